"""experiments/gpu.py: its checks on whatever device is here, every part at toy sizes, and what
happens when one fails."""
import json
import sys

import pytest
import torch
from scripts import run

from experiments import gpu, gpu_parts
from experiments.gpu_checks import CHECKS, wrong
from experiments.gpu_yardsticks import PlainGPT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What is not installed where the occasion is.
MISSING = ("datasets", "lm_eval", "tiktoken", "gguf", "peft", "openai", "transformers", "wandb")


@pytest.fixture
def bare(monkeypatch):
    """Without the packages that are MISSING."""
    for name in MISSING:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHECKS)
def test_the_device_computes_what_the_cpu_computes(name, dtype):
    if name == "compiled" and DEVICE == "cpu":
        pytest.skip("half a minute of a compiler of C++")
    errors = CHECKS[name](DEVICE, dtype)
    assert errors and not wrong(name, errors, dtype)


def test_a_difference_is_found():
    assert wrong("engine", {"greedy": 0.1, "drawn": 0.0}, torch.float32) == {"greedy": 0.1}
    assert wrong("diffusion", {"loss": float("nan")}, torch.bfloat16)


@pytest.mark.parametrize("part", [name for name in gpu.LIMITS if name != "checks"])
def test_every_part_runs_at_toy_sizes(part, bare, tmp_path, monkeypatch):
    """`checks` is the test above."""
    def run_script(script, arguments, environment):
        result = run(script, *arguments, environment=environment)
        assert result.status == 0, result
        return result.out

    monkeypatch.setattr(gpu_parts, "run_script", run_script)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    bench = gpu_parts.Bench(part, gpu.Book(tmp_path / "own"), toy=True)
    for measure in gpu_parts.PARTS[part]:
        bench.attempt(measure)
    rows = gpu.read_figures([tmp_path / "out" / gpu.FIGURES])
    assert rows and bench.failures == 0, rows
    assert rows == gpu.read_figures([tmp_path / "own" / gpu.FIGURES])
    assert all(row.get("same_tokens", 1.0) == 1.0 for row in rows)
    assert all((row.get("gradient_error") or 0) <= 1e-5 for row in rows)


def test_limits_are_those_of_the_parts():
    assert list(gpu.LIMITS) == list(gpu_parts.PARTS)


def test_what_fails_leaves_its_traceback_and_the_next_goes_on(tmp_path):
    def breaks(bench):
        raise RuntimeError("the card is on fire")

    def works(bench):
        bench.say("works", figure=1 / 3)

    bench = gpu_parts.Bench("train", gpu.Book(tmp_path), toy=True)
    bench.attempt(breaks)
    bench.attempt(works)
    first, second = gpu.read_figures([tmp_path / gpu.FIGURES])
    assert first["failed"] == "RuntimeError: the card is on fire" and "breaks" in first["said"]
    assert second == {"part": "train", "what": "works", "figure": 0.33333} and bench.failures == 1


def test_a_part_that_hangs_or_crashes_costs_itself_alone(tmp_path, monkeypatch):
    options = gpu.read_options(["train", "blocks", f"--out_dir={tmp_path}"])
    monkeypatch.setattr(gpu, "LIMITS", {"train": 0.2, "blocks": 20})
    monkeypatch.setattr(gpu, "CHILD", ["sh", "-c", "case $0 in *train) sleep 60;; esac; exit 3"])
    assert gpu.run_all(options) == 2
    hung, crashed = gpu.read_figures([tmp_path / gpu.FIGURES])
    assert "stopped after" in hung["failed"] and crashed["failed"] == "ended with status 3"
    monkeypatch.setattr(gpu, "MINUTES", 0.0)
    assert gpu.run_all(options) == 2
    assert gpu.read_figures([tmp_path / gpu.FIGURES])[-1]["failed"] == "0 minutes are over"


def test_the_report(tmp_path):
    page, file = tmp_path / "gpu.md", tmp_path / "figures.jsonl"
    page.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    rows = [{"part": "versions", "what": "machine", "date": "2026-11-28", "card": "H100"},
            {"part": "train", "what": "ours", "tokens_per_s": 123456.0, "mfu": 0.4512},
            {"part": "train", "what": "nanoGPT's step", "failed": "out of | memory"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpu.report([file], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "### 2026-11-28, H100" in text
    assert "| ours | 123,456 | 0.4512 |  |" in text
    assert "| nanoGPT's step |  |  | out of / memory |" in text
    assert gpu.PAGE.read_text().count(gpu.BEGIN) == gpu.PAGE.read_text().count(gpu.END) == 1


@pytest.mark.parametrize("arguments, words", [
    (["trane"], "no part called 'trane'"), (["--slow"], "no option --slow"),
    (["--report"], "--report takes the files"), (["--report", "nowhere"], "there is no nowhere"),
    (["--report", __file__], "is no figure of gpu.py")])
def test_mistakes(arguments, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        options = gpu.read_options(arguments)
        gpu.report(options.report)


def test_flops_of_the_yardstick():
    """As training/flops.py counts them: 6 a weight of a product, and attention."""
    model = PlainGPT(vocab_size=100, dim=16, n_layers=2, n_heads=2, max_len=8)
    products = 100 * 16 + 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    assert model.flops_per_token(8) == 6 * products + 12 * 2 * 16 * 8
