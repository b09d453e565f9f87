"""How good are the tales of a model? Numbers that need no judge: data/tales.py reads them.

    python experiments/tales.py rules CHECKPOINT [N=64]
        sentences in the grammar, consistent tales, variety: by rule, blocks and temperature
    python experiments/tales.py steps CHECKPOINT [N=64]
        the same by number of steps  -> docs/tales_steps.png
    python experiments/tales.py minutes OUT MINUTES,... [SEED,...]
        the same, and copying, after so many minutes of train_scratch.py  -> docs/tales_minutes.png
    python experiments/tales.py copying CHECKPOINT...
        the probability of a hidden thing with one, two, three other mentions, near and far; and of
        a hidden property and person among all properties and names
    python experiments/tales.py persons CHECKPOINT [N=200]
        who could not stop looking at the thing: one of two persons, for the thing is the other's
    python experiments/tales.py infill CHECKPOINT TWIN [N=200]
        a hidden cause or effect of held-out tales: does the whole hold together? TWIN is
        autoregressive and reads the left alone

N texts each, written together after an end of text; seeds are 0 if not given. A share is followed
by its standard error. Variety is the entropy of names, things and events over that of as many tales
of the data: far below 1 the rule repeats itself. Steps are one a token unless they vary.
"""
import itertools
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.tales import check, split_sentences, tell, variety  # noqa: E402
from data.tales_copying import hidden_things  # noqa: E402
from data.tales_world import ADJECTIVES, NAMES  # noqa: E402
from diffusion import restored  # noqa: E402
from experiments.recipes import log_of  # noqa: E402
from experiments.results import Curve, draw, train  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402

RULES = ("random", "low_confidence", "margin", "entropy")
TEMPERATURES = (0.5, 0.7, 1.0)
BLOCK_LENGTHS = (0, 8)      # tokens written together from left to right; 0: all
STEPS = (127, 64, 32, 16, 8, 4)
LOOKING = " could not stop looking at"      # nobody does so at a thing of their own
FAR = 24            # tokens to the nearest other mention: near below, far from here on

# --------------------------------------------------------------------------------------------------
# Tales out of nothing


def write(sampler, count, seed=0, **how):
    """`count` texts of a model, each up to its first end of text. how: settings of sample.py."""
    room = sampler.config.max_len - len(sampler.opening)
    settings = dict(steps=0, block_length=0, temperature="auto", remasking="auto", cache="auto",
                    cfg_scale=0.0, schedule="", seed=seed) | how
    arguments = sampler.arguments(min(room, 127), settings)
    rows = sampler.run([list(sampler.opening)] * count, arguments)
    return [sampler.decode(row[len(sampler.opening):])[0].strip() for row in rows]


@dataclass
class Score:
    """Shares with their standard errors, and the variety relative to the data's."""
    grammatical: float          # of the sentences
    grammatical_error: float
    consistent: float           # of the texts
    consistent_error: float
    distinct: float             # of the texts
    variety: dict               # {"names": ..., "things": ..., "events": ...}

    def __str__(self):
        varied = " ".join(f"{self.variety[name]:.2f}" for name in ("names", "things", "events"))
        return (f"sentences {self.grammatical:.3f} +- {self.grammatical_error:.3f}   "
                f"tales {self.consistent:.3f} +- {self.consistent_error:.3f}   "
                f"variety {varied}   distinct {self.distinct:.2f}")


def score(texts):
    """The Score of a list of texts."""
    found = [check(text) for text in texts]
    sentences = sum(one.sentences for one in found)
    grammatical = sum(one.grammatical for one in found) / max(sentences, 1)
    consistent = sum(one.consistent for one in found) / len(texts)
    rng = random.Random(0)
    ours, datas = variety(texts), variety([tell(rng).text for _ in texts])
    relative = {name: ours[name] / datas[name] for name in datas}
    return Score(grammatical, standard_error(grammatical, sentences), consistent,
                 standard_error(consistent, len(texts)), len(set(texts)) / len(texts), relative)


def standard_error(share, count):
    """Of a share of `count` independent cases."""
    return math.sqrt(share * (1 - share) / max(count, 1))


def rules(checkpoint, count="64"):
    sampler = Sampler.load(checkpoint)
    for remasking, block_length in itertools.product(RULES, BLOCK_LENGTHS):
        for temperature in TEMPERATURES:
            found = score(write(sampler, int(count), remasking=remasking, temperature=temperature,
                                block_length=block_length))
            blocks = f"in blocks of {block_length}" if block_length else "all at once"
            print(f"{remasking:15} {blocks:15} T {temperature:.1f}   {found}", flush=True)


def steps(checkpoint, count="64"):
    sampler, curves = Sampler.load(checkpoint), {}
    for remasking in RULES:
        curves[remasking] = Curve()
        for number in STEPS:
            found = score(write(sampler, int(count), remasking=remasking, steps=number))
            print(f"{remasking:15} {number:3} steps   {found}", flush=True)
            curves[remasking].add(number, found.consistent, found.consistent_error)
    draw("tales_steps.png", curves, f"tales of {checkpoint}", "denoising steps of 127 tokens",
         "share of consistent tales", xscale="log")


def minutes(out, lengths, seeds="1337"):
    """Runs of their own, whose learning rate ends at 0, side by side nothing."""
    shares, copies = Curve(), Curve()
    for length in lengths.split(","):
        for seed in seeds.split(","):
            folder = Path(out, f"{length}min-{seed}")
            train(folder, dataset="tales", max_minutes=length, seed=seed, threads=2,
                  eval_interval=0)
            found, last = score(write(Sampler.load(folder), 100)), log_of(folder)[-1]
            print(f"{length} minutes, seed {seed}: {last['step']} updates, nelbo "
                  f"{last['val_nelbo']:.4f} +- {last['val_stderr']:.4f}, restored "
                  f"{last['restored']:.3f}   {found}", flush=True)
            shares.add(float(length), found.consistent, found.consistent_error)
            copies.add(float(length), last["restored"], 0)
    draw("tales_minutes.png", {"consistent tales": shares, "hidden things restored": copies},
         "train_scratch.py on tales", "minutes of training", "share")


# --------------------------------------------------------------------------------------------------
# Looking back


def copying(*checkpoints):
    rng = random.Random(7)
    texts = [tell(rng).text for _ in range(400)]
    for checkpoint in checkpoints:
        sampler = Sampler.load(checkpoint, dtype=torch.float32)
        ids = []
        for row in sampler.tokenizer.encode_batch(texts):
            ids += [sampler.tokenizer.eos_token_id, *row]
        for visible in (1, 2, 3, None):
            things = hidden_things(ids, sampler.tokenizer, sampler.config.max_len, 256, visible)
            found = restored(sampler.model, things.tokens, things.hidden, things.target)
            near = found[things.distance < FAR]
            far = found[things.distance >= FAR]
            name = "all" if visible is None else str(visible)
            print(f"{checkpoint}: {name:3} other mentions: {found.mean():.3f} "
                  f"(near {near.mean():.3f}, {len(near)} tales; far {far.mean():.3f}, {len(far)})",
                  flush=True)
        kinds = {"properties": ADJECTIVES, "persons": NAMES}
        if sampler.config.causal:       # there is no mask to ask for one of several words
            kinds = {}
        for name, words in kinds.items():
            hidden = hidden_things(ids, sampler.tokenizer, sampler.config.max_len, 256, words=words)
            found = restored_among(sampler, hidden, words)
            print(f"{checkpoint}: {name}, all other mentions: {found.mean():.3f} "
                  f"({len(found)} tales)", flush=True)


@torch.no_grad()
def restored_among(sampler, hidden, words):
    """The probability [N] of what is hidden over that of all `words` together, for a pronoun in the
    place of a name is no mistake."""
    canvas = hidden.tokens.masked_fill(hidden.hidden, sampler.mask_id)                  # [N, T]
    p = sampler.model(canvas, select=hidden.target).softmax(-1)                         # [N, V]
    ids = [sampler.tokenizer.encode(f" {word}")[0] for word in words]
    right = p.gather(1, hidden.tokens[hidden.target][:, None])[:, 0]
    return right / p[:, ids].sum(-1)


@torch.no_grad()
def persons(checkpoint, count="200"):
    """Who wants the thing, asked in the two orders in which a sampler may write it: the name when
    the words after it are there, and the words when the name is."""
    sampler = Sampler.load(checkpoint, dtype=torch.float32)
    encode, mask_id = sampler.tokenizer.encode, sampler.mask_id
    words = encode(LOOKING)
    name_known, words_known = {"right": [], "wrong": []}, []
    for before, right, wrong in wishes(int(count)):
        row = sampler.opening + encode(before)
        begin, ids = len(row), {"right": encode(f" {right}")[0], "wrong": encode(f" {wrong}")[0]}
        rows = [row + [mask_id, *words]]
        rows += [row + [name] for name in ids.values()]
        T = sampler.config.max_len
        rows = torch.tensor([one[:T] + [mask_id] * (T - len(one)) for one in rows])
        p = sampler.model(rows).softmax(-1)                                             # [3, T, V]
        asked = p[0, begin, ids["right"]], p[0, begin, ids["wrong"]]
        words_known.append(asked[0] / sum(asked))
        for which, among in zip(ids, p[1:]):
            name_known[which].append(among[begin + 1, words[0]])
    means = {which: torch.stack(found).mean() for which, found in name_known.items()}
    print(f"{checkpoint}: before {LOOKING.strip()!r} the right one of two names has "
          f"{torch.stack(words_known).mean():.4f}\n"
          f"{checkpoint}: after the right name the first of these words has {means['right']:.3f}, "
          f"after the wrong one {means['wrong']:.3f}")


def wishes(count, seed=0):
    """`count` times (what a tale says before somebody looks at the thing, who does, who has it)."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        text = tell(rng).text
        said = re.search(rf" (\w+){LOOKING}", text)
        if not said or said[1] not in NAMES:
            continue
        before = text[:said.start()]
        others = [name for name in NAMES if name != said[1] and re.search(rf"\b{name}\b", before)]
        if others:
            found.append((before, said[1], others[0]))
    return found


# --------------------------------------------------------------------------------------------------
# The middle of a tale


@dataclass
class Gap:
    """A tale without one of its sentences."""
    before: str             # with the space at its end, if there is any text
    hidden: str
    after: str             # with the space at its beginning

    def filled(self, text):
        return f"{self.before}{text.strip()}{self.after}"


def gaps(count, what, seed=0):
    """`count` Gaps of held-out tales, at a sentence that causes a later one (what "cause") or
    that an earlier one causes ("effect"), with text on both sides."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        tale = tell(rng, held_out=True)
        effects = [i for i, step in enumerate(tale.steps) if step.causes]
        if what == "effect":
            places = effects
        else:
            places = sorted({cause for i in effects for cause in tale.steps[i].causes})
        places = [i for i in places if 0 < i < len(tale.steps) - 1]
        if places:
            step = tale.steps[rng.choice(places)]
            found.append(Gap(tale.text[:step.start], tale.text[step.start:step.end],
                             tale.text[step.end:]))
    return found


def infill(checkpoint, twin, count="200"):
    diffusion, left_only = Sampler.load(checkpoint), Sampler.load(twin)
    for what in ("cause", "effect"):
        found = gaps(int(count), what)
        for name, texts in (("diffusion", fill(diffusion, found)),
                            ("autoregressive", continue_left(left_only, found))):
            whole = [check(gap.filled(text)).consistent for gap, text in zip(found, texts)]
            share = sum(whole) / len(whole)
            same = sum(text.strip() == gap.hidden for gap, text in zip(found, texts)) / len(found)
            print(f"{what:6} by {name:14} consistent {share:.3f} +- "
                  f"{standard_error(share, len(whole)):.3f}, word for word {same:.3f}", flush=True)


def fill(sampler, found):
    """What a diffusion model writes into the gaps, whose lengths in tokens it is told."""
    rows, spans = [], []
    for gap in found:
        before = sampler.opening + sampler.tokenizer.encode(gap.before.rstrip())
        length = len(sampler.tokenizer.encode(f" {gap.hidden}"))
        after = sampler.tokenizer.encode(gap.after) + sampler.opening
        rows.append(before + [sampler.mask_id] * length + after)
        spans.append(slice(len(before), len(before) + length))
    longest = max(span.stop - span.start for span in spans)
    settings = dict(steps=longest, block_length=0, temperature=0.0, remasking="low_confidence",
                    cache="none", cfg_scale=0.0, schedule="", seed=0)
    filled = sampler.run(rows, sampler.arguments(longest, settings, gaps=True), gaps=True)
    return [sampler.tokenizer.decode(row[span]) for row, span in zip(filled, spans)]


def continue_left(sampler, found):
    """The sentence with which an autoregressive model goes on after what stands before the gap."""
    rows = [sampler.opening + sampler.tokenizer.encode(gap.before.rstrip()) for gap in found]
    settings = dict(steps=0, block_length=0, temperature=0.0, remasking="auto", cache="auto",
                    cfg_scale=0.0, schedule="", seed=0)
    room = sampler.config.max_len - max(map(len, rows))
    filled = sampler.run(rows, sampler.arguments(min(room, 40), settings))
    texts = []
    for row, done in zip(rows, filled):
        sentences = split_sentences(sampler.decode(done[len(row):])[0])
        texts.append(sentences[0] if sentences else "")
    return texts


COMMANDS = {"rules": rules, "steps": steps, "minutes": minutes, "copying": copying,
            "persons": persons, "infill": infill}

if __name__ == "__main__":
    common.show_errors_in_one_line()
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
