"""Small real models in every format, for the tests of the conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from polytrope.models import build_model

GPT2 = {"vocab_size": 97, "sequence_length": 24, "n_layer": 2, "n_head": 2, "n_embd": 16, "activation": "gelu_tanh"}
CONVNEXT = {"depths": [1, 2], "dims": [8, 12], "num_classes": 5, "activation": "gelu", "layer_scale": 0.5}
LLAMA_SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

WORDS = "the cat sat on a mat and saw that it was good because of all the fish"


def randomise(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Weights large enough that activations matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def own_model(architecture: str, **changes: Any) -> nn.Module:
    return randomise(build_model(architecture, (GPT2 if architecture == "gpt2" else CONVNEXT) | changes))


def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (6, 20), generator=torch.Generator().manual_seed(1))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def write_tokenizer(directory: Path) -> None:
    """A word tokenizer with 97 entries or fewer."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=97, special_tokens=["[PAD]", "[UNK]"])
    tokenizer.train_from_iterator([WORDS], trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))


def write_bert(directory: Path) -> nn.Module:
    """A small BERT as transformers saves it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = randomise(BertModel(BertConfig(vocab_size=97, max_position_embeddings=40, **sizes)))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


def write_texts(directory: Path) -> Path:
    """Forty short texts in the words of `write_tokenizer`."""
    path = directory / "texts.txt"
    words = WORDS.split()
    path.write_text("\n".join(" ".join(words[i % 7 : i % 7 + 4 + i % 5]) for i in range(40)))
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
