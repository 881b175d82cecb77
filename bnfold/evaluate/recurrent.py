"""LSTM, GRU and RNN of ONNX, with every attribute: the formulas of their operator pages, one step after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from bnfold.evaluate.attributes import Attributes

#: Activation -> its function of the value, alpha and beta, and the defaults of those.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float, float]] = {
    "relu": (lambda x, a, b: x.relu(), 0.0, 0.0),
    "tanh": (lambda x, a, b: x.tanh(), 0.0, 0.0),
    "sigmoid": (lambda x, a, b: x.sigmoid(), 0.0, 0.0),
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "leakyrelu": (lambda x, a, b: torch.where(x < 0, a * x, x), 0.01, 0.0),
    "thresholdedrelu": (lambda x, a, b: torch.where(x >= a, x, 0.0), 1.0, 0.0),
    "scaledtanh": (lambda x, a, b: a * (b * x).tanh(), 1.0, 1.0),
    "hardsigmoid": (lambda x, a, b: (a * x + b).clamp(0.0, 1.0), 0.2, 0.5),
    "elu": (lambda x, a, b: torch.where(x >= 0, x, a * x.expm1()), 1.0, 0.0),
    "softsign": (lambda x, a, b: F.softsign(x), 0.0, 0.0),
    "softplus": (lambda x, a, b: torch.logaddexp(x, torch.zeros_like(x)), 0.0, 0.0),
}
_WITH_ALPHA = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"}
_WITH_BETA = {"affine", "scaledtanh", "hardsigmoid"}

Activation = Callable[[Tensor], Tensor]
#: One step: the input's part of the gates, the states before it, and the activations -> the states after it.
Step = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]


def _activations(at: Attributes, defaults: Sequence[str], directions: int) -> list[list[Activation]]:
    names = [name.lower() for name in at.activations or list(defaults) * directions]
    alphas, betas = (list(map(float, values or ())) for values in (at.activation_alpha, at.activation_beta))
    found: list[Activation] = []
    for name in names:
        function, alpha, beta = _ACTIVATIONS[name]
        alpha = alphas.pop(0) if name in _WITH_ALPHA and alphas else alpha
        beta = betas.pop(0) if name in _WITH_BETA and betas else beta

        def activation(x: Tensor, f: Any = function, a: float = alpha, b: float = beta) -> Tensor:
            y: Tensor = f(x if at.clip is None else x.clamp(-float(at.clip), float(at.clip)), a, b)
            return y

        found.append(activation)
    return [found[i : i + len(defaults)] for i in range(0, len(found), len(defaults))]


def _run(
    at: Attributes,
    x: Tensor,
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    hidden: int,
    directions: int,
    make: Callable[[int], tuple[Tensor, Tensor | None, Step]],
) -> tuple[Tensor, ...]:
    """Every direction over time; ``make`` gives a direction's input weights, its input bias and its step."""
    x = x.transpose(0, 1) if at.layout else x
    steps, batch = x.shape[:2]
    counts = torch.full((batch,), steps) if lengths is None else lengths.long()
    outputs, ends = [], []
    for d in range(directions):
        weight, bias, step = make(d)
        gates = F.linear(x, weight, bias)
        given = [s if s is None or not at.layout else s.transpose(0, 1) for s in states]
        now: list[Tensor] = [x.new_zeros(batch, hidden) if s is None else s[d] for s in given]
        back = at.direction == "reverse" or d == 1
        seen = x.new_zeros(steps, batch, hidden)
        for t in range(steps):
            # Going backwards a sequence begins at its own end.
            place = counts - 1 - t if back else torch.full((batch,), t)
            live = (t < counts)[:, None]
            place = place.clamp(min=0)
            after = step(gates[place, torch.arange(batch)], now)
            now = [torch.where(live, new, old) for new, old in zip(after, now)]
            seen[place, torch.arange(batch)] = torch.where(live, now[0], seen[place, torch.arange(batch)])
        outputs.append(seen)
        ends.append([torch.where((counts > 0)[:, None], s, 0.0) for s in now])  # runtimes end no steps in zeros
    y = torch.stack(outputs, 1)
    last = [torch.stack([end[i] for end in ends]) for i in range(len(states))]
    if at.layout:
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)
    return y, *last


def _halves(b: Tensor | None, d: int, size: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if b is None else (b[d, :size], b[d, size:])


def rnn(
    at: Attributes, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``h' = f(x @ W.T + h @ R.T + b)``."""
    hidden, functions = r.shape[-1], _activations(at, ["tanh"], len(w))

    def make(d: int) -> tuple[Tensor, Tensor | None, Step]:
        into, back = _halves(b, d, hidden)
        return w[d], into, lambda gates, s: [functions[d][0](gates + F.linear(s[0], r[d], back))]

    return _run(at, x, lengths, [h], hidden, len(w), make)


def gru(
    at: Attributes, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gates z, r and h in that order; ``linear_before_reset`` resets after the recurrent product."""
    hidden, functions = r.shape[-1], _activations(at, ["sigmoid", "tanh"], len(w))

    def make(d: int) -> tuple[Tensor, Tensor | None, Step]:
        f, g = functions[d]
        into, back = _halves(b, d, 3 * hidden)
        twice, last = 2 * hidden, slice(2 * hidden, None)

        def step(gates: Tensor, s: Sequence[Tensor]) -> Sequence[Tensor]:
            both = gates[:, :twice] + F.linear(s[0], r[d, :twice], None if back is None else back[:twice])
            z, reset = f(both).chunk(2, -1)
            bias = None if back is None else back[last]
            if at.linear_before_reset:
                new = g(gates[:, last] + reset * F.linear(s[0], r[d, last], bias))
            else:
                new = g(gates[:, last] + F.linear(reset * s[0], r[d, last], bias))
            return [(1 - z) * new + z * s[0]]

        return w[d], into, step

    return _run(at, x, lengths, [h], hidden, len(w), make)


def lstm(
    at: Attributes, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None, c: Tensor | None = None, p: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gates i, o, f and c in that order, with peepholes ``p`` and coupled gates (``input_forget``)."""
    hidden, functions = r.shape[-1], _activations(at, ["sigmoid", "tanh", "tanh"], len(w))

    def make(d: int) -> tuple[Tensor, Tensor | None, Step]:
        f, g, out = functions[d]
        into, back = _halves(b, d, 4 * hidden)
        pi, po, pf = (x.new_zeros(hidden),) * 3 if p is None else p[d].chunk(3)

        def step(gates: Tensor, s: Sequence[Tensor]) -> Sequence[Tensor]:
            i, o, forget, cell = (gates + F.linear(s[0], r[d], back)).chunk(4, -1)
            i = f(i + pi * s[1])
            forget = 1 - i if at.input_forget else f(forget + pf * s[1])
            cell = forget * s[1] + i * g(cell)
            return [f(o + po * cell) * out(cell), cell]

        return w[d], into, step

    return _run(at, x, lengths, [h, c], hidden, len(w), make)
