"""Does it pay to let blocks grow and shrink? An autoregressive model becomes one that writes in
blocks of 32, straight, or by way of blocks of 1, 4, 32, a whole sequence and 32 again (LLaDA2,
arXiv 2512.15745), in equal minutes.

    python experiments/block_schedule.py OUT_FOLDER [MINUTES=6] [SEED=1337] [THREADS=0]

MINUTES each; sizes, batch, optimizer and text are those of experiments/conversions.py. A stage that
is finished is not run again, one that was killed goes on. OUT_FOLDER/results.jsonl has a line a
stage; docs/block_schedule.png shows the bound over minutes (OUT_FOLDER/block_schedule.png if
MINUTES is below 3, which proves nothing).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.conversions import (  # noqa: E402
    FROM_AR,
    ROOT,
    SCRATCH,
    Stage,
    described,
    run_stages,
)
from experiments.recipes import log_of  # noqa: E402

BLOCKS = ["--objective=bd3lm", "--block_length=32"]
STAGES = {
    "autoregressive": Stage(1, [*SCRATCH, "--objective=ar"]),
    "straight to blocks of 32": Stage(1, [*FROM_AR, *BLOCKS]),
    "1, 4, 32, T, 32": Stage(1, [*FROM_AR, *BLOCKS, "--block_schedule=1,4,32,T,32"]),
    "1, 4, 32, T * 4, 32 * 2": Stage(1, [*FROM_AR, *BLOCKS, "--block_schedule=1,4,32,T*4,32*2"]),
    "32, T, 32": Stage(1, [*FROM_AR, *BLOCKS, "--block_schedule=32,T,32"]),
}


def draw(out, path):
    """The bound over minutes of each conversion, always in blocks of 32."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in list(STAGES)[1:]:
        rows = log_of(out / name)
        minutes = [row["elapsed_s"] / 60 for row in rows]
        axes.errorbar(minutes, [row["val_nelbo"] for row in rows],
                      [row["val_stderr"] for row in rows], label=name, lw=1.2, elinewidth=0.5)
    axes.set(xlabel="minutes of conversion", ylabel="NELBO in blocks of 32, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(out, MINUTES="6", SEED="1337", THREADS="0"):
    out, minutes = Path(out).resolve(), float(MINUTES)
    for row in run_stages(STAGES, out, minutes, int(SEED), int(THREADS)):
        print(described(row, 26), flush=True)
    folder = ROOT / "docs" if minutes >= 3 else out
    draw(out, folder / "block_schedule.png")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], **dict(argument.split("=") for argument in sys.argv[2:]))
