"""The report at the end: one HTML page without outside parts, and its short form in Markdown."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from geotrain.plan.planner import Plan
from geotrain.report.board import link_rows
from geotrain.report.words import count, duration, money, rate, size

TEMPLATE = Path(__file__).with_name("page.html")


def loss_chart(rounds: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]]) -> str:
    """An SVG: the loss of every region over the rounds, and the held-out metrics at the segments."""
    by_region: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in rounds:
        if record["loss"] is not None:
            by_region[record["region"]].append((record["round"], record["loss"]))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for region, points in sorted(by_region.items()):
        left.plot(*zip(*sorted(points), strict=True), label=region, linewidth=1)
    left.set(title="training loss", xlabel="round")
    if by_region:
        left.legend(frameon=False)
    held_out: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in metrics:
        for name, value in record["metrics"].items():
            held_out[name].append((record["round"], value))
    for name, points in sorted(held_out.items()):
        right.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3, linewidth=1)
    right.set(title="held out, all regions", xlabel="round")
    if held_out:
        right.legend(frameon=False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "geotrain"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def html(summary: Mapping[str, Any], plan: Plan, chart: str, events: Iterable[Mapping[str, Any]]) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"duration": duration, "money": money, "size": size, "count": count, "rate": rate}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(summary=summary, plan=plan, chart=chart, events=list(events))


def markdown(summary: Mapping[str, Any], chart: str) -> str:
    """The short form, for the Prefect UI: the chart travels inside it."""
    rows = [
        f"| {name} | {show(summary['predicted'][key])} | {show(summary['measured'][key])} |"
        for key, name, show in (("seconds", "training time", duration), ("usd", "cost", money), ("wan_bytes", "over the WAN", size))
    ]
    regions = [
        f"| {r['region']} | {count(r['samples'])} | {r['seconds']:.1f} | {r['held_s']:.1f} | {size(r['wire_bytes'])} |"
        for r in summary["regions"]
    ]
    links = [
        f"| {row['link']} | {size(row['wire_bytes'])} | {rate(row['bytes_per_s'])} | {1000 * row['rtt_s']:.0f} | {row['retries']} "
        f"| {row['blocked_s']:.1f} | {row['hidden_s']:.1f} |"
        for row in link_rows({(link["source"], link["target"]): link for link in summary["links"]})
    ]
    held_out = ", ".join(f"**{name} {value:.4f}**" for name, value in summary["metrics"].items()) or "no held-out data"
    image = base64.b64encode(chart.encode()).decode()
    return "\n".join(
        [
            f"# {summary['run']}: {summary['status']}",
            f"{held_out}, {summary['rounds']} rounds, sync `{summary['strategy']}`, run folder `{summary['folder']}`",
            "",
            "| | predicted | measured |",
            "|---|---|---|",
            *rows,
            "",
            "| region | samples | seconds | waited, s | sent over the WAN |",
            "|---|---|---|---|---|",
            *regions,
            "",
            "| link | sent | goodput | round trip, ms | retries | blocked, s | hidden, s |",
            "|---|---|---|---|---|---|---|",
            *links,
            "",
            f"![loss](data:image/svg+xml;base64,{image})",
        ]
    )
