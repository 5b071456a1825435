"""The analyses `bilinear` and `rank`, on every architecture, against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_support import SEQUENCE_LENGTH, make_context, make_dataset, read_events

from polytrope.models import build_model, find_architecture
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.convert import convert
from polytrope.pipeline.data.analysis_file import read_analysis
from polytrope.pipeline.data.model_inputs import read_tensors
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.stages.analyze.analyses.bilinear import (
    encode,
    fit_autoencoder,
    hoyer_density,
    latent_eigenvalues,
    principal_errors,
    squared_errors,
)
from polytrope.pipeline.stages.analyze.analyze import analyze
from polytrope.pipeline.stages.analyze.parameters import AnalyzeParameters, BilinearOptions
from polytrope.pipeline.stages.shard.parameters import ShardImagesParameters, ShardNumbersParameters
from polytrope.pipeline.stages.shard.shard_images import shard_images
from polytrope.pipeline.stages.shard.shard_numbers import shard_numbers

NAMES = [{"name": "bilinear", "vectors": 200, "steps": 40}, {"name": "rank", "energy": 0.99}]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_the_error_of_the_gram_matrix_is_that_of_the_squares_and_the_eigenvalues_are_those_of_the_forms() -> None:
    left, right, x = random(10, 6), random(10, 6, seed=1), unit(random(50, 6, seed=2))
    forms = 0.5 * (left[:, :, None] * right[:, None] + right[:, :, None] * left[:, None])
    features = torch.einsum("ni,mij,nj->nm", x, forms, x)
    rebuilt = torch.einsum("nm,mij->nij", features, forms)
    explicit = (rebuilt - x[:, :, None] * x[:, None]).square().sum((1, 2))
    torch.testing.assert_close(encode(left, right, x), features, rtol=0, atol=1e-13)
    torch.testing.assert_close(squared_errors(left, right, features), explicit, rtol=0, atol=4e-12)
    values = torch.linalg.eigvalsh(forms)
    torch.testing.assert_close(latent_eigenvalues(left, right), values[:, [0, -1]], rtol=0, atol=1e-13)
    assert values[:, 1:-1].abs().max() < 1e-13


def test_density_is_one_of_equal_numbers_and_zero_of_one_alone() -> None:
    rows = torch.tensor([[1.0, -1, 1, -1], [0, 7, 0, 0], [0, 0, 0, 0], [3, 4, 0, 0]], dtype=torch.float64)
    assert hoyer_density(rows).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.4])
    assert hoyer_density(rows[:, :1]).tolist() == [1.0] * 4


def test_principal_components_are_those_of_the_squares() -> None:
    fitted, asked = unit(random(60, 5)), unit(random(20, 5, seed=1))
    squares = (fitted[:, :, None] * fitted[:, None]).flatten(1)
    other = (asked[:, :, None] * asked[:, None]).flatten(1)
    for components in (1, 4, 15, 60):
        basis = torch.linalg.svd(squares, full_matrices=False).Vh[: min(components, 15)]
        expected = (other - other @ basis.T @ basis).square().sum(1)
        torch.testing.assert_close(principal_errors(fitted, asked, components), expected, rtol=0, atol=1e-10)


def test_a_fit_finds_planted_forms_and_is_the_same_again() -> None:
    x = unit(random(400, 2) @ torch.linalg.qr(random(8, 2, seed=1)).Q.T)  # a plane: three squares span all
    options = BilinearOptions(name="bilinear", sparsity=0.0)
    left, right = fit_autoencoder(x, 32, options)
    assert float(squared_errors(left, right, encode(left, right, x)).mean()) < 1e-4
    again = fit_autoencoder(x, 32, options)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])
    other = fit_autoencoder(x, 32, BilinearOptions(name="bilinear", sparsity=0.0, seed=1))
    assert not torch.equal(left, other[0])
    vectors = unit(random(300, 8))
    densities = []
    for sparsity in (0.0, 1.0):
        fit = fit_autoencoder(vectors, 32, BilinearOptions(name="bilinear", sparsity=sparsity))
        features = encode(*fit, vectors)
        densities.append(float(hoyer_density(features).mean()))
        least = principal_errors(vectors, vectors, 32).mean()  # no linear map of the squares through 32 is nearer
        assert squared_errors(*fit, features).mean() > least - 1e-9
    assert densities[1] < 0.8 * densities[0]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Artifact, Path]]:
    """A data set and a model of each architecture."""
    directory = tmp_path_factory.mktemp("subjects")
    text = make_dataset(directory / "text")
    source = {"kind": "circle", "rows": 400, "amplitudes": [1.0]}
    shard_numbers(make_context(directory / "numbers"), ShardNumbersParameters.model_validate({"source": source}))
    shard_images(make_context(directory / "images"), ShardImagesParameters())
    configurations: dict[str, tuple[Artifact, dict[str, Any]]] = {
        "gpt2": (
            text,
            {"vocab_size": 320, "sequence_length": SEQUENCE_LENGTH, "n_layer": 2, "n_head": 2, "n_embd": 16},
        ),
        "mlp": (
            Artifact(directory / "numbers" / "output", "d" * 64, "shard_numbers"),
            {"inputs": 2, "outputs": 1, "widths": [24, 16], "loss": "mse"},
        ),
        "convnext": (
            Artifact(directory / "images" / "output", "d" * 64, "shard_images"),
            {"in_channels": 1, "num_classes": 10, "depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "patch_size": 1},
        ),
    }
    found = {}
    for architecture, (dataset, settings) in configurations.items():
        torch.manual_seed(0)
        save_model(
            directory / architecture,
            build_model(architecture, {**settings, "activation": "hermite3"}),
            tokenizer=dataset.path if architecture == "gpt2" else None,
        )
        found[architecture] = (dataset, directory / architecture)
    return found


@pytest.mark.parametrize("architecture", ["gpt2", "mlp", "convnext"])
def test_the_stage_says_both_of_every_architecture(
    tmp_path: Path, subjects: dict[str, tuple[Artifact, Path]], architecture: str
) -> None:
    dataset, path = subjects[architecture]
    parameters = AnalyzeParameters.model_validate({"analyses": NAMES, "samples": 40})
    models = {"model": Artifact(path, "digest", "train")}
    metrics = analyze(make_context(tmp_path / "run"), dataset, models, parameters)
    found = read_analysis(tmp_path / "run" / "output").models["model"]
    assert found.failures == {}
    assert found.bilinear is not None
    assert found.bilinear.missing == []
    for layer in found.bilinear.layers:
        assert layer.latents == 4 * layer.width == len(layer.eigenvalues)
        assert 0.0 <= layer.error < 1.0
        assert 2 * layer.latents * layer.width >= layer.principal_components * layer.width * (layer.width + 1) // 2
        assert layer.linear_error <= layer.principal_error + 1e-9
        assert all(low <= 1e-12 and high >= -1e-12 for low, high in layer.eigenvalues)
    assert metrics["model/bilinear/error"] > 0.0
    # neither has a picture: MLflow is not told of one that it then misses
    assert [event["path"] for event in read_events(tmp_path / "run", "artifact")] == ["analysis.json"]
    assert not (tmp_path / "run" / "output" / "plots").exists()

    model = load_model(path)
    reader = open_split(dataset.path, "validation")
    inputs = read_tensors(reader, torch.arange(min(40, len(reader))).numpy())[0]
    assert found.rank is not None
    assert found.rank.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.rank.layers
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, module in linears.items():
        module.register_forward_hook(
            lambda _, x, y, name=name: seen.update({name: (x[0].flatten(0, -2).double(), y.flatten(0, -2).double())})
        )
    with torch.no_grad():
        model(find_architecture(architecture).prepare(inputs))
    saved = 0
    for entry in found.rank.layers:
        linear = linears[entry.name]
        x, y = seen[entry.name]
        if linear.bias is not None:
            y = y - linear.bias.double()
        ranks = []
        for part in (x, y):  # the definition, by singular values
            squares = torch.linalg.svdvals(part.detach()).square()
            ranks.append(1 + int((squares.cumsum(0) < 0.99 * squares.sum()).sum()))
        assert [entry.input_rank, entry.output_rank] == ranks
        assert entry.rank == min(ranks)
        assert entry.utilisation == entry.rank / min(linear.weight.shape)
        saved += max(0, linear.weight.numel() - entry.rank * sum(linear.weight.shape))
    assert found.rank.saved == saved
    left = {line.partition(":")[0] for line in found.rank.missing}
    assert left | {entry.name for entry in found.rank.layers} == set(linears)
    assert metrics["model/rank/saved_share"] == pytest.approx(saved / found.rank.parameters)


def test_factors_at_that_energy_save_what_the_analysis_says(
    tmp_path: Path, subjects: dict[str, tuple[Artifact, Path]]
) -> None:
    dataset, path = subjects["mlp"]
    parameters = AnalyzeParameters.model_validate({"analyses": [NAMES[1]], "samples": 40})
    analyze(make_context(tmp_path / "run"), dataset, {"model": Artifact(path, "digest", "train")}, parameters)
    found = read_analysis(tmp_path / "run" / "output").models["model"].rank
    assert found is not None
    model, reader = load_model(path), open_split(dataset.path, "validation")
    inputs = read_tensors(reader, torch.arange(40).numpy())[0]
    made = convert(model, [inputs], factorize={"energy": 0.99}, samples=None)
    assert found.saved > 0
    left = sum(parameter.numel() for parameter in made.model.parameters())
    assert found.parameters - left == found.saved


def test_what_has_no_figures_says_why(tmp_path: Path, subjects: dict[str, tuple[Artifact, Path]]) -> None:
    dataset, _ = subjects["mlp"]
    torch.manual_seed(0)
    sizes = {"inputs": 2, "outputs": 1, "widths": [8, 8], "loss": "mse", "activation": "relu"}
    model: Any = build_model("mlp", sizes)
    with torch.no_grad():
        model.blocks[1].layer.bias.sub_(100.0)
    save_model(tmp_path / "dead", model)
    models = {"dead": Artifact(tmp_path / "dead", "digest", "train")}
    analyses = [{"name": "bilinear", "latents": 4}, "rank"]
    context = make_context(tmp_path / "run")
    analyze(context, dataset, models, AnalyzeParameters.model_validate({"analyses": analyses}))
    found = read_analysis(tmp_path / "run" / "output").models["dead"]
    assert found.bilinear is not None
    assert [layer.name for layer in found.bilinear.layers] == ["block 1"]
    assert found.bilinear.missing == ["block 2: bilinear: 0 vectors other than 0 are too few; raise `samples`"]
    # 17 components would have no more numbers than 40 latents, and three vectors have three
    few = AnalyzeParameters.model_validate({"analyses": [{"name": "bilinear", "latents": 40}], "samples": 6})
    analyze(make_context(tmp_path / "few"), dataset, models, few)
    fitted = read_analysis(tmp_path / "few" / "output").models["dead"].bilinear
    assert fitted is not None
    assert fitted.layers[0].principal_components == 3
    large = AnalyzeParameters.model_validate({"analyses": [{"name": "bilinear", "latents": 10**6}]})
    with pytest.raises(UserError, match=r"block 1: bilinear: 1000000 latents of 8 features .* lower `latents`"):
        analyze(make_context(tmp_path / "large"), dataset, models, large)
