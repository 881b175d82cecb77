"""Nets that decide: top-k, argmax, rounding, comparisons, greedy suppression. Half of their decisions are close.

``NETS[name]()`` gives a module in eval mode and an example batch, as ``zoo.NETS`` does. Without forced decisions
float32 and float64 disagree by far more than rounding on most of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import prepared
from zoo_parts import Factory


class Stem(nn.Sequential):
    """(N, 3, s, s) -> (N, width, s / 2, s / 2), with two BatchNorms."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip


class Detector(nn.Module):
    """RT-DETR's query selection: the best positions of an encoder, gathered and refined. The scores lie close."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.box = Stem(), nn.Linear(8, 4), nn.Linear(8, 4)
        self.refine, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.stem(x).flatten(2).transpose(1, 2)
        scores = self.score(memory).amax(-1) + 4e5
        picked = scores.topk(6, dim=1).indices
        query = memory.gather(1, picked[..., None].expand(-1, -1, memory.shape[-1]))
        query = query + self.norm(self.refine(query).transpose(1, 2)).transpose(1, 2).relu()
        return self.box(query).sigmoid(), self.score(query)


class Experts(nn.Module):
    """A mixture of experts: every position goes to the expert that its router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = Stem(), nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        chosen = (self.router(tokens) + 2e5).argmax(-1)
        routed = torch.einsum("npc,npcd->npd", tokens, self.experts[chosen])
        return self.head(routed.relu().mean(1))


class Quantised(nn.Module):
    """Activations rounded to steps and back between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.norm = Stem(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x) * 4096).round().clamp(-32768, 32767) / 4096
        x = self.norm(self.body(x)).relu()
        x = torch.div(x, 2**-13, rounding_mode="floor") * 2**-13
        return self.head(x.mean((2, 3)))


class Suppression(nn.Module):
    """Greedy suppression of overlapping boxes, unrolled, in comparisons."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = Stem(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.head(F.adaptive_avg_pool2d(self.stem(x), (2, 4)).flatten(2).transpose(1, 2))
        score, order = rows[..., 4].sigmoid().sort(dim=1, descending=True)
        box = rows[..., :4].sigmoid().gather(1, order[..., None].expand(-1, -1, 4))
        low, high = box[..., :2] * 0.5, box[..., :2] * 0.5 + box[..., 2:] + 0.1
        inner = (torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])).clamp(0)
        overlap, area = inner.prod(-1), (high - low).prod(-1)
        close = overlap / (area[:, :, None] + area[:, None] - overlap) > 0.6
        keep = [torch.ones_like(close[:, 0, 0])]
        for i in range(1, 8):
            keep.append(~(close[:, i, :i] & torch.stack(keep, 1)).any(1))
        kept = torch.stack(keep, 1)
        return score * kept, kept


class Keypoints(nn.Module):
    """SuperPoint's: local maxima of a heat map above a threshold, and what the descriptors are there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.heat, self.norm = Stem(), nn.Conv2d(8, 1, 1, bias=False), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stem(x)
        heat = self.norm(self.heat(features))
        peak = (heat == F.max_pool2d(heat, 3, stride=1, padding=1)) & (heat > 0.01)
        return torch.where(peak, heat, torch.zeros_like(heat)), F.normalize(features, dim=1) * peak


class Classifier(nn.Module):
    """Returns the class beside the scores, as deployed ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.norm = Stem(), nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.norm(self.head(self.stem(x).relu().mean((2, 3))))
        return scores, scores.argmax(1), scores.argsort(1, descending=True)


class Wrapped(nn.Module):
    """Phases wrapped to a circle, signs, whole parts, where the largest is: every kind of step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x) * 50
        phase = x % 0.73
        whole, best = (x * 300).to(torch.int64), x.flatten(2).max(-1)
        signs = x.sign() * x.ceil() + torch.fmod(x, 0.31)
        return phase, whole.to(torch.float32) * 0.01, signs, best.indices, torch.bucketize(x, torch.tensor([-1.0, 0.5]))


def _images(module: type[nn.Module], size: int = 16) -> Factory:
    return lambda: (module(), (torch.randn(3, 3, size, size),))


NETS: dict[str, Factory] = {
    name: prepared(f"deciding_{name}", factory)
    for name, factory in {
        "detector": _images(Detector),
        "experts": _images(Experts),
        "quantised": _images(Quantised),
        "suppression": _images(Suppression),
        "keypoints": _images(Keypoints),
        "classifier": _images(Classifier),
        "wrapped": _images(Wrapped),
    }.items()
}
