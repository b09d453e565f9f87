"""Recipe 1: a diffusion language model from random weights, with block-diffusion and autoregressive baselines.

The model sees text in which some tokens are masked, from few to all of them, and learns to predict what stood there; the loss,
a bound on -log p(text), weighs the noise levels so that the model can afterwards write text out of nothing but masks
(MDLM, arXiv 2406.07524; LLaDA, 2502.09992). `--objective=bd3lm` does so block by block (BD3-LM, 2503.09573) and
`--objective=ar` predicts each next token, on the same transformer.

    python train_scratch.py                                   a few minutes on a laptop's CPU or on a GPU, no network
    python train_scratch.py --max_minutes=1 --dim=64          a first look
    python train_scratch.py --dataset=notes.txt               your own text: a file or a folder
    python train_scratch.py --objective=bd3lm --block_length=8
    torchrun --nproc_per_node=4 train_scratch.py --dataset=tinystories --max_minutes=60

Then: python sample.py --checkpoint=out/scratch
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import contextlib
import math

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import override
from data.loader import TokenDataset
from data.prepare import prepare
from data.state import Progress, make_folder, save_training, start_training
from data.tokenizer import Tokenizer
from diffusion import SCHEDULES, ar_loss, block_loss, generate, mask_tokens, mdlm_loss, nelbo, sample_t
from model import Config, Transformer

# ---- settings: change them here or with --name=value ---------------------------------------------------------------------------
# run
out_dir = "out/scratch"     # receives model.safetensors, config.json, the tokenizer, train_state.pt, log.jsonl, loss.png
resume = False              # continue the run in out_dir, bit for bit
seed = 1337                 # weights, order of the data and masks follow from it
device = "auto"             # auto, cpu, cuda, mps
dtype = "auto"              # auto, float32, bfloat16: precision of the matrix products; weights stay float32
compile = "auto"            # auto (on a GPU), True, False: torch.compile; on a CPU it takes half a minute to pay off slowly
threads = 0                 # CPU threads; 0: torch's choice. If others use the machine, 1 can be faster than 2
# data
dataset = "pydocs"          # pydocs, pystdlib, shakespeare, tinystories, fineweb_edu, openwebtext, or a text file or folder
tokenizer = "bpe"           # bpe (trained on the data), byte, gpt2
vocab_size = 2048           # pieces of the bpe tokenizer, special tokens included
# model: 0 takes the value for the device from `fill_in` below
n_layers = 0                # transformer blocks
n_heads = 0                 # attention heads
dim = 0                     # width
seq_len = 0                 # tokens in a sequence
# diffusion
objective = "mdlm"          # mdlm, bd3lm, ar
block_length = 4            # bd3lm: tokens in a block
schedule = "linear"         # linear, cosine, polynomial: alpha_t
max_weight = 10.0           # the loss weight is clipped here, the NELBO is not; 0: no clipping
# optimizer
batch_size = 0              # sequences a step and process
grad_accum = 1              # steps of batch_size sequences before each update
optimizer = "muon"          # muon (AdamW for embeddings, head and norms) or adamw
learning_rate = 3e-3        # AdamW's peak
muon_lr = 0.02              # Muon's peak
weight_decay = 0.0          # of matrices
beta2 = 0.99                # AdamW's second moment
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
warmup = 0.02               # share of the run in which the learning rate rises
decay = "linear"            # linear or cosine: how it falls to 0
max_steps = 0               # updates; 0: as many as fit into max_minutes
max_minutes = 0.0           # minutes of training; 0: from `fill_in`, unless max_steps is set. Learning rate follows the clock then
# evaluation
eval_interval = 200         # updates between evaluations, checkpoints and samples; 0: at the end only
eval_tokens = 2**14         # validation tokens of an evaluation on the way
final_eval_tokens = 2**18   # and of the last one
sample_tokens = 64          # length of the samples shown on the way; 0: none
settings = override(globals())

# ---- process, precision --------------------------------------------------------------------------------------------------------
device, rank, world_size = common.init_process(device, threads)
common.fill_in(             # zeros become (CPU, GPU). In minutes on a CPU, many small updates are best
    globals(), settings, column=int(device.type != "cpu"), n_layers=(4, 8), n_heads=(4, 8), dim=(192, 512), seq_len=(128, 512), batch_size=(16, 64),
    max_minutes=(6.5, 8.0))
common.check(settings, at_least_1="n_layers n_heads dim seq_len batch_size grad_accum eval_tokens final_eval_tokens", positive="learning_rate muon_lr",
             not_negative="max_weight weight_decay grad_clip warmup max_steps max_minutes eval_interval sample_tokens seed",
             objective=("mdlm", "bd3lm", "ar"), schedule=SCHEDULES, optimizer=("muon", "adamw"), decay=("linear", "cosine"))
if objective == "bd3lm" and (block_length < 1 or seq_len % block_length):
    raise ValueError(f"block_length {block_length} does not divide seq_len {seq_len}")
if objective == "ar" and seq_len < 2:
    raise ValueError("objective ar predicts each token from those before it: seq_len must be at least 2")
autocast = common.autocast(device, dtype)
main = rank == 0                                                    # rank 0 writes and prints
folder = make_folder(out_dir)

# ---- data ----------------------------------------------------------------------------------------------------------------------
data_folder = common.first_on_rank_0(prepare, dataset, tokenizer, vocab_size)
data, text = TokenDataset(data_folder), Tokenizer.from_pretrained(data_folder)
val_windows = data.windows("val", seq_len, max(eval_tokens, final_eval_tokens, 2 * seq_len))       # [N, T]
data.batch("train", batch_size, seq_len, seed, 0)                   # too short a corpus is better known now
bytes_per_token = data.bytes_per_token("val")

# ---- model ---------------------------------------------------------------------------------------------------------------------
config = Config(
    vocab_size=data.vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads, max_len=seq_len, causal=objective == "ar", shift=objective == "ar",
    block_length=block_length if objective == "bd3lm" else 0, mask_token_id=data.mask_token_id, eos_token_id=text.eos_token_id,
    pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id)
raw_model = Transformer(config).init_weights(seed).to(device)       # saved and sampled; `model` may be wrapped
if common.is_on(compile, auto=device.type == "cuda"):
    raw_model.compile_blocks()
model = DistributedDataParallel(raw_model) if world_size > 1 else raw_model

# ---- optimizer -----------------------------------------------------------------------------------------------------------------
optimizers = common.make_optimizers(raw_model, optimizer, learning_rate, muon_lr, beta2, weight_decay)

# ---- resume --------------------------------------------------------------------------------------------------------------------
must_match = {name: settings[name] for name in ("objective", "block_length", "n_layers", "n_heads", "dim", "seq_len", "tokenizer", "optimizer",
                                                "weight_decay", "beta2", "seed")}
must_match |= {"dataset": data.fingerprint, "batch_size * grad_accum * processes": batch_size * grad_accum * world_size}
step, clock, losses, log = start_training(folder, raw_model, optimizers, must_match, resume)


def save():
    """What resuming needs, and then what sample.py reads."""
    save_training(folder, raw_model, optimizers, step, clock, losses, {**settings, **must_match})
    if main:
        raw_model.save_pretrained(folder)
        text.save_pretrained(folder)


def evaluate(max_tokens):
    """(NELBO, standard error) on the first max_tokens of the validation split, always with the same
    masks; the processes divide the passes.

    Computed in the precision of the weights, as eval.py does it: autocast is for training."""
    windows = val_windows[:max(2, max_tokens // seq_len)]
    return nelbo(raw_model, windows.to(device), seed=seed, map=common.share)


def show_sample():
    """One text out of nothing, as far as the model has come."""
    n = min(sample_tokens, seq_len - (objective == "ar"))           # an autoregressive text begins with one token of start
    ids = generate(raw_model, [[]], n, n, n, temperature=1.0, remasking="random", seed=step)[0]
    tqdm.write(f"step {step}: {text.decode(ids, skip_special_tokens=True)!r}")


# ---- loop ----------------------------------------------------------------------------------------------------------------------
# One pass more than there are updates: the last only evaluates and saves. All randomness of a step follows from (seed, step).
slices, tokens_per_step = grad_accum * world_size, batch_size * seq_len * grad_accum * world_size
bar = Progress(clock, step, max_steps, raw_model.flops_per_token(seq_len, head_share=1.0 if objective == "ar" else 0.5), device)
if main:
    tqdm.write(f"{sum(p.numel() for p in raw_model.parameters()):,} parameters, {len(data.train):,} training tokens, {objective} on {device}")
stop = common.stop_signals()
while True:
    elapsed = common.from_rank_0(clock.seconds(), device)
    progress = max(step / max_steps if max_steps else 0.0, elapsed / 60 / max_minutes if max_minutes else 0.0)
    stopped = bool(common.from_rank_0(float(bool(stop)), device))
    finished = progress >= 1 or stopped
    factor = common.learning_rate_factor(progress, warmup, decay)
    if finished or step and eval_interval and step % eval_interval == 0:
        save()                                                      # first: a resumed run evaluates again what a kill cut short
        if stopped:
            break
        val_nelbo, val_stderr = evaluate(final_eval_tokens if finished else eval_tokens)
        val_bpb = val_nelbo / math.log(2) / bytes_per_token
        if main:
            log.write(step=step, train_loss=sum(losses) / len(losses) if losses else None, val_nelbo=val_nelbo, val_stderr=val_stderr, val_bpb=val_bpb,
                      tokens_per_s=bar.tokens_per_s(), lr_factor=factor, elapsed_s=clock.seconds())
            if sample_tokens:
                show_sample()
        losses = []
        bar.begin_window()
    if finished:
        break
    common.set_learning_rate(optimizers, factor)

    # Each process draws the noise of the whole step and takes its slice: the times are spread over all sequences, and the result
    # does not depend on how many processes share the work.
    generator = common.stream("noise", seed, step)
    if objective != "ar":
        t = sample_t((slices * batch_size, 1 if objective == "mdlm" else seq_len // block_length), generator)          # [G, 1 or blocks]
        mask = mask_tokens((slices * batch_size, seq_len), (1 - SCHEDULES[schedule](t)[0]).repeat_interleave(seq_len // t.shape[1], 1), generator)
    sums = torch.zeros(3, device=device)                            # nats, their tokens, the loss
    for micro_step in range(grad_accum):
        piece = micro_step * world_size + rank
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        tokens = data.batch("train", batch_size, seq_len, seed, step, piece, slices).to(device)                      # [B, T]
        sync = contextlib.nullcontext() if world_size == 1 or micro_step == grad_accum - 1 else model.no_sync()
        with sync:
            with autocast:
                if objective == "mdlm":
                    loss = mdlm_loss(model, tokens, t[rows, 0], mask[rows], schedule=schedule, max_weight=max_weight or None)
                elif objective == "bd3lm":
                    loss = block_loss(model, tokens, block_length, t[rows], mask[rows], schedule=schedule, max_weight=max_weight or None)
                else:
                    loss = ar_loss(model, tokens)
            (loss.loss / grad_accum).backward()
        sums += torch.stack((loss.token_nll.sum(), sums.new_tensor(loss.count), loss.loss.detach()))
    nats, count, minimised = common.sum_over_ranks(sums)
    train_nelbo = nats / count
    common.check_finite(train_nelbo, step, out_dir)
    common.check_finite(minimised, step, out_dir)
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    step += 1
    losses.append(train_nelbo)
    bar.count(train_nelbo, tokens_per_step)
bar.close()

# ---- end -----------------------------------------------------------------------------------------------------------------------
if main and stopped:
    print(f"stopped at step {step}; --resume=True goes on from here")
elif main:
    log.plot(folder / "loss.png")
    print(f"val nelbo {val_nelbo:.4f} +- {val_stderr:.4f} nats/token, {val_bpb:.3f} bits/byte")
common.end_process()
