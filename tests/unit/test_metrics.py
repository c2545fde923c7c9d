from hypothesis import given
from hypothesis import strategies as st

from geotrain.metrics import add_sums, means

ROWS = st.lists(st.integers(0, 1), min_size=1, max_size=30)


@given(ROWS, st.integers(1, 29))
def test_metrics_of_parts_are_the_metric_of_the_whole(rows: list[int], cut: int) -> None:
    parts = [{"accuracy": (float(sum(part)), float(len(part)))} for part in (rows[:cut], rows[cut:])]
    assert means(add_sums(parts)) == {"accuracy": sum(rows) / len(rows)}


def test_a_metric_that_nobody_counted_is_left_out() -> None:
    assert means({"a": (0.0, 0.0), "b": (1.0, 2.0)}) == {"b": 0.5}
