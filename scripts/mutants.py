"""Edits right files at random, thousands of times, and lets the gate judge each: what does it let through?

    python scripts/mutants.py --results mutants.jsonl                    # 5,200 mutants; what is there is not run again
    python scripts/mutants.py --results mutants.jsonl --each 20          # 20 of every net
    python scripts/mutants.py --results mutants.jsonl --no-run --write docs/gate-measured.md

Whether a mutant is wrong is decided without the gate, in float64, on inputs of all families that the gate's design
names, at many sizes and batches: its *effect* is the largest difference of any element of any output from the right
file's, over what rounding every constant once does to that element (RMS of draws; at least a tenth of its channel's).
Above 10 it counts and must be refused; below 1 it equals the right file; between the two it may pass or not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from measured_page import stored, write
from mutant_file import File
from mutant_kinds import KINDS
from mutant_nets import NETS, Array, Right, feeds, right

from bnfold.errors import BnfoldError
from bnfold.evaluate.evaluator import File64
from bnfold.gate import gate
from bnfold.report import Ledger

#: Effects from which a mutant counts, and below which it is the right file.
COUNTS, EQUAL = 10.0, 1.0
DRAWS, MANY, ROUNDS = 6, 40, 6
Row = dict[str, Any]


class Oracle:
    """The right file in float64 on many inputs, with the noise of every element."""

    def __init__(self, found: Right) -> None:
        self._found, self._file = found, File64(found.path)
        self._names = [v.name for v in self._file.outputs]
        self._inputs = list(feeds(found, ROUNDS))
        self._known: dict[tuple[int, int], tuple[list[Array], list[Array]]] = {}

    def _truth(self, i: int, draws: int = DRAWS) -> tuple[list[Array], list[Array]]:
        if (i, draws) not in self._known:
            _, fed = self._inputs[i]
            exact = self._file.run(fed).outputs
            drawn = [self._file.run(fed, jitter=(None, seed)).outputs for seed in range(draws)]
            noise = [np.sqrt(np.mean([np.square(d[j] - y) for d in drawn], 0)) for j, y in enumerate(exact)]
            self._known[i, draws] = list(exact), [_floored(n, y) for n, y in zip(noise, exact)]
        return self._known[i, draws]

    def effect(self, model: onnx.ModelProto) -> tuple[float, str]:
        """The largest effect and the input that shows it; it stops at the first that counts.

        Raises:
            BnfoldError: the mutant cannot be evaluated at all.
        """
        file = File64(model)
        if [v.name for v in file.outputs] != self._names:
            return math.inf, "other outputs"
        worst, shown = 0.0, ""
        for i, (words, fed) in enumerate(self._inputs):
            exact, noise = self._truth(i)
            try:
                got = file.run(fed).outputs
            except BnfoldError as error:
                return math.inf, f"{words}: {error}"
            found = max((_effect(g, y, n) for g, y, n in zip(got, exact, noise)), default=0.0)
            if COUNTS < found < 10 * COUNTS:  # so near, a few draws may have been too small by chance
                exact, noise = self._truth(i, MANY)
                found = max((_effect(g, y, n) for g, y, n in zip(got, exact, noise)), default=0.0)
            if found > worst:
                worst, shown = found, words
            if worst > COUNTS:
                break
        return worst, shown


def _floored(noise: Array, exact: Array) -> Array:
    """At least a tenth of the RMS noise of its channel and sample, and what float64 itself may do."""
    axes = tuple(range(2, noise.ndim))
    pooled = np.sqrt(np.square(noise).mean(axes, keepdims=True)) if axes else noise
    return np.maximum(np.maximum(noise, 0.1 * pooled), 1e-13 * np.abs(exact) + 1e-300)


def _effect(got: Array, exact: Array, noise: Array) -> float:
    if not isinstance(got, np.ndarray) or got.shape != exact.shape or got.dtype != exact.dtype:
        return math.inf
    good = np.isfinite(exact)
    if not np.isfinite(got[good]).all():
        return math.inf
    return float((np.abs(got - exact)[good] / noise[good]).max(initial=0.0))


def mutant(name: str, found: Right, values: Mapping[str, Array], index: int) -> tuple[onnx.ModelProto, str, str] | None:
    """Mutant ``index`` of a net, its kind and what was done; None where no edit of that kind gives a file that runs."""
    kind = list(KINDS)[index % len(KINDS)]
    for turn in range(8):
        rng = np.random.default_rng((zlib.crc32(name.encode()), index, turn))
        file = File(onnx.load(found.path), values)
        try:
            words = KINDS[kind](file, rng)
        except (ValueError, IndexError):
            continue
        if words is None:
            continue
        del file.model.graph.value_info[:]
        if runs(file.model, found):
            return file.model, kind, words
    return None


def runs(model: onnx.ModelProto, found: Right) -> bool:
    """Whether ONNX Runtime takes the file and the example; what it does not take reaches nobody.

    Another process asks: on a stride of zero, and on more, ONNX Runtime ends the one that it is in.
    """
    content, fed = model.SerializeToString(), example(found)
    if not (child := os.fork()):
        try:
            for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
                options = onnxruntime.SessionOptions()
                options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
                options.log_severity_level, options.intra_op_num_threads = 4, 1
                onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"]).run(None, fed)
        except Exception:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def example(found: Right) -> dict[str, Array]:
    return {v.name: found.example[v.name].astype(v.dtype) for v in found.inputs}


def values(found: Right) -> dict[str, Array]:
    """Every value of the right file at the example."""
    file = File64(found.path)
    names = {name for node in onnx.load(found.path).graph.node for name in node.output}
    run = file.run(example(found), keep=names)
    return {**run.kept, **example(found)}


class RefusedError(Exception):
    """The gate has found a problem."""


class First(list[str]):
    """The problems of a gate whose first one decides: no question after it is asked."""

    def append(self, text: str) -> None:
        raise RefusedError(text)

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            raise RefusedError(text)

    def __iadd__(self, texts: Iterable[str]) -> First:  # type: ignore[misc, override]
        self.extend(texts)
        return self

    def __setitem__(self, place: Any, texts: Any) -> None:
        self.extend(texts)


def remembering(model: Any) -> Any:
    """The gate's model as a witness that remembers: the same inputs come again with every mutant of a net."""
    memo: dict[Any, Any] = {}

    class Remembering(model):  # type: ignore[misc]
        def _known(self, name: str, batch: Any, make: Callable[[], Any], *more: Any) -> Any:
            given = (x.numpy().tobytes() for x in batch.flat if isinstance(x, torch.Tensor))
            key = (name, id(self.captured), *more, *given)
            if key not in memo:
                memo[key] = make()
            return memo[key]

        def own(self, batch: Any) -> Any:
            return self._known("own", batch, lambda: super(Remembering, self).own(batch))

        def run(self, batch: Any, *more: Any, **asked: Any) -> Any:
            if more or asked.get("follow") or not set(asked) <= {"follow", "seed"}:
                return super().run(batch, *more, **asked)
            return self._known("run", batch, lambda: super(Remembering, self).run(batch, **asked), asked.get("seed"))

    return Remembering


def judge(found: Right, path: Path, *, whole: bool = False) -> Row:
    """What the gate says; unless it is asked for the ``whole`` report, up to its first problem."""
    start, findings = time.process_time(), gate.Findings
    try:
        if not whole:
            gate.Findings = lambda: findings(problems=First())  # type: ignore[assignment, misc]
        report = gate.Gate(found.captured, Ledger(), None, path, written=found.written).judge()
        said = {"verdict": report.verdict, "problem": report.problems[0] if report.problems else ""}
    except RefusedError as refused:
        said = {"verdict": "fail", "problem": str(refused)}
    except BnfoldError as error:
        said = {"verdict": "error", "problem": str(error)}
    except Exception as error:  # a fault of the gate's own, to be mended
        said = {"verdict": "crash", "problem": f"{type(error).__name__}: {error}"}
    finally:
        gate.Findings = findings  # type: ignore[misc]
    return {**said, "seconds": round(time.process_time() - start, 3)}


def run(names: list[str], each: int, first: int, done: set[tuple[str, int]], folder: Path) -> Iterator[Row]:
    for name in names:
        left = [i for i in range(first, each) if (name, i) not in done]
        if not left:
            continue
        found = right(name, folder)
        oracle, known = Oracle(found), values(found)
        if first == 0 and (name, -1) not in done:
            head = {"net": name, "index": -1, "kind": "none", "words": "", "effect": 0.0, "shown": ""}
            yield {**head, **judge(found, found.path, whole=True)}
        for index in left:
            head = {"net": name, "index": index}
            made = mutant(name, found, known, index)
            if made is None:
                yield {**head, "kind": list(KINDS)[index % len(KINDS)], "verdict": "none"}
                continue
            model, kind, words = made
            path = folder / "mutant.onnx"
            onnx.save(model, path)
            try:
                effect, shown = oracle.effect(model)
            except BnfoldError as error:
                effect, shown = math.inf, str(error)
            head |= {"kind": kind, "words": words, "effect": effect, "shown": shown}
            yield {**head, **(judge(found, path) if effect > EQUAL else {"verdict": "equal"})}


# ---- the table -------------------------------------------------------------------------------------------------------


def survived(row: Row) -> bool:
    """Whether it is wrong and was not refused; a crash of the gate is no refusal."""
    return bool(row.get("effect", 0) > COUNTS and row["verdict"] in ("pass", "crash"))


def table(rows: list[Row]) -> str:
    """A line per kind, and those that count and passed."""
    latest = {(r["net"], r["index"]): r for r in rows}.values()
    mutants = [r for r in latest if r["index"] >= 0 and r["verdict"] != "none"]
    lines = [
        "| kind of edit | mutants | equal to the right file | in between | wrong | refused of these | passed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in (*KINDS, "all"):
        mine = [r for r in mutants if kind in (r["kind"], "all")]
        wrong = [r for r in mine if r["effect"] > COUNTS]
        equal = sum(r["effect"] <= EQUAL for r in mine)
        passed = sum(map(survived, wrong))
        counts = (len(mine), equal, len(mine) - equal - len(wrong), len(wrong), len(wrong) - passed, passed)
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    left = [r for r in mutants if survived(r)]
    nets = {r["net"] for r in mutants}
    head = f"{len(mutants)} mutants of {len(nets)} nets ({', '.join(sorted(nets))})."
    found = [head, "", *lines]
    if left:
        found += ["", "Passed though wrong:", ""]
        found += [
            f"- {r['net']} {r['index']}, {r['kind']}: {r['words']}; effect {r['effect']:.3g} on {r['shown']}"
            for r in left
        ]
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--each", type=int, default=260, help="mutants per net")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    parser.add_argument("--again", action="store_true", help="judge those once more that passed though wrong")
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--write", type=Path, help="a page that has a place for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gate.Model = remembering(gate.Model)
    rows = stored(options.results)
    if not options.no_run:
        done = {(r["net"], r["index"]) for r in rows if not (options.again and survived(r))}
        with tempfile.TemporaryDirectory() as folder, options.results.open("a") as out:
            for row in run(options.nets, options.each, options.first, done, Path(folder)):
                rows.append(row)
                print(json.dumps(row), file=out, flush=True)
                if survived(row):
                    print(row, file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if options.write:
        write(options.write, "mutants", text)


if __name__ == "__main__":
    main()
