"""experiments/: what README and docs quote still runs: names, settings of recipes, two editions."""
import ast
import functools

import pytest
import torch
from conftest import ROOT
from scripts import run

from experiments import ablate, bench_sampling, conversions, results
from experiments.against import Edition, against
from experiments.bench import COMMANDS
from experiments.bench_eval import choices_of
from experiments.bench_sampling import compare_caches, published_loop
from experiments.timing import interleaved
from model import Config, Transformer
from sampling.engine import generate

STEADY = {"MALLOC_TRIM_THRESHOLD_": "0"}        # bench.py does not start itself anew then


def constants_of(script):
    """The names that a recipe's command line knows: what its first level assigns."""
    names = set()
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.add(node.targets[0].id)
    return names


@pytest.mark.parametrize("script", ["bench", "ablate", "results", "conversions"])
def test_without_arguments_they_say_how(script):
    result = run(f"experiments/{script}.py", environment=STEADY)
    assert result.status == 2 and f"python experiments/{script}.py" in result.err


def test_commands_that_are_quoted_are_there():
    assert set(COMMANDS) == {"forward", "parity", "load", "step", "loss", "block", "finetune",
                             "sample", "serve", "eval", "against"}
    result = run("experiments/bench.py", "step", "1", "2", "3", environment=STEADY)
    assert result.status == 2 and result.err.startswith("error: ")


def test_settings_of_runs_are_settings_of_the_recipes():
    known = constants_of("train_scratch.py")
    for settings in [*results.ARMS.values(), *results.EXERCISES.values()]:
        assert set(settings) <= known
    for stage in conversions.STAGES.values():
        if stage.command is not None:
            script, *arguments = stage.command
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
