"""The report stage: a page that stands alone, whose figures are those of the evaluation; statistics over repeats."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from training_support import make_context, read_events

from polytrope.ops import build_activation
from polytrope.pipeline.data.analysis_file import (
    Analysis,
    InputStatistics,
    MergedUnits,
    MergingFigures,
    write_analysis,
)
from polytrope.pipeline.data.circuit_file import CircuitRecord, write_circuit
from polytrope.pipeline.data.conversion_file import ConversionRecord, write_conversion
from polytrope.pipeline.data.lineage import Lineage, read_origin, write_lineage
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.stages.analyze.analyses.kernel import analyse_kernel
from polytrope.pipeline.stages.analyze.analyses.signal import analyse_signal
from polytrope.pipeline.stages.analyze.parameters import KernelOptions, SignalOptions
from polytrope.pipeline.stages.analyze.subject import AnalysedActivation
from polytrope.pipeline.stages.report.parameters import ReportParameters
from polytrope.pipeline.stages.report.report import check, report
from polytrope.pipeline.stages.report.statistics import holm, mean_interval, paired_p_value
from polytrope.pipeline.support.figures import (
    THEMES,
    Curve,
    Theme,
    draw_confusion,
    draw_losses,
    evenly,
    render,
    short_layer,
)

ENTROPY = 5.5


def make_layers(shift: float) -> list[dict[str, Any]]:
    x = np.linspace(-3, 3, 31)
    return [
        {
            "name": f"block {index + 1}",
            "activation": "gelu",
            "mean": 0.0,
            "std": 1.0,
            "minimum": -3.0,
            "maximum": 3.0,
            "output_mean_square": 0.4,
            "edges": [-3.0, 3.0],
            "density": np.exp(-(np.linspace(-3, 3, 20) ** 2)).tolist(),
            "x": x.tolist(),
            "y": (np.maximum(x, 0) + shift).tolist(),
        }
        for index in range(2)
    ]


ANSWERS = {"task": "derivative", "lines": 200, "too_long": 3, "valid": 190, "correct": 157, "exact": 120}


def make_evaluation(directory: Path, losses: dict[str, float]) -> Artifact:
    directory.mkdir()
    content = {
        "format": 1,
        "kind": "text",
        "dataset": {
            "name": "a corpus",
            "digest": "0" * 64,
            "tokenizer": {"kind": "bpe", "vocab_size": 512},
            "sequence_length": 64,
            "splits": {"train": {"documents": 90, "tokens": 90_000}, "validation": {"documents": 10, "tokens": 10_000}},
        },
        "unigram_entropy": ENTROPY,
        "protocol": {"samples": 100, "stride": None, "precision": "fp32"},
        "models": {
            label: {
                "stage": f"train-{label}",
                "digest": f"digest of {label}",
                "loss": loss,
                "perplexity": float(np.exp(loss)),
                "bits_per_byte": loss / 2,
                "top1": 0.3,
                "top5": 0.5,
                "calibration_error": 0.01,
                "tokens": 6400,
                "bytes": 20_000,
                "parameters": 123_456,
                "activation": "gelu" if "gelu" in label else "hermite, degree 3",
                "sample": f"text of {label} <script>alert('&')</script>",
                "layers": make_layers(loss),
            }
            | ({"answers": ANSWERS} if label == "hermite" else {})
            if np.isfinite(loss)
            else {"stage": "train", "digest": "f" * 64, "failure": "diverged at step 7: gradient norm is nan"}
            for label, loss in losses.items()
        },
    }
    (directory / "evaluation.json").write_text(json.dumps(content))
    return Artifact(directory, "e" * 64, "evaluate")


def make_model(directory: Path, label: str, loss: float) -> Artifact:
    directory.mkdir(parents=True)
    (directory / "model.json").write_text(json.dumps({"format": 1, "architecture": "gpt2", "config": {"n_layer": 2}}))
    summary = {
        "format": 1,
        "architecture": "gpt2",
        "parameters": 123_456,
        "steps": 20,
        "tokens": 1000,
        "train/loss": loss - 0.1,
        "val/loss": loss,
    }
    (directory / "training.json").write_text(json.dumps(summary))
    history: list[dict[str, Any]] = [{"step": step, "train/loss": loss + 1 / step} for step in (5, 10, 15, 20)]
    history += [{"step": step, "val/loss": loss + 1 / step} for step in (10, 20)]
    (directory / "history.json").write_text(json.dumps(history))
    return Artifact(directory, f"digest of {label}", f"train-{label}")


def make_conversion(directory: Path) -> Artifact:
    directory.mkdir()
    x = np.linspace(-3, 3, 41)
    layers = [
        {
            "name": f"transformer.h.{index}.mlp.activation",
            "target": "gelu",
            "family": "hermite",
            "degree": 8,
            "interval": [-2.5, 2.5],
            "config": {"name": "hermite", "degree": 8, "interval": [-2.5, 2.5]},
            "coefficients": [0.1] * 9,
            "relative_error": 0.01,
            "inputs": {"inputs": 1000, "minimum": -3.0, "maximum": 3.0},
            "certificate": {"maximum": 0.02, "rms": 0.01},
            "curve": {
                "x": x.tolist(),
                "target": np.tanh(x).tolist(),
                "fit": (np.tanh(x) + 0.01 * (index + 1)).tolist(),
                "density": np.exp(-(x**2)).tolist(),
            },
        }
        for index in range(2)
    ]
    (directory / "conversion.json").write_text(json.dumps({"format": 1, "layers": layers}))
    (directory / "model.json").write_text(json.dumps({"format": 1, "architecture": "gpt2", "config": {}}))
    return Artifact(directory, "c" * 64, "convert")


def make_report(directory: Path, **parameters: Any) -> dict[str, float]:
    """A report on a baseline, a model from scratch and a converted one."""
    inputs = directory / "inputs"
    inputs.mkdir(parents=True)
    losses = {"gelu": 4.0, "hermite": 4.25, "converted": 4.03}
    conversion = make_conversion(inputs / "convert")
    models = {label: make_model(inputs / label, label, losses[label]) for label in ("gelu", "hermite")}
    models["converted"] = conversion
    return report(
        make_context(directory),
        make_evaluation(inputs / "evaluate", losses),
        models,
        ReportParameters(baseline="gelu", labels={"converted": "GELU → Hermite"}, **parameters),
        conversion,
        Artifact(inputs, "d" * 64, "shard"),
        analysis=make_analysis(inputs / "analyze"),
        circuit=make_circuit_record(inputs / "circuit"),
    )


def make_circuit_record(directory: Path) -> Artifact:
    """Of one layer, with a row outside of a range, and without a loss."""
    directory.mkdir()
    counts = {"depth": 10, "levels": 18, "degree": 195, "products": 4000, "constant_products": 9000, "additions": 7000}
    division = {
        "name": "transformer.h.0.attn.reciprocal", "measured": [0.5, 3.0], "domain": [0.25, 6.0],
        "relative_error": 2.5e-4, "inputs": 1200, "outside": 1, "minimum": 0.2, "maximum": 2.0,
    }  # fmt: skip
    content = {
        "format": 1, "positions": 4, "width": 8, "vocabulary": 16, "cost": counts, "layers": {"block_0": counts},
        "largest_constant": 3.0, "deviation": 1e-4, "divisions": [division], "activations": [],
        "calibration_samples": 5, "held_out_samples": 3, "loss": None, "loss_with_divisions": 2.5,
    }  # fmt: skip
    write_circuit(directory, CircuitRecord.model_validate(content))
    return Artifact(directory, "c" * 64, "export_circuit")


def make_analysis(directory: Path) -> Artifact:
    """Of a model with all figures, one with a part of them, and one that failed."""
    directory.mkdir()
    activation = build_activation("hermite3")
    inputs = InputStatistics(count=9, mean=0.0, deviation=1.0, minimum=-3.0, maximum=3.0)
    subject = AnalysedActivation("block 1", "hermite, degree 3", activation, [], np.zeros(1), np.ones(1), inputs)
    kernel = analyse_kernel([subject], KernelOptions(name="kernel", frequencies=4))
    signal = analyse_signal([subject], SignalOptions(name="signal"))
    common = {"digest": "a" * 64, "stage": "train"}
    merged = [MergedUnits(distance=0.3, left=[3], share=0.75, loss=2.125)]
    merged.append(MergedUnits(distance=9.0, left=[1], share=0.25, loss=None))
    merging = MergingFigures(names=["block 1"], units=[4], loss=2.0, merged=merged, missing=[])
    models = {
        "gelu": {**common, "kernel": kernel, "signal": signal},
        "hermite": {**common, "kernel": kernel, "merging": merging, "failures": {"arithmetic": "arithmetic: no loss"}},
        "converted": {**common, "failure": "it diverged"},
    }
    data = {"name": "a corpus", "digest": "0" * 64, "samples": 3}
    write_analysis(directory, Analysis.model_validate({"format": 1, "dataset": data, "models": models}))
    return Artifact(directory, "a" * 64, "analyze")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The directory of a report, and the metrics that the stage returned."""
    directory = tmp_path_factory.mktemp("report")
    return directory, make_report(directory)


class PageReader(HTMLParser):
    """Text, image sources and tags of a page; complains about tags that do not match."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.text, self.sources, self.tags, self.stack = "", [], [], []  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "href") and value]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text += data


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text())
    assert reader.stack == []
    return reader


def test_the_page_needs_nothing_from_outside_and_runs_no_script(made: tuple[Path, dict[str, float]]) -> None:
    directory = made[0]
    page = read_page(directory / "output" / "report.html")
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert "<script>alert('&')</script>" in page.text  # a sampled text is text, whatever it contains


def test_every_figure_of_the_table_is_on_the_page_in_the_json_and_in_the_metrics(
    made: tuple[Path, dict[str, float]],
) -> None:
    directory, metrics = made
    figures = json.loads((directory / "output" / "report.json").read_text())
    page = read_page(directory / "output" / "report.html")
    assert [row["label"] for row in figures["table"]] == ["gelu", "hermite", "converted"]
    for row in figures["table"]:
        assert f"{row['loss']:.4f}" in page.text
        assert f"{row['perplexity']:.2f}" in page.text
        assert f"{row['bits_per_byte']:.4f}" in page.text
        assert metrics[f"{row['label']}/val_loss"] == row["loss"]
        assert metrics[f"{row['label']}/perplexity"] == row["perplexity"]
    assert f"{ENTROPY:.4f}" in page.text
    assert "157 of 200" in page.text
    assert "+0.2500" in page.text
    assert figures["table"][1]["difference"] == 0.25
    assert "GELU → Hermite" in page.text
    assert "changed its loss by +0.0300" in page.text


def test_conversion_errors_are_weighted_with_the_inputs_of_each_layer(made: tuple[Path, dict[str, float]]) -> None:
    directory = made[0]
    rows = json.loads((directory / "output" / "report.json").read_text())["conversion"]
    assert [row["maximum_error"] for row in rows] == pytest.approx([0.01, 0.02])
    assert [row["rms_error"] for row in rows] == pytest.approx([0.01, 0.02])  # a constant error, whatever the weights


def test_analyses_are_a_table_with_what_each_model_has_and_plots(made: tuple[Path, dict[str, float]]) -> None:
    directory = made[0] / "output"
    page = (directory / "report.html").read_text()
    whole, part, failed = json.loads((directory / "report.json").read_text())["analysis"]
    assert {name for name in part["figures"] if not name.startswith("merging/")} < whole["figures"].keys()
    assert failed == {"label": "converted", "name": "GELU → Hermite", "failure": "it diverged", "figures": {}}
    assert whole["figures"]["signal/largest_lipschitz"] == pytest.approx(8 / math.sqrt(2.5))  # F'(3)
    assert "<th>Lipschitz constant</th><th>mean frequency of a layer</th>" in page
    assert "<tr><td>gelu</td><td>1.765</td><td>5.06</td>" in page
    assert '<td>GELU → Hermite<small class="bad">it diverged</small></td>' + "<td>–</td>" * 8 in page
    heads = [
        "loss before merging",
        "units left, merged up to 0.3",
        "loss, merged up to 0.3",
        "units left, merged up to 9",
    ]
    assert "".join(f"<th>{head}</th>" for head in heads) in page  # whatever the distances are
    assert '<small class="bad">arithmetic: no loss</small>' in page
    assert "<td>2</td><td>0.75</td><td>2.125</td><td>0.25</td></tr>" in page


def test_a_circuit_is_shown_with_its_depth_its_ranges_and_what_lies_outside(
    made: tuple[Path, dict[str, float]],
) -> None:
    text = re.sub(r"\s+", " ", read_page(made[0] / "output" / "report.html").text)
    assert (
        "Depth 10 (products of two variable factors one after the other), 18 levels; 1,000 products and 2,250" in text
    )
    assert "On 3 held-out samples the loss is – nats per token, with divisions 2.500000." in text
    page = (made[0] / "output" / "report.html").read_text()
    assert '<td>[0.5, 3]</td><td>[0.25, 6]</td><td>2.5e-04</td><td class="bad">1 of 1,200</td>' in page


def test_plots_and_page_are_shown_on_the_workflows_run(made: tuple[Path, dict[str, float]]) -> None:
    directory = made[0]
    plots = sorted(path.name for path in (directory / "output" / "plots").iterdir())
    assert plots == ["conversion.png", "kernel.png", "losses.png", "shapes.png", "variances.png"]
    shown = {event["path"]: event["parent"] for event in read_events(directory, "artifact")}
    assert shown == {"report.html": True, "report.json": True, "plots": True}


def test_the_same_inputs_give_the_same_bytes(made: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    make_report(tmp_path)
    files = [path.relative_to(made[0]) for path in (made[0] / "output").rglob("*.*")]
    assert len(files) == 7
    for path in files:
        assert (made[0] / path).read_bytes() == (tmp_path / path).read_bytes()


def test_models_of_different_budgets_are_marked_and_their_lineage_is_told(tmp_path: Path) -> None:
    losses = {"gelu": 4.0, "tuned": 4.00001}
    models = {label: make_model(tmp_path / label, label, loss) for label, loss in losses.items()}
    first = Lineage(samples=480, tokens=61_440)
    write_lineage(models["gelu"].path, first)
    tuned = first.then("train", "digest of gelu").then("convert", "digest of it", samples=160, tokens=20_480)
    write_lineage(models["tuned"].path, tuned)
    report(make_context(tmp_path), make_evaluation(tmp_path / "evaluate", losses), models, ReportParameters())
    figures = json.loads((tmp_path / "output" / "report.json").read_text())
    assert [row["budget"] for row in figures["table"]] == ["61.4 k tokens", "81.9 k tokens"]
    assert figures["training"][1]["total_tokens"] == 81_920
    text = read_page(tmp_path / "output" / "report.html").text
    assert "These models were trained on different amounts of data" in text
    assert "train → convert" in text
    assert 'class="muted">+0.0000<' in (tmp_path / "output" / "report.html").read_text(), "neither good nor bad"
    write_lineage(models["tuned"].path, first)
    report(make_context(tmp_path / "same"), Artifact(tmp_path / "evaluate", "e", "e"), models, ReportParameters())
    assert "different amounts" not in read_page(tmp_path / "same" / "output" / "report.html").text


def test_what_a_teacher_has_seen_is_told_beside_what_a_model_has(tmp_path: Path) -> None:
    losses = {"gelu": 4.0, "taught": 3.9, "after": 3.8}
    models = {label: make_model(tmp_path / label, label, loss) for label, loss in losses.items()}
    plain, large = Lineage(samples=480, tokens=61_440), Lineage(samples=9600, tokens=1_228_800)
    taught = plain.taught_by("large", "digest of large", large)
    after = large.then("large", "digest of large", 10, 1280).taught_by("large", "digest of large", large)
    for label, lineage in (("gelu", plain), ("taught", taught), ("after", after)):
        write_lineage(models[label].path, lineage)
    report(make_context(tmp_path), make_evaluation(tmp_path / "evaluate", losses), models, ReportParameters())
    figures = json.loads((tmp_path / "output" / "report.json").read_text())
    budgets = ["61.4 k tokens", "61.4 k tokens; taught by large: 1.23 M tokens"]
    assert [row["budget"] for row in figures["table"][:2]] == budgets
    assert figures["table"][2]["budget"] == "1.23 M tokens; taught by large: which it was made from"
    assert [entry.get("teachers") for entry in figures["training"][:2]] == [None, "large: 1.23 M tokens"]
    text = read_page(tmp_path / "output" / "report.html").text
    assert "These models were trained on different amounts of data, their own or their teachers'" in text
    assert text.count("large: 1.23 M tokens") == 2
    [twice, once] = taught.then("taught", "of it").taught_by("taught", "of it", taught).teachers
    assert (twice.stage, once.stage, once.tokens) == ("large", "taught", 61_440), "its own teacher once"
    assert "teachers" not in json.loads((models["gelu"].path / "lineage.json").read_text())


def smaller() -> ConversionRecord:
    dropped = {"blocks": ["h.1"], "into": "h.0.mlp", "total": 4, "distances": {}, "relative_error": 0.1}
    rounded = {"bits": 4, "per": "row", "layers": [], "left": [], "equalized": [], "unequalized": []}
    return ConversionRecord.model_validate(
        {
            "layers": [],
            "dropped": {**dropped, "relative_error_without": 0.2},
            "quantization": {**rounded, "bytes_before": 4_000_000, "bytes_after": 612_345},
        }
    )


DONE = ["1 of 4 blocks dropped", "4-bit weights, 0.612 MB packed"]


def test_what_was_done_to_a_model_stands_below_its_name(tmp_path: Path) -> None:
    losses = {"gelu": 4.0, "smaller": 4.1, "trained": 3.9}
    models = {label: make_model(tmp_path / label, label, loss) for label, loss in losses.items()}
    write_conversion(models["smaller"].path, smaller())
    write_lineage(models["trained"].path, read_origin(models["smaller"].path).then("convert", "digest"))
    report(make_context(tmp_path), make_evaluation(tmp_path / "evaluate", losses), models, ReportParameters())
    figures = json.loads((tmp_path / "output" / "report.json").read_text())
    before = [f"from a model with {part}" for part in DONE]
    assert [row.get("structure") for row in figures["table"]] == [None, DONE, before]
    text = read_page(tmp_path / "output" / "report.html").text
    assert all(text.count(part) == 2 for part in DONE)


def make_study(directory: Path, record: ConversionRecord | None = None, **parameters: Any) -> dict[str, Any]:
    """Three activations, three seeds; the second is better than the baseline on every seed by nearly the same.

    Args:
        record: of what was done to the models of the second, which have seen other samples than the first.
    """
    inputs = directory / "inputs"
    inputs.mkdir(parents=True)
    effects = {"gelu": 0.0, "hermite": -0.05, "relu": 0.01}
    noise = {("relu", 0): 0.05, ("relu", 1): -0.05, ("hermite", 2): 0.002}
    losses = {
        f"train[activation={name},seed={seed}]": 4.0 + effect + 0.1 * seed + noise.get((name, seed), 0.0)
        for name, effect in effects.items()
        for seed in range(3)
    }
    models = {label: make_model(inputs / str(index), label, losses[label]) for index, label in enumerate(losses)}
    for label in models if record is not None else ():
        if "hermite" in label:
            write_conversion(models[label].path, record)
        if "relu" not in label:
            write_lineage(models[label].path, Lineage(samples=480 if "hermite" in label else 960))
    settings = ReportParameters(group_by="activation", baseline="gelu", **parameters)
    metrics = report(make_context(directory), make_evaluation(inputs / "evaluate", losses), models, settings)
    return {**json.loads((directory / "output" / "report.json").read_text()), "metrics": metrics}


def test_repeats_become_means_with_intervals_and_paired_differences(tmp_path: Path) -> None:
    figures = make_study(tmp_path)
    groups = {group["group"]: group for group in figures["groups"]}
    assert [group["group"] for group in figures["groups"]] == ["hermite", "gelu", "relu"]
    gelu, hermite = [4.0, 4.1, 4.2], [3.95, 4.05, 4.152]
    expected = stats.t.interval(0.95, 2, loc=np.mean(gelu), scale=stats.sem(gelu))
    assert groups["gelu"]["loss"]["mean"] + groups["gelu"]["loss"]["half_width"] == pytest.approx(expected[1])
    assert groups["hermite"]["difference"]["p_value"] == pytest.approx(stats.ttest_rel(hermite, gelu).pvalue)
    assert groups["hermite"]["difference"]["holm_p_value"] >= groups["hermite"]["difference"]["p_value"]
    assert groups["hermite"]["difference"]["pairs"] == 3
    assert "difference" not in groups["gelu"]
    assert figures["metrics"]["hermite/val_loss"] == pytest.approx(np.mean(hermite))
    text = read_page(tmp_path / "output" / "report.html").text
    assert "Outside the 95 % interval of the paired difference to gelu: better: hermite." in text
    assert (tmp_path / "output" / "plots" / "groups.png").exists()


def test_what_was_done_to_the_models_of_a_group_stands_below_its_name(tmp_path: Path) -> None:
    groups = make_study(tmp_path, smaller())["groups"]
    assert {group["group"]: group.get("structure") for group in groups} == {"hermite": DONE, "gelu": None, "relu": None}
    budgets = {"hermite": ["480 samples"], "gelu": ["960 samples"], "relu": ["trained elsewhere"]}
    assert {group["group"]: group.get("budgets") for group in groups} == budgets
    text = read_page(tmp_path / "output" / "report.html").text
    assert "These models were trained on different amounts of data" in text
    assert all(text.count(budget) == 1 for [budget] in budgets.values())
    text = read_page(tmp_path / "output" / "report.html").text
    assert all(text.count(part) == 1 for part in DONE)


def test_a_control_is_compared_with_beside_the_baseline(tmp_path: Path) -> None:
    figures = make_study(tmp_path, control="relu")
    groups = {group["group"]: group for group in figures["groups"]}
    beyond = groups["hermite"]["difference_to_control"]
    assert beyond["values"] == pytest.approx([-0.11, -0.01, -0.058])
    assert beyond["p_value"] == pytest.approx(stats.ttest_1samp([-0.11, -0.01, -0.058], 0.0).pvalue)
    assert beyond["holm_p_value"] == beyond["p_value"]  # one comparison: the baseline is not compared with the control
    assert groups["relu"]["difference"]["mean"] == pytest.approx(0.01)
    assert "difference_to_control" not in groups["relu"]
    assert "difference_to_control" not in groups["gelu"]
    text = read_page(tmp_path / "output" / "report.html").text
    assert "-0.0593" in text
    assert "No difference to relu is outside its 95 % interval." in text


def test_failures_are_rows_of_their_own_and_in_no_mean(tmp_path: Path) -> None:
    losses = {
        "train[activation=gelu,seed=0]": 4.0,
        "train[activation=gelu,seed=1]": 4.2,
        "train[activation=hermite,seed=0]": math.nan,
        "train[activation=hermite,seed=1]": 4.1,
        "train[activation=fourier,seed=0]": math.nan,
    }
    models = {label: make_model(tmp_path / str(index), label, 4.0) for index, label in enumerate(losses)}
    settings = ReportParameters(group_by="activation", baseline="gelu")
    metrics = report(make_context(tmp_path), make_evaluation(tmp_path / "evaluate", losses), models, settings)
    figures = json.loads((tmp_path / "output" / "report.json").read_text())
    groups = {group["group"]: group for group in figures["groups"]}
    assert list(groups) == ["gelu", "hermite", "fourier"]  # without a success: last
    assert (groups["hermite"]["count"], groups["hermite"]["failed"]) == (1, 1)
    assert groups["hermite"]["loss"]["mean"] == 4.1
    assert groups["hermite"]["difference"]["pairs"] == 1
    assert (groups["fourier"]["count"], groups["fourier"]["failed"]) == (0, 1)
    assert metrics["fourier/failed"] == 1.0
    text = read_page(tmp_path / "output" / "report.html").text
    assert "train[activation=fourier,seed=0]diverged at step 7: gradient norm is nan" in text


def test_pictures_have_the_names_of_their_classes_and_no_perplexity(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "evaluate", {"gelu": 1.0, "hermite": 1.25})
    path = evaluation.path / "evaluation.json"
    content = json.loads(path.read_text())
    content["kind"], content["unigram_entropy"] = "images", None
    content["dataset"] = {**content["dataset"], "class_names": ["cat", "dog"], "splits": {"validation": {"images": 4}}}
    for row in content["models"].values():  # as evaluations were written before
        for key in ("tokens", "bytes", "bits_per_byte", "sample"):
            del row[key]
        row |= {"images": 4, "confusion": [[1, 1], [0, 2]]}
    content["models"]["hermite"]["drift_missing"] = "no drift from `relu`, whose training failed: diverged at step 3"
    path.write_text(json.dumps(content))
    metrics = report(make_context(tmp_path), evaluation, {}, ReportParameters())
    page = read_page(tmp_path / "output" / "report.html").text
    figures = json.loads((tmp_path / "output" / "report.json").read_text())
    assert "perplexity" not in page
    assert not any("perplexity" in name for name in [*metrics, *figures["table"][0]])
    assert "no drift from relu, whose training failed: diverged at step 3" in page
    assert (tmp_path / "output" / "plots" / "confusion.png").exists()


def test_a_confusion_matrix_is_labelled_with_its_classes() -> None:
    figure = draw_confusion(THEMES["light"], {"gelu": [[1, 0], [1, 2]]}, ["cat", "a very long name of a class"])
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["cat", "a very long n…"]
    many = draw_confusion(THEMES["light"], {"gelu": np.eye(100).tolist()}, [str(number) for number in range(100)])
    ticks = many.axes[0].yaxis
    assert [label.get_text() for label in ticks.get_ticklabels()] == [str(int(place)) for place in ticks.get_ticklocs()]
    assert len(ticks.get_ticklocs()) == 20


@pytest.mark.parametrize("entries", [5, 40])
def test_long_names_of_branches_stay_inside_a_plot(entries: int) -> None:
    names = [f"train[activation=gelu_tanh,seed={seed}]" for seed in range(entries)]
    curves = [Curve(name, [1], [3.0], [1], [2.0]) for name in names]
    drawn: list[Figure] = []

    def draw(theme: Theme) -> Figure:
        drawn.append(draw_losses(theme, curves, None, "token"))
        return drawn[0]

    render(draw, "light")
    (figure,) = drawn
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    place = legend.get_window_extent()
    assert place.x0 >= 0
    assert place.x1 <= figure.bbox.width
    assert figure.axes[0].get_window_extent().height > 250  # of 420 pixels: the curves keep their room


def test_a_start_far_above_the_unigram_entropy_is_cut_off_and_said() -> None:
    curves = [Curve("wild", [1, 2, 3], [500.0, 3.2, 3.0], [0, 3], [345.6, 2.9]), Curve("gelu", [1], [8.0], [1], [2.5])]
    axes = draw_losses(THEMES["light"], curves, 6.0, "token").axes[0]
    assert 12.0 < axes.get_ylim()[1] < 14.0  # twice the entropy, and some room
    assert [text.get_text() for text in axes.texts] == [
        "not shown: 2 losses above 12, up to 500",
        "unigram entropy 6.00",
    ]
    curves[1] = Curve("diverged", [1], [8.0], [1, 2], [400.0, 90.0])
    axes = draw_losses(THEMES["light"], curves, 6.0, "token").axes[0]
    assert 90.0 < axes.get_ylim()[1] < 105.0  # how a training ended is shown
    for shown, entropy in ((curves, None), ([Curve("gelu", [1], [8.0], [1], [2.5])], 6.0)):
        axes = draw_losses(THEMES["light"], shown, entropy, "token").axes[0]
        assert not any("not shown" in text.get_text() for text in axes.texts)


def test_few_values_and_many_comparisons() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert mean_interval([2.0]).half_width is None
    assert paired_p_value([1.0]) is None
    assert paired_p_value([1.0, 1.0]) == 0.0


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="baseline: `silu` is none of the models"):
        check(ReportParameters(baseline="silu"), {"models": {"gelu": SimpleNamespace()}})
    with pytest.raises(UserError, match="control: a value of `group_by`"):
        check(ReportParameters(control="gelu"), {})
    with pytest.raises(UserError, match="control: `affine` is none of the models"):
        check(
            ReportParameters(group_by="activation", control="affine"),
            {"models": {"train[activation=gelu]": SimpleNamespace()}},
        )
    with pytest.raises(UserError, match="is not a branch of that axis"):
        check(ReportParameters(baseline="gelu", group_by="activation"), {"models": {"gelu": SimpleNamespace()}})
    (tmp_path / "inputs").mkdir()
    evaluation = make_evaluation(tmp_path / "evaluate", {"gelu": 4.0})
    stranger = {"relu": make_model(tmp_path / "relu", "relu", 4.0)}
    with pytest.raises(UserError, match="`relu` was not evaluated"):
        report(make_context(tmp_path), evaluation, stranger, ReportParameters())


def test_layers_are_named_and_thinned_evenly() -> None:
    assert short_layer("transformer.h.3.mlp.activation", 3) == "block 4"
    assert evenly(list(range(12)), 4) == [0, 4, 7, 11]
    assert re.match("layer 6", short_layer("encoder.1.stages.2.blocks.3.activation_function", 5))
