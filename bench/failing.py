"""The digits with faults to order: what a GPU that is full, numbers that go wrong, and a slow machine cost a run."""

import time

import torch
from torch import Tensor, nn

from geotrain.examples.digits import Batch, Digits
from tests.points import names_me


class FailingDigits(Digits):
    """`broken`, `sick`, `slow`: files that, once they are there, name processes in which the device fails, the loss is NaN, or a batch
    takes 50 ms; or all."""

    def __init__(self, lr: float = 0.05, broken: str = "", sick: str = "", slow: str = "") -> None:
        super().__init__(lr)
        self.broken, self.sick, self.slow = broken, sick, slow

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if names_me(self.broken):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if names_me(self.slow):
            time.sleep(0.05)
        return super().loss(model, batch) * (torch.nan if names_me(self.sick) else 1)
