"""polytrope: durable training workflows on Ray, and fused learnable activations.

    import polytrope

    result = polytrope.run("workflows/word-count.yaml", executor="local")
    activation = polytrope.Hermite(degree=3)

`dir(polytrope)` lists what users need. Nothing is imported before it is used: `import polytrope` itself costs nothing.
"""

TYPE_CHECKING = False  # as mypy and editors understand it; importing typing would be all that this module costs
if TYPE_CHECKING:
    from polytrope import integrations, models, ops, pipeline
    from polytrope.models import build_model
    from polytrope.models.checkpoint import load_model, save_model
    from polytrope.models.convert import Conversion, convert
    from polytrope.models.formats import read_model
    from polytrope.models.surgery import find_activations, replace_module
    from polytrope.ops import (
        Affine,
        Chebyshev,
        Composition,
        Fourier,
        Hermite,
        Legendre,
        PiecewiseLinear,
        PolyNorm,
        PolyReLU,
        Rational,
        RationalSpline,
        Tropical,
        TropicalRational,
        build_activation,
    )
    from polytrope.ops.interpolate import fit
    from polytrope.pipeline.errors import UserError
    from polytrope.pipeline.launch.interface import RunFailedError, run
    from polytrope.pipeline.stage import Artifact, StageContext, Stages, stage
    from polytrope.pipeline.store.store import Store
    from polytrope.pipeline.workflow.spec import StageSpec, Workflow, load_workflow

    __version__: str

# Name → the module that defines it. A stage that imports a name from here has that module's code in its key.
PLACES = {
    "Affine": "polytrope.ops",
    "Artifact": "polytrope.pipeline.stage",
    "Chebyshev": "polytrope.ops",
    "Composition": "polytrope.ops",
    "Conversion": "polytrope.models.convert",
    "Fourier": "polytrope.ops",
    "Hermite": "polytrope.ops",
    "Legendre": "polytrope.ops",
    "PiecewiseLinear": "polytrope.ops",
    "PolyNorm": "polytrope.ops",
    "PolyReLU": "polytrope.ops",
    "Rational": "polytrope.ops",
    "RationalSpline": "polytrope.ops",
    "RunFailedError": "polytrope.pipeline.launch.interface",
    "StageContext": "polytrope.pipeline.stage",
    "StageSpec": "polytrope.pipeline.workflow.spec",
    "Stages": "polytrope.pipeline.stage",
    "Store": "polytrope.pipeline.store.store",
    "Tropical": "polytrope.ops",
    "TropicalRational": "polytrope.ops",
    "UserError": "polytrope.pipeline.errors",
    "Workflow": "polytrope.pipeline.workflow.spec",
    "build_activation": "polytrope.ops",
    "build_model": "polytrope.models",
    "convert": "polytrope.models.convert",
    "find_activations": "polytrope.models.surgery",
    "fit": "polytrope.ops.interpolate",
    "load_model": "polytrope.models.checkpoint",
    "load_workflow": "polytrope.pipeline.workflow.spec",
    "read_model": "polytrope.models.formats",
    "replace_module": "polytrope.models.surgery",
    "run": "polytrope.pipeline.launch.interface",
    "save_model": "polytrope.models.checkpoint",
    "stage": "polytrope.pipeline.stage",
}
_PACKAGES = ("integrations", "models", "ops", "pipeline")

__all__ = [
    "Affine",
    "Artifact",
    "Chebyshev",
    "Composition",
    "Conversion",
    "Fourier",
    "Hermite",
    "Legendre",
    "PiecewiseLinear",
    "PolyNorm",
    "PolyReLU",
    "Rational",
    "RationalSpline",
    "RunFailedError",
    "StageContext",
    "StageSpec",
    "Stages",
    "Store",
    "Tropical",
    "TropicalRational",
    "UserError",
    "Workflow",
    "__version__",
    "build_activation",
    "build_model",
    "convert",
    "find_activations",
    "fit",
    "integrations",
    "load_model",
    "load_workflow",
    "models",
    "ops",
    "pipeline",
    "read_model",
    "replace_module",
    "run",
    "save_model",
    "stage",
]


def __getattr__(name: str) -> object:
    import importlib

    value: object
    if name in PLACES:
        value = getattr(importlib.import_module(PLACES[name]), name)
    elif name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
