"""The transport on an emulated WAN: goodput beside a raw TCP transfer of the same size in the same run, cuts, a slow link, what it costs.

Needs root and a WAN emulator (bench/emulator.py). One end runs in each of two network namespaces; raw and ours take turns.
"""

import itertools
import json
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.emulator import emulator, settled
from bench.measure import ROOT, run_job, spread, write
from bench.prediction import clusters, job_of, play
from geotrain.job import SecurityFiles
from geotrain.sync.messages import Kind, Update
from geotrain.wan import certs
from geotrain.wan.flight import FlightTransport
from geotrain.wan.transport import Identity

PORT, RAW_PORT = 9000, 9100
TURNS = 6
"""Pairs of transfers; the first opens the connections and does not count."""

CASES: dict[str, dict[str, Any]] = {
    "20 Mbit/s, 30 ms": {"mbit": 20, "rtt": 30, "mb": 12},
    "100 Mbit/s, 30 ms": {"mbit": 100, "rtt": 30, "mb": 45},
    "100 Mbit/s, 30 ms, TLS": {"mbit": 100, "rtt": 30, "mb": 45, "tls": True},
    "500 Mbit/s, 30 ms": {"mbit": 500, "rtt": 30, "mb": 45},
    "500 Mbit/s, 100 ms, beside 8 raw connections": {"mbit": 500, "rtt": 100, "mb": 180, "raw": 8},
    "100 Mbit/s, 30 ms, cut for 60 s": {"mbit": 100, "rtt": 30, "mb": 45, "cut": (1.0, 60.0), "turns": 1, "raw": 0},
    "100 Mbit/s, 200 ms, 1 % lost, cut for 60 s": {
        "mbit": 100,
        "rtt": 200,
        "mb": 45,
        "loss": "1%",
        "cut": (2.0, 60.0),
        "turns": 1,
        "raw": 0,
    },
    "5 Mbit/s, 30 ms, 100 MB": {"mbit": 5, "rtt": 30, "mb": 100, "turns": 1, "raw": 0},
    "training beside it, 100 Mbit/s both ways": {"mbit": 100, "rtt": 30, "mb": 45, "train": True},
}


# The ends: `python -m bench.wan end {...}` in a namespace.


def end(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    size = int(spec["mb"] * 1e6)
    credentials = None
    if spec.get("tls"):
        folder = Path(spec["ca"])
        files = SecurityFiles(ca=str(folder / "ca.pem"), cert=str(folder / f"{spec['me']}.pem"), key=str(folder / f"{spec['me']}.key"))
        credentials = certs.load(spec["me"], files)
    peers = {spec["peer"]: f"{spec['there']}:{PORT}"}
    transport = FlightTransport(
        Identity("bench", spec["me"], "bench", "bench", spec.get("life", 1), frozenset("ab"), size),
        f"{spec['here']}:{PORT}",
        peers,
        credentials=credentials,
        give_up_s=300,
        expect=lambda to: (spec["rtt"] / 1000, spec["mbit"] * 1e6 / 8),
    )
    act = {("a", False): sends, ("b", False): receives, ("a", True): trains, ("b", True): echoes}[spec["me"], bool(spec.get("train"))]
    try:
        act(spec, transport, size)
    finally:
        transport.close()


def used() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def update(number: int, origin: str = "a") -> Update:
    return Update(Kind.PUSH, 1, origin, number)


def sends(spec: dict[str, Any], transport: FlightTransport, size: int) -> None:
    payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
    raw = _Raw(spec) if spec["raw"] else None
    before_rss = peak()
    for number in range(spec["turns"]):
        cpu, began = used(), time.monotonic()
        transport.send("b", update(number), payload)
        if number == 0:
            tell(sending=True)
        while not transport.drain(1.0):
            transport.receive(0)
        seconds, cpu = time.monotonic() - began, used() - cpu
        raw_s = raw.send(payload) if raw else None
        link = transport.traffic["b"]
        tell(turn=number, seconds=seconds, raw_s=raw_s, cpu_s=cpu, wire_bytes=link.wire_bytes, retries=link.retries, rtt_s=link.rtt_s)
    tell(extra_bytes=peak() - before_rss)


def receives(spec: dict[str, Any], transport: FlightTransport, size: int) -> None:
    if spec["raw"]:
        threading.Thread(target=_serve_raw, args=(spec, size), daemon=True).start()
    tell(listening=True)
    before_rss = peak()
    for _ in range(spec["turns"]):
        cpu = used()
        while (delivery := transport.receive(1.0)) is None:
            pass
        tell(got=delivery.update.round, cpu_s=used() - cpu)
        del delivery
    tell(extra_bytes=peak() - before_rss - size)
    sys.stdin.read()  # until the other end is done


class _Raw:
    """So many TCP connections, kept open, over which a payload is striped."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.sockets = [socket.create_connection((spec["there"], RAW_PORT)) for _ in range(spec["raw"])]

    def send(self, payload: torch.Tensor) -> float:
        data = payload.numpy().data
        each = len(data) // len(self.sockets)

        def stripe(number: int) -> None:
            self.sockets[number].sendall(data[number * each : (number + 1) * each])
            self.sockets[number].recv(1)

        began = time.monotonic()
        threads = [threading.Thread(target=stripe, args=(number,)) for number in range(len(self.sockets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - began


def _serve_raw(spec: dict[str, Any], size: int) -> None:
    each = size // spec["raw"]
    listener = socket.create_server((spec["here"], RAW_PORT))

    def serve(connection: socket.socket) -> None:
        buffer = bytearray(2**20)
        while True:
            left = each
            while left:
                count = connection.recv_into(buffer, min(left, len(buffer)))
                if not count:
                    return
                left -= count
            connection.sendall(b"k")

    for _ in range(spec["raw"]):
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


STRETCH_S = 8.0


def trains(spec: dict[str, Any], transport: FlightTransport, size: int) -> None:
    """Steps that only compute, on one core; in turn with and without updates that come and go."""
    weights = torch.randn(600, 600)

    def steps(seconds: float, between: Callable[[], None]) -> float:
        nonlocal weights
        began, made = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            for _ in range(10):
                weights = torch.tanh(weights @ weights)
            made += 1
            between()
        return made / (time.monotonic() - began)

    payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
    sent = 0

    def exchange() -> None:
        nonlocal sent
        transport.receive(0)
        if transport.drain(0):
            transport.send("b", update(sent), payload)
            sent += 1

    steps(1.0, lambda: None)
    for turn in range(spec["turns"]):
        alone = steps(STRETCH_S, lambda: None)
        before = transport.traffic["b"].wire_bytes if sent else 0
        beside = steps(STRETCH_S, exchange)
        while not transport.drain(1.0):
            transport.receive(0)
        tell(turn=turn, alone=alone, beside=beside, wire_bytes=transport.traffic["b"].wire_bytes - before)


def echoes(_spec: dict[str, Any], transport: FlightTransport, _size: int) -> None:
    """Sends as much as it gets."""
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    tell(listening=True)
    while not over.is_set():
        if (delivery := transport.receive(0.2)) is not None:
            transport.send("a", update(delivery.update.round, "b"), delivery.payload)


# The measurement.


def measure(name: str, case: dict[str, Any]) -> dict[str, Any]:
    settled()
    with (
        tempfile.TemporaryDirectory() as ca,
        emulator()(["a", "b"], name=case.get("net", "gt-bench"), rate=f"{case['mbit']}mbit", rtt=f"{case['rtt']}ms", replace=True) as wan,
    ):
        if case.get("tls"):
            certs.make_ca(Path(ca))
            for region in "ab":
                certs.make_region(Path(ca), region)
        if "loss" in case:
            wan.set("all", loss=case["loss"])
        spec = {"turns": TURNS, "raw": 1, "ca": ca, **case}
        ends = {me: _start(wan, spec, me, peer) for me, peer in (("b", "a"), ("a", "b"))}
        told: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
        for line in ends["a"].stdout:
            told["a"].append(json.loads(line))
            if "sending" in told["a"][-1] and "cut" in case:
                threading.Thread(target=_cut, args=(wan, *case["cut"])).start()
        ends["b"].stdin.close()
        told["b"] = [json.loads(line) for line in ends["b"].stdout]
        for process in ends.values():
            with process:  # closes its pipes
                if process.wait(timeout=60):
                    raise SystemExit(f"{name}: an end failed")
    return _summary(case, told)


def _start(wan: Any, spec: dict[str, Any], me: str, peer: str) -> Any:
    words = json.dumps({**spec, "me": me, "peer": peer, "here": wan.ip(me), "there": wan.ip(peer)})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = wan.popen(me, [sys.executable, "-m", "bench.wan", "end", words], **pipes)
    if me == "b":
        process.stdout.readline()
    return process


def _cut(wan: Any, after_s: float, for_s: float) -> None:
    time.sleep(after_s)
    wan.cut("a-b")
    time.sleep(for_s)
    wan.heal("a-b")


def _summary(case: dict[str, Any], told: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    turns = [fact for fact in told["a"] if "turn" in fact]
    if case.get("train"):
        later = turns[1:]
        return {
            "steps beside / alone": spread([turn["beside"] / turn["alone"] for turn in later]),
            "mbit_per_s": spread([turn["wire_bytes"] * 8e-6 / STRETCH_S for turn in later]),
        }
    size = case["mb"] * 1e6
    found: dict[str, Any] = {"retries": turns[-1]["retries"], "wire / payload": round(turns[-1]["wire_bytes"] / size / len(turns), 4)}
    received = [fact for fact in told["b"] if "got" in fact]
    extra = {me: next(fact["extra_bytes"] for fact in told[me] if "extra_bytes" in fact) for me in told}
    found["extra memory / payload"] = {"sender": round(extra["a"] / size, 2), "receiver": round(extra["b"] / size, 2)}
    if len(turns) == 1:
        line_s = size * 8 / (case["mbit"] * 1e6)
        return {**found, "seconds": round(turns[0]["seconds"], 1), "line_s": round(line_s, 1), "cut_s": case.get("cut", (0, 0))[1]}
    later = turns[1:]
    return {
        **found,
        "mbit_per_s": spread([size * 8e-6 / turn["seconds"] for turn in later]),
        "raw_mbit_per_s": spread([size * 8e-6 / turn["raw_s"] for turn in later]),
        "of raw": spread([turn["raw_s"] / turn["seconds"] for turn in later]),
        "first, s": round(turns[0]["seconds"], 2),
        "cpu s per GB": {
            "sender": spread([turn["cpu_s"] / size * 1e9 for turn in later]),
            "receiver": spread([fact["cpu_s"] / size * 1e9 for fact in received[1:]]),
        },
    }


def adapts(folder: Path, net: str, *, mbit: Sequence[float], seconds: Sequence[float], mb: float, epochs: int) -> dict[str, Any]:
    """A run with `every: auto` and `codec: auto` while the link goes through the rates `mbit`, each for so many `seconds`."""
    names = ("tokyo", "virginia")
    settled()
    with ExitStack() as stack:
        wan = stack.enter_context(emulator()(list(names), name=net, rate=f"{mbit[0]}mbit", rtt="30ms", host=True, replace=True))
        stack.enter_context(clusters(wan, names))
        case = {
            "regions": 2,
            "mbit": mbit[0],
            "mb": mb,
            "rounds": 40,
            "sync": {"strategy": "delayed", "every": "auto", "codec": "auto"},
        }
        tree = yaml.safe_load(job_of(case, folder, wan).read_text())
        tree |= {"train": {"batch_size": 4, "epochs": epochs}, "schedule": {"segment_s": 600}}
        (folder / "job.yaml").write_text(yaml.safe_dump(tree))
        over = threading.Event()
        stack.callback(over.set)
        trace = list(zip(itertools.accumulate([0.0, *seconds]), mbit, strict=True))
        threading.Thread(target=play, args=(wan, folder, len(names), over, trace)).start()
        summary = run_job(str(folder / "job.yaml"), {})
    events = [json.loads(line) for line in Path(summary["folder"], "events.jsonl").read_text().splitlines()]
    inventory = json.loads(Path(summary["folder"], "inventory.json").read_text())
    rows = sum(sum(sum(shard["groups"]) for shard in found[0]["shards"]) for found in inventory.values())
    kept = {name: [event for event in events if event["event"] == name] for name in ("link_changed", "replanned", "bits")}
    return {**kept, "samples": summary["samples"], "rows": rows, "seconds": round(summary["measured"]["seconds"], 1)}


HIDDEN: dict[str, dict[str, Any]] = {
    "one round delayed": {"strategy": "delayed", "every": "auto"},
    "streaming": {"strategy": "streaming", "every": 160, "fragments": 4, "overlap_steps": 39, "mix": 0},
}


def hidden(sync: dict[str, Any], rounds: int = 6) -> dict[str, Any]:
    """Samples per second from the first round to the last, 45 MB over 100 Mbit/s, 30 ms against a link without limits, with one H."""
    speeds: dict[str, list[float]] = {"limited": [], "unlimited": []}
    every = 0
    for which, rate, rtt in (("limited", "100mbit", "30ms"), ("unlimited", "unlimited", "0ms")) * 2:
        settled()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = ("tokyo", "virginia")
            wan = stack.enter_context(emulator()(list(names), name="gt-bench", rate=rate, rtt=rtt, host=True, replace=True))
            stack.enter_context(clusters(wan, names))
            summary = run_job(str(job_of({"regions": 2, "mbit": 100, "mb": 45, "rounds": 10 * rounds, "sync": sync}, folder, wan)), {})
            plan = json.loads(Path(summary["folder"], "plan.json").read_text())
            records = [json.loads(line) for line in Path(summary["folder"], "rounds.jsonl").read_text().splitlines()]
        every = plan["chosen"]["every"]
        sync = {**sync, "every": every}
        mine = sorted((record["round"], record["at"], record["samples"]) for record in records if record["region"] == names[0])
        speeds[which].append(sum(samples for _, _, samples in mine[1:-1]) / (mine[-2][1] - mine[0][1]))
    ratios = [one / other for one, other in zip(speeds["limited"], speeds["unlimited"], strict=True)]
    return {"speed with / without WAN": spread(ratios), "every": every}


def main() -> None:
    if sys.argv[1:2] == ["end"]:
        end(json.loads(sys.argv[2]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the network is taken down
    results = {}
    for name, case in CASES.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        results[name] = measure(name, case)
        print(f"{name:45} {results[name]}", flush=True)
    for name, sync in HIDDEN.items():
        if not sys.argv[1:] or any(word in f"hidden {name}" for word in sys.argv[1:]):
            results[f"hidden, {name}"] = hidden(sync)
            print(f"{'hidden, ' + name:45} {results[f'hidden, {name}']}", flush=True)
    if not sys.argv[1:] or "adapts" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            results["adapts, 100 to 20 to 100 Mbit/s"] = found = adapts(
                Path(folder), "gt-bench", mbit=(100.0, 20.0, 100.0), seconds=(20.0, 40.0), mb=8, epochs=4
            )
        print(f"{'adapts, 100 to 20 to 100 Mbit/s':45} {found}", flush=True)
    if not sys.argv[1:]:
        write("wan", results)


if __name__ == "__main__":
    main()
