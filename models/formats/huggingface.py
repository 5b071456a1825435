"""Directories of Hugging Face: `config.json` and weights, read and written, with or without converted activations.

Models of this package become its own; every other architecture (BERT, ViT, …) is built by the installed `transformers`.
Weights are read as float32. Converted activations are described in `config.json`, by the entry `polytrope`; see
`remote_code` for how transformers comes to them. This reader runs no code of a directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from polytrope.models import find_architecture, find_huggingface, is_own
from polytrope.models.activations import normalised_activations
from polytrope.models.architecture import PublishedArchitecture
from polytrope.models.checkpoint import activation_modules, compare_configs, model_config
from polytrope.models.factors import describe_factors, restore_factors
from polytrope.models.foreign import CONVERSION, original_settings, with_activation_names
from polytrope.models.formats.deepspeed import checkpoint_directory
from polytrope.models.formats.deepspeed import read_state as read_deepspeed
from polytrope.models.formats.remote_code import (
    MODELING_FILE,
    auto_classes,
    check_functions,
    converted_fields,
    describe_activation,
    modeling_source,
    tokenizer_class,
)
from polytrope.models.formats.states import State, find_weights, load_content, load_safetensors
from polytrope.models.rewriting import original_class
from polytrope.models.special_tokens import kept_fields, token_fields
from polytrope.models.surgery import replace_module, restore_activations
from polytrope.models.weights import check_dtypes
from polytrope.models.writing import appearing, carry_over, compare_outputs, compare_weights
from polytrope.ops import is_learnable_activation

# As transformers looks for them: the first that is there is read, also beside an index that an older save left.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where converted activations were written before `config.json` described them.
_FORMER_FILE = "activations.json"
_FORMER_WEIGHTS = "activations.safetensors"


def read_weights(directory: Path) -> State:
    """The tensors of a directory, from the file that transformers would read, or from a DeepSpeed checkpoint in it.

    Raises:
        ValueError: no weights there, or a file that cannot be read.
    """
    name = next((name for name in _WEIGHT_FILES if (directory / name).exists()), None)
    if name is None:
        if checkpoint_directory(directory) is not None:
            return read_deepspeed(directory)
        raise ValueError(
            f"{directory}: no weights: neither {', '.join(_WEIGHT_FILES)} nor a DeepSpeed checkpoint "
            "(*_model_states.pt)"
        )
    if name.endswith(".index.json"):
        return _read_parts(directory / name)
    return _tensors(load_content(directory / name))


def _read_parts(index: Path) -> State:
    try:
        listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} cannot be read, it may be truncated: {error}") from error
    state: State = {}
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index}: weight_map names {file!r}, which is no file beside it")
        part = _tensors(load_content(index.parent / file))
        if twice := sorted(set(part) & set(state)):
            raise ValueError(f"{index}: {twice[0]} is in {file} and in {listed.get(twice[0])}")
        state |= part
    if missing := sorted(set(listed) - set(state)):
        raise ValueError(f"{index} lists {missing[0]} in {listed[missing[0]]}, which does not have it")
    return state


def _tensors(content: Any) -> State:
    named = content.items() if isinstance(content, Mapping) else ()
    return {str(name): value for name, value in named if isinstance(value, Tensor)}


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        ValueError: missing or not JSON.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{directory / 'config.json'}: expected an object with a model_type")
    return config


def load_huggingface(directory: Path, *, own: bool = True) -> nn.Module:
    """The model of the directory, float32, in evaluation mode, its converted activations in their places.

    Args:
        own: a GPT-2 or ConvNeXt becomes this package's model, not transformers'.

    Raises:
        ValueError: a file that cannot be read, an architecture that cannot be built, settings that are not supported,
            weights that do not fit or are left over.
    """
    content = read_config(directory)
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory}: adapter_config.json: an adapter beside the weights is not read; merge it first")
    config = original_settings(content)
    activations, shared = _read_activations(content, directory)
    factors = _read_factors(content, directory)
    record = find_huggingface(config["model_type"]) if own else None
    if record is not None and factors:
        raise ValueError(f"{directory}: config.json: factors of a {record.title} are read from the own format alone")
    if record is None:
        model = _foreign_model(config, directory, activations, factors)
        own_name: Callable[[str], str] = str
    else:
        state = _all_weights(directory)
        kept = {name: tensor for name, tensor in state.items() if _owner(name) not in activations}
        model = _own_model(config, record, directory, kept)
        own_name = _own_activation_names(model, record, directory)
        _load_activations(
            model,
            {own_name(name): entry for name, entry in activations.items()},
            {
                f"{own_name(_owner(name))}.{name.rpartition('.')[2]}": tensor
                for name, tensor in state.items()
                if _owner(name) in activations
            },
            directory,
        )
    for name, first in shared.items():
        replace_module(model, own_name(name), model.get_submodule(own_name(first)))
    return model.eval()


def _all_weights(directory: Path) -> State:
    """Those of the activations among the others, wherever they were written."""
    former = directory / _FORMER_WEIGHTS
    return read_weights(directory) | (load_safetensors(former) if former.exists() else {})


def _own_activation_names(model: nn.Module, record: PublishedArchitecture, directory: Path) -> Callable[[str], str]:
    """transformers' name of an activation, or this package's, to this package's."""
    own = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == record.activation]
    theirs = {record.huggingface.activation_name(name): name for name in own}
    without_head = {name.partition(".")[2]: found for name, found in theirs.items()}
    known = without_head | theirs | {name: name for name in own}

    def find(name: str) -> str:
        if name not in known:
            raise ValueError(
                f"{directory}: config.json describes the activation {name}, which {record.title} does not have"
            )
        found: str = known[name]
        return found

    return find


def _read_activations(content: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Configurations by module name; and further names of the same modules, each with the first one."""
    path = directory / "config.json"
    try:
        if CONVERSION in content:
            entry = content[CONVERSION]
            configs = {name: part["config"] for name, part in entry["activations"].items()}
            return configs, dict(entry["shared"])
        path = directory / _FORMER_FILE
        if not path.exists():
            return {}, {}
        described = json.loads(path.read_text(encoding="utf-8"))
        return dict(described["activations"]), dict(described.get("shared", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the converted activations cannot be read: {error!r}") from error


def _read_factors(content: Mapping[str, Any], directory: Path) -> dict[str, int]:
    """Ranks of factored layers by module name."""
    try:
        ranks = dict(content.get(CONVERSION, {}).get("factors", {}))
        if not all(type(rank) is int for rank in ranks.values()):
            raise ValueError(f"ranks are integers, got {ranks!r}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / 'config.json'}: the factored layers cannot be read: {error!r}") from error
    return ranks


def own_settings(directory: Path) -> tuple[str, dict[str, Any] | None]:
    """What `config.json` alone tells: transformers' name of the architecture, and the settings of this package's model.

    Settings are those of a directory that becomes this package's model, else None. Converted activations are not among
    them: those are in the weights' file as well.

    Raises:
        ValueError: a file that cannot be read, settings that are not supported.
    """
    content = read_config(directory)
    config = original_settings(content)
    model_type = str(config["model_type"])
    record = find_huggingface(model_type)
    if record is None:
        return model_type, None
    settings = dataclasses.asdict(_own_config(config, record, directory))
    if _read_activations(content, directory)[0]:
        del settings["activation"]
    return record.name, settings


def _own_config(config: dict[str, Any], record: PublishedArchitecture, directory: Path) -> Any:
    named, classes = config.get("architectures"), record.huggingface.classes
    if named and named[0] not in classes:
        raise ValueError(
            f"{directory}: config.json: architectures = {json.dumps(named)} is not supported, only "
            f"{' or '.join(classes)}"
        )
    try:
        return record.huggingface.read(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory}: {error}") from error


def _own_model(config: dict[str, Any], record: PublishedArchitecture, directory: Path, state: State) -> nn.Module:
    settings = _own_config(config, record, directory)
    try:
        model = record.build(settings)
        weights = find_weights(state, str(directory), [record])
        record.load(model, record.own_names(weights.state))
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(directory)) else f"{directory}: {text}") from error
    return model


def _foreign_model(
    config: dict[str, Any], directory: Path, activations: Mapping[str, Any], factors: Mapping[str, int]
) -> nn.Module:
    """Built and loaded by transformers, which knows the names that older versions wrote and those of its own files."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the directory
    try:
        import transformers

        import polytrope.integrations.transformers  # noqa: F401 (models that were made with names of ours)
    except ImportError as error:
        raise ValueError(
            f"{directory}: architecture {config['model_type']} is built by transformers, which is not installed: "
            "pip install transformers"
        ) from error
    named = (config.get("architectures") or [None])[0]
    kind = getattr(transformers, str(named), None)
    if kind is None:
        raise ValueError(f"{directory / 'config.json'}: architectures: transformers has no {named}")
    if config.get("quantization_config") is not None:
        shown = json.dumps(config["quantization_config"])[:80]
        raise ValueError(
            f"{directory}: config.json: quantization_config = {shown} is not supported; give the model as it was before"
        )
    options: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    try:
        with _without_progress_bars():
            if not (activations or factors) and any((directory / name).exists() for name in _WEIGHT_FILES):
                model, report = kind.from_pretrained(directory, local_files_only=True, weights_only=True, **options)
            else:
                settings = kind.config_class.from_dict(config)
                model, report = _converted(kind, activations, factors).from_pretrained(
                    None, config=settings, state_dict=_all_weights(directory), **options
                )
                model.__class__ = kind
    except (RuntimeError, OSError, ValueError, ImportError, KeyError) as error:
        text = str(error)
        if text.startswith(str(directory)):
            raise ValueError(text) from error
        raise ValueError(f"{directory}: transformers cannot load it: {text}") from error
    for problem in ("missing", "unexpected"):
        if report[f"{problem}_keys"]:
            names = ", ".join(sorted(report[f"{problem}_keys"])[:8])
            raise ValueError(f"{directory}: the weights do not fit {named}: {problem} {names}")
    network: nn.Module = model
    for tensor in (*network.parameters(), *network.buffers()):
        # They lie in the file as it was mapped. From odd addresses oneDNN may add in another order, so the same weights
        # would not give the same bits.
        tensor.data = tensor.data.clone()
    return network


def _converted(kind: Any, activations: Mapping[str, Any], factors: Mapping[str, int]) -> Any:
    """A class of transformers whose models have these activations and factors before their weights are loaded."""

    def build(self: Any, settings: Any, *inputs: Any, **options: Any) -> None:
        kind.__init__(self, settings, *inputs, **options)
        restore_activations(self, activations)
        restore_factors(self, factors)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Those of transformers, which go to stderr whatever it is."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_activations(model: nn.Module, activations: Mapping[str, Any], tensors: State, directory: Path) -> None:
    restore_activations(model, activations)
    own = model.state_dict()
    wanted = [name for name in own if _owner(name) in activations]
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{directory}: the weights have no {', '.join(missing[:8])}")
    if unexpected := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{directory}: unexpected weights {', '.join(unexpected[:8])}")
    check_dtypes({name: (tensors[name].dtype, own[name].dtype) for name in wanted})
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def save_huggingface(
    directory: Path,
    model: nn.Module,
    activations: Mapping[str, Any],
    source: Path | None,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `config.json`, the weights, what else the source has, and code that places the activations.

    Equal weights, equal bytes. The directory is read back and compared with the model before it appears.

    Args:
        model: built by transformers, or a model of this package.
        activations: configuration of every converted activation, by the first name of its module; none, and no factored
            layers: transformers reads the directory as it is.
        source: a directory whose tokenizer, names of tokens and names of classes are taken over; one of Hugging Face:
            with everything but its weights.
        inputs: of a model of transformers, by name; its outputs are compared on them. Default: where they are known.

    Raises:
        ValueError: what this format cannot say, or a model that does not come back from it.
    """
    state = model.state_dict()
    shared = _shared(model, activations)
    written_once = {name: tensor for name, tensor in state.items() if _owner(name) not in shared}
    record = find_architecture(str(model.architecture)) if is_own(model) else None
    if record is not None and not isinstance(record, PublishedArchitecture):
        raise ValueError(f"format: transformers has no {record.title}; write the own format instead")
    factors = describe_factors(model)
    if record is not None and factors:
        raise ValueError(
            f"format: transformers has no {record.title} whose linear layers are in two factors, as "
            f"{next(iter(factors))} is; write the own format instead"
        )
    with appearing(directory, "config.json") as aside:
        if record is not None:
            _write_own(aside, model, record, written_once, source)
        else:
            with _without_progress_bars():
                model.save_pretrained(aside, state_dict=written_once)  # type: ignore[operator]
        if source is not None:
            carry_over(source, aside)
        if activations or factors:
            _write_code(aside, model, record, activations, shared, factors)
        with torch.random.fork_rng(devices=[]):
            written = load_huggingface(aside, own=record is not None)
        what = f"{directory} is not written"
        if record is not None:
            compare_configs(written, model, what)
        elif repr(written) != repr(model):
            raise ValueError(f"{what}: {type(model).__name__} comes back with other modules")
        compare_weights(written.state_dict(), state, what)
        example = record.example(model.config) if record is not None else inputs or _example(model)
        if example is not None:
            compare_outputs(written, model, example, what)
        else:
            said = "its modules and weights were read back and compared, its outputs were not: its inputs are not known"
            warnings.warn(f"{directory}: {type(model).__name__}: {said}", stacklevel=2)
    for name in (_FORMER_FILE, _FORMER_WEIGHTS):  # of another model that was there before
        (directory / name).unlink(missing_ok=True)


def _write_code(
    aside: Path,
    model: Any,
    record: PublishedArchitecture | None,
    activations: Mapping[str, Any],
    shared: Mapping[str, str],
    factors: Mapping[str, int],
) -> None:
    """The modeling file, and what `config.json` says of it, of the activations, and of factored layers."""
    config = read_config(aside)
    described = {name: describe_activation(model.get_submodule(name), entry) for name, entry in activations.items()}
    check_functions(model, described)
    named: Callable[[str], str] = str if record is None else record.huggingface.activation_name
    content: dict[str, Any] = {
        "activations": {named(name): entry for name, entry in described.items()},
        "shared": {named(name): named(first) for name, first in shared.items()},
    }
    if factors:
        content["factors"] = dict(factors)
    if record is None:
        config_class, classes = _known_class(model.config), auto_classes(config["model_type"])
        architecture, tokenizer = _known_class(model), tokenizer_class(config["model_type"])
    else:
        config_class, classes = record.huggingface.config_class, dict(record.huggingface.auto_classes)
        architecture, tokenizer = config["architectures"][0], record.huggingface.tokenizer_class
    changed = converted_fields(config_class, config["model_type"], architecture, classes, content)
    if tokenizer is not None:  # which follows from the model's type otherwise
        changed |= {"tokenizer_class": config.get("tokenizer_class") or tokenizer}
    needed = sorted({*classes.values(), architecture})
    source = modeling_source(config_class, config["model_type"], needed, described, factored=bool(factors))
    (aside / MODELING_FILE).write_text(source, encoding="utf-8")
    (aside / "config.json").write_text(
        json.dumps(with_activation_names(config, replaced=True) | changed, indent=2, sort_keys=True) + "\n",
        encoding="utf-8",
    )


def _known_class(instance: Any) -> str:
    """The name of a class of transformers.

    Raises:
        ValueError: it is not one of those that `transformers` itself has.
    """
    import transformers

    kind = original_class(instance) if isinstance(instance, nn.Module) else type(instance)
    name = kind.__name__
    if getattr(transformers, name, None) is not kind:
        raise ValueError(f"{name} is no class of transformers: only these are written with learned activations")
    return name


def _owner(name: str) -> str:
    """The module a parameter belongs to."""
    return name.rpartition(".")[0]


def _shared(model: nn.Module, activations: Mapping[str, Any]) -> dict[str, str]:
    """Further names of the learned activations that several layers use, each with the first one.

    Raises:
        ValueError: a learned activation that is not among `activations`.
    """
    first = {model.get_submodule(name): name for name in activations}
    shared = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_learnable_activation(module) and module not in first:
            raise ValueError(f"{name} is a learned activation that `activations` does not describe")
        if module in first and name not in activations:
            shared[name] = first[module]
    return shared


def _write_own(aside: Path, model: nn.Module, record: PublishedArchitecture, kept: State, source: Path | None) -> None:
    tied: Mapping[str, str] = getattr(model, "tied_weights", {})
    state = {name: tensor for name, tensor in kept.items() if name not in tied}
    learned = {name for name, module in model.named_modules() if is_learnable_activation(module)}
    plain = {name: tensor for name, tensor in state.items() if _owner(name) not in learned}
    config, weights = record.huggingface.write(model.config, _classical_activation(model, record), plain)
    weights |= {
        f"{record.huggingface.activation_name(_owner(name))}.{name.rpartition('.')[2]}": tensor
        for name, tensor in state.items()
        if _owner(name) in learned
    }
    if record.data == "text":
        config |= token_fields(source)
    elif source is not None:
        labels = kept_fields(source)
        config |= {name: labels[name] for name in ("id2label", "label2id") if name in labels}
    tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
    (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _classical_activation(model: nn.Module, record: PublishedArchitecture) -> str:
    """The one classical activation of a model; any, where all are learned and described beside.

    Raises:
        ValueError: there are several, and `config.json` has one field.
    """
    modules = activation_modules(model)
    entries = normalised_activations(model_config(model)["activation"], len(record.activation_widths(model.config)))
    names = sorted({entries[layer][0] for layer, module in modules.items() if not is_learnable_activation(module)})
    if len(names) > 1:
        raise ValueError(
            f"transformers' {record.title} has one activation for all blocks; this one has {', '.join(names)}: write "
            "the own format instead"
        )
    return names[0] if names else str(record.config().activation)


def _example(model: Any) -> dict[str, Tensor] | None:
    """Inputs for a model of transformers that takes tokens or images of a known size, None for others."""
    config = model.config
    if model.main_input_name == "input_ids" and getattr(config, "vocab_size", None):
        tokens = torch.arange(8)[None] % config.vocab_size
        decoded = {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
        return {"input_ids": tokens} | decoded
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if model.main_input_name == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return {"pixel_values": torch.linspace(-2, 2, channels * size * size).sin().reshape(1, channels, size, size)}
    return None
