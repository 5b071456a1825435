"""Tokenizers: raw bytes, byte-level BPE trained on the corpus, or GPT-2's own vocabulary from given files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np

END_OF_TEXT = "<|endoftext|>"


class BytesTokenizer(BaseModel):
    """UTF-8 bytes, and 256 for the end of a document."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["bytes"]
    vocab_size: Literal[257] = 257


class BpeTokenizer(BaseModel):
    """Byte-level byte-pair encoding, trained on the training documents."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(2048, ge=257, le=1_000_000, description="tokens, the 256 bytes and end-of-text included")
    training_bytes: int = Field(20_000_000, ge=1, description="train on the first so many bytes")


class Gpt2Tokenizer(BaseModel):
    """GPT-2's byte-level BPE from its two files."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["gpt2"]
    vocab: str = Field(description="encoder.json or vocab.json, relative to the workflow file")
    merges: str = Field(description="vocab.bpe or merges.txt, relative to the workflow file")
    vocab_size: Literal[50257] = 50257


TokenizerParameters = Annotated[BytesTokenizer | BpeTokenizer | Gpt2Tokenizer, Field(discriminator="kind")]


class Tokenizer:
    """Text ↔ token ids. `backend` is a `tokenizers.Tokenizer`, or None for bytes."""

    def __init__(self, backend: Any | None) -> None:
        self.backend = backend
        self.vocab_size = 257 if backend is None else int(backend.get_vocab_size())
        self.end_of_text = 256 if backend is None else int(backend.token_to_id(END_OF_TEXT))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without an end-of-text token."""
        if self.backend is None:
            return list(text.encode())
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def encode_documents(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """The token ids of each document, with the end-of-text token behind, in `dtype`."""
        import numpy as np

        if self.backend is None:
            tokens = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        else:
            tokens = [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]
        pieces = []
        for ids in tokens:
            piece = np.empty(len(ids) + 1, dtype=dtype)
            piece[:-1] = ids
            piece[-1] = self.end_of_text
            pieces.append(piece)
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids below `vocab_size`."""
        if self.backend is None:
            return bytes(token for token in ids if token < 256).decode(errors="replace")
        text: str = self.backend.decode(list(ids))
        return text

    def decode_produced(self, ids: Sequence[int]) -> str:
        """The text that a model produced, up to the end of its document; an embedding may have more rows than there
        are tokens, and what it produces of them is left out."""
        end = ids.index(self.end_of_text) if self.end_of_text in ids else len(ids)
        return self.decode([token for token in ids[:end] if token < self.vocab_size])

    def to_json(self) -> str:
        """The file `tokenizer.json`: HF `tokenizers`' format, or `{"kind": "bytes"}`."""
        return json.dumps({"kind": "bytes"}) if self.backend is None else str(self.backend.to_str())


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`."""
    if json.loads(text).get("kind") == "bytes":
        return Tokenizer(None)
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_str(text))


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two `tokenizer.json` files give every text the same tokens: their content decides, not how it is written.

    Two files of Hugging Face tokenizers are compared by their vocabulary, merges, and how they cut a text.
    """
    contents = [json.loads(path.read_bytes()) for path in (one, other)]
    if contents[0] == contents[1]:
        return True
    if any(content.get("kind") == "bytes" for content in contents):
        return False
    return _parts(contents[0]) == _parts(contents[1])


def _parts(content: dict[str, Any]) -> list[Any]:
    """What decides the tokens, in one form."""
    model = content["model"]
    added = sorted((token["content"], token["id"]) for token in content.get("added_tokens") or [])
    steps = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    return [model.get("vocab"), _merges(model.get("merges")), added, *steps]


def _merges(merges: Any) -> Any:
    """Pairs, which older files write as one text."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or []]


def make_tokenizer(parameters: TokenizerParameters, texts: Iterable[str], directory: Path) -> Tokenizer:
    """Build the tokenizer; a BPE is trained on `texts`.

    Training counts words in one thread's order and breaks ties by the pair itself, so the result depends on the texts
    only (tested).
    """
    if isinstance(parameters, BytesTokenizer):
        return Tokenizer(None)
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if isinstance(parameters, Gpt2Tokenizer):
        vocab, merges = (_existing(directory / name) for name in (parameters.vocab, parameters.merges))
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    else:
        backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if isinstance(parameters, BpeTokenizer):
        trainer = trainers.BpeTrainer(
            vocab_size=parameters.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(_first_bytes(texts, parameters.training_bytes), trainer)
    elif backend.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"tokenizer.vocab: {parameters.vocab} has no token {END_OF_TEXT}", "give GPT-2's own files")
    return Tokenizer(backend)


def tokenizer_fingerprint(parameters: TokenizerParameters, directory: Path) -> dict[str, str]:
    """Digests of the tokenizer's files. Raises UserError if one is missing."""
    if not isinstance(parameters, Gpt2Tokenizer):
        return {}
    import hashlib

    return {
        name: hashlib.sha256(_existing(directory / getattr(parameters, name)).read_bytes()).hexdigest()
        for name in ("vocab", "merges")
    }


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"tokenizer: no such file: {path}", "paths are relative to the workflow file")
    return path


def _first_bytes(texts: Iterable[str], limit: int) -> Iterable[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text
