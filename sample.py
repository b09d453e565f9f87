"""Text out of noise: generate, fill gaps, chat, watch it happen, or serve it.

Everything starts as mask tokens; each step the model predicts all of them and a few predictions are
kept, until none is left.

    python sample.py --num_samples=3                    out of nothing but masks
    python sample.py --prompt='Once there was' --show   a continuation, and how it comes about
    python sample.py --infill='Tom had a [MASK:2]. He loved it.'    gaps, [MASK] for one token
    python sample.py --checkpoint=out/grids --infill=FILE:puzzle.txt    a puzzle, dots for blanks
    python sample.py --prompt=FILE:prompt.txt --html=trace.html     a page with a slider over steps
    python sample.py --checkpoint=GSAI-ML/LLaDA-8B-Instruct --chat --block_length=32
    python sample.py --checkpoint=out/edits --edit='Tom had had red kite.' --show     a repair
    python sample.py --serve=8000                       a web page and OpenAI's API on 127.0.0.1
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import os
import sys
from pathlib import Path

import torch

from sampling.sampler import Sampler, default_checkpoint
from sampling.terminal import Terminal, printable
from sampling.trace import Trace

# ---- settings: change them here or with --name=value ---------------------------------------------
checkpoint = default_checkpoint()   # out/scratch, or else checkpoints/tales; a folder or hub id
adapter = ""                # the folder of a LoRA adapter for it (finetune_llada.py, PEFT)
# what to write
prompt = ""                 # text to continue; FILE:path reads it from a file; empty: none
infill = ""         # a text with gaps, [MASK] or [MASK:12]; grids: a puzzle with dots; FILE:path
edit = ""                   # a text that a model of train_edits.py may change anywhere; FILE:path
num_samples = 1             # different ones, made together
max_new_tokens = 0          # tokens to generate; 0: what fits into the model's context, 128 at most
chat = False                # a conversation in the terminal, in the checkpoint's own chat format
serve = 0                   # port on 127.0.0.1 for the web page and OpenAI's API; 0: do not serve
# how: the sampler. Where "auto" stands the model decides. The small ones of train_scratch.py repeat
# themselves when they are greedy: outside of chats they get 0.5, and entropy in blocks of 8.
steps = 0                   # denoising steps in total; 0: one a token
block_length = 0    # tokens denoised together; 0: all (small models: 8; block diffusion: its own)
temperature = "auto"        # 0: the most probable token; auto: 0.5 for small models, else 0
top_p = 1.0                 # draw from the most probable tokens that together exceed this; 1: all
top_k = 0                   # draw from that many most probable tokens; 0: all
remasking = "auto"  # low_confidence, entropy (auto: for small models), margin, random, ancestral
alg_temp = 0.0              # Dream's: draw what to keep from softmax(score / alg_temp); 0: the best
threshold = 0.0    # keep all predictions of at least this probability a step; 0: off, LLaDA2: 0.95
edit_threshold = -1.0   # with it, write anew where another token exceeds it; below 0: the model's
factor = 0.0                # Fast-dLLM's factor rule instead; 0: off
entropy_bound = 0.0         # EB-Sampler's: keep as many as this bound (0.1 nats) allows; 0: off
remask = 0.0                # ReMDM's eta: "ancestral" may mask tokens of the block again; 0: never
remask_schedule = "cap"     # cap: this chance; rescale: a share of the largest; conf: by confidence
suppress = ""               # tokens never to write: ids, names, eos or eot, with commas
defer = ""                  # tokens to write last, likewise
cache = "auto"      # none, prefix, dual (approximate), block (exact; auto: for block diffusion)
cfg_scale = 0.0             # classifier-free guidance; 0: none
schedule = ""       # tokens a step: even or timesteps; of edits: linear, cubic...; empty: its own
seed = 1337                 # the same seed gives the same text
# how it looks
show = False                # the terminal view: masks turn into text, coloured by confidence
pause = 0.03                # seconds that --show waits after each step in a terminal
html = ""                   # write the run to this file: a page with a slider over the steps
# machine
device = "cuda" if torch.cuda.is_available() else "cpu"     # or mps
dtype = "auto"      # of the weights: float32, bfloat16; auto: as stored, where that is fast here
weights = "full"            # int8: matrices in 8 bits, on a CPU: half of bfloat16's memory
threads = 0                 # CPU threads; 0: torch's choice
settings = common.override(globals())

# ---- process -------------------------------------------------------------------------------------
common.check(settings, at_least_1=["num_samples"], not_negative=["max_new_tokens", "pause"],
             weights=["full", "int8"])
modes = [prompt, infill, edit, chat, serve]
if sum(map(bool, modes)) > 1:
    raise ValueError("choose one of --prompt, --infill, --edit, --chat and --serve")
if (chat or serve) and (html or num_samples != 1):
    raise ValueError("--html and --num_samples are for single runs: not with --chat or --serve")
if html and (Path(html).is_dir() or not os.access(Path(html).parent, os.W_OK)):
    raise OSError(f"cannot write a page to {html}: --html takes the name of a file in a folder "
                  "that exists and can be written to")
for stream in (sys.stdin, sys.stdout):
    if stream is not None:                  # a terminal that cannot show a character shows "?"
        stream.reconfigure(errors="replace")
device, *_ = common.init_process(device, threads)

# ---- model ---------------------------------------------------------------------------------------
sampler = Sampler.load(checkpoint, device, common.weights_dtype(device, dtype), adapter,
                       weights)
for line in sampler.without_effect(settings):
    print(f"note: {line}", file=sys.stderr)
edits = sampler.edits or bool(edit) and sampler.config.edit_threshold is not None   # LLaDA2.1's
if edit and not edits:
    raise ValueError(f"{checkpoint} fills masks and cannot edit a text: --edit is for models of "
                     "train_edits.py")
if (chat or serve) and sampler.has_noise:
    raise ValueError(f"{checkpoint} undoes {sampler.config.noise} noise: it takes --prompt and "
                     "--infill, neither --chat nor --serve")
if (chat or serve) and sampler.edits:
    raise ValueError(f"{checkpoint} edits texts: it takes --prompt, --infill and --edit, neither "
                     "--chat nor --serve")
if chat and sampler.grid is not None:
    raise ValueError(f"{checkpoint} writes grids, it cannot chat: give it a puzzle by --infill")
if chat:
    from sampling.chat import converse
    converse(sampler, settings)
    sys.exit()
if serve:
    from sampling.server import serve_forever
    serve_forever(sampler, settings)
    sys.exit()


# ---- text in -------------------------------------------------------------------------------------
def read(text):
    """The text itself or, for FILE:path, the contents of the file. Raises ValueError, OSError."""
    name, data = "the prompt", os.fsencode(text)
    if text.startswith("FILE:"):
        name = text.removeprefix("FILE:")
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise OSError(f"cannot read {name}: {error.strerror}") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")     # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}") from None


if edits:
    from sampling.editing import edit_and_show
    edit_and_show(sampler, settings, read)
    sys.exit()
if infill:
    tokens = sampler.encode_gaps(read(infill))
    count = tokens.count(sampler.mask_id)
else:
    tokens = sampler.encode_prompt(read(prompt))
    count = sampler.fit(tokens, max_new_tokens)

# ---- denoise -------------------------------------------------------------------------------------
arguments = sampler.arguments(count, settings, gaps=bool(infill))
terminal = Terminal(pause=pause, grid=sampler.grid)
rule = arguments.get("remasking", "none")       # other noise than masks is undone without one
trace = Trace(sampler, rule, terminal.draw if show else None)
try:
    samples = sampler.run([tokens] * num_samples, arguments, gaps=bool(infill), on_step=trace)
except KeyboardInterrupt:
    print("\nstopped")
    sys.exit(130)
terminal.clear()


# ---- text out ------------------------------------------------------------------------------------
def text_of(sample):
    """What to print of a row of tokens: prompt and completion, up to the end of the text."""
    if infill:
        return sampler.tokenizer.decode(sample, skip_special_tokens=True)
    if prompt:
        _, used, _ = sampler.decode(sample[len(tokens):])
        return sampler.tokenizer.decode(sample[:len(tokens) + used], skip_special_tokens=True)
    # What is written out of nothing may hold several texts, the last one cut off by the canvas.
    texts = [text.strip("\n") for text in sampler.split(sample) if text.strip()]
    if len(texts) > 1 and sample[-1] not in sampler.ends:
        texts.pop()
    return "\n\n".join(texts)


new_tokens = count * num_samples
if not infill:                                          # an end of text may have stopped it early
    new_tokens = sum(len(sample) - len(tokens) for sample in samples)
for number, sample in enumerate(samples, 1):
    if num_samples > 1:
        print(f"--- {number} of {num_samples}")
    if sampler.grid is not None:
        print(f"{terminal.draw_grid(trace.rows[number - 1])}\n\n{sampler.verdict(sample)}")
    else:
        print(printable(text_of(sample)))
print(f"\n{trace.report(new_tokens)}")
if html:
    trace.finish().write_html(html, arguments)
    print(f"wrote {html}: open it in a browser")
