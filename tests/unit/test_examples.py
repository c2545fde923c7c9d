"""Every example makes data that its own task learns from."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from geotrain.examples import make_example, region_names
from geotrain.examples.parquet import assign
from geotrain.starter import init
from geotrain.task import TrainingTask, load_task

TASKS = {
    "digits": ("geotrain.examples.digits:Digits", {"lr": 0.05, "momentum": 0.9}, 200),
    "images": ("geotrain.examples.images:Images", {"width": 4, "side": 16}, 120),
    "clicks": ("geotrain.examples.clicks:Clicks", {}, 2000),
    "text": ("geotrain.examples.text:Text", {"layers": 1, "width": 32, "heads": 2}, 200),
}


def losses(task: TrainingTask, rows: object, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    batch, seen = task.batch(rows), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("name", TASKS)
def test_an_example_learns_from_its_own_data(tmp_path: Path, name: str) -> None:
    path, args, rows = TASKS[name]
    written = make_example(name, tmp_path, region_names(2), skew=0.5, rows=rows, seed=0)  # type: ignore[arg-type]
    assert set(written) == {"tokyo", "frankfurt"}
    task = load_task("here", path, args)
    table = pq.read_table(tmp_path / "tokyo" / "train", columns=list(task.columns))
    assert table.num_rows == written["tokyo"] > 0
    batch = table.slice(0, 32).combine_chunks().to_batches()[0]
    seen = losses(task, batch, 60)
    assert seen[-1] < 0.95 * seen[0], seen
    model = task.model().eval()
    for value, number in task.evaluate(model, task.batch(batch)).values():
        assert value == value
        assert number >= 32


@pytest.mark.parametrize("name", ["digits", "clicks"])
def test_the_same_seed_makes_the_same_data(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        make_example(name, tmp_path / folder, region_names(2), skew=0.7, rows=300, seed=4)  # type: ignore[arg-type]
    assert pq.read_table(tmp_path / "one/tokyo/train").equals(pq.read_table(tmp_path / "two/tokyo/train"))


def test_skew_goes_from_even_to_apart() -> None:
    import numpy as np

    classes = np.arange(9000) % 9
    even = np.bincount(assign(classes, 3, 0.0, np.random.default_rng(0))[classes == 0], minlength=3)
    apart = assign(classes, 3, 1.0, np.random.default_rng(0))
    assert even.min() > 250
    assert (apart == classes % 3).all()


def test_a_new_folder_is_filled_and_never_overwritten(tmp_path: Path) -> None:
    from geotrain.errors import JobError

    files = init(tmp_path / "mine")
    assert {file.name for file in files} >= {"task.py", "job.yaml"}
    with pytest.raises(JobError, match="exists already"):
        init(tmp_path / "mine")
