"""What a seat is built of: the task's model, its optimizer and rows, and the replica that is exchanged."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from geotrain.data.batches import Reader
from geotrain.data.inventory import Inventory
from geotrain.errors import JobError, TaskFailed
from geotrain.job import JobSpec
from geotrain.partition.flat import FlatModel
from geotrain.partition.group import Alone, Group, Together
from geotrain.partition.memory import keep_freed_memory
from geotrain.partition.trainer import TASK_FAULTS, Rows, Trainer
from geotrain.plan.bits import Bits
from geotrain.sync.feedback import coding_of
from geotrain.sync.fragments import Fragment, make_fragments
from geotrain.sync.replica import AnyReplica, choose_codecs, replica_of
from geotrain.sync.sparse import Table
from geotrain.sync.strategy import Merging, Strategy
from geotrain.task import TrainingTask, load_task


def make_trainer(job: JobSpec, region: str, train: Inventory, rank: int, world: int, rendezvous: str | None) -> Trainer:
    """The task's model, flat, with its optimizer and its rows. Raises TaskImportError, TaskFailed, JobError."""
    keep_freed_memory()
    torch.set_num_threads(job.train.threads)
    task = load_task(region, job.task, job.task_args)
    torch.manual_seed(job.train.seed)
    try:
        flat = FlatModel(task.model(), device_of(job, region))
        if world > 1:
            flat.flatten_gradients()
        optimizer = task.optimizer([p for p in flat.model.parameters() if p.requires_grad])
    except TASK_FAULTS as error:
        raise TaskFailed(region, "model or optimizer", f"{type(error).__name__}: {error}") from error
    check_tables(job, flat.tables)
    group: Group = Alone()
    if rendezvous:
        gpus = getattr(job.region(region).cluster, "gpus", ())
        group = Together(rendezvous, rank, world, flat.vector.device, shared_device=len(set(gpus)) < len(gpus))
    reader = Reader(job.region(region), list(task.columns))
    rows = Rows(train.row_groups(), reader, job.train, rank, world, to_batch=batch_maker(region, task))
    flat.model.train()
    return Trainer(region, task, flat, optimizer, group, rows, job.train.precision, job.train.seed)


def check_tables(job: JobSpec, tables: Sequence[Table]) -> None:
    """Raises JobError where the job wants rows of embedding tables sent, and the model has no table."""
    if job.sync.sparse_embeddings and not tables:
        raise JobError("sync.sparse_embeddings: the model has no nn.Embedding, so every number would be sent: leave the key out")


def batch_maker(region: str, task: TrainingTask) -> Callable[[Any], Any]:
    """task.batch, whose failures name the region."""

    def to_batch(rows: Any) -> Any:
        try:
            return task.batch(rows)
        except TASK_FAULTS as error:
            raise TaskFailed(region, "batch", f"{type(error).__name__}: {error}") from error

    return to_batch


def seat_replica(job: JobSpec, flat: FlatModel, strategy: Strategy, shares: Sequence[float], bits: Bits | None) -> AnyReplica:
    """The replica of a model, cut into the strategy's fragments, with the codecs that the plan chose."""
    fragments: tuple[Fragment, ...] = ()
    if isinstance(strategy, Merging):
        sizes = [slot.stop - slot.start for slot in flat.slots]
        fragments = make_fragments(sizes, flat.parameters, strategy.turns, shares)
    replica = replica_of(strategy, flat.vector, flat.parameters, coding_of(job.sync, flat.tables), len(job.regions), fragments)
    if bits is not None:
        choose_codecs(replica, bits.up, bits.down)
    return replica


def device_of(job: JobSpec, region: str) -> torch.device:
    """CUDA where the region names a device that is not a CPU and this worker sees one."""
    wants_gpu = any(device.kind != "cpu" for device in job.region(region).devices)
    return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")
