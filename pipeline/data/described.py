"""What is known of a model or a data set by its own description, as a stage promises it.

Apart from `promised`, which all stages import, because it looks at the models (see `misfits`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS
from polytrope.pipeline.data.conversion_file import read_conversion
from polytrope.pipeline.data.converted_layers import CONVERSION_FILE
from polytrope.pipeline.data.description import Dataset
from polytrope.pipeline.data.promised import PromisedData, PromisedImages, PromisedModel, PromisedNumbers, PromisedText


def read_model_promise(directory: Path) -> PromisedModel:
    """What `model.json` says of the model in a directory.

    Raises:
        ValueError: there is none, it cannot be read, or is of no model that this package has.
        UserError: the record of its conversion beside it cannot be read.
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
    before = None
    if (directory / CONVERSION_FILE).exists() and (dropped := read_conversion(directory).dropped) is not None:
        before = dropped.total
    return PromisedModel(architecture, settings, tokenizer.get("kind"), blocks_before=before)


def dataset_promise(description: Dataset) -> PromisedData:
    """What `promise` of the stage that made a data set could know, and more: what is really there."""
    if description.kind == "text":
        tokenizer = description.tokenizer
        return PromisedText(description.sequence_length, tokenizer.vocab_size, tokenizer.kind)
    if description.kind == "numbers":
        return PromisedNumbers(description.inputs, description.targets, description.classes)
    image = description.image
    return PromisedImages(min(image.height, image.width), image.channels, description.classes)
