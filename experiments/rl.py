"""What reinforcement learning does to a small model, and how much each estimator's gradient varies.

    python experiments/rl.py variance CHECKPOINT TASK [DRAWS=8] [STEPS=0]
        answers of CHECKPOINT to TASK, and of each estimator's gradient: variance over draws of its
        views, passes, agreement with the sampler's own steps    -> docs/rl_variance.png
    python experiments/rl.py compare OUT CHECKPOINT TASK MINUTES SEED,... WAY,... [--name=value ...]
        train_grpo.py in each way, a key of WAYS, for so many minutes. The way `supervised` learns
        from answers instead: of grids as train_scratch.py does, and of a task gym:NAME[train:N] by
        finetune_llada.py, from N questions. What is done is not done again, what was killed goes
        on; WAY `all` takes all, `done` those of which OUT has something  -> docs/rl_compare.png
    python experiments/rl.py rollouts CHECKPOINT TASK [N=64] [ROUNDS=3] [--name=value ...]
        seconds for N answers at once and one by one, in turns

--name=value: settings of train_grpo.py. Every run takes one thread.
"""
import inspect
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.rewards import Judge  # noqa: E402
from data.tasks import find_task  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from diffusion import mask_tokens, mdlm_loss, sample_t  # noqa: E402
from evaluation.likelihood import sharp_sets  # noqa: E402
from experiments.recipes import log_of, run_recipe  # noqa: E402
from experiments.timing import interleaved  # noqa: E402
from model import Transformer  # noqa: E402
from policy import (  # noqa: E402
    bound,
    coupled,
    diffu,
    group_advantages,
    logps_of,
    token_weights,
    trace,
)
from sampling.rollouts import Asker, collate, mean_and_error  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402
from training.optimizers import clip_gradients, make_optimizers, set_learning_rate  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ASKING = dict(seq_len=1024, max_new_tokens=32, system="", rollout_size=64, steps=0, block_length=0,
              remasking="random", threshold=0.0, cache="none", cfg_scale=0.0)
PROMPTS, GROUP = 2, 8        # of variance
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
# Beside them, answers in place of rewards: finetune_llada.py, and of grids `train_on_grids`.
SUPERVISED = ["--lora_rank=0", "--seq_len=128", "--batch_size=48", "--checkpointing=False",
              "--learning_rate=1e-3", "--beta2=0.99", "--sample_tokens=0", "--eval_interval=200"]
GRIDS_A_STEP, GRIDS_RATE, GRIDS_MUON = 64, 1e-3, 5e-3

# --------------------------------------------------------------------------------------------------
# Variance


def rollouts_of(checkpoint, task, steps=0):
    """(Sampler, the rollouts of PROMPTS questions, their advantages)."""
    torch.set_num_threads(1)
    asker, asked = asker_of(checkpoint, task, {**ASKING, "steps": int(steps)})
    pairs = [asker.question("train", n) for n in range(PROMPTS) for _ in range(GROUP)]
    found = asker.write([canvas for _, canvas in pairs], list(range(len(pairs))), 1.0)
    judge = Judge("", asked.own)
    rewards = [judge(example, one.text).value for (example, _), one in zip(pairs, found)]
    advantages = group_advantages(torch.tensor(rewards), GROUP)
    if not advantages.any():
        raise ValueError(f"all answers of {checkpoint} to {task} are worth the same: there is no "
                         "gradient to compare; take another task")
    return asker.sampler, found, advantages


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


def variance(checkpoint, task, draws=8, steps=0):
    sampler, found, advantages = rollouts_of(checkpoint, task, steps)
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


def compare(out, checkpoint, task, minutes, seeds, ways, *settings):
    """Each way for each seed."""
    names, seeds = names_of(ways, out), seeds.split(",")
    table = {}
    for name in names:
        for seed in seeds:
            folder = Path(out, f"{name}-{seed}")
            if not folder.exists() and ways == "done":
                continue
            if name == "supervised":
                learn_from_answers(folder, checkpoint, task, minutes, seed, settings)
            else:
                run("train_grpo.py", folder, f"--init_from={checkpoint}",
                    f"--task={task.partition('[')[0]}", f"--max_minutes={minutes}",
                    f"--seed={seed}", *WAYS[name], *settings)
            table.setdefault(name, []).append(log_of(folder))
        tell(name, table[name])
    plot_curves(table, ROOT / "docs" / "rl_compare.png")


def names_of(ways, out):
    """The ways that a word of the command line names. ValueError for one that is none."""
    known = [*WAYS, "supervised"]
    if ways == "all":
        return known
    if ways == "done":
        return [name for name in known if any(Path(out).glob(f"{name}-*"))]
    for name in ways.split(","):
        if name not in known:
            raise ValueError(f"no way called {name!r}: there are {', '.join(known)}")
    return ways.split(",")


def run(script, folder, *settings):
    """A recipe, from where it stands to its end."""
    done = folder / "done"
    if done.exists():
        return
    run_recipe(script, folder, "--threads=1", *settings, quiet=True)
    done.touch()


def learn_from_answers(folder, checkpoint, task, minutes, seed, settings):
    """The supervised run; solve rates before and after are written where train_grpo.py has its."""
    model, log = folder / "model", folder / "log.jsonl"
    if log.exists():
        return
    if task.startswith("gym:"):
        run("finetune_llada.py", model, f"--init_from={checkpoint}", f"--dataset={task}",
            f"--max_minutes={minutes}", f"--seed={seed}", *SUPERVISED)
        updates = log_of(model)[-1]["step"]
    else:
        updates = train_on_grids(checkpoint, model, task.partition(":")[0], float(minutes),
                                 int(seed))
    rows = []
    for where, step, elapsed in ((checkpoint, 0, 0.0), (model, updates, 60 * float(minutes))):
        rate, error = solve_rate(where, task.partition("[")[0], asking_of(settings))
        rows.append(dict(step=step, elapsed_s=elapsed, solve_rate=rate, solve_stderr=error))
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def train_on_grids(checkpoint, folder, dataset, minutes, seed):
    """Go on with the bound of train_scratch.py, its optimizer at a quarter of its rates, falling to
    0. The number of updates."""
    torch.set_num_threads(1)
    model = Transformer.from_pretrained(checkpoint)
    data = TokenDataset(prepare(dataset))
    optimizers = make_optimizers(model, "muon", GRIDS_RATE, GRIDS_MUON)
    shape = (GRIDS_A_STEP, data.document_length)
    begin, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        set_learning_rate(optimizers, 1 - progress)
        noise = common.stream("noise", seed, step)
        t = sample_t((GRIDS_A_STEP, 1), noise)
        mask = mask_tokens(shape, t, noise)
        tokens = data.batch("train", *shape, seed, step)
        mdlm_loss(model, tokens, t[:, 0], mask, max_weight=10).loss.backward()
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        progress = (time.perf_counter() - begin) / 60 / minutes
    model.save_pretrained(folder)
    Tokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return step


def tell(name, runs):
    """Print a way's figures over its runs, each a list of rows of log.jsonl."""
    before = statistics.mean(rows[0]["solve_rate"] for rows in runs)
    after = [rows[-1]["solve_rate"] for rows in runs]
    mean = f"{statistics.mean(after):.3f} of one seed"
    if len(after) > 1:
        error = statistics.stdev(after) / math.sqrt(len(after))
        mean = f"{statistics.mean(after):.3f} +- {error:.3f} over {len(after)} seeds"
    steps = statistics.mean(rows[-1]["step"] for rows in runs)
    line = f"{name:12} solve rate {before:.3f}, then {mean}, {steps:.0f} steps"
    if "rollout_share" in runs[0][-1]:
        last = [rows[-1] for rows in runs]
        means = {key: statistics.mean(row[key] for row in last)
                 for key in ("reward", "train_loss", "clipped", "alike", "rollout_share")}
        line += (f"; at the end reward {means['reward']:.3f}, -log p a token "
                 f"{means['train_loss']:.3f}, clipped {means['clipped']:.1%}, groups alike "
                 f"{means['alike']:.0%}, rollouts {means['rollout_share']:.0%} of a step")
    print(line, flush=True)


def plot_curves(table, path):
    """Held-out solve rate, reward and sureness of the answers that are learned from, over minutes;
    a line a run, a colour a way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    panels = figure.subplots(1, 3)
    keys = {"solve_rate": "held-out solve rate", "reward": "reward of sampled answers",
            "train_loss": "-log p per token, estimated"}
    for number, (name, runs) in enumerate(table.items()):
        for first, rows in enumerate(runs):
            for axes, (key, label) in zip(panels, keys.items()):
                some = [row for row in rows if row.get(key) is not None]
                axes.plot([row["elapsed_s"] / 60 for row in some], [row[key] for row in some],
                          color=f"C{number}", label=name if not first else None)
                axes.set(xlabel="minutes", title=label)
                axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=120)


def asking_of(settings):
    """How train_grpo.py asks with these --name=value."""
    asking = dict(ASKING)
    for text in settings:
        name, _, value = text.removeprefix("--").partition("=")
        if name in asking:
            asking[name] = type(asking[name])(value)
    return asking


def asker_of(checkpoint, task, asking):
    """(Asker, the task) in float32."""
    sampler, asked = Sampler.load(checkpoint, dtype=torch.float32), find_task(task)
    context = min(asking["seq_len"], sampler.config.max_len)
    return Asker(sampler, asked, {**asking, "seq_len": context}), asked


def solve_rate(checkpoint, task, asking, count=128):
    """(rate, standard error), as train_grpo.py measures them."""
    asker, asked = asker_of(checkpoint, task, asking)
    pairs = [asker.question("val", n) for n in range(count)]
    found = asker.write([canvas for _, canvas in pairs], list(range(count)), 0.0)
    judge = Judge("", asked.own)
    return mean_and_error([float(judge(example, one.text).solved)
                           for (example, _), one in zip(pairs, found)])


# --------------------------------------------------------------------------------------------------
# Rollouts


def rollouts(checkpoint, task, *more):
    """Medians; processor time beside the clock, since other work does not change it."""
    numbers = [int(word) for word in more if not word.startswith("--")]
    count, rounds = (numbers + [64, 3][len(numbers):])[:2]
    torch.set_num_threads(1)
    asker, _ = asker_of(checkpoint, task, asking_of(more))
    canvases = [asker.question("train", n)[1] for n in range(count)]
    seeds = list(range(count))

    def together():
        return asker.write(canvases, seeds, 1.0)

    def one_by_one():
        return [asker.write([c], [seed], 1.0)[0] for c, seed in zip(canvases, seeds)]

    same = sum(a == b for a, b in zip(together(), one_by_one()))
    times = interleaved({"together": together, "one by one": one_by_one}, rounds, warmup=0)
    once, alone = times["together"], times["one by one"]
    print(f"{count} answers: {once.wall:.2f} s at once, {alone.wall:.2f} s one by one, "
          f"{once.wall / alone.wall:.0%} (processor time {once.cpu:.2f} s, {alone.cpu:.2f} s, "
          f"{once.cpu / alone.cpu:.0%}; goal a third); {same} are the same")


COMMANDS = {"variance": variance, "compare": compare, "rollouts": rollouts}

if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    common.show_errors_in_one_line()
    command, arguments = COMMANDS[sys.argv[1]], sys.argv[2:]
    try:
        inspect.signature(command).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{sys.argv[1]}: {error}") from None
    command(*arguments)
