"""The command line as a user meets it: a process of its own, Prefect in front, signals from outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from geotrain.guard import MARK

GEOTRAIN = [sys.executable, "-m", "geotrain.cli"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `geotrain init` writes."""
    folder = tmp_path_factory.mktemp("starter") / "mine"
    assert call("init", str(folder))["status"] == "ok"
    return folder


def call(*words: str, expect: int = 0, cwd: Path | None = None) -> dict[str, Any]:
    done = subprocess.run([*GEOTRAIN, *words, "--format", "json"], capture_output=True, text=True, cwd=cwd, timeout=240)
    assert done.returncode == expect, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    envelope: dict[str, Any] = json.loads(done.stdout)
    assert envelope["schema_version"] == 1
    assert envelope["exit_code"] == expect
    return envelope


@pytest.fixture
def running(mine: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A long run that has begun to train, and the folder of its runs."""
    runs = tmp_path / "runs"
    words = ["--set", f"output.url={runs}", "--set", "train.epochs=3000", "--set", "schedule.segment_rounds=40", "--format", "json"]
    environment = os.environ | {"PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "60"}  # what is logged must still reach the server at the end
    process = subprocess.Popen(
        [*GEOTRAIN, "run", str(mine / "job.yaml"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while not list(runs.glob("*/checkpoints/*/manifest.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "no checkpoint"
            time.sleep(0.1)
        yield process, runs
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_starter_runs_as_it_is_and_everything_can_be_asked_afterwards(mine: Path, tmp_path: Path) -> None:
    summary = call("run", str(mine / "job.yaml"))["data"]
    assert summary["metrics"]["accuracy"] > 0.9
    assert summary["version"] == 1
    run, runs = summary["run"], str(mine / "runs")
    assert [state["run"] for state in call("status", "--runs", runs)["data"]] == [run]
    state = call("status", run, "--runs", runs)["data"]
    assert (state["status"], state["round"], state["resumable"]) == ("completed", summary["rounds"], False)
    assert call("report", run, "--runs", runs)["data"] == summary
    assert call("report", run, "--runs", runs, "--ledger")["data"]["balanced"]
    assert call("report", run, "--runs", runs, "--ledger", "--rows", str(tmp_path / "rows.parquet"))["data"]["rows_written"] == 0
    assert call("report", run, "--runs", runs, "--rows", "rows.parquet", expect=2)["error"]["message"] == "--rows goes with --ledger"
    error = call("resume", run, "--runs", runs, expect=7)["error"]
    assert error["type"] == "NothingToResume"
    assert call("resume", "absent", "--runs", runs, expect=7)["error"]["type"] == "RunNotFound"


def test_validate_and_plan_answer_without_a_run(mine: Path) -> None:
    before = sorted(mine.glob("runs/*"))
    assert call("validate", str(mine / "job.yaml"))["data"]["regions"] == ["north", "south"]
    assert call("validate", str(mine / "job.yaml"), "--probe")["data"]["probed"]
    plan = call("plan", str(mine / "job.yaml"), "--set", "sync.every=4")["data"]
    assert plan["rounds"] > 0
    assert {region["region"]: region["rows"] for region in plan["regions"]} == {"north": 1600, "south": 1600}
    assert sorted(mine.glob("runs/*")) == before


def test_mistakes_have_their_exit_codes(mine: Path) -> None:
    job = str(mine / "job.yaml")
    assert "did you mean 'every'?" in call("validate", job, "--set", "sync.evry=4", expect=2)["error"]["message"]
    assert call("validate", job, "--set", "task=task:Absent", expect=3)["error"]["type"] == "TaskImportError"
    error = call("plan", job, "--set", "regions.south.data.train=absent", expect=4)["error"]
    assert error["type"] == "DataUnreachable"
    assert error["about"]["region"] == "south"
    cluster = '{"kind": "class", "path": "distributed:Absent"}'
    assert call("plan", job, "--set", f"regions.north.cluster={cluster}", expect=5)["error"]["type"] == "ClusterUnreachable"


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Its processes, and those that these began; not the one that sees to it that none is left."""
    family = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [child] if "geotrain.guard" not in " ".join(child.cmdline()) else []
    return family


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "Ctrl-C"])
def test_an_interrupt_drains_and_resume_continues(running: tuple[subprocess.Popen[str], Path], how: str) -> None:
    """A terminal's Ctrl-C reaches the whole process group."""
    process, runs = running
    family = family_of(process)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.Signals[how])
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left, [child.cmdline() for child in left]
    assert "Error logging" not in err
    envelope = json.loads(out)
    assert envelope["status"] == "stopped"
    run = envelope["error"]["about"]["run"]
    assert envelope["error"]["remedy"] == f"geotrain resume {run}"
    state = call("status", run, "--runs", str(runs))["data"]
    assert (state["status"], state["resumable"]) == ("stopped", True)
    shorten(runs / run, rounds=state["round"] + 40)
    assert call("resume", run, "--runs", str(runs))["data"]["rounds"] == state["round"] + 40


@pytest.mark.parametrize("force", [False, True], ids=["drained", "forced"])
def test_a_region_is_drained_and_a_stop_from_elsewhere_ends_it(
    running: tuple[subprocess.Popen[str], Path], force: bool, tmp_path: Path
) -> None:
    process, runs = running
    (run,) = [folder.name for folder in runs.iterdir()]
    taken = call("resume", run, "--runs", str(runs), expect=7)["error"]
    assert taken["type"] == "RunTaken", "while another process is in charge"
    if not force:
        north, south = (region["name"] for region in yaml.safe_load((runs / run / "job.yaml").read_text())["regions"])
        assert call("region", "drain", run, south, "--runs", str(runs))["data"] == {"run": run, "region": south, "left": True}
        assert f"{north} stays" in call("region", "drain", run, north, "--runs", str(runs), expect=2)["error"]["message"]
        (region := tmp_path / "region.yaml").write_text(yaml.safe_dump({"name": south, "data": {"train": str(tmp_path / "nothing")}}))
        assert call("region", "add", run, str(region), "--runs", str(runs), expect=2)["error"]["message"]
    family = family_of(process)
    answer = call("stop", run, "--runs", str(runs), *(["--force"] if force else []))["data"]
    assert answer == {"run": run, "status": "stopped"}
    process.communicate(timeout=30)
    assert process.returncode == 75
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left, [child.cmdline() for child in left]
    assert call("stop", run, "--runs", str(runs), expect=7)["error"]["type"] == "NotRunning"


def test_a_kill_leaves_no_process_and_resume_continues(running: tuple[subprocess.Popen[str], Path]) -> None:
    process, runs = running
    family = family_of(process)
    marks = {child.environ().get(MARK) for child in family}
    assert len(family) >= 5, "two workers, what they are forked from and what helps it, and a server"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left, [child.cmdline() for child in left]
    still = [p.info for p in psutil.process_iter(["pid", "environ"]) if (p.info["environ"] or {}).get(MARK) in marks - {None}]
    assert not still
    run = next(runs.iterdir()).name
    state = call("status", run, "--runs", str(runs))["data"]
    done = int(state["checkpoint"].split()[-1])
    shorten(runs / run, rounds=done + 40)
    summary = call("resume", run, "--runs", str(runs))["data"]
    assert summary["rounds"] == done + 40


def shorten(folder: Path, rounds: int) -> None:
    """Let a run that was planned for hours end after some rounds."""
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"rounds": rounds}))


def test_help_teaches() -> None:
    done = subprocess.run([*GEOTRAIN, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0
    assert "Exit codes" in done.stdout
    assert "geotrain data digits" in done.stdout


def test_certificates_and_the_doctor_from_the_command_line(mine: Path, tmp_path: Path) -> None:
    assert call("certs", "init", str(tmp_path / "ca"))["data"]["files"] == [str(tmp_path / f"ca/ca.{end}") for end in ("pem", "key")]
    assert call("certs", "init", str(tmp_path / "ca"), expect=2)["error"]["type"] == "JobError"
    made = call("certs", "region", "tokyo", "--ca", str(tmp_path / "ca"), "--days", "30")["data"]["files"]
    assert all(Path(file).exists() for file in made)
    found = call("doctor", str(mine / "job.yaml"), "--set", f"output.url={tmp_path / 'runs'}")["data"]
    assert {finding["verdict"] for finding in found["findings"]} == {"ok"}
    assert found["links"]
    planned = subprocess.run(
        [*GEOTRAIN, "plan", str(mine / "job.yaml"), "--set", f"output.url={tmp_path / 'runs'}"], capture_output=True, text=True, timeout=240
    )
    assert "as `geotrain doctor` measured them" in planned.stdout
    assert "goes again when it is unanswered for" in planned.stdout
