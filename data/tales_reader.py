"""The reader: any text as a tale, and what is wrong with it.

A sentence may tell several events, and a pronoun may leave open whose: `check` keeps all Scenes to
which the sentences so far may have led. A tale is consistent if one of them comes to an ending.
"""
import math
import re
from collections import Counter
from dataclasses import dataclass, field

from data.tales_machine import RULE_OF, is_role
from data.tales_scene import Scene, Tale, make_tale, objection, plain
from data.tales_sentences import capitalised, readings, shape
from data.tales_teller import NOUNS, PLACE_NAMES, SENTENCES
from data.tales_world import ADJECTIVES, ANIMALS, COLOURS, GENDER, NAMES, THINGS


@dataclass
class Check:
    """What `check` found: counts of sentences, whether they hold together, the first contradiction
    ("" if none), and what a consistent beginning is about."""
    sentences: int
    grammatical: int
    consistent: bool
    problem: str = ""
    names: list = field(default_factory=list)
    things: list = field(default_factory=list)
    events: list = field(default_factory=list)
    tale: Tale = None           # its history as it was read, of a consistent one


# A sentence may begin with what somebody says; what is said later in it may end it.
SENTENCE = re.compile(r'\s*("[^"]*")?((?:[^".!?]|"[^"]*[^".!?]")*)("[^"]*[.!?]"|[.!?]|"|$)')


def split_sentences(text):
    """The sentences of a text. One that begins with what is said goes on after it."""
    found = [match[0].strip() for match in SENTENCE.finditer(text)]
    return [sentence for sentence in found if sentence]


def check(text):
    """Read any text as a tale: a Check. A tale is one paragraph and begins and ends as tales do."""
    texts = split_sentences(text)
    scenes = [Scene(words={})]
    grammatical, problem = 0, ""
    for i, sentence in enumerate(texts):
        found = read(sentence)
        grammatical += bool(found)
        if problem:
            continue
        following = next_scenes(scenes, found)
        if following:
            scenes = following
        else:
            reason = explain(scenes, found) if found else "no tale says it so"
            problem = f"sentence {i + 1}, {sentence!r}: {reason}"
    if not problem:
        problem = whole(texts, text, scenes)
    scene = scenes[0]
    if not problem:
        scene = next(scene for scene in scenes if ("end",) in scene.state)
    result = Check(len(texts), grammatical, not problem, problem)
    result.names = [scene.words[letter] for letter in "ab" if letter in scene.words]
    result.things = [scene.words[letter][0] for letter in "tu" if letter in scene.words]
    result.events = [option.event.name for option, _ in scene.told]
    if result.consistent:
        result.tale = make_tale(scene, texts)
    return result


def read(sentence):
    """[(Pattern, {role: what the sentence says of it})] of all that a sentence may tell."""
    key, tokens = shape(sentence)
    if sentence != capitalised(sentence):
        return []
    found = []
    for reading in readings().get(key, ()):
        words = said(reading, tokens)
        if words is not None:
            found.append((reading.pattern, words))
    return found


def said(reading, tokens):
    """{role: a name, {"noun", "adjective", "use"}, a place, an animal, a colour} as the tokens of a
    sentence have it; None where they contradict each other or the pattern."""
    words = {}
    for (role, literal), token in zip(reading.roles, tokens):
        if role is None:
            if token.text != literal:
                return None
            continue
        value = token.value()
        if token.kind in "ACTV" and role != "C":
            part = {"T": "noun", "V": "use"}.get(token.kind, "adjective")
            value_of_part = words.setdefault(role, {}).setdefault(part, value)
        else:
            value_of_part = words.setdefault(role, value)
        if value_of_part != value:
            return None
    names = [word for role, word in words.items() if role in "AB"]
    if len(set(names)) < len(names):
        return None
    for word in words.values():
        if isinstance(word, dict) and "noun" in word:
            if word.get("use", THINGS[word["noun"]]) != THINGS[word["noun"]]:
                return None             # nobody rings a kite
    for role, of_gender in reading.pattern.genders:
        if role in words and GENDER[words[role]] != of_gender:
            return None
    return words


def next_scenes(scenes, found):
    """The Scenes to which a sentence, as `read` found it, may lead from any of these."""
    following = {}
    by_event = {}
    for one, words in found:
        by_event.setdefault(one.event.name, []).append((one, words))
    for scene in scenes:
        for option in scene.options():
            for one, words in by_event.get(option.event.name, ()):
                if objection(scene, option, one, words) is None:
                    letters = option.letters
                    new = {letters[role]: word_of(word) for role, word in words.items()
                           if letters.get(role) in option.new}
                    if "C" in words:
                        new["C"] = words["C"]
                    scene_after = scene.follow(option, one, new)
                    following.setdefault(identity(scene_after), scene_after)
    return list(following.values())


def word_of(said_word):
    """What is kept of a new word: of a thing (noun, adjective)."""
    if isinstance(said_word, dict):
        return said_word["noun"], said_word["adjective"]
    return said_word


def identity(scene):
    """What tells two Scenes apart."""
    return (scene.state, scene.persons, scene.things, scene.animals,
            tuple(sorted(scene.words.items())))


def whole(texts, text, scenes):
    """What a text lacks whose sentences all fit, "" if nothing."""
    if not texts:
        return "there is no text"
    if not any(("end",) in scene.state for scene in scenes):
        return "it has no ending"
    if not SENTENCES[0] <= len(texts) <= SENTENCES[1]:
        return f"it has {len(texts)} sentences; a tale has {SENTENCES[0]} to {SENTENCES[1]}"
    if " ".join(texts) != text.strip():
        return "a tale is one paragraph, with one space between sentences"
    return ""


def explain(scenes, found):
    """Why a sentence of the grammar does not fit after these scenes."""
    scene = scenes[0]
    for option in scene.options():
        for one, words in found:
            if option.event is one.event:
                reason = objection(scene, option, one, words)
                if reason:
                    return reason
    one, words = found[0]
    return unmet(scene, one, words) or f"{one.event.name} cannot happen here"


def unmet(scene, one, words):
    """The first need of an event that is not so, in words; "" if that is hard to say."""
    letters = {plain(scene.words, letter): letter for letter in scene.words}
    bound = {role: scene.referent(dict(one.genders)[role]) for role in one.pronouns}
    bound |= {role: next(iter(scene.things), None) for role in one.it}
    for role, word in words.items():
        noun = word.get("noun") if isinstance(word, dict) else word
        bound[role] = letters.get(noun)
        needed = any(role in need for need in RULE_OF[one.event.name].needs)
        if noun and needed and bound[role] is None:
            return f"nobody spoke of {noun if noun in NAMES else f'a {noun}'} before"
    for need in RULE_OF[one.event.name].needs:
        fact = tuple(bound.get(word, word) for word in need)
        if need[0] in DENIALS and None not in fact and not any(map(is_role, fact)):
            if fact not in scene.state:
                return DENIALS[need[0]].format(*(plain(scene.words, part) for part in fact[1:]))
    return ""


DENIALS = {
    "has": "{0} does not have the {1}", "owns": "the {1} does not belong to {0}",
    "lies": "the {0} is not there", "broken": "the {0} is not broken",
    "wants": "{0} did not want the {1}",
    "asked": "{0} did not ask {1} for the {2}", "lent": "{0} has not lent the {2} to {1}",
    "promised": "{0} promised nothing", "lost": "{0} has not lost the {1}",
    "missed": "{0} does not miss the {1}", "took": "{0} did not take the {2}",
    "feels": "nothing just made {0} feel so",
    "owes": "{0} has nothing to thank {1} for", "stuck": "the {0} is free",
    "bare": "it is known what {0} has",
}


# --------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class Mention:
    """A word of a text that could be another one of its kind: "person", "thing", "place", "animal"
    or "property"."""
    kind: str
    word: str
    start: int              # characters
    end: int
    others: int             # how often the word stands elsewhere in the text


def mentions(text):
    """All Mentions of a text, in its order."""
    found = [(match.lastgroup, match[0], match.span()) for match in MENTION.finditer(text)]
    counts = Counter((kind, word) for kind, word, _ in found)
    return [Mention(kind, word, start, end, counts[kind, word] - 1)
            for kind, word, (start, end) in found]


def is_certain(text, mention):
    """Whether a mention follows from the rest of a consistent tale: no other word of its kind in
    its place would make one."""
    for word in KINDS_OF_WORDS[mention.kind]:
        if word != mention.word:
            if check(text[:mention.start] + word + text[mention.end:]).consistent:
                return False
    return True


def variety(texts):
    """{"names", "things", "events": entropy in nats} of what some texts are about: each name and
    thing counts once a text, an event once a sentence of the grammar. Of no text all are 0."""
    names, things, events = Counter(), Counter(), Counter()
    for text in texts:
        words = {(mention.kind, mention.word) for mention in mentions(text)}
        names.update(word for kind, word in words if kind == "person")
        things.update(word for kind, word in words if kind == "thing")
        for sentence in split_sentences(text):
            found = read(sentence)
            if found:
                events[found[0][0].event.name] += 1
    return {"names": entropy(names), "things": entropy(things), "events": entropy(events)}


def entropy(counts):
    """Of a Counter, in nats."""
    total = sum(counts.values())
    return sum(-count / total * math.log(count / total) for count in counts.values())


KINDS_OF_WORDS = {"person": NAMES, "thing": NOUNS, "place": PLACE_NAMES, "animal": ANIMALS,
                  "property": ADJECTIVES}
MENTION = re.compile("|".join((
    *(rf"(?P<{kind}>\b(?:{'|'.join(KINDS_OF_WORDS[kind])})\b)"
      for kind in ("person", "thing", "place", "animal")),
    # "new" is a property of things alone, a colour whatever it stands after.
    rf"(?P<property>\b(?:(?:{'|'.join(ADJECTIVES)})(?= (?:{'|'.join(NOUNS)})\b)"
    rf"|(?:{'|'.join(COLOURS)}))\b)")))
