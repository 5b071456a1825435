"""How many bytes of text stand behind each token: what bits per byte are counted with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from polytrope.pipeline.data.tokenization import Tokenizer


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of text behind each token id, int64 `[vocab_size]`; 0 for the end-of-text token.

    A byte-level vocabulary writes each byte as one character, so a token's length is its number of bytes; added tokens
    are written as they are. Other vocabularies leave out spaces or write them elsewhere: None.
    """
    if tokenizer.backend is None:
        return np.array([1] * 256 + [0], dtype=np.int64)
    if "ByteLevel" not in _steps(json.loads(tokenizer.backend.to_str()).get("decoder")):
        return None
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for text, token in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        lengths[token] = len(text)
    for token, added in tokenizer.backend.get_added_tokens_decoder().items():
        lengths[token] = len(added.content.encode())
    lengths[tokenizer.end_of_text] = 0
    return lengths


def _steps(decoder: dict[str, Any] | None) -> list[str]:
    """Kinds of a decoder's steps."""
    if decoder is None:
        return []
    return [kind for inner in decoder.get("decoders", []) for kind in _steps(inner)] or [decoder["type"]]
