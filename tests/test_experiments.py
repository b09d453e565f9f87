"""experiments/: what README and docs quote still runs: names, settings of recipes, two editions."""
import ast
import functools
import json

import pytest
import torch
from conftest import ROOT
from runs import command, succeed
from safetensors.torch import load_file, save_file
from scripts import run
from tiny import publish, tiny_sampler

from experiments import (
    ablate,
    bench_mixture,
    bench_sampling,
    block_schedule,
    conversions,
    edits,
    encoder,
    mixture,
    real,
    results,
    rl,
)
from experiments.against import Edition, against
from experiments.bench import COMMANDS
from experiments.bench_eval import choices_of
from experiments.bench_sampling import compare_caches, published_loop
from experiments.timing import interleaved
from model import Config, Experts, Transformer
from pretrained.load import load
from sampling.engine import generate
from sampling.sampler import Sampler

STEADY = {"MALLOC_TRIM_THRESHOLD_": "0"}        # bench.py does not start itself anew then


def constants_of(script):
    """The names that a recipe's command line knows: what its first level assigns."""
    names = set()
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.add(node.targets[0].id)
    return names


@pytest.mark.parametrize("script", ["bench", "ablate", "results", "conversions", "mixture",
                                    "block_schedule", "encoder", "real", "rl", "edits"])
def test_without_arguments_they_say_how(script):
    result = run(f"experiments/{script}.py", environment=STEADY)
    assert result.status == 2 and f"python experiments/{script}.py" in result.err


def test_commands_that_are_quoted_are_there():
    assert set(COMMANDS) == {"forward", "parity", "load", "step", "loss", "block", "blocks", "real",
                             "experts", "finetune", "sample", "serve", "eval", "against"}
    result = run("experiments/bench.py", "step", "1", "2", "3", environment=STEADY)
    assert result.status == 2 and result.err.startswith("error: ")
    with pytest.raises(ValueError, match="no part called 'speed': there are all, sample, thin"):
        COMMANDS["real"]("speed")


def test_a_recipe_that_fails_ends_the_experiment_with_its_own_line(tmp_path):
    """No traceback of the experiment behind it."""
    result = run("experiments/mixture.py", str(tmp_path), "DATASET=nothing", environment=STEADY)
    assert result.status == 2
    assert result.err.startswith("error: ") and "nothing" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_an_encoder_without_a_head_has_a_random_twin(tmp_path):
    folder = publish("bert", tmp_path / "encoder")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
    save_file(kept, folder / "model.safetensors")
    encoder.write_random_twin(str(folder), tmp_path / "twin")
    ours = load(folder, fresh_head=True)
    twin = Transformer.from_pretrained(tmp_path / "twin")
    assert twin.config.n_layers == ours.config.n_layers and twin.head.weight is twin.embed.weight
    tokens = torch.arange(6)[None]
    assert not torch.allclose(twin(tokens), ours(tokens), atol=0.1)
    assert twin(tokens).std() < 1


def test_settings_of_runs_are_settings_of_the_recipes():
    known = constants_of("train_scratch.py")
    for settings in [*results.ARMS.values(), *results.EXERCISES.values()]:
        assert set(settings) <= known
    stages = [*conversions.STAGES.values(), *block_schedule.STAGES.values(),
              *encoder.STAGES.values()]
    commands = [stage.command for stage in stages if stage.command is not None]
    commands += [["convert_ar.py", *real.CONVERT, *way] for way in real.WAYS.values()]
    commands += [["train_scratch.py", *run] for run in mixture.RUNS.values()]
    commands += [["train_grpo.py", *way] for way in rl.WAYS.values()]
    commands += [["finetune_llada.py", *rl.SUPERVISED]]
    commands += [["train_edits.py", *way] for way in edits.WAYS.values()]
    for script, *arguments in commands:
        names = {a.removeprefix("--").partition("=")[0] for a in arguments}
        assert names <= constants_of(script)


def test_arms_of_the_ablation():
    for name in ablate.ARMS:
        Config(vocab_size=300, dim=128, n_heads=4, **{
            key: value for key, value in ablate.recipe_of(name).config.items() if key != "n_heads"})
    both = ablate.recipe_of("old + adamw")
    assert (both.optimizer, both.momentum, both.zero_outputs) == ("adamw", 0.95, True)
    with pytest.raises(ValueError, match="no arm called 'new'"):
        ablate.recipe_of("old + new")


@pytest.mark.parametrize("arm", ["recipe", "plain + ema 0.99", "old + complementary masks",
                                 "low t + soft-cap 15", "autoregressive"])
def test_an_ablation_runs(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "T", 16)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 100)
    row = ablate.run(arm, str(text), seed=1, updates=2)
    assert row["arm"] == arm and row["updates"] >= 1 and 3 < row["nelbo"] < 7


@torch.no_grad()
def test_published_loops_give_our_tokens(monkeypatch):
    monkeypatch.setattr(bench_sampling, "BLOCK", 8)
    model = Transformer(Config(vocab_size=50, dim=32, n_layers=2, n_heads=2, mask_token_id=49))
    torch.nn.init.normal_(model.init_weights().head.weight, std=0.3)
    theirs, _ = published_loop(model, [1, 2, 3], 16, temperature=0.0, passes=16)
    assert theirs == generate(model, [[1, 2, 3]], 16, 16, 8)[0]
    for kind in ("prefix", "dual"):             # compares the tokens itself
        assert set(compare_caches(model, [1, 2, 3], 16, kind)) == {"theirs", "ours"}


@torch.no_grad()
def test_the_yardsticks_of_mixtures_compute_the_same(monkeypatch):
    small = dict(dim=16, n_heads=2, n_experts=6, experts_per_token=2, expert_dim=8, shared_dim=8)
    layer = Experts(Config(**small))
    for p in layer.parameters():
        p.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(bench_mixture.loop_over_experts(layer, x), layer(x), atol=1e-6)
    monkeypatch.setattr(bench_mixture, "BLOCK", 8)
    monkeypatch.setattr(bench_mixture, "MASK", 49)
    config = Config(**bench_mixture.LLADA2 | small | dict(
        vocab_size=50, mask_token_id=49, n_layers=2, n_kv_heads=2, block_length=8,
        router_groups=3, router_top_groups=2))
    model = Transformer(config).init_weights()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    model.head.weight[49] = 0
    for threshold in (0.3, 0.95):
        published = bench_mixture.reference_blocks(model, [1, 2, 3], 16, threshold)
        assert generate(model, [[1, 2, 3]], 16, block_length=8, threshold=threshold,
                        minimum=1)[0] == published[:19]


def test_loads_of_a_small_mixture(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    arguments = command("train_scratch.py", tmp_path / "out", text, *mixture.MIXTURE,
                        "--max_steps=1", "--tokenizer=bpe", "--vocab_size=300")
    succeed(run(*arguments))
    loads = mixture.loads_of(tmp_path / "out", str(text), windows=4)
    assert loads.shape == (2, 8) and torch.allclose(loads.sum(1), torch.ones(2))
    mixture.draw({"a": loads}, tmp_path / "loads.png")
    assert (tmp_path / "loads.png").stat().st_size > 5000


def test_ways_of_learning_from_rewards_are_compared(tmp_path, monkeypatch, capsys):
    """What is done is told and drawn, and nothing is trained for it."""
    monkeypatch.setattr(rl, "ROOT", tmp_path)           # there is no recipe there, and no docs/
    (tmp_path / "docs").mkdir()
    trained = dict(train_loss=0.5, reward=0.5, clipped=0.1, alike=0.2, rollout_share=0.4)
    for name, last in (("coupled-1", 0.5), ("coupled-2", 0.7), ("supervised-1", 0.4)):
        lines = [dict(step=0, elapsed_s=0.0, solve_rate=0.3),
                 dict(step=9, elapsed_s=60.0, solve_rate=last) | trained]
        if name == "supervised-1":
            lines[1] = {key: value for key, value in lines[1].items() if key not in trained}
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (folder / "done").touch()
    rl.compare(tmp_path / "out", "none", "gym:chain_sum[train:10]", "1", "1,2,3", "done")
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "0.300, then 0.600 +- 0.100 over 2 seeds, 9 steps" in told[0]
    assert told[1].startswith("supervised") and "0.400 of one seed" in told[1]
    assert (tmp_path / "docs" / "rl_compare.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no way called 'none': there are diffu, coupled"):
        rl.compare(tmp_path / "out", "none", "tales", "1", "1", "none")


def test_rollouts_are_timed_with_the_settings_of_the_recipe(tmp_path, capsys):
    publish("llada", tmp_path)
    assert rl.asking_of(["3", "--max_new_tokens=4", "--beta=1"])["max_new_tokens"] == 4
    rl.rollouts(str(tmp_path), "gym:basic_arithmetic", "3", "1", "--max_new_tokens=4")
    assert capsys.readouterr().out.rstrip().endswith("; 3 are the same")


def test_decoding_beside_the_teacher(tmp_path):
    """One question after the other, with a converted model and the teacher itself."""
    teacher, model = Sampler.load(publish("llama", tmp_path)), tiny_sampler(max_len=256)
    questions = ["a?", "b?"]
    slow = real.answer(model, questions, teacher, 8, threshold=0.0)
    fast = real.answer(model, questions, teacher, 8, threshold=1e-6)
    assert len(slow.answers) == 2 and slow.passes == 16 and fast.passes == 2
    assert 2 <= slow.tokens <= 16 and slow.seconds > 0
    assert real.answer(teacher, questions, teacher, 4).passes <= 8
    nats = real.teacher_nats(teacher, ["a?"], ["abc"])
    begin = teacher.encode_chat([{"role": "user", "content": "a?"}])
    tokens = torch.tensor([[*begin, *teacher.tokenizer.encode("abc")]])
    with torch.no_grad():
        log_p = teacher.model(tokens).log_softmax(-1)[0, len(begin) - 1:-1]
    exact = -log_p.gather(1, tokens[0, len(begin):, None]).mean()
    assert nats == pytest.approx(exact.item(), rel=1e-4)


def test_measures_of_results():
    assert results.spread(torch.tensor([[1, 1, 1, 1]])) == 0
    assert results.spread(torch.tensor([[1, 2, 1, 2]])) == pytest.approx(0.6931, abs=1e-4)
    share = results.restored([[1, 2, 3, 4], [1, 2]], [[1, 2, 3, 5], [1, 2, 3, 4]], begin=2, gap=2)
    assert share.tolist() == [0.5, 0]           # the second answer ended early


def test_choices_are_of_equal_length():
    choices = choices_of(torch.arange(1000), documents=5)
    for four in choices.values():
        assert len({len(target) for _, target in four}) == 1 and len(four) == 4


def test_interleaved():
    seen = []
    times = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, 1)
    assert "".join(seen) in ("abbaab", "baabba") and set(times) == {"a", "b"}


def test_two_editions_in_turns(capsys, monkeypatch):
    """This one against itself, which is one process then; a window is one run."""
    monkeypatch.setattr("experiments.against.Edition", functools.cache(Edition))
    monkeypatch.setattr("experiments.against.WINDOW", 0)
    against(str(ROOT), "autoregressive", rounds="2")
    title, line = capsys.readouterr().out.splitlines()
    assert line.startswith("autoregressive ") and " same tokens" in line    # time is no test's
    with pytest.raises(ValueError, match="no case called 'nothing'"):
        against(str(ROOT), "nothing")
    with pytest.raises(FileNotFoundError, match="has no model.py"):
        against(str(ROOT / "docs"))
