"""What a stage accepts as a registered model's name and alias is what MLflow accepts."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_model_alias_name, _validate_model_name
from pydantic import TypeAdapter, ValidationError

from polytrope.pipeline.data.registered import RegisteredAlias, RegisteredName

NAMES = ["quickstart-gpt2", "a b", "a/b", "a:b", "", " ", ".", "..", "näme", "a.b"]
ALIASES = ["newest", "best_one", "a b", "a/b", "", "a" * 255, "a" * 256, "a.b"]


def accepted(kind: object, value: str) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def taken(check: object, value: str) -> bool:
    try:
        check(value)  # type: ignore[operator]
    except MlflowException:
        return False
    return True


@pytest.mark.parametrize("value", NAMES)
def test_names(value: str) -> None:
    assert accepted(RegisteredName, value) == taken(_validate_model_name, value)


@pytest.mark.parametrize("value", ALIASES)
def test_aliases(value: str) -> None:
    assert accepted(RegisteredAlias, value) == taken(_validate_model_alias_name, value)


@pytest.mark.parametrize("value", ["latest", "v3", "V12"])
def test_aliases_that_mean_versions_are_refused(value: str) -> None:
    assert not accepted(RegisteredAlias, value)
