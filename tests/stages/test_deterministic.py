"""`deterministic`: what a worker on a GPU asks of torch, and what is said where an operation cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.worker_process import _explained

PROGRAM = """
import json, os
from polytrope.pipeline.stages.train.worker_process import compute_deterministically
compute_deterministically()
import torch
print(json.dumps({
    "asked": torch.are_deterministic_algorithms_enabled(),
    "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
    "fills": torch.utils.deterministic.fill_uninitialized_memory,
    "tries": torch.backends.cudnn.benchmark,
    "cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"],
    "inductor": bool(torch._inductor.config.deterministic),
}))
"""


def test_a_worker_asks_torch_for_the_same_bits_every_time() -> None:
    """With a warning alone torch's attention on a GPU would stay as it is, and a resumed training end elsewhere."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CUBLAS_WORKSPACE_CONFIG",)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "asked": True, "warns": False, "fills": False, "tries": False, "cublas": ":4096:8", "inductor": True,
    }  # fmt: skip


def test_an_operation_that_cannot_names_the_way_out() -> None:
    said = (
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation."
    )
    error = _explained(RuntimeError(said))
    assert isinstance(error, UserError)
    assert error.message == "deterministic: cumsum_cuda_kernel does not have a deterministic implementation on a GPU"
    assert error.hint.startswith("set deterministic: false; ")
    other = RuntimeError("no memory")
    assert _explained(other) is other
