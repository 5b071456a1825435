"""Every analysis by its name; each is one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polytrope.pipeline.data.records import Record
from polytrope.pipeline.stages.analyze.analyses.kernel import analyse_kernel
from polytrope.pipeline.stages.analyze.analyses.signal import analyse_signal
from polytrope.pipeline.stages.analyze.subject import AnalysedActivation

# The activations of a model and the analysis's options → the field of this name of `AnalysedModel`.
ANALYSES: dict[str, Callable[[Sequence[AnalysedActivation], Any], Record]] = {
    "signal": analyse_signal,
    "kernel": analyse_kernel,
}
