"""The other noises: a token becomes any token, or a mask or any token.

A mask says where a token is missing, and what is written there stays. Here nothing tells the model
which tokens are wrong, and a sampler may change every token in every step. Everything stands in its
plain form; the losses that train a model with it are `uniform_loss` and `hybrid_loss` of
diffusion.py. Pure functions of tensors: no files, no tokenizers.

Time runs as in diffusion.py, from t = 0, clean, to t = 1, all noise. Each token independently:

    uniform   q(x_t | x_0) = alpha_t [x_t = x_0] + (1 - alpha_t) / V
    hybrid    q(x_t | x_0) = ((1 - t) [x_t = x_0] + t [x_t = mask] + c_t / (V - 1) [x_t != mask])
                             / (1 + c_t)

Uniform noise is that of UDLM (Schiff et al. 2024, arXiv 2412.10193) and Duo (Sahoo et al. 2025,
2506.10892). It covers the whole vocabulary, special tokens too: so the formulas are simplest, and a
model soon knows the tokens that no text contains. Hybrid noise is that of GIDD (von Rütte et al.
2025, 2503.04482, section 4): c_t is shared evenly among the V - 1 tokens that are no mask.

The model's prediction p [V] of x_0 stands in the place of x_0: q(x_t | p) is the average of
q(x_t | x_0) over x_0 drawn from p. The p that makes the bound least, and the sampler exact, is what
all other tokens say of a token, p(x_0^i | x_t without x_t^i), for what its own noisy token says is
in the formulas already (2605.22765). Nothing hides x_t^i from the model: training finds
this p because it makes the bound least. A mask says nothing: so this never mattered with masks.

Shapes: B batch, T positions, V vocabulary, N tokens that are asked about.
"""
import math

import torch

from common import streams
from passes import all_logits, check_canvas, config_of

EDGE = 1e-7     # at t = 0 and 1 the formulas divide by 0: they are taken so far inside
SMALLEST_SHARE = math.exp(-20)      # of uniform tokens in hybrid noise: no logarithm of 0 (GIDD)


# --------------------------------------------------------------------------------------------------
# Corrupt


def uniform_noise(shape, alpha_t, vocab_size, generator=None):
    """(mask bool, replacement int64), both of `shape`: which tokens noise hits, each with
    probability 1 - alpha_t (broadcast), and what it puts there; it may be the same token again."""
    mask = torch.rand(shape, generator=generator) < 1 - alpha_t
    return mask, torch.randint(vocab_size, shape, generator=generator)


def hybrid_noise(shape, t, vocab_size, mask_token_id, uniform_share, generator=None):
    """The same for hybrid noise at times t (broadcast): the mask or any other token."""
    c = uniform_part(t, uniform_share)
    mask = torch.rand(shape, generator=generator) < (t + c) / (1 + c)
    is_mask = torch.rand(shape, generator=generator) < t / (t + c)
    other = torch.randint(vocab_size - 1, shape, generator=generator)
    other = other + (other >= mask_token_id)            # any token but the mask
    return mask, torch.where(is_mask, mask_token_id, other)


def uniform_part(t, uniform_share):
    """c_t = 2 p / (1 - p) sqrt(t (1 - t)) for p = uniform_share, the share of uniform tokens at
    t = 1/2, where there are most of them (GIDD, section 4, with gamma = 1).

    Raises ValueError unless 0 <= uniform_share < 1.
    """
    if not 0 <= uniform_share < 1:
        raise ValueError(f"uniform_share must be at least 0 and below 1, got {uniform_share}")
    p = max(uniform_share, SMALLEST_SHARE)
    return 2 * p / (1 - p) * (t * (1 - t)).sqrt()


# --------------------------------------------------------------------------------------------------
# q(x_t | p): one token's distribution at time t, p [..., V] that of x_0


def uniform_marginal(p, alpha_t):
    """alpha_t p + (1 - alpha_t) / V, [..., V] for p [..., V] and alpha_t [...]."""
    alpha = alpha_t[..., None]
    return alpha * p + (1 - alpha) / p.shape[-1]


def hybrid_marginal(p, t, mask_token_id, uniform_share):
    """((1 - t) p + t [mask] + c_t / N [others]) / (1 + c_t), [..., V] for p [..., V] and t [...];
    p gives the mask 0."""
    c = uniform_part(t, uniform_share)[..., None]
    t = t[..., None]
    others = ((1 - t) * p + c / (p.shape[-1] - 1)) / (1 + c)
    is_mask = torch.arange(p.shape[-1], device=p.device) == mask_token_id
    return torch.where(is_mask, t / (1 + c), others)


def certain(tokens, like):
    """p [..., V] that is sure of the tokens int64 [...]."""
    return torch.zeros_like(like).scatter_(-1, tokens[..., None], 1.0)


def predicted(logits, mask_token_id=None):
    """softmax [..., V] of logits, in float32 at least; without the mask, where there is one."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_token_id is not None:
        mask = torch.tensor(mask_token_id, device=logits.device)
        logits = logits.index_fill(-1, mask, -torch.inf)
    return logits.softmax(-1)


# --------------------------------------------------------------------------------------------------
# The bound


def uniform_bound(logits, x_0, x_t, alpha_t, d_alpha_t):
    """The bound of uniform noise in nats [B, T]; its mean over t and x_t bounds -log p(x_0).

    logits [B, T, V]; x_0, x_t int64 [B, T]; alpha_t and its derivative d_alpha_t [B, 1]. Noise
    turns a token into each other one at the rate -alpha'_t / (V alpha_t), and `jump_bound` compares
    the way back. With x = V q(. | x_0), y = V q(. | p) and i = x_t it is

        alpha'_t / (V alpha_t) (V / x_i - V / y_i - sum_j x_j / x_i log(y_i x_j / (y_j x_i)))

    as UDLM and Duo have it. Raises ValueError where shapes do not fit.
    """
    check_shapes(logits, x_0, x_t)
    p, alpha = predicted(logits), alpha_t.clamp(EDGE, 1 - EDGE)
    q = uniform_marginal(certain(x_0, p), alpha)                                        # [B, T, V]
    q_model = uniform_marginal(p, alpha)
    rate = -d_alpha_t / (p.shape[-1] * alpha)                                           # [B, 1]
    return jump_bound(q, q_model, x_t, rate)


def hybrid_bound(logits, x_0, x_t, t, mask_token_id, uniform_share):
    """The bound of hybrid noise in nats [B, T] (GIDD, section 3), for t [B]; else as
    `uniform_bound`.

    Noise turns a token into x_t at the rate (its (beta pi)' - alpha' / alpha beta pi)

        into the mask           1 / ((1 - t) (1 + c_t))
        into each other token   (c_t + (1 - t) c'_t) / N / ((1 - t) (1 + c_t))

    of which c_t + (1 - t) c'_t is c_t / (2 t). GIDD writes `jump_bound` with the weight w = rate /
    q(x_t | x_0) as w (KL(q || q_model) + r - log r - 1), where r is q / q_model at x_t.
    """
    check_shapes(logits, x_0, x_t)
    p, t = predicted(logits, mask_token_id), t.clamp(EDGE, 1 - EDGE)[:, None]           # t [B, 1]
    q = hybrid_marginal(certain(x_0, p), t, mask_token_id, uniform_share)               # [B, T, V]
    q_model = hybrid_marginal(p, t, mask_token_id, uniform_share)
    c = uniform_part(t, uniform_share)                                                  # [B, 1]
    into_mask = 1 / ((1 - t) * (1 + c))
    into_other = c / (p.shape[-1] - 1) / (2 * t * (1 - t) * (1 + c))
    rate = torch.where(x_t == mask_token_id, into_mask, into_other)                     # [B, T]
    return jump_bound(q, q_model, x_t, rate)


def jump_bound(q, q_model, x_t, rate):
    """How far the model's way back is from the true one, in nats [B, T].

    Backwards in time a token jumps from x_t to j at `rate` times r_j, r_j = q_j / q(x_t); the
    model, which knows q_model, says `rate` times s_j, s_j = q_model_j / q_model(x_t). Two jump
    processes differ by

        rate * sum over j of  s_j - r_j - r_j log(s_j / r_j)
        s_j - r_j - r_j log(s_j / r_j) = r_j (e^g - 1 - g),     g = log(s_j / r_j)

    nats per unit of time. The second form adds numbers of one sign, where the first would take
    large ones from each other.
    q, q_model [B, T, V], all positive; x_t int64 [B, T]; rate [B, T] (broadcast).
    """
    here = x_t[..., None]
    log_q, log_model = q.log(), q_model.log()
    log_r = log_q - log_q.gather(-1, here)                                              # [B, T, V]
    g = log_model - log_model.gather(-1, here) - log_r
    return rate * (log_r.exp() * (g.expm1() - g)).sum(-1)


def check_shapes(logits, x_0, x_t):
    if not logits.shape[:-1] == x_0.shape == x_t.shape:
        raise ValueError(f"logits of {list(logits.shape)} do not fit x_0 of {list(x_0.shape)} and "
                         f"x_t of {list(x_t.shape)}")


# --------------------------------------------------------------------------------------------------
# The way back: probabilities of x_s given x_t, s < t


def uniform_step(p, x_t, alpha_t, alpha_s):
    """q(x_s | x_t, p) of uniform noise, [..., V], by Bayes' rule (UDLM; Duo):

        q(x_s | x_t, p) = q(x_t | x_s) q(x_s | p) / q(x_t | p)
        q(x_t | x_s) = a [x_t = x_s] + (1 - a) / V,     a = alpha_t / alpha_s

    p [..., V] the prediction of x_0; x_t int64 [...]; alpha_t, alpha_s [...] (broadcast).
    """
    a = alpha_t / alpha_s
    return bayes(uniform_marginal(p, alpha_s), x_t, a, (1 - a) / p.shape[-1])


def hybrid_step(p, x_t, t, s, mask_token_id, uniform_share, min_probability=0.0):
    """q(x_s | x_t, p) of hybrid noise, [..., V] (GIDD, section 3): as `uniform_step`, with

        q(x_t | x_s) = a [x_t = x_s] + noise_t(x_t) - a noise_s(x_t),   a = alpha_t / alpha_s

    where noise_t(z) is what q(z | x_0) is for z != x_0; t, s [...] (broadcast).
    min_probability  what is less probable is left out, GIDD's option.
    """
    c_t, c_s, N = uniform_part(t, uniform_share), uniform_part(s, uniform_share), p.shape[-1] - 1
    is_mask = x_t == mask_token_id
    noise_t = torch.where(is_mask, t, c_t / N) / (1 + c_t)
    noise_s = torch.where(is_mask, s, c_s / N) / (1 + c_s)
    a = (1 - t) / (1 + c_t) / ((1 - s) / (1 + c_s))
    comes = (noise_t - a * noise_s).clamp(min=0)
    q = bayes(hybrid_marginal(p, s, mask_token_id, uniform_share), x_t, a, comes)
    return without_small(q, min_probability)


def bayes(q_s, x_t, stays, comes):
    """(stays [x_s = x_t] + comes) q_s, made to add up to 1: [..., V] for q_s [..., V], x_t int64
    [...], stays and comes [...]: that a token is kept from s to t, that it is noise x_t."""
    joint = q_s * comes[..., None]
    here = x_t[..., None]
    joint = joint.scatter_add(-1, here, stays[..., None] * q_s.gather(-1, here))
    return joint / joint.sum(-1, keepdim=True)


def without_small(q, smallest):
    """q [..., V] without what is below `smallest`, but never without its largest."""
    limit = q.amax(-1, keepdim=True).clamp(max=smallest)
    q = torch.where(q < limit, 0.0, q)
    return q / q.sum(-1, keepdim=True)


# --------------------------------------------------------------------------------------------------
# The plain sampler


def pick(p, uniform):
    """Token ids [N] from probabilities p [N, V]: the distribution function is inverted at `uniform`
    [N], numbers in [0, 1). Exact, where Gumbel noise in less than float64 samples another
    distribution (2409.02908)."""
    cumulative = p.double().cumsum(-1)                                                  # [N, V]
    target = uniform.to(p.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def draw_uniform(generators, where):
    """Numbers in [0, 1), float64 [N], for the N positions `where` bool [B, T]: each row's from its
    own of the B generators."""
    return torch.cat([torch.rand(n, generator=own, dtype=torch.float64)
                      for own, n in zip(generators, where.sum(1).tolist())])


@torch.no_grad()
def reverse(model, tokens, steps, temperature=1.0, min_probability=0.0, seed=None, on_step=None):
    """Write a text out of noise where tokens int64 [B, T] are the mask; all others stay. Returns
    int64 [B, T].

    Time falls evenly from 1 to 0 in `steps` steps, and alpha_t = 1 - t whatever the schedule of
    training was: the model is not told the time. Each step asks it about the whole canvas and draws
    every token that was not given anew from its probabilities one step earlier: it may change in
    each step, from one token to another and back.
    temperature      of the predictions; 0: the most probable token, as if it were certain.
    min_probability  of a token in a step, see `hybrid_step`.
    seed             row b draws from the stream (seed, b).
    on_step          on_step(number of the step, canvas [B, T], probability of its tokens [B, T]).
    Raises ValueError for a model of masks and arguments that cannot be.
    """
    config = config_of(model)
    check_reverse(config, tokens, steps, temperature, min_probability)
    mask_id, V, device = config.mask_token_id, config.vocab_size, tokens.device
    canvas, rows = tokens.cpu().clone(), streams(seed, len(tokens))
    is_open = canvas == mask_id                                                         # [B, T]
    if not is_open.any():
        return canvas.to(device)
    if temperature < 1e-6:      # 0 in all that float32 can tell, and does not overflow
        temperature = 0.0
    if config.noise == "uniform":                       # hybrid noise at t = 1 is all masks
        canvas[is_open] = (draw_uniform(rows, is_open) * V).long()
    for step in range(steps):
        t = torch.tensor(1 - step / steps)
        s = torch.tensor(1 - (step + 1) / steps)
        logits = all_logits(model, canvas.to(device)).cpu()[is_open]                    # [N, V]
        if temperature > 0:
            p = predicted(logits / temperature, mask_id)
        else:
            p = certain(predicted(logits, mask_id).argmax(-1), logits)
        x_t = canvas[is_open]                                                           # [N]
        if config.noise == "uniform":
            q = without_small(uniform_step(p, x_t, 1 - t, 1 - s), min_probability)
        else:
            q = hybrid_step(p, x_t, t, s, mask_id, config.uniform_share, min_probability)
        x_s = pick(q, draw_uniform(rows, is_open))
        canvas[is_open] = x_s
        if on_step is not None:
            sureness = torch.zeros(canvas.shape, dtype=torch.float64)
            sureness[is_open] = p.gather(-1, x_s[:, None])[:, 0].double()
            on_step(step + 1, canvas.clone(), sureness)
    return canvas.to(device)


def check_reverse(config, tokens, steps, temperature, min_probability):
    """ValueError for what `reverse` cannot do, naming it."""
    if config.noise == "mask":
        raise ValueError("this model was trained with masks: see diffusion.denoise")
    if config.mask_token_id is None:
        raise ValueError("this model has no mask token to say where a text is to be written")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if not 0 <= min_probability <= 1:
        raise ValueError(f"min_probability must be between 0 and 1, got {min_probability}")
    check_canvas(config, tokens)
