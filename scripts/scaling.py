"""How long folding takes as a model grows: seconds per size, and the exponent of the power law fitted to them.

    python scripts/scaling.py [--sizes 300,1000,3000,10000] [--only conv_norm_relu,concat]

An exponent of 1 is linear. The programs are written by hand (``tests/long_programs.py``), so that capture's own time
is not in the way; every fold is checked to have left what it should.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from long_programs import PROGRAMS

from bnfold.graph.graph import Graph
from bnfold.passes.folding import fold


def seconds(name: str, layers: int) -> tuple[float, float, float]:
    """To read the program, to fold it and to write it."""
    make, left = PROGRAMS[name]
    program = make(layers)
    start = time.perf_counter()
    graph = Graph(program)
    read = time.perf_counter()
    ledger = fold(graph)
    done = time.perf_counter()
    graph.finish()
    assert len(ledger.left) == left(layers), f"{name}: {len(ledger.left)} affines are left"
    return read - start, done - read, time.perf_counter() - done


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of a line through (log size, log seconds)."""
    xs, ys = [math.log(n) for n in sizes], [math.log(t) for t in times]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="300,1000,3000", help="layers, ascending, separated by commas")
    parser.add_argument("--only", default=",".join(PROGRAMS), help=f"of {', '.join(PROGRAMS)}")
    options = parser.parse_args()
    sizes = [int(n) for n in options.sizes.split(",")]
    torch.set_num_threads(1)
    seconds("conv_norm_relu", 10)  # loads what torch loads at first use
    print(f"{'program':22}" + "".join(f"{n:>10}" for n in sizes) + "  exponent   (seconds: read + fold + write)")
    for name in options.only.split(","):
        times = [sum(seconds(name, n)) for n in sizes]
        slope = f"{exponent(sizes, times):10.2f}" if len(sizes) > 1 else ""
        print(f"{name:22}" + "".join(f"{t:10.2f}" for t in times) + slope, flush=True)


if __name__ == "__main__":
    main()
