"""Injects every kind of fault into exported nets and judges the files; judges correct folds over many nets and seeds.

    python scripts/inject_faults.py                                      # three nets, one scale: half a minute
    python scripts/inject_faults.py --full --results faults.jsonl        # everything: about half an hour on one core
    python scripts/inject_faults.py --results faults.jsonl --write docs/gate.md --no-run

A fault's effect is measured without the gate, on inputs of its own: how far the faulty file's values are from the right
file's, over the error of the eager unfolded model against the same model in float64, at the outputs and at the fold
site behind the faulty layer. Results are appended to a file, one JSON object per line; what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import operator
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import onnx
import onnxruntime
import torch
import zoo
from fault_kinds import KINDS, SPARSE, Subject, subject_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.errors import BnfoldError
from bnfold.gate.evidence import ELEMENT
from bnfold.gate.gate import LIMIT, Gate
from bnfold.graph.capture import capture
from bnfold.lowering.lower import lower, save
from bnfold.stages import fold_captured

NETS = (
    "hidden_branch", "resnet_basic", "mobilenet_v2", "densenet", "shufflenet_v2", "squeeze_excite", "unet", "repvgg",
    "levit", "nextvit", "conv1d", "mlp", "dict_outputs",
)  # fmt: skip
SCALES = (1.0, 100.0, 0.01)
SMALL = ("hidden_branch", "mobilenet_v2", "mlp")
#: Absolute and relative tolerances that people compare exports with; three decimals are numpy's assert_almost_equal.
FIXED = {
    "1e-5": (1e-5, 0.0), "1e-4/1e-5": (1e-5, 1e-4), "1e-3/1e-4": (1e-4, 1e-3), "5e-3/1e-1": (1e-1, 5e-3),
    "3 decimals": (1.5e-3, 0.0),
}  # fmt: skip
#: A fault of this effect, in multiples of the noise, has to be caught.
CLAIM = 10.0
WEIGHT_SEEDS, INPUT_SEEDS = 5, 9

Row = dict[str, Any]


class Measure:
    """Effects of faults on one net, on inputs that the gate never sees."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        generator = torch.Generator().manual_seed(20_000)
        self.sets = [self._inputs(n, factor, generator) for n, factor in ((7, 1.0), (7, 4.0), *((1, 1.0),) * 8)]
        self.eager = [self._run(subject.module, inputs) for inputs in self.sets]
        precise = copy.deepcopy(subject.module).double()
        self.truth = [self._run(precise, [x.double() for x in inputs]) for inputs in self.sets]
        self.right = self.values(subject.file)

    def _inputs(self, count: int, factor: float, generator: torch.Generator) -> list[Tensor]:
        made = []
        for x in self.subject.args:
            value = torch.randn(count, *x.shape[1:], generator=generator) * x.std() * factor + x.mean()
            made.append(value.abs() if bool((x >= 0).all()) else value)
        return made

    def _run(self, module: nn.Module, inputs: Sequence[Tensor]) -> list[np.ndarray]:
        """The outputs, and at their end the value at the site."""
        kept: list[Tensor] = []
        hook = None
        if self.subject.site is not None:
            hook = module.get_submodule(self.subject.site[1]).register_forward_hook(
                lambda _module, _args, output: kept.append(output.clone())
            )
        with torch.no_grad():
            outputs = [v for v in pytree.tree_leaves(module(*inputs)) if isinstance(v, Tensor)]
        if hook is not None:
            hook.remove()
        return [value.numpy() for value in [*outputs, *kept[:1]]]

    def values(self, model: onnx.ModelProto) -> list[list[np.ndarray] | None]:
        """Outputs and site of a file for every set of inputs; None where it cannot be run."""
        model, site = self._with_site(model)
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, 1
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception:
            return [None] * len(self.sets)
        names = [value.name for value in session.get_inputs()]
        wanted = [value.name for value in session.get_outputs() if value.name != site] + ([site] if site else [])
        found: list[list[np.ndarray] | None] = []
        for inputs in self.sets:
            try:
                found.append(session.run(wanted, {n: x.numpy() for n, x in zip(names, inputs)}))
            except Exception:
                found.append(None)
        return found

    def _with_site(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, str | None]:
        if self.subject.site is None or self.subject.site[0] in {v.name for v in model.graph.output}:
            return model, None
        name = self.subject.site[0]
        if not any(name in node.output for node in model.graph.node):
            return model, None
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        copied.graph.output.append(onnx.ValueInfoProto(name=name))
        return copied, name

    def effect(self, model: onnx.ModelProto) -> Row:
        """Over the noise: ``output`` by the median over samples of the worst input set, ``sample`` at the worst sample,
        ``site`` and its worst ``channel``."""
        faulty = self.values(model)
        found = {"output": 0.0, "sample": 0.0, "site": 0.0, "channel": 0.0}
        fixed = dict.fromkeys(FIXED, False)
        count = len(self.truth[0]) - (self.subject.site is not None)
        singles: list[float] = []
        for values, right, eager, truth in zip(faulty, self.right, self.eager, self.truth):
            assert right is not None, "the right file does not run"
            whole = values is not None and len([*values]) >= count
            if not whole or len(values) != len(right):  # type: ignore[arg-type]
                return {"output": math.inf, "sample": math.inf, "site": 0.0, "channel": 0.0} | dict.fromkeys(
                    FIXED, True
                )
            for one, good, own, true in zip(values[:count], right[:count], eager[:count], truth[:count]):
                if one.shape != good.shape or one.dtype != good.dtype:
                    found["output"] = found["sample"] = math.inf
                    fixed = dict.fromkeys(FIXED, True)
                    continue
                ratios = over_noise(one, good, own, true)
                singles += ratios.tolist() if len(ratios) == 1 else []
                found["output"] = max(found["output"], float(np.median(ratios)) if len(ratios) > 1 else 0.0)
                found["sample"] = max(found["sample"], float(ratios.max()))
                for name, (absolute, relative) in FIXED.items():
                    fixed[name] |= not np.allclose(one, own, rtol=relative, atol=absolute, equal_nan=True)
            if len(values) > count and len(truth) > count and len(truth[count]) > 1:
                one, good, own, true = values[count], right[count], eager[count], truth[count]
                found["site"] = max(found["site"], float(np.median(over_noise(one, good, own, true))))
                found["channel"] = max(found["channel"], channel_over_noise(one, good, own, true))
        found["output"] = max(found["output"], float(np.median(singles)) if singles else 0.0)
        return found | fixed


def over_noise(faulty: np.ndarray, right: np.ndarray, own: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Per sample, RMS of what the fault changed over the eager model's RMS error, at least its median."""

    def rms(value: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(value.astype(np.float64)).reshape(len(true), -1).mean(1))

    with np.errstate(invalid="ignore", over="ignore"):
        noise = rms(own - true)
        floor = np.maximum(np.median(noise), np.finfo(np.float32).eps * np.maximum(rms(true), rms(true).max() * 1e-3))
        ratio = rms(faulty.astype(np.float64) - right) / np.maximum(np.maximum(noise, floor), 1e-300)
    return np.where(np.isfinite(ratio), ratio, math.inf)


def channel_over_noise(faulty: np.ndarray, right: np.ndarray, own: np.ndarray, true: np.ndarray) -> float:
    """The same for the worst index of axis 1, with the noise of all of a channel's values."""

    def rms(value: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(value.astype(np.float64)).swapaxes(0, 1).reshape(true.shape[1], -1).mean(1))

    with np.errstate(invalid="ignore", over="ignore"):
        floor = np.finfo(np.float32).eps * np.maximum(rms(true), 0.1 * np.sqrt(np.square(true).mean()))
        ratio = rms(faulty.astype(np.float64) - right) / np.maximum(np.maximum(rms(own - true), floor), 1e-300)
    return float(np.where(np.isfinite(ratio), ratio, math.inf).max())


def judge(subject: Subject, model: onnx.ModelProto, folder: Path, **options: Any) -> Row:
    """What the gate says of a file; ``options`` are its own."""
    path = folder / "net.onnx"
    onnx.save(model, path)
    try:
        names, meanings = subject.lowered.sites, subject.meanings
        report = Gate(subject.captured, subject.ledger, None, path, names, meanings, **options).judge()
    except BnfoldError as error:
        return {"verdict": "error", "ratio": math.inf, "site_ratio": math.inf, "problem": str(error)}
    return {
        "verdict": report.verdict, "ratio": report.ratio, "site_ratio": report.site_ratio,
        "problem": report.problems[0] if report.problems else "",
    }  # fmt: skip


def inject(name: str, scale: float, folder: Path, done: set[tuple[Any, ...]]) -> Iterator[Row]:
    """Every kind of fault in one net; the first row is the right file."""
    if all((name, scale, kind) in done for kind in ("none", *KINDS)):
        return
    subject = subject_of(name, scale)
    measure = Measure(subject)
    for kind, make in ({"none": Subject.copy} | KINDS).items():
        if (name, scale, kind) in done:
            continue
        head = {"net": name, "scale": scale, "kind": kind}
        model = make(subject)
        yield head if model is None else head | measure.effect(model) | judge(subject, model, folder)


def correct(name: str, weights: int, seeds: Sequence[int], folder: Path) -> Iterator[Row]:
    """Correct folds of one net with other weights and statistics, over several seeds of inputs."""
    module, args = zoo.NETS[name]()
    if weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights)
            zoo.randomize(zoo.he_init(module, weights), weights)
        if hasattr(module, "settle"):
            module.settle()
    captured = capture(module, args)
    folded = fold_captured(captured, merge=True)
    lowered = lower(folded.program, dims=captured.dims, sites=folded.ledger.sites)
    path = folder / "net.onnx"
    save(lowered, path)
    for seed in seeds:
        report = Gate(captured, folded.ledger, folded.program, path, lowered.sites, seed=seed).judge()
        yield {
            "net": name, "weights": weights, "seed": seed, "verdict": report.verdict, "ratio": report.ratio,
            "site": max((s.ratio for s in report.sites), default=0.0),
            "channel": max((s.channel_ratio for s in report.sites), default=0.0),
            "sites": len({s.value for s in report.sites}),
            "worst": max((o.worst for o in report.outputs), default=0.0),
            "problem": report.problems[0] if report.problems else "",
        }  # fmt: skip


# -- the tables --------------------------------------------------------------------------------------------------------


def has_effect(row: Row) -> bool:
    """Whether the claim covers it: ten times the noise at the output or at the fold site."""
    measure = "sample" if row["kind"] in SPARSE else "output"
    return row[measure] > CLAIM or row["site"] > CLAIM


def caught(row: Row) -> bool:
    return row["verdict"] != "pass"


def fault_table(rows: Sequence[Row]) -> str:
    """A line per kind of fault: effect over noise, and how many each criterion caught."""
    rows = [row for row in rows if "verdict" in row]
    lines = [
        "| fault | files | effect at the output | at the site | caught, of those with effect | "
        + " | ".join(FIXED) + " |",
        "| --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(FIXED),
    ]  # fmt: skip
    for kind in ["none", *KINDS]:
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        effective = [row for row in mine if has_effect(row)]
        fixed = " | ".join(str(sum(row[name] for row in mine)) for name in FIXED)
        measure = "sample" if kind in SPARSE else "output"
        if kind == "none":
            lines.append(f"| *none: the right file* | {len(mine)} | | | *{sum(map(caught, mine))} refused* | {fixed} |")
            continue
        lines.append(
            f"| {kind} | {len(mine)} | {number(median(r[measure] for r in mine))} | "
            f"{number(median(r['site'] for r in mine))} | {sum(map(caught, effective))} of {len(effective)}"
            f"{extra(mine, effective)} | {fixed} |"
        )
    return "\n".join(lines)


def extra(mine: Sequence[Row], effective: Sequence[Row]) -> str:
    more = sum(caught(row) for row in mine if row not in effective)
    return f" (+{more})" if more else ""


def totals(rows: Sequence[Row]) -> str:
    """In sentences: what was caught by whom, and what was missed."""
    rows = [row for row in rows if "verdict" in row]
    right, faults = [r for r in rows if r["kind"] == "none"], [r for r in rows if r["kind"] != "none"]
    effective = [row for row in faults if has_effect(row)]
    missed = [row for row in effective if not caught(row)]
    nets = {row["net"] for row in rows}
    scales = sorted({row["scale"] for row in rows})
    lines = [
        f"{len(faults)} faulty files: {len({r['kind'] for r in faults})} kinds of fault, {len(nets)} nets "
        f"({', '.join(sorted(nets))}), outputs times {', '.join(f'{s:g}' for s in scales)}. "
        f"{len(effective)} have an effect above {CLAIM:g} times the noise at the output or at the fold site; the gate "
        f"caught {len(effective) - len(missed)} of them, and refused {sum(map(caught, right))} of {len(right)} right "
        "files.",
        "",
        "| criterion | caught, with effect | caught, without | refused right files |",
        "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    weak = [row for row in faults if row not in effective]
    criteria = {"the gate": caught} | {name: operator.itemgetter(name) for name in FIXED}
    for name, sees in criteria.items():
        seen = [f"{sum(map(sees, group))} of {len(group)}" for group in (effective, weak, right)]
        lines.append(f"| {name} | {' | '.join(seen)} |")
    if missed:
        lines += ["", "Missed:", ""]
        lines += [
            f"- {r['kind']}, {r['net']}, scale {r['scale']:g}: effect {number(r['output'])} at the output "
            f"(worst sample {number(r['sample'])}), {number(r['site'])} at the site; ratios {number(r['ratio'])} and "
            f"{number(r['site_ratio'])}"
            for r in missed
        ]
    return "\n".join(lines)


def correct_table(rows: Sequence[Row]) -> str:
    """Quantiles of the ratios of correct folds."""
    nets, weights = {row["net"] for row in rows}, {(row["net"], row["weights"]) for row in rows}
    sites = sum(row["sites"] for row in rows)
    other = [row for row in rows if row["verdict"] != "pass"]
    lines = [
        f"{len(rows)} verdicts on correct folds: {len(nets)} nets, {len(weights)} sets of weights and statistics, each "
        f"with several seeds of inputs, {sites} fold sites in torch and in the file. {len(rows) - len(other)} passed.",
        "",
        "| worst ratio of a verdict | median | 90 % | 99 % | 99.9 % | largest | limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for words, key, limit in (
        ("output", "ratio", LIMIT), ("fold site", "site", ELEMENT * LIMIT),
        ("worst channel of one", "channel", ELEMENT * LIMIT),
        ("output, worst sample", "worst", ELEMENT * LIMIT),
    ):  # fmt: skip
        values = np.array([row[key] for row in rows], dtype=np.float64)
        found = [*np.quantile(values, [0.5, 0.9, 0.99, 0.999]), values.max()]
        lines.append(f"| {words} | " + " | ".join(number(v) for v in found) + f" | {limit:g} |")
    if other:
        lines += ["", "Not passed:", ""]
        lines += [
            f"- {r['net']}, weights {r['weights']}, inputs {r['seed']}: {r['verdict']}, {r['problem']}" for r in other
        ]
    return "\n".join(lines)


def limit_table(faults: Sequence[Row], right: Sequence[Row]) -> str:
    """What other limits would do: correct folds they refuse, faults with effect that they let pass."""
    dense = [r for r in faults if "verdict" in r and r["kind"] not in ("none", *SPARSE)]
    outputs = [r for r in dense if r["output"] > CLAIM and math.isfinite(r["output"])]
    # Those that the outputs do not show: there the sites decide.
    hidden = [r for r in dense if r["site"] > CLAIM and not r["ratio"] > LIMIT]
    lines = [
        "| limit, outputs | refuses right folds | misses faults | limit, sites | refuses right folds | misses faults |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for limit, site in zip((2.0, 3.0, 4.0, 6.0, 8.0), (4.0, 8.0, 16.0, 32.0, 64.0)):
        lines.append(
            f"| {limit:g} | {sum(r['ratio'] > limit for r in right)} of {len(right)} | "
            f"{sum(not r['ratio'] > limit for r in outputs)} of {len(outputs)} | {site:g} | "
            f"{sum(max(r['site'], r['channel']) > site for r in right)} of {len(right)} | "
            f"{sum(not r['site_ratio'] > site for r in hidden)} of {len(hidden)} |"
        )
    return "\n".join(lines)


def median(values: Any) -> float:
    return float(np.median(list(values)))


def number(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def versions() -> str:
    found = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "onnx", "onnxscript"))
    return f"{found}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}, CPU"


def written(rows: Sequence[Row]) -> str:
    """The measured part of the document."""
    faults, right = [r for r in rows if "kind" in r], [r for r in rows if "weights" in r]
    parts = [f"Measured {datetime.date.today()} with {versions()}, by `python scripts/inject_faults.py --full`."]
    parts += ["### Correct folds", correct_table(right)] if right else []
    parts += ["### Faults", totals(faults), fault_table(faults)] if faults else []
    parts += ["### Other limits", limit_table(faults, right)] if faults and right else []
    return "\n\n".join(parts)


# -- running -----------------------------------------------------------------------------------------------------------


def stored(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def work(options: argparse.Namespace, rows: list[Row]) -> Iterator[Row]:
    """What is not among ``rows`` yet."""
    nets, scales = (NETS, SCALES) if options.full else (SMALL, SCALES[:1])
    nets = options.nets.split(",") if options.nets else nets
    done = {(r["net"], r["scale"], r["kind"]) for r in rows if "kind" in r}
    with tempfile.TemporaryDirectory() as folder:
        for name in nets:
            for scale in scales:
                yield from inject(name, scale, Path(folder), done)
        judged = {(r["net"], r["weights"], r["seed"]) for r in rows if "weights" in r}
        weights, seeds = (WEIGHT_SEEDS, INPUT_SEEDS) if options.full else (2, 3)
        for weight in range(weights):
            for name in zoo.NETS if options.full else nets:
                left = [seed for seed in range(seeds) if (name, weight, seed) not in judged]
                if left and name in zoo.NETS:
                    yield from correct(name, weight, left, Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a fault with an effect is missed or a right file refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all nets, scales and seeds")
    parser.add_argument("--nets", help=f"for the faults, of {', '.join(NETS)}")
    parser.add_argument("--results", type=Path, help="append results to this file, and do not repeat those in it")
    parser.add_argument("--write", type=Path, help="put the tables between the marks of this document")
    parser.add_argument("--no-run", action="store_true", help="tables from --results alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, start = stored(options.results), time.perf_counter()
    for row in () if options.no_run else work(options, rows):
        rows.append(row)
        if options.results is not None:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if len(rows) % 100 == 0:
            print(f"{time.perf_counter() - start:6.0f} s  {len(rows)} results", file=sys.stderr, flush=True)
    text = written(rows)
    if options.write is None:
        print(text)
    else:
        document = options.write.read_text(encoding="utf-8")
        marked = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)
        options.write.write_text(marked.sub(lambda _: f"\n{text}\n\n", document), encoding="utf-8")
    faults = [r for r in rows if "kind" in r and "verdict" in r]
    missed = [r for r in faults if r["kind"] != "none" and has_effect(r) and not caught(r)]
    refused = [r for r in rows if ("weights" in r or r.get("kind") == "none") and caught(r)]
    return 1 if missed or refused else 0


if __name__ == "__main__":
    sys.exit(main())
