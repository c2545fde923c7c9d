"""What a user begins with: init, data, certs."""

from pathlib import Path
from typing import Annotated

import typer

from geotrain.answers import Format, answering, answers, envelope, people
from geotrain.cli.arguments import Shape, app
from geotrain.examples import ExampleName, make_example, region_names
from geotrain.report.words import count


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
