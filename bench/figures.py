"""The figures in README and docs/failures.md, from the newest committed results: python -m bench.figures writes them there."""

import json
import re
from typing import Any

from bench.measure import RESULTS, ROOT

BLOCK = re.compile(r"(<!-- figures: bench/results -->\n).*?(<!-- /figures -->)", re.DOTALL)
OBSERVED = re.compile(r"(<!-- observed: ([^>]+) -->)[^|;\n]*")
"""In a cell of docs/failures.md: what bench/recovery observed of this fault."""


def newest(name: str) -> dict[str, Any]:
    file = sorted(RESULTS.glob(f"{name}-*.json"))[-1]
    return {"file": file.relative_to(ROOT), **json.loads(file.read_text())}


def figures() -> str:
    """The block as Markdown."""
    overhead, startup, strategies = newest("overhead"), newest("startup"), newest("strategies")
    facts = overhead["facts"]
    lines = [f"On {facts['cores']} shared CPU cores, torch {facts['torch']}; medians, with the least and the most.", ""]
    lines += [
        "| one region, one worker, no WAN | throughput against a plain PyTorch loop | the same, its tensors made beforehand |",
        "|---|---|---|",
    ]
    for task, result in overhead["results"].items():
        lines.append(f"| {task} | {range_of(result['ratio to plain'])} | {range_of(result['ratio to plain, tensors ready'])} |")
    first, later = (startup["results"][which]["command_to_first_round_s"] for which in ("first", "later"))
    lines += [
        "",
        f"From `geotrain run` to the first round of three regions: {range_of(later)} s; {range_of(first)} s the very first time.",
        "",
    ]
    lines += [
        "| two regions, 100 Mbit/s, 30 ms | digits: s | MB | accuracy | ResNet, 45 MB: s | MB | training loss |",
        "|---|---|---|---|---|---|---|",
    ]
    digits, resnet = strategies["results"]["digits"], strategies["results"]["ResNet"]
    for name in digits:
        small, large = (f"{r['seconds']:.1f} | {r['wan_megabytes']:,.0f}" for r in (digits[name], resnet[name]))
        metrics = digits[name]["accuracy"], resnet[name]["last_training_loss"]
        lines.append(f"| `{name}` | {small} | {metrics[0]:.3f} | {large} | {metrics[1]:.2f} |")
    few, more = resnet["asgd"]["samples"], digits["asgd"]["samples"]
    lines += [
        "",
        f"The same {more:,} samples of digits and {few:,} of images for all; one run each. Sixty steps hardly train a ResNet:",
        "its columns are about time and bytes, and its held-out metrics say nothing yet (docs/strategies.md, BatchNorm).",
        "Pushes (`asgd`, `asgd_ga`, asynchronous `ma`) were measured with `max_staleness: 8`, not with the default of 2.",
    ]
    lines += [*predictions(newest("prediction")), *core(newest("core")), *scale(newest("scale"))]
    lines += wan(newest("wan"))
    return "\n".join([*lines, *checkpoints(newest("checkpoint")), *goodput()]) + "\n"


def predictions(found: dict[str, Any]) -> list[str]:
    """`geotrain simulate` against `geotrain run` on a shaped network."""
    lines = [
        "",
        "| predicted by `geotrain simulate`, measured on a shaped network with 30 ms | predicted, s | measured, s | error |",
        "|---|---|---|---|",
    ]
    for name, case in found["results"].items():
        lines.append(f"| {name} | {case['predicted_s']:.1f} | {case['measured_s']:.1f} | {100 * case['error']:+.1f} % |")
    return lines


def core(found: dict[str, Any]) -> list[str]:
    """What codecs cost."""
    lines = ["", "| one core, 11.2 million numbers | times smaller | MB/s, both ways | times a clone | relative error |"]
    lines.append("|---|---|---|---|---|")
    for name, codec in found["results"]["codecs"].items():
        lines.append(f"| `{name}` | {codec['ratio']:.1f} | {codec['mb_per_s']:,} | {codec['times_clone']:.0f} | {codec['error']:.3f} |")
    return lines


def scale(found: dict[str, Any]) -> list[str]:
    """How large a WAN the simulator takes."""
    lines = ["", "| simulated without numbers, one core | seconds | MB |", "|---|---|---|"]
    for name, case in found["results"].items():
        lines.append(f"| {name} | {range_of(case['seconds'], 1)} | {case['megabytes']} |")
    return lines


def wan(found: dict[str, Any]) -> list[str]:
    """The transport beside raw TCP; what a cut costs."""
    results = found["results"]
    lines = [
        "",
        "| leader to leader, on an emulated WAN | Mbit/s | of raw TCP in the same run | CPU s/GB, both ends |",
        "|---|---|---|---|",
    ]
    for name, case in results.items():
        if "of raw" in case:
            cpu = case["cpu s per GB"]
            both = cpu["sender"]["median"] + cpu["receiver"]["median"]
            lines.append(f"| {name} | {range_of(case['mbit_per_s'], 1)} | {range_of(case['of raw'])} | {both:.1f} |")
    lines += ["", "| one update | s | line and cut alone, s | bytes on the wire / payload | sent again |", "|---|---|---|---|---|"]
    for name, case in results.items():
        if "line_s" in case:
            alone = case["line_s"] + case["cut_s"]
            lines.append(f"| {name} | {case['seconds']:.1f} | {alone:.1f} | {case['wire / payload']:.3f} | {case['retries']} |")
    lines.append("")
    for name, case in results.items():
        if "speed with / without WAN" in case:
            speed = range_of(case["speed with / without WAN"])
            lines.append(f"45 MB over 100 Mbit/s and 30 ms, {name}: {speed} of the speed without limits (H = {case['every']}).")
        if "steps beside / alone" in case:
            lines.append(f"Steps that only compute, beside updates both ways: {range_of(case['steps beside / alone'])} of those without.")
    return lines


WORDS = {
    "region drained": "gone",
    "region added": "in",
    "region added whose worker is killed": "told",
    "another region's worker killed as one is added": "both in",
    "hashes differ": "all back",
    "all wait for each other": "all back",
    "leader killed at the evaluation": "evaluated",
    "bucket answers 500 for 20 s": "a checkpoint",
    "disk full for 20 s": "a checkpoint",
    "place of the checkpoints lost": "the run ended",
    "region slows down": "replanned",
    "geotrain resume": "a round",
    "geotrain resume, a bit flipped": "a round",
    "geotrain resume --without": "a round",
    "second flow": "refused",
    "flow killed": "a checkpoint",
    "flow overtaken": "ended",
    "flow killed under a Prefect worker": "Crashed",
}
"""What there is after the seconds; else the region is back."""


def recovery(found: dict[str, Any]) -> list[str]:
    """What a fault costs."""
    lines = [
        "| digits, three regions, one of them hit | noticed after, s | the others stand still, s | back after, s |",
        "|---|---|---|---|",
    ]
    ends = ["", "| | from then until | s |", "|---|---|---|"]
    for name, case in found["results"].items():
        if "until" in case:
            ends.append(f"| {name} | {case['until']} | {range_of(case['seconds'], 1)} |")
        else:
            seconds = [range_of(case[what], 1) if what in case else "-" for what in ("noticed_s", "others_wait_s", "back_s")]
            lines.append(f"| {name} | {' | '.join(seconds)} |")
    return [*lines, *ends]


def observed(found: dict[str, Any], name: str) -> str:
    """Medians, in words."""
    case = {what: spread["median"] for what, spread in found["results"][name].items() if what != "until"}
    told = [f"{WORDS.get(name, 'back')} after {case[what]:.1f} s" for what in ("seconds", "back_s") if what in case]
    if "others_wait_s" in case:
        told.append(f"the others stood still for {case['others_wait_s']:.1f} s")
    return ", ".join(told)


def goodput() -> list[str]:
    """What faults leave of the speed."""
    lines = [
        "",
        "| useful samples per second, of those without faults; a fault every | geotrain | its accuracy, with and without | plain DDP |",
        "|---|---|---|---|",
    ]
    for workload in ("digits", "images"):
        ways = newest(f"goodput-{workload}")["results"]
        for mean, ours in ways["geotrain"].items():
            runs = ours["runs"]
            learned = (sum(run["metrics"]["accuracy"] for run in some) / len(runs) for some in (runs, [run["undisturbed"] for run in runs]))
            struck, seconds = sum(len(run["faults"]) for run in runs), sum(run["seconds"] for run in runs)
            cells = [f"{of_all(ours)} ({struck} in {seconds:.0f} s)", " ".join(f"{accuracy:.3f}" for accuracy in learned), "-"]
            if theirs := ways.get("plain DDP", {}).get(mean):
                restarts, seconds = (sum(run[what] for run in theirs["runs"]) for what in ("restarts", "seconds"))
                cells[2] = f"{of_all(theirs)} ({restarts} restart{'s' * (restarts > 1)} in {seconds:.0f} s)"
            lines.append(f"| {workload}, {mean} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Each run beside one without faults; in brackets the faults that they had: a worker, a leader, a region, or a link for 5 s.",
        "Plain DDP, begun again from its last checkpoint, has one run each, which is looked at for two minutes.",
    ]


def of_all(found: dict[str, Any]) -> str:
    return range_of(found["of undisturbed"]) if len(found["runs"]) > 1 else f"{found['of undisturbed']['median']:.2f}"


def checkpoints(found: dict[str, Any]) -> list[str]:
    """What a checkpoint costs."""
    lines = [
        "",
        "| a checkpoint every 10 s | training waits, s | `torch.save` waits, s | steps per second, of those without | with `torch.save` |",
    ]
    lines.append("|---|---|---|---|---|")
    for size, case in found["results"].items():
        if isinstance(case, dict):
            waits, speed = case["stall_s"], case["steps / steps without a checkpoint"]
            cells = [
                range_of(waits["staged"], 3),
                range_of(waits["torch.save"], 2),
                range_of(speed["staged"]),
                range_of(speed["torch.save"]),
            ]
            lines.append(f"| {size} | {' | '.join(cells)} |")
    first = " and ".join(f"{case['first stall_s']:.1f} s" for case in found["results"].values() if isinstance(case, dict))
    beside = " and ".join(
        f"{case['steps while memory is taken / steps without']:.2f}" for case in found["results"].values() if isinstance(case, dict)
    )
    return [
        *lines,
        "",
        f"For the first checkpoint of a seat it waits {first}; memory for it is taken beside the first steps: {beside} of the steps per",
        "second in ten seconds.",
    ]


def range_of(spread: dict[str, float], digits: int = 2) -> str:
    return f"{spread['median']:.{digits}f} ({spread['least']:.{digits}f} to {spread['most']:.{digits}f})"


def pages() -> dict[str, str]:
    """Page -> what it is with the newest figures."""
    found = newest("recovery")
    blocks = {"README.md": figures(), "docs/failures.md": "\n".join(recovery(found)) + "\n"}
    texts = {page: BLOCK.sub(lambda at, block=block: at[1] + block + at[2], (ROOT / page).read_text()) for page, block in blocks.items()}
    return {page: OBSERVED.sub(lambda at: f"{at[1]}{observed(found, at[2])} ", text) for page, text in texts.items()}


def main() -> None:
    for page, text in pages().items():
        (ROOT / page).write_text(text)
        print(text)


if __name__ == "__main__":
    main()
