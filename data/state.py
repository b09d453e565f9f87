"""What a run keeps beside its model: the folder, the state from which it goes on exactly, the log, and the progress bar."""
import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import check_finite, mean_over_ranks, rank_and_size
from data.checkpoints import local_part, write_atomically


def make_folder(out_dir):
    """Create out_dir and see that it can be written to, before hours of work depend on it."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_text("")
        (folder / ".writable").unlink(missing_ok=True)              # every rank does this at once
    except OSError as error:
        raise OSError(f"cannot write to out_dir {out_dir} ({error.strerror or error}): choose another with --out_dir=...") from None
    return folder


def save_training(folder, model, optimizers, step, clock, losses, settings, sharded=False):
    """Everything needed to go on from `step`, in train_state.pt alone (sharded: the folder train_state): a kill between two files cannot tear it apart.

    FloatingPointError, and nothing is written, if a weight is not finite.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    bad = not all(local_part(p).isfinite().all() for p in weights)
    check_finite(float("nan") if mean_over_ranks(bad, weights[0].device) else 0.0, step, folder, "a weight")
    record = {"step": step, "elapsed_s": clock.seconds(), "losses": losses, "settings": settings}
    if sharded:
        from scale.sharding import save_sharded  # it builds on this file
        save_sharded(folder / "train_state", model, optimizers, **record)
    elif rank_and_size()[0] == 0:
        save_state(folder / "train_state.pt", {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **record})


def start_training(folder, model, optimizers, must_match, resume, sharded=False):
    """(step, clock, losses, log) of a run: from nothing, or of what `save_training` wrote, read into model and optimizers, if `resume`.

    ValueError if a setting in `must_match` was another one.
    """
    main, record = rank_and_size()[0] == 0, {"step": 0, "elapsed_s": 0.0, "losses": []}
    if resume and sharded:
        from scale.sharding import load_sharded
        record = load_sharded(folder / "train_state", model, optimizers, must_match)
    elif resume:
        record = load_state(folder / "train_state.pt", must_match)
        model.load_state_dict(record["model"])
        for optimizer, state in zip(optimizers, record["optimizers"]):
            optimizer.load_state_dict(state)
    elif main and has_state(folder):
        tqdm.write(f"replacing the run in {folder} (--resume=True would have continued it)")
        (folder / "train_state.pt").unlink(missing_ok=True)         # or, killed before its first checkpoint, this run would resume as that one
        shutil.rmtree(folder / "train_state", ignore_errors=True)
    log = Log(folder / "log.jsonl", keep_up_to=record["step"] if resume else None) if main else None
    return record["step"], Clock(record["elapsed_s"]), record["losses"], log


def has_state(folder):
    """Whether a run in this folder got as far as a checkpoint."""
    return any((Path(folder) / name).exists() for name in ("train_state", "train_state.pt"))


def save_state(path, state):
    """torch.save: a kill or a full disk at any moment leaves the last good file."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path, must_match):
    """The state that `save_state` wrote; ValueError if its "settings" differ in any item of `must_match`."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: there is nothing to resume; run without --resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = dict(state["settings"])
    except Exception as error:      # unpickling a damaged file can raise anything
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it and start again") from None
    check_match(path, settings, must_match)
    return state


def check_match(path, settings, must_match):
    for name, value in must_match.items():
        if settings.get(name) != value:
            raise ValueError(f"cannot resume: {name} was {settings.get(name)!r} in {path} and is {value!r} now")


class Log:
    """log.jsonl, a JSON object a line. A resumed run drops what the killed one wrote behind its checkpoint."""

    def __init__(self, path, keep_up_to=None):
        self.path, self.rows = Path(path), []
        if keep_up_to is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):               # a line cut short by a kill
                    self.rows.append(json.loads(line))
            self.rows = [row for row in self.rows if row["step"] < keep_up_to]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def write(self, **row):
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def plot(self, path, ylabel="nats per token"):
        """Draw training loss and validation bound over minutes, where matplotlib is installed."""
        try:
            from matplotlib.figure import Figure  # no pyplot: no global state, no display
        except ImportError:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, label, style in (("train_loss", "training loss", dict(alpha=0.4)), ("val_nelbo", "validation NELBO", dict(marker="o", ms=3))):
            rows = [row for row in self.rows if row.get(key) is not None and math.isfinite(row[key])]
            axes.plot([row["elapsed_s"] / 60 for row in rows], [row[key] for row in rows], label=label, **style)
        axes.set(xlabel="minutes", ylabel=ylabel)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


class Clock:
    """Seconds of work, continued over a resume."""

    def __init__(self, before=0.0):
        self.start = time.perf_counter() - before

    def seconds(self):
        return time.perf_counter() - self.start


class Progress(tqdm):
    """The progress bar of training: loss, tokens/s since the last evaluation and, on a GPU, the share of its peak FLOP/s (MFU)."""

    def __init__(self, clock, step, max_steps, flops_per_token, device):
        rank, self.world_size = rank_and_size()
        self.clock, self.flops_per_token, self.peak, self.losses = clock, flops_per_token, peak_flops(device), []
        super().__init__(total=max_steps or None, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True,
                         mininterval=0.5 if sys.stderr.isatty() else 30)
        self.begin_window()

    def begin_window(self):
        """After an evaluation: what it took does not count."""
        self.begin, self.tokens = self.clock.seconds(), 0

    def tokens_per_s(self):
        return self.tokens / max(self.clock.seconds() - self.begin, 1e-9)

    def count(self, loss, tokens):
        """A step is done, over so many tokens of all processes."""
        self.tokens, self.losses = self.tokens + tokens, [*self.losses[-49:], loss]
        self.update()
        if self.n % 10 == 0:
            speed = self.tokens_per_s()
            mfu = {"mfu": f"{speed * self.flops_per_token / self.peak / self.world_size:.0%}"} if self.peak else {}
            self.set_postfix(loss=f"{sum(self.losses) / len(self.losses):.3f}", tok_s=f"{speed:,.0f}", **mfu, refresh=False)


def peak_flops(device):
    """Dense bf16 FLOP/s that the maker states for this GPU, or None; for model FLOP/s utilisation (MFU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    table = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12, "T4": 65e12}
    return next((flops for key, flops in table.items() if key in name), None)
