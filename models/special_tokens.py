"""Names of tokens and classes in `config.json`, which must not be lost on the way through another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polytrope.models import find_huggingface
from polytrope.models.foreign import original_settings

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id")
_END_OF_TEXT = "<|endoftext|>"


def kept_fields(directory: Path) -> dict[str, Any]:
    """Fields of `config.json` that name tokens and classes, from a Hugging Face directory or one that was made of it.

    Returns:
        Empty: nothing says them.
    """
    for name, read in (("model.json", _from_own), ("config.json", _from_huggingface)):
        if (directory / name).exists():
            return read(json.loads((directory / name).read_text(encoding="utf-8")))
    return {}


def _from_own(content: dict[str, Any]) -> dict[str, Any]:
    return dict(content.get("huggingface") or {})


def _from_huggingface(content: dict[str, Any]) -> dict[str, Any]:
    content = original_settings(content)
    record = find_huggingface(content.get("model_type"))
    defaults = {} if record is None else dict(record.huggingface.tokens)
    return defaults | {name: content[name] for name in _KEPT if name in content}


def read_tokenizer_entry(directory: str | Path) -> Any:
    """The `tokenizer` entry of a dataset or model directory, None if it has none (images)."""
    for name in ("dataset.json", "model.json"):
        if (path := Path(directory) / name).exists():
            return json.loads(path.read_text(encoding="utf-8")).get("tokenizer")
    return None


def token_fields(directory: Path | None) -> dict[str, Any]:
    """As `kept_fields`; else the end-of-text token of the directory's tokenizer, null where there is none.

    transformers takes 50256 where nothing is said, whatever the vocabulary.
    """
    kept = {} if directory is None else kept_fields(directory)
    if "eos_token_id" in kept or directory is None:
        return {"bos_token_id": None, "eos_token_id": None} | kept
    end = _end_of_text(directory)
    return {"bos_token_id": end, "eos_token_id": end} | kept


def _end_of_text(directory: Path) -> int | None:
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    entry = read_tokenizer_entry(directory) or {}
    if entry.get("end_of_text") is not None:
        return int(entry["end_of_text"])
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("kind") == "bytes":
        return 256
    known = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    return known.get(_END_OF_TEXT, vocabulary.get(_END_OF_TEXT) if isinstance(vocabulary, dict) else None)
