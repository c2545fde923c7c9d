"""What a region's own worker sees, for `geotrain doctor`: files, buckets, data, devices, and its links to the others."""

import platform
import secrets
import threading
import time
from importlib.metadata import version
from typing import Any

import torch

from geotrain import __version__, checkpoint
from geotrain.errors import GeotrainError, MailboxUnusable, TaskError
from geotrain.job import JobSpec
from geotrain.partition.endpoint import Endpoint
from geotrain.partition.orders import Directory, Finding, Measured, Verdict
from geotrain.partition.probing import survey
from geotrain.stores import STORE_ERRORS
from geotrain.sync.messages import Kind, Update
from geotrain.wan import certs
from geotrain.wan.mailbox import open_box
from geotrain.wan.transport import Identity

SAMPLE_BYTES = 2**20
LONG_ENOUGH_S = 2.0
"""A link is measured with as much as it carries in this time, by what it carried of a sample."""
MOST_BYTES = 2**26
LEAST_FREE_GPU = 0.5
"""Share of a GPU's memory; less is told."""


def failed(region: str, check: str, error: GeotrainError) -> Finding:
    return Finding(region, check, "failed", error.message, error.advice, error.exit_code)


def facts() -> dict[str, Any]:
    """Versions, and the time here."""
    versions = {"python": platform.python_version(), "geotrain": __version__, "torch": torch.__version__, "pyarrow": version("pyarrow")}
    return {"versions": versions, "now": time.time()}


def examine(job: JobSpec, region: str, output: str) -> list[Finding]:
    """Everything that one worker can see alone."""
    found = []
    for check, look in (
        ("certificate", _certificate),
        ("data", _data),
        ("output", lambda job, region: _output(region, output)),
        ("mailbox", _mailbox),
        ("devices", _devices),
    ):
        try:
            if (said := look(job, region)) is not None:
                found.append(Finding(region, check, *said))
        except GeotrainError as error:
            found.append(failed(region, check if not isinstance(error, TaskError) else "task", error))
    return found


Said = tuple[Verdict, str] | tuple[Verdict, str, str] | None
"""Verdict, what, remedy; None where there is nothing to check."""


def _certificate(job: JobSpec, region: str) -> Said:
    if (files := job.region(region).wan.security) is None:
        return None
    own = certs.load(region, files)
    what = f"{files.cert} is valid until {own.expires:%F}"
    return ("warning", what, f"renew it: geotrain certs region {region}") if own.expires_soon() else ("ok", what)


def _data(job: JobSpec, region: str) -> Said:
    train, held_out = survey(job, region)
    columns = ", ".join(f"{name} {kind}" for name, kind in train.schema.items())
    return "ok", f"{train.rows} rows in {len(train.shards)} files, {held_out.rows if held_out else 'none'} held out; {columns}"


def _output(region: str, output: str) -> Said:
    url = checkpoint.join(output, ".doctor", region)
    content = secrets.token_bytes(16)
    checkpoint.write_bytes(f"region {region}", url, content)
    if checkpoint.read_bytes(url) != content:
        return "failed", f"{url} does not give back what was written", "look for a cache, or another writer, before that bucket"
    return "ok", f"{output} can be written and read"


def _mailbox(job: JobSpec, region: str) -> Said:
    own = job.mailbox_of(region)
    if own is None:
        return None
    name, url = f"doctor-{region}-{secrets.token_hex(4)}", own.url
    try:
        box = open_box(region, own, url, LONG_ENOUGH_S * 10)
        box.write(b"doctor", name)
        if box.read(name) != b"doctor":
            return "failed", f"{own.url} does not give back what was written", "look for a cache before that bucket"
        box.remove([name])
        for spec in job.regions:
            if (other := job.mailbox_of(spec.name)) is not None and other != own:
                url = other.url
                open_box(region, other, url, LONG_ENOUGH_S * 10).read("nothing-of-this-name")
    except STORE_ERRORS as error:
        raise MailboxUnusable(region, url, error) from error
    return "ok", f"{own.url} can be written, read and cleaned"


def _devices(job: JobSpec, region: str) -> Said:
    wanted = [device.kind for device in job.region(region).devices if device.kind != "cpu"]
    if not wanted:
        return "ok", f"CPU, {job.train.threads} thread{'s' * (job.train.threads > 1)} per worker"
    if not torch.cuda.is_available():
        return "failed", f"the job says {wanted[0]}, and this worker sees no CUDA device", "check its driver, and CUDA_VISIBLE_DEVICES"
    rows = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        rows.append((free / total, f"{torch.cuda.get_device_name(number)}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"))
    what = "; ".join(row for _, row in rows)
    if min(rows)[0] < LEAST_FREE_GPU:
        return "warning", what, "something else uses that GPU: find it with nvidia-smi"
    return "ok", what


class _Post:
    """An endpoint that listens while the links are measured, and throws away what comes."""

    def __init__(self, job: JobSpec, identity: Identity, give_up_s: float) -> None:
        self.endpoint = Endpoint(job, identity, give_up_s, lambda name, facts: None)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._take, name="geotrain-doctor", daemon=True)
        self.thread.start()
        self.sent = 0

    def _take(self) -> None:
        while not self.closed.is_set():
            self.endpoint.inbox.get(0.05)

    def close(self) -> None:
        self.closed.set()
        self.thread.join()
        self.endpoint.close()

    def measure(self, to: str, transport: str) -> Measured:
        """Raises PeerUnreachable, UpdateRefused, MailboxUnusable."""
        seconds = self._timed(to, SAMPLE_BYTES)  # opens the connections
        seconds = self._timed(to, SAMPLE_BYTES)
        size = int(min(max(SAMPLE_BYTES, SAMPLE_BYTES * LONG_ENOUGH_S / seconds), MOST_BYTES))
        rate = size / self._timed(to, size)
        link = self.endpoint.transport.traffic[to]
        return Measured(to, transport, link.rtt_s, max(rate, link.bytes_per_s))

    def _timed(self, to: str, size: int) -> float:
        began, transport = time.monotonic(), self.endpoint.transport
        for _ in range(max(1, size // SAMPLE_BYTES)):
            self.sent += 1
            transport.send(to, Update(Kind.PUSH, 0, self.endpoint.region, self.sent), torch.zeros(SAMPLE_BYTES, dtype=torch.uint8))
        while not transport.drain(0.1):
            transport.receive(0)
        return max(time.monotonic() - began, 1e-6)


_POSTS: dict[tuple[str, str], _Post] = {}


def open_post(job: JobSpec, run: str, region: str, token: str, life: int, give_up_s: float) -> dict[str, str]:
    """Listen; returns this endpoint's addresses by transport."""
    names = frozenset(spec.name for spec in job.regions)
    _POSTS[run, region] = post = _Post(job, Identity(run, region, token, "doctor", life, names, SAMPLE_BYTES), give_up_s)
    return post.endpoint.addresses


def introduce(run: str, region: str, directory: Directory) -> None:
    _POSTS[run, region].endpoint.introduce(directory)


def reach(run: str, region: str, addresses: dict[str, str]) -> dict[str, str | None]:
    return _POSTS[run, region].endpoint.reach(addresses)


def measure(run: str, region: str, to: str, transport: str) -> Measured | Finding:
    try:
        return _POSTS[run, region].measure(to, transport)
    except GeotrainError as error:
        return failed(region, f"link to {to}", error)


def close_post(run: str, region: str) -> None:
    if (post := _POSTS.pop((run, region), None)) is not None:
        post.close()
