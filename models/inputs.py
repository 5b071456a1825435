"""Calibration data of any kind, and how a batch of it goes through a model."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from polytrope.models import is_own
from polytrope.models.modes import wrapped_forward

_Item = TypeVar("_Item")
Batch = dict[str, Tensor]
# Batches (a DataLoader, a list of tensors, tuples or dicts), one batch, or a function that runs the model.
Data = Iterable[Any] | Callable[[nn.Module], Any]
MaskAt = Callable[[Any, nn.Module, Tensor], Tensor | None]
_ENCODED = "_polytrope_encoded"  # note on a tensor: its positions are the encoder's


def read_batches(data: Data, samples: int | None) -> list[Any]:
    """The first batches of the data; a function that runs the model is one.

    Args:
        samples: read no further batch once there are that many; None: read all.

    Raises:
        ValueError: no batch, or no data of a known kind.
    """
    if isinstance(data, Tensor | Mapping):
        return [data]
    if isinstance(data, nn.Module) or not (hasattr(data, "__iter__") or callable(data)):
        hint = "; put it into a torch.utils.data.DataLoader" if hasattr(data, "__getitem__") else ""
        raise ValueError(
            f"data: {type(data).__name__} is neither batches (a DataLoader, a list of tensors, tuples or dicts) nor a "
            f"function that runs the model{hint}"
        )
    if not isinstance(data, Iterable):
        return [data]
    batches: list[Any] = []
    total = 0
    for batch in data:
        batches.append(batch)
        total += size_of(batch)
        if samples is not None and total >= samples:
            break
    if not batches:
        raise ValueError("data: there is no batch in it; an iterator that was used up gives none")
    return batches


def size_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor; 0 where that is not known."""
    first = next((tensor for tensor in tensors_of(batch) if tensor.dim()), None)
    return 0 if first is None else len(first)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in mappings, sequences and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_of(entry)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for entry in value:
            yield from tensors_of(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


def head(batches: Sequence[Any], count: int) -> Any:
    """The first `count` samples of the batch with the most numbers; all of a batch whose tensors have other lengths."""
    largest = max(batches, key=lambda batch: next((tensor.numel() for tensor in tensors_of(batch)), 0))
    first = part(largest, 0, count)
    return largest if first is None else first


def heads(batches: Sequence[Any], count: int) -> list[Any]:
    """The first `count` samples, from as few batches as can be; `head` where one has them."""
    found: list[Any] = []
    total = 0
    numbers = [next((tensor.numel() for tensor in tensors_of(batch)), 0) for batch in batches]
    for index in sorted(range(len(batches)), key=lambda index: -numbers[index]):
        if total >= count:
            break
        found.append(head([batches[index]], count - total))
        total += size_of(found[-1]) or count  # of a function the samples are not known
    return found


def paced(items: Sequence[_Item], say: Callable[[str], None], *, every: float) -> Iterator[_Item]:
    """The items; where they take long, `say` is told how many are done and how long the others will take.

    Args:
        every: seconds from one line to the next.
    """
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= every:
            left = (now - started) / done * (len(items) - done)
            say(f"{done} of {len(items)} done, about {left:.0f} s left")
            said = now
        yield item


def part(batch: Any, start: int, stop: int) -> Any:
    """The samples `start` … `stop` - 1 of a batch; None where its tensors have other lengths, or there are none."""
    tensors = list(tensors_of(batch))
    splits = isinstance(batch, Tensor | Mapping | tuple | list) and bool(tensors)
    if not splits or any(tensor.dim() == 0 or len(tensor) != len(tensors[0]) for tensor in tensors):
        return None
    return _mapped(batch, lambda tensor: tensor[start:stop])


def forward(model: nn.Module, batch: Any) -> Tensor:
    """The first tensor that a model gives for a batch.

    A dict goes in by name (into models of this package its first entry), a tensor and the entries of a tuple by
    position: of these as many as `forward` requires, the others are labels. Everything is moved to the model's device,
    floating-point numbers into the type of its weights. A function runs the model itself.

    Raises:
        ValueError: a batch of no known kind, a tuple of which it cannot be told what the model takes, an output without
            tensor.
    """
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)

    def placed(tensor: Tensor) -> Tensor:
        if like is None:
            return tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    if isinstance(batch, Tensor | Mapping | tuple | list):
        moved = _mapped(batch, placed)
        if isinstance(moved, Tensor):
            output = model(moved)
        elif isinstance(moved, Mapping):
            output = model(next(iter(moved.values()))) if is_own(model) else model(**moved)
        else:
            output = model(*moved[: _required(model, len(moved))])
    elif callable(batch):
        output = _run_by(batch, model)
    else:
        raise ValueError(f"a batch is a tensor, a tuple or a dict of tensors, not a {type(batch).__name__}")
    first = next(tensors_of(output), None)
    if first is None:
        raise ValueError(
            f"the model gives a {type(output).__name__} without any tensor; say how it runs: "
            "forward=lambda model, batch: …, which returns a tensor"
        )
    return first


def mask_of(model: nn.Module, batch: Any) -> Tensor | None:
    """Which positions of a model's output are no padding, `[samples, positions]` bool; None: nothing says.

    Args:
        batch: as it goes into the model.
    """
    return _mask_of_side(model, batch, "decoder")


def _mask_of_side(model: nn.Module, batch: Any, side: str | None) -> Tensor | None:
    """That of an encoder-decoder's decoder is `decoder_attention_mask`, and that of all else `attention_mask`."""
    if not isinstance(batch, Mapping):
        return None
    name = "attention_mask"
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if two or any(str(entry).startswith("decoder_") for entry in batch):
        if side is None:
            return None
        name = f"decoder_{name}" if side == "decoder" else name
    mask = batch.get(name)
    return mask != 0 if isinstance(mask, Tensor) else None


@contextmanager
def masks(model: nn.Module) -> Iterator[MaskAt]:
    """Inside, a function gives the mask of what a module of `model` receives, by the batch, the module and that.

    The side of an encoder-decoder is the one that the module lies in; but what is computed from the encoder's states
    alone, by whichever module, has the encoder's positions: the keys and values of cross-attention. A module that lies
    in both or in neither is of the side that runs; after the decoder still of that: a head on its outputs.
    """
    parts: dict[str, Any] = {side: getattr(model, f"get_{side}", lambda: None)() for side in ("encoder", "decoder")}
    sides = {
        side: set(part.modules()) if isinstance(part, nn.Module) and part is not model else set()
        for side, part in parts.items()
    }
    encoder, decoder = sides.values()
    running: str | None = None

    def run(side: str | None) -> None:
        nonlocal running
        running = side

    def mark(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in tensors_of(output):
            vars(tensor)[_ENCODED] = True

    def note_given(module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        mark(module, inputs, keywords.get("encoder_outputs"))  # the encoder does not run then

    def follow(module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
        given = list(tensors_of((*inputs, *keywords.values())))
        if given and all(map(_is_encoded, given)):
            mark(module, inputs, output)

    def mask_at(batch: Any, module: nn.Module, x: Tensor) -> Tensor | None:
        if _is_encoded(x):
            return _mask_of_side(model, batch, "encoder")
        found = [side for side, modules in sides.items() if module in modules]
        return _mask_of_side(model, batch, found[0] if len(found) == 1 else running)

    handles = []
    if encoder and decoder and parts["encoder"] is not parts["decoder"]:
        handles = [model.register_forward_pre_hook(note_given, with_kwargs=True)]
        handles.append(parts["encoder"].register_forward_hook(mark))
        others = (module for module in model.modules() if module not in encoder)
        handles += [module.register_forward_hook(follow, with_kwargs=True) for module in others]
        handles.append(model.register_forward_pre_hook(lambda *_: run(None)))
        handles.append(parts["encoder"].register_forward_pre_hook(lambda *_: run("encoder")))
        handles.append(parts["encoder"].register_forward_hook(lambda *_: run(None), always_call=True))
        handles.append(parts["decoder"].register_forward_pre_hook(lambda *_: run("decoder")))
    try:
        yield mask_at
    finally:
        for handle in handles:
            handle.remove()


def _is_encoded(x: Tensor) -> bool:
    return _ENCODED in vars(x)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` without padding: `[rows, width]` of `[samples, positions, width]` or `[samples · positions, width]`.

    Args:
        x: anything; of another shape it is given back as it is.
        mask: as of `mask_of` and `masks`.
    """
    if mask is None or x.dim() < 2:
        return x
    if x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
    return x[mask.to(x.device).flatten()] if x.dim() == 2 and len(x) == mask.numel() else x


def vectors(states: Tensor, mask: Tensor | None) -> Tensor:
    """The last dimension of states as float64 rows `[n, width]`, without padding.

    Args:
        states: `[…, width]` of a batch, at any place in the model.
        mask: as of `mask_of` and `masks`.
    """
    return counted(states, mask).reshape(-1, states.shape[-1]).double()


@contextmanager
def on_calibration_data() -> Iterator[None]:
    """Around a forward pass: what the model raises is about the data it was given.

    Raises:
        ValueError: the model's own words.
    """
    try:
        yield
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"the model cannot run on the calibration data: {reason}") from error


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_mapped(entry, change) for entry in value]
    return value


def _run_by(function: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """What a function that runs the model returns; without tensor, what the model returned to it first."""
    outputs: list[Any] = []

    def noting(_name: str, module: nn.Module) -> Callable[..., Any]:
        inner = module.forward

        def noted(*arguments: Any, **keywords: Any) -> Any:
            output = inner(*arguments, **keywords)
            outputs.append(output)
            return output

        return noted

    with wrapped_forward([("", model)], noting):
        result = function(model)
    return result if next(tensors_of(result), None) is not None or not outputs else outputs[0]


def _required(model: nn.Module, given: int) -> int:
    """How many entries of a batch the model's `forward` takes.

    Raises:
        ValueError: it may take more than it requires, so that inputs and labels cannot be told apart.
    """
    if given == 1:
        return 1
    kind: Any = type(getattr(model, "_orig_mod", model))  # a compiled model's own `forward` takes anything
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    positional = [entry for entry in parameters if entry.kind in (entry.POSITIONAL_ONLY, entry.POSITIONAL_OR_KEYWORD)]
    required = sum(entry.default is entry.empty for entry in positional)
    most = given if any(entry.kind is entry.VAR_POSITIONAL for entry in parameters) else len(positional)
    if required < min(most, given):
        raise ValueError(
            f"a batch has {given} entries, and {kind.__name__}.forward takes {required} of them or more: which are its "
            "inputs? Give batches as dicts by name, or forward=lambda model, batch: model(batch[0])"
        )
    return required
