"""What is replaced in DeepSpeed is what the patches were written for, and nothing is outside their versions."""

from __future__ import annotations

import json
import subprocess
import sys

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
