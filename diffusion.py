"""Masked diffusion over tokens: corrupt -> loss, denoise -> text, likelihood. Pure functions of tensors; no files, no tokenizers.

Time runs from t = 0, clean, to t = 1, all mask. The forward process masks each token independently:

    q(x_t | x_0):  x_t = x_0 with probability alpha_t,  x_t = [MASK] with probability 1 - alpha_t = mask_prob

and what trains a model p(x_0 | x_t) to undo it is a bound on the likelihood, a weighted cross-entropy of the masked tokens:

    -log p(x_0) <= E_t [ weight(t) * sum over masked i of -log p(x_0^i | x_t) ],   weight(t) = -alpha'_t / (1 - alpha_t)

(MDLM, Sahoo et al. 2024, arXiv 2406.07524, eq. 11; MD4, Shi et al. 2024, 2406.04329, eq. 4). For alpha_t = 1 - t the weight is
1 / t, LLaDA's loss (Nie et al. 2025, 2502.09992, eq. 3). Block diffusion, BD3-LM (Arriola et al. 2025, 2503.09573, eq. 8), is the
same bound for one block of tokens after the other, each given the clean blocks before it.

Shapes: B batch, T positions, V vocabulary, N masked tokens. The model is anything that maps tokens to logits as
model.Transformer does and has its `config`. Randomness comes from generators on the CPU: every device draws the same masks.
"""
import functools
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from common import stream
from model import Cache, Transformer, at_least_float32, packed

# ------------------------------------------------------------------------------------------------------------------------------
# Noise schedules: alpha_t and its derivative. Whatever the schedule, the bound is the same number; its variance is not.


def linear(t):
    """alpha_t = 1 - t. Returns (alpha_t, alpha'_t)."""
    return 1 - t, -torch.ones_like(t)


def cosine(t):
    """alpha_t = 1 - cos(pi/2 (1 - t)), which lingers at many masks (MaskGIT, 2202.04200; MD4, table 1). Returns (alpha_t, alpha'_t)."""
    angle = math.pi / 2 * (1 - t)
    return 1 - torch.cos(angle), -math.pi / 2 * torch.sin(angle)


def polynomial(t, power=2.0):
    """alpha_t = 1 - t^power, which lingers at few masks (MD4, table 1). Returns (alpha_t, alpha'_t)."""
    return 1 - t**power, -power * t ** (power - 1)


SCHEDULES = {"linear": linear, "cosine": cosine, "polynomial": polynomial}


def weight(t, schedule="linear"):
    """-alpha'_t / (1 - alpha_t), the factor of the bound at time t; 1/t for the linear schedule."""
    alpha, d_alpha = SCHEDULES[schedule](t)
    return -d_alpha / (1 - alpha)


# ------------------------------------------------------------------------------------------------------------------------------
# Corrupt


def sample_t(shape, generator=None, eps=1e-3):
    """Times in (eps, 1], float32 of `shape`, each uniform, together evenly spread.

    One offset u shifts an even grid, t_i = (u + i / n) mod 1, so that every batch sees all noise levels: the loss of a batch
    varies much less than with independent times (MD4, section 4; MDLM, appendix C.3).
    """
    n = math.prod(shape)
    grid = (torch.rand((), generator=generator) + torch.arange(n) / n) % 1
    return 1 - (1 - eps) * grid[torch.randperm(n, generator=generator)].view(shape)


def mask_tokens(shape, mask_prob, generator=None):
    """bool of `shape`: each position masked with its mask_prob (broadcast), independently."""
    return torch.rand(shape, generator=generator) < mask_prob


# ------------------------------------------------------------------------------------------------------------------------------
# Loss


@dataclass
class Loss:
    loss: torch.Tensor          # scalar with gradient: sum(token_nll) / count
    token_nll: torch.Tensor     # float32 [B, T], detached: weight * -log p in nats, 0 where nothing was masked
    nelbo: torch.Tensor         # scalar, detached: the estimate of the bound, nats per token (with the true weights)
    count: int                  # tokens that the sum is divided by
    is_masked: torch.Tensor     # bool [B, T]
    t: torch.Tensor             # [B, 1] or [B, number of blocks]


def mdlm_loss(model, tokens, t=None, mask=None, maskable=None, attention_mask=None, schedule="linear", max_weight=None, generator=None):
    """The bound of masked diffusion for tokens int64 [B, T] (MDLM eq. 11, LLaDA eq. 3), nats per token.

        loss = 1 / count * sum over masked i of weight(t) * -log p(x_0^i | x_t)

    count is the number of maskable tokens: all of them, or those where `maskable` [B, T] is true (the answers in chat data).
    t           float [B], None: drawn by `sample_t`.        mask   bool [B, T], None: drawn with probability 1 - alpha_t.
    max_weight  clips the weight of `loss`, not of `nelbo`: less noise from times near 0 for a slightly other objective.
    Raises ValueError where shapes or the mask token do not fit.
    """
    B, T = tokens.shape
    t = sample_t((B,), generator) if t is None else t
    if t.shape != (B,):
        raise ValueError(f"t must have shape [{B}], one time a sequence, got {list(t.shape)}")
    x_t, mask, t = _corrupt(model, tokens, t.view(B, 1), T, mask, maskable, schedule, generator)
    return _loss(model, tokens, x_t, mask, t, T, maskable, schedule, max_weight, attention_mask=attention_mask)


def block_loss(model, tokens, block_length, t=None, mask=None, maskable=None, schedule="linear", max_weight=None, generator=None):
    """The bound of block diffusion for tokens int64 [B, T] (BD3-LM eq. 8), nats per token; otherwise as `mdlm_loss`.

    Each block of `block_length` tokens is predicted from itself, noisy, and the blocks before it, clean; one pass over
    [x_t, x_0] does all blocks at once (BD3-LM, section 3.2). t float [B, T / block_length], a time for each block, or [B].
    """
    B, T = tokens.shape
    if block_length < 1 or T % block_length:
        raise ValueError(f"block_length {block_length} does not divide the {T} tokens of a sequence")
    blocks = T // block_length
    t = sample_t((B, blocks), generator) if t is None else t
    t = t[:, None].expand(B, blocks) if t.dim() == 1 else t
    if t.shape != (B, blocks):
        raise ValueError(f"t must have shape [{B}, {blocks}], one time a block, got {list(t.shape)}")
    x_t, mask, t = _corrupt(model, tokens, t, block_length, mask, maskable, schedule, generator)
    visible = block_attention(T, block_length, tokens.device)
    positions = torch.arange(T, device=tokens.device).repeat(2)                                     # [2T]
    return _loss(model, tokens, torch.cat((x_t, tokens), dim=1), mask, t, block_length, maskable, schedule, max_weight,
                 attention_mask=visible, positions=positions)


def sft_loss(model, tokens, maskable=None, t=None, mask=None, attention_mask=None, cart=0.0, generator=None):
    """LLaDA's loss of supervised fine-tuning (2502.09992, eq. 5 and algorithm 2): a mean over responses, however long each of them is.

        loss = 1/B sum_b 1/L_b sum over masked i of 1/t_b * -log p(x_0^i | x_t)

    for tokens int64 [B, T]; L_b is the number of tokens of row b where `maskable` [B, T] is true (None: all), end-of-text padding included. As times
    are uniform in (1e-3, 1], t is what LLaDA's code calls p_mask = (1 - eps) t + eps with eps 1e-3. `.nelbo` is the bound per token.
    cart > 0 takes Dream's weights (`cart_weights`) for 1/t_b and, as its code at one sequence a GPU, the number of masked tokens for L_b.
    """
    B, T = tokens.shape
    t = sample_t((B,), generator) if t is None else t
    if t.shape != (B,):
        raise ValueError(f"t must have shape [{B}], one time a sequence, got {list(t.shape)}")
    x_t, mask, t = _corrupt(model, tokens, t.view(B, 1), T, mask, maskable, "linear", generator)
    maskable = torch.ones_like(mask) if maskable is None else maskable.to(tokens.device)
    weights, counted = (cart_weights(mask, cart), mask) if cart else ((1 / t).expand(B, T), maskable)
    weights = weights / (B * counted.sum(1, keepdim=True).clamp(min=1))                             # [B, T]
    return _loss(model, tokens, x_t, mask, t, T, maskable, "linear", None, weights=weights, attention_mask=attention_mask)


def cart_weights(mask, p):
    """Dream's context-adaptive weights of the masked tokens (CART; 2508.15487, section 3.2), 0 elsewhere: float32 [B, T] for mask [B, T].

        w_i = 1/2 sum over clean j of p (1 - p)^(|i - j| - 1)

    A token counts the more the more of its neighbours are there to tell it; a large p looks at the nearest only. 0 < p <= 1.
    """
    if not 0 < p <= 1:
        raise ValueError(f"cart must be above 0 and at most 1, got {p}")
    index = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32)
    distance = (index[:, None] - index).abs()                                                       # [T, T]
    near = torch.where(distance > 0, p / 2 * (1 - p) ** (distance - 1), 0.0)
    return (~mask).float() @ near * mask


def ar_loss(model, tokens):
    """-log p(x_i | x_<i) of an autoregressive model, nats per token: the baseline. The first token is given, not predicted."""
    (B, T), device = tokens.shape, tokens.device
    predicted = torch.ones(B, T, dtype=torch.bool, device=device)
    predicted[:, 0] = False
    t = torch.ones(B, 1, device=device)                             # where the weight 1/t is 1
    return _loss(model, tokens, tokens, predicted, t, T, predicted, "linear", None, shift=True)


@functools.lru_cache(maxsize=8)
def block_attention(T, block_length, device, dense=False):
    """Who sees whom in a pass over [x_t, x_0], both of T tokens: bool [1, 2T, 2T] if `dense`, else a BlockMask on a GPU and pieces elsewhere.

    A noisy token sees its own noisy block and the clean blocks before it; a clean token sees the clean blocks up to its own.
    flex_attention computes the visible tiles only, but has no backward pass on a CPU. There about 128 tokens at a time attend to what
    stands before them, and half of the scores are never made: attention costs what it does in a bidirectional pass over T tokens.
    """
    def visible(batch, head, query, key):
        query_block, key_block = query % T // block_length, key % T // block_length
        own_noisy_block = (query < T) & (key < T) & (query_block == key_block)
        clean_before = (query < T) & (key >= T) & (query_block > key_block)
        clean_up_to_own = (query >= T) & (key >= T) & (query_block >= key_block)
        return own_noisy_block | clean_before | clean_up_to_own

    if device.type == "cuda" and not dense:
        return create_block_mask(visible, None, None, 2 * T, 2 * T, device=device)
    show = lambda queries, keys: visible(None, None, queries[:, None], keys[None, :])  # noqa: E731
    index = torch.arange(2 * T, device=device)
    if dense:
        return show(index, index)[None]                                                             # [1, 2T, 2T]
    pieces, size = [], block_length * max(1, 128 // block_length)
    for half in (0, T):
        for start in range(0, T, size):
            end = min(start + size, T)
            keys = ([slice(start, end)] if half == 0 else []) + [slice(T, T + end)]
            pieces.append((slice(half + start, half + end), keys, show(index[half + start:half + end], torch.cat([index[s] for s in keys]))))
    return pieces


def _corrupt(model, tokens, t, block_length, mask, maskable, schedule, generator):
    """(x_t, mask, t) on the device of tokens [B, T], for times t [B, T / block_length]."""
    mask_id = mask_token_id(model)
    if maskable is not None and maskable.shape != tokens.shape:
        raise ValueError(f"maskable must have the shape of tokens, {list(tokens.shape)}, got {list(maskable.shape)}")
    if mask is None:
        mask_prob = 1 - SCHEDULES[schedule](t.cpu())[0]                                             # [B, blocks]
        mask = mask_tokens(tokens.shape, mask_prob.repeat_interleave(block_length, dim=1), generator)
    elif mask.shape != tokens.shape:
        raise ValueError(f"mask must have the shape of tokens, {list(tokens.shape)}, got {list(mask.shape)}")
    mask, t = mask.to(tokens.device), t.to(tokens.device)
    mask = mask if maskable is None else mask & maskable.to(tokens.device)
    return torch.where(mask, mask_id, tokens), mask, t


def _loss(model, targets, inputs, mask, t, block_length, maskable, schedule, max_weight, shift=None, weights=None, **attention):
    (B, T), shift = targets.shape, _config(model).shift if shift is None else shift
    count = B * T if maskable is None else max(int(maskable.sum()), 1)
    true_weight = weight(t, schedule).repeat_interleave(block_length, dim=1)                        # [B, T]
    used, divisor = true_weight if max_weight is None else true_weight.clamp(max=max_weight), count
    if weights is not None:                                         # of the loss, [B, T], divided already
        used, divisor = weights, 1
    masked = mask.flatten().nonzero()[:, 0]                                                         # [N] indices into B * T
    rows = prediction_rows(masked, T, inputs.shape[1], shift, block_length)
    total, nll = token_nll(model, inputs, rows, targets.flatten()[masked], used.flatten()[masked], **attention)
    nll = nll * true_weight.flatten()[masked]                       # [N]
    weighted = nll.new_zeros(B * T)
    weighted[masked] = nll
    return Loss(total / divisor, weighted.view(B, T), weighted.sum() / count, count, mask, t)


def prediction_rows(masked, T, width, shift, block_length):
    """The rows of a pass, int64 [N] into B * width, that predict the tokens at `masked`, int64 [N] into B * T.

    Without `shift` a token is predicted where it stands; with it, one position earlier (token 0: at its own). The row before
    a block's first token is taken from the clean half, where there is one: it has seen all that stands before the block.
    """
    batch, position = masked // T, masked % T
    row = (position - 1).clamp(min=0) if shift else position
    if shift and width == 2 * T:
        row = torch.where((position % block_length == 0) & (position > 0), row + T, row)
    return batch * width + row


def token_nll(model, tokens, rows, targets, weights, **arguments):
    """(sum of weights * nll, nll [N]): cross-entropy in nats of `targets` [N] at the flat rows [N] of a pass over `tokens`."""
    if isinstance(_unwrap(model), Transformer):                     # never holds the logits
        # Up to 63 rows of weight 0 make the number of rows a round one: every new size of a matrix product costs time (its kernel
        # is made or chosen anew) and, on a CPU, a gigabyte of kernels in the end.
        fill = (0, -len(rows) % 64)
        total, nll = model(tokens, select=F.pad(rows, fill), targets=F.pad(targets, fill), weights=F.pad(weights, fill), **arguments)
        return total, nll[:len(rows)]
    logits = row_logits(model, tokens, rows, **arguments)                                           # [N, V]
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (nll * weights).sum(), nll.detach()


def row_logits(model, tokens, rows, **arguments):
    """Logits [N, V] at the flat rows [N] of a pass over `tokens`: float32, or the model's float64."""
    if isinstance(_unwrap(model), Transformer):
        logits = model(tokens, select=rows, **arguments)
        return logits.to(at_least_float32(logits.dtype))
    select = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device)
    select[rows] = True
    logits = model(tokens, select=select.view(tokens.shape), **arguments)                           # [N or fewer, V]
    return logits[(select.cumsum(0) - 1)[rows]].to(at_least_float32(logits.dtype))


def _unwrap(model):
    return getattr(model, "module", model)                          # DistributedDataParallel keeps the model there


def _config(model):
    return _unwrap(model).config


def mask_token_id(model):
    """The id of the mask token. Raises ValueError for a model that has none."""
    config = _config(model)
    if config.mask_token_id is None:
        raise ValueError("this model has no mask token: convert it first (convert_bert.py, convert_ar.py)")
    return config.mask_token_id


# ------------------------------------------------------------------------------------------------------------------------------
# Likelihood


@torch.no_grad()
def nelbo(model, tokens, num_samples=1, seed=0, batch_size=32, maskable=None, attention_mask=None, map=map):
    """(bound in nats per token, its standard error) for tokens int64 [N, T]; exact for an autoregressive model.

    Masks exactly k of T tokens, k uniform on 1..T, and weighs by T / k: the same bound with less variance than times and
    coin flips, for integrating over t leaves each set of k tokens the weight (k-1)! (T-k)! / T! (LLaDA, eq. 6 and appendix A.2).
    k is spread evenly over the rows. The standard error is over the rows: of this estimate, for
    text like this.

    maskable        bool [N, T], what is scored given the rest: the responses of conversations. Then nats and tokens are summed over
                    all rows before they are divided, and the error is that of this ratio. Raises ValueError if there is none.
    attention_mask  bool [N, T], false for padding behind a row's end, which nobody sees.
    map             what runs the passes: the builtin, or one that divides them among processes.
    """
    N, config, passes = len(tokens), _config(model), []
    maskable = torch.ones(tokens.shape, dtype=torch.bool) if maskable is None else maskable.cpu()
    if attention_mask is not None:
        maskable = maskable & attention_mask.bool().cpu()           # padding is no text to score
    generator = stream("hidden tokens of nelbo", seed)
    draws = 1 if config.causal else num_samples
    nats, width = torch.zeros(N, draws, dtype=torch.float64), tokens.shape[1]
    longest = width if attention_mask is None else int(attention_mask.sum(1).max())
    for sample in range(draws):
        # Of all rows at once: what is hidden does not depend on how they are cut into batches.
        mask, weights, counts = _hide(config, maskable[:, :longest], generator)
        for start in range(0, N, batch_size):
            rows, shown = slice(start, start + batch_size), None
            if attention_mask is not None:                          # no wider than the longest row of this batch
                width = int(attention_mask[rows].sum(1).max())
                shown = attention_mask[rows, :width]
            passes.append((sample, rows, width, shown, mask[rows, :width], weights[rows, :width]))

    def run(work):                                                  # -> estimates of -log p in nats, [B]
        _, rows, width, shown, mask, weights = work
        return (masked_nll(model, tokens[rows, :width], mask, shown) * weights.to(tokens.device)).sum(1).double().cpu()

    for (sample, rows, *_), estimate in zip(passes, map(run, passes)):
        nats[rows, sample] = estimate
    if not counts.sum():
        raise ValueError("there is no token to score")
    value = nats.sum() / (counts.sum() * draws)
    if N == 1:                                                      # the spread of the draws
        return value.item(), (nats[0] / counts[0]).std().item() / math.sqrt(draws) if draws > 1 else float("nan")
    # A ratio of sums r = sum n_i / sum c_i has the standard error sqrt(N / (N - 1) * sum (n_i - r c_i)^2) / sum c_i.
    residual = nats.mean(1) - value * counts
    return value.item(), (residual.square().sum() * N / (N - 1)).sqrt().item() / counts.sum().item()


@torch.no_grad()
def log_likelihood(model, prefixes, targets, num_samples=128, seed=0, estimator="dealt", cfg_scale=0.0, streams=None, batch_size=4096, map=map):
    """(log p(target | prefix) in nats float64 [N], standard errors [N]); prefixes and targets are lists of lists of tokens.

    Exact, with error 0, for autoregressive models and targets of one token. Else LLaDA's lower bound (eq. 6): the average over
    all sets S of k target tokens, then over k = 1..L, of L / k * sum over i in S of log p(x_i | all but S). It is exact where
    num_samples passes can go through all 2^L - 1 sets, else an estimate. A block-diffusion model is asked block by block.

    estimator   which sets: "llada", "stratified", "dealt", see evaluation/designs.py.
    cfg_scale   > 0: logits of the prefix masked, plus (1 + cfg_scale) times the difference made by the prefix (LLaDA, eq. 16).
    streams     an int for each request; requests of one stream and length draw the same sets. None: by their tokens.
    batch_size  tokens of a pass. Texts of like length share it, each with several of its sets.
    map         what runs the passes: the builtin, or one that divides them among processes.
    The errors are nan where there is one sample only. Raises ValueError for arguments that cannot be, naming them.
    """
    from evaluation.designs import ESTIMATORS, choose_sets  # a topic by itself
    config, device = _config(model), next(model.parameters()).device
    prefixes, targets = [list(p) for p in prefixes], [list(t) for t in targets]
    lengths = [len(p) + len(t) for p, t in zip(prefixes, targets, strict=True)]
    for wrong, message in (
        (num_samples < 1, f"num_samples must be at least 1, got {num_samples}"),
        (estimator not in ESTIMATORS, f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}"),
        (cfg_scale < 0, f"cfg_scale must not be negative, got {cfg_scale}"),
        (cfg_scale > 0 and (config.causal or config.block_length), "cfg_scale is for bidirectional models only"),
        (max(lengths, default=0) > config.max_len, f"{max(lengths, default=0)} tokens, prefix and target, exceed the context of {config.max_len}"),
    ):
        if wrong:
            raise ValueError(message)

    designs, rows = [], []                                          # of each text: the sets of each block; masks of its rows, bool [M, L]
    for i, (prefix, target) in enumerate(zip(prefixes, targets)):
        number = zlib.crc32(repr((prefix, target)).encode()) if streams is None else streams[i]
        generator = stream("hidden tokens of log_likelihood", seed, number)
        designs.append([choose_sets(L, num_samples, estimator, generator, config.causal, bool(prefix))
                        for L in _block_sizes(config, len(prefix), len(target))])
        height = max((len(design.masks) for design in designs[i]), default=0)
        rows.append(torch.cat([F.pad(d.masks, (0, 0, 0, height - len(d.masks))) for d in designs[i]], dim=1) if height else [])

    def run(batch):                                                 # [(text, row), ...] -> the nll of their targets, [B] of float32 [L]
        width = max(lengths[i] for i, _ in batch)
        tokens, given, mask = torch.zeros(len(batch), width, dtype=torch.int64), *torch.zeros(2, len(batch), width, dtype=torch.bool)
        for b, (i, row) in enumerate(batch):
            tokens[b, :lengths[i]] = torch.tensor(prefixes[i] + targets[i])
            given[b, :len(prefixes[i])], mask[b, len(prefixes[i]):lengths[i]] = True, rows[i][row]
        shown = torch.arange(width) < torch.tensor([lengths[i] for i, _ in batch])[:, None]
        nll = masked_nll(model, tokens.to(device), mask, None if shown.all() else shown.to(device), given, cfg_scale).cpu()
        return [nll[b, len(prefixes[i]):lengths[i]].clone() for b, (i, _) in enumerate(batch)]

    passes, work = [], sorted(((i, row) for i in range(len(rows)) for row in range(len(rows[i]))), key=lambda item: -lengths[item[0]])
    for i, row in work:                                             # the first text of a pass is its longest
        if not passes or (len(passes[-1]) + 1) * lengths[passes[-1][0][0]] > batch_size:
            passes.append([])
        passes[-1].append((i, row))
    nll = {item: found for batch, results in zip(passes, map(run, passes)) for item, found in zip(batch, results)}
    values, errors = torch.zeros(2, len(targets), dtype=torch.float64)
    for i, parts in enumerate(designs):
        start, table = 0, torch.stack([nll[i, row] for row in range(len(rows[i]))]).double() if parts else None             # [M, L]
        for design in parts:                                        # blocks draw independently: their variances add up
            M, L = design.masks.shape
            value, error = design.estimate(table[:M, start:start + L])
            values[i], errors[i], start = values[i] - value, torch.hypot(errors[i], error), start + L
    return values, errors


def _block_sizes(config, start, L):
    """How many of the L tokens from position `start` on lie in each block."""
    if not config.block_length or config.causal:
        return [L] if L else []
    cuts = [start, *range((start // config.block_length + 1) * config.block_length, start + L, config.block_length), start + L]
    return [b - a for a, b in zip(cuts, cuts[1:])] if L else []


def _hide(config, maskable, generator):
    """(mask bool [B, T], weights [B, T], tokens counted [B]): exactly k of the maskable tokens of a row or a block, k uniform, weight L / k."""
    B, T = maskable.shape
    if config.causal:
        mask = maskable & (torch.arange(T) > 0)                                                     # nothing predicts the first token
        return mask, torch.ones(B, T), mask.sum(1)
    block = config.block_length or T
    groups = F.pad(maskable, (0, -T % block)).view(B, -1, block)                                    # [B, blocks, block]; the last may be short
    size = groups.sum(-1)
    grid = (torch.rand((), generator=generator) + torch.arange(size.numel()) / size.numel()) % 1
    k = (grid[torch.randperm(size.numel(), generator=generator)].view(size.shape) * size).long().clamp(max=size - 1) + 1
    order = torch.where(groups, torch.rand(groups.shape, generator=generator), 2.0).argsort(-1).argsort(-1)
    mask = (order < k[..., None]) & groups                                                          # exactly k of each block
    scale = (size / k).nan_to_num()[..., None].expand(groups.shape)
    return mask.reshape(B, -1)[:, :T], scale.reshape(B, -1)[:, :T], maskable.sum(1)


def masked_nll(model, tokens, mask, attention_mask=None, given=None, cfg_scale=0.0):
    """-log p in nats [B, T] of the tokens [B, T] at `mask`, hidden from the model; 0 elsewhere.

    It is float32, or float64 if the model is.

    A block-diffusion model sees the blocks before a token's own without masks: one pass over [noisy, clean], as in training. An
    autoregressive model sees the tokens before. `given` [B, T] with cfg_scale: the prefix, for classifier-free guidance.
    """
    config, (B, T), device = _config(model), tokens.shape, tokens.device
    block, mask = config.block_length or T, mask.to(device)
    inputs = tokens if config.causal else torch.where(mask, mask_token_id(model), tokens)
    arguments = {} if attention_mask is None else {"attention_mask": attention_mask}
    if config.block_length and not config.causal:                   # what fills the last block is hidden
        inputs, tokens, mask = (F.pad(x, (0, -T % block)) for x in (inputs, tokens, mask))
        shown = torch.ones(B, T, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
        shown = F.pad(shown, (0, -T % block)).repeat(1, 2)[:, None, :]                              # [B, 1, 2T]
        visible = block_attention(tokens.shape[1], block, device, dense=True) & shown
        visible = visible | torch.eye(visible.shape[-1], dtype=torch.bool, device=device)
        inputs = torch.cat((inputs, tokens), dim=1)
        arguments = {"attention_mask": visible, "positions": torch.arange(tokens.shape[1], device=device).repeat(2)}
    masked = mask.flatten().nonzero()[:, 0]
    rows, targets = prediction_rows(masked, tokens.shape[1], inputs.shape[1], config.shift or config.causal, block), tokens.flatten()[masked]
    if cfg_scale:
        conditional = row_logits(model, inputs, rows, **arguments)                                  # [N, V]
        unconditional = row_logits(model, torch.where(given.to(device), mask_token_id(model), inputs), rows, **arguments)
        found = F.cross_entropy(unconditional + (cfg_scale + 1) * (conditional - unconditional), targets, reduction="none")
    else:
        _, found = token_nll(model, inputs, rows, targets, torch.ones(len(masked), device=device), **arguments)
    nll = found.new_zeros(tokens.numel())
    nll[masked] = found
    return nll.view(tokens.shape)[:, :T]


# ------------------------------------------------------------------------------------------------------------------------------
# Denoise. One loop serves all samplers; they differ in how they score a prediction, how many they keep, and what they recompute.


def sample_tokens(logits, temperature, uniform):
    """Token ids [N] from softmax(logits / temperature), logits float32 [N, V]; the most probable ones at temperature 0.

    Inverts the distribution function at `uniform`, one number in [0, 1) a row: exact, where Gumbel noise takes a random number
    and two logarithms a vocabulary entry, in float64 because in less it samples another distribution (arXiv 2409.02908).
    First the piece of 512 entries is found, then the entry in it. Pieces are summed in float32, which copies nothing, and added up in float64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    N, V = logits.shape
    p = (logits / temperature).softmax(dim=-1)
    p = (F.pad(p, (0, -V % 512)) if V % 512 else p).view(N, -1, 512)                                # [N, pieces, 512]
    cumulative = p.sum(-1).double().cumsum(-1)                                                      # [N, pieces]
    target = uniform.to(logits.device, torch.float64)[:, None] * cumulative[:, -1:]
    piece = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)   # [N, 1]
    before = torch.where(piece > 0, cumulative.gather(1, (piece - 1).clamp(min=0)), 0.0)
    inside = p[torch.arange(N, device=p.device), piece[:, 0]].double()                              # [N, 512]
    entry = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    last = torch.where(inside > 0, torch.arange(512, device=p.device), 0).amax(-1, keepdim=True)    # rounding must not pass the end
    return (piece * 512 + torch.minimum(entry, last))[:, 0]


def low_confidence(logits, chosen):
    """Probability of the chosen tokens [N] under softmax(logits) [N, V], float64: Dream's "maskgit_plus" as well.

    Near 1, where float32 makes everything equal, it is computed from the sum of all the others.
    """
    p = logits.softmax(dim=-1)
    value = p.gather(1, chosen[:, None])
    others = p.scatter_(1, chosen[:, None], 0.0).sum(-1).double()
    return torch.where(value[:, 0] > 0.5, 1 - others, value[:, 0].double())


def entropy(logits, chosen):
    """sum p log p [N], the negative entropy of each prediction (Dream, 2508.15487)."""
    p = logits.softmax(dim=-1)
    return (p * (p + 1e-10).log()).sum(-1)


def margin(logits, chosen):
    """Probability of the best token minus that of the second best [N] (Kim et al. 2025, 2502.06768)."""
    best = logits.softmax(dim=-1).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


# What a rule scores high is kept; the rest is masked again. None: chosen blindly, before the model is asked. "random" keeps as
# many as the schedule says, "ancestral" each with probability (t - s) / t, which samples the reverse process (MDLM, eq. 7; Dream's "origin").
REMASKING = {"low_confidence": low_confidence, "entropy": entropy, "margin": margin, "random": None, "ancestral": None}


def filter_logits(logits, top_p=None, top_k=None):
    """logits [N, V] with -inf for all but the most probable tokens: as few as together exceed top_p, then the top_k of them (Dream).
    Whatever is as probable as the last of them stays as well."""
    if top_p is not None and top_p < 1:
        p, V = logits.softmax(dim=-1), logits.shape[1]
        for k in sorted({min(k, V) for k in (256, 4096, V)}):       # to sort a large vocabulary can take longer than the model
            best = p.topk(k, dim=-1).values                                                         # [N, k], the highest first
            outside = F.pad(best.cumsum(-1)[:, :-1] > top_p, (1, 0))
            if outside[:, -1].all():                                # every row is full
                break
        logits = logits.masked_fill(p < best.masked_fill(outside, 1).amin(-1, keepdim=True), -torch.inf)
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    return logits


def even(start, left, step, steps):
    """How many of a block's `start` masked tokens, `left` of them now, this step reveals: equal shares, the remainder first (LLaDA)."""
    return start // steps + (step < start % steps)


def timesteps(start, left, step, steps):
    """Time falls evenly from 1 to 1e-3; a step from t to s reveals the integer part of left * (1 - s / t) (Dream)."""
    t = _times(steps)
    return int(left * (1 - t[step + 1] / t[step]))


@functools.lru_cache(maxsize=8)
def _times(steps):
    return torch.linspace(1, 1e-3, steps + 1)                       # float32, as Dream has it: `timesteps` rounds down


STEP_SCHEDULES = {"even": even, "timesteps": timesteps}


# ReMDM's schedules (section 4.1): sigma, the chance that a written token is masked again, of eta and the largest possible sigma. With "conf"
# the tokens of a block share one such sigma, by softmax(-confidence): who was written unsurely goes first.
REMASK_SCHEDULES = {"cap": min, "rescale": lambda eta, most: eta * most, "conf": lambda eta, most: eta * most}


@functools.lru_cache(maxsize=2**12)
def reverse_step(step, steps, eta=0.0, schedule="cap"):
    """(chance that a mask is written, chance sigma that a written token is masked again) in the step from time t to s, floats.

        write = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t),   0 <= sigma <= min(1, (1 - alpha_s) / alpha_t),   alpha_t = 1 - t

    Whatever sigma, a share alpha_s is written at s (ReMDM, Wang et al. 2025, 2503.00307, section 3); but "conf" leaves `write` as it is
    without. sigma = 0 is the reverse process of masked diffusion, write = (t - s) / t (MDLM, eq. 7). The last step writes all.
    """
    if step >= steps - 1:
        return 1.0, 0.0
    t, s = _times(steps)[step:step + 2].tolist()
    sigma = REMASK_SCHEDULES[schedule](eta, 1.0 if s >= 1 - t else s / (1 - t))
    return (t - s + (sigma * (1 - t) if schedule != "conf" else 0.0)) / t, sigma


def keep_best(score, eligible, count):
    """bool [B, T]: the `count` [B] eligible positions with the highest score [B, T]."""
    return eligible & (_rank(score, eligible) < count[:, None])


def perturb(score, alg_temp, uniform):
    """score / alg_temp plus Gumbel noise: the n best of it are n draws without replacement from softmax(score / alg_temp), as Dream's
    alg_temp wants them (Kool et al. 2019, 1903.06059). uniform: numbers in [0, 1), of the shape of score."""
    return score / alg_temp - (-uniform.clamp(min=1e-300).log()).log()


def keep_confident(score, eligible, threshold):
    """The best eligible position, and all whose score is at least `threshold` (Fast-dLLM, 2505.22618, algorithm 1)."""
    return eligible & ((_rank(score, eligible) == 0) | (score >= threshold))


def keep_factor(score, eligible, factor):
    """The n best, as long as the n-th has score >= 1 - factor / (n + 1) (Fast-dLLM, section 3.3; its code counts from n = 1 with
    the first always kept, and takes the last one along when it alone fails; so does this)."""
    rank, total = _rank(score, eligible), eligible.sum(1)                                           # [B, T], [B]
    enough = (score >= 1 - factor / (rank + 2)) | (rank == 0)
    fails = torch.where(eligible & ~enough, rank, total[:, None]).amin(1)                           # [B] first rank that fails
    fails = torch.where(fails >= total - 1, total, fails)
    return eligible & (rank < fails[:, None])


def keep_entropy_bound(score, entropies, eligible, gamma):
    """The most of the best, U, for which sum of H over U - max of H over U <= gamma, H [B, T] their entropies in nats: a bound on the
    information that they have about each other, which predicting them at once neglects (EB-Sampler, Ben-Hamu et al. 2025, 2505.24857)."""
    rank = _rank(score, eligible)
    ranked = torch.zeros_like(entropies).scatter(1, rank, entropies.masked_fill(~eligible, 0))      # [B, T], best first
    bound = ranked.cumsum(1) - ranked.cummax(1).values                                              # grows with every position
    return eligible & (bound <= gamma).gather(1, rank)


def _rank(score, eligible):
    """int64 [B, T]: 0 for the highest eligible score of a row, 1 for the next...; equal scores from left to right."""
    return score.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)


@dataclass
class Step:
    """What `on_step` gets after each denoising step. Rows of a batch may stand at different steps."""
    number: int                 # forward passes so far
    tokens: torch.Tensor        # int64 [B, T], mask tokens where still open
    revealed: torch.Tensor      # bool [B, T]: written by this step
    confidence: torch.Tensor    # float64 [B, T]: the score (for blind rules the probability) of what was revealed, 0 elsewhere
    lengths: torch.Tensor       # int64 [B]: the rest of a row is padding


@dataclass(kw_only=True)
class Sampling:
    """How to sample: the keyword arguments of `generate` and `infill`. `check` raises ValueError for what cannot be, naming it."""
    steps: int                      # denoising steps, over all blocks together
    block_length: int               # tokens denoised together
    temperature: float = 0.0        # 0: the most probable token; else an exact sample of softmax(logits / temperature)
    remasking: str = "low_confidence"   # which predictions a step keeps: a key of REMASKING
    threshold: float = None         # keep all with at least this score instead of a fixed number; then `steps` counts no more
    factor: float = None            # Fast-dLLM's rule instead: keep_factor
    cache: str = None               # "prefix", "dual" (Fast-dLLM: approximate, other keys are as old as the block), "block" (exact)
    cfg_scale: float = 0.0          # logits of the prompt masked plus (1 + cfg_scale) times the difference made by it (LLaDA, eq. 16)
    schedule: str = None            # tokens a step, a key of STEP_SCHEDULES; None: the family's own
    seed: int = None                # row r draws from the stream (seed, r); a list: from (seed[r], 0), what it draws alone; None: anew
    on_step: callable = None        # called with a `Step` after each denoising step
    top_p: float = None             # sample from the most probable tokens only, see filter_logits; confidence is then that of the
    top_k: int = None               # filtered softmax(logits / temperature), for Dream always, else of softmax(logits)
    alg_temp: float = None          # draw the positions to keep from softmax(score / alg_temp), see perturb (Dream)
    entropy_bound: float = None     # keep as many as this bound in nats allows instead of a fixed number: keep_entropy_bound
    remask: float = 0.0             # eta > 0, with "ancestral": tokens written in the block may be masked again, see reverse_step (ReMDM)
    remask_schedule: str = "cap"    # or "rescale", "conf": a key of REMASK_SCHEDULES
    suppress: list = ()             # tokens that are never written (LLaDA, appendix B.4: logits_eos_inf)
    defer: list = ()                # tokens that are written last: no confidence in them (LLaDA, B.4: confidence_eos_eot_inf)

    def __post_init__(self):
        if 0 < self.temperature < 1e-6:                             # the same in all that float32 can tell, and does not overflow there
            self.temperature = 0.0

    @property
    def adaptive(self):
        """The rules in use by which the predictions decide how many of them a step keeps."""
        return [name for name in ("threshold", "factor", "entropy_bound") if getattr(self, name) is not None]

    def check(self, config, sequences):
        for tokens, size in [(tokens, config.vocab_size + bool(config.causal)) for tokens in sequences] + [
                (tokens, config.vocab_size) for tokens in (self.suppress, self.defer)]:
            for token in tokens:
                if not 0 <= token < size:
                    raise ValueError(f"token {token} is outside the vocabulary of {config.vocab_size}")
        for low, high, names in ((0, math.inf, "temperature cfg_scale entropy_bound alg_temp"), (0, 1, "threshold top_p remask"),
                                 (1, math.inf, "top_k"), (1, 10**6, "steps")):
            for name in names.split():
                value, limits = getattr(self, name), f"be between {low} and {high}" if high < math.inf else f"be at least {low}" if low else "not be negative"
                if value is not None and not (low <= value <= high and value < math.inf):
                    raise ValueError(f"{name} must {limits}, got {value}")
        for name, choices in (("remasking", REMASKING), ("cache", (None, "prefix", "dual", "block")), ("schedule", (None, *STEP_SCHEDULES)),
                              ("remask_schedule", REMASK_SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        exact, blind = config.causal or config.block_length or self.cache == "block", REMASKING[self.remasking] is None
        longest, rules = max(map(len, sequences), default=0), self.adaptive + ["alg_temp"] * bool(self.alg_temp)
        for wrong, message in (
            (longest > config.max_len, f"{longest} tokens, prompt and completion, exceed the model's context of {config.max_len}"),
            (self.factor is not None and not self.factor > 0, f"factor must be positive, got {self.factor}"),
            (self.remask and (self.remasking != "ancestral" or config.causal), "remask needs remasking ancestral, and no autoregressive model"),
            (len(rules) > 1, f"{' and '.join(rules)} exclude each other"),
            ({"threshold", "factor"} & {*rules} and self.remasking != "low_confidence", "threshold and factor need low_confidence"),
            (blind and (rules or self.defer), f"{(rules or ['defer'])[0]} needs a rule that asks the model, not {self.remasking}"),
            (self.cache in ("prefix", "dual") and exact, f"cache {self.cache!r} is for bidirectional models; this one takes 'block'"),
            (self.cfg_scale > 0 and (self.cache or exact), "cfg_scale works without a cache and for bidirectional models only"),
            (isinstance(self.seed, list | tuple) and len(self.seed) != len(sequences),
             f"a list of seeds has one for each row, {len(sequences)}, got {self.seed}"),
        ):
            if wrong:
                raise ValueError(message)

    def distribution(self, logits, family):
        """(logits [N, V], temperature): what tokens are drawn from and confidence is read from."""
        if self.suppress:
            logits[:, list(self.suppress)] = -torch.inf
        if family == "Dream" or self.top_p is not None or self.top_k is not None:
            return filter_logits(logits / (self.temperature or 1), self.top_p, self.top_k), float(self.temperature > 0)
        return logits, self.temperature

    def score(self, logits, chosen):
        """float64 [N]: what the rule says of the chosen tokens; blind rules show their probability. Deferred tokens come last."""
        if self.defer:                                              # LLaDA reads the others' confidence without them, too
            logits = logits.index_fill(1, torch.tensor(self.defer, device=logits.device), -torch.inf)
        score = (REMASKING[self.remasking] or low_confidence)(logits, chosen).double()
        return score.masked_fill(torch.isin(chosen, torch.tensor(self.defer, device=chosen.device)), -1e9) if self.defer else score

    def keep(self, score, eligible, reveal, logits, draw):
        """bool [A, T]: the predictions that stay. reveal: int [A], for rules that do not decide that themselves; draw(): uniform [A, T]."""
        if self.threshold is not None:
            return keep_confident(score, eligible, self.threshold)
        if self.factor is not None:
            return keep_factor(score, eligible, self.factor)
        if self.entropy_bound is not None:
            entropies = torch.zeros_like(score)
            entropies[eligible] = -entropy(logits, None).double().cpu()
            return keep_entropy_bound(score, entropies, eligible, self.entropy_bound)
        return keep_best(perturb(score, self.alg_temp, draw()) if self.alg_temp else score, eligible, reveal)


def generate(model, prompts, max_new_tokens=128, steps=128, block_length=32, temperature=0.0, remasking="low_confidence", threshold=None,
             factor=None, cache=None, cfg_scale=0.0, schedule=None, seed=None, on_step=None, **more):
    """Continue each prompt by max_new_tokens: list of token lists -> list of token lists, prompt and completion.

    Blocks of block_length are denoised from left to right, in `steps` steps over all blocks together (LLaDA, section 2.4 and
    appendix B.4). Prompts may differ in length; each gets what it would get alone. An empty prompt generates unconditionally.
    What the arguments mean and which `more` there are: `Sampling`.

    A block-diffusion model uses its own block_length, blocks counted from the end of the prompt. It stops behind the block that
    holds an end of text, an autoregressive model, which decodes token by token with an exact cache, behind the end of text itself.
    Raises ValueError for arguments that cannot be, naming them.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    config = _config(model)
    if not config.causal and not config.block_length and not 1 <= block_length <= max_new_tokens:
        raise ValueError(f"block_length must be between 1 and max_new_tokens = {max_new_tokens}, got {block_length}")
    mask_id = config.vocab_size if config.causal else mask_token_id(model)      # an autoregressive model never reads its masks
    for i, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            if token == mask_id:
                raise ValueError(f"prompt {i} contains the mask token at position {position}: use infill to fill it")
    start = []                                                      # what an autoregressive model begins an empty text with
    if config.causal and not all(prompts):
        start = [config.bos_token_id if config.bos_token_id is not None else config.eos_token_id]
        if start == [None]:
            raise ValueError("an autoregressive model without a bos or eos token cannot start from an empty prompt")
    starts = [[] if prompt else start for prompt in prompts]
    how = Sampling(steps=steps, block_length=block_length, temperature=temperature, remasking=remasking, threshold=threshold, factor=factor,
                   cache=cache, cfg_scale=cfg_scale, schedule=schedule, seed=seed, on_step=on_step, **more)
    with packed(_unwrap(model)):
        answers = _denoise(model, [s + list(p) + [mask_id] * max_new_tokens for s, p in zip(starts, prompts)], mask_id,
                           [len(s) + len(p) for s, p in zip(starts, prompts)], how, config.ends)
    return [answer[len(s):] for s, answer in zip(starts, answers)]


def infill(model, sequences, steps=128, block_length=None, **more):
    """Fill every mask token of each sequence, wherever it stands; `more` arguments as in `generate`. block_length None: one block.

    Blocks are counted from a sequence's start. Raises ValueError for a sequence without a mask token.
    """
    if _config(model).causal:
        raise ValueError("an autoregressive model cannot fill in the middle: it sees nothing right of a gap")
    mask_id = mask_token_id(model)
    for i, sequence in enumerate(sequences):
        if mask_id not in list(sequence):
            raise ValueError(f"sequence {i} has no mask token: there is nothing to fill")
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    longest = max(map(len, sequences), default=1)
    how = Sampling(steps=steps, block_length=min(block_length or longest, longest), **more)
    with packed(_unwrap(model)):
        return _denoise(model, [list(s) for s in sequences], mask_id, [0] * len(sequences), how)


@torch.no_grad()
def _denoise(model, sequences, mask_id, first, how, ends=()):
    """The one loop: predict the masked tokens of each row's current block, keep some, until no mask is left.

    first: int [B], where a row's first block begins; ends: the tokens any of which ends a row when
    its order is left to right.
    """
    config, B = _config(model), len(sequences)
    how.check(config, sequences)
    if not B:
        return []
    lengths, first = torch.tensor([len(s) for s in sequences]), torch.tensor(first)
    T = int(lengths.max())
    position = torch.arange(T)
    canvas = torch.stack([F.pad(torch.tensor(s), (0, T - len(s))) for s in sequences])              # [B, T]
    shown = position < lengths[:, None]
    is_masked = (canvas == mask_id) & shown
    given = shown & ~is_masked
    cache = "block" if config.causal else how.cache
    left_to_right = cache == "block" or config.block_length > 0     # a block never sees the blocks right of it
    block_of = (position - first[:, None]) // (1 if config.causal else config.block_length or how.block_length)     # [B, T], negative left of `first`
    to_do = [list(zip(*(x.tolist() for x in block_of[b][is_masked[b]].unique(return_counts=True)))) for b in range(B)]
    if not (config.causal or how.adaptive) and how.steps < max(map(len, to_do)):
        raise ValueError(f"{how.steps} steps are too few for {max(map(len, to_do))} blocks: each needs at least one")
    schedule = STEP_SCHEDULES[how.schedule or ("timesteps" if config.family == "Dream" else "even")]
    states = [_Row(b, blocks, how, schedule) for b, blocks in enumerate(to_do)]
    streams = _streams(how.seed, B)
    look = _Passes(model, T, cache, how.cfg_scale, given, shown, lengths, block_of, left_to_right, mask_id)
    passes, sureness = 0, torch.zeros(B, T, dtype=torch.float64)    # the score with which each token was written
    while True:
        left = (is_masked & (block_of == torch.tensor([state.block for state in states])[:, None])).sum(1).tolist()
        work = [state for state in states if state.next(left[state.row])]
        if not work:                                                # finished rows cost nothing
            return [canvas[b, :lengths[b]].tolist() for b in range(B)]
        rows, current = torch.tensor([state.row for state in work]), torch.tensor([state.block for state in work])      # [A]
        reveal, final = torch.tensor([state.reveal for state in work]), torch.tensor([state.final for state in work])
        inside = (block_of[rows] == current[:, None]) & shown[rows]
        eligible, hidden, keep = inside & is_masked[rows], None, None                               # [A, T]
        if REMASKING[how.remasking] is None:                        # chosen blindly: look only at what will be revealed
            u = _draw(streams, rows, inside & ~given[rows] if how.remask else eligible)
            write, sigma = torch.tensor([state.chances for state in work], dtype=torch.float64).T[..., None]            # [A, 1]
            keep = keep_best(u, eligible, reveal) if how.remasking == "random" else eligible & (u < write)
            before = inside & ~given[rows] & ~eligible              # written in earlier steps
            if how.remask_schedule == "conf":
                sigma = sigma * torch.where(before, -sureness[rows], -torch.inf).softmax(dim=1)
            hidden = before & (u < sigma)
            eligible = keep
        score, written = torch.zeros(eligible.shape, dtype=torch.float64), canvas[rows]
        if looks := bool(eligible.any()):
            logits = look(canvas, rows, eligible, current)                                          # [N, V]
            passes += 1
            # A prediction may be the mask token itself, and the position stays open. In a block's last step that is ruled out.
            if mask_id < logits.shape[1]:
                logits[:, mask_id].masked_fill_(final[eligible.nonzero()[:, 0]].to(logits.device), -torch.inf)
            logits, temperature = how.distribution(logits, config.family)
            chosen = sample_tokens(logits, temperature, _draw(streams, rows, eligible)[eligible] if temperature else None)
            written[eligible] = chosen.cpu()
            if keep is None or how.on_step is not None or how.remask_schedule == "conf":    # who watches a blind choice wants a colour
                score[eligible] = how.score(logits, chosen).cpu()
        if keep is None:
            keep = how.keep(score, eligible, reveal, logits, lambda: _draw(streams, rows, eligible))
        if how.remask_schedule == "conf":
            sureness[rows] = torch.where(keep, score, sureness[rows])
        written = torch.where(keep, written, canvas[rows])
        canvas[rows] = written if hidden is None else torch.where(hidden, mask_id, written)
        is_masked = (canvas == mask_id) & shown
        if left_to_right and ends:
            for state in work:
                state.stop_at(ends, canvas, is_masked, block_of, lengths, shown)
        if how.on_step is not None and looks:
            revealed, confidence = torch.zeros_like(is_masked), torch.zeros(B, T, dtype=torch.float64)
            revealed[rows], confidence[rows] = keep, torch.where(keep, score, 0)
            how.on_step(Step(passes, canvas.clone(), revealed, confidence, lengths.clone()))


class _Row:
    """Where one row of the batch stands: its block, and the step in it. Rows of a batch advance independently."""

    def __init__(self, row, blocks, how, schedule):
        self.row, self.blocks, self.how, self.schedule = row, blocks, how, schedule     # blocks: (index, masked tokens) of those to visit
        self.steps = -(-how.steps // max(len(blocks), 1))           # for each block
        self.block, self.start = blocks.pop(0) if blocks else (0, 0)
        self.step = self.reveal = self.final = 0
        self.chances = 1.0, 0.0

    def next(self, left):
        """Advance to the next step that changes anything; false when the row is done. Sets reveal, chances and final for it.

        left: the masked tokens of its block.
        """
        while True:
            block_done = self.step >= self.steps if self.how.remask else not left
            if block_done:
                if not self.blocks:
                    return False
                (self.block, left), self.step = self.blocks.pop(0), 0
                self.start = left
            last = self.start if self.how.adaptive else min(self.steps, self.start) if self.schedule is even else self.steps
            self.final, self.reveal = self.step >= last - 1, left
            if self.how.remasking == "ancestral":
                self.final, self.chances = self.step >= self.steps - 1, reverse_step(self.step, self.steps, self.how.remask, self.how.remask_schedule)
            elif not (self.final or self.how.adaptive):
                self.reveal = self.schedule(self.start, left, self.step, self.steps)
            self.step += 1
            if self.reveal or self.how.remask:
                return True

    def stop_at(self, ends, canvas, is_masked, block_of, lengths, shown):
        """If the block is finished and holds an end of text, it is the row's last."""
        inside = (block_of[self.row] == self.block) & shown[self.row]
        has_end = torch.isin(canvas[self.row][inside], torch.tensor(ends)).any()
        unfinished = (is_masked[self.row] & inside).any() or self.how.remask and not self.final
        if has_end and not unfinished:
            shown[self.row] &= block_of[self.row] <= self.block
            lengths[self.row], self.blocks = int(shown[self.row].sum()), []


def _streams(seed, B):
    """A generator for each row; `seed` as in `Sampling`."""
    seed = torch.Generator().seed() if seed is None else seed
    pairs = [(s, 0) for s in seed] if isinstance(seed, list | tuple) else [(seed, b) for b in range(B)]
    return [stream("sampling", s, b) for s, b in pairs]


def _draw(streams, rows, where):
    """Uniform numbers at `where` [A, T], every row's from its own stream, float64; 1 elsewhere."""
    u = torch.ones(where.shape, dtype=torch.float64)
    u[where] = torch.cat([torch.rand(n, generator=streams[b], dtype=torch.float64) for b, n in zip(rows.tolist(), where.sum(1).tolist())])
    return u


class _Passes:
    """The forward passes of one `_denoise`: which tokens to feed, whom they see, what of it to keep for the next pass."""

    def __init__(self, model, T, cache, cfg_scale, given, shown, lengths, block_of, left_to_right, mask_id):
        B, config = len(shown), _config(model)
        self.model, self.config, self.kind, self.cfg_scale, self.T = model, config, cache, cfg_scale, T
        self.given, self.shown, self.lengths, self.block_of, self.mask_id = given, shown, lengths, block_of, mask_id
        self.left_to_right = left_to_right
        weight = model.embed.weight if isinstance(model, Transformer) else next(model.parameters())
        self.device = weight.device
        self.cache = Cache(config, B, T, self.device, weight.dtype) if cache else None
        self.fresh = torch.full((B,), -1)       # prefix, dual: the block at whose start all keys of a row were made
        self.final = torch.zeros(B, dtype=torch.int64)          # block: so many of a row's keys are final

    def __call__(self, canvas, rows, eligible, current):
        """Logits float32 [N, V] that predict the tokens at `eligible` [A, T] of these rows [A], whose current blocks are [A]."""
        if self.cache is None:
            return self._without_cache(canvas, rows, eligible)
        at = torch.arange(self.T)
        inside = (self.block_of[rows] == current[:, None]) & self.shown[rows]
        begin, end = inside.int().argmax(1), torch.where(inside, at + 1, 0).amax(1)                 # [A] of the current block
        shift = int(self.config.shift or self.config.causal)
        if self.kind == "block":
            logits = self._refresh(canvas, rows, eligible, self.final[rows], begin if self.config.causal else end)
            fed = eligible.any(1)                                   # a blind rule may write nothing in a row's step, which then feeds nothing
            self.final[rows[fed]] = (begin if self.config.causal else (begin - shift).clamp(min=0))[fed]    # the row before predicts the first
            return logits
        begin = (begin - shift).clamp(min=0)
        full = self.fresh[rows] != current
        self.fresh[rows] = current
        if self.kind == "prefix":
            end = self.lengths[rows]
        if full.all() or not full.any():
            return self._refresh(canvas, rows, eligible, torch.where(full, 0, begin), torch.where(full, self.lengths[rows], end))
        logits = None                                               # rows that enter a block, and rows that are in one
        row_of = eligible.nonzero()[:, 0]
        for group, lo, hi in ((full, torch.zeros_like(begin), self.lengths[rows]), (~full, begin, end)):
            part = self._refresh(canvas, rows[group], eligible[group], lo[group], hi[group])
            logits = part.new_empty(len(row_of), part.shape[1]) if logits is None else logits
            logits[group[row_of].to(logits.device)] = part
        return logits

    def _without_cache(self, canvas, rows, eligible):
        width = int(self.lengths[rows].max())
        tokens, mask = canvas[rows, :width], None
        if self.left_to_right:
            block = self.block_of[rows, :width]
            # Of blocks alone, padding would be part of a row's last one where that is partial.
            mask = block[:, None, :] <= block[:, :, None]                                           # [A, T, T]
            mask = mask & self.shown[rows, None, :width]
        elif (self.lengths[rows] != width).any():
            mask = self.shown[rows, :width]
        if self.cfg_scale:                                          # a second batch in which what was given is masked
            tokens = torch.cat((tokens, torch.where(self.given[rows, :width], self.mask_id, tokens)))
            mask = None if mask is None else torch.cat((mask, mask))
            eligible = torch.cat((eligible, eligible))
        logits = self._model(tokens, eligible[:, :width].nonzero(), 0, attention_mask=None if mask is None else mask.to(self.device))
        if self.cfg_scale:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (self.cfg_scale + 1) * (conditional - unconditional)
        return logits

    def _refresh(self, canvas, rows, eligible, begin, end):
        """Feed positions begin..end [A] of each row, write their keys to the cache, attend to all of it that is to be seen."""
        positions = begin[:, None] + torch.arange(int((end - begin).max()))                         # [A, S]
        # A row with fewer of them repeats its last one, which writes the same keys again.
        positions = torch.minimum(positions, end[:, None] - 1)
        tokens = canvas[rows[:, None], positions]
        if self.kind == "block" and not self.config.causal:
            mask = self.block_of[rows][:, None, :] <= self.block_of[rows[:, None], positions][:, :, None]       # [A, S, T]
            mask = mask & self.shown[rows, None, :]
        else:
            mask = self.shown[rows]
        self.cache.rows = None if len(rows) == len(self.shown) else rows.to(self.device)
        where = eligible.nonzero()
        where[:, 1] -= begin[where[:, 0]]
        return self._model(tokens, where, begin, attention_mask=mask.to(self.device), cache=self.cache, positions=positions.to(self.device))

    def _model(self, tokens, where, begin, **arguments):
        """Logits [N, V] for the (row, position) pairs `where` [N, 2] of tokens [A, S]."""
        shift = int(self.config.shift or self.config.causal)
        column = (where[:, 1] - shift).clamp(min=0)
        flat = where[:, 0] * tokens.shape[1] + column
        tokens = tokens.clamp(max=self.config.vocab_size - 1).to(self.device)
        return row_logits(self.model, tokens, flat.to(self.device), **arguments)
