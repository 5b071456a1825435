"""Tables of figures that are computed while the site is built; a page names one as `<!-- generated: NAME … -->`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots
from reference_pages import code, plain, table

import polytrope.ops
from polytrope.ops import Moments, build_activation
from polytrope.ops.modules import CLASSICAL, LEARNABLE, LearnableActivation

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def moments(name: str, *degrees: str) -> str:
    """E[F²] and E[F'²] under N(0, 1) for each degree and start."""
    inits = [init for init in plots.initializations(name) if init != "stable"]  # which has those of the first one
    heads = ["degree"] + [f"{what}, `{init}`" for init in inits for what in ("E[F²]", "E[F′²]")]
    rows = []
    for degree in degrees:
        found = [_moments(name, degree, init) for init in inits]
        rows.append([degree, *(f"{value:.3f}" for one in found for value in (one.value, one.derivative))])
    return table([head.replace("[", "\\[").replace("]", "\\]") for head in heads], rows)


def slopes(name: str, *degrees: str) -> str:
    """Slope of the map of variances q → E[F(√q z)²] at q = 1, for each degree and start."""
    inits = plots.initializations(name)
    rows = [[degree, *(f"{_moments(name, degree, init).slope:.3f}" for init in inits)] for degree in degrees]
    return table(["degree", *(f"slope, `{init}`" for init in inits)], rows)


def _moments(name: str, degree: str, init: str) -> Moments:
    return polytrope.ops.moments(build_activation({"name": name, "degree": int(degree), "init": init}))


def fits(*names: str) -> str:
    """How well each degree fits GELU on [-4, 4]."""
    rows = []
    for name in names:
        for degree in plots.FAMILIES[name][1]:
            found = plots.gelu_fit(name, degree)
            certificate = found.certificate
            figures = (certificate.rms, certificate.maximum, certificate.rms_derivative, certificate.maximum_outside)
            rows.append([code(name), str(degree), str(len(found.coefficients)), *(f"{value:.1e}" for value in figures)])
    heads = ["family", "degree", "numbers", "rms error", "largest error", "rms error of the slope", "largest outside"]
    return table(heads, rows)


def activations() -> str:
    """Names and options that `build_activation` accepts."""
    rows = [[code(name), "", "a classical activation, without options"] for name in CLASSICAL]
    for name, make in LEARNABLE.items():
        options = {**_options(make)}
        shown = ", ".join(code(f"{option}: {json.dumps(default)}") for option, default in options.items())
        rows.append([code(name), shown, plain((inspect.getdoc(make) or "").split("\n")[0])])
    return table(["name", "options of its own, with defaults", "function"], rows)


def _options(make: Callable[..., Any]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.default is not parameter.empty and name != "init"
    }


def shared_options() -> str:
    """Options that all families take."""
    described = {}
    for line in (inspect.getdoc(LearnableActivation) or "").partition("Args:\n")[2].split("\n"):
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            described[name] = text
        elif line.strip():
            described[name] += " " + line.strip()
    return table(["option", "meaning"], [[code(name), plain(text)] for name, text in described.items()])


def results(*names: str) -> str:
    """The files of benchmarks/results, as they are; without a file, how to make it."""
    parts = []
    for name in names or sorted(path.stem for path in RESULTS.glob("*.json")):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            command = f"python -m benchmarks.{name.partition('-')[0]}"
            parts.append(f"Not measured yet: `{command}` writes `benchmarks/results/{name}.json`.\n")
            continue
        if path.with_suffix(".md").exists():
            parts.append(
                re.sub(r"^#+ .*\n", "", path.with_suffix(".md").read_text(encoding="utf-8"), flags=re.MULTILINE)
            )
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        about = {key: value for key, value in content.items() if key != "results"} if isinstance(content, dict) else {}
        measured = content.get("results", content) if isinstance(content, dict) else content
        parts.append(_about(about) if measured is not content else "")
        parts.append(table(["measured", "value"], _rows("", measured)))
    return "\n".join(parts)


def pictures(name: str) -> str:
    """The plots of a benchmark, `benchmarks/results/NAME-*.png`; for pages one folder below docs/."""
    found = sorted(RESULTS.glob(f"{name}-*.png"))
    return "\n\n".join(f"![{path.stem}](../../benchmarks/results/{path.name})" for path in found) + "\n"


def _about(content: dict[str, Any]) -> str:
    return "".join(f"- {plain(key)}: {plain(_text(value))}\n" for key, value in content.items())


def _rows(prefix: str, content: Any) -> list[list[str]]:
    if isinstance(content, dict):
        return [row for key, value in content.items() for row in _rows(f"{prefix} · {key}".strip(" ·"), value)]
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return [row for index, value in enumerate(content) for row in _rows(f"{prefix} {index + 1}", value)]
    return [[plain(prefix), plain(_text(content))]]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)


TABLES: dict[str, Callable[..., str]] = {
    "moments": moments,
    "slopes": slopes,
    "fits": fits,
    "activations": activations,
    "shared_options": shared_options,
    "results": results,
    "pictures": pictures,
}
