"""Generator of docs/families.md (`python -m xarch_kd.testing.families_page`); a test runs every row of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from xarch_kd.models.conversion.targets import Fit
from xarch_kd.models.gguf.architectures import LAYOUTS
from xarch_kd.models.serving import FROM_SOURCE, SERVERS, STUDENTS, Served
from xarch_kd.taps.sites import TAPS
from xarch_kd.testing.families import CONVERSIONS, SPECIMENS, ConversionSupport, Export, Row, Specimen, row_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
FITS: dict[Fit, str] = {"exact": "exact", "folded": "up to rounding", "frozen": "as initialization"}
TESTED_MEANS = "tested here with `make serve-check`"
ABOUT = f"""\
# Model types

Generated from the code by `python -m xarch_kd.testing.families_page`. A test builds the tiny model of every row, reads
the taps, applies the mixing, converts, and requests what is not supported. Numbers link to the reasons below, which are
the messages of the code. Run `xarch-kd plan` to see how your model's config affects this.

- **Mixers**: the token mixers of the blocks. **Taps**: {", ".join(f"`{tap}`" for tap in TAPS)}.
- **`mixing`**: the class of matrix (`xarch_kd.mixing`) that the tap returns for each kind of mixer.
- **mamba2**, **gated_delta**: the student classes for a teacher of this type with `mixer: mamba2` or
  `mixer: gated_delta`; in bold the one that `target: auto` selects. {FITS["exact"].capitalize()}: with all attention
  kept the logits are bitwise equal to the teacher's, and so is the output of a kept block for the same input.
  {FITS["folded"].capitalize()}: multipliers are folded into weights. {FITS["frozen"].capitalize()}: equal up to
  rounding only while a part stays frozen.
- **mamba_ssm**: support for export of the model, or of the student that it converts to, to
  `mamba_ssm.MambaLMHeadModel`.
- **Served by**: the servers that run a model of this type and config, and the student that `target: auto` selects. In
  bold: {TESTED_MEANS}; otherwise {FROM_SOURCE}.
"""
SERVING = f"""
## Servers

Releases: {", ".join(f"{server} {release}" for server, release in SERVERS.items())}.
In bold: {TESTED_MEANS}; the other entries are {FROM_SOURCE}. An option without an entry is
supported as its class is. For llama.cpp, `xarch-kd export --format gguf` refuses with the reason what it would not
compute.
"""


class Notes:
    """Numbered list of reasons, without duplicates."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> str:
        """Return the number of `text` as a link."""
        if text not in self.texts:
            self.texts.append(text)
        number = self.texts.index(text) + 1
        return f"[{number}](#{number})"


def page(row: Callable[[Specimen], Row] = row_of) -> str:
    """Return the page as Markdown, with the `row` of each specimen."""
    notes = Notes()
    header = ("Type", "Mixers", "Taps", "`mixing`", *CONVERSIONS, "mamba_ssm", "Served by")
    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line(_cells(row(specimen), notes)) for specimen in SPECIMENS.values()]
    servers = list(_servers(notes))
    texts = [f'{number}. <a id="{number}"></a>{_sentence(text)}' for number, text in enumerate(notes.texts, 1)]
    return "\n".join([ABOUT, *lines, SERVING, *servers, "\n## Reasons\n", *texts, ""])


def _cells(row: Row, notes: Notes) -> Sequence[str]:
    name, *fields = row.name.split(", ")
    name = ", ".join([f"`{name}`", *(f"`{one}`" for one in fields)])
    conversions = [
        _conversions({target: row.conversions[mixer, target] for target in targets}, notes)
        for mixer, targets in CONVERSIONS.items()
    ]
    return (
        name,
        ", ".join(row.mixers),
        _taps(row.missing, notes),
        _mixings(row, notes),
        *conversions,
        _export(row.export, notes),
        _served(row.served, notes),
    )


def _taps(missing: Mapping[str, str], notes: Notes) -> str:
    if not missing:
        return "all"
    return "all but " + ", ".join(f"`{tap}` {notes.number(reason)}" for tap, reason in missing.items())


def _mixings(row: Row, notes: Notes) -> str:
    served = [f"{mixer}: {kind}" if len(row.mixers) > 1 else kind for mixer, kind in row.mixings.items()]
    refused = [
        f"{mixer}: no {notes.number(reason)}" if len(row.mixers) > 1 else f"no {notes.number(reason)}"
        for mixer, reason in row.unread.items()
    ]
    return ", ".join([*served, *refused])


def _conversions(conversions: Mapping[str, ConversionSupport], notes: Notes) -> str:
    """Return the cell of a mixer; targets of equal outcome are grouped, unnamed if all are refused for one reason."""
    together: dict[str, list[str]] = {}
    for target, conversion in conversions.items():
        outcome = _outcome(conversion, notes)
        together.setdefault(outcome, []).append(f"**{target}**" if conversion.chosen else target)
    if len(together) == 1 and all(conversion.fit is None for conversion in conversions.values()):
        return next(iter(together))
    return "; ".join(f"{', '.join(targets)}: {outcome}" for outcome, targets in together.items())


def _outcome(conversion: ConversionSupport, notes: Notes) -> str:
    if conversion.fit is None:
        return f"no {notes.number(conversion.reason or '')}"
    notes_of = [*conversion.notes, *([conversion.all_kept] if conversion.all_kept else [])]
    return " ".join([FITS[conversion.fit], *(notes.number(text) for text in notes_of)])


def _export(export: Export, notes: Notes) -> str:
    if export.reason is not None:
        return f"no {notes.number(export.reason)}"
    outcome = "yes" if export.by_way_of is None else f"by way of {export.by_way_of}"
    return outcome if export.rescaled is None else f"{outcome} {notes.number(export.rescaled)}"


def _served(served: Mapping[str, Mapping[str, Served]], notes: Notes) -> str:
    """Return the cell of the servers: those that run each class, then those that do not."""
    cells = []
    for model_type, row in served.items():
        runs = [_server(server, one, notes) for server, one in row.items() if one.runs]
        refuses = [_server(server, one, notes) for server, one in row.items() if not one.runs]
        parts = [*([", ".join(runs)] if runs else []), *([f"not {', '.join(refuses)}"] if refuses else [])]
        cells.append(f"{model_type}: {', '.join(parts)}")
    return "; ".join(cells) or "-"


def _server(server: str, one: Served, notes: Notes) -> str:
    name = f"**{server}**" if one.tested else server
    return f"{name} {notes.number(one.note)}" if one.note else name


def _servers(notes: Notes) -> Iterator[str]:
    """Yield the lines of the table of student classes and their options."""
    header = ("Student class, option", *SERVERS)
    yield _line(header)
    yield _line(["---"] * len(header))
    for model_type, row in STUDENTS.items():
        architecture = LAYOUTS[model_type].architecture if model_type in LAYOUTS else None
        gguf = f"as GGUF, `{architecture}`" if architecture else "no"
        yield _line([f"`{model_type}`", *(_support(one, notes) for one in row.servers.values()), gguf])
        for option in row.options:
            cells = (_support(option.servers[server], notes) if server in option.servers else "" for server in SERVERS)
            yield _line([f"`{model_type}`, {option.name}", *cells])


def _support(one: Served, notes: Notes) -> str:
    outcome = "yes" if one.runs else "no"
    outcome = f"**{outcome}**" if one.tested else outcome
    return f"{outcome} {notes.number(one.note)}" if one.note else outcome


def _sentence(text: str) -> str:
    # A name keeps its case.
    first = text[0] if any(sign in text.split()[0] for sign in "_.-") or text.startswith("vLLM") else text[0].upper()
    return f"{first}{text[1:].rstrip('.')}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
