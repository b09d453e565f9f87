"""Recipe 2: a BERT-style encoder becomes a diffusion language model that chats.

An encoder was trained to fill in 15 % or 30 % of masked tokens; a masked diffusion model fills in any share, up to all of them. So
nothing about the model changes but what it is trained on: the bound of train_scratch.py (MDLM, arXiv 2406.07524), on text or, with
masks in the answers only, on conversations (LLaDA, 2502.09992, section 2.3; dLLM's BERT-Chat, 2602.22661). The defaults are those of
ModernBERT-base-chat: tulu3 and smoltalk, 1024 tokens, 10 epochs of batches of 384, AdamW at 1e-4.

    python convert_bert.py --init_from=tiny                    two minutes on a laptop's CPU, no network: a small random encoder
    python convert_bert.py --init_from=bert-base-uncased --seq_len=512 --dataset=mine.jsonl --max_minutes=30
    python convert_bert.py --dataset=fineweb_edu               continual pretraining on text, or --dataset=notes.txt
    torchrun --nproc_per_node=8 convert_bert.py                the published run

Then: python sample.py --checkpoint=out/bert --chat        and --temperature=0.7 --remasking=random for a small model
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import contextlib
import math

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import override
from data import checkpoints
from data.chat import is_chat, open_dataset
from data.prepare import prepare
from data.state import Progress, make_folder, save_training, start_training
from data.tokenizer import Tokenizer
from diffusion import generate, mask_tokens, mdlm_loss, nelbo, sample_t
from model import Transformer

# ---- settings: change them here or with --name=value ---------------------------------------------------------------------------
# run
init_from = "answerdotai/ModernBERT-base"   # folder or hub id of a BERT, RoBERTa or ModernBERT; tiny, tiny:bert, tiny:roberta: small and random
out_dir = "out/bert"        # receives model.safetensors, config.json, the tokenizer, train_state.pt, log.jsonl, loss.png
export = ""                 # at the end also write the family's own layout, for its own code, to this folder
resume = False              # continue the run in out_dir, bit for bit
seed = 1337                 # order of the data and masks follow from it
device = "auto"             # auto, cpu, cuda, mps
dtype = "auto"              # auto, float32, bfloat16: precision of the matrix products; weights stay float32
compile = "auto"            # auto (on a GPU), True, False: torch.compile
fsdp = False                # with torchrun: spread weights and optimizer over the processes (FSDP2); False: each has all of them (DDP)
checkpointing = False       # keep only the blocks' inputs for the backward pass: a third slower, a fraction of the memory
threads = 0                 # CPU threads; 0: torch's choice
# data: here and below, 0 and nothing take the value of a published run, or of a tiny start
dataset = ""                # chat: pydocs_chat, alpaca, tulu3, smoltalk, opc, FILE.jsonl, mixed by +; text: as in train_scratch.py
seq_len = 0                 # tokens in a sequence at most
padding = "eos"             # eos: end-of-text tokens, part of the answer, so that its length is learned (LLaDA, appendix B.1); hidden: nobody sees it
vocab_size = 2048           # pieces of the tokenizer that a tiny model gets
# model: of a tiny one
n_layers = 4                # transformer blocks
n_heads = 4                 # attention heads
dim = 128                   # width
# diffusion
max_weight = 0.0            # the loss weight is clipped here, the NELBO is not; 0: no clipping, of a tiny start 10
# optimizer
batch_size = 0              # sequences a step and process
grad_accum = 1              # steps of batch_size sequences before each update
optimizer = ""              # adamw or, for small models, muon (AdamW for embeddings, head and norms)
learning_rate = 0.0         # AdamW's peak
muon_lr = 0.02              # Muon's peak
weight_decay = 0.0          # of matrices
beta2 = 0.999               # AdamW's second moment
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
warmup = 0.1                # share of the run in which the learning rate rises
decay = "cosine"            # linear or cosine: how it falls to 0
epochs = 10.0               # visits of the data, unless max_steps or max_minutes is set
max_steps = 0               # updates
max_minutes = 0.0           # minutes of training. Learning rate follows the clock then
# evaluation
eval_interval = 200         # updates between evaluations, checkpoints and samples; 0: at the end only
eval_sequences = 64         # held-out sequences (of chat: conversations) of an evaluation on the way
final_eval_sequences = 512  # and of the last one
sample_tokens = 64          # length of the samples shown on the way; 0: none
settings = override(globals())

# ---- process, precision --------------------------------------------------------------------------------------------------------
device, rank, world_size = common.init_process(device, threads)
start, _, tiny_family = init_from.partition(":")
tiny, longest = start == "tiny", 160
if not tiny:
    source, _ = checkpoints.read_config(checkpoints.model_folder(init_from))                # before a data set is prepared for nothing
    longest = source.max_len
    if source.causal:
        raise ValueError(f"{init_from} is an autoregressive model ({source.family}): convert_ar.py converts it")
    if source.family not in ("bert", "roberta", "modernbert", "unmask") or source.block_length:
        raise ValueError(f"{init_from} is no BERT, RoBERTa or ModernBERT but a diffusion model ({source.family}): see finetune_llada.py")
common.fill_in(             # published, tiny
    globals(), settings, column=int(tiny), dataset=("tulu3+smoltalk", "pydocs_chat"), seq_len=(min(1024, longest), 160), batch_size=(48, 16),
    learning_rate=(1e-4, 3e-3), max_minutes=(0.0, 1.2), optimizer=("adamw", "muon"), max_weight=(0.0, 10.0))
common.check(settings, at_least_1="n_layers n_heads dim seq_len batch_size grad_accum eval_sequences final_eval_sequences",
             positive="learning_rate muon_lr epochs", optimizer=("muon", "adamw"), decay=("linear", "cosine"),
             not_negative="max_weight weight_decay grad_clip warmup max_steps max_minutes eval_interval sample_tokens seed")
if not tiny and seq_len > longest:
    raise ValueError(f"{init_from} has positions for {longest} tokens, seq_len is {seq_len}: take --seq_len={longest}")
sharded = fsdp and world_size > 1
if sharded and optimizer == "muon":
    raise ValueError("muon needs whole matrices: take --fsdp=False or --optimizer=adamw")
# Sharded weights are cast when they are gathered.
autocast = contextlib.nullcontext() if sharded else common.autocast(device, dtype)
main = rank == 0                                                    # rank 0 writes and prints
folder = make_folder(out_dir)

# ---- data ----------------------------------------------------------------------------------------------------------------------
# A checkpoint keeps its own tokenizer, with a mask token and those of the chat template where it has none.
text = "bpe" if tiny else Tokenizer.from_pretrained(checkpoints.find_checkpoint(init_from))
if not tiny:
    old_size = text.vocab_size
    text.add_mask_token()
    text.add_chat_tokens()
data_folder = common.first_on_rank_0(prepare, dataset, text, vocab_size)
text = Tokenizer.from_pretrained(data_folder) if tiny else text
data, chat = open_dataset(dataset, data_folder, seq_len, padding), is_chat(dataset)
last_val = data.val_batch(max(final_eval_sequences, 2))             # as eval.py takes them
val = data.val_batch(max(eval_sequences, final_eval_sequences, 2)).spread(max(eval_sequences, 2))
data.batch("train", batch_size, seed, 0)                            # too short a corpus is better known now
slices = grad_accum * world_size
if not (max_steps or max_minutes):
    max_steps = max(1, round(epochs * data.examples["train"] / (batch_size * slices)))

# ---- model ---------------------------------------------------------------------------------------------------------------------
# Encoders see in both directions and predict a token where it stands: that is all that masked diffusion asks for.
if tiny:
    raw_model = checkpoints.tiny_model(tiny_family or "modernbert", text, seq_len, seed, dim=dim, n_layers=n_layers, n_heads=n_heads)
    if raw_model.config.causal:
        raise ValueError(f"{init_from} would be an autoregressive model: convert_ar.py converts it")
else:
    raw_model = checkpoints.load(init_from, dtype=torch.float32, fresh_head=True).train()
    if raw_model.fresh_head and main and not resume:
        print(f"{init_from} is an encoder without masked-LM head: it gets a fresh one, "
              "whose matrix is tied to the embedding")
    raw_model.resize_vocabulary(text.vocab_size, new=range(old_size, text.vocab_size))
    raw_model.source = None                                         # its tokenizer files are no longer the model's: `save` writes ours
raw_model.config.mask_token_id = text.mask_token_id
raw_model.config.put_end_first(text.eos_token_id)
raw_model.checkpoint_blocks = checkpointing
raw_model.to(device)                                                # saved and sampled; `model` may be wrapped
if common.is_on(compile, auto=device.type == "cuda"):
    raw_model.compile_blocks()
if sharded:
    from scale.sharding import shard
    shard(raw_model, device, common.matrix_dtype(device, dtype))
model = DistributedDataParallel(raw_model) if world_size > 1 and not sharded else raw_model

# ---- optimizer -----------------------------------------------------------------------------------------------------------------
optimizers = common.make_optimizers(raw_model, optimizer, learning_rate, muon_lr, beta2, weight_decay)

# ---- resume --------------------------------------------------------------------------------------------------------------------
must_match = {name: settings[name] for name in ("init_from", "seq_len", "padding", "optimizer", "weight_decay", "beta2", "seed")}
must_match |= {"dataset": data.fingerprint, "batch_size * grad_accum * processes": batch_size * slices}
step, clock, losses, log = start_training(folder, raw_model, optimizers, must_match, resume, sharded)


def save():
    """What resuming needs, and then what sample.py reads."""
    save_training(folder, raw_model, optimizers, step, clock, losses, {**settings, **must_match}, sharded)
    whole = checkpoints.gathered(raw_model.state_dict())
    if main:
        checkpoints.save(raw_model, folder, whole)
        text.save_pretrained(folder)


def evaluate(batch):
    """(NELBO, standard error, bits per byte) of held-out sequences, always with the same masks; in
    chat, of the answers given the rest. The processes divide the passes, unless each of them holds
    a part of the model.

    Computed in the precision of the weights, as eval.py does it: autocast is for training. Sharded
    weights have the precision of the products."""
    part = batch.to(device)
    value, error = nelbo(raw_model, part.tokens, seed=seed, maskable=part.maskable,
                         attention_mask=part.attention_mask, map=map if sharded else common.share)
    return value, error, value / math.log(2) / data.val_bytes_per_token(batch, text)


def show_sample():
    """The answer to a held-out question, or a text out of nothing, as far as the model has come. A sharded model needs all processes for it."""
    prompt = data.prompt("val", step)[0] if chat else []
    n = min(sample_tokens, seq_len - len(prompt))
    how = dict(temperature=0.0) if chat and not tiny else dict(temperature=0.7, remasking="random")     # a small model repeats itself when greedy
    ids = generate(raw_model, [prompt], n, n, n, seed=step, **how)[0]
    if main:
        question = [repr(text.decode(prompt, skip_special_tokens=True))] * chat
        tqdm.write(f"step {step}: " + " -> ".join([*question, repr(text.decode_answer(ids[len(prompt):]))]))


# ---- loop ----------------------------------------------------------------------------------------------------------------------
# One pass more than there are updates: the last only evaluates and saves. All randomness of a step follows from (seed, step).
bar = Progress(clock, step, max_steps, raw_model.flops_per_token(seq_len, head_share=0.5), device)
if main:
    tqdm.write(f"{sum(p.numel() for p in raw_model.parameters()):,} parameters, {raw_model.config.family} on {device}; {data.summary()}")
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
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        batch = data.batch("train", batch_size, seed, step, piece, slices).to(device)                                # tokens [B, T]
        if t is None:
            t = sample_t((slices * batch_size, 1), generator)                                                        # [G, 1]
            mask = mask_tokens((slices * batch_size, batch.tokens.shape[1]), t, generator)                           # [G, T]
        # A sharded model adds up gradients where they belong, so it must exchange them each time; DDP does so in the last micro-step.
        sync = contextlib.nullcontext() if world_size == 1 or sharded or micro_step == grad_accum - 1 else model.no_sync()
        with sync:
            with autocast:
                loss = mdlm_loss(model, batch.tokens, t[rows, 0], mask[rows], batch.maskable, batch.attention_mask, max_weight=max_weight or None)
            (loss.loss * batch.share / grad_accum).backward()       # answers differ in length: sum over tokens / count of the whole step
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
    bar.count(train_nelbo, batch.tokens.numel() * slices)
bar.close()

# ---- end -----------------------------------------------------------------------------------------------------------------------
if main and stopped:
    print(f"stopped at step {step}; --resume=True goes on from here")
elif main:
    log.plot(folder / "loss.png")
    if export:
        Transformer.from_pretrained(folder).export_pretrained(export)
        text.save_pretrained(export)
    print(f"val nelbo {val_nelbo:.4f} +- {val_stderr:.4f} nats/token, {val_bpb:.3f} bits/byte")
common.end_process()
