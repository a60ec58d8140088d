"""The shipped mapping for mamba_ssm, planned at its teacher's true sizes, gives a model that its format holds."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, LlamaConfig

from xarch_kd._layout import folder
from xarch_kd.models.mamba_ssm.config import mamba_ssm_config
from xarch_kd.planning.cost import Rates
from xarch_kd.planning.resolve import make_plan


def test_the_shipped_file_is_for_mamba_ssm(tmp_path: Path, rates: Rates) -> None:
    LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        rms_norm_eps=1e-5,
        vocab_size=49152,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "teacher")
    text = (folder("mappings") / "llama--mamba_ssm.yaml").read_text(encoding="utf-8")
    hub_id = "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert text.count(hub_id) == 1
    file = tmp_path / "mapping.yaml"
    file.write_text(text.replace(hub_id, str(tmp_path / "teacher")), encoding="utf-8")
    plan = make_plan(file, rates=rates)
    assert plan.mapping.student.format == "mamba_ssm"
    assert [row.index for row in plan.student.layers if not row.replaced] == list(range(1, 32, 2))
    assert [pair.student_layer for pair in plan.stages[0].pairs] == list(range(0, 32, 2))
    written = mamba_ssm_config(AutoConfig.for_model(**plan.student_config))
    assert written["attn_layer_idx"] == list(range(1, 32, 2))
    assert written["ssm_cfg"] | {"headdim": 64, "ngroups": 15, "d_state": 64} == written["ssm_cfg"]
    assert (written["tie_embeddings"], written["attn_cfg"]["rotary_emb_dim"]) == (True, 64)
