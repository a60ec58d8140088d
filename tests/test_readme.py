"""Every command and snippet of README.md, run on a tiny teacher in a folder of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from xarch_kd.cli.app import main
from xarch_kd.testing.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"(?:<!--(?P<comment>[^>]*)-->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
# README's figures are those of a real teacher; here only that each line runs counts.
SMALLER = (
    (r"steps: \d+", "steps: 2"),
    (r"sequence_length: \d+", "sequence_length: 32"),
    (r"tokens: \d+", "tokens: 128"),
)


class Block(NamedTuple):
    """One fenced block, with the HTML comment right above it."""

    language: str
    text: str
    comment: str


def blocks(page: str = "README.md") -> list[Block]:
    found = FENCE.finditer((ROOT / page).read_text())
    return [Block(each["language"], each["text"], (each["comment"] or "").strip()) for each in found]


RUN_HERE = [block for block in blocks() if not block.comment.startswith("run elsewhere:")]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what README's lines name: a tiny teacher and README's own mapping file, made smaller."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny_model("llama", num_hidden_layers=4).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    (mapping,) = [block.text for block in RUN_HERE if block.language == "yaml"]
    for pattern, smaller in SMALLER:
        mapping = re.sub(pattern, smaller, mapping)
    (folder / "mapping.yaml").write_text(mapping)
    return folder


def test_every_block_is_run_or_says_where() -> None:
    assert {block.language for block in RUN_HERE} == {"bash", "python", "yaml"}
    for block in blocks():
        if block.comment.startswith("run elsewhere:"):
            assert len(block.comment.removeprefix("run elsewhere:").strip()) > 20, block.text
        else:
            assert block.language in ("bash", "python", "yaml"), block.text


def test_the_mapping_file_is_valid_as_printed(workshop: Path) -> None:
    from xarch_kd.mapping_file.load import parse_mapping

    (mapping,) = [block.text for block in RUN_HERE if block.language == "yaml"]
    parsed, _ = parse_mapping(mapping, "README.md")
    assert [stage.name for stage in parsed.stages] == ["mixers", "logits"]


# Blocks run in README's order, in one folder, as a reader would run them.
@pytest.mark.parametrize("block", [pytest.param(block, id=block.text.splitlines()[0][:40]) for block in RUN_HERE])
def test_block_runs(block: Block, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    if block.language == "bash":
        for line in block.text.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "xarch-kd", f"{line}: mark the block with <!-- run elsewhere: why -->"
            assert main(arguments) == 0, line
    elif block.language == "python":
        exec(compile(block.text, "README.md", "exec"), {"__name__": "__main__"})


def test_the_page_on_custom_objects_runs(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping, example = blocks("docs/custom-objectives.md")
    for pattern, smaller in SMALLER:
        mapping = mapping._replace(text=re.sub(pattern, smaller, mapping.text))
    (tmp_path / "mapping.yaml").write_text(mapping.text.replace("./teacher", str(workshop / "teacher")))
    monkeypatch.chdir(tmp_path)
    exec(compile(example.text, "docs/custom-objectives.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "runs/mine/projectors.safetensors").is_file()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
