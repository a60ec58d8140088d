"""The documentation: generated pages are current, links lead somewhere, snippets are accepted, no page is an orphan."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

import xarch_kd
from xarch_kd.cli.app import COMMANDS, load_command
from xarch_kd.mapping_file.key_help import KEYS
from xarch_kd.mapping_file.load import parse_mapping
from xarch_kd.mapping_file.objectives import Align, Tokens
from xarch_kd.mapping_file.schema import Data, Evaluate, MappingFile, Model, Stage, Student
from xarch_kd.mapping_file.training import Optimizer, StageEvaluation
from xarch_kd.mapping_file.yaml_core import read_yaml
from xarch_kd.testing.docs_pages import DOCS, PAGES, markdown_of, page, signature
from xarch_kd.testing.docs_schema import sections
from xarch_kd.testing.examples import write_example_files

ROOT = DOCS.parent
FILES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(
    r"(?:<!--(?P<comment>[^>]*)-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
LANGUAGES = {"bash", "python", "pycon", "text", "yaml"}
PARTS: dict[str, Any] = {
    "teacher": Model,
    "student": Student,
    "data": Data,
    "stage": Stage,
    "align": Align,
    "tokens": Tokens,
    "evaluate": Evaluate,
    "evaluation": StageEvaluation,
    "optimizer": Optimizer,
}


class Snippet(NamedTuple):
    """One fenced block of a page, with the comment right above it."""

    page: str
    language: str
    text: str
    comment: str


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def snippets(language: str) -> list[Any]:
    """Return the blocks of a language, as parameters with short ids."""
    found = []
    for name in FILES:
        for number, each in enumerate(FENCE.finditer(text_of(name))):
            if each["language"] == language:
                snippet = Snippet(name, language, each["text"], (each["comment"] or "").strip())
                found.append(pytest.param(snippet, id=f"{name}-{number}"))
    return found


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "code", FENCE.sub("", text))


def slug(heading: str) -> str:
    """Return the anchor that Python-Markdown gives a heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(name: str) -> set[str]:
    text = text_of(name)
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {slug(heading) for heading in headings} | set(re.findall(r'id="([^"]+)"', text))


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for value in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(value)


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_yields(name: str) -> None:
    assert text_of(name) == page(name), "python -m xarch_kd.testing.docs_pages writes it anew"


def test_every_key_of_the_schema_has_a_meaning_and_no_meaning_is_left_over() -> None:
    found = sections()
    missing = [f"{part}.{key}" for part, keys in found.items() for key in keys if not help_of(part, key)]
    extra = [f"{part}.{key}" for part, keys in KEYS.items() if part != "*" for key in keys if key not in found[part]]
    assert (missing, extra) == ([], []), "the table is in xarch_kd/mapping_file/key_help.py"


def help_of(part: str, key: str) -> str | None:
    return KEYS.get(part, {}).get(key) or KEYS["*"].get(key)


def test_every_page_is_in_the_navigation_once() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    assert sorted(pages_of(project["nav"])) == FILES
    assert project["theme"]["font"] is False


@pytest.mark.parametrize("name", FILES)
def test_links_lead_to_pages_and_headings(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(name))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (DOCS / name).parent.joinpath(path).resolve() if path else DOCS / name
        page_name = found.relative_to(DOCS).as_posix() if found.is_relative_to(DOCS) else ""
        if page_name not in FILES or (anchor and anchor not in anchors(page_name)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", FILES)
def test_pictures_have_a_text_and_nothing_is_loaded_from_elsewhere(name: str) -> None:
    text = text_of(name)
    assert re.findall(r"!\[\s*\]", text) == []
    for drawing in re.findall(r"<(?:svg|img|pre)\b[^>]*>", text):
        assert re.search(r'(?:aria-label|alt)="[^"]{20,}"', drawing), drawing
    assert re.findall(r"<(?:script|iframe|link)\b|src=\"https?:", text) == []


def test_every_block_names_its_language() -> None:
    found = {(name, each["language"]) for name in FILES for each in FENCE.finditer(text_of(name))}
    assert {language for _, language in found} <= LANGUAGES, sorted(found)


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_a_mapping_file_or_its_part_is_accepted(snippet: Snippet) -> None:
    if not snippet.comment.startswith("part="):
        parsed, _ = parse_mapping(snippet.text, snippet.page)
        assert isinstance(parsed, MappingFile)
        return
    kind = PARTS[snippet.comment.removeprefix("part=")]
    value, _, problems = read_yaml(snippet.text, snippet.page)
    assert problems == []
    for one in value if isinstance(value, list | tuple) else [value]:
        kind.model_validate(one)


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python_compiles_and_imports_what_exists(snippet: Snippet) -> None:
    tree = ast.parse(snippet.text, snippet.page)
    compile(tree, snippet.page, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "xkd":
            assert hasattr(xarch_kd, node.attr), node.attr


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: a tiny teacher and a finished run."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_example_files()
        xarch_kd.train("mapping.yaml", "runs/first", console=Console(quiet=True))
    return folder


# The page on custom objects is run by test_readme.py, with its own mapping file.
@pytest.mark.parametrize("snippet", [one for one in snippets("python") if not str(one.id).startswith("custom-")])
def test_python_runs(snippet: Snippet, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    exec(compile(snippet.text, snippet.page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("snippet", snippets("bash"))
def test_commands_and_their_options_exist(snippet: Snippet) -> None:
    for line in snippet.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "xarch-kd" in words[:1]:
            words = words[1:]
        elif "xarch_kd" in words:
            words = words[words.index("xarch_kd") + 1 :]
        else:
            continue
        if words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, line
        check_options(words[0], words[1:])


def check_options(name: str, words: list[str]) -> None:
    command = load_command(name)
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert given <= known | {"--help", "--debug"}, f"{name}: {sorted(given - known)}"


def test_every_command_and_public_name_has_a_section() -> None:
    assert {f"## {name}" for name in COMMANDS} <= set(text_of("reference/cli.md").splitlines())
    named = "".join(text_of(name) for name in FILES if name.startswith("reference/"))
    modules = {"layer_mapping", "losses", "ops", "plots", "projectors"}
    expected = [f"## xkd.{name}" for name in xarch_kd.__all__ if name not in {*modules, "__version__"}]
    expected += [f"## xkd.{module}.{name}" for module in modules for name in getattr(xarch_kd, module).__all__]
    assert [heading for heading in expected if f"{heading}\n" not in named] == []


def test_docstrings_become_markdown() -> None:
    def function(first: int, /, second: str = "a", *rest: float, third: bool) -> None: ...

    text = "Return 2 * x < 3.\n\nRaises:\n    A: one\n        two.\n    B: three.\n\n>>> 1\n1\n\n    a + b"
    expected = "Return 2 \\* x &lt; 3.\n\n**Raises:**\n\n- A: one two.\n- B: three.\n\n```pycon\n>>> 1\n1\n```"
    assert markdown_of(text) == f"{expected}\n\n```text\na + b\n```\n"
    line = "name(first: int, second: str = 'a', *rest: float, third: bool) -> None"
    assert signature("name", function) == line
    broken = line.replace("(", "(\n    ").replace(", ", ",\n    ").replace(")", ",\n)")
    assert signature("a_longer_name", function) == broken.replace("name(", "a_longer_name(")
    assert signature("name", lambda self, *, first=1: None, on_one_line=True) == "name(*, first)"
