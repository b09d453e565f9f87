"""Edit many texts at once: what edits.flow does, for rows that differ in length and grow and shrink
each in its own way.

Each row gets, token for token, what it would get alone: its random numbers are its own, and padding
is hidden from all. A model that is not told the time is asked anew only for rows that have changed;
the logits of a step are those of the tokens that it writes. Read edits.flow first.

Shapes: B rows, A of them that are asked anew, T positions of the longest, N tokens to write, D
width, V vocabulary.
"""
import warnings
from dataclasses import dataclass

import torch

import kernels
from edits import (
    INSERT,
    SUBSTITUTE,
    apply_edits,
    carried,
    check_editor,
    draw,
    edit_logits,
    edit_rates,
    fires,
    flow_times,
    flow_weight,
    outgrown,
    protect,
)
from passes import check_tokens, config_of
from sampling.engine import row_streams


@dataclass
class EditStep:
    """What `on_step` gets after each step."""
    number: int                 # of the step, from 1
    passes: int                 # forward passes so far
    rows: list                  # of each row: edits.Written, None where nothing happened


@dataclass
class Text:
    """A row at work."""
    tokens: list
    frozen: torch.Tensor        # bool [T]: stays as it is
    closed: torch.Tensor        # bool [T]: nothing comes after it
    states: torch.Tensor = None     # [T, D]: what the heads read; None: to be asked anew
    rates: torch.Tensor = None      # [T, 3]
    is_done: bool = False       # it has grown out of the context, or nothing is left of it


def rewrite(model, sequences, steps=64, prompt_lens=None, frozen=None, closed=None, schedule=None,
            temperature=0.0, seed=None, uniform=None, on_step=None):
    """Edit each sequence from t = 0 to 1 in `steps` steps: list of token lists -> list of token
    lists.

    prompt_lens     for each row, so many tokens at its beginning are a prompt that stays; None: 0.
    frozen, closed  for each row lists of bool, in place of it: tokens that stay, and after which
                    nothing is inserted; None: those of its prompt.
    schedule        of the steps; None: the one that the model was trained with. dLLM's sampler is
                    "linear".
    temperature     0: the most probable token is written, else a sample.
    seed            row r draws from the stream (seed, r); a list: from (seed[r], 0); None: another
                    one each time.
    uniform         uniform(step, length) -> [3, length], in place of the streams: for comparisons.
    on_step         called with an `EditStep` after each step.
    A row that outgrows the context stops there, with a warning, and is what it was before. Raises
    ValueError for what cannot be.
    """
    check(model, sequences, steps, temperature)
    frozen, closed = protections(sequences, prompt_lens, frozen, closed)
    texts = []
    for row, stays, shuts in zip(sequences, frozen, closed):
        texts.append(Text(list(row), torch.tensor(stays), torch.tensor(shuts)))
    editor = Editor(model, texts, schedule, temperature, row_streams(seed, len(texts)), uniform)
    for step, t in enumerate(flow_times(1 / steps)):
        changed = editor.step(step, t, 1 / steps)
        if on_step is not None:
            on_step(EditStep(step + 1, editor.passes, changed))
    return [text.tokens for text in texts]


def check(model, sequences, steps, temperature):
    """ValueError for what `rewrite` cannot do."""
    check_editor(model)
    config = config_of(model)
    if not 1 <= steps <= 10**6:
        raise ValueError(f"steps must be between 1 and {10**6}, got {steps}")
    for i, row in enumerate(sequences):
        if not len(row):
            raise ValueError(f"row {i} is empty: there must be a token to insert after, such as "
                             "the beginning of text")
        if len(row) > config.max_len:
            raise ValueError(f"row {i} has {len(row)} tokens, the model's context is "
                             f"{config.max_len}")
    check_values(config, sequences, temperature)


def check_values(config, sequences, temperature):
    """ValueError for a temperature that cannot be and a token outside the vocabulary."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must not be negative, got {temperature}")
    check_tokens(config, sequences)


def protections(sequences, prompt_lens=None, frozen=None, closed=None):
    """(frozen, closed), a list of bool for each sequence in both; arguments as of `rewrite`. Raises
    ValueError where they do not fit the sequences."""
    if prompt_lens is None:
        prompt_lens = [0] * len(sequences)
    given = {"prompt_lens": prompt_lens, "frozen": frozen, "closed": closed}
    for name, values in given.items():
        if values is not None and len(values) != len(sequences):
            raise ValueError(f"{name} has one for each row, {len(sequences)}, got {len(values)}")
    for i, (row, n) in enumerate(zip(sequences, prompt_lens)):
        if not 0 <= n <= len(row):
            raise ValueError(f"row {i} has {len(row)} tokens, a prompt of {n} is not in it")
    prompts = [protect(len(row), n) for row, n in zip(sequences, prompt_lens)]
    if frozen is None:
        frozen = [stays.tolist() for stays, _ in prompts]
    if closed is None:
        closed = [shuts.tolist() for _, shuts in prompts]
    for i, row in enumerate(sequences):
        if not len(row) == len(frozen[i]) == len(closed[i]):
            raise ValueError(f"row {i} has {len(row)} tokens, but frozen {len(frozen[i])} and "
                             f"closed {len(closed[i])}")
    return frozen, closed


class Editor:
    """One run of `rewrite`."""

    def __init__(self, model, texts, schedule, temperature, streams, uniform):
        self.model, self.config, self.texts = model, config_of(model), texts
        self.schedule = schedule or self.config.edit_schedule
        self.temperature, self.streams, self.uniform = temperature, streams, uniform
        self.device = next(model.parameters()).device
        self.passes = 0

    @torch.no_grad()
    def step(self, number, t, tau):
        """A step from t to t + tau of all rows: for each what was Written, or None."""
        work = [b for b, text in enumerate(self.texts) if not text.is_done]
        changed = [None] * len(self.texts)
        self.look([self.texts[b] for b in work], t)
        weight = flow_weight(torch.tensor([t]), self.schedule)
        fired, draws = {}, {}
        for b in work:
            text, length = self.texts[b], len(self.texts[b].tokens)
            u = draw(self.streams[b], length, self.temperature)
            if self.uniform is not None:
                u[:3] = self.uniform(number, length)
            fire = fires(text.rates, weight, tau, u, text.frozen, text.closed)
            if fire:
                fired[b], draws[b] = fire, u
        substitutes = self.choose(fired, draws, SUBSTITUTE)
        inserts = self.choose(fired, draws, INSERT)
        for b, fire in fired.items():
            new = apply_edits(self.texts[b].tokens, fire, substitutes[b], inserts[b])
            changed[b] = self.write(self.texts[b], new)
        return changed

    def look(self, texts, t):
        """Ask the model for the rates of the texts that it must see anew."""
        if self.config.time_features:                   # at another time it has other rates
            asked = texts
        else:
            asked = [text for text in texts if text.states is None]
        if not asked:
            return
        lengths = torch.tensor([len(text.tokens) for text in asked])                    # [A]
        shown = torch.arange(int(lengths.max())) < lengths[:, None]                     # [A, T]
        tokens = torch.zeros(shown.shape, dtype=torch.int64)
        for row, text in zip(tokens, asked):
            row[:len(text.tokens)] = torch.tensor(text.tokens)
        mask = None if shown.all() else shown.to(self.device)
        times = torch.full((len(asked),), t, device=self.device)
        states = self.model.hidden(tokens.to(self.device), mask, t=times)               # [A, T, D]
        rates = edit_rates(self.model, states).cpu()                                    # [A, T, 3]
        for a, text in enumerate(asked):
            text.states = states[a, :len(text.tokens)]
            text.rates = rates[a, :len(text.tokens)]
        self.passes += 1

    def choose(self, fired, draws, kind):
        """{row: list of T tokens}: those that the Fires of a kind write, and 0 elsewhere."""
        chosen, states, numbers = {}, [], []
        for b, fire in fired.items():
            chosen[b] = [0] * len(self.texts[b].tokens)
            where = self.places(fire, kind)
            # With `shift` a token is predicted one position earlier; token 0 never is.
            read = where - 1 if self.config.shift and kind == SUBSTITUTE else where
            states.append(self.texts[b].states[read.to(self.device)])                   # [n, D]
            numbers.append(draws[b][-2 if kind == SUBSTITUTE else -1, where])
        if not sum(map(len, states)):
            return chosen
        logits = edit_logits(self.model, torch.cat(states), kind).float().cpu()         # [N, V]
        tokens = kernels.sample_tokens(logits, self.temperature, torch.cat(numbers).double())
        tokens = iter(tokens.tolist())
        for b, fire in fired.items():
            for i in self.places(fire, kind).tolist():
                chosen[b][i] = next(tokens)
        return chosen

    def places(self, fire, kind):
        """The positions at which edits of a kind happen."""
        flags = fire.substitute if kind == SUBSTITUTE else fire.insert
        return torch.tensor(flags).nonzero()[:, 0]

    def write(self, text, new):
        """Make what was Written the text; returns it, or None if it does not fit."""
        if len(new.tokens) > self.config.max_len:
            warnings.warn(outgrown(len(new.tokens), self.config.max_len), stacklevel=4)
            text.is_done = True
            return None
        text.tokens = new.tokens
        text.frozen = carried(text.frozen, new.origin)
        text.closed = carried(text.closed, new.origin)
        text.states, text.rates = None, None
        text.is_done = not text.tokens
        return new
