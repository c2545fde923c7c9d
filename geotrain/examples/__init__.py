"""Tasks that ship, each with the data it learns from: digits (LeNet), images (ResNet), clicks (DeepFM), text (GPT).

In each module stand the task and `make`, which writes the data of any number of regions as Parquet.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, assert_never

ExampleName = Literal["digits", "images", "clicks", "text"]
Make = Callable[..., dict[str, int]]
"""make(out, regions, skew=, rows=, seed=) -> region -> rows of training data written."""

CITIES = ("tokyo", "frankfurt", "virginia", "saopaulo", "mumbai", "sydney", "paris", "oregon")


def region_names(regions: int) -> tuple[str, ...]:
    """Names for so many regions."""
    return tuple(CITIES[i] if i < len(CITIES) else f"region-{i + 1}" for i in range(regions))


def make_example(name: ExampleName, out: Path, regions: Sequence[str], *, skew: float, rows: int | None, seed: int) -> dict[str, int]:
    """Write an example's data, `out/<region>/{train,eval}/*.parquet`; returns training rows per region."""
    match name:
        case "digits":
            from geotrain.examples import digits as example
        case "images":
            from geotrain.examples import images as example  # type: ignore[no-redef]
        case "clicks":
            from geotrain.examples import clicks as example  # type: ignore[no-redef]
        case "text":
            from geotrain.examples import text as example  # type: ignore[no-redef]
        case _:
            assert_never(name)
    return example.make(out, regions, skew=skew, rows=rows, seed=seed)
