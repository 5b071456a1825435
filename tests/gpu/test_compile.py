"""The CUDA kernels compile for both architectures; needs nvcc and some minutes, no GPU. Prints registers and spills."""

from __future__ import annotations

import re
import shutil

import pytest

from polytrope.ops import build


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (CUDA toolkit)")
def test_the_cuda_kernels_compile_for_both_architectures_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    log = build.cuda_library_path().with_suffix(".log").read_text()
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.S
    )
    assert {architecture for _, architecture, _, _ in kernels} == {"sm_80", "sm_90"}
    unrolled = [entry for entry in kernels if re.search(r"Li[1-9]", entry[0])]
    assert len(unrolled) > 40
    with capsys.disabled():
        for name, architecture, spilled, registers in kernels:
            print(f"{architecture} {name}: {registers} registers, {spilled} bytes spilled")
    assert all(spilled == "0" for _, _, spilled, _ in unrolled)
