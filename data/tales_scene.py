"""What has been told so far, with names and words: what a sentence may refer to, and what it adds.

The machine (tales_machine.py) knows what may happen to a, b and t; a Scene knows that a is Tom and
t the red kite, and who was spoken of last, which decides whom "he" and "it" can mean.
"""
from dataclasses import dataclass

from data.tales_machine import START, after, options
from data.tales_world import GENDER, THINGS


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
        """The letter that he or she means here, None if nobody."""
        for letter in self.persons:
            if GENDER[self.words[letter]] == of_gender:
                return letter
        return None

    def may_say_they(self, letters):
        """Whether "they" can only mean these two."""
        known = [letter for letter in "abc" if letter in self.words]
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
