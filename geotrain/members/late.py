"""Checkpoints that nobody was left to commit: the flow's process died, and the regions ended their segment without it."""

import json
from collections.abc import Mapping, Sequence

from geotrain.checkpoint import Manifest, StoredPart, commit, join, read_bytes
from geotrain.metrics import add_sums, means
from geotrain.partition.orders import SegmentDone
from geotrain.report.folder import RunFolder
from geotrain.report.ledger import samples_counted
from geotrain.report.seats import seats_of
from geotrain.stores import open_url
from geotrain.sync.messages import RoundMade


def commit_late(folder: RunFolder, last: Manifest | None, regions: Sequence[str], *, agree: bool) -> Manifest | None:
    """Commit, one after the other, the checkpoints after `last` for which every region that was in wrote its part; returns the newest.

    None when there is none. `agree`: the strategy leaves all regions with the same parameters, and that is checked. What was sent over
    the WAN in those segments is in no total.
    """
    fs, path = open_url(join(folder.url, "checkpoints"))
    fs.invalidate_cache()
    folders = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)) if fs.exists(path) else []
    newest, (lives, lost) = last, _seats(folder)
    for name in folders:
        if newest is not None and int(name) <= newest.round:
            continue
        there = [region for region in regions if fs.exists(join(path, name, f"{region}.done.json"))]
        notes = {region: json.loads(read_bytes(join(folder.url, "checkpoints", name, f"{region}.done.json"))) for region in there}
        told = {region: note for region, note in notes.items() if note["done"]["life"] == lives.get(region)}  # others were given up
        present = {part.region for part in newest.parts if part.round == newest.round} & set(regions) if newest else set(regions)
        if not told or not present - lost <= told.keys():
            continue
        done = [SegmentDone.from_dict(note["done"]) for note in told.values()]
        if {part.round for part in done} != {int(name)} or (agree and len({part.sha256 for part in done}) != 1):
            continue
        _make_up_rounds(folder, done)
        samples, (_, held) = samples_counted(folder, int(name)), seats_of(folder, int(name))
        newest = _manifest(folder.run, newest, done, samples, [StoredPart(**note["part"]) for note in told.values()])
        commit(folder.url, newest)
        hashes = {part.region: part.sha256[:12] for part in done}
        absent = {region: first for region, first in held.items() if region not in told}
        facts = {"metrics": newest.metrics, "hashes": hashes, "held_of_absent": absent}
        folder.event("segment", segment=newest.segment, round=newest.round, late=True, **facts)
    return newest if newest is not last else None


def _seats(folder: RunFolder) -> tuple[dict[str, int], set[str]]:
    """(region -> life of its last seat, regions that were away) when the run was last heard of."""
    lives: dict[str, int] = {}
    lost: set[str] = set()
    for event in folder.lines("events.jsonl"):
        if event["event"] == "seated":
            lives[event["region"]] = event["life"]
            lost.discard(event["region"])
        elif event["event"] == "lost":
            lost.add(event["region"])
    return lives, lost


def _make_up_rounds(folder: RunFolder, done: Sequence[SegmentDone]) -> None:
    """Put into rounds.jsonl what nobody was left to put there."""
    records = (record for record in folder.lines("rounds.jsonl") if not record.get("by_others"))
    there = {(record["region"], record["life"], record["round"]) for record in records}
    for part in done:
        for made in (RoundMade(part.region, part.life, *closed) for closed in part.closed):
            if (made.region, made.life, made.round) not in there:
                folder.round_by_others(made)
    folder.flush()


def _manifest(
    run: str, last: Manifest | None, done: Sequence[SegmentDone], samples: Mapping[str, int], parts: Sequence[StoredPart]
) -> Manifest:
    totals: dict[str, dict[str, float]] = {region: dict(sums) for region, sums in last.totals.items()} if last else {}
    for part in done:
        before = totals.get(part.region, {})
        add = {"seconds": part.seconds, "held_s": part.held_s, "wire_bytes": 0, "egress_usd": 0}
        totals[part.region] = {name: before.get(name, 0) + value for name, value in add.items()}
    for region, total in totals.items():
        total["samples"] = samples.get(region, 0)
    there = {part.region for part in done}
    kept: list[StoredPart] = [part for part in last.parts if part.region not in there] if last else []
    return Manifest(
        run=run,
        segment=done[0].segment,
        round=done[0].round,
        epoch=last.epoch if last else 0,
        samples=int(sum(total["samples"] for total in totals.values())),
        parent=last.parent if last else None,
        metrics=means(add_sums([part.metrics for part in sorted(done, key=lambda part: part.region)])),
        totals=totals,
        parts=(*parts, *kept),
    )
