"""A replica: what the machine's instructions mean for the numbers of one partition.

All vectors are flat: [parameters..., floating-point buffers...]. Buffers (BatchNorm statistics) are averaged with the parameters
but never take part in an outer optimizer, and travel in fp32 whatever the codec: they are few, and values rather than small steps,
which would spoil the scale that they share with others. The wire form is computed on the CPU in fp32, wherever the parameters live.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Protocol, assert_never

import torch
from torch import Tensor

from geotrain.errors import UpdateUnusable
from geotrain.sync.codec import FP32, Codec, Several
from geotrain.sync.feedback import Coding, ErrorFeedback, Feedback, MomentumCorrection
from geotrain.sync.fragments import Fragment, make_fragments
from geotrain.sync.merge import Merged, Part, cosine, merge, outer_step
from geotrain.sync.messages import Kind, Update
from geotrain.sync.strategy import Merging, Pushing, Strategy

AHEAD = 0.5
"""How much of its own contribution under way a region goes ahead with [ours]. 0 is CO2 (arXiv 2401.16265), 1 delayed averaging (DaSGD,
arXiv 2006.00441), 1 / R eager updates (arXiv 2502.12996). If a round pulls what it begins from a share c of the way to where it leads, the
mean of the regions follows z^2 - (1 - AHEAD c) z + (1 - AHEAD) c = 0 and their differences z = -AHEAD c: stable for c < 1 with 0 or 1,
for c < 2 with 0.5, as gradient descent itself. Buffers, averages with c < 1, go ahead entirely: then their mean never overshoots."""
Payload = Tensor
"""[wire_bytes] uint8 on the CPU."""


class Replica(Protocol):
    """The arithmetic of one strategy. State is a mapping of named tensors, so that it can be kept by name."""

    local: Tensor
    """The flat parameters and buffers that inner steps change, on any device."""

    @property
    def produce_moves(self) -> bool:
        """Whether producing a contribution changes `local`."""

    def produce(self, update: Update) -> Payload:
        """This region's payload: of its round, or its whole replica."""

    def merge(self, update: Update, parts: Sequence[tuple[Update, Payload]]) -> tuple[Payload, dict[str, str]]:
        """The owner's part: contributions to one payload. Also names what is odd about which region's contribution."""

    def apply(self, update: Update, payload: Payload, weight: float) -> None:
        """Let a payload change the parameters."""

    def remember(self, update: Update, payload: Payload) -> None:
        """This merge is about to be applied early: keep what it changes."""

    def rewind(self) -> dict[tuple[int, int], Payload]:
        """Be as before the merges that were applied early; (round, fragment) -> their payloads."""

    def take_back(self, update: Update, payload: Payload, weight: float) -> None:
        """An own contribution was not merged: send it again, times `weight`, with the next."""

    def share(self) -> Payload:
        """All that a region which joins must have."""

    def adopt(self, payload: Payload) -> None:
        """Go on from what another region shared. Raises ValueError on a wrong size."""

    def new_view(self) -> None:
        """The regions that are in have changed."""

    def void(self) -> None:
        """The round went wrong: be where it began."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, beside the parameters."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


def encode_whole(local: Tensor) -> Payload:
    return FP32.encode(local.detach().cpu())


def mean_of_replicas(parts: Sequence[tuple[Update, Payload]], elements: int) -> tuple[Payload, dict[str, str]]:
    """The mean by samples of whole replicas."""
    merged = merge(_parts(parts, lambda payload: FP32.decode(payload, elements)), "mean")
    return FP32.encode(merged.vector), merged.suspects


def _parts(parts: Sequence[tuple[Update, Payload]], decode: Callable[[Payload], Tensor]) -> list[Part]:
    return [Part(update.origin, update.samples, partial(_read, update, decode, payload)) for update, payload in parts]


def _read(update: Update, decode: Callable[[Payload], Tensor], payload: Payload) -> Tensor:
    """What a region's payload decodes to. Raises UpdateUnusable, which names it."""
    try:
        return decode(payload)
    except ValueError as error:
        raise UpdateUnusable(update.origin, update.round, error) from error


@dataclass(slots=True)
class MergeReplica:
    """theta, which all regions agree on, beside the local parameters; contributes pseudo-gradients, what local moved away from theta.

    One round delayed, a region begins a round from theta - AHEAD * lr * (its own contribution under way), and contributes what it
    moved from there.
    """

    local: Tensor
    parameters: int
    """How many of its elements are parameters; the rest are buffers."""
    coding: Coding
    strategy: Merging
    fragments: tuple[Fragment, ...] = ()
    """None given: the whole vector as one."""
    theta: Tensor = field(init=False)
    momentum: Tensor | None = field(init=False)
    up: list[Feedback] = field(init=False)
    down: list[ErrorFeedback] = field(init=False)
    """The owner's, for merged fragments on their way back."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """The owner's, with a penalty: each fragment's last merge."""
    integral: dict[int, Tensor] = field(default_factory=dict)
    """With EControl: each fragment's sum of merges, which is what is applied."""
    ahead: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """One round delayed: (round, fragment) -> [elements] by which this region is ahead of theta until that merge is applied."""
    early: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    """(round, fragment) of merges applied early -> their payloads, and what they changed as it was before. Until the next round is over."""

    def __post_init__(self) -> None:
        self.theta = self.local.detach().to("cpu", torch.float32, copy=True)
        self.momentum = torch.zeros(self.parameters) if self.strategy.outer.momentum else None
        self.fragments = self.fragments or make_fragments([self.parameters, self.local.numel() - self.parameters], self.parameters)
        assert len(self.fragments) == self.strategy.fragments, (len(self.fragments), self.strategy)
        self.up = [self.coding.up() for _ in self.fragments]
        self.down = [self.coding.down() for _ in self.fragments]

    @property
    def produce_moves(self) -> bool:
        return self.strategy.tau is None

    def _forget(self) -> None:
        """What codecs had kept back is void."""
        for way in (*self.up, *self.down):
            way.load_state({})

    def produce(self, update: Update) -> Payload:
        self.early.clear()
        if update.kind is Kind.REPLICA:
            return encode_whole(self.local)
        fragment, way = self.fragments[update.fragment], self.up[update.fragment]
        delta = fragment.difference(self.theta, self.local.detach())
        if self.strategy.tau is not None:
            return _encode(way, fragment, delta)
        for moved in self._ahead(update.fragment):
            delta.sub_(moved)
        payload = _encode(way, fragment, delta)
        steps, buffers = _decode(way.codec, fragment, payload)
        self.ahead[update.round, update.fragment] = torch.cat([steps * (AHEAD * self.strategy.outer.lr), buffers])
        self._begin(update.fragment)
        return payload

    def merge(self, update: Update, parts: Sequence[tuple[Update, Payload]]) -> tuple[Payload, dict[str, str]]:
        if update.kind is Kind.AGREED:
            return mean_of_replicas(parts, self.theta.numel())
        number, fragment = update.fragment, self.fragments[update.fragment]
        codec, rule = self.up[number].codec, self.strategy.rule
        if self.coding.feedback == "econtrol":  # every mirror counts alike, whatever a round's samples
            parts = [(replace(part, samples=1), payload) for part, payload in parts]
        merged = merge(_parts(parts, lambda payload: _decode(codec, fragment, payload)[0]), rule)
        buffers = merge(_parts(parts, lambda payload: _decode_buffers(fragment, payload)), "mean" if rule == "radial" else rule)
        if self.strategy.penalty and number in self.before:
            turned = 1 - cosine(merged.vector, self.before[number])
            merged = Merged(merged.vector / (1 + self.strategy.penalty * turned / 2), merged.suspects)
        if self.strategy.penalty:
            self.before[number] = merged.vector.clone()
        payload = torch.cat([FP32.encode(buffers.vector), self.down[number].encode(merged.vector)])
        return payload, buffers.suspects | merged.suspects

    def apply(self, update: Update, payload: Payload, weight: float) -> None:
        """The outer step, the same in every region: same bytes, same arithmetic, same result to the bit."""
        assert weight == 1.0, weight
        if update.kind is Kind.AGREED:
            self.theta = FP32.decode(payload, self.theta.numel()).clone()
            self._to_local(self.theta)
            return
        number = update.fragment
        merged, buffers = _decode(self.down[number].codec, self.fragments[number], payload)
        if self.coding.feedback == "econtrol":
            merged = self.integral[number] = self.integral[number] + merged if number in self.integral else merged.clone()
        self._outer_step(self.fragments[number], merged, buffers)
        self.ahead.pop((update.round, number), None)
        self._begin(number)

    def remember(self, update: Update, payload: Payload) -> None:
        number, place = update.fragment, (update.round, update.fragment)
        fragment = self.fragments[number]
        kept = {"payload": payload, "theta": _cut(self.theta, fragment.ranges), "local": _cut(self.local.detach(), fragment.ranges).cpu()}
        if self.momentum is not None:
            kept["momentum"] = _cut(self.momentum, fragment.parameters)
        if place in self.ahead:
            kept["ahead"] = self.ahead[place]
        if number in self.integral:
            kept["integral"] = self.integral[number]
        self.early[place] = kept

    def rewind(self) -> dict[tuple[int, int], Payload]:
        for (round, number), kept in self.early.items():
            fragment = self.fragments[number]
            _paste(self.theta, fragment.ranges, kept["theta"])
            _paste(self.local.detach(), fragment.ranges, kept["local"])
            if self.momentum is not None:
                _paste(self.momentum, fragment.parameters, kept["momentum"])
            if "ahead" in kept:
                self.ahead[round, number] = kept["ahead"]
            self.integral.pop(number, None)
            if "integral" in kept:
                self.integral[number] = kept["integral"]
        early, self.early = self.early, {}
        return {place: kept["payload"] for place, kept in early.items()}

    def _outer_step(self, fragment: Fragment, merged: Tensor, buffers: Tensor) -> None:
        at = 0
        for a, b in fragment.parameters:
            momentum = None if self.momentum is None else self.momentum[a:b]
            outer_step(self.theta[a:b], merged[at : at + b - a], momentum, self.strategy.outer)
            at += b - a
        at = 0
        for a, b in fragment.buffers:
            self.theta[a:b].sub_(buffers[at : at + b - a])
            at += b - a

    def _begin(self, number: int) -> None:
        """Let local be where the next inner step begins."""
        at, alpha, ahead = 0, self.strategy.alpha, self._ahead(number)
        for a, b in self.fragments[number].ranges:
            begin = self.theta[a:b]
            for moved in ahead:
                begin = begin - moved[at : at + b - a]
            with torch.no_grad():
                if alpha:
                    self.local[a:b].lerp_(begin.to(self.local.device), 1 - alpha)
                else:
                    self.local[a:b].copy_(begin)
            at += b - a

    def _ahead(self, number: int) -> list[Tensor]:
        return [moved for (_, fragment), moved in sorted(self.ahead.items(), key=lambda item: item[0]) if fragment == number]

    def take_back(self, update: Update, payload: Payload, weight: float) -> None:
        """Buffers are not sent again: they are values, of which the next contribution has newer ones."""
        fragment = self.fragments[update.fragment]
        self.up[update.fragment].give_back(payload[4 * fragment.buffered :], weight, fragment.parametric)

    def share(self) -> Payload:
        return FP32.encode(torch.cat([self.theta, *([] if self.momentum is None else [self.momentum])]))

    def adopt(self, payload: Payload) -> None:
        n = self.theta.numel()
        numbers = FP32.decode(payload, n + (0 if self.momentum is None else self.parameters)).clone()
        self.theta = numbers[:n]
        if self.momentum is not None:
            self.momentum = numbers[n:]
        self.ahead.clear()
        self.early.clear()
        self._to_local(self.theta)
        self._forget()

    def new_view(self) -> None:
        """EControl's ends must have seen the same: all begin again. The penalty's memory too, which a newcomer does not have."""
        self.early.clear()
        self.before.clear()
        if self.coding.feedback == "econtrol":
            self.integral.clear()
            self._forget()

    def void(self) -> None:
        """With fragments that are synchronized in turn, where each was synchronized last."""
        self._to_local(self.theta)
        for number in range(len(self.fragments)):
            if self._ahead(number):
                self._begin(number)

    def _to_local(self, vector: Tensor) -> None:
        with torch.no_grad():
            self.local.copy_(vector)

    def state(self) -> dict[str, Tensor]:
        assert not self.ahead, "a checkpoint is made where every merge is applied"
        kept = {"theta": self.theta} | ({} if self.momentum is None else {"momentum": self.momentum})
        for number in range(len(self.fragments)):
            kept |= {f"up.{number}.{name}": tensor for name, tensor in self.up[number].state().items()}
            kept |= {f"down.{number}.{name}": tensor for name, tensor in self.down[number].state().items()}
        kept |= {f"before.{number}": tensor for number, tensor in self.before.items()}
        for (round, number), before in self.early.items():
            kept |= {f"early.{round}.{number}.{name}": tensor for name, tensor in before.items()}
        return kept | {f"integral.{number}": tensor for number, tensor in self.integral.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.theta = state["theta"]
        self.momentum = state.get("momentum")
        for number in range(len(self.fragments)):
            self.up[number].load_state(_under(f"up.{number}", state))
            self.down[number].load_state(_under(f"down.{number}", state))
        self.before = {int(number): tensor for number, tensor in _under("before", state).items()}
        self.integral = {int(number): tensor for number, tensor in _under("integral", state).items()}
        self.early = {}
        for key, tensor in _under("early", state).items():
            *place, name = key.split(".")
            self.early.setdefault((int(place[0]), int(place[1])), {})[name] = tensor


def _cut(vector: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """A copy of these ranges, end to end."""
    return torch.cat([vector[:0], *(vector[a:b] for a, b in ranges)])


def _paste(vector: Tensor, ranges: Sequence[tuple[int, int]], numbers: Tensor) -> None:
    at = 0
    for a, b in ranges:
        vector[a:b].copy_(numbers[at : at + b - a])
        at += b - a


def _encode(way: Feedback, fragment: Fragment, vector: Tensor) -> Payload:
    """[elements] of a fragment, which is consumed -> its buffers in fp32, then its parameters, coded."""
    coded = way.encode(vector[: fragment.parametric])
    return torch.cat([FP32.encode(vector[fragment.parametric :]), coded]) if fragment.buffered else coded


def _decode(codec: Codec, fragment: Fragment, payload: Payload) -> tuple[Tensor, Tensor]:
    """(parameters, buffers)."""
    return codec.decode(payload[4 * fragment.buffered :], fragment.parametric), _decode_buffers(fragment, payload)


def _decode_buffers(fragment: Fragment, payload: Payload) -> Tensor:
    return FP32.decode(payload[: 4 * fragment.buffered], fragment.buffered)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}


@dataclass(slots=True)
class DeltaReplica:
    """Pushes what its own optimizer did since the last push, and adds what the others did.

    With an fp32 codec every partition ends at w0 + the sum of all deltas, up to float rounding (conservation); with momentum
    correction at w0 + the sum of all that was sent. Buffers are state, not sums: of those the push carries the values, and the
    receiver moves 1/regions of the way towards them.
    """

    local: Tensor
    parameters: int
    coding: Coding
    regions: int
    anchor: Tensor = field(init=False)
    """The parameters as the others know them: initial + own pushed + received."""
    buffers: Tensor = field(init=False)
    """As they were at the last push."""
    feedback: Feedback = field(init=False)

    def __post_init__(self) -> None:
        self.anchor = self.local.detach()[: self.parameters].clone()
        self.buffers = self.local.detach()[self.parameters :].clone()
        self.feedback = self.coding.up()

    @property
    def produce_moves(self) -> bool:
        return isinstance(self.feedback, MomentumCorrection)

    def produce(self, update: Update) -> Payload:
        if update.kind is Kind.REPLICA:
            return encode_whole(self.local)
        n = self.parameters
        with torch.no_grad():
            delta = self.local[:n] - self.anchor
            self.anchor.copy_(self.local[:n])
            self.buffers.copy_(self.local[n:])
        own = delta.clone() if self.produce_moves else None
        sums = self.feedback.encode(delta.cpu())
        if own is not None:
            self._move_as_sent(own, sums)
        return torch.cat([FP32.encode(self.local[n:].detach().cpu()), sums])

    def _move_as_sent(self, own: Tensor, sums: Payload) -> None:
        """With momentum correction what is sent is not what the inner optimizer did: this region moves as the others do."""
        with torch.no_grad():
            sent = self.feedback.codec.decode(sums, self.parameters).to(self.local.device)
            self.local[: self.parameters].add_(sent - own)
            self.anchor.copy_(self.local[: self.parameters])

    def merge(self, update: Update, parts: Sequence[tuple[Update, Payload]]) -> tuple[Payload, dict[str, str]]:
        return mean_of_replicas(parts, self.local.numel())

    def apply(self, update: Update, payload: Payload, weight: float) -> None:
        n, split = self.parameters, FP32.wire_bytes(self.local.numel() - self.parameters)
        with torch.no_grad():
            if update.kind is Kind.AGREED:
                self.local.copy_(FP32.decode(payload, self.local.numel()))
                self.anchor.copy_(self.local[:n])
                self.buffers.copy_(self.local[n:])
                if not isinstance(self.feedback, MomentumCorrection):
                    self.feedback.load_state({})  # what was not sent yet is in this region's replica, and so in the mean
                return
            buffers = FP32.decode(payload[:split], self.local.numel() - n).to(self.local.device)
            delta = self.feedback.codec.decode(payload[split:], n).to(self.local.device)
            self.local[:n].add_(delta, alpha=weight)
            self.anchor.add_(delta, alpha=weight)
            self.local[n:].lerp_(buffers, weight / self.regions)

    def remember(self, update: Update, payload: Payload) -> None:
        raise AssertionError("a push is applied when it comes")

    def rewind(self) -> dict[tuple[int, int], Payload]:
        return {}

    def take_back(self, update: Update, payload: Payload, weight: float) -> None:
        raise AssertionError("a push is never given back")

    def share(self) -> Payload:
        return encode_whole(self.local)

    def adopt(self, payload: Payload) -> None:
        raise AssertionError("a push strategy's views begin with a full merge")

    def new_view(self) -> None: ...

    def void(self) -> None:
        with torch.no_grad():
            self.local[: self.parameters].copy_(self.anchor)
            self.local[self.parameters :].copy_(self.buffers)

    def state(self) -> dict[str, Tensor]:
        return {"anchor": self.anchor} | {f"up.{name}": tensor for name, tensor in self.feedback.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.anchor = state["anchor"].to(self.local.device)
        self.feedback.load_state(_under("up", state))


@dataclass(slots=True)
class MixReplica:
    """Asynchronous MA: pushes its parameters, and moves towards those that arrive: w = (1 - a) w + a w_i."""

    local: Tensor
    coding: Coding
    good: Tensor = field(init=False)
    """As it was at the last push: nothing else remembers it."""
    produce_moves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.good = self.local.detach().clone()

    def produce(self, update: Update) -> Payload:
        self.good.copy_(self.local.detach())
        return encode_whole(self.local) if update.kind is Kind.REPLICA else self.coding.codec.encode(self.local.detach().cpu())

    def merge(self, update: Update, parts: Sequence[tuple[Update, Payload]]) -> tuple[Payload, dict[str, str]]:
        return mean_of_replicas(parts, self.local.numel())

    def apply(self, update: Update, payload: Payload, weight: float) -> None:
        codec = self.coding.codec if update.kind is Kind.PUSH else FP32
        other = codec.decode(payload, self.local.numel()).to(self.local.device)
        with torch.no_grad():
            if update.kind is Kind.AGREED:
                self.local.copy_(other)
                self.good.copy_(other)
            else:
                self.local.lerp_(other, weight)

    def remember(self, update: Update, payload: Payload) -> None:
        raise AssertionError("a push is applied when it comes")

    def rewind(self) -> dict[tuple[int, int], Payload]:
        return {}

    def take_back(self, update: Update, payload: Payload, weight: float) -> None:
        raise AssertionError("a push is never given back")

    def share(self) -> Payload:
        return encode_whole(self.local)

    def adopt(self, payload: Payload) -> None:
        raise AssertionError("a push strategy's views begin with a full merge")

    def new_view(self) -> None: ...

    def void(self) -> None:
        with torch.no_grad():
            self.local.copy_(self.good)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        assert not state, sorted(state)


AnyReplica = MergeReplica | DeltaReplica | MixReplica


def replica_of(
    strategy: Strategy, local: Tensor, parameters: int, coding: Coding, regions: int, fragments: tuple[Fragment, ...] = ()
) -> AnyReplica:
    """The replica that carries out a strategy on `local`, whose first `parameters` elements are parameters."""
    match strategy:
        case Merging():
            return MergeReplica(local, parameters, coding, strategy, fragments)
        case Pushing(sends="delta"):
            return DeltaReplica(local, parameters, coding, regions)
        case Pushing(sends="parameters"):
            return MixReplica(local, coding)
        case Pushing():
            raise AssertionError(strategy.sends)
        case _:
            assert_never(strategy)


def choose_codecs(replica: AnyReplica, up: Sequence[int], down: int) -> None:
    """With `codec: auto`: which of its codecs each way takes from now on. `up`: for each owner in turn."""
    if isinstance(replica, MixReplica):
        return
    ways = [replica.feedback] if isinstance(replica, DeltaReplica) else replica.up
    for number, way in enumerate(ways):
        if isinstance(way.codec, Several):
            way.codec.chosen = up[number % len(up)]
    for way in replica.down if isinstance(replica, MergeReplica) else ():
        if isinstance(way.codec, Several):
            way.codec.chosen = down
