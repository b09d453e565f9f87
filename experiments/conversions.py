"""Does it pay to convert? Two small models are trained on pydocs, each is converted, and diffusion
from random weights is the yardstick.

    python experiments/conversions.py OUT_FOLDER [MINUTES=6] [SEED=1337] [THREADS=0]

Of MINUTES each: an autoregressive model, an encoder with 15 % of the tokens masked (as BERT was),
and from random weights an MDLM and a BD3-LM; then four conversions of half of MINUTES each. All
have the size, batch and optimizer of train_scratch.py and the same validation text and masks. A
stage that is finished is not run again, one that was killed goes on. OUT_FOLDER/results.jsonl has a
line a stage; docs/convert.png shows the bound over minutes (OUT_FOLDER/convert.png if MINUTES is
below 3, which proves nothing).
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from diffusion import mask_tokens, mdlm_loss  # noqa: E402
from experiments.recipes import log_of, rows_of, run_recipe  # noqa: E402
from model import Config, Transformer  # noqa: E402
from training.optimizers import (  # noqa: E402
    learning_rate_factor,
    make_optimizers,
    set_learning_rate,
)

T, B = 128, 16
COMMON = ["--dataset=pydocs", "--device=cpu", "--eval_interval=50", "--sample_tokens=0",
          f"--seq_len={T}", f"--batch_size={B}"]
SCRATCH = ["train_scratch.py", *COMMON, "--eval_tokens=16384"]
CONVERT = [*COMMON, "--eval_sequences=128", "--final_eval_sequences=2048", "--optimizer=muon",
           "--learning_rate=3e-3", "--muon_lr=0.02", "--beta2=0.99", "--max_weight=10",
           "--warmup=0.02", "--decay=linear"]
FROM_AR = ["convert_ar.py", "--init_from=OUT/autoregressive", *CONVERT]
FROM_ENCODER = ["convert_bert.py", "--init_from=OUT/encoder", *CONVERT]
BLOCKS = ["--objective=bd3lm", "--block_length=4"]


@dataclass
class Stage:
    share: float            # of MINUTES
    command: list           # None: `train_encoder`


STAGES = {
    "autoregressive": Stage(1, [*SCRATCH, "--objective=ar"]),
    "encoder": Stage(1, None),
    "MDLM from random weights": Stage(1, SCRATCH),
    "MDLM from the autoregressive model": Stage(0.5, FROM_AR),
    "MDLM from the autoregressive model, shift kept": Stage(0.5, [*FROM_AR, "--shift=True"]),
    "MDLM from the encoder": Stage(0.5, FROM_ENCODER),
    "BD3-LM from random weights": Stage(1, [*SCRATCH, *BLOCKS]),
    "BD3-LM from the autoregressive model": Stage(0.5, [*FROM_AR, *BLOCKS]),
}


def train_encoder(folder, minutes, seed, threads):
    """A masked language model as BERT's: always 15 % of the tokens are masked. Optimizer and first
    weights are those of train_scratch.py."""
    if threads:
        torch.set_num_threads(threads)
    data_folder = prepare("pydocs", "bpe", 2048)
    data, tokenizer = TokenDataset(data_folder), Tokenizer.from_pretrained(data_folder)
    model = Transformer(Config(
        vocab_size=data.vocab_size, dim=192, n_layers=4, n_heads=4, max_len=T,
        mask_token_id=data.mask_token_id, eos_token_id=tokenizer.eos_token_id)).init_weights(seed)
    model.look_beside()
    optimizers = make_optimizers(model, "muon", learning_rate=3e-3, muon_lr=0.02, embedding_lr=0.05)
    rate = torch.full((B,), 0.15)
    begin, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        set_learning_rate(optimizers, learning_rate_factor(progress))
        tokens = data.batch("train", B, T, seed, step)
        mask = mask_tokens((B, T), 0.15, common.stream("noise", seed, step))
        with common.autocast(torch.device("cpu"), "auto"):
            loss = mdlm_loss(model, tokens, rate, mask).loss
        loss = loss * 0.15              # at a fixed rate the weight 1/t is no more than a factor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        progress = (time.perf_counter() - begin) / 60 / minutes
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"updates": step, "train_nll_of_15_percent": loss.item()}


def run_stage(name, stage, out, minutes, seed, threads):
    """The stage's line of results."""
    folder = out / name
    minutes = minutes * stage.share
    result = {"stage": name, "minutes": minutes}
    if stage.command is None:
        return result | train_encoder(folder, minutes, seed, threads)
    script, *settings = [argument.replace("OUT", str(out)) for argument in stage.command]
    run_recipe(script, folder, *settings, f"--max_minutes={minutes}", f"--seed={seed}",
               f"--threads={threads}")
    last = log_of(folder)[-1]
    result["updates"] = last["step"]
    for key in ("val_nelbo", "val_stderr", "val_bpb"):
        result[key] = last[key]
    return result


def plot(out, path):
    """The bound over minutes of every diffusion stage."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, kind in ((left, "MDLM"), (right, "BD3-LM")):
        for name in STAGES:
            if name.startswith(kind):
                rows = log_of(out / name)
                minutes = [row["elapsed_s"] / 60 for row in rows]
                values = [row["val_nelbo"] for row in rows]
                errors = [row["val_stderr"] for row in rows]
                axes.errorbar(minutes, values, errors, label=name.removeprefix(f"{kind} "), lw=1.2,
                              elinewidth=0.5)
        axes.set(title=kind, xlabel="minutes of diffusion training")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylabel("NELBO, nats per token")
    figure.savefig(path, dpi=120)


def run_stages(stages, out, minutes, seed, threads):
    """Yield the row of each stage; one that results.jsonl has no row of yet is run for it."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = {row["stage"]: row for row in rows_of(results)}
    for name, stage in stages.items():
        if name not in done:
            done[name] = run_stage(name, stage, out, minutes, seed, threads)
            with results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
        yield done[name]


def described(row, width):
    """A line on a stage, whose name gets so many columns."""
    return (f"{row['stage']:{width}} {row['minutes']:5.2f} min {row['updates']:6} updates   "
            f"{row['val_nelbo']:.4f} +- {row['val_stderr']:.4f} nats/token   "
            f"{row['val_bpb']:.3f} bits/byte")


def main(out, MINUTES="6", SEED="1337", THREADS="0"):
    out, minutes = Path(out).resolve(), float(MINUTES)
    for row in list(run_stages(STAGES, out, minutes, int(SEED), int(THREADS))):
        if "val_nelbo" in row:
            print(described(row, 46))
    plot(out, ROOT / "docs" / "convert.png" if minutes >= 3 else out / "convert.png")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], **dict(argument.split("=") for argument in sys.argv[2:]))
