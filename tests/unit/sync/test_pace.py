from hypothesis import given
from hypothesis import strategies as st

from geotrain.sync.messages import SegmentBegins, StepDone, View
from geotrain.sync.pace import Pace, balanced, compass, rounds_per_epoch
from geotrain.sync.progress import Progress


def progress(rounds: int, steps: list[int]) -> Progress:
    at = Progress("a", View(0, ("a",), ("a",)), Pace(rounds, lambda epoch: steps[epoch % len(steps)]))
    at.begin_segment(SegmentBegins(10**6, 0.0))
    at.held = False
    return at


def make(at: Progress, steps: int) -> int:
    if steps:
        at.count(StepDone(1, 0.0, steps))
    at.close_round(0.0)
    return steps


@given(st.integers(1, 50), st.lists(st.integers(0, 500), min_size=1, max_size=4))
def test_an_epochs_rounds_add_up_to_its_steps(rounds: int, steps: list[int]) -> None:
    at = progress(rounds, steps)
    for total in steps:
        made = [make(at, at.quota) for _ in range(rounds)]
        assert sum(made) == total
        assert max(made) - min(made) <= 1


@given(st.integers(1, 1000), st.integers(1, 64))
def test_the_busiest_region_makes_at_most_h_steps_a_round(steps: int, every: int) -> None:
    at = progress(rounds_per_epoch(steps, every), [steps])
    assert max(make(at, at.quota) for _ in range(at.pace.rounds_per_epoch)) <= every


@given(st.integers(1, 20), st.lists(st.integers(0, 100), min_size=3, max_size=3), st.data())
def test_steps_missed_in_rounds_cut_short_are_made_up(rounds: int, steps: list[int], data: st.DataObject) -> None:
    at, made = progress(rounds, steps), 0
    for number in range(2 * rounds):
        missed = data.draw(st.integers(0, at.quota)) if number < 2 * rounds - 1 else 0
        made += make(at, at.quota - missed)
    assert made == steps[0] + steps[1]


def test_balanced_regions_end_a_round_together() -> None:
    assert balanced({"fast": 0.1, "half": 0.2, "slow": 0.5}, 10) == {"fast": 10, "half": 5, "slow": 2}


def test_groups_by_fedcompass() -> None:
    """Fast opens a group due at 2.0 s; half fits 10 steps of 0.2 s in it, slow 4; crawling fits none and opens its own."""
    assert compass({"fast": 0.1, "half": 0.2, "slow": 0.5, "crawling": 3.0}, 20) == {"fast": 20, "half": 10, "slow": 4, "crawling": 20}
