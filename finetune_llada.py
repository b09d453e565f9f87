"""Recipe 4: supervised fine-tuning of LLaDA, Dream and LLaDA2, by LoRA or in full, on one GPU or
many.

A diffusion language model learns to answer as it learned to write, except that only the answer is
ever masked: the prompt stays, and end-of-text tokens after the answer are learned too, so that the
model says how long an answer is (LLaDA, arXiv 2502.09992, section 2.3 and algorithm 2; Dream,
2508.15487). A model that writes block by block (LLaDA2, 2512.15745; SDAR; our own) sees its noisy
block and the clean ones before it, and each answer twice: what is masked once is shown the other
time. LoRA (2106.09685) keeps the weights as they are, in bfloat16, and trains 2 % beside
them: with checkpointing, and a loss that never holds all logits, LLaDA-8B takes 19 GB. FSDP2
spreads what is left over the GPUs.

    python finetune_llada.py --init_from=tiny             two minutes on a CPU: a small LLaDA
    python finetune_llada.py --init_from=tiny:llada2      a small LLaDA2: experts, blocks of 32
    python finetune_llada.py --plan                       what LLaDA-8B would take; reads no weights
    python finetune_llada.py --dataset='tulu3[train:50000]'           LoRA on one GPU
    torchrun --nproc_per_node=8 finetune_llada.py --lora_rank=0 --learning_rate=2.5e-5    everything
    python finetune_llada.py --merge=out/merged           the adapter in out_dir into the weights

Then: python sample.py --checkpoint=out/finetune --chat
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import contextlib
import sys

import torch

from data.chat import is_chat, open_dataset
from data.prepare import prepare
from data.tokenizer import Tokenizer
from diffusion import llada2_loss, mask_tokens, nelbo, sample_t, sft_loss
from pretrained.config import read_config
from pretrained.hub import model_folder
from pretrained.load import fill, open_checkpoint
from pretrained.tensors import put_rows
from pretrained.tiny import tiny_config
from training import nf4
from training.finetuning import (base_of_run, check_base, check_folder, check_processes,
                                 check_settings, only_merges, save_result)
from training.flops import flops_per_token
from training.lora import add_lora, freeze_in_4_bits, init_lora, published_modules
from training.memory import report
from training.merge import check_target, write_merged
from training.optimizers import (average_gradients, clip_gradients, learning_rate_factor,
                                 make_optimizers, set_learning_rate)
from training.run import Run
from training.sharding import check_ranks_agree, shard
from training.show import show_answer
from training.state import make_folder, resumes

# ---- settings: change them here or with --name=value ---------------------------------------------
# run
init_from = "GSAI-ML/LLaDA-8B-Base"     # folder or hub id; tiny, tiny:Dream, tiny:llada2: random
_tiny = common.given("init_from", init_from).partition(":")[0] == "tiny"     # then small settings
out_dir = "out/finetune"    # receives adapter or model, tokenizer, train_state, log.jsonl, loss.png
merge = ""                  # write base + adapter, of the run in out_dir or else of this one, here
resume = False              # continue the run in out_dir, exactly, by any number of processes
seed = 1337                 # adapters, order of the data and masks follow from it
device = "cuda" if torch.cuda.is_available() else "cpu"     # or a name
dtype = common.best_dtype(common.given("device", device))   # of frozen weights and products
compile = False             # torch.compile
checkpointing = True       # keep only the blocks' inputs for the backward pass: slower, less memory
fsdp = True                 # with torchrun: spread all weights over the processes (FSDP2)
replicas = 1                # copies of the model, each spread over processes / replicas (HSDP)
threads = 0                 # CPU threads; 0: torch's choice
wandb = ""                  # a project of Weights & Biases that gets the rows of log.jsonl as well
# plan
plan = False                # say how much memory a step takes, and stop
ranks = 0                   # processes that the plan reckons with; 0: torchrun's
memory_gb = 0.0             # memory of a GPU, for the plan; 0: of the one here, else 24
# data
dataset = "pydocs_chat"    # pydocs_chat, alpaca, tulu3, smoltalk, opc, FILE.jsonl, mixed by +; text
seq_len = 160 if _tiny else 1024    # tokens in a sequence at most
padding = "eos"             # eos: end-of-text tokens, part of the answer; hidden: nobody sees it
vocab_size = 2048           # pieces of the tokenizer that a tiny model gets
# what learns
lora_rank = 64              # of the adapters; 0 trains everything
lora_alpha = 64.0           # they count lora_alpha / lora_rank times
lora_dropout = 0.0          # of their input
lora_targets = "q,k,v,o,gate,up,down"   # the matrices that get one
base_bits = 16              # 16: the base as dtype says; 4: NF4 (QLoRA), for LoRA on small GPUs
cart = 0.0            # p of Dream's weights that look at the neighbours (0.1 there); 0: LLaDA's 1/t
# models that write in blocks
t_low = 0.3                 # times of the noise are uniform between this one
t_high = 0.8                # and this
complement = True           # every sequence twice: what is masked in one is shown in the other
block_weights = "mean"      # of masked tokens: mean, or bound: 1/t (then take all times)
cap_weight = 0.0            # CAP: weight of the entropy of what is predicted rightly; 0: none
# optimizer
batch_size = 16 if _tiny else 1     # sequences a step and process
grad_accum = 1              # steps of batch_size sequences before each update
learning_rate = 5e-3 if _tiny else 2e-4     # AdamW's peak, of adapters
if common.given("lora_rank", str(lora_rank)) == "0":
    learning_rate = 3e-3 if _tiny else 2.5e-5           # of all weights
weight_decay = 0.0          # of the blocks' matrices
beta2 = 0.999               # AdamW's second moment
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
warmup = 0.05               # share of the run in which the learning rate rises
decay = "linear"            # linear or cosine: how it falls to 0
max_steps = 0               # updates; 0: as many as fit into max_minutes
max_minutes = 1.2 if _tiny else 0.0     # unless max_steps is set; 0: as many updates as epochs take
epochs = 3.0                # visits of the data, unless max_steps or max_minutes is set
# evaluation
eval_interval = 200       # updates between evaluations, checkpoints and samples; 0: at the end only
eval_sequences = 64        # held-out sequences (of chat: conversations) of an evaluation on the way
final_eval_sequences = 256  # and of the last one
sample_tokens = 64          # length of the samples shown on the way; 0: none
settings = common.override(globals())

# ---- process -------------------------------------------------------------------------------------
check_settings(settings)
if plan:
    # For a GPU, whatever this machine is: in bfloat16, if nothing else is asked for.
    print(report(settings | {"dtype": common.given("dtype", "bfloat16")}))
    sys.exit()
device, rank, world_size = common.init_process(device, threads)
compute = common.matrix_dtype(device, dtype)
sharded = fsdp and world_size > 1
check_processes(settings, world_size)
check_target("out_dir", out_dir, init_from)
folder = make_folder(out_dir)
settings["resume"] = resume = resumes(resume, folder)
if only_merges(settings, folder):
    sys.exit()
check_folder(folder, out_dir, lora_rank)
if _tiny:                           # all of this before a data set is prepared for nothing
    source = tiny_config(init_from.partition(":")[2] or "llada", Tokenizer.bytes(), seq_len)
else:
    source, _ = read_config(model_folder(init_from))
check_base(source, settings)
in_blocks = source.block_length > 0

# ---- data ----------------------------------------------------------------------------------------
if _tiny:
    data_folder = common.first_on_rank_0(prepare, dataset, "bpe", vocab_size)
    text = Tokenizer.from_pretrained(data_folder)
else:
    text = Tokenizer.from_pretrained(model_folder(init_from))
    text.add_chat_tokens()
    if source.mask_token_id is None:
        text.add_mask_token()
    data_folder = common.first_on_rank_0(prepare, dataset, text, vocab_size)
chat = is_chat(dataset)
data = open_dataset(dataset, data_folder, seq_len, padding, source.block_length)
last_val = data.val_batch(max(final_eval_sequences, 2))     # the same as eval.py takes
val = data.val_batch(max(eval_sequences, final_eval_sequences, 2)).spread(max(eval_sequences, 2))
data.batch("train", batch_size, seed, 0)    # fail early: less text than one sequence
slices = grad_accum * world_size            # of a step, batch_size sequences each
local = ("dataset", "device", "threads", "wandb")       # what may differ between processes
same = {name: value for name, value in settings.items() if name not in local}
check_ranks_agree(device, **{"the data": data.fingerprint}, **same)
if not (max_steps or max_minutes):
    updates = epochs * data.epoch_length() / (batch_size * slices)
    max_steps = settings["max_steps"] = max(1, round(updates))

# ---- model ---------------------------------------------------------------------------------------
base = base_of_run(init_from, folder, text, seq_len, seed, source.vocab_size, write=not resume)
model, weights = open_checkpoint(base)      # no memory yet
config = model.config
if config.mask_token_id is None:            # Dream's config leaves both to its tokenizer
    config.mask_token_id = text.mask_token_id
if config.eos_token_id is None:
    config.eos_token_id = text.eos_token_id
if lora_rank:
    add_lora(model, lora_rank, lora_alpha, lora_dropout, lora_targets)
    published_modules(model)                # fail early: a family without names for its adapters
if base_bits == 4:
    freeze_in_4_bits(model)
model.checkpoint_blocks = checkpointing
if compile:
    model.compile_blocks()
if sharded:
    shard(model, device, compute, replicas)
# Of a sharded model each process reads the rows that belong to it.
fill(model, weights, device, compute if lora_rank else torch.float32,
     nf4.put_packed if base_bits == 4 else put_rows)
if lora_rank:
    init_lora(model, seed)
model.train()
# Frozen and sharded weights are in `compute` already; others are float32 and the products are cast,
# each weight when it is used.
autocast = contextlib.nullcontext()
if not (lora_rank or sharded or compute == torch.float32):
    autocast = torch.autocast(device.type, compute, cache_enabled=False)

# ---- optimizer -----------------------------------------------------------------------------------
learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
optimizers = make_optimizers(model, "adamw", learning_rate, beta2=beta2, weight_decay=weight_decay)
must_match = {name: settings[name] for name in (
    "init_from", "seq_len", "padding", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
    "base_bits", "cart", "t_low", "t_high", "complement", "block_weights", "cap_weight",
    "weight_decay", "beta2", "seed")}
must_match["dataset"] = data.fingerprint
must_match["batch_size * grad_accum * processes"] = batch_size * slices
flops = flops_per_token(model, seq_len, head_share=0.5, training=False)
flops *= 2 if lora_rank else 3              # frozen weights get no gradient
if in_blocks:
    flops *= 4 if complement else 2         # [x_t, x_0], and each sequence twice


def save_model():
    """The adapter or the model, for sample.py and the like."""
    save_result(model, folder, lora_rank, init_from, base)


run = Run(settings, model, optimizers, text, device, must_match, flops, save_model,
          sharded=True)                     # resumed by any number of processes


def evaluate(batch):
    """(NELBO, standard error, bytes per token) of held-out sequences, always with the same masks,
    in the precision of the weights, as eval.py has it; in chat, of the answers given the rest. The
    processes divide the passes, unless each holds but a part of the model."""
    part = batch.to(device)
    model.eval()                            # no dropout
    value, error = nelbo(model, part.tokens, seed=seed, batch_size=8, maskable=part.maskable,
                         attention_mask=part.attention_mask,
                         run_passes=map if sharded else common.share)
    model.train()
    return value, error, data.val_bytes_per_token(batch, text)


def share_of(rows, mask, batch):
    """What the mean over the tokens of a slice is multiplied by, so that the slices of a step
    average to the mean over all tokens of the step: the slice's tokens over the mean number of a
    slice. rows: of the slice in mask [G, T]."""
    if complement or block_weights == "bound":          # all tokens of the answers
        return batch.share
    whole = data.batch("train", len(mask), seed, run.step)
    masked = mask if whole.maskable is None else mask & whole.maskable                  # [G, T]
    return (masked[rows].sum() * slices / masked.sum().clamp(min=1)).item()


# ---- loop ----------------------------------------------------------------------------------------
# All randomness of a step follows from (seed, step). Each process draws the noise of the whole step
# and takes its slices: the result does not depend on how many processes share the work.
run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(p.numel() for p in learning.values()):,} learn, {config.family} on {device}; "
        f"{data.summary()}")
while run.goes_on():
    factor = learning_rate_factor(run.progress, warmup, decay)
    if run.evaluates():
        run.save()                              # first: a resumed run repeats what a kill cut short
        run.log(*evaluate(last_val if run.finished else val), factor)
        if sample_tokens and (run.main or sharded):
            show_answer(run, data, chat, temperature=0.0 if chat else 1.0)
        run.bar.begin_window()
    if run.finished:
        break
    set_learning_rate(optimizers, factor)

    noise = common.stream("noise", seed, run.step)
    T = data.step_length(batch_size * slices, seed, run.step)       # of all its sequences
    G = slices * batch_size                         # sequences of this step
    t = sample_t((G, 1), noise)                                                     # [G, 1]
    if in_blocks:
        t = t_low + (t_high - t_low) * sample_t((G, 1), noise, eps=0)
    mask = mask_tokens((G, T), t, noise)                                            # [G, T]
    # Pretraining cuts 1 % of the sequences to a random length, so that the model knows short
    # contexts (LLaDA, section 2.2).
    cut = torch.rand(G, generator=noise) < 0.01                                     # [G]
    length = torch.randint(1, T + 1, cut.shape, generator=noise)
    for micro_step in range(grad_accum):
        piece = micro_step * world_size + rank
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        batch = data.batch("train", batch_size, seed, run.step, piece, slices)
        if not chat and not in_blocks and cut[rows].any():
            shown = torch.arange(T) < torch.where(cut, length, T)[rows, None]       # [B, T]
            batch.maskable = batch.attention_mask = shown
        batch = batch.to(device)
        torch.manual_seed(common.seed_for("dropout", seed, run.step, piece))
        with autocast:
            if in_blocks:
                loss = llada2_loss(model, batch.tokens, config.block_length, batch.maskable,
                                   t[rows, 0], mask[rows], complement, block_weights == "bound",
                                   cap_weight)
                loss.loss = loss.loss * share_of(rows, mask, batch)
            else:
                loss = sft_loss(model, batch.tokens, batch.maskable, t[rows, 0], mask[rows],
                                batch.attention_mask, cart)
        (loss.loss / grad_accum).backward()
        run.count(loss)
    if not sharded:                                 # a sharded model has done it on its way
        average_gradients(model)
    clip_gradients(model, grad_clip)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    run.end_step(tokens=batch.tokens.numel() * slices)

if merge and run.main and not run.stopped:
    run.say(write_merged(out_dir, merge))
run.finish()
common.end_process()
