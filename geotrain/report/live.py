"""The live table in a terminal, and the tables before and after a run."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from geotrain.plan.planner import Plan
from geotrain.report.board import Board
from geotrain.report.words import count, duration, money, rate, size
from geotrain.wan.timing import PART_BYTES

CODECS = ("bf16", "int8", "int4")
"""What `codec: auto` chooses from, as geotrain.plan.bits numbers them."""


class LiveView:
    """Rendered anew at every refresh."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def __rich__(self) -> RenderableType:
        state = self.board.snapshot()
        table = Table(expand=False)
        table.add_column("region", style="bold")
        table.add_column("status", min_width=22)
        for title in ("samples/s", "loss", "rounds", "over the WAN", "waited"):
            table.add_column(title, justify="right", min_width=9)
        for row in state["regions"]:
            planned = f"/{state['rounds']}" if state["rounds"] else ""
            table.add_row(
                row["region"],
                row["status"],
                count(row["samples_per_s"]) if row["samples_per_s"] else "-",
                f"{row['loss']:.4f}" if row["loss"] is not None else "-",
                f"{row['rounds']}{planned}",
                size(row["wire_bytes"]),
                duration(row["held_s"]),
            )
        metrics = "   ".join(f"{name} {value:.4f}" for name, value in state["metrics"].items())
        head = Text(f"{duration(state['seconds'])}  {state['stage']}   {metrics}", style="cyan")
        return Group(head, table, links_table(state["links"])) if state["links"] else Group(head, table)


def ledger_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """The ledger, in sums per region; epochs that are not as they should be in lines of their own; and why."""
    sums = Table(expand=False)
    sums.add_column("region", style="bold")
    names = ("once", "more than once", "never", "away", "discarded", "to come", "again")
    for title in ("epochs", "rows", *names):
        sums.add_column(title, justify="right")
    odd: list[RenderableType] = []
    for region in sorted({row["region"] for row in found["regions"]}):
        rows = [row for row in found["regions"] if row["region"] == region]
        totals = [sum(row[name.replace(" ", "_")] for row in rows) for name in names]
        sums.add_row(region, str(len(rows)), str(rows[0]["rows"]), *map(str, totals))
        told = [
            (row, [f"{row[n.replace(' ', '_')]} {n}" for n in names[1:] if row[n.replace(" ", "_")] and n != "to come"]) for row in rows
        ]
        for same, group in itertools.groupby(told, key=lambda pair: (pair[1], bool(pair[0]["rounds_again"]))):
            epochs = [row for row, _ in group]
            if same[0]:
                which = f"epoch {epochs[0]['epoch']}" + (f" to {epochs[-1]['epoch']}, each" if len(epochs) > 1 else "")
                again = sorted({round for row in epochs for round in row["rounds_again"]})
                odd.append(Text(f"{region}, {which}: {', '.join(same[0])}  {_rounds_of(again)}".rstrip()))
    words = {
        "lost": "{region} was lost: {message}",
        "lost_at_end": "after the last segment: {message}",
        "rolled_back": "back to round {round}: {why}",
        "resumed": "resumed at round {round}",
    }
    why = [Text(words[event["event"]].format(**event), style="dim") for event in found["why"]]
    verdict = "balanced: every row once, or why not is said above" if found["balanced"] else "NOT balanced: rows counted twice, or never"
    explained = Text(
        "away: of rounds that went on without the region; discarded: of rounds that ended in a NaN or an infinity; "
        "again: of rounds that were lost with a worker, trained once more"
    )
    return [sums, *odd, *why, explained, Text(verdict, style="green" if found["balanced"] else "red")]


def _rounds_of(rounds: Sequence[int]) -> str:
    return f"(rounds {rounds[0]} to {rounds[-1]})" if rounds else ""


def links_table(rows: Sequence[Mapping[str, Any]], most: int = 8) -> RenderableType:
    """Per directed link what it carried and how; the busiest."""
    table = Table(expand=False, title=f"the {most} busiest of {len(rows)} links" if len(rows) > most else None, title_justify="left")
    table.add_column("link", style="bold")
    for title in ("sent", "goodput", "round trip", "retries", "blocked", "hidden"):
        table.add_column(title, justify="right", min_width=8)
    for row in rows[:most]:
        table.add_row(
            row["link"],
            size(row["wire_bytes"]),
            rate(row["bytes_per_s"]) if row["bytes_per_s"] else "-",
            f"{1000 * row['rtt_s']:.0f} ms" if row["rtt_s"] else "-",
            str(row["retries"]),
            duration(row["blocked_s"]),
            duration(row["hidden_s"]),
        )
    return table


def plan_table(plan: Plan) -> RenderableType:
    """The plan like a shopping list, with what was rejected and why."""
    table = Table(title="plan", title_justify="left")
    for title in ("region", "rows", "data", "workers", "samples/s", "s/round", "$/round", "why"):
        table.add_column(title, justify="left" if title in ("region", "why", "workers") else "right", overflow="fold")
    for region in plan.regions:
        table.add_row(
            region.region,
            count(region.rows),
            size(region.bytes),
            ", ".join(f"{n} {kind}" for kind, n in region.allocation.items()),
            count(region.samples_per_s),
            f"{region.compute_s:.3f}",
            money(region.usd_per_round).lstrip("$"),
            region.reason,
        )
    lines = [
        f"{plan.rounds} rounds of {plan.round_s:.3f} s in {plan.segments} segments; an update is {size(plan.payload_bytes)}, "
        f"its exchange takes {plan.exchange_s:.3f} s" + (" beside compute" if plan.hidden else f" per round, {_mergers(plan)}"),
        _chosen(plan),
        f"predicted: {duration(plan.seconds)}, {money(plan.usd)}, {size(plan.wan_bytes)} over the WAN; "
        f"a peer is given up after {duration(plan.give_up_s)} out of reach",
        f"a part of {size(PART_BYTES)} goes again when it is unanswered for {_patience(plan)}",
    ]
    lines += [f"rejected: {other.what}: {duration(other.seconds)}, {money(other.usd)} ({other.why_not})" for other in plan.alternatives]
    return Group(table, *[Text(line) for line in lines])


COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def findings_table(findings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What the doctor found, by region, with what to do about it."""
    table = Table(title="doctor", title_justify="left")
    for title in ("region", "check", "", "what", "what to do"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        colour = COLOURS[finding["verdict"]]
        row = (Text(finding["what"]), Text(finding["remedy"]))
        table.add_row(finding["region"], finding["check"], Text(finding["verdict"], style=colour), *row)
    bad = sum(finding["verdict"] == "failed" for finding in findings)
    return Group(table, Text(f"{bad} to mend" if bad else "nothing to mend", style="bold"))


def _patience(plan: Plan) -> str:
    """From the link that is soon impatient to the one that is patient; measured from the first parts on."""
    times = sorted(plan.patience_s.values())
    if not times:
        return "ever: there is nobody to send to"
    least, most = duration(times[0]), duration(times[-1])
    return least if least == most else f"{least} to {most}, by the link"


def _mergers(plan: Plan) -> str:
    """Who merges: one, or each its share."""
    if len(plan.shares) == 1:
        return f"{plan.owner} merges"
    return "merged by " + ", ".join(f"{owner} {100 * share:.0f} %" for owner, share in plan.shares.items())


def _chosen(plan: Plan) -> str:
    """What the plan settled, the job having left some of it open."""
    words = [f"{plan.chosen.every} inner steps between two rounds"]
    if plan.chosen.overlap_steps:
        words.append(f"a merge is used {plan.chosen.overlap_steps} steps later")
    for region, bits in plan.bits.items():
        words.append(f"{region} sends {'/'.join(CODECS[choice] for choice in bits.up)}, merges {CODECS[bits.down]}")
    return "; ".join(words)


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """Predicted against measured."""
    table = Table(title="predicted against measured", title_justify="left")
    for title in ("", "predicted", "measured", "measured / predicted"):
        table.add_column(title, justify="left" if not title else "right")
    show = {"seconds": duration, "usd": money, "wan_bytes": size}
    names = {"seconds": "training time", "usd": "cost", "wan_bytes": "over the WAN"}
    for key, name in names.items():
        predicted, measured = summary["predicted"][key], summary["measured"][key]
        table.add_row(name, show[key](predicted), show[key](measured), f"{measured / predicted:.2f}" if predicted else "-")
    metrics = "   ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items())
    return Group(table, Text(f"held-out: {metrics}" if metrics else "no held-out data", style="bold"))
