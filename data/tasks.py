"""Tasks to be rewarded for: what is asked, and what an answer is worth.

    gym:countdown            a task of reasoning-gym (data/gym.py); gym:a+gym:b takes turns
    tales                    how a tale goes on: reward for what holds together
    tales_chat               questions about a tale
    sudoku6, sudoku6:25      grids with so many blanks to fill in; sudoku, sudoku4
    gsm8k                    mathematics for schools, over the network
    FILE.jsonl               lines of {"prompt": "...", "answer": "..."} and what a reward reads

A question is a pure function of (split, number): a resumed run asks what it would have asked. The
held-out ones are fixed, and in no training.
"""
import difflib
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from data.chat_sets import enough_for_validation, gsm8k_number
from data.files import VAL_FRACTION, hash_fraction
from data.gym import PREFIX, Gym
from data.hub import stream_rows
from data.rewards import Named, exact, final_answer, number
from data.sudoku import SHAPES, empty_cells, is_solved, solutions, text_of
from data.tales import check, tell
from data.tales_chat import WITH_TALE, questions

BLANKS = {"sudoku": 45, "sudoku6": 25, "sudoku4": 10}      # unless the task says how many


@dataclass
class Example:
    """One thing that is asked."""
    prompt: str             # a question; of tales the beginning; of grids digits and dots
    answer: str = ""        # the reference's, if there is one
    facts: dict = field(default_factory=dict)       # what else a reward reads


class Task:
    """name; kind ("chat": a question; "text": a beginning; "grid": a puzzle); own: the Named reward
    that it brings, or None; example(split, number): an Example, split "train" or "val"."""
    kind = "chat"
    own = None


class GymTask(Task):
    """Tasks of reasoning-gym, in turns."""

    def __init__(self, text):
        self.name = text
        parts = [part.strip().removeprefix(PREFIX) for part in text.split("+")]
        self.gyms = [Gym(PREFIX + part) for part in parts]
        self.own = Named(self.reward, 1.0)

    def example(self, split, number):
        number, which = divmod(number, len(self.gyms))
        entry = self.gyms[which].entry_of(split, number)
        facts = {**entry["metadata"], "gym": which, "entry": entry}
        return Example(entry["question"], entry["answer"] or "", facts)

    def reward(self, example, text):
        """The package's score of what is in <answer>, or of all of a text without tags."""
        gym = self.gyms[example.facts["gym"]]
        return gym.score(final_answer(text), example.facts["entry"])


class Tales(Task):
    """The first sentences of a tale: how does it go on?"""
    kind = "text"

    def __init__(self):
        self.name, self.own = "tales", Named(holds_together, 1.0)
        check("Once.")          # the reader's tables, which are made once, take some seconds

    def example(self, split, number):
        rng = random.Random(f"tales {split} {number}")
        tale = tell(rng, held_out=split == "val")
        sentences = [step.text for step in tale.steps]
        given = rng.randint(1, len(sentences) // 2)
        return Example(" ".join(sentences[:given]), " ".join(sentences[given:]),
                       {"given": given})


def holds_together(example, text):
    """half for the share of the sentences that fit what was told before, half for a tale that holds
    together to its end"""
    found = check(f"{example.prompt} {text.strip()}")
    given = example.facts["given"]
    share = (len(found.events) - given) / max(found.sentences - given, 1)
    return max(share, 0.0) / 2 + found.consistent / 2


class TaleQuestions(Task):
    """A tale and a question about it."""

    def __init__(self):
        self.name, self.own = "tales_chat", Named(exact, 1.0)

    def example(self, split, number):
        rng = random.Random(f"tales_chat {split} {number}")
        asked = []
        while not asked:
            tale = tell(rng, held_out=split == "val")
            asked = questions(tale)
        one = rng.choice(asked)
        prompt = rng.choice(WITH_TALE).format(tale=tale.text, question=one.question)
        return Example(prompt, one.answer)


class Sudoku(Task):
    """A grid with blanks."""
    kind = "grid"

    def __init__(self, text):
        self.name, _, blanks = text.partition(":")
        self.shape, self.own = SHAPES[self.name], Named(cells_right, 1.0)
        self.blanks = BLANKS[self.name]
        if blanks:
            if not blanks.isdecimal() or not 1 <= int(blanks) <= self.shape.cells:
                raise ValueError(f"{self.name} has from 1 to {self.shape.cells} blanks, got "
                                 f"{blanks!r}")
            self.blanks = int(blanks)

    def example(self, split, number):
        rng = random.Random(f"{self.name} {split} {number}")
        grid = next(solutions([0] * self.shape.cells, rng))
        puzzle = empty_cells(grid, self.blanks, rng)
        return Example(text_of(puzzle).replace("0", "."), text_of(grid), {"puzzle": puzzle})


def cells_right(example, text):
    """1 for a grid that solves the puzzle, in whatever way; else the share of its blanks that are
    as in the grid it was made from, but for one"""
    grid = [int(digit) for digit in text]
    puzzle = example.facts["puzzle"]
    if len(grid) == len(puzzle) and is_solved(grid, puzzle):
        return 1.0
    blanks = [cell for cell, digit in enumerate(puzzle) if not digit]
    right = sum(text[cell:cell + 1] == example.answer[cell] for cell in blanks)
    return min(right, len(blanks) - 1) / len(blanks)


class Rows(Task):
    """A finite set of Examples, each in a split by its hash; a run goes through those for training
    again and again."""

    def __init__(self, name, examples, val_fraction, own=None):
        self.name, self.own, self.rows = name, own, {"train": [], "val": []}
        for one in sorted(examples, key=hash_of):
            self.rows["val" if hash_of(one) < val_fraction else "train"].append(one)
        for split in ("train", "val"):
            if not self.rows[split]:
                raise ValueError(f"{name} is too short: there is nothing for its {split} split")

    def example(self, split, number):
        return self.rows[split][number % len(self.rows[split])]


def hash_of(example):
    return hash_fraction(f"{example.prompt}\n{example.answer}")


def gsm8k():
    """GSM8K: the number after #### is the answer (Cobbe et al., 2110.14168)."""
    try:
        rows = list(stream_rows("openai/gsm8k", name="main"))
    except ConnectionError as error:        # whose advice is about texts to train on
        reason = str(error).partition(": try again")[0]
        raise ConnectionError(f"{reason}: try again with a network, or take tales, sudoku6, "
                              "gym:NAME or a FILE.jsonl, which need none") from None
    examples = [Example(row["question"], gsm8k_number(row)) for row in rows]
    return Rows("gsm8k", examples, VAL_FRACTION, Named(number, 1.0))


def jsonl(path):
    """The Rows of a .jsonl file. ValueError with the line's number for one without a prompt and an
    answer, two texts."""
    examples = []
    for place, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {place} is not JSON: "
                             f"{getattr(error, 'msg', error)}") from None
        if isinstance(row, dict) and "response" in row:     # as the files for fine-tuning have it
            row = {"answer": row["response"], **row}
        for name in ("prompt", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise ValueError(f'{path}, line {place} has no "{name}", a text: a line is '
                                 '{"prompt": "...", "answer": "..."}')
            if re.search("[\ud800-\udfff]", row[name]):
                raise ValueError(f"{path}, line {place} has a text that is not Unicode: it holds "
                                 "half of a surrogate pair")
        examples.append(Example(row["prompt"], row["answer"], row))
    if not examples:
        raise ValueError(f"{path} is empty")
    keys = [f"{one.prompt}\n{one.answer}" for one in examples]
    return Rows(path.name, examples, enough_for_validation(keys))


TASKS = {"tales": Tales, "tales_chat": TaleQuestions, "gsm8k": gsm8k}


def find_task(text):
    """The Task that a text like those above names. Raises ValueError, ImportError or, as no file is
    there or no network, OSError."""
    name = text.partition(":")[0]
    if text.startswith(PREFIX):
        return GymTask(text)
    if name in SHAPES:
        return Sudoku(text)
    if text in TASKS:
        return TASKS[text]()
    path = Path(text).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        return jsonl(path)
    known = [*TASKS, *SHAPES]
    near = difflib.get_close_matches(name, known, 1)
    advice = f"; did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(f"no task called {text!r}{advice} (take {', '.join(known)}, gym:NAME "
                            "or a FILE.jsonl)")
