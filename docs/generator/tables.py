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
    inits = [init for init in plots.initializations(name) if init != "stable"]  # which has those of variance_preserving
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
    """The tables that benchmarks wrote for people, `benchmarks/results/NAME.md`."""
    parts = []
    for name in names:
        path = RESULTS / f"{name}.md"
        if path.exists():
            parts.append(re.sub(r"^#+ .*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        else:
            parts.append(f"Not measured yet: `python -m benchmarks.{name}` writes `benchmarks/results/{name}.md`.\n")
    return "\n".join(parts)


def kernels() -> str:
    """The activations on a CPU: a row per activation, 32 and 16 bits in one cell."""
    content = json.loads((RESULTS / "ops-cpu.json").read_text(encoding="utf-8"))
    machine = content["machine"]
    found: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        config = dict(row["config"])
        name = f"{config.pop('name')} {config.pop('degree')}"
        found.setdefault(", ".join([name, *(_option(*option) for option in config.items())]), {})[row["dtype"]] = row
    rows = []
    for name, kinds in found.items():
        wide, narrow = kinds["float32"], kinds["bfloat16"]
        both = [[f"{row[key]:.2f}" for row in (wide, narrow)] for key in ("times_gelu", "faster_than_compiled")]
        times = [f"{row['polytrope'][key]:.2f}" for key in ("forward_ms", "backward_ms") for row in (wide, narrow)]
        ortho = wide.get("faster_than_torchortho")
        bar = wide.get("bar_times_gelu")
        cells = [f"{times[0]} / {times[1]}", f"{times[2]} / {times[3]}", *(" / ".join(pair) for pair in both)]
        rows.append([name, *cells, "" if bar is None else f"{bar:g}", "" if ortho is None else f"{ortho:,.0f}"])
    heads = ["activation, degree", "forward, ms", "backward, ms", "× GELU's time", "times faster than torch.compile"]
    shape = " × ".join(map(str, content["shape"]))
    return (
        f"{shape} elements, {machine['threads']} threads ({machine['instruction_set']}), torch {machine['torch']}; "
        f"medians of {content['repeats']} rounds. In each cell float32 / bfloat16.\n\n"
        + table([*heads, "bar, × GELU", "times faster than torchortho, float32"], rows)
    )


def _option(name: str, value: Any) -> str:
    if value is True:
        return name
    if isinstance(value, list):
        return f"{name} \\[{', '.join(f'{item:g}' for item in value)}\\]"
    return {"num_parameters": "one set per channel"}.get(name, f"{name} {value}")


def engine() -> str:
    """What the engine's cases took, and the peers beside it."""
    found = json.loads((RESULTS / "engine.json").read_text(encoding="utf-8"))["results"]
    peers = found["peers"]
    compared = [["polytrope", f"{peers['polytrope_ms_per_stage']:.1f}", ""]]
    for name, title, unit in (
        ("prefect_threads", "Prefect, in threads", "task"),
        ("prefect_processes", "Prefect, in processes", "task"),
        ("metaflow", "Metaflow", "task"),
    ):
        compared.append([title, f"{peers[f'{name}_ms_per_{unit}']:.1f}", f"{peers[f'{name}_times_slower']:.1f}"])
    parts = [
        f"{_place(peers)}\n",
        table(["tool", "ms per stage", "times slower than polytrope"], compared),
        "\nThe engine by itself:\n",
    ]
    local, ray, plan = found["local"], found["ray"], found["plan"]
    journal, hashing = found["journal"], found["hashing"]
    rows = [
        [f"{local['stages']:,} stages in processes", f"{local['ms_per_stage']:.1f} ms each", local],
        ["the same again, nothing changed", f"{local['no_change_seconds']:.2f} s for all", local],
        [
            f"{ray['stages']:,} stages on Ray",
            f"{ray['ms_per_stage']:.1f} ms each (a bare Ray task: {ray['bare_ms_per_task']:.2f} ms)",
            ray,
        ],
        [f"plan of {plan['stages']:,} stages", f"{plan['seconds']:.2f} s", plan],
        [
            f"journal of {journal['events']:,} events ({journal['megabytes']:.0f} MB)",
            f"read in {journal['seconds']:.2f} s, state in {journal['read_and_fold_seconds']:.2f} s",
            journal,
        ],
        [
            f"{hashing['gibibytes']} GiB of results",
            f"found unchanged in {hashing['no_change_seconds']:.2f} s, hashed again in "
            f"{hashing['verify_seconds']:.1f} s",
            hashing,
        ],
    ]
    measured = [[what, took, f"{case['date']}, {plain(case['processor'])}"] for what, took, case in rows]
    return "\n".join([*parts, table(["what", "took", "measured"], measured)])


def _place(case: dict[str, Any]) -> str:
    return f"{case['cpus']} cores of {case['processor']}, Python {case['python']}, {case['date']}."


def pictures(name: str) -> str:
    """The plots of a benchmark, `benchmarks/results/NAME-*.png`; for pages one folder below docs/."""
    found = sorted(RESULTS.glob(f"{name}-*.png"))
    return "\n\n".join(f"![{path.stem}](../../benchmarks/results/{path.name})" for path in found) + "\n"


TABLES: dict[str, Callable[..., str]] = {
    "moments": moments,
    "slopes": slopes,
    "fits": fits,
    "activations": activations,
    "shared_options": shared_options,
    "results": results,
    "kernels": kernels,
    "engine": engine,
    "pictures": pictures,
}
