"""Recipe 1: a diffusion language model from random weights, with block-diffusion and autoregressive
baselines.

The model sees text in which some tokens are masked, from few to all of them, and learns to predict
what stood there. The loss, a bound on -log p(text), weighs the noise levels so that the model can
afterwards write text out of nothing but masks (MDLM, arXiv 2406.07524; LLaDA, 2502.09992).
--objective=bd3lm does so block by block (BD3-LM, 2503.09573), --objective=ar predicts each next
token, on the same transformer. With --noise=uniform tokens become any others instead of masks
(UDLM, 2412.10193), with --noise=hybrid either (GIDD, 2503.04482).

    python train_scratch.py                               minutes on a CPU or a GPU, no network
    python train_scratch.py --max_minutes=1 --dim=64      a first look
    python train_scratch.py --dataset=notes.txt           your own text: a file or a folder
    python train_scratch.py --dataset=sudoku6             grids; then sample.py solves puzzles
    python train_scratch.py --objective=bd3lm --block_length=8
    python train_scratch.py --noise=uniform               every token may change until the end
    torchrun --nproc_per_node=4 train_scratch.py --dataset=tinystories --max_minutes=60

Then: python sample.py --checkpoint=out/scratch
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import torch

from data.loader import TokenDataset
from data.prepare import prepare
from data.sudoku import SHAPES, draw
from data.tales_copying import hidden_things
from data.tokenizer import Tokenizer
from diffusion import (SCHEDULES, ar_loss, block_loss, denoise, hybrid_loss, mask_tokens,
                       mdlm_loss, nelbo, restored, sample_t, uniform_loss)
from model import Config, Transformer
from noises import hybrid_noise, reverse, uniform_noise
from passes import canvas_mask_id
from training import balance
from training.flops import flops_per_token
from training.optimizers import (average_gradients, clip_gradients, learning_rate_factor,
                                 make_optimizers, set_learning_rate)
from training.run import Run
from training.state import make_folder, resumes

# ---- settings: change them here or with --name=value ---------------------------------------------
# run
out_dir = "out/scratch"     # receives weights, tokenizer, train_state.pt, log.jsonl, loss.png
resume = False              # continue the run in out_dir, bit for bit
seed = 1337                 # weights, order of the data and masks follow from it
device = "cuda" if torch.cuda.is_available() else "cpu"     # or mps
_on_gpu = common.given("device", device) != "cpu"
dtype = common.best_dtype(common.given("device", device))   # of matrix products: bfloat16, float32
compile = _on_gpu           # torch.compile; on a CPU it takes half a minute and pays off slowly
threads = 0                 # CPU threads; 0: torch's choice
wandb = ""                  # a project of Weights & Biases that gets the rows of log.jsonl as well
# data
dataset = "tales"     # a text file, a folder or a name that `python data/prepare.py --help` lists
_grids = common.given("dataset", dataset) in SHAPES         # sudoku, sudoku6, sudoku4
tokenizer = "bpe"           # bpe (trained on the data), byte, gpt2
vocab_size = 2048           # pieces of the bpe tokenizer at most, special tokens included
# model
n_layers = 8 if _on_gpu else 4      # transformer blocks
n_heads = 8 if _on_gpu else 4       # attention heads
dim = 512 if _on_gpu else 192       # width
seq_len = 512 if _on_gpu else 128   # tokens in a sequence; grids: whole ones, whatever this says
positions = "learned" if _grids else "rope"     # rope knows distances alone, but a grid has places
_turns = common.given("positions", positions) == "rope"
look_beside = _turns        # two heads begin by attending to the tokens before and after
n_experts = 0               # MLPs in place of each MLP, of which a token takes some; 0: one
experts_per_token = 2       # so many, together as wide as the one
balance_loss = 0.0          # weight of the loss that evens out the experts' loads, 0.01; 0: none
balance_rate = 0.0          # step by which biases do so without a loss, 0.001; 0: none
# diffusion
objective = "mdlm"          # mdlm, bd3lm, ar
block_length = 4            # bd3lm: tokens in a block
noise = "mask"              # what tokens become: mask, uniform, hybrid (noises.py; with mdlm)
uniform_share = 0.1         # hybrid: share of uniform tokens at t = 1/2, the others become masks
schedule = "linear"         # alpha_t: linear, cosine, polynomial
max_weight = 10.0           # the loss weight is clipped here, the NELBO is not; 0: no clipping
# optimizer
batch_size = 64 if _on_gpu else 16  # sequences a step and process; a CPU likes many small updates
grad_accum = 1              # steps of batch_size sequences before each update
optimizer = "muon"          # muon (AdamW for embeddings, head and norms) or adamw
learning_rate = 3e-3        # AdamW's peak
embedding_lr = 0.05         # AdamW's for the embedding, whose numbers are of size 1
muon_lr = 0.02              # Muon's peak
weight_decay = 0.0          # of the blocks' matrices
beta2 = 0.99                # AdamW's second moment
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
warmup = 0.02               # share of the run in which the learning rate rises
decay = "linear"            # linear or cosine: how it falls to 0
max_steps = 0               # updates; 0: as many as fit into max_minutes
max_minutes = 8.0 if _on_gpu else 6.5   # unless max_steps is set; the learning rate follows it
# evaluation
eval_interval = 200       # updates between evaluations, checkpoints and samples; 0: at the end only
eval_tokens = 2**14         # validation tokens of an evaluation on the way
final_eval_tokens = 2**18   # and of the last one
sample_tokens = 64          # length of the samples shown on the way; 0: none
settings = common.override(globals())

# ---- process -------------------------------------------------------------------------------------
common.check(
    settings,
    at_least_1=["n_layers", "n_heads", "dim", "seq_len", "batch_size", "grad_accum", "eval_tokens",
                "final_eval_tokens"],
    positive=["learning_rate", "embedding_lr", "muon_lr"],
    not_negative=["n_experts", "balance_loss", "balance_rate", "max_weight", "weight_decay",
                  "grad_clip", "max_steps", "max_minutes", "eval_interval", "sample_tokens"],
    shares=["warmup"], below_1=["beta2", "uniform_share"],
    objective=["mdlm", "bd3lm", "ar"], noise=["mask", "uniform", "hybrid"],
    positions=["rope", "learned"], schedule=list(SCHEDULES),
    optimizer=["muon", "adamw"], decay=["linear", "cosine"])
if not (max_steps or max_minutes):
    raise ValueError("max_steps and max_minutes are both 0: say when to stop")
common.note_without_effect(f"max_steps {max_steps}", max_minutes=max_steps == 0)
if n_experts == 0 and (balance_loss or balance_rate):
    raise ValueError("balance_loss and balance_rate are for experts: set n_experts")
if noise != "mask" and objective != "mdlm":
    raise ValueError(f"objective {objective} is for masks: noise {noise} needs --objective=mdlm")
common.note_without_effect(f"noise {noise}", uniform_share=noise == "hybrid",
                           schedule=noise != "hybrid")
common.note_without_effect(f"objective {objective}", schedule=objective != "ar",
                           max_weight=objective != "ar", block_length=objective == "bd3lm")
common.note_without_effect("n_experts 0", experts_per_token=n_experts > 0)
if objective == "ar" and seq_len < 2:
    raise ValueError("objective ar predicts each token from those before it: seq_len must be at "
                     "least 2")
device, rank, world_size = common.init_process(device, threads)
autocast = common.autocast(device, dtype)           # of training steps; weights stay float32
folder = make_folder(out_dir)       # fail early if it cannot be written to
settings["resume"] = resumes(resume, folder)

# ---- data ----------------------------------------------------------------------------------------
data_folder = common.first_on_rank_0(prepare, dataset, tokenizer, vocab_size)
data = TokenDataset(data_folder)
text = Tokenizer.from_pretrained(data_folder)
T = data.document_length or seq_len     # documents that all have one length are not cut
if objective == "bd3lm" and (block_length < 1 or T % block_length):
    raise ValueError(f"block_length {block_length} does not divide seq_len {T}")
val_tokens = max(eval_tokens, final_eval_tokens, 2 * T)     # one sequence alone has no error
val_windows = data.windows("val", T, val_tokens)                                    # [N, T]
data.batch("train", batch_size, T, seed, 0)         # fail early: less text than one sequence
has_things = dataset == "tales" and noise == "mask"
things = hidden_things(data.val, text, T) if has_things else None

# ---- model ---------------------------------------------------------------------------------------
left_to_right = objective == "ar"
config = Config(
    vocab_size=data.vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads, max_len=T,
    positions=positions, causal=left_to_right, shift=left_to_right,
    block_length=block_length if objective == "bd3lm" else 0,
    noise=noise, uniform_share=uniform_share if noise == "hybrid" else 0.0,
    mask_token_id=data.mask_token_id, eos_token_id=text.eos_token_id,
    pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id,
    n_experts=n_experts, experts_per_token=experts_per_token, router_norm=n_experts > 0,
    router_bias="choice" if balance_rate else "none")
model = Transformer(config).init_weights(seed)
if look_beside:
    model.look_beside()         # at the tokens before and after each one
model = model.to(device)
if compile:
    model.compile_blocks()

# ---- optimizer -----------------------------------------------------------------------------------
optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, beta2, weight_decay,
                             embedding_lr)
must_match = {name: settings[name] for name in (
    "objective", "block_length", "noise", "uniform_share", "n_layers", "n_heads", "dim", "seq_len",
    "positions", "n_experts", "experts_per_token", "tokenizer", "optimizer", "weight_decay",
    "beta2", "seed")}
must_match["dataset"] = data.fingerprint
must_match["batch_size * grad_accum * processes"] = batch_size * grad_accum * world_size
head_share = 1.0 if left_to_right or noise != "mask" else 0.5       # half of the tokens are masked
flops = flops_per_token(model, T, head_share)
if objective == "bd3lm":
    flops *= 2                  # a pass reads [x_t, x_0]
run = Run(settings, model, optimizers, text, device, must_match, flops)


def evaluate(tokens):
    """(NELBO, standard error, bytes per token) on so many validation tokens, always with the same
    masks, in the precision of the weights, as eval.py has it. The processes divide the passes."""
    windows = val_windows[:max(2, tokens // T)].to(device)
    value, error = nelbo(model, windows, seed=seed, run_passes=common.share)
    return value, error, data.bytes_per_token("val")


def look_back():
    """Of tales: the probability of a hidden thing that other mentions tell. A model that has not
    learned to look back gives each of the twenty things the same, 0.05."""
    if things is None:
        return {}
    found = restored(model, things.tokens.to(device), things.hidden, things.target)     # [N]
    return {"restored": found.mean().item()}


def show_sample():
    """One text out of nothing, as far as the model has come."""
    length = data.document_length or min(sample_tokens, T)
    unwritten = canvas_mask_id(model) if noise == "mask" else config.mask_token_id
    canvas = torch.full((1, length), unwritten)
    if config.bos_token_id is not None:                 # a text begins where another has ended
        canvas[0, 0] = config.bos_token_id
    elif left_to_right:                                 # something must stand before the first
        canvas[0, 0] = val_windows[0, 0]
    canvas = canvas.to(device)
    if noise == "mask":
        ids = denoise(model, canvas, length, temperature=1.0, remasking="random", seed=run.step)[0]
    else:
        ids = reverse(model, canvas, length, seed=run.step)[0]
    if _grids:
        digits = [text.decode([token], skip_special_tokens=True) for token in ids]
        run.say(f"step {run.step}:\n{draw(digits)}\n")
    else:
        run.say(f"step {run.step}: {text.decode(ids, skip_special_tokens=True)!r}")


# ---- loop ----------------------------------------------------------------------------------------
# All randomness of a step follows from (seed, step). Each process draws the noise of the whole step
# and takes its slices: the result does not depend on how many processes share the work.
slices = grad_accum * world_size                    # of a step, batch_size sequences each
G = slices * batch_size                             # sequences of a step
blocks = T // block_length if objective == "bd3lm" else 1
run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data.train):,} training "
        f"tokens, {objective} on {device}")
while run.goes_on():
    factor = learning_rate_factor(run.progress, warmup, decay)
    if run.evaluates():
        run.save()                              # first: a resumed run repeats what a kill cut short
        values = evaluate(final_eval_tokens if run.finished else eval_tokens)
        run.log(*values, factor, **look_back())
        if sample_tokens and run.main:
            show_sample()
        run.bar.begin_window()                  # the speed shown leaves out what that took
    if run.finished:
        break
    set_learning_rate(optimizers, factor)

    draws = common.stream("noise", seed, run.step)      # objective ar makes no use of it
    t = sample_t((G, blocks), draws)                                                # [G, blocks]
    alpha, _ = SCHEDULES[schedule](t)
    if noise == "mask":
        mask_prob = (1 - alpha).repeat_interleave(T // blocks, dim=1)         # [G, T]
        mask = mask_tokens((G, T), mask_prob, draws)
    elif noise == "uniform":
        mask, new = uniform_noise((G, T), alpha, data.vocab_size, draws)
    else:
        mask, new = hybrid_noise((G, T), t, data.vocab_size, data.mask_token_id, uniform_share,
                                 draws)
    counts = 0                                      # tokens of each expert, [layers, E]
    for micro_step in range(grad_accum):
        piece = micro_step * world_size + rank
        rows = slice(piece * batch_size, (piece + 1) * batch_size)
        tokens = data.batch("train", batch_size, T, seed, run.step, piece, slices).to(device)
        with autocast:
            if noise == "uniform":
                loss = uniform_loss(model, tokens, t[rows, 0], mask[rows], schedule=schedule,
                                    max_weight=max_weight, replacement=new[rows])
            elif noise == "hybrid":
                loss = hybrid_loss(model, tokens, t[rows, 0], mask[rows], max_weight=max_weight,
                                   replacement=new[rows])
            elif objective == "mdlm":
                loss = mdlm_loss(model, tokens, t[rows, 0], mask[rows], schedule=schedule,
                                 max_weight=max_weight)
            elif objective == "bd3lm":
                loss = block_loss(model, tokens, block_length, t[rows], mask[rows],
                                  schedule=schedule, max_weight=max_weight)
            else:
                loss = ar_loss(model, tokens)
            if balance_loss:
                loss.loss = loss.loss + balance_loss * balance.balance_loss(model)
        (loss.loss / grad_accum).backward()
        run.count(loss)
        if balance_rate:
            counts = counts + balance.expert_counts(model)
    average_gradients(model)                        # over the processes
    clip_gradients(model, grad_clip)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    if balance_rate:
        balance.move_biases(model, balance_rate, counts)
    run.end_step(tokens=G * T)

run.finish()
common.end_process()
