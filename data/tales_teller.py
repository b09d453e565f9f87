"""The teller: a plan of what happens, then the words for it.

A plan is a random walk through the machine from the start to an ending. A Teller puts one into
words: names, things and places by chance, of the ways to say each event one that does not repeat
what came before, pronouns where they are clear. What comes out badly is thrown away.
"""
import functools
import re
from collections import Counter

from data.files import hash_fraction
from data.tales_machine import START, after, options
from data.tales_scene import Scene, make_tale
from data.tales_sentences import capitalised, pattern, roles_of, spell
from data.tales_world import (
    ADJECTIVES,
    ANIMALS,
    BOYS,
    COLOURS,
    GENDER,
    GIRLS,
    LOUD,
    PLACES,
    THINGS,
    TOYS,
)

SENTENCES = (4, 10)         # fewest and most sentences of a tale
MAX_PIECES = 118            # words and punctuation marks of a tale at most
HELD_OUT = 0.04             # share of all (name, thing, event) that training never sees
PIECE = re.compile(r"\w+|[^\w\s]")
NOUNS, PLACE_NAMES = tuple(THINGS), tuple(PLACES)
NAMED_ENOUGH = {"p": 2, "q": 2, "r": 2, "x": 2, "t": 3}     # mentions of places, animal and thing
CONNECTIVES = {"Then", "But", "So", "And", "Suddenly", "Soon", "At", "In", "The", "From"}


def tell(rng, held_out=False):
    """A Tale, of random.Random alone. held_out: with a (name, thing, event) that `tales` never has;
    without it, none of them."""
    while True:
        tale = tell_plan(plan(rng), rng, held_out)
        if tale is not None:
            return tale


def tell_plan(plot, rng, held_out=False):
    """A Tale of a plan, None if it comes out too long or otherwise badly four times."""
    for _ in range(4):
        teller = Teller(plot, rng, held_out)
        if teller.succeeds(plot):
            return make_tale(teller.scene, teller.texts)
    return None


# --------------------------------------------------------------------------------------------------
# What happens


def plan(rng):
    """What happens in a tale: a list of Options from the first sentence to the ending."""
    while True:
        steps = walk(rng)
        if steps is not None and returns(steps):
            return steps


def returns(steps):
    """Whether who and what comes up in a plan comes up again, persons twice."""
    counts = Counter(letter for step in steps for letter in step.named)
    return all(counts[letter] > (2 if letter in "ab" else 1) for letter in counts)


def walk(rng):
    """One attempt at a plan, None if it comes to no ending in time."""
    state, steps, used = START, [], set()
    while len(steps) < SENTENCES[1]:
        by_kind = choices(state)
        kind = next_kind(by_kind, len(steps), rng)
        if kind not in by_kind:
            return None
        step = rng.choices(*by_kind[kind])[0]
        if step.event.name not in used:         # else draw again: nothing happens twice
            used.add(step.event.name)
            steps.append(step)
            if kind == "end":
                return steps
            state = after(state, step)
        elif rng.random() < 0.2:                # perhaps there is nothing else
            return None
    return None


@functools.cache
def choices(state):
    """{"side", "end" or "plot": (Options, their weights)} of a state."""
    by_kind = {}
    for option in options(state):
        kind = option.event.kind if option.event.kind in ("side", "end") else "plot"
        found, weights = by_kind.setdefault(kind, ([], []))
        found.append(option)
        weights.append(option.event.weight)
    return by_kind


def next_kind(by_kind, length, rng):
    """Which kind of event comes next: feelings after half of what causes them, an ending when it is
    time for one. Sad endings, which have small weights, come less often."""
    if "side" in by_kind and rng.random() < 0.4:
        return "side"
    chance = {4: 0.3, 5: 0.7}.get(length, float(length > 5))
    if "end" in by_kind and rng.random() < chance * min(1, max(by_kind["end"][1])):
        return "end"
    return "plot"


@functools.cache
def is_held_out(name, noun, event):
    """Whether training never has this person do this with this thing."""
    return hash_fraction(f"{name} {noun} {event}") < HELD_OUT


def has_held_out(plot, words):
    """Whether a held-out combination occurs in a plan with these words."""
    for option in plot:
        letters = option.letters
        if "A" in letters and "T" in letters and option.event.kind != "side":
            noun, _ = words[letters["T"]]
            if is_held_out(words[letters["A"]], noun, option.event.name):
                return True
    return False


# --------------------------------------------------------------------------------------------------
# How it is told


class Teller:
    """Tells one tale, sentence by sentence: `scene`, `texts` and what was mentioned how often."""

    def __init__(self, plot, rng, held_out=False):
        self.rng = rng
        self.words = choose_words(rng)          # {letter: word}
        while has_held_out(plot, self.words) != held_out:
            self.words = choose_words(rng)
        self.scene, self.texts = Scene(words={}), []
        self.counts = Counter()                 # mentions of a letter by its own word
        self.properties = Counter()             # mentions of a thing's adjective
        self.late = False                       # what was not mentioned twice now has to be

    def succeeds(self, plot):
        """Tell a plan. False if no way was found, or a bad one."""
        for i, option in enumerate(plot):
            self.late = i > len(plot) - 4
            if not self.say(option):
                return False
        pieces = sum(len(PIECE.findall(text)) for text in self.texts)
        return pieces <= MAX_PIECES and self.is_well_knit()

    def is_well_knit(self):
        """Whether all that a tale names comes up again, so that no word of it could be another one;
        and the thing often enough to be remembered."""
        if self.counts["t"] < 3 or self.properties["t"] < 2:
            return False
        return all(self.counts[letter] >= 2 for letter in self.scene.words)

    def say(self, option):
        """Tell what happens in one sentence. False if no way was found."""
        for _ in range(6):
            one = self.choose_pattern(option, self.choose_way(option))
            if one is None:
                continue
            text = write(one, option.letters, self.words)
            if self.repeats(text):
                continue
            self.texts.append(text)
            self.scene = self.scene.follow(option, one, self.new_words(option, one))
            self.words |= self.scene.words          # a thing that was painted
            self.count(option, one)
            return True
        return False

    def choose_way(self, option):
        """One of the ways of an event, rather one that names what was not named often enough: a
        place or an animal once, near the end the thing twice."""
        ways, counts = option.event.ways, self.counts
        for _ in range(3):
            way = ways[int(self.rng.random() * len(ways))]
            lacks = False
            for role, letter in option.roles:
                if 0 < counts[letter] < NAMED_ENOUGH.get(letter, 0) and f"{{{role}" not in way:
                    lacks = lacks or self.late or letter != "t"
            if not lacks:
                break
        return way

    def choose_pattern(self, option, way):
        """A Pattern of a way with as many pronouns as are clear here and to the teller's taste;
        None if they do not go together."""
        letters, scene, chance = option.letters, self.scene, self.rng.random
        persons, things = roles_of(way, "AB"), roles_of(way, "TU")
        genders = tuple(GENDER[self.words[letters[role]]] for role in persons)
        pronouns = []
        for role, gender in zip(persons, genders):
            letter = letters[role]
            if self.counts[letter] > 1 and chance() < 0.3 and scene.referent(gender) == letter:
                pronouns.append(role)
        they = "{AB}" in way and chance() < 0.7 and scene.may_say_they(letters)
        forms = tuple(self.choose_form(letters[role]) for role in things)
        one = pattern(option.event, way, genders, tuple(pronouns), they, forms)
        if one is None:
            plain_forms = tuple("noun" for _ in things)
            one = pattern(option.event, way, genders, (), they, plain_forms)
        return one

    def choose_form(self, letter):
        """How to speak of a thing: "noun", "full" (with its adjective) or "it"."""
        chance = self.rng.random
        if self.counts[letter] > 2 and chance() < 0.3 and self.scene.may_say_it(letter):
            return "it"
        share = 0.9     # what is named but twice is hardly learned (docs/training.md)
        if self.properties[letter] < 2 and self.late:
            share = 1
        return "full" if chance() < share else "noun"

    def repeats(self, text):
        """Whether a sentence begins as one before it did, or with "One day" in the middle of a
        tale."""
        first, second, _ = text.split(" ", 2)
        if first == "One" and ("happened",) in self.scene.state:
            return True
        if first in CONNECTIVES and self.texts and self.texts[-1].startswith(f"{first} "):
            return True
        if first in GENDER:
            return False
        beginning = f"{first} {second} "
        return any(other.startswith(beginning) for other in self.texts)

    def new_words(self, option, one):
        """The words that a sentence brings in: of new letters, and the colour of a painted
        thing."""
        found = {letter: self.words[letter] for letter in option.new}
        if any(form == "colour" for _, form in one.fills):
            found["C"] = self.words["C"]
        return found

    def count(self, option, one):
        """Count whom and what a sentence mentions."""
        for role, form in one.fills:
            if form in ("a", "adjective"):
                self.properties[option.letters[role]] += 1
            if form not in ("adjective", "use", "colour"):
                self.counts[option.letters[role]] += 1


def choose_words(rng):
    """{letter: word} for all letters that may come up, and "C", a new colour for the thing t. The
    two persons are a girl and a boy, and of two things one is loud: two of a kind are hard to tell
    apart for a small model (docs/training.md)."""
    both = [*pick(GIRLS, 1, rng), *pick(BOYS, 1, rng)]
    words = dict(zip("ab", pick(both, 2, rng)))
    things = [*pick(tuple(TOYS), 1, rng), *pick(tuple(LOUD), 1, rng)]
    for letter, noun in zip("tu", pick(things, 2, rng)):
        words[letter] = (noun, *pick(ADJECTIVES, 1, rng))
    words |= zip("pqr", pick(PLACE_NAMES, 3, rng))
    words["x"], = pick(ANIMALS, 1, rng)
    words["C"] = next(colour for colour in pick(COLOURS, 2, rng) if colour != words["t"][1])
    return words


def pick(words, number, rng):
    """So many different ones of a few words; ten times as fast as rng.sample."""
    found = []
    while len(found) < number:
        word = words[int(rng.random() * len(words))]
        if word not in found:
            found.append(word)
    return found


def write(one, letters, words):
    """The sentence of a Pattern."""
    spelled = []
    for role, form in one.fills:
        spelled.append(spell(form, words["C" if role == "C" else letters[role]]))
    return capitalised(one.text.format(*spelled))
