"""Adapters: they start as nothing, keep what they promise, and are merged into weights that compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.adapters import (
    ADAPTERS,
    Adapted,
    AdaptedLinear,
    AdapterSettings,
    Householder,
    Spectral,
    adapter_parameters,
    add_adapters,
)

GPT2: dict[str, Any] = {"vocab_size": 64, "sequence_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 24}
CONVNEXT: dict[str, Any] = {
    "depths": [1, 1],
    "dims": [8, 16],
    "num_classes": 3,
    "in_channels": 1,
    "patch_size": 1,
    "layer_scale": 0.5,
}
MLP: dict[str, Any] = {"inputs": 3, "widths": [8, 8], "feedforward": ["dense", "quadratic"]}
MODELS = {"gpt2": GPT2, "convnext": CONVNEXT, "mlp": MLP}
EXAMPLES = {
    "gpt2": (torch.arange(24).reshape(2, 12) * 7 + 3) % 64,
    "convnext": torch.linspace(-2, 2, 128).sin().reshape(2, 1, 8, 8),
    "mlp": torch.linspace(-2, 2, 12).sin().reshape(4, 3),
}
SETTINGS = [
    AdapterSettings("householder", 4),
    AdapterSettings("householder", 2, relaxed=True),
    AdapterSettings("spectral", 3),
    AdapterSettings("lora", 3),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def adapter(settings: AdapterSettings, weight: Tensor) -> Any:
    torch.manual_seed(0)
    return ADAPTERS[settings.name](weight, settings).double()


def moved(module: nn.Module, size: float = 0.3) -> Any:
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(size * random(*parameter.shape, seed=number).to(parameter.dtype))
    return module


def layer(settings: AdapterSettings) -> Any:
    torch.manual_seed(1)
    linear = nn.Linear(7, 5).double()
    return AdaptedLinear(linear, adapter(settings, linear.weight)), linear


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_adapter_starts_as_nothing_with_gradients_and_is_merged(settings: AdapterSettings) -> None:
    adapted, linear = layer(settings)
    x = random(6, 7)
    exact = 0.0 if settings.name != "householder" else 1e-14
    torch.testing.assert_close(adapted(x), linear(x), rtol=0, atol=exact)
    adapted(x).square().sum().backward()
    sizes = [float(parameter.grad.abs().max()) for parameter in adapted.adapter.parameters()]
    assert max(sizes) > 1e-2
    moved(adapted.adapter)
    assert (adapted(x) - linear(x)).abs().max() > 1e-2
    holder = nn.Module()
    holder.layer = adapted  # type: ignore[assignment]
    weights = Adapted(("layer",), settings).merged(holder.state_dict(), holder)
    assert set(weights) == {"layer.weight", "layer.bias"}
    torch.testing.assert_close(nn.functional.linear(x, weights["layer.weight"], weights["layer.bias"]), adapted(x))
    names = dict(adapted.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(adapted, dict(zip(names, values, strict=True)), (x,))

    own = [parameter.detach().requires_grad_() for parameter in names.values()]
    assert torch.autograd.gradcheck(run, (x[:2].requires_grad_(), *own))


def test_householder_is_a_product_of_reflections_that_keeps_the_rows_products() -> None:
    weight = random(5, 7)
    module = moved(adapter(AdapterSettings("householder", 4), weight))
    product = torch.eye(7, dtype=torch.float64)
    for vector in module.vectors:
        product = product @ (
            torch.eye(7, dtype=torch.float64) - 2 * torch.outer(vector, vector) / vector.square().sum()
        )
    torch.testing.assert_close(module(weight), weight @ product, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(module(weight) @ module(weight).T, weight @ weight.T, rtol=1e-10, atol=1e-10)
    one = Householder(weight, AdapterSettings("householder", 2)).double()
    with torch.no_grad():
        one.vectors[1] = torch.eye(7)[0]
        one.vectors[0] = torch.eye(7)[1]
    assert (one(weight) - weight)[:, 2:].abs().max() == 0.0  # two reflections turn one plane alone


def test_relaxed_pairs_take_one_direction_out_and_another_in() -> None:
    weight = random(5, 7)
    module = moved(adapter(AdapterSettings("householder", 2, relaxed=True), weight))
    u, v = (vector / vector.norm() for vector in module.vectors)
    expected = weight - weight @ torch.outer(u, u) + weight @ torch.outer(v, v)
    torch.testing.assert_close(module(weight), expected, rtol=1e-10, atol=1e-11)


def test_spectral_changes_the_largest_singular_vectors() -> None:
    weight = random(5, 7)
    module: Spectral = moved(adapter(AdapterSettings("spectral", 2), weight))
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    own = (module.left + module.left_change) * sizes[:2] @ (module.right + module.right_change).T
    rest = left[:, 2:] * sizes[2:] @ right[2:]
    whole = weight + module(torch.eye(7, dtype=torch.float64)).T
    torch.testing.assert_close(whole, own + rest, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("architecture", MODELS)
def test_models_with_adapters_are_what_they_were_and_their_merged_weights_too(
    architecture: str, settings: AdapterSettings
) -> None:
    torch.manual_seed(0)
    model: Any = build_model(architecture, MODELS[architecture]).double()
    before, names = model(EXAMPLES[architecture]), [name for name, _ in model.named_parameters()]
    adapted = add_adapters(model, settings)
    torch.testing.assert_close(model(EXAMPLES[architecture]), before, rtol=0, atol=1e-12)
    added = {id(parameter) for parameter in adapter_parameters(model)}
    assert [name for name, parameter in model.named_parameters() if id(parameter) not in added] == names
    assert len(adapted.layers) == {"gpt2": 8, "convnext": 4, "mlp": 1}[architecture]
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            moved(module.adapter)
    after = model(EXAMPLES[architecture])
    assert (after - before).abs().max() > 1e-3
    weights = adapted.merged(model.state_dict(), model)
    plain = build_model(architecture, MODELS[architecture]).double()
    plain.load_state_dict(weights, strict=True)
    torch.testing.assert_close(plain(EXAMPLES[architecture]), after, rtol=1e-9, atol=1e-10)


def test_singular_vectors_of_another_machine_are_merged_as_they_were_learned_with() -> None:
    settings = AdapterSettings("spectral", 2)
    adapted, _ = layer(settings)
    with torch.no_grad():
        adapted.adapter.left.neg_()  # as good a pair as the one that is computed here
        adapted.adapter.right.neg_()
    moved(adapted.adapter)
    holder = nn.Module()
    holder.layer = adapted
    weights = Adapted(("layer",), settings).merged(holder.state_dict(), holder)
    x = random(6, 7)
    torch.testing.assert_close(nn.functional.linear(x, weights["layer.weight"], weights["layer.bias"]), adapted(x))


def test_layers_are_chosen_by_name_and_what_cannot_be_is_refused() -> None:
    model = build_model("gpt2", GPT2)
    chosen = add_adapters(model, AdapterSettings("lora", 2, layers=("transformer.h.*.mlp.*", "*.1.attn.c_proj")))
    assert chosen.layers == (
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    )
    for settings, words in (
        (
            AdapterSettings("lora", 2, layers=("lm_head",)),
            "adapters.layers: `lm_head` names no linear layer of the blocks",
        ),
        (
            AdapterSettings("lora", 25),
            r"adapters\.rank: expected at most 24, .* got 25 \(`transformer\.h\.0\.attn\.c_at",
        ),
        (AdapterSettings("spectral", 25), r"adapters\.rank: expected at most 24"),
        (AdapterSettings("householder", 3), r"adapters\.rank: householder vectors come in pairs, got 3"),
    ):
        model = build_model("gpt2", GPT2)
        with pytest.raises(ValueError, match=words):
            add_adapters(model, settings)
        assert not adapter_parameters(model)
    with pytest.raises(ValueError, match="adapters: the blocks have no linear layers"):
        add_adapters(build_model("mlp", {"widths": [4], "feedforward": "quadratic"}), AdapterSettings("lora", 1))
