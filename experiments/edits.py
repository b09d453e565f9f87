"""What does a model that edits do with tales? Numbers that need no judge: data/tales.py reads them.

    python experiments/edits.py train OUT [WAY,...] [--minutes=20] [--threads=1] [--seed=1337]
        train_edits.py for each way of editing, `flows`, `blind` (flows that are not told the time)
        `tokens` and `replace`, into OUT/WAY; --minutes=20 --threads=2 is the recipe's default run
    python experiments/edits.py repair OUT [--count=200] [--steps=64] [--minutes=20]
        held-out tales with k random edits: how many come back word for word, how many hold
        together                                                        -> docs/edits_repair.png
    python experiments/edits.py gaps OUT MASKS [--count=200] [--steps=64] [--minutes=20]
        a sentence is missing, and nothing says how long it was; beside it MASKS, a model that fills
        masks, with as many as it had, with two more and with two fewer   -> docs/edits_gaps.png
    python experiments/edits.py lengths OUT [--count=200] [--steps=8,16,32,64,128] [--minutes=20]
        out of nothing: lengths against the data's, and tales that hold together, by passes
                                                                        -> docs/edits_lengths.png
    python experiments/edits.py schedules OUT [--count=200] [--steps=64] [--minutes=20]
        repairs of three edits with the schedule that was trained and with others: dLLM samples with
        the linear one, whatever was trained                          -> docs/edits_schedules.png
    python experiments/edits.py speed [ROUNDS=9] [--threads=N]
        an alignment and a common subsequence of 1,024 tokens; a training step against one of masks,
        in turns

OUT is a folder with a folder for each way. A way that is trained is not trained again, one that was
killed goes on. Each point that is measured becomes a line of OUT/repair.jsonl and so on; one that
has a line of the same sizes is not measured again, and after --minutes no other is begun, so that
the same command goes on later. Pictures of fewer than 100 tales stay in OUT. Shares are followed by
their standard errors.
"""
import functools
import inspect
import json
import random
import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.tales import check, tell  # noqa: E402
from diffusion import mdlm_loss  # noqa: E402
from data.damage import (  # noqa: E402
    SOURCES,
    SourceSettings,
    alphabet_of,
    block_source,
    damaged,
)
from edit_tokens import Orders, common_tokens, label_loss, spoiled  # noqa: E402
from edits import align, edit_loss, stack  # noqa: E402
from experiments.recipes import rows_of, run_recipe  # noqa: E402
from experiments.results import is_done  # noqa: E402
from experiments.tales import gaps as find_gaps  # noqa: E402
from experiments.tales import standard_error  # noqa: E402
from experiments.timing import interleaved, machine, timed  # noqa: E402
from model import Config, Transformer  # noqa: E402
from sampling.editing import Canvas, begun, canvas_with_gaps, continued, edit  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402

WAYS = {        # settings of train_edits.py
    "flows": [],
    "blind": ["--time_features=0"],
    "tokens": ["--editing=tokens"],
    "replace": ["--editing=replace"],
}
EDITS = (0, 1, 2, 3, 5, 8)  # none: does it leave alone what is right?
WRONG_BY = (0, 2, -2)       # masks more than the sentence had tokens
SCHEDULES = ("linear", "cubic", "cube", "cosine")
TELLING = 100               # tales at least for a picture in docs/

# --------------------------------------------------------------------------------------------------
# Training


def train(out, ways="", minutes="20", threads="1", seed="1337", *settings):
    """settings: further ones of train_edits.py."""
    for way in ways.split(",") if ways else WAYS:
        if way not in WAYS:
            raise ValueError(f"no way of editing called {way!r}: there are {', '.join(WAYS)}")
        folder = Path(out, way)
        if not is_done(folder):
            run_recipe("train_edits.py", folder, f"--max_minutes={minutes}",
                       f"--threads={threads}", f"--seed={seed}", *WAYS[way], *settings)


def trained(out):
    """{way: its Sampler} of what `train` left in OUT. Raises FileNotFoundError if that is
    nothing."""
    folders = {way: Path(out, way) for way in WAYS}
    found = {way: folder for way, folder in folders.items() if (folder / "config.json").exists()}
    if not found:
        raise FileNotFoundError(f"{out} holds no model: python experiments/edits.py train {out}")
    return {way: Sampler.load(folder) for way, folder in found.items()}


# --------------------------------------------------------------------------------------------------
# Points: what is measured, each once


def measured(path, points, minutes):
    """The rows, dicts, of `points`, {name: function() -> dict}: those that the .jsonl file `path`
    has, and the others, which are measured and written there until `minutes` are over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {row["point"]: row for row in rows_of(path)}
    began, left = time.perf_counter(), 0
    for name, measure in points.items():
        if name not in found and time.perf_counter() - began < 60 * minutes:
            found[name] = {"point": name, **measure()}
            with path.open("a") as file:
                file.write(json.dumps(found[name]) + "\n")
        if name in found:
            print(f"{name}: {told(found[name])}", flush=True)
        else:
            left += 1
    if left:
        print(f"{left} points are left: the same command goes on with them", flush=True)
    return [found[name] for name in points if name in found]


def told(row):
    """The figures of a row, as text."""
    parts = []
    for name, value in row.items():
        if isinstance(value, float) and f"{name}_error" in row:
            parts.append(f"{name} {value:.3f} +- {row[name + '_error']:.3f}")
        elif isinstance(value, float) and not name.endswith("_error"):
            parts.append(f"{name} {value:.3f}")
        elif isinstance(value, int):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def shares(**flags):
    """{name: share of true ones, name_error: its standard error} of lists of flags."""
    row = {}
    for name, values in flags.items():
        row[name] = sum(values) / len(values)
        row[f"{name}_error"] = standard_error(row[name], len(values))
    return row


def draw(out, name, rows, x, figures, xlabel, count, **axis):
    """A line for each way and each of `figures`, names of shares, over the rows' `x`."""
    if not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        mine = [row for row in rows if row["way"] == way]
        for style, one in zip(("-o", "--s"), figures):
            axes.errorbar([row[x] for row in mine], [row[one] for row in mine],
                          [row[f"{one}_error"] for row in mine], fmt=style, ms=4, capsize=2,
                          color=f"C{number}", label=f"{way}: {one}")
    axes.set(xlabel=xlabel, ylabel=f"share of {count} tales", ylim=(0, 1.02), **axis)
    axes.grid(alpha=0.3)
    axes.legend()
    path = (ROOT / "docs" if count >= TELLING else Path(out)) / name
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


# --------------------------------------------------------------------------------------------------
# Repair


def edited(sampler, canvases, steps, temperature=0.0, **how):
    """(texts, forward passes) of a model's edits of Canvases."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # a text that outgrows the context
        rows = edit(sampler.model, canvases, seen.append, steps=steps, temperature=temperature,
                    seed=0, **how)
    return texts_of(sampler, rows), seen[-1].passes


def texts_of(sampler, rows):
    return [sampler.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def tales(count, seed=0):
    """Texts of held-out tales."""
    rng = random.Random(seed)
    return [tell(rng, held_out=True).text for _ in range(count)]


def damaged_tales(sampler, count, number):
    """(texts, their tokens after `number` random edits)."""
    texts, rng = tales(count), random.Random(number)
    alphabet = alphabet_of(sampler.tokenizer, sampler.tokenizer.vocab_size)
    rows = [begun(sampler, sampler.tokenizer.encode(text)) for text in texts]
    return texts, [damaged(row, number, rng, alphabet) for row in rows]


def repaired(sampler, count, number, steps, **how):
    """The figures of `number` edits."""
    texts, rows = damaged_tales(sampler, count, number)
    canvases = [Canvas(row, [True] + [False] * (len(row) - 1), [False] * len(row)) for row in rows]
    after, passes = edited(sampler, canvases, steps, **how)
    found = shares(consistent=[check(text).consistent for text in after],
                   restored=[a == b for a, b in zip(after, texts)])
    before = [check(text).consistent for text in texts_of(sampler, rows)]
    return {"edits": number, **found, "passes": passes, "before": sum(before) / len(before)}


def repair(out, count="200", steps="64", minutes="20"):
    points, size = {}, int(count)
    for number in EDITS:
        for way, sampler in trained(out).items():
            name = f"{way}, {number} edits of {size} tales in {steps} steps"
            points[name] = functools.partial(
                with_way, way, repaired, sampler, size, number, int(steps))
    rows = measured(Path(out, "repair.jsonl"), points, float(minutes))
    draw(out, "edits_repair.png", rows, "edits", ("consistent", "restored"),
         "random edits of a tale", size)


def with_way(way, measure, *arguments):
    return {"way": way, **measure(*arguments)}


def schedules(out, count="200", steps="64", minutes="20"):
    points, size = {}, int(count)
    for way, sampler in trained(out).items():
        if sampler.config.edits:                        # the others have none
            for name in SCHEDULES:
                trained_so = " (trained)" if name == sampler.config.edit_schedule else ""
                points[f"{way}, {name}{trained_so}, {size} tales in {steps} steps"] = (
                    functools.partial(with_schedule, way, name, sampler, size, int(steps)))
    rows = measured(Path(out, "schedules.jsonl"), points, float(minutes))
    draw(out, "edits_schedules.png", rows, "schedule", ("consistent", "restored"),
         "schedule of the steps; three edits a tale", size)


def with_schedule(way, name, sampler, count, steps):
    return {"way": way, "schedule": name, **repaired(sampler, count, 3, steps, schedule=name)}


# --------------------------------------------------------------------------------------------------
# A gap of unknown length


def gaps(out, masks, count="200", steps="64", minutes="20"):
    points, size, filler = {}, int(count), Sampler.load(masks)
    found = find_gaps(size, "cause")
    for way, sampler in trained(out).items():
        points[f"{way}, length not told, {size} gaps in {steps} steps"] = functools.partial(
            filled_by_edits, way, sampler, found, int(steps))
    for wrong in WRONG_BY:
        points[f"masks of {masks}, length {wrong:+d}, {size} gaps"] = functools.partial(
            filled_by_masks, filler, found, wrong)
    rows = measured(Path(out, "gaps.jsonl"), points, float(minutes))
    draw(out, "edits_gaps.png", rows, "label", ("consistent",), "", size)


def filled_by_edits(way, sampler, found, steps):
    canvases = [canvas_with_gaps(sampler, f"{gap.before.rstrip()} [MASK]{gap.after}")
                for gap in found]
    texts, passes = edited(sampler, canvases, steps)
    consistent = [check(text).consistent for text in texts]
    return {"way": "edits", "label": way, **shares(consistent=consistent), "passes": passes}


def filled_by_masks(sampler, found, wrong):
    consistent = [check(text).consistent for text in fill(sampler, found, wrong)]
    label = f"masks {wrong:+d}" if wrong else "masks, true length"
    return {"way": "masks", "label": label, **shares(consistent=consistent)}


def fill(sampler, found, wrong):
    """The tales with what a model of masks writes, told the length of each gap plus `wrong`."""
    rows = []
    for gap in found:
        before = sampler.opening + sampler.tokenizer.encode(gap.before.rstrip())
        length = max(1, len(sampler.tokenizer.encode(f" {gap.hidden}")) + wrong)
        after = sampler.tokenizer.encode(gap.after) + sampler.opening
        rows.append(before + [sampler.mask_id] * length + after)
    longest = max(row.count(sampler.mask_id) for row in rows)
    settings = dict(steps=longest, block_length=0, temperature=0.0, remasking="low_confidence",
                    cache="none", cfg_scale=0.0, schedule="", seed=0)
    filled = sampler.run(rows, sampler.arguments(longest, settings, gaps=True), gaps=True)
    return [sampler.tokenizer.decode(row, skip_special_tokens=True).strip() for row in filled]


# --------------------------------------------------------------------------------------------------
# Out of nothing


def lengths(out, count="200", steps="8,16,32,64,128", minutes="20"):
    points, size, known = {}, int(count), trained(out)
    theirs = [len(next(iter(known.values())).tokenizer.encode(text)) for text in tales(size)]
    print(f"data: {statistics.mean(theirs):.1f} +- {statistics.pstdev(theirs):.1f} tokens")
    for way, sampler in known.items():
        for number in map(int, steps.split(",")):
            points[f"{way}, {size} tales in {number} steps"] = functools.partial(
                written, way, sampler, size, number, theirs)
    rows = measured(Path(out, "lengths.jsonl"), points, float(minutes))
    draw(out, "edits_lengths.png", rows, "passes", ("consistent",), "forward passes", size,
         xscale="log")


def written(way, sampler, count, steps, theirs):
    """Tales out of nothing; how their lengths in tokens differ from `theirs`."""
    start = continued(sampler, begun(sampler, []), 0)
    texts, passes = edited(sampler, [start] * count, steps, temperature=0.7)
    ours = [len(sampler.tokenizer.encode(text)) for text in texts]
    return {"way": way, "passes": passes, "tokens": statistics.mean(ours),
            "spread": statistics.pstdev(ours), "distance": distance(ours, theirs),
            **shares(consistent=[check(text).consistent for text in texts])}


def distance(ours, theirs):
    """The largest difference of two distribution functions (Kolmogorov and Smirnov), 0 to 1."""
    def share(lengths, x):
        return sum(length <= x for length in lengths) / len(lengths)

    return max(abs(share(ours, x) - share(theirs, x)) for x in {*ours, *theirs})


# --------------------------------------------------------------------------------------------------
# Time


def speed(rounds="9", threads="1", B=16, T=128, V=2048, D=192, layers=4):
    torch.set_num_threads(int(threads.removeprefix("--threads=")))
    rng = random.Random(0)
    long = [[rng.randrange(V) for _ in range(1024)] for _ in range(2)]
    print(machine())
    for name, function in (("alignment", align), ("common subsequence", common_tokens)):
        timings = [timed(functools.partial(function, *long)) for _ in range(int(rounds))]
        wall = statistics.median(timing.wall for timing in timings)
        cpu = statistics.median(timing.cpu for timing in timings)
        print(f"{name} of 1,024 tokens: {1000 * wall:.1f} ms ({1000 * cpu:.1f} of CPU)")
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
    # A block is as long as the texts; the two orders are the last tokens.
    corrector = Transformer(Config(**shape, delete_token_id=V - 3, insert_token_id=V - 2,
                                   eos_token_id=V - 4)).init_weights()
    orders, pairs = Orders(V - 1, V - 3, V - 2), []
    for x_1 in texts:
        x_0, share = block_source(x_1, "mixed", rng, how)
        pairs.append(spoiled(x_0, x_1, share, rng, T, V - 4, orders))
    blocks = stack(pairs)

    def correction():
        label_loss(corrector, *blocks).loss.backward()

    functions["tokens from mixed"] = correction
    return functions


COMMANDS = {"train": train, "repair": repair, "gaps": gaps, "lengths": lengths,
            "schedules": schedules, "speed": speed}


def run(command, *arguments):
    """Call a command with what stands after it; --name=value is its argument of that name, or of
    `train` one more setting of the recipe."""
    function, positional, named, others = COMMANDS[command], [], {}, []
    known = inspect.signature(function).parameters
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            positional.append(argument)
        elif name in known and equals:
            named[name] = value
        elif command == "train":
            others.append(argument)
        else:
            raise ValueError(f"{command} has no argument {argument!r}: it takes "
                             f"{', '.join(known)}")
    try:
        bound = inspect.signature(function).bind(*positional, **named)
    except TypeError as error:
        raise ValueError(f"{command}: {error}") from None
    bound.apply_defaults()
    function(*bound.args, *others)


if __name__ == "__main__":
    common.show_errors_in_one_line()
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    run(*sys.argv[1:])
