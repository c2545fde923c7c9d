"""The digits with faults to order: what a GPU that is full, and numbers that go wrong, cost a run."""

import torch
from torch import Tensor, nn

from geotrain.examples.digits import Batch, Digits
from tests.points import names_me


class FailingDigits(Digits):
    """`broken`, `sick`: files that, once they are there, name processes in which the device fails, or the loss is NaN."""

    def __init__(self, lr: float = 0.05, broken: str = "", sick: str = "") -> None:
        super().__init__(lr)
        self.broken, self.sick = broken, sick

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if names_me(self.broken):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().loss(model, batch) * (torch.nan if names_me(self.sick) else 1)
