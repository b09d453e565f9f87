"""Edits as tokens: a model of masks fills a block of text and writes anew what is wrong in it
(LLaDA2.1); one that has orders for it deletes and inserts as well (LLaDA2.2). Read edit_tokens.py
first.

Each pass reads all blocks that are not finished and does at once whatever the model is sure of. A
block is finished when no mask is left and nothing is edited. Two edits may undo each other for
ever: a block that stands as it stood before is settled, edited no more; its masks are filled with
tokens and that is all. (LLaDA2.2 draws another edit instead.)

Shapes: B rows, A of them at work, L tokens of a block, V vocabulary.
"""
import math
import warnings
from dataclasses import dataclass, field

import torch

from edit_tokens import apply_labels, check_corrector, edit_block, fit, labels_to_apply, orders_of
from edits import Written, carried, outgrown
from kernels import sample_tokens
from passes import config_of, prediction_rows, row_logits
from sampling.engine import row_streams
from sampling.rewriting import EditStep, check_values, protections

AT_ONCE = 32            # rows of a pass whose logits, [L, V] each, are in memory together
THRESHOLD = 0.9         # for masks; what is edited is LLaDA2.1's edit_threshold of the model


@dataclass
class Row:
    """A block at work."""
    tokens: list
    frozen: torch.Tensor        # bool [L]: stays as it is
    closed: torch.Tensor        # bool [L]: nothing comes after it
    stream: torch.Generator
    seen: set = field(default_factory=set)      # what stood there after each step
    is_settled: bool = False    # it is edited no more: masks become tokens, never orders
    is_done: bool = False


def correct(model, sequences, steps=64, prompt_lens=None, frozen=None, closed=None,
            threshold=THRESHOLD, edit_threshold=None, temperature=0.0, seed=None, on_step=None):
    """Fill the masks of each sequence and edit its tokens, in at most `steps` forward passes: list
    of token lists -> list of token lists. The last pass fills all masks that are left and edits
    nothing.

    A sequence is put into a block of the length that the model was trained with, ends of text
    after it; what comes back ends before the first of them.
    prompt_lens     for each row, so many tokens at its beginning are a prompt that stays; None: 0.
    frozen, closed  for each row lists of bool, in place of it: tokens that stay, and after which
                    nothing is inserted; None: those of its prompt.
    threshold       masks are filled where the model is as sure as this, and the surest anyway: an
                    equal share of them in each pass that is left.
    edit_threshold  tokens are edited where it is surer than this; None: the model's own.
    temperature     0: the most probable token; else masks become a sample of softmax(logits /
                    temperature).
    seed            row r draws from the stream (seed, r); a list: from (seed[r], 0).
    on_step         called with an `EditStep` after each pass.
    A row that would lose text at the end of its block is what it was before and edited no more,
    with a warning; its masks are filled. Raises ValueError for what cannot be.
    """
    config = config_of(model)
    check_corrector(config)
    check(config, sequences, steps, threshold, edit_threshold, temperature)
    frozen, closed = protections(sequences, prompt_lens, frozen, closed)
    L, rows = edit_block(config), []
    for tokens, stays, shuts, stream in zip(sequences, frozen, closed,
                                            row_streams(seed, len(sequences))):
        rows.append(Row(fit(list(tokens), L, config.eos_token_id),
                        torch.tensor(fit(list(stays), L, False)),
                        torch.tensor(fit(list(shuts), L, False)), stream))
    if edit_threshold is None:
        edit_threshold = config.edit_threshold
    corrector = Corrector(model, rows, threshold, edit_threshold, temperature)
    for number in range(1, steps + 1):
        changed = corrector.step(left=steps - number + 1)
        if on_step is not None:
            on_step(EditStep(number, number, changed))
        if all(row.is_done for row in rows):
            break
    return [text_of(row.tokens, config) for row in rows]


def check(config, sequences, steps, threshold, edit_threshold, temperature):
    """ValueError for what `correct` cannot do."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for name, value in (("threshold", threshold), ("edit_threshold", edit_threshold)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    for i, row in enumerate(sequences):
        if not 1 <= len(row) <= edit_block(config):
            raise ValueError(f"row {i} has {len(row)} tokens, and a block of this model from 1 to "
                             f"{edit_block(config)}")
    check_values(config, sequences, temperature)


def text_of(tokens, config):
    """A block's tokens up to the end of its text. The first token stands before every text, and may
    be an end itself."""
    for i, token in enumerate(tokens):
        if i and token in config.ends:
            return tokens[:i]
    return tokens


class Corrector:
    """One run of `correct`."""

    def __init__(self, model, rows, threshold, edit_threshold, temperature):
        self.model, self.config, self.rows = model, config_of(model), rows
        self.orders = orders_of(self.config)
        self.threshold, self.edit_threshold = threshold, edit_threshold
        self.temperature = temperature
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def step(self, left):
        """A pass over the rows at work, `left` of them with this one: for each row what was
        Written, or None."""
        changed = [None] * len(self.rows)
        work = [b for b, row in enumerate(self.rows) if not row.is_done]
        for begin in range(0, len(work), AT_ONCE):
            for b, labels in self.labels(work[begin:begin + AT_ONCE], left):
                changed[b] = self.write(self.rows[b], labels)
        return changed

    def labels(self, work, left):
        """(row, its labels) for each row of `work`."""
        x = torch.tensor([self.rows[b].tokens for b in work])                           # [A, L]
        chosen, p = self.predict(x, work, left == 1)
        for a, b in enumerate(work):
            row = self.rows[b]
            edit_threshold = self.edit_threshold
            if left == 1 or row.is_settled:
                edit_threshold = 1.0                    # which nothing exceeds
            minimum = math.ceil(row.tokens.count(self.orders.mask) / left)
            labels = labels_to_apply(x[a], chosen[a], p[a], self.orders, self.threshold,
                                     edit_threshold, row.frozen, row.closed, minimum)
            yield b, labels.tolist()

    def predict(self, x, work, is_last):
        """(tokens, their probabilities) that the model says of each position of x [A, L]. There are
        no orders in the last pass and in blocks that are settled."""
        A, L = x.shape
        where = torch.arange(A * L)
        read = prediction_rows(where, L, L, self.config.shift, 0)
        logits = row_logits(self.model, x.to(self.device), read.to(self.device)).cpu()
        logits[:, self.orders.mask] = -torch.inf                                        # [A L, V]
        if self.orders.delete is not None:
            fills_only = torch.tensor([is_last or self.rows[b].is_settled for b in work])
            fills_only = fills_only.repeat_interleave(L)                                # [A L]
            for order in (self.orders.delete, self.orders.insert):
                logits[fills_only, order] = -torch.inf
        chosen = logits.argmax(-1)
        if self.temperature > 0:
            u = torch.cat([torch.rand(L, generator=self.rows[b].stream, dtype=torch.float64)
                           for b in work])                                              # [A L]
            drawn = sample_tokens(logits, self.temperature, u)
            chosen = torch.where(x.flatten() == self.orders.mask, drawn, chosen)
        p = logits.softmax(-1).gather(1, chosen[:, None])[:, 0]
        return chosen.view(A, L), p.view(A, L)

    def write(self, row, labels):
        """Do what the labels say. Returns what was Written, of the text alone, or None for
        nothing."""
        if labels == row.tokens:
            row.is_done = self.orders.mask not in row.tokens
            return None
        new = apply_labels(row.tokens, labels, self.orders)
        kept = 1 + max((i for i in new.origin if i is not None), default=-1)
        lost = [token for token, label in zip(row.tokens[kept:], labels[kept:])
                if label != self.orders.delete and token != self.orders.mask]
        if not set(lost) <= set(self.config.ends):
            length = len(row.tokens)
            warnings.warn(outgrown(length + len(lost), length), stacklevel=5)
            row.is_settled = True
            return None
        before, row.tokens = len(text_of(row.tokens, self.config)), new.tokens
        row.frozen = carried(row.frozen, new.origin)
        row.closed = carried(row.closed, new.origin)
        state = tuple(row.tokens)
        row.is_settled = row.is_settled or state in row.seen
        row.seen.add(state)
        return of_text(new, before, len(text_of(new.tokens, self.config)))


def of_text(new, before, length):
    """Of what was Written in a block, what is seen of it: the text that it holds now, `length`
    tokens, whose tokens from after the end of the text that it held, `before`, are new."""
    origin = []
    for i in new.origin[:length]:
        origin.append(i if i is not None and i < before else None)
    return Written(new.tokens[:length], origin, new.edited[:length])
