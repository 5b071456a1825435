"""Puts compiled CPU kernels into a wheel; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def compile_kernels(target: Path) -> bool:
    """Compile for every instruction set into `target`, where torch and a compiler are there; whether they were."""
    shutil.rmtree(target, ignore_errors=True)
    spec = importlib.util.spec_from_file_location("polytrope_build", ROOT / "ops" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(build)
    except ImportError as error:
        print(
            f"polytrope: kernels compile on first use ({error}; pip wheel --no-build-isolation shows what is installed)"
        )
        return False
    try:
        build.prebuild(target)
    except build.BuildError as error:
        print(f"polytrope: kernels compile on first use ({error})")
        return False
    return True


class WheelWithKernels(bdist_wheel):
    """With kernels the wheel is for one platform, and for any Python."""

    def run(self) -> None:
        kernels = Path(self.bdist_dir).with_name("polytrope-kernels")
        if compile_kernels(kernels):
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # asked for the name of the wheel's root directory
            self.get_finalized_command("build_py").kernels = kernels
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


class CopyKernels(build_py):
    """Editable installs and source distributions never compile: only a wheel sets `kernels`."""

    kernels: Path | None = None

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib) / "polytrope" / "ops" / "prebuilt"
        shutil.rmtree(target, ignore_errors=True)
        if self.kernels is not None:
            shutil.copytree(self.kernels, target)


setup(cmdclass={"bdist_wheel": WheelWithKernels, "build_py": CopyKernels})
