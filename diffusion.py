"""Masked diffusion over tokens: corrupt -> loss, bound on the likelihood, denoise -> text.

Every idea stands here in its plain form. Change it and see what happens. The fast forms (the loss
without logits, ragged batches, caches) stand in kernels.py and sampling/engine.py; tests hold them
equal to these. How a model is asked stands in passes.py. Pure functions of tensors: no files, no
tokenizers.

Time runs from t = 0, clean, to t = 1, all mask. The forward process masks each token independently:

    q(x_t | x_0):  x_t = x_0 with probability alpha_t,  [MASK] with mask_prob = 1 - alpha_t

and what trains a model p(x_0 | x_t) to undo it is a bound on the likelihood, a weighted
cross-entropy of the masked tokens:

    -log p(x_0) <= E_t [ weight(t) * sum over masked i of -log p(x_0^i | x_t) ]
    weight(t) = -alpha'_t / (1 - alpha_t)

(MDLM, Sahoo et al. 2024, arXiv 2406.07524, eq. 11; MD4, Shi et al. 2024, 2406.04329, eq. 4). For
alpha_t = 1 - t the weight is 1/t, LLaDA's loss (Nie et al. 2025, 2502.09992, eq. 3). Block
diffusion, BD3-LM (Arriola et al. 2025, 2503.09573, eq. 8), is the same bound for one block of
tokens after the other, each given the clean blocks before it.

Noise that makes other tokens of a token, not masks, stands in noises.py; its losses stand here.

Shapes: B batch, T positions, V vocabulary, N masked tokens. The model is anything that maps tokens
to logits as model.Transformer does and has its `config`. Randomness comes from generators on the
CPU, so that every device draws the same masks.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import stream, streams
from noises import hybrid_bound, hybrid_noise, pick, uniform_bound, uniform_noise
from passes import (
    all_logits,
    block_nll,
    canvas_mask_id,
    check_canvas,
    config_of,
    mask_token_id,
    masked_nll,
    noise_of,
    own_block_length,
    predict,
    ratio_error,
    weighted_nll,
)

# --------------------------------------------------------------------------------------------------
# Noise schedules: (alpha_t, alpha'_t). Whatever the schedule, the bound is the same number; how
# much its estimates vary is not.


def linear(t):
    """alpha_t = 1 - t."""
    return 1 - t, -torch.ones_like(t)


def cosine(t):
    """alpha_t = 1 - cos(pi/2 (1 - t)), which lingers at many masks (MaskGIT, 2202.04200)."""
    angle = math.pi / 2 * (1 - t)
    return 1 - torch.cos(angle), -math.pi / 2 * torch.sin(angle)


def polynomial(t, power=2.0):
    """alpha_t = 1 - t^power, which lingers at few masks (MD4, table 1)."""
    return 1 - t**power, -power * t ** (power - 1)


SCHEDULES = {"linear": linear, "cosine": cosine, "polynomial": polynomial}


def look_up(table, name, what):
    """table[name]. Raises ValueError for a name that is none, with those that are."""
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def weight(t, schedule="linear"):
    """-alpha'_t / (1 - alpha_t), the factor of the bound at time t; 1/t for the linear schedule."""
    alpha, d_alpha = look_up(SCHEDULES, schedule, "schedule")(t)
    return -d_alpha / (1 - alpha)


# --------------------------------------------------------------------------------------------------
# Corrupt


def evenly_spread(shape, generator=None):
    """Numbers in [0, 1), float32 of `shape`, each uniform, together evenly spread: one offset u
    shifts an even grid of n, (u + i / n) mod 1, which is then shuffled."""
    n = math.prod(shape)
    offset = torch.rand((), generator=generator)
    grid = (offset + torch.arange(n) / n) % 1
    return grid[torch.randperm(n, generator=generator)].view(shape)


def sample_t(shape, generator=None, eps=1e-3):
    """Times in (eps, 1], float32 of `shape`, evenly spread: every batch sees all noise levels, and
    its loss varies less than with independent times (MD4, section 4; MDLM, C.3)."""
    return 1 - (1 - eps) * evenly_spread(shape, generator)


def mask_tokens(shape, mask_prob, generator=None):
    """bool of `shape`: each position masked with its mask_prob (broadcast), independently."""
    return torch.rand(shape, generator=generator) < mask_prob


def corrupt(model, tokens, t, mask=None, maskable=None, schedule="linear", generator=None):
    """(x_t, mask) for tokens int64 [B, T] and times t [B, T] or [B, 1]: q(x_t | x_0), but only
    where `maskable`.

    mask  bool [B, T]; None: drawn with probability 1 - alpha_t.
    Raises ValueError where shapes do not fit or the model has no mask token.
    """
    check_like(tokens, mask=mask, maskable=maskable)
    if mask is None:
        alpha, _ = look_up(SCHEDULES, schedule, "schedule")(t.cpu())
        mask = mask_tokens(tokens.shape, 1 - alpha, generator)
    mask = mask.to(tokens.device)
    if maskable is not None:
        mask = mask & maskable.to(tokens.device)
    return torch.where(mask, mask_token_id(model), tokens), mask


def text_alone(maskable, attention_mask):
    """`maskable` without padding, which is no text: bool [B, T], or None where all may be masked.

    attention_mask  bool [B, T] says what is shown; of any other kind it says nothing of padding.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return maskable
    shown = attention_mask.bool()
    return shown if maskable is None else maskable.to(shown.device) & shown


def token_count(tokens, maskable):
    """How many tokens [B, T] a loss is divided by: those that may be masked, None for all."""
    return tokens.numel() if maskable is None else max(int(maskable.sum()), 1)


def check_like(tokens, **others):
    """ValueError for one of the others, None or a tensor, that has not the shape of tokens."""
    for name, value in others.items():
        if value is not None and value.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens, {list(tokens.shape)}, got "
                             f"{list(value.shape)}")


# --------------------------------------------------------------------------------------------------
# Losses


@dataclass
class Loss:
    loss: torch.Tensor          # scalar with gradient
    token_nll: torch.Tensor     # [B, T], detached: the bound in nats, weight(t) * -log p of masks;
    #                             0 where nothing is predicted
    count: int                  # tokens that the bound is divided by
    is_masked: torch.Tensor     # bool [B, T]: where noise is
    t: torch.Tensor             # [B, 1] or [B, blocks]

    @property
    def nelbo(self):
        """The estimate of the bound, nats per token; its weights are never clipped."""
        return self.token_nll.sum() / self.count


def mdlm_loss(model, tokens, t=None, mask=None, maskable=None, attention_mask=None,
              schedule="linear", max_weight=None, generator=None):
    """The bound of masked diffusion for tokens int64 [B, T] (MDLM eq. 11, LLaDA eq. 3).

        loss = 1 / count * sum over masked i of weight(t) * -log p(x_0^i | x_t)     nats per token

    count is the number of maskable tokens: all, or those where `maskable` [B, T] is true (the
    answers in chat data); never padding, which attention_mask [B, T] hides.
    t           float [B]; None: drawn by `sample_t`.
    mask        bool [B, T]; None: drawn with probability 1 - alpha_t.
    max_weight  clips the weight of `loss`, not of `nelbo`: less noise from times near 0. None or 0:
                it is not clipped.
    Raises ValueError where shapes or the mask token do not fit.
    """
    B, T = tokens.shape
    t = times(t, (B,), generator).to(tokens.device)[:, None]                            # [B, 1]
    maskable = text_alone(maskable, attention_mask)
    x_t, mask = corrupt(model, tokens, t, mask, maskable, schedule, generator)
    weights = weight(t, schedule).expand(B, T)
    clipped = weights.clamp(max=max_weight or math.inf)
    count = token_count(tokens, maskable)
    total, nll = weighted_nll(model, x_t, tokens, mask, clipped, attention_mask=attention_mask)
    return Loss(total / count, weights * nll, count, mask, t)


def block_loss(model, tokens, block_length, t=None, mask=None, maskable=None,
               schedule="linear", max_weight=None, generator=None):
    """The bound of block diffusion for tokens int64 [B, T] (BD3-LM eq. 8); else as `mdlm_loss`.

    Each block of `block_length` tokens is predicted from itself, noisy, and the blocks before it,
    clean; one pass over [x_t, x_0] does all blocks at once (passes.block_nll).
    t  float [B, T / block_length], a time for each block, or [B].
    """
    t, each = block_times(t, tokens, block_length, generator)                  # [B, blocks], [B, T]
    x_t, mask = corrupt(model, tokens, each, mask, maskable, schedule, generator)
    weights = weight(each, schedule)
    clipped = weights.clamp(max=max_weight or math.inf)
    count = token_count(tokens, maskable)
    total, nll = block_nll(model, x_t, tokens, mask, clipped, block_length)
    return Loss(total / count, weights * nll, count, mask, t)


def uniform_loss(model, tokens, t=None, mask=None, maskable=None, attention_mask=None,
                 schedule="linear", max_weight=None, generator=None, replacement=None):
    """The bound of uniform noise (UDLM, 2412.10193; Duo, 2506.10892) for tokens int64 [B, T]; else
    as `mdlm_loss`.

        loss = 1/count * sum over all maskable i of uniform_bound_i             nats per token

    All tokens are predicted, for the model is not told which of them noise has hit.
    mask, replacement  bool and int64 [B, T]: where noise is and what it puts there; None: drawn.
    max_weight  clips weight(t) as with masks: a time near 0 counts so much less in `loss`, not in
                `nelbo`. There is little noise then, and what there is costs about weight(t).
    """
    t = times(t, tokens.shape[:1], generator)[:, None]                                  # [B, 1]
    alpha, d_alpha = look_up(SCHEDULES, schedule, "schedule")(t.to(tokens.device))
    maskable = text_alone(maskable, attention_mask)
    draw = functools.partial(uniform_noise, tokens.shape, alpha.cpu(), config_of(model).vocab_size,
                             generator)
    x_t, mask = replaced(tokens, mask, replacement, draw, maskable)
    logits = all_logits(model, x_t, attention_mask)                                     # [B, T, V]
    nats = uniform_bound(logits, tokens, x_t, alpha, d_alpha)
    return noise_loss(nats, t.to(tokens.device), weight(t, schedule), mask, maskable, max_weight)


def hybrid_loss(model, tokens, t=None, mask=None, maskable=None, attention_mask=None,
                max_weight=None, generator=None, replacement=None):
    """The bound of hybrid noise (GIDD, 2503.04482), with the uniform_share of the model's config;
    else as `uniform_loss`. It has a schedule of its own; weight(t) is 1/t."""
    config = config_of(model)
    t = times(t, tokens.shape[:1], generator)                                           # [B]
    maskable = text_alone(maskable, attention_mask)
    draw = functools.partial(hybrid_noise, tokens.shape, t.cpu()[:, None], config.vocab_size,
                             config.mask_token_id, config.uniform_share, generator)
    x_t, mask = replaced(tokens, mask, replacement, draw, maskable)
    logits = all_logits(model, x_t, attention_mask)                                     # [B, T, V]
    t = t.to(tokens.device)
    nats = hybrid_bound(logits, tokens, x_t, t, config.mask_token_id, config.uniform_share)
    return noise_loss(nats, t[:, None], weight(t)[:, None], mask, maskable, max_weight)


NOISE_LOSSES = {"uniform": uniform_loss, "hybrid": hybrid_loss}     # for Config.noise


def replaced(tokens, mask, replacement, draw, maskable):
    """(x_t, mask): tokens int64 [B, T] with the replacement where `mask` and `maskable` are; what
    is None as draw() says, (mask, replacement). Raises ValueError where shapes do not fit."""
    if mask is None or replacement is None:
        drawn_mask, drawn_replacement = draw()
        mask = drawn_mask if mask is None else mask
        replacement = drawn_replacement if replacement is None else replacement
    check_like(tokens, mask=mask, replacement=replacement, maskable=maskable)
    mask = mask.to(tokens.device)
    if maskable is not None:
        mask = mask & maskable.to(tokens.device)
    return torch.where(mask, replacement.to(tokens.device), tokens), mask


def noise_loss(nats, t, weights, mask, maskable, max_weight):
    """The Loss of a bound [B, T] at times t, whose weights [B, 1] are clipped at max_weight."""
    count = token_count(nats, maskable)
    if maskable is not None:
        nats = nats * maskable.to(nats.device)
    kept = (max_weight or math.inf) / weights.to(nats.device)                           # [B, 1]
    return Loss((kept.clamp(max=1) * nats).sum() / count, nats.detach(), count, mask, t)


def sft_loss(model, tokens, maskable=None, t=None, mask=None, attention_mask=None, cart=0.0,
             generator=None):
    """LLaDA's loss of supervised fine-tuning (2502.09992, eq. 5): a mean over answers, however
    long.

        loss = 1/B sum_b 1/L_b sum over masked i of 1/t_b * -log p(x_0^i | x_t)

    for tokens int64 [B, T]; L_b is the number of tokens of row b where `maskable` [B, T] is true
    (None: all), end-of-text padding included. Times are uniform in (1e-3, 1], what LLaDA's code
    calls p_mask. cart > 0 takes Dream's weights (`cart_weights`) for 1/t_b and, as its code at one
    sequence a GPU, the number of masked tokens for L_b.
    """
    B, T = tokens.shape
    t = times(t, (B,), generator).to(tokens.device)[:, None]                            # [B, 1]
    maskable = text_alone(maskable, attention_mask)
    x_t, mask = corrupt(model, tokens, t, mask, maskable, "linear", generator)
    maskable = torch.ones_like(mask) if maskable is None else maskable.to(tokens.device)
    weights = (1 / t).expand(B, T)
    used, lengths = weights, maskable.sum(1, keepdim=True)                              # [B, 1]
    if cart:
        used, lengths = cart_weights(mask, cart), mask.sum(1, keepdim=True)
    used = used / (B * lengths.clamp(min=1))
    count = token_count(tokens, maskable)
    total, nll = weighted_nll(model, x_t, tokens, mask, used, attention_mask=attention_mask)
    return Loss(total, weights * nll, count, mask, t)


def llada2_loss(model, tokens, block_length, maskable=None, t=None, mask=None, complement=True,
                bound=False, cap_weight=0.0, generator=None):
    """LLaDA2's loss of supervised fine-tuning (2512.15745): a mean over the masked tokens, however
    many there are.

        loss = 1/M sum over masked i of -log p_i + cap_weight * mean over right i of H(p_i)
        p_i = p(x_0^i | x_t in the block of i, x_0 before that block)

    for tokens int64 [B, T] in one pass over [x_t, x_0], as in `block_loss`. The second term is CAP
    (confidence-aware parallel training): what the model knows, those masked i whose most probable
    token is right, it shall be sure of, for sampling keeps many sure tokens a step.
    t           float [B] or [B, T / block_length]; None: uniform between 0.3 and 0.8, which leaves
                out what teaches little: nearly no masks, and nearly nothing else.
    complement  every row goes in twice, at t and 1 - t: what is masked in one is shown in the
                other. So each maskable token is learned in each step. The Loss then has 2B rows.
    bound       True: weights 1/t, and the count of maskable tokens for M: the bound, if times are
                uniform in (0, 1].
    Raises ValueError where shapes or the mask token do not fit.
    """
    if t is None:
        t = 0.3 + 0.5 * sample_t(tokens.shape[:1], generator, eps=0)                    # [B]
    t, each = block_times(t, tokens, block_length, generator)                  # [B, blocks], [B, T]
    x_t, mask = corrupt(model, tokens, each, mask, maskable, "linear", generator)
    maskable = torch.ones_like(mask) if maskable is None else maskable.to(tokens.device)
    if complement:
        rest = maskable & ~mask
        other, _ = corrupt(model, tokens, 1 - each, rest)
        x_t, mask = torch.cat((x_t, other)), torch.cat((mask, rest))                    # [2B, T]
        tokens, maskable = tokens.repeat(2, 1), maskable.repeat(2, 1)
        t, each = torch.cat((t, 1 - t)), torch.cat((each, 1 - each))
    weights = weight(each.clamp(min=1e-3))              # 1 - t may be 0
    used = torch.ones_like(weights) / mask.sum().clamp(min=1)
    if bound:
        used = weights / maskable.sum().clamp(min=1)
    total, nll = block_nll(model, x_t, tokens, mask, used, block_length, cap_weight)
    return Loss(total, weights * nll, token_count(tokens, maskable), mask, t)


def cart_weights(mask, p):
    """Dream's context-adaptive weights of the masked tokens, 0 elsewhere: float32 [B, T] for mask
    [B, T] (CART; 2508.15487, section 3.2).

        w_i = 1/2 sum over clean j of p (1 - p)^(|i - j| - 1)

    A token counts the more the more of its neighbours are there to tell it; a large p looks at the
    nearest only. Raises ValueError unless 0 < p <= 1.
    """
    if not 0 < p <= 1:
        raise ValueError(f"cart must be above 0 and at most 1, got {p}")
    index = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32)
    distance = (index[:, None] - index).abs()                                           # [T, T]
    near = torch.where(distance > 0, p / 2 * (1 - p) ** (distance - 1), 0.0)
    return (~mask).float() @ near * mask


def ar_loss(model, tokens):
    """-log p(x_i | x_<i) of an autoregressive model, nats per token: the baseline. The first token
    is given, not predicted."""
    predicted = torch.ones_like(tokens, dtype=torch.bool)
    predicted[:, 0] = False
    count = max(int(predicted.sum()), 1)
    weights = torch.ones(tokens.shape, device=tokens.device)
    total, nll = weighted_nll(model, tokens, tokens, predicted, weights, shift=True)
    return Loss(total / count, nll, count, predicted, weights[:, :1])


def times(t, shape, generator):
    """t, or times drawn by `sample_t`. Raises ValueError for another shape, and for times at which
    nothing is masked or more than everything."""
    if t is None:
        return sample_t(shape, generator)
    if t.shape != shape:
        raise ValueError(f"t must have shape {list(shape)}, one time a sequence or block, got "
                         f"{list(t.shape)}")
    if not ((t > 0) & (t <= 1)).all():
        raise ValueError(f"t must be above 0 and at most 1, got {t.min().item()} to "
                         f"{t.max().item()}")
    return t


def block_times(t, tokens, block_length, generator):
    """(t [B, T / block_length], the same for each token [B, T]) of tokens int64 [B, T] in blocks;
    t None: drawn, a time for each block; [B]: one for all blocks of a row. Raises ValueError."""
    B, T = tokens.shape
    if block_length < 1 or T % block_length:
        raise ValueError(f"block_length {block_length} does not divide the {T} tokens of a "
                         "sequence")
    blocks = T // block_length
    if t is not None and t.dim() == 1:
        t = t[:, None].expand(-1, blocks)
    t = times(t, (B, blocks), generator).to(tokens.device)                             # [B, blocks]
    return t, t.repeat_interleave(block_length, dim=1)


# --------------------------------------------------------------------------------------------------
# The bound on a text, with its error


@torch.no_grad()
def nelbo(model, tokens, num_samples=1, seed=0, batch_size=32, maskable=None,
          attention_mask=None, run_passes=map):
    """(bound in nats per token, its standard error) for tokens int64 [N, T]; exact for an
    autoregressive model.

    Masks exactly k of T tokens, k uniform on 1..T, and weighs by T / k: the same bound with less
    variance than times and coin flips, for integrating over t leaves each set of k tokens the
    weight (k-1)! (T-k)! / T! (LLaDA, eq. 6 and appendix A.2). k is spread evenly over rows and
    samples. Other noise is drawn at times t = u^3 and weighed by dt/du = 3 u^2, u spread evenly
    over both: near t = 0 there is little noise, but what there is costs up to 1/t, and estimates of
    hybrid noise from even times would vary without bound. The error is over the rows: of this
    estimate, for text like this.

    maskable        bool [N, T], what is scored given the rest: the answers of conversations. Nats
                    and tokens are summed over all rows before they are divided.
    attention_mask  bool [N, T], false for padding, which nobody sees.
    run_passes      the builtin map, or common.share, which divides the passes among processes.
    Raises ValueError where there is no token to score, or for less than one sample.
    """
    N, config = len(tokens), config_of(model)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    maskable = what_to_score(config, tokens, maskable, attention_mask)
    samples = 1 if config.causal else num_samples
    draw, score = draw_masks, score_masks
    if noise_of(model) != "mask":
        draw, score = draw_noise, score_noise
    drawn = draw(config, maskable, samples, stream("hidden tokens of nelbo", seed))

    def bound(one):                                     # -log p in nats, [B]
        sample, rows = one
        T, shown = maskable.shape[1], None
        if attention_mask is not None:                  # no wider than the longest of these rows
            T = width_of(attention_mask[rows])
            shown = attention_mask[rows, :T]
        own = [part[rows, :T] for part in drawn[sample]]            # [B, T], but u [B, 1]
        nats = score(model, tokens[rows, :T], maskable[rows, :T], shown, *own)              # [B, T]
        return nats.sum(1).double().cpu()

    passes = [(sample, slice(first, first + batch_size))
              for sample in range(samples) for first in range(0, N, batch_size)]
    nats = torch.zeros(N, samples, dtype=torch.float64)
    for (sample, rows), estimate in zip(passes, run_passes(bound, passes)):
        nats[rows, sample] = estimate
    counts = maskable.sum(1).double()                                                   # [N]
    value = nats.sum() / (counts.sum() * samples)
    return value.item(), ratio_error(nats, counts, value)


def what_to_score(config, tokens, maskable, attention_mask):
    """bool [N, <= T]: which of tokens [N, T] are scored; columns after the last that is shown are
    cut off. Raises ValueError where nothing is scored."""
    maskable = torch.ones(tokens.shape, dtype=torch.bool) if maskable is None else maskable.cpu()
    width = tokens.shape[1]
    if attention_mask is not None:                      # padding is no text to score
        shown = attention_mask.bool().cpu()
        width, maskable = width_of(shown), maskable & shown
        if config.causal:                               # nor does it predict the token after it
            maskable[:, 1:] &= shown[:, :-1]
    if config.causal:                                   # nothing predicts the first token
        maskable = maskable & (torch.arange(tokens.shape[1]) > 0)
    if not maskable.any():
        raise ValueError("there is no token to score")
    return maskable[:, :width]


def width_of(shown):
    """Of how many columns, from the first on, all is that is shown [B, T]; at least 1."""
    columns = shown.bool().any(0).nonzero()
    return int(columns.max()) + 1 if len(columns) else 1


def draw_masks(config, maskable, samples, generator):
    """Of each sample (mask bool [N, T], weights [N, T]): exactly k of the L maskable tokens of a
    row, or of each of its blocks, k uniform on 1..L, with weight L / k."""
    if config.causal:                                   # one pass predicts every token
        return [(maskable, torch.ones(maskable.shape))]
    N, T = maskable.shape
    block = config.block_length or T
    groups = F.pad(maskable, (0, -T % block)).view(N, -1, block)        # [N, blocks, block]
    shares = evenly_spread((samples, *groups.shape[:2]), generator)     # [samples, N, blocks]
    drawn = [hide(groups, share, generator) for share in shares]
    return [(mask.view(N, -1)[:, :T], weights.reshape(N, -1)[:, :T]) for mask, weights in drawn]


def hide(groups, share, generator):
    """(mask, weights), both [N, blocks, block] as `groups`, bool, which are the maskable tokens of
    blocks: k = 1 + the integer part of `share` [N, blocks] of the others, with weight L / k."""
    size = groups.sum(-1)                                               # L, [N, blocks]
    k = (share * size).long().clamp(max=size - 1) + 1
    # The k lowest of random numbers, among which 2.0 comes last: what is not maskable.
    order = torch.where(groups, torch.rand(groups.shape, generator=generator), 2.0)
    mask = (order.argsort(-1).argsort(-1) < k[..., None]) & groups
    weights = (size / k).nan_to_num()[..., None].expand(groups.shape)   # 0 / 0: nothing is maskable
    return mask, weights


def score_masks(model, tokens, maskable, attention_mask, mask, weights):
    """The estimate of the bound, nats [B, T], from one sample of `draw_masks`."""
    return masked_nll(model, tokens, mask, attention_mask) * weights.to(tokens.device)


def draw_noise(config, maskable, samples, generator):
    """Of each sample (u [N, 1], mask bool [N, T], replacement int64 [N, T]): what a model of other
    noise than masks meets at times t = u^3."""
    V, drawn = config.vocab_size, []
    for u in sample_t((samples, len(maskable), 1), generator, eps=0):                   # [N, 1]
        if config.noise == "uniform":
            noise = uniform_noise(maskable.shape, 1 - u**3, V, generator)
        else:
            noise = hybrid_noise(maskable.shape, u**3, V, config.mask_token_id,
                                 config.uniform_share, generator)
        drawn.append((u, *noise))
    return drawn


def score_noise(model, tokens, maskable, attention_mask, u, mask, replacement):
    """The estimate of the bound, nats [B, T], from one sample of `draw_noise`."""
    loss = NOISE_LOSSES[config_of(model).noise](model, tokens, u[:, 0]**3, mask, maskable,
                                                attention_mask, replacement=replacement)
    return loss.token_nll * (3 * u**2).to(tokens.device)


@torch.no_grad()
def restored(model, tokens, hidden, target):
    """The probability [B] that the model gives the tokens at `target` when all at `hidden` are
    masked; tokens int64 [B, T], hidden and target bool [B, T]. Several tokens count as if they were
    independent."""
    nll = masked_nll(model, tokens, hidden).cpu()                                       # [B, T]
    return (nll * target).sum(1).neg().exp()


# --------------------------------------------------------------------------------------------------
# Denoise. What a rule scores high is kept; the rest stays masked. A new rule is one function here.
# It sees the masks of several rows at once, and its scores are compared within a row.


def low_confidence(logits, chosen):
    """Probability of the chosen tokens [N] under softmax(logits) [N, V], float64: LLaDA's rule, and
    Dream's "maskgit_plus"; named for what it masks again. Near 1, where float32 makes everything
    equal, it is 1 - all the others."""
    p = logits.softmax(dim=-1)
    value = p.gather(1, chosen[:, None])[:, 0].double()
    others = p.scatter_(1, chosen[:, None], 0.0).sum(-1).double()
    return torch.where(value > 0.5, 1 - others, value)


def entropy(logits, chosen):
    """sum p log p [N], the negative entropy of each prediction (Dream, 2508.15487)."""
    p = logits.softmax(dim=-1)
    return (p * (p + 1e-10).log()).sum(-1)


def margin(logits, chosen):
    """Probability of the best token minus that of the second best [N] (Kim et al., 2502.06768)."""
    best = logits.softmax(dim=-1).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


REMASKING = {"low_confidence": low_confidence, "entropy": entropy, "margin": margin,
             "random": low_confidence, "ancestral": low_confidence}
# These two choose positions blindly, by uniform numbers, before the model is asked: "random" as
# many as the schedule says, "ancestral" each with probability (t - s) / t, which samples the
# reverse process (MDLM, eq. 7; Dream's "origin"). The function in the table chooses nothing: it is
# shown as the confidence, and ReMDM's "conf" (sampling/engine.py) reads it.
BLIND = ("random", "ancestral")


def even(start, left, step, steps):
    """How many of a block's `start` masks, `left` of them now, this step reveals: equal shares, the
    remainder first (LLaDA)."""
    share, remainder = divmod(start, steps)
    return share + 1 if step < remainder else share


def timesteps(start, left, step, steps):
    """Time falls evenly from 1 to 1e-3; a step from t to s reveals the integer part of
    left * (1 - s / t) (Dream)."""
    t, s = step_times(steps)[step:step + 2]
    return int(left * (1 - s / t))


@functools.lru_cache(maxsize=8)
def step_times(steps):
    return torch.linspace(1, 1e-3, steps + 1)           # float32, as Dream has it


STEP_SCHEDULES = {"even": even, "timesteps": timesteps}


def sample_tokens(logits, temperature, uniform):
    """Token ids [N] from softmax(logits / temperature), logits [N, V]; the most probable at 0.

    uniform  numbers in [0, 1), [N]: see noises.pick.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    return pick((logits / temperature).softmax(dim=-1), uniform)


def best(score, count):
    """The indices of the `count` highest scores [N], from left to right."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


@torch.no_grad()
def denoise(model, tokens, steps, temperature=0.0, remasking="low_confidence", block_length=None,
            threshold=None, schedule=None, prompt_len=0, seed=None, edit_threshold=None,
            edit_passes=16):
    """The plain sampler: fill every mask of tokens int64 [B, T]. Returns int64 [B, T].

    Blocks of block_length tokens (None: one block; block diffusion: the model's own), counted from
    prompt_len (LLaDA2: from 0), are denoised from left to right in `steps` steps over all of them,
    each in its share of those, rounded up.
    temperature   0: the most probable token; else a sample of softmax(logits / temperature).
    remasking     which predictions a step keeps: a key of REMASKING.
    threshold     keep all with at least this score, and the best (LLaDA2: at least as many as the
                  schedule says); None: the model's own, with "low_confidence".
    schedule      how many a step keeps: a key of STEP_SCHEDULES; None: the model's own.
    seed          row b draws from the stream (seed, b).
    edit_threshold, edit_passes     see `rewrites`; None: the model's own, with a threshold.
    An autoregressive model is the case of blocks of one token; its masks have the id vocab_size.
    Raises ValueError for arguments that cannot be, naming them, and for tokens that do not fit.
    sampling/engine.py does the same with batches and caches, and has more rules.
    """
    config, mask_id = config_of(model), canvas_mask_id(model)
    how = Rules(temperature, remasking, threshold, schedule or config.step_schedule, edit_threshold,
                edit_passes, tokens.device)
    how.take_habits(config)
    how.check(config)
    if steps < 1 or block_length is not None and block_length < 1:
        raise ValueError(f"steps and block_length must be at least 1, got {steps} and "
                         f"{block_length}")
    check_canvas(config, tokens)
    block_length = own_block_length(config, block_length) or tokens.shape[1]
    begin = 0 if config.blocks_from_start else prompt_len
    block_of = (torch.arange(tokens.shape[1]) - begin) // block_length                  # [T]
    canvas = tokens.cpu().clone()
    for x, generator in zip(canvas, streams(seed, len(canvas))):                        # x [T]
        blocks = block_of[x == mask_id].unique()
        for block in blocks:
            denoise_block(model, x, block_of, block, math.ceil(steps / len(blocks)), how, generator)
    return canvas.to(tokens.device)


@dataclass
class Rules:
    """What `denoise` was told, and the model's own where it was not."""
    temperature: float
    remasking: str
    threshold: float | None
    schedule: str
    edit_threshold: float | None
    edit_passes: int
    device: torch.device        # where the model is

    def __post_init__(self):
        if 0 < self.temperature < 1e-6:     # 0 in all that float32 can tell, and does not overflow
            self.temperature = 0.0

    def take_habits(self, config):
        """What was left out is as the model has it."""
        if self.threshold is None and self.remasking == "low_confidence":
            self.threshold = config.threshold
        if self.edit_threshold is None and self.threshold is not None:
            self.edit_threshold = config.edit_threshold

    def check(self, config):
        """Raises ValueError for what cannot be, naming it."""
        look_up(STEP_SCHEDULES, self.schedule, "schedule")
        look_up(REMASKING, self.remasking, "remasking")
        threshold, remasking = self.threshold, self.remasking
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if threshold is not None and (remasking != "low_confidence" or not 0 <= threshold <= 1):
            raise ValueError("threshold needs low_confidence and must be between 0 and 1, got "
                             f"{threshold} with {remasking}")
        if self.edit_threshold is not None and config.causal:
            raise ValueError("edit_threshold is not for autoregressive models")


def denoise_block(model, x, block_of, block, steps, how, generator):
    """Fill the masks of a block of a row x [T], in place. Each step predicts all of them, keeps the
    predictions that the rule scores highest and leaves the rest for later (LLaDA, algorithm 5).

    block_of int64 [T], the block of each position; how: Rules.
    """
    config, mask_id = config_of(model), canvas_mask_id(model)
    inside = block_of == block                                                          # [T]
    own = inside & (x == mask_id)                       # what is to be written
    # The schedule counts the block's masks; LLaDA2's all of its positions, those of a prompt, too.
    start = int((inside if config.blocks_from_start else own).sum())
    # A threshold takes the place of the schedule, and keeps one at least; but not LLaDA2's own.
    one_a_step = how.threshold is not None and config.threshold is None
    if one_a_step:
        steps = start
    step = 0
    while (own & (x == mask_id)).any():
        where = (own & (x == mask_id)).nonzero()[:, 0]                                  # [N]
        last = step >= steps - 1
        count = len(where)
        if one_a_step:
            count = 1
        elif how.remasking != "ancestral" and not last:
            count = STEP_SCHEDULES[how.schedule](start, len(where), step, steps)
        if how.remasking in BLIND and count:
            where = choose_blindly(where, count, step, steps, how.remasking, generator)
            count = len(where)
        step += 1
        if not count:
            continue
        logits = predict(model, x, where, block_of, how.device).cpu()                   # [N, V]
        if last:                # no mask again (of an autoregressive model there is no such column)
            logits[:, mask_id:mask_id + 1] = -torch.inf
        u = None
        if how.temperature > 0:
            u = torch.rand(len(where), generator=generator, dtype=torch.float64)
        chosen = sample_tokens(logits, how.temperature, u)                              # [N]
        score = REMASKING[how.remasking](logits, chosen)
        if how.threshold is not None:
            count = max(count, int((score >= how.threshold).sum()))
        keep = best(score, count)
        anew, tokens_anew = rewrites(model, x, own, block_of, how)
        x[where[keep]] = chosen[keep]
        x[anew] = tokens_anew
    for _ in range(how.edit_passes):                    # the block is full: is all of it good?
        anew, tokens_anew = rewrites(model, x, own, block_of, how)
        x[anew] = tokens_anew
        if not len(anew):
            break


def choose_blindly(where, count, step, steps, remasking, generator):
    """The positions that a rule of BLIND chooses of the masks `where` [N]: "random" so many,
    "ancestral" each with probability (t - s) / t, and all in the last step."""
    u = torch.rand(len(where), generator=generator, dtype=torch.float64)
    if remasking == "random":
        return where[best(u, count)]
    if step >= steps - 1:
        return where
    t, s = step_times(steps)[step:step + 2].double()
    return where[u < (t - s) / t]


def rewrites(model, x, inside, block_of, how):
    """(positions, tokens) [N] that are written anew in a row x [T], where another token than the
    one that stands there is predicted with more than edit_threshold (LLaDA2.1; None: nothing is).

    inside  bool [T], where that may happen; masks are left to the other rule. The rule is asked in
            every step of a block and then, when its masks are gone, until it changes nothing or for
            edit_passes passes: two tokens may replace each other for ever.
    """
    mask_id = canvas_mask_id(model)
    where = (inside & (x != mask_id)).nonzero()[:, 0]
    if how.edit_threshold is None or not len(where):
        return where[:0], where[:0]
    logits = predict(model, x, where, block_of, how.device).cpu()                       # [N, V]
    chosen = logits.index_fill(1, torch.tensor(mask_id), -torch.inf).argmax(dim=-1)
    other = (chosen != x[where]) & (low_confidence(logits, chosen) > how.edit_threshold)
    return where[other], chosen[other]
