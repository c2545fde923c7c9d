"""Being in charge of a run: a lease in its folder, which one process at a time holds, and what others ask of that process.

lease/<number>.json    who holds it. Whoever makes the next number is in charge from then on: a fence that no clock can break.
requests/<when>.json   what `geotrain stop` and `geotrain region` ask of it; removed when it is heard.
"""

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from geotrain.errors import NotRunning, OutputUnwritable, RunTaken
from geotrain.stores import PATIENCE_S, STORE_ERRORS, create_whole, is_local, open_url, patiently, write_whole

BEAT_S, LOCAL_BEAT_S = 2.0, 0.5
"""Between two looks at the requests."""
RENEW_S = 4.0
LEASE_S = 20.0
"""A holder that renewed nothing for so long, as seen by who wants the lease, is gone: no two clocks are compared."""


def me() -> dict[str, Any]:
    """This process, as others may find it."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "boot": psutil.boot_time() // 10, "pid": process.pid, "started": process.create_time()}


def gone(holder: dict[str, Any]) -> bool:
    """Whether this machine knows that the holder's process has ended."""
    if (holder["host"], holder["boot"]) != (socket.gethostname(), psutil.boot_time() // 10):
        return False
    try:
        return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1)
    except psutil.NoSuchProcess:
        return True


class Charge:
    """Held from `take` to `release`; a thread renews it and hears the requests."""

    def __init__(self, run: str, url: str, asked: Callable[[str, dict[str, Any]], None]) -> None:
        """`asked`: called with stop, force, drain or add, and what else was said; with lost when another process has taken the lease."""
        self.run, self.asked = run, asked
        self.fs, self.path = open_url(url)
        self.number = 0
        self._renewed_at = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, told: Callable[[str], None] = lambda words: None) -> None:
        """Raises RunTaken when another process is in charge, OutputUnwritable. May wait LEASE_S for a sign of life."""
        try:
            number, before = self.newest()
            if before is not None and not before["released"] and not gone(before["holder"]):
                told("waiting for a sign of life of the process that had this run before")
                until = time.monotonic() + LEASE_S
                while time.monotonic() < until:
                    time.sleep(BEAT_S)
                    if self.newest() != (number, before):
                        raise RunTaken(self.run, _words(before["holder"]))
            self.number = number + 1
            if not create_whole(self.fs, self._name(self.number), self._content(0)):
                raise RunTaken(self.run, "a process that came at the same time")
            self._forget_requests()
        except STORE_ERRORS as error:
            raise OutputUnwritable("the flow", self.path, error) from error
        self._renewed_at = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="geotrain-lease", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        return self._thread is not None

    def look_after_sleep(self) -> None:
        """Before anything is written: `look`, where this process did not renew its lease for long."""
        if self.held and time.monotonic() - self._renewed_at > LEASE_S / 2:
            self.look()

    def check_after_sleep(self) -> None:
        """The same. Raises RunTaken, OutputUnwritable."""
        if self.held and time.monotonic() - self._renewed_at > LEASE_S / 2:
            self.check()

    def check(self, over: threading.Event | None = None) -> None:
        """Before anything is committed. Raises RunTaken when another process is in charge by now, OutputUnwritable.

        `over`: a store that fails for a while is waited for, until this is set.
        """
        try:
            patiently(self.look, over, PATIENCE_S if over is not None else 0.0)
        except STORE_ERRORS as error:
            raise OutputUnwritable("the flow", self.path, error) from error

    def look(self) -> None:
        """The same for who is patient with the store. Raises RunTaken, one of STORE_ERRORS."""
        number, content = self.newest()
        if number > self.number:
            raise RunTaken(self.run, _words(content["holder"]) if content else "another process")

    def release(self) -> None:
        """Another process may begin at once."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            try:
                write_whole(self.fs, self._name(self.number), self._content(0, released=True))
            except STORE_ERRORS:
                return  # who comes next waits for LEASE_S

    def _renew(self) -> None:
        beat = 0
        while not self._over.wait(min(BEAT_S, LOCAL_BEAT_S) if is_local(self.fs) else BEAT_S):
            try:
                for request in self._requests():
                    self.asked(request.pop("what"), request)
                if time.monotonic() - self._renewed_at > RENEW_S:
                    if self.newest()[0] > self.number:
                        self.asked("lost", {})
                        return
                    beat += 1
                    write_whole(self.fs, self._name(self.number), self._content(beat))
                    self._renewed_at = time.monotonic()
            except STORE_ERRORS:
                continue  # the next commit says so, if it lasts

    def _name(self, number: int) -> str:
        return f"{self.path}/lease/{number:08d}.json"

    def _content(self, beat: int, *, released: bool = False) -> bytes:
        return json.dumps({"holder": me(), "beat": beat, "released": released}).encode()

    def newest(self) -> tuple[int, dict[str, Any] | None]:
        """(number, content) of the newest lease."""
        self.fs.invalidate_cache(f"{self.path}/lease")
        names = sorted(self.fs.glob(f"{self.path}/lease/*.json"))
        if not names:
            return 0, None
        number, content = int(names[-1].rsplit("/", 1)[-1].removesuffix(".json")), self.fs.cat_file(names[-1])
        try:
            return number, json.loads(content)
        except ValueError:
            return number, None  # of somebody who could not write it

    def _requests(self) -> list[dict[str, Any]]:
        self.fs.invalidate_cache(f"{self.path}/requests")
        found = []
        for name in self.fs.glob(f"{self.path}/requests/*.json"):
            found.append(json.loads(self.fs.cat_file(name)))
            self.fs.rm(name)
        return found

    def _forget_requests(self) -> None:
        """Those that were meant for an earlier holder."""
        for name in self.fs.glob(f"{self.path}/requests/*.json"):
            self.fs.rm(name)


def ask(url: str, what: str, **more: Any) -> None:
    """Ask whoever is in charge of the run in this folder. Raises OutputUnwritable."""
    try:
        fs, path = open_url(url)
        content = json.dumps({"what": what, **more}).encode()
        write_whole(fs, f"{path}/requests/{time.time_ns()}-{secrets.token_hex(2)}.json", content)
    except STORE_ERRORS as error:
        raise OutputUnwritable("this command", url, error) from error


def in_charge(run: str, url: str) -> tuple[int, dict[str, Any]]:
    """(number, content) of the lease on the run in this folder. Raises NotRunning when nobody holds it."""
    number, content = Charge(run, url, lambda what, more: None).newest()
    if content is None or content["released"] or gone(content["holder"]):
        raise NotRunning(run)
    return number, content


def wait_for_end(run: str, url: str) -> None:
    """Until nobody is in charge of the run in this folder. Raises NotRunning when nobody was, or does not answer any more."""
    looked, (number, content) = Charge(run, url, lambda what, more: None), in_charge(run, url)
    changed_at, before = time.monotonic(), content
    while not before["released"]:
        time.sleep(BEAT_S / 4)
        newest, now = looked.newest()
        if newest != number or now is None:
            return
        if now != before:
            changed_at, before = time.monotonic(), now
        elif gone(before["holder"]) or time.monotonic() - changed_at > 2 * LEASE_S:
            raise NotRunning(run)


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
