"""Room for new tokens in a model that was trained without them."""
import torch
import torch.nn as nn

from common import stream


@torch.no_grad()
def resize_vocabulary(model, vocab_size, new=(), seed=None):
    """Make room for at least vocab_size tokens. Rows that are added, and those of the ids `new`,
    become the mean of all others: a new token is as likely as an average one. Returns the model.

    A published vocabulary is often padded, so that a new token's row exists already, untrained.
    seed: the rows are not the mean but drawn from N(mean, variance) of the others, and so differ.
    For adapters, which leave embedding and head as they are: of tokens whose rows are equal none is
    ever told from another, nor <|im_end|> written rather than <|im_start|>.
    """
    generator = None if seed is None else stream("rows of new tokens", seed)
    V, tied = model.config.vocab_size, model.config.tie_embeddings
    size = max(vocab_size, V)
    known = torch.ones(V, dtype=torch.bool)
    known[[token for token in new if token < V]] = False

    def grown(weight):                                              # [V] or [V, D]
        rows = weight.new_empty(size, *weight.shape[1:]).copy_(weight[known].mean(0))
        if generator is not None:
            is_new = torch.ones(size, dtype=torch.bool)
            is_new[:V] = ~known
            noise = torch.randn(is_new.sum(), *weight.shape[1:], generator=generator)
            rows[is_new] += (weight[known].float().std(0) * noise).to(rows)
        rows[:V][known] = weight[known]
        return nn.Parameter(rows)

    model.embed.weight, model.embed.num_embeddings = grown(model.embed.weight), size
    model.head.weight = model.embed.weight if tied else grown(model.head.weight)
    model.head.out_features = size
    if model.head.bias is not None:
        model.head.bias = grown(model.head.bias)
    model.config.vocab_size = size
    return model
