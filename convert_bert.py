"""Recipe 2: a BERT-style encoder becomes a diffusion language model that chats.

An encoder was trained to fill in 15 % or 30 % of masked tokens; a masked diffusion model fills in
any share, up to all of them. So nothing about the model changes but what it is trained on: the
bound of train_scratch.py (MDLM, arXiv 2406.07524), on text or, with masks in the answers only, on
conversations (LLaDA, 2502.09992, section 2.3; dLLM's BERT-Chat, 2602.22661). The defaults are those
of ModernBERT-base-chat: tulu3 and smoltalk, 1024 tokens, 10 epochs of batches of 384, AdamW at
1e-4.

    python convert_bert.py --init_from=tiny               two minutes on a CPU: a random encoder
    python convert_bert.py --init_from=bert-base-uncased --seq_len=512 --dataset=mine.jsonl
    python convert_bert.py --dataset=fineweb_edu          pretraining goes on, on text
    torchrun --nproc_per_node=8 convert_bert.py           the published run

Then: python sample.py --checkpoint=out/bert --chat
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import contextlib

import torch

from data.chat import is_chat, open_dataset
from data.prepare import prepare
from data.tokenizer import Tokenizer
from diffusion import mask_tokens, mdlm_loss, nelbo, sample_t
from model import Transformer
from pretrained.config import read_config
from pretrained.export import save
from pretrained.hub import model_folder
from pretrained.load import load
from pretrained.tensors import gathered
from pretrained.tiny import tiny_model
from pretrained.vocabulary import resize_vocabulary
from training.finetuning import check_masks
from training.flops import flops_per_token
from training.merge import check_target
from training.optimizers import (average_gradients, clip_gradients, learning_rate_factor,
                                 make_optimizers, set_learning_rate)
from training.run import Run
from training.show import show_answer
from training.state import make_folder, resumes

# ---- settings: change them here or with --name=value ---------------------------------------------
# run
init_from = "answerdotai/ModernBERT-base"  # folder or hub id; tiny, tiny:bert, tiny:roberta: random
_tiny = common.given("init_from", init_from).partition(":")[0] == "tiny"     # then small settings
out_dir = "out/bert"        # receives weights, tokenizer, train_state.pt, log.jsonl, loss.png
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
max_weight = 10.0 if _tiny else 0.0    # the loss weight is clipped here, the NELBO is not; 0: never
# data
dataset = "pydocs_chat" if _tiny else "tulu3+smoltalk"  # chat sets, FILE.jsonl, mixed by +; text
seq_len = 160 if _tiny else 1024        # tokens in a sequence at most
padding = "eos"             # eos: end-of-text tokens, part of the answer; hidden: nobody sees it
vocab_size = 2048           # pieces of the tokenizer that a tiny model gets
# model: of a tiny one
n_layers = 4                # transformer blocks
n_heads = 4                 # attention heads
dim = 128                   # width
# optimizer
batch_size = 16 if _tiny else 48        # sequences a step and process
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
                  "eval_interval", "sample_tokens"],
    shares=["warmup"], below_1=["beta2"], finite=["epochs"], padding=["eos", "hidden"],
    optimizer=["muon", "adamw"], decay=["linear", "cosine"])
common.note_without_effect(f"max_steps {max_steps}", max_minutes=max_steps == 0)
common.note_without_effect(f"max_steps {max_steps} and max_minutes {max_minutes}",
                           epochs=not (max_steps or max_minutes))
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
    if source.causal:
        raise ValueError(f"{init_from} is an autoregressive model ({source.family}): convert_ar.py "
                         "converts it")
    check_masks(source, init_from)
    if source.family not in ("bert", "roberta", "modernbert", "unmask") or source.block_length:
        raise ValueError(f"{init_from} is no BERT, RoBERTa or ModernBERT but a diffusion model "
                         f"({source.family}): see finetune_llada.py")
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
data = open_dataset(dataset, data_folder, seq_len, padding)
last_val = data.val_batch(max(final_eval_sequences, 2))     # the same as eval.py takes
val = data.val_batch(max(eval_sequences, final_eval_sequences, 2)).spread(max(eval_sequences, 2))
data.batch("train", batch_size, seed, 0)    # fail early: less text than one sequence
slices = grad_accum * world_size            # of a step, batch_size sequences each
if not (max_steps or max_minutes):
    updates = epochs * data.epoch_length() / (batch_size * slices)
    max_steps = settings["max_steps"] = max(1, round(updates))

# ---- model ---------------------------------------------------------------------------------------
# Encoders see in both directions and predict a token where it stands: that is all that masked
# diffusion asks for.
if _tiny:
    family = init_from.partition(":")[2] or "modernbert"
    model = tiny_model(family, text, seq_len, seed, dim=dim, n_layers=n_layers, n_heads=n_heads)
    if model.config.causal:
        raise ValueError(f"{init_from} would be an autoregressive model: convert_ar.py converts it")
else:
    model = load(init_from, dtype=torch.float32, fresh_head=True).train()
    if model.fresh_head and rank == 0 and not resume:
        print(f"{init_from} is an encoder without masked-LM head: it gets a fresh one, whose "
              "matrix is tied to the embedding")
    resize_vocabulary(model, text.vocab_size, new=range(old_size, text.vocab_size))
    model.source = None                     # its tokenizer files are no longer the model's
config = model.config
config.mask_token_id = text.mask_token_id
config.put_end_first(text.eos_token_id)
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
    "init_from", "seq_len", "padding", "optimizer", "weight_decay", "beta2", "seed")}
must_match["dataset"] = data.fingerprint
must_match["batch_size * grad_accum * processes"] = batch_size * slices


def save_model():
    weights = gathered(model.state_dict())          # of a sharded model: all processes take part
    if run.main:
        save(model, run.folder, weights)


run = Run(settings, model, optimizers, text, device, must_match, save_model=save_model,
          flops_per_token=flops_per_token(model, seq_len, head_share=0.5), sharded=sharded)


def evaluate(batch):
    """(NELBO, standard error, bytes per token) of held-out sequences, always with the same masks,
    in the precision of the weights, as eval.py has it; in chat, of the answers given the rest. The
    processes divide the passes, unless each holds but a part of the model."""
    part = batch.to(device)
    value, error = nelbo(model, part.tokens, seed=seed, maskable=part.maskable,
                         attention_mask=part.attention_mask,
                         run_passes=map if sharded else common.share)
    return value, error, data.val_bytes_per_token(batch, text)


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
    t = sample_t((slices * batch_size, 1), noise)                                   # [G, 1]
    mask = mask_tokens((slices * batch_size, T), t, noise)                          # [G, T]
    for micro_step in range(grad_accum):
        piece = micro_step * world_size + rank
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        batch = data.batch("train", batch_size, seed, run.step, piece, slices).to(device)
        with autocast:
            loss = mdlm_loss(model, batch.tokens, t[rows, 0], mask[rows], batch.maskable,
                             batch.attention_mask, max_weight=max_weight)
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
