"""What surrounds reinforcement learning and is no lesson: the Run, whose log has rewards where
others have bounds; mistakes found before hours of work; the reference."""
import copy
from pathlib import Path

import torch

import common
from data.tokenizer import Tokenizer
from policy import ESTIMATORS, MEANS
from pretrained.hub import model_folder
from pretrained.load import fill, open_checkpoint
from training.log import draw
from training.run import Run


class RewardRun(Run):
    """run.add(...) after each step; run.log(...) and run.finish() tell of rewards."""

    said = frozenset()

    def evaluates(self):
        """As of any Run, and before the first step: the model as it came."""
        return super().evaluates() or self.step == 0 and self.settings["eval_interval"] > 0

    def say_once(self, text):
        """A line that is said once in a run, whatever stands after its " step " or colon."""
        kind = text.partition(" step ")[0].partition(":")[0]
        if kind not in self.said:
            self.say(f"note: {text}")
        self.said |= {kind}

    def add(self, **figures):
        """Figures of a step, numbers that are averaged until the next row of the log; the bar shows
        some of them."""
        self.figures.append({name: float(value) for name, value in figures.items()})
        means = self.means()
        shown = {name: f"{means[name]:.3f}" for name in ("reward", "solved", "kl", "clipped")}
        self.bar.set_postfix(shown, refresh=False)

    def means(self):
        """{name: mean of what was added}."""
        names = self.figures[0] if self.figures else ()
        return {name: sum(row[name] for row in self.figures) / len(self.figures) for name in names}

    def log(self, held_out, lr_factor):
        """A row of log.jsonl: what was added, and `held_out`, {name: number} with solve_rate,
        solve_stderr and val_reward."""
        self.held_out, means = held_out, self.means()
        train_loss = sum(self.losses) / len(self.losses) if self.losses else None
        if self.main:
            self.log_file.write(step=self.step, train_loss=train_loss, **means, **held_out,
                                tokens_per_s=self.bar.tokens_per_s(), lr_factor=lr_factor,
                                elapsed_s=self.clock.seconds())
        self.say(f"step {self.step}: {self.result()}")
        self.losses, self.figures = [], []

    def result(self):
        """The figures of the last evaluation, in words."""
        now = self.held_out
        return (f"solve rate {now['solve_rate']:.3f} +- {now['solve_stderr']:.3f}, "
                f"reward {now['val_reward']:.3f}")

    def finish(self):
        """Close the bar, draw reward.png, print the last line."""
        self.bar.close()
        if self.main and self.stopped:
            print(f"stopped at step {self.step}; --resume=True goes on from here")
        elif self.main:
            dots = dict(marker="o", ms=3)
            curves = [("solve_rate", "solve_stderr", "held-out tasks solved", dots),
                      ("reward", "", "reward of answers, training", dict(alpha=0.6))]
            draw(self.folder / "reward.png", self.log_file.rows, curves, "reward, solve rate")
            print(self.result())


def check_settings(settings):
    """ValueError for a constant of train_grpo.py that cannot be."""
    common.check(
        settings,
        at_least_1=["prompts", "rollout_size", "seq_len", "max_new_tokens", "bound_samples",
                    "trace_together", "inner_updates", "batch_size", "eval_prompts"],
        positive=["learning_rate", "reward_seconds"],
        not_negative=["steps", "block_length", "temperature", "cfg_scale", "clip", "clip_high",
                      "beta", "lora_rank", "weight_decay", "grad_clip", "max_steps", "max_minutes",
                      "eval_interval", "eval_temperature", "sample_tokens", "memory_gb"],
        shares=["warmup"], below_1=["beta2"],
        estimator=list(ESTIMATORS), objective=["grpo", "wd1", "spg"], mean=MEANS,
        bound_sets=["even", "dealt"], cache=["none", "prefix", "dual", "block"])
    if settings["group_size"] < 2:
        raise ValueError(f"group_size must be at least 2, got {settings['group_size']}: an answer "
                         "is compared with the others of its question")
    if settings["reward_seconds"] > 1e6:
        raise ValueError(f"reward_seconds must be at most 1e6, got {settings['reward_seconds']}")
    if not (settings["max_steps"] or settings["max_minutes"]):
        raise ValueError("max_steps and max_minutes are both 0: say when to stop")
    common.note_without_effect(f"max_steps {settings['max_steps']}",
                               max_minutes=settings["max_steps"] == 0)
    if settings["reference"] and not settings["beta"]:
        raise ValueError("reference is what the KL is measured from, and beta=0 has none: set beta")
    estimator, objective = settings["estimator"], settings["objective"]
    common.note_without_effect(
        f"estimator {estimator}", trace_together=estimator == "trace",
        bound_samples=estimator == "bound", bound_sets=estimator == "bound")
    common.note_without_effect(
        f"objective {objective}", clip=objective == "grpo", clip_high=objective == "grpo")
    needs_even_bounds = settings["objective"] == "spg"
    if needs_even_bounds and (settings["estimator"], settings["bound_sets"]) != ("bound", "even"):
        raise ValueError("objective spg is made of two bounds: it needs --estimator=bound and "
                         "--bound_sets=even")


def frozen_reference(model, reference, init_from, base, lora_rank, device):
    """The policy as it began, or its checkpoint `reference`, as a model of its own; None with
    adapters, for the policy without them is its base. ValueError for a checkpoint that is none of
    the policy's."""
    is_base = not reference or Path(model_folder(reference)).resolve() == Path(base).resolve()
    if lora_rank and not is_base:
        raise ValueError(f"reference={reference} is not the policy's base: adapters belong to "
                         f"{init_from}; leave it away, or train everything with --lora_rank=0")
    if lora_rank:
        return None
    if not reference:
        return copy.deepcopy(model).requires_grad_(False).eval()
    frozen, weights = open_checkpoint(model_folder(reference))
    theirs, ours = frozen.config, model.config
    same = (theirs.family, theirs.vocab_size, theirs.shift) == (
        ours.family, ours.vocab_size, ours.shift)
    if not same:
        raise ValueError(f"reference={reference} is not the policy's base: a {theirs.family} of "
                         f"{theirs.vocab_size} tokens, and {init_from} is a {ours.family} of "
                         f"{ours.vocab_size}")
    words = [Tokenizer.from_pretrained(folder).backend.get_vocab()
             for folder in (model_folder(reference), base)]
    if words[0] != words[1]:
        raise ValueError(f"reference={reference} is not the policy's base: its tokenizer has other "
                         f"tokens than that of {init_from}")
    fill(frozen, weights, device, torch.float32)
    return frozen.requires_grad_(False).eval()
