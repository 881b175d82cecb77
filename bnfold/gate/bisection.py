"""The first module of a file that leaves the noise: question 1, asked of every value in place of the outputs.

A file of bnfold's own calls its values as the captured graph does, and folding the model again tells which captured
value each of them must equal, and which equals none because an affine is on its way through. The values are read in
the order of the file, some at a time, until one is off. Other files are compared by what their values hold: a value of
the model that is nowhere else to be found may have been folded away, so there the culprit is the first value after the
last ones that agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bnfold.affine import Meaning
from bnfold.errors import InputError
from bnfold.gate.candidates import DEPLOYED, PLAIN, OnnxCandidate
from bnfold.gate.decisions import NEAR, distance
from bnfold.gate.deployed import Sessions
from bnfold.gate.evidence import MANY, Draws, Row, Source, compare
from bnfold.gate.file_gate import FileGate
from bnfold.gate.file_graph import FileGraph, FileValue
from bnfold.gate.findings import Findings
from bnfold.gate.gate import LIMIT, Gate
from bnfold.gate.judge import Case, Judge, run_cases
from bnfold.gate.models import Model
from bnfold.gate.samples import MIN_SAMPLES
from bnfold.gate.sites import compared
from bnfold.gate.witnesses import FileWitness
from bnfold.graph.capture import Captured
from bnfold.graph.functional import module_of
from bnfold.report import Bisection, Culprit, Ledger
from bnfold.report.progress import Progress, silent
from bnfold.runtime.runtime import Device, pip_problem, resolve_device

#: As many elements are compared at a time: with truth and error they take 1 GB. Each time all is run again.
CHUNK = 32_000_000


@dataclass(frozen=True)
class Pair:
    """What is compared.

    Attributes:
        judge: the cases of what is right.
        claim: the file.
        onnx: the file in ONNX Runtime.
        notes: what a user should know.
        computed: the tensors that the model computes, by name: which operator does.
        returned: by name of an output of the file the value of the model that it must equal.
        module_of: the module of a value of the model.
        elements: about how many elements such a value has on a case.
    """

    judge: Judge
    claim: FileWitness
    onnx: Callable[..., OnnxCandidate]
    notes: Sequence[str]
    computed: Mapping[str, Any]
    returned: Mapping[str, str]
    module_of: Callable[[str], str]
    elements: Callable[[str, Case], int]


@dataclass(kw_only=True)
class Search:
    """One search. Build it, then ``find``; a subclass says in what: its ``_open`` does.

    ``meanings`` says of the values of what was folded, by name, which value of the model they equal (None: none) where
    that is not the one of their own name.
    """

    path: Path
    ledger: Ledger = field(default_factory=Ledger)
    meanings: Mapping[str, Meaning | None] = field(default_factory=dict)
    device: Device | str = "cpu"
    seed: int = 0
    limit: float = LIMIT
    data: Mapping[str, Any] | None = None
    progress: Progress = silent

    def _open(self) -> Pair:
        raise NotImplementedError

    def find(self) -> Bisection:
        """The first value that is off.

        Raises:
            InputError: the file's inputs do not fit the model's, or it runs on none of them.
            MissingOperatorError: nothing computes one of its operators in float64.
        """
        self._file = FileGraph.read(self.path)
        self._ours = "bnfold.version" in self._file.metadata
        self._values = self._file.values
        self._pair = pair = self._open()
        judge, claim = self._judge, self._claim = pair.judge, pair.claim
        judge.claim(claim)
        if len(judge.unrun) == len(judge.cases):
            raise InputError(f"the file does not run: {next(iter(judge.unrun.values()))}", where=str(self.path))
        sessions = Sessions(judge, claim, pair.onnx, resolve_device(self.device))
        sessions.run_plain()
        sessions.run_deployed(pair.onnx(optimized=True))
        optimizers = sessions.guilty() or ()
        file, *each = (judge.of(name, said=True) for name in (claim.name, PLAIN, DEPLOYED))
        worst, optimized = (max(map(self._ratio, [*file, *rows]), default=math.inf) for rows in each)
        #: What values of the file stand for; of those that agree how far they are off, and the module of the last.
        self._meant, self._ratios = dict[str, Meaning](), dict[str, float]()
        self._agree, self._notes = "", list[str]()
        culprit = (self._scan if self._ours else self._scan_contents)(self._case())
        if culprit is None and not optimizers and not max(worst, optimized) <= self.limit:
            self._notes.append("every value that could be compared agrees, and the outputs do not: see check")
        notes = dict.fromkeys(filter(None, (pip_problem(), *pair.notes, *judge.findings.doubts, *self._notes)))
        return Bisection(
            culprit, optimizers, self._agree, len(self._ratios), len(self._values), worst, optimized, self.limit,
            tuple(notes),
        )  # fmt: skip

    def _ratio(self, row: Row) -> float:
        """One number for a row, at most ``limit`` where it is right."""
        return row.misfit(self.limit) * self.limit

    def _case(self) -> Case:
        """The one that is furthest off, or the largest of the first sizes."""
        rows = self._judge.of(self._claim.name, said=True)
        ran = [case for case in self._judge.cases if case.claimed is not None]

        def misfit(case: Case) -> float:
            return self._judge.misfit(row for row in rows if row.case == case.words)

        off = max(ran, key=lambda case: (misfit(case), case.batch.samples))
        if misfit(off) > 1:
            return off
        return max(ran, key=lambda c: c.batch.samples * (c.batch.sizes == ran[0].batch.sizes and not c.batch.origin))

    # -- values by name ------------------------------------------------------------------------------------------------

    def _scan(self, case: Case) -> Culprit | None:
        """The first value that is off, in the file's order."""
        partners, done = self._partners(), 0
        turned = self._turned(case)
        for chunk in self._chunks(partners, case):
            self.progress("bisect", done, len(partners))
            done += len(chunk)
            rows = compared(self._judge, self._claim, case, {name: self._meant[name] for name in chunk})
            for name in (name for name in chunk if name in rows):
                ratio = max(self._ratio(rows[name]), turned.get(name, 0.0))
                if ratio <= self.limit:
                    self._agrees(name, partners[name], ratio)
                elif name in self._pair.returned or not self._is_another(name, partners[name], case):
                    return self._culprit(name, partners[name], ratio)
        return None

    def _turned(self, case: Case) -> dict[str, float]:
        """How far from a near-tie the file decides otherwise, in limits, by the value that holds the decision."""
        found: dict[str, float] = {}
        if not case.truth.decided:
            return found
        _, taken = self._judge.taken(self._claim, case)
        follow, reference = {**case.truth.decided, **taken}, self._judge.reference
        try:
            run = reference.run(case.batch, follow=follow)
            moved = [reference.run(case.batch, follow=follow, seed=seed).turns for seed in range(4)]
        except Exception:  # indices that there are none of: they are off where they are decided
            return found
        for turn in (turn for turn in run.turns if turn.different):
            if (name := self._claim.called(turn.value)) is not None:
                found[name] = distance(turn, moved) * self.limit / NEAR
        return found

    def _partners(self) -> dict[str, str]:
        """For the values of the file, in its order, the values of the model that they must equal."""
        found, computed, ours = dict[str, str](), self._pair.computed, self.meanings if self._ours else {}
        for name in self._values:
            bases = (name, name.removesuffix("_value"), name.removesuffix(":0"))  # as its name may have been taken
            base = next((b for b in bases if b in self.meanings or b in computed), name)
            held = ours.get(base, Meaning(base))
            partner = self._pair.returned.get(name) or (held.value if held is not None else "")
            if partner in computed:
                found[name], self._meant[name] = partner, ours.get(base) or Meaning(partner)
        if not found:
            self._notes.append("the file and the model have no names in common: values are compared by what they hold")
        return found

    def _chunks(self, partners: Mapping[str, str], case: Case) -> Iterator[list[str]]:
        chunk: list[str] = []
        total = 0
        for name, partner in partners.items():
            size = self._pair.elements(partner, case)
            if chunk and total + size > CHUNK:
                yield chunk
                chunk, total = [], 0
            chunk.append(name)
            total += size
        if chunk:
            yield chunk

    def _is_another(self, name: str, partner: str, case: Case) -> bool:
        """Whether a value has its name by chance: torch.onnx numbers those that it makes itself in the same way.

        It then has another shape, or equals another captured value of the same operator.
        """
        computed = self._pair.computed
        alike = [name for name, operator in computed.items() if operator == computed[partner]]
        value = self._claim.run(case.batch, [name]).kept[name]
        truth = self._judge.reference.run(case.batch, alike).kept
        if value.shape != truth[partner].shape:
            return True
        rows = (compared(self._judge, self._claim, case, {name: Meaning(n)}) for n in alike
                if n != partner and truth[n].shape == value.shape)  # fmt: skip
        return any(self._ratio(row[name]) <= self.limit for row in rows if name in row)

    def _agrees(self, name: str, partner: str, ratio: float) -> None:
        self._ratios[name] = ratio
        self._agree = self._module(self._values[name], partner) or self._agree

    def _module(self, value: FileValue, partner: str | None) -> str:
        return value.module or (self._pair.module_of(partner) if partner else "")

    def _culprit(self, name: str, partner: str | None, ratio: float, *, sure: bool = True) -> Culprit:
        value = self._values[name]
        module = self._module(value, partner)
        _, nearest = self._file.behind([name], self._ratios)
        before, folds = max(map(self._ratios.__getitem__, nearest), default=0.0), self._folds(name, partner, module)
        return Culprit(module, name, value.operator, value.node, ratio, before, tuple(folds), sure)

    def _folds(self, name: str, partner: str | None, module: str) -> Iterable[str]:
        """What was folded or merged into a value, in words."""

        def here(own: bool, site: Iterable[tuple[str, str]]) -> bool:
            return own or any(folded == name or captured == partner for folded, captured in site)

        for entry in self.ledger.folded:
            if here(bool(module) and (module in entry.into or module == entry.module), entry.site):
                into = f" into {' and '.join(entry.into)}" if any(entry.into) else ""
                yield f"{entry.layer if entry.module else entry.kind} '{entry.module or entry.value}'{into}"
        for merge in self.ledger.merges:
            if here(bool(module) and module in (*merge.modules, merge.into), merge.site):
                yield f"{' + '.join(merge.modules)} merged into {merge.into}"

    # -- values by what they hold --------------------------------------------------------------------------------------

    def _scan_contents(self, case: Case) -> Culprit | None:
        """The first value after the last ones that agree, on the way to an output that does not."""
        names = list(self._pair.computed)
        if sum(self._pair.elements(name, case) for name in names) > CHUNK:
            case = min((c for c in self._judge.cases if c.claimed is not None), key=lambda c: c.batch.samples)
        truth, partners = self._truth(case, names), self._partners()
        kept = self._claim.run(case.batch, list(self._values)).kept
        given = {n: kept[n] for n in self._values if isinstance(x := kept.get(n), Tensor) and x.is_floating_point()}
        wrong: dict[str, float] = {}
        for name, value in given.items():
            known = [n for n, (true, _) in truth.items() if true.shape == value.shape]
            hoped = [partners[name]] if partners.get(name) in known else []
            ratios = ((self._against(value, *truth[n], case), n) for n in (*hoped, *known))
            ratio, partner = next(((r, n) for r, n in ratios if r <= self.limit), (math.inf, ""))
            if partner:
                self._agrees(name, partner, ratio)
            elif name in self._pair.returned:
                wrong[name] = self._against(value, *truth[hoped[0]], case) if hoped else math.inf
        if not wrong:
            return None
        region, _ = self._file.behind(wrong, self._ratios)
        # What is computed from no input is no place to be wrong in, and a size is no value.
        moving = [name for name, value in self._values.items() if name in region and name in given and value.depends]
        first = next(iter([*moving, *wrong]))
        return self._culprit(first, partners.get(first), max(wrong.values()), sure=False)

    def _truth(self, case: Case, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """The model's values and what rounding does to them."""
        model, decided = self._judge.reference, {**case.truth.decided, **self._judge.taken(self._claim, case)[1]}
        kept = model.run(case.batch, names, follow=decided).kept
        known = [n for n in names if n in kept and kept[n].is_floating_point()]
        true = [kept[n] for n in known]

        def draw(seed: int) -> list[Tensor]:
            found = model.run(case.batch, known, follow=decided, seed=seed).kept
            return [found[n] for n in known]

        draws = Draws([Source(true, draw)])
        draws.more(MANY)
        return {name: (value, draws.noise(i)) for i, (name, value) in enumerate(zip(known, true))}

    def _against(self, value: Tensor, truth: Tensor, noise: Tensor, case: Case) -> float:
        noise = noise * 2**0.5  # the file's constants were rounded as well
        ratio, worst, *_ = compare(value, truth, noise, unit=self._judge.reference.coarsest,
                                   batched=case.batch.leads(truth))  # fmt: skip
        return self._ratio(Row("", "", "", ratio, worst))


@dataclass(kw_only=True)
class Bisector(Search):
    """A search in a captured model."""

    captured: Captured
    samples: int = MIN_SAMPLES

    def _open(self) -> Pair:
        captured, program = self.captured, self.captured.program
        gate = Gate(captured, self.ledger, None, self.path, device=self.device, samples=self.samples, seed=self.seed,
                    data=self.data)  # fmt: skip
        notes, findings, model = gate.match(strange=False), Findings(), Model(captured)
        cases, reason = run_cases(model, gate.inputs(), findings, self.progress)
        if not cases:
            raise InputError(f"the unfolded model runs on none of the inputs made for it: {reason}")
        claim = gate.file64(model, None)
        nodes = {node.name: node for node in program.graph.nodes}
        computed = {
            name: node.target for name, node in nodes.items()
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
        }  # fmt: skip
        names = {output: value for value, output in gate.returned()}
        example = next((x for x in captured.flat if isinstance(x, Tensor) and x.ndim), None)

        def elements(name: str, case: Case) -> int:
            sizes = [n if isinstance(n, int) else max(int(n.node.hint or 1), 1) for n in nodes[name].meta["val"].shape]
            shown = example.shape[0] if example is not None and case.batch.size else 1
            return int(math.prod(sizes) * (case.batch.size or 1) / max(shown, 1)) + 1

        return Pair(Judge(model, cases, findings, self.limit), claim, gate.onnx, notes, computed, names,
                    lambda name: module_of(nodes[name]), elements)  # fmt: skip


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

    def _open(self) -> Pair:
        self._ours = self._ours and self._values.keys() == set(self.folded)
        gate = FileGate(
            self.original, self.path, self.device, self.seed, self.limit, data=self.data, progress=self.progress
        )
        claim, findings = gate.open(), gate.findings
        if findings.problems:
            raise InputError(findings.problems[0], where=str(self.path))
        reference, judge = gate.reference, Judge(gate.reference, gate.cases(), findings, self.limit)
        values = FileGraph.read(self.original).values
        modules = {name: value.module or value.node or name for name, value in values.items()}
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}

        def elements(name: str, case: Case) -> int:
            if case.words not in shapes:
                shapes[case.words] = reference.file.shapes(reference.feeds(case.batch))
            return math.prod(shapes[case.words].get(name, (0,))) + 1  # none where it is no tensor

        return Pair(judge, claim, gate.onnx, findings.notes, {name: value.operator for name, value in values.items()},
                    {name: name for name in reference.outputs}, modules.__getitem__, elements)  # fmt: skip
