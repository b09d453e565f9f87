"""Clock, log, evaluation times and checkpoints of a run: what surrounds a training loop and is no
lesson.

    run = Run(settings, model, optimizers, tokenizer, device, must_match)
    while run.goes_on():
        if run.evaluates():
            run.save()
            run.log(...)
        if run.finished:
            break
        ...                         # forward, backward, update: written out in each recipe
        run.count(loss)             # of each micro-step
        run.end_step(tokens)
    run.finish()
"""
import math
import shutil
import signal
import sys

import torch
from tqdm import tqdm

import common
from training.files import save_model
from training.log import Clock, Log, Progress
from training.state import (
    SHARDED,
    check_finite,
    has_state,
    load_training,
    make_folder,
    save_training,
)


class Run:
    """Attributes: `step` (updates done), `progress` (0 to 1, by steps or by the clock), `finished`,
    `figures` (a list that is kept from one row of the log to the next, over a resume too)."""

    def __init__(self, settings, model, optimizers, tokenizer, device, must_match,
                 flops_per_token=0.0, save_model=None, sharded=False):
        """settings: the recipe's constants. must_match: what a resumed run may not change.
        save_model(): in place of training.files.save_model(model, folder).

        With --resume the state is read into model and optimizers. Raises ValueError, OSError.
        """
        self.settings, self.must_match, self.sharded = settings, must_match, sharded
        self.model, self.optimizers, self.tokenizer = model, optimizers, tokenizer
        self.device, self.save_model = device, save_model
        self.folder, self.main = make_folder(settings["out_dir"]), common.rank_and_size()[0] == 0
        self.step, self.losses, self.figures, elapsed = 0, [], [], 0.0
        if settings["resume"]:
            record = load_training(self.folder, model, optimizers, must_match, sharded)
            self.step, elapsed, self.losses = record["step"], record["elapsed_s"], record["losses"]
            self.figures = record.get("figures", [])
        elif self.main and has_state(self.folder):
            self.say(f"replacing the run in {self.folder} (--resume=True would have continued it)")
            # Or, killed before its first checkpoint, this run would resume as that one.
            (self.folder / "train_state.pt").unlink(missing_ok=True)
            for name in SHARDED:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        common.barrier()
        self.clock = Clock(elapsed)
        self.sums = torch.zeros(3, device=device)       # of a step: nats, their tokens, the loss
        if self.main:
            keep = self.step if settings["resume"] else None
            self.log_file = Log(self.folder / "log.jsonl", keep, settings["wandb"], settings)
        self.bar = Progress(self.clock, self.step, settings["max_steps"], flops_per_token, device)
        self.stop = stop_signals()

    def say(self, text):
        """Print a line above the progress bar, once for all processes; at once, in a pipe too."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def goes_on(self):
        """Look at the clock. True for one pass more than there are updates: the last only evaluates
        and saves. After Ctrl-C it saves and returns False."""
        max_steps, max_minutes = self.settings["max_steps"], self.settings["max_minutes"]
        minutes = common.from_rank_0(self.clock.seconds(), self.device) / 60
        if max_steps:                   # then a run is the same however fast the machine is
            self.progress = self.step / max_steps
        else:
            self.progress = minutes / max_minutes
        self.finished = self.progress >= 1
        self.stopped = bool(common.from_rank_0(float(bool(self.stop)), self.device))
        if self.stopped:
            self.save()
        return not self.stopped

    def evaluates(self):
        """Whether it is time to save, evaluate and show a sample."""
        interval = self.settings["eval_interval"]
        return self.finished or self.step > 0 and interval > 0 and self.step % interval == 0

    def save(self):
        """What resuming needs, and then what sample.py reads."""
        record = {"step": self.step, "elapsed_s": self.clock.seconds(), "losses": self.losses,
                  "figures": self.figures, "settings": {**self.settings, **self.must_match}}
        save_training(self.folder, self.model, self.optimizers, record, self.sharded)
        if self.save_model is not None:
            self.save_model()
        elif self.main:
            save_model(self.model, self.folder)
        if self.main:
            self.tokenizer.save_pretrained(self.folder)
        common.barrier()

    def log(self, val_nelbo, val_stderr, bytes_per_token, lr_factor, **more):
        """A row of log.jsonl. more: further values for it."""
        self.val_nelbo, self.val_stderr = val_nelbo, val_stderr
        self.val_bpb = val_nelbo / math.log(2) / bytes_per_token
        train_loss = sum(self.losses) / len(self.losses) if self.losses else None
        if self.main:
            self.log_file.write(
                step=self.step, train_loss=train_loss, val_nelbo=val_nelbo, val_stderr=val_stderr,
                val_bpb=self.val_bpb, tokens_per_s=self.bar.tokens_per_s(), lr_factor=lr_factor,
                elapsed_s=self.clock.seconds(), **more)
        self.losses = []

    def count(self, loss):
        """A micro-step's Loss: its nats and tokens, for train_loss, the NELBO per token of a
        step."""
        nats, count = loss.token_nll.sum(), self.sums.new_tensor(loss.count)
        self.sums += torch.stack((nats.to(count.dtype), count, loss.loss.detach().to(count.dtype)))

    def end_step(self, tokens):
        """An update is done, over so many tokens of all processes. FloatingPointError if its loss
        is not finite."""
        nats, count, objective = common.sum_over_ranks(self.sums.tolist(), self.device)
        self.sums.zero_()
        check_finite(nats / count, self.step, self.folder)
        check_finite(objective, self.step, self.folder)
        self.step += 1
        self.losses.append(nats / count)
        self.bar.count(self.losses[-1], tokens)

    def finish(self):
        """Close the bar, draw loss.png, print the last line."""
        self.bar.close()
        if self.main and self.stopped:
            print(f"stopped at step {self.step}; --resume=True goes on from here")
        elif self.main:
            self.log_file.plot(self.folder / "loss.png")
            print(f"val nelbo {self.val_nelbo:.4f} +- {self.val_stderr:.4f} nats/token, "
                  f"{self.val_bpb:.3f} bits/byte")


def stop_signals():
    """A list that is empty until Ctrl-C, or until a machine about to be taken says so: finish the
    step, save, leave."""
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    return stop
