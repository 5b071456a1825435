"""What is replaced in DeepSpeed is what the patches were written for, and nothing is outside their versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.stages.train import patches


def test_the_replaced_sources_are_those_that_the_patches_were_written_for() -> None:
    """In a process that has patched nothing yet."""
    program = (
        "import json; from polytrope.pipeline.stages.train.patches import UPSTREAM, source_digest; "
        "print(json.dumps({name: source_digest(name) for name in UPSTREAM}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    changed = [name for name, digest in patches.UPSTREAM.items() if found[name] != digest]
    assert not changed, f"read what changed there, adapt the patch, and note the new digests: {found}"


@pytest.mark.parametrize(
    ("version", "within"), [("0.19.8", True), ("0.19.0+cpu", True), ("0.20.0", False), ("1.0", False)]
)
def test_only_the_versions_they_are_for_are_patched(
    version: str, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed
    import deepspeed.ops

    assert patches.applies(version) is within
    before = deepspeed.DeepSpeedEngine._broadcast_model
    monkeypatch.setattr(deepspeed, "__version__", version)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", dict(deepspeed.ops.__compatible_ops__))
    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "_broadcast_model", before)
    patches.at_import(deepspeed, compiles=True)
    assert (deepspeed.DeepSpeedEngine._broadcast_model is not before) is within


HANDED_OVER = """
import os, sys, tempfile
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/meeting", rank=0, world_size=1)
from polytrope.models import build_model
from polytrope.pipeline.stages.train import patches
from polytrope.pipeline.stages.train.deepspeed_engine import import_deepspeed

deepspeed = import_deepspeed(True)
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "sequence_length": 16, "activation": "hermite3"}

def train(precision, patched, clipping, accumulated=None):
    torch.manual_seed(0)
    model = build_model("gpt2", SIZES)
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    config = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping, "zero_optimization": {"stage": 1}, "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }
    if accumulated is not None:
        config["data_types"] = {"grad_accum_dtype": accumulated}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    if patched:
        patches.on_engine(engine, cpu=True, zero_stage=1, precision=precision)
        assert getattr(engine.optimizer, "_coalesce_grad_reduction", False) == (accumulated is None), precision
    generator, norms = torch.Generator().manual_seed(1), []
    for _ in range(4):
        tokens = torch.randint(0, 64, (4, 17), generator=generator)
        engine.backward(engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return [weight.detach().clone() for weight in engine.module.parameters()], norms

for precision in ("fp32", "bf16"):
    theirs, their_norms = train(precision, False, 0.0)
    ours, our_norms = train(precision, True, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), precision
    assert all(abs(a / b - 1) < 1e-6 for a, b in zip(our_norms, their_norms, strict=True)), (our_norms, their_norms)
    clipped, norms = train(precision, True, 0.1)
    assert norms[0] == our_norms[0]
    assert not any(torch.equal(a, b) for a, b in zip(clipped[:1], ours[:1]))
    other = {"fp32": "bf16", "bf16": "fp32"}[precision]  # of bf16 that is another class of optimizer
    theirs, ours = (train(precision, patched, 0.0, other)[0] for patched in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"{precision}, accumulated in {other}"
"""


def test_gradients_handed_over_at_once_are_those_of_deepspeed(tmp_path: Path) -> None:
    """By one worker without accumulation: the same bits in fp32 and bf16, and the norm of them all; DeepSpeed keeps
    those that it is told to add up in another type."""
    command = [sys.executable, "-W", "ignore", "-c", HANDED_OVER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
