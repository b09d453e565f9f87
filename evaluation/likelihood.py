"""log p(target | prefix) of many texts, for evaluation: LLaDA's bound by few passes, with its
error.

A masked diffusion model gives a bound on log p: the average, over all sets of k of the L target
tokens and then over k = 1..L, of L / k * nll of the hidden ones (LLaDA, arXiv 2502.09992, eq. 6).
It has to be sampled. `Design` is a choice of sets and what to make of the model's answers. LLaDA
draws k and then k tokens, independently each time. Three things make the same number of passes say
more (experiments/bench.py eval measures them): "stratified" spreads k evenly; "dealt" deals the
tokens like cards, so that consecutive sets complement each other and every token is asked equally
often, and it asks of each token how much easier it is than with the whole target hidden, a number
that one pass knows exactly (a control variate). Where there are no more sets than passes, all are
taken.

Shapes: N texts, L tokens of a target, M sets, B rows of a pass, T its positions.
"""
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import stream
from passes import check_tokens, config_of, mask_token_id, masked_nll, token_ids
from policy import Answers, masked_logps


@torch.no_grad()
def log_likelihood(model, prefixes, targets, num_samples=128, seed=0, estimator="dealt",
                   cfg_scale=0.0, streams=None, batch_size=4096, run_passes=map):
    """(log p(target | prefix) in nats float64 [N], standard errors [N]); prefixes and targets are
    lists of lists of tokens.

    Exact, with error 0, for autoregressive models, for targets of one token, and where num_samples
    passes can go through all 2^L - 1 sets; else an estimate. A block-diffusion model is asked block
    by block. The errors are nan where there is one sample only.

    estimator   which sets: a key of ESTIMATORS.
    cfg_scale   > 0: classifier-free guidance by the prefix (passes.guided).
    streams     an int for each request; requests of one stream and length draw the same sets. None:
                by their tokens.
    batch_size  tokens of a pass. Texts of like length share it, each with several of its sets.
    run_passes  the builtin map, or common.share, which divides the passes among processes.
    Raises ValueError for arguments that cannot be, naming them.
    """
    config, device = config_of(model), next(model.parameters()).device
    requests = []
    for prefix, target in zip(prefixes, targets, strict=True):
        requests.append(Request(token_ids(prefix), token_ids(target)))
    check(config, requests, num_samples, estimator, cfg_scale)
    for i, request in enumerate(requests):
        number = zlib.crc32(repr((request.prefix, request.target)).encode())
        if streams is not None:
            number = streams[i]
        generator = stream("hidden tokens of log_likelihood", seed, number)
        request.choose_sets(config, num_samples, estimator, generator)

    def run(batch):
        return ask(model, batch, device, cfg_scale)

    passes = batches(requests, batch_size)
    for batch, answers in zip(passes, run_passes(run, passes)):
        for (request, row), nll in zip(batch, answers):
            request.nll[row] = nll.double()
    values = torch.zeros(len(requests), dtype=torch.float64)
    errors = torch.zeros(len(requests), dtype=torch.float64)
    for i, request in enumerate(requests):
        values[i], errors[i] = request.estimate()
    return values, errors


def check(config, requests, num_samples, estimator, cfg_scale):
    longest = max((request.length for request in requests), default=0)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if cfg_scale < 0:
        raise ValueError(f"cfg_scale must not be negative, got {cfg_scale}")
    if cfg_scale > 0 and (config.causal or config.block_length):
        raise ValueError("cfg_scale is for bidirectional models only")
    if longest > config.max_len:
        raise ValueError(f"{longest} tokens, prefix and target, exceed the context of "
                         f"{config.max_len}")
    check_tokens(config, [request.prefix + request.target for request in requests])


class Request:
    """A text to score: which of its tokens are hidden in which pass, and the answers."""

    def __init__(self, prefix, target):
        self.prefix, self.target = prefix, target
        self.length = len(prefix) + len(target)
        self.designs = []       # of each block of the target, in order

    def choose_sets(self, config, num_samples, estimator, generator):
        for L in block_sizes(config, len(self.prefix), len(self.target)):
            self.designs.append(choose_sets(L, num_samples, estimator, generator, config.causal,
                                            bool(self.prefix)))
        passes = max((len(design.masks) for design in self.designs), default=0)
        # Row r of a pass hides the r-th set of every block; a block with fewer sets hides nothing.
        parts = [F.pad(d.masks, (0, 0, 0, passes - len(d.masks))) for d in self.designs]
        self.masks = torch.cat(parts, dim=1) if parts else torch.zeros(0, 0, dtype=torch.bool)
        self.nll = torch.zeros(self.masks.shape, dtype=torch.float64)       # [passes, L]

    def estimate(self):
        """(log p, its standard error). Blocks draw independently: their variances add up."""
        value, variance, start = 0.0, 0.0, 0
        for design in self.designs:
            M, L = design.masks.shape
            nats, error = design.estimate(self.nll[:M, start:start + L])
            value, variance, start = value - nats, variance + error**2, start + L
        return value, math.sqrt(variance)


def block_sizes(config, start, L):
    """How many of the L tokens from position `start` on lie in each block."""
    if not L:
        return []
    if not config.block_length or config.causal:
        return [L]
    first_border = (start // config.block_length + 1) * config.block_length
    cuts = [start, *range(first_border, start + L, config.block_length), start + L]
    return [end - begin for begin, end in zip(cuts, cuts[1:])]


def batches(requests, batch_size):
    """All (request, row) pairs in passes of at most batch_size tokens, the longest texts first."""
    work = [(request, row) for request in requests for row in range(len(request.masks))]
    work.sort(key=lambda pair: -pair[0].length)
    passes = []
    for pair in work:
        if not passes or (len(passes[-1]) + 1) * passes[-1][0][0].length > batch_size:
            passes.append([])
        passes[-1].append(pair)
    return passes


def ask(model, batch, device, cfg_scale):
    """The nll of the targets, a float32 [L] for each (request, row)."""
    B, T = len(batch), max(request.length for request, _ in batch)
    tokens = torch.zeros(B, T, dtype=torch.int64)
    mask, given = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    for b, (request, row) in enumerate(batch):
        tokens[b, :request.length] = torch.tensor(request.prefix + request.target)
        given[b, :len(request.prefix)] = True
        mask[b, len(request.prefix):request.length] = request.masks[row]
    lengths = torch.tensor([request.length for request, _ in batch])
    shown = None
    if (lengths < T).any():
        shown = (torch.arange(T) < lengths[:, None]).to(device)
    tokens, mask = tokens.to(device), mask.to(device)
    if cfg_scale:
        nll = guided_nll(model, tokens, mask, shown, given.to(device), cfg_scale).cpu()
    else:
        nll = masked_nll(model, tokens, mask, shown).cpu()
    answers = []
    for b, (request, _) in enumerate(batch):
        answers.append(nll[b, len(request.prefix):request.length].clone())
    return answers


def guided_nll(model, tokens, mask, attention_mask, given, cfg_scale):
    """`masked_nll` of a bidirectional model with classifier-free guidance, [B, T]; given [B, T]:
    the prefix."""
    mask_id = mask_token_id(model)
    noisy = torch.where(mask, mask_id, tokens)
    without_prefix = torch.where(given, mask_id, noisy)
    shown = torch.ones_like(mask) if attention_mask is None else attention_mask
    answers = Answers(tokens, given, mask, shown)
    return -masked_logps(model, noisy, answers, mask, without_prefix, cfg_scale)


# --------------------------------------------------------------------------------------------------
# Designs: which sets are hidden


@dataclass
class Design:
    """n samples, each a set of hidden tokens, and what to make of the model's answers.

    Samples that hide the same tokens are asked once: `masks` has the M different sets. With nll(s)
    the nats of all tokens that sample s hides, in the pass that hides them,

        estimate of a group = sum over its samples s of weights_s * nll(s)
                              + sum over tokens i of control_i * nll_i with all tokens hidden

    estimates -log p, each group by itself and independently of the others.
    """
    masks: torch.Tensor         # bool [M, L]: true is hidden
    set_of: torch.Tensor        # int64 [n]: the row of `masks` that a sample is
    weights: torch.Tensor       # float64 [n]
    group: torch.Tensor         # int64 [n]: the group that a sample belongs to
    control: torch.Tensor = None    # float64 [groups, L]; needs sample 0 to hide all; None: zeros
    exact: bool = False         # the one group has all sets there are: no error

    def estimate(self, nll):
        """(-log p, its standard error) from nll float64 [M, L], 0 where nothing was hidden."""
        groups = torch.zeros(int(self.group.max()) + 1, dtype=torch.float64)
        groups.index_add_(0, self.group, nll.sum(1)[self.set_of] * self.weights)
        if self.control is not None:
            groups = groups + self.control @ nll[self.set_of[0]]
        if len(groups) == 1:
            return groups[0].item(), 0.0 if self.exact else math.nan
        return groups.mean().item(), groups.std().item() / math.sqrt(len(groups))

    def token_weights(self):
        """float64 [M, L]: what each entry of nll counts in the mean over groups."""
        groups = int(self.group.max()) + 1
        counted = torch.zeros(self.masks.shape, dtype=torch.float64)
        counted.index_add_(0, self.set_of, self.weights[:, None].expand(-1, self.masks.shape[1]))
        if self.control is not None:
            counted[self.set_of[0]] += self.control.sum(0)
        return counted * self.masks / groups


def choose_sets(L, n, estimator, generator, chain_rule=False, given=True):
    """The Design of n samples for a target of L tokens. chain_rule: one pass of an autoregressive
    model, which predicts the first token if a prefix is `given`."""
    if chain_rule or L == 1:
        masks = torch.ones(1, L, dtype=torch.bool)
        masks[0, 0] = given or not chain_rule
        zero = torch.zeros(1, dtype=torch.int64)
        return Design(masks, zero, torch.ones(1, dtype=torch.float64), zero, exact=True)
    design = ESTIMATORS[estimator](L, n, generator)
    design.masks, design.set_of = design.masks.unique(dim=0, return_inverse=True)
    design.exact = estimator != "llada" and 2**L - 1 <= n
    return design


def every_set(L):
    """All 2^L - 1 sets, a set of k with weight (k-1)! (L-k)! / L!."""
    masks = (torch.arange(1, 2**L)[:, None] >> torch.arange(L) & 1).bool()
    sizes = masks.sum(1).tolist()
    weights = torch.tensor([1 / (k * math.comb(L, k)) for k in sizes], dtype=torch.float64)
    one_group = torch.zeros(len(masks), dtype=torch.int64)
    return Design(masks, torch.arange(len(masks)), weights, one_group)


def llada_sets(L, n, generator):
    """k uniform on 1..L, then a set of k (LLaDA, eq. 6). Each sample is a group."""
    k = torch.randint(1, L + 1, (n,), generator=generator)
    return Design(subsets(k, L, generator), torch.arange(n), L / k.double(), torch.arange(n))


def stratified_sets(L, n, generator):
    """The same with k evenly spread over the samples of a group."""
    if 2**L - 1 <= n:
        return every_set(L)
    group, k, _ = spread(torch.ones(L), n, generator)
    weights = L / k.double() / group.bincount()[group]
    return Design(subsets(k, L, generator), torch.arange(n), weights, group)


def dealt_sets(L, n, generator):
    """Sets dealt from a deck, small ones more often, and differences from the nll with all hidden,
    which sample 0 asks for. With S_k a set of k tokens drawn at random,

        bound = 1/L nll(all) + sum over k < L of 1/k E[nll(S_k)]
              = (1 + sum of c_k) / L nll(all) + sum over k < L of 1/k E[nll(S_k) - c_k nll_0(S_k)]

    for any numbers c_k, where nll_0(S) are the nats of the tokens of S with all hidden: on average
    over S_k, nll_0(S_k) / k is nll(all) / L, which is known. What is left in the expectation varies
    less, for a token that is hard in one pass is hard in the other (a control variate).
    """
    if 2**L - 1 <= n:
        return every_set(L)
    if n < 3:
        return llada_sets(L, n, generator)
    # k is drawn with probability p_k: a large set says more, so small ones are asked more often.
    group, k, p = spread(torch.arange(1, L) ** -0.5, n - 1, generator)
    dealt = [deal(k[group == g].tolist(), L, generator) for g in group.unique()]
    masks = torch.cat([torch.ones(1, L, dtype=torch.bool), *dealt])                     # [n, L]
    weights = (1 / k.double() / p[k - 1]) / group.bincount()[group]                     # [n - 1]
    # c_k: the more is hidden, the more alike are the two passes.
    c = (1 + torch.arange(1, L, dtype=torch.float64) / L) / 2                           # [L - 1]
    subtracted = torch.zeros(int(group.max()) + 1, L, dtype=torch.float64)
    subtracted.index_add_(0, group, (weights * c[k - 1])[:, None] * masks[1:])
    control = (1 + c.sum()) / L - subtracted                                       # [groups, L]
    first = (1, 0)              # sample 0 stands before the others; its weight is in `control`
    return Design(masks, torch.arange(n), F.pad(weights, first), F.pad(group, first), control)


ESTIMATORS = {"llada": llada_sets, "stratified": stratified_sets, "dealt": dealt_sets}


def sharp_sets(L, num_samples, generator):
    """(masks bool [M, L], weights float [M, L]) of dealt sets, for policy.bound."""
    design = choose_sets(L, num_samples, "dealt", generator)
    return design.masks, design.token_weights().float()


def spread(density, n, generator):
    """(group [n], k [n], p): n numbers k = 1.. with probabilities p proportional to density, evenly
    spread within each of 4 to 8 groups."""
    groups = min(n, max(4, min(8, n // 16)))
    group = torch.arange(n) * groups // n                           # sorted
    size = group.bincount()
    place = torch.arange(n) - (size.cumsum(0) - size)[group]        # in its group
    p = density.double() / density.sum()
    offset = torch.rand(groups, generator=generator, dtype=torch.float64)
    u = (offset[group] + place) / size[group]
    k = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1) + 1
    return group, k, p


def subsets(k, L, generator):
    """bool [n, L]: k [n] of L, each subset alike."""
    order = torch.rand(len(k), L, generator=generator).argsort(1).argsort(1)
    return order < k[:, None]


def deal(sizes, L, generator):
    """bool [n, L]: hands of these sizes from a deck of L cards that is shuffled anew whenever it
    runs out.

    A hand by itself is a subset like any other of its size, as the cards are alike to the dealer;
    together they go through the deck evenly.
    """
    masks, deck = torch.zeros(len(sizes), L, dtype=torch.bool), []
    for mask, size in zip(masks, sizes):
        hand, deck = deck[:size], deck[size:]
        missing = size - len(hand)
        if missing:
            fresh = torch.randperm(L, generator=generator).tolist()
            others = [card for card in fresh if card not in hand]
            hand, deck = hand + others[:missing], [c for c in fresh if c not in others[:missing]]
        mask[hand] = True
    return masks
