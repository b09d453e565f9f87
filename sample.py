"""Text out of noise: generate, fill gaps, chat, watch it happen, or serve it.

Everything starts as mask tokens; each step the model predicts all of them and a few predictions are kept, until none is left.

    python sample.py --num_samples=3                                    out of nothing but masks
    python sample.py --prompt='Return the' --show                       a continuation, and how it comes about
    python sample.py --infill='Return the [MASK:4] of the list.'        gaps, [MASK] for one token
    python sample.py --prompt=FILE:prompt.txt --html=trace.html         a page with a slider over the steps
    python sample.py --checkpoint=GSAI-ML/LLaDA-8B-Instruct --chat --block_length=32
    python sample.py --serve=8000                                       a web page and OpenAI's API on 127.0.0.1
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import os
import sys
from pathlib import Path

from common import override
from sampling.sampler import Sampler, Trace, default_checkpoint
from sampling.terminal import Terminal, printable

# ---- settings: change them here or with --name=value ---------------------------------------------------------------------------
checkpoint = ""             # a recipe's folder, a published checkpoint's folder or its hub id; nothing: out/scratch or, untrained, checkpoints/mdlm
adapter = ""                # the folder of a LoRA adapter for it (finetune_llada.py, PEFT)
# what to write
prompt = ""                 # text to continue; FILE:path reads it from a file; nothing: text out of nothing
infill = ""                 # a text with [MASK] or [MASK:12] where one or twelve tokens are missing; FILE:path as well
num_samples = 1             # different ones, made together
max_new_tokens = 0          # tokens to generate; 0: 128, or what fits into the model's context
chat = False                # a conversation in the terminal, in the checkpoint's own chat format
serve = 0                   # port on 127.0.0.1 for the web page and /v1/completions, /v1/chat/completions; 0: do not serve
# how: the sampler
steps = 0                   # denoising steps in total; 0: one a token
block_length = 0            # tokens denoised together, block after block from the left; 0: all (block diffusion: the model's own)
temperature = "auto"        # 0: the most probable token; auto: 0.7 for models of train_scratch.py, else and in chats 0
top_p = 1.0                 # draw from the most probable tokens that together exceed this; 1: from all
top_k = 0                   # draw from that many most probable tokens; 0: from all
remasking = "auto"          # what is kept: low_confidence, random, entropy, margin, ancestral; auto: random where temperature's auto is 0.7
alg_temp = 0.0              # Dream's: draw the positions to keep from softmax(score / alg_temp); 0: keep the best
threshold = 0.0             # keep every prediction with at least this probability instead of a fixed number a step; 0: off
factor = 0.0                # Fast-dLLM's factor rule instead; 0: off
entropy_bound = 0.0         # EB-Sampler's rule instead: as many as this bound in nats allows, 0.1 for instance; 0: off
remask = 0.0                # ReMDM's eta: with ancestral remasking, tokens of the block may be masked again; 0: what is written stays
remask_schedule = "cap"     # cap: with this chance a step; rescale: this share of the largest possible; conf: that shared out, most to the least sure
suppress = ""               # tokens never to write: ids, names, eos or eot, separated by commas
defer = ""                  # tokens to write last, likewise
cache = "auto"              # none, prefix, dual (approximate), block (exact); auto: block for block diffusion, else none
cfg_scale = 0.0             # classifier-free guidance; 0: none
schedule = ""               # tokens a step: even or timesteps; empty: the family's own
seed = 1337                 # the same seed gives the same text
# how it looks
show = False                # the terminal view: masks turn into text, step by step, coloured by confidence
pause = 0.03                # seconds that --show waits after each step in a terminal
html = ""                   # write the run to this file: a page with a slider over the steps
# machine
device = "auto"             # auto, cpu, cuda, mps
dtype = "auto"              # of the weights: float32, bfloat16; auto: as stored, on a CPU without bfloat16 instructions float32
threads = 0                 # CPU threads; 0: torch's choice
settings = override(globals())

# ---- set-up --------------------------------------------------------------------------------------------------------------------
for _stream in filter(None, (sys.stdin, sys.stdout)):
    _stream.reconfigure(errors="replace")                           # a terminal that cannot show a character shows "?"
if bool(prompt) + bool(infill) + chat + bool(serve) > 1:
    raise ValueError("choose one of --prompt, --infill, --chat and --serve")
if (chat or serve) and (html or num_samples != 1):
    raise ValueError("--html and --num_samples are for single runs: not with --chat or --serve")
if num_samples < 1 or max_new_tokens < 0 or pause < 0:
    raise ValueError(f"num_samples must be at least 1, max_new_tokens and pause not negative, got {num_samples}, {max_new_tokens}, {pause}")
if html and (Path(html).is_dir() or not os.access(Path(html).parent, os.W_OK)):
    raise OSError(f"cannot write a page to {html}: --html takes the name of a file in a folder that exists and can be written to")
settings["checkpoint"] = checkpoint = checkpoint or default_checkpoint()
settings["cache"] = "" if cache == "none" else cache
device, *_ = common.init_process(device, threads)
sampler = Sampler.load(checkpoint, device, common.weights_dtype(device, dtype), adapter)

# ---- chat and serve ------------------------------------------------------------------------------------------------------------
if chat:
    from sampling.chat import converse
    converse(sampler, settings)
    sys.exit()
if serve:
    from sampling.server import serve_forever
    serve_forever(sampler, settings)
    sys.exit()


# ---- generate or fill gaps -----------------------------------------------------------------------------------------------------
def read(text):
    """The text, or the contents of FILE:path."""
    name, data = ("the prompt", os.fsencode(text)) if not text.startswith("FILE:") else (text[5:], Path(text[5:]).read_bytes())
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}") from None


if infill:
    tokens = sampler.encode_gaps(read(infill))
    count = tokens.count(sampler.mask_id)
else:
    tokens = sampler.encode_prompt(read(prompt))
    count = sampler.fit(tokens, max_new_tokens)
arguments = sampler.arguments(count, settings, gaps=bool(infill))
terminal = Terminal(pause=pause)
trace = Trace(sampler, arguments["remasking"], terminal.draw if show else None)
try:
    samples = sampler.run([tokens] * num_samples, arguments, gaps=bool(infill), on_step=trace)
except KeyboardInterrupt:
    print("\nstopped")
    sys.exit(130)
terminal.clear()
for number, sample in enumerate(samples, 1):
    if infill:
        text = sampler.tokenizer.decode(sample, skip_special_tokens=True)
    elif prompt:
        used = sampler.decode(sample[len(tokens):])[1]
        text = sampler.tokenizer.decode(sample[:len(tokens) + used], skip_special_tokens=True)
    else:                                                           # what is written out of nothing may hold several texts
        text = "\n\n".join(text.strip("\n") for text in sampler.split(sample) if text.strip())
    print(f"--- {number} of {num_samples}\n" * (num_samples > 1) + printable(text))
new_tokens = count * num_samples if infill else sum(map(len, samples)) - len(tokens) * num_samples
print(f"\n{trace.report(new_tokens)}")
if html:
    trace.finish().write_html(html, arguments)
    print(f"wrote {html}: open it in a browser")
