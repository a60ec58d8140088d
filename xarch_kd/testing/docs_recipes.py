"""Pages of the shipped mapping files and of what was recorded, generated from `mappings/` and `benchmarks/results/`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Recorded tables, in the order of the page.
TABLES: Final = ("recipes", "selection", "strategies-cpu", "gains-cpu", "serving-cpu", "serving-demo-cpu")
# Heading of a table whose file has none.
TITLES: Final = {"gains-cpu": "Cache and state of one sequence"}
ABOUT = """\
# Recipes

Every file in `mappings/` of the repository runs, and can be copied and changed. For each: what it does, what it reads,
and what was recorded. A recipe without a recorded result was run on tiny models by the tests only, or recorded before
its file changed; no figure is given for it.

Tokens are those that a stage reads with its own settings: steps times rows times sequence length. The repository's
`benchmarks/recipes.py` measures the demo, and [the results](results.md) have all tables.
"""
RESULTS_ABOUT = """\
# Recorded results

The tables are those of `benchmarks/results` in the repository, written by the programs that their first lines name.
[Background](background.md) has what follows from them. Negative results are kept.
"""


def recipes_page() -> str:
    """Return the page of the shipped mapping files."""
    return "\n".join([ABOUT, *(_recipe(path) for path in sorted((ROOT / "mappings").glob("*.yaml")))])


def results_page() -> str:
    """Return the page of recorded tables."""
    return "\n".join([RESULTS_ABOUT, *(_table(name) for name in TABLES if (RESULTS / f"{name}.md").is_file())])


def demo_page() -> str:
    """Return README's section on the demo as a page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## Demo\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("README.md has no section `Demo`")
    body = re.sub(r"<!-- (?!part=)[^>]*-->\n", "", found[1])
    # Pages of the site stand for what README links to in the repository.
    body = re.sub(r"\]\(mappings/[^)]*\)", "](reference/mapping-file.md)", body)
    return "# Demo\n" + re.sub(r"\]\(benchmarks/results/[^)]*\)", "](results.md)", body)


def _recipe(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    about = []
    for line in lines[1:]:
        if not line.startswith("#"):
            break
        about.append(line.removeprefix("#").strip())
    body = "\n".join(line for line in lines if not line.startswith("#"))
    facts = "\n".join(_facts(yaml.safe_load(text)))
    return "\n".join(
        [
            f"## {path.stem}\n",
            " ".join(about) + "\n",
            facts + "\n",
            _recorded(path) + "\n",
            f"```yaml\n{body}\n```\n",
        ]
    )


def _facts(mapping: dict[str, Any]) -> Iterator[str]:
    """Yield what each stage reads."""
    data = mapping["data"]
    length = data.get("sequence_length", 512)
    yield "| stage | steps | tokens | of them different | trains |"
    yield "|---|---|---|---|---|"
    for stage in mapping["stages"]:
        rows = stage.get("batch_size", data.get("batch_size", 4)) * stage.get("gradient_accumulation", 1)
        tokens = stage["steps"] * rows * length
        different = min(stage.get("batches", stage["steps"]) * rows * length, tokens)
        trains = ", ".join(str(part) for part in stage["train"])
        yield f"| {stage['name']} | {stage['steps']:,} | {tokens:,} | {different:,} | {trains} |"


def _recorded(path: Path) -> str:
    """Return what was recorded of a file: nothing, a table, or a table of an earlier version."""
    text = (RESULTS / "recipes.md").read_text(encoding="utf-8")
    found = re.search(r"from `([^`]+)` \(SHA-256 `(\w+)`\)", text)
    if found is None or found[1] != path.name:
        return "Recorded: no result of this file."
    is_current = hashlib.sha256(path.read_bytes()).hexdigest().startswith(found[2])
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    state = "this file" if is_current else f"an earlier version of this file (SHA-256 `{found[2]}`), not of this one"
    return f"Recorded of {state}; gaps are student - teacher in nats per token:\n\n{_first_table(table)}"


def _first_table(rows: str) -> str:
    """Return the first of the tables, which ends where a second header begins."""
    lines = rows.splitlines()
    second = next((index for index in range(2, len(lines)) if lines[index].startswith("|---")), None)
    return "\n".join(lines if second is None else lines[: second - 1])


def _table(name: str) -> str:
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()
    if not text.startswith("# "):
        text = f"# {TITLES.get(name, name)}\n\n{text}"
    return re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE) + "\n"
