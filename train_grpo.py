"""Recipe 5: reinforcement learning: a diffusion model writes answers, a reward says which were
good, and those become more probable.

A step has two halves. First the model answers some questions, several times each, as sample.py
would. Then it learns: an answer that is better than the others of its question has a positive
advantage, a worse one a negative, and the loss moves log p(answer) accordingly (GRPO, DeepSeekMath,
arXiv 2402.03300). A diffusion model does not know log p(answer): --estimator chooses how it is
estimated, --objective what is made of it; policy.py has them all, with their papers.

    python train_grpo.py                          grids of 6 x 6: minutes on a CPU, no network
    python train_grpo.py --task=tales --init_from=checkpoints/tales --max_new_tokens=64
    python train_grpo.py --task=gym:chain_sum --init_from=out/sums      (pip install reasoning-gym)
    python train_grpo.py --task=mine.jsonl --reward=mine.py:reward --init_from=out/merged
    python train_grpo.py --plan=True --init_from=GSAI-ML/LLaDA-8B-Instruct --lora_rank=128 ...

What d1 does with LLaDA-8B stands in docs/rl.md. Then: python sample.py --checkpoint=out/grpo
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import sys
import time

import torch

from data.rewards import Judge
from data.tasks import find_task
from data.tokenizer import Tokenizer
from diffusion import Loss
from evaluation.likelihood import sharp_sets
from policy import (ESTIMATORS, group_advantages, logps_of, policy_terms, spg_terms,
                    token_weights, view_logps, wd1_weights)
from pretrained.load import fill, open_checkpoint
from sampling.rollouts import Asker, collate, mean_and_error
from sampling.sampler import Sampler
from training.finetuning import base_of_run, check_folder, check_masks, save_result
from training.lora import add_lora, init_lora, published_modules, without_adapters
from training.memory import report_of_rewards
from training.merge import check_target
from training.optimizers import (average_gradients, clip_gradients, make_optimizers,
                                 set_learning_rate)
from training.reward_run import RewardRun, check_settings, frozen_reference
from training.sharding import check_ranks_agree
from training.state import make_folder, resumes

# ---- settings: change them here or with --name=value ---------------------------------------------
# run
init_from = "checkpoints/sudoku6"   # folder or hub id; tiny, tiny:Dream: small and random
_tiny = common.given("init_from", init_from).partition(":")[0] == "tiny"
out_dir = "out/grpo"        # receives model or adapter, tokenizer, state, log.jsonl, reward.png
resume = False              # continue the run in out_dir, exactly
seed = 1337                 # questions, answers and views follow from it
device = "cuda" if torch.cuda.is_available() else "cpu"     # or a name
dtype = common.best_dtype(common.given("device", device))   # of frozen weights and products
checkpointing = False       # keep only the blocks' inputs for the backward pass
compile = False             # torch.compile
threads = 0                 # CPU threads; 0: torch's choice
wandb = ""                  # a project of Weights & Biases that gets the rows of log.jsonl as well
plan = False                # say how much memory a step takes, and stop
memory_gb = 0.0             # memory of a GPU, for the plan; 0: of the one here, else 24
# task
task = "tales" if _tiny else "sudoku6"  # sudoku6:25, gym:countdown, FILE.jsonl, ...: data/tasks.py
reward = ""                 # data/rewards.py: exact, number, ..., sums of them, FILE.py:function
reward_seconds = 5.0        # that the reward of one answer may take
system = ""                 # what the system says before a question
# answers
prompts = 8                 # questions of a step
group_size = 8              # answers to each
rollout_size = 64           # answers that are written at once
seq_len = 128 if _tiny else 1024    # tokens of prompt and answer at most
max_new_tokens = 16 if _tiny else 64    # of an answer; grids: their blanks
steps = 0                   # denoising steps; 0: one a token
block_length = 0            # tokens denoised together; 0: the whole answer
temperature = 1.0           # of answers to learn from: without variety there is nothing to compare
remasking = "random"        # which predictions a step keeps, see sample.py
threshold = 0.0             # keep all predictions of at least this probability; 0: off
cache = "none"              # none, prefix, dual, block
cfg_scale = 0.0             # classifier-free guidance, of answers and of their log p
# learning
estimator = "coupled"       # of log p(answer): diffu, coupled, trace, bound
bound_samples = 4           # of the estimator bound: views an answer
bound_sets = "even"         # which tokens they hide: even, or dealt, which vary less
trace_together = 1          # of the estimator trace: so many steps share a view
objective = "grpo"          # grpo; without a ratio: wd1, spg (with the estimator bound)
inner_updates = 2           # updates with one set of answers, each with views of its own
scale_advantages = False    # divide by their standard deviation in the group
leave_one_out = False       # compare with the others of the group only
mean = "tokens"             # tokens, answers or constant: what counts alike, policy.token_weights
clip = 0.2                  # the ratio of new to old policy counts from 1 - clip
clip_high = 0.2             # up to 1 + clip_high
beta = 0.0                  # weight of the KL to the reference; 0: none
reference = ""              # its checkpoint; empty: init_from
# what learns
lora_rank = 0               # of the adapters; 0 trains everything
lora_alpha = 64.0           # they count lora_alpha / lora_rank times
lora_targets = "q,k,v,o,gate,up,down"   # the matrices that get one
batch_size = 64             # sequences a forward and backward pass: answers times views
learning_rate = 1e-4        # AdamW's, after the warmup
weight_decay = 0.0          # of the blocks' matrices
beta2 = 0.99                # AdamW's second moment
grad_clip = 0.2             # largest norm of the gradient; 0: no clipping
warmup = 0.02               # share of the run in which the learning rate rises; then it is constant
max_steps = 0               # steps; 0: as many as fit into max_minutes
max_minutes = 5.0           # unless max_steps is set
# evaluation
eval_interval = 20          # steps between evaluations and checkpoints; 0: at the end only
eval_prompts = 128          # held-out questions, the same every time
eval_temperature = 0.0      # of the answers to them
sample_tokens = 1           # 0: show no answer on the way
settings = common.override(globals())

# ---- process -------------------------------------------------------------------------------------
check_settings(settings)
if plan:
    print(report_of_rewards(settings | {"dtype": common.given("dtype", "bfloat16")}))
    sys.exit()
device, rank, world_size = common.init_process(device, threads)
compute = common.matrix_dtype(device, dtype)
if prompts * group_size % world_size:
    raise ValueError(f"{prompts} x {group_size} answers do not divide among {world_size} processes")
check_target("out_dir", out_dir, init_from)
folder = make_folder(out_dir)
settings["resume"] = resume = resumes(resume, folder)
check_folder(folder, out_dir, lora_rank)

# ---- task ----------------------------------------------------------------------------------------
asked = find_task(task)
judge = Judge(reward, asked.own, reward_seconds)

# ---- model ---------------------------------------------------------------------------------------
base = base_of_run(init_from, folder, Tokenizer.bytes(), seq_len, seed, write=not resume)
text = Tokenizer.from_pretrained(base)
model, weights = open_checkpoint(base)      # no memory yet
config = model.config
if config.causal:
    raise ValueError(f"{init_from} is an autoregressive model ({config.family}): convert_ar.py "
                     "makes a diffusion model of it")
if config.delete_token_id is not None:
    raise ValueError(f"{init_from} inserts, deletes and substitutes: see train_edits.py")
check_masks(config, init_from)
if lora_rank:
    add_lora(model, lora_rank, lora_alpha, 0.0, lora_targets)
    published_modules(model)                # fail early: a family without names for its adapters
fill(model, weights, device, compute if lora_rank else torch.float32)
if lora_rank:
    init_lora(model, seed)
model.checkpoint_blocks = checkpointing
if compile:
    model.compile_blocks()
autocast = common.autocast(device, "float32" if lora_rank else dtype)
sampler = Sampler(model, text, init_from)   # it finds the special tokens that config.json lacks
settings["seq_len"] = min(seq_len, config.max_len)
asker = Asker(sampler, asked, settings)
example, canvas = asker.question("train", 0)    # fail early: an answer longer than the context
asker.question("val", 0)
judge.check(example)                        # fail early: a reward that is for other tasks

frozen = None                               # the reference that the KL is measured from
if beta:                                    # a resumed run makes it anew: it never changed
    frozen = frozen_reference(model, reference, init_from, base, lora_rank, device)
model.eval()                                # there is no dropout, and rollouts are half of the work
asker.write([canvas], [seed], temperature)  # fail early: a setting that the sampler refuses

# ---- optimizer -----------------------------------------------------------------------------------
learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
optimizers = make_optimizers(model, "adamw", learning_rate, beta2=beta2, weight_decay=weight_decay)
not_kept = ("out_dir", "resume", "device", "threads", "wandb", "plan", "memory_gb", "batch_size",
            "max_steps", "max_minutes", "eval_interval", "rollout_size", "sample_tokens", "compile",
            "checkpointing", "reward_seconds")
must_match = {name: value for name, value in settings.items() if name not in not_kept}
check_ranks_agree(device, **must_match)


def save_model():
    """The adapter or the model, for sample.py and the like."""
    save_result(model, folder, lora_rank, init_from, base)


run = RewardRun(settings, model, optimizers, text, device, must_match, save_model=save_model,
                sharded=True)


def answer(split, numbers, copies, temperature):
    """(Examples, Rollouts with rewards): `copies` answers to each of the questions `numbers`, those
    of a question together. The processes divide the work, and each gets all of it."""
    step = run.step if split == "train" else 0          # held-out ones are asked in the same way
    questions = [asker.question(split, number) for number in numbers for _ in range(copies)]
    mine = range(rank * len(questions) // world_size, (rank + 1) * len(questions) // world_size)
    seeds = [common.seed_for(f"{split} answer", seed, step, row) for row in mine]
    rollouts = asker.write([questions[row][1] for row in mine], seeds, temperature)
    failures = []
    judge.forgive()
    for row, rollout in zip(mine, rollouts):
        score = judge(questions[row][0], rollout.text)
        rollout.reward, rollout.solved = score.value, score.solved
        if score.failure:
            failures.append(score.failure)
    failures = sum(common.gather(failures), [])
    if len(failures) == len(questions):
        if run.step:
            run.save()                                  # nothing is lost
        raise ValueError(failures[0])
    if failures:
        run.say_once(f"a reward failed and counts 0: {failures[0]}")
    return [example for example, _ in questions], sum(common.gather(rollouts), [])


def evaluate():
    """Held-out questions, always the same: how many are solved, by the most probable answer."""
    examples, rollouts = answer("val", range(eval_prompts), 1, eval_temperature)
    rate, error = mean_and_error([float(one.solved) for one in rollouts])
    if sample_tokens:
        which = run.step % len(rollouts)
        run.say(asker.shown(examples[which], rollouts[which]))
    value, _ = mean_and_error([one.reward for one in rollouts])
    return {"solve_rate": rate, "solve_stderr": error, "val_reward": value}


# ---- loop ----------------------------------------------------------------------------------------
# All randomness of a step follows from (seed, step). Every process knows all answers, draws the
# views of all and learns from its share: the result does not depend on how many there are.
estimate = ESTIMATORS[estimator]
options = {}
if estimator == "trace":
    options = {"together": trace_together}
elif estimator == "bound":
    options = {"num_samples": bound_samples, "sets": sharp_sets if bound_sets == "dealt" else None}
scoring = dict(cfg_scale=cfg_scale, without_mask=True,      # as the sampler wrote the answers
               temperature=temperature or 1.0)      # 0: nothing is drawn
B = prompts * group_size
mine = torch.arange(rank * B // world_size, (rank + 1) * B // world_size)
run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(p.numel() for p in learning.values()):,} learn, {config.family} on {device}; {B} "
        f"answers a step, {objective} with {estimator}")
while run.goes_on():
    factor = min(1.0, run.progress / warmup) if warmup else 1.0
    if run.evaluates():                         # before the first step, too: where does it begin?
        if run.step:
            run.save()                          # first: a resumed run repeats what a kill cut short
        run.log(evaluate(), factor)
        run.bar.begin_window()
    if run.finished:
        break
    set_learning_rate(optimizers, factor)

    # Answers, and how much better each is than the others to its question.
    begin = time.perf_counter()
    numbers = range(run.step * prompts, (run.step + 1) * prompts)
    _, rollouts = answer("train", numbers, group_size, temperature)
    writing = time.perf_counter() - begin
    rewards = torch.tensor([one.reward for one in rollouts])                            # [B]
    advantages = group_advantages(rewards, group_size, scale_advantages, leave_one_out)
    alike = (rewards.view(prompts, group_size).std(dim=1) < 1e-6).float().mean()
    if alike == 1:
        run.say_once(f"all rewards of step {run.step} are the same within their groups: there is "
                     "nothing to learn from them (take easier questions, a larger group_size or a "
                     "higher temperature)")

    # Views of them for each update, and what the model says of these before the first one.
    answers = collate(rollouts)
    views, old, ref = [], [], []
    for update in range(inner_updates):
        noise = common.stream("views", seed, run.step, update)
        views.append(estimate(answers, config.mask_token_id, noise, **options))
    passes = mine.split(max(1, batch_size // len(views[0].tokens)))     # answers of each
    with torch.no_grad(), autocast:
        for seen in views:
            for rows in passes:
                some, shown = answers.rows(rows).to(device), seen.rows(rows).to(device)
                if objective == "grpo" and inner_updates > 1:
                    old.append(logps_of(model, some, shown, **scoring))                 # [b, T]
                if beta and frozen is None:
                    with without_adapters(model):
                        ref.append(logps_of(model, some, shown, **scoring))
                elif beta:
                    ref.append(logps_of(frozen, some, shown, **scoring))

    # Updates. Weights belong to the whole step: losses of parts of it add up.
    loss_weights = token_weights(answers.answer, mean)                                  # [B, T]
    log_weights = token_weights(answers.answer)         # the mean over all tokens, for kl, clipped
    for_wd1 = wd1_weights(advantages)                                                   # [B]
    kl = clipped = 0.0
    for update, seen in enumerate(views):
        for i, rows in enumerate(passes, update * len(passes)):
            some, shown = answers.rows(rows).to(device), seen.rows(rows).to(device)
            A, weight = advantages[rows].to(device), loss_weights[rows].to(device)
            with autocast:
                found = view_logps(model, some, shown, **scoring)                       # [K, b, T]
            logps = (shown.weight * found).sum(0)                                       # [b, T]
            terms = policy_terms(logps, old[i] if old else None, ref[i] if ref else None, A, clip,
                                 beta, clip_high)
            if objective == "grpo":
                loss = (weight * terms.loss).sum()
            elif objective == "wd1":
                loss = (for_wd1[rows, None].to(device) * logps + beta * weight * terms.kl).sum()
            else:
                loss = (weight * (spg_terms(found, shown.weight, A) + beta * terms.kl)).sum()
            (loss * world_size).backward()              # the mean over processes is the sum again
            run.count(Loss(loss, -logps, shown.weight.sum().item(), some.answer, None))
            kl += (log_weights[rows].to(device) * terms.kl).sum().item() / inner_updates
            clipped += (log_weights[rows].to(device) * terms.clipped).sum().item() / inner_updates
        average_gradients(model)
        clip_gradients(model, grad_clip)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
    kl, clipped = common.sum_over_ranks([kl, clipped], device)
    run.end_step(tokens=int(answers.shown.sum()))
    solved = sum(one.solved for one in rollouts) / B
    ended = sum(one.ended for one in rollouts) / B
    run.add(reward=rewards.mean(), solved=solved, length=answers.answer.sum() / B, ended=ended,
            kl=kl, clipped=clipped, alike=alike,
            rollout_share=writing / (time.perf_counter() - begin))

run.finish()
common.end_process()
