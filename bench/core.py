"""The core on one core: every codec next to tensor.clone(), every merge next to a plain sum; 11.2 million numbers, 45 MB."""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.measure import write
from geotrain.job import CodecName
from geotrain.sync.codec import codec_of
from geotrain.sync.feedback import ErrorFeedback
from geotrain.sync.merge import Part, merge
from geotrain.sync.strategy import Rule

NUMBERS = 11_200_000
CODECS: tuple[CodecName, ...] = ("fp32", "bf16", "int8", "int4", "e3m0", "topk", "sparseloco", "fedzip")
RULES: tuple[Rule, ...] = ("mean", "radial", "norm_clipped", "median", "trimmed", "flag")
TIMES = 5


def vector(seed: int) -> torch.Tensor:
    """Like a gradient: normal numbers whose size differs from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(NUMBERS // 100_000, generator=generator).repeat_interleave(100_000)
    return torch.randn(NUMBERS, generator=generator) * scale * 1e-3


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "least": round(min(values), 4), "most": round(max(values), 4)}


def codecs() -> dict[str, Any]:
    x, results = vector(0), {}
    for name in CODECS:
        codec = codec_of(name)
        feedback = ErrorFeedback(codec)
        feedback.encode(x.clone())
        clone, encode, decode, both = [], [], [], []
        for _ in range(TIMES):  # alternating, so that a busy moment of the machine falls on all
            clone.append(seconds(x.clone))
            encode.append(seconds(lambda: codec.encode(x)))
            payload = codec.encode(x)
            decode.append(seconds(lambda payload=payload: codec.decode(payload, NUMBERS)))
            fresh = x.clone()
            both.append(seconds(lambda fresh=fresh: feedback.encode(fresh)))
        total = statistics.median(encode) + statistics.median(decode)
        error = float((codec.decode(codec.encode(x), NUMBERS) - x).norm() / x.norm())
        results[name] = {
            "clone_s": spread(clone),
            "encode_s": spread(encode),
            "decode_s": spread(decode),
            "encode_with_feedback_s": spread(both),
            "mb_per_s": round(4 * NUMBERS / 1e6 / total),
            "times_clone": round(total / statistics.median(clone), 1),
            "ratio": round(4 * NUMBERS / codec.wire_bytes(NUMBERS), 2),
            "error": round(error, 4),
            "extra_copies": peak(f"codec {name}"),
        }
        print(f"{name:12} {results[name]}", flush=True)
    return results


def merges() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for count in (3, 8, 32):
        vectors = [vector(seed) for seed in range(min(count, 4))]
        parts = [Part(f"r{i:02}", i + 1, lambda i=i: vectors[i % len(vectors)]) for i in range(count)]
        plain = [seconds(lambda: sum(part.decode() for part in parts[1:])) for _ in range(2)]
        for rule in RULES:
            if count > 8 and rule in ("median", "trimmed", "flag"):
                continue  # 32 vectors of 45 MB sorted by coordinate: minutes, and of no use at that size
            times = [seconds(lambda rule=rule: merge(parts, rule)) for _ in range(2)]
            results[f"{rule} of {count}"] = {"seconds": spread(times), "times_plain_sum": round(min(times) / min(plain), 1)}
            print(f"{rule:12} of {count:2} {results[f'{rule} of {count}']}", flush=True)
    return results


def peak(what: str) -> float:
    """Memory beyond the vector itself, payload and decoded vector included, in copies of it, measured in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "bench.core", *what.split()], check=True, capture_output=True, text=True)
    return round(float(done.stdout) / (4 * NUMBERS), 2)


def peak_of_codec(name: CodecName) -> None:
    torch.set_num_threads(1)
    codec, x = codec_of(name), torch.empty(NUMBERS).normal_()
    codec.decode(codec.encode(x[:100_000]), 100_000)
    fixed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codec.decode(codec.encode(x), NUMBERS)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - fixed) * 1024)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["codec"]:
        peak_of_codec(sys.argv[2])  # type: ignore[arg-type]
        return
    write("core", {"codecs": codecs(), "merges": merges()})


if __name__ == "__main__":
    main()
