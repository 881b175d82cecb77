"""A user's runner as a candidate of the gate, and whether it gives the same answer twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.evaluate.subject import Array, Run, Subject, ValueInfo
from bnfold.gate.engines import Setting, coarser
from bnfold.gate.evidence import unit_roundoff
from bnfold.gate.values import as_tensor, to_numpy
from bnfold.graph.capture import Captured, tensor_inputs
from bnfold.graph.names import number_names
from bnfold.runtime.runner import Raised, UserRunner
from bnfold.runtime.runtime import FLOAT32, Arithmetic, Device, Provider


@dataclass(frozen=True)
class RunnerSubject:
    """A runner that knows what it takes and returns; fulfils ``evaluate.subject.Subject``.

    ``path`` is the file that it is to run, if any.
    """

    runner: UserRunner
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    path: Path | None = None

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.runner.name

    def run(self, inputs: Mapping[str, Array], keep: Collection[str] = ()) -> Run:
        """One call. Outputs go by name where there are names, else by position; it keeps no other values.

        Raises:
            Exception: the runner raised, hung or crashed, or its outputs' names are others.
        """
        answer, names = self.runner(inputs, self.path), [value.name for value in self.outputs]
        if isinstance(answer, dict):
            if len(answer) > 1 and not set(names) <= set(answer):
                raise Raised(f"its outputs are {', '.join(answer)}, those of the model {', '.join(names)}")
            answer = [answer[name] for name in names] if set(names) <= set(answer) else [*answer.values()]
        return Run(tuple(answer))


class RunnerCandidate:
    """The model as a user's own runner has it. It shows no values but its outputs."""

    def __init__(
        self, runner: UserRunner, captured: Captured, inputs: Sequence[tuple[int, str]] | None = None,
        outputs: Sequence[str] | None = None, path: Path | None = None, arithmetic: Arithmetic | None = None,
    ) -> None:  # fmt: skip
        """Judges ``runner``.

        Args:
            runner: what runs the model.
            captured: the model.
            inputs: flat input index and the name that the runner is given it under; by default the model's own names.
            outputs: what the runner's outputs may be called; by default as the model's own are.
            path: the file that it is to run, if any.
            arithmetic: what it computes in; by default the model's own dtypes.
        """
        own = [(captured.names.index(name), name) for name in tensor_inputs(captured.program)]
        self._inputs, self.name = list(own if inputs is None else inputs), runner.name
        returned: Any = captured.program.graph.output_node().args[0]
        values = [value for value in returned if isinstance(value, torch.fx.Node | int | float)]
        metas = [getattr(value, "meta", {}).get("val") for value in values]
        self._dtypes = [getattr(meta, "dtype", None) for meta in metas]
        taken = [_info(name, captured.flat[i]) for i, name in self._inputs]
        names = list(outputs or number_names(captured.program))
        self.subject: Subject = RunnerSubject(
            runner, tuple(taken), tuple(_info(name, meta) for name, meta in zip(names, metas)), path
        )
        self.coarser = 1.0 if arithmetic is None else coarser(arithmetic, captured.program)
        self.setting = Setting(Device(Provider("runner", runner.name)), arithmetic or FLOAT32, self.coarser)

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs; numbers that crossed a wire as wider ones are the model's again.

        Raises:
            Exception: the runner raised, hung or crashed, or its outputs' names are not the model's.
        """
        answer = self.subject.run({name: to_numpy(flat[i]) for i, name in self._inputs}).outputs
        found = [as_tensor(array) for array in answer]
        return [self._as_own(*pair) for pair in zip(found, self._dtypes)] if len(found) == len(self._dtypes) else found

    def _as_own(self, value: Tensor, own: torch.dtype | None) -> Tensor:
        if own is None or value.dtype == own:
            return value
        both_float = value.is_floating_point() and own.is_floating_point
        wider = both_float and (unit_roundoff(value.dtype) < unit_roundoff(own) or self.coarser > 1)
        neither = not (value.is_floating_point() or value.is_complex() or own.is_floating_point or own.is_complex)
        return value.to(own) if wider or (neither and torch.equal(value.to(own).to(value.dtype), value)) else value


def _info(name: str, value: Any) -> ValueInfo:
    """An input or output by its example; sizes that are dynamic are unknown, and so is what is no tensor."""
    if not isinstance(value, Tensor):
        return ValueInfo(name, np.dtype(object), ())
    dtype = to_numpy(torch.empty(0, dtype=value.dtype)).dtype
    return ValueInfo(name, dtype, tuple(size if isinstance(size, int) else None for size in value.shape))
