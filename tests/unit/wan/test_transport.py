"""What a link's counters say."""

from geotrain.wan.transport import LinkTraffic


def test_a_link_is_never_said_to_have_been_busy_for_less_than_before() -> None:
    """The thread that saw the acknowledgement looked at the clock earlier than who asked meanwhile, and came later."""
    link = LinkTraffic()
    link.begin(10.0)
    assert link.busy(12.5) == 2.5
    link.end(12.0)
    assert link.busy(20.0) == 2.5
    link.begin(21.0)
    assert link.busy(20.5) == 2.5, "it began since"
    link.end(22.0)
    assert link.to_dict()["busy_s"] == 3.5
