"""Names for artifacts that shall stay: `aliases/NAME.json` in a store says which key a name stands for.

polytrope alias best RUN train      # kept by `gc` from now on, also when the run is forgotten
polytrope convert "$(polytrope alias best)/model" converted/
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.store.manifest import is_key
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.files import safe_name
from polytrope.pipeline.support.text import suggest


@dataclass(frozen=True)
class Alias:
    """A name, and the result it stands for: of `stage` in `run`. `created` in seconds since the epoch."""

    name: str
    key: str
    digest: str
    run: str
    stage: str
    created: float


def set_alias(store: Store, name: str, directory: Path, stage: str) -> Alias:
    """Let `name` stand for the result of a stage; what it stood for before is forgotten.

    Args:
        store: the store.
        name: letters, digits, `-`, `_` and `.`.
        directory: of the run.
        stage: name of the node: `train`, `train[degree=3]`.

    Raises:
        UserError: no such stage, or it has no intact result.
    """
    if not name or safe_name(name) != name:
        raise UserError(f"`{name}` cannot be the name of an alias", "use letters, digits, `-` and `_`")
    try:
        store.create()
        with store.alone(f"alias {name}"):  # or a collection would remove what is about to be named
            return _set_alias(store, name, directory, stage)
    except OSError as error:
        raise store_error(store.address, error) from error


def _set_alias(store: Store, name: str, directory: Path, stage: str) -> Alias:
    stages = fold(read(directory)).stages
    if stage not in stages:
        raise UserError(f"run {directory.name} has no stage `{stage}`", suggest(stage, stages))
    found = stages[stage]
    artifact = store.find(found.key) if found.key and found.digest else None
    if artifact is None:
        raise UserError(
            f"stage `{stage}` of run {directory.name} is {found.state} and has no intact result",
            f"compute it: `polytrope resume {directory.name}`",
        )
    alias = Alias(name, artifact.key, artifact.digest, directory.name, stage, time.time())
    store.put_alias(name, json.dumps(asdict(alias), indent=2, ensure_ascii=False).encode() + b"\n")
    return alias


def read_aliases(store: Store) -> dict[str, Alias]:
    """All of them, by name.

    Raises:
        UserError: one is damaged, so that nobody knows what it keeps.
    """
    try:
        names = [name.removesuffix(".json") for name in store.names("aliases") if not name.startswith(".")]
        files = {name: store.get_alias(name) for name in names}
    except OSError as error:
        raise store_error(store.address, error) from error
    found = {}
    for name, data in files.items():
        try:
            if data is not None:
                alias = Alias(**json.loads(data))
                if not is_key(alias.key):
                    raise ValueError
                found[name] = alias
        except (ValueError, TypeError):
            raise UserError(
                f"{store.address}/aliases/{name}.json is damaged",
                f"set it again (`polytrope alias {name} RUN STAGE`) or remove it (`polytrope alias --remove {name}`)",
            ) from None
    return found


def find_alias(store: Store, name: str) -> Alias:
    """One of them.

    Raises:
        UserError: there is none of this name.
    """
    aliases = read_aliases(store)
    if name not in aliases:
        hint = suggest(name, aliases) or "`polytrope alias NAME RUN STAGE` makes one"
        raise UserError(f"there is no alias `{name}` in {store.address}", hint)
    return aliases[name]
