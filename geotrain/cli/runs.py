"""A run and what becomes of it: run, resume, stop, status, report, region."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from geotrain import checkpoint, guard
from geotrain.answers import Format, answering, answers, envelope, people, watching
from geotrain.cli.arguments import JobFile, Overrides, RunId, Runs, Shape, Without, app, parse_overrides
from geotrain.errors import GeotrainError, JobError, Stopped
from geotrain.job import load_job, load_region
from geotrain.report.folder import RunFolder, list_runs
from geotrain.report.state import state_of
from geotrain.report.words import count, duration, rate, size


@app.command()
def run(job: JobFile, set_: Overrides = None, shape: Shape = Format.text) -> None:
    """Train. Ctrl-C once drains, writes a checkpoint and exits with 75; twice ends at once."""
    with answering(shape):
        overrides = parse_overrides(set_)
        spec = load_job(job, overrides)
        from geotrain.run import Run

        this = Run.start(spec)
        _conduct(this, shape, lambda: _flow("flows.train", "geotrain_train")(job, overrides, run=this.id, return_state=True))


@app.command()
def resume(run: RunId, runs: Runs = "runs", without: Without = None, shape: Shape = Format.text) -> None:
    """Continue a stopped or killed run from its newest checkpoint, with as many workers as there are."""
    with answering(shape):
        from geotrain.run import Run

        this = Run.resume(RunFolder.find(run, runs), people.print, without or ())
        _conduct(this, shape, lambda: _flow("flows.train", "geotrain_resume")(this.folder.url, return_state=True))


def _flow(module: str, name: str) -> Any:
    """From the Prefect side, which takes seconds to import: only once the clusters are opening."""
    return getattr(importlib.import_module(module), name)


def _conduct(this: Any, shape: Format, flow: Callable[[], Any]) -> None:
    """Show a run's way through its flow; answer with its summary."""
    from geotrain.run import hand_over

    people.print(f"run [bold]{this.id}[/]  {this.folder.url}")
    this.board.enter("starting Prefect and the regions' clusters (the very first time Prefect makes its database)")
    guard.start()
    try:
        with watching(this), this:  # entered here too, for what may happen before the flow takes it over
            hand_over(this)
            _flow("flows.conduct", "begin_server")()
            state = flow()
    except KeyboardInterrupt:
        if checkpoint.latest(this.folder.url) is None:
            raise
        raise Stopped(this.id) from None
    if state.is_cancelled():
        if checkpoint.latest(this.folder.url) is None:
            raise KeyboardInterrupt  # there is nothing to resume
        raise Stopped(this.id)
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        raise error if isinstance(error, BaseException) else GeotrainError(state.message)
    summary = this.folder.read_json("summary.json")
    if shape is Format.json:
        envelope("ok", 0, data=summary)
        return
    from geotrain.report.live import plan_table, summary_table

    answers.print(plan_table(this.plan), summary_table(summary))
    if "version" in summary:
        answers.print(f"published as version {summary['version']}: {summary['verdict']}")
    answers.print(f"run folder {this.folder.url}")
    people.print(f"next: open {this.folder.url}/report.html, or `geotrain report {this.id}`", style="cyan")


@app.command()
def stop(
    run: RunId,
    force: Annotated[bool, typer.Option("--force", help="Do not drain: what was trained since the last checkpoint is lost.")] = False,
    runs: Runs = "runs",
    shape: Shape = Format.text,
) -> None:
    """Ask whoever runs it to drain, write a checkpoint and end; wait until that is done."""
    with answering(shape):
        from geotrain.charge import ask, wait_for_end

        folder = RunFolder.find(run, runs)
        ask(folder.url, "force" if force else "stop")
        with people.status(f"asked {folder.run} to {'end at once' if force else 'drain and end'}"):
            wait_for_end(folder.run, folder.url)
        state = state_of(folder)
        if shape is Format.json:
            envelope("ok", 0, data={"run": folder.run, "status": state["status"]})
            return
        answers.print(f"{folder.run} {state['status']}")
        if state["resumable"]:
            people.print(f"next: geotrain resume {folder.run}", style="cyan")


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="A run; without it, all runs are listed.")] = None,
    runs: Runs = "runs",
    shape: Shape = Format.text,
) -> None:
    """What a run is doing, or what became of it."""
    with answering(shape):
        folders = [RunFolder.find(run, runs)] if run else list_runs(runs)
        states = [state_of(folder) for folder in folders]
        if shape is Format.json:
            envelope("ok", 0, data=states[0] if run else states)
            return
        if not states:
            answers.print(f"no runs under {runs}")
        for state in states:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in state["metrics"].items())
            answers.print(f"[bold]{state['run']}[/]  {state['status']}  round {state['round']}/{state['rounds'] or '?'}  {metrics}")
            if run:
                answers.print(f"  last sign {duration(state['silent_s'])} ago; checkpoint: {state['checkpoint'] or 'none'}")
                for region in state["regions"]:
                    answers.print(f"  {region['region']}: {count(region['samples'])} samples, loss {region['loss']}")
                if state["message"]:
                    answers.print(f"  {state['message']}", markup=False)
                if state["resumable"]:
                    people.print(f"next: geotrain resume {state['run']}", style="cyan")


@app.command()
def report(
    run: RunId,
    ledger: Annotated[bool, typer.Option("--ledger", help="What became of every row of every epoch, instead.")] = False,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", help="With --ledger: name every row of a round that did not count (file, row group, row; why) in this Parquet file."
        ),
    ] = None,
    runs: Runs = "runs",
    shape: Shape = Format.text,
) -> None:
    """Predicted against measured, and where the page is."""
    with answering(shape):
        folder = RunFolder.find(run, runs)
        if rows and not ledger:
            raise JobError("--rows goes with --ledger")
        if ledger:
            _show_ledger(folder, rows, shape)
            return
        summary = folder.read_json("summary.json")
        if shape is Format.json:
            envelope("ok", 0, data=summary)
            return
        from geotrain.report.live import summary_table

        answers.print(summary_table(summary))
        for link in summary["links"]:
            answers.print(
                f"{link['source']} > {link['target']}: {link['updates']} updates, {size(link['wire_bytes'])}, {rate(link['bytes_per_s'])}, "
                f"{1000 * link['rtt_s']:.0f} ms, {link['retries']} retries, blocked {duration(link['blocked_s'])}"
            )
        answers.print(f"page: {folder.url}/report.html")


def _show_ledger(folder: RunFolder, rows: Path | None, shape: Format) -> None:
    from geotrain.report.ledger import ledger, write_spent_rows

    found = ledger(folder)
    if rows:
        found["rows_written"] = write_spent_rows(folder, rows)
    if shape is Format.json:
        envelope("ok" if found["balanced"] else "error", 0 if found["balanced"] else 1, data=found)
    else:
        from geotrain.report.live import ledger_tables

        for part in ledger_tables(found):
            answers.print(part)
        if rows:
            answers.print(f"{found['rows_written']} rows of rounds that did not count are named in {rows}", markup=False)
        elif any(row["spent"] for row in found["regions"]):
            people.print(f"next: geotrain report {folder.run} --ledger --rows rows.parquet  names these rows", style="cyan")
    if not found["balanced"]:
        raise SystemExit(1)


region_app = typer.Typer(no_args_is_help=True, help="Regions of a run that is under way.")
app.add_typer(region_app, name="region")


@region_app.command("drain")
def region_drain(run: RunId, region: str, runs: Runs = "runs", shape: Shape = Format.text) -> None:
    """Let a region leave in peace: the segment ends early, with a checkpoint, and the others go on without it."""
    with answering(shape):
        folder = RunFolder.find(run, runs)
        names = [spec.name for spec in folder.job().regions]
        if region not in names:
            raise JobError(f"{run} has no region '{region}'; it has: {', '.join(names)}")
        told = _asked(folder, "drain", region, {"left", "stays"}, f"go on without {region}", {"region": region})
        if told["event"] == "stays":
            raise JobError(f"{region} stays: {told['why']}; `geotrain stop {folder.run}` ends the run")
        if shape is Format.json:
            envelope("ok", 0, data={"run": folder.run, "region": region, "left": True})
            return
        answers.print(f"{region} has left {folder.run}: its cluster can go")


@region_app.command("add")
def region_add(
    run: RunId,
    file: Annotated[Path, typer.Argument(metavar="REGION.yaml", help="What an entry of a job's `regions` holds.")],
    runs: Runs = "runs",
    shape: Shape = Format.text,
) -> None:
    """Let a region come in: its cluster is opened and measured while the others train, then all go on by a new plan."""
    with answering(shape):
        folder = RunFolder.find(run, runs)
        job = load_region(str(file), folder.job())
        tree = job.to_dict()["regions"][-1]
        told = _asked(folder, "add", tree["name"], {"joined", "not_added"}, f"take in {tree['name']}", {"region": tree})
        if told["event"] == "not_added":
            raise JobError(f"{tree['name']} does not come in: {told['message']}")
        if shape is Format.json:
            envelope("ok", 0, data={"run": folder.run, "region": tree["name"], "round": told["round"]})
            return
        answers.print(f"{tree['name']} trains in {folder.run} from round {told['round']} on")


def _asked(folder: RunFolder, what: str, region: str, ends: set[str], words: str, more: dict[str, Any]) -> dict[str, Any]:
    """Ask whoever is in charge of a run, and wait for the event that answers. Raises NotRunning when nobody is there, or any more."""
    from geotrain.charge import ask, in_charge

    in_charge(folder.run, folder.url)
    before = sum(1 for _ in folder.lines("events.jsonl"))
    ask(folder.url, what, **more)
    with people.status(f"asked {folder.run} to {words}"):
        while True:
            for event in list(folder.lines("events.jsonl"))[before:]:
                if event["event"] in ends and event["region"] == region:
                    return event
            in_charge(folder.run, folder.url)
            time.sleep(0.5)
