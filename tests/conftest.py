"""What holds for the whole suite: no network, quiet libraries, interpreted kernels."""

from __future__ import annotations

import os

# Set before any test imports transformers, which reads them at import; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Read when triton is first imported: kernels run in its interpreter, on the CPU. On a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a processor of its own; threads of several would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
