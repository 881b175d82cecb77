"""Train the four nets of models/digits.py on scikit-learn's handwritten digits and write everything in models/.

The data comes with scikit-learn, so nothing is downloaded. The split is stratified, 1,437 images to train on and 360
held out, and depends on a fixed seed of its own: other values of --seed train other weights on the same images.
On one machine and one torch version the same seed gives the same weights; about a minute on one core.

    python scripts/train_digits.py                  # all four, into models/
    python scripts/train_digits.py --only digits_mlp --out /tmp/digits
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

MODELS = Path(__file__).resolve().parent.parent / "models"
NETS = ("digits_mlp", "digits_cnn", "digits_tcn", "digits_batchstats")
SPLIT_SEED = 0
BATCH = 64
#: Training images that models/digits_calibration.npz holds, without labels.
CALIBRATION = 512


def load_factories() -> ModuleType:
    """models/digits.py, imported from its path: models/ holds examples and is no package."""
    spec = importlib.util.spec_from_file_location("digits", MODELS / "digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) float32 in [0, 1] and labels (N,) int64: train x, train labels, held-out x and labels."""
    digits = load_digits()
    x = (digits.images / 16).astype(np.float32)[:, None]
    parts = train_test_split(x, digits.target, test_size=360, stratify=digits.target, random_state=SPLIT_SEED)
    train_x, held_x, train_labels, held_labels = (torch.from_numpy(part) for part in parts)
    return train_x, train_labels.long(), held_x, held_labels.long()


def shifted(x: Tensor) -> Tensor:
    """Each image of ``x`` (N, 1, 8, 8) moved by -1, 0 or 1 pixel per axis, zeros moving in."""
    padded = functional.pad(x, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(x), 1)) + torch.arange(8)
    image = torch.arange(len(x))[:, None, None]
    return padded[image, 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(net: nn.Module, x: Tensor, labels: Tensor, epochs: int, *, shifts: bool) -> None:
    """AdamW with a one-cycle rate, on shifted images if asked, then BatchNorm statistics of the final weights."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}])
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        # The incomplete last batch is dropped: the permutation differs every epoch, and so do the images left out.
        for batch in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            images = shifted(x[batch]) if shifts else x[batch]
            loss = functional.cross_entropy(net(images), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    # A moving average lags behind the weights, and momentum=None still averages in the first, untrained steps.
    update_bn([x[batch] for batch in torch.randperm(len(x)).split(len(x) // 3)], net)
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of ``labels`` that ``net`` gets right, all images in one batch."""
    return (net(x).argmax(1) == labels).double().mean().item()


def save_program(net: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    """``net`` as an ExportedProgram with a dynamic batch, without the source paths that torch.export records."""
    with torch.no_grad():
        program = torch.export.export(net, example, dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODELS, help="folder to write into (default: models/)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and shifts (default: 0)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images (default: 40)")
    parser.add_argument("--only", choices=NETS, help="train this net alone")
    args = parser.parse_args()

    # One thread: the order of the sums, and so the weights, must not depend on the number of cores.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    factories = load_factories()
    train_x, train_labels, held_x, held_labels = split_digits()
    np.savez_compressed(args.out / "digits_heldout.npz", x=held_x.numpy(), labels=held_labels.numpy())
    np.savez_compressed(args.out / "digits_calibration.npz", x=train_x[:CALIBRATION].numpy())

    for name in [args.only] if args.only else NETS:
        torch.manual_seed(args.seed)
        net = getattr(factories, name)()
        # A net without convolutions has to learn every shift of a digit by itself; at this width it does not.
        train(net, train_x, train_labels, args.epochs, shifts=name != "digits_mlp")
        (args.out / f"{name}.safetensors").write_bytes(save(net.state_dict()))
        if name == "digits_mlp":
            save_program(net, net.example_inputs, args.out / f"{name}.pt2")
        size = sum(p.numel() for p in net.parameters())
        held, seen = accuracy(net, held_x, held_labels), accuracy(net, train_x, train_labels)
        print(f"{name:18} {size:6} parameters   held out {held:7.2%}   training images {seen:7.2%}", flush=True)


if __name__ == "__main__":
    main()
