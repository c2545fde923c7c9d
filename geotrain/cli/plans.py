"""Before a run: validate, plan, doctor, simulate."""

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from geotrain.answers import Format, answering, answers, envelope, people, watching
from geotrain.cli.arguments import JobFile, Overrides, Shape, app, parse_overrides
from geotrain.errors import JobError, NonFiniteLoss
from geotrain.job import load_job
from geotrain.report.words import count, duration


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
    from geotrain.run import InThreads, Run, locate_and_plan

    this = Run.start(spec)
    with watching(this):
        try:
            with this:
                return locate_and_plan(this, InThreads(this))
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
