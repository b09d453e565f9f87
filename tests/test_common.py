"""common.py: settings from the command line, errors in one line, processes, precision, random
streams."""

import json
import math
import os
import sys

import pytest
import torch

import common
from training.optimizers import orthogonal

DEFAULTS = {
    "n_layer": 6,
    "weight_decay": 0.1,
    "compile": True,
    "show": False,
    "out_dir": "out",
    "seed": -1,
}


@pytest.fixture
def override(monkeypatch):
    """override(arguments...): the settings that they make of DEFAULTS."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards

    def settings(*arguments, **more):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        constants = {
            "__doc__": "A script.",
            "_private": 1,
            "json": json,
            "sizes": {"a": 1},
            "nothing": None,
            **DEFAULTS,
            **more,
        }
        changed = common.override(constants)
        assert all(constants[name] == value for name, value in changed.items())
        assert set(changed) == {*DEFAULTS, *more} and constants["_private"] == 1
        return changed

    return settings


# ---------------------------------------------------------------- settings


def test_check():
    settings = {"dim": 2, "depth": 3.0, "max_minutes": 0.0, "seed": 1, "kind": "a",
                "width": math.inf}
    common.check(
        settings,
        at_least_1=["dim"],
        positive=["depth"],
        not_negative=["max_minutes"],
        kind=["a", "b"],
    )
    wrong = [
        (dict(at_least_1=["max_minutes"]), "max_minutes must be at least 1, got 0.0"),
        (dict(positive=["max_minutes"]), "max_minutes must be positive, got 0.0"),
        (dict(finite=["width"]), "width must be finite, got inf"),
        (dict(kind=["b", "c"]), "kind must be one of b, c, got 'a'"),
    ]
    for rules, words in wrong:
        with pytest.raises(ValueError, match=words):
            common.check(settings, **rules)
    for number in (-1, 2**32, float("nan")):
        with pytest.raises(ValueError, match="depth must not be negative|seed must be from 0"):
            common.check(
                settings | {"depth": -1.0 if number == -1 else number, "seed": number},
                not_negative=["depth"],
            )


def test_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--init_from=tiny:gpt2", "--name=a=b"])
    assert common.given("init_from", "x") == "tiny:gpt2"
    sys.argv.append("--init_from=tiny")
    assert common.given("init_from", "x") == "tiny", "the last one counts"
    assert common.given("name", "x") == "a=b"
    assert common.given("other", "x") == "x" and common.given("init", "x") == "x"
    sys.argv += ["--device=cuda", "--device=auto"]
    assert common.given("device", "cpu") == "cpu", "auto: what this machine has"


def test_a_setting_without_effect_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--schedule=cosine", "--size=2"])
    common.note_without_effect("objective ar", schedule=False, size=True, other=False)
    assert capsys.readouterr().err == "note: schedule has no effect with objective ar\n"
    monkeypatch.setenv("RANK", "1")
    common.note_without_effect("objective ar", schedule=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
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
    ],
)
def test_override(override, argument, name, value):
    settings = override(argument)
    assert settings == {**DEFAULTS, name: value} and type(settings[name]) is type(value)


def test_override_takes_many_and_the_last_one_counts(override):
    assert override() == DEFAULTS
    assert override("--seed=1", "--n_layer=2", "--seed=3") == {**DEFAULTS, "seed": 3, "n_layer": 2}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
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
    ],
)
def test_override_says_what_is_wrong(override, argument, words):
    with pytest.raises(ValueError) as error:
        override(argument)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help(override, argument, tmp_path, capsys):
    source = tmp_path / "script.py"
    source.write_text(
        '"""A script."""\nn_layer = 6  # blocks = layers\nout_dir = "a # b"    # é\n'
        "weight_decay = 0.1\ncompile = True\nshow = False; seed = -1\n"
        "def function():\n    n_layer = 7  # not this one\n",
        encoding="utf-8",
    )
    with pytest.raises(SystemExit) as stop:
        override(argument, __file__=str(source))
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code and lines[0] == "A script."
    assert lines[1].split() == ["--n_layer=6", "blocks", "=", "layers"] and lines[2].split() == [
        "--out_dir=out",
        "é",
    ]
    assert (
        lines[3].split() == ["--weight_decay=0.1"]
        and lines[6].split() == ["--seed=-1"]
        and len(lines) == 7
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines  and more"), 2, "error: two lines and more\n"),
        (FileNotFoundError("no such thing"), 2, "error: no such thing\n"),
        (
            OSError(28, "No space left on device", "out/x"),
            2,
            "error: [Errno 28] No space left on device: 'out/x'\n",
        ),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            2,
            "error: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte\n",
        ),
        (ValueError(), 2, "error: ValueError\n"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan\n"),
    ],
)
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
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled(
            "cpu"
        )
    with common.autocast(cpu, "float32"):
        assert not torch.is_autocast_enabled("cpu")
    for device in ("tpu", "cuda", "cuda:x", "mps", ""):
        if not (
            device == "mps"
            and torch.backends.mps.is_available()
            or device.startswith("cuda")
            and torch.cuda.is_available()
        ):
            with pytest.raises(ValueError, match="device"):
                common.init_process(device)
    for device in ("cuda9", "cuda:", "cuda:-1"):
        with pytest.raises(ValueError, match=f"cuda or cuda:N, got '{device}'"):
            common.init_process(device)
    with pytest.raises(ValueError, match="device is cuda:999, but torch sees .* such GPUs here"):
        common.init_process("cuda:999")
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16, got 'float16'"):
        common.autocast(cpu, "float16")


@pytest.mark.parametrize("name, number", [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_becomes_the_one_that_torch_takes(name, number, monkeypatch):
    """By its number, or that of the process; there are two."""
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    assert common.choose_device(name) == f"cuda:{number}"
    assert calls == [f"cuda:{number}", "high"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    for missing in ("cuda", "cuda:2"):
        with pytest.raises(ValueError, match="device is cuda:2, but torch sees 2 such GPUs here"):
            common.choose_device(missing)


def test_a_single_process_needs_no_group():
    assert common.sum_over_ranks([2.5, 1.0], "cpu") == [2.5, 1.0]
    assert common.from_rank_0(7, "cpu") == 7 and common.gather("x") == ["x"]
    assert common.share(lambda n: n * n, range(4)) == [0, 1, 4, 9]


def test_streams_are_independent():
    """Neither a sum nor a product of the numbers tells what stream it is."""
    names = [("noise", 1, 2), ("noise", 2, 1), ("noise", 12), ("noise", 1, 1, 2), ("dropout", 1, 2)]
    draws = torch.stack([torch.rand(1000, generator=common.stream(*name)) for name in names])
    assert torch.equal(draws[0], torch.rand(1000, generator=common.stream("noise", 1, 2)))
    correlation = torch.corrcoef(draws) - torch.eye(len(names))
    assert correlation.abs().max() < 0.15


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_without_bfloat16_instructions_computes_in_float32(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    expected, cpu = torch.bfloat16 if fast else torch.float32, torch.device("cpu")
    assert common.matrix_dtype(cpu, "auto") == orthogonal(torch.randn(1, 4, 4)).dtype == expected
    assert common.best_dtype("cpu") == str(expected).removeprefix("torch.")
    assert (
        common.weights_dtype(cpu, "auto") == (None if fast else torch.float32)
        and common.weights_dtype(torch.device("cuda"), "auto") is None
    )
    assert common.weights_dtype(cpu, "bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be"):
        common.weights_dtype(cpu, "float16")
