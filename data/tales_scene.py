"""What has been told so far, with names and words: what a sentence may refer to, and what it adds.

The machine (tales_machine.py) knows what may happen to a, b and t; a Scene knows that a is Tom and
t the red kite, and who was spoken of last, which decides whom "he" and "it" can mean. When all is
told, `make_tale` keeps what a Scene knows as a Tale.
"""
from dataclasses import dataclass

from data.tales_machine import RULE_OF, START, after, options
from data.tales_world import GENDER, THINGS

SETTING = {"known", "at", "person", "happened"}     # facts that make no cause


@dataclass(frozen=True, eq=False)
class Scene:
    """The state of a tale after some of its sentences. Never changed: `follow` makes the next."""
    state: frozenset = START
    words: dict = None      # letter: a name, (noun, adjective), a place or an animal
    persons: tuple = ()     # letters, in the order in which the last sentence mentioned them
    things: tuple = ()      # letters that the last sentence mentioned
    animals: bool = False   # whether it mentioned one
    told: tuple = ()        # (option, words of a colour or None) of all sentences

    def options(self):
        """What may happen next and has not happened yet, a list of Options."""
        told = {option for option, _ in self.told}
        return [option for option in options(self.state) if option not in told]

    def referent(self, of_gender):
        """The letter that he or she means here: the only girl or boy of whom the last sentence
        spoke. None if it spoke of none or two."""
        found = [letter for letter in self.persons if GENDER[self.words[letter]] == of_gender]
        return found[0] if len(found) == 1 else None

    def may_say_they(self, letters):
        """Whether "they" can only mean these two."""
        known = [letter for letter in "ab" if letter in self.words]
        both = {letters["A"], letters["B"]}
        return both == set(known) or both == set(self.persons)

    def may_say_it(self, letter):
        """Whether "it" at the beginning of a sentence's talk of things can only mean this thing."""
        only_one = "u" not in self.words
        return only_one and letter in self.things and not self.animals

    def follow(self, option, pattern, words):
        """The Scene after a sentence; `words`: those of new letters, and "C" for a colour."""
        letters = option.letters
        known = self.words | {letter: words[letter] for letter in option.new}
        colour = words.get("C")
        if colour:
            noun, _ = known[letters["T"]]
            known[letters["T"]] = (noun, colour)
        persons, things = self.persons, self.things
        if pattern.persons:
            persons = tuple(letters[role] for role in pattern.persons)
        things = tuple(letters[role] for role in pattern.things)
        return Scene(after(self.state, option), known, persons, things, bool(pattern.animals),
                     (*self.told, (option, colour)))


def objection(scene, option, pattern, words):
    """Why a pattern cannot tell an option here, or None. `words`: what the sentence says of each
    role: a name, {"noun", "adjective", "use"}, a place, an animal, a colour; roles it is silent
    about are missing."""
    letters = option.letters
    known = scene.words
    for role, of_gender in pattern.genders:
        name = words.get(role) or known.get(letters[role])
        if name is None or GENDER[name] != of_gender:
            return f"{name} is no {of_gender}"
    for role in pattern.pronouns:
        if scene.referent(dict(pattern.genders)[role]) != letters[role]:
            return "a pronoun means nobody here, or somebody else"
    if pattern.they and not scene.may_say_they(letters):
        return '"they" are not two of whom was spoken'
    for role in pattern.it:
        if not scene.may_say_it(letters[role]):
            return '"it" means nothing here'
    for role, said in words.items():
        if role == "C":
            continue
        problem = disagreement(known, letters[role], said, letters[role] in option.new)
        if problem:
            return problem
    return None


def disagreement(known, letter, said, is_new):
    """Why what a sentence says of a letter does not fit what is known, or None."""
    before = known.get(letter)
    if isinstance(said, dict):
        noun = said.get("noun", before[0] if before else None)
        if "use" in said and THINGS.get(noun) != said["use"]:
            return f"one does not {said['use']} a {noun}"
        if is_new:
            nouns = [words[0] for words in known.values() if isinstance(words, tuple)]
            if noun in nouns:
                return f"there was a {noun} before"
            return None if noun and "adjective" in said else "a thing is not introduced"
        if noun != before[0]:
            return f"it is a {before[0]}, not a {noun}"
        if said.get("adjective", before[1]) != before[1]:
            return f"the {noun} is {before[1]}, not {said['adjective']}"
        return None
    if is_new:
        return f"{said} is known already" if said in known.values() else None
    return None if said == before else f"{said} is not {before}"


# --------------------------------------------------------------------------------------------------
# When all is told


@dataclass
class Step:
    """One sentence of a tale: what happens in it, to whom, and where it stands in the text."""
    text: str
    event: str
    kind: str               # opening, intro, quiet, plot, side or end
    roles: dict             # {role: name, noun, place, animal or colour}
    start: int              # of the sentence in the tale, characters
    end: int
    causes: tuple = ()      # indices of the earlier sentences without which this could not be


@dataclass
class Tale:
    """A tale and its history."""
    text: str
    steps: list             # a Step for each sentence
    facts: set              # what holds at its end: ("has", "Tom", "kite")
    things: dict            # {noun: its adjective at the end}, the main thing first


def make_tale(scene, texts):
    """The Tale that ends in a Scene: its text, steps and facts."""
    steps, start = [], 0
    state, origin = START, {}
    for i, ((option, colour), text) in enumerate(zip(scene.told, texts)):
        roles = {role: plain(scene.words, letter) for role, letter in option.roles}
        if colour:
            roles["C"] = colour
        steps.append(Step(text, option.event.name, option.event.kind, roles, start,
                          start + len(text), causes_of(option, origin, steps)))
        start += len(text) + 1
        before, state = state, after(state, option)
        for fact in state - before:
            origin[fact] = i
    facts = {tuple(plain(scene.words, part) for part in fact) for fact in state}
    things = {word[0]: word[1] for word in scene.words.values() if isinstance(word, tuple)}
    return Tale(" ".join(texts), steps, facts, things)


def causes_of(option, origin, steps):
    """The indices of the earlier plot sentences to which an option owes a fact that it needs."""
    causes = set()
    for fact in needed_facts(option):
        if fact in origin and fact[0] not in SETTING:
            causes.add(origin[fact])
    return tuple(sorted(i for i in causes if steps[i].kind in ("plot", "quiet")))


def needed_facts(option):
    """The facts that an option needs, with its letters."""
    letters = option.letters
    for need in RULE_OF[option.event.name].needs:
        yield tuple(letters.get(word, word) for word in need)


def plain(words, letter):
    """The word of a letter; of a thing its noun."""
    word = words.get(letter, letter)
    return word[0] if isinstance(word, tuple) else word
