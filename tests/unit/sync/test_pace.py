from hypothesis import given
from hypothesis import strategies as st

from geotrain.sync.pace import Pace, rounds_per_epoch


@given(st.integers(1, 50), st.lists(st.integers(0, 500), min_size=1, max_size=4))
def test_an_epochs_rounds_add_up_to_its_steps(rounds: int, steps: list[int]) -> None:
    pace = Pace(rounds, lambda epoch: steps[epoch])
    for epoch, total in enumerate(steps):
        made = [pace.steps(epoch * rounds + i) for i in range(rounds)]
        assert sum(made) == total
        assert max(made) - min(made) <= 1


@given(st.integers(1, 1000), st.integers(1, 64))
def test_the_busiest_region_makes_at_most_h_steps_a_round(steps: int, every: int) -> None:
    pace = Pace(rounds_per_epoch(steps, every), lambda epoch: steps)
    assert max(pace.steps(round) for round in range(pace.rounds_per_epoch)) <= every
