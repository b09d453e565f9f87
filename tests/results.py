"""The figures of README's "Results": trains with train_scratch.py, measures with the checkpoints, draws into docs/.

    python tests/results.py curves  OUT [UPDATES]       NELBO against updates: mdlm, bd3lm (4, 16, 64), ar          -> docs/curves.png
    python tests/results.py repeats OUT [UPDATES]       a corpus of 200 kB read again and again: mdlm and ar         -> docs/repeats.png
    python tests/results.py quality DIFFUSION AR [N]    samples of each rule at each number of steps, judged by AR   -> docs/quality.png
    python tests/results.py infill  DIFFUSION AR [N]    held-out gaps: exact tokens, diffusion against AR

OUT is a folder for the runs; a run that is there already is not repeated. DIFFUSION and AR are checkpoints with one tokenizer.
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


def train(out, **settings):
    """The rows of log.jsonl of a run of train_scratch.py with these settings."""
    if not (out / "loss.png").exists():                             # drawn at the very end
        arguments = [f"--{name}={value}" for name, value in {**settings, "out_dir": out, "sample_tokens": 0}.items()]
        subprocess.run([sys.executable, ROOT / "train_scratch.py", *arguments], check=True)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def draw(path, title, xlabel, ylabel, series):
    """series: {label: (xs, ys, errors or None)}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, (xs, ys, errors) in series.items():
        axes.errorbar(xs, ys, errors, label=label, marker="o", ms=3, capsize=2)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def curves(out, updates="2000"):
    """The same transformer, text, batch and number of updates; blocks from one token (ar) to the whole sequence (mdlm)."""
    arms = {"ar": dict(objective="ar"), **{f"bd3lm, blocks of {n}": dict(objective="bd3lm", block_length=n) for n in (4, 16, 64)}, "mdlm": {}}
    series = {}
    for name, settings in arms.items():
        rows = train(Path(out) / name.replace(" ", "_").replace(",", ""), dim=128, max_steps=updates, eval_interval=int(updates) // 10, **settings)
        rows = [row for row in rows if row.get("val_bpb")]
        scale = [row["val_bpb"] / row["val_nelbo"] for row in rows]
        series[name] = [row["step"] for row in rows], [row["val_bpb"] for row in rows], [row["val_stderr"] * s for row, s in zip(rows, scale)]
        print(f"{name:22} {rows[-1]['val_nelbo']:.4f} +- {rows[-1]['val_stderr']:.4f} nats/token, {rows[-1]['val_bpb']:.3f} bits/byte, "
              f"{rows[-1]['elapsed_s'] / 60:.1f} minutes", flush=True)
    draw(ROOT / "docs" / "curves.png", "pydocs, D 128, 4 layers, 2,048 tokens an update", "updates", "held-out bits per byte", series)


def repeats(out, updates="4000"):
    """Few data, many passes: an autoregressive model learns them by heart, a diffusion model sees them under new masks each time."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    corpus, size = out / "small.txt", 0
    with corpus.open("w", encoding="utf-8") as file:
        for split, text in pydocs():
            if split == "train" and text and size < 200_000:
                size += file.write(text + "\n\n")
    passes = 16 * 128 / len(TokenDataset(prepare(str(corpus), "bpe", 1024)).train)          # of the corpus in an update
    series = {}
    for objective in ("mdlm", "ar"):
        rows = train(out / objective, dataset=corpus, vocab_size=1024, objective=objective, dim=128, max_steps=updates,
                     eval_interval=int(updates) // 20, eval_tokens=2**18)
        rows = [row for row in rows if row.get("val_nelbo")]
        series[objective] = [row["step"] * passes for row in rows], [row["val_nelbo"] for row in rows], [row["val_stderr"] for row in rows]
        best = min(rows, key=lambda row: row["val_nelbo"])
        print(f"{objective:6} best {best['val_nelbo']:.4f} +- {best['val_stderr']:.4f} after {best['step'] * passes:.0f} passes, "
              f"last {rows[-1]['val_nelbo']:.4f} after {rows[-1]['step'] * passes:.0f}", flush=True)
    draw(ROOT / "docs" / "repeats.png", "200 kB of pydocs, again and again", "passes over the corpus", "held-out nats per token", series)


@torch.no_grad()
def quality(diffusion, ar, count="32", length=128):
    """Texts out of nothing: what the autoregressive twin thinks of them (nats/token), and how varied their tokens are (entropy)."""
    model, judge = (Transformer.from_pretrained(folder, dtype=torch.float32) for folder in (diffusion, ar))
    data = TokenDataset(prepare("pydocs", "bpe"))
    real = data.windows("val", length, 2**15)
    score = lambda tokens: nelbo(judge, tokens)
    print(f"{'':16} steps  nats/token        token entropy\n{'held-out text':23} {score(real)[0]:.3f} +- {score(real)[1]:.3f}   {spread(real):.2f}")
    series = {}
    for rule in ("random", "ancestral", "low_confidence", "entropy", "margin"):
        xs, ys, errors = [], [], []
        for steps in (8, 16, 32, 64, 128):
            texts = torch.tensor(generate(model, [[]] * int(count), length, steps, length, 1.0, rule, seed=0))
            value, error = score(texts)
            print(f"{rule:16} {steps:5}  {value:.3f} +- {error:.3f}   {spread(texts):.2f}", flush=True)
            xs, ys, errors = xs + [steps], ys + [value], errors + [error]
        series[rule] = xs, ys, errors
    draw(ROOT / "docs" / "quality.png", f"{count} texts of {length} tokens, temperature 1", "denoising steps", "nats per token by the AR twin", series)


def spread(tokens):
    """Entropy in nats of the tokens within a text, the mean over texts [N, T]: low where a text repeats itself."""
    entropies = []
    for row in tokens:
        p = row.bincount().double() / len(row)
        entropies.append(-(p[p > 0] * p[p > 0].log()).sum().item())
    return sum(entropies) / len(entropies)


@torch.no_grad()
def infill(diffusion, ar, count="200", length=96):
    """Gaps in held-out text: the share of tokens restored exactly, with both sides known (diffusion) or the left one only (AR)."""
    model, twin = (Transformer.from_pretrained(folder, dtype=torch.float32) for folder in (diffusion, ar))
    windows = TokenDataset(prepare("pydocs", "bpe")).windows("val", length, int(count) * length)[:int(count)].tolist()
    for gap in (1, 4, 8):
        begin = length // 2
        holes = [w[:begin] + [model.config.mask_token_id] * gap + w[begin + gap:] for w in windows]
        answers = {"diffusion, most confident first": fill_gaps(model, holes, steps=gap),
                   "autoregressive": generate(twin, [w[:begin] for w in windows], gap, gap)}
        for name, rows in answers.items():
            hits = torch.tensor([[a == b for a, b in zip((row + [-1] * gap)[begin:begin + gap], w[begin:begin + gap])] for row, w in zip(rows, windows)])
            share = hits.double().mean(1)
            print(f"gap of {gap}: {name:32} {share.mean():.3f} +- {share.std() / math.sqrt(len(share)):.3f}", flush=True)


if __name__ == "__main__":
    commands = {"curves": curves, "repeats": repeats, "quality": quality, "infill": infill}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    commands[sys.argv[1]](*sys.argv[2:])
