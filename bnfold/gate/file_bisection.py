"""Where one ONNX file begins to differ from another that it claims to equal."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bnfold.errors import InputError
from bnfold.gate.bisection import Search
from bnfold.gate.candidates import OnnxCandidate
from bnfold.gate.file_gate import FileGate
from bnfold.gate.file_graph import FileGraph
from bnfold.gate.judge import Case, Judge
from bnfold.gate.values import to_numpy


@dataclass(kw_only=True)
class FileBisector(Search):
    """A search in a file.

    Args:
        original: the file that is right.
        folded: the values that folding ``original`` again makes, of which ``meanings`` tells: they say what a file with
            the very same values holds. In any other, values are found by what they hold.
    """

    original: Path
    folded: Collection[str] = ()
    _shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict, init=False, repr=False)

    def _open(self) -> Sequence[str]:
        self._ours = self._ours and {value.name for value in self._file.values} == set(self.folded)
        self._gate = FileGate(
            self.original, self.path, self.device, self.seed, self.limit, data=self.data, progress=self.progress
        )
        self._reference, self._claim = self._gate.opened()
        if (findings := self._gate.findings).problems:
            raise InputError(findings.problems[0], where=str(self.path))
        self._judge = Judge(self._reference, self._gate.cases(self._reference), findings, self.limit)
        values = FileGraph.read(self.original).values
        self._computed = {value.name: value.operator for value in values}
        self._labels = {value.name: value.module or value.node or value.name for value in values}
        self._returned = {name: name for name in self._reference.outputs}
        return findings.notes

    def _onnx(self, *, optimized: bool, disabled: Sequence[str] = ()) -> OnnxCandidate:
        return self._gate.candidate(self._reference, optimized=optimized, disabled=disabled)

    def _module_of(self, name: str) -> str:
        return self._labels[name]

    def _elements(self, name: str, case: Case) -> int:
        """How many elements a value has on a case; none where it is no tensor."""
        if case.words not in self._shapes:
            feeds = {v.name: to_numpy(x) for v, x in zip(self._reference.inputs, case.batch.flat)}
            self._shapes[case.words] = self._reference.file.shapes(feeds)
        return math.prod(self._shapes[case.words].get(name, (0,))) + 1
