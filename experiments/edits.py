"""What does a model that edits do with tales? Numbers that need no judge: data/tales.py reads them.

    python experiments/edits.py repair CHECKPOINT [N=200] [STEPS=64]
        held-out tales with k random edits: how many come back word for word, how many hold together
    python experiments/edits.py gaps CHECKPOINT MASKS [N=200]
        a sentence is missing, and nothing says how long it was; beside it MASKS, a model that fills
        masks, with as many as it had, with two more and with two fewer
    python experiments/edits.py lengths CHECKPOINT [N=200] [STEPS,...=8,16,32,64,128]
        out of nothing: lengths against the data's, and tales that hold together, by passes
    python experiments/edits.py schedules CHECKPOINT [N=200]
        repairs of three edits with the schedule that was trained and with others: dLLM samples with
        the linear one, whatever was trained
    python experiments/edits.py speed [ROUNDS=9] [--threads=N]
        an alignment of 1,024 tokens; a training step against one of masks, in turns

Shares are followed by their standard errors. CHECKPOINT is a folder of train_edits.py; with and
without --time_features, or of another --source, they are compared by their folders.
"""
import random
import statistics
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.tales import check, tell  # noqa: E402
from diffusion import mdlm_loss  # noqa: E402
from data.damage import SOURCES, SourceSettings, damaged  # noqa: E402
from edits import align, edit_loss, stack  # noqa: E402
from experiments.tales import gaps as find_gaps  # noqa: E402
from experiments.tales import standard_error  # noqa: E402
from experiments.timing import interleaved, machine, timed  # noqa: E402
from model import Config, Transformer  # noqa: E402
from sampling.editing import begun, canvas_with_gaps  # noqa: E402
from sampling.rewriting import rewrite  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402

EDITS = (1, 2, 3, 5, 8)
WRONG_BY = (0, 2, -2)       # masks more than the sentence had tokens
SCHEDULES = ("linear", "cubic", "cube", "cosine")


def share(flags):
    """A share and its standard error, as text."""
    value = sum(flags) / len(flags)
    return f"{value:.3f} +- {standard_error(value, len(flags)):.3f}"


def edited(sampler, rows, steps, temperature=0.0, schedule=None, **how):
    """(texts, forward passes) of `rewrite`."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # a text that outgrows the context
        rows = rewrite(sampler.model, rows, steps, temperature=temperature, seed=0,
                       schedule=schedule, on_step=seen.append, **how)
    texts = [sampler.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return texts, seen[-1].passes


def tales(count, seed=0):
    """Texts of held-out tales."""
    rng = random.Random(seed)
    return [tell(rng, held_out=True).text for _ in range(count)]


# --------------------------------------------------------------------------------------------------
# Repair


def damaged_tales(sampler, count, number):
    """(texts, their tokens after `number` random edits)."""
    texts, rng = tales(count), random.Random(number)
    special = set(sampler.tokenizer.backend.get_added_tokens_decoder())
    alphabet = [token for token in range(sampler.config.vocab_size) if token not in special]
    rows = [begun(sampler, sampler.tokenizer.encode(text)) for text in texts]
    return texts, [damaged(row, number, rng, alphabet) for row in rows]


def repair(checkpoint, count="200", steps="64"):
    sampler = Sampler.load(checkpoint)
    for number in EDITS:
        texts, rows = damaged_tales(sampler, int(count), number)
        before = [sampler.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        after, passes = edited(sampler, rows, int(steps), prompt_lens=[1] * len(rows))
        print(f"{number} edits: consistent {share([check(text).consistent for text in before])} "
              f"before, {share([check(text).consistent for text in after])} after; word for word "
              f"{share([a == b for a, b in zip(after, texts)])}; {passes} passes", flush=True)


def schedules(checkpoint, count="200", steps="64"):
    sampler = Sampler.load(checkpoint)
    texts, rows = damaged_tales(sampler, int(count), 3)
    for name in SCHEDULES:
        after, _ = edited(sampler, rows, int(steps), schedule=name, prompt_lens=[1] * len(rows))
        trained = " (trained)" if name == sampler.config.edit_schedule else ""
        print(f"{name + trained:16} consistent {share([check(t).consistent for t in after])}, word "
              f"for word {share([a == b for a, b in zip(after, texts)])}", flush=True)


# --------------------------------------------------------------------------------------------------
# A gap of unknown length


def gaps(checkpoint, masks, count="200"):
    editor, filler = Sampler.load(checkpoint), Sampler.load(masks)
    found = find_gaps(int(count), "cause")
    canvases = [canvas_with_gaps(editor, f"{gap.before.rstrip()} [MASK]{gap.behind}")
                for gap in found]
    texts, passes = edited(editor, [canvas.tokens for canvas in canvases], 64,
                           frozen=[canvas.frozen for canvas in canvases],
                           closed=[canvas.closed for canvas in canvases])
    print(f"edits, length not told:   consistent {share([check(t).consistent for t in texts])}; "
          f"{passes} passes", flush=True)
    for wrong in WRONG_BY:
        texts = fill(filler, found, wrong)
        name = f"masks, length {wrong:+d}:" if wrong else "masks, true length:"
        print(f"{name:25} consistent {share([check(text).consistent for text in texts])}",
              flush=True)


def fill(sampler, found, wrong):
    """The tales with what a model of masks writes, told the length of each gap plus `wrong`."""
    rows = []
    for gap in found:
        before = sampler.opening + sampler.tokenizer.encode(gap.before.rstrip())
        length = max(1, len(sampler.tokenizer.encode(f" {gap.hidden}")) + wrong)
        behind = sampler.tokenizer.encode(gap.behind) + sampler.opening
        rows.append(before + [sampler.mask_id] * length + behind)
    longest = max(row.count(sampler.mask_id) for row in rows)
    settings = dict(steps=longest, block_length=0, temperature=0.0, remasking="low_confidence",
                    cache="none", cfg_scale=0.0, schedule="", seed=0)
    filled = sampler.run(rows, sampler.arguments(longest, settings, gaps=True), gaps=True)
    return [sampler.tokenizer.decode(row, skip_special_tokens=True).strip() for row in filled]


# --------------------------------------------------------------------------------------------------
# Out of nothing


def lengths(checkpoint, count="200", steps="8,16,32,64,128"):
    sampler, count = Sampler.load(checkpoint), int(count)
    theirs = [len(sampler.tokenizer.encode(text)) for text in tales(count)]
    print(f"data: {describe(theirs)} tokens", flush=True)
    start = begun(sampler, []) + [sampler.mask_id] * sampler.config.edit_masks
    for number in map(int, steps.split(",")):
        texts, passes = edited(sampler, [start] * count, number, temperature=0.7,
                               prompt_lens=[1] * count)
        ours = [len(sampler.tokenizer.encode(text)) for text in texts]
        print(f"{number:3} steps, {passes} passes: {describe(ours)} tokens, distance "
              f"{distance(ours, theirs):.3f}; consistent "
              f"{share([check(text).consistent for text in texts])}", flush=True)


def describe(numbers):
    return f"{statistics.mean(numbers):.1f} +- {statistics.pstdev(numbers):.1f}"


def distance(ours, theirs):
    """The largest difference of two distribution functions (Kolmogorov and Smirnov), 0 to 1."""
    at = sorted({*ours, *theirs})
    return max(abs(sum(a <= x for a in ours) / len(ours) - sum(b <= x for b in theirs) /
                   len(theirs)) for x in at)


# --------------------------------------------------------------------------------------------------
# Time


def speed(rounds="9", threads="1", B=16, T=128, V=2048, D=192, layers=4):
    torch.set_num_threads(int(threads.removeprefix("--threads=")))
    rng = random.Random(0)
    long = [[rng.randrange(V) for _ in range(1024)] for _ in range(2)]
    timings = [timed(lambda: align(*long)) for _ in range(int(rounds))]
    wall = statistics.median(timing.wall for timing in timings)
    cpu = statistics.median(timing.cpu for timing in timings)
    print(f"{machine()}\nalignment of 1,024 tokens: {1000 * wall:.1f} ms ({1000 * cpu:.1f} of CPU)")
    medians = interleaved(steps_of_training(B, T, V, D, layers), int(rounds))
    masked = medians["masks"]
    for name, timing in medians.items():
        print(f"{name:22} {1000 * timing.wall:7.1f} ms ({1000 * timing.cpu:.1f} of CPU), "
              f"{timing.cpu / masked.cpu:.2f} x masks")


def steps_of_training(B, T, V, D, layers):
    """{name: forward and backward pass of B texts of T tokens}, with masks and with edits from each
    source. The optimizer is the same for all and left out."""
    shape = dict(vocab_size=V, dim=D, n_layers=layers, n_heads=4, mask_token_id=V - 1)
    masked = Transformer(Config(**shape)).init_weights()
    editor = Transformer(Config(**shape, edits=True, time_features=64)).init_weights()
    rng, noise = random.Random(1), torch.Generator().manual_seed(2)
    texts = [[rng.randrange(V - 1) for _ in range(T)] for _ in range(B)]
    how = SourceSettings(list(range(V - 1)), V - 1)
    functions = {"masks": lambda: mdlm_loss(masked, torch.tensor(texts),
                                            generator=noise).loss.backward()}
    for source in ("nothing", "damage", "gap", "mixed"):
        z_0, z_1 = stack([align(SOURCES[source](x_1, rng, how), x_1) for x_1 in texts])

        def step(z_0=z_0, z_1=z_1):
            edit_loss(editor, z_0, z_1, max_weight=20.0, generator=noise).loss.backward()

        functions[f"edits from {source}"] = step
    return functions


COMMANDS = {"repair": repair, "gaps": gaps, "lengths": lengths, "schedules": schedules,
            "speed": speed}

if __name__ == "__main__":
    common.show_errors_in_one_line()
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
