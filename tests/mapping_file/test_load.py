from __future__ import annotations

from pathlib import Path

import pytest

from xarch_kd.errors import MappingFileError
from xarch_kd.mapping_file.load import load_mapping, parse_mapping
from xarch_kd.mapping_file.read import MAXIMUM_BYTES


def problems(text: str) -> list[str]:
    with pytest.raises(MappingFileError) as caught:
        parse_mapping(text, "map.yaml")
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def test_a_good_file_loads_with_its_text_and_positions(tmp_path: Path, good: str) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(good)
    mapping, source, source_map = load_mapping(path)
    assert source == good
    assert mapping.stages[0].optimizer.lr == 0.01
    assert mapping.stages[0].align[0].loss.kind == "relative_mse"
    position = source_map.position(("stages", 0, "align", 0, "loss", "kind"))
    assert good.splitlines()[position.line - 1][position.column - 1 :].startswith("relative_mse")


def test_unknown_key_with_suggestion_line_and_caret(good: str) -> None:
    assert problems(good.replace("        tap: mixer_output", "        tap: mixer_output\n        tapp: hidden")) == [
        "map.yaml:22:9: stages[0].align[0].tapp: unknown key. Did you mean 'tap'?\n"
        "   22 |         tapp: hidden\n"
        "      |         ^"
    ]


def test_all_problems_are_told_at_once_in_the_order_of_the_file(good: str) -> None:
    text = (
        good.replace("seed: 0", "seed: zero\nsede: 0").replace("steps: 4", "steps: -4").replace("bfloat16", "bfloat61")
    )
    heads = [problem.splitlines()[0] for problem in problems(text)]
    assert heads == [
        "map.yaml:4:10: teacher.dtype: 'bfloat61' is not float32 | bfloat16 | float16 | auto. Did you mean 'bfloat16'?",
        "map.yaml:13:7: seed: must be a whole number, found 'zero'.",
        "map.yaml:14:1: sede: unknown key. Did you mean 'seed'?",
        "map.yaml:17:12: stages[0].steps: must be at least 1, found the number -4",
    ]


# Each case: what is replaced in the good file, by what, and the whole first line of the one problem.
CASES = {
    "mixing with a feature loss": (
        "tap: mixer_output",
        "tap: mixing",
        "map.yaml:20:9: stages[0].align[0]: the loss 'relative_mse' does not fit the tap 'mixing', which is compared "
        "by relation | attention_bridge | mixing | custom",
    ),
    "mixing with a projector": (
        "tap: mixer_output\n        layers: replaced\n        loss: {kind: relative_mse, weight: 1.0}",
        "tap: mixing\n        layers: replaced\n        projector: linear",
        "map.yaml:20:9: stages[0].align[0]: the loss 'mixing' takes no projector; unequal heads are bridged by "
        "loss: {heads: …}",
    ),
    "a distance that does not exist": (
        "tap: mixer_output\n        layers: replaced\n        loss: {kind: relative_mse, weight: 1.0}",
        "tap: mixing\n        layers: replaced\n        loss: {kind: mixing, distance: cosin}",
        "map.yaml:23:40: stages[0].align[0].loss.distance: 'cosin' is not cosine | frobenius | relative_frobenius | kl "
        "| cross_entropy. Did you mean 'cosine'?",
    ),
    "a divergence that does not exist": (
        "divergence: forward_kl",
        "divergence: forwardkl",
        "map.yaml:29:26: stages[1].tokens.divergence: 'forwardkl' is not forward_kl | reverse_kl | jsd | "
        "skew_forward_kl | skew_reverse_kl | total_variation | alpha | renyi | alpha_beta | entropy_aware | "
        "adaptive_kl, or a mapping with a 'kind'. Did you mean 'forward_kl'?",
    ),
    "beta out of range": (
        "divergence: forward_kl",
        "divergence: {kind: jsd, beta: 1.5}",
        "map.yaml:29:44: stages[1].tokens.divergence.beta: must be at most 1, found the number 1.5",
    ),
    "a parameter of another divergence": (
        "divergence: forward_kl",
        "divergence: {kind: jsd, alpha: 0.5}",
        "map.yaml:29:38: stages[1].tokens.divergence.alpha: unknown key. Allowed here: kind, beta, normalised",
    ),
    "foreign key of a loss": (
        "{kind: relative_mse, weight: 1.0}",
        "{kind: cosine, epsilon: 1e-6}",
        "map.yaml:23:30: stages[0].align[0].loss.epsilon: unknown key. Allowed here: kind, weight, standardize",
    ),
    "the old spelling of a loss's key": (
        "{kind: relative_mse, weight: 1.0}",
        "{kind: cosine, standardise: true}",
        "map.yaml:23:30: stages[0].align[0].loss.standardise: the key 'standardise' is now spelled 'standardize'.",
    ),
    "the old spelling of a projector's key": (
        "layers: replaced",
        "layers: replaced\n        projector: {kind: linear, initialise: pca}",
        "map.yaml:23:35: stages[0].align[0].projector.initialise: the key 'initialise' is now spelled 'init'.",
    ),
    "the old spelling of an MLP's inner size": (
        "layers: replaced",
        "layers: replaced\n        projector: {kind: mlp, width: 8}",
        "map.yaml:23:32: stages[0].align[0].projector.width: the key 'width' is now spelled 'hidden'.",
    ),
    "the old spelling of the kernel to use": (
        "tap: mixer_output\n        layers: replaced\n        loss: {kind: relative_mse, weight: 1.0}",
        "tap: mixing\n        layers: replaced\n        loss: {kind: mixing, implementation: fused}",
        "map.yaml:23:30: stages[0].align[0].loss.implementation: the key 'implementation' is now spelled 'impl'.",
    ),
    "the old spelling of a conversion's key": (
        "mixer: mamba2",
        "mixer: mamba2\n    initialisation: random",
        "map.yaml:8:5: student.convert.initialisation: the key 'initialisation' is now spelled 'init'.",
    ),
    "unknown kind": (
        "kind: relative_mse",
        "kind: relative_mes",
        "map.yaml:23:22: stages[0].align[0].loss.kind: 'relative_mes' is not mse | relative_mse | cosine | "
        "normalised_mse | huber | l2 | cka | gram | relation | attention_bridge | mixing | custom. Did you mean "
        "'relative_mse'?",
    ),
    "loss without a kind": (
        "{kind: relative_mse, weight: 1.0}",
        "{weight: 1.0}",
        "map.yaml:23:15: stages[0].align[0].loss.kind: required key is missing. It must be mse | relative_mse | cosine"
        " | normalised_mse | huber | l2 | cka | gram | relation | attention_bridge | mixing | custom.",
    ),
    "loss as a word": (
        "{kind: relative_mse, weight: 1.0}",
        "cosine",
        "map.yaml:23:15: stages[0].align[0].loss: must be a mapping with a 'kind', found 'cosine'.",
    ),
    "wrong strategy": (
        "layers: replaced",
        "layers: repalced",
        "map.yaml:22:17: stages[0].align[0].layers: 'repalced' is not same | replaced | uniform | uniform_endpoints | "
        "uniform_begin | first | last | block_average | type_aware | cka | reverse | monotone | optimal_transport | "
        "all_to_one | random | learned, or a mapping with a 'strategy', or a list of {student, teacher, weight} "
        "entries. Did you mean 'replaced'?",
    ),
    "one pair misspelt": (
        "layers: replaced",
        "layers: [{student: 1, teach: 1}, {student: 0, teacher: 0}]",
        "map.yaml:22:31: stages[0].align[0].layers[0].teach: unknown key. Did you mean 'teacher'?",
    ),
    "a number where text is due": (
        "model: ./teacher",
        "model: ./teacher\n  revision: 0123456",
        "map.yaml:4:13: teacher.revision: must be text, found the number 123456. Put it in quotes: '0123456'.",
    ),
    "text where a number is due": (
        "lr: 1e-2",
        "lr: 1e-2x",
        "map.yaml:24:21: stages[0].optimizer.lr: must be a number, found '1e-2x'.",
    ),
    "a word where a list is due": (
        "train: [mixers]\n    inputs",
        "train: mixers\n    inputs",
        "map.yaml:17:12: stages[0].train: must be a list, found 'mixers'. Write a list: [mixers].",
    ),
    "an infinite number": (
        "lr: 1e-2",
        "lr: .inf",
        "map.yaml:24:21: stages[0].optimizer.lr: must be a finite number",
    ),
    "two sources of a student": (
        "student:\n",
        "student:\n  model: ./student\n",
        "map.yaml:5:1: student: exactly one of model | config | convert must be given, found model and convert",
    ),
    "two texts": (
        "{builtin: licences}",
        "{builtin: licences, files: [a.txt]}",
        "map.yaml:32:10: evaluate.also[0]: exactly one of builtin | files | dataset must be given, "
        "found builtin and files",
    ),
    "neither keep_attention nor replace": (
        "    keep_attention: every 2\n",
        "",
        "map.yaml:6:3: student.convert: exactly one of keep_attention | replace must be given, "
        "e.g. keep_attention: every 4, or replace: {strategy: sensitivity, budget: 0.5}",
    ),
    "a budget of no layer": (
        "every 2",
        "{budget: 0}",
        "map.yaml:8:5: student.convert.keep_attention: budget must be at least 1 layer, found 0: for no layer at all "
        "write none",
    ),
    "a budget of bytes without a unit": (
        "every 2",
        "{budget: {cache_bytes: '64', at_context: 4096}}",
        "map.yaml:8:31: student.convert.keep_attention.budget.cache_bytes: '64' is not a size: write a number with B, "
        "KiB, MiB or GiB, e.g. 64MiB",
    ),
    "a strategy that is not there": (
        "every 2",
        "{strategy: logits, budget: 1}",
        "map.yaml:8:32: student.convert.keep_attention.strategy: 'logits' is not sensitivity | one_in | greedy | gates "
        "| window | uniform | random.",
    ),
    "a key that a strategy does not have": (
        "every 2",
        "{strategy: uniform, budget: 1, tokens: 64}",
        "map.yaml:8:5: student.convert.keep_attention: strategy: uniform has no tokens: leave it out",
    ),
    "stage without an objective": (
        "    tokens: {divergence: forward_kl}\n",
        "",
        "map.yaml:26:5: stages[1]: a stage needs at least one objective: give align and/or tokens",
    ),
    "stage without steps": (
        "    steps: 2\n",
        "",
        "map.yaml:26:5: stages[1]: exactly one of steps | epochs must be given, e.g. steps: 100, found neither",
    ),
    "stage with steps and epochs": (
        "    steps: 2\n",
        "    steps: 2\n    epochs: 1\n",
        "map.yaml:26:5: stages[1]: exactly one of steps | epochs must be given, e.g. steps: 100, found both",
    ),
    "DeepSpeed": (
        "seed: 0\n",
        "seed: 0\ndeepspeed: ds.json\n",
        "map.yaml:14:1: deepspeed: not supported. Several processes train data-parallel: python -m "
        "torch.distributed.run --nproc-per-node 2 -m xarch_kd train FILE --output FOLDER. Less memory: "
        "gradient_checkpointing: true, optimizer: {optim: adafactor}, a smaller batch_size with gradient_accumulation",
    ),
    "LoRA": (
        "    mixer: mamba2\n    keep_attention: every 2\n",
        "    mixer: mamba2\n    keep_attention: every 2\n  lora: {r: 8}\n",
        "map.yaml:9:3: student.lora: not a key here. Name adapters in train of a stage: train: [{lora: {rank: 16, on: "
        "[attention, mlp]}}]",
    ),
    "two stages of one name": (
        "name: logits",
        "name: mixers",
        "map.yaml:1:1: stage names must differ, found twice: mixers",
    ),
    "version of another kind": (
        "version: 1",
        "version: true",
        "map.yaml:1:1: version: must be the number 1, the only version there is",
    ),
    "no is text": (
        "builtin: python-docs",
        "builtin: no",
        "map.yaml:10:12: data.builtin: 'no' is not python-docs | python-sources | framework-docs | licences | "
        "library-docs | copy.",
    ),
    "accidental dedent": (
        "teacher:\n  model: ./teacher\n  dtype: bfloat16\n",
        "teacher:\nmodel: ./teacher\n",
        "map.yaml:2:1: teacher: must be a mapping with keys among model, revision, tokenizer, dtype, quantization, "
        "paths, found nothing. If its entries follow, indent them further than this line; if it is not wanted, leave "
        "the key out.",
    ),
    "no stages": (
        "evaluate:",
        "stages: []\nevaluate:",
        "map.yaml:30:1: stages: given twice, first on line 14",
    ),
    "anchor": (
        "model: ./teacher",
        "model: &name ./teacher",
        "map.yaml:3:10: the anchor &name is not allowed. Write the value out where it is used.",
    ),
    "alias": (
        "builtin: licences",
        "builtin: *name",
        "map.yaml:32:20: the alias *name is not allowed. Write the value out again.",
    ),
    "tag": (
        "model: ./teacher",
        "model: !!python/object/apply:os.system ['true']",
        "map.yaml:3:10: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed: a mapping file holds "
        "plain values only.",
    ),
    "merge key": (
        "  model: ./teacher",
        "  <<: {model: ./teacher}\n  model: ./teacher",
        "map.yaml:3:3: teacher: merge keys (<<) are not allowed. Write the keys out.",
    ),
    "key that is no text": (
        "seed: 0",
        "1: 0",
        "map.yaml:13:1: a key must be text; put 1 in quotes",
    ),
    "huge integer": (
        "seed: 0",
        "seed: " + "9" * 5000,
        "map.yaml:13:7: seed: the number is too large: at most 9223372036854775807",
    ),
    "tab": (
        "  model: ./teacher",
        "\tmodel: ./teacher",
        "map.yaml:3:1: not valid YAML: while scanning for the next token, found character '\\t' that cannot start any "
        "token. Indent with spaces, not with tabs.",
    ),
    "control character": (
        "seed: 0",
        "seed: \x07",
        "map.yaml:13:7: the character U+0007 is not allowed in YAML",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case: str, good: str) -> None:
    old, new, first_line = CASES[case]
    assert good.count(old) >= 1
    assert first_line in [problem.splitlines()[0] for problem in problems(good.replace(old, new, 1))]


def test_a_required_key_under_a_wrong_name_is_one_problem(good: str) -> None:
    found = problems(good.replace("        tap: mixer_output", "        tapp: mixer_output"))
    assert [problem.splitlines()[0] for problem in found] == [
        "map.yaml:21:9: stages[0].align[0].tapp: unknown key. Did you mean 'tap'?"
    ]


def test_an_alias_does_not_raise_further_complaints(good: str) -> None:
    assert len(problems(good.replace("builtin: licences", "builtin: *name"))) == 1


def test_a_dedented_key_is_told_where_it_belongs(good: str) -> None:
    found = problems(good.replace("teacher:\n  model: ./teacher\n  dtype: bfloat16\n", "teacher:\nmodel: ./teacher\n"))
    assert found[1].splitlines()[0] == (
        "map.yaml:3:1: model: unknown key here. It is a key of 'teacher', which is empty: "
        "indent it further than 'teacher'."
    )


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~\n"])
def test_an_empty_file(text: str) -> None:
    assert problems(text)[0].startswith("map.yaml:1:1: the file is empty. It needs the keys version, teacher, student")


def test_a_list_at_the_top() -> None:
    assert problems("- version: 1\n")[0].startswith("map.yaml:1:1: the top level must be a mapping, found a list.")


def test_two_documents(good: str) -> None:
    assert "expected a single document" in problems(good + "---\n" + good)[0]


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_nesting_is_bounded_quickly(opening: str) -> None:
    text = opening * (2**20 // len(opening) - 10)
    found = problems(text)
    assert "nested deeper than 20 levels" in found[0]
    assert len(found[0]) < 500


def test_a_file_that_is_too_big(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("# " + "x" * MAXIMUM_BYTES)
    with pytest.raises(MappingFileError, match=f"larger than {MAXIMUM_BYTES} bytes"):
        load_mapping(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MappingFileError, match=r"absent\.yaml: there is no such file"):
        load_mapping(tmp_path / "absent.yaml")
    with pytest.raises(MappingFileError, match="this is a folder"):
        load_mapping(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\nteacher: \xe9\n")
    with pytest.raises(MappingFileError, match=r"latin\.yaml:2:10: not UTF-8 text"):
        load_mapping(tmp_path / "latin.yaml")


def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path, good: str) -> None:
    path = tmp_path / "map.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + good.replace("\n", "\r\n").encode())
    assert load_mapping(path)[0].seed == 0


def test_the_caret_stays_near_the_fault_of_a_long_line(good: str) -> None:
    long_line = "teacher: {revision: '" + "x" * 5000 + "', modle: ./teacher}\n"
    found = problems(good.replace("teacher:\n  model: ./teacher\n  dtype: bfloat16\n", long_line))
    text = next(problem for problem in found if "teacher.modle" in problem).splitlines()
    assert len(text[1]) <= 110
    assert text[1][text[2].index("^") :].startswith("modle")


def test_very_many_problems_are_counted_not_printed(good: str) -> None:
    found = problems(good + "".join(f"key{number}: 1\n" for number in range(200)))
    assert len(found) == 51
    assert found[-1] == "map.yaml: and 150 more problems"
