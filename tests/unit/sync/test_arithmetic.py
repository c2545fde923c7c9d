"""Laws of codecs, merges, outer steps and replicas."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geotrain.sync.codec import FP32, Codec, Several, codec_of
from geotrain.sync.feedback import Coding, ErrorControl, ErrorFeedback, MomentumCorrection
from geotrain.sync.fragments import make_fragments
from geotrain.sync.merge import Part, merge, outer_step
from geotrain.sync.messages import Kind, Update
from geotrain.sync.replica import AHEAD, DeltaReplica, MergeReplica, MixReplica
from geotrain.sync.sparse import TopK, TouchedRows
from geotrain.sync.strategy import Merging, Outer, Rule, discount

SEEDS = st.integers(0, 10**6)
SIZES = st.integers(0, 9000)
CODECS = ["fp32", "bf16", "int8", "int4", "e3m0", "topk", "sparseloco", "fedzip", "auto"]
DILOCO = Outer(lr=0.7, momentum=0.9)
PUSH = Update(Kind.PUSH, 0, "a", 0)


def noise(seed: int, n: int = 17) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(SEEDS, SIZES, st.sampled_from(CODECS))
def test_a_codec_says_its_exact_size_and_decodes_what_it_encoded(seed: int, n: int, name: str) -> None:
    codec, x = codec_of(name), noise(seed, n)
    before = x.clone()
    payload = codec.encode(x)
    assert payload.dtype == torch.uint8
    assert payload.numel() == codec.wire_bytes(n)
    decoded = codec.decode(payload, n)
    assert decoded.shape == (n,)
    assert torch.equal(x, before), "encoding changes nothing"
    assert float((x - decoded).norm()) <= float(x.norm()) * (1 + 1e-6), "it brings the receiver nearer"


@given(SEEDS, SIZES)
def test_how_much_codecs_lose(seed: int, n: int) -> None:
    x = noise(seed, n)
    worst = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.02, "int4": 0.25, "e3m0": 0.35}
    for name, bound in worst.items():
        codec = codec_of(name)
        assert float((codec.decode(codec.encode(x), n) - x).norm()) <= bound * float(x.norm()) + 1e-9, name


@given(SEEDS, st.integers(10, 30_000), st.floats(0.001, 0.5))
def test_top_k_keeps_exactly_the_largest(seed: int, n: int, keep: float) -> None:
    codec, x = TopK(keep), noise(seed, n)
    decoded = codec.decode(codec.encode(x), n)
    kept = decoded != 0
    assert int(kept.sum()) == codec.kept(n)
    assert kept.all() or float(x[kept].abs().min()) >= float(x[~kept].abs().max())


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "e3m0", "topk", "sparseloco", "fedzip", "auto"])
def test_bytes_that_fit_no_vector_are_refused(name: str) -> None:
    codec = codec_of(name)
    payload = codec.encode(noise(1, 5000))
    with pytest.raises(ValueError, match=r"payload|codec"):
        codec.decode(payload[:-1], 5000)


def test_positions_from_outside_are_refused() -> None:
    payload = TopK(0.1).encode(noise(1, 100))
    payload[:4] = 255
    with pytest.raises(ValueError, match="outside"):
        TopK(0.1).decode(payload, 100)


def touched(seed: int, rows: int, width: int, share: float) -> Tensor:
    """[7 numbers, a table, 3 numbers, a table of the same], of which only a share of the tables' rows is not zero."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(rows, width, generator=generator) * (torch.rand(rows, 1, generator=generator) < share) for _ in range(2)]
    return torch.cat([noise(seed, 7), tables[0].view(-1), noise(seed + 1, 3), tables[1].view(-1)])


@given(SEEDS, st.integers(1, 60), st.integers(1, 9), st.floats(0, 1), st.sampled_from(["fp32", "bf16", "int8", "int4", "e3m0"]))
def test_of_embeddings_only_touched_rows_are_sent(seed: int, rows: int, width: int, share: float, name: str) -> None:
    x = touched(seed, rows, width, share)
    codec = TouchedRows(codec_of(name), ((7, rows, width), (10 + rows * width, rows, width)))
    payload = codec.encode(x)
    assert payload.numel() == codec.measure(x) <= codec.wire_bytes(x.numel())
    decoded = codec.decode(payload, x.numel())
    assert torch.equal(decoded == 0, x == 0) or name not in ("fp32", "bf16")
    assert float((decoded - x).norm()) <= 0.4 * float(x.norm()) + 1e-9
    if name == "fp32":
        assert torch.equal(decoded, x)
    if share < 0.2 and rows > 30 and width > 4:
        assert payload.numel() < 0.6 * codec.inner.wire_bytes(x.numel()) + 64
    with pytest.raises(ValueError, match="payload|row|elements|size"):
        codec.decode(payload[:-1], x.numel())


def test_rows_from_outside_are_refused() -> None:
    x = touched(1, 10, 3, 0.5)
    codec = TouchedRows(FP32, ((7, 10, 3), (40, 10, 3)))
    payload = codec.encode(x)
    payload[8:12] = torch.tensor([200, 0, 0, 0], dtype=torch.uint8)
    with pytest.raises(ValueError, match="outside"):
        codec.decode(payload, x.numel())


def test_compression_is_what_the_docs_say() -> None:
    n = 11_200_000
    ratio = {name: 4 * n / codec_of(name).wire_bytes(n) for name in CODECS}
    assert ratio["int8"] == pytest.approx(3.98, abs=0.01)
    assert ratio["int4"] == ratio["e3m0"] == pytest.approx(7.76, abs=0.01)
    assert ratio["sparseloco"] == pytest.approx(146.3, abs=0.1)
    assert ratio["topk"] == pytest.approx(66.7, abs=0.1)


def test_auto_can_change_from_update_to_update() -> None:
    codec, x = Several([codec_of("bf16"), codec_of("int8")]), noise(2, 3000)
    payloads = []
    for codec.chosen in (0, 1):
        payloads.append(codec.encode(x))
    assert [payload.numel() for payload in payloads] == [6001, 3013]
    assert all(torch.allclose(codec.decode(payload, 3000), x, atol=0.02) for payload in payloads)


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 12), st.sampled_from(CODECS), st.integers(1, 5000))
def test_decoded_plus_residual_is_produced(seed: int, rounds: int, name: str, n: int) -> None:
    feedback, total, decoded = ErrorFeedback(codec_of(name)), torch.zeros(n), torch.zeros(n)
    for round in range(rounds):
        x = noise(seed + round, n)
        total += x
        payload = feedback.encode(x)
        if round % 3 == 1:  # not merged: given back whole, and sent again
            feedback.give_back(payload, 1.0, n)
        else:
            decoded += feedback.codec.decode(payload, n)
    residual = feedback.residual if feedback.residual is not None else torch.zeros(n)
    assert torch.allclose(decoded + residual, total, atol=1e-4)


@given(SEEDS, st.integers(1, 30), st.floats(0, 0.95))
def test_momentum_correction_conserves_the_velocity(seed: int, rounds: int, momentum: float) -> None:
    feedback = MomentumCorrection(TopK(0.01), momentum, warm_up=2)
    decoded, velocities, velocity = torch.zeros(400), torch.zeros(400), torch.zeros(400)
    for round in range(rounds):
        x = noise(seed + round, 400)
        velocity = momentum * velocity + x
        velocities += velocity
        payload = feedback.encode(x.clone())
        sent = TopK(0.01).decode(payload, 400)
        decoded += sent
        velocity[sent != 0] = 0
    assert feedback.total is not None
    assert torch.allclose(decoded + feedback.total, velocities, atol=1e-3)


def test_the_share_kept_warms_up() -> None:
    feedback, sizes = MomentumCorrection(TopK(0.001), 0.9, warm_up=1), []
    for round in range(7):
        sizes.append(feedback.encode(noise(round, 10_000)).numel() // 6)
    assert sizes == [2500, 630, 150, 40, 10, 10, 10]


def test_error_control_reaches_what_top_k_alone_leaves_out() -> None:
    """A constant gradient: the sum of what was sent comes to it (EF21's property), and both ends hold the same mirror."""
    feedback, gradient, received = ErrorControl(TopK(0.1), eta=0.1 / 400), noise(5, 100), torch.zeros(100)
    for _ in range(60):
        received += TopK(0.1).decode(feedback.encode(gradient.clone()), 100)
        assert feedback.mirror is not None
        assert torch.allclose(received, feedback.mirror, atol=1e-5)
    assert float((received - gradient).norm()) < 0.05 * float(gradient.norm())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4))
def test_fragments_are_a_partition_of_the_vector(sizes: list[int], buffers: int, turns: int, shards: int) -> None:
    fragments = make_fragments([*sizes, buffers], sum(sizes), turns, [1.0 + s for s in range(shards)])
    assert len(fragments) == turns * shards
    covered = sorted(r for fragment in fragments for r in (*fragment.parameters, *fragment.buffers))
    assert sum(b - a for a, b in covered) == sum(sizes) + buffers
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(covered))
    assert all(b <= sum(sizes) for fragment in fragments for _, b in fragment.parameters)
    left, right = noise(1, sum(sizes) + buffers), noise(2, sum(sizes) + buffers)
    for fragment in fragments:
        ranges = (*fragment.parameters, *fragment.buffers)
        expected = torch.cat([torch.zeros(0), *(left[a:b] - right[a:b] for a, b in ranges)])
        assert torch.equal(fragment.difference(left, right), expected)


def test_turns_are_of_equal_size_and_take_from_all_over() -> None:
    fragments = make_fragments([1000] * 8 + [5000], 13_000, turns=4)
    assert max(f.elements for f in fragments) - min(f.elements for f in fragments) <= 1000
    assert all(f.parameters[-1][1] - f.parameters[0][0] > 5000 for f in fragments)


def parts(vectors: list[Tensor], samples: list[int] | None = None) -> list[Part]:
    return [Part(f"r{i}", (samples or [1] * len(vectors))[i], lambda v=v: v.clone()) for i, v in enumerate(vectors)]


@given(SEEDS, st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_a_mean_is_weighted_by_samples(seed: int, weights: list[int]) -> None:
    vectors = [noise(seed + i) for i in range(len(weights))]
    mean = merge(parts(vectors, weights), "mean").vector
    if sum(weights):
        expected = sum(w * v.double() for w, v in zip(weights, vectors, strict=True)) / sum(weights)
        assert torch.allclose(mean.double(), expected, atol=1e-6)
    else:
        assert torch.equal(mean, torch.zeros(17))


@given(SEEDS, st.sampled_from(["mean", "radial", "norm_clipped", "median", "trimmed", "flag"]), st.integers(1, 6))
def test_all_rules_agree_on_equal_contributions(seed: int, rule: Rule, count: int) -> None:
    x = noise(seed, 50)
    merged = merge(parts([x] * count), rule)
    assert torch.allclose(merged.vector, x, atol=1e-4)
    assert not merged.suspects


def test_a_radial_mean_does_not_shrink() -> None:
    vectors = [noise(i, 10_000) for i in range(8)]
    lengths = {rule: float(merge(parts(vectors), rule).vector.norm()) for rule in ("mean", "radial")}
    assert lengths["radial"] == pytest.approx(100, rel=0.02)
    assert lengths["mean"] == pytest.approx(100 / 8**0.5, rel=0.05)


@pytest.mark.parametrize("rule", ["norm_clipped", "median", "trimmed", "flag"])
@pytest.mark.parametrize("sick", [lambda x: x * torch.nan, lambda x: -x, lambda x: 1000 * x], ids=["nan", "sign", "scale"])
def test_one_bad_contribution_of_five_hardly_moves_the_merge_and_is_named(rule: Rule, sick: Any) -> None:
    truth = noise(0, 500)
    vectors = [truth + 0.3 * noise(i + 1, 500) for i in range(5)]
    vectors[2] = sick(vectors[2])
    merged = merge(parts(vectors), rule)
    # a flipped sign costs clipping two fifths of the length, and no direction
    assert float(torch.nn.functional.cosine_similarity(merged.vector, truth, dim=0)) > 0.95
    assert 0.4 * float(truth.norm()) < float(merged.vector.norm()) < 1.3 * float(truth.norm())
    assert set(merged.suspects) == {"r2"}


@settings(max_examples=30)
@given(SEEDS, st.floats(0.05, 1.5), st.floats(0, 0.95), st.integers(1, 6), st.booleans())
def test_the_outer_step_is_torchs_sgd(seed: int, lr: float, momentum: float, steps: int, nesterov: bool) -> None:
    parameter = torch.nn.Parameter(noise(seed))
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)
    theta, buffer = noise(seed), torch.zeros(17) if momentum else None
    for step in range(steps):
        gradient = noise(seed + 100 + step)
        parameter.grad = gradient.clone()
        optimizer.step()
        outer_step(theta, gradient, buffer, Outer(lr, momentum, nesterov))
    assert torch.allclose(theta, parameter.data, atol=1e-5)


def test_momentum_is_clipped() -> None:
    theta, buffer = torch.zeros(3), torch.zeros(3)
    outer_step(theta, torch.tensor([5.0, -5.0, 0.1]), buffer, Outer(1.0, 0.9, nesterov=False, clip=0.5))
    assert torch.allclose(theta, torch.tensor([-0.5, 0.5, -0.1]))


def merge_round(replicas: list[MergeReplica], samples: list[int], round: int = 0) -> None:
    for fragment in range(replicas[0].strategy.fragments):
        updates = [Update(Kind.CONTRIBUTION, 0, str(i), round, fragment, n) for i, n in enumerate(samples)]
        merged = Update(Kind.MERGED, 0, "0", round, fragment)
        payload, _ = replicas[0].merge(
            merged, [(update, replica.produce(update)) for update, replica in zip(updates, replicas, strict=True)]
        )
        for replica in replicas:
            replica.apply(merged, payload, 1.0)


def replicas(rule: Merging, n: int = 3, buffers: int = 3, codec: Codec | None = None) -> list[MergeReplica]:
    return [MergeReplica(noise(0, 12), 12 - buffers, Coding(codec or FP32), rule) for _ in range(n)]


@given(SEEDS, st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_ma_is_diloco_with_outer_lr_1_and_momentum_0(seed: int, samples: list[int]) -> None:
    group = replicas(Merging(every=1, outer=Outer(lr=1.0, momentum=0.0)))
    for round in range(4):
        for i, replica in enumerate(group):
            replica.local += noise(seed + 10 * round + i, 12)
        expected = sum(n * replica.local for n, replica in zip(samples, group, strict=True)) / sum(samples)
        merge_round(group, samples)
        assert torch.allclose(group[0].local, expected, atol=1e-5)


@given(SEEDS, st.sampled_from(CODECS))
def test_after_a_merge_all_regions_are_equal_to_the_bit(seed: int, name: str) -> None:
    group = replicas(Merging(every=1, outer=DILOCO), codec=codec_of(name))
    for round in range(4):
        for i, replica in enumerate(group):
            replica.local += noise(seed + 10 * round + i, 12)
        merge_round(group, [1, 2, 3])
        assert all(torch.equal(replica.local, group[0].local) for replica in group)


def test_a_stale_merge_that_turns_counts_less() -> None:
    steps = []
    for sign in (1, -1):
        group = replicas(Merging(every=1, tau=None, penalty=1.0), n=2, buffers=0)
        for round in range(2):
            before = group[0].theta.clone()
            for replica in group:
                replica.local.copy_(replica.theta - (1.0 if round == 0 else sign))
            merge_round(group, [1, 1], round)
        steps.append(float((group[0].theta - before).norm()))
    assert steps[1] == pytest.approx(steps[0] / 2, rel=1e-4)


def test_buffers_are_averaged_and_never_see_momentum() -> None:
    group = replicas(Merging(every=1, outer=DILOCO), n=2, buffers=3)
    for round in range(3):
        for i, replica in enumerate(group):
            replica.local[9:] = float(round + i)
        merge_round(group, [1, 1])
        assert torch.allclose(group[0].local[9:], torch.full((3,), round + 0.5))


@pytest.mark.parametrize("name", ["e3m0", "sparseloco", "topk"])
def test_buffers_are_exact_whatever_the_codec(name: str) -> None:
    group = replicas(Merging(every=1), n=2, buffers=3, codec=codec_of(name))
    for round in range(3):
        for i, replica in enumerate(group):
            replica.local[:9] += 100.0 * noise(round + 7 * i, 9)
            replica.local[9:] = torch.tensor([1e-4, 1.0, 5000.0]) * (round + i + 1)
        merge_round(group, [1, 1])
        assert torch.allclose(group[0].local[9:], torch.tensor([1e-4, 1.0, 5000.0]) * (round + 1.5), rtol=1e-3)


Inner = Callable[[int, int, Tensor], Tensor]
"""(region, round, where it begins) -> what it moves by"""


def delayed(group: list[MergeReplica], samples: list[int], rounds: int, inner: Inner) -> list[list[Tensor]]:
    """Rounds of which each merge is applied after the contribution to the next. Returns what each region moved by in each round."""
    moved: list[list[Tensor]] = []
    waiting: list[tuple[Update, Tensor]] = []
    for round in range(rounds):
        contributions, moves = [], []
        for i, (replica, n) in enumerate(zip(group, samples, strict=True)):
            moves.append(inner(i, round, replica.local))
            replica.local += moves[-1]
            update = Update(Kind.CONTRIBUTION, 0, str(i), round, 0, n)
            contributions.append((update, replica.produce(update)))
        merged = Update(Kind.MERGED, 0, "0", round, 0)
        waiting.append((merged, group[0].merge(merged, contributions)[0]))
        if round:
            older, payload = waiting.pop(0)
            for replica, move in zip(group, moves, strict=True):
                replica.apply(older, payload, 1.0)
                n = replica.parameters
                assert torch.allclose(replica.local[:n], replica.theta[:n] + AHEAD * move[:n], atol=1e-4)
                assert torch.allclose(replica.local[n:], replica.theta[n:] + move[n:], atol=1e-4)
        moved.append(moves)
    for replica in group:
        replica.apply(*waiting[0], 1.0)
        assert torch.equal(replica.local, replica.theta)
    return moved


def delayed_run(seed: int, samples: list[int], rounds: int) -> None:
    group = replicas(Merging(every=1, tau=None), n=len(samples))
    moved = delayed(group, samples, rounds, lambda i, round, local: noise(seed + 10 * round + i, 12))
    mean = [sum(n * move for n, move in zip(samples, moves, strict=True)) / sum(samples) for moves in moved]
    for replica in group:
        assert torch.allclose(replica.theta, noise(0, 12) + sum(mean), atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.5, 1.8])
def test_delayed_merges_are_stable_where_gradient_descent_is(share: float) -> None:
    """Rounds that pull each region a share of the way to where its own data leads, or past it."""
    group = replicas(Merging(every=1, tau=None), buffers=0)
    goals = [noise(100 + i, 12) for i in range(3)]
    delayed(group, [1, 1, 1], 150, lambda i, round, local: share * (goals[i] - local))
    assert torch.allclose(group[0].theta, sum(goals) / 3, atol=1e-2)


@pytest.mark.parametrize("moves", [True, False])
def test_a_replica_says_whether_producing_moves_it(moves: bool) -> None:
    """The other workers of the region then take the leader's parameters."""
    merging = MergeReplica(noise(0, 12), 12, Coding(codec_of("int4")), Merging(every=1, tau=None if moves else 0))
    pushing = DeltaReplica(noise(0, 12), 12, Coding(TopK(0.2), "dgc" if moves else "ef"), 2)
    for replica, kind in ((merging, Kind.CONTRIBUTION), (pushing, Kind.PUSH)):
        replica.local += noise(1, 12)
        before = replica.local.clone()
        replica.produce(Update(kind, 0, "a", 0))
        assert replica.produce_moves == moves == (not torch.equal(replica.local, before))


@given(SEEDS, st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(2, 6))
def test_a_delayed_merge_counts_every_move_once(seed: int, samples: list[int], rounds: int) -> None:
    delayed_run(seed, samples, rounds)


@given(SEEDS, st.integers(2, 4))
def test_deltas_are_conserved_whatever_the_order(seed: int, regions: int) -> None:
    group = [DeltaReplica(noise(0, 10), 10, Coding(FP32), regions) for _ in range(regions)]
    total, mail = noise(0, 10).clone(), []
    for round in range(5):
        for i, replica in enumerate(group):
            step = noise(seed + 10 * round + i, 10)
            replica.local += step
            total += step
            payload = replica.produce(PUSH)
            mail += [(j, payload) for j in range(regions) if j != i]
        if round % 2:
            for j, payload in reversed(mail):
                group[j].apply(PUSH, payload, 1.0)
            mail = []
    for j, payload in mail:
        group[j].apply(PUSH, payload, 1.0)
    for replica in group:
        assert torch.allclose(replica.local, total, atol=1e-4)


def test_a_delta_of_plain_sgd_is_the_gradient_sum_of_asgd_ga() -> None:
    replica = DeltaReplica(torch.zeros(4), 4, Coding(FP32), 2)
    gradients = [noise(i, 4) for i in range(3)]
    for gradient in gradients:
        replica.local -= 0.1 * gradient
    pushed = FP32.decode(replica.produce(PUSH), 4)
    assert torch.allclose(pushed, -0.1 * sum(gradients, torch.zeros(4)), atol=1e-6)


def test_mixing_moves_by_the_weight() -> None:
    replica = MixReplica(torch.zeros(3), Coding(FP32))
    replica.apply(PUSH, FP32.encode(torch.ones(3)), 0.25)
    assert torch.equal(replica.local, torch.full((3,), 0.25))


def test_older_replicas_weigh_less() -> None:
    assert [discount(s) for s in (0, 3, 8)] == [1.0, 0.5, 1 / 3]
