"""Architectures of transformers with BatchNorm, from small configurations and random weights, never from a hub.

The same interface as ``zoo.NETS``. transformers is imported when a net is built, not before.
"""

from __future__ import annotations

from typing import NamedTuple

import zoo_hf_dense
import zoo_hf_sequence
import zoo_hf_vision
from zoo import prepared
from zoo_parts import Factory

FAMILIES = (zoo_hf_vision, zoo_hf_dense, zoo_hf_sequence)

HF_NETS: dict[str, Factory] = {
    name: prepared(f"hf_{name}", factory) for family in FAMILIES for name, factory in family.NETS.items()
}


class Refusal(NamedTuple):
    """What a capture with a dynamic batch runs into, as a pattern, and why."""

    error: str
    reason: str


_LEN_OF_TENSOR = Refusal(r"Guard failed: x.size\(\)\[0\] == 2", "len() of a tensor makes the batch a constant")

#: Nets that torch.export captures for the example's batch alone. It says so only when another batch is run.
UNCAPTURED: dict[str, Refusal] = dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine"), _LEN_OF_TENSOR)

#: Nets without BatchNorm, kept for their LayerScale.
WITHOUT_BATCHNORM: set[str] = {"convnext", "dinov2", "poolformer"}
