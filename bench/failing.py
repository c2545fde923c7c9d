"""What fails to order inside a worker's process."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geotrain import checkpoint
from geotrain.examples.digits import Batch, Digits
from geotrain.partition import server
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


def flip_a_bit_of_the_next_state(file: str) -> None:
    """That a peer is given, by the first of all leaders that have been told so and find the file."""
    with_hash = server._with_hash

    def spoilt(payload: Tensor) -> Tensor:
        hashed = with_hash(payload)
        try:
            Path(file).unlink()
        except FileNotFoundError:
            return hashed
        hashed[5] ^= 1
        return hashed

    server._with_hash = spoilt


def never_write_a_part() -> None:
    """As where the way to the store is very slow."""

    def slowly(*_: Any, **__: Any) -> Any:
        time.sleep(3600.0)

    checkpoint.write_packed = slowly
