"""Shared by all tests: the repository on the path, few threads, the data that small runs learn
from, the fixtures beside the checkout where they are."""

import functools
import json
import os
import random
import sys

import pytest
from scripts import ROOT, leave_out_what_nobody_reads

sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in two processes, see pyproject.toml
# transformers would import it, pandas and scipy for an assistant of generation that nobody uses
# here: four seconds in each of the processes.
sys.modules["sklearn"] = None


@pytest.fixture
def fixture_path():
    """fixture_path(name): the folder ../shared/fixtures/name beside the checkout; the test skips
    where it is absent."""

    def path(name):
        folder = ROOT.parent / "shared" / "fixtures" / name
        if not folder.exists():
            pytest.skip(
                f"{folder} is not here: these checkpoints stand beside the project, not in it"
            )
        return folder

    return path


@pytest.fixture(scope="session", autouse=True)
def prepared_data(tmp_path_factory):
    """The folder where data sets are prepared, here and in the scripts that tests start: never
    data/prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_DATA", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def haste():
    """This process leaves out what those of scripts.py leave out."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_what_nobody_reads(patch.setattr)
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 30 kB of easy sentences."""
    rng = random.Random(0)
    words = "the cat dog sat on mat and ran to a house with green door while rain fell".split()
    sentences = [" ".join(rng.choice(words) for _ in range(9)) for _ in range(700)]
    path = tmp_path_factory.mktemp("text") / "easy.txt"
    path.write_text("".join(sentence + ".\n" for sentence in sentences))
    return path


@pytest.fixture(scope="session")
def talk(tmp_path_factory):
    """A file of 80 conversations; the answer repeats the question, of one to four words."""
    rng, words = random.Random(0), "cat dog sat ran red big".split()
    path = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    questions = [" ".join(rng.choice(words) for _ in range(rng.randint(1, 4))) for _ in range(80)]
    turns = [{"prompt": f"{n}: {q}", "response": q} for n, q in enumerate(questions)]
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return path


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A reward of a reader's own, FILE.py:function, that a random model's answers differ in: the
    share of small letters."""
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(
        "def letters(prompt, answer, reference):\n"
        "    return sum(map(str.islower, answer)) / max(len(answer), 1)\n"
    )
    return f"{path}:letters"


@pytest.fixture(scope="session")
def small(text, talk):
    """small(script, out_dir, settings...): a recipe and its arguments for a run of a second; later
    settings overrule earlier ones."""
    from runs import command

    def arguments(script, out_dir, *settings):
        data = text if script in ("train_scratch.py", "train_edits.py") else talk
        return command(script, out_dir, data, *settings)

    return arguments


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """published(family): a random checkpoint in the family's own layout; a decoder's tokenizer
    knows bytes and an end of text, no mask."""
    from tiny import publish

    @functools.cache
    def folder(family):
        return publish(family, tmp_path_factory.mktemp(family))

    return folder
