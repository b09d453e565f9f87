"""train_grpo.py: a model learns what it is rewarded for, a resumed run is the same run, and what it
is built of: tasks, rollouts, adapters that step aside."""
import json
import random
import shutil

import pytest
import torch
from runs import SOLVE_RATE, equal, learned, rows, succeed
from scripts import ROOT, run_here
from tiny import tiny_model

from common import stream
from data import tasks
from data.chat_sets import conversations, find_parts, is_chat
from data.files import VAL_FRACTION, hash_fraction
from data.gym import conversations as gym_conversations
from data.hub import offline
from data.rewards import find_reward
from data.sudoku import is_solved
from data.tasks import Example, find_task
from data.tokenizer import Tokenizer
from evaluation.likelihood import sharp_sets
from model import Transformer
from passes import masked_nll
from policy import bound, logps_of, trace
from sampling.rollouts import Asker, collate
from sampling.sampler import Sampler
from training.lora import add_lora, init_lora, without_adapters
from training.reward_run import frozen_reference

SETTINGS = dict(seq_len=96, max_new_tokens=6, system="", rollout_size=4, steps=3, block_length=0,
                remasking="low_confidence", threshold=0.0, cache="none", cfg_scale=0.0)


def learning_model():
    """A small model whose blocks do something."""
    model = tiny_model()
    for number, block in enumerate(model.blocks):
        for matrix in (block.attn.o.weight, block.mlp.down.weight):
            with torch.no_grad():
                matrix.copy_(0.2 * torch.randn(matrix.shape, generator=stream("w", number)))
    return model


class Repeat:
    """A task for random models: any prompt."""
    name, kind, own = "repeat", "text", None

    def example(self, split, number):
        return Example("abc"[:number % 3 + 1] * (number + 1), "x")


# --------------------------------------------------------------------------------------------------
# The recipe


def test_a_model_learns_what_is_rewarded_and_resumes(small, letters, published, tmp_path):
    """More small letters after eight steps; and two runs that are one run."""
    settings = ["--max_steps=8", "--eval_interval=4", "--warmup=0", "--learning_rate=0.03",
                "--max_new_tokens=8", "--grad_clip=1", "--prompts=4", "--batch_size=64",
                "--estimator=diffu", f"--reward={letters}", f"--init_from={published('llada')}"]
    result = run_here(*small("train_grpo.py", tmp_path / "whole", *settings))
    succeed(result)
    log = rows(tmp_path / "whole")
    assert [row["step"] for row in log] == [0, 4, 8]
    assert log[2]["reward"] > log[1]["reward"]
    assert {"solve_rate", "solve_stderr", "val_reward", "length", "kl", "clipped"} <= log[1].keys()
    assert (tmp_path / "whole" / "reward.png").exists()
    short = [*settings, "--max_steps=4"]
    succeed(run_here(*small("train_grpo.py", tmp_path / "parts", *short)))
    again = [*settings, "--resume=True"]
    succeed(run_here(*small("train_grpo.py", tmp_path / "parts", *again)))
    assert rows(tmp_path / "parts") == log
    assert equal(learned(tmp_path / "parts"), learned(tmp_path / "whole"))


@pytest.mark.parametrize("settings", [
    "--estimator=trace --lora_rank=2 --beta=0.1 --inner_updates=2 --trace_together=2",
    "--estimator=bound --objective=spg --bound_samples=2",
    "--estimator=bound --bound_sets=dealt --bound_samples=6 --beta=0.1 --scale_advantages=True",
    "--objective=wd1 --leave_one_out=True",
])
def test_every_estimator_and_objective_runs(settings, small, letters, published, tmp_path):
    family = "Dream" if "wd1" in settings else "llada"
    result = run_here(*small("train_grpo.py", tmp_path, "--max_steps=1", "--eval_interval=0",
                             f"--reward={letters}", f"--init_from={published(family)}",
                             *settings.split(" ")))
    succeed(result)
    row = rows(tmp_path)[-1]
    assert row["train_loss"] > 0
    if "--beta" in settings:
        assert row["kl"] >= 0


def test_equal_rewards_are_told_and_the_run_goes_on(small, published, tmp_path):
    result = run_here(*small("train_grpo.py", tmp_path, "--max_steps=2", "--eval_interval=0",
                             f"--init_from={published('llada')}"))
    succeed(result)
    assert result.out.count("note: all rewards") == 1
    assert rows(tmp_path)[-1]["alike"] == 1


def test_a_reward_that_fails_now_and_then_is_told_and_the_run_goes_on(small, published,
                                                                      tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(prompt, answer, reference):\n"
                    "    f.count += 1\n"
                    "    return 1 / (f.count % 3)\n"
                    "f.count = 0\n")
    result = run_here(*small("train_grpo.py", tmp_path / "out", "--max_steps=2",
                             "--eval_interval=0", f"--reward={file}:f",
                             f"--init_from={published('llada')}"))
    succeed(result)
    assert result.out.count("note: a reward failed and counts 0: the reward") == 1


@pytest.mark.parametrize("name, words", [
    ("raises", "raised ZeroDivisionError: division by zero for the answer"),
    ("words", "returned 'good', which is no number, for the answer"),
    ("endless", "took longer than 0.01 s for the answer"),
])
def test_a_reward_that_always_fails_ends_the_run(name, words, small, published, tmp_path):
    """With one line."""
    file = tmp_path / "bad.py"
    file.write_text("def raises(prompt, answer, reference): return 1 / 0\n"
                    "def words(prompt, answer, reference): return 'good'\n"
                    "def endless(prompt, answer, reference):\n    while True: pass\n")
    result = run_here(*small("train_grpo.py", tmp_path / "out", f"--reward={file}:{name}",
                             "--reward_seconds=0.01", f"--init_from={published('llada')}"))
    assert result.status == 2
    assert result.err.count("error: ") == 1 and words in result.err


def test_a_reference_must_have_the_policys_tokens(published, tmp_path):
    """Two checkpoints of one size may have learned other tokenizers."""
    ours, other = published("llada"), tmp_path / "other"
    shutil.copytree(ours, other)
    file = other / "tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(words))
    model = Transformer.from_pretrained(ours)
    assert frozen_reference(model, str(ours), "policy", ours, 0, "cpu") is not None
    with pytest.raises(ValueError, match="not the policy's base: its tokenizer has other tokens"):
        frozen_reference(model, str(other), "policy", ours, 0, "cpu")


def test_a_reference_may_be_the_base_by_another_path(published, monkeypatch):
    """Then there is none: the policy without its adapters is it."""
    ours = published("llada")
    monkeypatch.chdir(ours.parent)
    assert frozen_reference(None, ours.name, "policy", ours, 2, "cpu") is None


def test_a_tiny_model_needs_no_other_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = succeed(run_here(
        "train_grpo.py", "--init_from=tiny", "--max_steps=1", "--prompts=2", "--group_size=2",
        "--eval_prompts=2", "--eval_interval=0", "--max_new_tokens=2", "--threads=1",
        "--device=cpu", "--dtype=float32", "--sample_tokens=0", f"--out_dir={tmp_path}"))
    assert SOLVE_RATE.fullmatch(result.out.splitlines()[-1])


def test_plan_says_what_a_step_takes():
    result = run_here("train_grpo.py", "--plan=True", "--init_from=tiny", "--lora_rank=8",
                      "--estimator=trace", "--batch_size=6", "--seq_len=64", "--memory_gb=80",
                      "--max_new_tokens=16", "--trace_together=2", "--checkpointing=True")
    succeed(result)
    assert "tiny: LoRA of rank 8, 8 x 64 tokens a pass, 8 views an answer (trace)" in result.out
    logits = 3 * 4 * 8 * 16 * 260 / 1e9
    assert f"logits      {logits:9.3f}   of 16 tokens of each answer" in result.out
    assert "fits into 80 GB: yes" in result.out


# --------------------------------------------------------------------------------------------------
# Rollouts


def test_what_the_system_says_needs_a_question():
    task = Repeat()
    task.name, task.kind = "beginnings", "text"
    sampler = Sampler(learning_model(), Tokenizer.bytes(), "tiny")
    with pytest.raises(ValueError, match="system .* and task beginnings asks none"):
        Asker(sampler, task, SETTINGS | dict(system="Go on."))


def test_rollouts_are_the_samplers_and_know_their_steps():
    """Answers are those of one prompt alone, and the steps are those in which tokens were
    written."""
    sampler = Sampler(learning_model(), Tokenizer.bytes(), "tiny")
    asker = Asker(sampler, Repeat(), SETTINGS)
    canvases = [asker.question("train", number)[1] for number in range(6)]
    together = asker.write(canvases, list(range(6)), temperature=1.0)
    for number, canvas in enumerate(canvases):
        alone = asker.write([canvas], [number], temperature=1.0)[0]
        assert alone == together[number]
        assert alone.tokens[:len(canvas) - 6] == canvas[:-6]
    answers = collate(together)
    for b, one in enumerate(together):
        steps = [step for step, given in zip(one.step, one.prompt) if not given]
        assert sorted(steps) == [0, 0, 1, 1, 2, 2]
        assert answers.answer[b].sum() == sum(one.answer)
        ends = [i for i, token in enumerate(one.tokens) if token == 256 and not one.prompt[i]]
        assert one.ended == bool(ends)
        if ends:
            assert not any(one.answer[ends[0] + 1:]) and one.answer[ends[0]]
    assert not answers.shown[0, len(together[0].tokens):].any()


def test_a_question_that_is_too_long_is_passed_over_for_another():
    """In a set of eight, too, which begins anew after the last one."""
    class Eight(Repeat):
        def example(self, split, number):
            return Example("x" * (200 if number % 8 == 3 else number % 8), "x")

    sampler = Sampler(learning_model(), Tokenizer.bytes(), "tiny")
    example, canvas = Asker(sampler, Eight(), SETTINGS).question("train", 3)
    assert len(example.prompt) < 8 and len(canvas) <= 96


def test_trace_gives_the_probabilities_with_which_tokens_were_drawn():
    """At temperature 1 and in random order, one token a step: the sampler draws from softmax, so
    the first step's tokens have the frequencies that `trace` says."""
    sampler = Sampler(learning_model(), Tokenizer.bytes(), "tiny")
    asker = Asker(sampler, Repeat(), {**SETTINGS, "remasking": "random", "max_new_tokens": 1,
                                      "rollout_size": 500, "steps": 1})
    canvas = asker.question("train", 1)[1]
    rollouts = asker.write([canvas] * 1500, list(range(1500)), temperature=1.0)
    token = max(set(one.tokens[-1] for one in rollouts),
                key=[one.tokens[-1] for one in rollouts].count)
    share = sum(one.tokens[-1] == token for one in rollouts) / 1500
    one = next(one for one in rollouts if one.tokens[-1] == token)
    answers = collate([one])
    with torch.no_grad():
        p = logps_of(sampler.model, answers, trace(answers, 257)).sum().exp().item()
    assert abs(share - p) < 4 * (p * (1 - p) / 1500) ** 0.5 + 1e-3


def test_grids_are_filled_where_they_are_empty():
    sampler = Sampler.load("checkpoints/sudoku6", dtype=torch.float32)
    task = find_task("sudoku6:4")
    asker = Asker(sampler, task, {**SETTINGS, "steps": 0})
    example, canvas = asker.question("val", 0)
    one = asker.write([canvas], [0], temperature=0.0)[0]
    grid = [int(digit) for digit in one.text]
    assert task.own.function(example, one.text) == is_solved(grid, example.facts["puzzle"])
    assert sum(one.answer) == 4 and sorted(set(one.step)) == [0, 1, 2, 3]


def test_sharp_sets_are_the_same_estimate_as_log_likelihoods():
    """policy.bound with the dealt sets is what Design.estimate makes of the same answers."""
    from evaluation.likelihood import choose_sets

    model, T = learning_model().double(), 8
    tokens = torch.randint(0, 200, (1, T), generator=stream("tokens", 0))
    design = choose_sets(T, 12, "dealt", stream("sets", 0))
    with torch.no_grad():
        nll = masked_nll(model, tokens.expand(len(design.masks), -1), design.masks)
        expected, _ = design.estimate(nll.double())
        whole = torch.ones(1, T, dtype=torch.bool)
        answers = collate_of(tokens, whole)
        views = bound(answers, 257, stream("sets", 0), 12, sets=sharp_sets)
        found = logps_of(model, answers, views).sum()
    assert abs(found + expected) < 1e-3 * abs(expected)


def collate_of(tokens, whole):
    from policy import Answers

    return Answers(tokens, ~whole, whole, whole)


def test_adapters_step_aside():
    model = learning_model()
    tokens = torch.randint(0, 200, (2, 8), generator=stream("tokens", 0))
    before = model(tokens).detach()
    add_lora(model, 2, 4.0)
    init_lora(model, 0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.fill_(0.1)
    assert not torch.allclose(model(tokens), before, atol=1e-3)
    with without_adapters(model):
        assert torch.equal(model(tokens), before)
    assert not torch.allclose(model(tokens), before, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# Tasks


def test_questions_are_functions_of_their_number_and_held_out():
    for name in ("sudoku6", "tales", "tales_chat"):
        first, again = find_task(name), find_task(name)
        assert first.example("train", 3) == again.example("train", 3)
        assert first.example("train", 3) != first.example("train", 4)
        assert first.example("train", 3) != first.example("val", 3)


def test_tales_and_grids_reward_what_is_right():
    tales = find_task("tales")
    example = tales.example("val", 1)
    half = example.answer[:len(example.answer) // 2]
    assert tales.own.function(example, example.answer) == 1
    assert 0 < tales.own.function(example, half) < 1
    assert tales.own.function(example, "Nobody says so.") == 0
    grids = find_task("sudoku6:5")
    example = grids.example("val", 1)
    assert grids.own.function(example, example.answer) == 1
    blank = example.facts["puzzle"].index(0)
    wrong = list(example.answer)
    wrong[blank] = str(int(wrong[blank]) % 6 + 1)
    assert grids.own.function(example, "".join(wrong)) == 0.8
    units = find_reward("units").function       # a row, a column and a box are wrong then
    assert units(example, example.answer) == 1
    assert units(example, "".join(wrong)) == pytest.approx(15 / 18)
    given = example.facts["puzzle"].index(next(filter(None, example.facts["puzzle"])))
    wrong[given] = str(int(wrong[given]) % 6 + 1)
    assert units(example, "".join(wrong)) == 0 and units(example, "12") == 0


def test_tasks_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = find_task("gym:chain_sum:max_terms=2:max_digits=1+gym:spell_backward")
    asked = [task.example("val", number) for number in range(6)]
    assert asked == [find_task(task.name).example("val", number) for number in range(6)]
    for example in asked:
        key = f"{example.prompt}\n{example.answer}"
        assert hash_fraction(key) < VAL_FRACTION
        assert task.own.function(example, f" {example.answer}\n") == 1
        assert task.own.function(example, f"so <answer>{example.answer}</answer>") == 1
        assert task.own.function(example, "") < 0.1
    trained = {task.example("train", number).prompt for number in range(60)}
    assert not trained & {example.prompt for example in asked}


def test_gym_refuses_what_it_does_not_know():
    pytest.importorskip("reasoning_gym")
    for name, words in (("gym:chainsum", "no task called 'chainsum'; did you mean 'chain_sum'"),
                        ("gym:chain_sum:terms=2", "has no option 'terms=2'"),
                        ("gym:chain_sum:min_terms=9", "cannot be made")):
        with pytest.raises(ValueError, match=words):
            find_task(name)
    with pytest.raises(ValueError, match="max_digits=2.5 cannot be made"):
        find_task("gym:chain_sum:max_digits=2.5").example("train", 0)


def test_gym_as_a_task_of_lm_evals():
    pytest.importorskip("reasoning_gym")
    from evaluation.gym_tasks import gym_task

    task, gym = gym_task("gym:chain_sum"), find_task("gym:chain_sum")
    document = task.test_docs()[3]
    example = gym.example("val", 3)
    assert task.doc_to_text(document) == example.prompt
    right = task.process_results(document, [example.answer])
    wrong = task.process_results(document, ["none"])
    assert right == {"score": 1.0, "solved": 1.0} and wrong["solved"] == 0


def test_gym_as_conversations(tmp_path):
    pytest.importorskip("reasoning_gym")
    name = "gym:chain_sum:max_terms=2"
    assert is_chat(f"{name}[train:20]+talk.jsonl") and not is_chat("tales")
    rows_of = list(conversations(find_parts(f"{name}[train:20]", tmp_path)))
    assert sum(split == "train" for split, _ in rows_of) == 20
    _, messages = next(gym_conversations(name))
    assert [message["role"] for message in messages] == ["user", "assistant"]
    task, held_out = find_task(name), set()
    for number in range(5):
        example = task.example("val", number)
        held_out.add(example.prompt)
    assert not held_out & {messages[0]["content"] for split, messages in rows_of
                           if split == "train"}


def test_a_missing_package_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        find_task("gym:chain_sum")


def test_a_task_without_a_network_names_tasks(monkeypatch):
    def fails(repository, **options):
        raise offline(repository, OSError("no route"))
        yield

    monkeypatch.setattr(tasks, "stream_rows", fails)
    with pytest.raises(ConnectionError, match=r"gsm8k \(no route\): .* or take tales, sudoku6"):
        find_task("gsm8k")


def test_a_file_of_prompts_and_answers(tmp_path):
    file = tmp_path / "sums.jsonl"
    rng = random.Random(0)
    lines = [f'{{"prompt": "{a} + {b}", "answer": "{a + b}", "numbers": [{a}, {b}]}}'
             for a, b in [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(30)]]
    file.write_text("\n".join(lines))
    task = find_task(str(file))
    prompts = {split: {task.example(split, number).prompt for number in range(40)}
               for split in ("train", "val")}
    assert prompts["val"] and not prompts["train"] & prompts["val"]
    assert len(task.example("train", 0).facts["numbers"]) == 2
    # U+2028, a line separator, is a character like others.
    lines = [f'{{"prompt": "a\u2028{number}", "answer": "1"}}' for number in range(30)]
    file.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert find_task(str(file)).example("train", 0).prompt.startswith("a\u2028")
    file.write_bytes(b'{"prompt": "a", "answer": "\xff"}')
    with pytest.raises(ValueError, match="sums.jsonl, line 1 is not JSON"):
        find_task(str(file))
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "\\ud800", "answer": "b"}')
    with pytest.raises(ValueError, match="sums.jsonl, line 2 has a text that is not Unicode"):
        find_task(str(file))
