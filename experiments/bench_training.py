"""bench.py's measurements of training: a step, its loss, its memory, and what blocks cost."""
import contextlib
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from diffusion import ar_loss, block_loss, mdlm_loss
from experiments.bench_model import open_attention
from experiments.timing import fast_bfloat16, in_own_process, interleaved, memory
from kernels import linear_cross_entropy
from model import Config, Transformer
from training.flops import flops_per_token

# --------------------------------------------------------------------------------------------------
# A step

B, T, D, LAYERS = 8, 256, 384, 6


def step(vocab_size="50304", how="compiled"):
    """A training step on a CPU, tokens/s of every arrangement and their ratios; `step 260 eager`
    for bytes, without compiling."""
    vocab_size = int(vocab_size)
    eager = candidates(vocab_size, compiled=False)
    functions = eager
    if how != "eager":
        functions = {}
        for name, function in candidates(vocab_size, compiled=True).items():
            functions[f"{name} compiled"] = function
        functions |= eager
    functions |= products()
    times = interleaved(functions, rounds=3, warmup=1)
    print_steps(vocab_size, times)
    print_efficiency(vocab_size, times)


def candidates(vocab_size, compiled):
    """{name: a function that does a forward and backward pass}. The optimizer is the same for all
    and left out."""
    mask_id = vocab_size - 1
    tokens = torch.randint(0, mask_id, (B, T), generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    ours, causal = build(vocab_size, compiled), build(vocab_size, compiled, causal=True)
    llama = build_llama(vocab_size)
    visible = torch.ones_like(tokens)

    def masked():
        return mdlm_loss(ours, tokens, generator=noise).loss

    def all_logits():
        return loss_of_all_logits(ours, tokens, mask_id, noise)

    def autoregressive():
        return ar_loss(causal, tokens).loss

    def plain_autoregressive():
        logits = causal(tokens)[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, tokens[:, 1:].flatten())

    def trunk():
        return ours.hidden(tokens).sum()

    def llama_logits(x):
        return llama(x, attention_mask=visible, use_cache=False).logits

    def llama_loss():
        return loss_of_all_logits(llama_logits, tokens, mask_id, noise)

    functions = {}
    for precision in precisions():
        functions[f"ours {precision}"] = step_of(ours, masked, precision)
        functions[f"full logits {precision}"] = step_of(ours, all_logits, precision)
        functions[f"ours, autoregressive, {precision}"] = step_of(causal, autoregressive, precision)
        functions[f"plain autoregressive {precision}"] = step_of(
            causal, plain_autoregressive, precision)
        functions[f"trunk {precision}"] = step_of(ours, trunk, precision)
    if not compiled:
        functions["transformers, dLLM's loss, float32"] = step_of(llama, llama_loss, "float32")
    return functions


def precisions():
    return ["float32", "bf16"] if fast_bfloat16() else ["float32"]


def build(vocab_size, compiled, causal=False):
    model = Transformer(Config(
        vocab_size=vocab_size, dim=D, n_layers=LAYERS, n_heads=6, mask_token_id=vocab_size - 1,
        causal=causal, shift=causal)).init_weights()
    if compiled:
        model.compile_blocks()
    return model


def build_llama(vocab_size):
    import transformers
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=6,
        intermediate_size=1024, attn_implementation="sdpa"))
    open_attention(llama)
    return llama


def step_of(model, objective, precision):
    """A function that does a forward and backward pass of objective()."""
    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = objective()
        value.backward()
        model.zero_grad(set_to_none=True)
    return run


def loss_of_all_logits(forward, tokens, mask_id, generator):
    """The usual way: all logits, the cross-entropy of all positions, times the mask."""
    t = torch.rand(B, 1, generator=generator).clamp(min=1e-3)
    mask = torch.rand(B, T, generator=generator) < t
    logits = forward(torch.where(mask, mask_id, tokens)).flatten(0, 1).float()          # [B * T, V]
    nll = F.cross_entropy(logits, tokens.flatten(), reduction="none").view(B, T)
    return (nll * mask / t).sum() / (B * T)


def products():
    """{name: a product of two matrices}, for the most that this machine can."""
    functions = {}
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        if precision in precisions():
            a = torch.randn(2048, 2048).to(dtype)
            functions[f"mm {precision}"] = product_of(a)
    return functions


def product_of(a):
    def run():
        return a @ a
    return run


def print_steps(vocab_size, times):
    base = times["full logits float32"].wall
    title = f"V {vocab_size}, 6 layers, D 384, T 256, B 8, forward and backward"
    print(f"{title:58}ms    tokens/s   x full logits float32")
    for name, timing in times.items():
        if name.startswith("mm "):
            speed = 2 * 2048**3 / timing.wall / 1e9
            print(f"{name:44} {timing.wall * 1e3:10.1f}   {speed:6.0f} GFLOP/s")
        else:
            print(f"{name:44} {timing.wall * 1e3:10.1f} {B * T / timing.wall:10,.0f}   "
                  f"{base / timing.wall:5.2f}")


def print_efficiency(vocab_size, times):
    """FLOP/s of the model's products over what a product alone reaches (half of the rows reach the
    head)."""
    model = build(vocab_size, compiled=False)
    flops = flops_per_token(model, T, head_share=0.5) * B * T
    for precision in precisions():
        best = 2 * 2048**3 / times[f"mm {precision}"].wall
        for name in (f"ours {precision} compiled", f"ours {precision}"):
            if name in times:
                share = flops / times[name].wall / best
                print(f"model FLOP/s of {name} over torch.mm: {share:.2f}")


# --------------------------------------------------------------------------------------------------
# The loss


def loss():
    """Time and peak memory of the loss, forward and backward, V 126464, D 256, T 1024, half of the
    tokens masked: ours against all logits."""
    figures = {}
    for name in ("all logits", "ours", "ours, on all rows") * 3:
        measured = in_own_process(loss_figures, name, torch.get_num_threads())
        figures.setdefault(name, []).append(measured)
    medians = {}
    for name, runs in figures.items():
        medians[name] = [statistics.median(column) for column in zip(*runs)]
    base_bytes, base_seconds = medians["all logits"]
    for name, (size, seconds) in medians.items():
        print(f"{name:18} {size / 2**20:6.0f} MB, {base_bytes / size:4.1f} times less   "
              f"{seconds:5.2f} s, {base_seconds / seconds:4.2f} times faster")


def loss_figures(name, threads):
    """(bytes at the peak above the inputs, seconds) of a loss with its gradients."""
    torch.set_num_threads(threads)
    V, D, T = 126464, 256, 1024
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets, weights, mask = torch.randint(0, V, (T,)), torch.rand(T), torch.rand(T) < 0.5
    rows = mask if name == "ours" else torch.ones_like(mask)
    before, begin = memory("VmHWM"), time.perf_counter()
    for _ in range(3):
        if name == "all logits":
            nll = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
            total = (nll * weights * mask).sum()
            del nll
        else:
            total, _ = linear_cross_entropy(hidden[rows], weight, None, targets[rows],
                                            (weights * mask)[rows], max(64, 2**25 // V))
        total.backward()
        del total
        hidden.grad = weight.grad = None
    return memory("VmHWM") - before, (time.perf_counter() - begin) / 3


# --------------------------------------------------------------------------------------------------
# Blocks


def block():
    """A training step of block diffusion against one of masked diffusion, the same tokens: the
    small CPU model; on a GPU T 1024, blocks of 32."""
    if torch.cuda.is_available():
        compare_blocks("cuda", T=1024, B=16, block_length=32, dim=768, n_layers=12, n_heads=12)
    else:
        compare_blocks("cpu", T=128, B=16, block_length=4)
        compare_blocks("cpu", T=512, B=4, block_length=32)


def compare_blocks(device, T, B, block_length, dim=192, n_layers=4, n_heads=4):
    on_gpu = device == "cuda"
    config = Config(vocab_size=2048, mask_token_id=2047, max_len=T, dim=dim, n_layers=n_layers,
                    n_heads=n_heads)
    model = Transformer(config).init_weights().to(device)
    if on_gpu:
        model.compile_blocks()          # flex_attention that is not compiled makes all scores
    tokens = torch.randint(0, 2047, (B, T), device=device)

    def run(objective, *arguments):
        with common.autocast(torch.device(device), "auto"):
            objective(model, tokens, *arguments).loss.backward()
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    functions = {"mdlm": lambda: run(mdlm_loss), "bd3lm": lambda: run(block_loss, block_length)}
    times = interleaved(functions, rounds=30 if on_gpu else 9, warmup=3)
    mdlm, bd3lm = times["mdlm"], times["bd3lm"]
    wall, cpu = bd3lm.wall / mdlm.wall, bd3lm.cpu / mdlm.cpu
    print(f"T {T}, B {B}, blocks of {block_length}, D {dim}, {common.best_dtype(device)} on "
          f"{device}: mdlm {mdlm.wall * 1e3:.1f} ms, bd3lm {bd3lm.wall * 1e3:.1f} ms, "
          f"{wall:.2f} times as long ({cpu:.2f} in CPU time)", flush=True)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        run(block_loss, block_length)
        peak = torch.cuda.max_memory_allocated() / 2**20
        print(f"peak memory of a bd3lm step {peak:,.0f} MiB")


# --------------------------------------------------------------------------------------------------
# The memory of fine-tuning


def finetune():
    """Peak memory of one step, V 126464, D 512, 4 layers, T 1024, B 1: LoRA and full, ours against
    all logits at once, and as planned."""
    from training.memory import plan_memory
    config = dict(vocab_size=126464, dim=512, n_layers=4, n_heads=8, qk_norm=False)
    print("                        all logits       ours    planned   ours / all logits")
    for dtype in ("float32", "bfloat16"):
        for rank in (64, 0):
            case = dict(config=config, T=1024, B=1, rank=rank, dtype=dtype)
            plain, ours = step_memory(dict(case, checkpointing=False, plain=True),
                                      dict(case, checkpointing=True, plain=False))
            planned = plan_memory(Config(**config), 1024, 1, rank, dtype=getattr(torch, dtype)).peak
            name = f"LoRA {rank}" if rank else "everything"
            print(f"{name:12}{dtype:10} {plain / 1e6:8.0f} MB {ours / 1e6:7.0f} MB "
                  f"{planned / 1e6:7.0f} MB   {ours / plain:5.2f}", flush=True)


def step_memory(*cases):
    """Peak bytes of training steps, weights and optimizer included, measured in a process of its
    own.

    cases: dicts of `config` (of Config), T, B, rank (of LoRA; 0: everything), dtype (a name),
    checkpointing, plain (all logits at once).
    """
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                  "MALLOC_TOP_PAD_": "0"}               # freed memory does not count
    threads = torch.get_num_threads()
    return in_own_process(peaks_of_steps, threads, cases, environment=gives_back)


def peaks_of_steps(threads, cases):
    """What `step_memory` returns, measured in this process."""
    torch.set_num_threads(threads)
    peaks = []
    for case in cases:
        small = dict(case, config=dict(vocab_size=300, dim=64, n_layers=1, n_heads=2), T=32)
        train_two_steps(**small)                    # kernels and the like are there now
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")       # the high-water mark starts here
        train_two_steps(**case)
        peaks.append(memory("VmHWM") - before)
    return peaks


def train_two_steps(config, T, B, rank, dtype, checkpointing, plain):
    from training.lora import add_lora
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, dtype)
    with torch.device("meta"):
        model = Transformer(Config(**config))
        if rank:
            add_lora(model.to(dtype), rank, 1.0)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    model.checkpoint_blocks = checkpointing
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, fused=True)
    autocast = contextlib.nullcontext()
    if not rank and dtype != torch.float32:             # the weights are float32, the products not
        autocast = torch.autocast("cpu", dtype, cache_enabled=False)
    for _ in range(2):
        tokens = torch.randint(0, config["vocab_size"], (B, T), generator=generator)
        with autocast:
            if plain:
                logits = model(tokens).flatten(0, 1).float()
                total = F.cross_entropy(logits, tokens.flatten(), reduction="sum")
                del logits
            else:
                total, _ = model.weighted_nll(tokens, torch.arange(B * T), tokens)
        total.backward()
        del total
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
