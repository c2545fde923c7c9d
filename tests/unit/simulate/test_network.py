import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geotrain.errors import JobError
from geotrain.job import LinkSpec
from geotrain.simulate.network import DUPLEX, HEADER_BYTES, Link, Network, read_trace


def network(spec: LinkSpec, **more: object) -> Network:
    return Network(lambda source, target: spec, random.Random(0), **more)  # type: ignore[arg-type]


def test_a_transfer_takes_its_bytes_at_the_rate_and_half_a_round_trip() -> None:
    arrival = network(LinkSpec(mbit_per_s=100, rtt_ms=30)).send("a", "b", 45_000_000 - HEADER_BYTES, 1.0)
    assert arrival == pytest.approx(1.0 + 3.6 + 0.015)


def test_updates_on_a_link_go_one_after_the_other_and_links_do_not_wait_for_each_other() -> None:
    net = network(LinkSpec(mbit_per_s=8, rtt_ms=100))
    first, second, other = (net.send(*way, 1_000_000 - HEADER_BYTES, 0.0) for way in (("a", "b"), ("a", "b"), ("b", "c")))
    assert (first, other) == (pytest.approx(1.05), pytest.approx(1.05))
    assert second == pytest.approx(2.05), "it follows the first at once"


def test_both_directions_of_a_pair_lose_a_little_while_both_are_busy() -> None:
    net = network(LinkSpec(mbit_per_s=8, rtt_ms=0))
    net.send("a", "b", 1_000_000 - HEADER_BYTES, 0.0)
    assert net.send("b", "a", 2_000_000 - HEADER_BYTES, 0.5) == pytest.approx(2.5 + 0.5 * (1 / DUPLEX - 1))


@given(st.floats(0, 50), st.floats(0.1, 100), st.lists(st.tuples(st.floats(0.1, 10), st.sampled_from([0, 1, 5, 50])), max_size=5))
def test_what_a_trace_carries_adds_up(start: float, megabits: float, steps: list[tuple[float, float]]) -> None:
    """The integral of the rate from start to finish is what was sent."""
    trace, at = [], 0.0
    for length, rate in steps:
        at += length
        trace.append((at, rate))
    link = Link(LinkSpec(mbit_per_s=10), trace)
    end = link.finish(start, megabits * 1e6 / 8)
    if math.isinf(end):
        assert trace[-1][1] == 0
        return
    edges = [(-1.0, 10.0), *trace, (math.inf, 0.0)]
    carried = sum(rate * max(0.0, min(end, b) - max(start, a)) for (a, rate), (b, _) in itertools.pairwise(edges))
    assert carried == pytest.approx(megabits, rel=1e-6)


def test_loss_costs_bytes_and_a_round_trip() -> None:
    clean, lossy = (network(LinkSpec(mbit_per_s=10, rtt_ms=200, loss=loss)) for loss in (0.0, 0.2))
    assert lossy.send("a", "b", 10**6, 0.0) == pytest.approx(clean.send("a", "b", 10**6, 0.0) / 0.8 + 0.2, abs=0.05)


def test_jitter_never_changes_the_order() -> None:
    net = network(LinkSpec(mbit_per_s=1000, rtt_ms=10, jitter_ms=50))
    arrivals = [net.send("a", "b", 100, 0.001 * i) for i in range(200)]
    assert arrivals == sorted(arrivals)


def test_a_trace_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("seconds,link,mbit_per_s\n10,a>b,20\n0,a>b,100\n5,all,0\n")
    assert read_trace(str(file)) == {"a>b": [(0.0, 100.0), (10.0, 20.0)], "all": [(5.0, 0.0)]}
    file.write_text("seconds,link,mbit_per_s\n10,a>b,fast\n")
    with pytest.raises(JobError, match="line 2"):
        read_trace(str(file))
    with pytest.raises(JobError, match="cannot read"):
        read_trace(str(tmp_path / "absent.csv"))
