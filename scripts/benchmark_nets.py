"""Nets of real size for the benchmarks, with random weights and settled statistics: nothing is downloaded.

transformers' default configurations are the published nets; the branchy ones are in ``tests/zoo_branchy.py``; timm's
and torchvision's are there where they can be imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from zoo_branchy import FULL

Factory = Callable[[], nn.Module]


class Logits(nn.Module):
    """A transformers classifier that returns its logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x).logits
        return logits


def _transformers(family: str, **config: Any) -> Factory:
    def make() -> nn.Module:
        import transformers

        settings = getattr(transformers, f"{family}Config")(**config)
        return Logits(getattr(transformers, f"{family}ForImageClassification")(settings))

    return make


def _timm(name: str) -> Factory:
    def make() -> nn.Module:
        import timm

        net: nn.Module = timm.create_model(name)
        return net

    return make


def _torchvision(name: str) -> Factory:
    def make() -> nn.Module:
        import torchvision

        net: nn.Module = torchvision.models.get_model(name)
        return net

    return make


EFFICIENTNET_B0 = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}

#: Nets in which every convolution has its BatchNorm behind it, which every tool folds.
PLAIN: dict[str, Factory] = {
    "ResNet-50": _transformers("ResNet"),
    "RegNetY-040": _transformers("RegNet"),
    "MobileNetV2": _transformers("MobileNetV2", image_size=224),
    "EfficientNet-B0": _transformers("EfficientNet", **EFFICIENTNET_B0),
    "MobileViT-S": _transformers("MobileViT", image_size=256),
}
#: Nets with BatchNorms elsewhere, LayerScales, or parallel branches.
BRANCHY: dict[str, Factory] = {
    "LeViT-256": _transformers("Levit"),
    "SwiftFormer-XS": _transformers("SwiftFormer"),
    "ConvNeXt-T": _transformers("ConvNext"),
    "CvT-13": _transformers("Cvt"),
    **{name: FULL[name] for name in ("RepVGG-A0", "MobileOne-S1", "RepGhostNet", "FastViT-T8", "RepViT-M0.9")},
}
OPTIONAL: dict[str, Factory] = {}
if importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"):
    for _name in ("levit_128s", "visformer_tiny", "nextvit_small", "inception_next_tiny", "coatnet_0_rw_224"):
        OPTIONAL[f"timm {_name}"] = _timm(_name)
    OPTIONAL["torchvision shufflenet_v2_x1_0"] = _torchvision("shufflenet_v2_x1_0")
    OPTIONAL["torchvision densenet121"] = _torchvision("densenet121")

NETS: dict[str, Factory] = PLAIN | BRANCHY | OPTIONAL
SIZES = {"MobileViT-S": 256}


def build(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    """A net in eval mode and a batch of two, with statistics that a batch of noise has."""
    torch.manual_seed(0)
    net = zoo.randomize(zoo.he_init(NETS[name]()))
    size = SIZES.get(name, 224)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        net.train()(torch.randn(4, 3, size, size))
    return net.eval(), (torch.randn(2, 3, size, size),)
