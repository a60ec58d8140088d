"""Compilation of every shipped configuration without a GPU, with its registers, spills and shared memory.

    python -m xarch_kd.kernels.compile            # compare with the committed table
    python -m xarch_kd.kernels.compile --write    # rewrite the table
    python -m xarch_kd.kernels.compile --changed  # of files as they were when the table was written, only a sample
    python -m xarch_kd.kernels.compile mixing_distance ssd    # only labels that contain every word

A kernel file ships the configurations in its module-level tuple `SPECIMENS` (of `tiles.Specimen`). The table is
`resources.json`, and `resources.md` for reading; both name the release of triton that compiled them. The table has a
hash of each file too: of the same sources and by the same release, its figures hold.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PACKAGE = "xarch_kd.kernels"
TABLE = FOLDER / "resources.json"
PAGE = FOLDER / "resources.md"
PROCESSES = 2
# So few take less time in this process than others take to load torch.
FEW = 8
# Of a table that holds, one configuration of this many is compiled: no multiple of the three targets, so some of each.
SAMPLE_EVERY = 55

# Limits of the hardware: bytes of shared memory per program, registers per thread (AMD: vector and accumulator
# registers together).
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}
REGISTER_LIMIT = {"sm_80": 255, "sm_90": 255, "gfx942": 512}

Row = dict[str, int]
_IMPORTS = re.compile(r"^(?:from|import) xarch_kd\.kernels(.*)$", re.MULTILINE)


def specimens(words: Sequence[str] = ()) -> dict[str, tuple[str, int, str]]:
    """Return every shipped configuration: `file/label/target` -> (file, index in its SPECIMENS, target).

    With `words`, only configurations whose name contains every word. If a word is a file's name, only such files are
    loaded.
    """
    found: dict[str, tuple[str, int, str]] = {}
    files = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != Path(__file__).stem]
    for file in [file for file in files if file in words] or files:
        for place, specimen in enumerate(_specimens_of(file)):
            for target in specimen.targets:
                name = f"{file}/{specimen.label}/{target}"
                if name in found:
                    raise ValueError(f"two specimens are called {name}")
                found[name] = (file, place, target)
    return {name: where for name, where in found.items() if all(word in name for word in words)}


def compile_all(chosen: Mapping[str, tuple[str, int, str]]) -> dict[str, Row]:
    """Compile the chosen configurations, many of them in two processes, and return the resources of each."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if len(chosen) <= FEW:
            return {name: _compile(where) for name, where in chosen.items()}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            rows = pool.map(_compile, chosen.values())
            return dict(zip(chosen, rows, strict=True))


def problems(
    chosen: Mapping[str, tuple[str, int, str]], rows: Mapping[str, Row], table: Mapping[str, Any], whole: bool = True
) -> list[str]:
    """Return the problems of the compiled `rows` of `chosen`, one line each.

    A spill that the specimen does not allow, and more than the hardware has, are problems under any release of triton.
    More registers, spills or shared memory than in the committed `table` are problems only under the release that wrote
    it. `whole`: `chosen` holds every configuration, so that entries of the table without a configuration are problems
    too.
    """
    import triton

    lines: list[str] = []
    bounds: Mapping[str, Row] = table.get("configurations", {})
    same = table.get("triton") == triton.__version__
    for name, row in rows.items():
        module, place, target = chosen[name]
        if row["spills"] and target not in _specimens_of(module)[place].may_spill:
            lines.append(f"{name}: spills {row['spills']}")
        for what, limit in (("registers", REGISTER_LIMIT[target]), ("shared", SHARED_LIMIT[target])):
            if row[what] > limit:
                lines.append(f"{name}: {what} {row[what]}, and {target} has {limit}")
        if name not in bounds:
            lines.append(f"{name}: not in {TABLE.name}")
        elif same:
            lines += [
                f"{name}: {key} {row[key]}, bound {most}" for key, most in bounds[name].items() if row[key] > most
            ]
    if whole:
        lines += [f"{name}: in {TABLE.name} but not shipped" for name in bounds if name not in rows]
    return lines


def sources_hash(file: str) -> str:
    """Return the SHA-256 of a kernel file, of those that it imports, and of this one."""
    wanted, found = [file, Path(__file__).stem], set[str]()
    while wanted:
        name = wanted.pop()
        if name not in found and (FOLDER / f"{name}.py").is_file():
            found.add(name)
            if name != Path(__file__).stem:
                wanted += re.findall(r"\w+", " ".join(_IMPORTS.findall((FOLDER / f"{name}.py").read_text())))
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\0".encode() + (FOLDER / f"{name}.py").read_bytes() + b"\0")
    return digest.hexdigest()


def compiled_files(table: Mapping[str, Any]) -> set[str]:
    """Return the files whose rows of the table were written from them as they are, by the triton that is installed."""
    import triton

    if table.get("triton") != triton.__version__:
        return set()
    return {file for file, written in table.get("sources", {}).items() if written == sources_hash(file)}


def changed(chosen: Mapping[str, tuple[str, int, str]], table: Mapping[str, Any]) -> dict[str, tuple[str, int, str]]:
    """Return the configurations of files that changed since the table was written, and a sample of the others."""
    known = compiled_files(table)
    same = sorted(name for name, (file, _, _) in chosen.items() if file in known)[::SAMPLE_EVERY]
    return {name: chosen[name] for name in sorted(chosen) if name in same or chosen[name][0] not in known}


def _specimens_of(module: str) -> tuple[Any, ...]:
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), "SPECIMENS", ())


def _compile(where: tuple[str, int, str]) -> Row:
    """Compile one configuration."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, place, target = where
    specimen = _specimens_of(module)[place]
    names = specimen.kernel.arg_names
    types = {name: specimen.signature[name].split(":") for name in names if name in specimen.signature}
    signature = {name: types[name][0] if name in types else "constexpr" for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", int(parts[1])]] for name, parts in types.items() if len(parts) > 1
    }
    source = ASTSource(specimen.kernel, signature, dict(specimen.constexprs), attributes)
    back_end = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=back_end, options=options)
    read = _read_cubin if target.startswith("sm_") else _read_amd
    return {**read(compiled.asm), "shared": compiled.metadata.shared}


def _read_cubin(assembly: Mapping[str, Any]) -> Row:
    """Return registers and bytes of stack per thread: a kernel without local arrays uses its stack only for spills."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {"registers": _number(r"\bREG:(\d+)", text), "spills": _number(r"\bSTACK:(\d+)", text)}


def _read_amd(assembly: Mapping[str, Any]) -> Row:
    """Return vector registers (accumulators included) and bytes of scratch memory per lane, from the object's notes.

    A scalar register spills to a lane of a vector register, which is included in the registers and takes no memory.
    """
    text = assembly["amdgcn"]
    spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return {"registers": _number(r"\.vgpr_count:\s*(\d+)", text), "spills": spills}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} is not in the compiler's output")
    return int(found[1])


def _page(rows: Mapping[str, Row], version: str) -> str:
    lines = [
        "# Resources of the kernels",
        "",
        f"Compiled by triton {version}, without a GPU; written by `python -m {PACKAGE}.compile --write`. Registers per",
        "thread; memory for spilled registers in bytes per thread; shared memory in bytes per program.",
        "",
        "| configuration | registers | spills | shared |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {name} | {row['registers']} | {row['spills']} | {row['shared']} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _write(rows: Mapping[str, Row], known: Mapping[str, Any]) -> dict[str, Any]:
    """Write `rows` and those of the table `known` that are not among them."""
    import triton

    every = specimens()
    whole = {file for file, _, _ in every.values()}
    whole -= {file for name, (file, _, _) in every.items() if name not in rows}
    table = {
        "triton": triton.__version__,
        "sources": {**known.get("sources", {}), **{file: sources_hash(file) for file in sorted(whole)}},
        "configurations": dict(sorted({**known.get("configurations", {}), **rows}.items())),
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    PAGE.write_text(_page(table["configurations"], triton.__version__))
    return table


def main(arguments: Iterable[str] | None = None) -> int:
    """Compile, print one line per configuration, and return 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.compile", description="Compile the kernels.")
    parser.add_argument("words", nargs="*", help="only configurations whose name contains every word")
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument(
        "--changed", action="store_true", help="only a sample of files that have not changed since the table"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    # The interpreter replaces the kernels by functions that cannot be compiled.
    os.environ["TRITON_INTERPRET"] = "0"
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    chosen = specimens(options.words)
    if options.changed:
        chosen = changed(chosen, known)
    rows = compile_all(chosen)
    for name, row in rows.items():
        print(f"{name:<72} {row['registers']:>4} registers {row['spills']:>5} spills {row['shared']:>7} shared")
    is_whole = not options.words and not options.changed
    if options.write:
        known = _write(rows, {} if is_whole else known)
    wrong = problems(chosen, rows, known, whole=is_whole)
    print("\n".join(wrong) if wrong else f"{len(rows)} configurations, nothing wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
