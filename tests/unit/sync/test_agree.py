"""What a full merge says of the rounds that are in it."""

from geotrain.sync.agree import FullMerge
from geotrain.sync.messages import Produce, RoundMade, Send, StepDone, Update, View
from geotrain.sync.pace import Pace
from geotrain.sync.progress import Progress

VIEW = View(5, ("lima", "oslo"), ("lima",))


def progress(region: str) -> Progress:
    at = Progress(region, VIEW, Pace(10, lambda epoch: 20), life=7)
    at.held = False
    at.count(StepDone(8, 0.0, 2))
    at.close_round(0.0)
    at.count(StepDone(4, 0.0, 1))
    return at


def made(region: str, round: int, steps: int) -> RoundMade:
    return RoundMade(region, 7, round, 0, 2 * round + steps, steps, 4 * steps)


def test_it_names_the_last_rounds_of_its_members_and_what_they_have_of_regions_that_are_away() -> None:
    lima, oslo = progress("lima"), progress("oslo")
    for part in (made("cairo", 4, 2), made("cairo", 5, 1), made("cairo", 5, 2), made("cairo", 3, 2), made("lima", 0, 2)):
        oslo.heard_of(part)
    merge = FullMerge(lima)
    assert isinstance(merge.begin()[0], Produce)
    (sent,) = [step.update for step in FullMerge(oslo).begin() if isinstance(step, Send)]
    (mean,) = [step.update for step in merge.received(sent) if isinstance(step, Send)]
    assert isinstance(mean, Update)
    assert mean.made == (made("lima", 0, 2), made("lima", 1, 1), made("oslo", 0, 2), made("oslo", 1, 1), made("cairo", 5, 2))
    assert lima.newest["cairo"] == made("cairo", 5, 2), "it holds that too from now on, and names it in the next"
