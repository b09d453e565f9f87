"""How the sets of hidden tokens are chosen when log p(answer) is asked for, and what is made of the model's answers.

A masked diffusion model gives a bound on log p: the average, over all sets of k of the L tokens and then over k, of L / k * nll of the
hidden ones (LLaDA, arXiv 2502.09992, eq. 6). It has to be sampled. LLaDA draws k and then k tokens, independently each time. Three things
make the same number of passes say more (tests/bench.py eval measures them). "stratified" spreads k evenly. "dealt" deals the tokens like
cards, so that consecutive sets complement each other and every token is asked equally often; and it asks about each token how much easier
it is than with the whole target hidden, a number that one pass knows exactly (a control variate, and the stratum k = L as well). Where
there are no more sets than passes, all are taken.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Design:
    """Sets of hidden tokens and what to make of the answers. Each group of sets is an estimate by itself, independent of the others."""
    masks: torch.Tensor                 # bool [M, L]: the different sets
    row: torch.Tensor                   # int64 [n]: which of them each sample is
    weights: torch.Tensor               # float64 [n]: of the sum of a sample's nll in the estimate of its group
    group: torch.Tensor                 # int64 [n]
    control: torch.Tensor | None = None     # float64 [groups, L]: weights of the nll with all hidden, sample 0
    exact: bool = False

    def estimate(self, nll):
        """(-log p, its standard error) from nll [M, L], which is 0 where nothing was hidden."""
        groups = torch.zeros(int(self.group.max()) + 1, dtype=torch.float64).index_add(0, self.group, nll.sum(1)[self.row] * self.weights)
        if self.control is not None:
            groups = groups + self.control @ nll[self.row[0]]
        if len(groups) == 1:
            return groups[0], torch.tensor(0.0 if self.exact else math.nan)
        return groups.mean(), groups.std() / math.sqrt(len(groups))


def choose_sets(L, n, estimator, generator, chain_rule=False, given=True):
    """The Design of n samples for a target of L tokens. chain_rule: one pass of an autoregressive model, which predicts the first token if `given` a prefix."""
    if chain_rule or L == 1:
        masks = torch.arange(L)[None] >= int(chain_rule and not given)
        return Design(masks, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64), exact=True)
    masks, weights, group, *control = ESTIMATORS[estimator](L, n, generator)
    masks, row = masks.unique(dim=0, return_inverse=True)           # a set drawn twice is asked once
    return Design(masks, row, weights, group, *control, exact=estimator != "llada" and 2**L - 1 <= n)


def every_set(L):
    """All 2^L - 1 sets, a set of k with weight (k-1)! (L-k)! / L!."""
    masks = (torch.arange(1, 2**L)[:, None] >> torch.arange(L) & 1).bool()
    weights = torch.tensor([1 / (k * math.comb(L, k)) for k in masks.sum(1).tolist()], dtype=torch.float64)
    return masks, weights, torch.zeros(len(masks), dtype=torch.int64)


def llada_sets(L, n, generator):
    """k uniform on 1..L, then a set of k (LLaDA, eq. 6). Each sample is a group."""
    k = torch.randint(1, L + 1, (n,), generator=generator)
    return _subsets(k, L, generator), L / k.double(), torch.arange(n)


def stratified_sets(L, n, generator):
    """The same with k evenly spread over the samples of a group."""
    if 2**L - 1 <= n:
        return every_set(L)
    group, k, _ = _spread(torch.ones(L), n, generator)
    return _subsets(k, L, generator), L / k.double() / group.bincount()[group], group


def dealt_sets(L, n, generator):
    """k evenly spread and smaller ones more often, sets dealt from a deck, differences from the nll with all hidden (sample 0)."""
    if 2**L - 1 <= n:
        return every_set(L)
    if n < 3:
        return llada_sets(L, n, generator)
    group, k, p = _spread(torch.arange(1, L) ** -0.5, n - 1, generator)                             # a set of k says more the larger k is
    masks = torch.cat([_deal(k[group == g].tolist(), L, generator) for g in group.unique()])        # [n - 1, L]
    weights = (1 / k.double() / p[k - 1]) / group.bincount()[group]                                 # of the strata 1..L-1, for 1/L of each
    # How much of the nll with all hidden is subtracted: the more, the more is hidden. What is subtracted comes back as its exact mean.
    share = (1 + torch.arange(1, L, dtype=torch.float64) / L) / 2                                   # [L - 1]
    taken = torch.zeros(int(group.max()) + 1, L, dtype=torch.float64).index_add(0, group, (weights * share[k - 1])[:, None] * masks)
    control = (1 + share.sum()) / L - taken                                                         # [groups, L]
    everything = torch.ones(1, L, dtype=torch.bool)
    return torch.cat((everything, masks)), F.pad(weights, (1, 0)), F.pad(group, (1, 0)), control


ESTIMATORS = {"llada": llada_sets, "stratified": stratified_sets, "dealt": dealt_sets}


def _spread(density, n, generator):
    """(group, k, p): n numbers k = 1.. with probabilities p proportional to density, evenly spread within each of 4 to 8 groups."""
    groups = min(n, max(4, min(8, n // 16)))
    group = torch.arange(n) * groups // n                           # [n], sorted
    size = group.bincount()
    place = torch.arange(n) - (size.cumsum(0) - size)[group]        # in its group
    p = density.double() / density.sum()
    u = (torch.rand(groups, generator=generator, dtype=torch.float64)[group] + place) / size[group]
    return group, torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1) + 1, p


def _subsets(k, L, generator):
    """bool [n, L]: k [n] of L, each subset alike."""
    return torch.rand(len(k), L, generator=generator).argsort(1).argsort(1) < k[:, None]


def _deal(sizes, L, generator):
    """bool [n, L]: hands of these sizes from a deck of L cards that is shuffled anew whenever it runs out.

    A hand by itself is a subset like any other of its size, as the cards are alike to the dealer; together they go through the deck evenly.
    """
    masks, deck = torch.zeros(len(sizes), L, dtype=torch.bool), []
    for mask, size in zip(masks, sizes):
        hand, deck = deck[:size], deck[size:]
        if len(hand) < size:
            fresh, held = torch.randperm(L, generator=generator).tolist(), set(hand)
            hand += [card for card in fresh if card not in held][:size - len(hand)]
            held = set(hand) - held
            deck = [card for card in fresh if card not in held]
        mask[hand] = True
    return masks
