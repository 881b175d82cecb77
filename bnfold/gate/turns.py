"""Decisions that somebody else took and float64 would not: a near-tie each, or a fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bnfold.evaluate.subject import Turn
from bnfold.gate.decisions import NEAR
from bnfold.gate.evidence import TINY
from bnfold.gate.findings import Findings
from bnfold.gate.values import as_tensor

#: How often constants are drawn for what a decision compares.
DRAWS = 4
#: Where rounding moves an output, or what is compared, by this part of itself, almost anything would pass.
WILD = 1e-2


def distance(turn: Turn, moved: Sequence[Sequence[Turn]], more: float = 0.0) -> float:
    """How far from a tie a decision is, in noises: up to ``NEAR`` it may fall either way.

    Args:
        turn: what was decided.
        moved: the same decisions where constants were drawn.
        more: noise besides.
    """
    noise, gap = math.hypot(near_noise(turn, moved)[0], more), as_tensor(turn.gap)
    return float(gap.max()) / max(noise, TINY) if gap.numel() else 0.0


def near_noise(turn: Turn, moved: Sequence[Sequence[Turn]]) -> tuple[float, float]:
    """RMS of what rounding does to what is compared, a rounding of itself at least; and the RMS of that."""
    compared = as_tensor(turn.compared)
    others = [as_tensor(other.compared) for each in moved for other in each if other.value == turn.value]
    good = compared.isfinite()
    scale = float(compared[good].square().mean().sqrt()) if bool(good.any()) else 0.0
    parts = [(m - compared)[good & m.isfinite()].square().mean() for m in others if m.shape == compared.shape]
    found = [float(part) for part in parts if bool(part.isfinite())]
    return max((sum(found) / len(found)) ** 0.5 if found else 0.0, 2.0**-24 * scale), scale


def judge_turns(
    findings: Findings, witness: str, turns: Sequence[Turn], again: Callable[[int], Sequence[Turn]],
    theirs: Callable[[Turn], float] = lambda turn: 0.0,
) -> None:  # fmt: skip
    """Says what the decisions are that were followed although float64 would decide otherwise.

    Args:
        findings: near-ties are noted in it, others are problems.
        witness: who decided.
        turns: all that were followed.
        again: draws the reference's constants, by a seed.
        theirs: what rounding a claim's constants does to what it compares there.
    """
    turned = [turn for turn in turns if turn.different]
    if not turned:
        return
    moved = [again(seed) for seed in range(DRAWS)]
    near, most = 0, 0.0
    for turn in turned:
        noise, scale = near_noise(turn, moved)
        far = distance(turn, moved, theirs(turn))
        said = f"{witness}: {turn.operator} decides otherwise than the model in {turn.different} places"
        if noise > WILD * scale:
            findings.doubts.append(
                f"{said}, and rounding moves what it compares by {noise / max(scale, TINY):.2g} of it, so almost any "
                "decision would pass"
            )
        elif not far <= NEAR:
            findings.problems.append(
                f"{said}, although what it compares is up to {far:.3g} times the noise away from that (limit {NEAR:g})"
            )
        else:
            near, most = near + turn.different, max(most, far)
    if near:
        findings.notes.append(
            f"{witness}: {near} decisions (such as {turned[0].operator}) fell otherwise than in float64, all of "
            f"them near-ties, at most {most:.2g} times the noise: float64 was run again with them"
        )
