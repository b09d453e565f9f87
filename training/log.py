"""What a run tells: log.jsonl, loss.png, Weights & Biases, and the progress bar."""
import contextlib
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import rank_and_size, write_atomically


class Log:
    """log.jsonl, a JSON object a line. A resumed run drops what the killed one wrote after its
    checkpoint. wandb: the project of Weights & Biases that gets the same rows, or ""."""

    def __init__(self, path, keep_up_to=None, wandb="", settings=None):
        self.path, self.rows, self.wandb = Path(path), [], None
        if keep_up_to is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):   # a line cut short by a kill
                    self.rows.append(json.loads(line))
            self.rows = [row for row in self.rows if row["step"] < keep_up_to]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.path, lambda path: Path(path).write_text(text, encoding="utf-8"))
        if wandb:
            self.wandb = start_wandb(wandb, self.path.parent, settings)

    def write(self, **row):
        self.rows.append(row)
        known = {}                                      # NaN, of one window's error, is no JSON
        for name, value in row.items():
            known[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(known) + "\n")
        if self.wandb is not None:
            self.wandb.log(row, step=row["step"])

    def plot(self, path):
        """Draw training loss and validation bound over minutes."""
        curves = [("train_loss", "", "training loss", dict(alpha=0.4)),
                  ("val_nelbo", "", "validation NELBO", dict(marker="o", ms=3))]
        draw(path, self.rows, curves, "nats per token")


def draw(path, rows, curves, ylabel):
    """Numbers of a log's rows over minutes, to a file, where matplotlib is installed. curves: [(key
    of the number, key of its standard error or "", label, style), ...]."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state, no display
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, error, label, style in curves:
        some = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        minutes = [row["elapsed_s"] / 60 for row in some]
        errors = [row[error] for row in some] if error else None
        axes.errorbar(minutes, [row[key] for row in some], errors, label=label, **style)
    axes.set(xlabel="minutes", ylabel=ylabel)
    axes.legend()
    axes.grid(alpha=0.3)
    write_atomically(path, lambda name: figure.savefig(name, dpi=120, format="png"))


def start_wandb(project, folder, settings):
    """A run of Weights & Biases; a resumed one goes on in the same. Raises ImportError."""
    try:
        import wandb
    except ImportError:
        raise ImportError(f"--wandb={project} needs a package that is not here: pip install "
                          "wandb") from None
    run_id = hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=str(folder), id=run_id, resume="allow", config=settings)


class Clock:
    """Seconds of work, continued over a resume."""

    def __init__(self, before=0.0):
        self.begin = time.perf_counter() - before

    def seconds(self):
        return time.perf_counter() - self.begin


class Progress(tqdm):
    """The progress bar of training: loss, tokens/s since the last evaluation and, on a GPU, the
    share of its peak FLOP/s (MFU)."""

    def __init__(self, clock, step, max_steps, flops_per_token, device):
        rank, self.world_size = rank_and_size()
        self.clock, self.flops_per_token, self.peak = clock, flops_per_token, peak_flops(device)
        self.losses = []
        interval = 0.5 if sys.stderr.isatty() else 30
        super().__init__(total=max_steps or None, initial=step, disable=rank > 0, unit="step",
                         dynamic_ncols=True, mininterval=interval)
        self.begin_window()

    def begin_window(self):
        """Behind an evaluation: what it took does not count."""
        self.begin, self.tokens = self.clock.seconds(), 0

    def tokens_per_s(self):
        return self.tokens / max(self.clock.seconds() - self.begin, 1e-9)

    def count(self, loss, tokens):
        """A step is done, over so many tokens of all processes."""
        self.tokens += tokens
        self.losses = [*self.losses[-49:], loss]
        self.update()
        if self.n % 10 == 0:
            speed = self.tokens_per_s()
            shown = {"loss": f"{sum(self.losses) / len(self.losses):.3f}", "tok_s": f"{speed:,.0f}"}
            if self.peak:
                mfu = speed * self.flops_per_token / self.peak / self.world_size
                shown["mfu"] = f"{mfu:.0%}"
            self.set_postfix(shown, refresh=False)


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
              "4090": 165e12, "3090": 71e12, "T4": 65e12}       # dense bf16, as the makers state it


def peak_flops(device):
    """FLOP/s of this GPU, or None; for model FLOP/s utilisation (MFU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, flops in PEAK_FLOPS.items():
        if key in name:
            return flops
    return None
