"""The sampler's rules for batches: which predictions stay, from which tokens is drawn, what is
masked again. The plain ones stand in diffusion.py; scores and masks here are [B, T], a row each its
own.
"""
import functools

import torch
import torch.nn.functional as F

from diffusion import step_times


def rank(score, eligible):
    """int64 [B, T]: 0 for the highest eligible score of a row, 1 for the next...; equal scores from
    left to right."""
    score = score.masked_fill(~eligible, -torch.inf)
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def keep_best(score, eligible, count):
    """bool [B, T]: the `count` [B] eligible positions with the highest score [B, T]."""
    return eligible & (rank(score, eligible) < count[:, None])


def keep_confident(score, eligible, threshold, count):
    """The `count` [B] best eligible positions, and all whose score is at least `threshold`
    (Fast-dLLM, 2505.22618, algorithm 1; count is 1 there)."""
    return keep_best(score, eligible, count) | eligible & (score >= threshold)


def keep_factor(score, eligible, factor):
    """The n best, as long as the n-th has score >= 1 - factor / (n + 1) (Fast-dLLM, section 3.3;
    its code counts from n = 1 with the first always kept, and takes the last one along when it
    alone fails; so does this)."""
    ranks, total = rank(score, eligible), eligible.sum(1)                              # [B, T], [B]
    enough = (score >= 1 - factor / (ranks + 2)) | (ranks == 0)
    fails = torch.where(eligible & ~enough, ranks, total[:, None]).amin(1)  # [B] first that fails
    fails = torch.where(fails >= total - 1, total, fails)
    return eligible & (ranks < fails[:, None])


def keep_entropy_bound(score, entropies, eligible, gamma):
    """The most of the best, U, for which sum of H over U - max of H over U <= gamma, H [B, T] their
    entropies in nats: a bound on the information that they have about each other, which predicting
    them at once neglects (EB-Sampler, Ben-Hamu et al. 2025, 2505.24857)."""
    ranks = rank(score, eligible)
    entropies = entropies.masked_fill(~eligible, 0)
    ranked = torch.zeros_like(entropies).scatter(1, ranks, entropies)       # [B, T], best first
    bound = ranked.cumsum(1) - ranked.cummax(1).values                   # grows with every position
    return eligible & (bound <= gamma).gather(1, ranks)


def perturb(score, alg_temp, uniform):
    """score / alg_temp plus Gumbel noise: the n best of it are n draws without replacement from
    softmax(score / alg_temp), as Dream's alg_temp wants them (Kool et al. 2019, 1903.06059).
    uniform: numbers in [0, 1), of the shape of score."""
    return score / alg_temp - (-uniform.clamp(min=1e-300).log()).log()


def filter_logits(logits, top_p=None, top_k=None):
    """logits [N, V] with -inf for all but the most probable tokens: as few as together exceed
    top_p, then the top_k of them (Dream). What is as probable as the last of them stays as well."""
    if top_p is not None and top_p < 1:
        p, V = logits.softmax(dim=-1), logits.shape[1]
        for k in sorted({min(k, V) for k in (256, 4096, V)}):  # sorting all V can outlast the model
            best = p.topk(k, dim=-1).values                                             # [N, k]
            outside = F.pad(best.cumsum(-1)[:, :-1] > top_p, (1, 0))
            if outside[:, -1].all():                            # every row is full
                break
        least = best.masked_fill(outside, 1).amin(-1, keepdim=True)
        logits = logits.masked_fill(p < least, -torch.inf)
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


# ReMDM's schedules (section 4.1): sigma, the chance that a written token is masked again, of eta
# and the largest possible sigma. With "conf" the tokens of a block share one such sigma, by
# softmax(-confidence): who was written unsurely goes first.


def cap(eta, largest):
    return min(eta, largest)


def rescale(eta, largest):
    return eta * largest


REMASK_SCHEDULES = {"cap": cap, "rescale": rescale, "conf": rescale}


@functools.lru_cache(maxsize=2**12)
def reverse_step(step, steps, eta=0.0, schedule="cap"):
    """(chance that a mask is written, chance sigma that a written token is masked again) in the
    step from time t to s, floats.

        write = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t),    alpha_t = 1 - t
        0 <= sigma <= min(1, (1 - alpha_s) / alpha_t)

    Whatever sigma, a share alpha_s is written at s (ReMDM, Wang et al. 2025, 2503.00307, section
    3); but "conf" leaves `write` as it is without. sigma = 0 is the reverse process of masked
    diffusion, write = (t - s) / t (MDLM, eq. 7). The last step writes all.
    """
    if step >= steps - 1:
        return 1.0, 0.0
    t, s = step_times(steps)[step:step + 2].tolist()
    largest = 1.0 if s >= 1 - t else s / (1 - t)
    sigma = REMASK_SCHEDULES[schedule](eta, largest)
    rewritten = 0.0 if schedule == "conf" else sigma * (1 - t)
    return (t - s + rewritten) / t, sigma
