"""The figures of README's and docs' "Results": trains with train_scratch.py, measures with the
checkpoints in the box, draws into docs/.

    python experiments/results.py curves  OUT MINUTES [ARM,...]
        NELBO against minutes: ar, mdlm, bd3lm with blocks of 4, 16, 64  -> docs/curves.png
    python experiments/results.py repeats OUT UPDATES,... [ARM,...]
        100 kB of text read again and again: ar and mdlm  -> docs/repeats.png
    python experiments/results.py exercises OUT SEED,... [K/N]
        one constant at a time, 800 updates on pydocs; K/N: every N-th run only
    python experiments/results.py quality [N]
        samples of each rule in so many steps, judged by checkpoints/ar  -> docs/quality.png
    python experiments/results.py infill  [N]
        gaps in held-out text: tokens restored, diffusion against AR

Every run takes one thread, so two invocations with different arms fill two cores; OUT is a folder
for the runs, and one that is there already is not repeated. What is drawn is what OUT holds. Seeds
are those of train_scratch.py, and 0 for samples.
"""
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare, pydocs  # noqa: E402
from diffusion import nelbo  # noqa: E402
from experiments.recipes import log_of, run_recipe  # noqa: E402
from model import Transformer  # noqa: E402
from sampling import engine  # noqa: E402

# Constants of train_scratch.py.
ARMS = {
    "ar": dict(objective="ar"),
    "mdlm": {},
    "bd3lm-4": dict(objective="bd3lm", block_length=4),
    "bd3lm-16": dict(objective="bd3lm", block_length=16),
    "bd3lm-64": dict(objective="bd3lm", block_length=64),
}
EXERCISES = {       # what the exercises ask
    "as it is": {},
    "optimizer=adamw": dict(optimizer="adamw"),
    "muon_lr=0.08": dict(muon_lr=0.08),
    "max_weight=0": dict(max_weight=0.0),
    "schedule=cosine": dict(schedule="cosine"),
    "warmup=0.3": dict(warmup=0.3),
    "batch_size=64, max_steps=200": dict(batch_size=64, max_steps=200),
    "batch_size=4, max_steps=3200": dict(batch_size=4, max_steps=3200),
    "n_layers=8, dim=96": dict(n_layers=8, dim=96),
    "tokenizer=byte": dict(tokenizer="byte"),
    "vocab_size=512": dict(vocab_size=512),
    "objective=ar": dict(objective="ar"),
    "objective=bd3lm, block_length=4": dict(objective="bd3lm", block_length=4),
    "objective=bd3lm, block_length=32": dict(objective="bd3lm", block_length=32),
}

# --------------------------------------------------------------------------------------------------
# Runs and plots


def is_done(folder):
    """Whether a run ended: loss.png is drawn at the very end."""
    return (folder / "loss.png").exists()


def train(folder, **settings):
    """Run train_scratch.py with these settings, unless `folder` holds such a run already."""
    if is_done(folder):
        return
    settings = dict(dataset="pydocs", threads=1) | settings | dict(sample_tokens=0, device="cpu")
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    run_recipe("train_scratch.py", folder, *arguments)


@dataclass
class Curve:
    """Points of a plot."""
    x: list = field(default_factory=list)
    y: list = field(default_factory=list)
    error: list = field(default_factory=list)

    def add(self, x, y, error):
        self.x.append(x)
        self.y.append(y)
        self.error.append(error)


def draw(name, curves, title, xlabel, ylabel, **axis):
    """docs/`name` from {label: Curve}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.errorbar(curve.x, curve.y, curve.error, label=label, marker="o", ms=3, capsize=2)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **axis)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / name, dpi=120)
    print(f"drew docs/{name}")


# --------------------------------------------------------------------------------------------------
# Trained models


def curves(out, minutes, arms="ar,mdlm,bd3lm-4,bd3lm-16,bd3lm-64"):
    """The same transformer, text, batch and minutes; blocks from one token (ar) to the whole
    sequence (mdlm)."""
    for name in arms.split(","):
        train(Path(out, name), dim=128, max_minutes=minutes, eval_interval=200, **ARMS[name])
    found = {}
    for name in ARMS:
        if is_done(Path(out, name)):
            rows = log_of(Path(out, name))
            found[name] = curve_of(rows)
            last = rows[-1]
            print(f"{name:9} {last['val_nelbo']:.4f} +- {last['val_stderr']:.4f} nats/token, "
                  f"{last['val_bpb']:.3f} bits/byte, {last['step']} updates", flush=True)
    title = "pydocs, D 128, 4 layers, one thread; blocks from 1 token (ar) to 128 (mdlm)"
    draw("curves.png", found, title, "minutes", "held-out bits per byte")


def curve_of(rows):
    """Bits per byte over minutes."""
    curve = Curve()
    for row in rows:
        bits_per_nat = row["val_bpb"] / row["val_nelbo"]
        curve.add(row["elapsed_s"] / 60, row["val_bpb"], row["val_stderr"] * bits_per_nat)
    return curve


def repeats(out, updates, arms="ar,mdlm"):
    """Few data, many passes: an autoregressive model learns them by heart, a diffusion model sees
    them under new masks each time.

    Each point is a run of its own, whose learning rate ends at 0.
    """
    out, updates = Path(out), [int(n) for n in updates.split(",")]
    text = small_text(out)
    for n in updates:
        for name in arms.split(","):
            train(out / f"{name}-{n}", dataset=text, vocab_size=1024, dim=128, batch_size=16,
                  max_steps=n, eval_interval=0, **ARMS[name])
    data = TokenDataset(prepare(str(text), "bpe", 1024))
    held_out = data.windows("val", 128)
    passes_per_update = 16 * 128 / len(data.train)
    found = {"ar": Curve(), "mdlm": Curve()}
    for name, curve in found.items():
        for n in updates:
            folder, passes = out / f"{name}-{n}", n * passes_per_update
            if is_done(folder):
                model = Transformer.from_pretrained(folder, dtype=torch.float32)
                value, error = nelbo(model, held_out, num_samples=64)
                curve.add(passes, value, error)
                print(f"{name:5} {passes:6.0f} passes: {value:.4f} +- {error:.4f} nats/token, "
                      f"in training {log_of(folder)[-1]['train_loss']:.4f}", flush=True)
    draw("repeats.png", found, "100 kB of pydocs, again and again; each point a run of its own",
         "passes over the corpus", "held-out nats per token", xscale="log")


def small_text(out):
    """A file with 100 kB of pydocs, written once."""
    path = out / "small.txt"
    if not path.exists():
        documents, size = [], 0
        for split, document in pydocs():
            if split == "train" and document and size < 100_000:
                documents.append(document)
                size += len(document)
        out.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def exercises(out, seeds, part="1/1"):
    """Everything is counted in tokens, 2,048 an update, so that a busy machine changes nothing but
    the minutes."""
    seeds, (k, n) = seeds.split(","), map(int, part.split("/"))
    runs = [(name, seed) for seed in seeds for name in EXERCISES]
    for name, seed in runs[k - 1::n]:
        settings = dict(dim=128, n_layers=4, batch_size=16, max_steps=800, eval_interval=0,
                        embedding_lr=3e-3, look_beside=False)       # as they were measured
        train(exercise_folder(out, name, seed), **{**settings, **EXERCISES[name]}, seed=seed)
    print("| constants | bits/byte | seeds | minutes |\n| --- | --- | --- | --- |")
    for name in EXERCISES:
        folders = [exercise_folder(out, name, seed) for seed in seeds]
        rows = [log_of(folder)[-1] for folder in folders if is_done(folder)]
        if rows:
            values = [row["val_bpb"] for row in rows]
            minutes = sum(row["elapsed_s"] for row in rows) / len(rows) / 60
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"| {name} | {sum(values) / len(values):.3f} | {each} | {minutes:.1f} |")


def exercise_folder(out, name, seed):
    return Path(out, f"{name.replace(' ', '').replace(',', '+')}-{seed}")


# --------------------------------------------------------------------------------------------------
# The models in the box


def in_the_box(name):
    return Transformer.from_pretrained(ROOT / "checkpoints" / name, dtype=torch.float32)


@torch.no_grad()
def quality(count="32", length=128):
    """Texts out of nothing: what the autoregressive twin thinks of them (nats/token), and how
    varied their tokens are (entropy)."""
    model, judge = in_the_box("mdlm"), in_the_box("ar")
    real = TokenDataset(prepare("pydocs", "bpe")).windows("val", length, 2**15)
    value, error = nelbo(judge, real)
    print(f"{'':24} steps  nats/token        token entropy")
    print(f"{'held-out text':31} {value:.3f} +- {error:.3f}   {spread(real):.2f}")
    found = {}
    rules = [("random", 1.0), ("ancestral", 1.0), ("low_confidence", 1.0), ("entropy", 1.0),
             ("margin", 1.0), ("low_confidence", 0.0)]
    for rule, temperature in rules:
        label = rule if temperature else f"{rule} (greedy)"
        found[label] = Curve()
        for steps in (8, 16, 32, 64, 128):
            nothing = [[]] * int(count)
            texts = torch.tensor(engine.generate(model, nothing, length, steps, length, temperature,
                                                 rule, seed=0))
            value, error = nelbo(judge, texts)
            found[label].add(steps, value, error)
            print(f"{label:24} {steps:5}  {value:.3f} +- {error:.3f}   {spread(texts):.2f}",
                  flush=True)
    title = f"{count} texts of {length} tokens by checkpoints/mdlm, temperature 1"
    draw("quality.png", found, title, "denoising steps", "nats per token by checkpoints/ar",
         xscale="log")


def spread(tokens):
    """Entropy in nats of the tokens within a text, the mean over texts [N, T]: low where a text
    repeats itself."""
    entropies = []
    for row in tokens:
        p = row.bincount().double() / len(row)
        p = p[p > 0]
        entropies.append(-(p * p.log()).sum().item())
    return sum(entropies) / len(entropies)


@torch.no_grad()
def infill(count="300", length=96):
    """Gaps in held-out text: the share of tokens restored exactly, with both sides known
    (diffusion) or the left one only (AR)."""
    model, twin = in_the_box("mdlm"), in_the_box("ar")
    data = TokenDataset(prepare("pydocs", "bpe"))
    texts = data.windows("val", length, int(count) * length)[:int(count)].tolist()
    begin = length // 2
    for gap in (1, 4, 8):
        lefts = [text[:begin] for text in texts]
        mask = [model.config.mask_token_id] * gap
        holes = [text[:begin] + mask + text[begin + gap:] for text in texts]
        answers = {"diffusion, both sides": engine.infill(model, holes, steps=gap),
                   "diffusion, left side only": engine.generate(model, lefts, gap, gap, gap),
                   "autoregressive": engine.generate(twin, lefts, gap, gap)}
        for name, rows in answers.items():
            share = restored(rows, texts, begin, gap)
            error = share.std() / math.sqrt(len(share))
            print(f"gap of {gap}: {name:26} {share.mean():.3f} +- {error:.3f}", flush=True)


def restored(answers, texts, begin, gap):
    """The share of each gap's tokens that are those of the text, float64 [N]. An autoregressive
    answer may end early: what is missing is wrong."""
    shares = []
    for answer, text in zip(answers, texts):
        written = answer[begin:begin + gap]
        hits = sum(a == b for a, b in zip(written, text[begin:begin + gap]))
        shares.append(hits / gap)
    return torch.tensor(shares, dtype=torch.float64)


COMMANDS = {"curves": curves, "repeats": repeats, "exercises": exercises, "quality": quality,
            "infill": infill}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    common.show_errors_in_one_line()
    COMMANDS[sys.argv[1]](*sys.argv[2:])
