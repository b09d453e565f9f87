"""The test of memory in data/tales_copying.py: what it hides, and that only copying passes it."""

import random
import re
from types import SimpleNamespace

import pytest
import torch

from data.tales import tell
from data.tales_copying import hidden_things
from data.tales_world import ADJECTIVES, NAMES, THINGS
from data.tokenizer import Tokenizer
from diffusion import restored

T = 128


@pytest.fixture(scope="module")
def stream():
    """(ids, tokenizer) of forty tales, each after an end of text; a thing is one token."""
    rng = random.Random(3)
    texts = [tell(rng).text for _ in range(40)]
    tokenizer = Tokenizer.train([*texts, *(f" {noun} the" * 99 for noun in THINGS)], 1024)
    assert all(len(tokenizer.encode(f" {noun}")) == 1 for noun in THINGS)
    ids = []
    for text in texts:
        ids += [tokenizer.eos_token_id, *tokenizer.encode(text)]
    return ids, tokenizer


@pytest.mark.parametrize("visible", [None, 1, 2])
def test_what_is_hidden(visible, stream):
    ids, tokenizer = stream
    things = hidden_things(ids, tokenizer, T, 20, visible)
    assert things.tokens.shape == things.hidden.shape == things.target.shape
    for tokens, hidden, target, distance in zip(
            things.tokens, things.hidden, things.target, things.distance.tolist()):
        assert tokens[0] == tokenizer.eos_token_id and (hidden | ~target).all()
        noun = tokenizer.decode(tokens[target]).strip()
        assert noun in THINGS
        end = tokens[1:].tolist().index(tokenizer.eos_token_id) + 1     # of the tale
        assert not hidden[end:].any()
        left = torch.where(hidden, tokenizer.mask_token_id, tokens)[:end]
        shown = tokenizer.decode(left).split("[MASK]")
        count = re.findall("[a-z]+", "".join(shown)).count(noun)
        assert count == visible if visible else count >= 1 and target.equal(hidden)
        first = target.nonzero()[0].item()
        near = tokens[max(first - distance, 0):first + distance + 6]
        assert noun in tokenizer.decode(near)


@pytest.mark.parametrize("words", [ADJECTIVES, NAMES])
def test_properties_and_persons_can_be_hidden_too(words, stream):
    ids, tokenizer = stream
    found = hidden_things(ids, tokenizer, T, 10, words=words)
    for tokens, target in zip(found.tokens, found.target):
        word = tokenizer.decode(tokens[target])
        assert word.strip() in words
        assert word in tokenizer.decode(tokens[:target.nonzero()[0]])


def test_the_first_mention_is_never_asked_for(stream):
    ids, tokenizer = stream
    things = hidden_things(ids, tokenizer, T, 20)
    for tokens, target in zip(things.tokens, things.target):
        noun = tokenizer.decode(tokens[target])
        assert noun in tokenizer.decode(tokens[:target.nonzero()[0]])


def test_windows_without_a_tale(stream):
    ids, tokenizer = stream
    assert hidden_things(ids, tokenizer, 16) is None


class Reader:
    """A model that gives a hidden thing what it finds in the row: the things there, or all."""

    def __init__(self, tokenizer, looks_back):
        self.config = SimpleNamespace(mask_token_id=tokenizer.mask_token_id, shift=False,
                                      causal=False, block_length=0)
        self.nouns = [tokenizer.encode(f" {noun}")[0] for noun in THINGS]
        self.size, self.looks_back = tokenizer.vocab_size, looks_back

    def __call__(self, tokens, select, attention_mask=None):
        rows = []
        for row in tokens:
            seen = [noun for noun in self.nouns if noun in row.tolist()]
            end = row[1:].tolist().index(row[0]) + 1            # of the tale
            own = [noun for noun in self.nouns if noun in row[:end].tolist()]
            logits = torch.full((len(row), self.size), -30.0)
            logits[:, (own or seen) if self.looks_back else self.nouns] = 0.0
            rows.append(logits)
        return torch.stack(rows)[select]


def test_only_who_looks_back_knows_the_thing(stream):
    ids, tokenizer = stream
    things = hidden_things(ids, tokenizer, T, 20)
    one_thing = []
    for tokens in things.tokens:
        end = tokens[1:].tolist().index(tokens[0]) + 1
        text = tokenizer.decode(tokens[:end])
        one_thing.append(sum(f" {noun}" in text for noun in THINGS) == 1)
    one_thing = torch.tensor(one_thing)
    assert one_thing.sum() > 5
    asked = things.tokens, things.hidden, things.target
    found = restored(Reader(tokenizer, looks_back=True), *asked)
    torch.testing.assert_close(found[one_thing], torch.ones(int(one_thing.sum())))
    blind = restored(Reader(tokenizer, looks_back=False), *asked)
    torch.testing.assert_close(blind, torch.full_like(blind, 1 / len(THINGS)))
