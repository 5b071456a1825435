"""What is known of a model by its own description, as a stage promises it.

Apart from `promised`, which all stages import, because it looks at the models (see `misfits`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS
from polytrope.pipeline.data.promised import PromisedModel


def read_model_promise(directory: Path) -> PromisedModel:
    """What `model.json` says of the model in a directory.

    Raises:
        ValueError: there is none, it cannot be read, or is of no model that this package has.
    """
    from polytrope.models.checkpoint import read_description

    content = read_description(directory)
    architecture, tokenizer = str(content["architecture"]), content.get("tokenizer") or {}
    try:
        if architecture not in MODEL_KINDS:
            raise ValueError(f"unknown architecture `{architecture}`; there are: {', '.join(MODEL_KINDS)}")
        settings = asdict(make_config(MODEL_KINDS[architecture].config, content["config"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / 'model.json'}: {error}") from error
    return PromisedModel(architecture, settings, tokenizer.get("kind"))
