"""Let a module call a child where it called a function: `F.gelu(x)` in its source becomes `self.gelu_call_1(x)`.

One call in the source is a `Site`. The method around it is compiled again with that call exchanged, and the module gets
a subclass of its own class with this method: nothing is looked up, counted or intercepted when it runs, so that
torch.compile, torch.export, copying and pickling see an ordinary module.
"""

from __future__ import annotations
import __future__

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn


class SourceError(ValueError):
    """A call that cannot be exchanged; says why."""


class HiddenError(SourceError):
    """A call in a method that another one overrides."""


@dataclass(frozen=True, order=True)
class Site:
    """One call in the source of a module's method.

    Args:
        method: its name.
        line, column, end_line, end_column: of the call; lines from the first of the method (0), columns in bytes.
        child: name of the child module that is called instead.
        source: sha256 of the method's text.
    """

    method: str
    line: int
    column: int
    end_line: int
    end_column: int
    child: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


class FunctionalActivation(nn.Module):
    """A function that was called as one, with the other arguments it was called with.

    Args:
        kind: what the function is: `gelu`, `relu`, …
        function: of a tensor.
    """

    def __init__(self, kind: str, function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> None:
        super().__init__()
        self.kind = kind
        self.function = function
        self.arguments = arguments
        self.keywords = keywords

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.arguments, **self.keywords)

    def extra_repr(self) -> str:
        return self.kind


def route(owner: nn.Module, site: Site, module: nn.Module) -> None:
    """Give `owner` the child `site.child`, called at this place instead of what is called there.

    Raises:
        SourceError: a source that is not there, or not the one of the site; a call that cannot be exchanged.
    """
    base, sites = original_class(owner), (*sites_of(owner), site)
    routed = _routed(base, tuple(sorted(sites)))  # type: ignore[arg-type]
    owner.add_module(site.child, module)
    owner.__class__ = routed


def sites_of(owner: nn.Module) -> tuple[Site, ...]:
    """The places where children were put instead of functions."""
    return getattr(type(owner), "_routed_sites", ())


def original_class(owner: nn.Module) -> type[nn.Module]:
    """Of a module, as it was before children were put instead of functions."""
    base: type[nn.Module] = getattr(type(owner), "_routed_base", type(owner))
    return base


@functools.cache
def _routed(base: type[nn.Module], sites: tuple[Site, ...]) -> type[nn.Module]:
    """The subclass whose methods call children at these places; it goes by the name of its base."""
    methods: dict[str, Any] = {}
    for name in sorted({site.method for site in sites}):
        methods[name] = _with_calls(base, name, [site for site in sites if site.method == name])
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_routed_base": base,
        "_routed_sites": sites,
    }
    make: Any = type(base)
    routed: type[nn.Module] = make(base.__name__, (base,), namespace | methods)
    return routed


def _reduce(self: Any, protocol: Any) -> Any:
    routed: Any = next(kind for kind in type(self).__mro__ if "_routed_base" in vars(kind))
    _, _, *state = super(routed, self).__reduce_ex__(max(int(protocol), 2))
    return (_empty, (routed._routed_base, routed._routed_sites), *state)


def _empty(base: type[nn.Module], sites: tuple[Site, ...]) -> nn.Module:
    routed = _routed(base, sites)  # type: ignore[arg-type]
    return routed.__new__(routed)


def method_with(kind: type, code: CodeType) -> str:
    """The name of the method of a class whose source has this code, decorators and nested functions looked through.

    Raises:
        SourceError: none has, or an overriding method hides it.
    """
    for parent in kind.__mro__:
        for name, value in vars(parent).items():
            functions = list(_functions(value))
            if functions and code in _codes(functions[-1]):
                if inspect.getattr_static(kind, name) is not value:
                    raise HiddenError(f"it is called by {parent.__name__}.{name}, which {kind.__name__} overrides")
                return name
    raise SourceError("it is called by a function that is no method of the module")


def call_at(kind: type, method: str, position: tuple[int, int, int, int]) -> tuple[ast.Call, Site]:
    """The call of a method at a position (line, column, end line, end column of the file), and its site, without child.

    Raises:
        SourceError: there is no call.
    """
    function = _innermost(kind, method)
    first = function.__code__.co_firstlineno
    text = _source(function)
    line, column, end_line, end_column = position
    place = (line - first, column, end_line - first, end_column)
    digest = hashlib.sha256(text.encode()).hexdigest()
    site = Site(method, *place, "", digest)
    return _find_call(_parse(text), site), site


def _with_calls(base: type[nn.Module], method: str, sites: list[Site]) -> Any:
    """The method of a class with its calls at the sites exchanged, inside whatever decorates it."""
    function = _innermost(base, method)
    text = _source(function)
    if any(site.source != hashlib.sha256(text.encode()).hexdigest() for site in sites):
        raise SourceError(
            f"{base.__name__}.{method} is another one than at the conversion; install the versions of then"
        )
    tree = _parse(text)
    for site in sites:
        _exchange(tree, _find_call(tree, site), function.__code__.co_varnames[0], site.child)
    new = _compiled(tree, function)
    return _redecorated(inspect.getattr_static(base, method), function, new)


def _exchange(tree: ast.Module, call: ast.Call, owner: str, child: str) -> None:
    argument, in_place = subject(call)
    parents = {below: above for above in ast.walk(tree) for below in ast.iter_child_nodes(above)}
    statement = parents[call]
    call.func = ast.Attribute(ast.Name(owner, ast.Load()), child, ast.Load())
    call.args, call.keywords = [argument], []
    if isinstance(statement, ast.Expr) and in_place:
        # Called for what it does to its argument: that becomes the result.
        assert isinstance(argument, ast.Name)
        above = parents[statement]
        for body in (getattr(above, field, None) for field in ("body", "orelse", "finalbody")):
            if isinstance(body, list) and statement in body:
                body[body.index(statement)] = ast.Assign([ast.Name(argument.id, ast.Store())], call)
    ast.fix_missing_locations(tree)


def subject(call: ast.Call) -> tuple[ast.expr, bool]:
    """What a function is applied to, by position, keyword or as the object of a method; whether it may work in place.

    Raises:
        SourceError: it cannot be told from the source.
    """
    if any(isinstance(entry, ast.Starred) for entry in call.args) or any(entry.arg is None for entry in call.keywords):
        raise SourceError("its arguments are unpacked in the call")
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    in_place = name.endswith("_") or any(entry.arg == "inplace" for entry in call.keywords) or len(call.args) > 1
    if call.args:
        return call.args[0], in_place
    for entry in call.keywords:
        if entry.arg in ("input", "x", "tensor"):
            return entry.value, in_place
    if isinstance(call.func, ast.Attribute):
        return call.func.value, in_place
    raise SourceError("the call has no argument")


def check_use(kind: type, method: str, site: Site) -> None:
    """Refuse a call whose result is not used, unless it can become the variable it works on.

    Raises:
        SourceError: neither.
    """
    tree = _parse(_source(_innermost(kind, method)))
    call = _find_call(tree, site)
    argument, in_place = subject(call)
    unused = any(isinstance(node, ast.Expr) and node.value is call for node in ast.walk(tree))
    if unused and not (in_place and isinstance(argument, ast.Name)):
        raise SourceError("its result is not used")


def _innermost(kind: type, method: str) -> FunctionType:
    """The function whose source a method has, without what decorates it."""
    value = inspect.getattr_static(kind, method)
    functions = list(_functions(value))
    if not functions:
        raise SourceError(f"{kind.__name__}.{method} is no Python function")
    return functions[-1]


def _functions(value: Any) -> Iterator[FunctionType]:
    """A function, and the function it decorates, and so on: decorators keep it in a closure."""
    if not isinstance(value, FunctionType):
        return
    yield value
    for cell in value.__closure__ or ():
        inner = _content(cell)
        if isinstance(inner, FunctionType) and inner.__name__ == value.__name__ and inner is not value:
            yield from _functions(inner)
            return


def _redecorated(value: FunctionType, old: FunctionType, new: FunctionType) -> FunctionType:
    if value is old:
        return new
    following = next(inner for inner in list(_functions(value))[1:])
    inside = _redecorated(following, old, new)
    cells = tuple(CellType(inside) if _content(cell) is following else cell for cell in value.__closure__ or ())
    return _alike(value, value.__code__, cells, inside)


def _alike(function: FunctionType, code: CodeType, cells: tuple[CellType, ...], wrapped: Any = None) -> FunctionType:
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__annotations__ = function.__annotations__
    new.__qualname__ = function.__qualname__
    new.__doc__ = function.__doc__
    vars(new).update(vars(function))
    if wrapped is not None and "__wrapped__" in vars(function):
        new.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return new


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _codes(function: FunctionType) -> list[CodeType]:
    """Its own code and that of the functions and comprehensions inside it."""
    return _nested(function.__code__)


def _nested(code: CodeType) -> list[CodeType]:
    found = [code]
    for outer in found:
        found += [constant for constant in outer.co_consts if isinstance(constant, CodeType)]
    return found


def _source(function: FunctionType) -> str:
    try:
        return inspect.getsource(function.__code__)
    except (OSError, TypeError) as error:
        raise SourceError(f"there is no source of {function.__qualname__}") from error


def _parse(text: str) -> ast.Module:
    """Columns stay as in the file; lines are one more than from the function's first."""
    try:
        return ast.parse(("if True:\n" if text[:1].isspace() else "\n") + text)
    except SyntaxError as error:
        raise SourceError("its source is not a statement of its own") from error


def _find_call(tree: ast.Module, site: Site) -> ast.Call:
    wanted = (site.line + 2, site.column, site.end_line + 2, site.end_column)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            place = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
            if place == wanted:
                return node
    raise SourceError("its place in the source is no call")


def _compiled(tree: ast.Module, function: FunctionType) -> FunctionType:
    """A function like `function`, compiled from a changed source; it closes over the same variables."""
    definition = next(
        (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function.__name__), None
    )
    if definition is None:
        raise SourceError(f"the source of {function.__qualname__} defines no function of that name")
    definition.decorator_list = []
    code = function.__code__
    body: list[ast.stmt] = [definition]
    around = function.__qualname__.split(".")[-2:-1]
    if around and around[0].isidentifier():  # names such as `self.__x` are different ones in every class
        body = [ast.ClassDef(name=around[0], bases=[], keywords=[], body=body, decorator_list=[])]
    variables = [ast.arg(name) for name in code.co_freevars if name != "__class__"]
    factory = ast.FunctionDef(
        name="factory",
        args=ast.arguments(posonlyargs=[], args=variables, kwonlyargs=[], kw_defaults=[], defaults=[]),
        body=body,
        decorator_list=[],
    )
    module = ast.Module([factory], [])
    ast.fix_missing_locations(module)
    ast.increment_lineno(module, code.co_firstlineno - 2)
    flags = code.co_flags & __future__.annotations.compiler_flag
    compiled = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    new = next(inner for inner in _nested(compiled) if inner.co_name == definition.name)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    return _alike(function, new, tuple(cells[name] for name in new.co_freevars))
