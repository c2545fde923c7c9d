"""Doctor: everything that can be wrong with a job's regions before it costs anything, looked at from each region's own workers."""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from geotrain import measured
from geotrain.clusters import quiet_dask
from geotrain.errors import GeotrainError
from geotrain.job import AddressCluster, JobSpec
from geotrain.partition.orders import Directory, Finding, Measured
from geotrain.partition.partition import Partition
from geotrain.partition.ways import directory_of
from geotrain.run import Run

SKEW_WARNING_S, SKEW_FAILED_S = 2.0, 300.0
"""Clocks order what people read; certificates are judged by them."""
MUST_AGREE = ("geotrain", "torch")
"""Versions of which two would not compute the same."""


@dataclass
class Examination:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    links: dict[str, Measured] = field(default_factory=dict)
    """`tokyo>virginia` -> what it carries."""
    kept_at: str | None = None
    """Where the links were written for the planner."""

    @property
    def exit_code(self) -> int:
        return next((finding.exit_code or 1 for finding in self.findings if finding.verdict == "failed"), 0)

    def add(self, region: str, check: str, verdict: Any, what: str, remedy: str = "", exit_code: int = 0) -> None:
        self.findings.append(Finding(region, check, verdict, what, remedy, exit_code))


def examine(run: Run) -> Examination:
    """Look at every region, then measure every directed link. The run is entered by the caller; nothing trains."""
    quiet_dask()
    found, job = Examination(), run.job
    regions = _each([region.name for region in job.regions], lambda name: _region(run, name, found))
    up = {name: partition for name, partition in regions.items() if partition is not None}
    _compare_versions(up, found)
    if len(up) > 1:
        _links(run, up, found)
    if found.links:
        links = {pair: {"mbit_per_s": link.bytes_per_s * 8e-6, "rtt_ms": 1000 * link.rtt_s} for pair, link in sorted(found.links.items())}
        found.kept_at = measured.write(job, links)
    order = [region.name for region in job.regions]
    found.findings.sort(key=lambda finding: order.index(finding.region))
    return found


def _each(names: Sequence[str], act: Callable[[str], Any]) -> dict[str, Any]:
    """In a thread per region."""
    with ThreadPoolExecutor(max_workers=max(1, len(names))) as threads:
        return dict(zip(names, threads.map(act, names), strict=True))


def _failed(found: Examination, region: str, check: str, error: GeotrainError) -> None:
    found.add(region, check, "failed", error.message, error.advice, error.exit_code)


def _region(run: Run, name: str, found: Examination) -> Partition | None:
    """Its cluster, and what one of its workers sees alone."""
    job = run.job
    run.board.enter("looking at every region")
    try:
        partition = run.partitions.wait(name)
        partition.cluster.ship(job.code)
        _count_workers(job, partition, found)
        run.board.status(name, "examining")
        for finding in partition.ask("examine:examine", job, name, run.folder.url):
            found.findings.append(finding)
    except GeotrainError as error:
        _failed(found, name, "cluster", error)
        return None
    run.board.status(name, "examined")
    return partition


def _count_workers(job: JobSpec, partition: Partition, found: Examination) -> None:
    spec = job.region(partition.region)
    there, wanted = len(partition.cluster.workers()), sum(device.count for device in spec.devices)
    if isinstance(spec.cluster, AddressCluster) and there < wanted:
        remedy = "start more workers, or lower `devices: count`"
        found.add(spec.name, "cluster", "warning", f"{there} workers, the devices would take {wanted}", remedy)
    else:
        found.add(spec.name, "cluster", "ok", f"{spec.cluster.kind}, {there} worker{'s' * (there != 1)} now")


def _compare_versions(up: dict[str, Partition], found: Examination) -> None:
    """Versions against the most common ones, clocks against this machine's."""

    def look(name: str) -> Any:
        try:
            up[name].ask("examine:facts")  # the first answer takes the time to import
            before = time.time()
            facts = up[name].ask("examine:facts")
            after = time.time()
        except GeotrainError as error:
            _failed(found, name, "versions", error)
            return None
        return facts["versions"], facts["now"] - (before + after) / 2, (after - before) / 2

    seen = {name: facts for name, facts in _each(list(up), look).items() if facts is not None}
    for name, (versions, skew, doubt) in seen.items():
        usual = {what: Counter(facts[0][what] for facts in seen.values()).most_common(1)[0][0] for what in versions}
        odd = {what: number for what, number in versions.items() if number != usual[what]}
        told = ", ".join(f"{what} {number}" for what, number in versions.items())
        if odd:
            differ = ", ".join(f"{what} {number}, elsewhere {usual[what]}" for what, number in odd.items())
            verdict = "failed" if any(what in MUST_AGREE for what in odd) else "warning"
            found.add(name, "versions", verdict, differ, "install the same versions in all regions", 5 if verdict == "failed" else 0)
        else:
            found.add(name, "versions", "ok", told)
        off = max(0.0, abs(skew) - doubt)
        verdict = "failed" if off > SKEW_FAILED_S else "warning" if off > SKEW_WARNING_S else "ok"
        found.add(
            name,
            "clock",
            verdict,
            f"{skew:+.2f} s from here, known to {doubt:.2f} s",
            "" if off == 0 else "set it by NTP",
            5 * (verdict == "failed"),
        )


def _links(run: Run, up: dict[str, Partition], found: Examination) -> None:
    """One link into and one out of every region at a time, so that none is measured against another."""
    job, token, life = run.job, secrets.token_hex(16), time.time_ns()
    run.board.enter("measuring the links")

    def open_post(name: str) -> dict[str, str] | None:
        try:
            answer: dict[str, str] = up[name].ask("examine:open_post", job, run.id, name, token, life, GIVE_UP_S)
        except GeotrainError as error:
            _failed(found, name, "endpoint", error)
            return None
        return answer

    addresses = {name: opened for name, opened in _each(list(up), open_post).items() if opened is not None}
    try:
        names = list(addresses)
        reached = _each(names, lambda name: _reach(run, up, addresses, name))
        directory = directory_of(job, addresses, reached)
        _each(names, lambda name: up[name].ask("examine:introduce", run.id, name, directory))
        for shift in range(1, len(names)):
            ring = {name: names[(position + shift) % len(names)] for position, name in enumerate(names)}
            _each(names, lambda name, ring=ring: _measure(run, up, directory, name, ring[name], found))  # type: ignore[misc]
    finally:
        _each(list(addresses), lambda name: up[name].ask("examine:close_post", run.id, name))


GIVE_UP_S = 15.0
"""How long a link that carried nothing is waited for: it is looked at, not trained over."""


def _reach(run: Run, up: dict[str, Partition], addresses: dict[str, dict[str, str]], name: str) -> dict[str, str | None]:
    """Other region -> why it cannot be dialled."""
    others = {other: ways["flight"] for other, ways in addresses.items() if other != name and "flight" in ways}
    answer: dict[str, str | None] = up[name].ask("examine:reach", run.id, name, others)
    return answer


def _measure(run: Run, up: dict[str, Partition], directory: Directory, name: str, to: str, found: Examination) -> None:
    way = directory.ways[f"{name}>{to}"]
    run.board.status(name, f"measuring the link to {to}")
    try:
        answer = up[name].ask("examine:measure", run.id, name, to, way)
    except GeotrainError as error:
        _failed(found, name, f"link to {to}", error)
        return
    if isinstance(answer, Finding):
        found.findings.append(answer)
        return
    found.links[f"{name}>{to}"] = answer
    mbit, rtt_ms, believed = answer.bytes_per_s * 8e-6, 1000 * answer.rtt_s, run.job.link(name, to)
    what = f"{mbit:.1f} Mbit/s, {rtt_ms:.1f} ms, by {way}"
    if run.job.links is not None and not 0.5 < mbit / believed.mbit_per_s < 2:
        found.add(
            name, f"link to {to}", "warning", f"{what}; the job says {believed.mbit_per_s:g} Mbit/s", "the plan takes what was measured"
        )
    else:
        found.add(name, f"link to {to}", "ok", what)
