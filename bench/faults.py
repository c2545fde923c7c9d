"""What happens to one of three regions in mid-run, for bench/recovery: with real processes, and from outside wherever that can be."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import s3fs

from geotrain.charge import ask
from geotrain.errors import GeotrainError, OutputUnwritable
from geotrain.partition.partition import Partition
from geotrain.run import Run
from tests.chaos.test_processes import DaskProcesses, wait_for
from tests.chaos.test_stores import fill, small_disk
from tests.points import flip_a_bit_of_the_next_state, lose_the_next_hello, never_write_a_part
from tests.s3 import BUCKET, failing, moto
from tests.valve import Valve

VICTIM, ANOTHER = "virginia", "tokyo"
CUT_S, LONG_CUT_S, DOWN_S, OUTAGE_S = 10.0, 90.0, 3.0, 20.0
SEGMENT_ROUNDS = 60
SPEED = 4000.0
"""Samples per second that a worker is believed to make, where that matters; in truth some thousands."""


@dataclass
class Scene:
    """A run that a fault is to happen to."""

    run: Run
    valve: Valve
    """Before VICTIM's endpoint."""
    entry: dict[str, Any]
    """VICTIM's, of the job."""
    elsewhere: DaskProcesses | None
    """VICTIM's cluster, where that is to be lost."""
    outage: Callable[[float], None]
    """The place of the run folder cannot be written to for so many seconds."""
    struck_at: float = math.inf
    mended_at: float = 0.0
    """What failed is well again, where nobody is to notice before."""

    def kill(self, worker: int = 0, number: int = signal.SIGKILL) -> None:
        os.kill(pid_of(self.run.partitions[VICTIM], worker), number)

    def kill_all(self) -> None:
        for pid in [pid_of(self.run.partitions[region]) for region in self.run.present]:
            os.kill(pid, signal.SIGKILL)

    def cut(self, seconds: float) -> None:
        self.valve.open.clear()
        threading.Timer(seconds, self.valve.open.set).start()

    def mark(self, how: str) -> Path:
        """For FailingDigits: VICTIM's process."""
        file = Path(self.run.job.task_args[how])
        file.write_text(str(pid_of(self.run.partitions[VICTIM])))
        return file

    def fail(self, how: str) -> None:
        """Until it is lost."""
        file = self.mark(how)
        wait_for(lambda: VICTIM not in self.run.present)
        file.unlink()

    def lose_scheduler(self) -> None:
        assert self.elsewhere is not None
        self.elsewhere.end()
        threading.Timer(DOWN_S, self.elsewhere.start).start()

    def disagree(self) -> None:
        """VICTIM's next hash is another, once: as of a node that computes wrongly without a word."""
        partition = self.run.partitions[VICTIM]
        train = partition.train

        def differs(*args: Any) -> Any:
            done = train(*args)
            partition.train = train  # type: ignore[method-assign]
            self.struck_at = time.time()
            return replace(done, sha256="0" * 64)

        partition.train = differs  # type: ignore[method-assign]

    def damage_a_state(self) -> None:
        """VICTIM's leader is killed, and what a peer gives it first has a bit flipped."""
        (file := Path(self.run.folder.url, "damage")).touch()
        for region in self.run.present:
            on_leader(self.run.partitions[region], flip_a_bit_of_the_next_state, str(file))
        self.struck_at = time.time()
        self.kill()

    def wait_for_each_other(self) -> None:
        """VICTIM's leader is killed, and what it says to another when it is back is lost, though that was acknowledged."""
        on_leader(self.run.partitions[ANOTHER], lose_the_next_hello, VICTIM)
        self.struck_at = time.time()
        self.kill()

    def kill_before_a_part_is_written(self) -> None:
        on_leader(self.run.partitions[VICTIM], never_write_a_part)
        wait_for(lambda: self.run.board.rows[VICTIM].rounds > 2 * SEGMENT_ROUNDS + 5)
        self.struck_at = time.time()
        self.kill()

    def kill_at(self, stage: str, region: str = VICTIM) -> None:
        """In the moment in which its leader is next asked to do this."""
        does = getattr(Partition, stage)

        def loses(partition: Partition, *args: Any) -> Any:
            if partition.region == region:
                setattr(Partition, stage, does)
                self.struck_at = time.time()
                os.kill(pid_of(partition), signal.SIGKILL)
            return does(partition, *args)

        setattr(Partition, stage, loses)

    def add(self) -> None:
        ask(self.run.folder.url, "add", region=self.entry)

    def add_while_one_dies(self, region: str) -> None:
        self.kill_at("take_seats", region)
        self.add()

    def fail_to_store(self) -> None:
        self.outage(OUTAGE_S)
        self.mended_at = time.time()

    def lose_checkpoints(self) -> None:
        """A file is where their folder was."""
        checkpoints = Path(self.run.folder.url, "checkpoints")
        checkpoints.rename(checkpoints.with_name("aside"))
        checkpoints.write_text("in the way")


def on_leader(partition: Partition, call: Callable[..., Any], *args: Any, worker: int = 0) -> Any:
    """Its answer, from the process of a region's leader, or of another worker."""
    address = partition.workers[worker]
    return partition.client.run(call, *args, workers=[address])[address]


def pid_of(partition: Partition, worker: int = 0) -> int:
    return int(on_leader(partition, os.getpid, worker=worker))


def kill_fork_server() -> None:
    """What all local workers are forked from."""
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]


Place = tuple[str, Callable[[float], None]]
"""Of run folders, and how it becomes unusable for so many seconds."""


@contextmanager
def in_a_folder(folder: Path) -> Iterator[Place]:
    def outage(_: float) -> None:
        raise NotImplementedError("a folder is always there")

    yield str(folder), outage


@contextmanager
def in_a_bucket(_: Path) -> Iterator[Place]:
    """That answers 500."""
    with moto() as url, failing(url) as flaky:
        s3fs.S3FileSystem().mkdir(BUCKET)

        def outage(seconds: float) -> None:
            flaky.down = True
            time.sleep(seconds)
            flaky.down = False

        yield f"s3://{BUCKET}/runs", outage


@contextmanager
def on_a_small_disk(folder: Path) -> Iterator[Place]:
    """That gets full."""
    with small_disk(disk := folder / "disk", megabytes=64):

        def outage(seconds: float) -> None:
            fill(ballast := disk / "ballast")
            time.sleep(seconds)
            ballast.unlink()

        yield str(disk), outage


@dataclass(frozen=True)
class Fault:
    """What happens to VICTIM in mid-run."""

    strike: Callable[[Scene], None]
    noticed: tuple[str, ...] = ("lost", "notice")
    """Events, of which there is one at least."""
    over: tuple[str, ...] = ("back",)
    """Events, all of which there are. None: nobody notices."""
    first: bool = False
    """It is over with the first of these, and not with the last."""
    workers: int = 1
    job: dict[str, Any] | None = None
    """More of it."""
    comes: bool = False
    """The run begins without it."""
    elsewhere: bool = False
    """Its cluster is one of its own."""
    place: Callable[[Path], AbstractContextManager[Place]] = in_a_folder
    ends: type[GeotrainError] | None = None
    """The run."""
    epochs: int = 80


STORED: dict[str, Any] = {"noticed": (), "over": ("checkpoint",), "first": True}
COMES: dict[str, Any] = {"noticed": ("asked_to_come",), "over": ("joined",), "comes": True, "epochs": 120}
BELIEVED = {f"regions.{name}.devices": [{"kind": "cpu", "count": 1, "samples_per_s": SPEED}] for name in (ANOTHER, "frankfurt")}
SLOW: dict[str, Any] = {
    **BELIEVED,
    f"regions.{VICTIM}.devices": [{"kind": "cpu", "count": 2, "samples_per_s": SPEED}],
    "schedule.allocate": "matched",
    "elastic.speed_margin": 8.0,
    "elastic.speed_for_s": 5.0,
}

FAULTS: dict[str, Fault] = {
    "leader killed": Fault(Scene.kill),
    "leader killed, below the quorum": Fault(Scene.kill, job={"elastic.quorum": 3}),
    "one worker of two killed": Fault(lambda scene: scene.kill(1), workers=2),
    "leader gets SIGTERM": Fault(lambda scene: scene.kill(number=signal.SIGTERM)),
    "all leaders killed": Fault(Scene.kill_all),
    "fork server killed": Fault(lambda scene: kill_fork_server()),
    "leader hangs": Fault(lambda scene: scene.kill(number=signal.SIGSTOP)),
    "leader killed at the evaluation": Fault(lambda scene: scene.kill_at("evaluate"), noticed=("lost_at_end",), over=("evaluated",)),
    "leader killed before its part is written": Fault(Scene.kill_before_a_part_is_written, over=("back", "checkpoint_lost")),
    "leader killed, and what a peer gives is damaged": Fault(Scene.damage_a_state),
    "device fails": Fault(lambda scene: scene.fail("broken")),
    "NaN, three rounds in a row": Fault(lambda scene: scene.fail("sick"), noticed=("void_round",)),
    "hashes differ": Fault(Scene.disagree, noticed=("rolled_back",), over=("seated",)),
    "all wait for each other": Fault(Scene.wait_for_each_other, noticed=("standstill",), over=("back", "rolled_back")),
    "scheduler lost for 3 s": Fault(Scene.lose_scheduler, elsewhere=True),
    "links cut for 10 s": Fault(lambda scene: scene.cut(CUT_S), noticed=(), over=()),
    "links cut for 90 s": Fault(lambda scene: scene.cut(LONG_CUT_S), epochs=200),
    "bucket answers 500 for 20 s": Fault(Scene.fail_to_store, place=in_a_bucket, **STORED),
    "disk full for 20 s": Fault(Scene.fail_to_store, place=on_a_small_disk, **STORED),
    "place of the checkpoints lost": Fault(Scene.lose_checkpoints, noticed=(), over=("failed",), ends=OutputUnwritable),
    "region slows down": Fault(
        lambda scene: scene.mark("slow") and None, noticed=("speed_changed",), over=("replanned", "seated"), job=SLOW, epochs=40
    ),
    "region drained": Fault(lambda scene: ask(scene.run.folder.url, "drain", region=VICTIM), noticed=("asked_to_leave",), over=("left",)),
    "region added": Fault(Scene.add, **COMES),
    "another region's worker killed as one is added": Fault(
        lambda scene: scene.add_while_one_dies(ANOTHER), **{**COMES, "noticed": ("lost",), "over": ("back", "joined")}
    ),
    "region added whose worker is killed": Fault(
        lambda scene: scene.add_while_one_dies(VICTIM), **{**COMES, "noticed": (), "over": ("not_added",)}
    ),
}
