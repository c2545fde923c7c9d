"""A replica: what the machine's instructions mean for the numbers of one partition.

All vectors are flat: [parameters..., floating-point buffers...]. Buffers (BatchNorm statistics) are averaged with the parameters
but never take part in an outer optimizer. The wire form is computed on the CPU in fp32, wherever the parameters live.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

import torch
from torch import Tensor

from geotrain.sync.codec import Codec, ErrorFeedback
from geotrain.sync.merge import nesterov_step, weighted_mean
from geotrain.sync.messages import Update
from geotrain.sync.strategy import Merging, Pushing, Strategy

Payload = Tensor
"""[wire_bytes] uint8 on the CPU."""


class Replica(Protocol):
    """The arithmetic of one strategy. State is a mapping of named tensors, so that it can be kept by name."""

    def produce(self) -> Payload:
        """This region's payload for the round that it just finished."""

    def apply(self, payload: Payload, weight: float) -> None:
        """Let a payload change the parameters."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, beside the parameters."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass(slots=True)
class MergeReplica:
    """theta_global beside the local parameters; contributes pseudo-gradients theta_global - theta_local."""

    local: Tensor
    """The flat parameters and buffers that inner steps change, on any device."""
    parameters: int
    """How many of its elements are parameters; the rest are buffers."""
    codec: Codec
    strategy: Merging
    theta: Tensor = field(init=False)
    momentum: Tensor | None = None
    up: ErrorFeedback = field(init=False)
    down: ErrorFeedback = field(init=False)
    """The owner's, for the merged update on its way back."""

    def __post_init__(self) -> None:
        self.theta = self.local.detach().to("cpu", torch.float32, copy=True)
        self.up, self.down = ErrorFeedback(self.codec), ErrorFeedback(self.codec)

    def produce(self) -> Payload:
        return self.up.encode(self.theta - self.local.detach().cpu())

    def merge(self, contributions: Sequence[tuple[Update, Payload]]) -> Payload:
        """The owner's part: the mean by samples of what the contributions decode to, encoded once."""
        vectors = [self.codec.decode(payload, self.theta.numel()) for _, payload in contributions]
        return self.down.encode(weighted_mean(vectors, [update.samples for update, _ in contributions]))

    def apply(self, payload: Payload, weight: float) -> None:
        """The outer step, the same in every region: same bytes, same arithmetic, same result to the bit."""
        assert weight == 1.0, weight
        merged = self.codec.decode(payload, self.theta.numel())
        n, rule = self.parameters, self.strategy
        self.momentum = nesterov_step(self.theta[:n], merged[:n], self.momentum, rule.outer_lr, rule.outer_momentum)
        self.theta[n:].sub_(merged[n:])
        with torch.no_grad():
            self.local.copy_(self.theta)

    def state(self) -> dict[str, Tensor]:
        kept = {"theta": self.theta, "momentum": self.momentum, "residual_up": self.up.residual, "residual_down": self.down.residual}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.theta = state["theta"]
        self.momentum = state.get("momentum")
        self.up.residual, self.down.residual = state.get("residual_up"), state.get("residual_down")


@dataclass(slots=True)
class DeltaReplica:
    """Pushes what its own optimizer did since the last push, and adds what the others did.

    With an fp32 codec every partition ends at w0 + the sum of all deltas, up to float rounding (conservation). Buffers are
    state, not sums: of those the push carries the values, and the receiver moves 1/regions of the way towards them.
    """

    local: Tensor
    parameters: int
    codec: Codec
    regions: int
    anchor: Tensor = field(init=False)
    """The parameters as the others know them: initial + own pushed + received."""
    feedback: ErrorFeedback = field(init=False)

    def __post_init__(self) -> None:
        self.anchor = self.local.detach()[: self.parameters].clone()
        self.feedback = ErrorFeedback(self.codec)

    def produce(self) -> Payload:
        n = self.parameters
        with torch.no_grad():
            delta = self.local[:n] - self.anchor
            self.anchor.copy_(self.local[:n])
        sums = self.feedback.encode(delta.cpu())
        return torch.cat([sums, self.codec.encode(self.local[n:].detach().cpu())])

    def apply(self, payload: Payload, weight: float) -> None:
        n, split = self.parameters, self.codec.wire_bytes(self.parameters)
        with torch.no_grad():
            delta = self.codec.decode(payload[:split], n).to(self.local.device)
            self.local[:n].add_(delta, alpha=weight)
            self.anchor.add_(delta, alpha=weight)
            buffers = self.codec.decode(payload[split:], self.local.numel() - n).to(self.local.device)
            self.local[n:].lerp_(buffers, weight / self.regions)

    def state(self) -> dict[str, Tensor]:
        kept = {"anchor": self.anchor, "residual_up": self.feedback.residual}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.anchor = state["anchor"].to(self.local.device)
        self.feedback.residual = state.get("residual_up")


@dataclass(slots=True)
class MixReplica:
    """Asynchronous MA: pushes its parameters, and moves towards those that arrive: w = (1 - a) w + a w_i."""

    local: Tensor
    codec: Codec

    def produce(self) -> Payload:
        return self.codec.encode(self.local.detach().cpu())

    def apply(self, payload: Payload, weight: float) -> None:
        with torch.no_grad():
            self.local.lerp_(self.codec.decode(payload, self.local.numel()).to(self.local.device), weight)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        assert not state, sorted(state)


def replica_of(strategy: Strategy, local: Tensor, parameters: int, codec: Codec, regions: int) -> MergeReplica | DeltaReplica | MixReplica:
    """The replica that carries out a strategy on `local`, whose first `parameters` elements are parameters."""
    match strategy:
        case Merging():
            return MergeReplica(local, parameters, codec, strategy)
        case Pushing(sends="delta"):
            return DeltaReplica(local, parameters, codec, regions)
        case Pushing(sends="parameters"):
            return MixReplica(local, codec)
        case Pushing():
            raise AssertionError(strategy.sends)
        case _:
            assert_never(strategy)
