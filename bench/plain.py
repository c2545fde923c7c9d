"""The loop that anyone would write: python -m bench.plain JOB trains on the job's first region and prints {seconds, samples}.

The batches are those that geotrain takes: the same leases in the same order, read into memory beforehand. With `--ready` they are
tensors beforehand too; without it the loop makes its tensors, as a script does that has no other thread for it.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from geotrain.data.batches import Reader, record_batches
from geotrain.data.inventory import take_inventory
from geotrain.data.leases import LeaseBook
from geotrain.job import JobSpec, load_job
from geotrain.task import TrainingTask, load_task


def rows_of(job: JobSpec, task: TrainingTask, epoch: int) -> list[Any]:
    region = job.regions[0]
    found = take_inventory(region, region.data.train, task.columns)
    book = LeaseBook(found.row_groups(), seed=job.train.seed, epoch=epoch, workers=1, mix=job.train.mix_row_groups)
    return list(record_batches(book, 0, job.train.batch_size, Reader(region, list(task.columns)).read))


def main() -> None:
    job = load_job(sys.argv[1], json.loads(sys.argv[2]))
    task = load_task("here", job.task, job.task_args)
    torch.set_num_threads(job.train.threads)
    torch.manual_seed(job.train.seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    model.train()
    epochs = [rows_of(job, task, epoch) for epoch in range(int(job.train.epochs or 1))]
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
