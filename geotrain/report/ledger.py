"""What a run's folder proves of its data: every row of every epoch in exactly one committed round, or what came in between."""

from collections.abc import Mapping
from typing import Any

from geotrain.data.inventory import Inventory
from geotrain.data.ledger import RoundOfRows, Seating, account
from geotrain.report.folder import RunFolder


def ledger(folder: RunFolder) -> dict[str, Any]:
    """{"balanced": ..., "regions": [{region, epoch, rows, ...}], "why": [...]}.

    Balanced: no row counts twice in an epoch, and every row of a finished epoch counts once, but for those of rounds for which the
    region was away, or that ended in a NaN. Raises NothingToResume for a run that trained nothing.
    """
    job, inventories = folder.job(), folder.read_json("inventory.json")
    seatings: dict[str, dict[int, Seating]] = {}
    why: list[dict[str, Any]] = []
    for event in folder.lines("events.jsonl"):
        if event["event"] == "seated":
            seatings.setdefault(event["region"], {})[event["life"]] = Seating(event["cursor"], event["round"])
        elif event["event"] in ("lost", "rolled_back", "resumed"):
            why.append(event)
    for record in folder.lines("rounds.jsonl"):
        seating = seatings[record["region"]][record["life"]]
        void = bool(record["steps"]) and not record["samples"]
        seating.rounds.append(RoundOfRows(record["round"], record["epoch"], record["done"], record["steps"], void))
    regions = []
    for region, lives in sorted(seatings.items()):
        groups = Inventory.from_dict(inventories[region][0]).row_groups()
        settings: Mapping[str, int] = {"seed": job.train.seed, "mix": job.train.mix_row_groups, "batch_size": job.train.batch_size}
        epochs = account(groups, [lives[life] for life in sorted(lives)], **settings)
        for one in epochs:
            finished = one.epoch < epochs[-1].epoch
            kind = "away" if one.away else "never" if finished else "to_come"
            regions.append(
                {
                    "region": region,
                    "epoch": one.epoch,
                    "rows": one.rows,
                    "once": one.counted - one.more_than_once,
                    "more_than_once": one.more_than_once,
                    "never": 0,
                    "away": 0,
                    "to_come": 0,
                    kind: one.never,
                    "discarded": one.discarded,
                    "again": one.void,
                    "rounds_again": list(one.again),
                }
            )
    balanced = all(not row["more_than_once"] and not row["never"] for row in regions)
    return {"run": folder.run, "balanced": balanced, "regions": regions, "why": why}
