"""Does it pay to convert? Two small models are trained on pydocs, each is converted, and diffusion from random weights is the yardstick.

    python tests/convert_experiment.py OUT_FOLDER [MINUTES=6] [SEED=1337] [THREADS=0]

Of MINUTES each: an autoregressive model, an encoder with 15 % of the tokens masked (as BERT was), and from random weights an MDLM and a
BD3-LM; then four conversions of half of MINUTES each. All have the size, batch and optimizer of train_scratch.py and the same validation
text and masks. A stage that is finished is not run again, one that was killed goes on. OUT_FOLDER/results.jsonl has a line a stage;
docs/convert.png shows the bound over minutes (OUT_FOLDER/convert.png if MINUTES is below 3, which proves nothing).
"""
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402, I001 (before torch: it sets how threads wait)

import torch  # noqa: E402

from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from diffusion import mask_tokens, mdlm_loss  # noqa: E402
from model import Config, Transformer  # noqa: E402

T, B = 128, 16
SCRATCH = ["train_scratch.py", "--dataset=pydocs", "--eval_interval=50", "--eval_tokens=16384", "--sample_tokens=0", f"--seq_len={T}", f"--batch_size={B}"]
CONVERT = ["--dataset=pydocs", "--eval_interval=50", "--eval_sequences=128", "--final_eval_sequences=2048", "--sample_tokens=0", f"--seq_len={T}",
           f"--batch_size={B}", "--optimizer=muon", "--learning_rate=3e-3", "--muon_lr=0.02", "--beta2=0.99", "--max_weight=10", "--warmup=0.02", "--decay=linear"]
BLOCKS = ["--objective=bd3lm", "--block_length=4"]
STAGES = {      # name: (share of MINUTES, command; None: `train_encoder`)
    "autoregressive": (1, [*SCRATCH, "--objective=ar"]),
    "encoder": (1, None),
    "MDLM from random weights": (1, SCRATCH),
    "MDLM from the autoregressive model": (0.5, ["convert_ar.py", "--init_from=OUT/autoregressive", *CONVERT]),
    "MDLM from the autoregressive model, shift kept": (0.5, ["convert_ar.py", "--init_from=OUT/autoregressive", "--shift=True", *CONVERT]),
    "MDLM from the encoder": (0.5, ["convert_bert.py", "--init_from=OUT/encoder", *CONVERT]),
    "BD3-LM from random weights": (1, [*SCRATCH, *BLOCKS]),
    "BD3-LM from the autoregressive model": (0.5, ["convert_ar.py", "--init_from=OUT/autoregressive", *CONVERT, *BLOCKS]),
}


def train_encoder(folder, minutes, seed, threads):
    """A masked language model as BERT's: always 15 % of the tokens are masked. The optimizer is that of train_scratch.py."""
    if threads:
        torch.set_num_threads(threads)
    data_folder = prepare("pydocs", "bpe", 2048)
    data, text = TokenDataset(data_folder), Tokenizer.from_pretrained(data_folder)
    model = Transformer(Config(vocab_size=data.vocab_size, dim=192, n_layers=4, n_heads=4, max_len=T, mask_token_id=data.mask_token_id,
                               eos_token_id=text.eos_token_id)).init_weights(seed)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = {common.Muon(matrices): 0.02, torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0, fused=True): 3e-3}
    autocast, rate = common.autocast(torch.device("cpu"), "auto"), torch.full((B,), 0.15)
    start, step = time.perf_counter(), 0
    while (progress := (time.perf_counter() - start) / 60 / minutes) < 1:
        for optimizer, peak in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * common.learning_rate_factor(progress)
        mask = mask_tokens((B, T), 0.15, common.stream("noise", seed, step))
        with autocast:
            loss = mdlm_loss(model, data.batch("train", B, T, seed, step), rate, mask).loss
        (loss * 0.15).backward()                                    # at a fixed rate the weight 1/t is no more than a factor
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return {"updates": step, "train_nll_of_15_percent": loss.item() * 0.15}


def run_stage(name, out, minutes, seed, threads):
    """The stage's line of results."""
    share, command = STAGES[name]
    folder = out / name
    if command is None:
        return {"stage": name, "minutes": minutes, **train_encoder(folder, minutes, seed, threads)}
    resume = ["--resume=True"] if (folder / "train_state.pt").exists() else []
    command = [argument.replace("OUT", str(out)) for argument in command]
    subprocess.run([sys.executable, *command, f"--max_minutes={minutes * share}", f"--seed={seed}", f"--threads={threads}", f"--out_dir={folder}", *resume],
                   cwd=ROOT, check=True)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return {"stage": name, "minutes": minutes * share, "updates": last["step"], **{key: last[key] for key in ("val_nelbo", "val_stderr", "val_bpb")}}


def plot(out, path, names):
    """The bound over minutes of every diffusion stage."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("MDLM", "BD3-LM")):
        for name in (name for name in names if name.startswith(kind)):
            rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
            axes.errorbar([row["elapsed_s"] / 60 for row in rows], [row["val_nelbo"] for row in rows], [row["val_stderr"] for row in rows],
                          label=name.removeprefix(f"{kind} "), lw=1.2, elinewidth=0.5)
        axes.set(title=kind, xlabel="minutes of diffusion training", ylabel="NELBO, nats per token" if kind == "MDLM" else "")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    options = dict(argument.split("=") for argument in sys.argv[2:])
    out, minutes = Path(sys.argv[1]).resolve(), float(options.get("MINUTES", 6))
    seed, threads = int(options.get("SEED", 1337)), int(options.get("THREADS", 0))
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = {row["stage"]: row for row in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    for name in STAGES:
        if name not in done:
            done[name] = run_stage(name, out, minutes, seed, threads)
            with results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    for row in done.values():
        if "val_nelbo" in row:
            print(f"{row['stage']:46} {row['minutes']:5.2f} min {row['updates']:6} updates   {row['val_nelbo']:.4f} +- {row['val_stderr']:.4f} nats/token   "
                  f"{row['val_bpb']:.3f} bits/byte")
    plot(out, ROOT / "docs" / "convert.png" if minutes >= 3 else out / "convert.png", [name for name in STAGES if STAGES[name][1]])
