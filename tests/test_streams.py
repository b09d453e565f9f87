"""Random numbers that are used for different things are independent; equal quantities bear equal
names and are the same number.

Whole runs of the four recipes, watched from within.
"""

import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from models import tiny
from runs import SETTINGS, rows, succeed
from scripts import run, run_parallel

import common
import diffusion
from data.tokenizer import Tokenizer
from diffusion import nelbo
from evaluation.likelihood import log_likelihood
from model import Transformer
from pretrained.tiny import tiny_model
from sampling.engine import row_streams

# The recipes whose loss is a bound on text: what edits and rewards minimise is no bound of masks.
OF_MASKS = [script for script in SETTINGS if script not in ("train_edits.py", "train_grpo.py")]

# ---------------------------------------------------------------- streams


def test_streams_are_told_apart_by_everything_in_their_name():
    names = itertools.product(("noise", "dropout"), range(20), range(20), range(5))
    seeds = {common.seed_for(*name) for name in names}
    assert len({seed % 2**32 for seed in seeds}) == len(seeds) == 4000 and all(
        0 <= seed < 2**63 for seed in seeds
    )  # torch reads 32 bits
    assert common.seed_for("a", 1, 23) != common.seed_for("a", 12, 3) and common.seed_for(
        "a", 1
    ) != common.seed_for("a", 1, 0)
    first = torch.rand(4, generator=common.stream("a", 1, 2))
    assert torch.equal(first, torch.rand(4, generator=common.stream("a", 1, 2)))


def test_rows_and_seeds_of_sampling_do_not_coincide():
    def first(seed, row=0):
        return torch.rand((), generator=row_streams(seed, row + 1)[row], dtype=torch.float64).item()

    numbers = [
        first(seed, row)
        for seed in (0, 1, 5, 5 + 2**32, 1_000_003, 2 * 1_000_003)
        for row in range(3)
    ]
    assert len(set(numbers)) == len(numbers)
    assert first(5) == first([5]) and first([7, 5], 1) == first([5])  # the documented rule

    from sampling.worker import Job

    requests = [Job([[1]] * 3, {"seed": seed}).seeds for seed in (5, 5 + 1_000_003, 6)]
    assert (
        len({seed for seeds in requests for seed in seeds}) == 9
        and requests[0][0] == 5
        and requests[0] == Job([[1]] * 3, {"seed": 5}).seeds
    )


def test_seeds_and_streams_of_likelihoods_do_not_coincide():
    model, request = tiny(), ([[1, 2, 3]], [[3, 1, 4, 1, 5, 9, 2, 6]])
    pairs = ((0, 1_000_003), (1, 0), (1 + 2**32, 0), (1, 2**32))
    values = {
        log_likelihood(model, *request, num_samples=4, seed=seed, streams=[stream])[0].item()
        for seed, stream in pairs
    }
    assert len(values) == len(pairs)
    seen = []
    hide = diffusion.hide
    try:
        diffusion.hide = lambda groups, share, generator: (
            seen.append(generator.initial_seed()),
            hide(groups, share, generator),
        )[1]
        nelbo(model, torch.zeros(2, 8, dtype=torch.int64), seed=7)
    finally:
        diffusion.hide = hide
    assert seen != [7], "the seed of the weights"


def test_the_matrices_of_a_tiny_model_are_not_its_embedding():
    for family in ("qwen3", "llada", "modernbert"):
        model = tiny_model(family, Tokenizer.bytes(), 32, 0, dim=16, n_layers=2, n_heads=2)
        embedding = model.embed.weight.detach().flatten()
        for module in model.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                matrix = module.weight.detach().flatten()
                n = min(len(matrix), len(embedding))
                assert torch.corrcoef(torch.stack((matrix[:n], embedding[:n])))[
                    0, 1
                ].abs() < 5 / math.sqrt(n)


class WatchSeeds:
    """Writes to a file, of every generator that is seeded in a process, the seed and the line of
    code that asked for it."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        path, plain, whole = self.path, torch.Generator, torch.manual_seed

        def note(seed):
            frame = sys._getframe(2)
            while Path(frame.f_code.co_filename).name == "common.py":
                frame = frame.f_back
            with open(path, "a") as file:
                file.write(f"{seed % 2**32} {frame.f_code.co_filename}:{frame.f_lineno}\n")

        class Generator(plain):
            def manual_seed(self, seed):
                note(seed)
                return super().manual_seed(seed)

        def manual_seed(seed):
            note(seed)
            return whole(seed)

        torch.Generator, torch.manual_seed = Generator, manual_seed


@pytest.mark.parametrize("script", SETTINGS)
def test_no_two_places_of_a_recipe_draw_the_same_numbers(script, small, tmp_path):
    """Weights, noise, dropout, opening attention, evaluation, samples: whoever draws has a seed
    that nobody else has."""
    succeed(run(*small(script, tmp_path / "out"), before=WatchSeeds(tmp_path / "seeds")))
    asked = {}
    for line in (tmp_path / "seeds").read_text().splitlines():
        seed, place = line.split(" ", 1)
        asked.setdefault(int(seed), set()).add(place)
    assert len(set.union(*asked.values())) >= 4 and len(asked) >= 6 + 3, asked
    assert [places for places in asked.values() if len(places) > 1] == []


class WatchMasks:
    """Writes the masks and the open pairs of every step to a file."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        plain, seen, path = diffusion.mdlm_loss, [], self.path

        def watched(model, tokens, t, mask, maskable, attention_mask, **more):
            seen.append((mask, attention_mask))
            torch.save(seen, path)
            return plain(model, tokens, t, mask, maskable, attention_mask, **more)

        diffusion.mdlm_loss = watched


def test_the_pairs_that_open_say_nothing_about_the_masks(small, tmp_path):
    """However the two rows of random numbers are laid beside each other, they are not
    correlated."""
    settings = ("--max_steps=12", "--anneal_steps=12", "--eval_interval=0")
    arguments = small("convert_ar.py", tmp_path / "out", *settings)
    succeed(run(*arguments, before=WatchMasks(tmp_path / "masks")))
    columns = []
    for mask, pairs in torch.load(tmp_path / "masks")[1:]:  # nothing is open at the first step
        T = mask.shape[1]
        drawn = ~torch.ones(T, T, dtype=torch.bool).tril()  # the others are open anyway
        share = pairs[0][drawn].float().mean()
        opened = torch.where(drawn, pairs[0].float() - share, torch.nan).flatten()
        hidden = (mask.float() - mask.float().mean(1, keepdim=True)).flatten()
        columns.append(
            torch.stack([torch.stack((opened[s : s + len(hidden)], hidden)) for s in range(40)])
        )
    columns = torch.cat(columns, dim=2)  # [shifts, 2, numbers of all steps]
    for opened, hidden in columns:
        known = ~opened.isnan()
        correlation = torch.corrcoef(torch.stack((opened[known], hidden[known])))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(int(known.sum()))


# ---------------------------------------------------------------- the training loss


class WatchLosses:
    """Writes (nats, tokens, loss) of every pass of training to a file; the loss that is minimised
    is multiplied by `factor`."""

    def __init__(self, path, factor=1.0):
        self.path, self.factor = path, factor

    def __call__(self):
        for name in ("mdlm_loss", "block_loss", "ar_loss", "sft_loss"):
            setattr(diffusion, name, self.watch(getattr(diffusion, name)))

    def watch(self, plain):
        def watched(*arguments, **options):
            loss = plain(*arguments, **options)
            with open(self.path, "a") as file:
                file.write(
                    json.dumps((loss.token_nll.sum().item(), loss.count, loss.loss.item())) + "\n"
                )
            return (
                dataclasses.replace(loss, loss=loss.loss * self.factor)
                if self.factor != 1
                else loss
            )

        return watched


@pytest.mark.parametrize("script", OF_MASKS)
def test_train_loss_is_the_bound_per_token_in_every_recipe(script, small, tmp_path):
    """Nats of the whole step over tokens of the whole step, whatever is minimised and however long
    the answers of each pass are."""
    settings = ("--eval_interval=1", "--max_steps=4", "--grad_accum=2", "--batch_size=2",
                "--sample_tokens=0")
    arguments = small(script, tmp_path / "out", *settings)
    succeed(run(*arguments, before=WatchLosses(tmp_path / "losses")))
    passes = [json.loads(line) for line in (tmp_path / "losses").read_text().splitlines()]
    nats, counts = ([a[i] + b[i] for a, b in zip(passes[::2], passes[1::2])] for i in (0, 1))
    expected = [n / c for n, c in zip(nats, counts)]
    assert [row["train_loss"] for row in rows(tmp_path / "out")] == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("script", OF_MASKS)
def test_what_is_minimised_must_be_finite_too(script, small, tmp_path):
    """The bound alone may be finite where the loss, which weighs otherwise, is not."""
    result = run(
        *small(script, tmp_path / "out", "--max_steps=2", "--sample_tokens=0"),
        before=WatchLosses(tmp_path / "losses", math.inf),
    )
    assert result.status == 1 and re.search(
        r"^error: the loss is (inf|nan) at step 0: lower the learning rate",
        result.err,
        re.MULTILINE,
    ), result


# ---------------------------------------------------------------- the last line


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("train_scratch.py", ()),
        ("train_scratch.py", ("--objective=bd3lm",)),
        ("train_scratch.py", ("--objective=ar",)),
        ("convert_bert.py", ()),
        ("convert_ar.py", ("--anneal_steps=0", "--objective=bd3lm", "--block_length=12")),
        ("convert_ar.py", ("TEXT", "--shift=True", "--eval_sequences=32")),
        ("finetune_llada.py", ("--lora_rank=0",)),
        ("finetune_llada.py", ("--dtype=float32",)),
    ],
)
def test_eval_prints_the_recipe_s_last_line(script, settings, small, talk, text, tmp_path):
    """The same sequences, masks and precision, also where training computes in bfloat16; only
    --dataset, --seq_len and --max_tokens are said."""
    data, seq_len, count = (
        (text, 16, 512)
        if script == "train_scratch.py"
        else (text if "TEXT" in settings else talk, 96, 8 * 96)
    )
    settings = [f"--dataset={text}" if setting == "TEXT" else setting for setting in settings]
    arguments = small(
        script,
        tmp_path / "out",
        "--dtype=bfloat16",
        "--eval_interval=0",
        "--sample_tokens=0",
        "--learning_rate=1e-2",
        *settings,
    )
    last = succeed(run(*arguments)).out.splitlines()[-1]
    assert last.startswith("val nelbo ")
    told = succeed(
        run(
            "eval.py",
            f"--checkpoint={tmp_path / 'out'}",
            f"--dataset={data}",
            f"--seq_len={seq_len}",
            f"--max_tokens={count}",
            "--device=cpu",
            "--dtype=float32",
        )
    )
    assert told.out.splitlines()[-1] == last


def test_nelbo_does_not_depend_on_how_its_batches_are_cut():
    for config in (dict(), dict(block_length=3), dict(shift=True), dict(causal=True, shift=True)):
        model, tokens = (
            tiny(**config),
            torch.randint(0, 11, (9, 10), generator=torch.Generator().manual_seed(0)),
        )
        shown = torch.arange(10) < torch.tensor([3, 4, 10, 6, 2, 10, 9, 5, 7])[:, None]
        for mask in (None, shown):
            values = [
                nelbo(model, tokens, 2, seed=1, batch_size=size, attention_mask=mask)
                for size in (1, 4, 32)
            ]
            assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] == pytest.approx(
                values[2], rel=1e-5
            ), config
        wider = [torch.nn.functional.pad(x, (0, 5)) for x in (tokens, shown)]
        assert nelbo(model, wider[0], 2, seed=1, attention_mask=wider[1]) == pytest.approx(
            values[0], rel=1e-5
        )


def test_padding_is_not_scored():
    model, tokens = tiny(), torch.zeros(4, 10, dtype=torch.int64)
    shown = torch.arange(10) < torch.tensor([6, 3, 9, 10])[:, None]
    found = nelbo(model, torch.where(shown, tokens, 7), seed=1, attention_mask=shown)
    assert found == nelbo(model, tokens, seed=1, attention_mask=shown, maskable=shown)


def test_a_model_is_evaluated_in_the_precision_of_its_weights(small, text, tmp_path):
    """A sharded run computes in bfloat16 because its weights are gathered so: then eval.py
    --dtype=bfloat16 prints its line."""
    arguments = small(
        "convert_ar.py",
        tmp_path / "out",
        f"--dataset={text}",
        "--dtype=bfloat16",
        "--fsdp=True",
        "--optimizer=adamw",
        "--sample_tokens=0",
        "--anneal_steps=0",
        "--eval_interval=0",
    )
    results = run_parallel(2, *arguments)
    assert [result.status for result in results] == [0, 0], results
    assert Transformer.from_pretrained(tmp_path / "out").embed.weight.dtype == torch.float32
    told = succeed(
        run(
            "eval.py",
            f"--checkpoint={tmp_path / 'out'}",
            f"--dataset={text}",
            "--seq_len=96",
            f"--max_tokens={8 * 96}",
            "--device=cpu",
            "--dtype=bfloat16",
        )
    )
    assert told.out.splitlines()[-1] == results[0].out.splitlines()[-1]
