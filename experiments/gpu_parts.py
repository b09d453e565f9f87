"""The parts of gpu.py: what each measures. `PARTS` has the functions of each, which are called with
a `Bench` and tell it their figures one by one."""
import common  # noqa: I001 (before torch: it sets how threads wait)
import contextlib
import datetime
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn as nn
from torch._dynamo.utils import counters

import kernels
import passes
from diffusion import ar_loss, block_loss, mdlm_loss, sft_loss
from experiments.gpu_checks import CHECKS, wrong
from experiments.gpu_yardsticks import PlainGPT, fast_dllm_loop, llada_loop, now
from model import Config, ExpertLinear, Transformer
from sampling.cache import Cache
from sampling.engine import generate
from training.flops import flops_per_token
from training.log import peak_flops
from training.lora import add_lora
from training.memory import LLADA, LLADA2_MINI, plan_memory

ROOT = Path(__file__).resolve().parent.parent

# Sizes on a GPU, and in a toy run on a CPU.
GPT2 = dict(vocab_size=50304, dim=768, n_layers=12, n_heads=12, max_len=1024)
TOY = dict(vocab_size=320, dim=32, n_layers=2, n_heads=2, max_len=64)
TOY_LLADA = dict(family="llada", hidden_dim=64, qk_norm=False, **TOY)
# An eighth of LLaDA2-mini's 16 B parameters.
MIXTURE = dict(LLADA2_MINI, dim=1024, n_layers=10, n_heads=8, n_kv_heads=2, hidden_dim=2560,
               n_experts=128, max_len=4096)
TOY_MIXTURE = dict(MIXTURE, **TOY | dict(dim=64, n_experts=8, expert_dim=16, shared_dim=16,
                                         hidden_dim=64, router_groups=4, router_top_groups=2,
                                         experts_per_token=2))


class Bench:
    """What a part measures with: the device, the sizes, and where the figures go."""

    def __init__(self, part, book, toy):
        self.part, self.book, self.toy, self.failures = part, book, toy, 0
        self.device = torch.device(common.choose_device("cpu" if toy else "cuda"))
        if toy:
            torch.set_num_threads(1)

    def say(self, what, **figures):
        """A line of figures, now. Floats are rounded to five digits."""
        for name, value in figures.items():
            if type(value) is float:
                figures[name] = float(f"{value:.5g}")
        self.book.write(self.part, what, **figures)

    def attempt(self, measure):
        """Call a measurement; what it raises becomes a line, and the next one has its turn."""
        try:
            measure(self)
        except Exception as error:  # noqa: BLE001  whatever it is, the others go on
            self.failures += 1
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.say(measure.__name__, failed=reason, said=traceback.format_exc()[-4000:])
            error.__traceback__ = None                  # it holds the tensors
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def compile(self, model):
        """torch.compile as the recipes do it, as if nothing had been compiled before: there is a
        limit to how often. Not of a toy run, where it would take half a minute."""
        torch._dynamo.reset()
        if not self.toy:
            model.compile_blocks()

    def choose(self, on_gpu, toy):
        return toy if self.toy else on_gpu

    def autocast(self):
        """bfloat16 products, of a toy run float32."""
        return common.autocast(self.device, self.choose("bfloat16", "float32"))

    @property
    def dtype(self):
        """Of weights that are not trained."""
        return self.choose(torch.bfloat16, torch.float32)

    def seconds(self, step, count, warmup):
        """Seconds of a step, the mean of `count` after `warmup` of them; the most memory since the
        beginning of the former is then known to `peak_gb`."""
        for _ in range(warmup):
            step()
        self.forget_peak()
        begin = now(self.device)
        for _ in range(count):
            step()
        return (now(self.device) - begin) / count

    def forget_peak(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self):
        """10^9 bytes that tensors took at most; None on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return None

    def mfu(self, flops_per_s):
        """The share of the card's peak FLOP/s in bfloat16; None where that is unknown."""
        peak = peak_flops(self.device)
        return flops_per_s / peak if peak else None


# --------------------------------------------------------------------------------------------------
# versions


def machine(bench):
    """What all figures after this line were measured on."""
    card, memory_gb, cuda, bfloat16 = "CPU, toy sizes", None, torch.version.cuda, None
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_name()
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
        bfloat16 = common.has_bfloat16()
    bench.say("machine", date=f"{datetime.date.today()}", card=card, memory_gb=memory_gb,
              torch=torch.__version__, cuda=cuda, python=sys.version.split()[0],
              bfloat16=bfloat16, cores=os.cpu_count())
    if bfloat16 is False:
        raise ValueError(f"{card} cannot multiply in bfloat16, which all parts do: take a card of "
                         "Nvidia's Ampere or newer")


def product(bench):
    """The most that a product of matrices reaches here: what MFU is to be compared with."""
    n = bench.choose(8192, 64)
    a = torch.randn(n, n, device=bench.device).to(bench.dtype)
    seconds = bench.seconds(lambda: a @ a, count=20, warmup=3)
    bench.say(f"product of {n} x {n}", tflop_per_s=2 * n**3 / seconds / 1e12,
              mfu=bench.mfu(2 * n**3 / seconds))


# --------------------------------------------------------------------------------------------------
# checks


def checks(bench):
    """The device against the CPU, fast forms against plain ones: gpu_checks.py."""
    failed = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_float32_matmul_precision("highest")
        for name, check in CHECKS.items():
            if bench.toy and name == "compiled":        # half a minute
                continue
            errors = check(bench.device, dtype)
            bad = wrong(name, errors, dtype)
            worst = max(errors, key=errors.get)
            bench.say(f"{name}, {str(dtype).removeprefix('torch.')}", worst=worst,
                      error=float(errors[worst]), wrong=", ".join(bad) or None)
            failed += bad
    if failed:
        raise AssertionError(f"these differ too much: {', '.join(failed)}")


# --------------------------------------------------------------------------------------------------
# train: GPT-2's size


def train_ours(bench):
    """A step of masked diffusion, and of our autoregressive baseline on the same transformer."""
    for name, causal in (("ours, masked diffusion", False), ("ours, autoregressive", True)):
        size = bench.choose(GPT2, TOY)
        model = Transformer(Config(**size, causal=causal, shift=causal,
                                   mask_token_id=size["vocab_size"] - 1))
        model.init_weights().to(bench.device)
        bench.compile(model)
        noise = torch.Generator().manual_seed(0)

        def objective(tokens, model=model, causal=causal, noise=noise):
            if causal:
                return ar_loss(model, tokens).loss
            return mdlm_loss(model, tokens, generator=noise, max_weight=10.0).loss

        flops = flops_per_token(model, size["max_len"], head_share=1.0 if causal else 0.5)
        time_training(bench, name, model, objective, flops)


def train_plain(bench):
    """nanoGPT's step, written out in gpu_yardsticks.py."""
    size = bench.choose(GPT2, TOY)
    model = PlainGPT(**size).to(bench.device)
    torch._dynamo.reset()
    step = torch.compile(model, backend=bench.choose("inductor", "eager"))

    def objective(tokens):
        return step(tokens[:, :-1], tokens[:, 1:])

    time_training(bench, "nanoGPT's step", model, objective,
                  model.flops_per_token(size["max_len"]), extra=1)


def time_training(bench, name, model, objective, flops, extra=0):
    """Forward, backward and AdamW's update. extra: tokens a row has more than are learned."""
    size, B = bench.choose(GPT2, TOY), bench.choose(32, 2)
    T, count = size["max_len"], bench.choose(20, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, size["vocab_size"] - 1, (8, B, T + extra), generator=generator)
    rows, turn = rows.to(bench.device), [0]

    def step():
        tokens = rows[turn[0] % len(rows)]
        turn[0] += 1
        with bench.autocast():
            loss = objective(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    begin, before = now(bench.device), graphs()
    step()
    compiled_s, first = now(bench.device) - begin, graphs() - before
    seconds = bench.seconds(step, count, warmup=bench.choose(3, 1))
    bench.say(name, tokens_per_s=B * T / seconds, ms=1e3 * seconds, batch=B,
              mfu=bench.mfu(flops * B * T / seconds), peak_gb=bench.peak_gb(),
              compiled_s=compiled_s, graphs=first, recompiled=graphs() - before - first,
              loss=step().item())


def graphs():
    """How many graphs torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


# --------------------------------------------------------------------------------------------------
# blocks: flex_attention


@contextlib.contextmanager
def replaced(module, name, function):
    """For as long as this lasts, another function under this name."""
    plain = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, plain)


def dense_attention(T, block_length, device):
    """`block_attention` as a bool mask on every device, bool [1, 2T, 2T]."""
    return passes.block_attention(T, block_length, torch.device("cpu")).clone().to(device)


def blocks(bench):
    """A step of block diffusion by flex_attention and by a dense mask, beside a step of masked
    diffusion; and both gradients against those in float32."""
    size, block = bench.choose(GPT2, TOY), bench.choose(32, 8)
    T, B = size["max_len"], bench.choose(8, 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, size["vocab_size"] - 1, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.5
    tokens, mask = tokens.to(bench.device), mask.to(bench.device)
    t = torch.full((B, T // block), 0.5, device=bench.device)
    dense = dense_attention(T, block, bench.device)
    config = Config(**size, mask_token_id=size["vocab_size"] - 1)

    def masked_diffusion(model):
        return mdlm_loss(model, tokens, t[:, 0], mask).loss

    def by_flex(model):
        return block_loss(model, tokens, block, t, mask).loss

    def by_dense_mask(model):
        with replaced(passes, "block_attention", lambda *_: dense):
            return block_loss(model, tokens, block, t, mask).loss

    exact = gradients_in_float32(bench, config, by_dense_mask)
    for name, objective in {"masked diffusion": masked_diffusion, "blocks, flex": by_flex,
                            "blocks, dense mask": by_dense_mask}.items():
        model = Transformer(config).init_weights().to(bench.device)
        bench.compile(model)

        def step(model=model, objective=objective):
            model.zero_grad(set_to_none=True)
            with bench.autocast():
                loss = objective(model)
            loss.backward()

        seconds = bench.seconds(step, bench.choose(20, 1), bench.choose(3, 0))
        peak, error = bench.peak_gb(), None
        if objective is not masked_diffusion:
            error = distance([p.grad for p in model.parameters()], exact)
        bench.say(name, ms=1e3 * seconds, tokens_per_s=B * T / seconds, peak_gb=peak,
                  gradient_error=error)


def gradients_in_float32(bench, config, objective):
    """Of a model of the same weights, not compiled."""
    torch.set_float32_matmul_precision("highest")
    model = Transformer(config).init_weights().to(bench.device)
    objective(model).backward()
    torch.set_float32_matmul_precision("high")
    return [p.grad for p in model.parameters()]


def distance(found, wanted):
    """|found - wanted| / |wanted| of lists of tensors."""
    far = sum(((a.float() - b.float()).norm() ** 2).item() for a, b in zip(found, wanted))
    size = sum((b.float().norm() ** 2).item() for b in wanted)
    return (far / size) ** 0.5


# --------------------------------------------------------------------------------------------------
# lora: LLaDA-8B's shape


@torch.no_grad()
def made_on_card(config, device, dtype, rank=0):
    """A Transformer of random weights, N(0, 0.02^2), made where it stays: no copy on the CPU."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        if rank:
            add_lora(model, rank, float(rank))
    model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)
    return model


def lora(bench):
    """LoRA steps of LLaDA-8B at T 1024 and 4096: the peak against the plan's, speed."""
    config = Config(**bench.choose(LLADA, TOY_LLADA), mask_token_id=5)
    rank = bench.choose(64, 4)
    model = made_on_card(config, bench.device, bench.dtype, rank)
    model.checkpoint_blocks = True
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    for T in bench.choose((1024, 4096), (16, 32)):
        tokens = torch.randint(0, config.vocab_size, (1, T), generator=generator).to(bench.device)

        def step(share, tokens=tokens, T=T):
            mask = (torch.rand(1, T, generator=generator) < share).to(bench.device)
            sft_loss(model, tokens, t=torch.full((1,), share, device=bench.device),
                     mask=mask).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        bench.seconds(lambda: step(1.0), count=2, warmup=1)     # all masked: what the plan plans
        peak = bench.peak_gb()
        seconds = bench.seconds(lambda: step(0.5), bench.choose(10, 1), warmup=1)
        # Frozen weights get no gradient, and what checkpointing computes again does not count.
        flops = 2 * flops_per_token(model, T, head_share=0.5, training=False)
        planned = plan_memory(config, T, 1, rank, dtype=bench.dtype).peak / 1e9
        bench.say(f"LoRA {rank}, T {T}", tokens_per_s=T / seconds, ms=1e3 * seconds,
                  mfu=bench.mfu(flops * T / seconds), peak_gb=peak, planned_gb=planned,
                  peak_over_plan=peak / planned if peak else None)


# --------------------------------------------------------------------------------------------------
# sampling


def sampling_exact(bench):
    """Our tokens against LLaDA's loop where rounding decides nothing: float32, fewer layers."""
    config = Config(**dict(bench.choose(LLADA, TOY_LLADA), n_layers=bench.choose(8, 2)),
                    mask_token_id=5)
    torch.set_float32_matmul_precision("highest")
    model = made_on_card(config, bench.device, torch.float32).eval()
    with torch.inference_mode():
        prompts, new = random_prompts(bench, config, 2), bench.choose(32, 8)
        wanted, _ = llada_loop(model, prompts, new, new, passes=new)
        found = generate(model, prompts.tolist(), new, new, new)
        bench.say("float32, LLaDA's loop", same_tokens=share_equal(found, wanted))
        for kind in ("prefix", "dual"):
            cache = Cache(config, len(prompts), prompts.shape[1] + new, bench.device)
            wanted, _ = fast_dllm_loop(model, prompts, new, new, kind, cache)
            found = generate(model, prompts.tolist(), new, new, new, cache=kind)
            bench.say(f"float32, Fast-dLLM's {kind}", same_tokens=share_equal(found, wanted))
    torch.set_float32_matmul_precision("high")


def sampling_speed(bench):
    """LLaDA-8B in bfloat16: 128 tokens in 128 steps, blocks of 32, after a prompt of 64. A pass of
    the published loops is timed on one block where there are many rows. On random weights no
    prediction is sure, so that a threshold writes one token a pass: what its rule costs."""
    config = Config(**bench.choose(LLADA, TOY_LLADA), mask_token_id=5)
    model = made_on_card(config, bench.device, bench.dtype).eval()
    new, block = bench.choose((128, 32), (8, 4))
    with torch.inference_mode():
        for B in bench.choose((1, 8, 32), (1, 2)):
            prompts = random_prompts(bench, config, B)
            generate(model, prompts.tolist(), block, 4, block)          # warm-up
            sampling_without_cache(bench, model, prompts, new, block)
            for kind in ("prefix", "dual"):
                sampling_with_cache(bench, model, prompts, new, block, kind)


def sampling_without_cache(bench, model, prompts, new, block):
    """All tokens for one row; for many rows one block, with the rest of the canvas in the
    prompt."""
    B = len(prompts)
    if B > 1:
        longer = random_prompts(bench, model.config, B, new - block, seed=1)
        prompts, new = torch.cat((prompts, longer), dim=1), block
    wanted, theirs = llada_loop(model, prompts, new, block, passes=new)
    for name, how in {"ours": {}, "ours, threshold 0.9": dict(threshold=0.9)}.items():
        begin = now(bench.device)
        found = generate(model, prompts.tolist(), new, new, block, **how)
        ours = (now(bench.device) - begin) / new
        bench.say(f"{name}, batch {B}", tokens_per_s=B / ours, ms_a_pass=1e3 * ours,
                  theirs_ms=1e3 * theirs, times_faster=theirs / ours, against="LLaDA's loop",
                  same_tokens=share_equal(found, wanted), peak_gb=bench.peak_gb())


def sampling_with_cache(bench, model, prompts, new, block, kind):
    """Against Fast-dLLM's loop with the same cache."""
    B, T = len(prompts), prompts.shape[1] + new
    cache = Cache(model.config, B, T, bench.device, bench.dtype)
    wanted, theirs = fast_dllm_loop(model, prompts, new, block, kind, cache)
    del cache
    begin = now(bench.device)
    found = generate(model, prompts.tolist(), new, new, block, cache=kind)
    ours = (now(bench.device) - begin) / new
    bench.say(f"ours, {kind}, batch {B}", tokens_per_s=B / ours, ms_a_pass=1e3 * ours,
              theirs_ms=1e3 * theirs, times_faster=theirs / ours, against="Fast-dLLM's loop",
              same_tokens=share_equal(found, wanted), peak_gb=bench.peak_gb())


def random_prompts(bench, config, rows, length=0, seed=0):
    """int64 [rows, length]; 0: the usual length."""
    generator = torch.Generator().manual_seed(seed)
    length = length or bench.choose(64, 8)
    tokens = torch.randint(6, config.vocab_size, (rows, length), generator=generator)
    return tokens.to(bench.device)


def share_equal(found, wanted):
    """The share of all tokens, prompts included, that are the same."""
    return (torch.tensor(found) == wanted.cpu()).double().mean().item()


# --------------------------------------------------------------------------------------------------
# mixture


def loop_over_experts(x, weight, counts):
    """`kernels.expert_linear` by a product for each expert."""
    return kernels.ExpertLinearProduct.apply(x, weight, counts.tolist())


def mixture(bench):
    """A training step of an eighth of LLaDA2-mini: all experts in one call, and one by one."""
    config = Config(**bench.choose(MIXTURE, TOY_MIXTURE), mask_token_id=5)
    model = made_on_card(config, bench.device, bench.dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear | ExpertLinear) and module.weight is not model.head.weight:
            with torch.no_grad():
                module.weight.mul_(2)                   # the router must prefer somebody
    B, T = bench.choose((8, 512), (2, 16))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, config.vocab_size, (B, T), generator=generator).to(bench.device)
    select = torch.arange(0, B * T, 2, device=bench.device)
    targets = tokens.flatten()[select]

    def step():
        model.zero_grad(set_to_none=True)
        model.weighted_nll(tokens, select, targets)[0].backward()

    def gradients():
        return [m.weight.grad.clone() for m in model.modules() if isinstance(m, ExpertLinear)]

    count = bench.choose(10, 1)
    grouped = bench.seconds(step, count, warmup=bench.choose(3, 0))
    grouped_peak, grouped_gradients = bench.peak_gb(), gradients()
    with replaced(kernels, "expert_linear", loop_over_experts):
        loop = bench.seconds(step, count, warmup=bench.choose(3, 0))
        loop_peak = bench.peak_gb()
        error = distance(grouped_gradients, gradients())
    parameters = sum(p.numel() for p in model.parameters())
    bench.say(f"{parameters:,} parameters, {B} x {T} tokens", grouped_ms=1e3 * grouped,
              loop_ms=1e3 * loop, times_faster=loop / grouped, grouped_peak_gb=grouped_peak,
              loop_peak_gb=loop_peak, gradient_difference=error)


# --------------------------------------------------------------------------------------------------
# recipe


def recipe(bench):
    """A minute of train_scratch.py as it is on a GPU, its data prepared before."""
    folder = bench.book.folders[0]
    environment = {"UNMASK_DATA": str(folder / "prepared")}
    settings = [f"--out_dir={folder / 'scratch'}", "--sample_tokens=0"]
    if bench.toy:
        text = folder / "text.txt"
        text.write_text("The fox saw the owl, and the owl saw the fox.\n" * 200)
        settings += [f"--dataset={text}", "--tokenizer=byte", "--device=cpu", "--dim=16",
                     "--n_layers=1", "--n_heads=2", "--seq_len=16", "--max_steps=3",
                     "--eval_interval=2", "--eval_tokens=64", "--final_eval_tokens=64"]
    else:
        settings += ["--max_minutes=1"]
        begin = time.perf_counter()
        run_script("data/prepare.py", ["tales"], environment)
        bench.say("data prepared", seconds=time.perf_counter() - begin)
    begin = time.perf_counter()
    said = run_script("train_scratch.py", settings, environment)
    seconds = time.perf_counter() - begin
    log = (folder / "scratch" / "log.jsonl").read_text().splitlines()
    curve = [json.loads(row) for row in log]
    last = curve[-1]
    bench.say("train_scratch.py, a minute", seconds=seconds, updates=last["step"],
              tokens_per_s=last["tokens_per_s"], val_nelbo=last["val_nelbo"],
              val_stderr=last["val_stderr"], restored=last.get("restored"),
              last_line=said.strip().splitlines()[-1],
              curve=[[row["step"], row["train_loss"], row["val_nelbo"]] for row in curve])
    bench.book.keep(folder / "scratch" / "loss.png")
    bench.book.keep(folder / "scratch" / "log.jsonl")


def run_script(script, arguments, environment):
    """What a script prints. Raises CalledProcessError."""
    result = subprocess.run([sys.executable, script, *arguments], cwd=ROOT, text=True, check=True,
                            env=os.environ | environment, stdout=subprocess.PIPE)
    return result.stdout


PARTS = {
    "versions": [machine, product],
    "checks": [checks],
    "train": [train_ours, train_plain],
    "blocks": [blocks],
    "lora": [lora],
    "sampling": [sampling_exact, sampling_speed],
    "mixture": [mixture],
    "recipe": [recipe],
}
