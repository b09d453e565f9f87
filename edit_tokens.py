"""Edits as tokens: one head whose words are edits, as LLaDA2.1 and 2.2 have it.

A model of masks learns to say of every position of a block what shall stand there, of masks and of
wrong tokens alike (LLaDA2.1, arXiv 2602.08676). With two more words in its vocabulary it can also
say that a token shall go, or that something is missing before it (LLaDA2.2's Levenshtein editing,
technical report of 2026). Unlike Edit Flows (edits.py) it has one head and is not told the time; a
block keeps its length, by masks at its end or by losing what stands there.

As in edits.py, x_0 is the text to begin with, x_1 the finished one and x_t what the model reads.
Pure functions of lists and tensors; sampling/correcting.py samples with them.
"""
from dataclasses import dataclass

import torch

import kernels
from diffusion import Loss
from edits import Written
from passes import config_of, token_ids, weighted_nll


@dataclass
class Orders:
    """Tokens that no finished text holds."""
    mask: int
    delete: int | None = None   # as a label: the token that stands here goes
    insert: int | None = None   # as a label: a mask comes before the token that stands here

    def __post_init__(self):
        if (self.delete is None) != (self.insert is None):
            raise ValueError("a model has both delete_token_id and insert_token_id, or neither")


def orders_of(config):
    """The Orders of a model's Config."""
    return Orders(config.mask_token_id, config.delete_token_id, config.insert_token_id)


def edit_block(config):
    """The length of a model's blocks: the first token and the masks that a text to be written
    begins with. A model that was not trained here (LLaDA2.1) has its whole context."""
    if config.edit_masks:
        return min(1 + config.edit_masks, config.max_len)
    return config.max_len


def common_tokens(x_0, x_1):
    """The longest common subsequence of two lists, as the list of its places (i, j), x_0[i] ==
    x_1[j], in rising order. Of several it is the one that is found from the end by leaving out
    tokens of x_1 before those of x_0."""
    x_0, x_1 = token_ids(x_0), token_ids(x_1)
    if not kernels.PLAIN:
        return kernels.common_tokens(x_0, x_1)
    longest = [[0] * (len(x_1) + 1)]        # [i][j]: of the first i tokens and the first j
    for token in x_0:
        above, row = longest[-1], [0]
        for j, other in enumerate(x_1, 1):
            row.append(above[j - 1] + 1 if token == other else max(above[j], row[-1]))
        longest.append(row)
    i, j, places = len(x_0), len(x_1), []
    while i and j:
        if x_0[i - 1] == x_1[j - 1]:
            i, j = i - 1, j - 1
            places.append((i, j))
        elif longest[i][j - 1] == longest[i][j]:
            j = j - 1
        else:
            i = i - 1
    return places[::-1]


def edit_labels(x_t, x_1, orders):
    """What the model shall say of each token of x_t, so that x_t becomes x_1: a list of ids.

    Tokens of the longest common subsequence stay. Between two of them x_t has m tokens and x_1 n:
    one after the other they become those of x_1. If m > n the rest of them is deleted; if m < n the
    token after them is labelled `insert`:

        x_t     a  b  d  e
        label   a  x  I  D          x_1: a x c d

    That is one insertion a place. Where more is missing the next labels say so, those of what the
    first have made of x_t: see `apply_labels`. Behind the last token nothing can be inserted: let
    both texts end with the same one.
    """
    labels, i, j = [], 0, 0
    for i_next, j_next in [*common_tokens(x_t, x_1), (len(x_t), len(x_1))]:
        m, n = i_next - i, j_next - j
        labels += x_1[j:j + min(m, n)] + [orders.delete] * max(m - n, 0)
        if i_next < len(x_t):
            labels.append(orders.insert if m < n else x_t[i_next])
        i, j = i_next + 1, j_next + 1
    return labels


def fit(tokens, length, filler):
    """The first `length` tokens, with `filler` after them where there are fewer."""
    return tokens[:length] + [filler] * (length - len(tokens))


def spoiled(x_0, x_1, share, rng, length, end, orders):
    """(x_t, labels), lists of `length` ids: a block with the text x_0 in it, which shall become
    x_1, and what is to be said of each of its tokens. Both end with the token `end`, and more of
    them fill the block.

    share of its tokens, those after the first, are masked.
    Without orders.delete the label of a token is the one that stands there in x_1, so that after
    an insertion every token is wrong (LLaDA2.1's edits keep the length).
    """
    x_t, x_1 = x_0 + [end], x_1 + [end]
    labels = x_1
    if orders.delete is not None:
        labels = edit_labels(x_t, x_1, orders)
    x_t, labels = fit(x_t, length, end), fit(labels, length, end)
    for i in range(1, length):                          # the first token is given
        if rng.random() < share:
            x_t[i] = orders.mask
    return x_t, labels


def label_loss(model, x_t, labels):
    """The diffusion.Loss of blocks x_t and their labels, int64 [B, L] each: the mean over all
    positions but the first of -log p(label | x_t), nats.

    No weight makes it a bound: it is the loss of LLaDA2's stages of training, which counts the
    masks and the tokens to be edited alike.
    """
    counts = torch.ones_like(x_t, dtype=torch.bool)
    counts[:, 0] = False
    count = int(counts.sum())
    total, nll = weighted_nll(model, x_t, labels, counts, counts.float())
    masked = x_t == config_of(model).mask_token_id
    return Loss(total / count, nll, count, masked, masked.float().mean(1, keepdim=True))


def labels_to_apply(x, chosen, p, orders, threshold, edit_threshold, frozen, closed, minimum=1):
    """What a step does with a block x, int64 [L]: labels [L], those of x itself where it does
    nothing.

    chosen, p   what the model says of each position, and its probability, [L].
    A mask becomes what is chosen if p >= threshold, and in any case the `minimum` surest do.
    Another token is edited if p > edit_threshold (LLaDA2.1). frozen, closed bool [L]: tokens that
    stay, and after which nothing comes.
    """
    masked = x == orders.mask
    filled = masked & (p >= threshold)
    surest = torch.where(masked, p, -1.0).argsort(descending=True, stable=True)
    filled[surest[:min(minimum, int(masked.sum()))]] = True
    edited = ~masked & (chosen != x) & (p > edit_threshold) & ~frozen
    if orders.insert is not None:
        inserts = chosen == orders.insert
        edited = edited | (~masked & inserts & (p > edit_threshold))    # a frozen token stays, too
        before_first = torch.ones(1, dtype=torch.bool, device=x.device)
        shut = torch.cat((before_first, closed[:-1]))                   # nothing comes before it
        edited = edited & ~(inserts & shut)
        filled = filled & ~(inserts & shut)
    return torch.where(filled | edited, chosen, x)


def apply_labels(tokens, labels, orders):
    """The block that labels make of `tokens`, lists, as Written: as long as it was, with masks at
    its end or without what stood there."""
    new = Written([], [], [])

    def write(token, origin, edited):
        new.tokens.append(token)
        new.origin.append(origin)
        new.edited.append(edited)

    for i, (token, label) in enumerate(zip(tokens, labels)):
        if orders.insert is not None and label == orders.insert:
            write(orders.mask, None, True)
            write(token, i, False)
        elif orders.delete is None or label != orders.delete:
            write(label, i, label != token)
    while len(new.tokens) < len(tokens):
        write(orders.mask, None, True)
    length = len(tokens)
    return Written(new.tokens[:length], new.origin[:length], new.edited[:length])


def check_corrector(config):
    """ValueError for the Config of a model that cannot edit by tokens."""
    if config.edits or config.edit_threshold is None:
        raise ValueError("this model does not edit by tokens: train_edits.py --editing=tokens "
                         "makes one that does")
    if config.causal or config.block_length:
        raise ValueError("a model that reads from left to right or block by block edits while it "
                         "writes: it takes edit_threshold")
    if config.mask_token_id is None or config.eos_token_id is None:
        raise ValueError("a model that edits by tokens needs a mask, and an end of text that fills "
                         "its block: mask_token_id and eos_token_id of its config.json")
