"""Trains the net with Lightning, and writes digits.ckpt and heldout.npz: ``pip install lightning scikit-learn``."""

from __future__ import annotations

import lightning
import numpy as np
import torch
from digits import Digits
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Training(lightning.LightningModule):
    """What Lightning trains; the checkpoint's keys begin with ``model.``, which bnfold takes off."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model, self.loss = Digits(width), nn.CrossEntropyLoss()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return self.loss(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def main() -> None:
    """Trains on the first 1,500 images and holds out the rest."""
    lightning.seed_everything(0)
    found = load_digits()
    images, labels = found.images.astype(np.float32)[:, None] / 16, found.target
    data = TensorDataset(torch.from_numpy(images[:1500]), torch.from_numpy(labels[:1500]))
    trainer = lightning.Trainer(max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Training(), DataLoader(data, 64, shuffle=True))
    trainer.save_checkpoint("digits.ckpt", weights_only=True)
    np.savez_compressed("heldout.npz", image=images[1500:], labels=labels[1500:])


if __name__ == "__main__":
    main()
