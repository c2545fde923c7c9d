"""geotrain's command line, and its composition root: here the flows, the library and the terminal meet."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from geotrain import __version__, checkpoint, guard
from geotrain.answers import Format, answering, answers, envelope, people, watching
from geotrain.errors import GeotrainError, JobError, NonFiniteLoss, Stopped
from geotrain.examples import ExampleName, make_example, region_names
from geotrain.job import load_job
from geotrain.report.folder import RunFolder, list_runs
from geotrain.report.state import state_of
from geotrain.report.words import count, duration, rate, size

EXIT_CODES = """
Exit codes: 0 done; 2 the job or the command line is wrong; 3 your task; 4 data; 5 a cluster; 6 between regions;
7 run folder, checkpoint or registry; 75 stopped on request, `geotrain resume` continues; 130 interrupted before there was
anything to keep.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train one PyTorch model on data that lives in several regions, without moving the data.\n\n"
    "A first look: [bold]geotrain data digits --regions 3 --skew 0.5[/], then "
    "[bold]geotrain run deployments/jobs/digits-3-regions.yaml[/].",
    epilog=EXIT_CODES.replace("\n", " "),
)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="The job file (YAML).")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the path or URL of its folder.")]
Runs = Annotated[str, typer.Option("--runs", help="Where run folders lie.")]
Shape = Annotated[Format, typer.Option("--format", help="text for people; json prints one envelope on stdout.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the job: --set sync.every=16 --set train.epochs=5.")
]


def main() -> None:
    """The `geotrain` command."""
    prefect_defaults()
    app()


def prefect_defaults() -> None:
    """What Prefect is to do in a process that geotrain started; whatever the user has set stands."""
    defaults = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def parse_overrides(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE, the value as YAML. Raises JobError."""
    parsed = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign:
            raise JobError(f"--set {pair}: write KEY=VALUE")
        parsed[key] = yaml.safe_load(value)
    return parsed


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        answers.print(__version__)
        raise typer.Exit


@app.command()
def validate(
    job: JobFile,
    probe: Annotated[bool, typer.Option("--probe", help="Also take a batch in every region, on its own workers.")] = False,
    set_: Overrides = None,
    shape: Shape = Format.text,
) -> None:
    """Check a job file; with --probe, check it where it will run.

    Without --probe: every key, and that the task can be imported here. With it: clusters, data, columns, schemas, a training
    step, and that every region can write the output.
    """
    with answering(shape):
        spec = load_job(job, parse_overrides(set_))
        from geotrain.clusters.code import pack
        from geotrain.task import load_task

        pack(spec.code)
        sys.path[:0] = [str(path.parent if path.is_file() else path) for path in map(Path, spec.code)]
        load_task("here", spec.task, spec.task_args)
        if probe:
            _planned(spec)
        data = {"job": spec.name, "regions": [region.name for region in spec.regions], "probed": probe, "digest": spec.digest()}
        if shape is Format.json:
            envelope("ok", 0, data=data)
        else:
            answers.print(f"{job} is a valid job: {spec.name}, {len(spec.regions)} regions, {spec.sync.strategy}")
            people.print(f"next: geotrain plan {job}" if not probe else f"next: geotrain run {job}", style="cyan")


@app.command()
def plan(job: JobFile, set_: Overrides = None, shape: Shape = Format.text) -> None:
    """Look at every region's data and speed, and print who would do how much, how long, and for what money. Trains nothing."""
    with answering(shape):
        decided = _planned(load_job(job, parse_overrides(set_)))
        if shape is Format.json:
            envelope("ok", 0, data=decided.to_dict())
            return
        from geotrain.measured import told
        from geotrain.report.live import plan_table

        answers.print(plan_table(decided))
        if links := told(load_job(job, parse_overrides(set_))):
            answers.print(links)
        people.print(f"next: geotrain run {job}", style="cyan")


@app.command()
def doctor(job: JobFile, set_: Overrides = None, shape: Shape = Format.text) -> None:
    """Look for what is wrong before it costs: from every region's own workers. Trains nothing.

    Clusters, versions, clocks, certificates, data and columns, buckets, devices; then every directed link is dialled and measured,
    some seconds each. `geotrain plan` and `geotrain run` believe the measured links from then on.
    """
    with answering(shape):
        spec = load_job(job, parse_overrides(set_))
        from geotrain.doctor import examine
        from geotrain.run import Run

        this = Run.start(spec, believe=False)
        with watching(this):
            try:
                with this:
                    found = examine(this)
            finally:
                this.folder.remove()
        if shape is Format.json:
            tree = {"findings": [asdict(finding) for finding in found.findings], "links": {p: asdict(m) for p, m in found.links.items()}}
            envelope("ok" if not found.exit_code else "error", found.exit_code, data=tree)
        else:
            from geotrain.report.live import findings_table

            answers.print(findings_table([asdict(finding) for finding in found.findings]))
            if found.kept_at:
                answers.print(f"measured links, which the plan believes from now on: {found.kept_at}")
            if not found.exit_code:
                people.print(f"next: geotrain plan {job}", style="cyan")
    if found.exit_code:
        raise SystemExit(found.exit_code)


def _planned(spec: Any) -> Any:
    """Locality and plan, without Prefect and without a run to keep."""
    from geotrain.run import Run

    this = Run.start(spec)
    with watching(this):
        try:
            with this:
                return this.look_and_plan()
        finally:
            this.folder.remove()


class Numerics(StrEnum):
    none = "none"
    real = "real"


@app.command()
def simulate(
    job: JobFile,
    numerics: Annotated[
        Numerics, typer.Option(help="none: only time and bytes move. real: it really trains, here, and gives metrics over virtual time.")
    ] = Numerics.none,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=A,B,...", help="Simulate with each of these values; given twice, with every combination."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="METRIC>=X", help="Stop at this held-out metric, and compare the ways there.")
    ] = None,
    regions: Annotated[int | None, typer.Option(min=1, help="So many regions: copies of the job's in turn.")] = None,
    out: Annotated[Path, typer.Option(help="Where sweep.png, sweep.svg and results.json go.")] = Path("simulations"),
    set_: Overrides = None,
    shape: Shape = Format.text,
) -> None:
    """Run the job on a virtual clock: how long, how much, how good, over a WAN that need not be there.

    Speeds are the devices' samples_per_s, or simulate.samples_per_s; the WAN is `links`, with links.trace for how it changes.
    """
    with answering(shape):
        from geotrain.simulate.simulate import many, parse_goal, simulate, sweeps

        goal = parse_goal(target) if target else None
        rows: list[dict[str, Any]] = []
        for values in sweeps([parse_axis(axis) for axis in sweep or []]):
            told = " ".join(f"{key}={value}" for key, value in values.items()) or job
            with people.status(f"simulating {told}") as status:
                try:
                    spec = load_job(job, {**parse_overrides(set_), **values}, fit_strategy="sync.strategy" in values)
                except JobError as error:
                    if not values:
                        raise
                    rows.append({"keys": values, "refused": error.message.splitlines()[-1].strip(" -")})
                    continue
                spec = many(spec, regions) if regions else spec

                def tell(point: Any, told: str = told, status: Any = status) -> None:
                    metrics = " ".join(f"{name} {value:.4f}" for name, value in point.metrics.items())
                    status.update(f"simulating {told}: {duration(point.seconds)}, {count(point.samples)} samples  {metrics}")

                until = goal or (spec.train.until if numerics is Numerics.real else None)
                try:
                    outcome = simulate(spec, real=numerics is Numerics.real, goal=until, told=tell)
                except NonFiniteLoss as error:
                    if not values:
                        raise
                    rows.append({"keys": values, "refused": error.message})
                    continue
            rows.append({"keys": values, **asdict(outcome)})
        _show_simulated(rows, target, out, shape)


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """KEY=A,B,... Raises JobError."""
    key, sign, values = text.partition("=")
    if not sign or not values:
        raise JobError(f"--sweep {text}: write KEY=A,B,...")
    return key, [yaml.safe_load(value) for value in values.split(",")]


def _show_simulated(rows: list[dict[str, Any]], target: str | None, out: Path, shape: Format) -> None:
    from geotrain.report import simulated

    files: list[Path] = []
    if any("refused" not in row for row in rows) and len(rows) > 1:
        files = simulated.picture(rows, target, out)
        (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    if shape is Format.json:
        envelope("ok", 0, data={"simulations": rows, "files": [str(file) for file in files]})
        return
    answers.print(simulated.table(rows, target))
    if any(row.get("stuck") for row in rows):
        answers.print("stuck: too few regions came back for the run to end", style="yellow")
    for file in files:
        answers.print(str(file))


@app.command()
def run(job: JobFile, set_: Overrides = None, shape: Shape = Format.text) -> None:
    """Train. Ctrl-C once drains, writes a checkpoint and exits with 75; twice ends at once."""
    with answering(shape):
        overrides = parse_overrides(set_)
        spec = load_job(job, overrides)
        from geotrain.run import Run

        this = Run.start(spec)
        _conduct(this, shape, lambda: _flow("flows.train", "geotrain_train")(job, overrides, this.id, return_state=True))


@app.command()
def resume(run: RunId, runs: Runs = "runs", shape: Shape = Format.text) -> None:
    """Continue a stopped or killed run from its newest checkpoint."""
    with answering(shape):
        from geotrain.run import Run

        this = Run.resume(RunFolder.find(run, runs), people.print)
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
        status = state_of(folder)["status"]
        if shape is Format.json:
            envelope("ok", 0, data={"run": folder.run, "status": status})
            return
        answers.print(f"{folder.run} {status}")
        if status != "completed":
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
    runs: Runs = "runs",
    shape: Shape = Format.text,
) -> None:
    """Predicted against measured, and where the page is."""
    with answering(shape):
        folder = RunFolder.find(run, runs)
        if ledger:
            _show_ledger(folder, shape)
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


def _show_ledger(folder: RunFolder, shape: Format) -> None:
    from geotrain.report.ledger import ledger

    found = ledger(folder)
    if shape is Format.json:
        envelope("ok" if found["balanced"] else "error", 0 if found["balanced"] else 1, data=found)
    else:
        from geotrain.report.live import ledger_tables

        answers.print(*ledger_tables(found))
    if not found["balanced"]:
        raise SystemExit(1)


@app.command()
def data(
    example: Annotated[ExampleName, typer.Argument(help="Which example's data to make.")],
    regions: Annotated[str, typer.Option(help="How many regions, or their names: tokyo,paris.")] = "3",
    skew: Annotated[float, typer.Option(min=0, max=1, help="0: alike everywhere. 1: each class, or package, in one region only.")] = 0.5,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows in all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.  [default: data/EXAMPLE]")] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same data.")] = 0,
    shape: Shape = Format.text,
) -> None:
    """Make the data of an example: one folder per region, as Parquet, differently distributed."""
    with answering(shape):
        names = region_names(int(regions)) if regions.isdigit() else tuple(regions.split(","))
        folder = out or Path("data") / example
        written = make_example(example, folder, names, skew=skew, rows=rows, seed=seed)
        if shape is Format.json:
            envelope("ok", 0, data={"folder": str(folder), "rows": written})
            return
        for region, number in written.items():
            answers.print(f"{folder / region}: {count(number)} rows to train on, a quarter as many held out")


region_app = typer.Typer(no_args_is_help=True, help="Regions of a run that is under way.")
app.add_typer(region_app, name="region")


@region_app.command("drain")
def region_drain(run: RunId, region: str, runs: Runs = "runs", shape: Shape = Format.text) -> None:
    """Let a region leave in peace: the segment ends early, with a checkpoint, and the others go on without it."""
    with answering(shape):
        from geotrain.charge import ask, in_charge

        folder = RunFolder.find(run, runs)
        names = [spec.name for spec in folder.job().regions]
        if region not in names:
            raise JobError(f"{run} has no region '{region}'; it has: {', '.join(names)}")
        in_charge(folder.run, folder.url)
        ask(folder.url, f"drain {region}")
        ended = {"left", "stays"}
        with people.status(f"asked {folder.run} to go on without {region}"):
            while not (told := [e for e in folder.lines("events.jsonl") if e["event"] in ended and e["region"] == region]):
                in_charge(folder.run, folder.url)
                time.sleep(0.5)
        if told[-1]["event"] == "stays":
            raise JobError(f"{region} stays: {told[-1]['why']}; `geotrain stop {folder.run}` ends the run")
        if shape is Format.json:
            envelope("ok", 0, data={"run": folder.run, "region": region, "left": True})
            return
        answers.print(f"{region} has left {folder.run}: its cluster can go")


certs_app = typer.Typer(no_args_is_help=True, help="Certificates for a trial: a CA, and one for every region. Bring your own in earnest.")
app.add_typer(certs_app, name="certs")
CaFolder = Annotated[Path, typer.Option("--ca", help="The CA's folder.")]


@certs_app.command("init")
def certs_init(folder: Annotated[Path, typer.Argument(help="A folder for the CA.")] = Path("ca"), shape: Shape = Format.text) -> None:
    """Make a CA: ca.pem goes to every region, ca.key stays here and signs."""
    with answering(shape):
        from geotrain.wan import certs

        _told(shape, certs.make_ca(folder), f"next: geotrain certs region NAME --ca {folder}, for each region")


@certs_app.command("region")
def certs_region(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The region, as the job calls it.")],
    ca: CaFolder = Path("ca"),
    also: Annotated[list[str] | None, typer.Option("--also", metavar="HOST", help="A further DNS name, as a scheduler's.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long it is valid.")] = 365,
    shape: Shape = Format.text,
) -> None:
    """Make a region's certificate and key, or make them anew: running regions take the new ones at their next segment."""
    with answering(shape):
        from geotrain.wan import certs

        path = certs.make_region(ca, name, also or (), days)
        files = f"{{ca: {ca / 'ca.pem'}, cert: {path}, key: {path.with_suffix('.key')}}}"
        _told(shape, path, f"in the job, region {name}: wan: {{listen: ..., security: {files}}}")


def _told(shape: Format, path: Path, next_step: str) -> None:
    files = [str(path), str(path.with_suffix(".key"))]
    if shape is Format.json:
        envelope("ok", 0, data={"files": files})
        return
    for file in files:
        answers.print(file)
    people.print(next_step, style="cyan", markup=False)


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.")], shape: Shape = Format.text) -> None:
    """Begin your own: a task in Python, a job in YAML, a little made-up data. It runs as it is."""
    from geotrain.starter import init as write

    with answering(shape):
        files = write(folder)
        if shape is Format.json:
            envelope("ok", 0, data={"files": [str(file) for file in files]})
            return
        for file in files:
            answers.print(str(file))
        people.print(f"next: geotrain run {folder / 'job.yaml'}", style="cyan")


if __name__ == "__main__":
    main()
