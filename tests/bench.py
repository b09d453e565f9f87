"""The measurements that README quotes: `python tests/bench.py NAME`, or without a name for the list.

Candidates are compared in one run, in turns, so that whatever else the machine does hits all of them alike.
"""
import http.client
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# glibc gives large freed blocks back to the system and asks for them anew at the next step. Whether it does is luck, hits either
# candidate and can cost more than all that is compared (the same silu took 19 or 398 ms). So it is told to keep what it has; it
# reads that when a process starts, hence the second start.
KEEP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "200000000",
        "GOMP_SPINCOUNT": "10000"}      # and threads that wait do not keep the cores from each other, see common.py
if __name__ == "__main__" and "MALLOC_TRIM_THRESHOLD_" not in os.environ and sys.argv[1:2] != ["load"]:
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)

import torch  # noqa: E402

import common  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import Cache, Config, Transformer  # noqa: E402

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))     # of the machine's cores
COMMANDS = {}
BF16 = common.matrix_dtype(torch.device("cpu"), "auto") == torch.bfloat16       # without its instructions a CPU takes minutes for what it does in seconds


def command(function):
    """`python tests/bench.py <the function's name>` runs it."""
    COMMANDS[function.__name__] = function
    return function


def machine():
    """What the figures below it were measured on, in a line."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")] or [platform.processor()]
    return (f"{names[0]}, {os.cpu_count()} cores, {'' if BF16 else 'no '}bfloat16 instructions, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"load {os.getloadavg()[0]:.1f}")


class Timing(typing.NamedTuple):
    median: float       # seconds
    cpu: float          # seconds of CPU time, all threads: with one thread, what other work on the machine disturbs least


def interleaved(functions, rounds=9, warmup=2):
    """{name: Timing}, medians: every function once a round, in an order that turns round each time, after `warmup` rounds."""
    wall, cpu = {name: [] for name in functions}, {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name in list(functions) if number % 2 else reversed(functions):
            start, cpu_start = time.perf_counter(), time.process_time()
            functions[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {name: Timing(statistics.median(wall[name][warmup:]), statistics.median(cpu[name][warmup:])) for name in functions}


def random_reference(family, **config):
    """A random model of transformers with sdpa attention, float32, in evaluation mode."""
    import transformers
    config = transformers.AutoConfig.for_model(family, attn_implementation="sdpa", **config)
    torch.manual_seed(0)
    if family in ("bert", "roberta", "modernbert"):
        return transformers.AutoModelForMaskedLM.from_config(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def open_attention(reference, opened=True):
    """Everyone sees everyone, without a mask: the reference at its fastest. (Only an attention mask of ones tells it that.)"""
    for module in reference.modules() if opened else []:
        if hasattr(module, "is_causal"):
            module.is_causal = False


def ours_of(reference, **options):
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return Transformer.from_pretrained(folder, **options)


# -------------------------------------------------------------------------------------------------------------------------------

V, D, T, LAYERS, HEADS = 8192, 512, 512, 8, 8
_LLAMA = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=1376)
_BERT = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * D)
REFERENCES = {      # our family: (the family of transformers with the same weights, its config)
    "llada": ("llama", dict(_LLAMA, num_key_value_heads=8)),
    "Dream": ("qwen2", dict(_LLAMA, num_key_value_heads=2)),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", dict(_BERT, max_position_embeddings=T + 2)),
    "modernbert": ("modernbert", dict(_BERT, intermediate_size=768, reference_compile=False, pad_token_id=0, bos_token_id=1,
                                      eos_token_id=2,
                                      cls_token_id=1, sep_token_id=2)),
    "gpt2": ("gpt2", dict(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=T)),
    "llama": ("llama", dict(_LLAMA, num_key_value_heads=2)),
    "qwen2": ("qwen2", dict(_LLAMA, num_key_value_heads=2)),
    "qwen3": ("qwen3", dict(_LLAMA, num_key_value_heads=2, head_dim=64)),
}


@command
@torch.inference_mode()
def forward():
    """A forward pass against transformers (sdpa), same weights: T 512, D 512, 8 layers, float32, batch 1 and 8."""
    print("family       batch   transformers        ours   ratio of wall clocks, of CPU times (above 1: ours is faster)")
    for family in [name for name in REFERENCES if not sys.argv[2:] or name in sys.argv[2:]]:
        reference = random_reference(REFERENCES[family][0], **REFERENCES[family][1])
        opened = family in ("llada", "Dream")
        ours = ours_of(reference, causal=False if opened else None)
        open_attention(reference, opened)
        for batch_size in (1, 8):
            tokens = torch.randint(8, V, (batch_size, T), generator=torch.Generator().manual_seed(0))
            keywords = {"attention_mask": torch.ones_like(tokens)} | ({} if "bert" in family else {"use_cache": False})
            functions = {"theirs": lambda: reference(tokens, **keywords).logits, "ours": lambda: ours(tokens)}      # noqa: B023
            a, b = functions["theirs"](), functions["ours"]()
            assert (a - b).abs().max() < 2e-4 * a.abs().max(), family
            times = interleaved(functions, rounds=21 if batch_size == 1 else 7)
            (theirs, their_cpu), (mine, my_cpu) = times["theirs"], times["ours"]
            print(f"{family:12} {batch_size:5}   {theirs * 1e3:9.1f} ms {mine * 1e3:8.1f} ms   "
                  f"{theirs / mine:5.3f}  {their_cpu / my_cpu:5.3f}",
                  flush=True)


def loading_memory(layout, stored, loaded, megabytes):
    """(bytes of the weights as loaded, peak bytes of loading them above what the imports took), in a process of its own.

    layout: "single" file, "sharded" into four, or "tied" (one file, head and embedding one matrix). Mapped pages of files count.
    """
    from safetensors.torch import save_file
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    tied, layers = layout == "tied", 8
    dim = round((megabytes * 1e6 / size[loaded] / (8 * 12 + 100)) ** 0.5 / 64) * 64        # 12 D^2 a layer, V = 50 D, in and out
    config = Config(vocab_size=(100 if tied else 50) * dim, dim=dim, n_layers=layers, n_heads=dim // 64, hidden_dim=8 * dim // 3,
                    tie_embeddings=tied)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = Transformer(config).init_weights().to(getattr(torch, stored))
        model.save_pretrained(folder)
        count = sum(parameter.numel() for parameter in model.parameters())
        if layout == "sharded":
            os.remove(f"{folder}/model.safetensors")
            weights = model.state_dict()
            places = {name: f"model-0000{1 + i * 4 // len(weights)}-of-00004.safetensors" for i, name in enumerate(weights)}
            for shard in set(places.values()):
                save_file({name: weights[name] for name in weights if places[name] == shard}, f"{folder}/{shard}")
            Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        del model
        script = f"""
import torch
from model import Transformer
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
model = Transformer.from_pretrained({folder!r}, dtype=torch.{loaded})
print(status("VmHWM") - before)
"""
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return count * size[loaded], int(result.stdout)


@command
def load():
    """Peak memory of from_pretrained on a checkpoint of a gigabyte (as loaded): at most 1.15 times the weights and 300 MB."""
    print("layout     stored     loaded      weights       peak   peak / weights")
    for layout, stored, loaded in (("single", "float32", "float32"), ("single", "bfloat16", "float32"),
                                   ("single", "bfloat16", "bfloat16"),
                                   ("sharded", "float32", "float32"), ("sharded", "bfloat16", "float32"),
                                   ("tied", "float32", "float32")):
        size, peak = loading_memory(layout, stored, loaded, megabytes=1000)
        print(f"{layout:10} {stored:10} {loaded:10} {size / 1e6:6.0f} MB  {peak / 1e6:6.0f} MB   {peak / size:6.3f}", flush=True)
        assert peak < 1.15 * size + 300e6


@command
@torch.inference_mode()
def parity():
    """The largest difference of logits from the reference's, relative to the largest logit: float32 and bfloat16."""
    print("family       float32    bfloat16: ours - theirs, ours - float32, theirs - float32 (root mean square / largest)")
    for family, (name, config) in REFERENCES.items():
        reference = random_reference(name, **config)
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
        opened = family in ("llada", "Dream")
        open_attention(reference, opened)
        tokens = torch.randint(8, V, (2, T), generator=torch.Generator().manual_seed(0))
        exact, mine = reference(tokens).logits, ours_of(reference, causal=False if opened else None)(tokens)
        reference.bfloat16()
        rounded, mine16 = reference(tokens).logits.float(), ours_of(reference, causal=False if opened else None)(tokens).float()
        scale, rms = exact.abs().max(), lambda x: x.square().mean().sqrt()
        figures = [rms(x) / scale for x in (mine16 - rounded, mine16 - exact, rounded - exact)]
        print(f"{family:12} {(mine - exact).abs().max() / scale:.1e}   " + "   ".join(f"{figure:.1e}" for figure in figures),
              flush=True)


# ---- the training step ------------------------------------------------------------------------------------------------------


def training_candidates(vocab_size, compiled):
    """{name: a forward and backward pass}: 6 layers, D 384, T 256, B 8. The optimizer is the same for all and left out."""
    import transformers

    from diffusion import ar_loss, mdlm_loss
    B, T, dim, mask_id = 8, 256, 384, vocab_size - 1
    tokens = torch.randint(0, mask_id, (B, T), generator=torch.Generator().manual_seed(0))
    options = dict(vocab_size=vocab_size, dim=dim, n_layers=6, n_heads=6, mask_token_id=mask_id)

    def build(causal=False):
        model = Transformer(Config(**options, causal=causal, shift=causal)).init_weights()
        if compiled:
            model.compile_blocks()
        return model

    ours, causal = build(), build(causal=True)
    config = transformers.LlamaConfig(vocab_size=vocab_size, hidden_size=dim, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024,
                                      attn_implementation="sdpa")
    llama = transformers.LlamaForCausalLM(config)
    open_attention(llama)
    visible, generator = torch.ones_like(tokens), torch.Generator().manual_seed(1)

    def step(model, loss, bf16=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        model.zero_grad(set_to_none=True)

    def full(forward):          # all logits, cross-entropy on all positions, times the mask
        t = torch.rand(B, 1, generator=generator).clamp(min=1e-3)
        mask = torch.rand(B, T, generator=generator) < t
        logits = forward(torch.where(mask, mask_id, tokens))
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view(B, T)
        return (nll * mask / t).sum() / (B * T)

    mdlm = lambda: mdlm_loss(ours, tokens, generator=generator).loss
    candidates = {}
    for bf16, precision in ((False, "float32"), (True, "bf16"))[:1 + BF16]:
        candidates[f"ours {precision}"] = lambda bf16=bf16: step(ours, mdlm, bf16)
        candidates[f"full logits {precision}"] = lambda bf16=bf16: step(ours, lambda: full(ours), bf16)
        candidates[f"ours, autoregressive, {precision}"] = lambda bf16=bf16: step(causal, lambda: ar_loss(causal, tokens).loss, bf16)
        candidates[f"plain autoregressive {precision}"] = lambda bf16=bf16: step(causal, lambda: torch.nn.functional.cross_entropy(
            causal(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()), bf16)
        candidates[f"trunk {precision}"] = lambda bf16=bf16: step(ours, lambda: ours.hidden(tokens).sum(), bf16)
    candidates["transformers, dLLM's loss, float32"] = lambda: step(llama, lambda: full(lambda x: llama(
        x, attention_mask=visible, use_cache=False).logits))
    return ours, candidates


@command
def step():
    """A training step on a CPU, tokens/s of every arrangement and their ratios; `step 260 eager` for bytes, without compiling."""
    vocab_size = int(sys.argv[2]) if len(sys.argv) > 2 else 50304
    compiled = "eager" not in sys.argv
    ours, candidates = training_candidates(vocab_size, compiled)
    _, eager = training_candidates(vocab_size, False) if compiled else (None, {})
    candidates = {**{f"{name}{' compiled' if compiled and 'transformers' not in name else ''}": f for name, f in candidates.items()}, **eager}
    for dtype in (torch.float32, torch.bfloat16)[:1 + BF16]:
        a = torch.randn(2048, 2048).to(dtype)
        candidates[f"mm {dtype}"] = lambda a=a: a @ a
    times = interleaved(candidates, rounds=3, warmup=1)
    base, flops = times["full logits float32"].median, ours.flops_per_token(256, head_share=0.5) * 2048
    print(f"V {vocab_size}, 6 layers, D 384, T 256, B 8, forward and backward".ljust(58) + "ms    tokens/s   x full logits float32")
    for name, (median, _) in times.items():
        if name.startswith("mm "):
            print(f"{name:44} {median * 1e3:10.1f}   {2 * 2048**3 / median / 1e9:6.0f} GFLOP/s")
        else:
            print(f"{name:44} {median * 1e3:10.1f} {2048 / median:10,.0f}   {base / median:5.2f}")
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))[:1 + BF16]:
        for suffix in (" compiled", "") if compiled else ("",):
            speed = flops / times[f"ours {precision}{suffix}"].median
            print(f"model FLOP/s of ours {precision}{suffix} over torch.mm: {speed / (2 * 2048**3 / times[f'mm {dtype}'].median):.2f}")


@command
def loss():
    """Time and peak memory of the loss, forward and backward, V 126464, D 256, T 1024, half of the tokens masked: ours against all logits."""
    script = """
import sys, time, torch
torch.set_num_threads({threads})
from model import LinearCrossEntropy
import torch.nn.functional as F
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
V, D, T = 126464, 256, 1024
hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
targets, weights, mask = torch.randint(0, V, (T,)), torch.rand(T), torch.rand(T) < 0.5
before, start = peak(), time.perf_counter()
for _ in range(3):
    if {name!r} == "all logits":
        loss = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights * mask).sum()
    else:
        rows = mask if {name!r} == "ours" else torch.ones_like(mask)
        loss, _ = LinearCrossEntropy.apply(hidden[rows], weight, None, targets[rows], (weights * mask)[rows], max(64, 2**25 // V))
    loss.backward()
    del loss
    hidden.grad = weight.grad = None
print(peak() - before, (time.perf_counter() - start) / 3)
"""
    figures = {}
    for name in ("all logits", "ours", "ours, on all rows") * 3:                # a process each: its peak is its own
        out = subprocess.run([sys.executable, "-c", script.format(threads=THREADS, name=name)], cwd=ROOT, capture_output=True, text=True, check=True)
        figures.setdefault(name, []).append([float(x) for x in out.stdout.split()])
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in figures.items()}
    for name, (megabytes, seconds) in medians.items():
        base = medians["all logits"]
        print(f"{name:18} {megabytes:6.0f} MB, {base[0] / megabytes:4.1f} times less   {seconds:5.2f} s, {base[1] / seconds:4.2f} times faster")


@command
def block():
    """A training step of block diffusion against one of masked diffusion, the same tokens: the small CPU model; on a GPU T 1024, blocks of 32."""
    from diffusion import block_loss, mdlm_loss
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = common.matrix_dtype(device, "auto")
    sizes = [(1024, 16, 32, dict(dim=768, n_layers=12, n_heads=12))] if gpu else [(128, 16, 4, {}), (512, 4, 32, {})]
    for T, B, length, config in sizes:
        config = Config(vocab_size=2048, mask_token_id=2047, max_len=T, **{**dict(dim=192, n_layers=4, n_heads=4), **config})
        model = Transformer(config).init_weights().to(device)
        if gpu:
            model.compile_blocks()                                  # flex_attention that is not compiled makes all scores
        tokens = torch.randint(0, 2047, (B, T), device=device)

        def step(loss, *arguments):
            with common.autocast(device, "auto"):
                loss(model, tokens, *arguments).loss.backward()
            model.zero_grad(set_to_none=True)
            if gpu:
                torch.cuda.synchronize()

        times = interleaved({"mdlm": lambda: step(mdlm_loss), "bd3lm": lambda: step(block_loss, length)}, rounds=9 if not gpu else 30, warmup=3)
        wall, cpu = (times["bd3lm"][i] / times["mdlm"][i] for i in (0, 1))
        print(f"T {T}, B {B}, blocks of {length}, D {config.dim}, {dtype} on {device.type}: mdlm {times['mdlm'].median * 1e3:.1f} ms, "
              f"bd3lm {times['bd3lm'].median * 1e3:.1f} ms, {wall:.2f} times as long ({cpu:.2f} in CPU time)", flush=True)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            step(block_loss, length)
            print(f"peak memory of a bd3lm step {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")
# ---- fine-tuning ------------------------------------------------------------------------------------------------------------

_STEP = """
import contextlib, json, sys, torch
import torch.nn.functional as F
from data.checkpoints import put_rows
from scale.lora import add_lora, init_lora
from model import Config, Transformer
torch.set_num_threads({threads})

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def steps(config, T, B, rank, dtype, checkpointing, plain):
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = Transformer(Config(**config))
        if rank:
            add_lora(model.to(dtype), rank, 1.0)
    for name, p in list(model.named_parameters()):
        put_rows(model, name, torch.empty(p.shape, dtype=p.dtype).normal_(std=0.02, generator=generator))
    model.checkpoint_blocks = checkpointing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    autocast = contextlib.nullcontext() if rank or dtype == torch.float32 else torch.autocast("cpu", dtype, cache_enabled=False)
    for _ in range(2):
        tokens, rows = torch.randint(0, config["vocab_size"], (B, T), generator=generator), torch.arange(B * T)
        with autocast:
            if plain:
                loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten(), reduction="none").sum()
            else:
                loss, _ = model(tokens, select=rows, targets=tokens.flatten(), weights=torch.ones(B * T))
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

for case in json.loads(sys.argv[1]):
    case["dtype"] = getattr(torch, case["dtype"])
    steps(**case | dict(config=dict(vocab_size=300, dim=64, n_layers=1, n_heads=2), T=32))       # kernels and the like are there now
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")               # the high-water mark starts here
    steps(**case)
    print(status("VmHWM") - before)
"""


def step_memory(*cases):
    """Peak bytes of training steps, weights and optimizer included, measured in a process of its own.

    cases: dicts of `config` (of Config), T, B, rank (of LoRA; 0: everything), dtype (a name), checkpointing, plain (all logits at once).
    """
    out = subprocess.run([sys.executable, "-c", _STEP.replace("{threads}", str(THREADS)), json.dumps(cases)], cwd=ROOT, capture_output=True, text=True,
                         check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}).stdout
    return [int(line) for line in out.split()]


@command
def finetune():
    """Peak memory of one step, V 126464, D 512, 4 layers, T 1024, B 1: LoRA and full, ours against all logits at once, and as planned."""
    from scale.memory import plan_memory
    config = dict(vocab_size=126464, dim=512, n_layers=4, n_heads=8, qk_norm=False)
    base = dict(config=config, T=1024, B=1)
    print("                        all logits       ours    planned   ours / all logits")
    for dtype in ("float32", "bfloat16"):
        for rank in (64, 0):
            case = dict(base, rank=rank, dtype=dtype)
            plain, ours = step_memory(dict(case, checkpointing=False, plain=True), dict(case, checkpointing=True, plain=False))
            planned = plan_memory(Config(**config), 1024, 1, rank, dtype=getattr(torch, dtype)).peak
            print(f"{f'LoRA {rank}' if rank else 'everything':12}{dtype:10} {plain / 1e6:8.0f} MB {ours / 1e6:7.0f} MB {planned / 1e6:7.0f} MB   {ours / plain:5.2f}",
                  flush=True)


# ---- sampling -----------------------------------------------------------------------------------------------------------------


def published_choice(x, logits, first, end, mask_id, temperature, count):
    """What LLaDA's and Fast-dLLM's loops do with logits [1, S, V] of positions first...: softmax (and noise) in float64 over all of them."""
    token = logits
    if temperature:
        noise = torch.rand(logits.shape, dtype=torch.float64)
        token = logits.double().exp() / (-torch.log(noise)) ** temperature
    token = token.argmax(-1)
    confidence = logits.double().softmax(-1).gather(-1, token[..., None])[0, :, 0]                  # [S]
    confidence[end - first:] = -torch.inf
    confidence[x[0, first:first + len(confidence)] != mask_id] = -torch.inf
    keep = confidence.topk(count).indices
    x[0, first + keep] = token[0, keep]


def published_loop(model, prompt, new_tokens, block_length, temperature, mask_id, passes=10**6):
    """LLaDA's loop done plainly, a token a step: every logit of the canvas. The tokens, and the seconds a pass took, of at most `passes`."""
    x, start, done = torch.tensor([prompt + [mask_id] * new_tokens]), time.perf_counter(), 0
    while (x == mask_id).any() and done < passes:
        end = len(prompt) + (done // block_length + 1) * block_length
        published_choice(x, model(x), 0, end, mask_id, temperature, 1)
        done += 1
    return x[0].tolist(), (time.perf_counter() - start) / done


def published_cache_loop(model, prompt, new_tokens, block_length, cache, mask_id):
    """Fast-dLLM's loop done plainly: a full pass at the start of each block, then the block (dual) or all from it on (prefix), all logits."""
    x = torch.tensor([prompt + [mask_id] * new_tokens])
    keys = Cache(model.config, 1, x.shape[1])
    for begin in range(len(prompt), x.shape[1], block_length):
        end = begin + block_length
        for step in range(block_length):
            first, last = (0, x.shape[1]) if not step else (begin, end if cache == "dual" else x.shape[1])
            logits = model(x[:, first:last], cache=keys, positions=torch.arange(first, last))
            published_choice(x, logits, first, end, mask_id, 0, 1)
    return x[0].tolist()


SAMPLE_MASK = 126336


def sample_model(vocab_size=126464, mask_id=SAMPLE_MASK, max_len=512):
    model = Transformer(Config(vocab_size=vocab_size, dim=256, n_layers=4, n_heads=4, qk_norm=False, mask_token_id=mask_id, max_len=max_len))
    torch.nn.init.normal_(model.init_weights().head.weight, std=0.05)
    return model, torch.randint(0, vocab_size - 200, (64,), generator=torch.Generator().manual_seed(0)).tolist()


def sample_published(tokens):
    from diffusion import generate
    model, prompt = sample_model()
    for temperature, goal in ((0.0, 6), (0.7, 20)):
        ours, theirs, passes = [], [], 10**6 if not temperature else 32     # each pass costs the same: at 0.7, where they are long, a block will do
        generate(model, [prompt], 32, 32, 32, temperature, seed=0)          # warm-up
        for _ in range(3):
            start = time.perf_counter()
            mine = generate(model, [prompt], tokens, tokens, 32, temperature, seed=0)[0]
            ours.append((time.perf_counter() - start) / tokens)
            text, seconds = published_loop(model, prompt, tokens, 32, temperature, SAMPLE_MASK, passes)
            theirs.append(seconds)
        assert temperature or mine == text, "the tokens differ"
        ours, theirs = statistics.median(ours), statistics.median(theirs)
        print(f"temperature {temperature}: published loop {1 / theirs:7.2f} tokens/s, ours {1 / ours:7.2f}, {theirs / ours:5.1f} x (goal {goal})"
              + ", identical tokens" * (not temperature), flush=True)


def sample_cache(tokens):
    from diffusion import generate
    model, prompt = sample_model()
    for cache in ("prefix", "dual"):
        ours = lambda: generate(model, [prompt], tokens, tokens, 32, cache=cache)[0]
        theirs = lambda: published_cache_loop(model, prompt, tokens, 32, cache, SAMPLE_MASK)
        assert ours() == theirs(), "the tokens differ"
        times = interleaved({"theirs": theirs, "ours": ours}, rounds=2, warmup=0)
        print(f"{cache} cache: all rows {tokens / times['theirs'].median:7.2f} tokens/s, ours {tokens / times['ours'].median:7.2f}, "
              f"{times['theirs'].median / times['ours'].median:5.2f} x (goal 2), identical tokens", flush=True)


def sample_batch(tokens):
    from diffusion import generate
    model, prompt = sample_model(260, 257)
    prompt = prompt[:32]
    for cache in (None, "dual"):
        batch = lambda n: generate(model, [prompt] * n, tokens, tokens, 32, cache=cache, seed=0)
        times = interleaved({"1": lambda: batch(1), "8": lambda: batch(8)}, rounds=3, warmup=1)
        print(f"D 256, bytes, cache {cache}: batch 1 {tokens / times['1'].median:.0f} tokens/s, batch 8 {8 * tokens / times['8'].median:.0f}, "
              f"{8 * times['1'].median / times['8'].median:.2f} x (goal 2.5)", flush=True)


@command
@torch.inference_mode()
def sample():
    """LLaDA's sampler, V 126464, D 256, 4 layers, prompt 64, 128 tokens in as many steps, blocks of 32; `sample published|cache|batch [tokens]`."""
    parts = {"published": sample_published, "cache": sample_cache, "batch": sample_batch}
    for name in [part for part in sys.argv[2:3] if part in parts] or parts:
        parts[name](int(sys.argv[3]) if len(sys.argv) > 3 else 128)


def ask(port, body, path="/v1/completions"):
    """(status, completion tokens, seconds) of a request."""
    start, connection = time.perf_counter(), http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    text = response.read()
    connection.close()
    tokens = json.loads(text)["usage"]["completion_tokens"] if response.status == 200 and text[:1] == b"{" else 0
    return response.status, tokens, time.perf_counter() - start


@command
def serve():
    """sample.py --serve, D 256 bytes: 1 and 32 clients, with and without seeds; 500 mixed requests, errors, memory; `serve [new tokens]`."""
    new_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        sample_model(260, 257)[0].save_pretrained(folder)
        Tokenizer.bytes().save_pretrained(folder)
        server = subprocess.Popen([sys.executable, "sample.py", f"--checkpoint={folder}", f"--serve={port}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            server.stdout.readline()                                # it listens
            body = {"prompt": "Once upon a time", "max_tokens": new_tokens, "temperature": 0.7, "suppress": "eos"}
            ask(port, body)
            for clients, seeded in ((1, False), (32, False), (32, True)):
                with ThreadPoolExecutor(clients + 1) as pool:
                    start, count = time.perf_counter(), max(clients, 8)
                    answers = pool.map(lambda i: ask(port, {**body, **({"seed": i} if seeded else {})}), range(count))    # noqa: B023
                    page = pool.submit(lambda: time.sleep(0.2) or ask(port, None, "/")).result()
                    answers = list(answers)
                seconds = time.perf_counter() - start
                assert all(status == 200 for status, _, _ in answers) and page[0] == 200
                print(f"{clients:2} clients{', seeded' * seeded:8}: {sum(n for _, n, _ in answers) / seconds:7.1f} tokens/s, longest answer "
                      f"{max(s for _, _, s in answers):5.2f} s, the page meanwhile {page[2] * 1e3:.0f} ms", flush=True)
            memory = lambda: next(int(line.split()[1]) for line in open(f"/proc/{server.pid}/status") if line.startswith("VmRSS")) / 1024
            kinds = [("/v1/completions", {"prompt": "ab"}), ("/v1/completions", {"prompt": "", "stream": True}), ("/generate", {"prompt": "a[MASK:4]b"}),
                     ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}), ("/v1/completions", {"prompt": "a", "seed": 1, "n": 2})]
            mixed = lambda i: ask(port, {**kinds[i % 5][1], "max_tokens": 8}, kinds[i % 5][0])[0]
            with ThreadPoolExecutor(32) as pool:
                list(pool.map(mixed, range(200)))                   # until every buffer has its size
                before = memory()
                wrong = sum(status != 200 for status in pool.map(mixed, range(500)))
            print(f"500 mixed requests of 32 clients: {wrong} errors, memory {before:.0f} MB before and {memory():.0f} MB after")
        finally:
            server.terminate()
            server.wait()


# ---- evaluation -----------------------------------------------------------------------------------------------------------------


def published_log_likelihood(model, prefix, target, num_samples, generator):
    """The yardstick: LLaDA's estimator (eq. 6), one request at a time repeated as the batch, all logits."""
    L, mask_id = len(target), model.config.mask_token_id
    tokens = torch.tensor(prefix + target).repeat(num_samples, 1)
    k = torch.randint(1, L + 1, (num_samples, 1), generator=generator)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, len(prefix):] = torch.rand(num_samples, L, generator=generator).argsort(1).argsort(1) < k
    logits = model(torch.where(mask, mask_id, tokens))
    nll = torch.nn.functional.cross_entropy(logits[mask].float(), tokens[mask], reduction="none")
    return -(nll * (L / k).expand(tokens.shape)[mask]).sum().item() / num_samples


def requests_of(tokens, n, longest, shortest=1, seed=0):
    """n pairs (context of 30 to 100 tokens, answer of up to `longest`) out of a corpus."""
    generator = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
    pairs = []
    for _ in range(n):
        context, answer, start = number(30, 100), number(shortest, longest), number(0, len(tokens) - 128)
        pairs.append((tokens[start:start + context].tolist(), tokens[start + context:start + context + answer].tolist()))
    return pairs


def spread_of(model, pairs, repeats, **options):
    """(mean of log_likelihood over streams [N], its standard deviation from stream to stream [N])."""
    from diffusion import log_likelihood
    prefixes, targets = zip(*(pair for pair in pairs for _ in range(repeats)))
    values, _ = log_likelihood(model, prefixes, targets, streams=range(len(targets)), **options)
    return values.view(-1, repeats).mean(1), values.view(-1, repeats).std(1)


def pydocs_model(folder):
    """The Evaluator of a checkpoint trained on pydocs; made here in a minute and a half if `folder` has none."""
    import eval as settings_of
    from evaluation.evaluator import Evaluator
    if not Path(folder, "config.json").exists():
        subprocess.run([sys.executable, "train_scratch.py", "--max_minutes=1.5", "--dim=96", "--n_heads=3", f"--out_dir={folder}"], cwd=ROOT, check=True)
    return Evaluator({**settings_of.settings, "checkpoint": str(folder)})


@command
@torch.inference_mode()
def eval():
    """log_likelihood against LLaDA's: standard errors, bias, requests/s, "auto"; `eval FOLDER [small]` with a model of pydocs."""
    from data.loader import TokenDataset
    from data.prepare import prepare
    from diffusion import log_likelihood
    from evaluation.designs import ESTIMATORS
    small, folder = "small" in sys.argv, sys.argv[2] if len(sys.argv) > 2 else "/tmp/unmask-bench-eval"
    evaluator = pydocs_model(folder)
    text = torch.from_numpy(TokenDataset(prepare("pydocs", folder)).val[:].astype("int64"))
    pairs = [(prefix[-100:], target) for prefix, target in requests_of(text, 10 if small else 100, 20, 2)]

    print(f"standard error, from 8 streams, over {len(pairs)} requests of 2 to 20 tokens, relative to LLaDA's with as many passes")
    errors = {(name, n): spread_of(evaluator.model, pairs, 8, num_samples=n, estimator=name)[1]
              for n in (8, 12, 32) for name in ESTIMATORS}
    for n in sorted({n for _, n in errors}):
        print(f"  {n:4} passes: " + ", ".join(f"{name} {(errors[name, n] / errors['llada', n]).mean():.3f}" for name in ESTIMATORS)
              + f"   (LLaDA's: {errors['llada', n].mean():.3f} nats)", flush=True)
    print(f"  dealt with 12 passes / LLaDA's with 32: {errors['dealt', 12].mean() / errors['llada', 32].mean():.3f}")

    few, many = pairs[:4 if small else 10], 1000 if small else 10_000
    long, long_error = log_likelihood(evaluator.model, *zip(*few), num_samples=many, estimator="llada", seed=1)
    for name in ("llada", "dealt"):
        mean, spread = spread_of(evaluator.model, few, 16, num_samples=32, estimator=name, seed=2)
        z = (mean - long) / torch.hypot(spread / 4, long_error)
        print(f"bias of {name}, against {many:,} samples of LLaDA's: {int((z.abs() <= 2).sum())} of {len(few)} requests within 2 standard errors, "
              f"mean difference {(mean - long).mean():+.4f} +- {torch.hypot(spread / 4, long_error).square().sum().sqrt() / len(few):.4f} nats", flush=True)

    # Which of four spans goes on? The true one, and three from elsewhere of the same 6 to 12 tokens.
    documents = [(prefix[-40:], target) for prefix, target in requests_of(text, 10 if small else 150, 12, 6, seed=3)]
    spans = requests_of(text, 3 * len(documents), 12, 12, seed=4)
    choices = {("spans", i): {(tuple(prefix), tuple(other[:len(target)])): 1 for other in [target] + [span for _, span in spans[3 * i:3 * i + 3]]}
               for i, (prefix, target) in enumerate(documents)}
    cost = {}
    for name, n, estimator in (("LLaDA's, 120 passes", 120, "llada"), ("dealt, 120 passes", 120, "dealt"), ("dealt, auto", None, "dealt")):
        evaluator.num_samples, evaluator.settings["estimator"], evaluator.tokens = n, estimator, 0
        found = list(evaluator.score(choices).values())
        right = [max(range(4), key=lambda c: found[4 * i + c]) == 0 for i in range(len(documents))]
        cost[name] = evaluator.tokens
        print(f"choice of 4, {name:20}: accuracy {sum(right) / len(right):.3f} +- {(statistics.variance(map(int, right)) / len(right)) ** 0.5:.3f}, "
              f"{evaluator.tokens:,} tokens through the model ({evaluator.tokens / max(cost.values()):.2f})", flush=True)

    V, mask_id = 50304, 50303
    model = Transformer(Config(vocab_size=V, dim=384, n_layers=6, n_heads=6, mask_token_id=mask_id)).init_weights().eval()
    words = torch.randint(0, mask_id, (100_000,), generator=torch.Generator().manual_seed(0))
    pairs, few = requests_of(words, 16 if small else 200, 20), 4 if small else 24
    generator = torch.Generator().manual_seed(0)
    times = interleaved({
        "yardstick": lambda: [published_log_likelihood(model, *pair, 32, generator) for pair in pairs[:few]],
        "ours, 32 passes": lambda: log_likelihood(model, *zip(*pairs), num_samples=32, batch_size=2048),
        "ours, 12 passes": lambda: log_likelihood(model, *zip(*pairs), num_samples=12, batch_size=2048)}, rounds=1, warmup=0)
    base = few / times["yardstick"].median
    print(f"requests/s, V {V}, 6 layers, D 384, {len(pairs)} requests (the yardstick: {few} of them, 32 samples each)")
    for name, (median, _) in times.items():
        speed = (few if name == "yardstick" else len(pairs)) / median
        print(f"  {name:16} {speed:8.2f}   {speed / base:5.2f} x")


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        width = max(map(len, COMMANDS))
        sys.exit(print("\n".join(f"python tests/bench.py {name:{width}}  {function.__doc__.splitlines()[0]}" for name,
                                 function in COMMANDS.items()),
                       file=sys.stderr) or 2)
    print(machine())
    COMMANDS[sys.argv[1]]()
