"""Exports right files by the thousand and lets the gate judge them: does it refuse any?

    python scripts/right_files.py --results right.jsonl --count 1700                 # 5,100 verdicts; resumable
    python scripts/right_files.py --results right.jsonl --only 4711                  # one again, with all that is said
    python scripts/right_files.py --results right.jsonl --no-run --write docs/gate-measured.md

File ``i`` is drawn by its number: a net of the tests' zoo with new weights, a random graph, a net of ``mutant_nets``, a
net whose outputs an activation closes or saturates, or a trained one of models/; in float32, float16 or bfloat16; its
outputs times 1e-20 to 1e20. ``export`` judges it as it writes it, ``check`` twice more, with other inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

import digits
import mutant_nets
import torch
import zoo
from fault_kinds import Scaled
from measured_page import stored, write
from random_graphs import grow
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

import bnfold
from bnfold.errors import BnfoldError

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Model = nn.Module | ExportedProgram
DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
SOURCES = {"zoo": 9, "random graph": 6, "net": 5, "closed": 4, "trained": 1}
CHECKS = 2


class Closed(nn.Module):
    """A classifier behind an activation that closes or saturates."""

    def __init__(self, end: nn.Module, offset: float, gain: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head, self.end, self.offset, self.gain = nn.Linear(12, 40), end, offset, gain

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.body(x)) * self.gain + self.offset)


ENDS = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.SiLU, nn.GELU, nn.Softplus, nn.ELU, nn.ReLU6, nn.Mish)


def drawn(index: int) -> tuple[str, str, str, float, Model, tuple[Tensor, ...], Any]:
    """Source, name, dtype, scale, model, example, dynamic shapes of file ``index``."""
    pick = random.Random(index)
    source = pick.choices(list(SOURCES), list(SOURCES.values()))[0]
    dtype = pick.choices(list(DTYPES), [6, 3, 2])[0]
    scale = (
        1.0 if pick.random() < 0.4 else 10 ** pick.uniform(-20, 20) if dtype != "float16" else 10 ** pick.uniform(-3, 1)
    )
    shapes: Any = None
    torch.manual_seed(index)
    if source == "random graph":
        name = f"graph {index}"
        program = grow(pick.choice).rounded(DTYPES[dtype] or torch.float32)
        return source, name, dtype, 1.0, program, (), None
    if source == "zoo":
        name = pick.choice(list(zoo.NETS))
        module, args = zoo.NETS[name]()
        zoo.randomize(zoo.he_init(module, index), index)
        if hasattr(module, "settle"):
            module.settle()
    elif source == "net":
        name = pick.choice([n for n, net in mutant_nets.NETS.items() if net.dtype is None])
        net = mutant_nets.NETS[name]
        module, args = net.make()
        zoo.randomize(module, index)
        shapes = None if net.free is None else ({0: "batch", **net.free},)
    elif source == "closed":
        end = pick.choice([*(e() for e in ENDS), nn.Softmax(1), nn.LogSoftmax(1)])
        offset, gain = pick.uniform(-18, 6), 10 ** pick.uniform(-1, 1.5)
        name = f"{type(end).__name__}({gain:.2g} x + {offset:.2g})"
        module, args = zoo.randomize(Closed(end, offset, gain), index), (torch.randn(2, 3, 12, 12),)
    else:
        name = pick.choice(["digits_cnn", "digits_mlp", "digits_tcn"])
        module, args = getattr(digits, name)(), (torch.rand(2, 1, 8, 8),)
        module.load_state_dict(load_file(ROOT / f"models/{name}.safetensors"))
    whole = {"half", "tokens"} - {name} and all(a.is_floating_point() for a in args)
    if scale != 1.0 and whole and shapes is None:
        module = Scaled(module, scale)
    else:
        scale = 1.0
    return source, name, dtype, scale, module.eval(), args, shapes


def judged(index: int, folder: Path) -> Iterator[Row]:
    """The verdicts on one file; none where it cannot be exported, which is no matter of the gate."""
    source, name, dtype, scale, model, args, shapes = drawn(index)
    head = {"index": index, "source": source, "name": name, "dtype": dtype, "scale": scale}
    path, start = folder / f"{index}.onnx", time.process_time()
    asked: dict[str, Any] = {
        "dtype": None if isinstance(model, ExportedProgram) else DTYPES[dtype],
        "dynamic_shapes": shapes,
    }
    given = (model,) if isinstance(model, ExportedProgram) else (model, args)
    for turn in range(1 + CHECKS):
        try:
            if turn == 0:
                report: Any = bnfold.export(given[0], path, *given[1:], keep_failed=True, seed=index, **asked).check
            else:
                report = bnfold.check(path, *given, seed=index + turn, **asked)
            said = {"verdict": report.verdict, "problems": list(report.problems)[:3]}
        except BnfoldError as error:
            said = {"verdict": "not exported" if turn == 0 else "error", "problems": [str(error)]}
        except Exception as error:  # a fault of bnfold's own, to be mended
            said = {"verdict": "crash", "problems": [f"{type(error).__name__}: {error}"]}
        yield {**head, "turn": turn, **said, "seconds": round(time.process_time() - start, 2)}
        if not path.exists():
            return


def table(rows: list[Row]) -> str:
    """Verdicts by source and dtype, and all that are no pass."""
    found = [r for r in rows if r["verdict"] != "not exported"]
    other = [r for r in found if r["verdict"] != "pass"]
    files = len({r["index"] for r in found})
    lines = [
        f"{len(found)} verdicts on {files} right files: {dict(Counter(r['verdict'] for r in found))}.",
        "",
        "| files | " + " | ".join(DTYPES) + " | not a pass |",
        "| --- |" + " ---: |" * (len(DTYPES) + 1),
    ]
    for source in SOURCES:
        mine = [r for r in found if r["source"] == source]
        each = [str(sum(r["dtype"] == d for r in mine)) for d in DTYPES]
        lines.append(f"| {source} | {' | '.join(each)} | {sum(r in other for r in mine)} |")
    if other:
        lines += ["", "Not passed:", ""]
        lines += [f"- {r['index']}.{r['turn']} {r['name']}, {r['dtype']}, times {r['scale']:.3g}: {r['verdict']}, "
                  f"{(r['problems'] or [''])[0]}" for r in other]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1700, help="files")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start none after so long")
    parser.add_argument("--only", type=int, help="the number of one, which is printed and not kept")
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--write", type=Path, help="a page that has a place for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, start = stored(options.results), time.monotonic()
    done = {r["index"] for r in rows}
    with tempfile.TemporaryDirectory() as folder:
        if options.only is not None:
            print(*(json.dumps(row) for row in judged(options.only, Path(folder))), sep="\n")
            return
        with options.results.open("a") as out:
            for index in range(options.first, options.first + (0 if options.no_run else options.count)):
                if index in done:
                    continue
                if time.monotonic() - start > options.seconds:
                    break
                for row in judged(index, Path(folder)):
                    rows.append(row)
                    print(json.dumps(row), file=out, flush=True)
                    if row["verdict"] not in ("pass", "not exported"):
                        print(row, file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if options.write:
        write(options.write, "right files", text)


if __name__ == "__main__":
    main()
