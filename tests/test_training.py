"""training/: optimizers, the learning rate, state and log that survive a kill."""

import io
import json
import math
import os
import pickle
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from training import log as log_module
from training import optimizers as optimizers_module
from training.log import Clock, Log
from training.optimizers import (
    learning_rate_factor,
    make_optimizers,
    orthogonal,
    set_learning_rate,
)
from training.run import Run
from training.state import load_state, load_training, make_folder, save_state, save_training

# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("decay_from", [0.0, 0.5])
def test_learning_rate_rises_stays_and_falls_to_zero(decay, warmup, decay_from):
    factors = [learning_rate_factor(i / 1000, warmup, decay, decay_from) for i in range(1001)]
    top = max(warmup, decay_from)
    assert all(0 <= factor <= 1 for factor in factors)
    for i, factor in enumerate(factors[:-1]):
        if i / 1000 < warmup:
            assert factor == pytest.approx(i / 1000 / warmup)
        elif i / 1000 <= top:
            assert factor == 1
        else:
            assert factor < factors[i - 1]
    assert factors[-1] == 0 and learning_rate_factor(
        (1 + top) / 2, warmup, decay, decay_from
    ) == pytest.approx(0.5)


def test_shapes_of_the_decay():
    assert learning_rate_factor(0.25, 0, "linear") == 0.75
    assert learning_rate_factor(0.25, 0, "cosine") == pytest.approx(
        0.5 + 0.5 * math.cos(math.pi / 4)
    )


# ---------------------------------------------------------------- Muon


def test_muon_is_torchs_muon(monkeypatch):
    monkeypatch.setattr(
        optimizers_module, "matrix_dtype", lambda device, dtype: torch.bfloat16
    )  # as torch's does whatever the device
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (16, 16),
        (44, 16),
        (16, 44),
        (16, 16),
    ]  # square, tall, wide, and two that are stacked
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = (
        optimizers_module.Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # stacked products may round otherwise


def test_orthogonal():
    x = orthogonal(torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x.float())
    assert values.min() > 0.5 and values.max() < 1.3


# ---------------------------------------------------------------- state

STATE = {
    "model": {"w": torch.arange(6.0).view(2, 3)},
    "step": 7,
    "settings": {"dim": 64, "objective": "mdlm"},
}


def test_state_comes_back(tmp_path):
    path = tmp_path / "state.pt"
    (tmp_path / "state.pt.tmp").write_bytes(b"left behind by a kill")
    save_state(path, STATE)
    state = load_state(path, {"dim": 64})
    assert torch.equal(state["model"]["w"], STATE["model"]["w"]) and state["step"] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_last_state(tmp_path, monkeypatch, failing):
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def fail_as_torch_does(_, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")

    monkeypatch.setattr(
        *((torch, "save", fail_as_torch_does) if failing == "write" else (os, failing, fail))
    )
    with pytest.raises(
        OSError,
        match="cannot write .*state.pt .*free some space or choose another folder; "
        "what stood there is untouched",
    ):
        save_state(path, {"step": 8})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [
        "state.pt"
    ]


def test_state_that_is_not_there_or_does_not_match(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume; run without --resume first"):
        load_state(tmp_path / "state.pt", {})
    save_state(tmp_path / "state.pt", STATE)
    for wrong, words in (
        ({"dim": 32}, "dim was 64 in .* and is 32 now"),
        ({"objective": "ar"}, "objective was 'mdlm'"),
        ({"new": 1}, "new was None"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume: {words}"):
            load_state(tmp_path / "state.pt", wrong)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_damaged_state(tmp_path):
    path, whole = tmp_path / "state.pt", tmp_path / "whole.pt"
    save_state(whole, STATE)
    data = whole.read_bytes()
    bomb = Bomb()
    bomb.folder = str(tmp_path / "hacked")
    torch.save({**STATE, "bomb": bomb}, tmp_path / "bomb.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"step": 7}, tmp_path / "other.pt")
    for content in (
        b"",
        b"text",
        data[:10],
        data[: len(data) // 2],
        data[:-1],
        data[:-200],
        pickle.dumps({"step": 7}),
        pickle.dumps(bomb),
        *((tmp_path / name).read_bytes() for name in ("bomb.pt", "list.pt", "other.pt")),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged .*: delete it and start again"):
            load_state(path, {"dim": 64})
    assert not (tmp_path / "hacked").exists()


def test_make_folder(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("x")
    for bad in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        "/proc/nothing/here",
        "/sys",
        "bad\0name",
        "x" * 300,
    ):
        with pytest.raises((OSError, ValueError), match="cannot write to out_dir|null byte"):
            make_folder(bad)
    with pytest.raises(ValueError, match="out_dir is empty"):      # not the folder one stands in
        make_folder("")
    errors = []

    def many_times():  # all ranks of a run make the folder at once
        try:
            for _ in range(300):
                make_folder(tmp_path / "shared")
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=many_times) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_folder_in_the_home_of_who_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert make_folder("~/runs/a") == tmp_path / "home" / "runs" / "a"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_state_of_another_model_is_refused(tmp_path):
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    save_training(tmp_path, model, [], {"settings": {}, "step": 1})
    assert load_training(tmp_path, torch.nn.Linear(2, 3), [], {})["step"] == 1
    with pytest.raises(ValueError, match="holds another model than these settings make"):
        load_training(tmp_path, other, [], {})


def test_a_state_of_the_other_kind_is_named(tmp_path):
    """Nothing is said of a run that could begin anew: it would delete this one."""
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    (sharded / "train_state.old").mkdir(parents=True)
    with pytest.raises(ValueError, match="was written with --fsdp, by several processes: resume"):
        load_training(sharded, None, [], {})
    whole.mkdir()
    (whole / "train_state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="was written without --fsdp, or by one process: resume"):
        load_training(whole, None, [], {}, sharded=True)


# ---------------------------------------------------------------- log


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_log(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for step in (10, 20, 30):
        log.write(step=step, train_loss=1 / step, note="é")
    assert [row["step"] for row in rows_of(path)] == [10, 20, 30] and rows_of(path)[0][
        "train_loss"
    ] == 0.1
    with open(path, "a") as file:
        file.write('{"step": 40, "train_lo')  # cut short by a kill
    resumed = Log(path, keep_up_to=30)  # step 30 is evaluated again
    assert (
        [row["step"] for row in rows_of(path)] == [10, 20] == [row["step"] for row in resumed.rows]
    )
    resumed.write(step=30, train_loss=0.5)
    assert [row["step"] for row in rows_of(path)] == [10, 20, 30]
    resumed.write(step=40, val_stderr=math.nan)         # of one window; NaN is no JSON
    assert rows_of(path)[-1] == {"step": 40, "val_stderr": None}
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
    Log(path)  # a new run begins a new log
    assert path.read_text() == "" and Log(tmp_path / "none.jsonl", keep_up_to=5).rows == []


def test_a_log_is_never_half_rewritten(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.write(step=1)
    log.write(step=2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Log(path, keep_up_to=2)
    assert [row["step"] for row in rows_of(path)] == [1, 2]


def test_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    log = Log(tmp_path / "log.jsonl")
    log.plot(tmp_path / "empty.png")
    log.write(step=1, train_loss=float("nan"), val_nelbo=3.0, elapsed_s=1.0)
    log.write(step=2, train_loss=2.0, elapsed_s=2.0)
    log.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "empty.png"
    ).exists()
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    log.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_clock_goes_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now[0])
    clock = Clock(before=50.0)
    now[0] += 7
    assert clock.seconds() == 57


def test_wandb_gets_the_rows_of_the_log(tmp_path, monkeypatch):
    told = []
    fake = types.ModuleType("wandb")

    def init(**how):
        told.append(how)
        return fake

    fake.init = init
    fake.log = lambda row, step: told.append((row, step))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = Log(tmp_path / "log.jsonl", wandb="mine", settings={"dim": 64})
    log.write(step=3, val_nelbo=2.5)
    assert told[0]["project"] == "mine" and told[0]["config"] == {"dim": 64}
    assert told[1] == ({"step": 3, "val_nelbo": 2.5}, 3)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ImportError, match="--wandb=mine needs a package .* pip install wandb"):
        Log(tmp_path / "log.jsonl", wandb="mine")


def test_what_a_run_says_goes_through_a_pipe_at_once(monkeypatch):
    """`python train_scratch.py | tee log` shows the samples when they are made."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    Run.say(types.SimpleNamespace(main=True), "step 200: a sample")
    assert sys.stdout.buffer.getvalue() == b"step 200: a sample\n"


def test_what_each_optimizer_gets():
    """Muon the matrices of the blocks, AdamW the rest; frozen parameters belong to nobody."""
    from model import Config, Transformer

    model = Transformer(Config(dim=32, n_layers=2, vocab_size=50))
    model.blocks[0].attn.q.weight.requires_grad_(False)
    muon, adamw = make_optimizers(model, "muon", 1e-3, 0.02, weight_decay=0.1)
    matrices = {id(p) for p in muon.param_groups[0]["params"]}
    others = {id(p) for p in adamw.param_groups[0]["params"]}
    assert len(matrices) == 2 * 7 - 1 and not matrices & others
    assert len(matrices | others) == sum(p.requires_grad for p in model.parameters())
    assert id(model.embed.weight) in others and id(model.head.weight) in others
    (both,) = make_optimizers(model, "adamw", 1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="optimizer must be one of muon, adamw, got 'lion'"):
        make_optimizers(model, "lion", 1e-3)
    assert [group["weight_decay"] for group in both.param_groups] == [0.0, 0.1]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_embedding_has_a_rate_of_its_own(kind):
    """It follows the schedule like all others, and one update moves its numbers by that much."""
    from model import Config, Transformer

    model = Transformer(Config(dim=32, n_layers=1, vocab_size=50)).init_weights(0)
    optimizers = make_optimizers(model, kind, 1e-3, 0.02, embedding_lr=0.1)
    set_learning_rate(optimizers, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    moved = {name: (p - before[name]).abs().mean().item() for name, p in model.named_parameters()}
    assert moved["embed.weight"] == pytest.approx(0.05, rel=1e-3)
    assert moved["head.weight"] == pytest.approx(0.0005, rel=1e-3)


def test_a_resumed_run_has_the_learning_rates_that_it_is_told(tmp_path):
    """torch's load_state_dict puts the saved run's own settings of a group back in their place."""
    from model import Config, Transformer

    rates = []
    for learning_rate, embedding_lr in ((1e-3, 0.1), (2e-3, 0.02)):
        model = Transformer(Config(dim=32, n_layers=1, vocab_size=50)).init_weights(0)
        optimizers = make_optimizers(model, "adamw", learning_rate, embedding_lr=embedding_lr)
        if rates:
            load_training(tmp_path, model, optimizers, {})
        else:
            save_training(tmp_path, model, optimizers, {"settings": {}, "step": 1})
        set_learning_rate(optimizers, 0.5)
        rates.append([group["lr"] for group in optimizers[0].param_groups])
    assert rates == [[5e-4, 0.05, 5e-4], [1e-3, 0.01, 1e-3]]


def test_a_tied_embedding_has_the_rate_of_the_head():
    from model import Config, Transformer

    model = Transformer(Config(dim=32, n_layers=1, vocab_size=50, tie_embeddings=True))
    _, adamw = make_optimizers(model, "muon", 1e-3, 0.02, embedding_lr=0.1)
    assert [group["lr"] for group in adamw.param_groups] == [1e-3]
