"""convert_bert.py and convert_ar.py as a user runs them: every family, kills and resumes, many
processes, mistakes. Tiny models, easy talk."""

import functools
import json
import math
import re
import shutil
import signal
import sys

import pytest
import torch
from runs import LAST_LINE, Killer, SignalAt, equal, refused, rows, same_run, state_of
from safetensors.torch import load_file, save_file
from scripts import run, run_parallel
from tiny import DECODERS, ENCODERS

from data.tokenizer import Tokenizer
from model import Transformer


@pytest.fixture(scope="module")
def short(talk, published):
    """short(script, out_dir, settings...): the command line of a run of a second."""

    def arguments(script, out_dir, *settings):
        family = "modernbert" if script == "convert_bert.py" else "qwen3"
        return (
            script,
            f"--init_from={published(family)}",
            "--threads=1",
            "--dtype=float32",
            f"--dataset={talk}",
            "--seq_len=96",
            "--batch_size=4",
            "--learning_rate=1e-3",
            "--max_steps=8",
            "--eval_interval=4",
            "--eval_sequences=4",
            "--final_eval_sequences=8",
            "--sample_tokens=0",
            f"--out_dir={out_dir}",
            *settings,
        )

    return arguments


def convert(*arguments, **options):
    result = run(*arguments, **options)
    assert result.status == 0 and LAST_LINE.fullmatch(result.out.splitlines()[-1]), result
    return result


def ask(path):
    sys.stdin = open(path)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_every_family(short, published, tmp_path, family):
    """From its published layout to a model that chats, and back to the published layout, where its
    own code finds the same logits."""
    script = "convert_bert.py" if family in ENCODERS else "convert_ar.py"
    start = Transformer.from_pretrained(published(family))
    result = convert(
        *short(
            script,
            tmp_path / "out",
            f"--init_from={published(family)}",
            f"--export={tmp_path / 'export'}",
            "--sample_tokens=4",
        )
    )
    model, tokenizer = (
        Transformer.from_pretrained(tmp_path / "out"),
        Tokenizer.from_pretrained(tmp_path / "out"),
    )
    assert model.config.family == family and not model.config.causal and not model.config.shift
    assert (
        model.config.mask_token_id == tokenizer.mask_token_id
        and tokenizer.vocab_size <= model.config.vocab_size
    )
    assert (
        "<|im_end|>" in tokenizer.backend.get_vocab()
        and len(tokenizer.encode("<|im_end|>", parse_special=True)) == 1
    )
    assert not torch.equal(model.embed.weight[:256], start.embed.weight[:256])
    assert re.search(r"^step 4: '.*user\\n.*' -> '", result.out, re.MULTILINE)

    (tmp_path / "question").write_text("1: cat\n/exit\n")
    told = run(
        "sample.py",
        f"--checkpoint={tmp_path / 'out'}",
        "--chat",
        "--max_new_tokens=8",
        "--steps=2",
        before=functools.partial(ask, tmp_path / "question"),
    )
    assert told.status == 0 and "8 tokens in 2 forward passes" in told.out, told

    transformers = pytest.importorskip("transformers")
    kind = (
        transformers.AutoModelForMaskedLM
        if family in ENCODERS
        else transformers.AutoModelForCausalLM
    )
    theirs = kind.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    ours = Transformer.from_pretrained(
        tmp_path / "export", causal=family in DECODERS
    ).eval()  # as transformers 4 reads it
    again = Transformer.from_pretrained(tmp_path / "export")  # and as it was trained
    tokens = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-4)
        assert torch.equal(again(tokens), model.eval()(tokens)) and not again.config.causal
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "export").mask_token_id
        == tokenizer.mask_token_id
    )


def test_an_encoder_without_head_gets_a_fresh_one(short, published, tmp_path):
    """Its names lack `bert.` as those of a BertModel do. Other scripts say what is missing."""
    folder = shutil.copytree(published("bert"), tmp_path / "encoder")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {
            name.removeprefix("bert."): tensor
            for name, tensor in tensors.items()
            if name.startswith("bert.")
        },
        folder / "model.safetensors",
    )
    refused(
        run("sample.py", f"--checkpoint={folder}", "--prompt=x"),
        "an encoder without the head that predicts tokens",
        "convert_bert.py",
    )
    settings = (
        "convert_bert.py",
        tmp_path / "out",
        f"--init_from={folder}",
        f"--export={tmp_path / 'export'}",
    )
    result = convert(*short(*settings))
    assert result.out.count("it gets a fresh one, whose matrix is tied to the embedding") == 1
    model, back = (Transformer.from_pretrained(tmp_path / name) for name in ("out", "export"))
    tokens = torch.arange(20)[None]
    assert model.head.weight is model.embed.weight and torch.equal(back(tokens), model(tokens))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architectures"] == [
        "BertForMaskedLM"
    ]


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("convert_ar.py", ("--objective=bd3lm", "--block_length=8")),
        (
            "convert_ar.py",
            ("--objective=bd3lm", "--block_length=8", "--shift=True", "--checkpointing=True"),
        ),
        (
            "convert_ar.py",
            ("--shift=True", "--anneal_steps=6", "--padding=hidden", "--grad_accum=2"),
        ),
        (
            "convert_bert.py",
            ("--padding=hidden", "--decay=linear", "--warmup=0", "--max_weight=5", "--grad_clip=0"),
        ),
        (
            "convert_bert.py",
            ("--max_steps=0", "--epochs=0.4", "--optimizer=muon", "--eval_interval=0"),
        ),
    ],
)
def test_other_settings(short, tmp_path, script, settings):
    convert(*short(script, tmp_path, *settings))
    log = rows(tmp_path)
    assert all(
        math.isfinite(row["val_nelbo"] + row["val_stderr"] + row["train_loss"]) for row in log
    ) and log[-1]["step"] in (7, 8)
    config = Transformer.from_pretrained(tmp_path).config
    assert config.shift == ("--shift=True" in settings) and config.block_length == (
        8 if "--objective=bd3lm" in settings else 0
    )


def test_attention_opens_pair_by_pair(short, tmp_path):
    """DiffuLLaMA's annealing changes the training; with the last of its steps it is over."""
    for name, steps in (("open", 0), ("one", 1), ("six", 6)):
        convert(*short("convert_ar.py", tmp_path / name, f"--anneal_steps={steps}"))
    losses = {
        name: [row["train_loss"] for row in rows(tmp_path / name)]
        for name in ("open", "one", "six")
    }
    assert len({round(values[0], 3) for values in losses.values()}) == 3, losses


@pytest.mark.parametrize(
    ("script", "objective"),
    [("convert_bert.py", ""), ("convert_ar.py", "mdlm"), ("convert_ar.py", "bd3lm")],
)
def test_it_learns(short, tmp_path, script, objective):
    """From tiny, on conversations, in four seconds: the answers' bound falls far below that of a
    uniform model."""
    settings = (
        "--init_from=tiny",
        "--vocab_size=300",
        "--dim=32",
        "--n_layers=2",
        "--n_heads=2",
        "--batch_size=16",
        "--learning_rate=1e-2",
        "--max_steps=60",
        "--eval_interval=10",
        "--eval_sequences=64",
        "--final_eval_sequences=64",  # all there are: four say little
        *([f"--objective={objective}", "--block_length=8"] if objective else []),
    )
    convert(*short(script, tmp_path, *settings))
    values = [row["val_nelbo"] for row in rows(tmp_path)]
    assert values[-1] < values[0] - 0.3 and values[-1] < math.log(260) - 2.5, values


def test_text_and_our_own_checkpoints(short, tmp_path):
    """An autoregressive run of train_scratch.py goes on as a diffusion model on the same text; a
    diffusion run starts convert_bert.py."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 500)
    for script, objective in (("convert_ar.py", "ar"), ("convert_bert.py", "mdlm")):
        before, after = tmp_path / objective, tmp_path / f"{objective}_converted"
        assert (
            run(
                "train_scratch.py",
                f"--objective={objective}",
                "--dim=24",
                "--n_layers=2",
                "--n_heads=2",
                "--seq_len=32",
                "--batch_size=8",
                "--max_steps=30",
                "--tokenizer=byte",
                f"--dataset={text}",
                "--eval_interval=0",
                "--sample_tokens=0",
                "--threads=1",
                f"--out_dir={before}",
            ).status
            == 0
        )
        convert(
            *short(
                script,
                after,
                f"--init_from={before}",
                f"--dataset={text}",
                "--seq_len=32",
                "--learning_rate=1e-2",
                "--max_steps=30",
                "--sample_tokens=4",
            )
        )
        assert rows(after)[-1]["val_nelbo"] < 2.5
        for there in (f"--out_dir={before}", f"--export={before}"):
            result = run(*short(script, after, f"--init_from={before}", there))
            assert result.status == 2 and "is where the weights come from" in result.err
        model, tokenizer = Transformer.from_pretrained(after), Tokenizer.from_pretrained(before)
        assert (
            model.config.vocab_size == tokenizer.vocab_size
            and model.config.mask_token_id == tokenizer.mask_token_id
        )


# ---------------------------------------------------------------- kills, resumes, processes


@pytest.mark.parametrize("script", ["convert_bert.py", "convert_ar.py"])
def test_a_killed_run_goes_on_bit_for_bit(short, tmp_path, script):
    settings = (
        "--eval_interval=1",
        *(
            ("--objective=bd3lm", "--block_length=8")
            if script == "convert_ar.py"
            else ("--grad_accum=2",)
        ),
    )
    convert(*short(script, tmp_path / "whole", *settings))
    for death in (Killer(27), Killer(2, "state"), Killer(19)):
        again = ("--resume=True",) if (tmp_path / "broken" / "train_state.pt").exists() else ()
        assert (
            run(*short(script, tmp_path / "broken", *settings, *again), before=death).status
            == -signal.SIGKILL
        )
    assert 1 < state_of(tmp_path / "broken")["step"] < 8
    convert(*short(script, tmp_path / "broken", *settings, "--resume=True"))
    same_run(tmp_path / "broken", tmp_path / "whole")
    assert refused(
        run(*short(script, tmp_path / "broken", "--resume=True", "--padding=hidden", "--seed=2")),
        "cannot resume",
    )


@pytest.mark.parametrize(
    ("script", "settings"),
    [("convert_bert.py", ()), ("convert_ar.py", ("--objective=bd3lm", "--block_length=8"))],
)
def test_a_sharded_run_is_the_same(short, tmp_path, script, settings):
    """FSDP2 on two processes gives what one gives, goes on where it stopped, and leaves a whole
    model."""
    settings = (*settings, "--max_steps=4", "--eval_interval=2")
    convert(*short(script, tmp_path / "whole", *settings, "--batch_size=4"))
    sharded = short(
        script,
        tmp_path / "sharded",
        *settings,
        "--batch_size=2",
        "--fsdp=True",
        "--sample_tokens=2",
    )
    deaths = run_parallel(2, *sharded, before=SignalAt(4))
    assert [result.status for result in deaths] == [0, 0] and "stopped at step" in deaths[0].out, (
        deaths
    )
    results = run_parallel(2, *sharded, "--resume=True")
    assert [result.status for result in results] == [0, 0], results
    assert equal(rows(tmp_path / "sharded"), rows(tmp_path / "whole"), 5e-4)
    models = [
        Transformer.from_pretrained(tmp_path / name).state_dict() for name in ("sharded", "whole")
    ]
    assert equal(*(dict(model) for model in models), 2e-3)

