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
def move_biases(model, rate):
    """Raise the bias of each expert that had less than its part of the tokens by `rate`, lower that
    of each that had more; over all processes."""
    for layer in mixtures(model):
        load = layer.load.float()
        if dist.is_initialized():
            dist.all_reduce(load)
        layer.router_bias += rate * (load.mean() - load).sign()


def expert_loads(model):
    """float [layers, E]: each expert's share of the tokens of the last training pass."""
    loads = torch.stack([layer.load.float() for layer in mixtures(model)])
    return loads / loads.sum(1, keepdim=True)
