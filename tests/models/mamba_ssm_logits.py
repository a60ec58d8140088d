"""Logits of mamba_ssm for each folder of its format, written into the folder in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.mamba_ssm_peer import load_mamba_ssm


def main(root: Path) -> None:
    """Write `logits.pt` into every folder under `root`."""
    model_class = load_mamba_ssm()
    ids = torch.load(root / "ids.pt", weights_only=True)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        model = model_class.from_pretrained(str(folder)).eval()
        with torch.no_grad():
            torch.save(model(ids).logits, folder / "logits.pt")
        # What the package writes is read back too.
        model.save_pretrained(str(folder / "saved"))
