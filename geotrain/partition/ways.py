"""Which way every directed link takes: straight, or through the mailboxes."""

from collections.abc import Mapping

from geotrain.job import JobSpec
from geotrain.partition.orders import Directory


def others_with_a_choice(job: JobSpec, region: str) -> list[str]:
    """The regions to which a link from here may be direct, or go through the mailboxes that both have."""
    boxed = {spec.name for spec in job.regions if job.mailbox_of(spec.name) is not None}
    others = [spec.name for spec in job.regions if spec.name != region]
    return [other for other in others if job.link(region, other).transport == "auto" and {region, other} <= boxed]


def directory_of(job: JobSpec, addresses: dict[str, dict[str, str]], tried: Mapping[str, Mapping[str, str | None]]) -> Directory:
    """The way of every directed link. `tried`: region -> other -> why it cannot be dialled; such links go through the mailbox."""
    ways: dict[str, str] = {}
    for region in addresses:
        choice = others_with_a_choice(job, region)
        for other in (name for name in addresses if name != region):
            ways[f"{region}>{other}"] = way = job.link(region, other).transport
            if way == "auto":
                refused = other in choice and tried.get(region, {}).get(other, "it does not listen") is not None
                ways[f"{region}>{other}"] = "mailbox" if refused else "flight"
    return Directory(addresses, ways)
