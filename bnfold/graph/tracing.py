"""Tracing: torch.export of a twin of the module, as torch.onnx.export goes about it, with what it leaves unsaid."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.nn.modules.module import register_module_forward_pre_hook

from bnfold.graph.copies import twin
from bnfold.graph.failures import explained, fails, is_torchs, quiet

_ATEN = torch.ops.aten
_LAYERS = (_ATEN.lstm.input, _ATEN.gru.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input)
_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
#: A module that runs so often in one call is being walked step by step, which a trace takes long for.
STEPS = 100
#: Called with what a user should know while it takes long.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Traced:
    """A program; for every size that the code fixes where it does; and the attributes that forward assigned."""

    program: ExportedProgram
    places: dict[str, str]
    assigned: tuple[str, ...]


def trace(module: nn.Module, say: Say, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Traced:
    """The program of ``module``, which stays as it is.

    Where torch.export's tracing of plain Python fails, its strict one is tried, which compiles the code.

    Raises:
        CaptureError: both fail.
    """
    copy = twin(module)
    places: dict[str, str] = {}
    with torch.no_grad(), quiet(), whole_recurrent(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with _placing(places), _counting(copy, say), _naming(copy):
                program = torch.export.export(_called(copy), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            failure = explained(error, copy, lambda: _called(twin(module))(*args, **kwargs))
            if fails(lambda: _called(twin(module))(*args, **kwargs)):
                raise failure from error
            try:
                with _placing(places):
                    strictly = _called(twin(module))
                    program = torch.export.export(strictly, args, kwargs, dynamic_shapes=dynamic_shapes, strict=True)
            except Exception:
                raise failure from error
            if any(isinstance(tensor, FakeTensor) for tensor in program.constants.values()):
                raise failure from error  # what it follows no better, and does not say
    said = (str(warning.message) for warning in caught)
    found = (re.findall(r"self\.([^\s,]+)", words) for words in said if "assigned during export" in words)
    names = (name for each in found for name in each if "._flat_weights[" not in f".{name}")
    return Traced(program, places, tuple(dict.fromkeys(names)))


def _called(module: nn.Module) -> nn.Module:
    """The module as torch.export must be given it: the graph of a GraphModule it runs without the module's hooks."""
    # torch._dynamo comes with it, which takes half a second to import, and a file needs none of it.
    from torch.export._unlift import _check_input_constraints_pre_hook

    hooks = {*module._forward_pre_hooks.values(), *module._forward_hooks.values()} - {_check_input_constraints_pre_hook}
    if not isinstance(module, GraphModule) or not hooks:
        return module
    plain: nn.Module = type(type(module).__name__, (nn.Module,), {"forward": type(module).forward})()
    vars(plain).update(vars(module))
    return plain


@contextmanager
def _placing(places: dict[str, str]) -> Iterator[None]:
    """Notes, for every size that becomes a number, which line of the user's code made it one."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # takes long, and an ONNX file needs none of it

    fix = ShapeEnv._set_replacement

    def noting(self: ShapeEnv, symbol: Any, number: Any, *more: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and is_torchs(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None and getattr(number, "is_Integer", False):
            for source in self.var_to_sources.get(symbol, ()):
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                places.setdefault(source.name, where)
        fix(self, symbol, number, *more)

    ShapeEnv._set_replacement = noting  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ShapeEnv._set_replacement = fix  # type: ignore[method-assign]


@contextmanager
def _counting(module: nn.Module, say: Say) -> Iterator[None]:
    """Says which module is walked step by step, while that goes on."""
    names = {id(each): name for name, each in module.named_modules()}
    counts: dict[int, int] = {}

    def count(each: nn.Module, args: Any) -> None:
        counts[id(each)] = steps = counts.get(id(each), 0) + 1
        if steps == STEPS and id(each) in names:
            say(f"'{names[id(each)]}' is walked step by step, {steps} so far: a shorter example is captured faster")

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(count).remove)
        yield


@contextmanager
def _naming(module: nn.Module) -> Iterator[None]:
    """Lets torch note the modules that are in no module's ``_modules``, which it runs and takes for none.

    And leave a module that raises what the model catches, as where it tries whether a layer takes an argument.
    """
    names = _unregistered(module)
    path_of_module, call_module = _ModuleStackTracer.path_of_module, _ModuleStackTracer.call_module

    def named(self: _ModuleStackTracer, each: nn.Module) -> str:
        return names[id(each)] if id(each) in names else path_of_module(self, each)

    def called(self: _ModuleStackTracer, *args: Any) -> Any:
        around = self.module_stack.copy()
        try:
            return call_module(self, *args)
        except BaseException:
            self.module_stack = around
            raise

    _ModuleStackTracer.path_of_module = named  # type: ignore[assignment,method-assign]
    _ModuleStackTracer.call_module = called  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        _ModuleStackTracer.path_of_module = path_of_module  # type: ignore[method-assign]
        _ModuleStackTracer.call_module = call_module  # type: ignore[method-assign]


def _unregistered(module: nn.Module) -> dict[int, str]:
    """Names of the modules that are kept in plain lists and the like: their own, as Keras has them, or where they are.

    A module of the same name as another has that of the place.
    """
    known = list(module.named_modules())
    seen, taken = {id(each) for _, each in known}, {name for name, _ in known}
    names: dict[int, str] = {}
    for owner, each in known:  # which grows
        for place, held in _held(owner, vars(each).items()):
            if id(held) in seen:
                continue
            own = getattr(held, "name", None)
            name = own if isinstance(own, str) and own and own not in taken else place
            inner = [(f"{name}.{n}" if n else name, m) for n, m in held.named_modules() if id(m) not in seen]
            names |= {id(m): n for n, m in inner}
            seen |= names.keys()
            taken |= {n for n, _ in inner}
            known += inner
    return names


def _held(owner: str, attributes: Iterable[tuple[object, object]], depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    """The modules in attributes, and in lists, tuples and dictionaries there, with their places."""
    for key, value in attributes:
        place = f"{owner}.{key}" if owner else str(key)
        if isinstance(value, nn.Module):
            yield place, value
        elif isinstance(value, (list, tuple)) and depth:
            yield from _held(place, enumerate(value), depth - 1)
        elif isinstance(value, dict) and depth and key != "_modules":
            yield from _held(place, value.items(), depth - 1)


@contextmanager
def whole_recurrent() -> Iterator[None]:
    """While a graph is traced, recurrent layers stay one operator.

    To find out their shapes torch walks them step by step, which takes long and fixes the number of steps. Their shapes
    follow from their operands'.
    """
    saved = [(layer, key, layer.py_kernels[key]) for layer in _LAYERS for key in _KEYS if key in layer.py_kernels]
    for layer, key, walking in saved:
        layer.py_kernels[key] = partial(_shapes, walking)
        layer._dispatch_cache.clear()
    try:
        yield
    finally:
        for layer, key, walking in saved:
            layer.py_kernels[key] = walking
            layer._dispatch_cache.clear()


def _shapes(
    walking: Callable[..., Any], data: Tensor, state: Tensor | Sequence[Tensor], parameters: Any, *options: Any
) -> Any:
    """Empty results of the shapes that the layer's have: ``(out, h)``, of an LSTM ``(out, h, c)``."""
    if not isinstance(data, FakeTensor):
        return walking(data, state, parameters, *options)
    states = [state] if isinstance(state, Tensor) else list(state)
    bidirectional = options[4]
    features = states[0].shape[2] * (2 if bidirectional else 1)
    return (data.new_empty((*data.shape[:2], features)), *(torch.empty_like(each) for each in states))
