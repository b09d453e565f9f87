"""Recipe 3: an autoregressive language model becomes a diffusion language model.

It knows the language already; what it learns anew is to look to the right and to fill in any share
of masked tokens. Attention is opened to both sides, at once or little by little (DiffuLLaMA, arXiv
2410.17891), a mask token is added, and training goes on with the bound of diffusion, on text or,
with masks in the answers only, on conversations. --shift=True keeps the old habit of predicting
token i at position i - 1 (Dream, 2508.15487), else it is dropped (dLLM's Tiny-A2D, 2602.22661).
--objective=bd3lm gives a model that writes block by block (BD3-LM, 2503.09573), at once or with
blocks that grow first and shrink then (--block_schedule; LLaDA2, 2512.15745). The defaults are
those of Qwen3-0.6B-diffusion-mdlm: 1024 tokens, 10 epochs of batches of 2048, AdamW at 1e-4; with
bd3lm those of -bd3lm: 512 tokens, blocks of 32.

    python convert_ar.py --init_from=tiny                 two minutes on a CPU: a random decoder
    python convert_ar.py --init_from=gpt2 --dataset=fineweb_edu --max_minutes=60
    python convert_ar.py --init_from=out/scratch --dataset=pydocs --seq_len=128
                                                          after train_scratch.py --objective=ar
    torchrun --nproc_per_node=8 convert_ar.py --grad_accum=16     the published run

Then: python sample.py --checkpoint=out/ar --chat
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import contextlib
import math

import torch

from data.chat import is_chat, open_dataset
from data.prepare import prepare
from data.tokenizer import Tokenizer
from diffusion import block_loss, mask_tokens, mdlm_loss, nelbo, sample_t
from model import Transformer
from pretrained.config import read_config
from pretrained.export import save
from pretrained.hub import model_folder
from pretrained.tensors import gathered
from pretrained.tiny import tiny_model
from pretrained.vocabulary import resize_vocabulary
from training.blocks import block_length_at, parse_schedule
from training.flops import flops_per_token
from training.merge import check_target
from training.optimizers import (average_gradients, clip_gradients, learning_rate_factor,
                                 make_optimizers, set_learning_rate)
from training.run import Run
from training.show import show_answer
from training.state import make_folder, resumes

# ---- settings: change them here or with --name=value ---------------------------------------------
# run
init_from = "Qwen/Qwen3-0.6B"   # folder or hub id; tiny, tiny:gpt2, tiny:llama...: random
_tiny = common.given("init_from", init_from).partition(":")[0] == "tiny"     # then small settings
out_dir = "out/ar"          # receives weights, tokenizer, train_state.pt, log.jsonl, loss.png
export = ""                 # at the end also write the family's own layout to this folder
resume = False              # continue the run in out_dir, bit for bit
seed = 1337                 # order of the data and masks follow from it
device = "cuda" if torch.cuda.is_available() else "cpu"     # or mps
dtype = common.best_dtype(common.given("device", device))   # of matrix products: bfloat16, float32
compile = common.given("device", device) != "cpu"           # torch.compile
fsdp = False                # with torchrun: spread weights and optimizer over the processes (FSDP2)
checkpointing = False      # keep only the blocks' inputs for the backward pass: slower, less memory
threads = 0                 # CPU threads; 0: torch's choice
wandb = ""                  # a project of Weights & Biases that gets the rows of log.jsonl as well
# diffusion
objective = "mdlm"          # mdlm, bd3lm
_in_blocks = common.given("objective", objective) == "bd3lm"
block_length = 8 if _tiny else 32   # bd3lm: tokens in a block
block_schedule = ""         # bd3lm: lengths in turn, like 1,4,32,T,32; T: a sequence; "": only one
shift = False               # True: token i is predicted at i - 1, as before; False: where it stands
anneal_steps = 0            # mdlm: updates over which attention to the right opens; 0: at once
max_weight = 10.0 if _tiny else 0.0    # the loss weight is clipped here, the NELBO is not; 0: never
# data
dataset = "pydocs_chat" if _tiny else "tulu3+smoltalk+opc"  # chat, FILE.jsonl, mixed by +; text
_longest = 512 if _in_blocks else 1024
seq_len = 160 if _tiny else _longest        # tokens in a sequence at most
padding = "eos"             # eos: end-of-text tokens, part of the answer; hidden: nobody sees it
vocab_size = 2048           # pieces of the tokenizer that a tiny model gets
# model: of a tiny one
n_layers = 4                # transformer blocks
n_heads = 4                 # attention heads
dim = 128                   # width
# optimizer
batch_size = 16             # sequences a step and process
grad_accum = 1              # steps of batch_size sequences before each update
optimizer = "muon" if _tiny else "adamw"    # muon takes AdamW for embeddings, head, norms
learning_rate = 3e-3 if _tiny else 1e-4     # AdamW's peak
muon_lr = 0.02              # Muon's peak
weight_decay = 0.0          # of the blocks' matrices
beta2 = 0.999               # AdamW's second moment
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
warmup = 0.1                # share of the run in which the learning rate rises
decay = "cosine"            # linear or cosine: how it falls to 0
max_steps = 0               # updates; 0: as many as fit into max_minutes
max_minutes = 1.2 if _tiny else 0.0     # unless max_steps is set; 0: as many updates as epochs take
epochs = 10.0               # visits of the data, unless max_steps or max_minutes is set
# evaluation
eval_interval = 200       # updates between evaluations, checkpoints and samples; 0: at the end only
eval_sequences = 64        # held-out sequences (of chat: conversations) of an evaluation on the way
final_eval_sequences = 512  # and of the last one
sample_tokens = 64          # length of the samples shown on the way; 0: none
settings = common.override(globals())

# ---- process -------------------------------------------------------------------------------------
common.check(
    settings,
    at_least_1=["n_layers", "n_heads", "dim", "seq_len", "batch_size", "grad_accum",
                "eval_sequences", "final_eval_sequences"],
    positive=["learning_rate", "muon_lr", "epochs"],
    not_negative=["max_weight", "weight_decay", "grad_clip", "max_steps", "max_minutes",
                  "eval_interval", "sample_tokens", "anneal_steps"],
    shares=["warmup"], below_1=["beta2"], finite=["epochs"], padding=["eos", "hidden"],
    objective=["mdlm", "bd3lm"], optimizer=["muon", "adamw"], decay=["linear", "cosine"])
common.note_without_effect(f"max_steps {max_steps}", max_minutes=max_steps == 0)
common.note_without_effect(f"max_steps {max_steps} and max_minutes {max_minutes}",
                           epochs=not (max_steps or max_minutes))
if objective == "bd3lm" and (block_length < 1 or seq_len % block_length):
    raise ValueError(f"block_length {block_length} does not divide seq_len {seq_len}")
if block_schedule and objective != "bd3lm":
    raise ValueError("block_schedule is for objective bd3lm")
stages = parse_schedule("T")                # mdlm: a sequence is one block
if objective == "bd3lm":
    stages = parse_schedule(block_schedule or str(block_length))
whole_blocks = math.lcm(*[stage.length for stage in stages if stage.length])    # of every length
if block_schedule and (stages[-1].length != block_length or seq_len % whole_blocks):
    raise ValueError(f"block_schedule {block_schedule} must end with block_length {block_length}, "
                     f"and its lengths must divide seq_len {seq_len}")
if objective == "bd3lm" and (anneal_steps or padding != "eos"):
    raise ValueError("anneal_steps and padding=hidden are for objective mdlm: a block sees nothing "
                     "to the right of itself anyway")
device, rank, world_size = common.init_process(device, threads)
autocast = common.autocast(device, dtype)           # of training steps; weights stay float32
check_target("out_dir", out_dir, init_from)
check_target("export", export, init_from)
folder = make_folder(out_dir)       # fail early if it cannot be written to
settings["resume"] = resume = resumes(resume, folder)
sharded = fsdp and world_size > 1
if sharded and optimizer == "muon":
    raise ValueError("muon needs whole matrices: take --fsdp=False or --optimizer=adamw")
if not _tiny:                       # before a data set is prepared for nothing
    source, _ = read_config(model_folder(init_from))
    if not source.causal:
        raise ValueError(f"{init_from} sees in both directions already ({source.family}): "
                         "convert_bert.py is for encoders, finetune_llada.py for LLaDA and Dream")
    if seq_len > source.max_len:
        raise ValueError(f"{init_from} has positions for {source.max_len} tokens, seq_len is "
                         f"{seq_len}: take --seq_len={source.max_len}")

# ---- data ----------------------------------------------------------------------------------------
# A checkpoint keeps its own tokenizer. A mask token and those of the chat template are added if it
# has none.
if _tiny:
    data_folder = common.first_on_rank_0(prepare, dataset, "bpe", vocab_size)
    text = Tokenizer.from_pretrained(data_folder)
else:
    text = Tokenizer.from_pretrained(model_folder(init_from))
    old_size = text.vocab_size
    text.add_mask_token()
    text.add_chat_tokens()
    data_folder = common.first_on_rank_0(prepare, dataset, text, vocab_size)
chat = is_chat(dataset)
data = open_dataset(dataset, data_folder, seq_len, padding, whole_blocks if _in_blocks else 0)
last_val = data.val_batch(max(final_eval_sequences, 2))     # the same as eval.py takes
val = data.val_batch(max(eval_sequences, final_eval_sequences, 2)).spread(max(eval_sequences, 2))
data.batch("train", batch_size, seed, 0)    # fail early: less text than one sequence
slices = grad_accum * world_size            # of a step, batch_size sequences each
if not (max_steps or max_minutes):
    updates = epochs * data.epoch_length() / (batch_size * slices)
    max_steps = settings["max_steps"] = max(1, round(updates))

# ---- model ---------------------------------------------------------------------------------------
if _tiny:
    family = init_from.partition(":")[2] or "qwen3"
    model = tiny_model(family, text, seq_len, seed, dim=dim, n_layers=n_layers, n_heads=n_heads)
    if not model.config.causal:
        raise ValueError(f"{init_from} would not be an autoregressive model: convert_bert.py "
                         "converts encoders")
else:
    model = Transformer.from_pretrained(init_from, dtype=torch.float32).train()
    resize_vocabulary(model, text.vocab_size, new=range(old_size, text.vocab_size))
    model.source = None                     # its tokenizer files are no longer the model's
config = model.config
config.mask_token_id = text.mask_token_id
config.put_end_first(text.eos_token_id)
config.causal, config.shift = False, shift  # every position sees every other: no weight changes
config.block_length = block_length if objective == "bd3lm" else 0
model.checkpoint_blocks = checkpointing
model.to(device)
if compile:
    model.compile_blocks()
if sharded:
    from training.sharding import shard
    shard(model, device, common.matrix_dtype(device, dtype))
    autocast = contextlib.nullcontext()     # weights are cast when they are gathered

# ---- optimizer -----------------------------------------------------------------------------------
optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, beta2, weight_decay)
must_match = {name: settings[name] for name in (
    "init_from", "objective", "block_length", "block_schedule", "shift", "anneal_steps", "seq_len",
    "padding", "optimizer", "weight_decay", "beta2", "seed")}
must_match["dataset"] = data.fingerprint
must_match["batch_size * grad_accum * processes"] = batch_size * slices


def save_model():
    weights = gathered(model.state_dict())          # of a sharded model: all processes take part
    if run.main:
        save(model, run.folder, weights)


flops = flops_per_token(model, seq_len, head_share=0.5)
if objective == "bd3lm":
    flops *= 2                  # a pass reads [x_t, x_0]
run = Run(settings, model, optimizers, text, device, must_match, flops, save_model,
          sharded=sharded)


def evaluate(batch):
    """(NELBO, standard error, bytes per token) of held-out sequences, always with the same masks,
    in the precision of the weights, as eval.py has it; in chat, of the answers given the rest. The
    processes divide the passes, unless each holds but a part of the model."""
    part = batch.to(device)
    value, error = nelbo(model, part.tokens, seed=seed, maskable=part.maskable,
                         attention_mask=part.attention_mask,
                         run_passes=map if sharded else common.share)
    return value, error, data.val_bytes_per_token(batch, text)


def opening_attention(tokens, attention_mask, opened):
    """Who sees whom while attention opens, bool [1 or B, T, T]: what stands before, and a share
    `opened` of all other pairs, the same for the whole step (DiffuLLaMA, section 3.3)."""
    T = tokens.shape[1]
    pairs = torch.rand(T, T, generator=common.stream("opening attention", seed, run.step)) < opened
    before = torch.ones(T, T, dtype=torch.bool).tril()
    pairs = (pairs | before)[None].to(tokens.device)                                # [1, T, T]
    if attention_mask is None:
        return pairs
    itself = torch.eye(T, dtype=torch.bool, device=tokens.device)
    return pairs & attention_mask[:, None] | itself                                 # [B, T, T]


# ---- loop ----------------------------------------------------------------------------------------
# All randomness of a step follows from (seed, step). Each process draws the noise of the whole step
# and takes its slices: the result does not depend on how many processes share the work.
run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.family} on {device}; "
        f"{data.summary()}")
while run.goes_on():
    factor = learning_rate_factor(run.progress, warmup, decay)
    if run.evaluates():
        run.save()                              # first: a resumed run repeats what a kill cut short
        run.log(*evaluate(last_val if run.finished else val), factor)
        if sample_tokens and (run.main or sharded):
            # A small model repeats itself when it is greedy.
            show_answer(run, data, chat, temperature=0.0 if chat and not _tiny else 0.7)
        run.bar.begin_window()
    if run.finished:
        break
    set_learning_rate(optimizers, factor)

    noise = common.stream("noise", seed, run.step)
    T = data.step_length(batch_size * slices, seed, run.step)       # of all its sequences
    length = block_length_at(stages, run.progress) or T             # tokens in a block
    blocks = T // length
    t = sample_t((slices * batch_size, blocks), noise)                              # [G, blocks]
    mask_prob = t.repeat_interleave(length, dim=1)                                  # [G, T]
    mask = mask_tokens(mask_prob.shape, mask_prob, noise)
    for micro_step in range(grad_accum):
        piece = micro_step * world_size + rank
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        batch = data.batch("train", batch_size, seed, run.step, piece, slices).to(device)
        if run.step < anneal_steps:
            batch.attention_mask = opening_attention(batch.tokens, batch.attention_mask,
                                                     run.step / anneal_steps)
        with autocast:
            if blocks == 1:
                loss = mdlm_loss(model, batch.tokens, t[rows, 0], mask[rows], batch.maskable,
                                 batch.attention_mask, max_weight=max_weight)
            else:
                loss = block_loss(model, batch.tokens, length, t[rows], mask[rows],
                                  batch.maskable, max_weight=max_weight)
        # Answers differ in length: the sum over tokens is divided by the count of the whole step.
        (loss.loss * batch.share / grad_accum).backward()
        run.count(loss)
    if not sharded:                                 # a sharded model has done it on its way
        average_gradients(model)
    clip_gradients(model, grad_clip)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    run.end_step(tokens=batch.tokens.numel() * slices)

run.finish()
if export and run.main and run.finished:
    Transformer.from_pretrained(run.folder).export_pretrained(export)
    text.save_pretrained(export)
common.end_process()
