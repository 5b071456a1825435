"""Which architectures convert: `python -m benchmarks.architectures` makes the table in docs/conversion.md.

Small models with random weights, of the configurations that the installed transformers has and of torch modules of
one's own, are converted by `polytrope.models.convert.convert`, saved, and loaded again: those of transformers by
`AutoModel… .from_pretrained(trust_remote_code=True)`, the others into a fresh module. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models import inputs
from polytrope.models.calls import lift
from polytrope.models.convert import Conversion, convert
from polytrope.models.modes import measuring

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "conversion.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
_WIDTH, _VOCABULARY, _LENGTH = 32, 97, 16
_SAMPLES = 8


@dataclass(frozen=True)
class Architecture:
    """One row.

    Args:
        name: of the row.
        build: a fresh model.
        inputs: what it takes, by name.
        auto: the class of transformers that loads it again; None: it goes into a fresh module.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    auto: str | None = None


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Args:
        architecture: its name.
        parameters: of the model.
        found: activations seen, modules and calls.
        converted: of them.
        calls: of these, functions that became modules.
        stays: kinds of those that stay, with their numbers.
        certified: the largest relative error of an activation over its measured inputs.
        before: |difference| / |output| when functions have become modules and nothing is replaced yet.
        after: the same when activations are replaced.
        reload: "equal", or how far the reloaded model's output is from the converted one's; None: not tried.
        failure: what went wrong.
    """

    architecture: str
    parameters: int = 0
    found: int = 0
    converted: int = 0
    calls: int = 0
    stays: str = ""
    certified: float | None = None
    before: float | None = None
    after: float | None = None
    reload: str | None = None
    failure: str | None = None


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, _VOCABULARY, (_SAMPLES, _LENGTH), generator=_generator())}


def both_tokens() -> dict[str, Tensor]:
    ids = tokens()["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(1)}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(_SAMPLES, 3, 32, 32, generator=_generator())}


def pairs() -> dict[str, Tensor]:
    return tokens() | pictures()


def waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(_SAMPLES, 2000, generator=_generator())}


def spectra() -> dict[str, Tensor]:
    features = torch.randn(_SAMPLES, 8, 40, generator=_generator())
    return {"input_features": features, "decoder_input_ids": tokens()["input_ids"][:, :6]}


def vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(_SAMPLES, _LENGTH, _WIDTH, generator=_generator())}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


_BERT = {"hidden_size": _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_LLAMA = _BERT | {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "d_model": _WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {"d_model": _WIDTH, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_WAVES = _BERT | {
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
# Class, the one that loads it again, inputs, and the configuration's fields.
_TRANSFORMERS: dict[str, tuple[str, str, Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "BERT": ("BertForMaskedLM", "AutoModelForMaskedLM", tokens, _BERT),
    "RoBERTa": ("RobertaForMaskedLM", "AutoModelForMaskedLM", tokens, _BERT),
    "DistilBERT": (
        "DistilBertModel",
        "AutoModel",
        tokens,
        {"dim": _WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    "ALBERT": ("AlbertModel", "AutoModel", tokens, _BERT | {"embedding_size": 16}),
    "ELECTRA": ("ElectraModel", "AutoModel", tokens, _BERT | {"embedding_size": 16}),
    "DeBERTa-v2": ("DebertaV2Model", "AutoModel", tokens, _BERT),
    "MPNet": ("MPNetModel", "AutoModel", tokens, _BERT),
    "ModernBERT": (
        "ModernBertModel",
        "AutoModel",
        tokens,
        _BERT | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "GPT-2": ("GPT2LMHeadModel", "AutoModelForCausalLM", tokens, {"n_embd": _WIDTH, "n_layer": 2, "n_head": 2}),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "AutoModelForCausalLM",
        tokens,
        {"hidden_size": _WIDTH, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "GPT-J": (
        "GPTJForCausalLM",
        "AutoModelForCausalLM",
        tokens,
        {"n_embd": _WIDTH, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "AutoModelForCausalLM", tokens, _BERT),
    "OPT": (
        "OPTForCausalLM",
        "AutoModelForCausalLM",
        tokens,
        {
            "hidden_size": _WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "word_embed_proj_dim": _WIDTH,
        },
    ),
    "Bloom": ("BloomForCausalLM", "AutoModelForCausalLM", tokens, {"hidden_size": _WIDTH, "n_layer": 2, "n_head": 2}),
    "Llama": ("LlamaForCausalLM", "AutoModelForCausalLM", tokens, _LLAMA),
    "Mistral": ("MistralForCausalLM", "AutoModelForCausalLM", tokens, _LLAMA),
    "Mixtral": (
        "MixtralForCausalLM",
        "AutoModelForCausalLM",
        tokens,
        _LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "Qwen2": ("Qwen2ForCausalLM", "AutoModelForCausalLM", tokens, _LLAMA),
    "Qwen3": ("Qwen3ForCausalLM", "AutoModelForCausalLM", tokens, _LLAMA | {"head_dim": 16}),
    "Gemma": ("GemmaForCausalLM", "AutoModelForCausalLM", tokens, _LLAMA | {"head_dim": 16}),
    "Gemma 2": ("Gemma2ForCausalLM", "AutoModelForCausalLM", tokens, _LLAMA | {"head_dim": 16}),
    "Phi": ("PhiForCausalLM", "AutoModelForCausalLM", tokens, _LLAMA),
    "Falcon": (
        "FalconForCausalLM",
        "AutoModelForCausalLM",
        tokens,
        {"hidden_size": _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "T5": ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", both_tokens, _T5),
    "T5 1.1": (
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        both_tokens,
        _T5 | {"feed_forward_proj": "gated-gelu"},
    ),
    "BART": ("BartForConditionalGeneration", "AutoModelForSeq2SeqLM", both_tokens, _SEQ2SEQ),
    "Pegasus": ("PegasusForConditionalGeneration", "AutoModelForSeq2SeqLM", both_tokens, _SEQ2SEQ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "AutoModelForSpeechSeq2Seq",
        spectra,
        _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16},
    ),
    "Wav2Vec2": ("Wav2Vec2Model", "AutoModel", waves, _WAVES),
    "HuBERT": ("HubertModel", "AutoModel", waves, _WAVES),
    "ViT": ("ViTModel", "AutoModel", pictures, _BERT | {"image_size": 32, "patch_size": 8}),
    "DeiT": ("DeiTModel", "AutoModel", pictures, _BERT | {"image_size": 32, "patch_size": 8}),
    "BEiT": ("BeitModel", "AutoModel", pictures, _BERT | {"image_size": 32, "patch_size": 8}),
    "DINOv2": ("Dinov2Model", "AutoModel", pictures, _BERT | {"image_size": 32, "patch_size": 8}),
    "Swin": (
        "SwinModel",
        "AutoModel",
        pictures,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "AutoModelForImageClassification",
        pictures,
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    ),
    "ResNet": (
        "ResNetModel",
        "AutoModel",
        pictures,
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    ),
    "MobileNetV2": ("MobileNetV2Model", "AutoModel", pictures, {"depth_multiplier": 0.25, "image_size": 32}),
    "EfficientNet": (
        "EfficientNetModel",
        "AutoModel",
        pictures,
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    ),
    "CLIP": (
        "CLIPModel",
        "AutoModel",
        pairs,
        {
            "projection_dim": 16,
            "text_config": _BERT
            | {
                "vocab_size": _VOCABULARY,
                "max_position_embeddings": 20,
                "eos_token_id": 2,
                "bos_token_id": 1,
                "pad_token_id": 0,
            },
            "vision_config": _BERT | {"image_size": 32, "patch_size": 8},
        },
    ),
}


class FunctionalNetwork(nn.Module):
    """Functions of several modules' `forward`, with a gate that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.outer = nn.Linear(_WIDTH, 64), nn.Linear(_WIDTH, 64), nn.Linear(64, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.inner(x), approximate="tanh") * torch.sigmoid(self.gate(x))
        found: Tensor = self.outer(hidden.relu())
        return found


class FeedForward(nn.Module):
    """SwiGLU as Meta's Llama writes it: `w2(silu(w1(x)) * w3(x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(_WIDTH, 64, bias=False)
        self.w2 = nn.Linear(64, _WIDTH, bias=False)
        self.w3 = nn.Linear(_WIDTH, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return found


class GatedGelu(nn.Module):
    """GEGLU: one projection, cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.outer = nn.Linear(_WIDTH, 128), nn.Linear(64, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        found: Tensor = self.outer(value * F.gelu(gate))
        return found


class Shared(nn.Module):
    """One activation module and one block, each used several times."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.GELU()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(_WIDTH, _WIDTH), self.activation) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = x + layer(x)
        return x


class Encoder(nn.Module):
    """torch's own encoder, whose fused path does not call its activation."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(_WIDTH, 2, 64, batch_first=True, activation=activation)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.encoder(x)
        return found


class Zoo(nn.Module):
    """The rarer activations of torch."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [nn.SELU, nn.CELU, nn.ELU, nn.Mish, nn.Hardswish, nn.Softsign, nn.Softplus, nn.LeakyReLU]
        kinds += [nn.Hardtanh, nn.LogSigmoid, nn.Tanhshrink, nn.Tanh, nn.ReLU6]
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(_WIDTH, _WIDTH), kind()) for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


_OWN: dict[str, Callable[[], nn.Module]] = {
    "functions in `forward`": FunctionalNetwork,
    "SwiGLU in Meta's style": FeedForward,
    "GEGLU": GatedGelu,
    "`nn.TransformerEncoder`, `nn.GELU()`": lambda: Encoder(nn.GELU()),
    '`nn.TransformerEncoder`, "relu"': lambda: Encoder("relu"),
    "one module for several layers": Shared,
    "13 activations of torch": Zoo,
}


def _of_transformers(name: str) -> Architecture:
    import transformers

    kind, auto, given, fields = _TRANSFORMERS[name]
    model_class: Any = getattr(transformers, kind)
    config_class = model_class.config_class
    if "text_config" not in fields and given in (tokens, both_tokens, spectra):
        fields = {"vocab_size": _VOCABULARY, **fields}
    return Architecture(name, lambda: model_class(config_class(**fields)), given, auto)


def _of_ones_own(name: str) -> Architecture:
    return Architecture(name, _OWN[name], vectors)


def architectures() -> dict[str, Callable[[], Architecture]]:
    """Every row, by name."""
    found: dict[str, Callable[[], Architecture]] = {}
    for name in _TRANSFORMERS:
        found[name] = lambda name=name: _of_transformers(name)  # type: ignore[misc]
    for name in _OWN:
        found[name] = lambda name=name: _of_ones_own(name)  # type: ignore[misc]
    return found


def measure(architecture: Architecture, directory: Path) -> Row:
    """Convert one model, save it, load it again, and compare."""
    torch.manual_seed(0)
    model = architecture.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that activations matter
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batch = architecture.inputs()
    original = _output(model, batch)
    conversion = convert(model, [batch], degree=8)
    assert conversion.selection is not None
    called = copy.deepcopy(model)
    lift(called, conversion.selection.calls)
    converted = _output(conversion.model, batch)
    stays: dict[str, int] = {}
    for left in conversion.left:
        stays[left.kind] = stays.get(left.kind, 0) + 1
    conversion.save(directory)
    again = _output(_reloaded(architecture, directory), batch)
    off = _distance(again, converted)
    return Row(
        architecture.name,
        parameters,
        found=len(conversion.activations) + len(conversion.left),
        converted=len(conversion.activations),
        calls=len(conversion.selection.calls),
        stays=", ".join(f"{kind} × {count}" for kind, count in sorted(stays.items())),
        certified=max(entry.relative_error for entry in conversion.activations),
        before=_distance(_output(called, batch), original),
        after=_distance(converted, original),
        reload="equal" if torch.equal(again, converted) else f"off by {off:.1e}",
    )


def _reloaded(architecture: Architecture, directory: Path) -> nn.Module:
    if architecture.auto is None:
        return Conversion.load(directory, architecture.build()).model
    import transformers

    kind: Any = getattr(transformers, architecture.auto)
    model: nn.Module = kind.from_pretrained(directory, trust_remote_code=True)
    return model.eval()


def _output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with measuring(model):
        torch.manual_seed(0)
        return inputs.forward(model, dict(batch)).double()


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says about remote code and missing kernels."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def measure_all(names: list[str]) -> list[Row]:
    """A row for each name; a model that cannot be converted gets its error."""
    known = architectures()
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            try:
                with _quiet():
                    row = measure(known[name](), Path(directory) / "converted")
            except Exception as error:  # it is what the table is for
                row = Row(name, failure=f"{type(error).__name__}: {error}")
        rows.append(row)
        print(name, row.failure or f"{row.converted} of {row.found}, {row.reload}", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    heads = [
        "model",
        "found",
        "converted",
        "of them functions",
        "stays",
        "certified error",
        "output before",
        "after",
        "reload",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        if row.failure is not None:
            cells = [row.architecture, *[""] * 7, row.failure.splitlines()[0]]
        else:
            cells = [row.architecture, str(row.found), str(row.converted), str(row.calls or "–"), row.stays or "–"]
            cells += [_number(row.certified), _number(row.before), _number(row.after), str(row.reload)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def main() -> None:
    """Measure, write the JSON, and put the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="name of a row; nothing is written then")
    options = parser.parse_args()
    rows = measure_all(options.only or list(architectures()))
    if options.only:
        print(table(rows))
        return
    import transformers

    content = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "rows": [asdict(row) for row in rows],
    }
    (RESULTS / "architectures.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    opening, _, rest = page.partition(BEGIN)
    _, _, closing = rest.partition(END)
    PAGE.write_text(f"{opening}{BEGIN}\n{table(rows)}{END}{closing}", encoding="utf-8")


if __name__ == "__main__":
    main()
