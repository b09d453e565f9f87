"""From an event to a sentence, and from a sentence back to the events that it may tell.

A way of the table, "{A} gave {B:him} {T}.", becomes one Pattern for each choice that a teller has:
names or pronouns, "the kite" or "the red kite" or "it". The pattern of "Tom gave her the red kite."
is "{} gave her the {} {}.". `shape` does the same to any text: it takes names, things and places
out and leaves "N gave her the C T.", under which `readings` finds all patterns that look so.
Nothing else parses: what the teller cannot say is not in the grammar.
"""
import functools
import itertools
import re
from dataclasses import dataclass

from data.tales_events import EVENTS, Event
from data.tales_world import (
    ADJECTIVES,
    ANIMALS,
    BOYS,
    COLOURS,
    GIRLS,
    NAMES,
    PLACES,
    PRONOUNS,
    THINGS,
    with_article,
)

SLOT = re.compile(r"{([A-Z]+)(?::(\w+))?}")
PERSONS = "AB"
GENDERS = ("girl", "boy")
THING_FORMS = ("noun", "full", "it")


@dataclass(frozen=True, eq=False)
class Pattern:
    """One sentence of an event, down to its pronouns; only the words in `fills` are open."""
    event: Event
    text: str               # "{} gave her the {}."
    fills: tuple            # ((role, form), ...) for the {} in turn
    genders: tuple          # ((role, "girl" or "boy"), ...) of the persons
    pronouns: tuple         # the roles whose first mention is a pronoun: who is known from before
    they: bool              # whether it says "they" for A and B
    it: tuple               # the thing roles whose first mention is "it"
    persons: tuple          # the person roles in the order of their mention
    things: tuple           # the thing roles
    animals: tuple          # the animal roles
    places: tuple           # the place roles that it names


# --------------------------------------------------------------------------------------------------
# From a way to its patterns


@functools.cache
def parts_of(way):
    """A way taken apart: texts and (role, form) in turn."""
    parts, end = [], 0
    for match in SLOT.finditer(way):
        parts.append(way[end:match.start()])
        parts.append((match[1], match[2] or ""))
        end = match.end()
    parts.append(way[end:])
    if isinstance(parts[0], str) and parts[0]:
        parts[0] = uncapitalised(parts[0])
    return tuple(part for part in parts if part != "")


@functools.cache
def roles_of(way, kinds):
    """The roles of a way that are of these letters, in the order of their mention."""
    roles = []
    for part in parts_of(way):
        if isinstance(part, tuple):
            roles += [role for role in part[0] if role in kinds]
    return tuple(dict.fromkeys(roles))


@functools.cache
def pattern(event, way, genders, pronouns, they, thing_forms):
    """The Pattern of a way for these choices, or None where they do not go together.

    genders: of the persons in the order of roles_of; pronouns: the roles first mentioned by one;
    thing_forms: of the things in the order of roles_of, "noun", "full" or "it"."""
    persons, things = roles_of(way, PERSONS), roles_of(way, "TU")
    writer = Writer(dict(zip(persons, genders)), pronouns, they, dict(zip(things, thing_forms)),
                    roles_of(way, "X"))
    for part in parts_of(way):
        if isinstance(part, str):
            writer.text.append(part.replace("{", "{{"))
        elif not writer.write(*part):
            return None
    if set(pronouns) != writer.used_pronouns or they != writer.used_they:
        return None
    if any(form != writer.used_forms.get(role, "noun") for role, form in writer.forms.items()):
        return None
    it = tuple(role for role in things if writer.forms[role] == "it")
    # Who is only called by name in what somebody says is not whom "he" means afterwards.
    order = tuple(sorted(persons, key=lambda role: role in writer.called))
    return Pattern(event, "".join(writer.text), tuple(writer.fills), tuple(zip(persons, genders)),
                   pronouns, they, it, order, things, writer.animals, roles_of(way, "P"))


class Writer:
    """Writes the slots of one sentence, and knows what was mentioned in it."""

    def __init__(self, genders, pronouns, they, forms, animals):
        self.genders, self.pronouns, self.they = genders, pronouns, they
        self.forms, self.animals = forms, animals
        self.text, self.fills = [], []
        self.persons, self.things = [], []          # mentioned so far
        self.alike = False                          # two of one gender were named together
        self.called = set()                         # persons first mentioned in quotation marks
        self.used_pronouns, self.used_they, self.used_forms = set(), False, {}
        self.last, self.after_person = "", False   # one does not say "gave him it"

    def write(self, role, form):
        """Add a slot. False if the choices forbid it."""
        if role == "AB":
            return self.pair()
        self.after_person = self.text[-1:] == [" "] and self.last in PERSONS
        self.last = role
        if role in PERSONS:
            return self.person(role, form)
        if role in "TU":
            return self.thing(role, form)
        if role == "X":
            self.open({"": "the {}", "a": "a {}", "noun": "{}"}[form], (role, "animal"))
        elif role == "C":
            self.open("{}", (role, "colour"))
        else:
            self.open({"the": "the {}"}.get(form, "{}"), (role, form))
        return True

    def open(self, text, *fills):
        self.text.append(text)
        self.fills += fills

    def pair(self):
        if self.they:
            self.used_they = True
            self.text.append("they")
        else:
            self.open("{} and {}", ("A", "name"), ("B", "name"))
            self.persons += ["A", "B"]
            self.alike = self.genders["A"] == self.genders["B"]
        return not self.used_pronouns

    def person(self, role, form):
        """A name, or a pronoun. Later in the sentence a pronoun means the first of its gender, and
        the others have their names."""
        gender = self.genders[role]
        if form == "kid":
            self.text.append(gender)
            return True
        form = "he" if form == "" else form
        same = [other for other in self.persons if self.genders[other] == gender]
        first = role not in self.persons
        if first:
            self.persons.append(role)
            if "".join(self.text).count('"') % 2:
                self.called.add(role)
        by_pronoun = form != "name" and same[:1] == [role] and not self.alike
        if first and role in self.pronouns:
            if form == "name" or same:
                return False
            self.used_pronouns.add(role)
            by_pronoun = True
        if by_pronoun:
            self.text.append(PRONOUNS[gender][form])
        else:
            self.open("{}'s" if form == "his" else "{}", (role, "name"))
        return True

    def thing(self, role, form):
        """ "the kite" and its kind. Later in the sentence it is "it", where that is clear."""
        first = role not in self.things
        if first:
            self.things.append(role)
        if form == "use":
            self.open("{}", (role, "use"))
            if first:
                self.things.remove(role)
        elif form == "a":
            self.open("{}", (role, "a"))
        elif form == "full":
            self.open("{} {}", (role, "adjective"), (role, "noun"))
        elif form == "noun":
            self.open("{}", (role, "noun"))
        elif form in ("the", "The"):
            self.open(f"{form} {{}}", (role, "noun"))
        elif first:
            return self.first_thing(role)
        elif len(self.things) == 1 and not self.animals and not self.after_person:
            self.text.append("it")
        else:
            self.open("the {}", (role, "noun"))
        return True

    def first_thing(self, role):
        form = self.used_forms[role] = self.forms[role]
        if form == "it":
            self.text.append("it")
            return not self.animals and not self.after_person
        if form == "full":
            self.open("the {} {}", (role, "adjective"), (role, "noun"))
        else:
            self.open("the {}", (role, "noun"))
        return True


def patterns(event, way):
    """All Patterns of a way."""
    persons, things = roles_of(way, PERSONS), roles_of(way, "TU")
    subsets = [tuple(itertools.compress(persons, bits))
               for bits in itertools.product((0, 1), repeat=len(persons))]
    they = (False, True) if "{AB}" in way else (False,)
    choices = itertools.product(itertools.product(GENDERS, repeat=len(persons)), subsets, they,
                                itertools.product(THING_FORMS, repeat=len(things)))
    for genders, pronouns, they, forms in choices:
        found = pattern(event, way, genders, pronouns, they, forms)
        if found is not None:
            yield found


# --------------------------------------------------------------------------------------------------
# Words in and out


def spell(form, words):
    """The word of a fill, of the words of its letter: a name, (noun, adjective), a place, an
    animal, a colour."""
    if form in ("name", "animal", "colour"):
        return words
    if form in ("at", "to"):
        return PLACES[words][("at", "to").index(form)]
    if form == "the":
        return words
    noun, adjective = words
    if form == "use":
        return THINGS[noun]
    if form == "a":
        return with_article(adjective, noun)
    return noun if form == "noun" else adjective


def capitalised(text):
    return text[:1].upper() + text[1:]


def uncapitalised(text):
    """A sentence without its capital letter, unless it begins with a name."""
    word = re.match(r"\w*", text)[0]
    return text if word in NAMES else text[:1].lower() + text[1:]


def alternatives(words):
    return "|".join(sorted(words, key=len, reverse=True))


NOUN = f"(?:{alternatives(THINGS)})"
TOKENS = {
    "N": alternatives(NAMES),
    "AT": alternatives(at for at, _ in PLACES.values()),
    "TO": alternatives(to for _, to in PLACES.values()),
    "P": alternatives(PLACES),
    "A": f"(?:{alternatives(with_article(word, '').strip() for word in ADJECTIVES)})(?= {NOUN}\\b)",
    "C": f"(?:{alternatives(ADJECTIVES)})(?= {NOUN}\\b)|(?:{alternatives(COLOURS)})",
    "T": NOUN,
    "X": alternatives(ANIMALS),
    "V": alternatives(set(THINGS.values())),
}
TOKEN = re.compile(
    rf"\b(?:{'|'.join(f'(?P<{name}>{words})' for name, words in TOKENS.items())})\b")
BY_PHRASE = {phrase: place for place, phrases in PLACES.items() for phrase in phrases}


@dataclass(frozen=True)
class Token:
    """A word of a text that a slot may stand for: its kind, itself and where it stands."""
    kind: str
    text: str
    start: int

    def value(self):
        """The bare word: "orange" of "an orange", "barn" of "in the barn"."""
        if self.kind == "A":
            return self.text.split()[1]
        return BY_PHRASE.get(self.text, self.text)


def shape(sentence):
    """(the sentence with each token replaced by its kind, [Token])"""
    text = uncapitalised(sentence)
    tokens = [Token(match.lastgroup, match[0], match.start()) for match in TOKEN.finditer(text)]
    return TOKEN.sub(lambda match: match.lastgroup, text), tokens


@dataclass(frozen=True)
class Reading:
    """A Pattern that a sentence may be, and for each of its tokens the role, or the word itself
    where the token belongs to the pattern."""
    pattern: Pattern
    roles: tuple            # (role, None) or (None, word)


SAMPLES = {"girl": dict(zip(PERSONS, GIRLS)), "boy": dict(zip(PERSONS, BOYS)),
           "T": ("kite", "orange"), "U": ("drum", "red"), "P": "barn", "X": "dog", "C": "blue"}


@functools.lru_cache(maxsize=1)
def readings():
    """{shape: [Reading]} of all that can be told."""
    found = {}
    for event in EVENTS:
        for way in event.ways:
            for one in patterns(event, way):
                key, reading = read_sample(one)
                found.setdefault(key, []).append(reading)
    return found


def read_sample(one):
    """(shape, Reading) of a pattern, found with sample words in its slots."""
    genders = dict(one.genders)
    spelled = []
    for role, form in one.fills:
        words = SAMPLES[genders[role]][role] if role in PERSONS else SAMPLES[role]
        spelled.append(spell(form, words))
    pieces = re.split("{}", one.text)
    starts = {}
    text = pieces[0]
    for (role, form), word, piece in zip(one.fills, spelled, pieces[1:]):
        starts[len(text)] = role
        if form == "a":
            starts[len(text) + len(word.rsplit(" ", 1)[0]) + 1] = role
        text += word + piece
    key, tokens = shape(text.replace("{{", "{"))
    roles = []
    for token in tokens:
        role = starts.pop(token.start, None)
        roles.append((role, None) if role else (None, token.text))
    assert not starts, (one.text, text, tokens)
    return key, Reading(one, tuple(roles))
