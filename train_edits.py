"""Recipe 6: a model that inserts, deletes and substitutes tokens until a text is finished.

Masks fix the length of what is written before it is written; edits do not. The model sees a text on
its way from x_0 (nothing, a damaged text, one with a gap) to x_1, a text of the data, and learns at
what rate each position is substituted, deleted, or followed by something new, and what is written
there (Edit Flows, arXiv 2506.09018; the mathematics stands in edits.py). The transformer is that of
the other recipes with three heads, of random weights or with those of a model of masks.

--editing chooses among three ways. The two others keep the single head of a model of masks, which
learns to say what shall stand at each position of a block: another token (replace, LLaDA2.1), or
also that a token goes or that something is missing before it (tokens, LLaDA2.2).

    python train_edits.py                                 minutes on a CPU or a GPU, no network
    python train_edits.py --source=nothing                writing alone, no repairs
    python train_edits.py --editing=tokens                insert and delete tokens, LLaDA2.2's
    python train_edits.py --init_from=out/scratch         a model of masks learns to edit
    python train_edits.py --init_from=GSAI-ML/LLaDA-8B-Base --source=masks --num_masks=128
    torchrun --nproc_per_node=4 train_edits.py --dataset=tinystories --max_minutes=60

Then: python sample.py --checkpoint=out/edits --show
      python sample.py --checkpoint=out/edits --edit='Tom had had red kite.' --show
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import random
import warnings

import torch

from data.chat import is_chat
from data.damage import SOURCES, SourceSettings, alphabet_of, block_source
from data.documents import Documents
from data.loader import TokenDataset
from data.prepare import prepare
from data.tokenizer import Tokenizer
from diffusion import sample_t
from edit_tokens import label_loss, orders_of, spoiled
from edits import FLOW_SCHEDULES, align_answer, edit_loss, edit_nelbo, stack
from evaluation.editing import bound_of_blocks
from model import Config, Transformer
from pretrained.editing import become_corrector, become_editor
from pretrained.export import save
from pretrained.hub import model_folder
from pretrained.tiny import tiny_model
from sampling.correcting import correct
from sampling.rewriting import rewrite
from training.ahead import Ahead
from training.flops import flops_per_token
from training.merge import check_target
from training.optimizers import (average_gradients, clip_gradients, learning_rate_factor,
                                 make_optimizers, set_learning_rate)
from training.run import Run
from training.state import make_folder, resumes

# ---- settings: change them here or with --name=value ---------------------------------------------
# run
init_from = ""      # a model of masks or edits, folder or hub id; tiny, tiny:bert: small and random
_tiny = common.given("init_from", init_from).partition(":")[0] == "tiny"
out_dir = "out/edits"       # receives weights, tokenizer, train_state.pt, log.jsonl, loss.png
resume = False              # continue the run in out_dir, bit for bit
seed = 1337                 # weights, order of the data and noise follow from it
device = "cuda" if torch.cuda.is_available() else "cpu"     # or mps
_on_gpu = common.given("device", device) != "cpu"
dtype = common.best_dtype(common.given("device", device))   # of matrix products: bfloat16, float32
compile = False             # torch.compile, which begins anew where rows get another length
threads = 0                 # CPU threads; 0: torch's choice
wandb = ""                  # a project of Weights & Biases that gets the rows of log.jsonl as well
# data
dataset = "tales"     # a text file, a folder or a name that `python data/prepare.py --help` lists
tokenizer = "bpe"           # bpe (trained on the data), byte, gpt2; with init_from: the model's
vocab_size = 2048           # pieces of the bpe tokenizer, special tokens included
# model, of random weights
n_layers = 8 if _on_gpu else 4      # transformer blocks
n_heads = 8 if _on_gpu else 4       # attention heads
dim = 512 if _on_gpu else 192       # width
seq_len = 512 if _on_gpu else 128   # tokens of a document at most; longer ones are cut
look_beside = True          # two heads begin by looking at the token before and the one after
# edits
editing = "flows"           # flows (Edit Flows), tokens (LLaDA2.2), replace (LLaDA2.1)
source = "mixed"            # x_0: nothing, masks, damage, gap; mixed: nothing, damage or gap
num_masks = 32              # of source masks, however long the text is
max_damage = 24             # random edits at most of source damage
edit_threshold = 0.5        # of tokens, replace: sample.py edits where the model is surer than this
# of flows
schedule = "cubic"          # kappa_t: linear, cubic (dLLM), cube (t^3, Edit Flows), cosine
time_features = 64          # sines and cosines of t that the model is told; 0: not told (dLLM)
max_weight = 20.0           # the loss weight is clipped here, the NELBO is not; 0: no clipping
per_token = False           # each text counts by its length, once; True: all texts the same (dLLM)
# optimizer
batch_size = 64 if _on_gpu else 16  # documents a step and process
grad_accum = 1              # steps of batch_size documents before each update
optimizer = "muon"          # muon (AdamW for embeddings, heads and norms) or adamw
learning_rate = 3e-3        # AdamW's peak
embedding_lr = 0.05         # AdamW's for the embedding, whose numbers are of size 1
muon_lr = 0.02              # Muon's peak
if common.given("init_from", init_from) and not _tiny:
    optimizer, learning_rate = "adamw", 1e-4            # of a trained model
weight_decay = 0.0          # of the blocks' matrices
beta2 = 0.99                # AdamW's second moment
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
warmup = 0.02               # share of the run in which the learning rate rises
decay = "linear"            # linear or cosine: how it falls to 0
max_steps = 0               # updates; 0: as many as fit into max_minutes
max_minutes = 8.0 if _on_gpu else 20.0  # unless max_steps is set; the learning rate follows it
# evaluation
eval_interval = 200       # updates between evaluations, checkpoints and samples; 0: at the end only
eval_tokens = 2**14         # validation tokens of an evaluation on the way
final_eval_tokens = 2**17   # and of the last one
sample_tokens = 64          # steps of the samples shown on the way; 0: none
settings = common.override(globals())

# ---- process -------------------------------------------------------------------------------------
common.check(
    settings,
    at_least_1=["n_layers", "n_heads", "dim", "batch_size", "grad_accum", "num_masks",
                "max_damage", "eval_tokens", "final_eval_tokens"],
    positive=["learning_rate", "embedding_lr", "muon_lr"],
    not_negative=["time_features", "max_weight", "weight_decay", "grad_clip", "max_steps",
                  "max_minutes", "eval_interval", "sample_tokens"],
    shares=["warmup"], below_1=["beta2"],
    editing=["flows", "tokens", "replace"], source=list(SOURCES), schedule=list(FLOW_SCHEDULES),
    optimizer=["muon", "adamw"], decay=["linear", "cosine"])
if not (max_steps or max_minutes):
    raise ValueError("max_steps and max_minutes are both 0: say when to stop")
common.note_without_effect(f"max_steps {max_steps}", max_minutes=max_steps == 0)
if is_chat(dataset):
    raise ValueError(f"{dataset} holds conversations, and this recipe learns from whole texts: "
                     "finetune_llada.py takes it")
if not 0 <= edit_threshold <= 1:
    raise ValueError(f"edit_threshold must be between 0 and 1, got {edit_threshold}")
for name in ("schedule", "time_features", "max_weight", "per_token"):
    if editing != "flows" and common.given(name, None) is not None:
        raise ValueError(f"{name} is of --editing=flows: {editing} knows no time and no rates")
common.note_without_effect("editing flows", edit_threshold=editing != "flows")
common.note_without_effect(f"source {source}", num_masks=source == "masks",
                           max_damage=source in ("damage", "mixed"))
if seq_len < 2:
    raise ValueError(f"seq_len must be at least 2, a token to begin with and one of text, got "
                     f"{seq_len}")
device, rank, world_size = common.init_process(device, threads)
autocast = common.autocast(device, dtype)           # of training steps; weights stay float32
check_target("out_dir", out_dir, init_from)
folder = make_folder(out_dir)       # fail early if it cannot be written to
settings["resume"] = resumes(resume, folder)

# ---- data ----------------------------------------------------------------------------------------
base = None
if init_from and not _tiny:
    base = Transformer.from_pretrained(init_from, dtype=torch.float32)
    text = Tokenizer.from_pretrained(model_folder(init_from))
    if base.config.mask_token_id is None:       # some configs leave both to the tokenizer (Dream)
        base.config.mask_token_id = text.mask_token_id
    if base.config.eos_token_id is None:
        base.config.put_end_first(text.eos_token_id)
    data_folder = common.first_on_rank_0(prepare, dataset, text, vocab_size)
else:
    data_folder = common.first_on_rank_0(prepare, dataset, tokenizer, vocab_size)
    text = Tokenizer.from_pretrained(data_folder)
if _tiny:
    family = init_from.partition(":")[2] or "llada"
    base = tiny_model(family, text, 2 * seq_len, seed, dim=dim, n_layers=n_layers, n_heads=n_heads)
data = TokenDataset(data_folder)
roles = [text.bos_token_id, text.eos_token_id]
first = next((token for token in roles if token is not None), None)     # stands before every text
if first is None:
    raise ValueError(f"the tokenizer of {init_from or dataset} has no token to begin a text with "
                     "(bos or eos)")
if editing != "flows" and (text.eos_token_id is None or data.mask_token_id is None):
    raise ValueError(f"the tokenizer of {init_from or dataset} has no end of text or no mask to "
                     "fill a block with: take --editing=flows")
documents = Documents(data, first, seq_len)
alphabet = alphabet_of(text, data.vocab_size)
how = SourceSettings(alphabet, data.mask_token_id, num_masks, max_damage)
val_source = "nothing" if source == "mixed" else source     # what a flow's bound is measured from


def pair(x_1, name, *numbers):
    """The alignment (z_0, z_1) of a text with one to begin with, or the block (x_t, labels) that it
    becomes where tokens are edits; drawn from a stream of its own."""
    rng = random.Random(common.seed_for("source", seed, *numbers))
    if editing == "flows":
        return align_answer(SOURCES[name](x_1, rng, how), x_1, prompt_len=1)
    x_0, share = block_source(x_1, name, rng, how)
    return spoiled(x_0, x_1, share, rng, seq_len, text.eos_token_id, orders)


def pairs_of_step(step):
    """The pairs of each micro-step of this process, two tensors [B, Z]. Prepared beside the step
    before."""
    found = []
    for micro_step in range(grad_accum):
        piece = micro_step * world_size + rank
        texts = documents.batch("train", batch_size, seed, step, piece, slices)
        begin = piece * batch_size
        found.append(stack([pair(x_1, source, step, begin + i) for i, x_1 in enumerate(texts)]))
    return found


slices = grad_accum * world_size                    # of a step, batch_size documents each
val_texts = documents.some("val", max(eval_tokens, final_eval_tokens))

# ---- model ---------------------------------------------------------------------------------------
masks_to_begin = num_masks if source == "masks" else 0
if base is None:
    fields = dict(
        vocab_size=data.vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads,
        max_len=2 * seq_len, mask_token_id=data.mask_token_id, eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id)
    if editing == "flows":
        fields |= dict(edits=True, edit_schedule=schedule, edit_masks=masks_to_begin,
                       time_features=time_features)
    model = Transformer(Config(**fields)).init_weights(seed)
    if look_beside:
        model.look_beside()
elif editing == "flows":
    model = become_editor(base, schedule, time_features, masks_to_begin, seed)
    longest, grown = model.config.max_len, seq_len + max_damage
    if 2 * seq_len > longest:                       # on its way a text may be as long as both ends
        raise ValueError(f"{init_from} has a context of {longest} tokens, and texts grow to twice "
                         f"seq_len {seq_len}: take --seq_len={longest // 2}")
    is_damaged = source in ("damage", "mixed")
    if is_damaged and model.config.positions == "learned" and grown > longest:
        raise ValueError(f"{init_from} has positions for {longest} tokens, and damaged texts grow "
                         f"to {grown}: take --max_damage={longest - seq_len}")
    model.head.requires_grad_(not model.config.keeps_head)
else:
    model = base
if editing != "flows":
    model = become_corrector(model, seq_len, edit_threshold, has_orders=editing == "tokens")
elif masks_to_begin >= model.config.max_len:
    raise ValueError(f"num_masks {num_masks} and the token before them do not fit into the context "
                     f"of {model.config.max_len}: take --num_masks={model.config.max_len - 1}")
model, config = model.to(device).train(), model.config
orders = orders_of(config)
if compile:
    model.compile_blocks()

# ---- optimizer -----------------------------------------------------------------------------------
optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, beta2, weight_decay,
                             embedding_lr if base is None else None)
must_match = {name: settings[name] for name in (
    "init_from", "n_layers", "n_heads", "dim", "seq_len", "editing", "source", "num_masks",
    "max_damage", "schedule", "time_features", "per_token", "tokenizer", "optimizer",
    "weight_decay", "beta2", "seed")}
must_match["dataset"] = data.fingerprint
must_match["batch_size * grad_accum * processes"] = batch_size * grad_accum * world_size


def save_model():
    """The model, for sample.py and the next recipe."""
    if run.main:
        save(model, out_dir)


run = Run(settings, model, optimizers, text, device, must_match,
          flops_per_token(model, seq_len, head_share=0.5), save_model)


def evaluate(tokens):
    """(NELBO, standard error, bytes per token) on so many validation tokens, always with the same
    times and edits: of texts out of nothing, a bound on -log p(text) as the other recipes have it,
    the length included. The processes divide the passes."""
    texts = val_texts[:len(documents.some("val", tokens))]
    model.eval()
    if editing == "flows":
        pairs = stack([pair(x_1, val_source, i, i) for i, x_1 in enumerate(texts)])     # [N, Z]
        value, error = edit_nelbo(model, *pairs, seed=seed, run_passes=common.share)
    else:
        value, error = bound_of_blocks(model, texts, seq_len, text.eos_token_id, seed)
    model.train()
    return value, error, data.bytes_per_token("val")


def show_sample():
    """A text out of nothing, and a damaged one repaired, as far as the model has come."""
    x_1 = val_texts[run.step % len(val_texts)]
    rng = random.Random(run.step)
    begins = [[first] + [config.mask_token_id] * config.edit_masks,
              SOURCES["damage"](x_1, rng, how)[:seq_len]]
    model.eval()
    edit = rewrite if editing == "flows" else correct
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # a young model lets texts grow without end
        written, repaired = edit(model, begins, sample_tokens, [1, 1], temperature=0.7,
                                 seed=run.step)
    model.train()
    shown = [text.decode(ids, skip_special_tokens=True) for ids in (written, begins[1], repaired)]
    run.say(f"step {run.step}: {shown[0]!r}\n  repair: {shown[1]!r} -> {shown[2]!r}")


# ---- loop ----------------------------------------------------------------------------------------
# All randomness of a step follows from (seed, step). Each process draws the noise of the whole step
# and takes its slices: the result does not depend on how many processes share the work.
G = slices * batch_size                             # documents of a step
Z = 2 * seq_len + max_damage + num_masks            # columns of an alignment at most
divisor = grad_accum
if editing == "flows" and not per_token:
    divisor *= seq_len      # nats a text are made nats a token of a full one: grad_clip suits those
ahead = Ahead(pairs_of_step)
run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data.train):,} training "
        f"tokens, edits from {source} on {device}")
while run.goes_on():
    factor = learning_rate_factor(run.progress, warmup, decay)
    if run.evaluates():
        run.save()                              # first: a resumed run repeats what a kill cut short
        run.log(*evaluate(final_eval_tokens if run.finished else eval_tokens), factor)
        if sample_tokens and run.main:
            show_sample()
        run.bar.begin_window()
    if run.finished:
        break
    set_learning_rate(optimizers, factor)

    noise = common.stream("noise", seed, run.step)
    t = 1 - sample_t((G,), noise)                   # 0: x_0, 1: x_1                        [G]
    u = torch.rand((G, Z), generator=noise)         # which columns are edited at t         [G, Z]
    tokens = 0
    for micro_step, pairs in enumerate(ahead(run.step)):
        piece = micro_step * world_size + rank
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        before, after = pairs[0].to(device), pairs[1].to(device)                        # [B, Z]
        with autocast:
            if editing == "flows":
                loss = edit_loss(model, before, after, t[rows], u[rows, :before.shape[1]],
                                 schedule, max_weight, per_token)
            else:
                loss = label_loss(model, before, after)
        (loss.loss / divisor).backward()
        run.count(loss)
        tokens += loss.count
    average_gradients(model)                        # over the processes
    clip_gradients(model, grad_clip)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    run.end_step(tokens=tokens * world_size)

run.finish()
common.end_process()
