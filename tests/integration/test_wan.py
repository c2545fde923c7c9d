"""Whole runs over TLS and through mailboxes, and the doctor: on this machine's own workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from geotrain import measured
from geotrain.doctor import examine
from geotrain.errors import BadCertificate, UpdateRefused
from geotrain.job import JobSpec, parse_job
from geotrain.report.folder import RunFolder
from geotrain.run import InThreads, Run, locate_and_plan
from geotrain.sync.messages import Kind, Update
from geotrain.wan import certs
from geotrain.wan.flight import FlightTransport
from geotrain.wan.transport import Identity
from tests.integration.test_run import model_of, same
from tests.making import conduct, job_tree, points_job

SYNC = {"strategy": "diloco", "every": 4, "codec": "bf16"}


def wan_job(root: Path, wan: dict[str, dict[str, Any]], **changes: Any) -> JobSpec:
    """The points job, with a `wan` section per region."""
    points_job(root)
    tree = job_tree(root, sync=SYNC, **changes)
    for region in tree["regions"]:
        region["wan"] = wan.get(region["name"], {})
    return parse_job(tree)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    folder = tmp_path / "ca"
    certs.make_ca(folder)
    for region in ("north", "south"):
        certs.make_region(folder, region)
    return folder


def secured(ca: Path) -> dict[str, dict[str, Any]]:
    names = ("north", "south")
    return {
        name: {"security": {"ca": str(ca / "ca.pem"), "cert": str(ca / f"{name}.pem"), "key": str(ca / f"{name}.key")}} for name in names
    }


def events(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    return [event for event in folder.lines("events.jsonl") if event["event"] == name]


def test_every_way_between_regions_ends_with_the_same_bits(tmp_path: Path, ca: Path, bucket: str) -> None:
    """Directly in plain text, with TLS, through a mailbox on S3 that is signed, and there directly and back through a folder."""
    box, ways = {"url": f"s3://{bucket}/boxes"}, {}
    ways["plain"] = wan_job(tmp_path, {})
    ways["TLS"] = wan_job(tmp_path, secured(ca))
    ways["mailbox"] = wan_job(tmp_path, secured(ca), mailbox=box, links={"transport": "mailbox"})
    mixed = {"transport": "flight", "pairs": {"north>south": {"transport": "mailbox"}}}
    ways["mixed"] = wan_job(tmp_path, {}, mailbox={"url": str(tmp_path / "box")}, links=mixed)
    models = {}
    for name, job in ways.items():
        run = Run.start(job)
        summary = conduct(run)
        models[name] = model_of(run)
        for link in summary["links"]:
            assert link["updates"] > 0, (name, link)
            assert bool(link["requests"]) == (name == "mailbox" or name == "mixed"), (name, link)
            assert link["busy_s"] + 1e-6 >= link["blocked_s"] > 0, (name, link)
        records = [record for record in run.folder.lines("rounds.jsonl") if record["links"]]
        assert sum(record["links"][to]["wire_bytes"] for record in records for to in record["links"]) > 0
        assert not events(run.folder, "refused")
    assert all(same(model, models["plain"]) for model in models.values())
    assert not s3fs.S3FileSystem(skip_instance_cache=True).find(f"{bucket}/boxes"), "objects are removed"
    assert not [path for path in (tmp_path / "box").rglob("*") if path.is_file()]


def test_what_cannot_be_dialled_goes_through_the_mailbox_and_says_why(tmp_path: Path) -> None:
    job = wan_job(tmp_path, {"south": {"advertise": "127.0.0.1:9"}}, mailbox={"url": str(tmp_path / "box")}, links={"rtt_ms": 1})
    run = Run.start(job)
    conduct(run)
    told = {(event["region"], event["to"]): event for event in events(run.folder, "link")}
    assert told["north", "south"]["transport"] == "mailbox"
    assert "connect" in told["north", "south"]["why"].lower()
    assert told["south", "north"]["transport"] == "flight"


def test_a_certificate_is_renewed_between_segments_and_one_that_expires_is_told(tmp_path: Path, ca: Path) -> None:
    certs.make_region(ca, "north", days=3)
    job = wan_job(tmp_path, secured(ca), schedule={"segment_rounds": 3})
    run = Run.start(job)

    def renew(run: Run, segment: int) -> None:
        if segment == 2:
            certs.make_region(ca, "north", days=300)
        if segment == 3:
            (ca / "south.pem").write_text("no certificate")

    conduct(run, before_segment=renew)
    (soon,) = events(run.folder, "certificate_expires")
    assert soon["region"] == "north"
    (renewed,) = events(run.folder, "certificate_renewed")
    assert renewed["region"] == "north"
    refused = events(run.folder, "certificate_refused")
    assert refused
    assert "south.pem" in refused[0]["reason"], "the run goes on with the old one"


def test_a_region_with_another_regions_certificate_is_told_so(tmp_path: Path, ca: Path) -> None:
    wan = secured(ca)
    wan["south"]["security"] |= {"cert": str(ca / "north.pem"), "key": str(ca / "north.key")}
    with pytest.raises(BadCertificate, match="region south: .*north.pem cannot be used: it is for north, not for south"):
        conduct(Run.start(wan_job(tmp_path, wan)))


def look(job: JobSpec) -> Any:
    run = Run.start(job, believe=False)
    with run:
        return examine(run)


def test_the_doctor_finds_nothing_and_the_plan_believes_its_links(tmp_path: Path, ca: Path) -> None:
    job = wan_job(tmp_path, secured(ca), mailbox={"url": str(tmp_path / "box")}, links={"mbit_per_s": 3, "rtt_ms": 400})
    found = look(job)
    assert found.exit_code == 0, found.findings
    checks = {finding.check for finding in found.findings if finding.region == "north"}
    assert checks == {"cluster", "certificate", "data", "output", "mailbox", "devices", "versions", "clock", "link to south"}
    assert any(finding.verdict == "warning" and "the job says 3 Mbit/s" in finding.what for finding in found.findings)
    kept = json.loads(Path(measured.url_of(job)).read_text())
    assert kept["links"].keys() == {"north>south", "south>north"}
    run = Run.start(job)
    with run:
        plan = locate_and_plan(run, InThreads(run))
    assert run.job.link("north", "south").mbit_per_s == pytest.approx(kept["links"]["north>south"]["mbit_per_s"])
    assert plan.exchange_s < 0.4, "by the job's own links it would take longer"
    assert not [path for path in (tmp_path / "box").rglob("*") if path.is_file()]


def test_the_doctor_says_what_to_mend_in_which_region(tmp_path: Path, ca: Path) -> None:
    wan = secured(ca)
    certs.make_ca(tmp_path / "other")
    certs.make_region(tmp_path / "other", "south")
    other = tmp_path / "other"
    wan["south"]["security"] = {"ca": str(other / "ca.pem"), "cert": str(other / "south.pem"), "key": str(other / "south.key")}
    job = wan_job(tmp_path, wan, links={"rtt_ms": 1})
    for file in (tmp_path / "south" / "train").iterdir():
        file.unlink()
    found = look(job)
    bad = {(finding.region, finding.check): finding for finding in found.findings if finding.verdict == "failed"}
    assert bad.keys() == {("south", "data"), ("north", "link to south"), ("south", "link to north")}
    assert bad["south", "data"].exit_code == found.exit_code == 4 or found.exit_code == 6
    assert "cannot reach south" in bad["north", "link to south"].what


def test_a_segment_that_ends_early_for_another_h_loses_no_row(tmp_path: Path) -> None:
    """As if the links had become four times slower, and later four times faster."""
    points_job(tmp_path, rows={"north": 400, "south": 240})
    tree = job_tree(
        tmp_path,
        sync={"strategy": "ma", "every": "auto"},
        links={"mbit_per_s": 0.6, "rtt_ms": 1},
        train={"batch_size": 10, "epochs": 6, "seed": 3},
        schedule={"segment_rounds": 40},
    )
    for region in tree["regions"]:
        region["devices"][0]["samples_per_s"] = 1000
    job = parse_job(tree)
    run = Run.start(job)
    rates = [0.15, 0.6]

    def change(run: Run, segment: int) -> None:
        if rates:
            mbit = rates.pop(0)
            for source, target in (("north", "south"), ("south", "north")):
                for updates in (1, 2):
                    run.replanner.links.heard(source, {target: {"updates": 1000 * len(rates) + updates, "bytes_per_s": mbit * 1e6 / 8}})
            run.control.turn.set()

    summary = conduct(run, before_segment=change)
    changes = [event["every"] for event in events(run.folder, "replanned")]
    assert [after > before for before, after in changes] == [True, False], changes
    assert summary["samples"] == 6 * 640
    assert {region["region"]: region["samples"] for region in summary["regions"]} == {"north": 2400, "south": 1440}


def test_strangers_are_refused_and_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """Somebody who knows the address of a leader, and nothing else; and somebody who knows the token of another run."""
    run = Run.start(wan_job(tmp_path, {}, schedule={"segment_rounds": 5}))
    strangers = []

    def knock(run: Run, segment: int) -> None:
        if segment == 2:
            identity = Identity("other", "north", "a token", "a model", 1, frozenset(("north", "south")), 1000)
            address = run.membership.links.directory.addresses["south"]["flight"]
            stranger = FlightTransport(identity, "127.0.0.1:0", {"south": address}, give_up_s=5)
            strangers.append(stranger)
            stranger.send("south", Update(Kind.PUSH, 1, "north", 0), torch.zeros(10, dtype=torch.uint8))
            with pytest.raises(UpdateRefused, match="wrong run token"):
                while True:
                    stranger.receive(0.1)

    summary = conduct(run, before_segment=knock)
    strangers[0].close()
    assert summary["status"] == "completed"
    (refused,) = events(run.folder, "refused")
    assert (refused["region"], refused["from"], refused["times"]) == ("south", "ipv4:127.0.0.1", 1)
    assert "wrong run token" in refused["reason"]
