"""Python values as JSON that says everything a stage could tell apart: for stage keys, and for recorded workflows.

Texts, booleans, null, finite numbers, lists and mappings stand for themselves. Anything else is a mapping with one name
that begins with `$`: `{"$float": "inf"}`, `{"$set": [1, 2]}`. Sets have no order. A mapping has one, which a stage can
see; in a key it is written down where it is not that of the names. What cannot be written without loss is refused by
the name of its field.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import decimal
import enum
import fractions
import hashlib
import ipaddress
import json
import math
import pathlib
import re
import uuid
import zoneinfo
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, SecretBytes, SecretStr

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import is_unicode

_DEEPEST = 100  # levels of nesting
_LARGEST = 2**63  # integers from here on are written in hexadecimal: Python refuses long decimal ones


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, shortest float notation."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def encode(value: Any, field: str) -> Any:
    """A value for a stage key. An instance of a class says which class; a secret is hashed.

    Args:
        value: validated; of a pydantic model or dataclass all fields count, also those that it would not dump.
        field: its name, for the message.

    Raises:
        UserError: a value that has no lossless form; names its field.
    """
    return _encode(value, field, _instance, 0)


def encode_fields(model: BaseModel) -> dict[str, Any]:
    """The fields of a model by their names in the workflow file, each as `encode` writes it."""
    return {name: encode(value, name) for name, value in _model_fields(model)}


def encode_plain_fields(model: BaseModel) -> dict[str, Any]:
    """The same with each as `encode_plain` writes it."""
    return {name: encode_plain(value, name) for name, value in _model_fields(model)}


def encode_plain(value: Any, field: str) -> Any:
    """A value of a workflow, such that `decode` gives it back; an instance of a class becomes its fields.

    Raises:
        UserError: a value that cannot be read back; names its field.
    """
    return _encode(value, field, _plain_instance, 0)


def decode(value: Any) -> Any:
    """The value behind `encode_plain`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, content),) = value.items()
        if name == "$mapping":
            return {decode(key): decode(item) for key, item in content}
        if name in _DECODERS:
            return _DECODERS[name](content)
    return {key: decode(item) for key, item in value.items()}


def encode_digests(digests: Mapping[str, str]) -> Any:
    """The artifacts of a fan-in by label, for a stage key: their order is seen by the stage too."""
    return _encode_mapping(dict(digests), "inputs", _instance, 0)


def readable(value: Any) -> Any:
    """An encoded value for people: `{"$float": "inf"}` → "inf", `{"$set": [1]}` → [1], no names of classes."""
    if isinstance(value, list):
        return [readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, content),) = value.items()
        if name in ("$mapping", "$ordered"):
            return {str(readable(key)): readable(item) for key, item in content}
        if name == "$instance":
            return readable(content[1])
        if name.startswith("$") and name != "$class":
            return readable(content)
    return {key: readable(item) for key, item in value.items() if key != "$class"}


_Instance = Callable[[Any, str, int], Any]


def _encode(value: Any, field: str, instance: _Instance, depth: int) -> Any:
    if depth > _DEEPEST:
        raise UserError(f"{field.split('.')[0]}: nested more than {_DEEPEST} deep, or within itself")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -_LARGEST < value < _LARGEST else {"$integer": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is str:
        return value if is_unicode(value) else {"$text": value.encode(errors="surrogatepass").hex()}
    if kind in (list, tuple):
        items = [_encode(item, f"{field}.{index}", instance, depth + 1) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind in (set, frozenset):
        items = [_encode(item, field, instance, depth + 1) for item in value]
        return {f"${kind.__name__}": sorted(items, key=canonical_json)}
    if kind is dict:
        return _encode_mapping(value, field, instance, depth)
    if kind is OrderedDict:
        pairs = [[_encode(item, field, instance, depth + 1) for item in pair] for pair in value.items()]
        return {"$ordered": pairs}
    if kind is deque:
        return {"$deque": [value.maxlen, [_encode(item, field, instance, depth + 1) for item in value]]}
    if kind in _ENCODERS:
        name, write = _ENCODERS[kind]
        return {name: write(value)}
    return instance(value, field, depth)


def _encode_mapping(value: dict[Any, Any], field: str, instance: _Instance, depth: int) -> Any:
    named = all(type(key) is str and not key.startswith("$") and is_unicode(key) for key in value)
    if named and (instance is _plain_instance or list(value) == sorted(value)):  # a record keeps the order it is given
        return {key: _encode(item, f"{field}.{key}", instance, depth + 1) for key, item in value.items()}
    pairs = [
        [_encode(key, field, instance, depth + 1), _encode(item, f"{field}.{key}", instance, depth + 1)]
        for key, item in value.items()
    ]
    return {"$mapping": pairs}


def _instance(value: Any, field: str, depth: int) -> Any:
    """Of a class: its name and all that it holds."""
    if isinstance(value, enum.Enum):
        return {"$enum": f"{_class_name(value)}.{value.value if value.name is None else value.name}"}
    if isinstance(value, SecretStr | SecretBytes):
        secret = value.get_secret_value()
        data = secret.encode(errors="surrogatepass") if isinstance(secret, str) else secret
        return {"$secret": hashlib.sha256(data).hexdigest()[:32]}
    fields = _fields(value)
    if fields is not None:
        content = {name: _encode(item, f"{field}.{name}", _instance, depth + 1) for name, item in fields}
        return {"$class": _class_name(value), **content}
    if type(value).__module__ == "pydantic.networks":
        return {"$instance": [_class_name(value), str(value)]}
    for base, read in _BASES.items():
        if isinstance(value, base) and not getattr(value, "__dict__", None) and not _has_slots(value):
            return {"$instance": [_class_name(value), _encode(read(value), field, _instance, depth + 1)]}
    raise _refused(value, field, "in the key of a stage")


_BASES: dict[type, Callable[[Any], Any]] = {  # what an instance of a subclass is without its class
    int: int.__index__,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes.__bytes__,
    tuple: lambda value: list(tuple.__iter__(value)),
}


def _has_slots(value: Any) -> bool:
    return any(vars(base).get("__slots__") for base in type(value).__mro__)


def _plain_instance(value: Any, field: str, depth: int) -> Any:
    """Of a class: what a workflow file would say of it."""
    if isinstance(value, enum.Enum):
        return _encode(value.value, field, _plain_instance, depth + 1)
    if isinstance(value, SecretStr | SecretBytes):
        raise UserError(f"{field}: a secret cannot be kept in the record of a run", "write `${env.NAME}` instead")
    fields = _fields(value)
    if fields is not None:
        return {name: _encode(item, f"{field}.{name}", _plain_instance, depth + 1) for name, item in fields}
    if type(value).__module__ == "pydantic.networks":
        return str(value)
    raise _refused(value, field, "in the record of a run")


def _refused(value: Any, field: str, place: str) -> UserError:
    return UserError(
        f"{field}: a value of type `{type(value).__module__}.{type(value).__qualname__}` has no exact form {place}",
        "use texts, numbers, lists, mappings, sets, dates, paths, enums, pydantic models or dataclasses",
    )


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _fields(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The fields of a pydantic model or of a dataclass; None for anything else."""
    if isinstance(value, BaseModel):
        return _model_fields(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
    return None


def _model_fields(model: BaseModel) -> Iterator[tuple[str, Any]]:
    for name, info in type(model).model_fields.items():
        yield name if (info.alias or "$").startswith("$") else info.alias or name, getattr(model, name)
    yield from (model.__pydantic_extra__ or {}).items()


def _moment(value: datetime.datetime | datetime.time) -> list[Any]:
    """ISO text (with the offset), the zone's name, and which of two equal times on the clock it is."""
    zone = value.tzinfo
    if not (zone is None or isinstance(zone, datetime.timezone | zoneinfo.ZoneInfo) or _is_pydantic_zone(zone)):
        raise UserError(f"the time zone {zone!r} has no exact form", "use a zone of `zoneinfo` or `datetime.timezone`")
    name = zone.key if isinstance(zone, zoneinfo.ZoneInfo) else None
    return [value.isoformat(), name, value.fold]


def _is_pydantic_zone(zone: datetime.tzinfo) -> bool:
    """A fixed offset, as pydantic makes it from a text."""
    return type(zone).__name__ == "TzInfo"


def _read_datetime(content: list[Any]) -> datetime.datetime:
    text, zone, fold = content
    value = datetime.datetime.fromisoformat(text).replace(fold=fold)
    return value if zone is None else value.replace(tzinfo=zoneinfo.ZoneInfo(zone))


def _read_time(content: list[Any]) -> datetime.time:
    text, zone, fold = content
    value = datetime.time.fromisoformat(text).replace(fold=fold)
    return value if zone is None else value.replace(tzinfo=zoneinfo.ZoneInfo(zone))


_ADDRESSES = {
    kind.__name__: kind
    for kind in (
        ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network,
        ipaddress.IPv4Interface, ipaddress.IPv6Interface,
    )
}  # fmt: skip

_ENCODERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("$bytes", lambda value: value.hex()),
    bytearray: ("$bytearray", lambda value: value.hex()),
    complex: ("$complex", repr),
    range: ("$range", lambda value: [value.start, value.stop, value.step]),
    decimal.Decimal: ("$decimal", str),
    fractions.Fraction: ("$fraction", str),
    datetime.datetime: ("$datetime", _moment),
    datetime.date: ("$date", lambda value: value.isoformat()),
    datetime.time: ("$time", _moment),
    datetime.timedelta: ("$duration", lambda value: [value.days, value.seconds, value.microseconds]),
    uuid.UUID: ("$uuid", str),
    pathlib.PosixPath: ("$path", str),
    pathlib.WindowsPath: ("$path", str),
    pathlib.PurePosixPath: ("$posix_path", str),
    pathlib.PureWindowsPath: ("$windows_path", str),
    re.Pattern: ("$pattern", lambda value: [repr(value.pattern), value.flags]),
    **{kind: ("$address", lambda value: [type(value).__name__, str(value)]) for kind in _ADDRESSES.values()},
}

_DECODERS: Mapping[str, Callable[[Any], Any]] = {
    "$integer": lambda content: int(content, 16),
    "$float": float,
    "$text": lambda content: bytes.fromhex(content).decode(errors="surrogatepass"),
    "$tuple": lambda content: tuple(map(decode, content)),
    "$set": lambda content: set(map(decode, content)),
    "$frozenset": lambda content: frozenset(map(decode, content)),
    "$ordered": lambda content: OrderedDict((decode(key), decode(item)) for key, item in content),
    "$deque": lambda content: deque(map(decode, content[1]), content[0]),
    "$bytes": bytes.fromhex,
    "$bytearray": bytearray.fromhex,
    "$complex": complex,
    "$range": lambda content: range(*content),
    "$decimal": decimal.Decimal,
    "$fraction": fractions.Fraction,
    "$datetime": _read_datetime,
    "$date": datetime.date.fromisoformat,
    "$time": _read_time,
    "$duration": lambda content: datetime.timedelta(*content),
    "$uuid": uuid.UUID,
    "$path": pathlib.Path,
    "$posix_path": pathlib.PurePosixPath,
    "$windows_path": pathlib.PureWindowsPath,
    "$pattern": lambda content: re.compile(ast.literal_eval(content[0]), content[1]),
    "$address": lambda content: _ADDRESSES[content[0]](content[1]),
}
