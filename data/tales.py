"""Short tales with a world behind them: python data/tales.py 5 prints five.

    python data/tales.py 5                  five tales
    python data/tales.py --check FILE       which of a file's tales hold together, and where the
                                            others go wrong; a blank line stands between tales

`tell` makes a tale and keeps what it knows of it. `check` reads any text as a tale: it counts the
sentences that belong to the grammar and says whether persons, pronouns, things, places, feelings
and the ending agree with what was told before. Both use one table of events (tales_events.py): the
teller walks through it, and the checker looks for a walk that says the same words. It never sees
the tale that a text was made from.
"""
import argparse
import random
import re
import sys
from pathlib import Path

if __name__ == "__main__":      # `python data/tales.py` has data/ on its path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.tales_reader import Check, Mention, check, is_certain, mentions, split_sentences, variety
from data.tales_scene import Step, Tale
from data.tales_teller import Teller, is_held_out, plan, tell, tell_plan

__all__ = ["Check", "Mention", "Step", "Tale", "check", "is_certain", "is_held_out", "mentions",
           "split_sentences", "tales", "tell", "tell_plan", "variety"]

TRAIN_TALES = 40_000
VAL_TALES = 1_500
TELLINGS = 5                # of one plan in the data, about


def tales():
    """short tales from a grammar whose world can be checked: 15 MB, embedded"""
    for split, number, seed in (("train", TRAIN_TALES, 1), ("val", VAL_TALES, 2)):
        rng = random.Random(seed)
        texts = list(texts_of_tales(number, rng))
        rng.shuffle(texts)              # or one plot would stand five times in a row
        for text in texts:
            yield split, text
            yield split, None


def texts_of_tales(number, rng):
    """So many tales, none with a held-out combination; a plan, which takes longest to find, serves
    for some of them, with other names, things, places and words."""
    while number > 0:
        plot = plan(rng)
        for _ in range(2 * TELLINGS):
            teller = Teller(plot, rng)
            if number > 0 and teller.succeeds(plot):
                number -= 1
                yield " ".join(teller.texts)


# --------------------------------------------------------------------------------------------------
# The command line


def main():
    arguments = parse_arguments()
    try:
        if arguments.check is not None:
            check_file(arguments.check)
        else:
            rng = random.Random(arguments.seed)
            tales_of_seed = [tell(rng, arguments.held_out).text for _ in range(arguments.number)]
            print("\n\n".join(tales_of_seed))
    except (ValueError, OSError) as error:
        fail(error)


def parse_arguments():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail                  # argparse would print its usage, too
    parser.add_argument("number", type=int, nargs="?", default=1, help="of tales (1)")
    parser.add_argument("--seed", type=int, default=1, help="of the tales (1)")
    parser.add_argument("--held_out", action="store_true",
                        help="tales with a name, thing and event that never meet in training")
    parser.add_argument("--check", metavar="FILE", help="say which of a file's tales hold together")
    arguments = parser.parse_args()
    if arguments.number < 1:
        fail(f"the number of tales must be at least 1, got {arguments.number}")
    return arguments


def check_file(path):
    """Print a line for each tale of a file, and a summary. ValueError if there is none."""
    texts = [text.strip() for text in re.split(r"\n\s*\n", Path(path).read_text("utf-8-sig"))]
    checks = [check(text) for text in texts if text]
    if not checks:
        raise ValueError(f"there is no tale in {path}")
    for number, found in enumerate(checks, 1):
        verdict = found.problem or "consistent"
        print(f"tale {number}: {found.grammatical} of {found.sentences} sentences; {verdict}")
    sentences = sum(found.sentences for found in checks)
    grammatical = sum(found.grammatical for found in checks)
    consistent = sum(found.consistent for found in checks)
    print(f"{len(checks)} tales: {grammatical / sentences:.1%} of sentences are in the grammar, "
          f"{consistent / len(checks):.1%} of tales are consistent")


def fail(message):
    """End with one line and status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
