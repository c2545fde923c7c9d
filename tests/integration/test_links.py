"""The transport on an emulated WAN: cuts, loss, a slow link, a receiver that is killed in mid-transfer, a link that changes."""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import wan as bench
from bench.emulator import emulator, missing, settled
from bench.measure import ROOT

why = missing()
pytestmark = [
    pytest.mark.skipif(why is not None, reason=why or ""),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the emulator's own files
]


def namespaces() -> str:
    return subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def no_namespace_is_left() -> Iterator[None]:
    before = namespaces()
    yield
    gc.collect()  # so that nothing of the emulator is found by a later test
    assert namespaces() == before


ONCE: dict[str, Any] = {"turns": 1, "raw": 0, "net": "gt-test"}


def test_a_cut_in_the_middle_costs_its_time_and_hardly_a_byte() -> None:
    found = bench.measure("cut", {**ONCE, "mbit": 100, "rtt": 30, "mb": 45, "cut": (1.0, 6.0)})
    assert found["wire / payload"] < 1.1
    assert found["seconds"] > 6.0 + found["line_s"] - 1.0, "it was cut"


def test_loss_on_a_long_link_costs_time_alone() -> None:
    found = bench.measure("loss", {**ONCE, "mbit": 50, "rtt": 200, "mb": 8, "loss": "1%"})
    assert found["wire / payload"] < 1.1


def test_a_slow_link_is_waited_for_without_sending_anything_twice() -> None:
    found = bench.measure("slow", {**ONCE, "mbit": 5, "rtt": 30, "mb": 6})
    assert (found["retries"], found["wire / payload"] < 1.01) == (0, True)


def test_a_receiver_that_is_killed_in_the_middle_gets_it_all_in_its_next_life() -> None:
    settled()
    spec = {**ONCE, "mbit": 50, "rtt": 30, "mb": 12, "ca": ""}
    with emulator()(["a", "b"], name="gt-test", rate="50mbit", rtt="30ms", replace=True) as wan:

        def start(me: str, peer: str, life: int) -> Any:
            words = json.dumps({**spec, "me": me, "peer": peer, "here": wan.ip(me), "there": wan.ip(peer), "life": life})
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
            return wan.popen(me, [sys.executable, "-m", "bench.wan", "end", words], **pipes)

        b = start("b", "a", 1)
        assert "listening" in b.stdout.readline()
        a = start("a", "b", 1)
        assert "sending" in a.stdout.readline()
        time.sleep(1.0)
        b.kill()
        with b:
            b.communicate()
        b = start("b", "a", 2)
        told = [json.loads(line) for line in a.stdout]
        assert told[0]["turn"] == 0
        assert 12e6 < told[0]["wire_bytes"] < 24e6, "from its beginning, once more"
        b.stdin.close()
        assert any(json.loads(line).get("got") == 0 for line in b.stdout)
        for process in (a, b):
            with process:
                assert process.wait(timeout=30) == 0


def test_a_link_that_slows_down_is_adapted_to_and_comes_back(tmp_path: Path) -> None:
    """100 Mbit/s, then 10, then 100: H and bits follow, each change an event, and every row counts once per epoch all the same."""
    found = bench.adapts(tmp_path, "gt-test", mbit=(100.0, 10.0, 100.0), seconds=(10.0, 24.0), mb=4, epochs=2)
    every = [change["every"] for change in found["replanned"]]
    assert every, found
    assert max(after for _, after in every) > 2 * every[0][0], every
    assert every[-1][1] < max(after for _, after in every) / 2, every
    assert len({event["up"] for event in found["bits"]}) > 1, found["bits"]
    assert found["samples"] == found["rows"] * 2
