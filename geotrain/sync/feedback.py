"""Feedback: what becomes of what a codec drops. Every kind keeps it and sends it later."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, assert_never

import torch
from torch import Tensor

from geotrain import job
from geotrain.sync.codec import Codec, Several, codec_of
from geotrain.sync.sparse import Table, TopK, TouchedRows

FeedbackName = Literal["ef", "dgc", "econtrol"]


class Feedback(Protocol):
    """One direction of one fragment. State is named tensors."""

    codec: Codec

    def encode(self, vector: Tensor) -> Tensor:
        """[elements] fp32, which is consumed -> payload."""

    def give_back(self, payload: Tensor, weight: float, elements: int) -> None:
        """A payload was not merged: send it again, times `weight`, with the next."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass(slots=True)
class ErrorFeedback:
    """e = decay e + x; s = C(e); e -= s; send s. With decay 1 the sum of decoded + residual = the sum of produced.

    SparseLoCo (arXiv 2508.15706) lets e decay by 0.95, in place of an outer momentum.
    """

    codec: Codec
    decay: float = 1.0
    residual: Tensor | None = None

    def encode(self, vector: Tensor) -> Tensor:
        if self.residual is not None:
            vector.add_(self.residual, alpha=self.decay)
        payload = self.codec.encode(vector)
        self.residual = None if self.codec.lossless else vector.sub_(self.codec.decode(payload, vector.numel()))
        return payload

    def give_back(self, payload: Tensor, weight: float, elements: int) -> None:
        decoded = self.codec.decode(payload, elements)
        self.residual = decoded * weight if self.residual is None else self.residual.add_(decoded, alpha=weight)

    def state(self) -> dict[str, Tensor]:
        return {} if self.residual is None else {"residual": self.residual}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.residual = state.get("residual")


WARM_UP = (0.25, 0.063, 0.015, 0.004, 0.001)


@dataclass(slots=True)
class MomentumCorrection:
    """Deep Gradient Compression (arXiv 1712.01887, code): u = m u + x; v += u; send v where it is largest; zero u and v there.

    For an inner optimizer without momentum of its own. What is conserved is the velocity: the sum of decoded + v = the sum of u.
    The share kept warms up, 0.25, 0.063, 0.015, 0.004, 0.001, over `warm_up` payloads each, and stays at `keep` once below it.
    """

    codec: Codec
    momentum: float = 0.9
    warm_up: int = 4
    sent: int = 0
    velocity: Tensor | None = None
    total: Tensor | None = None

    def _now(self) -> TopK:
        assert isinstance(self.codec, TopK), "momentum correction selects by size"
        stage = self.sent // self.warm_up if self.warm_up else len(WARM_UP)
        return TopK(max(self.codec.keep, WARM_UP[stage])) if stage < len(WARM_UP) else self.codec

    def encode(self, vector: Tensor) -> Tensor:
        if self.velocity is None or self.total is None:
            self.velocity, self.total = torch.zeros_like(vector), torch.zeros_like(vector)
        self.velocity.mul_(self.momentum).add_(vector)
        self.total.add_(self.velocity)
        payload = self._now().encode(self.total)
        decoded = self.codec.decode(payload, vector.numel())
        self.sent += 1
        self.total.sub_(decoded)
        self.velocity.masked_fill_(decoded != 0, 0.0)
        return payload

    def give_back(self, payload: Tensor, weight: float, elements: int) -> None:
        assert self.total is not None
        self.total.add_(self.codec.decode(payload, elements), alpha=weight)

    def state(self) -> dict[str, Tensor]:
        if self.velocity is None or self.total is None:
            return {}
        return {"velocity": self.velocity, "total": self.total, "sent": torch.tensor(self.sent)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.velocity, self.total = state.get("velocity"), state.get("total")
        self.sent = int(state["sent"]) if "sent" in state else 0


@dataclass(slots=True)
class ErrorControl:
    """EControl (arXiv 2311.05645): d = C(eta e + g - h); e += g - h - d; h += d; send d.

    The receivers add up the means of d, so their sum is the mean of all h, which is what they apply (`Integrator`). eta 0 is
    EF21. Both ends must see every d: a new view starts all of them from zero.
    """

    codec: Codec
    eta: float
    error: Tensor | None = None
    mirror: Tensor | None = None

    def encode(self, vector: Tensor) -> Tensor:
        if self.error is None or self.mirror is None:
            self.error, self.mirror = torch.zeros_like(vector), torch.zeros_like(vector)
        vector.sub_(self.mirror)
        payload = self.codec.encode(torch.add(vector, self.error, alpha=self.eta))
        decoded = self.codec.decode(payload, vector.numel())
        self.error.add_(vector).sub_(decoded)
        self.mirror.add_(decoded)
        return payload

    def give_back(self, payload: Tensor, weight: float, elements: int) -> None:
        raise AssertionError("EControl needs every contribution: the job rejects it with a quorum")

    def state(self) -> dict[str, Tensor]:
        return {} if self.error is None or self.mirror is None else {"error": self.error, "mirror": self.mirror}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.error, self.mirror = state.get("error"), state.get("mirror")


@dataclass(frozen=True, slots=True)
class Coding:
    """How a fragment is coded, each way: a codec, and what becomes of what it drops."""

    codec: Codec
    feedback: FeedbackName = "ef"
    decay: float = 1.0
    momentum: float = 0.9
    warm_up: int = 4
    eta: float = field(default=0.01 / 400)
    """EControl's; delta / 400 in its theory, delta being the share kept."""

    def up(self) -> Feedback:
        """Of a region's own contributions."""
        match self.feedback:
            case "ef":
                return ErrorFeedback(self._own_codec(), self.decay)
            case "dgc":
                return MomentumCorrection(self.codec, self.momentum, self.warm_up)
            case "econtrol":
                return ErrorControl(self.codec, self.eta)
            case _:
                assert_never(self.feedback)

    def down(self) -> ErrorFeedback:
        """Of the owner's merges."""
        return ErrorFeedback(self._own_codec())

    def _own_codec(self) -> Codec:
        """What `auto` chooses is chosen for each fragment and way."""
        return replace(self.codec) if isinstance(self.codec, Several) else self.codec


def coding_of(sync: job.Sync, tables: Sequence[Table] = ()) -> Coding:
    """How the job's updates are coded. `tables`: the model's embedding tables, for `sparse_embeddings`."""
    codec: Codec = codec_of(sync.codec, sync.keep)
    if sync.sparse_embeddings and tables:
        codec = TouchedRows(codec, tuple(tables))
    keep = getattr(codec, "keep", 1.0)
    return Coding(codec, sync.feedback, sync.feedback_decay, eta=keep / 400)
