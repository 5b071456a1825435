"""What makes transformers load a converted model as converted: code of its own that lies in the model's directory.

`config.json` gets a `model_type` that transformers does not have, so that it refuses to load the directory unless it
trusts the code; and the entry `polytrope`, which describes the activations. The code needs torch and transformers; with
this package beside, kernels compute the same functions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models.foreign import CLASS_PREFIX, CONVERSION, MODEL_TYPE_PREFIX
from polytrope.models.formats.extraction import Place, extract
from polytrope.ops import LearnableActivation

MODELING_FILE = "modeling_polytrope.py"
_FUNCTIONS = Place("polytrope.ops.functional", "_apply"), Place("polytrope.ops.plain", "apply")
_SETTINGS = Place("polytrope.models.foreign", "with_activation_names")
_ROUTING = Place("polytrope.models.rewriting", "route"), Place("polytrope.models.rewriting", "Site")
_POINTS = 257


def describe_activation(module: nn.Module, config: Any) -> dict[str, Any]:
    """An activation in `config.json`.

    Args:
        config: what `build_activation` makes the module of; it becomes `config`. `plain` is for the code beside: the
            name of the function, its options, and in its order, of each parameter the name, the shape and what each
            group of channels starts with.
    """
    assert isinstance(module, LearnableActivation)
    definition = module.definition()
    parameters = [
        {"name": name, "shape": list(module.get_parameter(name).shape), "initial": value.tolist()}
        for name, value in definition.initial.items()
    ]
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in definition.options.items()}
    function = f"{definition.function.__module__}:{definition.function.__qualname__}"
    return {"config": config, "plain": {"function": function, "parameters": parameters, "options": options}}


def modeling_source(
    config_class: str, model_type: str, classes: list[str], activations: Mapping[str, Any], *, factored: bool = False
) -> str:
    """The text of the modeling file.

    Args:
        config_class: transformers' configuration of the model that was converted.
        model_type: of that.
        classes: transformers' classes that get one with converted activations each.
        activations: `describe_activation` of each.
        factored: there are linear layers in two factors.
    """
    imports, functions = _functions_source(activations)
    models = "\n\n\n".join(
        f"class {CLASS_PREFIX}{name}(Converted, transformers.{name}):\n    config_class = {CLASS_PREFIX}{config_class}"
        for name in classes
    )
    originals = [*classes, model_type]
    ours = [*(f"{CLASS_PREFIX}{name}" for name in classes), f"{MODEL_TYPE_PREFIX}{model_type}"]
    return _TEMPLATE.substitute(
        imports="\n".join(imports),
        functions=functions,
        config=config_class,
        model_type=f"{MODEL_TYPE_PREFIX}{model_type}",
        models=models,
        made="that polytrope has converted" if factored else "whose activations polytrope has replaced by learned ones",
        factors=_FACTORS if factored else "",
        placed=_placed(factored, bool(activations)),
        registered="\n".join(f"    {own!r}: {old!r}," for own, old in zip(ours, originals, strict=True)),
    )


def _placed(factored: bool, activated: bool) -> str:
    """The calls that convert a model which was just built."""
    calls = ["place_factors(self)"] * factored + ["place_activations(self)"] * activated
    return "\n        ".join(calls)


def _functions_source(activations: Mapping[str, Any]) -> tuple[list[str], str]:
    """Imports, and the definitions that end in the table of functions by name."""
    names = sorted({str(entry["plain"]["function"]) for entry in activations.values()})
    places = {name: Place(*name.split(":")) for name in names}
    called = any("call" in entry["config"] for entry in activations.values())
    routing = _ROUTING if called else ()
    extracted = extract([*places.values(), _SETTINGS, *routing], dict([_FUNCTIONS]))
    table = "\n".join(f'    "{name}": {extracted.names[place]},' for name, place in places.items())
    source = f"{extracted.source}\n\n\nFUNCTIONS = {{\n{table}\n}}\n"
    return extracted.imports, source if called else f"{source}route = Site = None  # no function became a module\n"


def converted_fields(
    config_class: str, model_type: str, architecture: str, auto_classes: Mapping[str, str], described: dict[str, Any]
) -> dict[str, Any]:
    """What `config.json` says instead.

    Args:
        architecture: the class that was written.
        auto_classes: transformers' class for each of its `AutoModel…`.
        described: `activations` and `shared`.
    """
    module = Path(MODELING_FILE).stem
    named = {"AutoConfig": config_class, **auto_classes}
    return {
        "model_type": MODEL_TYPE_PREFIX + model_type,
        "architectures": [CLASS_PREFIX + architecture],
        "auto_map": {auto: f"{module}.{CLASS_PREFIX}{name}" for auto, name in sorted(named.items())},
        CONVERSION: described,
    }


def auto_classes(model_type: str) -> dict[str, str]:
    """transformers' classes of an architecture, by the `AutoModel…` that finds them."""
    from transformers.models.auto import modeling_auto

    found = {}
    for auto, kind in vars(modeling_auto).items():
        mapping = getattr(kind, "_model_mapping", None) if isinstance(kind, type) else None
        names = None if mapping is None else mapping._model_mapping.get(model_type)
        if names is not None and kind.__name__ == auto and not auto.startswith("_"):
            found[auto] = names if isinstance(names, str) else names[0]
    return found


def tokenizer_class(model_type: str) -> str | None:
    """The tokenizer that transformers takes for an architecture whose directory names none."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    name = TOKENIZER_MAPPING_NAMES.get(model_type)
    return name if isinstance(name, str) else None


def check_functions(model: nn.Module, activations: Mapping[str, Any]) -> None:
    """Run the functions of the modeling file, and refuse one that is not what its activation computes.

    Raises:
        ValueError: the activation, and how far it is off.
    """
    written: dict[str, Any] = {}
    imports, source = _functions_source(activations)
    exec(compile("\n".join([*imports, source]), MODELING_FILE, "exec"), written)
    for name, entry in activations.items():
        module: Any = copy.deepcopy(model.get_submodule(name)).double().cpu()
        plain = entry["plain"]
        parameters = [module.get_parameter(part["name"]) for part in plain["parameters"]]
        inputs = _inputs(module.config())
        with torch.no_grad():
            meant = module(inputs)
            found = written["FUNCTIONS"][plain["function"]](inputs, *parameters, **plain["options"])
        scale = float(meant.abs().max().clamp(min=1.0))
        if found.shape != meant.shape or not bool(((found - meant).abs() <= 1e-9 * scale).all()):
            raise ValueError(f"activation `{name}`: its plain form for {MODELING_FILE} computes something else")


def _inputs(config: Mapping[str, Any]) -> Tensor:
    """Values inside the interval and outside of it, for whatever dimension holds groups of channels."""
    groups, dim = int(config.get("num_parameters", 1)), int(config.get("dim", -1))
    low, high = config.get("interval") or config.get("domain") or (-4.0, 4.0)
    shape = [4] * max(3, dim + 1, -dim)
    shape[dim] = 2 * groups
    shape[0 if dim % len(shape) else 1] = _POINTS
    shape[-1] *= 2 if config.get("glu") else 1
    count = torch.Size(shape).numel()
    reach = 0.0 if config.get("domain") else high - low
    return torch.linspace(low - reach / 2, high + reach / 2, count, dtype=torch.float64)[
        torch.arange(count) * 7919 % count
    ].reshape(shape)


_FACTORS = '''class FactoredLinear(nn.Module):
    """A linear layer whose weight is the product of two matrices."""

    def __init__(self, inputs, outputs, rank, bias):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.inner = nn.Linear(inputs, rank, bias=False)
        self.outer = nn.Linear(rank, outputs, bias=bias)

    def forward(self, input):
        return self.outer(self.inner(input))


def place_factors(model):
    """Put two factors in the places of the linear layers that `config.json` names; see `place_activations`."""
    described = getattr(model.config, "polytrope", None)
    if not described:
        raise ValueError("config.json has no entry `polytrope`, which describes the factored layers")
    whole = type(model).__name__ in (model.config.architectures or [])
    ranks = {}
    for written, rank in described["factors"].items():
        name = find_name(model, written, whole)
        if name is not None:
            layer = model.get_submodule(name)
            factored = FactoredLinear(layer.in_features, layer.out_features, rank, layer.bias is not None)
            replace(model, name, factored)
            ranks[name] = rank
    model.config.polytrope = {**described, "factors": ranks}


'''
_TEMPLATE = Template(
    '''"""A $config model $made.

Written by polytrope. `AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)` of transformers loads it. It needs
torch and transformers; where polytrope is installed, its compiled kernels compute the activations.
"""

import pkgutil
$imports

import transformers
from torch import nn
from transformers import conversion_mapping


$functions

try:
    import polytrope.ops
except ImportError:
    pass
else:  # the same functions, with kernels
    FUNCTIONS = {name: pkgutil.resolve_name(name) for name in FUNCTIONS}


class LearnedActivation(nn.Module):
    """An activation with learned parameters, as `config.json` describes it."""

    def __init__(self, plain):
        super().__init__()
        self.function = plain["function"]
        self.options = plain["options"]
        self.initial = {part["name"]: part["initial"] for part in plain["parameters"]}
        for part in plain["parameters"]:
            self.register_parameter(part["name"], nn.Parameter(torch.empty(part["shape"])))
        self.reset_parameters()

    def reset_parameters(self):
        """What the parameters start with where no weights are loaded."""
        for name, value in self.initial.items():
            self.reset_parameter(name, value)

    def reset_parameter(self, name, value):
        parameter = self.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(torch.tensor(value, dtype=torch.float64).expand(parameter.shape))

    @property
    def _is_hf_initialized(self):
        return self.__dict__.get("is_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value):
        # transformers says so of each module when its weights are loaded, and marks the parameters that were.
        for name, initial in self.initial.items():
            if value and not self.get_parameter(name).is_meta:
                if not getattr(self.get_parameter(name), "_is_hf_initialized", False):
                    self.reset_parameter(name, initial)
        self.__dict__["is_initialized"] = value

    def forward(self, input):
        return FUNCTIONS[self.function](input, *[getattr(self, name) for name in self.initial], **self.options)

    def extra_repr(self):
        return f"{self.function}, {self.options}"


class Converted:
    """What makes a model of transformers a converted one."""

    def __init__(self, config, *inputs, **keywords):
        super().__init__(config, *inputs, **keywords)
        $placed


${factors}def place_activations(model):
    """Put the activations that `config.json` describes in their places.

    A model with another head than the one that was written has other names, and maybe not all parts of it.
    """
    described = getattr(model.config, "polytrope", None)
    if not described:
        raise ValueError("config.json has no entry `polytrope`, which describes the learned activations")
    whole = type(model).__name__ in (model.config.architectures or [])
    activations = {}
    for written, entry in described["activations"].items():
        call = entry["config"].get("call")  # of a function, which becomes a module here
        place, _, child = written.rpartition(".")
        name = find_name(model, place if call else written, whole)
        if name is None:
            continue
        if call:
            route(model.get_submodule(name), Site(**call), LearnedActivation(entry["plain"]))
            name = f"{name}.{child}" if name else child
        else:
            replace(model, name, LearnedActivation(entry["plain"]))
        activations[name] = entry
    if not activations:
        raise ValueError(f"{type(model).__name__} has none of the activations that config.json describes")
    shared = {}
    for written, first in described.get("shared", {}).items():
        name, first = find_name(model, written, whole), find_name(model, first, whole)
        if name is not None and first is not None:
            shared[name] = first
            module = model.get_submodule(first)
            replace(model, name, module)
            tied = {f"{name}.{part}": f"{first}.{part}" for part in module.initial}
            model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
            model.all_tied_weights_keys.update(tied)
    model.config.polytrope = {**described, "activations": activations, "shared": shared}


def find_name(model, written, whole):
    """The name that a module has in this model; None: this model has no such part."""
    base = model.base_model_prefix + "."
    names = [written, written.removeprefix(base), base + written]
    for name in names:
        try:
            model.get_submodule(name)
            return name
        except AttributeError:
            pass
    if whole or any(hasattr(model, name.partition(".")[0]) for name in names[:2]):
        raise ValueError(f"{type(model).__name__} has no module `{written}`, which config.json describes")
    return None


def replace(model, name, module):
    """Put a module in a place, and wherever else the same one is used."""
    old = model.get_submodule(name)
    for owner in list(model.modules()):
        for child, value in list(owner._modules.items()):
            if value is old:
                setattr(owner, child, module)


class ${prefix}$config(transformers.$config):
    model_type = "$model_type"

    def __post_init__(self, *inputs, **keywords):
        for name, value in with_activation_names(vars(self), replaced=False).items():
            if value != vars(self)[name]:
                setattr(self, name, value)
        super().__post_init__(*inputs, **with_activation_names(keywords, replaced=False))

    def to_dict(self):
        return with_activation_names(super().to_dict(), replaced=True)


$models


# How transformers renames and joins the weights of a model on the way from a file and back, for the same model here.
REGISTERED = {
$registered
}
for own, original in REGISTERED.items():
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(original)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(own, mapping, overwrite=True)
'''.replace("${prefix}", CLASS_PREFIX)
)
