"""Does it pay to let blocks grow and shrink? An autoregressive model becomes one that writes in
blocks of 32, straight, or by way of blocks of 1, 4, 32, a whole sequence and 32 again (LLaDA2,
arXiv 2512.15745), in equal minutes.

    python experiments/block_schedule.py OUT_FOLDER [MINUTES=6] [SEED=1337] [THREADS=0]

MINUTES each; sizes, batch, optimizer and text are those of experiments/conversions.py. A stage that
is finished is not run again, one that was killed goes on. OUT_FOLDER/results.jsonl has a line a
stage.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.conversions import (  # noqa: E402
    FROM_AR,
    SCRATCH,
    Stage,
    described,
    run_stages,
)

BLOCKS = ["--objective=bd3lm", "--block_length=32"]
STAGES = {
    "autoregressive": Stage(1, [*SCRATCH, "--objective=ar"]),
    "straight to blocks of 32": Stage(1, [*FROM_AR, *BLOCKS]),
    "1, 4, 32, T, 32": Stage(1, [*FROM_AR, *BLOCKS, "--block_schedule=1,4,32,T,32"]),
    "1, 4, 32, T * 4, 32 * 2": Stage(1, [*FROM_AR, *BLOCKS, "--block_schedule=1,4,32,T*4,32*2"]),
    "32, T, 32": Stage(1, [*FROM_AR, *BLOCKS, "--block_schedule=32,T,32"]),
}


def main(out, MINUTES="6", SEED="1337", THREADS="0"):
    out = Path(out).resolve()
    for row in run_stages(STAGES, out, float(MINUTES), int(SEED), int(THREADS)):
        print(described(row, 26), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], **dict(argument.split("=") for argument in sys.argv[2:]))
