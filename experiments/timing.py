"""How bench.py measures: a process with steady memory, candidates in turns, medians."""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# glibc gives large freed blocks back to the system and asks for them anew at the next step. Whether
# it does is luck, hits either candidate and can cost more than all that is compared (the same silu
# took 19 or 398 ms). So it is told to keep what it has.
STEADY_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "200000000",
    "GOMP_SPINCOUNT": "10000",      # threads that wait do not keep the cores busy, see common.py
}


def keep_freed_memory():
    """Start this program anew with STEADY_MEMORY, which glibc reads when a process starts."""
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STEADY_MEMORY)


def machine():
    """What the figures below it were measured on, in a line."""
    import torch
    bfloat16 = "bfloat16 instructions" if fast_bfloat16() else "no bfloat16 instructions"
    return (f"{processor_name()}, {os.cpu_count()} cores, {bfloat16}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"load {os.getloadavg()[0]:.1f}")


def processor_name():
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def fast_bfloat16():
    """Whether this CPU has instructions for bfloat16; else it takes minutes for what is done in
    seconds, and nobody would choose it."""
    import common
    return common.best_dtype("cpu") == "bfloat16"


@dataclass
class Timing:
    wall: float         # seconds
    cpu: float          # seconds of CPU time of all threads: with one thread, what other work on
    #                     the machine disturbs least


def interleaved(functions, rounds=9, warmup=2):
    """{name: Timing}, medians: every function once a round, in an order that turns round each time,
    after `warmup` rounds."""
    walls = {name: [] for name in functions}
    cpus = {name: [] for name in functions}
    order = list(functions)
    for number in range(warmup + rounds):
        order.reverse()
        for name in order:
            timing = timed(functions[name])
            if number >= warmup:
                walls[name].append(timing.wall)
                cpus[name].append(timing.cpu)
    medians = {}
    for name in functions:
        medians[name] = Timing(statistics.median(walls[name]), statistics.median(cpus[name]))
    return medians


def timed(function):
    """The Timing of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def in_own_process(function, *arguments, environment=None):
    """function(*arguments) in a new process, whose peak of memory is its own. Arguments and result
    are what JSON can hold; the function is one of a module in experiments/."""
    call = f"from {function.__module__} import {function.__name__} as function"
    script = (f"import json, sys; {call}\n"
              "print(json.dumps(function(*json.loads(sys.argv[1]))))")
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)], cwd=ROOT, text=True, check=True,
        stdout=subprocess.PIPE, env=os.environ | (environment or {}))
    return json.loads(result.stdout.splitlines()[-1])


def memory(key, process="self"):
    """Bytes of a process's memory by /proc: key "VmRSS", what it has now, or "VmHWM", the most that
    it had."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status does not tell {key}")
