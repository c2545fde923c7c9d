from geotrain.partition.signs import COLD, FROZEN_S, Signs
from tests.making import Clock

LIFE = 7


def looking(signs: Signs, clock: Clock, seconds: float) -> float | None:
    """Look five times a second, until something is found."""
    for _ in range(int(5 * seconds)):
        clock.now += 0.2
        if (silent_s := signs.no_step_for(60.0)) is not None:
            return silent_s
    return None


def seated() -> tuple[Signs, Clock]:
    signs = Signs(clock := Clock())
    signs.seated({LIFE})
    signs.begin()
    return signs, clock


def test_a_leader_that_makes_no_step_is_found_later_before_its_first_round() -> None:
    signs, clock = seated()
    assert looking(signs, clock, 59 * COLD) is None
    signs.heard({"rounds": [], "life": LIFE})
    assert looking(signs, clock, 59 * COLD) is None, "it waits, and says so"
    signs.heard({"rounds": [{}], "life": LIFE})
    assert 60 < (looking(signs, clock, 70) or 0) < 61
    signs.begin()
    assert looking(signs, clock, 59) is None, "the next segment counts from its beginning"
    assert looking(signs, clock, 2) is not None


def test_what_earlier_seats_say_is_no_sign() -> None:
    signs, clock = seated()
    signs.heard({"rounds": [{}], "life": LIFE})
    assert looking(signs, clock, 59) is None
    signs.heard({"rounds": [{}], "life": LIFE - 1})
    assert looking(signs, clock, 2) is not None


def test_what_follows_the_last_step_takes_its_time() -> None:
    signs, clock = seated()
    signs.heard({"rounds": [{}], "life": LIFE, "closing": True})
    assert looking(signs, clock, 1000) is None
    signs.heard({"rounds": [], "life": LIFE})
    assert looking(signs, clock, 1000) is None


def test_who_did_not_look_has_missed_nothing() -> None:
    signs, clock = seated()
    signs.heard({"rounds": [{}], "life": LIFE})
    assert signs.no_beat_for("worker", 1.0) is None
    clock.now += 600
    assert looking(signs, clock, 59) is None
    assert signs.no_beat_for("worker", 1.0) is None


def test_a_process_without_a_heartbeat_is_found() -> None:
    signs, clock = seated()
    signs.heard({"rounds": [], "life": LIFE, "closing": True})
    for beat in (1.0, 2.0):
        assert signs.no_beat_for("worker", beat) is None
        assert looking(signs, clock, FROZEN_S - 1) is None
        assert signs.no_beat_for("worker", beat) is None
    assert looking(signs, clock, 2) is None
    assert FROZEN_S < (signs.no_beat_for("worker", 2.0) or 0) < FROZEN_S + 2
