"""`${…}`, `--set` and conditions: what is written is what is meant, to the last character, or it is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.secret_values import hider
from polytrope.pipeline.workflow.conditions import evaluate_condition
from polytrope.pipeline.workflow.source import parse_value
from polytrope.pipeline.workflow.spec import load_workflow


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Issue #5", "Issue #5"),
        ("a: b", "a: b"),
        ("", ""),
        ("- x", "- x"),
        ("&name", "&name"),
        ("*name", "*name"),
        ("!tag x", "!tag x"),
        ("| text", "| text"),
        ('"quoted" and more', '"quoted" and more'),
        ("'5'", "5"),
        ('"Issue #5"', "Issue #5"),
        ("5", 5),
        ("5 # five", "5 # five"),
        ("1e-3", 0.001),
        ("true", True),
        ("null", None),
        ("[1, b, {c: 2}]", [1, "b", {"c": 2}]),
        ("{name: hermite, degree: 3}", {"name": "hermite", "degree": 3}),
    ],
)
def test_a_value_of_the_command_line_is_read_to_its_end(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["[1, 2", "{a: 1", "[1] # one", "[1], [2]", "{a: 1} b"])
def test_a_list_or_mapping_that_is_not_whole_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a whole list or mapping"):
        parse_value(text)


def test_a_number_that_no_float_holds_is_not_infinity() -> None:
    assert [parse_value(text) for text in (".inf", "-.INF", "1e308", "'1e400'")] == [
        math.inf,
        -math.inf,
        1e308,
        "1e400",
    ]
    for text in ("1e400", "-1e400", "[1e999]"):
        with pytest.raises(UserError, match="is larger than any float"):
            parse_value(text)


PARAMS = {"mode": "fast", "quoted": "a'b\"c", "endless": math.inf, "nothing": math.nan}


def workflow_with(tmp_path: Path, **stage: Any) -> Path:
    path = tmp_path / "w.yaml"
    stages = {"s": {"uses": "said:s", **stage}}
    path.write_text(yaml.safe_dump({"name": "w", "params": PARAMS, "stages": stages}))
    return path


@pytest.mark.parametrize("text", ["${params.mode", "x ${params.mode} y ${params", "${"])
def test_a_reference_without_its_end_is_refused_where_it_stands(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"w\.yaml:\d+: stages\.s\.with\.x: .* without its `}`"):
        load_workflow(workflow_with(tmp_path, **{"with": {"x": text}}))
    with pytest.raises(UserError, match="without its `}`"):
        load_workflow(workflow_with(tmp_path), [f"params.mode={text}"])


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("'${params.mode}' == 'fast'", True),
        ('"${params.mode}" == "fast"', True),
        ("'${params.mode}' == 'slow'", False),
        ("${params.mode} == 'fast'", True),
        ("'x-${params.mode}' == 'x-fast'", True),
        ("'${params.mode}' in ['slow', 'fast']", True),
        ("""'${params.quoted}' == "a'b\\"c" """, True),
        ("1 < ${params.endless}", True),
        ("-${params.endless} < 1", True),
        ("${params.nothing} < 1 or ${params.nothing} >= 1", False),
    ],
)
def test_a_reference_in_quotes_is_its_text(tmp_path: Path, condition: str, holds: bool) -> None:
    workflow = load_workflow(workflow_with(tmp_path, when=condition))
    when = workflow.stages["s"].when
    assert when is not None
    assert evaluate_condition(when, params=workflow.params, matrix={}, stages={}) is holds


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("Params.mode == 1", "unknown name `Params`"),
        ("stages.gone.loss < 1", "`gone` was skipped, so it has no metrics"),
        (f"0.5 * {'9' * 400} > 1", "int too large to convert to float"),
    ],
)
def test_a_condition_that_cannot_be_computed_is_refused(condition: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_condition(condition, params={"mode": 1}, matrix={}, stages={})


def test_secrets_are_hidden_in_every_form_they_are_written_in() -> None:
    pem = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n"
    secrets = {"KEY": pem, "WORD": 'p@ss "wörd"/+'}
    hide = hider(secrets)
    for value, name in ((pem, "KEY"), ('p@ss "wörd"/+', "WORD")):
        for written in (
            value, repr(value), json.dumps(value), json.dumps(value, ensure_ascii=False), quote(value),
            quote(value, safe=""), f"got {value!r} and {[value]}",
        ):  # fmt: skip
            hidden = hide(written)
            assert f"${{env.{name}}}" in hidden, written
            assert "MIIE" not in hidden
            assert "rd" not in hidden.replace("WORD", "")
    assert hide("log: MIIEvQIBADANBgkq") == "log: ${env.KEY}"
    assert hide("nothing to hide") == "nothing to hide"
