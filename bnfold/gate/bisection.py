"""The first module of a file that leaves the noise: every value of the file against the same value of the model.

A file of bnfold's own calls its values as the captured graph does, and folding the model again tells which captured
value each of them must equal, and which equals none because an affine is on its way through. The values are read in
the order of the file, some at a time, until one is off. Other files are compared by what their values hold: a value of
the model that is nowhere else to be found may have been folded away, so there the culprit is the first value after the
last ones that agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bnfold.affine import Meaning
from bnfold.errors import InputError
from bnfold.gate.candidates import OnnxCandidate, needs_widening, probe_session
from bnfold.gate.engines import settings
from bnfold.gate.file_graph import FileGraph, FileValue
from bnfold.gate.following import Follower
from bnfold.gate.matching import match
from bnfold.gate.optimizers import guilty
from bnfold.gate.reference import RUN_FACTOR, Findings, Progress, References, first_line
from bnfold.gate.samples import MIN_SAMPLES, Batch, batches
from bnfold.gate.sites import Noise
from bnfold.gate.stored import Rows
from bnfold.graph.capture import Captured
from bnfold.graph.functional import module_of
from bnfold.report import Bisection, Culprit, Ledger
from bnfold.runtime.runtime import Device, pip_problem, resolve_device

#: Largest ratio, over all or in the worst channel, of a value that is right. Of all values of 62 nets the worst was at
#: 4.1, and of 56 nets of transformers at 33 (ALIGN, D-FINE: approximated sigmoids in
#: quiet channels); faults in a layer are in the thousands.
LIMIT = 64.0
#: As many elements are compared at a time: with truth and error they take 1 GB. Each time all is run again.
CHUNK = 32_000_000


@dataclass
class Bisector:
    """One search. Build it, then ``find``.

    ``meanings`` says of the values of the folded program, by name, which captured value they equal (None: none) where
    that is not the one of their own name.
    """

    captured: Captured
    path: Path
    ledger: Ledger = field(default_factory=Ledger)
    meanings: Mapping[str, Meaning | None] = field(default_factory=dict)
    device: Device | str = "cpu"
    samples: int = MIN_SAMPLES
    seed: int = 0
    limit: float = LIMIT
    data: Mapping[str, Rows] | None = None
    progress: Progress = lambda stage, done, total: None

    def find(self) -> Bisection:
        """The first value that is off.

        Raises:
            InputError: the file's inputs do not fit the model's, or it runs on none of them.
        """
        self._file = FileGraph.read(self.path)
        self._ours = "bnfold.version" in self._file.metadata
        # Where the device rounds more coarsely than the model's dtype, that would hide the file's fault.
        self._setting = settings(resolve_device(self.device), self.captured.program)[0]
        self._widen = needs_widening(self.path, self._setting.device)
        probe = probe_session(self.path, device=self._setting.device, widen=self._widen)
        self._matched = match(self.captured, probe, widened=self._widen)
        del probe
        made = batches(
            self.captured.program, self.captured.names, self.captured.flat, samples=self.samples, seed=self.seed,
            data=self.data, sizes=self.captured.sizes, pinned=self._matched.pinned,
        )  # fmt: skip
        self._findings = Findings()
        self._references = References(self.captured, made, self._findings, 4.0, self.progress)
        self._references.run()
        self._nodes = {node.name: node for node in self.captured.program.graph.nodes}
        plain, full = self._misfits(optimized=False), self._misfits(optimized=True)
        worst, run = max((ratio, run) for run, ratio in enumerate(plain))
        optimizers: tuple[str, ...] = ()
        if worst <= RUN_FACTOR < max(full):
            optimizers = self._blame(full, plain)
        culprit = self._scan(run if worst > RUN_FACTOR else self._largest())
        if culprit is None and worst > RUN_FACTOR:
            # Errors are medians over samples, which a single wrong sample does not move.
            culprit = self._scan(run, pooled=True)
        if culprit is None and worst > RUN_FACTOR:
            self._notes.append("every value that could be compared agrees, and the outputs do not: see check")
        return Bisection(
            culprit, optimizers, self._agree, len(self._ratios), len(self._file.values), worst, max(full), self.limit,
            tuple(dict.fromkeys(filter(None, (
                pip_problem(), *self._matched.notes, *self._findings.doubts, *self._notes
            )))),
        )  # fmt: skip

    # -- outputs -------------------------------------------------------------------------------------------------------

    def _onnx(self, *, optimized: bool, disabled: Sequence[str] = ()) -> OnnxCandidate:
        names = {value.name: value.name for value in self._file.values}
        return OnnxCandidate(
            self.path, setting=self._setting, optimized=optimized, inputs=self._matched.inputs, widen=self._widen,
            disabled=disabled, names=names, outputs=self._matched.outputs, wider=self._matched.wider,
        )  # fmt: skip

    def _misfits(self, *, optimized: bool) -> list[float]:
        """Batch by batch the largest ratio of any sample of any output."""
        follower = Follower(self._references, self._onnx(optimized=optimized))
        return [follower.misfit(run) for run in range(len(self._references.batches))]

    def _blame(self, full: Sequence[float], plain: Sequence[float]) -> tuple[str, ...]:
        worst, run = max((ratio, run) for run, ratio in enumerate(full))
        middle = math.sqrt(min(worst, 1e30) * max(plain[run], 1.0))

        def wrong(disabled: Sequence[str]) -> bool:
            candidate = self._onnx(optimized=True, disabled=disabled)
            return not Follower(self._references, candidate).misfit(run) < middle

        return guilty(wrong)

    def _largest(self) -> int:
        sizes = [b.samples if b.sizes == self._references.batches[0].sizes else 0 for b in self._references.batches]
        return sizes.index(max(sizes))

    # -- values --------------------------------------------------------------------------------------------------------

    def _scan(self, run: int, *, pooled: bool = False) -> Culprit | None:
        self._pooled = pooled
        batch = self._references.batches[run]
        self._ratios: dict[str, float] = {}
        self._agree, self._notes = "", list[str]()
        self._candidate = self._onnx(optimized=False)
        partners = self._partners()
        if not partners:
            self._notes.append("the file and the model have no names in common: values are compared by what they hold")
        try:
            taken: Mapping[str, Tensor] = self._candidate.decide(batch.flat, self._references.decisions.names)[1]
        except Exception as error:
            raise InputError(f"the file does not run: {first_line(error)}", where=str(self.path)) from error
        try:
            taken = self._references.decisions.complete(taken)
            turns = self._references.following(run, taken).turns
        except Exception:  # indices that there are none of: they are off where they are decided
            turns, taken = (), {}
        self._turned = {turn.place.value: turn.multiple for turn in turns}
        by_name = {value.name: value for value in self._file.values}
        if not self._ours:
            return self._scan_contents(batch, taken)
        done, outputs = 0, self._matched.outputs or self._file.outputs
        for chunk in self._chunks(partners, batch):
            self.progress("bisect", done, len(partners))
            done += len(chunk)
            noise = Noise.of(self._references, batch, {partners[name] for name in chunk})
            if noise is None:
                self._notes.append("the graph does not run in float64, so there is no truth to compare values with")
                return None
            followed = noise.following(taken)
            found = self._candidate.values(batch.flat, chunk)
            for name in (name for name in chunk if name in found):
                meaning = self._meaning(name, partners[name])
                ratio = self._ratio(found[name], noise, meaning, followed, batch)
                if not ratio <= self.limit:
                    if name not in outputs and self._is_another(found[name], partners[name], taken, batch):
                        continue
                    return self._culprit(by_name[name], partners[name], ratio)
                self._ratios[name] = ratio
                self._agree = self._module(by_name[name], partners[name]) or self._agree
        return None

    def _partners(self) -> dict[str, str]:
        """For the values of the file, in its order, the captured values that they must equal."""
        specs = self.captured.program.graph_signature.output_specs
        returned = [getattr(spec.arg, "name", "") for spec in specs]
        outputs = self._matched.outputs or self._file.outputs
        ours = dict(zip(outputs, returned)) if len(outputs) == len(returned) else {}
        found: dict[str, str] = {}
        for value in self._file.values:
            name = ours.get(value.name) or self._captured_name(value.name)
            if name is not None and isinstance(self._val(name), Tensor):
                found[value.name] = name
        return found

    def _captured_name(self, name: str) -> str | None:
        base = self._base(name)
        held = self.meanings.get(base, Meaning(base)) if self._ours else Meaning(base)
        return held.value if held is not None and self._is_captured(held.value) else None

    def _base(self, name: str) -> str:
        """The value of the program that a value of the file is, whose name may have been taken."""
        bases = (name, name.removesuffix("_value"), name.removesuffix(":0"))
        return next((b for b in bases if b in self.meanings or self._is_captured(b)), name)

    def _is_captured(self, name: str) -> bool:
        return name in self._nodes and self._nodes[name].op == "call_function"

    def _meaning(self, name: str, partner: str) -> Meaning:
        """What the value of the file stands for."""
        return (self.meanings.get(self._base(name)) if self._ours else None) or Meaning(partner)

    def _val(self, name: str) -> object:
        return self._nodes[name].meta.get("val")

    def _chunks(self, partners: Mapping[str, str], batch: Batch) -> Iterator[list[str]]:
        chunk: list[str] = []
        total = 0
        for name, partner in partners.items():
            size = self._elements(partner, batch)
            if chunk and total + size > CHUNK:
                yield chunk
                chunk, total = [], 0
            chunk.append(name)
            total += size
        if chunk:
            yield chunk

    def _elements(self, name: str, batch: Batch) -> int:
        """About how many elements a captured value has on a batch."""
        value = self._val(name)
        if not isinstance(value, Tensor):
            return 0
        sizes = [n if isinstance(n, int) else max(int(n.node.hint or 1), 1) for n in value.shape]
        example = next((x for x in self.captured.flat if isinstance(x, Tensor) and x.ndim), None)
        shown = example.shape[0] if example is not None and batch.size else 1
        return int(math.prod(sizes) * (batch.size or 1) / max(shown, 1)) + 1

    def _ratio(
        self, value: Tensor, noise: Noise, meaning: Meaning, followed: Mapping[str, Tensor], batch: Batch,
        limit: float | None = None,
    ) -> float:  # fmt: skip
        """Error over noise; beyond ``limit``, this search's own by default, what rounding does is noise too."""
        limit, name = self.limit if limit is None else limit, meaning.value
        if self._turned.get(name, 0.0) > self.limit:
            return self._turned[name]
        truth = noise.truth[name]
        right = followed.get(name, truth)
        if value.shape != right.shape:
            return math.inf
        if not right.is_floating_point():
            return 0.0 if torch.equal(value.to(right.dtype), right) else math.inf
        if name in followed:
            if truth.shape != right.shape:
                return 0.0  # its size is decided, and nothing says how large the noise is
            stored, wanted = meaning.of(right), meaning.of(truth)
            value = torch.where(value == stored, wanted, value.double() - stored + wanted)
        return max(noise.ratios(value, meaning, limit, batched=batch.size > 0 and not self._pooled))

    def _is_another(self, value: Tensor, name: str, taken: Mapping[str, Tensor], batch: Batch) -> bool:
        """Whether a value has its name by chance: torch.onnx numbers those that it makes itself in the same way.

        It then has another shape, or equals another captured value of the same operator.
        """
        node = self._nodes[name]
        alike = {
            n.name for n in self._nodes.values() if n.target is node.target and isinstance(self._val(n.name), Tensor)
        }
        alike = set(itertools.islice((n for n in alike if self._elements(n, batch) < 2 * value.numel() + 64), 64)) | {
            name
        }
        noise = Noise.of(self._references, batch, alike)
        assert noise is not None
        followed = noise.following(taken)
        if value.shape != followed.get(name, noise.truth[name]).shape:
            return True
        return any(self._ratio(value, noise, Meaning(n), followed, batch) <= self.limit for n in alike - {name})

    def _module(self, value: FileValue, partner: str | None) -> str:
        return value.module or (module_of(self._nodes[partner]) if partner else "")

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

    def _scan_contents(self, batch: Batch, taken: Mapping[str, Tensor]) -> Culprit | None:
        """The first value after the last ones that agree, on the way to an output that does not."""
        names = {
            n.name for n in self._nodes.values() if n.op == "call_function" and isinstance(self._val(n.name), Tensor)
        }
        if sum(self._elements(name, batch) for name in names) > CHUNK:
            small = min(self._references.batches, key=lambda b: b.samples)
            batch = small if small.samples < batch.samples else batch
        noise = Noise.of(self._references, batch, names)
        if noise is None:
            self._notes.append("the graph does not run in float64, so there is no truth to compare values with")
            return None
        followed = noise.following(taken)
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name in (
            n.name for n in self._nodes.values() if n.name in noise.truth and noise.truth[n.name].is_floating_point()
        ):
            by_shape.setdefault(tuple(followed.get(name, noise.truth[name]).shape), []).append(name)
        values = {value.name: value for value in self._file.values}
        partners = self._partners()
        agreeing: dict[str, str] = {}
        wrong: dict[str, float] = {}
        floats: set[str] = set()
        # What rounding does to the values costs several runs, and is asked for where an output is wrong without it.
        for limit in (math.inf, self.limit):
            wrong = {}
            unknown = [name for name in values if name not in agreeing]
            for start in range(0, len(unknown), 64):
                self.progress("bisect", start, len(unknown))
                for name, value in self._readable(batch, unknown[start : start + 64]).items():
                    if not value.is_floating_point():
                        continue
                    floats.add(name)
                    known = by_shape.get(tuple(value.shape), [])
                    hoped = [partners[name]] if partners.get(name) in known else []
                    ratios = (
                        (self._ratio(value, noise, Meaning(n), followed, batch, limit), n) for n in (*hoped, *known)
                    )
                    ratio, partner = next(((r, each) for r, each in ratios if r <= self.limit), (math.inf, ""))
                    if partner:
                        self._ratios[name], agreeing[name] = ratio, partner
                    elif name in (self._matched.outputs or self._file.outputs):
                        wrong[name] = (
                            self._ratio(value, noise, Meaning(hoped[0]), followed, batch, limit) if hoped else math.inf
                        )
            if not wrong:
                break
        for name in (name for name in values if name in agreeing):
            self._agree = self._module(values[name], agreeing[name]) or self._agree
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

    def _readable(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """The values that ONNX Runtime hands out: not sequences, nor what it has no numpy type for."""
        try:
            return self._candidate.values(batch.flat, names)
        except Exception:
            if len(names) == 1:
                return {}
        half = len(names) // 2
        return self._readable(batch, names[:half]) | self._readable(batch, names[half:])
