"""What pays in a short training run? One change at a time against the recipe of train_scratch.py,
equal updates.

    python experiments/ablate.py DATASET OUT.jsonl ARM,ARM... SEED,SEED... [UPDATES or MINUTESmin]

DATASET: tales, pydocs, any other name or a text file. T 128, 4 layers, D 192, 2,048 pieces of
words, as in train_scratch.py. 800 updates of 2,048 tokens (other batches: equal tokens) on one
thread (two runs side by side fill two cores and do not disturb each other), or, with "2.5min", as
many as 2.5 minutes allow on all cores. An arm is a name below, or several as in "old + adamw". Each
line of OUT: arm, seed, validation NELBO in nats/token with the true weights, its standard error,
tokens/s and, of tales, what share of a hidden thing's probability is right (`restored`) at each
tenth of the run.
"""
import copy
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from config import ACTIVATIONS  # noqa: E402
from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.tales_copying import hidden_things  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from diffusion import (  # noqa: E402
    ar_loss,
    mask_tokens,
    mdlm_loss,
    nelbo,
    restored,
    sample_t,
)
from model import Config, Transformer  # noqa: E402
from training.optimizers import (  # noqa: E402
    learning_rate_factor,
    make_optimizers,
    set_learning_rate,
)

T = 128         # tokens of a sequence
CPU = torch.device("cpu")


@dataclass
class Recipe:
    """What an arm may change, and what train_scratch.py does; but here no heads look beside."""
    objective: str = "mdlm"         # mdlm, ar
    ar_share: float = 0.0           # of the run that an mdlm learns from left to right at first
    shift: bool = False             # token i is predicted at i - 1, which ar_share needs
    t: str = "stratified"           # how times are drawn: a kind of `draw_times`, or complementary
    max_weight: float = 10.0        # None: not clipped
    weight_power: float = 1.0       # the weight is 1 / t to this power
    optimizer: str = "muon"         # muon, adamw
    muon_lr: float = 0.02
    momentum: float = 0.9           # Muon's
    lr: float = 3e-3                # AdamW's
    embedding_lr: float = 0.05      # AdamW's for the embedding
    beta2: float = 0.99             # AdamW's
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup: float = 0.02
    decay: str = "linear"           # linear, cosine
    decay_from: float = 0.0         # share of the run after which the learning rate falls
    batch: int = 16                 # sequences
    dtype: str = "auto"             # of matrix products
    matrix_std: float = 0.02        # of the first weights; None: 1 / sqrt(inputs)
    embedding_std: float = 1.0
    zero_outputs: bool = False      # the head and what writes into the residual stream begin at 0
    config: dict = field(default_factory=dict)      # fields of model.Config
    ema: float = 0.0                # average of the weights, so much of it stays at an update
    softcap: float = 0.0            # logits stay within so much


FAN_IN_ZEROS = dict(matrix_std=None, embedding_std=1.0, zero_outputs=True)
PLAIN = dict(
    optimizer="adamw", lr=1e-3, embedding_lr=1e-3, decay="cosine", t="uniform", max_weight=None,
    matrix_std=0.02, embedding_std=0.02, zero_outputs=False, weight_decay=0.1, batch=32,
    config=dict(qk_norm=False))
ARMS = {
    "recipe": {},
    "old": dict(FAN_IN_ZEROS, momentum=0.95),
    "plain": PLAIN,
    "plain float32": dict(PLAIN, dtype="float32"),
    "autoregressive": dict(objective="ar"),
    "shift": dict(shift=True),
    "ar first 0.2": dict(ar_share=0.2, shift=True),
    "ar first 0.4": dict(ar_share=0.4, shift=True),
    "ar first 0.6": dict(ar_share=0.6, shift=True),
    # times and weights
    "uniform t": dict(t="uniform"),
    "complementary masks": dict(t="complementary"),
    "curriculum": dict(t="curriculum"),
    "low t": dict(t="low"),
    "no clip": dict(max_weight=None),
    "clip 5": dict(max_weight=5.0),
    "clip 3": dict(max_weight=3.0),
    "clip 2": dict(max_weight=2.0),
    "sqrt weight": dict(weight_power=0.5),
    "flat weight": dict(weight_power=0.0),
    # optimizer
    "adamw": dict(optimizer="adamw"),
    "adamw 1e-3": dict(optimizer="adamw", lr=1e-3),
    "muon 0.01": dict(muon_lr=0.01),
    "muon 0.04": dict(muon_lr=0.04),
    "momentum 0.95": dict(momentum=0.95),
    "lr 1.5e-3": dict(lr=1.5e-3),
    "lr 6e-3": dict(lr=6e-3),
    "lr 1e-2": dict(lr=1e-2),
    "embedding lr 3e-3": dict(embedding_lr=3e-3),
    "embedding lr 0.01": dict(embedding_lr=0.01),
    "embedding lr 0.02": dict(embedding_lr=0.02),
    "embedding lr 0.1": dict(embedding_lr=0.1),
    "embedding lr 0.3": dict(embedding_lr=0.3),
    "beta2 0.95": dict(beta2=0.95),
    "weight decay 0.1": dict(weight_decay=0.1),
    "cosine decay": dict(decay="cosine"),
    "decay from half": dict(decay_from=0.5),
    "ema 0.99": dict(ema=0.99),
    "batch 8": dict(batch=8),
    "batch 32": dict(batch=32),
    "batch 64": dict(batch=64),
    # first weights
    "init 0.02": dict(matrix_std=0.02, embedding_std=0.02, zero_outputs=False),
    "zero init": FAN_IN_ZEROS,
    "small embedding": dict(FAN_IN_ZEROS, embedding_std=0.02),
    "zero outputs": dict(FAN_IN_ZEROS, matrix_std=0.02),
    "fan-in init": dict(FAN_IN_ZEROS, zero_outputs=False),
    # model
    "no q/k norm": dict(config=dict(qk_norm=False)),
    "theta 1000": dict(config=dict(rope_theta=1000.0)),
    "theta 100": dict(config=dict(rope_theta=100.0)),
    "2 heads": dict(config=dict(n_heads=2)),
    "8 heads": dict(config=dict(n_heads=8)),
    "relu^2": dict(config=dict(gated=False, activation="relu2")),
    "gelu": dict(config=dict(gated=False, activation="gelu")),
    "tied": dict(config=dict(tie_embeddings=True)),
    "soft-cap 15": dict(softcap=15.0),
}


def relu2(x):
    return F.relu(x).square()


ACTIVATIONS["relu2"] = relu2

# --------------------------------------------------------------------------------------------------
# Model and optimizer


class SoftCap(nn.Module):
    """A model whose logits are bent to stay within +- cap (Gemma 2)."""

    def __init__(self, model, cap):
        super().__init__()
        self.model, self.config, self.cap = model, model.config, cap

    def forward(self, tokens, **how):
        return self.cap * torch.tanh(self.model(tokens, **how).float() / self.cap)


def build_model(recipe, data, seed):
    causal = recipe.objective == "ar"
    settings = dict(dim=192, n_layers=4, n_heads=4, causal=causal, shift=causal or recipe.shift)
    config = Config(vocab_size=data.vocab_size, mask_token_id=data.mask_token_id, max_len=T,
                    **{**settings, **recipe.config})
    model = Transformer(config).init_weights(seed)
    if first_weights(recipe) != first_weights(Recipe()):
        draw_weights(model, recipe, torch.manual_seed(seed))
    return model


def first_weights(recipe):
    return recipe.matrix_std, recipe.embedding_std, recipe.zero_outputs


def draw_weights(model, recipe, generator):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = recipe.matrix_std or module.weight.shape[1] ** -0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
            if recipe.zero_outputs and name.endswith((".o", ".down", "head")):
                nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=recipe.embedding_std, generator=generator)


def build_optimizers(recipe, model):
    optimizers = make_optimizers(model, recipe.optimizer, recipe.lr, recipe.muon_lr, recipe.beta2,
                                 recipe.weight_decay, recipe.embedding_lr)
    if recipe.optimizer == "muon":
        optimizers[0].param_groups[0]["momentum"] = recipe.momentum
    return optimizers


# --------------------------------------------------------------------------------------------------
# Noise and loss


def draw_times(kind, n, progress, generator):
    """Times float32 [n]."""
    if kind == "uniform":
        return torch.rand(n, generator=generator).clamp(min=1e-3)
    t = sample_t((n,), generator)
    if kind == "curriculum":    # begin with few masks: short contexts are learned fastest from them
        return t * min(1.0, 0.3 + 0.7 * progress / 0.3)
    if kind == "low":           # more of the small times, weighed down by as much in `objective`
        return t**1.5
    return t


def draw_noise(recipe, tokens, progress, generator):
    """(tokens [B, T], times [B], mask [B, T])."""
    B = len(tokens)
    t = draw_times(recipe.t, B, progress, generator)
    if recipe.t != "complementary":
        return tokens, t, mask_tokens((B, T), t[:, None], generator)
    # Two noisings of the same text: each token is masked in exactly one of them.
    t = t[:B // 2]
    half = mask_tokens((B // 2, T), t[:, None], generator)
    times = torch.cat((t, 1 - t)).clamp(min=1e-3)
    return tokens[:B // 2].repeat(2, 1), times, torch.cat((half, ~half))


def objective(recipe, model, tokens, progress, generator):
    """The Loss of a batch. `mdlm_loss` weighs by 1 over the times it is given: other weights are
    other times for masks that are drawn already."""
    model.config.causal = recipe.objective == "ar" or progress < recipe.ar_share
    if model.config.causal:
        return ar_loss(model, tokens)
    tokens, t, mask = draw_noise(recipe, tokens, progress, generator)
    if recipe.weight_power != 1:
        t = 2 * t**recipe.weight_power
    if recipe.t == "low":       # the density of u^1.5 is 2/3 t^(-1/3)
        t = t * (2 / 3) * t ** (-1 / 3)
    return mdlm_loss(model, tokens, t, mask, max_weight=recipe.max_weight)


# --------------------------------------------------------------------------------------------------
# A run


def recipe_of(arm):
    """The Recipe with the changes of an arm, or of several joined by " + "."""
    changes = {}
    for name in arm.split(" + "):
        if name not in ARMS:
            raise ValueError(f"no arm called {name!r}: there are {', '.join(ARMS)}")
        changes |= ARMS[name]
    return dataclasses.replace(Recipe(), **changes)


def run(arm, dataset, seed, updates, minutes=0.0):
    """A line of OUT. minutes 0: so many updates, of the recipe's batch or as many tokens."""
    recipe = recipe_of(arm)
    torch.manual_seed(seed)
    folder = prepare(dataset)
    data, tokenizer = TokenDataset(folder), Tokenizer.from_pretrained(folder)
    things = hidden_things(data.val, tokenizer, T) if dataset == "tales" else None
    model = build_model(recipe, data, seed)
    optimizers = build_optimizers(recipe, model)
    average = copy.deepcopy(model) if recipe.ema else None
    if recipe.softcap:
        model = SoftCap(model, recipe.softcap)
    updates = updates * Recipe.batch // recipe.batch    # equal tokens, which is about equal minutes
    begin, step, progress, looks_back = time.perf_counter(), 0, 0.0, []
    while progress < 1:
        factor = learning_rate_factor(progress, recipe.warmup, recipe.decay, recipe.decay_from)
        set_learning_rate(optimizers, factor)
        tokens = data.batch("train", recipe.batch, T, seed, step)
        update(recipe, model, optimizers, tokens, progress, common.stream("noise", seed, step))
        if average is not None:
            move_average(average, model, recipe.ema)
        step += 1
        progress = step / updates
        if minutes:
            progress = (time.perf_counter() - begin) / 60 / minutes
        if things is not None and progress >= (len(looks_back) + 1) / 10:
            model.config.causal = recipe.objective == "ar"
            share = restored(average or model, things.tokens, things.hidden, things.target)
            looks_back.append(round(share.mean().item(), 3))
    speed = step * recipe.batch * T / (time.perf_counter() - begin)
    model = (average or model).eval()
    model.config.causal = recipe.objective == "ar"
    value, error = nelbo(model, data.windows("val", T, 2**16), num_samples=2, seed=0)
    return dict(arm=arm, seed=seed, nelbo=round(value, 4), stderr=round(error, 4),
                tokens_per_s=round(speed), updates=step, restored=looks_back)


def update(recipe, model, optimizers, tokens, progress, generator):
    with common.autocast(CPU, recipe.dtype):
        loss = objective(recipe, model, tokens, progress, generator).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def move_average(average, model, share):
    for mean, p in zip(average.parameters(), model.parameters()):
        mean.lerp_(p, 1 - share)


def main(dataset, out, arms, seeds, length="800"):
    updates, minutes = 0, 0.0
    if length.endswith("min"):
        minutes = float(length.removesuffix("min"))
    else:
        updates = int(length)
        torch.set_num_threads(1)
    for seed in seeds.split(","):
        for arm in arms.split(","):
            result = run(arm, dataset, int(seed), updates, minutes)
            print(json.dumps(result), flush=True)
            with open(out, "a") as file:
                file.write(json.dumps({**result, "minutes": minutes}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    common.show_errors_in_one_line()
    main(*sys.argv[1:])
