"""The workers of one region as a torch.distributed group: gradients are averaged every inner step, the leader speaks after it."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

GROUP_TIMEOUT = timedelta(minutes=30)
"""How long a collective may take: as long as a leader may have to hold for a slow WAN."""


@dataclass(frozen=True, slots=True)
class Directive:
    """What the leader tells its workers after each inner step."""

    round: int
    changed: bool
    """The parameters changed: take the leader's."""
    over: bool
    """The segment is over."""
    epoch: int
    done: int
    """Where the region is in its rows: inner steps made of that epoch; negative: some of the epoch before are still to be made."""
    void: bool = False
    """The round went wrong: what is not finite in the inner optimizer is to be forgotten."""


class Alone:
    """The group of a region with one worker: nothing to do."""

    rank, world = 0, 1

    def average(self, gradients: Tensor | None, weight: float) -> None:
        assert weight == 1.0, weight

    def follow(self, directive: Directive | None, vector: Tensor) -> Directive:
        assert directive is not None
        return directive

    def share_vector(self, vector: Tensor) -> None: ...

    def close(self) -> None: ...


class Together:
    """A region with several workers. One per process: torch.distributed has one default group."""

    def __init__(self, rendezvous: str, rank: int, world: int, device: torch.device, *, shared_device: bool) -> None:
        """`shared_device`: two workers use one GPU, which NCCL does not allow."""
        self.rank, self.world = rank, world
        if rendezvous.startswith("tcp://127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and not shared_device else "gloo"
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=GROUP_TIMEOUT)

    def average(self, gradients: Tensor | None, weight: float) -> None:
        """sum_k weight_k * gradients_k over the workers, in place. Weights are shares of the step's rows, and sum to 1."""
        assert gradients is not None
        gradients.mul_(weight)
        dist.all_reduce(gradients)

    def follow(self, directive: Directive | None, vector: Tensor) -> Directive:
        """The leader's directive, on every worker; with its parameters when they changed."""
        word = torch.zeros(6, dtype=torch.int64)
        if directive is not None:
            at = (directive.round, directive.epoch, directive.done)
            word = torch.tensor([*at, directive.changed, directive.over, directive.void], dtype=torch.int64)
        dist.broadcast(word, 0)
        round, epoch, done, changed, over, void = word.tolist()
        if changed:
            self.share_vector(vector)
        return Directive(round, bool(changed), bool(over), epoch, done, bool(void))

    def share_vector(self, vector: Tensor) -> None:
        dist.broadcast(vector, 0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


Group = Alone | Together
