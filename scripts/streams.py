"""How many BatchNorms stay in nets whose streams are normalised in front of activations.

    python scripts/streams.py [--only resnet_v2,face] [--small]

Every net of ``tests/zoo_streams.py`` is folded twice: with positive scales, and with half of them negated. The folded
program must equal the net in float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from zoo_streams import STREAMS, signed

from bnfold.graph.capture import capture
from bnfold.graph.graph import Graph
from bnfold.graph.interpret import Runner
from bnfold.graph.threads import torch_threads
from bnfold.passes.folding import fold
from bnfold.report import Ledger


def folded(name: str, size: tuple[int, int], negative: float) -> tuple[Ledger, float, float]:
    """The ledger, the seconds of folding, and how far the folded program is from the net in float64, relative."""
    torch.manual_seed(0)
    module, inputs = STREAMS[name][0](*size)
    module, inputs = signed(module, negative).double(), tuple(x.double() for x in inputs)
    program = capture(module, inputs).program
    graph, start = Graph(program), time.process_time()
    ledger = fold(graph)
    seconds = time.process_time() - start
    true, found = (Runner(p)(list(inputs)) for p in (program, graph.finish()))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, true))
    return ledger, seconds, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(STREAMS), help="names, separated by commas")
    parser.add_argument("--small", action="store_true", help="the sizes that the tests use")
    options = parser.parse_args()
    print("| net | width, depth | BatchNorms | stay | with half of the scales negated | why | fold | error |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    for name in options.only.split(","):
        size = STREAMS[name][1 if options.small else 2]
        with torch_threads(1):
            runs = [folded(name, size, negative) for negative in (0.0, 0.5)]
        left = [len(ledger.batch_norms) - ledger.count()[0] for ledger, _, _ in runs]
        why = Counter(r.reason for ledger, _, _ in runs for e in ledger.left for r in set(e.refusals))
        words = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
        cost, error = (max(each) for each in list(zip(*runs))[1:])
        print(
            f"| {name} | {size[0]}, {size[1]} | {runs[0][0].count()[1]} | {left[0]} | {left[1]} | {words} | "
            f"{cost:.2f} s | {error:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
