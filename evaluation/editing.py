"""The bound of a model that edits (train_edits.py) on the texts of a data set: the figure of that
recipe's last line. Of edit flows it is that where their source is mixed, nothing or masks."""
import torch

import common
from data.damage import SOURCES, SourceSettings
from data.documents import Documents
from diffusion import nelbo
from edit_tokens import fit
from edits import align_answer, edit_nelbo, stack
from sampling.editing import begun


def texts_to_write(sampler, data, seq_len, max_tokens):
    """The first documents of the validation split of `data`, a TokenDataset, with at most so many
    tokens together: lists of tokens, each after the one that a text begins with; what is longer
    than seq_len is cut. Raises ValueError for a tokenizer that has no such token."""
    first = begun(sampler, [])
    if not first:
        raise ValueError(f"the tokenizer of {sampler.name} has no token to begin a text with (bos "
                         "or eos)")
    return Documents(data, first[0], seq_len).some("val", max_tokens)


def bound_of_edits(sampler, texts, seed):
    """(bound on -log p(text) in nats per token, its standard error) of texts that are written out
    of nothing or, by a model that was trained so, out of masks."""
    config = sampler.config
    how = SourceSettings([], config.mask_token_id, config.edit_masks)
    source = SOURCES["masks" if config.edit_masks else "nothing"]
    pairs = stack([align_answer(source(x_1, None, how), x_1, 1) for x_1 in texts])      # [N, Z]
    return edit_nelbo(sampler.model, *pairs, seed=seed, run_passes=common.share)


def bound_of_blocks(model, texts, length, end, seed, num_samples=1):
    """(bound on -log p(text) in nats per token, its standard error) of texts that are written by a
    model that edits by tokens: the bound of masks on whole blocks of so many tokens, in which the
    token `end` follows a text until the block is full."""
    blocks = torch.tensor([fit(x_1 + [end], length, end) for x_1 in texts])             # [N, L]
    written = torch.arange(length).expand(blocks.shape) > 0             # all but the first token
    device = next(model.parameters()).device
    value, error = nelbo(model, blocks.to(device), num_samples, seed, maskable=written,
                         run_passes=common.share)
    positions_per_token = int(written.sum()) / sum(map(len, texts))
    return value * positions_per_token, error * positions_per_token
