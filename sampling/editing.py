"""What sample.py does with a model that edits (train_edits.py): texts in, edits, texts out."""
import sys
import warnings
from dataclasses import dataclass

from edit_tokens import edit_block
from sampling.correcting import THRESHOLD, correct
from sampling.rewriting import rewrite
from sampling.sampler import FOR_MASKS, GAP, refuse_for_masks
from sampling.terminal import Terminal, printable
from sampling.trace import EditTrace

STEPS = 64          # unless the user says otherwise: of length 1 / 64 in time, or passes at most
GAP_MASKS = 8       # with which a model that edits by tokens begins a gap of unknown length


@dataclass
class Canvas:
    """A text to edit."""
    tokens: list
    frozen: list        # bool each: it stays
    closed: list        # bool each: nothing comes after it


def edit_and_show(sampler, settings, read):
    """Run sample.py for a model that edits. settings: its constants; read(text): the text or what a
    FILE:path holds. Raises ValueError."""
    arguments = edit_arguments(sampler, settings)
    canvas = make_canvas(sampler, settings, read)
    terminal, count = Terminal(pause=settings["pause"]), settings["num_samples"]
    watch = terminal.draw if settings["show"] else None
    trace = EditTrace(sampler, [canvas.tokens] * count, watch)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            samples = edit(sampler.model, [canvas] * count, on_step=trace, **arguments)
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)
    terminal.clear()
    for line in dict.fromkeys(str(warning.message) for warning in told):
        print(f"note: {line}", file=sys.stderr)
    for number, sample in enumerate(samples, 1):
        if count > 1:
            print(f"--- {number} of {count}")
        print(printable(sampler.tokenizer.decode(sample, skip_special_tokens=True)))
    given = sum(canvas.frozen)                          # tokens of each sample that stay
    written = sum(max(len(sample) - given, 0) for sample in samples)
    print(f"\n{summary(trace, written)}")
    if settings["html"]:
        trace.write_html(settings["html"], arguments)
        print(f"wrote {settings['html']}: open it in a browser")


def edit(model, canvases, on_step=None, **arguments):
    """`rewrite` or `correct`, whichever is the model's way, for a list of Canvas: a list of token
    lists."""
    way = rewrite if model.config.edits else correct
    return way(model, [canvas.tokens for canvas in canvases],
               frozen=[canvas.frozen for canvas in canvases],
               closed=[canvas.closed for canvas in canvases], on_step=on_step, **arguments)


def summary(trace, new_tokens):
    """How many edits there were, and the speed of the run that wrote so many tokens."""
    kinds = {"inserted": 0, "substituted": 0, "deleted": 0}
    for message in trace.messages:
        for cells in message.get("canvas", {}).values():
            for _, kind, step, _ in cells:
                if step == message["step"]:
                    kinds[kind] += 1
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    return f"{counts}; {trace.report(new_tokens)}"


def edit_arguments(sampler, settings):
    """The keyword arguments of `edit` for sample.py's constants. Raises ValueError for one that a
    model of edits does not take."""
    by_tokens, takes = not sampler.config.edits, ["steps", "schedule", "temperature", "seed"]
    unused = dict(FOR_MASKS)
    if by_tokens:
        takes[1:2] = ["threshold", "edit_threshold"]
        del unused["threshold"], unused["edit_threshold"]
        unused["schedule"] = ""
    refuse_for_masks(settings, unused,
                     f"{sampler.name} edits, without blocks or caches, and takes "
                     f"{', '.join(takes[:-1])} and {takes[-1]}")
    arguments = {"temperature": edit_temperature(sampler, settings), "seed": settings["seed"]}
    arguments["steps"] = settings["steps"] or STEPS
    if not by_tokens:
        return arguments | {"schedule": settings["schedule"] or None}
    arguments["threshold"] = settings["threshold"] or THRESHOLD
    if settings["edit_threshold"] >= 0:
        arguments["edit_threshold"] = settings["edit_threshold"]
    if not settings["steps"] and not (settings["edit"] or settings["infill"]):
        arguments["steps"] = 2 * edit_block(sampler.config)         # a mask a pass, if need be
    return arguments


def edit_temperature(sampler, settings):
    """Unless one is asked for, a repair is the most probable one, and a new text is drawn as by a
    model of masks."""
    repairs = settings["infill"] or settings["edit"]
    if settings["temperature"] == "auto" and repairs:
        return 0.0
    return sampler.choose_temperature(settings, gaps=False, chat=False)


def make_canvas(sampler, settings, read):
    """The Canvas of sample.py's prompt, infill or edit. Raises ValueError."""
    if settings["edit"]:
        text = read(settings["edit"])
        if not text.strip():
            raise ValueError("the text to edit is empty: leave --edit out to write a new one")
        refuse_gap(text, "the text to edit")
        tokens = begun(sampler, sampler.tokenizer.encode(text) + sampler.tail)
        stays = [True] + [False] * (len(tokens) - 1)
        return Canvas(tokens, stays, [False] * len(tokens))
    if settings["infill"]:
        return canvas_with_gaps(sampler, read(settings["infill"]))
    text = read(settings["prompt"])
    refuse_gap(text, "the prompt")
    tokens = begun(sampler, sampler.tokenizer.encode(text))
    return continued(sampler, tokens, settings["max_new_tokens"])


def refuse_gap(text, name):
    """ValueError for a text with a gap where none is filled."""
    gap = GAP.search(text)
    if gap:
        raise ValueError(f"{name} contains {gap[0]} at character {gap.start()}: use --infill to "
                         "fill it")


def continued(sampler, tokens, max_new_tokens):
    """The Canvas of a prompt, with the masks that the model was trained to begin with: of edits by
    tokens, the rest of the block."""
    if not sampler.config.edits:
        masks = edit_block(sampler.config) - len(tokens)
        if masks < max(max_new_tokens, 1):
            raise ValueError(f"{len(tokens)} tokens of prompt and {max(max_new_tokens, 1)} new "
                             f"ones exceed the block of {edit_block(sampler.config)}")
        return with_masks(sampler, tokens, max_new_tokens or masks)
    asked, room = max_new_tokens or sampler.config.edit_masks, sampler.config.max_len - len(tokens)
    if max_new_tokens and not sampler.config.edit_masks:
        raise ValueError(f"{sampler.name} decides itself how much it writes: leave max_new_tokens "
                         "at 0")
    if room < 1:
        raise ValueError(f"{len(tokens)} tokens of prompt leave no room in the context of "
                         f"{sampler.config.max_len}")
    return with_masks(sampler, tokens, min(asked, room))


def with_masks(sampler, tokens, number):
    """The Canvas of tokens that stay and so many masks after them."""
    n = len(tokens)
    frozen = [True] * n + [False] * number
    closed = [True] * (n - 1) + [False] * (1 + number)
    return Canvas(tokens + [sampler.mask_id] * number, frozen, closed)


def canvas_with_gaps(sampler, text):
    """The Canvas of a text in which [MASK] stands where something is missing, of whatever length:
    the rest stays, and tokens come after those before a gap. A model that edits by tokens gets
    some masks there to begin with, of [MASK:12] twelve. Raises ValueError."""
    gaps = list(GAP.finditer(text))
    if not gaps:
        raise ValueError("there is nothing to fill: write [MASK] where text is missing")
    canvas, position = Canvas(begun(sampler, []), [], []), 0
    ends = [gap.start() for gap in gaps] + [len(text)]
    begins = [gap.end() for gap in gaps] + [len(text)]
    opens, masks = [], []           # positions after which a gap is, and those of its masks
    for gap in gaps:
        if gap[1] and sampler.config.edits:
            raise ValueError(f"{gap[0]} says how long a gap is, and {sampler.name} finds that out: "
                             "write [MASK]")
        if gap[1] and not 1 <= int(gap[1]) <= sampler.config.max_len:
            raise ValueError(f"{gap[0]} asks for {int(gap[1])} masks: between 1 and the context of "
                             f"{sampler.config.max_len} are possible")
    counts = [int(gap[1] or GAP_MASKS) for gap in gaps] + [0]
    for end, begin, count in zip(ends, begins, counts):
        before = text[position:end]
        if sampler.glues_space and end < len(text):
            before = before.removesuffix(" ")
        canvas.tokens += sampler.tokenizer.encode(before)
        if end < len(text):
            opens.append(len(canvas.tokens) - 1)
        if not sampler.config.edits:
            masks += range(len(canvas.tokens), len(canvas.tokens) + count)
            canvas.tokens += [sampler.mask_id] * count
        position = begin
    canvas.tokens += sampler.tail
    canvas.frozen = [i not in masks for i in range(len(canvas.tokens))]
    canvas.closed = [i not in opens + masks for i in range(len(canvas.tokens))]
    return canvas


def begun(sampler, tokens):
    """The tokens after the one that stands before every text, as train_edits.py has it."""
    roles = [sampler.tokenizer.bos_token_id, sampler.config.bos_token_id,
             sampler.tokenizer.eos_token_id, sampler.config.eos_token_id]
    first = [token for token in roles if token is not None][:1]
    return tokens if tokens[:1] == first else first + tokens
