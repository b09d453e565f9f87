"""Learning from rewards: log p(answer) of a masked diffusion model, advantages, objectives.

A model that writes an answer token by token knows log p(answer). One that fills masks in any order
does not: log p would be a sum over all orders. So every method takes an estimate, and what tells
the methods apart is the noise that the model is shown in order to make it. Each estimate here is of
one form, for token i of an answer:

    logp_i = sum_k weight_k,i * log p(token_i | view_k)

A view is a copy of the sequence in which some tokens are masked, and weight is 0 but for tokens
that are. An estimator is a function that draws views (`diffu`, `coupled`, `trace`, `bound`), and
`logps_of` asks the model. Old, reference and new policy are shown the same views: only then is
exp(new - old) a ratio of the same thing.

An objective turns estimates and rewards into a loss: `policy_loss` (GRPO: clipped ratio and KL,
DeepSeekMath, arXiv 2402.03300), or without a ratio `wd1_loss` (2507.08838) and `spg_loss`
(2510.09541). Pure functions of tensors: no files, no tokenizers.

Shapes: B answers, T positions of prompt, answer and what was generated after its end, K views.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from passes import config_of, guided, in_blocks, mask_token_id, prediction_rows, row_logits

# --------------------------------------------------------------------------------------------------
# Advantages: how much better is an answer than the others of its prompt?


def group_advantages(rewards, group_size, scale=False, leave_one_out=False):
    """Advantages float [B] of rewards [B], a tensor or a list, numbers of any type; the answers of
    a prompt stand together, group_size each.

        A = r - mean(r of the group)                    (Dr. GRPO, arXiv 2503.20783)
        A = (r - mean) / (std + 1e-4)    with `scale`   (GRPO, 2402.03300; std with n - 1)
        A = r - mean(r of the others)    with `leave_one_out`    (RLOO, 2402.14740)

    Raises ValueError where groups do not divide the answers or are too small to compare.
    """
    rewards = torch.as_tensor(rewards)
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size}")
    if group_size < 2 and (scale or leave_one_out):
        raise ValueError("scale and leave_one_out compare the answers of a prompt: group_size must "
                         f"be at least 2, got {group_size}")
    if not rewards.is_floating_point():     # 0 and 1 for wrong and right
        rewards = rewards.float()
    groups = rewards.reshape(-1, group_size)                                            # [P, G]
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if leave_one_out:                       # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        advantages = advantages * group_size / (group_size - 1)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.reshape(-1)


# --------------------------------------------------------------------------------------------------
# Answers and views of them


@dataclass
class Answers:
    """Answers to learn from, with their prompts; padding may stand on either side."""
    tokens: torch.Tensor        # int64 [B, T]
    prompt: torch.Tensor        # bool [B, T]: given
    answer: torch.Tensor        # bool [B, T]: what counts: up to the first end of text, with it
    shown: torch.Tensor         # bool [B, T]: what is no padding
    step: torch.Tensor = None   # int64 [B, T]: the sampler's step that wrote it; for `trace`

    @property
    def generated(self):
        """bool [B, T]: the answer and what was written after its end."""
        return self.shown & ~self.prompt

    def rows(self, which):
        """The answers that an index or a slice names."""
        step = None if self.step is None else self.step[which]
        return Answers(self.tokens[which], self.prompt[which], self.answer[which],
                       self.shown[which], step)

    def to(self, device):
        """The same on a device."""
        step = None if self.step is None else self.step.to(device)
        return Answers(self.tokens.to(device), self.prompt.to(device), self.answer.to(device),
                       self.shown.to(device), step)


@dataclass
class Views:
    """What a model is shown in order to score answers."""
    tokens: torch.Tensor        # int64 [K, B, T]
    weight: torch.Tensor        # float [K, B, T]: what the log p of a token counts; 0: not asked

    def rows(self, which):
        """The views of the answers that an index or a slice names."""
        return Views(self.tokens[:, which], self.weight[:, which])

    def to(self, device):
        return Views(self.tokens.to(device), self.weight.to(device))


def diffu(answers, mask_id, generator, prompt_mask=0.15):
    """Views [1, B, T] of diffu-GRPO (d1, arXiv 2504.12216): all that was generated is masked, so
    that one pass scores every token, as if they were independent.

    Each prompt token is masked with probability prompt_mask; with other tokens in every update one
    set of answers serves for several, and does not wear out.
    """
    u = torch.rand(answers.tokens.shape, generator=generator)
    hidden = answers.generated | answers.prompt & (u < prompt_mask)
    return Views(torch.where(hidden, mask_id, answers.tokens)[None], answers.answer[None].float())


def coupled(answers, mask_id, generator, lowest=0.2, highest=0.8):
    """Views [3, B, T] of coupled-GRPO (DiffuCoder, arXiv 2506.20639): everything masked; a random
    share r of the answer; the rest of it, so that each token is scored once more among neighbours.

        logp_i = (log p(i | all masked) + w * log p(i | the view that masks i)) / 2

    with w = 1/r in the first of the two and 1/(1-r) in the second; r is uniform from `lowest` to
    `highest`, the same for the whole batch. So the weights of a token add up to (1 + 2) / 2 on
    average: the paper's estimate is 1.5 times what the others are, and its ratio to that power.
    """
    ratio = lowest + (highest - lowest) * torch.rand((), generator=generator).item()
    mask = torch.rand(answers.tokens.shape, generator=generator) < ratio
    return coupled_views(answers, mask_id, mask, ratio)


def coupled_views(answers, mask_id, mask, ratio):
    """The views of `coupled` for a mask bool [B, T] with this share of masked tokens."""
    whole = answers.generated
    hidden = torch.stack((whole, whole & mask, whole & ~mask))                          # [3, B, T]
    factors = torch.tensor([1, 1 / ratio, 1 / (1 - ratio)]).view(3, 1, 1) / 2
    weight = factors * (hidden & answers.answer)
    return Views(torch.where(hidden, mask_id, answers.tokens), weight)


def trace(answers, mask_id, generator=None, together=1):
    """Views [K, B, T] of TraceRL (arXiv 2509.06949): the steps as the sampler took them. Each token
    is scored in the view in which it was chosen, the later ones still masked: nothing is drawn, and
    it takes as many views as there were steps.

    together  so many neighbouring steps share a view, in which the tokens of all of them are masked
              (their shrinkage s).
    Raises ValueError where the steps are not known.
    """
    if answers.step is None:
        raise ValueError("the estimator trace needs the step in which each token was written")
    number = answers.step // together                                                   # [B, T]
    K = int(number[answers.generated].max()) + 1
    current = torch.arange(K, device=number.device).view(K, 1, 1)
    hidden = answers.generated & (number >= current)                                    # [K, B, T]
    weight = (answers.answer & (number == current)).float()
    return Views(torch.where(hidden, mask_id, answers.tokens), weight)


def bound(answers, mask_id, generator, num_samples=4, sets=None):
    """Views [K, B, T] of the bound on log p (LLaDA, arXiv 2502.09992, eq. 6): k of the L tokens are
    masked and count L / k, k from 1 to L, averaged over num_samples sets.

    sets(L, num_samples, generator) -> (masks bool [M, L], weights float [M, L]): which sets and
    what the log p of each token counts there; None: `even_sets`. evaluation.likelihood has sharper
    ones. What was generated after the end of an answer is masked in every view.
    """
    sets = sets or even_sets
    drawn = [sets(int(L), num_samples, generator) for L in answers.answer.sum(1)]
    K = max(len(masks) for masks, _ in drawn)
    hidden = (answers.generated & ~answers.answer).expand(K, -1, -1).clone()            # [K, B, T]
    weight = torch.zeros(hidden.shape)
    for b, (masks, weights) in enumerate(drawn):
        place = answers.answer[b].nonzero()[:, 0]                                       # [L]
        hidden[:len(masks), b, place] = masks
        weight[:len(masks), b, place] = weights * masks
    return Views(torch.where(hidden, mask_id, answers.tokens), weight)


def even_sets(L, num_samples, generator):
    """(masks bool [M, L], weights float [M, L]): sets of k tokens, k evenly spread over 1..L."""
    grid = (torch.rand((), generator=generator) + torch.arange(num_samples)) / num_samples
    k = (grid % 1 * L).long() + 1                                                       # [M]
    order = torch.rand(num_samples, L, generator=generator).argsort(1).argsort(1)
    masks = order < k[:, None]
    return masks, masks * (L / k / num_samples)[:, None]


ESTIMATORS = {"diffu": diffu, "coupled": coupled, "trace": trace, "bound": bound}

# --------------------------------------------------------------------------------------------------
# What the model says of them


def logps_of(model, answers, views, cfg_scale=0.0, without_mask=False, temperature=1.0):
    """The estimate of log p in nats, float [B, T], 0 where a token does not count: what a ratio or
    a loss is made of. Its gradient flows. without_mask, temperature: see `view_logps`."""
    found = view_logps(model, answers, views, cfg_scale, without_mask, temperature)
    return (views.weight * found).sum(0)


def view_logps(model, answers, views, cfg_scale=0.0, without_mask=False, temperature=1.0):
    """log p(token | view) in nats, float [K, B, T], where the weight is not 0; else 0.

    Only views that are asked for anything cost a pass. cfg_scale > 0: classifier-free guidance
    (passes.guided). without_mask: among all tokens but the mask, as the sampler chooses what it
    writes. Published code has the mask among them, and then a bad answer becomes improbable at no
    price when the mask takes its probability: nothing ever samples that. temperature: log p under
    softmax(logits / temperature), from which the sampler drew; without it the policy that learns is
    another than the one that wrote the answers. Raises ValueError for guidance of a model that
    writes in blocks.
    """
    asked = views.weight != 0                                                           # [K, B, T]
    used = asked.any(2).nonzero()                                                       # [N, 2]
    view, row = used[:, 0], used[:, 1]
    noisy, asked_here = views.tokens[view, row], asked[view, row]                       # [N, T]
    picked = answers.rows(row)
    unguided = None
    if cfg_scale and config_of(model).block_length:
        raise ValueError("cfg_scale is for bidirectional models only")
    if cfg_scale:
        unguided = torch.where(picked.prompt, mask_token_id(model), noisy)
    nats = masked_logps(model, noisy, picked, asked_here, unguided, cfg_scale, without_mask,
                        temperature)
    found = nats.new_zeros(asked.shape)
    return found.index_put((view, row), nats)


def masked_logps(model, noisy, answers, asked, unguided=None, cfg_scale=0.0, without_mask=False,
                 temperature=1.0):
    """log p of the tokens at `asked` [N, T] given `noisy` [N, T]: [N, T], 0 elsewhere. unguided:
    the same with the prompt masked, for guidance."""
    config = config_of(model)
    flat = asked.flatten().nonzero()[:, 0]
    T = noisy.shape[1]
    how = {}
    if not answers.shown.all():
        how["attention_mask"] = answers.shown
    if config.block_length:                 # one pass over [noisy, clean], as in training
        noisy, _, padded, visible = in_blocks(config, noisy, answers.tokens, asked, answers.shown)
        flat, T = padded.flatten().nonzero()[:, 0], padded.shape[1]
        how = {"attention_mask": visible,
               "positions": torch.arange(T, device=noisy.device).repeat(2)}
    rows = prediction_rows(flat, T, noisy.shape[1], config.shift, config.block_length)
    logits = row_logits(model, noisy, rows, **how)                                      # [M, V]
    if unguided is not None:
        logits = guided(logits, row_logits(model, unguided, rows, **how), cfg_scale)
    if without_mask:
        mask_id = torch.tensor(mask_token_id(model), device=logits.device)
        logits = logits.index_fill(1, mask_id, -torch.inf)
    nats = -F.cross_entropy(logits / temperature, answers.tokens[asked], reduction="none")  # [M]
    return nats.new_zeros(asked.shape).masked_scatter(asked, nats)


# --------------------------------------------------------------------------------------------------
# Objectives


@dataclass
class Terms:
    """What each token adds to the objective, float [B, T] each but `clipped`."""
    loss: torch.Tensor
    kl: torch.Tensor            # the estimate of KL(policy || reference), without its factor
    clipped: torch.Tensor       # bool [B, T]: where the ratio is beyond its limit, no gradient


def policy_terms(logps, old, ref, advantages, clip=0.2, beta=0.0, clip_high=None, ratio_cap=None):
    """The Terms of GRPO (arXiv 2402.03300, eq. 3 and 4), float [B, T]:

        ratio = exp(logp - old)
        loss  = -min(ratio * A, clamp(ratio, 1 - clip, 1 + clip_high) * A) + beta * kl
        kl    = exp(ref - logp) - (ref - logp) - 1        (k3: never negative, and unbiased)

    logps, old, ref [B, T]; advantages [B]. old None: the policy that wrote the answers is the one
    that learns, as in a first update. ref None: no KL.
    clip_high   None: clip (DAPO, 2503.14476, has 0.28 for 0.2).
    ratio_cap   the unclipped ratio is at most this, against steps that a bad answer makes endless.
    """
    if old is None:
        old = logps.detach()
    A = advantages[:, None]
    high = 1 + (clip if clip_high is None else clip_high)
    ratio = (logps - old).exp()
    limited = ratio.clamp(1 - clip, high)
    whole = ratio if ratio_cap is None else ratio.clamp(max=ratio_cap)
    loss = -torch.minimum(whole * A, limited * A)
    clipped = (ratio < 1 - clip) & (A < 0) | (ratio > high) & (A > 0)
    kl = torch.zeros_like(logps)
    if ref is not None:
        kl = (ref - logps).exp() - (ref - logps) - 1
    return Terms(loss + beta * kl, kl, clipped)


def check_shapes(shape, advantages, **tensors):
    """ValueError unless advantages are [B] and all of the tensors, None aside, are of this shape,
    [B, T]: others would be repeated until they fit, and the sum would be of something else."""
    wanted = {"advantages": list(shape[:1]), **dict.fromkeys(tensors, list(shape))}
    for name, tensor in {"advantages": advantages, **tensors}.items():
        if tensor is not None and list(tensor.shape) != wanted[name]:
            raise ValueError(f"{name} must have shape {wanted[name]}, got {list(tensor.shape)}")


MEANS = ("tokens", "answers", "constant")


def token_weights(answer, mean="tokens"):
    """What the term of each token counts, float [B, T], so that a loss is a plain sum; answer bool
    [B, T].

    mean  "tokens": all tokens count alike, long answers more (DAPO); "answers": every answer alike
          (GRPO); "constant": a sum over B T, however long answers are (Dr. GRPO).
    """
    if mean not in MEANS:
        raise ValueError(f"mean must be one of {', '.join(MEANS)}, got {mean!r}")
    answer = answer.float()
    if mean == "tokens":
        return answer / answer.sum().clamp(min=1)
    if mean == "answers":
        return answer / answer.sum(1, keepdim=True).clamp(min=1) / len(answer)
    return answer / answer.numel()


def policy_loss(logps, old, ref, advantages, answer, clip=0.2, beta=0.0, clip_high=None,
                ratio_cap=None, mean="tokens"):
    """The loss of GRPO, a scalar: the mean of `policy_terms` over all answer tokens, or another
    one, see `token_weights`. logps, old, ref float [B, T]; advantages [B]; answer bool [B, T].
    Raises ValueError for other shapes."""
    check_shapes(logps.shape, advantages, answer=answer, old=old, ref=ref)
    answer = answer.bool()
    # What stands outside of the answers may be anything, even nan.
    logps = torch.where(answer, logps, 0)
    old = None if old is None else torch.where(answer, old, 0)
    ref = None if ref is None else torch.where(answer, ref, 0)
    terms = policy_terms(logps, old, ref, advantages, clip, beta, clip_high, ratio_cap)
    return (token_weights(answer, mean).to(logps) * terms.loss).sum()


def wd1_weights(advantages, negative=True):
    """What log p of each answer counts in wd1's loss, float [B] for advantages [B] of all answers
    of a step (arXiv 2507.08838):

        softmax(-A) - softmax(A)

    Good answers are made more probable, the best most, and bad ones less; without `negative` only
    the former.
    """
    weights = -advantages.softmax(dim=0)
    if negative:
        weights = weights + (-advantages).softmax(dim=0)
    return weights


def wd1_loss(logps, advantages, answer, negative=True):
    """wd1's loss, a scalar: sum over answers of `wd1_weights` times log p; no ratio, no clipping,
    no length. logps float [B, T]; advantages [B]; answer bool [B, T]. Raises ValueError for other
    shapes."""
    check_shapes(logps.shape, advantages, answer=answer)
    totals = torch.where(answer.bool(), logps, 0).sum(1)                                # [B]
    return (wd1_weights(advantages, negative).to(totals) * totals).sum()


def spg_terms(found, weight, advantages, mix=0.5, beta=1.5):
    """What each token adds to SPG's loss, float [B, T] (arXiv 2510.09541): a good answer's lower
    bound on log p is raised, a bad one's upper bound lowered.

        lower_i = sum_k weight_k,i * log p_k,i
        upper_i = 1/beta * log sum_k weight_k,i * p_k,i^beta        (Renyi; up to a constant)
        loss_i  = -A * lower_i                                      where A >= 0
                  -A * (mix * upper_i + (1 - mix) * lower_i)        where A < 0

    found float [K, B, T], what `view_logps` says; weight [K, B, T], not negative, of the views of
    `bound`; advantages [B]. A token that no view masks adds nothing. A lower bound that is lowered
    has no floor: the model finds the answers whose bound is loose, not those that are bad.
    """
    asked = (weight > 0).any(0)                                                         # [B, T]
    lower = (weight * found).sum(0)
    powers = torch.where(weight > 0, weight.clamp(min=1e-30).log() + beta * found, -torch.inf)
    powers = torch.where(asked, powers, 0.0)            # logsumexp of -inf alone has no gradient
    upper = torch.where(asked, powers.logsumexp(0) / beta, 0.0)
    A = advantages[:, None]
    return -A * torch.where(A < 0, mix * upper + (1 - mix) * lower, lower)


def spg_loss(found, weight, advantages, answer, mix=0.5, beta=1.5, mean="tokens"):
    """SPG's loss, a scalar: the mean of `spg_terms` over all answer tokens, or another one, see
    `token_weights`. Raises ValueError for shapes that do not fit."""
    check_shapes(found.shape[1:], advantages, answer=answer)
    terms = spg_terms(found, weight, advantages, mix, beta)
    return (token_weights(answer, mean).to(terms) * terms).sum()
