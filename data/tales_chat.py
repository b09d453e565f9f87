"""Questions about tales with their answers, and requests for tales: python data/tales_chat.py

Every answer follows from a tale's history, be it the teller's or what `check` read in a text:
`questions(tale)` gives all of them. Run as a program it writes the two tasks of lm-eval in
evaluation/tasks, from held-out tales and a fixed seed.
"""
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":      # `python data/tales_chat.py` has data/ on its path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.tales_events import EVENTS
from data.tales_sentences import capitalised, pattern, roles_of, spell
from data.tales_teller import plan, tell, tell_plan
from data.tales_world import COLOURS, GENDER, MOODS, NAMES, PLACES, with_article

CHAT_TALES = 9_000          # tales of the data, one conversation each
TASK_DOCUMENTS = 100        # of each task
NO_TALE = "Tell me a tale first."
EVENT_OF = {event.name: event for event in EVENTS}

# --------------------------------------------------------------------------------------------------
# What one can ask about an event: (question, answer)

WHERE = {
    "outing": ("Where was {A} at the beginning?", "{A} was {P:at}."),
    "go": ("Where did {A} go with {T:the}?", "{A} went {P:to}."),
    "meet": ("Where did {A} meet {B:him}?", "{A} met {B:him} {P:at}."),
    "forget": ("Where did {A} leave {T:the}?", "{A} left {T:the} {P:at}."),
    "blow": ("Where did the wind blow {T:the}?", "The wind blew {T:the} {P:to}."),
    "find_again": ("Where did {A} find {T:the}?", "{A} found {T:the} {P:at}."),
    "search": ("Where did {B} find {T:the}?", "{B} found {T:the} {P:at}."),
    "find_for": ("Where did {B} find {T:the}?", "{B} found {T:the} {P:at}."),
    "hide": ("Where did {A} hide {T:the}?", "{A} hid {T:the} {P:at}."),
    "snatch": ("Where did {X} run with {T:the}?", "It ran {P:to}."),
    "stuck": ("Where was {X}?", "The {X:noun} was {P:at}."),
}
WHO = {
    "find_for": ("Who found {T:the}?", "{B} found {T:the}."),
    "search": ("Who found {T:the}?", "{B} found {T:the}."),
    "find_again": ("Who found {T:the}?", "{A} found {T:the}."),
    "break_own": ("Who broke {T:the}?", "{A} broke {T:the}."),
    "break_lent": ("Who broke {T:the}?", "{B} broke {T:the}."),
    "mend_own": ("Who mended {T:the}?", "{A} mended {T:the}."),
    "help_mend": ("Who mended {T:the}?", "{B} mended {T:the}."),
    "mend_vowed": ("Who mended {T:the}?", "{B} mended {T:the}."),
    "take": ("Who took {T:the}?", "{B} took {T:the}."),
    "snatch": ("Who took {T:the}?", "{X} took {T:the}."),
    "rescue": ("Who saved {X}?", "{A} saved {X}."),
    "promise": ("Who made a promise?", "{B} made a promise."),
    "lend": ("Who lent {T:the} to {B:him}?", "{A} lent {T:the} to {B:him}."),
    "admire": ("Who liked {T:the}?", "{B} liked {T:the}."),
}
# What somebody did with a thing: the person who did it, and the sentence.
DEEDS = {
    "present": "{A} gave {T:the} to {B:him} as a present.",
    "lend": "{A} lent {T:the} to {B:him}.",
    "share_after_all": "{A} shared {T:the} with {B:him}.",
    "trade": "{A} traded {T:the} for {U:the}.",
    "hide": "{A} hid {T:the} {P:at}.",
    "break_own": "{A} broke {T:the}.",
    "mend_own": "{A} mended {T:the}.",
    "paint": "{A} painted {T:the} {C}.",
    "forget": "{A} left {T:the} {P:at}.",
    "find_again": "{A} found {T:the}.",
    "make": "{A} made {T:the}.",
    "buy": "{A} bought {T:the}.",
}
# What happened, in a few words, for "What happened first?"
HAPPENED = DEEDS | {
    "admire": "{B} liked {T:the}.",
    "birthday": "It was the birthday of {B:name}.",
    "idea": "{A} wanted to paint {T:the}.",
    "blow": "The wind blew {T:the} {P:to}.",
    "snatch": "{X:a} took {T:the}.",
    "stuck": "{A} found {X:a}.",
}


@dataclass(frozen=True)
class Question:
    """A question about a tale, its only answer, its kind (holder, who, where, why, deed, first,
    property), and wrong answers of the same form, if there are any."""
    kind: str
    question: str
    answer: str
    wrong: tuple = ()


def phrase(event, template, roles):
    """A template, in the notation of the table of events, for what happened to whom. Persons have
    their names, but for a second mention."""
    genders = tuple(GENDER[roles[role]] for role in roles_of(template, "AB"))
    forms = tuple("noun" for _ in roles_of(template, "TU"))
    one = pattern(event, template, genders, (), False, forms)
    spelled = []
    for role, form in one.fills:
        word = (roles[role], "") if role in "TU" else roles[role]
        spelled.append(spell(form, word))
    return capitalised(one.text.format(*spelled))


def questions(tale):
    """All Questions about a Tale. What could be answered in two ways is not asked."""
    found = holder_questions(tale) + property_questions(tale) + first_question(tale)
    for step in tale.steps:
        found += step_questions(step)
    by_question = {}
    for one in found:
        by_question.setdefault(one.question, set()).add(one.answer)
    return [one for one in dict.fromkeys(found) if len(by_question[one.question]) == 1]


def holder_questions(tale):
    """Who has each thing at the end."""
    found = []
    for fact in sorted(tale.facts):
        if fact[0] == "has":
            _, holder, noun = fact
            answer = f"{name_of(holder)} has the {noun}."
            wrong = tuple(f"{name} has the {noun}." for name in NAMES if name != holder)
            for question in (f"Who has the {noun} now?", f"Who has the {noun} in the end?"):
                found.append(Question("holder", question, answer, wrong))
        if fact[0] == "lies":
            _, noun, place = fact
            found.append(Question("where", f"Where is the {noun} now?",
                                  f"The {noun} is {PLACES[place][0]}.",
                                  tuple(f"The {noun} is {at}." for at in other_places(place))))
    return found


def name_of(holder):
    """A person's name, or "The dog"."""
    return holder if holder in NAMES else f"The {holder}"


def people(tale):
    """The persons of a tale, in the order in which they come up."""
    names = [word for step in tale.steps for word in step.roles.values() if word in NAMES]
    return list(dict.fromkeys(names))


def other_places(place):
    """Where else something could be."""
    return [at for other, (at, _) in PLACES.items() if other != place]


def property_questions(tale):
    """What kind of thing each is at the end."""
    found = []
    painted = {step.roles["T"]: step.roles["C"] for step in tale.steps if step.event == "paint"}
    for noun, adjective in tale.things.items():
        if noun in painted:
            wrong = tuple(f"The {noun} is {colour}." for colour in COLOURS if colour != adjective)
            found.append(Question("property", f"What colour is the {noun} now?",
                                  f"The {noun} is {adjective}.", wrong))
        else:
            answer = f"It was {with_article(adjective, noun)}."
            found.append(Question("property", f"What kind of {noun} was it?", answer))
    return found


def first_question(tale):
    """What happened first, if the first event of the plot has a short sentence."""
    for step in tale.steps:
        if step.kind == "plot":
            if step.event not in HAPPENED:
                return []
            answer = phrase(EVENT_OF[step.event], HAPPENED[step.event], step.roles)
            return [Question("first", "What happened first?", answer)]
    return []


def step_questions(step):
    """What one can ask about one sentence of a tale."""
    event, found = EVENT_OF[step.event], []
    for kind, table in (("where", WHERE), ("who", WHO)):
        if step.event in table:
            question, answer = (phrase(event, text, step.roles) for text in table[step.event])
            wrong = ()
            if kind == "where":
                wrong = tuple(phrase(event, table[step.event][1], step.roles | {"P": place})
                              for place in PLACES if place != step.roles["P"])
            found.append(Question(kind, question, answer, wrong))
    if step.event in DEEDS:
        question = phrase(event, "What did {A} do with {T:the}?", step.roles)
        answer = phrase(event, DEEDS[step.event], step.roles)
        found.append(Question("deed", question, answer))
    if step.event in REASONS:
        found.append(why_question(step))
    return found


def reasons():
    """{name of the event that tells a mood: (event that caused it, role, mood, the reason)}"""
    found = {}
    for event in EVENTS:
        for line in event.moods:
            who, clause = line.split(": ")
            role, *moods = who.split()
            for mood in moods:
                found[f"{event.name}_{role}_{mood}"] = (event, role, MOODS[mood][0], clause)
    return found


REASONS = reasons()


def why_question(step):
    """Why somebody felt as a sentence says."""
    event, role, mood, clause = REASONS[step.event]
    frame = f"{{{role}}} was {mood}, because {clause}."
    question = f"Why was {step.roles[role]} {mood}?"
    wrong = []
    for other, other_role, other_mood, other_clause in REASONS.values():
        same = other is not event and other_mood == mood and other_role == role
        if same and set(roles_of(other_clause, "ABTUXC")) <= set(step.roles):
            wrong.append(phrase(event, f"{{{role}}} was {mood}, because {other_clause}.",
                                step.roles))
    answer = phrase(event, frame, step.roles)
    # "Tom had lent her the kite" is not wrong where he had lent it "after all".
    wrong = tuple(text for text in dict.fromkeys(wrong)
                  if text[:-1] not in answer and answer[:-1] not in text)
    return Question("why", question, answer, wrong)


# --------------------------------------------------------------------------------------------------
# Conversations

WITH_TALE = ("{tale}\n{question}", "{tale}\n\n{question}", "Here is a tale. {tale}\n{question}")
REQUESTS = ("Tell a tale about {what}.", "Tell me a tale about {what}.",
            "Please tell a tale with {what}.", "I would like a tale about {what}.",
            "Do you know a tale about {what}?")
SHARES = (("question", 0.5), ("two questions", 0.22), ("request", 0.25), ("no tale", 0.03))


def conversations_about_tales():
    """Conversations, each a list of (what the user says, the answer)."""
    rng = random.Random(3)
    kinds, weights = zip(*SHARES)
    plot = None
    for number in range(CHAT_TALES):
        if number % 3 == 0:         # a plan takes longest to find: it serves for three tales
            plot = plan(rng)
        tale = tell_plan(plot, rng)
        while tale is None:
            plot = plan(rng)
            tale = tell_plan(plot, rng)
        yield conversation(tale, rng.choices(kinds, weights)[0], rng)


def conversation(tale, kind, rng):
    """The turns of one conversation of a kind."""
    if kind == "request":
        return [(rng.choice(REQUESTS).format(what=subject(tale, rng)), tale.text)]
    by_kind = {}
    for one in questions(tale):
        by_kind.setdefault(one.kind, []).append(one)
    chosen = [rng.choice(by_kind[name]) for name in rng.sample(sorted(by_kind), len(by_kind))]
    first = chosen[0]
    if kind == "no tale":
        return [(first.question, NO_TALE)]
    asked = rng.choice(WITH_TALE).format(tale=tale.text, question=first.question)
    turns = [(asked, first.answer)]
    if kind == "two questions" and len(chosen) > 1:
        turns.append((chosen[1].question, chosen[1].answer))
    return turns


def subject(tale, rng):
    """Some of the persons and things of a tale, and perhaps a place: "Rosa and Ben in the park"."""
    names = people(tale)
    chosen = names[:1] if rng.random() < 0.4 else names[:2]
    if len(chosen) == 1 or rng.random() < 0.4:
        noun, adjective = next(iter(tale.things.items()))
        painted = any(step.event == "paint" for step in tale.steps)
        thing = with_article(adjective, noun)
        if painted or rng.random() < 0.5:
            thing = f"a {noun}"
        chosen.append(thing)
    text = chosen[0]
    if len(chosen) > 1:
        text = f"{', '.join(chosen[:-1])} and {chosen[-1]}"
    places = [word for step in tale.steps for word in step.roles.values() if word in PLACES]
    if places and rng.random() < 0.3:
        text = f"{text} {PLACES[places[0]][0]}"
    return text


# --------------------------------------------------------------------------------------------------
# Tasks for lm-eval

TASKS = Path(__file__).resolve().parent.parent / "evaluation" / "tasks"


def choice_documents():
    """The documents of tales_choice: {"tale", "question", "choices", "answer": an index}."""
    rng = random.Random(4)
    for _ in range(TASK_DOCUMENTS):
        one = None
        while one is None:
            tale = tell(rng, held_out=True)
            asked = [one for one in questions(tale) if len(one.wrong) >= 3]
            kinds = sorted({one.kind for one in asked} & {"holder", "where", "why"})
            if kinds:
                kind = rng.choice(kinds)
                one = rng.choice([one for one in asked if one.kind == kind])
        wrong = rng.sample(one.wrong, len(one.wrong))
        # Those of whom the tale speaks come first: the others are wrong at first sight.
        wrong = sorted(wrong, key=lambda text: text.split()[0] not in people(tale))[:3]
        choices = rng.sample([one.answer, *wrong], 4)
        yield {"tale": tale.text, "question": one.question, "choices": choices,
               "answer": choices.index(one.answer)}


def answer_documents():
    """The documents of tales_answer: {"tale", "question", "answer"}."""
    rng = random.Random(5)
    for _ in range(TASK_DOCUMENTS):
        tale = tell(rng, held_out=True)
        asked = questions(tale)
        kind = rng.choice(sorted({one.kind for one in asked}))
        one = rng.choice([one for one in asked if one.kind == kind])
        yield {"tale": tale.text, "question": one.question, "answer": one.answer}


def task_file(documents):
    """The documents as the text of a .jsonl file."""
    return "".join(json.dumps(document) + "\n" for document in documents)


def main():
    if len(sys.argv) > 1:
        print("error: this takes no arguments: it writes evaluation/tasks/tales_*.jsonl",
              file=sys.stderr)
        sys.exit(2)
    for name, documents in (("tales_choice", choice_documents()),
                            ("tales_answer", answer_documents())):
        path = TASKS / f"{name}.jsonl"
        path.write_text(task_file(documents), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
