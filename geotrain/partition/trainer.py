"""The training loop of one worker: inner steps, and what the leader says after each."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geotrain.data.batches import Prefetched, Reader, record_batches
from geotrain.data.inventory import Inventory, RowGroup
from geotrain.data.leases import LeaseBook
from geotrain.errors import GeotrainError, NonFiniteLoss, TaskFailed
from geotrain.job import TrainSpec
from geotrain.metrics import add_sums
from geotrain.partition.flat import FlatModel
from geotrain.partition.group import Directive, Group
from geotrain.partition.server import ParameterServer
from geotrain.task import TrainingTask

TASK_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What somebody else's model code raises when it is wrong."""


@dataclass
class Rows:
    """The rows of this region, epoch by epoch, as this worker sees them."""

    groups: tuple[RowGroup, ...]
    reader: Reader
    train: TrainSpec
    rank: int
    world: int
    to_batch: Callable[[Any], Any]
    books: dict[int, LeaseBook] = field(default_factory=dict)
    """The books of the current epoch and, once asked for, of the next."""
    stream: Prefetched | None = None
    epoch: int = 0
    waiting: Callable[[], None] = lambda: None
    """Called now and then while the next batch is not there. Raises when nobody wants it any more."""

    def book(self, epoch: int) -> LeaseBook:
        if epoch not in self.books:
            for old in [known for known in self.books if known < min(self.epoch, epoch - 1)]:
                del self.books[old]
            self.books[epoch] = self._new_book(epoch)
        return self.books[epoch]

    def _new_book(self, epoch: int, workers: int | None = None) -> LeaseBook:
        return LeaseBook(self.groups, seed=self.train.seed, epoch=epoch, workers=workers or self.world, mix=self.train.mix_row_groups)

    def steps_in(self, epoch: int) -> int:
        """Inner steps of an epoch: those of the worker with the most rows."""
        return self.book(epoch).steps(self.train.batch_size)

    def next(self) -> tuple[Any | None, list[int]]:
        """(this worker's batch or None, rows of each worker) of the next inner step: what is left of this epoch, then the next."""
        if self.book(self.epoch).spent:
            self.epoch += 1
        book = self.book(self.epoch)
        if self.stream is None and book.lent_rows[self.rank]:
            self.stream = Prefetched(self._batches(book, skip=book.used[self.rank]))
        taken = book.take(self.train.batch_size)
        return (self.stream.take(self.waiting) if self.stream and taken[self.rank] else None), taken

    def _batches(self, book: LeaseBook, skip: int) -> Iterator[Any]:
        """This worker's batches from here on, epoch after epoch: the next one is read while this one ends."""
        while book.lent_rows[self.rank]:
            yield from map(self.to_batch, record_batches(book, self.rank, self.train.batch_size, self.reader.read, skip))
            book, skip = self._new_book(book.epoch + 1), 0

    def seek(self, epoch: int, done: int) -> None:
        """Be where `done` inner steps of an epoch lead; negative: so many before its begin."""
        self.close()
        self.epoch = epoch if done >= 0 else max(0, epoch - 1)
        book = self.books[self.epoch] if self.epoch in self.books else self._new_book(self.epoch)
        book.seek(done if done >= 0 else max(0, book.steps(self.train.batch_size) + done), self.train.batch_size)
        self.books = {self.epoch: book}

    def restore(self, cursor: dict[str, Any], at: tuple[int, int] | None = None) -> None:
        """Go on from a cursor; or from where `at`, (epoch, inner steps made of it), leads in leases that were lent as the cursor says.

        With another number of workers what is not trained on is lent anew.
        """
        self.close()
        lent = len(cursor["used"])
        book = self._book_at(cursor, lent)
        if at is not None:
            epoch, done = at
            if (last := epoch if done >= 0 else epoch - 1) > book.epoch:
                book = self._new_book(last, lent)
            book.seek(done if done >= 0 else max(0, book.steps(self.train.batch_size) + done), self.train.batch_size)
        if lent != self.world:
            book = self._book_at(book.cursor(), self.world)
        self.books, self.epoch = {book.epoch: book}, book.epoch

    def _book_at(self, cursor: dict[str, Any], workers: int) -> LeaseBook:
        return LeaseBook.at(cursor, self.groups, seed=self.train.seed, workers=workers, mix=self.train.mix_row_groups)

    def follow(self, epoch: int, done: int) -> None:
        """Be there, if this is not where the rows are anyhow: a region that was away goes on with the rows of the round it comes to."""
        if self.epoch not in (epoch, epoch - 1) or self.done(epoch) != done:
            self.seek(epoch, done)

    def done(self, epoch: int) -> int:
        """Inner steps made of an epoch since its rows were lent; negative: some of the epoch before are still to be made."""
        book, batch = self.book(self.epoch), self.train.batch_size
        made = max(-(-used // batch) for used in book.used)
        return made if self.epoch == epoch else made - book.steps(batch)

    def close(self) -> None:
        if self.stream is not None:
            self.reader.over.set()
            self.stream.close()
            self.reader.over.clear()
            self.stream = None


@dataclass
class Trainer:
    """One worker's model and how it steps."""

    region: str
    task: TrainingTask
    flat: FlatModel
    optimizer: torch.optim.Optimizer
    group: Group
    rows: Rows
    precision: str
    seed: int
    server: ParameterServer | None = None
    """The leader's."""

    def segment(self, first: Directive | None, alive: Callable[[], None]) -> None:
        """Inner steps until the leader says that the segment is over. Raises NonFiniteLoss, TaskFailed."""
        directive = self.group.follow(first, self.flat.vector)
        round = -1
        while not directive.over:
            if self.server is None:
                alive()
            if directive.changed or directive.round != round:
                self.rows.follow(directive.epoch, directive.done)
            if directive.round != round:
                round = directive.round
                self.seed_round(round)
            directive = self._step(round)
            if directive.void:
                self.forget_what_is_not_finite()

    def forget_what_is_not_finite(self) -> None:
        """In the inner optimizer: its state begins anew if a NaN or an infinity is in it."""
        tensors = [value for slots in self.optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]
        if not all(bool(torch.isfinite(tensor.sum())) for tensor in tensors):
            self.optimizer.state.clear()

    def inner_step(self) -> tuple[Tensor, int]:
        """One inner step on this worker's next batch; returns the region's mean loss and rows."""
        batch, rows = self.rows.next()
        return self.learn(batch, rows[self.group.rank] / sum(rows)), sum(rows)

    def _step(self, round: int) -> Directive:
        loss, rows = self.inner_step()
        if self.server is None:
            return self.group.follow(None, self.flat.vector)
        try:
            directive = self.server.step_done(rows, loss)
        except FloatingPointError as error:
            raise self.not_finite(round) from error
        return self.group.follow(directive, self.flat.vector)

    def not_finite(self, round: int) -> NonFiniteLoss:
        """The error to raise when a round went wrong."""
        return NonFiniteLoss(self.region, round, self._files())

    def learn(self, batch: Any | None, share: float) -> Tensor:
        """One inner step on this worker's batch, gradients averaged over the region's workers by rows.

        `share`: this worker's part of the step's rows. Returns the region's mean loss, detached. Raises TaskFailed for the user's
        code; what the group raises when another worker is lost goes through as it is.
        """
        with self._blamed_on_task():
            loss = self._forward_backward(batch)
        if (gradients := self.flat.gradients) is not None:
            self.group.average(gradients, share)
            loss = gradients[-1].clone()
        with self._blamed_on_task():
            self.optimizer.step()
        return loss

    @contextmanager
    def _blamed_on_task(self) -> Iterator[None]:
        try:
            yield
        except TASK_FAULTS as error:
            raise TaskFailed(self.region, "loss or backward", f"{type(error).__name__}: {error}") from error

    def _forward_backward(self, batch: Any | None) -> Tensor:
        """Gradients of this worker's batch; zeros where it has none left. With several workers the loss lies beside them."""
        gradients = self.flat.gradients
        if gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            gradients.zero_()
        if batch is None:
            assert gradients is not None, "a region's only worker always has a batch"
            return gradients[-1]
        with self.autocast():
            loss = self.task.loss(self.flat.model, on_device(batch, self.flat.vector.device))
        loss.backward()
        if gradients is not None:
            gradients[-1] = loss.detach()
        return loss.detach()

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.flat.vector.device.type, dtype=torch.bfloat16)

    def seed_round(self, round: int) -> None:
        """Dropout and the like depend on (seed, region, worker, round) alone, so that a resumed run repeats them."""
        words = f"{self.seed} {self.region} {self.group.rank} {round}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "little"))

    def _files(self) -> str:
        book = self.rows.book(self.rows.epoch)
        uris = sorted({book.groups[group].uri for group in book.in_use(self.group.rank)})
        return ", ".join(uris[:3]) + (f" and {len(uris) - 3} more" if len(uris) > 3 else "")


def evaluate(
    trainer: Trainer, held_out: Inventory, batch_size: int, check: Callable[[], None] = lambda: None
) -> dict[str, tuple[float, float]]:
    """Sums and counts over all held-out rows of the region. `check`: called before every batch; raises when nobody wants them any more.

    Raises TaskFailed.
    """
    groups = LeaseBook(held_out.row_groups(), seed=0, epoch=0, workers=1, mix=1)
    model = trainer.flat.model
    model.eval()
    try:
        with torch.inference_mode(), trainer.autocast():
            batches = map(trainer.rows.to_batch, record_batches(groups, 0, batch_size, trainer.rows.reader.read))
            parts = []
            for batch in batches:
                check()
                parts.append(trainer.task.evaluate(model, on_device(batch, trainer.flat.vector.device)))
    except GeotrainError:
        raise
    except TASK_FAULTS as error:
        raise TaskFailed(trainer.region, "evaluate", f"{type(error).__name__}: {error}") from error
    finally:
        model.train()
    return add_sums(parts)


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch of tensors, in whatever tuple, list or dict, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(on_device(value, device) for value in batch)
    return batch
