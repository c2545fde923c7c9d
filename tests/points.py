"""A task for tests: a small regression, with faults to order; and what else fails to order inside a worker's process."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from geotrain import checkpoint
from geotrain.partition import progress, server
from geotrain.sync.messages import Kind
from geotrain.wan.transport import Delivery


def names_me(file: str) -> bool:
    try:
        return bool(file) and not {str(os.getpid()), "all"}.isdisjoint(Path(file).read_text().split())
    except FileNotFoundError:
        return False


class Points:
    columns = ("x", "y")

    def __init__(
        self,
        lr: float = 0.05,
        momentum: float = 0.0,
        adam: bool = False,
        norm: bool = False,
        fault: str = "",
        slow: str = "",
        broken: str = "",
        sick: str = "",
        slow_to_evaluate: str = "",
    ) -> None:
        """`slow`, `broken`, `slow_to_evaluate`: files that, once they are there, name processes in which a batch takes 20 ms, the device
        fails, or the evaluation of a batch takes 2 s; or all.
        `sick`: the same for five losses that are NaN: with two steps a round, three rounds in a row.
        """
        self.lr, self.momentum, self.adam, self.norm, self.fault = lr, momentum, adam, norm, fault
        self.slow, self.broken, self.sick, self.turns = slow, broken, sick, 0
        self.slow_to_evaluate = slow_to_evaluate

    def model(self) -> nn.Module:
        middle = [nn.BatchNorm1d(6)] if self.norm else []
        model = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Dropout(0.0 if self.fault == "no-dropout" else 0.1), nn.Linear(6, 1))
        if self.fault == "unseeded":
            nn.init.normal_(
                model[0].weight,
                generator=torch.Generator().manual_seed(
                    int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(id(model))).item())
                ),
            )
        return model

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr) if self.adam else torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)

    def batch(self, rows: pa.RecordBatch) -> tuple[Tensor, Tensor]:
        if self.fault == "batch":
            raise ValueError("cannot make a batch")
        if names_me(self.slow):
            time.sleep(0.02)
        x = np.stack(rows.column("x").to_numpy(zero_copy_only=False))
        return torch.from_numpy(x), torch.from_numpy(rows.column("y").to_numpy(zero_copy_only=False).copy())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.fault == "loss":
            raise RuntimeError("shapes do not fit")
        if names_me(self.broken):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        loss = functional.mse_loss(model(batch[0]).squeeze(1), batch[1])
        if names_me(self.sick):
            self.turns += 1
            if self.turns == 5:
                Path(self.sick).unlink()
            return loss * torch.nan
        return loss

    def evaluate(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[float, float]]:
        if names_me(self.slow_to_evaluate):
            time.sleep(2.0)
        error = functional.mse_loss(model(batch[0]).squeeze(1), batch[1], reduction="sum")
        return {"mse": (error.item(), len(batch[1]))}


def flip_a_bit_of_the_next_state(file: str) -> None:
    """That a peer is given, by the first of all leaders that have been told so and find the file; by all, always, if it says so."""
    with_hash = server._with_hash

    def spoilt(payload: Tensor) -> Tensor:
        hashed = with_hash(payload)
        try:
            if Path(file).read_text() != "always":
                Path(file).unlink()
        except FileNotFoundError:
            return hashed
        hashed[5] ^= 1
        return hashed

    server._with_hash = spoilt


def lose_the_next_hello(origin: str, *, always: bool = False) -> None:
    """Though it was acknowledged: all wait for ever for what follows it."""
    take, lost = server.ParameterServer.take, list[Delivery]()

    def deaf(self: server.ParameterServer, delivery: Delivery) -> None:
        if (delivery.update.kind, delivery.update.origin) == (Kind.HELLO, origin) and (always or not lost):
            lost.append(delivery)
        else:
            take(self, delivery)

    server.ParameterServer.take = deaf  # type: ignore[method-assign]


def tell_seldom() -> None:
    """Of rounds, and of what is held of others' rounds."""
    progress.EVERY_S = progress.ROUND_EVERY_S = 60.0


def never_write_a_part() -> None:
    """As where the way to the store is very slow."""

    def slowly(*_: Any, **__: Any) -> Any:
        time.sleep(3600.0)

    checkpoint.write_packed = slowly
