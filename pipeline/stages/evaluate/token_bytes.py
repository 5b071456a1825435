"""How many bytes of text stand behind each token: what bits per byte are counted with."""

from __future__ import annotations

import numpy as np

from polytrope.pipeline.data.tokenization import Tokenizer


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text behind each token id, int64 `[vocab_size]`; 0 for the end-of-text token.

    A byte-level vocabulary writes each byte as one character, so a token's length is its number of bytes.
    """
    if tokenizer.backend is None:
        return np.array([1] * 256 + [0], dtype=np.int64)
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for text, token in tokenizer.backend.get_vocab().items():
        lengths[token] = 0 if token == tokenizer.end_of_text else len(text)
    return lengths
