"""Operators of ONNX as its reference evaluator calls them: the rows of the table, casts, and what has a body."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_cast import cast_to
from torch import Tensor

from bnfold.evaluate.attributes import Attributes, Row
from bnfold.evaluate.operators import TABLE
from bnfold.evaluate.reading import raised
from bnfold.evaluate.subject import Array

#: What torch computes as other integers.
_WIDENED = ("uint16", "uint32", "uint64")


def tensor(value: Array) -> Tensor:
    """An array as a tensor that shares its memory where it may."""
    array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
    if array.dtype.name in _WIDENED:
        array = array.astype(np.int64)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class _TorchOperator(OpRun):
    """A row of the table."""

    row: Row

    def _run(self, *given: Any, **attributes: Any) -> tuple[Any, ...]:
        opset = self.run_params["opsets"].get(self.op_domain, 1)
        explicit = {a.name for a in self.onnx_node.attribute}
        at = Attributes({n: v for n, v in attributes.items() if n in explicit}, opset, len(self.onnx_node.output))
        found = type(self).row(at, *(None if x is None else tensor(x) for x in given))
        results = [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]
        first = next((x.dtype for x in given if x is not None), None)
        if first is not None and first.name in _WIDENED and results[0].dtype.kind in "ui":
            results[0] = results[0].astype(first, copy=False)
        return tuple(results[: max(len(self.onnx_node.output), 1)])


class Cast(OpRun):
    """To a float it is to float64; to anything else as the reference has it."""

    def _run(self, x: Any, to: int = 0, saturate: int = 1, round_mode: str = "up") -> tuple[Any]:
        return (_cast(x, to, bool(saturate), round_mode),)


class CastLike(OpRun):
    """To the type of another value."""

    def _run(self, x: Any, like: Any, saturate: int = 1, round_mode: str = "up") -> tuple[Any]:
        to = onnx.helper.np_dtype_to_tensor_dtype(like.dtype) if like.dtype.kind not in "OU" else 8
        return (_cast(x, to, bool(saturate), round_mode),)


def _cast(x: Any, to: Any, saturate: bool, round_mode: str) -> Any:
    kinds = onnx.TensorProto
    if to in (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE):
        return x.astype(np.float64)
    return cast_to(x, to, saturate, round_mode)


class Loop(OpRun):
    """Any number of times, or as long as the body says so; what scans collect is stacked."""

    body: Any

    def need_context(self) -> bool:
        """The body may read what lies outside."""
        return True

    def _run(
        self, trips: Any = None, cond: Any = None, *state: Any, context: Any = None, attributes: Any = None, **_: Any
    ) -> tuple[Any, ...]:  # fmt: skip
        body = self.body
        limit = None if trips is None else int(trips.item())
        alive = cond is None or bool(cond.item())
        rows: list[list[Any]] = [[] for _ in body.output_names[1 + len(state) :]]
        step, now = 0, list(state)
        while alive and (limit is None or step < limit):
            feeds = dict(zip(body.input_names, [np.array(step, np.int64), np.array(True), *now]))
            still, *found = body.run(None, {**context, **feeds}, attributes=attributes)
            alive = bool(still.item())
            now = found[: len(state)]
            for row, value in zip(rows, found[len(state) :]):
                row.append(value)
            step += 1
        kinds = body.output_types_[1 + len(state) :]
        return *now, *(np.stack(row) if row else _empty(kind) for row, kind in zip(rows, kinds))


class Scan(OpRun):
    """Once for every slice of its inputs along their axes, in either direction."""

    body: Any

    def need_context(self) -> bool:
        """The body may read what lies outside."""
        return True

    def _run(
        self, *given: Any, context: Any = None, attributes: Any = None, num_scan_inputs: int = 0,
        scan_input_axes: Any = None, scan_output_axes: Any = None, scan_input_directions: Any = None,
        scan_output_directions: Any = None, **_: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        if self.run_params["opsets"][""] < 9:
            raise NotImplementedError("Scan of opset 8, which has a batch of its own")
        body, states = self.body, len(given) - num_scan_inputs
        zeros = [0] * max(len(given), len(body.output_names))
        inputs = [
            np.flip(np.moveaxis(x, axis, 0), 0) if back else np.moveaxis(x, axis, 0)
            for x, axis, back in zip(given[states:], scan_input_axes or zeros, scan_input_directions or zeros)
        ]
        now = list(given[:states])
        rows: list[list[Any]] = [[] for _ in body.output_names[states:]]
        for step in range(len(inputs[0])):
            feeds = dict(zip(body.input_names, [*now, *(x[step] for x in inputs)]))
            found = body.run(None, {**context, **feeds}, attributes=attributes)
            now = found[:states]
            for row, value in zip(rows, found[states:]):
                row.append(value)
        outputs = []
        ends = zip(rows, body.output_types_[states:], scan_output_axes or zeros, scan_output_directions or zeros)
        for row, kind, axis, back in ends:
            outputs.append(np.stack(row[::-1] if back else row, axis) if row else _empty(kind))
        return *now, *outputs


def _empty(kind: Any) -> Array:
    """What no step has collected."""
    dims = [d.dim_value for d in kind.tensor_type.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type or onnx.TensorProto.FLOAT)
    return np.zeros((0, *dims), dtype)


class Optional(OpRun):
    """A dictionary of one value, or of none: what ONNX Runtime hands out as no array is none here."""

    def _run(self, x: Any = None, type: Any = None) -> tuple[Any]:
        return ({} if x is None else {"value": x},)


class OptionalHasElement(OpRun):
    """Whether there is one."""

    def _run(self, x: Any = None) -> tuple[Any]:
        return (np.array(bool(x) if isinstance(x, dict) else x is not None),)


class OptionalGetElement(OpRun):
    """The value that is there."""

    def _run(self, x: Any) -> tuple[Any]:
        found = x.get("value") if isinstance(x, dict) else x
        if found is None:
            raise ValueError("there is no value in it")
        return (found,)


class ConstantOfShape(OpRun):
    """One number, so often."""

    def _run(self, shape: Any, value: Any = None) -> tuple[Any]:
        fill = np.zeros(1) if value is None else raised(np.asarray(value))
        return (np.full(tuple(int(n) for n in shape), fill.reshape(()), fill.dtype),)


_ROWS = {
    key: type(key[1], (_TorchOperator,), {"op_domain": key[0], "row": staticmethod(row)}) for key, row in TABLE.items()
}
#: What computes an operator, by domain and name.
OPERATORS: dict[tuple[str, str], type[OpRun]] = {
    ("", own.__name__): own
    for own in (Cast, CastLike, ConstantOfShape, Loop, Optional, OptionalGetElement, OptionalHasElement, Scan)
} | _ROWS
