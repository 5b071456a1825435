"""The DeepSpeed configuration of a training: one of infra/deepspeed, a file, or settings over one of them; the stage
fills in the rest. A setting that says something else than the stage's own parameters is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytrope.pipeline.errors import UserError

if TYPE_CHECKING:
    from polytrope.pipeline.stages.train.parameters import TrainParameters

SHIPPED = Path(__file__).resolve().parents[3] / "infra" / "deepspeed"
AUTO = "auto"  # as in DeepSpeed's own integrations: to be filled in
DEFAULT_ZERO_STAGE = 1


def shipped_names() -> list[str]:
    """The configurations that `deepspeed:` may name."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def read_configuration(parameters: TrainParameters, directory: Path = Path()) -> dict[str, Any]:
    """What `deepspeed:` stands for, checked against the other parameters; values may be `auto`.

    Args:
        parameters: of the stage. Without `deepspeed`: `zero-0` … `zero-3`, by `zero_stage`. A name: a file of
            infra/deepspeed. A path that ends in `.json`: that file. A mapping: settings over `zero-0` … `zero-3`.
        directory: where relative paths start.

    Raises:
        UserError: no such file or name, no JSON object, or a contradiction.
    """
    given = parameters.deepspeed
    if isinstance(given, str):
        configuration = _read_file(_path_of(given, directory), given)
    else:
        refuse_contradictions(given or {}, parameters)  # first: a wrong stage has no file
        stage = _lookup(given or {}, "zero_optimization.stage")
        if stage == AUTO:
            stage = DEFAULT_ZERO_STAGE if parameters.zero_stage is None else parameters.zero_stage
        path = SHIPPED / f"zero-{stage}.json"
        configuration = merge(_read_file(path, path.stem), given or {})
    refuse_contradictions(configuration, parameters)
    return configuration


def zero_stage_of(configuration: Mapping[str, Any], parameters: TrainParameters) -> int:
    """The ZeRO stage: the parameter's, else the configuration's, else 1."""
    if parameters.zero_stage is not None:
        return parameters.zero_stage
    stage = _lookup(configuration, "zero_optimization.stage")
    return DEFAULT_ZERO_STAGE if stage == AUTO else int(stage)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def refuse_contradictions(configuration: Mapping[str, Any], parameters: TrainParameters) -> None:
    """A DeepSpeed setting that this stage sets itself must be absent, `"auto"`, or say the same.

    Raises:
        UserError: naming both values.
    """
    own: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("global_batch_size", parameters.global_batch_size),
        "train_micro_batch_size_per_gpu": ("micro_batch_size", parameters.micro_batch_size),
        "gradient_clipping": ("gradient_clipping", parameters.gradient_clipping),
        "zero_optimization.stage": ("zero_stage", parameters.zero_stage),
        "bf16.enabled": ("precision", parameters.precision == "bf16"),
        "fp16.enabled": ("precision", parameters.precision == "fp16"),
    }
    for key, (name, value) in own.items():
        setting = _lookup(configuration, key)
        if setting != AUTO and value is not None and setting != value:
            said = parameters.precision if name == "precision" else value
            raise UserError(
                f"deepspeed: says {key} = {json.dumps(setting)}, the stage's `{name}` says {said}",
                f'set `{name}` to match, or make it "auto" in the DeepSpeed configuration',
            )
    for key in ("optimizer", "scheduler", "gradient_accumulation_steps"):
        if configuration.get(key, AUTO) != AUTO:
            raise UserError(
                f"deepspeed: sets `{key}`, which this stage decides",
                f"remove `{key}`; use learning_rate, weight_decay, betas, warmup_steps, micro_batch_size",
            )
    stage = _lookup(configuration, "zero_optimization.stage")
    if stage != AUTO and stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed: says zero_optimization.stage = {json.dumps(stage)}", "it is 0, 1, 2 or 3")
    if parameters.precision == "fp16" and zero_stage_of(configuration, parameters) == 0:
        raise UserError(
            "precision: fp16 with zero_stage: 0: DeepSpeed scales the loss of its ZeRO optimizers only",
            "use zero_stage: 1 (with one worker it shards nothing), or precision: bf16",
        )
    if parameters.ema_decay is not None and zero_stage_of(configuration, parameters) == 3:
        raise UserError("ema_decay: needs whole weights on each worker", "use zero_stage 0, 1 or 2")
    if parameters.linearize and zero_stage_of(configuration, parameters) == 3:
        raise UserError("linearize: needs whole weights on each worker", "use zero_stage 0, 1 or 2")
    if parameters.statistics_every and zero_stage_of(configuration, parameters) == 3:
        raise UserError("statistics_every: needs whole coefficients on each worker", "use zero_stage 0, 1 or 2")


def _path_of(given: str, directory: Path) -> Path:
    if given in shipped_names():
        return SHIPPED / f"{given}.json"
    path = directory / given  # an absolute one stays as it is
    if not path.is_file():
        raise UserError(
            f"deepspeed: {given}: no such file ({path})",
            f"give the path of a JSON file, or one of {', '.join(shipped_names())}",
        )
    return path


def _read_file(path: Path, given: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed: {given}: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"deepspeed: {given}: {path} is not a JSON object")
    return content


def _lookup(configuration: Mapping[str, Any], key: str) -> Any:
    section: Any = configuration
    for part in key.split("."):
        section = section.get(part, AUTO) if isinstance(section, Mapping) else AUTO
    return section
