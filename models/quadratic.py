"""A model's linear layers become quadratic ones, and its function stays what it was, bit for bit. (Fan et al., On
Expressivity and Trainability of Quadratic Networks, 2021)"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from polytrope.models.per_layer import Entry

if TYPE_CHECKING:
    from torch import nn

_LINEAR = ("mlp", "dense")  # parts made of linear layers alone
# Names of the layers of a feed-forward part: of a GPT-2, a ConvNeXt, an MLP.
_FEEDFORWARD = re.compile(r"transformer\.h\.\d+\.mlp\.c_(fc|proj)|stages\.\d+\.\d+\.pwconv[12]|blocks\.\d+\.layer")


def quadratic_feedforward(config: Any) -> Entry | list[Entry]:
    """What `feedforward` of a configuration becomes, with quadratic layers in the place of linear ones.

    Raises:
        ValueError: it has none but quadratic ones, or a part or a layer in two factors, which have no quadratic form.
    """
    parts = config.feedforward_settings()
    for number, part in enumerate(parts):
        if part.name not in (*_LINEAR, "quadratic"):
            raise ValueError(
                f"linear: layer {number} has `feedforward: {part.name}`, which has no quadratic form; "
                f"{' and '.join(_LINEAR)} have one"
            )
    entries: list[Entry] = ["quadratic" if part.name in _LINEAR else part.config() for part in parts]
    if not any(part.name in _LINEAR for part in parts):
        raise ValueError("linear: the layers of the model are quadratic already")
    for name in config.factors:
        if _FEEDFORWARD.fullmatch(name):
            raise ValueError(
                f"linear: `{name}` is in two factors, which has no quadratic form; leave linear out, or convert the "
                "model before it was factored"
            )
    return "quadratic" if entries == ["quadratic"] * len(entries) else entries


def make_quadratic(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A model of this package with the same weights and quadratic layers, in the same mode, and the names of those that
    were linear. The factors that multiply inputs by inputs are 0, so that every output is the same number.

    Raises:
        ValueError: as of `quadratic_feedforward`.
    """
    import torch

    from polytrope.models import build_model
    from polytrope.models.checkpoint import model_config
    from polytrope.models.factors import describe_factors, restore_factors
    from polytrope.models.parts.feedforward import QuadraticLinear

    factors = describe_factors(model)
    changed = quadratic_feedforward(replace(model.config, factors=factors))  # type: ignore[type-var]
    config = model_config(model) | {"feedforward": changed, "factors": {}}
    with torch.random.fork_rng(devices=[]):
        made: Any = build_model(str(model.architecture), config)
        names = [
            name
            for name, module in made.named_modules()
            if isinstance(module, QuadraticLinear) and not isinstance(model.get_submodule(name), QuadraticLinear)
        ]
        restore_factors(made, factors)  # of other parts, such as attention
    made.config = replace(made.config, factors=factors)
    # A linear layer's weight and bias keep their names.
    made.load_state_dict({**made.state_dict(), **model.state_dict()})
    return made.train(model.training), names
