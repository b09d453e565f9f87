"""Does a model look back? A mention of a tale's thing is hidden, and the others tell what it was.

In "Tom had a red kite. ... In the end Tom gave the [MASK] to Mia." nothing but the earlier "kite"
says what is missing, for all things take part in the same events. A model that has only learned
which words go together gives each of them the same small probability, however good its loss is.
"""
import random
from dataclasses import dataclass

import numpy as np
import torch

from data.tales_world import THINGS


@dataclass
class HiddenThings:
    """Windows of N tales, each from the end of text before it on, and what is hidden of them."""
    tokens: torch.Tensor        # int64 [N, T]
    hidden: torch.Tensor        # bool [N, T]: the mentions that are hidden
    target: torch.Tensor        # bool [N, T]: the one that is asked for, never the first
    distance: torch.Tensor      # int64 [N]: tokens from it to the nearest one that is not hidden


def hidden_things(ids, tokenizer, seq_len, count=64, visible=None, seed=5, words=THINGS):
    """HiddenThings of the first tales in a split's ids (TokenDataset.val), `count` at most; None if
    none fits into seq_len tokens.

    visible: so many other mentions of the thing are left, and the rest are hidden too; None: all
    are left. words: what may be hidden, properties or names in place of things; of several that a
    tale has the one that it names most often.
    """
    nouns = [tokenizer.encode(f" {word}") for word in words]
    rng, rows = random.Random(seed), []
    ends = np.flatnonzero(np.asarray(ids) == tokenizer.eos_token_id).tolist()
    for begin, end in zip(ends, ends[1:]):
        window = [int(token) for token in ids[begin:begin + seq_len]]
        if end - begin > seq_len or len(window) < seq_len:
            continue
        mentions = max((find(noun, window[:end - begin]) for noun in nouns), key=len)
        if len(mentions) >= 2 + (visible or 1):
            rows.append(hide(window, mentions, visible, rng))
        if len(rows) == count:
            break
    if not rows:
        return None
    tokens, hidden, target, distance = zip(*rows)
    return HiddenThings(torch.tensor(tokens), torch.stack(hidden), torch.stack(target),
                        torch.tensor(distance))


def find(noun, window):
    """The slices of a list of ids that are those of a noun."""
    size = len(noun)
    starts = [i for i, token in enumerate(window) if token == noun[0]]
    return [slice(i, i + size) for i in starts if window[i:i + size] == noun]


def hide(window, mentions, visible, rng):
    """A row of each field of HiddenThings, for a thing that stands in these slices."""
    target = rng.choice(mentions[1:])
    others = [mention for mention in mentions if mention != target]
    kept = others if visible is None else rng.sample(others, visible)
    hidden, asked = torch.zeros(2, len(window), dtype=torch.bool)
    for mention in mentions:
        hidden[mention] = mention not in kept
    asked[target] = True
    return window, hidden, asked, min(abs(mention.start - target.start) for mention in kept)
