"""Every shipped kernel configuration compiles without a GPU, within the committed table, without forbidden spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xarch_kd.kernels import compile as gate

ROOT = Path(__file__).resolve().parents[2]
ROW = {"registers": 100, "spills": 0, "shared": 1024}
NAME = "linear_divergence/jsd/fp32-bf16/full/sm_90"


@pytest.mark.timeout(1500)
def test_every_configuration_compiles_within_its_bounds() -> None:
    """All of them where a kernel or triton changed, else a sample: the table is then what compiling them gives."""
    # The interpreter of the other tests is chosen when triton is imported, so compiling needs a process of its own.
    command = [sys.executable, "-m", "xarch_kd.kernels.compile", "--changed"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compiled = [line for line in done.stdout.splitlines() if " registers " in line]
    table = json.loads(gate.TABLE.read_text())
    assert [line.split()[0] for line in compiled] == list(gate.changed(gate.specimens(), table))


def test_files_that_changed_and_all_files_under_another_triton_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = gate.specimens()
    files = {file for file, _, _ in every.values()}
    table = json.loads(gate.TABLE.read_text()) | {"sources": {file: gate.sources_hash(file) for file in files}}
    sample = gate.changed(every, table)
    assert len(sample) == -(-len(every) // gate.SAMPLE_EVERY)
    assert {name.split("/")[-1] for name in sample} == gate.SHARED_LIMIT.keys()
    assert {name.split("/")[0] for name in sample} == files
    assert gate.changed(every, {**table, "triton": "0.0.0"}) == gate.changed(every, {}) == dict(sorted(every.items()))
    for path in gate.FOLDER.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(gate, "FOLDER", tmp_path)
    assert gate.compiled_files(table) == files
    (tmp_path / "projected_distance.py").write_text("# changed")
    assert gate.compiled_files(table) == files - {"projected_distance"}
    # Others import it.
    (tmp_path / "mixing_ssd.py").write_text("# changed")
    assert gate.compiled_files(table) == files - {"projected_distance", "mixing_specimens"}
    (tmp_path / "compile.py").write_text("# changed")
    assert gate.compiled_files(table) == set()


def test_the_table_has_every_kernel_and_target_and_the_page_says_the_same() -> None:
    table = json.loads(gate.TABLE.read_text())
    rows = table["configurations"]
    assert rows.keys() == gate.specimens().keys()
    for target in gate.SHARED_LIMIT:
        for operation in ("linear_divergence", "mixing", "projected_distance"):
            assert any(name.startswith(operation) and name.endswith(target) for name in rows)
    page = gate.PAGE.read_text()
    assert f"triton {table['triton']}" in page
    cells = re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert {name: tuple(map(int, numbers)) for name, *numbers in cells} == {
        name: (row["registers"], row["spills"], row["shared"]) for name, row in rows.items()
    }


def test_only_sm_80_and_the_widest_heads_spill() -> None:
    for name, row in json.loads(gate.TABLE.read_text())["configurations"].items():
        if name.endswith("gfx942") or name.startswith(("linear_divergence", "projected_distance")):
            assert row["spills"] == 0 or name.endswith("sm_80"), name


def _problems(row: dict[str, int], bounds: dict[str, Any], *, whole: bool = False, triton: str | None = None) -> str:
    import triton as installed

    table = {"triton": triton or installed.__version__, "configurations": bounds}
    return "\n".join(gate.problems(gate.specimens(["linear_divergence"]), {NAME: row}, table, whole))


def test_nothing_is_wrong_with_a_row_at_its_bounds() -> None:
    assert _problems(ROW, {NAME: ROW}, whole=True) == ""
    assert _problems({**ROW, "registers": 80}, {NAME: ROW}) == ""


@pytest.mark.parametrize("what", ["registers", "shared"])
def test_more_than_the_table_says_is_refused(what: str) -> None:
    assert f"{what} {ROW[what] + 1}, bound {ROW[what]}" in _problems({**ROW, what: ROW[what] + 1}, {NAME: ROW})
    assert _problems({**ROW, what: ROW[what] + 1}, {NAME: ROW}, triton="0.0.0") == ""


def test_spills_limits_and_missing_rows_are_refused_under_any_triton() -> None:
    assert "spills 8" in _problems({**ROW, "spills": 8}, {NAME: ROW}, triton="0.0.0")
    assert "sm_90 has 255" in _problems({**ROW, "registers": 256}, {NAME: ROW}, triton="0.0.0")
    assert "sm_90 has 232448" in _problems({**ROW, "shared": 232449}, {NAME: ROW}, triton="0.0.0")
    assert "not in resources.json" in _problems(ROW, {}, triton="0.0.0")
    assert "gone: in resources.json but not shipped" in _problems(ROW, {NAME: ROW, "gone": ROW}, whole=True)


def test_amd_figures_are_read_from_the_notes() -> None:
    notes = (
        "    .private_segment_fixed_size: 12\n    .sgpr_count: 20\n    .sgpr_spill_count: 2\n    .vgpr_count:     96\n"
    )
    assert gate._read_amd({"amdgcn": notes}) == {"registers": 96, "spills": 12}
    with pytest.raises(ValueError, match="private_segment_fixed_size"):
        gate._read_amd({"amdgcn": "nothing"})
