"""Recipe 4: supervised fine-tuning of LLaDA and Dream, by LoRA or in full, on one GPU or many.

A diffusion language model learns to answer as it learned to write, but that only the answer is ever masked: the prompt stays, and
end-of-text tokens behind the answer are learned too, so that the model says how long an answer is (LLaDA, arXiv 2502.09992, section
2.3 and algorithm 2; Dream, 2508.15487). LoRA (2106.09685) keeps the weights as they are, in bfloat16, and trains 2 % beside them:
with checkpointing, and a loss that never holds all logits, LLaDA-8B takes 19 GB. FSDP2 spreads what is left over the GPUs.

    python finetune_llada.py --init_from=tiny                         two minutes on a CPU, no network: a small random LLaDA
    python finetune_llada.py --plan                                   what LLaDA-8B would take; reads no weights
    python finetune_llada.py --dataset='tulu3[train:50000]'           LoRA on one GPU
    torchrun --nproc_per_node=8 finetune_llada.py --lora_rank=0       everything, spread over 8 GPUs
    python finetune_llada.py --merge=out/merged                       the adapter in out_dir into the weights, in the family's own layout

Then: python sample.py --checkpoint=out/finetune --chat
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import contextlib
import math
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import override
from data import checkpoints
from data.chat import is_chat, open_dataset
from data.prepare import prepare
from data.state import Progress, make_folder, save_training, start_training
from data.tokenizer import Tokenizer
from diffusion import generate, mask_tokens, nelbo, sample_t, sft_loss
from scale.lora import add_lora, check_target, init_lora, published_modules, save_adapter, write_merged
from scale.memory import report
from scale.sharding import check_ranks_agree, shard
from model import Transformer

# ---- settings: change them here or with --name=value ---------------------------------------------------------------------------
# run
init_from = "GSAI-ML/LLaDA-8B-Base"     # folder or hub id of LLaDA, Dream or one of our own models; tiny, tiny:Dream: small and random
out_dir = "out/finetune"    # receives the adapter (or the model), the tokenizer, train_state, log.jsonl, loss.png
merge = ""                  # folder for base + adapter in the family's layout: of the run in out_dir; if there is none, of the one that begins
resume = False              # continue the run in out_dir, exactly; the number of processes may be another one
seed = 1337                 # adapters, order of the data and masks follow from it
device = "auto"             # auto, cpu, cuda
dtype = "auto"              # auto, float32, bfloat16: of the frozen weights and the matrix products; what learns is float32
compile = "False"           # auto (on a GPU), True, False: torch.compile
checkpointing = True        # keep only the blocks' inputs for the backward pass: a third slower, a fraction of the memory
fsdp = True                 # with torchrun: spread all weights over the processes; False: each has all of them (DDP), which is faster if they fit
threads = 0                 # CPU threads; 0: torch's choice
# plan
plan = False                # say how much memory a step takes, and stop
ranks = 0                   # processes that the plan reckons with; 0: torchrun's
memory_gb = 0.0             # memory of a GPU, for the plan; 0: of the one here, else 24
# data: 0 takes the value of a published run, or of a tiny start
dataset = "pydocs_chat"     # chat: pydocs_chat, alpaca, tulu3, smoltalk, opc, FILE.jsonl, mixed by +; text (pretraining goes on): as in train_scratch.py
seq_len = 0                 # tokens in a sequence at most
padding = "eos"             # eos: end-of-text tokens, part of the answer, so that its length is learned; hidden: nobody sees it
vocab_size = 2048           # pieces of the tokenizer that a tiny model gets
# what learns
lora_rank = 64              # of the adapters; 0 trains everything
lora_alpha = 64.0           # they count lora_alpha / lora_rank times
lora_dropout = 0.0          # of their input
lora_targets = "q,k,v,o,gate,up,down"   # the matrices that get one
cart = 0.0                  # Dream's weights that look at the neighbours, with this p (0.1 in its configuration); 0: LLaDA's 1/t
# optimizer: 0 likewise
batch_size = 0              # sequences a step and process
grad_accum = 1              # steps of batch_size sequences before each update
learning_rate = 0.0         # AdamW's peak
weight_decay = 0.0          # of the blocks' matrices
beta2 = 0.999               # AdamW's second moment
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
warmup = 0.05               # share of the run in which the learning rate rises
decay = "linear"            # linear or cosine: how it falls to 0
epochs = 3.0                # visits of the data, unless max_steps or max_minutes is set
max_steps = 0               # updates
max_minutes = 0.0           # minutes of training. Learning rate follows the clock then
# evaluation
eval_interval = 200         # updates between evaluations, checkpoints and samples; 0: at the end only
eval_sequences = 64         # held-out sequences (of chat: conversations) of an evaluation on the way
final_eval_sequences = 256  # and of the last one
sample_tokens = 64          # length of the samples shown on the way; 0: none
settings = override(globals())

# ---- process, precision --------------------------------------------------------------------------------------------------------
start, _, tiny_family = init_from.partition(":")
tiny = start == "tiny"
any_length = not seq_len                                            # then a shorter context is no mistake
common.fill_in(             # published, tiny
    globals(), settings, column=int(tiny), seq_len=(1024, 160), batch_size=(1, 16), max_minutes=(0.0, 1.2),
    learning_rate=(2e-4, 5e-3) if lora_rank else (2.5e-5, 3e-3))
common.check(settings, at_least_1="seq_len batch_size grad_accum eval_sequences final_eval_sequences", positive="learning_rate epochs",
             not_negative="lora_rank weight_decay grad_clip warmup max_steps max_minutes eval_interval sample_tokens seed ranks memory_gb",
             decay=("linear", "cosine"))
if not 0 <= cart <= 1:
    raise ValueError(f"cart must be between 0 and 1, got {cart}")
if plan:
    print(report(settings))
    sys.exit()
device, rank, world_size = common.init_process(device, threads)
compute = common.matrix_dtype(device, dtype)
sharded = fsdp and world_size > 1
# Frozen and sharded weights are in `compute` already; others are float32 and the products are cast, each weight when it is used.
autocast = contextlib.nullcontext() if lora_rank or sharded or compute == torch.float32 else torch.autocast(device.type, compute, cache_enabled=False)
main = rank == 0                                                    # rank 0 writes and prints
check_target("out_dir", out_dir, init_from)
folder = make_folder(out_dir)
if merge:
    check_target("merge", merge, init_from, out_dir)
    if not resume and any((folder / name).exists() for name in ("adapter_model.safetensors", "config.json")):
        if main:
            print(write_merged(out_dir, merge))
        sys.exit()
if (folder / ("config.json" if lora_rank else "adapter_model.safetensors")).exists():
    raise ValueError(f"{out_dir} holds {'a model' if lora_rank else 'an adapter'} of another run, which this one could be mistaken for: choose another out_dir")

# ---- data ----------------------------------------------------------------------------------------------------------------------
base, text = "tiny", "bpe"                                          # the checkpoint that is fine-tuned and its tokenizer
if not tiny:
    base = checkpoints.model_folder(init_from)
    source, _ = checkpoints.read_config(base)                       # before a data set is prepared for nothing
    if source.causal or source.block_length:
        raise ValueError(f"{init_from} is {'an autoregressive' if source.causal else 'a block-diffusion'} model ({source.family}): see convert_ar.py")
    if any_length:
        settings["seq_len"] = seq_len = min(seq_len, source.max_len)
    text = Tokenizer.from_pretrained(base)
    text.add_chat_tokens()
    if source.mask_token_id is None:
        text.add_mask_token()
data_folder = common.first_on_rank_0(prepare, dataset, text, vocab_size)
text = Tokenizer.from_pretrained(data_folder) if tiny else text
data, chat = open_dataset(dataset, data_folder, seq_len, padding), is_chat(dataset)
last_val = data.val_batch(max(final_eval_sequences, 2))             # as eval.py takes them
val = data.val_batch(max(eval_sequences, final_eval_sequences, 2)).spread(max(eval_sequences, 2))
data.batch("train", batch_size, seed, 0)                            # too short a corpus is better known now
slices = grad_accum * world_size
check_ranks_agree(device, **{"the data": data.fingerprint, **{k: v for k, v in settings.items() if k not in ("dataset", "device", "threads")}})
if not (max_steps or max_minutes):
    max_steps = max(1, round(epochs * data.examples["train"] / (batch_size * slices)))

# ---- model ---------------------------------------------------------------------------------------------------------------------
# A tiny base is made here, and one of ours may lack the tokens of a chat: then the base is written beside the run.
if tiny or text.vocab_size > source.vocab_size:
    base = folder / "base"
    if main and not resume:
        made = checkpoints.tiny_model(tiny_family or "llada", text, seq_len, seed) if tiny else Transformer.from_pretrained(init_from)
        made.resize_vocabulary(text.vocab_size, new=range(made.config.vocab_size, text.vocab_size))
        made.source = None                                          # the tokenizer is written here
        (made.export_pretrained if tiny else made.save_pretrained)(base)
        text.save_pretrained(base)
    common.barrier()
raw_model, weights = checkpoints.open_checkpoint(base)              # no memory yet
config = raw_model.config
for name in ("mask_token_id", "eos_token_id"):                      # Dream's config leaves them to its tokenizer
    setattr(config, name, getattr(text if getattr(config, name) is None else config, name))
if seq_len > config.max_len:
    raise ValueError(f"{init_from} has a context of {config.max_len} tokens, seq_len is {seq_len}: take --seq_len={config.max_len}")
if lora_rank:
    published_modules(add_lora(raw_model, lora_rank, lora_alpha, lora_dropout, lora_targets))       # a family without a name for them is known now
raw_model.checkpoint_blocks = checkpointing
if common.is_on(compile, auto=device.type == "cuda"):
    raw_model.compile_blocks()
if sharded:
    shard(raw_model, device, compute)
checkpoints.fill(raw_model, weights, device, compute if lora_rank else torch.float32)               # of sharded ones, the rows that belong here
if lora_rank:
    init_lora(raw_model, seed)
raw_model.train()                                                   # saved and sampled; `model` may be wrapped
model = raw_model if sharded or world_size == 1 else DistributedDataParallel(raw_model, gradient_as_bucket_view=True)

# ---- optimizer -----------------------------------------------------------------------------------------------------------------
trained = [p for p in raw_model.parameters() if p.requires_grad]
optimizers = common.make_optimizers(raw_model, "adamw", learning_rate, beta2=beta2, weight_decay=weight_decay)

# ---- resume --------------------------------------------------------------------------------------------------------------------
must_match = {name: settings[name] for name in ("init_from", "seq_len", "padding", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "cart",
                                                "weight_decay", "beta2", "seed")}
must_match |= {"dataset": data.fingerprint, "batch_size * grad_accum * processes": batch_size * slices}
step, clock, losses, log = start_training(folder, raw_model, optimizers, must_match, resume, sharded=True)
common.barrier()


def save():
    """What resuming needs, in any number of processes; and then the adapter, or the model, for sample.py and the like."""
    save_training(folder, raw_model, optimizers, step, clock, losses, {**settings, **must_match}, sharded=True)
    whole = checkpoints.gathered({name: p for name, p in raw_model.named_parameters() if p.requires_grad} if lora_rank else raw_model.state_dict())
    if main:
        if lora_rank:
            name = "base" if base == folder / "base" else str(base.resolve()) if Path(init_from).expanduser().is_dir() else init_from
            save_adapter(raw_model, folder, name, whole)
        else:
            checkpoints.save(raw_model, folder, whole)
        text.save_pretrained(folder)
    common.barrier()


def evaluate(batch):
    """(NELBO, standard error, bits per byte) of held-out sequences, always with the same masks; in
    chat, of the answers given the rest. The processes divide the passes, unless each of them holds
    a part of the model.

    Computed in the precision of the weights, as eval.py does it: autocast is for training. Frozen
    and sharded weights have the precision of the products."""
    part = batch.to(device)
    raw_model.eval()                                                # no dropout
    value, error = nelbo(raw_model, part.tokens, seed=seed, batch_size=8, maskable=part.maskable,
                         attention_mask=part.attention_mask, map=map if sharded else common.share)
    raw_model.train()
    return value, error, value / math.log(2) / data.val_bytes_per_token(batch, text)


def show_sample():
    """The answer to a held-out question, or a text out of nothing, as far as the model has come. A sharded model needs all processes for it."""
    prompt = data.prompt("val", step)[0] if chat else []
    n = min(sample_tokens, seq_len - len(prompt))
    how = dict(temperature=0.0) if chat else dict(temperature=1.0, remasking="random")
    raw_model.eval()
    ids = generate(raw_model, [prompt], n, n, n, seed=step, **how)[0]
    raw_model.train()
    if main:
        question = [repr(text.decode(prompt, skip_special_tokens=True))] * chat
        tqdm.write(f"step {step}: " + " -> ".join([*question, repr(text.decode_answer(ids[len(prompt):]))]))


# ---- loop ----------------------------------------------------------------------------------------------------------------------
# One pass more than there are updates: the last only evaluates and saves. All randomness of a step follows from (seed, step).
flops = raw_model.flops_per_token(seq_len, head_share=0.5, training=False) * (2 if lora_rank else 3)      # frozen weights get no gradient
bar = Progress(clock, step, max_steps, flops, device)
if main:
    tqdm.write(f"{sum(p.numel() for p in raw_model.parameters()):,} parameters, {sum(p.numel() for p in trained):,} learn, {config.family} on {device}; "
               + data.summary())
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
        val_nelbo, val_stderr, val_bpb = evaluate(last_val if finished else val)
        if main:
            log.write(step=step, train_loss=sum(losses) / len(losses) if losses else None, val_nelbo=val_nelbo, val_stderr=val_stderr, val_bpb=val_bpb,
                      tokens_per_s=bar.tokens_per_s(), lr_factor=factor, elapsed_s=clock.seconds())
        if sample_tokens and (main or sharded):
            show_sample()
        losses = []
        bar.begin_window()
    if finished:
        break
    common.set_learning_rate(optimizers, factor)

    # Each process draws the noise of the whole step and takes its slice: the times are spread over all sequences, and the result
    # does not depend on how many processes share the work.
    generator, t = common.stream("noise", seed, step), None
    sums = torch.zeros(3, device=device)                            # nats, their tokens, the loss
    for micro_step in range(grad_accum):
        piece = micro_step * world_size + rank
        torch.manual_seed(common.seed_for("dropout", seed, step, piece))
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        batch = data.batch("train", batch_size, seed, step, piece, slices)                                           # tokens [B, T]
        if t is None:
            G, T = slices * batch_size, batch.tokens.shape[1]
            t = sample_t((G, 1), generator)
            mask = mask_tokens((G, T), t, generator)
            # Pretraining cuts 1 % of the sequences to a random length, so that the model knows short contexts (LLaDA, section 2.2).
            length = torch.where((torch.rand(G, generator=generator) < 0.01) & (not chat), torch.randint(1, T + 1, (G,), generator=generator), T)
        if (length[rows] < T).any():
            batch.maskable = batch.attention_mask = torch.arange(T) < length[rows, None]
        batch = batch.to(device)
        # A sharded model adds up gradients where they belong, so it must exchange them each time; DDP does so in the last micro-step.
        sync = contextlib.nullcontext() if world_size == 1 or sharded or micro_step == grad_accum - 1 else model.no_sync()
        with sync:
            with autocast:
                loss = sft_loss(model, batch.tokens, batch.maskable, t[rows, 0], mask[rows], batch.attention_mask, cart)
            (loss.loss / grad_accum).backward()
        sums += torch.stack((loss.token_nll.sum(), sums.new_tensor(loss.count), loss.loss.detach()))
    nats, count, minimised = common.sum_over_ranks(sums)
    train_nelbo = nats / count
    common.check_finite(train_nelbo, step, out_dir)
    common.check_finite(minimised, step, out_dir)
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(trained, grad_clip)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    step += 1
    losses.append(train_nelbo)
    bar.count(train_nelbo, batch.tokens.numel() * slices)
bar.close()

# ---- end -----------------------------------------------------------------------------------------------------------------------
if main and stopped:
    print(f"stopped at step {step}; --resume=True goes on from here")
elif main:
    log.plot(folder / "loss.png")
    if merge:
        print(write_merged(out_dir, merge))
    print(f"val nelbo {val_nelbo:.4f} +- {val_stderr:.4f} nats/token, {val_bpb:.3f} bits/byte")
common.end_process()
