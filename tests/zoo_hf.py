"""Architectures of transformers with BatchNorm, from small configurations and random weights, never from a hub.

The same interface as ``zoo.NETS``. transformers is imported when a net is built, not before.
"""

from __future__ import annotations

import zoo_hf_dense
import zoo_hf_sequence
import zoo_hf_vision
from zoo import prepared
from zoo_parts import Factory

FAMILIES = (zoo_hf_vision, zoo_hf_dense, zoo_hf_sequence)

HF_NETS: dict[str, Factory] = {
    name: prepared(f"hf_{name}", factory) for family in FAMILIES for name, factory in family.NETS.items()
}

#: Nets that are another of these with a second head, a deeper neck, or its backbone under another model.
VARIANTS: set[str] = {
    "d_fine", "data2vec", "dpt", "mobilenet_v2_deeplab", "mobilevit", "pp_lcnet", "regnet_x", "rt_detr_v2", "zoedepth",
}  # fmt: skip
#: Nets without BatchNorm, kept for their LayerScale.
WITHOUT_BATCHNORM: set[str] = {"convnext", "dinov2", "poolformer"}
