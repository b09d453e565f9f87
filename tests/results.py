"""The figures of README's "Results": trains with train_scratch.py, measures with the checkpoints in the box, draws into docs/.

    python tests/results.py curves  OUT MINUTES [ARM,...]       NELBO against minutes: ar, mdlm, bd3lm with blocks of 4, 16, 64  -> docs/curves.png
    python tests/results.py repeats OUT UPDATES,... [ARM,...]   100 kB of text read again and again: ar and mdlm                 -> docs/repeats.png
    python tests/results.py exercises OUT SEED,... [K/N]        one constant at a time, 800 updates on pydocs; K/N: every N-th run only
    python tests/results.py quality [N]                         samples of each rule in so many steps, judged by checkpoints/ar  -> docs/quality.png
    python tests/results.py infill  [N]                         gaps in held-out text: tokens restored, diffusion against AR

Every run takes one thread, so two invocations with different arms fill two cores; OUT is a folder for the runs, and one that is there
already is not repeated. What is drawn is what OUT holds. Seeds are those of train_scratch.py, and 0 for samples.
"""
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, F401, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare, pydocs  # noqa: E402
from diffusion import generate, infill as fill_gaps, nelbo  # noqa: E402
from model import Transformer  # noqa: E402

ARMS = {"ar": dict(objective="ar"), "mdlm": {}, **{f"bd3lm-{n}": dict(objective="bd3lm", block_length=n) for n in (4, 16, 64)}}

EXERCISES = {       # what README asks: constants of train_scratch.py
    "as it is": {}, "optimizer=adamw": dict(optimizer="adamw"), "muon_lr=0.08": dict(muon_lr=0.08), "max_weight=0": dict(max_weight=0.0),
    "schedule=cosine": dict(schedule="cosine"), "warmup=0.3": dict(warmup=0.3), "batch_size=64, max_steps=200": dict(batch_size=64, max_steps=200),
    "batch_size=4, max_steps=3200": dict(batch_size=4, max_steps=3200), "n_layers=8, dim=96": dict(n_layers=8, dim=96),
    "tokenizer=byte": dict(tokenizer="byte"), "vocab_size=512": dict(vocab_size=512), "objective=ar": dict(objective="ar"),
    "objective=bd3lm, block_length=4": dict(objective="bd3lm", block_length=4), "objective=bd3lm, block_length=32": dict(objective="bd3lm", block_length=32),
}


def train(out, **settings):
    """The evaluations that a run of train_scratch.py with these settings logs."""
    if not (out / "loss.png").exists():                             # drawn at the very end
        arguments = [f"--{name}={value}" for name, value in {**settings, "out_dir": out, "sample_tokens": 0, "threads": 1}.items()]
        subprocess.run([sys.executable, ROOT / "train_scratch.py", *arguments], check=True)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def draw(name, title, xlabel, ylabel, series, **axis):
    """series: {label: (xs, ys, errors or None)}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, (xs, ys, errors) in series.items():
        axes.errorbar(xs, ys, errors, label=label, marker="o", ms=3, capsize=2)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **axis)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / name, dpi=120)
    print(f"drew docs/{name}")


def curves(out, minutes, arms=""):
    """The same transformer, text, batch and minutes; blocks from one token (ar) to the whole sequence (mdlm)."""
    for name in arms.split(",") if arms else ARMS:
        train(Path(out) / name, dim=128, max_minutes=minutes, eval_interval=200, **ARMS[name])
    series = {}
    for name in (name for name in ARMS if (Path(out) / name / "loss.png").exists()):
        rows = train(Path(out) / name)
        series[name] = [[row[key] for row in rows] for key in ("elapsed_s", "val_bpb", "val_stderr")]
        series[name][0] = [seconds / 60 for seconds in series[name][0]]
        series[name][2] = [error * row["val_bpb"] / row["val_nelbo"] for error, row in zip(series[name][2], rows)]
        print(f"{name:9} {rows[-1]['val_nelbo']:.4f} +- {rows[-1]['val_stderr']:.4f} nats/token, {rows[-1]['val_bpb']:.3f} bits/byte, "
              f"{rows[-1]['step']} updates", flush=True)
    draw("curves.png", "pydocs, D 128, 4 layers, one thread; blocks from 1 token (ar) to 128 (mdlm)", "minutes", "held-out bits per byte", series)


def repeats(out, updates, arms="ar,mdlm"):
    """Few data, many passes: an autoregressive model learns them by heart, a diffusion model sees them under new masks each time.

    Each point is a run of its own, whose learning rate ends at 0.
    """
    out, updates = Path(out), [int(n) for n in updates.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "small.txt").exists():
        text, size = [], 0
        for split, document in pydocs():
            if split == "train" and document and size < 100_000:
                text, size = [*text, document], size + len(document)
        (out / "small.txt").write_text("\n\n".join(text), encoding="utf-8")
    data = TokenDataset(prepare(str(out / "small.txt"), "bpe", 1024))
    passes, held_out, series = 16 * 128 / len(data.train), data.windows("val", 128), {}             # passes over the corpus in an update
    for n in updates:
        for name in arms.split(","):
            train(out / f"{name}-{n}", dataset=out / "small.txt", vocab_size=1024, dim=128, batch_size=16, max_steps=n, eval_interval=0, **ARMS[name])
    for name in ("ar", "mdlm"):
        series[name] = xs, ys, errors = [], [], []
        for n, folder in ((n, out / f"{name}-{n}") for n in updates if (out / f"{name}-{n}" / "loss.png").exists()):
            value, error = nelbo(Transformer.from_pretrained(folder, dtype=torch.float32), held_out, num_samples=64)
            print(f"{name:5} {n * passes:6.0f} passes: {value:.4f} +- {error:.4f} nats/token, in training {train(folder)[-1]['train_loss']:.4f}", flush=True)
            xs.append(n * passes), ys.append(value), errors.append(error)
    draw("repeats.png", "100 kB of pydocs, again and again; each point a run of its own", "passes over the corpus", "held-out nats per token", series,
         xscale="log")


def exercises(out, seeds, part="1/1"):
    """Everything is counted in tokens, 2,048 an update, so that a busy machine changes nothing but the minutes."""
    k, n = map(int, part.split("/"))
    runs = [(name, seed) for seed in seeds.split(",") for name in EXERCISES]
    folder = lambda name, seed: Path(out) / f"{name.replace(' ', '').replace(',', '+')}-{seed}"
    for name, seed in runs[k - 1::n]:
        train(folder(name, seed), **{**dict(dim=128, n_layers=4, batch_size=16, max_steps=800, eval_interval=0, seed=seed), **EXERCISES[name]})
    print("| constants | bits/byte | seeds | minutes |\n| --- | --- | --- | --- |")
    for name in EXERCISES:
        rows = [train(folder(name, seed))[-1] for seed in seeds.split(",") if (folder(name, seed) / "loss.png").exists()]
        if rows:
            values, minutes = [row["val_bpb"] for row in rows], sum(row["elapsed_s"] for row in rows) / len(rows) / 60
            print(f"| {name} | {sum(values) / len(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} | {minutes:.1f} |")


@torch.no_grad()
def quality(count="32", length=128):
    """Texts out of nothing: what the autoregressive twin thinks of them (nats/token), and how varied their tokens are (entropy)."""
    model, judge = (Transformer.from_pretrained(ROOT / "checkpoints" / name, dtype=torch.float32) for name in ("mdlm", "ar"))
    real = TokenDataset(prepare("pydocs", "bpe")).windows("val", length, 2**15)
    value, error = nelbo(judge, real)
    print(f"{'':24} steps  nats/token        token entropy\n{'held-out text':31} {value:.3f} +- {error:.3f}   {spread(real):.2f}")
    series = {}
    for rule, temperature in (("random", 1.0), ("ancestral", 1.0), ("low_confidence", 1.0), ("entropy", 1.0), ("margin", 1.0), ("low_confidence", 0.0)):
        label = rule + " (greedy)" * (not temperature)
        series[label] = xs, ys, errors = [], [], []
        for steps in (8, 16, 32, 64, 128):
            texts = torch.tensor(generate(model, [[]] * int(count), length, steps, length, temperature, rule, seed=0))
            value, error = nelbo(judge, texts)
            print(f"{label:24} {steps:5}  {value:.3f} +- {error:.3f}   {spread(texts):.2f}", flush=True)
            xs.append(steps), ys.append(value), errors.append(error)
    draw("quality.png", f"{count} texts of {length} tokens by checkpoints/mdlm, temperature 1", "denoising steps", "nats per token by checkpoints/ar", series,
         xscale="log")


def spread(tokens):
    """Entropy in nats of the tokens within a text, the mean over texts [N, T]: low where a text repeats itself."""
    entropies = []
    for row in tokens:
        p = row.bincount().double() / len(row)
        entropies.append(-(p[p > 0] * p[p > 0].log()).sum().item())
    return sum(entropies) / len(entropies)


@torch.no_grad()
def infill(count="300", length=96):
    """Gaps in held-out text: the share of tokens restored exactly, with both sides known (diffusion) or the left one only (AR)."""
    model, twin = (Transformer.from_pretrained(ROOT / "checkpoints" / name, dtype=torch.float32) for name in ("mdlm", "ar"))
    windows = TokenDataset(prepare("pydocs", "bpe")).windows("val", length, int(count) * length)[:int(count)].tolist()
    for gap in (1, 4, 8):
        begin = length // 2
        holes = [w[:begin] + [model.config.mask_token_id] * gap + w[begin + gap:] for w in windows]
        answers = {"diffusion, both sides": fill_gaps(model, holes, steps=gap),
                   "diffusion, left side only": generate(model, [w[:begin] for w in windows], gap, gap, gap),
                   "autoregressive": generate(twin, [w[:begin] for w in windows], gap, gap)}
        for name, rows in answers.items():
            hits = torch.tensor([[a == b for a, b in zip((row + [-1] * gap)[begin:begin + gap], w[begin:begin + gap])] for row, w in zip(rows, windows)])
            share = hits.double().mean(1)
            print(f"gap of {gap}: {name:26} {share.mean():.3f} +- {share.std() / math.sqrt(len(share)):.3f}", flush=True)


if __name__ == "__main__":
    commands = {"curves": curves, "repeats": repeats, "exercises": exercises, "quality": quality, "infill": infill}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    commands[sys.argv[1]](*sys.argv[2:])
