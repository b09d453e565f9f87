"""Is this edition as fast as another one? Both run in one interleaved measurement.

Each edition has a process of its own (edition.py) that stays alive and runs what it is told, so
that both are warm and never work at the same time. A round is one window of each, one right after
the other; its ratio of seconds is what counts, for whatever else the machine does changes slowly
and hits both.
"""
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from experiments.timing import ROOT, STEADY_MEMORY

CASES = ("step-mdlm", "step-bd3lm", "step-ar", "loss", "sample", "sample-0.7", "cache-prefix",
         "cache-dual", "batch-8", "batch-8-dual", "cache-block", "autoregressive",
         "autoregressive-8", "eval", "nelbo")
WINDOW = 0.5        # seconds of a window, at least one run
LIMIT = 1.03        # what is slower than this is marked


class Edition:
    """The process that runs the code in a folder."""

    def __init__(self, folder, threads):
        script = ROOT / "experiments" / "edition.py"
        environment = os.environ | STEADY_MEMORY | {"OMP_NUM_THREADS": str(threads)}
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, script, str(folder), str(threads)], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        """The answer to a line. Raises RuntimeError if the process ended."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the code in {self.folder} failed at {request}: see above")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def against(folder, *cases, rounds="9"):
    """This code against that of another edition: `git worktree add /tmp/first 3a7d72e`, then
    `against /tmp/first [CASE ...] [--rounds=9]`.

    Prints the median milliseconds of both and the median of the rounds' ratios, new / old, with its
    quartiles, of wall clock and of CPU time, and the ratio of the smallest CPU times. With one
    thread CPU time is what other work on the machine disturbs less, the smallest least.
    """
    folder = Path(folder).resolve()
    if not (folder / "model.py").exists():
        raise FileNotFoundError(f"{folder} has no model.py: it takes a checkout of this repository")
    for case in cases:
        if case not in CASES:
            raise ValueError(f"no case called {case!r}: there are {', '.join(CASES)}")
    rounds = int(rounds)
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}: a spread needs two")
    editions = [Edition(place, torch.get_num_threads()) for place in (folder, ROOT)]
    print("case                old ms    new ms   new / old: wall clock   CPU time                "
          "least   results")
    for case in cases or CASES:
        old, new = compare(editions, case, rounds)
        print(describe(case, old, new), flush=True)
    for edition in editions:
        edition.end()


def compare(editions, case, rounds):
    """(answers of the old edition, of the new one), one a round."""
    for edition in editions:
        edition.ask(prepare=case)
        edition.ask(times=1)                            # warm-up
    seconds = min(edition.ask(times=1)["wall"] for edition in editions)
    times = max(1, math.ceil(WINDOW / seconds))
    answers = ([], [])
    order = [0, 1]
    for _ in range(rounds):
        order.reverse()                                 # neither is always the first
        for i in order:
            answers[i].append(editions[i].ask(times=times))
    return answers


def describe(case, old, new):
    """A line of the table."""
    milliseconds = []
    for answers in (old, new):
        milliseconds.append(1e3 * statistics.median(answer["wall"] for answer in answers))
    wall, cpu = ratios(old, new, "wall"), ratios(old, new, "cpu")
    least = min(answer["cpu"] for answer in new) / min(answer["cpu"] for answer in old)
    mark = ""
    if min(statistics.median(wall), statistics.median(cpu), least) > LIMIT:
        mark = "  <- slower"
    return (f"{case:16} {milliseconds[0]:9.1f} {milliseconds[1]:9.1f}   {spread(wall)}    "
            f"{spread(cpu)}    {least:5.3f}   {agreement(old, new)}{mark}")


def ratios(old, new, clock):
    """new / old of each round."""
    return [second[clock] / first[clock] for first, second in zip(old, new)]


def spread(values):
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return f"{middle:5.3f} [{low:5.3f}, {high:5.3f}]"


def agreement(old, new):
    """Whether both computed the same."""
    first, second = old[-1]["result"], new[-1]["result"]
    if isinstance(first, list):
        return "same tokens" if first == second else "other tokens"
    if math.isclose(first, second, rel_tol=1e-3):
        return "same"
    return f"{first:.6g}, {second:.6g}"
