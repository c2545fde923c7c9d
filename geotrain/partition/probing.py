"""Before a run is planned: what data a region has, and how fast one of its workers is on the task."""

import itertools
import time
import zlib
from dataclasses import replace

from torch import Tensor

from geotrain import checkpoint
from geotrain.data.batches import record_batches
from geotrain.data.inventory import Inventory, take_inventory
from geotrain.data.leases import LeaseBook
from geotrain.job import JobSpec
from geotrain.partition.building import make_trainer
from geotrain.partition.flat import FlatModel
from geotrain.partition.orders import Probed
from geotrain.sync.codec import FP32
from geotrain.sync.feedback import coding_of
from geotrain.sync.messages import Kind, Update
from geotrain.sync.replica import replica_of
from geotrain.sync.sparse import TouchedRows
from geotrain.sync.strategy import Merging, Pushing, provisional, strategy_of
from geotrain.task import load_task

PROBE_S = 1.0


def survey(job: JobSpec, region: str) -> tuple[Inventory, Inventory | None]:
    """On any worker of a region: what data it has, for training and held out."""
    spec = job.region(region)
    task = load_task(region, job.task, job.task_args)
    label = getattr(task, "label", None)
    train = take_inventory(spec, spec.data.train, task.columns, label)
    return train, take_inventory(spec, spec.data.eval, task.columns, label) if spec.data.eval else None


def probe(job: JobSpec, region: str, train: Inventory, output: str) -> Probed:
    """On one worker of a region: a second of training on its own rows, thrown away. Finds what is wrong before it costs."""
    checkpoint.write_bytes(f"region {region}", checkpoint.join(output, ".writable", region), b"")
    trainer = make_trainer(job, region, train, 0, 1, None)
    book = LeaseBook(train.row_groups()[: job.train.mix_row_groups], seed=0, epoch=0, workers=1, mix=job.train.mix_row_groups)
    batches = record_batches(book, 0, job.train.batch_size, trainer.rows.reader.read)
    first = next(batches)
    trainer.learn(trainer.rows.to_batch(first), 1.0).item()  # the first step is slower than those that follow
    before, every = trainer.flat.vector.to("cpu", copy=True), provisional(job.sync).every
    rows, touched, began = 0, before, time.monotonic()
    for steps, batch in enumerate(itertools.chain(batches, itertools.repeat(first)), 1):
        rows += batch.num_rows
        trainer.learn(trainer.rows.to_batch(batch), 1.0).item()
        if steps <= every and job.sync.sparse_embeddings:
            touched = trainer.flat.vector.cpu() - before
        if (seconds := time.monotonic() - began) > PROBE_S:
            break
    payload = payload_bytes(job, trainer.flat.vector.numel(), trainer.flat.parameters)
    if isinstance(sparse := coding_of(job.sync, trainer.flat.tables).codec, TouchedRows):
        payload = sparse.measure(touched)
    full = FP32.wire_bytes(trainer.flat.vector.numel())
    return Probed(region, rows / seconds, payload, full, work_seconds(job, trainer.flat), str(trainer.flat.vector.device))


def work_seconds(job: JobSpec, flat: FlatModel) -> float:
    """What one transfer of a whole update takes beside the wire: produced, checked at both ends, applied. Spoils the replica.

    A merge is two transfers: what is contributed, and what comes back.
    """
    strategy = strategy_of(job.sync, len(job.regions))
    if isinstance(strategy, Merging):
        strategy = replace(strategy, turns=1, shards=1, quorum=None)
    replica = replica_of(strategy, flat.vector, flat.parameters, coding_of(job.sync, flat.tables), len(job.regions))
    seconds: list[float] = []
    while len(seconds) < 2 or (sum(seconds) < PROBE_S and len(seconds) < 10):  # the first takes fresh memory
        began = time.monotonic()
        transfers, kind = (2, Kind.CONTRIBUTION) if isinstance(strategy, Merging) else (1, Kind.PUSH)
        update = Update(kind, 0, "", len(seconds), samples=1)
        payload = _checked(replica.produce(update))
        if isinstance(strategy, Merging):
            payload = _checked(replica.merge(replace(update, kind=Kind.MERGED), [(update, payload)])[0])
        replica.apply(update, payload, 1.0)
        seconds.append((time.monotonic() - began) / transfers)
    return min(seconds)


def _checked(payload: Tensor) -> Tensor:
    """As a transport does it at both ends."""
    zlib.crc32(payload.numpy().data)
    arrived = payload.clone()
    zlib.crc32(arrived.numpy().data)
    return arrived


def payload_bytes(job: JobSpec, elements: int, parameters: int) -> int:
    """One update of a whole model, encoded."""
    codec, strategy = coding_of(job.sync).codec, strategy_of(job.sync, len(job.regions))
    if isinstance(strategy, Pushing) and strategy.sends == "parameters":
        return codec.wire_bytes(elements)
    return codec.wire_bytes(parameters) + FP32.wire_bytes(elements - parameters)
