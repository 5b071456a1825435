"""Every analysis by its name; each is one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polytrope.pipeline.data.records import Record
from polytrope.pipeline.stages.analyze.analyses.arithmetic import analyse_arithmetic
from polytrope.pipeline.stages.analyze.analyses.bilinear import analyse_bilinear
from polytrope.pipeline.stages.analyze.analyses.features import analyse_features
from polytrope.pipeline.stages.analyze.analyses.kernel import analyse_kernel
from polytrope.pipeline.stages.analyze.analyses.merging import analyse_merging
from polytrope.pipeline.stages.analyze.analyses.modular import analyse_modular
from polytrope.pipeline.stages.analyze.analyses.rank import analyse_rank
from polytrope.pipeline.stages.analyze.analyses.signal import analyse_signal
from polytrope.pipeline.stages.analyze.analyses.width import analyse_width
from polytrope.pipeline.stages.analyze.subject import Subject, activations_of

# A model and the analysis's options → the field of this name of `AnalysedModel`.
ANALYSES: dict[str, Callable[[Subject, Any], Record]] = {
    "signal": lambda subject, options: analyse_signal(activations_of(subject), options),
    "kernel": lambda subject, options: analyse_kernel(activations_of(subject), options),
    "modular": analyse_modular,
    "width": analyse_width,
    "features": analyse_features,
    "merging": analyse_merging,
    "arithmetic": analyse_arithmetic,
    "bilinear": analyse_bilinear,
    "rank": analyse_rank,
}
