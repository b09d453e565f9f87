"""A small mixture of experts from random weights against the dense default, in equal minutes.

    python experiments/mixture.py OUT_FOLDER [MINUTES=6.5] [SEED=1337] [THREADS=0] [DATASET=tales]
                                  [MORE='--name=value ...']

Three runs of train_scratch.py: as it is; with eight experts, two of them a token and together of
the dense MLP's width; and the same with biases that even out the experts' loads. MORE: settings of
train_scratch.py for all three. A run that is finished is not run again, one that was killed goes
on. Prints the bound of each, and draws how the validation text spreads over the experts of each
layer: docs/experts.png (OUT_FOLDER/experts.png if MINUTES is below 3, which proves nothing).
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from diffusion import mask_tokens  # noqa: E402
from experiments.recipes import log_of, run_recipe  # noqa: E402
from model import Transformer  # noqa: E402
from training.balance import expert_loads  # noqa: E402

MIXTURE = ["--n_experts=8", "--experts_per_token=2"]
RUNS = {
    "dense": [],
    "8 experts": MIXTURE,
    "8 experts, balanced": [*MIXTURE, "--balance_rate=0.001"],
}


def train(name, out, minutes, seed, threads, dataset, *more):
    """The last row of the run's log.jsonl; `more`: further arguments of train_scratch.py."""
    folder = out / name
    done = out / f"{name}.done"
    if not done.exists():
        run_recipe("train_scratch.py", folder, *RUNS[name], f"--max_minutes={minutes}",
                   f"--seed={seed}", f"--threads={threads}", f"--dataset={dataset}", *more)
        done.touch()
    return log_of(folder)[-1]


@torch.no_grad()
def loads_of(folder, dataset, windows=64):
    """float [layers, E]: each expert's share of the choices on the validation text."""
    model = Transformer.from_pretrained(folder).train()
    data = TokenDataset(prepare(dataset, Tokenizer.from_pretrained(folder)))
    tokens = data.windows("val", model.config.max_len, windows * model.config.max_len)
    noise = common.stream("expert loads", 0)
    mask = mask_tokens(tokens.shape, 0.5, noise)        # as at time 0.5
    model(torch.where(mask, model.config.mask_token_id, tokens))
    return expert_loads(model)


def draw(loads, path):
    """Bars of each expert's share, a row a run and a column a layer; even is the line."""
    from matplotlib.figure import Figure
    layers = max(len(load) for load in loads.values())
    figure = Figure(figsize=(2.2 * layers, 2 * len(loads)), layout="constrained")
    axes = figure.subplots(len(loads), layers, sharey=True, squeeze=False)
    for row, (name, load) in zip(axes, loads.items()):
        for layer, (panel, shares) in enumerate(zip(row, load)):
            panel.bar(range(len(shares)), shares.tolist())
            panel.axhline(1 / len(shares), color="black", lw=0.8)
            panel.set(title=f"layer {layer}", xticks=[])
        row[0].set_ylabel(name)
    figure.savefig(path, dpi=120)


def main(out, MINUTES="6.5", SEED="1337", THREADS="0", DATASET="tales", MORE=""):
    out, loads = Path(out).resolve(), {}
    out.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        row = train(name, out, float(MINUTES), SEED, THREADS, DATASET, *MORE.split())
        print(f"{name:22} {row['step']:6} updates   {row['val_nelbo']:.4f} +- "
              f"{row['val_stderr']:.4f} nats/token   {row['val_bpb']:.3f} bits/byte", flush=True)
        if name != "dense":
            loads[name] = loads_of(out / name, DATASET)
            smallest, largest = loads[name].min(), loads[name].max()
            print(f"{'':22} an expert sees {100 * smallest:.1f} to {100 * largest:.1f} % of the "
                  "choices")
    draw(loads, ROOT / "docs" / "experts.png" if float(MINUTES) >= 3 else out / "experts.png")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], **dict(argument.split("=", 1) for argument in sys.argv[2:]))
