"""The measurements that README and docs quote: `python experiments/bench.py NAME ...`, or without a
name for the list.

Candidates are compared in one run, in turns, so that whatever else the machine does hits all of
them alike. --threads=N: so many CPU threads; without it OMP_NUM_THREADS, or 2.
"""
import inspect
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.timing import keep_freed_memory, machine  # noqa: E402

if __name__ == "__main__" and "load" not in sys.argv[1:]:       # `load` measures memory as it is
    keep_freed_memory()

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from experiments.against import against  # noqa: E402
from experiments.bench_eval import likelihoods  # noqa: E402
from experiments.bench_mixture import blocks, experts  # noqa: E402
from experiments.bench_model import forward, load, parity  # noqa: E402
from experiments.bench_real import real  # noqa: E402
from experiments.bench_sampling import sample, serve  # noqa: E402
from experiments.bench_training import block, finetune, loss, step  # noqa: E402

COMMANDS = {"forward": forward, "parity": parity, "load": load, "step": step, "loss": loss,
            "block": block, "finetune": finetune, "sample": sample, "blocks": blocks,
            "experts": experts, "serve": serve, "eval": likelihoods, "against": against,
            "real": real}


def print_commands():
    for name, function in COMMANDS.items():
        summary = " ".join(function.__doc__.split("\n\n")[0].split())
        print(f"python experiments/bench.py {name:9} {summary}", file=sys.stderr)


def main(arguments):
    """The exit status. NAME, then the arguments of its function: words, or --name=value."""
    words, options = [], {}
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.removeprefix("--").partition("=")
            options[name] = value
        else:
            words.append(argument)
    if not words or words[0] not in COMMANDS:
        print_commands()
        return 2
    command = COMMANDS[words.pop(0)]
    torch.set_num_threads(int(options.pop("threads", os.environ.get("OMP_NUM_THREADS", 2))))
    try:
        inspect.signature(command).bind(*words, **options)
    except TypeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    common.show_errors_in_one_line()
    print(machine(), flush=True)
    command(*words, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
