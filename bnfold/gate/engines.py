"""How a file is run: where its own verdict is reached, and in which arithmetic the engine that it is for computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.export import ExportedProgram

from bnfold.graph.interpret import coarsest_epsilon
from bnfold.report import Engine, Verdict
from bnfold.runtime.runtime import FLOAT32, Arithmetic, Device, arithmetic, device_of


@dataclass(frozen=True)
class Setting:
    """A device, with the options that its row adds or as ``deployed`` without, and what it computes in there.

    ``coarser`` is how many times more coarsely than the model's own dtype that rounds; the noise that its errors are
    measured in is so many times larger, because to first order every error of rounding is proportional to the unit
    roundoff (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapter 3).
    """

    device: Device
    arithmetic: Arithmetic = FLOAT32
    coarser: float = 1.0
    deployed: bool = False

    def result(self, ratio: float, verdict: Verdict) -> Engine:
        """What the report says of it."""
        options = self.device.provider_options(deployed=self.deployed)
        found = self.arithmetic
        return Engine(self.device.provider.ort_name, options, found.name, found.unit_roundoff, ratio, verdict)


def settings(device: Device, program: ExportedProgram) -> list[Setting]:
    """How a file is run that is for ``device``: first for its own verdict, then as each engine that rounds coarser.

    Where the device itself does, its rounding would hide what is wrong with the file, and that is judged on the CPU.
    """
    strict = _setting(device, program)
    found = [strict] if strict.coarser == 1 else [_setting(device_of("cpu"), program), strict]
    if device.provider.options:
        default = _setting(device, program, deployed=True)
        found += [default] if default.coarser > 1 and default.arithmetic != strict.arithmetic else []
    return found


def _setting(device: Device, program: ExportedProgram, *, deployed: bool = False) -> Setting:
    double = coarsest_epsilon(program) / 2 < FLOAT32.unit_roundoff
    found = arithmetic(device, deployed=deployed, double=double)
    return Setting(device, found, coarser(found, program), deployed)


def coarser(found: Arithmetic, program: ExportedProgram) -> float:
    """How many times more coarsely than a program's own dtype an arithmetic rounds; at least 1."""
    return max(1.0, found.unit_roundoff / (coarsest_epsilon(program) / 2))
