"""Table of servers: what it returns for configs of students, and its agreement with the recorded check."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Mamba2Config

from xarch_kd.models.conversion.convert import plan_conversion
from xarch_kd.models.serving import SERVERS, TESTED, served_by, serving_rows
from xarch_kd.testing.tiny import LLAMA3, PARTIAL, tiny_config


def student(model_type: str, mixer: str = "mamba2", target: str = "auto", **overrides: Any) -> Any:
    return plan_conversion(tiny_config(model_type, **overrides), mixer=mixer, target=target, replace=[1]).config


def runs(config: Any) -> dict[str, bool]:
    return {server: one.runs for server, one in (served_by(config) or {}).items()}


# Students that vLLM's and SGLang's sources take, and those that they refuse.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", (True, True, False, False)),
        ("own head_dim", (False, True, False, False)),
        ("gelu", (False, True, False, False)),
        ("bamba", (False, False, False, False)),
        ("partial rotary", (False, False, False, False)),
        ("qwen3", (True, True, True, True)),
        ("olmo2", (True, False, True, False)),
        ("in place", (False, False, False, False)),
    ],
)
def test_the_servers_of_a_student(name: str, expected: tuple[bool, ...]) -> None:
    configs = {
        "llama": lambda: student("llama"),
        "own head_dim": lambda: student("llama", head_dim=24),
        "gelu": lambda: student("gemma"),
        "bamba": lambda: student("llama", target="bamba"),
        "partial rotary": lambda: student("phi3", rope_parameters=PARTIAL),
        "qwen3": lambda: student("qwen3", "gated_delta"),
        "olmo2": lambda: student("olmo2", "gated_delta"),
        "in place": lambda: student("gemma2", target="in_place"),
    }
    assert runs(configs[name]()) == dict(zip(SERVERS, expected, strict=True))


def test_an_option_that_was_not_run_is_not_called_tested() -> None:
    plain, scaled = served_by(student("llama")), served_by(student("llama", rope_parameters=LLAMA3))
    assert plain is not None and scaled is not None
    assert plain["vLLM"].tested and not plain["SGLang"].tested
    assert scaled["vLLM"].runs


def test_a_hybrid_that_fits_llama_cpp_and_mlx() -> None:
    config = student("llama")
    config.update({"mamba_expand": 2, "mamba_d_head": 32, "mamba_proj_bias": False, "mamba_n_groups": 1})
    assert runs(config) == {"vLLM": True, "SGLang": True, "mlx-lm": True, "llama.cpp": True}


def test_rows_name_release_basis_and_reason() -> None:
    rows = {row[0].split()[0]: row for row in serving_rows(student("llama"))}
    assert rows["vLLM"][1:3] == ("yes", "tested here") and "mamba_n_groups" in rows["vLLM"][3]
    assert rows["SGLang"][1:3] == ("yes", "from its source, not run") and "--layer-names" in rows["SGLang"][3]
    assert "ignores the groups" in rows["mlx-lm"][3] and "mamba_expand: 1" in rows["llama.cpp"][3]
    assert serving_rows(tiny_config("gpt2")) == []
    assert serving_rows(Mamba2Config())[0][1] == "yes"
    assert set(TESTED) <= SERVERS.keys()
