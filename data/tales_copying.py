"""Does a model look back? A mention of a tale's thing is hidden, and the others tell what it was.

In "Tom had a red kite. ... In the end Tom gave the [MASK] to Mia." nothing but the earlier "kite"
says what is missing, for all things take part in the same events. A model that has only learned
which words go together gives each of them the same small probability, however good its loss is.
"""
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from data.tales_world import THINGS


@dataclass
class HiddenThings:
    """Windows of N tales, each from the end of text before it on, and what is hidden of them."""
    tokens: torch.Tensor        # int64 [N, T]
    hidden: torch.Tensor        # bool [N, T]: the mentions that are hidden
    target: torch.Tensor        # bool [N, T]: the one of them that is asked for, never the first
    distance: torch.Tensor      # int64 [N]: tokens from it to the nearest mention that is not hidden


def hidden_things(ids, tokenizer, seq_len, count=64, visible=None, seed=5):
    """HiddenThings of the first tales in a split's ids (TokenDataset.val), `count` at most.

    visible: so many other mentions of the thing are left, and the rest are hidden too; None: all
    are left. Raises ValueError where there is no such tale in windows of seq_len tokens.
    """
    nouns = [tokenizer.encode(f" {noun}") for noun in THINGS]
    nouns = {tokens[0] for tokens in nouns if len(tokens) == 1}
    rng, rows = random.Random(seed), []
    ends = np.flatnonzero(np.asarray(ids) == tokenizer.eos_token_id).tolist()
    for begin, end in zip(ends, ends[1:]):
        window = [int(token) for token in ids[begin:begin + seq_len]]
        things = Counter(token for token in window[:end - begin] if token in nouns)
        if end - begin > seq_len or len(window) < seq_len or not things:
            continue
        thing, mentions = things.most_common(1)[0]
        if mentions < 2 + (visible or 1):
            continue
        places = [i for i in range(end - begin) if window[i] == thing]
        rows.append(hide(window, places, visible, rng))
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"no tale with a thing in {seq_len} tokens: take a larger seq_len")
    tokens, hidden, target, distance = zip(*rows)
    return HiddenThings(torch.tensor(tokens), torch.stack(hidden), torch.stack(target),
                        torch.tensor(distance))


def hide(window, places, visible, rng):
    """A row of each field of HiddenThings, for a thing that stands at these places."""
    target = rng.choice(places[1:])
    others = [place for place in places if place != target]
    kept = others if visible is None else rng.sample(others, visible)
    hidden, asked = torch.zeros(2, len(window), dtype=torch.bool)
    hidden[[place for place in places if place not in kept]] = True
    asked[target] = True
    return window, hidden, asked, min(abs(place - target) for place in kept)
