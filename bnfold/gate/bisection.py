"""The first module of a file that leaves the noise: question 1, asked of every value in place of the outputs.

A file of bnfold's own calls its values as the captured graph does, and folding the model again tells which captured
value each of them must equal, and which equals none because an affine is on its way through. The values are read in
the order of the file, some at a time, until one is off. Other files are compared by what their values hold: a value of
the model that is nowhere else to be found may have been folded away, so there the culprit is the first value after the
last ones that agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bnfold.affine import Meaning
from bnfold.errors import InputError
from bnfold.gate.candidates import OnnxCandidate, needs_widening, probe_session
from bnfold.gate.claims import FileClaim
from bnfold.gate.decisions import NEAR
from bnfold.gate.deployed import DEPLOYED, PLAIN, Sessions
from bnfold.gate.engines import settings
from bnfold.gate.evidence import MANY, Draws, Row, Source, compare
from bnfold.gate.file_graph import FileGraph, FileValue
from bnfold.gate.findings import Findings
from bnfold.gate.gate import LIMIT
from bnfold.gate.judge import Case, Judge, run_cases
from bnfold.gate.matching import match
from bnfold.gate.models import Model, coarsest_unit
from bnfold.gate.samples import MIN_SAMPLES, batches
from bnfold.gate.sites import compared
from bnfold.gate.turns import distance
from bnfold.gate.values import batched
from bnfold.graph.capture import Captured
from bnfold.graph.functional import module_of
from bnfold.report import Bisection, Culprit, Ledger
from bnfold.report.progress import Progress
from bnfold.runtime.model_file import read_model
from bnfold.runtime.runtime import Device, pip_problem, resolve_device

#: As many elements are compared at a time: with truth and error they take 1 GB. Each time all is run again.
CHUNK = 32_000_000


@dataclass(kw_only=True)
class Search:
    """One search. Build it, then ``find``.

    A subclass says in what: its ``_open`` makes the judge with its cases, and the claim, and says what the model
    computes and returns.

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
    progress: Progress = lambda stage, done, total: None

    def find(self) -> Bisection:
        """The first value that is off.

        Raises:
            InputError: the file's inputs do not fit the model's, or it runs on none of them.
            MissingOperatorError: nothing computes one of its operators in float64.
        """
        self._file = FileGraph.read(self.path)
        self._ours = "bnfold.version" in self._file.metadata
        noted = self._open()
        judge = self._judge
        judge.claim(self._claim)
        if len(judge.unrun) == len(judge.cases):
            raise InputError(f"the file does not run: {next(iter(judge.unrun.values()))}", where=str(self.path))
        worst, optimized, optimizers = self._outputs()
        self._ratios: dict[str, float] = {}
        self._agree, self._notes = "", list[str]()
        case = self._case()
        culprit = self._scan(case) if self._ours else self._scan_contents(case)
        if culprit is None and not optimizers and not max(worst, optimized) <= self.limit:
            self._notes.append("every value that could be compared agrees, and the outputs do not: see check")
        return Bisection(
            culprit, optimizers, self._agree, len(self._ratios), len(self._file.values), worst, optimized, self.limit,
            tuple(dict.fromkeys(filter(None, (pip_problem(), *noted, *judge.findings.doubts, *self._notes)))),
        )  # fmt: skip

    # -- what a subclass says --------------------------------------------------------------------------------------

    _judge: Judge = field(init=False, repr=False)
    _claim: FileClaim = field(init=False, repr=False)
    #: The tensors that the model computes, by name: which operator does.
    _computed: Mapping[str, Any] = field(init=False, repr=False)
    #: By name of an output of the file the value of the model that it must equal.
    _returned: Mapping[str, str] = field(init=False, repr=False)

    def _open(self) -> Sequence[str]:
        raise NotImplementedError

    def _onnx(self, *, optimized: bool, disabled: Sequence[str] = ()) -> OnnxCandidate:
        raise NotImplementedError

    def _elements(self, name: str, case: Case) -> int:
        raise NotImplementedError

    def _module_of(self, name: str) -> str:
        raise NotImplementedError

    # -- outputs -------------------------------------------------------------------------------------------------------

    def _outputs(self) -> tuple[float, float, tuple[str, ...]]:
        """The largest misfits at the outputs, in limits' units: of the file by itself, and optimised."""
        judge = self._judge
        sessions = Sessions(judge, self._claim, self._onnx, resolve_device(self.device))
        sessions.run_plain()
        sessions.run_deployed(self._onnx(optimized=True))
        optimizers = sessions.guilty()

        def worst(*names: str) -> float:
            ratios = [row.misfit(self.limit) * self.limit for name in names for row in judge.table.of(name)]
            return math.inf if any(name in names for name, _ in judge.said) else max(ratios, default=math.inf)

        return worst(self._claim.name, PLAIN), worst(self._claim.name, DEPLOYED), optimizers

    def _case(self) -> Case:
        """The one that is furthest off, or the largest of the first sizes."""
        name, judge = self._claim.name, self._judge
        ran = [case for case in judge.cases if case.claimed is not None]

        def misfit(case: Case) -> float:
            if (name, case.words) in judge.said:
                return math.inf
            return max((r.misfit(self.limit) for r in judge.table.of(name) if r.case == case.words), default=0.0)

        off = max(ran, key=lambda case: (misfit(case), case.batch.samples))
        if misfit(off) > 1:
            return off
        return max(ran, key=lambda c: c.batch.samples * (c.batch.sizes == ran[0].batch.sizes and not c.batch.origin))

    # -- values --------------------------------------------------------------------------------------------------------

    def _scan(self, case: Case) -> Culprit | None:
        partners, judge = self._partners(), self._judge
        by_name = {value.name: value for value in self._file.values}
        done = 0
        turned = self._turned(case)
        for chunk in self._chunks(partners, case):
            self.progress("bisect", done, len(partners))
            done += len(chunk)
            rows = compared(judge, self._claim, case, {name: self._meaning(name, partners[name]) for name in chunk})
            for name in (name for name in chunk if name in rows):
                ratio = max(_ratio(rows[name], self.limit), turned.get(name, 0.0))
                if not ratio <= self.limit:
                    if name not in self._returned and self._is_another(name, partners[name], case):
                        continue
                    return self._culprit(by_name[name], partners[name], ratio)
                self._ratios[name] = ratio
                self._agree = self._module(by_name[name], partners[name]) or self._agree
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
        found: dict[str, str] = {}
        for value in self._file.values:
            name = self._returned.get(value.name) or self._meant(value.name)
            if name in self._computed:
                found[value.name] = name
        if not found:
            self._notes.append("the file and the model have no names in common: values are compared by what they hold")
        return found

    def _meant(self, name: str) -> str:
        base = self._base(name)
        held = self.meanings.get(base, Meaning(base)) if self._ours else Meaning(base)
        return "" if held is None else held.value

    def _base(self, name: str) -> str:
        """The value of the program that a value of the file is, whose name may have been taken."""
        bases = (name, name.removesuffix("_value"), name.removesuffix(":0"))
        return next((b for b in bases if b in self.meanings or b in self._computed), name)

    def _meaning(self, name: str, partner: str) -> Meaning:
        """What the value of the file stands for."""
        return (self.meanings.get(self._base(name)) if self._ours else None) or Meaning(partner)

    def _chunks(self, partners: Mapping[str, str], case: Case) -> Iterator[list[str]]:
        chunk: list[str] = []
        total = 0
        for name, partner in partners.items():
            size = self._elements(partner, case)
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
        alike = [name for name, operator in self._computed.items() if operator == self._computed[partner]]
        value = self._claim.run(case.batch, [name]).kept[name]
        truth = self._judge.reference.run(case.batch, alike).kept
        if value.shape != truth[partner].shape:
            return True
        rows = (compared(self._judge, self._claim, case, {name: Meaning(n)}) for n in alike
                if n != partner and truth[n].shape == value.shape)  # fmt: skip
        return any(_ratio(row[name], self.limit) <= self.limit for row in rows if name in row)

    def _module(self, value: FileValue, partner: str | None) -> str:
        return value.module or (self._module_of(partner) if partner else "")

    def _culprit(self, value: FileValue, partner: str | None, ratio: float, *, sure: bool = True) -> Culprit:
        module = self._module(value, partner)
        before = self._file.before(value.name, self._ratios)
        return Culprit(
            module, value.name, value.operator, value.node, ratio,
            max((self._ratios[name] for name in before), default=0.0), tuple(self._folds(value, partner, module)), sure,
        )  # fmt: skip

    def _folds(self, value: FileValue, partner: str | None, module: str) -> Iterable[str]:
        """What was folded or merged into a value, in words."""
        for entry in self.ledger.folded:
            own = module in entry.into or module == entry.module if module else False
            if own or any(folded == value.name or captured == partner for folded, captured in entry.site):
                into = f" into {' and '.join(entry.into)}" if any(entry.into) else ""
                yield f"{entry.layer if entry.module else entry.kind} '{entry.module or entry.value}'{into}"
        for merge in self.ledger.merges:
            own = module in (*merge.modules, merge.into) if module else False
            if own or any(folded == value.name or captured == partner for folded, captured in merge.site):
                yield f"{' + '.join(merge.modules)} merged into {merge.into}"

    # -- files from elsewhere ------------------------------------------------------------------------------------------

    def _scan_contents(self, case: Case) -> Culprit | None:
        """The first value after the last ones that agree, on the way to an output that does not."""
        names = list(self._computed)
        if sum(self._elements(name, case) for name in names) > CHUNK:
            case = min((c for c in self._judge.cases if c.claimed is not None), key=lambda c: c.batch.samples)
        truth = self._truth(case, names)
        values = {value.name: value for value in self._file.values}
        partners = self._partners()
        given = self._claim.run(case.batch, list(values)).kept
        wrong: dict[str, float] = {}
        floats = {n for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
        for name in (name for name in values if name in floats):
            known = [n for n, (true, _) in truth.items() if true.shape == given[name].shape]
            hoped = [partners[name]] if partners.get(name) in known else []
            ratios = ((self._against(given[name], *truth[n], case), n) for n in (*hoped, *known))
            ratio, partner = next(((r, n) for r, n in ratios if r <= self.limit), (math.inf, ""))
            if partner:
                self._ratios[name] = ratio
                self._agree = self._module(values[name], partner) or self._agree
            elif name in self._returned:
                wrong[name] = self._against(given[name], *truth[hoped[0]], case) if hoped else math.inf
        if not wrong:
            return None
        region: set[str] = set()
        stack = list(wrong)
        while stack:
            name = stack.pop()
            if name not in region and name not in self._ratios:
                region.add(name)
                stack += values[name].reads
        # What is computed from no input is no place to be wrong in, and a size is no value.
        moving = [v for v in self._file.values if v.name in region and v.name in floats and v.depends]
        first = moving[0] if moving else values[next(iter(wrong))]
        return self._culprit(first, partners.get(first.name), max(wrong.values()), sure=False)

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
        unit = coarsest_unit(self._judge.reference)
        noise = noise * 2**0.5  # the file's constants were rounded as well
        ratio, worst, *_ = compare(value, truth, noise, unit=unit, batched=batched(case.batch, truth))
        return _ratio(Row("", "", "", ratio, worst), self.limit)


@dataclass(kw_only=True)
class Bisector(Search):
    """A search in a captured model."""

    captured: Captured
    samples: int = MIN_SAMPLES

    def _open(self) -> Sequence[str]:
        program = self.captured.program
        # Where the device rounds more coarsely than the model's dtype, that would hide the file's fault.
        self._setting = settings(resolve_device(self.device), program)[0]
        self._widen = needs_widening(held := read_model(self.path), self._setting.device)
        probe = probe_session(self.path, device=self._setting.device, widen=self._widen)
        self._matched = match(self.captured, probe, widened=self._widen)
        del probe
        made = batches(
            program, self.captured.names, self.captured.flat, samples=self.samples, seed=self.seed,
            data=self.data, sizes=self.captured.sizes, pinned=self._matched.pinned,
        )  # fmt: skip
        findings, model = Findings(), Model(self.captured)
        cases, reason = run_cases(model, made, findings, self.progress)
        if not cases:
            raise InputError(f"the unfolded model runs on none of the inputs made for it: {reason}")
        self._judge = Judge(model, cases, findings, self.limit)
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._computed = {
            name: node.target for name, node in self._nodes.items()
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
        }  # fmt: skip
        self._claim = FileClaim(self.path, held, self._matched.inputs, self._matched.outputs, None, model.epsilon,
                                model.halves)  # fmt: skip
        outputs = self._matched.outputs or self._file.outputs
        returned = [getattr(spec.arg, "name", "") for spec in program.graph_signature.output_specs]
        known = len(outputs) == len(returned)
        self._returned = dict(zip(outputs, returned if known else [""] * len(outputs)))
        return self._matched.notes

    def _onnx(self, *, optimized: bool, disabled: Sequence[str] = ()) -> OnnxCandidate:
        return OnnxCandidate(
            self.path, setting=self._setting, optimized=optimized, inputs=self._matched.inputs,
            widen=self._widen, outputs=self._matched.outputs, wider=self._matched.wider, disabled=disabled,
        )  # fmt: skip

    def _module_of(self, name: str) -> str:
        return module_of(self._nodes[name])

    def _elements(self, name: str, case: Case) -> int:
        """About how many elements a captured value has on a case."""
        value = self._nodes[name].meta["val"]
        sizes = [n if isinstance(n, int) else max(int(n.node.hint or 1), 1) for n in value.shape]
        example = next((x for x in self.captured.flat if isinstance(x, Tensor) and x.ndim), None)
        shown = example.shape[0] if example is not None and case.batch.size else 1
        return int(math.prod(sizes) * (case.batch.size or 1) / max(shown, 1)) + 1


def _ratio(row: Row, limit: float) -> float:
    """One number for a row, at most ``limit`` where it is right."""
    return row.misfit(limit) * limit
