"""Held-out metrics as sums and counts, so that those of several regions combine exactly."""

from collections.abc import Iterable, Mapping

Sums = Mapping[str, tuple[float, float]]
"""Metric name -> (sum, count)."""


def add_sums(parts: Iterable[Sums]) -> dict[str, tuple[float, float]]:
    """Sums and counts added metric by metric, in the order given."""
    total: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


def means(sums: Sums) -> dict[str, float]:
    """Each metric's sum divided by its count; a metric that nobody counted is left out."""
    return {name: value / count for name, (value, count) in sums.items() if count}
