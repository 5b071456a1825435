"""Activations that a model calls as functions (`F.gelu(x)`, `x.relu()`): seen while it runs, and made modules.

Once they are modules (`lift`), they are calibrated, replaced and saved like all others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from polytrope.models.inputs import on_calibration_data
from polytrope.models.modes import measuring, wrapped_forward
from polytrope.models.rewriting import (
    FunctionalActivation,
    HiddenError,
    Site,
    SourceError,
    call_at,
    check_use,
    method_with,
    route,
    subject,
)
from polytrope.models.surgery import is_activation, leave_fast_path, part_reason
from polytrope.ops.fitting.targets import resolve_target

# What counts as an activation, as torch hands it to a function mode. `erf` is the heart of a GELU written out.
FUNCTIONS: dict[Callable[..., Any], str] = {
    F.gelu: "gelu",
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.mish: "mish",
    F.elu: "elu",
    F.elu_: "elu",
    F.selu: "selu",
    F.selu_: "selu",
    torch.selu: "selu",
    F.celu: "celu",
    F.celu_: "celu",
    torch.celu: "celu",
    F.prelu: "prelu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.hardswish: "hardswish",
    F.softsign: "softsign",
    F.softplus: "softplus",
    F.hardtanh: "hardtanh",
    F.hardtanh_: "hardtanh",
    F.hardsigmoid: "hardsigmoid",
    F.logsigmoid: "logsigmoid",
    F.tanhshrink: "tanhshrink",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    Tensor.tanh: "tanh",
    Tensor.tanh_: "tanh",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    Tensor.sigmoid_: "sigmoid",
    torch.special.expit: "sigmoid",
    torch.erf: "erf",
    Tensor.erf: "erf",
}
_SMALL = 64  # parameters of a module that may be an activation of somebody's own


@dataclass(frozen=True)
class Call:
    """One place where a module calls an activation as a function.

    Args:
        owner: name of the module, as in `named_modules`.
        kind: `gelu`, `relu`, …; for a function around these, its own name.
        place: for people: class, method and line.
        count: how often it was called.
        site: where in the source, None if that cannot be told.
        module: what does the same as a module.
        obstacle: why it cannot be made a module; None if it can.
    """

    owner: str
    kind: str
    place: str
    count: int
    site: Site | None = None
    module: FunctionalActivation | None = field(default=None, compare=False)
    obstacle: str | None = None

    @property
    def name(self) -> str:
        """Of the module that it can become; of its owner and the function otherwise."""
        own = self.site.child if self.site is not None and self.site.child else f"{self.kind}()"
        return f"{self.owner}.{own}" if self.owner else own


def observe_calls(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]
) -> tuple[list[Call], list[str]]:
    """Run `forward(model, batch)` over the batches, in evaluation mode, and see which functions its modules call.

    Modules that are activations themselves are not looked into.

    Returns:
        The calls, in the order of `named_modules` and of the source; and the names of modules of no known class that
        are nothing but an activation.

    Raises:
        ValueError: the model cannot run on the data.
    """
    patched = {name for name, module in model.named_modules() if "forward" in vars(module)}
    watch = _Watch(patched)
    with measuring(model), _following(model, watch.stack), watch:
        for batch in batches:
            with on_calibration_data():
                forward(model, batch)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    owners = {seen.owner for seen in watch.seen.values()}
    own = [name for name in sorted(owners, key=order.__getitem__) if is_elementwise(model.get_submodule(name))]
    calls = [seen.call() for seen in watch.seen.values() if seen.owner not in own]
    calls.sort(key=lambda call: (order[call.owner], call.site is None, call.site or call.kind))
    return _named(model, calls), own


def lift(model: nn.Module, calls: Sequence[Call]) -> None:
    """Let the owners call modules at these places; the model computes what it did.

    Raises:
        ValueError: a call that has an obstacle.
    """
    for call in calls:
        if call.site is None or call.module is None or call.obstacle is not None:
            raise ValueError(f"{call.place}: {call.kind} cannot be made a module: {call.obstacle}")
        owner = model.get_submodule(call.owner)
        module = FunctionalActivation(call.kind, call.module.function, *call.module.arguments, **call.module.keywords)
        route(owner, call.site, module.train(owner.training))
        leave_fast_path(model, owner)


def _named(model: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """Each with a name for its module: `relu_call_1`, by owner and kind, in the order of the source."""
    counts: dict[tuple[str, str], int] = {}
    named = []
    for call in calls:
        if call.site is not None:
            owner, key = model.get_submodule(call.owner), (call.owner, call.kind)
            counts[key] = counts.get(key, 0) + 1
            while hasattr(owner, f"{call.kind}_call_{counts[key]}"):
                counts[key] += 1
            call = replace(call, site=replace(call.site, child=f"{call.kind}_call_{counts[key]}"))
        named.append(call)
    return named


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module is nothing but a function of single numbers."""
    if sum(parameter.numel() for parameter in module.parameters()) > _SMALL:
        return False
    try:
        resolve_target(module)
    except Exception:  # whatever it does with a row of seven numbers
        return False
    return True


def plain_kind(function: Callable[[Tensor], Tensor]) -> str | None:
    """`tanh` or `sigmoid` for a function that is nothing else, whatever its name."""
    probe = torch.linspace(-3.0, 3.0, 31, dtype=torch.float64)
    with torch.no_grad():
        values = function(probe)
    plain = {"tanh": torch.tanh(probe), "sigmoid": torch.sigmoid(probe)}
    return next((kind for kind, wanted in plain.items() if torch.allclose(values, wanted)), None)


@dataclass
class _Seen:
    """What is known of one place: the arguments of its first call, and whether others were different."""

    owner: str
    module: nn.Module
    function: Callable[..., Any]
    place: str
    count: int = 0
    site: Site | None = None
    callee: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    obstacle: str | None = None

    def call(self) -> Call:
        kind = FUNCTIONS[self.function]
        if self.obstacle is None and kind == "erf" and self.callee is self.function:
            self.obstacle = "it is a part of a formula; make that a function or a module of its own"
        if self.obstacle is not None or self.callee is None or self.site is None:
            return Call(self.owner, kind, self.place, self.count, obstacle=self.obstacle or "its source is not known")
        name = kind if self.callee in FUNCTIONS else getattr(self.callee, "__name__", kind).strip("_<>") or kind
        module = FunctionalActivation(name, self.callee, *self.arguments, **self.keywords)
        try:
            module.kind = kind = plain_kind(resolve_target(module)) or name
        except ValueError as error:
            return Call(self.owner, kind, self.place, self.count, obstacle=f"in a call of `{name}`: {error}")
        return Call(self.owner, kind, self.place, self.count, self.site, module)


class _Watch(TorchFunctionMode):
    """Notes every call of `FUNCTIONS` with the module that runs, and where in its source."""

    def __init__(self, patched: set[str]) -> None:
        super().__init__()
        self.patched = patched
        self.stack: list[tuple[str, nn.Module]] = []
        self.seen: dict[tuple[Any, ...], _Seen] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FUNCTIONS and self.stack:
            name, owner = self.stack[-1]
            if not is_activation(owner):
                self.note(func, name, owner, sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def note(self, function: Callable[..., Any], name: str, owner: nn.Module, frame: FrameType | None) -> None:
        outermost = frame
        method: str | None = None
        reason = "it is called by a function that is no method of the module"
        while frame is not None and frame.f_code is not _FOLLOWED:
            outermost = frame
            try:
                method = method_with(type(owner), frame.f_code)
            except HiddenError as error:
                method, reason, frame = None, str(error), None
                break
            except SourceError:
                method = None
            if method is not None and _is_own(frame, owner, method):
                break
            frame = frame.f_back
        if method is None or frame is None:
            where = outermost.f_code.co_qualname if outermost is not None else "?"
            key: tuple[Any, ...] = (name, where, function)
            seen = self.seen.setdefault(key, _Seen(name, owner, function, where, obstacle=reason))
            seen.count += 1
            return
        place = f"{type(owner).__name__}.{method}, line {frame.f_lineno}"
        key = (name, frame.f_code, frame.f_lasti)
        if key not in self.seen:
            theirs = "another tool put a `forward` into the module" if name in self.patched else part_reason(owner)
            self.seen[key] = _Seen(name, owner, function, place, obstacle=theirs)
            _describe(self.seen[key], method, frame, new=True)
        elif self.seen[key].function is function:
            _describe(self.seen[key], method, frame, new=False)
        self.seen[key].count += self.seen[key].function is function


def _is_own(frame: FrameType, owner: nn.Module, method: str) -> bool:
    """Whether a method runs for this very module; a comprehension inside it has no variable to tell."""
    code = frame.f_code
    return code.co_name != method or frame.f_locals.get(code.co_varnames[0]) is owner


def _describe(seen: _Seen, method: str, frame: FrameType, new: bool) -> None:
    """What is called there, and with which other arguments."""
    if seen.obstacle is not None:
        return
    try:
        position = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        if any(part is None for part in position):
            raise SourceError("Python runs without positions in the source (-X no_debug_ranges)")
        line, end_line, column, end_column = position
        call, site = call_at(type(seen.module), method, (line, column, end_line, end_column))  # type: ignore[arg-type]
        check_use(type(seen.module), method, site)
        argument, _ = subject(call)
        callee = _callee(call, seen.function, frame)
        arguments = tuple(_value(entry, frame) for entry in call.args if entry is not argument)
        keywords = {
            str(entry.arg): _value(entry.value, frame) for entry in call.keywords if entry.value is not argument
        }
        if new:
            seen.callee, seen.site, seen.arguments, seen.keywords = callee, site, arguments, keywords
        elif (callee, arguments, keywords) != (seen.callee, seen.arguments, seen.keywords):
            raise SourceError("it is called with other arguments each time")
    except SourceError as error:
        seen.obstacle = str(error)


def _callee(call: ast.Call, function: Callable[..., Any], frame: FrameType) -> Callable[..., Any]:
    method = call.func.attr if isinstance(call.func, ast.Attribute) and not call.args else ""
    # A method of a tensor: of whatever the expression before it gives.
    callee: Any = function if getattr(Tensor, method, None) is function else _value(call.func, frame)
    if isinstance(callee, nn.Module) or not callable(callee):
        raise SourceError("what is called there is no function")
    if isinstance(getattr(callee, "__self__", None), Tensor):
        raise SourceError("what is called there is a method of a tensor")
    return callee  # type: ignore[no-any-return]


def _value(node: ast.expr, frame: FrameType) -> Any:
    """Of a constant, a name or an attribute, where looking it up computes nothing.

    Raises:
        SourceError: anything else, or a tensor.
    """
    allowed = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.UnaryOp, ast.USub, ast.Load)
    if not all(isinstance(part, allowed) for part in ast.walk(node)):
        raise SourceError(f"`{ast.unparse(node)}` in the call is computed there")
    try:
        value = eval(compile(ast.Expression(node), "<call>", "eval"), frame.f_globals, frame.f_locals)
    except Exception as error:
        raise SourceError(f"`{ast.unparse(node)}` in the call cannot be looked up") from error
    if isinstance(value, Tensor):
        raise SourceError(f"`{ast.unparse(node)}` in the call is a tensor")
    return value


@contextmanager
def _following(model: nn.Module, stack: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep the modules whose `forward` runs on `stack`, the innermost last."""
    followed = [
        (name, module) for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)
    ]
    with wrapped_forward(followed, lambda name, module: _followed(name, module, stack)):
        yield


def _followed(name: str, module: nn.Module, stack: list[tuple[str, nn.Module]]) -> Callable[..., Any]:
    function = module.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        stack.append((name, module))
        try:
            return function(*arguments, **keywords)
        finally:
            stack.pop()

    return forward


_FOLLOWED = next(entry for entry in _followed.__code__.co_consts if isinstance(entry, CodeType))
