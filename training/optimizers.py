"""Muon by hand, AdamW, the learning rate, gradients over processes."""
import math

import torch
import torch.distributed as dist

from common import matrix_dtype


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: of each matrix's momentum U S V^T only U V^T is
    applied (Jordan et al. 2024).

    Five steps of a Newton-Schulz iteration, X <- aX + b(XX^T)X + c(XX^T)^2 X, drive the singular
    values to about 1. Matrices of one shape are stacked and go through it together, which takes
    half the time of one after the other (torch.optim.Muon). A parameter of three dimensions is a
    stack of matrices already: those of the experts.
    """

    def __init__(self, matrices, lr=0.02, momentum=0.9, weight_decay=0.0):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}                             # (rows <= columns) -> [(p, its updates), ...]
            for p in group["params"]:
                if p.grad is not None:
                    update = wide(self.momentum(p, group["momentum"]))
                    update = update[None] if p.ndim == 2 else update    # [1 or E, rows, columns]
                    by_shape.setdefault(update.shape[1:], []).append((p, update))
            for pairs in by_shape.values():
                sizes = [len(update) for _, update in pairs]
                updates = orthogonal(torch.cat([update for _, update in pairs])).split(sizes)
                for (p, _), update in zip(pairs, updates):
                    rows, columns = p.shape[-2:]
                    if rows > columns:
                        update = update.mT
                    scale = max(1, rows / columns) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)

    def momentum(self, p, beta):
        """Nesterov's look ahead: the gradient moved towards the running mean of gradients."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["momentum_buffer"], beta)


def wide(matrix):
    """The matrix, or its transpose if it has more rows than columns; each one of a stack."""
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def orthogonal(matrices, steps=5):
    """Roughly U V^T of each of the matrices U S V^T, [N, rows, columns] with rows <= columns, in
    bfloat16 where that is fast."""
    x = matrices.to(matrix_dtype(matrices.device, "auto"))
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)               # singular values at most 1
    for _ in range(steps):
        a = x @ x.mT                                                # [N, rows, rows]
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


def make_optimizers(model, kind, learning_rate, muon_lr=0.0, beta2=0.99, weight_decay=0.0,
                    embedding_lr=None):
    """[optimizer, ...] of what learns in a Transformer: Muon for the matrices of its blocks and
    AdamW for the rest, or (kind "adamw") AdamW for all. Only the matrices of the blocks decay.

    embedding_lr: AdamW's for the token embedding, unless it is tied to the head; None: as the
    others. AdamW moves every number by about its learning rate, however large the number is. So
    embeddings that begin as N(0, 1) need a rate some thirty times that of a head of N(0, 0.02^2).
    Raises ValueError for another kind, or a beta2 that cannot be.
    """
    if kind not in ("muon", "adamw"):
        raise ValueError(f"optimizer must be one of muon, adamw, got {kind!r}")
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 must be at least 0 and below 1, got {beta2}")
    in_blocks, table = set(model.blocks.parameters()), model.embed.weight
    matrices, embedding, others = [], [], []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if p.ndim >= 2 and p in in_blocks:
            matrices.append(p)
        elif p is table and p is not model.head.weight and embedding_lr is not None:
            embedding.append(p)
        else:
            others.append(p)
    groups = [{"params": others}]
    if embedding:
        groups.append({"params": embedding, "lr": embedding_lr, "peak_lr": embedding_lr})
    how = dict(lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0, fused=True)
    if kind == "muon":
        muon = Muon(matrices, muon_lr, weight_decay=weight_decay)
        return [muon, torch.optim.AdamW(groups, **how)]
    groups.append({"params": matrices, "weight_decay": weight_decay})
    return [torch.optim.AdamW(groups, **how)]


def set_learning_rate(optimizers, factor):
    """Every parameter's learning rate: `factor` times the peak of its group or, where it has none
    of its own, of its optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.get("peak_lr", optimizer.defaults["lr"])


def learning_rate_factor(progress, warmup=0.02, decay="linear", decay_from=0.0):
    """What the peak learning rate is multiplied by at `progress` in [0, 1]: up over `warmup`,
    level, down to 0 from `decay_from` on, in a straight line or a cosine."""
    if progress >= 1:
        return 0.0
    if progress < warmup:
        return progress / warmup
    left = min(1.0, (1 - progress) / (1 - max(decay_from, warmup)))
    if decay == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    return left


def average_gradients(model, bucket_bytes=2**26):
    """Make every gradient its mean over all processes, in a few large messages."""
    if not dist.is_initialized():
        return
    bucket, size = [], 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for number, gradient in enumerate(gradients, 1):
        bucket.append(gradient)
        size += gradient.nbytes
        if size >= bucket_bytes or number == len(gradients):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(mean.view_as(g))
            bucket, size = [], 0


def clip_gradients(model, largest):
    """Scale all gradients together so that their norm is at most `largest`; 0: leave them."""
    if largest:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], largest)
