"""What can happen next in a tale: facts, and what the events make of them.

The machine knows no names and no words. It calls the persons a b, the things t u, the animal x,
the places p q r and home, in the order in which they come up; a state is a frozenset of facts such
as ("has", "a", "t"). So there are few states, `options` remembers what each of them leads to, and
one machine serves whoever tells a tale and whoever checks one.
"""
import collections
import functools
import itertools
import re
from dataclasses import dataclass, field, replace

from data.tales_events import EVENTS, FRESH, OPEN, URGENT, Event, feeling_fact

KINDS = {"A": "person", "B": "person", "T": "thing", "U": "thing", "X": "animal", "P": "place",
         "V": "anywhere", "W": "anywhere", "Z": "anywhere", "C": "colour"}
LETTERS = {"person": ("a", "b"), "thing": ("t", "u"), "animal": ("x",),
           "place": ("p", "q", "r"), "anywhere": ("p", "q", "r", "home")}
START = frozenset({("start",), ("nobody",)})


@dataclass(frozen=True)
class Rule:
    """An event, its facts taken apart: tuples of a predicate and roles or constants."""
    event: Event
    needs: tuple            # facts that must hold
    forbids: tuple          # facts that must not; "*" stands for anything
    calm: frozenset         # predicates of which no fact may hold
    adds: tuple
    ends: tuple
    roles: tuple            # all roles but colours, in the order of the alphabet
    named: tuple            # those that its ways may name
    needed: frozenset       # the predicates of the needs
    relevant: tuple         # the predicates on which it depends which options there are


@dataclass(frozen=True)
class Option:
    """What may happen next: an event, who takes part, and which of them are new."""
    event: Event
    roles: tuple            # ((role, letter), ...)
    new: tuple              # the letters that were not there before
    named: tuple            # the letters of the roles that its sentences may name
    letters: dict = field(compare=False, hash=False)    # roles, as a dictionary


def is_role(word):
    """Whether a word of a fact is a role, to be bound to a letter."""
    return len(word) == 1 and word in KINDS


def parse_fact(text):
    """("has", "A", "T") of "A has T": the predicate comes first."""
    words = text.split()
    if len(words) > 1 and (is_role(words[0]) or words[0] == "*"):
        words[0], words[1] = words[1], words[0]
    return tuple(words)


def parse_event(event):
    """The Rule of an event."""
    needs, forbids, calm, adds, ends = [], [], set(), [], []
    for text in event.needs.split(", "):
        words = text.split()
        if words[0] == "not":
            forbids.append(parse_fact(text.removeprefix("not ")))
        elif words[0] == "calm":
            calm = OPEN - set(words[2:])
        elif words[1:2] == ["with"]:
            needs += [("at", words[0], "Z"), ("at", words[2], "Z")]
        else:
            needs.append(parse_fact(text))
    for text in event.then.split(", "):
        if text.startswith("no "):
            ends.append(parse_fact(text.removeprefix("no ")))
        else:
            adds.append(parse_fact(text))
    adds += [parse_fact(feeling_fact(event, line)) for line in event.moods]
    if event.kind == "plot":
        adds.append(("happened",))
    if event.kind == "end":
        needs.append(("happened",))
    said = [role for way in event.ways for role in re.findall(r"{([A-Z]+)", way)]
    words = set(itertools.chain(*needs, *forbids, *adds, *ends, *said))
    roles = tuple(sorted(word for word in words if is_role(word) and word != "C"))
    named = tuple(role for role in roles if role in "".join(said))
    needed = frozenset(need[0] for need in needs)
    relevant = needed | {"known"} | {fact[0] for fact in forbids}
    return Rule(event, tuple(needs), tuple(forbids), frozenset(calm), tuple(adds), tuple(ends),
                roles, named, needed, tuple(sorted(relevant)))


def without_unread(rules):
    """The rules without the facts that none of them asks for: fewer facts make fewer states."""
    read = {"end"} | OPEN
    for rule in rules:
        read |= rule.needed | {fact[0] for fact in rule.forbids}
    for rule in rules:
        yield replace(rule, adds=tuple(fact for fact in rule.adds if fact[0] in read))


RULES = tuple(without_unread([parse_event(event) for event in EVENTS]))
RULE_OF = {rule.event.name: rule for rule in RULES}


def rules_by_key():
    """{predicate: the numbers of the rules that it is the rarest need of}: where it does not hold,
    nobody has to look at them."""
    counts = collections.Counter(itertools.chain(*(rule.needed for rule in RULES)))
    found = {}
    for number, rule in enumerate(RULES):
        key = min(sorted(rule.needed), key=counts.get)
        found.setdefault(key, []).append(number)
    return found


RULES_BY_KEY = rules_by_key()


# --------------------------------------------------------------------------------------------------
# From state to state


@functools.cache
def options(state):
    """All Options of a state, a tuple."""
    if ("end",) in state:
        return ()
    by_predicate = group(state)
    present = frozenset(by_predicate)
    urgent = URGENT & present
    found = []
    for number in sorted(itertools.chain(*(RULES_BY_KEY.get(key, ()) for key in present))):
        rule = RULES[number]
        if not (rule.needed <= present and rule.calm.isdisjoint(present)):
            continue
        if urgent and urgent.isdisjoint(rule.needed):
            continue
        # Few facts matter to a rule: what it found for others like them holds here as well.
        facts = tuple(by_predicate.get(predicate, ()) for predicate in rule.relevant)
        found += options_of_rule(number, facts)
    return tuple(found)


def group(facts):
    """{predicate: its facts, sorted}"""
    by_predicate = {}
    for fact in sorted(facts):
        by_predicate.setdefault(fact[0], []).append(fact)
    return {predicate: tuple(facts) for predicate, facts in by_predicate.items()}


@functools.cache
def options_of_rule(number, facts):
    """The Options of one rule, given the facts of its relevant predicates."""
    rule = RULES[number]
    by_predicate = dict(zip(rule.relevant, facts))
    found = []
    for letters in bindings(rule.needs, by_predicate, {}):
        found += complete(rule, letters, by_predicate)
    return tuple(dict.fromkeys(found))


def bindings(needs, by_predicate, letters):
    """Every {role: letter} under which all needs are facts."""
    if not needs:
        yield letters
        return
    for fact in by_predicate[needs[0][0]]:
        bound = unify(needs[0], fact, letters)
        if bound is not None:
            yield from bindings(needs[1:], by_predicate, bound)


def unify(need, fact, letters):
    """`letters` with the roles of a need bound so that it is this fact; None if it cannot be."""
    if len(need) != len(fact):
        return None
    bound = dict(letters)
    for word, value in zip(need[1:], fact[1:]):
        if not is_role(word):
            if word != value:
                return None
        elif word in bound:
            if bound[word] != value:
                return None
        elif fits(word, value, bound):
            bound[word] = value
        else:
            return None
    return bound


def fits(role, letter, letters):
    """Whether a role may be bound to a letter. No two roles share one, but for Z, which says only
    that two persons are together."""
    if letter not in LETTERS[KINDS[role]]:
        return False
    if role == "Z":
        return True
    return all(value != letter or other == "Z" for other, value in letters.items())


def complete(rule, letters, by_predicate):
    """The Options of a rule whose needs are met: roles that are still free become new ones."""
    free = [role for role in rule.roles if role not in letters]
    known = [fact[1] for fact in by_predicate["known"]]
    choices = []
    for role in free:
        letters_of_kind = LETTERS[KINDS[role]]
        fresh = [letter for letter in letters_of_kind if letter not in known][:1]
        if KINDS[role] == "place":
            fresh += [letter for letter in letters_of_kind if letter in known]
        choices.append(fresh)
    for values in itertools.product(*choices):
        bound = dict(letters)
        for role, letter in zip(free, values):
            if fits(role, letter, bound):
                bound[role] = letter
        if len(bound) < len(letters) + len(free):
            continue
        if any(holds(fact, bound, by_predicate) for fact in rule.forbids):
            continue
        new = tuple(letter for letter in values if letter not in known)
        roles = tuple((role, bound[role]) for role in rule.roles)
        named = tuple(bound[role] for role in rule.named)
        yield Option(rule.event, roles, new, named, dict(roles))


def holds(pattern, letters, by_predicate):
    """Whether there is a fact of this pattern."""
    return any(matches(pattern, fact, letters) for fact in by_predicate[pattern[0]])


def matches(pattern, fact, letters):
    """Whether a fact is of a pattern: "*" stands for anything."""
    if len(pattern) != len(fact):
        return False
    words = [letters.get(word, word) for word in pattern]
    return all(word in ("*", value) for word, value in zip(words, fact))


@functools.cache
def after(state, option):
    """The facts after an event, a frozenset."""
    rule = RULE_OF[option.event.name]
    letters = option.letters
    facts = set(state)
    if rule.event.kind != "side":
        facts = {fact for fact in facts if fact[0] not in FRESH}
    for pattern in rule.ends:
        facts = {fact for fact in facts if not matches(pattern, fact, letters)}
    for pattern in rule.adds:
        facts.add(tuple(letters.get(word, word) for word in pattern))
    facts.update(("known", letter) for letter in option.new)
    return frozenset(facts)
