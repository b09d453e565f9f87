"""Texts to begin with, for a model that edits: x_1 is the finished text, x_0 what is made of it.

Each source is a function of (x_1, rng, how) that returns x_0, lists of tokens; rng is a
random.Random, how SourceSettings. The first token stays in front of both: something to insert
after.
"""
from dataclasses import dataclass


@dataclass
class SourceSettings:
    """What the sources read."""
    alphabet: list              # the tokens that damage may write
    mask_token_id: int | None   # of "masks"
    num_masks: int = 32         # of "masks"
    max_damage: int = 24        # edits of "damage" at most


def alphabet_of(tokenizer, vocab_size):
    """What damage may write: the tokens below vocab_size that are not special to a Tokenizer."""
    special = set(tokenizer.backend.get_added_tokens_decoder())
    return [token for token in range(vocab_size) if token not in special]


def nothing(x_1, rng, how):
    """Only the first token: the model writes everything, and decides how much that is."""
    return x_1[:1]


def masks(x_1, rng, how):
    """The first token and a fixed number of masks, however long x_1 is: dLLM's."""
    return x_1[:1] + [how.mask_token_id] * how.num_masks


def damage(x_1, rng, how):
    """x_1 after 1 to max_damage random edits."""
    return damaged(x_1, rng.randint(1, how.max_damage), rng, how.alphabet)


def gap(x_1, rng, how):
    """x_1 without a piece of up to half of it, and nothing says how long it was."""
    begin, end = gap_place(x_1, rng)
    return x_1[:begin] + x_1[end:]


def damaged(tokens, count, rng, alphabet):
    """The tokens after `count` random edits, each an insertion, deletion or substitution with equal
    chance, anywhere after the first token."""
    tokens = list(tokens)
    for _ in range(count):
        kind, place = rng.choice(("substitute", "delete", "insert")), rng.randint(1, len(tokens))
        if kind == "insert" or place == len(tokens):
            tokens.insert(place, rng.choice(alphabet))
        elif kind == "delete":
            del tokens[place]
        else:
            tokens[place] = rng.choice(alphabet)
    return tokens


def gap_place(x_1, rng):
    """(begin, end) of a piece of 1 to half the tokens after the first one."""
    longest = max(1, (len(x_1) - 1) // 2)
    size = rng.randint(1, longest)
    begin = rng.randint(1, max(1, len(x_1) - size))
    return begin, begin + size


SOURCES = {"nothing": nothing, "masks": masks, "damage": damage, "gap": gap}
MIXTURE = ("nothing", "damage", "gap")      # of "mixed"


def mixed(x_1, rng, how):
    """One of MIXTURE, with equal chance."""
    return SOURCES[rng.choice(MIXTURE)](x_1, rng, how)


SOURCES["mixed"] = mixed


def block_source(x_1, source, rng, how):
    """(x_0, share of it to mask) for a model that edits by tokens, whose text stands in a block.

    source  nothing: x_1, of which a random share is masked. damage: random edits, and at most a
            fifth is masked. gap: a piece is being filled in, see `half_filled`. masks: all of it
            gives way to how.num_masks of them. mixed: one of MIXTURE.
    """
    if source == "mixed":
        source = rng.choice(MIXTURE)
    if source == "nothing":
        return x_1, 1 - rng.random()
    if source == "damage":
        return damage(x_1, rng, how), rng.random() / 5
    if source == "masks":
        return masks(x_1, rng, how), 0.0
    return half_filled(x_1, rng, how), 0.0


def half_filled(x_1, rng, how):
    """x_1 with a gap as a sampler finds it on its way: in every second text nothing stands there
    yet, in the others a random share of what is missing does. Instead of each run of missing tokens
    there are masks, from none to twice as many."""
    begin, end = gap_place(x_1, rng)
    share = rng.choice((0.0, rng.random()))
    x_0, missing = x_1[:begin], 0
    for token in x_1[begin:end]:
        if rng.random() < share:
            x_0 += [how.mask_token_id] * rng.randint(0, 2 * missing) + [token]
            missing = 0
        else:
            missing += 1
    return x_0 + [how.mask_token_id] * rng.randint(0, 2 * missing) + x_1[end:]
