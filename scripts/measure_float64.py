"""The file in float64 against torch's float64 run of the same program: times, and how far their outputs are apart.

python scripts/measure_float64.py [names of scripts/benchmark_nets.py...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
from benchmark_nets import build

import bnfold
from bnfold.evaluate.evaluator import File64
from bnfold.graph.interpret import Runner

NETS = ["ResNet-50", "MobileNetV2", "EfficientNet-B0", "LeViT-256", "ConvNeXt-T", "RepVGG-A0"]


def timed(run: Callable[[], object], rounds: int) -> float:
    """Median seconds of a run."""
    run()
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def measure(name: str, folder: Path, rounds: int) -> str:
    """One row of the table."""
    model, (x,) = build(name)
    path = folder / f"{name}.onnx"
    bnfold.export(model, path, (x,), check=False)
    program = bnfold.fold(model, (x,)).program
    file, runner = File64(path), Runner(program, precise=True)
    feeds = {file.inputs[0].name: x.numpy()}
    theirs, mine = runner([x])[0].numpy(), file.run(feeds).outputs[0]
    apart = float(np.abs(theirs - mine).max() / np.abs(theirs).max())
    torch_seconds, file_seconds = timed(lambda: runner([x]), rounds), timed(lambda: file.run(feeds), rounds)
    ratio = file_seconds / torch_seconds
    return f"| {name} | {torch_seconds:.2f} | {file_seconds:.2f} | {ratio:.2f} | {apart:.1e} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NETS)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| net | torch, s | file, s | ratio | apart |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names:
            print(measure(name, Path(folder), given.rounds), flush=True)


if __name__ == "__main__":
    main()
