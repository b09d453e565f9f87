"""Tasks of the package reasoning-gym: gym:NAME, with options gym:NAME:option=value:option=value.

A hundred kinds of puzzles, made on the spot and scored by the package; no network. The same
question is never in both splits: as in all of data/, the hash of a question and its answer says in
which it is.
"""
import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import itertools

from data.files import VAL_FRACTION, hash_fraction

PREFIX = "gym:"
CHUNK = 10_000          # questions of one data set of the package: some prepare all at once
VAL_FROM = 10**9        # where the numbers of held-out questions begin
TRIES = {"train": 16, "val": 256}       # numbers that are tried for one question of a split


def package():
    """The package. ImportError, one line, where it is missing."""
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError:
        raise ImportError("gym:NAME needs a package that is not here: pip install "
                          "reasoning-gym") from None
    return reasoning_gym


class Gym:
    """One kind of task, from its text "gym:countdown:max_numbers=4". Raises ImportError without the
    package, ValueError for a kind or an option that it does not know."""

    def __init__(self, text):
        self.text = text
        self.name, *options = text.removeprefix(PREFIX).split(":")
        kinds = package().factory.DATASETS
        if self.name not in kinds:
            near = difflib.get_close_matches(self.name, kinds, 1, 0)[0]
            raise ValueError(f"reasoning-gym has no task called {self.name!r}; did you mean "
                             f"{near!r}? (it has {len(kinds)})")
        self.options = read_options(self.name, kinds[self.name][1], options)
        self.chunk = functools.lru_cache(maxsize=2)(self.chunk)
        self.scorer = self.chunk(0)

    def chunk(self, number):
        """The package's data set of the questions from number * CHUNK on."""
        with self.mistakes_told():
            return package().create_dataset(self.name, seed=number * CHUNK, size=CHUNK,
                                            **self.options)

    def entry(self, number):
        """A question as the package has it: {"question", "answer", "metadata"}. ValueError for an
        option that only shows here that it cannot be, such as max_digits=2.5."""
        questions = self.chunk(number // CHUNK)
        with self.mistakes_told():
            return questions[number % CHUNK]

    @contextlib.contextmanager
    def mistakes_told(self):
        """ValueError for whatever the package raises under it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  a check of the package's own, of any kind
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self.text} cannot be made: {reason}") from None

    def entry_of(self, split, number):
        """The n-th question of a split. ValueError where the task has too few different ones."""
        begin = number * TRIES[split] + (VAL_FROM if split == "val" else 0)
        for candidate in range(begin, begin + TRIES[split]):
            entry = self.entry(candidate)
            if split_of(entry) == split:
                return entry
        raise ValueError(f"{self.text} has too few different questions to hold some out")

    def score(self, answer, entry):
        """What the package gives for an answer, from 0 to 1."""
        return self.scorer.score_answer(answer, entry)

    def label(self):
        """A name for the folder of the prepared data: another version may ask other questions."""
        version = importlib.metadata.version("reasoning-gym")
        return f"{self.text.replace(':', '-')}-{version}"


def split_of(entry):
    """The split of a question, by its hash; chat_sets.py comes to the same."""
    text = f"{entry['question']}\n{entry['answer']}"
    return "val" if hash_fraction(text) < VAL_FRACTION else "train"


def read_options(name, config, texts):
    """{option: value} of ["max_terms=3", ...]; config: the package's dataclass of options."""
    known = {field.name for field in dataclasses.fields(config)} - {"seed", "size"}
    found = {}
    for text in texts:
        option, equals, value = text.partition("=")
        if option not in known or not equals:
            near = difflib.get_close_matches(option, known, 1, 0)[0]
            raise ValueError(f"gym:{name} has no option {text!r}; did you mean {near}=...? (it has "
                             f"{', '.join(sorted(known))})")
        try:
            found[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[option] = value                       # a word
    return found


def conversations(text):
    """(key, messages) without end: a question and the package's answer. ValueError for a task that
    has none."""
    gym = Gym(text)
    for number in itertools.count():
        entry = gym.entry(number)
        if not isinstance(entry["answer"], str):
            raise ValueError(f"{text} has no answers to learn from, only a score: it is for "
                             "train_grpo.py")
        messages = [{"role": "user", "content": entry["question"]},
                    {"role": "assistant", "content": entry["answer"]}]
        yield f"{entry['question']}\n{entry['answer']}", messages
