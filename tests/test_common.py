"""common.py and data/state.py: settings from the command line, errors in one line, the learning rate, state and log that survive a kill."""
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

import common
from data import state as state_module
from data.state import Clock, Log, load_state, make_folder, save_state

DEFAULTS = {"n_layer": 6, "weight_decay": 0.1, "compile": True, "show": False, "out_dir": "out", "seed": -1}


@pytest.fixture
def override(monkeypatch):
    """override(arguments...): the settings that they make of DEFAULTS."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)          # put back afterwards

    def settings(*arguments, **more):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        constants = {"__doc__": "A script.", "_private": 1, "json": json, "sizes": {"a": 1}, "nothing": None, **DEFAULTS, **more}
        changed = common.override(constants)
        assert all(constants[name] == value for name, value in changed.items())
        assert set(changed) == {*DEFAULTS, *more} and constants["_private"] == 1
        return changed
    return settings


# ---------------------------------------------------------------- settings

def test_fill_in_and_check():
    constants, settings = {}, {"dim": 0, "depth": 3, "max_minutes": 0.0, "max_steps": 5, "seed": 1, "kind": "a"}
    common.fill_in(constants, settings, column=1, dim=(1, 2), depth=(1, 2), max_minutes=(1.0, 2.0), gone=(1, 2))
    assert constants == {"dim": 2, "gone": 2} and settings["dim"] == 2 and settings["depth"] == 3 and not settings["max_minutes"]
    common.check(settings, at_least_1="dim", positive="depth", not_negative="max_minutes", kind=("a", "b"))
    for wrong, words in ((dict(at_least_1="max_minutes"), "max_minutes must be at least 1, got 0.0"), (dict(kind=("b", "c")), "kind must be one of b, c, got 'a'"),
                         (dict(not_negative="weight"), "weight must not be negative, got None")):     # a constant edited to None is no setting
        with pytest.raises(ValueError, match=words):
            common.check(settings, **wrong)


@pytest.mark.parametrize(("argument", "name", "value"), [
    ("--n_layer=12", "n_layer", 12),
    ("--seed=-7", "seed", -7),
    ("--weight_decay=0", "weight_decay", 0.0),
    ("--weight_decay=1e-3", "weight_decay", 1e-3),
    ("--compile=false", "compile", False),
    ("--compile=0", "compile", False),
    ("--show=True", "show", True),
    ("--show=1", "show", True),
    ("--show", "show", True),
    ("--out_dir=a=b", "out_dir", "a=b"),
    ("--out_dir=", "out_dir", ""),
    ("--out_dir=7", "out_dir", "7"),
    ("--out_dir= spaces and é ", "out_dir", " spaces and é "),
])
def test_override(override, argument, name, value):
    settings = override(argument)
    assert settings == {**DEFAULTS, name: value} and type(settings[name]) is type(value)


def test_override_takes_many_and_the_last_one_counts(override):
    assert override() == DEFAULTS
    assert override("--seed=1", "--n_layer=2", "--seed=3") == {**DEFAULTS, "seed": 3, "n_layer": 2}


@pytest.mark.parametrize(("argument", "words"), [
    ("--n_layer=1e3", "n_layer takes an int, got '1e3' (default 6)"),
    ("--n_layer=", "n_layer takes an int, got '' (default 6)"),
    ("--n_layer=True", "n_layer takes an int"),
    ("--weight_decay=much", "weight_decay takes a float, got 'much' (default 0.1)"),
    ("--compile=maybe", "compile takes True or False, got 'maybe' (default True)"),
    ("--compile=", "compile takes True or False, got ''"),
    ("--wieght_decay=0.1", "no setting called 'wieght_decay'; did you mean 'weight_decay'?"),
    ("--weight=0.1", "no setting called 'weight'; did you mean 'weight_decay'?"),
    ("--zzzz=1", "no setting called 'zzzz'"),
    ("--=1", "no setting called ''"),
    ("--_private=2", "no setting called '_private'"),
    ("--sizes=2", "no setting called 'sizes'"),
    ("--json=2", "no setting called 'json'"),
    ("--__doc__=2", "no setting called '__doc__'"),
    ("--n_layer", "--n_layer needs a value: --n_layer=6"),
    ("--out_dir", "--out_dir needs a value: --out_dir='out'"),
    ("n_layer=3", "expected --name=value, got 'n_layer=3'"),
    ("-n_layer=3", "expected --name=value, got '-n_layer=3'"),
    ("3", "expected --name=value, got '3'"),
])
def test_override_says_what_is_wrong(override, argument, words):
    with pytest.raises(ValueError) as error:
        override(argument)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help(override, argument, tmp_path, capsys):
    source = tmp_path / "script.py"
    source.write_text('"""A script."""\nn_layer = 6  # blocks = layers\nout_dir = "a # b"    # é\nweight_decay = 0.1\ncompile = True\nshow = False; seed = -1\n'
                      "def function():\n    n_layer = 7  # not this one\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        override(argument, __file__=str(source))
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code and lines[0] == "A script."
    assert lines[1].split() == ["--n_layer=6", "blocks", "=", "layers"] and lines[2].split() == ["--out_dir=out", "é"]
    assert lines[3].split() == ["--weight_decay=0.1"] and lines[6].split() == ["--seed=-1"] and len(lines) == 7


@pytest.mark.parametrize(("error", "status", "line"), [
    (ValueError("two\nlines  and more"), 2, "error: two lines and more\n"),
    (FileNotFoundError("no such thing"), 2, "error: no such thing\n"),
    (OSError(28, "No space left on device", "out/x"), 2, "error: [Errno 28] No space left on device: 'out/x'\n"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "error: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte\n"),
    (ValueError(), 2, "error: ValueError\n"),
    (FloatingPointError("the loss is nan"), 1, "error: the loss is nan\n"),
])
def test_a_mistake_is_one_line(monkeypatch, capsys, error, status, line):
    stops = []
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "_exit", stops.append)
    monkeypatch.delenv("UNMASK_TRACEBACK", raising=False)
    common.show_errors_in_one_line()
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == line and stops == [status]


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("left"))
    common.show_errors_in_one_line()
    sys.excepthook(KeyError, KeyError("x"), None)
    assert "KeyError: 'x'" in capsys.readouterr().err
    monkeypatch.setenv("UNMASK_TRACEBACK", "1")
    sys.excepthook(ValueError, ValueError("x"), None)
    assert "ValueError: x" in capsys.readouterr().err


# ---------------------------------------------------------------- processes and precision

def test_device_and_dtype():
    assert common.init_process("cpu") == (torch.device("cpu"), 0, 1)
    cpu = torch.device("cpu")
    with common.autocast(cpu, "bfloat16"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    with common.autocast(cpu, "float32"):
        assert not torch.is_autocast_enabled("cpu")
    for device in ("tpu", "cuda", "cuda:x", "mps", ""):
        if not (device == "mps" and torch.backends.mps.is_available() or device.startswith("cuda") and torch.cuda.is_available()):
            with pytest.raises(ValueError, match="device"):
                common.init_process(device)
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16, got 'float16'"):
        common.autocast(cpu, "float16")


def test_is_on():
    assert [common.is_on(x, auto=True) for x in ("auto", "True", "false", True, False)] == [True, True, False, True, False]
    assert common.is_on("auto", auto=False) is False
    with pytest.raises(ValueError, match="expected auto, True or False, got 'yes'"):
        common.is_on("yes", auto=True)


def test_a_single_process_needs_no_group():
    assert common.mean_over_ranks(torch.tensor(2.5), "cpu") == 2.5 and common.from_rank_0(7, "cpu") == 7


# ---------------------------------------------------------------- learning rate

@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("decay_from", [0.0, 0.5])
def test_learning_rate_rises_stays_and_falls_to_zero(decay, warmup, decay_from):
    factors = [common.learning_rate_factor(i / 1000, warmup, decay, decay_from) for i in range(1001)]
    top = max(warmup, decay_from)
    assert all(0 <= factor <= 1 for factor in factors)
    for i, factor in enumerate(factors[:-1]):
        if i / 1000 < warmup:
            assert factor == pytest.approx(i / 1000 / warmup)
        elif i / 1000 <= top:
            assert factor == 1
        else:
            assert factor < factors[i - 1]
    assert factors[-1] == 0 and common.learning_rate_factor((1 + top) / 2, warmup, decay, decay_from) == pytest.approx(0.5)


def test_shapes_of_the_decay():
    assert common.learning_rate_factor(0.25, 0, "linear") == 0.75
    assert common.learning_rate_factor(0.25, 0, "cosine") == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_without_bfloat16_instructions_computes_in_float32(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    expected, cpu = torch.bfloat16 if fast else torch.float32, torch.device("cpu")
    assert common.matrix_dtype(cpu, "auto") == common.orthogonal(torch.randn(1, 4, 4)).dtype == expected
    assert common.weights_dtype(cpu, "auto") == (None if fast else torch.float32) and common.weights_dtype(torch.device("cuda"), "auto") is None
    assert common.weights_dtype(cpu, "bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be"):
        common.weights_dtype(cpu, "float16")


# ---------------------------------------------------------------- Muon

def test_muon_is_torchs_muon(monkeypatch):
    monkeypatch.setattr(common, "matrix_dtype", lambda device, dtype: torch.bfloat16)       # as torch's does whatever the device
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator)
    shapes = [(16, 16), (44, 16), (16, 44), (16, 16)]                # square, tall, wide, and two that are stacked
    ours = [torch.nn.Parameter(draw(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = common.Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = draw(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)          # stacked products may round otherwise


def test_orthogonal():
    x = common.orthogonal(torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x.float())
    assert values.min() > 0.5 and values.max() < 1.3


# ---------------------------------------------------------------- state

STATE = {"model": {"w": torch.arange(6.0).view(2, 3)}, "step": 7, "settings": {"dim": 64, "objective": "mdlm"}}


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
    monkeypatch.setattr(*((torch, "save", fail_as_torch_does) if failing == "write" else (os, failing, fail)))
    with pytest.raises(OSError, match="cannot write .*state.pt .*free some space or choose another folder; what stood there is untouched"):
        save_state(path, {"step": 8})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_state_that_is_not_there_or_does_not_match(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume; run without --resume first"):
        load_state(tmp_path / "state.pt", {})
    save_state(tmp_path / "state.pt", STATE)
    for wrong, words in (({"dim": 32}, "dim was 64 in .* and is 32 now"), ({"objective": "ar"}, "objective was 'mdlm'"), ({"new": 1}, "new was None")):
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
    for content in (b"", b"text", data[:10], data[:len(data) // 2], data[:-1], data[:-200], pickle.dumps({"step": 7}), pickle.dumps(bomb),
                    *((tmp_path / name).read_bytes() for name in ("bomb.pt", "list.pt", "other.pt"))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged .*: delete it and start again"):
            load_state(path, {"dim": 64})
    assert not (tmp_path / "hacked").exists()


def test_make_folder(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing/here", "/sys", "bad\0name", "x" * 300):
        with pytest.raises((OSError, ValueError), match="cannot write to out_dir|null byte"):
            make_folder(bad)
    errors = []

    def many_times():                                               # all ranks of a run make the folder at once
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


# ---------------------------------------------------------------- log

def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_log(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for step in (10, 20, 30):
        log.write(step=step, train_loss=1 / step, note="é")
    assert [row["step"] for row in rows_of(path)] == [10, 20, 30] and rows_of(path)[0]["train_loss"] == 0.1
    with open(path, "a") as file:
        file.write('{"step": 40, "train_lo')                         # cut short by a kill
    resumed = Log(path, keep_up_to=30)                        # step 30 is evaluated again
    assert [row["step"] for row in rows_of(path)] == [10, 20] == [row["step"] for row in resumed.rows]
    resumed.write(step=30, train_loss=0.5)
    assert [row["step"] for row in rows_of(path)] == [10, 20, 30]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
    Log(path)                                                 # a new run begins a new log
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
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "empty.png").exists()
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)      # not installed
    log.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_clock_goes_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(state_module.time, "perf_counter", lambda: now[0])
    clock = Clock(before=50.0)
    now[0] += 7
    assert clock.seconds() == 57
