"""Tokenizers: raw bytes, byte-level BPE trained on the corpus, GPT-2's own vocabulary, or any of Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


class HuggingfaceTokenizer(BaseModel):
    """Any tokenizer of Hugging Face: the directory of a model or of a tokenizer, with its `tokenizer.json`."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["huggingface"]
    path: str = Field(description="the directory, relative to the workflow file")
    end_of_text: str | None = Field(
        None, description="the token behind every document; default: `eos_token` of its tokenizer_config.json"
    )


TokenizerParameters = Annotated[
    BytesTokenizer | BpeTokenizer | Gpt2Tokenizer | HuggingfaceTokenizer, Field(discriminator="kind")
]


class Tokenizer:
    """Text ↔ token ids.

    Args:
        backend: a `tokenizers.Tokenizer`, or None for bytes. It cuts the text and adds no tokens of its own.
        end_of_text: id of the token behind every document; default: that of `<|endoftext|>`.
    """

    def __init__(self, backend: Any | None, end_of_text: int | None = None) -> None:
        self.backend = backend
        self.vocab_size = 257 if backend is None else 1 + max(map(int, backend.get_vocab().values()))
        usual = 256 if backend is None else backend.token_to_id(END_OF_TEXT)
        self.end_of_text = int(usual if end_of_text is None else end_of_text)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without an end-of-text token."""
        if self.backend is None:
            return list(text.encode())
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """The token ids of each document, with the end-of-text token behind, in `dtype`."""
        import numpy as np

        if self.backend is None:
            tokens = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        else:
            tokens = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
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


def tokenizer_from_json(text: str, end_of_text: int | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; `end_of_text` as of `Tokenizer`."""
    if json.loads(text).get("kind") == "bytes":
        return Tokenizer(None)
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_str(text), end_of_text)


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a data set, or of a model that was trained on one."""
    found = [path for name in ("dataset.json", "model.json") if (path := directory / name).exists()]
    entry = json.loads(found[0].read_bytes()).get("tokenizer") if found else None
    return tokenizer_from_json(
        (directory / "tokenizer.json").read_text(encoding="utf-8"), (entry or {}).get("end_of_text")
    )


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

    if isinstance(parameters, HuggingfaceTokenizer):
        content, end = _huggingface(parameters, directory)
        backend = Backend.from_str(content)
        backend.no_truncation()
        backend.no_padding()
        return Tokenizer(backend, end)
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
    if isinstance(parameters, HuggingfaceTokenizer):
        import hashlib

        content, end = _huggingface(parameters, directory)
        return {"tokenizer": hashlib.sha256(content.encode()).hexdigest(), "end_of_text": str(end)}
    if not isinstance(parameters, Gpt2Tokenizer):
        return {}
    import hashlib

    return {
        name: hashlib.sha256(_existing(directory / getattr(parameters, name)).read_bytes()).hexdigest()
        for name in ("vocab", "merges")
    }


def _huggingface(parameters: HuggingfaceTokenizer, directory: Path) -> tuple[str, int]:
    """Content of `tokenizer.json`, and the id of the token behind every document.

    Raises:
        UserError: no such file, no tokenizer, or a token that it does not have.
    """
    path = directory / parameters.path / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"tokenizer.path: there is no {path}",
            "name the directory of a Hugging Face model, relative to the workflow file; where it has only other files: "
            "`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` writes tokenizer.json",
        )
    try:
        text = path.read_text(encoding="utf-8")
        known = _tokens(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"tokenizer.path: {path} is no tokenizer: {error!r}", "copy it again from the model") from None
    name = parameters.end_of_text or _end_of_sequence(path.with_name("tokenizer_config.json"))
    special = ", ".join(f"`{token}`" for token in list(known.special)[:8])
    hint = f"for example `end_of_text: …` with one of {special}" if special else "give `end_of_text:` one of its tokens"
    if name is None:
        raise UserError(
            f"tokenizer.end_of_text: {path.parent} names no `eos_token`, and a token must stand between documents", hint
        )
    if name not in known.ids:
        raise UserError(f"tokenizer.end_of_text: {path} has no token `{name}`", hint)
    return text, known.ids[name]


@dataclass(frozen=True)
class _Tokens:
    """Token → id, and those that stand for no text."""

    ids: dict[str, int]
    special: tuple[str, ...]


def _tokens(content: dict[str, Any]) -> _Tokens:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (token, score), the id is the place
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = content.get("added_tokens") or []
    special = tuple(token["content"] for token in added if token.get("special"))
    return _Tokens({**vocabulary, **{token["content"]: int(token["id"]) for token in added}}, special)


def _end_of_sequence(path: Path) -> str | None:
    """`eos_token` of a `tokenizer_config.json`: a text, or a mapping with its `content`."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer.path: {path} cannot be read: {error}", "copy it again from the model") from None
    return token.get("content") if isinstance(token, dict) else token


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
