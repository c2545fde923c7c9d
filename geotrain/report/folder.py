"""The run folder on any fsspec URL.

<output.url>/<run>/
  job.yaml  inventory.json  plan.json     what was asked for, found and decided
  rounds.jsonl  events.jsonl              append-only, while it runs
  checkpoints/<round>/                    one part per region, manifest.json last
  summary.json  report.html  report.md    at the end
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from geotrain.checkpoint import join, read_bytes, write_bytes
from geotrain.errors import NothingToResume, OutputUnwritable, RunNotFound, RunTaken
from geotrain.job import JobSpec, parse_job
from geotrain.stores import PATIENCE_S, STORE_ERRORS, open_url, patiently
from geotrain.sync.messages import RoundMade


def new_run_id(job_name: str, now: datetime | None = None) -> str:
    """The job's name, the time in UTC, four random digits."""
    return f"{job_name}-{now or datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class RunFolder:
    """Reads and writes one run's folder. Thread-safe."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if "://" in url else str(Path(url).resolve())
        self.run = self.url.rsplit("/", 1)[-1]
        self._fs, self._path = open_url(self.url)
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._pending: dict[str, list[str]] = {"rounds.jsonl": [], "events.jsonl": []}
        self._soon: list[threading.Thread] = []
        self.fence: Callable[[], None] = lambda: None
        """Raises RunTaken where another process is in charge by now, whereupon what this one still has to say is dropped; STORE_ERRORS."""
        self.over: threading.Event | None = None
        """Of who conducts the run: a store that fails for a while is waited for, until this is set."""

    @property
    def appends(self) -> bool:
        """A local disk can append; on an object store flushing writes a whole file."""
        return "file" in self._fs.protocol

    @classmethod
    def create(cls, job: JobSpec, run: str) -> "RunFolder":
        """A new run's folder, with its job in it. Raises OutputUnwritable."""
        folder = cls(join(job.output.url, run))
        folder.write("job.yaml", yaml.safe_dump(job.to_dict(), sort_keys=False))
        folder.event("created", job=job.name, digest=job.digest())
        folder.flush()
        return folder

    @classmethod
    def find(cls, run: str, runs: str) -> "RunFolder":
        """A run by its folder, or by its id under `runs`. Raises RunNotFound."""
        for url in (run, join(runs, run)):
            fs, path = open_url(url)
            if fs.exists(join(path, "job.yaml")):
                return cls(url)
        raise RunNotFound(run, runs)

    def remove(self) -> None:
        """Remove the folder and all in it."""
        self.flush()
        self._fs.rm(self._path, recursive=True)

    def write(self, name: str, text: str) -> None:
        """Raises OutputUnwritable, RunTaken."""
        write_bytes("the flow", join(self.url, name), text.encode(), over=self.over, fence=self.fence)

    def write_json(self, name: str, tree: Any) -> None:
        self.write(name, json.dumps(tree, indent=1))

    def read_json(self, name: str) -> Any:
        """Raises NothingToResume when the run never came that far."""
        try:
            return json.loads(read_bytes(join(self.url, name)))
        except FileNotFoundError as error:
            raise NothingToResume(self.run, f"it ended before {name} was written") from error

    def has(self, name: str) -> bool:
        return bool(self._fs.exists(join(self._path, name)))

    def job(self) -> JobSpec:
        return parse_job(yaml.safe_load(read_bytes(join(self.url, "job.yaml"))), join(self.url, "job.yaml"))

    def event(self, event: str, **facts: Any) -> None:
        """One line of events.jsonl."""
        self._append("events.jsonl", {"at": round(time.time(), 3), "event": event, **facts})

    def round(self, record: Mapping[str, Any]) -> None:
        """One line of rounds.jsonl."""
        self._append("rounds.jsonl", record)

    def round_by_others(self, made: RoundMade) -> None:
        """The same by the word of those who hold the round: its leader was not heard to tell of it, or has made more of it."""
        unknown: dict[str, Any] = {"loss": None, "held_s": 0.0, "compute_s": None, "links": {}}
        self.round({**asdict(made), "at": time.time(), **unknown, "by_others": True})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with self._lock:
            self._pending[name].append(json.dumps(dict(record)))

    def flush(self, *, must: bool = True) -> None:
        """Put what was appended into the files. Object stores cannot append: there the whole file is written again.

        Raises OutputUnwritable, RunTaken; unless it `must` be now: then what cannot be written is kept for the next time.
        """
        if must:
            for thread in self._soon:
                thread.join()
        with self._flushing:
            for name in self._pending:
                with self._lock:
                    lines = list(self._pending[name])
                if not lines:
                    continue
                try:
                    self._add_lines(join(self._path, name), "".join(f"{line}\n" for line in lines), patient=must)
                except RunTaken:
                    with self._lock:
                        for pending in self._pending.values():
                            pending.clear()
                    if must:
                        raise
                    return
                except OutputUnwritable:
                    if must:
                        raise
                    continue
                with self._lock:
                    del self._pending[name][: len(lines)]

    def flush_soon(self) -> None:
        """The same where nobody may wait for an object store."""
        if self.appends:
            self.flush(must=False)
            return
        thread = threading.Thread(target=self.flush, kwargs={"must": False}, name="geotrain-flush", daemon=True)
        thread.start()
        self._soon = [one for one in [*self._soon, thread] if one.is_alive()]

    def _add_lines(self, path: str, text: str, *, patient: bool) -> None:
        def add() -> None:
            self.fence()
            if self.appends:
                _append_whole(path, text.encode())
            else:
                before = self._fs.cat_file(path).decode() if self._fs.exists(path) else ""
                self._fs.pipe_file(path, (before + text).encode())

        try:
            patiently(add, self.over, PATIENCE_S if patient and self.over is not None else 0.0)
        except STORE_ERRORS as error:
            raise OutputUnwritable("the flow", path, error) from error

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The records of a .jsonl file; a line cut off by a crash is left out. Raises one of STORE_ERRORS."""
        path = join(self._path, name)

        def read() -> bytes:
            return bytes(self._fs.cat_file(path)) if self._fs.exists(path) else b""

        for line in patiently(read, self.over, PATIENCE_S if self.over is not None else 0.0).decode().splitlines():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def _append_whole(path: str, content: bytes) -> None:
    """All of it or nothing: a disk that becomes full takes a part. Raises OSError."""
    with Path(path).open("ab", buffering=0) as file:
        end = file.tell()
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def list_runs(runs: str) -> list[RunFolder]:
    """All runs under a URL, the newest last."""
    fs, path = open_url(runs)
    return [
        RunFolder(str(fs.unstrip_protocol(name.rsplit("/", 1)[0])) if "://" in runs else name.rsplit("/", 1)[0])
        for name in sorted(fs.glob(join(path, "*/job.yaml")))
    ]
