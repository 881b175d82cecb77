"""A program -> ONNX by torch.onnx, without the part that takes most of its time and does nothing here.

torch.onnx decomposes every program before it translates it: it traces the whole graph again so that operators it has
no translation for become others, which is two thirds of its time. Of what bnfold hands it next to nothing needs that:
the graph is functional, and the few common operators without a translation are written by the ones they stand for
here. So the program says itself that it is decomposed where it is; where torch.onnx then misses an operator after all,
it gets the program as it was.
"""

from __future__ import annotations

import copy
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from bnfold.errors import LowerError
from bnfold.graph.functional import arguments, module_of
from bnfold.graph.tracing import whole_recurrent

_ATEN = torch.ops.aten
_HALVES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def translate(program: ExportedProgram, opset: int | None = None) -> ir.Model:
    """The ONNX model of a functional program, not optimised in any way. ``program``'s graph is written over.

    Raises:
        LowerError: torch.onnx cannot translate an operator.
    """
    model = None
    if _rewrite(program.graph_module):
        with suppress(LowerError):  # an operator that has no translation of its own
            model = _by_torch(_Decomposed.of(program), opset)
    model = model or _by_torch(program, opset)
    _narrow_outputs(model.graph, program)
    return model


def _narrow_outputs(graph: ir.Graph, program: ExportedProgram) -> None:
    """Gives outputs the dtypes that the program's have.

    torch.onnx (2.13) computes sums, absolute values and more of half floats in float32, and narrows them where another
    operator reads them alone.
    """
    (returned,) = program.graph.output_node().args
    values = [node.meta["val"] for node in returned if isinstance(node, fx.Node)]
    for i, (value, meant) in enumerate(zip(list(graph.outputs), values)):
        dtype = _HALVES.get(meant.dtype) if isinstance(meant, Tensor) else None
        if dtype is not None and value.dtype == ir.DataType.FLOAT:
            node = ir.node("Cast", [value], {"to": dtype})
            narrow, value.name = node.outputs[0], f"{value.name}_wide"
            narrow.name, narrow.shape, narrow.dtype = value.name.removesuffix("_wide"), value.shape, dtype
            producer = value.producer()
            node.metadata_props.update(producer.metadata_props if producer is not None else {})
            graph.append(node)
            graph.outputs[i] = narrow


class _Decomposed(ExportedProgram):
    """A program in which there may be nothing left to decompose; it looks before it traces itself again."""

    @classmethod
    def of(cls, program: ExportedProgram) -> ExportedProgram:
        found = copy.copy(program)
        found.__class__ = cls
        return found

    def run_decompositions(self, decomp_table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        if decomp_table is None or any(node.target in decomp_table for node in self.graph.nodes):
            traced: ExportedProgram = super().run_decompositions(decomp_table, **options)
            return traced
        return self


def _by_torch(program: ExportedProgram, opset: int | None) -> ir.Model:
    from bnfold.lowering.translations import TRANSLATIONS, gathered_once  # onnxscript takes long, and no file needs it

    try:
        with quiet(), torch.no_grad(), whole_recurrent(), gathered_once():
            result = torch.onnx.export(
                program, dynamo=True, optimize=False, verbose=False, opset_version=opset,
                custom_translation_table=TRANSLATIONS,
            )  # fmt: skip
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = re.sub(r"\x1b\[\d+m", "", str(cause)).strip().split("\n")[0]
        raise LowerError(
            f"torch.onnx cannot translate the model: {type(cause).__name__}: {first}",
            hint="Replace the operator it names, or try another --opset",
        ) from error
    assert result is not None
    return result.model


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the log and the warnings of torch.onnx and onnx_ir away."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


# -- operators that torch.onnx has no translation for, by those that they stand for ------------------------------------


def _rewrite(module: fx.GraphModule) -> bool:
    """Writes what can be written by other operators; whether nothing is left that has to be traced again."""
    # Checks of numbers ONNX cannot say, and torch.onnx (2.13) does not know all that they are computed from.
    for node in module.graph.find_nodes(op="call_function", target=_ATEN._assert_scalar.default):
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    plain, known = True, dict[str, fx.Node]()
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        if not isinstance(target, OpOverload):
            # A region with a graph of its own, such as autocast.
            plain &= target is operator.getitem or getattr(target, "__module__", "") in ("_operator", "math")
            continue
        if target is _ATEN.sym_size.int:
            # One place to ask for a size is enough: every value that has it is as good as the first.
            node.replace_all_uses_with(known.setdefault(str(node.meta["val"]), node))
        if target in _RESHAPES:
            _reshape(node)
        rewrite = _REWRITES.get(target)
        if rewrite is not None:
            with module.graph.inserting_before(node):
                rewrite(node, arguments(node))
        if target is _ATEN.dropout_.default and arguments(node)["train"] is False:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            continue
        plain &= not target._schema.is_mutable
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return plain


def _become(node: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> None:
    node.target, node.args, node.kwargs = target, args, kwargs


def _size(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _reshape(node: fx.Node) -> None:
    """A shape of which one size is dynamic is that of the rest and -1, without asking for any size."""
    shape = _size(node)
    if 0 not in shape and sum(not isinstance(n, int) for n in shape) <= 1:
        _become(node, _ATEN.reshape.default, node.args[0], [n if isinstance(n, int) else -1 for n in shape])


def _pool(node: fx.Node, given: dict[str, Any]) -> None:
    """A pool to one value is the mean; others have a decomposition of their own."""
    size = list(given["output_size"])
    if all(n == 1 for n in size if isinstance(n, int)) and all(isinstance(n, int) for n in size):
        _become(node, _ATEN.mean.dim, given["self"], [-i for i in range(len(size), 0, -1)], True)


def _convolved(
    node: fx.Node, given: dict[str, Any], *, transposed: bool = False, padding: list[int] | None = None
) -> None:
    """torch's convolutions are one operator to torch.onnx; the transposed take their last arguments in another order.

    onnxscript (0.7) gives a conv3d without a bias one of zeros with two axes, which ONNX Runtime refuses.
    """
    rank = len(_size(given["weight"])) - 2
    stride, dilation = (_spread(given[name], rank) for name in ("stride", "dilation"))
    padding = _spread(given["padding"], rank) if padding is None else padding
    output = _spread(given["output_padding"], rank) if transposed else [0] * rank
    _become(
        node, _ATEN.convolution.default,
        given["input"], given["weight"], given["bias"], stride, padding, dilation, transposed, output, given["groups"],
    )  # fmt: skip


def _named_padding(node: fx.Node, given: dict[str, Any]) -> None:
    """``padding="same"`` pads by ``dilation * (k - 1)`` in all; where that is odd a pad of its own is needed."""
    kernel = _size(given["weight"])[2:]
    dilation = _spread(given["dilation"], len(kernel))
    total = [0 if given["padding"] == "valid" else d * (k - 1) for d, k in zip(dilation, kernel)]
    if all(n % 2 == 0 for n in total):
        _convolved(node, given, padding=[n // 2 for n in total])


def _spread(value: Any, rank: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * rank if len(values) == 1 else values


def _normalise(node: fx.Node, given: dict[str, Any]) -> None:
    """A BatchNorm in eval mode; torch.onnx (2.13) reads the first of its three results.

    One that uses the batch's statistics it lowers to inference, whatever ``training`` says, unless it has no others.
    """
    needed = ("weight", "bias", "running_mean", "running_var")
    if given["training"] is True:
        _become(node, _ATEN.batch_norm.default, *(given | dict.fromkeys(needed[2:])).values())
    if given["training"] is not False or any(given[name] is None for name in needed):
        return
    normalised = node.graph.call_function(
        _ATEN._native_batch_norm_legit_no_training.default,
        (given["input"], *(given[name] for name in needed), given["momentum"], given["eps"]),
    )
    value: Tensor = node.meta["val"]
    empty = value.new_empty(0)
    normalised.meta = {**node.meta, "val": (value, empty, empty)}
    node.target, node.args, node.kwargs = operator.getitem, (normalised, 0), {}


def _turned(node: fx.Node, given: dict[str, Any]) -> None:
    """The last two axes change places; torch.onnx writes an Einsum, which bfloat16 has none of and is slow."""
    if not node.meta["val"].is_complex():
        _become(node, _ATEN.transpose.int, given["self"], -2, -1)


def _converted(node: fx.Node, given: dict[str, Any]) -> None:
    """What is left of ``to`` in a file is the cast."""
    dtype = given.get("dtype")
    if dtype is not None and not given.get("memory_format"):
        _become(node, _ATEN._to_copy.default, given["self"], dtype=dtype)


def _projected(node: fx.Node, given: dict[str, Any]) -> None:
    """ONNX's LSTM returns its state as it is; torch.onnx (2.13) would take the projection for a bias."""
    state, cell = given["hx"]
    if _size(state)[2] != _size(cell)[2]:
        where, hint = module_of(node), "Use an LSTM without, and a linear layer behind it"
        raise LowerError(
            "ONNX's LSTM has no projections (proj_size)", where=f"module '{where}'" if where else None, hint=hint
        )


def _attended(node: fx.Node, given: dict[str, Any]) -> None:
    """torch.onnx takes attention on (batch, heads, length, features) alone: other leading axes become those two."""
    lead, mask = _size(node)[:-2], given["attn_mask"]
    parts = [given["query"], given["key"], given["value"]]
    if mask is not None and len(_size(mask)) > 2:
        parts.append(mask)
    if len(lead) == 2 or any(_size(part)[:-2] != lead for part in parts) or sum(type(n) is not int for n in lead) > 1:
        return
    graph, added = node.graph, [1] if lead else [0, 1]

    def call(target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta = {**node.meta, "val": target(*values[0], **values[1])}
        return made

    def led(part: fx.Node) -> fx.Node:
        if len(lead) > 1:
            part = call(_ATEN.flatten.using_ints, part, 0, len(lead) - 1)
            _reshape(part)
        for axis in added:
            part = call(_ATEN.unsqueeze.default, part, axis)
        return part

    options = {name: given[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa")}
    options["attn_mask"] = led(mask) if mask in parts else mask
    attended = call(_ATEN.scaled_dot_product_attention.default, *(led(part) for part in parts[:3]), **options)
    if len(lead) > 1:
        squeezed = call(_ATEN.squeeze.dims, attended, added)
        _become(node, _ATEN.unflatten.int, squeezed, 0, [n if type(n) is int else -1 for n in lead])
        _reshape(node)
    else:
        _become(node, _ATEN.squeeze.dims, attended, added)


_RESHAPES = {
    _ATEN.flatten.using_ints, _ATEN.reshape.default, _ATEN.view.default, _ATEN._unsafe_view.default,
    _ATEN.unflatten.int, _ATEN.reshape_as.default, _ATEN.view_as.default,
}  # fmt: skip
_REWRITES: dict[OpOverload, Callable[[fx.Node, dict[str, Any]], None]] = {
    _ATEN.adaptive_avg_pool1d.default: _pool,
    _ATEN.adaptive_avg_pool2d.default: _pool,
    _ATEN.adaptive_avg_pool3d.default: _pool,
    _ATEN.conv_transpose1d.default: partial(_convolved, transposed=True),
    _ATEN.conv_transpose2d.input: partial(_convolved, transposed=True),
    _ATEN.conv_transpose3d.input: partial(_convolved, transposed=True),
    _ATEN.conv3d.default: _convolved,
    _ATEN.conv1d.padding: _named_padding,
    _ATEN.conv2d.padding: _named_padding,
    _ATEN.conv3d.padding: _named_padding,
    _ATEN.batch_norm.default: _normalise,
    _ATEN.scaled_dot_product_attention.default: _attended,
    _ATEN.lstm.input: _projected,
    _ATEN.mT.default: _turned,
    _ATEN.mH.default: _turned,
    _ATEN.adjoint.default: _turned,
    _ATEN.to.dtype: _converted,
    _ATEN.to.dtype_layout: _converted,
}
