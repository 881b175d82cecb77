"""Folds and merges random programs that are hostile to it, and compares each with what it was, in float64.

    python scripts/fuzz_folds.py                          1,000 programs from seed 0
    python scripts/fuzz_folds.py --seed 5000 --count 500  others
    python scripts/fuzz_folds.py --seconds 60             as many as a minute holds
    python scripts/fuzz_folds.py --show 4711              one, as a graph, with what became of it

Programs write to values in place, take sizes as arguments and operands, mix dtypes and share constants (see
``tests/hostile_graphs.py``). Each is compared at batches of 1, 2 and 3 and at sizes that are multiples of nothing.
Exit code 1 where one was wrong; its seed reproduces it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from hostile_graphs import check, functional, grow

from bnfold.graph.threads import torch_threads


def main() -> int:
    """Runs the programs that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the next ones follow")
    parser.add_argument("--count", type=int, default=1000, help="how many programs at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after so long")
    parser.add_argument("--stop", action="store_true", help="end at the first that is wrong")
    parser.add_argument("--show", type=int, metavar="SEED", help="print one program and what is wrong with it")
    given = parser.parse_args()
    with torch_threads(1):
        return _show(given.show) if given.show is not None else _run(given)


def _run(given: argparse.Namespace) -> int:
    start, outcomes, wrong = time.monotonic(), Counter[str](), []
    done = 0
    for seed in range(given.seed, given.seed + given.count):
        if time.monotonic() - start > given.seconds:
            break
        done += 1
        try:
            fault, ledger = check(grow(seed))
            outcomes.update(entry.outcome for entry in ledger.entries)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if fault is not None:
            wrong.append(seed)
            print(f"seed {seed}: {fault}", flush=True)
            if given.stop:
                break
        if done % 500 == 0:
            print(f"{done} programs, {len(wrong)} wrong, {time.monotonic() - start:.0f} s", flush=True)
    kinds = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{done} programs from seed {given.seed} in {time.monotonic() - start:.0f} s: {len(wrong)} wrong")
    print(f"affines: {kinds}")
    if wrong:
        print(f"reproduce with: python scripts/fuzz_folds.py --show {wrong[0]}")
    return int(bool(wrong))


def _show(seed: int) -> int:
    program = grow(seed)
    print(functional(program).graph)
    try:
        fault, ledger = check(program)
    except Exception:
        traceback.print_exc()
        return 1
    for entry in ledger.entries:
        print(entry.value, entry.kind, entry.outcome, "; ".join(map(str, entry.refusals)))
    print(fault or "nothing is wrong with it")
    return int(fault is not None)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
