"""ConvNeXt: equal to an independent implementation on the same weights, published names, stochastic depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architecture_support import WITHOUT_EFFECT, load_published
from torch import nn

from polytrope.models import build_model
from polytrope.models.checkpoint import save_model
from polytrope.models.convnext import (
    ARCHITECTURE,
    CONVNEXT_PRESETS,
    HUGGINGFACE_ALIASES,
    HUGGINGFACE_DEFAULTS,
    ConvNeXt,
    ConvNeXtConfig,
    config_from_huggingface,
    drop_samples,
)
from polytrope.models.formats import read_model
from polytrope.models.formats.huggingface import save_huggingface

SIZES = {"depths": [1, 2], "dims": [8, 16], "num_classes": 5, "in_channels": 3, "patch_size": 2}


def make_model(**changes: object) -> ConvNeXt:
    torch.manual_seed(0)
    model = build_model("convnext", {**SIZES, **changes})
    assert isinstance(model, ConvNeXt)
    return model


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.ConvNextConfig(
        depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 24, 32], num_labels=5, layer_norm_eps=1e-6, layer_scale_init_value=0.5
    )
    model: nn.Module = transformers.ConvNextForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_logits_equal_huggingface_on_the_same_weights(reference: nn.Module) -> None:
    model = ConvNeXt(config_from_huggingface(reference.config.to_dict())).eval()
    load_published(model, reference.state_dict(), ARCHITECTURE)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images).logits, rtol=1e-5, atol=1e-5)


# Fields of a backbone, of the loss or the image processor, or without any use.
UNUSED = {"image_size", "stage_names", "out_features", "out_indices"}


def test_every_field_of_transformers_configuration_is_known_with_its_default() -> None:
    theirs = pytest.importorskip("transformers").ConvNextConfig()
    fields = theirs.to_dict()
    assert {name: fields[name] for name in HUGGINGFACE_DEFAULTS} == HUGGINGFACE_DEFAULTS
    assert theirs.attribute_map == HUGGINGFACE_ALIASES
    checked = {"num_stages", "problem_type", "is_encoder_decoder", "id2label"}
    assert set(fields) == {*HUGGINGFACE_DEFAULTS, *checked, *WITHOUT_EFFECT, *UNUSED}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 2},
        {"num_labels": 3},
        {"layer_norm_eps": 1e-3},
        {"layer_scale_init_value": 0.0},
        {"patch_size": 2, "num_channels": 1},
        {"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2},
        *[{"hidden_act": name} for name in ("gelu_new", "gelu_pytorch_tanh", "swish", "relu")],
    ],
    ids=str,
)
def test_every_supported_field_gives_the_logits_of_transformers(tmp_path: Path, fields: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {
        "depths": [1, 1, 2, 1],
        "hidden_sizes": [8, 12, 16, 24],
        "drop_path_rate": 0.1,
        "layer_scale_init_value": 0.5,
    }
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    images = torch.randn(2, model.config.num_channels, 32, 32)
    read = read_model(tmp_path)
    assert read.config.drop_path == 0.1  # type: ignore[union-attr]
    save_huggingface(tmp_path / "again", read, {}, tmp_path)
    again = transformers.ConvNextForImageClassification.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(read(images), model(images).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_stages": 3}, "num_stages = 3 is not supported, only 4"),
        ({"depths": [1, 1], "hidden_sizes": [8, 16]}, "num_stages is missing"),
        ({"patch_size": [4, 2]}, r"patch_size = \[4, 2\]: expected an integer"),
        ({"problem_type": "multi_label_classification"}, "problem_type"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels = 3, but id2label lists 2"),
        ({"num_labels": 0}, "num_classes must be at least 1"),
        ({"hidden_act": "mish"}, 'hidden_act = "mish" is not supported, only gelu'),
    ],
)
def test_fields_that_this_model_does_not_have_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(fields)


def test_names_of_classes_survive_the_way_through_the_own_format(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    labels = {0: "cat", 1: "dog", 2: "fish"}
    config = transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], id2label=labels)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "hf")
    save_model(tmp_path / "own", read_model(tmp_path / "hf"), tokenizer=tmp_path / "hf")
    save_huggingface(tmp_path / "again", read_model(tmp_path / "own"), {}, tmp_path / "own")
    assert transformers.ConvNextConfig.from_pretrained(tmp_path / "again").id2label == labels


def test_a_backbone_without_classifier_is_refused(tmp_path: Path) -> None:
    state = {name: t for name, t in make_model().state_dict().items() if not name.startswith("head.")}
    torch.save(state, tmp_path / "backbone.pt")
    with pytest.raises(ValueError, match=r"backbone\.pt: .* missing head\.weight, the classifier"):
        read_model(tmp_path / "backbone.pt")


def test_names_are_those_of_the_original_code() -> None:
    names = set(make_model(activation="gelu").state_dict())
    assert {"downsample_layers.0.0.weight", "downsample_layers.1.1.bias", "head.weight", "norm.bias"} <= names
    block = {"dwconv.weight", "norm.weight", "pwconv1.weight", "pwconv2.bias", "gamma"}
    assert {f"stages.1.0.{name}" for name in block} <= names


def test_loads_its_own_names_and_refuses_another_size() -> None:
    source, target = make_model(), make_model()
    with torch.no_grad():
        source.head.weight.add_(1.0)
    load_published(target, source.state_dict(), ARCHITECTURE)
    assert torch.equal(target.head.weight, source.head.weight)
    with pytest.raises(ValueError, match=r"head\.weight is \[5, 16\], the model's is \[6, 16\]"):
        load_published(make_model(num_classes=6), source.state_dict(), ARCHITECTURE)


def test_presets_have_the_published_parameter_counts() -> None:
    for name, millions in (("convnext-atto", 3.7), ("convnext-tiny", 28.6), ("convnext-large", 197.8)):
        with torch.device("meta"):
            model = ConvNeXt(ConvNeXtConfig(**CONVNEXT_PRESETS[name]))  # type: ignore[arg-type]
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_stochastic_depth_keeps_the_expectation_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    branch = torch.ones(20_000, 1, 1, 1)
    dropped = drop_samples(branch, 0.25, training=True)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop_samples(branch, 0.25, training=False), branch)
    rates = [block.drop_path for block in make_model(drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_loss_takes_classes_and_probabilities_and_smooths_only_in_training() -> None:
    model, images = make_model(layer_scale=1.0).eval(), torch.randn(4, 3, 8, 8)
    classes = torch.tensor([0, 1, 2, 4])
    hard = model(images, classes)
    torch.testing.assert_close(hard, model(images, nn.functional.one_hot(classes, 5).float()))
    model.label_smoothing = 0.1
    torch.testing.assert_close(model(images, classes), hard)
    expected = nn.functional.cross_entropy(model(images), classes, label_smoothing=0.1)
    torch.testing.assert_close(model.train()(images, classes), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_takes_the_images_of_a_data_set_and_learns(dtype: torch.dtype) -> None:
    model = make_model(layer_scale=1.0).to(dtype)
    loss = model(torch.randn(2, 3, 8, 8), torch.tensor([0, 4]))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_one_activation_per_block() -> None:
    model = make_model(activation=["gelu", {"name": "hermite", "degree": 3}, "gelu"])
    assert [bool(list(block.act.parameters())) for block in model.blocks] == [False, True, False]
    with pytest.raises(ValueError, match="length 1 for 3 layers"):
        make_model(activation=["gelu"])
    with pytest.raises(ValueError, match="equally long lists"):
        make_model(dims=[8])


def test_operations_per_image_are_those_of_the_paper() -> None:
    """Table 1 of Liu et al. (2022): 4.5 G multiply-adds for a forward pass of ConvNeXt-T at 224 × 224, 15.4 G for B."""
    for name, billions in (("convnext-tiny", 4.5), ("convnext-base", 15.4)):
        with torch.device("meta"):
            model = ConvNeXt(ConvNeXtConfig(**CONVNEXT_PRESETS[name]))  # type: ignore[arg-type]
        assert model.flops_per_image(224, 224) / 6e9 == pytest.approx(billions, abs=0.05)
