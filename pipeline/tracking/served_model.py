"""A polytrope model as an MLflow model: texts → their continuations, images → class probabilities, or rows of numbers
→ either class probabilities or numbers.

mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(["Once upon"], params={"max_new_tokens": 20})
mlflow models serve -m models:/NAME@ALIAS --env-manager local
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
from mlflow.models import ModelSignature, set_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

_NEW_TOKENS = 64


class PolytropeModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Loads the artifact `model`: a directory with `model.json`, the weights, and for texts `tokenizer.json`."""

    def load_context(self, context: Any) -> None:
        from polytrope.models.checkpoint import load_model
        from polytrope.pipeline.data.tokenization import tokenizer_from_json

        directory = Path(context.artifacts["model"])
        self.model: Any = load_model(directory)
        vocabulary = directory / "tokenizer.json"
        self.tokenizer = tokenizer_from_json(vocabulary.read_text(encoding="utf-8")) if vocabulary.exists() else None

    # no annotations: MLflow would read them as a signature of its own
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Continue texts (by sampling with a fixed seed), or classify images or rows, or predict numbers from rows.

        Args:
            context: of MLflow; unused.
            model_input: texts: a list, or a data frame whose first column holds them; images: uint8
                `[n, channels, height, width]`; rows: float32 `[n, inputs]`.
            params: of texts: `max_new_tokens`, `temperature`, `seed`.

        Returns:
            Texts with their continuations, or float32 probabilities `[n, classes]` or numbers `[n, outputs]`.
        """
        from polytrope.models import find_architecture

        if find_architecture(self.model.architecture).data == "numbers":
            return self._predict(np.asarray(model_input))
        if self.tokenizer is None:
            return self._classify(np.asarray(model_input))
        texts = list(model_input.iloc[:, 0]) if hasattr(model_input, "iloc") else list(model_input)
        return [self._continue(str(text), params or {}) for text in texts]

    def _continue(self, text: str, params: dict[str, Any]) -> str:
        import torch

        assert self.tokenizer is not None
        tokens = self.tokenizer.encode(text) or [self.tokenizer.end_of_text]
        generator = torch.Generator().manual_seed(int(params.get("seed", 0)))
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([tokens]),
                int(params.get("max_new_tokens", _NEW_TOKENS)),
                temperature=float(params.get("temperature", 0.8)),
                generator=generator,
            )
        return text + self.tokenizer.decode_produced(output[0].tolist()[len(tokens) :])

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            outputs = self.model(torch.from_numpy(rows.astype(np.float32)))
        chooses = self.model.config.loss == "cross_entropy"
        return np.asarray((outputs.softmax(-1) if chooses else outputs).numpy())

    def _classify(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        from polytrope.models import find_architecture

        prepare = find_architecture(self.model.architecture).prepare
        with torch.inference_mode():
            logits = self.model(prepare(torch.from_numpy(pixels.astype(np.float32)) / 255.0))
        return np.asarray(logits.softmax(-1).numpy())


def signature_and_example(model_directory: Path) -> tuple[ModelSignature, Any]:
    """What the model takes and gives, and an input to try."""
    from polytrope.models import find_architecture
    from polytrope.models.checkpoint import read_description

    description = read_description(model_directory, tangents=True)
    record = find_architecture(description["architecture"])
    if record.data == "text":
        parameters = [
            ParamSpec("max_new_tokens", DataType.long, _NEW_TOKENS),
            ParamSpec("temperature", DataType.double, 0.8),
            ParamSpec("seed", DataType.long, 0),
        ]
        text = Schema([ColSpec(DataType.string)])
        return ModelSignature(inputs=text, outputs=text, params=ParamSchema(parameters)), ["The "]
    config = record.config(**description["config"])
    if record.data == "numbers":
        float32 = np.dtype("float32")
        return ModelSignature(
            inputs=Schema([TensorSpec(float32, (-1, config.inputs))]),
            outputs=Schema([TensorSpec(float32, (-1, config.outputs))]),
        ), np.zeros((1, config.inputs), np.float32)
    example = np.zeros(record.example(config).shape, np.uint8)
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, example.shape[1], -1, -1))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, config.num_classes))]),
    ), example


def write_model(path: Path, model_directory: Path) -> None:
    """Write the MLflow model `path` (must not exist) around a copy of `model_directory`."""
    signature, example = signature_and_example(model_directory)
    mlflow.pyfunc.save_model(
        path=str(path),
        python_model=__file__,  # "models from code": no pickle
        artifacts={"model": str(model_directory)},
        signature=signature,
        input_example=example,
        pip_requirements=["polytrope"],
    )


if __name__ != "polytrope.pipeline.tracking.served_model":  # MLflow runs this file to get the model
    set_model(PolytropeModel())
