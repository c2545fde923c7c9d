"""The loop that anyone would write: python -m bench.plain JOB trains on the job's first region and prints {seconds, samples}.

The batches are those that geotrain takes: the same leases in the same order, read into memory beforehand. With `--ready` they are
tensors beforehand too; without it the loop makes its tensors, as a script does that has no other thread for it.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import torch

from geotrain.data.batches import Reader, record_batches
from geotrain.data.inventory import take_inventory
from geotrain.data.leases import LeaseBook
from geotrain.job import JobSpec, RegionSpec, load_job
from geotrain.task import TrainingTask, load_task


def epochs_of(
    job: JobSpec, task: TrainingTask, regions: Sequence[RegionSpec], worker: int = 0, workers: int = 1
) -> Callable[[int], list[pa.RecordBatch]]:
    """Epoch -> the batches of one worker of so many that share the rows of these regions; the files are read once."""
    groups = [group for region in regions for group in take_inventory(region, region.data.train, task.columns).row_groups()]
    read = functools.cache(Reader(regions[0], list(task.columns)).read)

    def batches(epoch: int) -> list[pa.RecordBatch]:
        book = LeaseBook(groups, seed=job.train.seed, epoch=epoch, workers=workers, mix=job.train.mix_row_groups)
        return list(record_batches(book, worker, job.train.batch_size, read))

    return batches


def main() -> None:
    job = load_job(sys.argv[1], json.loads(sys.argv[2]))
    task = load_task("here", job.task, job.task_args)
    torch.set_num_threads(job.train.threads)
    torch.manual_seed(job.train.seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    model.train()
    rows_of = epochs_of(job, task, job.regions[:1])
    epochs: list[list[Any]] = [[*rows_of(epoch)] for epoch in range(int(job.train.epochs or 1))]
    make: Callable[[Any], Any] = task.batch
    if "--ready" in sys.argv:
        epochs, make = [[task.batch(rows) for rows in epoch] for epoch in epochs], lambda batch: batch
    samples = 0
    began = time.monotonic()
    for epoch in epochs:
        for item in epoch:
            batch = make(item)
            optimizer.zero_grad(set_to_none=True)
            task.loss(model, batch).backward()
            optimizer.step()
            samples += len(batch if isinstance(batch, torch.Tensor) else batch[0])
    print(json.dumps({"seconds": time.monotonic() - began, "samples": samples}))


if __name__ == "__main__":
    main()
