"""Parameters in a key: values that a stage can tell apart have different keys, equal ones the same in every process."""

import datetime
import decimal
import enum
import json
import math
import pathlib
import re
import subprocess
import sys
import zoneinfo
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.workflow.encoding import canonical_json, decode, encode, encode_fields, encode_plain, readable

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
    | st.text("$floatinus", max_size=6) | st.binary(max_size=4) | st.decimals(allow_nan=False) | st.dates()
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC)) | st.timedeltas() | st.uuids()
    | st.builds(pathlib.Path, st.sampled_from(["a", "a/b", "/a"])) | st.complex_numbers(allow_nan=False)
)  # fmt: skip
HASHABLE = SCALARS | st.tuples(SCALARS)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("$ab", max_size=3), inner, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=2)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
    ),
    max_leaves=8,
)


def identity(value: Any) -> Any:
    """A value with the types of all its parts, hashable: equal for values that no stage can tell apart."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, tuple(map(identity, value))
    if kind in (set, frozenset):
        return kind, frozenset(map(identity, value))
    if kind is dict:
        return kind, tuple((identity(name), identity(item)) for name, item in value.items())
    return kind, repr(value)


def text(value: Any) -> str:
    return canonical_json(encode(value, "x"))


@settings(max_examples=400, deadline=None)
@given(TREES, TREES)
def test_different_values_have_different_keys_and_equal_values_the_same(one: Any, other: Any) -> None:
    assert (text(one) == text(other)) == (identity(one) == identity(other))


def reordered(value: Any) -> Any:
    """An equal value whose sets were filled the other way round."""
    if isinstance(value, dict):
        return {name: reordered(item) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return type(value)(reversed(list(value)))
    return type(value)(map(reordered, value)) if isinstance(value, list | tuple) else value


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_sets_have_no_order_and_a_recorded_value_is_read_back(value: Any) -> None:
    assert text(reordered(value)) == text(value)
    written = json.dumps(encode_plain(value, "x"), allow_nan=False)
    assert identity(decode(json.loads(written))) == identity(value)


def test_a_mapping_has_the_order_that_a_stage_sees() -> None:
    sorted_one, other = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert text(sorted_one) == '{"a":1,"b":2}'
    assert text(other) != text(sorted_one)
    assert text({2: "x", 1: "y"}) != text({1: "y", 2: "x"})
    assert list(decode(json.loads(json.dumps(encode_plain(other, "x"))))) == ["b", "a"]
    assert list(decode(json.loads(json.dumps(encode_plain({2: "x", 1: "y"}, "x"))))) == [2, 1]


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from polytrope.pipeline.workflow.encoding import *\n"
        "value = {'tags': {'alpha', 'beta', 'gamma', ('a', 1)}, 'deep': [frozenset({b'x', b'y', 2.5, None})], 1: 2}\n"
        "print(canonical_json(encode(value, 'x')))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


class Base(BaseModel):
    size: int = 1


class Larger(Base):
    extra: float = 2.0


class Twin(BaseModel):
    size: int = 1


class Colour(enum.StrEnum):
    RED = "red"


class Point(NamedTuple):
    x: int


@dataclass
class Record:
    x: int


class Bytes(int):
    pass


APART = [
    None, False, 0, 0.0, -0.0, "", "0", b"", b"0", math.inf, -math.inf, math.nan, "inf", "null", [], (), set(),
    frozenset(), {}, [None], {"$float": "inf"}, {"$class": "x"}, {"a": 1}, {1: 1}, {"1": 1}, {True: 1},
    OrderedDict(a=1, b=2), OrderedDict(b=2, a=1), {"a": 1, "b": 2}, deque([1]), deque([1], 2), range(3), 10**30,
    str(10**30), Base(), Base(size=2), Larger(), Larger(extra=3.0), Twin(), {"size": 1}, Colour.RED, "red", Point(1),
    (1,), Record(1), Record(2), {"x": 1}, Bytes(1), 1, SecretStr("a"), SecretStr("b"), "a", "\ud800", "\ud801",
    pathlib.Path("a"), pathlib.PureWindowsPath("a"), decimal.Decimal("1.0"), decimal.Decimal("1.00"),
    datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), datetime.timedelta(1), re.compile("a"),
    re.compile("a", re.I), datetime.datetime(2020, 10, 25, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    datetime.datetime(2020, 10, 25, 2, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
]  # fmt: skip


def test_values_that_look_alike_are_told_apart() -> None:
    texts = [text(value) for value in APART]
    assert len(set(texts)) == len(texts), [item for item in texts if texts.count(item) > 1]


class Settings(BaseModel):
    model_config = ConfigDict(extra="allow")

    rate: float = Field(0.1, alias="learning-rate")
    hidden: int = Field(1, exclude=True)
    secret: SecretStr = SecretStr("hunter2")
    nested: Base = Base()


def test_all_fields_count_also_those_that_a_dump_leaves_out() -> None:
    reference = canonical_json(encode_fields(Settings()))
    assert '"learning-rate":0.1' in reference
    assert "hunter2" not in reference
    others = [
        Settings(hidden=2), Settings(secret=SecretStr("other")), Settings(nested=Larger()), Settings(more=1),  # type: ignore[call-arg]
    ]  # fmt: skip
    assert len({reference, *(canonical_json(encode_fields(item)) for item in others)}) == 5


def test_what_has_no_exact_form_is_refused_by_its_field() -> None:
    within: list[Any] = []
    within.append(within)
    for value, what in ((len, "builtin_function_or_method"), (object(), "object"), (type("S", (str,), {})("x"), "")):
        if what:
            with pytest.raises(UserError, match=rf"model\.0\.f: a value of type `builtins\.{what}` has no exact form"):
                encode([{"f": value}], "model")
    with pytest.raises(UserError, match=r"model: nested more than 100 deep, or within itself"):
        encode(within, "model")
    with pytest.raises(UserError, match="a secret cannot be kept in the record of a run"):
        encode_plain({"token": SecretStr("x")}, "params")


def test_people_read_values_without_their_tags() -> None:
    value = {"limit": math.inf, "tags": {"b", "a"}, "model": Larger(), "kinds": {1: Colour.RED}}
    assert readable(encode(value, "x")) == {
        "limit": "inf",
        "tags": ["a", "b"],
        "model": {"size": 1, "extra": 2.0},
        "kinds": {"1": "test_encoding:Colour.RED"},
    }
