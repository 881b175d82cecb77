"""TorchScript as a module that torch.export captures: torch's own converter makes a graph of it.

``TS2EPConverter`` is private to torch and no longer grows; this is the one place that leans on it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from bnfold.errors import CaptureError, InputError
from bnfold.graph.allowed import is_allowed

_WAYS = "Give the Python class that it was made from, with its weights (torch.jit.load(...).state_dict()); or the ONNX "
_WAYS += "file of it"


def converted(script: torch.jit.ScriptModule, args: tuple[Any, ...]) -> nn.Module:
    """A module of torch's own operators that computes what ``script``, in eval mode, does; names of weights stay.

    Args:
        script: only its ``forward`` is looked at.
        args: positional example inputs.

    Raises:
        InputError: ``forward`` holds an operator that does more than compute on tensors.
        CaptureError: torch's converter does not know one of its operators.
    """
    from torch._export.converter import TS2EPConverter

    refuse_effects(script)

    class Converter(TS2EPConverter):
        def retrace_as_exported_program(self, gm: Any, name_to_constant: Any) -> Any:
            found.append(gm)
            raise _Done

    found: list[GraphModule] = []
    try:
        with torch.no_grad():
            Converter(script, args).convert()
    except _Done:
        for inner in found[0].modules():
            # weights in, weights out: none of them computed by autograd
            inner._buffers.update((name, b.detach()) for name, b in inner._buffers.items() if b is not None)
            for node in inner.graph.nodes if isinstance(inner, GraphModule) else ():
                if getattr(node.target, "_opname", "") == "__interpolate":
                    # TorchScript's own, in C++, takes every size for a constant.
                    node.target = nn.functional.interpolate
        _name_inputs(found[0], list(signature(script).parameters))
        return found[0]
    except Exception as error:
        text = re.sub(r"%\S+ : .*? = |, scope: .*|# .*", "", " ".join(str(error).split()))[:200]
        raise CaptureError(
            f"torch's converter of TorchScript fails: {text or type(error).__name__}", where="forward", hint=_WAYS
        ) from error
    raise AssertionError("the converter retraces what it has made")


def _name_inputs(module: GraphModule, names: Sequence[str]) -> None:
    """Calls the arguments of ``forward`` what the script calls them."""
    for node, name in zip(module.graph.find_nodes(op="placeholder"), names):
        node.target = name
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            inner.recompile()


class _Done(Exception):  # noqa: N818
    """The graph is there; what follows in the converter would capture it with sizes of its own choice."""


def in_eval_mode(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A copy in eval mode."""
    module: torch.jit.ScriptModule = copy.deepcopy(script)
    return module.eval()


def refuse_effects(script: torch.jit.ScriptModule) -> None:
    """Raises InputError where ``forward`` would do more than compute on tensors: read a file, print, call out."""
    from torch._export.converter import TS2FXGraphConverter

    if script._c._get_forward_pre_hooks() or script._c._get_forward_hooks():
        raise InputError("it has hooks around its forward, which are not run", hint=_WAYS)
    for node in _nodes(script.inlined_graph):
        kind = node.kind()
        domain, _, name = kind.partition("::")
        if domain == "prim":
            # What torch's converter knows of these works on lists, numbers, attributes and branches.
            good = (hasattr(TS2FXGraphConverter, f"convert_prim_{name}") and name != "CallMethod") or name in _PLAIN
        else:
            good = is_allowed(f"torch.ops.{domain}.{name}.default") or (domain == "aten" and name in _ON_VALUES)
        if not good:
            raise InputError(f"its forward holds {kind}, which is not run: it may do more than compute", hint=_WAYS)


#: Operators of TorchScript's own: on lists, numbers and texts, and those that functions of torch.nn become.
_WORDS = """Bool Delete Float FloatImplicit Int IntImplicit ScalarImplicit __contains__ __derive_index __getitem__
    __interpolate __is__ __isnot__ __not__ __range_length __round_to_zero_floordiv __upsample __upsample_bilinear
    __upsample_nearest _set_item append as_tensor clear cpu dict extend floordiv format get insert
    is_autocast_enabled is_grad_enabled items join keys len list mathremainder ord pop remove reverse setdefault str
    strip tensor update values warn"""
_ON_VALUES = frozenset(_WORDS.split())
_PLAIN = {"max", "min", "TupleIndex", "RaiseException", "unchecked_cast", "dtype", "Return"}


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def signature(model: nn.Module) -> inspect.Signature:
    """What ``forward`` takes; TorchScript has a schema of its own in place of Python's signature."""
    if not isinstance(model, torch.jit.ScriptModule):
        return inspect.signature(model.forward)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    takes, empty = model._c._get_method("forward").schema.arguments[1:], inspect.Parameter.empty
    defaults = [a.default_value if a.has_default_value() else empty for a in takes]
    return inspect.Signature([inspect.Parameter(a.name, kind, default=d) for a, d in zip(takes, defaults)])


def positional(script: torch.jit.ScriptModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs in the order of ``forward``'s arguments.

    Raises:
        InputError: they do not fit.
    """
    takes = signature(script)
    try:
        return takes.bind(*args, **kwargs).args
    except TypeError as error:
        raise InputError(f"the inputs do not fit forward: {error}", hint=f"Its signature is {takes}") from error


def name_modules(program: ExportedProgram) -> None:
    """Lets every operator that reads weights belong to the module that they are named after."""
    targets = {spec.arg.name: spec.target or "" for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        owners = {targets[n.name].rpartition(".")[0] for n in node.all_input_nodes if targets.get(n.name)}
        if node.op == "call_function" and len(owners) == 1:
            (owner,) = owners
            node.meta["nn_module_stack"] = {owner: (owner, "TorchScript")}
