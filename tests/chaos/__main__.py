"""make chaos SEEDS=n: so many schedules in virtual time, over every valid strategy, codec and topology in turn.

Prints the first failing seed with the trace of its schedule; `--only NAME --seed N` replays one.
"""

import argparse
import time

from tests.chaos.invariants import combinations, play, replay


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", help="one combination, as strategy-codec")
    parser.add_argument("--seed", type=int, help="with --only: replay this one and print its trace")
    args = parser.parse_args()
    known = dict(combinations())
    names = [args.only] if args.only else list(known)
    if args.only and args.only not in known:
        parser.error(f"no combination '{args.only}'; there are: {', '.join(known)}")
    if args.seed is not None:
        print("\n".join(replay(names[0], args.seed)))
        return 0
    began = told = time.monotonic()
    for number in range(args.seeds):
        name, seed = names[number % len(names)], args.first + number // len(names)
        try:
            play(known[name], seed)
        except Exception as error:
            print("\n".join(replay(name, seed)[-60:]))
            print(f"\n{name}, seed {seed}: {type(error).__name__}: {error}")
            print(f"replay it: python -m tests.chaos --only {name} --seed {seed}")
            return 1
        if time.monotonic() - told > 2:
            told = time.monotonic()
            print(f"\r{number + 1} of {args.seeds} schedules, {(number + 1) / (told - began):.0f} a second", end="", flush=True)
    print(f"\r{args.seeds} schedules over {len(names)} combinations hold in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
