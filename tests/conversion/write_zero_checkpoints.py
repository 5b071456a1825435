"""Written by two real DeepSpeed ranks: a checkpoint of each ZeRO stage, and beside it the whole weights.

Once with all parameters trained (`stage1`), once with some frozen (`frozen1`).

Run as a program: `write_zero_checkpoints.py DIRECTORY`.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing


def rank_main(rank: int, directory: str, port: int) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
    )  # fmt: skip
    from conversion_support import GPT2

    from polytrope.models import build_model
    from polytrope.pipeline.stages.train.deepspeed_engine import import_deepspeed

    deepspeed = import_deepspeed(cpu=True)
    torch.set_num_threads(1)
    for name, stage in [(name, stage) for name in ("stage", "frozen") for stage in (1, 2, 3)]:
        torch.manual_seed(stage)
        model = build_model("gpt2", GPT2 | {"activation": {"name": "hermite", "degree": 3}})
        if name == "frozen":
            model.transformer["wpe"].requires_grad_(False)
            model.transformer["h"][0].requires_grad_(False)
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        tokens = torch.randint(0, 97, (2, 8))
        engine.backward(engine(tokens, tokens))
        engine.step()
        engine.save_checkpoint(f"{directory}/{name}{stage}", tag="step1")
        parameters = list(engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters([p for _, p in parameters], enabled=stage == 3):
            whole = {key: parameter.detach().clone() for key, parameter in parameters}
        if rank == 0:
            torch.save(whole, f"{directory}/{name}{stage}.pt")
    torch.distributed.barrier()
    os._exit(0)  # no teardown: gloo's threads may abort a process whose peer is gone already


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, args=(str(Path(sys.argv[1])), free), nprocs=2)
