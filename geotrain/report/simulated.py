"""What simulations came to: a table for the terminal, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from geotrain.report.words import count, duration, money, size

Row = Mapping[str, Any]
"""`keys`: the values swept over; then what came out, or `refused`: why the job does not take those values."""


def table(rows: Sequence[Row], target: str | None) -> RenderableType:
    """A line per simulation."""
    built = Table(title=f"simulated, to {target}" if target else "simulated, to the end", title_justify="left")
    keys = list(rows[0]["keys"])
    for key in keys:
        built.add_column(key.removeprefix("sync.").removeprefix("links."), style="bold")
    for title in ("time", "cost", "over the WAN", "samples", "rounds", "longest wait", *_metrics(rows)):
        built.add_column(title, justify="right")
    for row in rows:
        values = [str(row["keys"][key]) for key in keys]
        if "refused" in row:
            built.add_row(*values, f"[yellow]{row['refused']}[/]")
            continue
        waited = f"{100 * max(region['held_s'] for region in row['regions'].values()) / max(row['seconds'], 1e-9):.0f} %"
        metrics = [f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "-" for name in _metrics(rows)]
        found = row["reached"] if target else row
        if found is None:
            built.add_row(*values, "not reached", "", "", count(row["samples"]), count(row["rounds"]), waited, *metrics)
        else:
            built.add_row(
                *values,
                duration(found["seconds"]) + (" (stuck)" if row["stuck"] else ""),
                money(found["usd"]),
                size(found["wan_bytes"]),
                count(found["samples"]),
                count(row["rounds"]),
                waited,
                *metrics,
            )
    return built


def _metrics(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row.get("metrics", {})})


def picture(rows: Sequence[Row], target: str | None, folder: Path) -> list[Path]:
    """Time, cost and bytes over the last key swept, a line for each combination of the others; as PNG and SVG.

    With metrics also how the first of them rises over time.
    """
    from matplotlib.figure import Figure

    good = [row for row in rows if "refused" not in row and (row["reached"] if target else True)]
    metric = next(iter(_metrics(rows)), None)
    figure = Figure(figsize=(4 * (4 if metric else 3), 3.4), layout="constrained")
    axes = figure.subplots(1, 4 if metric else 3)
    *others, last = list(rows[0]["keys"]) or ["job"]
    for label, line in _lines(good, others).items():
        where = [row["keys"].get(last, "") for row in line]
        positions = where if all(isinstance(x, int | float) for x in where) else list(range(len(where)))
        for axis, key, unit in zip(axes, ("seconds", "usd", "wan_bytes"), (1, 1, 1e6), strict=False):
            axis.plot(positions, [(row["reached"] if target else row)[key] / unit for row in line], marker="o", markersize=3, label=label)
            if positions is not where:
                axis.set_xticks(positions, [str(x) for x in where])
    for axis, title in zip(axes, ("seconds", "$", "MB over the WAN"), strict=False):
        axis.set(title=title, xlabel=last, ylim=(0, None))
        if all(isinstance(row["keys"].get(last), int | float) for row in good) and len(good) > 1:
            axis.set_xscale("log")
    if metric:
        for row in rows:
            if points := [(point["seconds"], point["metrics"][metric]) for point in row.get("curve", ()) if metric in point["metrics"]]:
                axes[3].plot(*zip(*points, strict=True), linewidth=1, label=" ".join(str(value) for value in row["keys"].values()))
        axes[3].set(title=metric, xlabel="seconds")
        axes[3].legend(frameon=False, fontsize=6)
    if others:
        axes[0].legend(frameon=False, fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "sweep.png", folder / "sweep.svg"]
    for file in files:
        figure.savefig(file)
    return files


def _lines(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(" ".join(str(row["keys"][key]) for key in keys), []).append(row)
    return lines
