"""Laws of codecs, merges, outer steps and replicas."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geotrain.sync.codec import Cast, ErrorFeedback, codec_of
from geotrain.sync.merge import nesterov_step, weighted_mean
from geotrain.sync.messages import Kind, Update
from geotrain.sync.replica import DeltaReplica, MergeReplica, MixReplica
from geotrain.sync.strategy import Merging, discount

SEEDS = st.integers(0, 10**6)


def noise(seed: int, n: int = 17) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@given(SEEDS)
def test_fp32_is_exact_and_bf16_is_close(seed: int) -> None:
    x = noise(seed)
    assert torch.equal(codec_of("fp32").decode(codec_of("fp32").encode(x), 17), x)
    assert torch.allclose(codec_of("bf16").decode(codec_of("bf16").encode(x), 17), x, rtol=2**-8)


@given(SEEDS, st.integers(1, 30))
def test_decoded_plus_residual_is_produced(seed: int, rounds: int) -> None:
    feedback, total, decoded = ErrorFeedback(codec_of("bf16")), torch.zeros(17), torch.zeros(17)
    for round in range(rounds):
        x = noise(seed + round)
        total += x
        decoded += feedback.codec.decode(feedback.encode(x), 17)
    assert feedback.residual is not None
    assert torch.allclose(decoded + feedback.residual, total, atol=1e-5)


@given(SEEDS, st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_a_mean_is_weighted_by_samples(seed: int, weights: list[int]) -> None:
    vectors = [noise(seed + i) for i in range(len(weights))]
    mean = weighted_mean(vectors, weights)
    if sum(weights):
        expected = sum(w * v.double() for w, v in zip(weights, vectors, strict=True)) / sum(weights)
        assert torch.allclose(mean.double(), expected, atol=1e-6)
    else:
        assert torch.equal(mean, torch.zeros(17))


@settings(max_examples=30)
@given(SEEDS, st.floats(0.05, 1.5), st.floats(0, 0.95), st.integers(1, 6))
def test_the_outer_step_is_torchs_nesterov_sgd(seed: int, lr: float, momentum: float, steps: int) -> None:
    parameter = torch.nn.Parameter(noise(seed))
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=momentum > 0)
    theta, buffer = noise(seed), None
    for step in range(steps):
        gradient = noise(seed + 100 + step)
        parameter.grad = gradient.clone()
        optimizer.step()
        buffer = nesterov_step(theta, gradient, buffer, lr, momentum)
    assert torch.allclose(theta, parameter.data, atol=1e-5)


def merge_round(replicas: list[MergeReplica], samples: list[int]) -> None:
    updates = [Update(Kind.CONTRIBUTION, 0, str(i), 0, samples=n) for i, n in enumerate(samples)]
    merged = replicas[0].merge([(update, replica.produce()) for update, replica in zip(updates, replicas, strict=True)])
    for replica in replicas:
        replica.apply(merged, 1.0)


def replicas(rule: Merging, n: int = 3, buffers: int = 3, codec: Cast | None = None) -> list[MergeReplica]:
    return [MergeReplica(noise(0, 12), 12 - buffers, codec or Cast(torch.float32), rule) for _ in range(n)]


@given(SEEDS, st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_ma_is_diloco_with_outer_lr_1_and_momentum_0(seed: int, samples: list[int]) -> None:
    group = replicas(Merging(every=1, outer_lr=1.0, outer_momentum=0.0))
    for round in range(4):
        for i, replica in enumerate(group):
            replica.local += noise(seed + 10 * round + i, 12)
        expected = sum(n * replica.local for n, replica in zip(samples, group, strict=True)) / sum(samples)
        merge_round(group, samples)
        assert torch.allclose(group[0].local, expected, atol=1e-5)


@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_after_a_merge_all_regions_are_equal_to_the_bit(seed: int, dtype: torch.dtype) -> None:
    group = replicas(Merging(every=1, outer_lr=0.7, outer_momentum=0.9), codec=Cast(dtype))
    for round in range(4):
        for i, replica in enumerate(group):
            replica.local += noise(seed + 10 * round + i, 12)
        merge_round(group, [1, 2, 3])
        assert all(torch.equal(replica.local, group[0].local) for replica in group)


def test_buffers_are_averaged_and_never_see_momentum() -> None:
    group = replicas(Merging(every=1, outer_lr=0.7, outer_momentum=0.9), n=2, buffers=3)
    for round in range(3):
        for i, replica in enumerate(group):
            replica.local[9:] = float(round + i)
        merge_round(group, [1, 1])
        assert torch.allclose(group[0].local[9:], torch.full((3,), round + 0.5))


@given(SEEDS, st.integers(2, 4))
def test_deltas_are_conserved_whatever_the_order(seed: int, regions: int) -> None:
    group = [DeltaReplica(noise(0, 10), 10, Cast(torch.float32), regions) for _ in range(regions)]
    total, mail = noise(0, 10).clone(), []
    for round in range(5):
        for i, replica in enumerate(group):
            step = noise(seed + 10 * round + i, 10)
            replica.local += step
            total += step
            payload = replica.produce()
            mail += [(j, payload) for j in range(regions) if j != i]
        if round % 2:
            for j, payload in reversed(mail):
                group[j].apply(payload, 1.0)
            mail = []
    for j, payload in mail:
        group[j].apply(payload, 1.0)
    for replica in group:
        assert torch.allclose(replica.local, total, atol=1e-4)


def test_a_delta_of_plain_sgd_is_the_gradient_sum_of_asgd_ga() -> None:
    replica = DeltaReplica(torch.zeros(4), 4, Cast(torch.float32), 2)
    gradients = [noise(i, 4) for i in range(3)]
    for gradient in gradients:
        replica.local -= 0.1 * gradient
    pushed = Cast(torch.float32).decode(replica.produce(), 4)
    assert torch.allclose(pushed, -0.1 * sum(gradients, torch.zeros(4)), atol=1e-6)


def test_mixing_moves_by_the_weight() -> None:
    replica = MixReplica(torch.zeros(3), Cast(torch.float32))
    replica.apply(Cast(torch.float32).encode(torch.ones(3)), 0.25)
    assert torch.equal(replica.local, torch.full((3,), 0.25))


def test_older_replicas_weigh_less() -> None:
    assert [discount(s) for s in range(3)] == [1.0, 0.5, 1 / 3]
