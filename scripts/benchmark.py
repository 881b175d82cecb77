"""Measures bnfold against what users would take in its place: one command, nothing from the network.

    python scripts/benchmark.py --suite merge
    python scripts/benchmark.py --suite merge --quick --only RepVGG-A0
    python scripts/benchmark.py --suite merge --output docs/merge

A suite is a module in ``scripts/suites`` with a ``run(settings) -> Outcome``. Its tables are printed as Markdown; with
``--output NAME`` they go into ``NAME.md``, everything measured into ``NAME.json`` and a picture into ``NAME.svg``. What
is compared runs in turn, in random order in every round, and figures are medians over rounds of ratios within one. Run
it on an idle machine. The peers come with ``pip install -c constraints.txt -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites.common import Outcome, Settings

#: Every module beside ``common``, which they share.
SUITES = sorted({path.stem for path in (Path(__file__).parent / "suites").glob("*.py")} - {"__init__", "common"})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.md and NAME.json")
    parser.add_argument("--only", default="", metavar="NAME,...", help="of what the suite goes through, only these")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: whether it works at all")
    parser.add_argument("--rounds", type=int, default=60, help="of every measurement (default: 60)")
    parser.add_argument("--threads", type=int, default=1, help="for one call (default: 1)")
    parser.add_argument(
        "--device", choices=["auto", "cpu"], default="auto", help="auto: on CUDA as well, where it works"
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    settings = Settings(
        only=frozenset(filter(None, given.only.split(","))), quick=given.quick, threads=given.threads,
        rounds=min(given.rounds, 10) if given.quick else given.rounds, device=given.device,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome: Outcome = importlib.import_module(f"suites.{given.suite}").run(settings)
    print(outcome.markdown())
    if given.output is not None:
        picture = given.output.with_suffix(".svg")
        if outcome.figure is not None:
            outcome.figure(picture)
        text = outcome.markdown(picture.name if outcome.figure is not None else "")
        given.output.with_suffix(".md").write_text(text, encoding="utf-8")
        given.output.with_suffix(".json").write_text(json.dumps(outcome.data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
