"""What reinforcement learning does to a small model, and how much each estimator's gradient varies.

    python experiments/rl.py variance CHECKPOINT TASK [DRAWS=16] [STEPS=0]
        answers of CHECKPOINT to TASK, and of each estimator's gradient: variance over draws of its
        views, passes, agreement with the sampler's own steps    -> docs/rl_variance.png
    python experiments/rl.py compare OUT CHECKPOINT TASK MINUTES SEED,... [--name=value ...]
        train_grpo.py with every estimator and objective for so many minutes each; with a task
        gym:NAME also finetune_llada.py on the same questions      -> docs/rl_compare.png
    python experiments/rl.py rollouts CHECKPOINT TASK [N=64]
        seconds for N answers at once and one by one

Every run takes one thread.
"""
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.rewards import Judge  # noqa: E402
from data.tasks import find_task  # noqa: E402
from evaluation.likelihood import sharp_sets  # noqa: E402
from policy import (  # noqa: E402
    bound,
    coupled,
    diffu,
    group_advantages,
    logps_of,
    token_weights,
    trace,
)
from sampling.rollouts import Asker, collate  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ASKING = dict(seq_len=1024, max_new_tokens=32, system="", rollout_size=64, steps=0, block_length=0,
              remasking="random", threshold=0.0, cache="none", cfg_scale=0.0)
PROMPTS, GROUP = 4, 8
ESTIMATES = {
    "diffu": diffu,
    "coupled": coupled,
    "bound, 4 even": lambda *a: bound(*a, num_samples=4),
    "bound, 4 dealt": lambda *a: bound(*a, num_samples=4, sets=sharp_sets),
    "bound, 16 even": lambda *a: bound(*a, num_samples=16),
    "bound, 16 dealt": lambda *a: bound(*a, num_samples=16, sets=sharp_sets),
    "trace, 4 together": lambda *a: trace(*a, together=4),
    "trace": trace,
}
WAYS = {
    "diffu": ["--estimator=diffu"],
    "coupled": ["--estimator=coupled"],
    "trace": ["--estimator=trace", "--trace_together=4"],
    "bound": ["--estimator=bound"],
    "dealt": ["--estimator=bound", "--bound_sets=dealt"],
    "wd1": ["--estimator=coupled", "--objective=wd1"],
    "spg": ["--estimator=bound", "--objective=spg"],
}

# --------------------------------------------------------------------------------------------------
# Variance


def rollouts_of(checkpoint, task, steps=0):
    """(Sampler, Asker, the rollouts of PROMPTS questions, their advantages)."""
    torch.set_num_threads(1)
    sampler = Sampler.load(checkpoint, dtype=torch.float32)
    asked = find_task(task)
    context = min(ASKING["seq_len"], sampler.config.max_len)
    asker = Asker(sampler, asked, {**ASKING, "seq_len": context, "steps": int(steps)})
    pairs = [asker.question("train", n) for n in range(PROMPTS) for _ in range(GROUP)]
    found = asker.write([canvas for _, canvas in pairs], list(range(len(pairs))), 1.0)
    judge = Judge("", asked.own)
    rewards = [judge(example, one.text).value for (example, _), one in zip(pairs, found)]
    advantages = group_advantages(torch.tensor(rewards), GROUP)
    if not advantages.any():
        raise ValueError(f"all answers of {checkpoint} to {task} are worth the same: there is no "
                         "gradient to compare; take another task")
    return sampler, asker, found, advantages


def gradient_of(model, answers, advantages, views):
    """The gradient of a first update, the ratio being 1: float32 [all weights]."""
    weights = token_weights(answers.answer)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rows in torch.arange(len(advantages)).split(max(1, 64 // len(views.tokens))):
        logps = logps_of(model, answers.rows(rows), views.rows(rows))
        loss = -(weights[rows] * advantages[rows, None] * logps).sum()
        for sum_so_far, g in zip(total, torch.autograd.grad(loss, model.parameters())):
            sum_so_far += g
    return torch.cat([g.flatten() for g in total])


def variance(checkpoint, task, draws=16, steps=0):
    sampler, _, found, advantages = rollouts_of(checkpoint, task, steps)
    answers, mask_id, table = collate(found), sampler.mask_id, {}
    exact = gradient_of(sampler.model, answers, advantages, trace(answers, mask_id))
    for name, estimate in ESTIMATES.items():
        gradients, passes = [], 0
        times = 1 if name.startswith("trace") else int(draws)
        for draw in range(times):
            views = estimate(answers, mask_id, common.stream("views", 0, draw))
            passes += (views.weight != 0).any(2).sum().item() / len(found) / times
            gradients.append(gradient_of(sampler.model, answers, advantages, views))
        gradients = torch.stack(gradients)                                      # [draws, weights]
        mean = gradients.mean(0)
        noise = 0.0
        if times > 1:
            noise = gradients.var(0).sum().item()
        signal = max(mean.square().sum().item() - noise / times, 1e-30)
        cosine = torch.cosine_similarity(mean, exact, dim=0).item()
        table[name] = noise / signal
        print(f"{name:18} {passes:5.1f} passes an answer, variance / signal^2 "
              f"{noise / signal:8.3f}, cosine of the mean with trace's {cosine:.3f}", flush=True)
    plot_bars(table, "variance of the gradient over the square of its mean", "rl_variance.png")


def plot_bars(table, label, name):
    """A bar for each row, in docs/."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(table)[::-1], list(table.values())[::-1])
    axes.set(xlabel=label)
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / name, dpi=120)


# --------------------------------------------------------------------------------------------------
# Comparison


def compare(out, checkpoint, task, minutes, seeds, *settings):
    """Each way for each seed; a run that is there already is not repeated."""
    table = {}
    for name, way in WAYS.items():
        rates = []
        for seed in seeds.split(","):
            folder = Path(out, f"{name}-{seed}")
            run("train_grpo.py", folder, f"--init_from={checkpoint}", f"--task={task}",
                f"--max_minutes={minutes}", f"--seed={seed}", *way, *settings)
            rows = read_log(folder)
            rates.append((rows[0]["solve_rate"], rows[-1]["solve_rate"], rows[-1]["step"],
                          rows[-1]["rollout_share"]))
        table[name] = tell(name, rates)
    if task.startswith("gym:"):
        rates = []
        for seed in seeds.split(","):
            folder = Path(out, f"supervised-{seed}")
            run("finetune_llada.py", folder, f"--init_from={checkpoint}", f"--dataset={task}",
                f"--max_minutes={minutes}", f"--seed={seed}", "--lora_rank=0", "--seq_len=128",
                "--batch_size=16", "--learning_rate=3e-4", "--eval_interval=0")
            before, after = solve_rate(checkpoint, task), solve_rate(folder, task)
            rates.append((before, after, read_log(folder)[-1]["step"], 0.0))
        table["supervised"] = tell("supervised", rates)
    plot_bars(table, "held-out solve rate", "rl_compare.png")


def run(script, folder, *settings):
    if not (folder / "log.jsonl").exists():
        command = [sys.executable, str(ROOT / script), f"--out_dir={folder}", "--threads=1",
                   *settings]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def read_log(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def tell(name, rates):
    """Print a way's figures over seeds; the mean of its last solve rates."""
    before, after, steps, shares = (list(column) for column in zip(*rates))
    error = math.nan
    if len(after) > 1:
        error = statistics.stdev(after) / math.sqrt(len(after))
    print(f"{name:12} first evaluation {statistics.mean(before):.3f}, last "
          f"{statistics.mean(after):.3f} +- {error:.3f} over {len(after)} seeds, "
          f"{statistics.mean(steps):.0f} steps, rollouts {statistics.mean(shares):.0%} of the time",
          flush=True)
    return statistics.mean(after)


def solve_rate(checkpoint, task, count=128):
    """As train_grpo.py measures it."""
    sampler, asked = Sampler.load(checkpoint, dtype=torch.float32), find_task(task)
    context = min(ASKING["seq_len"], sampler.config.max_len)
    asker = Asker(sampler, asked, {**ASKING, "seq_len": context})
    pairs = [asker.question("val", n) for n in range(count)]
    found = asker.write([canvas for _, canvas in pairs], list(range(count)), 0.0)
    judge = Judge("", asked.own)
    return statistics.mean(judge(example, one.text).solved
                           for (example, _), one in zip(pairs, found))


# --------------------------------------------------------------------------------------------------
# Rollouts


def rollouts(checkpoint, task, count=64):
    """Processor time, which other work on the machine does not change."""
    torch.set_num_threads(1)
    sampler, asked = Sampler.load(checkpoint, dtype=torch.float32), find_task(task)
    context = min(ASKING["seq_len"], sampler.config.max_len)
    asker = Asker(sampler, asked, {**ASKING, "seq_len": context})
    canvases = [asker.question("train", n)[1] for n in range(int(count))]
    seeds = list(range(len(canvases)))
    asker.write(canvases[:2], seeds[:2], 1.0)                                   # warm
    begin = time.process_time()
    together = asker.write(canvases, seeds, 1.0)
    at_once = time.process_time() - begin
    begin = time.process_time()
    alone = [asker.write([c], [seed], 1.0)[0] for c, seed in zip(canvases, seeds)]
    one_by_one = time.process_time() - begin
    same = sum(a == b for a, b in zip(together, alone))
    print(f"{count} answers: {at_once:.1f} s at once, {one_by_one:.1f} s one by one "
          f"({at_once / one_by_one:.0%}); {same} are the same")


COMMANDS = {"variance": variance, "compare": compare, "rollouts": rollouts}

if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    common.show_errors_in_one_line()
    COMMANDS[sys.argv[1]](*sys.argv[2:])
