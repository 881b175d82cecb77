"""What a provider really computes in: TF32, float16 or bfloat16 behind float32 inputs and outputs is told by no API.

A convolution and a matrix product of random float32 numbers are run where the file will run. An engine that rounds the
factors to a significand of p bits is off by about ``2**-p`` relative to the RMS of the result, whatever the number of
products; sums in float32 stay hundreds of times below that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from bnfold.runtime.device import Device
from bnfold.runtime.session import Array, Session, model_of, open_on


@dataclass(frozen=True)
class Arithmetic:
    """A format of floating-point numbers, by name, and its unit roundoff: half the distance from 1 to the next."""

    name: str
    unit_roundoff: float


_BITS = {"float64": 53, "float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}
#: By the name that ``--precision`` takes.
FORMATS = {name: Arithmetic(name, 2.0**-bits) for name, bits in _BITS.items()}
FLOAT64, FLOAT32 = FORMATS["float64"], FORMATS["float32"]
#: Products in each sum of the probe, and what its inputs are multiplied with to see whether they overflow float16.
_PRODUCTS, _LARGE = 144, 2.0**17


@functools.cache
def arithmetic(device: Device, *, deployed: bool = False, double: bool = False) -> Arithmetic:
    """What ``device`` computes float32 models in, measured, or float64 ones; the plain CPU computes them as they are.

    ``deployed``: as the runtime's own defaults have it, without the options that the provider's row adds; ``double``:
    ask with a float64 model. BnfoldError where the probe cannot be run there.
    """
    if device.is_cpu:
        return FLOAT64 if double else FLOAT32
    session = open_on(_model(double=double), device, deployed=deployed)
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal((2, 16, 9, 9)), "a": random.standard_normal((24, _PRODUCTS))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}  # exact in float64 too
    truth = _truth(feeds)
    error = max(
        float(np.sqrt(np.mean((found - truth[name]) ** 2) / np.mean(truth[name] ** 2)))
        for name, found in _run(session, feeds).items()
    )
    large = _run(session, feeds, _LARGE).values()
    return classified(error, overflows=not all(np.isfinite(array).all() for array in large))


def classified(error: float, *, overflows: bool) -> Arithmetic:
    """The format that a relative RMS ``error`` of the probe, and whether large inputs ``overflows`` it, speak for.

    The RMS of rounding two factors is about 0.6 unit roundoffs, and a sum in float32 adds the square root of its
    products at most: the formats lie so far apart that nothing in between is to be decided.
    """
    for exact in (FLOAT64, FLOAT32):
        if error <= np.sqrt(_PRODUCTS) * exact.unit_roundoff:
            return exact
    if error <= 2.0**-11:
        return FORMATS["float16" if overflows else "tf32"]
    return FORMATS["bfloat16"] if error <= 2.0**-8 else Arithmetic("less than 8 bits", 2 * error)


def _run(session: Session, feeds: dict[str, Array], scale: float = 1.0) -> dict[str, Array]:
    given = {value.name: (scale * feeds[value.name]).astype(value.dtype) for value in session.inputs}
    return {value.name: array.astype(np.float64) for value, array in zip(session.outputs, session.run(given))}


def _weights() -> tuple[Array, Array]:
    random = np.random.default_rng(1)
    shapes = ((16, 16, 3, 3), (_PRODUCTS, 40))
    weight, b = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return weight, b


def _truth(feeds: dict[str, Array]) -> dict[str, Array]:
    weight, b, x, a = (array.astype(np.float64) for array in (*_weights(), feeds["x"], feeds["a"]))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    return {"y": np.einsum("nchwij,ocij->nohw", windows, weight), "z": a @ b}


def _model(*, double: bool) -> bytes:
    """z = MatMul(a, b), and in float32 y = Conv(x, weight) too: convolutions in float64 hardly any provider has."""
    weight, b = _weights()
    if double:
        return model_of(
            f"(double[24,{_PRODUCTS}] a) => (double[24,40] z) {{ z = MatMul(a, b) }}", b=b.astype(np.float64)
        )
    values = f"(float[24,{_PRODUCTS}] a, float[2,16,9,9] x) => (float[24,40] z, float[2,16,7,7] y)"
    return model_of(f"{values} {{ z = MatMul(a, b) y = Conv(x, weight) }}", b=b, weight=weight)
