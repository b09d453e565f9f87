"""What pays in a training run of 2.5 minutes? One change at a time against the recipe of train_scratch.py, equal updates.

    python tests/ablate.py TEXT_FILE OUT.jsonl ARM,ARM... SEED,SEED... [UPDATES or MINUTESmin]

Byte level, T 128, 4 layers, D 128. 1000 updates of 2,048 tokens (other batches: equal tokens) on one thread (two runs side by side fill two
cores and do not disturb each other), or, with "2.5min", as many as 2.5 minutes allow on all cores. An arm is a name below, or several as in
"old + adamw". Each line of OUT: arm, seed, validation NELBO in nats/byte with the true weights, its standard error, tokens/s.
"""
import copy
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402
import model as model_module  # noqa: E402
from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from diffusion import ar_loss, mask_tokens, mdlm_loss, nelbo, sample_t  # noqa: E402
from model import Config, Transformer  # noqa: E402

# init: standard deviation of matrices (None: fan-in ** -0.5), of embeddings, and whether the head and what writes into the residual stream are zero.
BASE = dict(optimizer="muon", muon_lr=0.02, lr=3e-3, beta2=0.99, weight_decay=0.0, decay="linear", decay_from=0.0, warmup=0.02, batch=16, t="stratified",
            max_weight=10.0, weight_power=1.0, init=(0.02, 1.0, False), config={}, objective="mdlm", grad_clip=1.0, momentum=0.9, ema=0.0, softcap=0.0, dtype="auto")
PLAIN = dict(optimizer="adamw", lr=1e-3, decay="cosine", t="uniform", max_weight=None, init=(0.02, 0.02, False), weight_decay=0.1, batch=32, config=dict(qk_norm=False))
ARMS = {
    "recipe": {}, "old": dict(momentum=0.95, init=(None, 1.0, True)), "plain": PLAIN, "plain float32": dict(PLAIN, dtype="float32"),
    "uniform t": dict(t="uniform"), "no clip": dict(max_weight=None), "clip 5": dict(max_weight=5.0), "clip 3": dict(max_weight=3.0),
    "clip 2": dict(max_weight=2.0), "sqrt weight": dict(weight_power=0.5), "flat weight": dict(weight_power=0.0),
    "complementary masks": dict(t="complementary"), "curriculum": dict(t="curriculum"), "low t": dict(t="low"),
    "adamw": dict(optimizer="adamw"), "adamw 1e-3": dict(optimizer="adamw", lr=1e-3),
    "cosine decay": dict(decay="cosine"), "decay from half": dict(decay_from=0.5), "init 0.02": dict(init=(0.02, 0.02, False)), "zero init": dict(init=(None, 1.0, True)),
    "small embedding": dict(init=(None, 0.02, True)), "zero outputs": dict(init=(0.02, 1.0, True)), "fan-in init": dict(init=(None, 1.0, False)),
    "muon 0.01": dict(muon_lr=0.01), "muon 0.04": dict(muon_lr=0.04), "lr 1.5e-3": dict(lr=1.5e-3), "lr 6e-3": dict(lr=6e-3), "lr 1e-2": dict(lr=1e-2),
    "beta2 0.95": dict(beta2=0.95), "weight decay 0.1": dict(weight_decay=0.1), "momentum 0.95": dict(momentum=0.95),
    "batch 8": dict(batch=8), "batch 32": dict(batch=32), "batch 64": dict(batch=64),
    "no q/k norm": dict(config=dict(qk_norm=False)), "theta 1000": dict(config=dict(rope_theta=1000.0)), "theta 100": dict(config=dict(rope_theta=100.0)),
    "2 heads": dict(config=dict(n_heads=2)), "8 heads": dict(config=dict(n_heads=8)), "relu^2": dict(config=dict(gated=False, activation="relu2")),
    "gelu": dict(config=dict(gated=False, activation="gelu")), "tied": dict(config=dict(tie_embeddings=True)),
    "autoregressive": dict(objective="ar"), "ema 0.99": dict(ema=0.99), "soft-cap 15": dict(softcap=15.0),
}
model_module.ACTIVATIONS["relu2"] = lambda x: F.relu(x).square()


def draw_t(kind, n, progress, generator):
    if kind == "uniform":
        return torch.rand(n, generator=generator).clamp(min=1e-3)
    if kind == "curriculum":                # begin with few masks: from them the short contexts are learned fastest
        return sample_t((n,), generator) * min(1.0, 0.3 + 0.7 * progress / 0.3)
    if kind == "low":                       # more of the small t, weighed down by as much
        return sample_t((n,), generator) ** 1.5
    return sample_t((n,), generator)


class SoftCap(nn.Module):
    """A model whose logits are bent to stay within +- cap (Gemma 2)."""

    def __init__(self, model, cap):
        super().__init__()
        self.model, self.config, self.cap = model, model.config, cap

    def forward(self, tokens, **options):
        return self.cap * torch.tanh(self.model(tokens, **options).float() / self.cap)


def run(arm, text, seed, updates, minutes=0.0):
    o = dict(BASE)
    for name in arm.split(" + "):
        o |= ARMS[name]
    T, torch_seed, cpu = 128, torch.manual_seed(seed), torch.device("cpu")
    data = TokenDataset(prepare(text, "byte"))
    config = Config(vocab_size=data.vocab_size, mask_token_id=data.mask_token_id, max_len=T,
                    **{**dict(dim=128, n_layers=4, n_heads=4, causal=o["objective"] == "ar", shift=o["objective"] == "ar"), **o["config"]})
    model = Transformer(config).init_weights(seed)
    matrix_std, embedding_std, zero_outputs = o["init"]
    for name, module in model.named_modules() if o["init"] != BASE["init"] else ():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = matrix_std if isinstance(module, nn.Linear) else embedding_std
            nn.init.normal_(module.weight, std=std or module.weight.shape[1] ** -0.5, generator=torch_seed)
            if zero_outputs and name.endswith((".o", ".down", "head")):
                nn.init.zeros_(module.weight)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    if o["optimizer"] == "muon":
        optimizers = [common.Muon(matrices, lr=o["muon_lr"], momentum=o["momentum"], weight_decay=o["weight_decay"]),
                      torch.optim.AdamW(others, lr=o["lr"], betas=(0.9, o["beta2"]), weight_decay=0.0, fused=True)]
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=o["lr"], betas=(0.9, o["beta2"]), weight_decay=o["weight_decay"], fused=True)]
    peaks = [[g["lr"] for g in opt.param_groups] for opt in optimizers]
    B, ema = o["batch"], copy.deepcopy(model) if o["ema"] else None
    model = SoftCap(model, o["softcap"]) if o["softcap"] else model
    updates = updates * BASE["batch"] // B  # equal tokens, which is about equal minutes
    start = time.perf_counter()
    step, progress = 0, 0.0
    while progress < 1:
        factor = common.learning_rate_factor(progress, o["warmup"], o["decay"], o["decay_from"])
        for opt, lrs in zip(optimizers, peaks):
            for group, lr in zip(opt.param_groups, lrs):
                group["lr"] = lr * factor
        generator = common.stream("noise", seed, step)
        tokens = data.batch("train", B, T, seed, step)
        t = draw_t(o["t"], B, progress, generator)
        if o["t"] == "complementary":       # two noisings of the same text: each token is masked in exactly one of them
            tokens = tokens[:B // 2].repeat(2, 1)
            half = mask_tokens((B // 2, T), t[:B // 2, None], generator)
            mask, t = torch.cat((half, ~half)), torch.cat((t[:B // 2], 1 - t[:B // 2])).clamp(min=1e-3)
        else:
            mask = mask_tokens((B, T), t[:, None], generator)
        with common.autocast(cpu, o["dtype"]):
            if o["objective"] == "ar":
                loss = ar_loss(model, tokens)
            else:
                w = t                       # mdlm_loss weighs by 1 / (what it is given)
                if o["weight_power"] != 1:
                    w = 2 * t ** o["weight_power"]
                if o["t"] == "low":         # density of u^1.5 is 2/3 t^(-1/3)
                    w = t * (2 / 3) * t ** (-1 / 3)
                loss = mdlm_loss(model, tokens, w.clamp(max=1e6), mask, max_weight=o["max_weight"])
        loss.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["grad_clip"])
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        for average, p in zip(ema.parameters() if ema else (), model.parameters()):
            average.data.lerp_(p.data, 1 - o["ema"])
        step += 1
        progress = (time.perf_counter() - start) / 60 / minutes if minutes else step / updates
    seconds = time.perf_counter() - start
    model = (ema or model).eval()
    value, error = nelbo(model, data.windows("val", T, 2**16), num_samples=2, seed=0)
    return dict(arm=arm, seed=seed, nelbo=round(value, 4), stderr=round(error, 4), tokens_per_s=round(step * B * T / seconds), updates=step)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    text, out, arms, seeds, *length = sys.argv[1:]
    minutes = float(length[0].removesuffix("min")) if length and length[0].endswith("min") else 0.0
    if not minutes:
        torch.set_num_threads(1)
    for seed in seeds.split(","):
        for arm in arms.split(","):
            result = run(arm, text, int(seed), int(length[0]) if length and not minutes else 1000, minutes)
            print(json.dumps(result), flush=True)
            with open(out, "a") as file:
                file.write(json.dumps({**result, "minutes": minutes}) + "\n")
