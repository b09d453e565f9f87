"""Even loads for the experts of a mixture, by a loss or without one.

A router that is left to itself sends most tokens to the few experts that happened to learn first,
and the others learn nothing. Two remedies:

    balance_loss     an auxiliary loss that pulls at the scores (Switch, Fedus et al. 2021,
                     2101.03961, eq. 4)
    move_biases      biases that take part in the choice alone and are moved by hand, against the
                     load; no gradient but the model's own (Wang et al. 2024, 2408.15664)

Both read what the last training pass left in `Experts.load` and `Experts.mean_score`.
"""
import torch
import torch.distributed as dist

from model import Experts


def mixtures(model):
    """The `Experts` of a model, from the first layer on."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def balance_loss(model):
    """The mean over the layers of

        E * sum over experts e of load_e * score_e

    load_e: the expert's share of the tokens; score_e: its mean share of the scores, through which
    the gradient goes. 1 if either is even; more if the expert with the larger load has the larger
    score, too. A scalar with gradient; Hugging Face's router_aux_loss_coef weighs k times it.
    """
    losses = []
    for layer in mixtures(model):
        share = layer.load / layer.load.sum()
        losses.append(len(share) * (share * layer.mean_score).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def move_biases(model, rate, counts=None):
    """Raise the bias of each expert that had less than its part of the tokens by `rate`, lower that
    of each that had more; over all processes. counts: the sum of `expert_counts` over the passes of
    the update; None: there was but one."""
    loads = expert_counts(model) if counts is None else counts.clone()              # [layers, E]
    if dist.is_initialized():
        dist.all_reduce(loads)
    for layer, load in zip(mixtures(model), loads.float()):
        layer.router_bias += rate * (load.mean() - load).sign()


def expert_counts(model):
    """int64 [layers, E]: how many tokens of the last training pass each expert had."""
    return torch.stack([layer.load for layer in mixtures(model)])


def expert_loads(model):
    """float [layers, E]: each expert's share of the tokens of the last training pass."""
    loads = expert_counts(model).float()
    return loads / loads.sum(1, keepdim=True)
