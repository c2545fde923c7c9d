"""Topologies of push strategies: to whom a region sends, and from whom it hears.

mesh   everyone to everyone: R - 1 sends a round
star   the owner to all, all to the owner: 1 send, R - 1 of the owner
ring   each to the next by name (gossip): 1 send, whatever R
Merge strategies have theirs in the view's owners: one owner is a star, many spread the load.
"""

from typing import Literal, assert_never

from geotrain.sync.messages import View

PushTopology = Literal["mesh", "star", "ring"]


def targets(topology: PushTopology, view: View, region: str) -> tuple[str, ...]:
    match topology:
        case "mesh":
            return view.others(region)
        case "star":
            hub = view.owner(0)
            return view.others(region) if region == hub else (hub,)
        case "ring":
            return _neighbour(view, region, 1)
        case _:
            assert_never(topology)


def sources(topology: PushTopology, view: View, region: str) -> tuple[str, ...]:
    return targets(topology, view, region) if topology != "ring" else _neighbour(view, region, -1)


def diameter(topology: PushTopology, view: View) -> int:
    """Sends after which what one region knows is known to all."""
    match topology:
        case "mesh":
            return 1
        case "star":
            return 2
        case "ring":
            return max(1, len(view.regions) - 1)
        case _:
            assert_never(topology)


def _neighbour(view: View, region: str, step: int) -> tuple[str, ...]:
    order = sorted(view.regions)
    other = order[(order.index(region) + step) % len(order)]
    return (other,) if other != region else ()
