"""train_scratch.py as a user runs it: every objective, kills and resumes, many processes, faults.
Tiny models on a generated text."""

import importlib.util
import json
import math
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import (
    LAST_LINE,
    Killer,
    contents,
    equal,
    refused,
    rows,
    same_run,
    state_of,
    succeed,
)
from safetensors import safe_open
from scripts import ROOT, Script, free_port, run, run_here, run_parallel

from data.loader import TokenDataset
from data.prepare import prepare
from data.tokenizer import Tokenizer
from diffusion import denoise, nelbo
from model import Transformer

SCRIPT = "train_scratch.py"
FILES = {
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_state.pt",
    "log.jsonl",
}
STEPS = 24


@pytest.fixture(scope="module")
def tiny(text):
    """tiny(out_dir, settings...): the command line of a run that takes a fraction of a second;
    later settings overrule earlier ones."""

    def arguments(out_dir, *settings):
        return (
            "--threads=1",
            "--dtype=float32",
            f"--dataset={text}",
            "--tokenizer=byte",
            "--dim=16",
            "--n_layers=2",
            "--n_heads=2",
            "--seq_len=16",
            "--batch_size=4",
            f"--max_steps={STEPS}",
            "--eval_interval=4",
            "--eval_tokens=64",
            "--final_eval_tokens=512",
            "--sample_tokens=0",
            f"--out_dir={out_dir}",
            *settings,
        )

    return arguments


def train(*arguments, **options):
    """The Result of a run that succeeded."""
    result = run(SCRIPT, *arguments, **options)
    assert result.status == 0, result
    return result


def loads(folder):
    """Whatever moment a run was killed at: a model.safetensors that is there is whole."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys())  # noqa: SIM118
        if (folder / "config.json").exists():
            Transformer.from_pretrained(folder)
    return True


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """unbroken(settings...): the folder of a run that nobody disturbed, made once."""
    made = {}

    def folder(*settings):
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("unbroken")
            train(*tiny(made[settings], *settings))
        return made[settings]

    return folder


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm", "ar"])
def test_a_run(tiny, text, tmp_path, objective):
    settings = f"--objective={objective}", "--max_steps=80", "--eval_interval=20"
    plots = objective == "mdlm" and importlib.util.find_spec("matplotlib") is not None
    result = train(*tiny(tmp_path, *settings, "--sample_tokens=16"), plots=plots)
    files = FILES | {"loss.png"} if plots else FILES
    assert {file.name for file in tmp_path.iterdir()} == files
    assert (
        len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    )  # safetensors alone would make its file private
    value, error, bpb = map(float, LAST_LINE.fullmatch(result.out.splitlines()[-1]).groups())

    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [20, 40, 60, 80]
    for row in log:
        assert {
            "step",
            "train_loss",
            "val_nelbo",
            "val_stderr",
            "val_bpb",
            "tokens_per_s",
            "elapsed_s",
        } <= row.keys()
        assert (
            all(math.isfinite(number) for number in row.values())
            and row["tokens_per_s"] > 0
            and row["val_stderr"] > 0
        )
    assert [row["elapsed_s"] for row in log] == sorted(row["elapsed_s"] for row in log)
    assert (
        log[-1]["val_nelbo"] < log[0]["val_nelbo"] - 0.1
        and log[-1]["train_loss"] < log[0]["train_loss"] - 0.3
        and value < math.log(260) - 1
    )

    model, tokenizer = Transformer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    data = TokenDataset(prepare(text, "byte"))
    windows = data.windows("val", 16, 512)
    again = nelbo(model, windows, seed=1337)
    assert again == pytest.approx(
        (log[-1]["val_nelbo"], log[-1]["val_stderr"]), abs=1e-5
    ) and again == pytest.approx((value, error), abs=1e-4)
    assert bpb == pytest.approx(value / math.log(2) / data.bytes_per_token("val"), abs=1e-3)
    assert model.config.causal == model.config.shift == (objective == "ar")
    assert (
        model.config.block_length == (4 if objective == "bd3lm" else 0)
        and model.config.mask_token_id == tokenizer.mask_token_id
    )

    samples = dict(re.findall(r"^step (\d+): (.*)$", result.out, re.MULTILINE))
    assert list(samples) == ["20", "40", "60", "80"]
    canvas = torch.full((1, 16), tokenizer.mask_token_id)
    if objective == "ar":
        canvas = torch.full((1, 16), model.config.vocab_size)
    canvas[0, 0] = tokenizer.bos_token_id  # a text begins where another has ended
    ids = denoise(model, canvas, 16, temperature=1.0, remasking="random", seed=80)[0]
    assert repr(tokenizer.decode(ids, skip_special_tokens=True)) == samples["80"]


@pytest.mark.parametrize(
    "settings",
    [
        ("--optimizer=adamw", "--weight_decay=0.1", "--grad_clip=0", "--decay=cosine"),
        ("--schedule=cosine", "--max_weight=0", "--beta2=0.95", "--warmup=0"),
        ("--objective=bd3lm", "--block_length=1", "--schedule=polynomial"),
        ("--objective=bd3lm", "--block_length=16", "--dtype=bfloat16"),
        ("--tokenizer=bpe", "--vocab_size=300", "--eval_interval=0", "--sample_tokens=64"),
        ("--seq_len=1", "--batch_size=1", "--sample_tokens=8"),  # many steps without a masked token
        ("--warmup=1", "--grad_accum=3"),
        (
            "--eval_tokens=1",
            "--final_eval_tokens=1",
        ),  # two sequences, or there is no standard error
    ],
)
def test_other_settings(tiny, tmp_path, settings):
    result = train(*tiny(tmp_path, "--max_steps=8", *settings))
    assert LAST_LINE.fullmatch(result.out.splitlines()[-1]) and all(
        math.isfinite(row["val_nelbo"] + row["val_stderr"]) for row in rows(tmp_path)
    )


def test_equal_seeds_make_equal_runs(tiny, unbroken, tmp_path):
    train(*tiny(tmp_path / "a"))
    same_run(tmp_path / "a", unbroken())
    other = unbroken("--seed=7")
    assert not equal(state_of(other), state_of(unbroken())) and rows(other) != rows(unbroken())
    # Evaluations and samples do not disturb the training.
    often, never = unbroken("--eval_interval=1"), unbroken("--eval_interval=0", "--sample_tokens=4")
    assert equal(state_of(often), state_of(unbroken())) and equal(
        state_of(never), state_of(unbroken())
    )
    assert [row["step"] for row in rows(often)] == list(range(1, STEPS + 1)) and [
        row["step"] for row in rows(never)
    ] == [STEPS]


# ---------------------------------------------------------------- kills and resumes


@pytest.fixture(scope="module")
def often(unbroken):
    """A run that saves after every step."""
    return unbroken("--eval_interval=1")


def resumes(folder):
    return ("--resume=True",) if (folder / "train_state.pt").exists() else ()


def test_killed_at_every_step_of_a_save(tiny, often, tmp_path):
    """The process dies before each flush and each rename of two saves, then half way through each
    file; each time it goes on."""
    deaths = [Killer(n) for n in range(1, 17)] + [Killer(2, "state"), Killer(3, "model")]
    for death in deaths:
        assert (
            run(
                SCRIPT, *tiny(tmp_path, "--eval_interval=1", *resumes(tmp_path)), before=death
            ).status
            == -signal.SIGKILL
        )
        assert loads(tmp_path)
    assert (tmp_path / "model.safetensors.tmp").exists()
    assert 2 < state_of(tmp_path)["step"] < STEPS
    train(*tiny(tmp_path, "--eval_interval=1", "--resume=True"))
    same_run(tmp_path, often)


def test_killed_at_random_moments(tiny, often, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, kills = random.Random(seed), 0
    log = tmp_path / "log.jsonl"
    for _ in range(6):
        script = Script(SCRIPT, *tiny(tmp_path, "--eval_interval=1", *resumes(tmp_path)))
        before = log.stat().st_size if log.exists() else 0
        if rng.random() < 0.8:  # else during the start
            script.wait_for(lambda: log.exists() and len(log.read_bytes()) > before)  # noqa: B023
        script.process.join(rng.uniform(0, 0.1))
        script.process.kill()
        kills += script.wait().status == -signal.SIGKILL
        assert loads(tmp_path)
    assert kills
    train(*tiny(tmp_path, "--eval_interval=1", *resumes(tmp_path)))
    same_run(tmp_path, often)


@pytest.mark.parametrize(
    "settings",
    [(), ("--objective=bd3lm", "--optimizer=adamw", "--grad_accum=2"), ("--objective=ar",)],
)
def test_ctrl_c(tiny, unbroken, tmp_path, settings):
    script = Script(SCRIPT, *tiny(tmp_path, *settings))
    assert script.wait_for(lambda: (tmp_path / "log.jsonl").exists() and rows_so_far(tmp_path) >= 2)
    script.signal(signal.SIGINT)
    result = script.wait()
    assert result.status == 0 and "Traceback" not in result.err
    stopped = re.fullmatch(
        r"stopped at step (\d+); --resume=True goes on from here", result.out.splitlines()[-1]
    )
    assert (
        stopped and 8 <= int(stopped[1]) < STEPS and state_of(tmp_path)["step"] == int(stopped[1])
    )
    train(*tiny(tmp_path, *settings, "--resume=True"))
    same_run(tmp_path, unbroken(*settings))


def rows_so_far(folder):
    return (folder / "log.jsonl").read_text().count("\n")


def test_a_finished_run_resumes(tiny, unbroken, tmp_path):
    """As it is, it only evaluates again; with more steps, it goes on."""
    shutil.copytree(unbroken(), tmp_path / "a")
    result = train(*tiny(tmp_path / "a", "--resume=True"))
    assert LAST_LINE.fullmatch(result.out.splitlines()[-1])
    same_run(tmp_path / "a", unbroken())
    train(*tiny(tmp_path / "a", "--resume=True", f"--max_steps={STEPS + 8}"))
    assert [row["step"] for row in rows(tmp_path / "a")] == list(
        range(4, STEPS + 9, 4)
    ) and state_of(tmp_path / "a")["step"] == STEPS + 8


def test_the_clock_goes_on(tiny, tmp_path):
    """--max_minutes counts the minutes before a stop, and the learning rate follows them."""
    clock = ("--max_steps=0", "--max_minutes=0.04")
    script = Script(SCRIPT, *tiny(tmp_path, *clock))
    assert script.wait_for(lambda: (tmp_path / "log.jsonl").exists() and rows_so_far(tmp_path) >= 3)
    script.signal(signal.SIGINT)
    assert script.wait().status == 0
    before = torch.load(tmp_path / "train_state.pt", weights_only=True)
    train(*tiny(tmp_path, *clock, "--resume=True"))
    after = torch.load(tmp_path / "train_state.pt", weights_only=True)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (
        0 < before["elapsed_s"] < 2.4 <= after["elapsed_s"] < 4.4
        and before["step"] < after["step"] == log[-1]["step"]
    )
    factors = [row["lr_factor"] for row in log if "lr_factor" in row]
    assert all(a > b for a, b in zip(factors[1:], factors[2:])) and factors[-1] < 0.2
    seconds = [row["elapsed_s"] for row in log]
    assert seconds == sorted(seconds)


# ---------------------------------------------------------------- many processes


def test_processes_without_a_masked_token(tiny, tmp_path):
    results = run_parallel(
        2, SCRIPT, *tiny(tmp_path, "--seq_len=2", "--batch_size=1", "--max_steps=12")
    )
    assert [result.status for result in results] == [0, 0], results


def test_torchrun_resumes(tiny, unbroken, tmp_path):
    """torchrun's own agent, on a run that two processes began, with the default optimizer."""
    settings = ("--batch_size=2", "--max_steps=12")
    whole = tiny(tmp_path / "whole", *settings)
    first = succeed(*run_parallel(2, SCRIPT, *whole))
    scripts = run_parallel(2, SCRIPT, *tiny(tmp_path / "broken", *settings), before=Killer(12))
    assert -signal.SIGKILL in [script.status for script in scripts]
    assert 4 <= state_of(tmp_path / "broken")["step"] < 12
    settings = tiny(tmp_path / "broken", *settings, "--resume=True")
    torchrun = "tests/torchrun.py", "--nproc_per_node=2", f"--master_port={free_port()}"
    result = succeed(run(*torchrun, "--master_addr=127.0.0.1", SCRIPT, *settings))
    assert result.out.splitlines()[-1] == first.out.splitlines()[-1]
    same_run(tmp_path / "broken", tmp_path / "whole")


# ---------------------------------------------------------------- faults


def test_a_real_process_exits_like_that():
    result = subprocess.run(
        [sys.executable, SCRIPT, "--n_layer=2"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == "error: no setting called 'n_layer'; did you mean 'n_layers'? (--help lists all)\n"
    )


def test_resuming_what_cannot_be_resumed(tiny, unbroken, text, tmp_path):
    """Each refusal leaves the folder as it was."""
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text(text.read_text()[100:])
    assert refused(
        run(SCRIPT, *tiny(tmp_path / "none", "--resume=True")),
        "train_state.pt does not exist: there is nothing to resume; run without --resume first",
    )
    shutil.copytree(unbroken(), folder)
    before = contents(folder)
    for setting, *words in (
        ("--dim=32", "dim was 16", "is 32 now"),
        ("--n_layers=3", "n_layers was 2"),
        ("--n_heads=4", "n_heads was 2"),
        ("--seq_len=8", "seq_len was 16"),
        ("--objective=ar", "objective was 'mdlm'"),
        ("--optimizer=adamw", "optimizer was 'muon'"),
        ("--seed=1", "seed was 1337"),
        ("--tokenizer=bpe", "tokenizer was 'byte'"),
        (f"--dataset={other}", "dataset was"),
        ("--batch_size=8", "was 4", "is 8 now"),
        ("--grad_accum=2", "was 4", "is 8 now"),
        ("--weight_decay=0.1", "weight_decay was 0.0"),
        ("--beta2=0.9", "beta2 was 0.99"),
    ):
        assert refused(
            run_here(SCRIPT, *tiny(folder, "--resume=True", setting)), "cannot resume: ", *words
        ), setting
        assert contents(folder) == before, setting
    whole = (folder / "train_state.pt").read_bytes()
    for damage in (b"", whole[:100], whole[:-100], b"x" * 1000):
        (folder / "train_state.pt").write_bytes(damage)
        before = contents(folder)
        assert refused(
            run_here(SCRIPT, *tiny(folder, "--resume=True")),
            "train_state.pt is damaged",
            "start again",
        )
        assert contents(folder) == before


def test_damaged_weights(unbroken, tmp_path):
    shutil.copytree(unbroken(), tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    whole = file.read_bytes()
    for damage in (b"", whole[:4], whole[:500], whole[:-1], whole + b"x"):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="model.safetensors is truncated"):
            Transformer.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        ("--learning_rate=inf",),
        ("--muon_lr=inf", "--eval_interval=3"),
        ("--optimizer=adamw", "--learning_rate=inf"),
    ],
)
def test_a_loss_that_is_not_finite(tiny, tmp_path, settings):
    """It ends the run with status 1, and the last checkpoint is one of before."""
    optimizer = [setting for setting in settings if "optimizer" in setting]
    train(*tiny(tmp_path, *optimizer))
    result = run(
        SCRIPT, *tiny(tmp_path, "--resume=True", "--max_steps=48", "--eval_interval=1", *settings)
    )
    assert result.status == 1 and "Traceback" not in result.err
    assert re.fullmatch(
        r"error: (the loss|a weight) is \S+ at step 2\d: lower the learning rate; "
        r"the last checkpoint is in .*",
        result.err.splitlines()[-1],
    )
    assert loads(tmp_path) and STEPS <= state_of(tmp_path)["step"] < 28
    assert all(tensor.isfinite().all() for tensor in state_of(tmp_path)["model"].values())
    train(*tiny(tmp_path, "--resume=True", "--max_steps=28", *optimizer))
    assert [row["step"] for row in rows(tmp_path)][-1] == 28


def test_a_run_that_was_replaced_is_not_resumed(tiny, tmp_path):
    """Killed or broken before its first checkpoint, the new run has nothing to resume: least of all
    the old one."""
    train(*tiny(tmp_path))
    (tmp_path / "train_state.old").mkdir()      # nor one with --fsdp, killed between two renames
    result = run(SCRIPT, *tiny(tmp_path, "--seed=7", "--learning_rate=inf", "--muon_lr=inf"))
    assert (
        result.status == 1
        and "replacing the run in" in result.out + result.err
        and result.err.splitlines()[-1].endswith("no checkpoint was written yet")
    )
    again = run(SCRIPT, *tiny(tmp_path, "--resume=True"))
    assert again.status == 2 and "there is nothing to resume" in again.err.splitlines()[-1], again
    assert loads(tmp_path)  # the old model can still be sampled


class Limit:
    """No file of this process may be larger."""

    def __init__(self, size):
        self.size = size

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def fails_for_space(result):
    assert result.status == 2 and "Traceback" not in result.err, result
    line = result.err.splitlines()[-1]
    assert (
        line.startswith("error: cannot write ")
        and "free some space or choose another folder" in line
    ), line
    return True


def test_no_space_for_a_checkpoint(tiny, unbroken, tmp_path):
    """A limit on the size of files, which every system has: too small for the state, for the
    weights, for the log."""
    shutil.copytree(unbroken(), tmp_path / "run")
    before, size = contents(tmp_path / "run"), (tmp_path / "run" / "train_state.pt").stat().st_size
    assert fails_for_space(
        run(
            SCRIPT,
            *tiny(tmp_path / "run", "--resume=True", "--max_steps=48"),
            before=Limit(size - 5000),
        )
    )
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in FILES - {"log.jsonl"}} == {
        name: before[name] for name in FILES - {"log.jsonl"}
    } and after.keys() == before.keys()
    train(*tiny(tmp_path / "run", "--resume=True", "--max_steps=48"))
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(4, 49, 4))


def test_a_full_disk(tiny, text, unbroken, tmp_path):
    """Room for everything; for no second state beside the first; for a state but no weights; for
    nothing."""
    disk, folder = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        train(*tiny(folder))
        before = contents(folder)
        state, weights = (
            (folder / name).stat().st_size for name in ("train_state.pt", "model.safetensors")
        )
        for left in (state // 2, 0):
            fill(disk, left)
            assert fails_for_space(run(SCRIPT, *tiny(folder, "--resume=True", "--max_steps=48")))
            assert {name for name in before if contents(folder)[name] != before[name]} <= {
                "log.jsonl"
            }
            (disk / "filler").unlink()
        train(*tiny(folder, "--resume=True"))
        same_run(folder, unbroken())
        shutil.rmtree(folder)
        fill(disk, state + weights // 2)
        assert fails_for_space(run(SCRIPT, *tiny(folder)))
        (disk / "filler").unlink()
        train(*tiny(folder, "--resume=True"))
        same_run(folder, unbroken())
        fill(disk, 8192)
        result = run(
            SCRIPT,
            *tiny(folder, f"--dataset={text.parent}", "--tokenizer=bpe"),
            environment={"UNMASK_DATA": str(disk / "data")},
        )
        assert refused(result, "No space left on device")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, left):
    """Leave this many bytes on a disk."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"\0" * (free - left))
