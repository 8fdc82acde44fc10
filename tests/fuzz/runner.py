"""Run numbered random trials in child processes, so that an abort inside XLA is reported as a problem.

A fuzzer is a script with a function `trial(seed) -> (description, problems)`. The number of a trial is its seed and its
only source of randomness, so `--first N --count 1` repeats trial N.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

Trial = Callable[[int], tuple[str, list[str]]]

# Trials per child process: enough to amortize the start-up, few enough that compiled programs do not fill the memory.
BATCH = 25


def main(trial: Trial, *, count: int) -> None:
    """Run `count` trials, and exit with status 1 if any trial found a problem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--count", type=int, default=count, help="number of trials")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of one child process")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        for seed in range(args.first, args.first + args.count):
            print(json.dumps({"start": seed}), flush=True)
            description, problems = _attempt(trial, seed)
            print(json.dumps({"done": seed, "what": description, "problems": problems}), flush=True)
        return
    start, found, seed, end = time.monotonic(), [], args.first, args.first + args.count
    while seed < end:
        size = min(BATCH, end - seed)
        found += _batch(seed, size, args.seconds)
        seed += size
        print(f"{seed - args.first} trials, {len(found)} problems, {time.monotonic() - start:.0f} s", flush=True)
    for line in found:
        print(line)
    sys.exit(bool(found))


def _attempt(trial: Trial, seed: int) -> tuple[str, list[str]]:
    try:
        return trial(seed)
    except Exception as error:  # any exception is a problem
        return "", [f"{type(error).__name__}: {str(error)[:300]}"]


def _batch(first: int, count: int, seconds: float) -> list[str]:
    """Return the problems of a batch. After a trial that ends its process, the others run in another child."""
    found, seed, end = [], first, first + count
    while seed < end:
        command = [sys.executable, sys.argv[0], "--child", "--first", str(seed), "--count", str(end - seed)]
        lines, failure = _output(command, seconds)
        records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith("{")]
        started = [r["start"] for r in records if "start" in r]
        done = [r for r in records if "done" in r]
        for record in done:
            for problem in record["problems"]:
                found.append(f"trial {record['done']}: {record['what']}: {problem}")
                print(found[-1], flush=True)
        if not failure:
            return found
        died = started[-1] if started else seed
        found.append(f"trial {died}: {failure}")
        print(found[-1], flush=True)
        seed = died + 1
    return found


def _output(command: list[str], seconds: float) -> tuple[list[str], str]:
    """Return the lines that a child printed, and a description of its failure, empty if it succeeded."""
    try:
        child = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode().splitlines(), f"took more than {seconds:.0f} s"
    last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
    failure = f"the process exited with {child.returncode}: {' '.join(last)[:300]}" if child.returncode else ""
    return child.stdout.decode().splitlines(), failure
