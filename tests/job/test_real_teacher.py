"""One short run on a real teacher, through the command line in a process of its own, as a newcomer's first one is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from xarch_kd._layout import folder

DEMO = folder("mappings") / "smollm2-135m--mamba2-hybrid.yaml"


def test_the_demo_in_a_few_steps(tmp_path: Path, smollm2: PreTrainedModel) -> None:
    mapping = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    # Its choice of layers and its mixture of texts have tests on tiny models.
    mapping["student"]["convert"]["replace"] = [6, 13, 20, 27]
    mapping["data"] = {"builtin": "python-docs", "sequence_length": 64, "batch_size": 2}
    mapping["evaluate"] |= {"suites": ["likelihood", "speed"], "tokens": 128, "speed": {"seconds": 0}}
    # The mixers see each of two batches three times.
    mixers, logits = mapping["stages"]
    mixers |= {"steps": 6, "batches": 2, "batch_size": 2, "cache": "memory"}
    logits |= {"steps": 1, "batch_size": 1}
    path, run = tmp_path / "few.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "xarch_kd", "train", str(path), "--output", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step" and event["stage"] == "mixers"]
    assert losses[-1] < losses[0]
    evaluation = json.loads((run / "evaluation.json").read_text())["results"]
    # No notice that a cache is not of the computed size.
    assert evaluation["speed"]["notices"] == ["left out: 16,384, 65,536 tokens, beyond the 8,192 positions"]
    figures = evaluation["likelihood"]
    assert [result["text"] for result in figures] == ["held-out", "licences", "library-docs"]
    assert all(1.0 < result["teacher_nll"] < 5.0 for result in figures)

    student = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32)
    assert type(student).__name__ == "GraniteMoeHybridForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    prompt = tokenizer("The with statement", return_tensors="pt")
    texts = [
        student.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache)  # pyright: ignore[reportAttributeAccessIssue]
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
    # Nothing but the new mixers trained: every weight that the teacher has too is the teacher's.
    for ours, theirs in (("embed_tokens", "embed_tokens"), ("layers.0", "layers.0"), ("layers.29", "layers.29")):
        own = dict(student.model.get_submodule(ours).named_parameters())
        block = smollm2.model.get_submodule(theirs)
        for name, parameter in own.items():
            parts = [name.replace("shared_mlp.output_linear", "mlp.down_proj")]
            if "shared_mlp.input_linear" in name:
                parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
            assert torch.equal(parameter, torch.cat([block.get_parameter(part) for part in parts])), name
