"""bench.py's measurements of a real model: SmolLM2-135M beside the same weights in transformers,
and beside llama.cpp."""
import contextlib
import functools
import itertools
import json
import subprocess
import tempfile

import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer
from diffusion import corrupt, mdlm_loss, weight
from experiments.bench_model import open_attention
from experiments.timing import ROOT, interleaved
from kernels import packed
from model import Config, Transformer
from pretrained.hub import find_checkpoint
from sampling.engine import generate

PARTS = ("all", "sample", "thin", "step", "diffusion")
CHECKPOINT = "smollm2"
PROMPT = 64         # tokens
T = 256             # of a training step
MASK = 0            # a token that no text holds, "<|endoftext|>", stands for the mask

# SmolLM2's layers and heads around small matrices: what a token costs besides its products, which
# other work on the machine disturbs less.
THIN = Config(family="llama", vocab_size=49152, dim=64, n_layers=30, n_heads=9, n_kv_heads=3,
              head_dim=64, hidden_dim=64, causal=True, qk_norm=False, tie_embeddings=True)


def real(part="all", tokens="128", rounds="3", batch_sizes="1,8", dtype="float32", llama_bench=""):
    """SmolLM2-135M, 64 + 128 tokens greedily, batch 1 and 8, against transformers' generate; the
    same of a thin model; a training step, T 256, against dLLM's loss there; diffusion sampling in
    bfloat16 against float32; `real sample|thin|step|diffusion`, --tokens=N, --rounds=N,
    --batch_sizes=1,8, --dtype=bfloat16, --llama_bench=FILE for llama.cpp's own figures beside."""
    if part not in PARTS:
        raise ValueError(f"no part called {part!r}: there are {', '.join(PARTS)}")
    tokens, rounds, dtype = int(tokens), int(rounds), getattr(torch, dtype)
    sizes = [int(size) for size in batch_sizes.split(",")]
    if part in ("all", "thin"):
        model = Transformer(THIN).init_weights(0).to(dtype).eval()
        theirs = in_transformers(model, dtype)
        for size in sizes:
            sample_real("thin model", model, theirs, size, tokens, rounds)
    if part == "thin":
        return
    if part in ("all", "diffusion"):
        diffusion_real(sizes, tokens, rounds)
    if part == "diffusion":
        return
    model = Transformer.from_pretrained(CHECKPOINT, dtype=dtype).eval()
    model.config.set_ends([])                           # all write as many tokens
    theirs = in_transformers(model, dtype)
    if part in ("all", "sample"):
        for size in sizes:
            sample_real("SmolLM2", model, theirs, size, tokens, rounds)
        if llama_bench:
            print_llama(llama_bench, tokens, dtype)
    if part in ("all", "step"):
        step_real(model, theirs, dtype, rounds)


def in_transformers(model, dtype):
    """The same weights there, by way of the folder that we export."""
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        model.export_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = MASK
    return theirs.eval()


def real_tokens(count, length):
    """int64 [count, length]: the beginning of a chapter of ours."""
    tokenizer = Tokenizer.from_pretrained(find_checkpoint(CHECKPOINT))
    ids = tokenizer.encode((ROOT / "docs" / "training.md").read_text())
    return torch.tensor(ids[:count * length]).view(count, length)


@torch.inference_mode()
def sample_real(name, model, theirs, batch_size, tokens, rounds):
    """Decoding; in float32 the tokens are compared."""
    prompts = real_tokens(batch_size, PROMPT)
    visible = torch.ones_like(prompts)
    written = {}

    def run_ours():
        written["ours"] = generate(model, prompts.tolist(), tokens)

    def run_theirs():
        rows = theirs.generate(prompts, attention_mask=visible, max_new_tokens=tokens,
                               do_sample=False)
        written["theirs"] = rows.tolist()

    with packed(model):                                 # as sample.py keeps it
        times = interleaved({"theirs": run_theirs, "ours": run_ours}, rounds, warmup=1)
    same = count_equal(written["ours"], written["theirs"])
    if model.embed.weight.dtype == torch.float32:
        assert same == batch_size, f"the tokens of {batch_size - same} rows differ"
    mine, yardstick, total = times["ours"], times["theirs"], batch_size * tokens
    print(f"{name}, batch {batch_size}, {PROMPT} + {tokens} tokens: transformers "
          f"{total / yardstick.wall:7.2f} tokens/s, ours {total / mine.wall:7.2f}, "
          f"{yardstick.wall / mine.wall:5.2f} x ({yardstick.cpu / mine.cpu:.2f} in CPU time; goal "
          f"2), {same} of {batch_size} rows equal", flush=True)


def count_equal(ours, theirs):
    return sum(mine == yours for mine, yours in zip(ours, theirs))


def print_llama(program, tokens, dtype):
    """What llama.cpp's llama-bench says of the same weights in a GGUF file of this precision."""
    kind = {"float32": "f32", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
    model = Transformer.from_pretrained(CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        file = model.export_pretrained(folder, gguf=kind)
        command = [program, "-m", str(file), "-p", str(PROMPT), "-n", str(tokens), "-t",
                   str(torch.get_num_threads()), "-o", "json"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    for row in json.loads(result.stdout):
        kind = "decoding" if row["n_gen"] else "prompt"
        print(f"llama.cpp, {row['model_type']}, {kind}: {row['avg_ts']:.2f} tokens/s", flush=True)


def diffusion_real(sizes, tokens, rounds, tokens_per_pass=4):
    """The weights as a diffusion model, whose texts mean nothing: its speed by precision."""
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer.from_pretrained(CHECKPOINT, dtype=dtype).eval()
        model.config.causal, model.config.shift, model.config.mask_token_id = False, True, MASK
        model.config.set_ends([])
        models[str(dtype).removeprefix("torch.")] = model
    ways = {"masks, no cache": (0, None), "masks, cache prefix": (0, "prefix"),
            "masks, cache dual": (0, "dual"), "blocks of 4": (4, "block")}
    for (name, (block_length, cache)), size in itertools.product(ways.items(), sizes):
        prompts, runs = real_tokens(size, PROMPT).tolist(), {}
        with contextlib.ExitStack() as stack:
            for precision, model in models.items():
                model.config.block_length = block_length
                stack.enter_context(packed(model))
                runs[precision] = functools.partial(
                    generate, model, prompts, tokens, tokens // tokens_per_pass, cache=cache)
            times = interleaved(runs, rounds, warmup=1)
        slow, fast = times["float32"].wall, times["bfloat16"].wall
        print(f"diffusion, {name}, batch {size}, {PROMPT} + {tokens} tokens, {tokens_per_pass} a "
              f"pass: float32 {size * tokens / slow:7.2f} tokens/s, bfloat16 "
              f"{size * tokens / fast:7.2f}, {slow / fast:5.2f} x (goal 1)", flush=True)


def step_real(model, theirs, dtype, rounds, batch_size=2):
    """A forward and backward pass of the masked-diffusion loss; the losses are compared."""
    tokens = real_tokens(batch_size, T)
    model.config.causal, model.config.mask_token_id = False, MASK
    open_attention(theirs)
    t = torch.linspace(0.25, 0.75, batch_size)
    x_t, mask = corrupt(model, tokens, t[:, None], generator=torch.Generator().manual_seed(0))
    visible, losses = torch.ones_like(tokens), {}

    def run_ours():
        loss = mdlm_loss(model, tokens, t, mask).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        losses["ours"] = loss.item()

    def run_theirs():
        logits = theirs(x_t, attention_mask=visible, use_cache=False).logits
        nll = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
        loss = (nll.view_as(tokens) * mask * weight(t[:, None])).sum() / tokens.numel()
        loss.backward()
        theirs.zero_grad(set_to_none=True)
        losses["theirs"] = loss.item()

    times = interleaved({"theirs": run_theirs, "ours": run_ours}, rounds, warmup=1)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    difference = abs(losses["ours"] - losses["theirs"])
    assert difference < tolerance * losses["theirs"], f"the losses differ: {losses}"
    mine, yardstick = times["ours"], times["theirs"]
    print(f"training step, B {batch_size}, T {T}: transformers {yardstick.wall * 1e3:.0f} ms, ours "
          f"{mine.wall * 1e3:.0f}, {yardstick.wall / mine.wall:.2f} x "
          f"({yardstick.cpu / mine.cpu:.2f} in CPU time; goal 1.5), equal losses", flush=True)
