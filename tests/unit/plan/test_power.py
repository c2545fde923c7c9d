from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geotrain.plan.power import Offer, allocations, cheapest, compute, efficiency, everything, load_power, usd_per_hour

OFFERS = st.lists(st.builds(Offer, st.just("k"), st.integers(1, 4), st.floats(0.1, 5), st.floats(1, 100)), min_size=1, max_size=3)


@given(OFFERS, st.integers(1, 1000), st.floats(0.001, 1))
def test_the_cheapest_allocation_is_found_exactly(offers: list[Offer], rows: int, target: float) -> None:
    chosen = cheapest(offers, rows, target, 0.05)
    reach = [a for a in product(*(range(o.count + 1) for o in offers)) if load_power(compute(offers, a, 0.05), rows) >= target]
    if reach:
        assert usd_per_hour(offers, chosen) == min(usd_per_hour(offers, a) for a in reach)
        assert load_power(compute(offers, chosen, 0.05), rows) >= target
    else:
        assert chosen == everything(offers)


@given(OFFERS)
def test_nobody_is_left_without_a_worker(offers: list[Offer]) -> None:
    assert all(sum(allocation) >= 1 for allocation in allocations(offers))


def test_efficiency_falls_with_workers() -> None:
    assert efficiency(1, 0.05) == 1.0
    assert efficiency(3, 0.05) == pytest.approx(1 / 1.1)
