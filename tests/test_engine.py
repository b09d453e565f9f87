"""sampling/engine.py: the reference samplers' outputs, plain loops, ragged batches, caches, ends of
text, seeds and mistakes. test_denoise.py holds it equal to the plain sampler, test_rules.py has the
rules."""
import json
import math

import naive
import numpy as np
import pytest
import torch
from models import MASK, RAGGED, ExactPosterior, never_mask, ragged_sequences, tiny

from model import Transformer
from sampling.engine import generate, infill

# --------------------------------------------------------------------------------------------------
# Against other samplers


def reference_records():
    return [
        (file, number)
        for file, count in (("llada", 9), ("fast_dllm", 21), ("dream", 12))
        for number in range(count)
    ]


@pytest.mark.parametrize("file,number", reference_records())
def test_reference_samplers(fixture_path, file, number):
    folder = fixture_path("samplers")
    r = json.loads((folder / f"{file}.json").read_text())[number]
    model = Transformer.from_pretrained(folder.parent / r["checkpoint"])
    n = r.get("gen_length") or r["max_new_tokens"]
    rule = (
        r.get("remasking")
        or {"entropy": "entropy", "maskgit_plus": "low_confidence", "topk_margin": "margin"}[
            r["alg"]
        ]
    )
    prompts, outputs = r["prompts"], r["outputs"]
    if "attention_mask" in r:  # left padding: our batches are ragged instead
        prompts = [
            [token for token, shown in zip(p, a) if shown]
            for p, a in zip(prompts, r["attention_mask"])
        ]
        outputs = [o[a.count(0) :] for o, a in zip(outputs, r["attention_mask"])]
    ours = generate(
        model,
        prompts,
        n,
        r["steps"],
        r.get("block_length", n),
        0.0,
        rule,
        r.get("threshold"),
        cache=r.get("cache"),
        cfg_scale=r.get("cfg_scale", 0.0),
    )
    assert ours == outputs


class Naive:
    """What naive.py's samplers ask of a model: logits [S, V] of a list of S tokens."""

    mask_id = MASK

    def __init__(self, model):
        self.model = model

    def logits(self, tokens, visible=None):
        if visible is not None:
            visible = visible[None]
        return self.model(torch.tensor([tokens]), attention_mask=visible)[0]


@pytest.mark.parametrize(
    "n,steps,block_length", [(12, 12, 12), (12, 6, 4), (12, 3, 4), (16, 8, 16), (8, 6, 4)]
)
def test_low_confidence_equals_the_naive_loop(n, steps, block_length):
    model, prompt = never_mask(tiny(vocab_size=40, seed=4)), [1, 2, 3, 4]
    loop, passes = naive.llada_generate(Naive(model), prompt, n, steps, block_length)
    assert MASK not in loop and passes == steps
    assert len(set(loop[4:])) > 4       # one token everywhere would be right in any order
    assert generate(model, [prompt], n, steps, block_length)[0] == loop


def test_block_sampling_equals_the_naive_block_loop():
    """BD3-LM's sampler: append a block of masks, denoise it given the blocks before, go on."""
    model, prompt = never_mask(tiny(vocab_size=40, block_length=4)), [1, 2, 3, 4, 5, 6]
    loop, _ = naive.block_generate(Naive(model), prompt, 12, 6, 4)
    assert generate(model, [prompt], 12, 6, cache="block")[0] == loop


def test_ancestral_sampling_of_a_known_distribution():
    """With the exact posterior and one token a step the samples follow the joint distribution."""
    model = ExactPosterior()
    model.parameters()
    n = 4000
    answers = generate(model, [[]] * n, 3, 3, 3, temperature=1.0, remasking="random", seed=0)
    counts = torch.zeros(model.joint.shape, dtype=torch.float64)
    for a in answers:
        counts[tuple(a)] += 1
    expected = n * model.joint
    chi2 = (
        ((counts - expected) ** 2 / expected).sum().item()
    )  # 26 degrees of freedom: mean 26, standard deviation 7.2
    assert chi2 < 26 + 5 * 7.2


def test_infill_writes_masks_and_nothing_else():
    model = tiny(vocab_size=40)
    sequences = [[1, MASK, 3, MASK, MASK, 6], [MASK, 4, MASK], [5, 6, 7, 8, MASK, 1, 2, 3, MASK]]
    for options in (
        dict(),
        dict(block_length=2, steps=8),
        dict(remasking="random", temperature=1.0, seed=0),
        dict(cache="dual", block_length=3),
    ):
        filled = infill(model, sequences, **options)
        for sequence, answer in zip(sequences, filled):
            assert (
                MASK not in answer
                and all(a == s for a, s in zip(answer, sequence) if s != MASK)
                and len(answer) == len(sequence)
            )
    assert infill(model, sequences) == [infill(model, [s])[0] for s in sequences]


def test_every_step_reveals_what_it_says_and_reads_no_other_row():
    model, rows, seen = tiny(vocab_size=40), [], []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (
        rows.append(len(kwargs["select"])),
        forward(*args, **kwargs),
    )[1]
    answer = generate(model, [[1, 2, 3]], 12, 6, 4, on_step=seen.append)[0]
    assert rows == [4, 2] * 3  # the head runs on the masks of the block, nothing else
    assert [int(s.revealed.sum()) for s in seen] == [2] * 6 and [s.number for s in seen] == list(
        range(1, 7)
    )
    assert seen[-1].tokens[0].tolist() == answer
    rows.clear()
    generate(model, [[1, 2, 3]], 12, 6, 4, temperature=1.0, remasking="random", seed=0)
    assert rows == [2] * 6  # chosen blindly: only what is revealed is looked at


# --------------------------------------------------------------------------------------------------
# Batches of rows of any length


OPTIONS = [
    dict(),
    dict(cache="prefix"),
    dict(cache="dual"),
    dict(cache="block"),
    dict(threshold=0.3),
    dict(threshold=0.3, cache="dual"),
    dict(threshold=0.2, cache="prefix"),
    dict(factor=1.0),
    dict(remasking="entropy"),
    dict(remasking="margin", schedule="timesteps"),
    dict(cfg_scale=1.5),
]
CONFIGS = [
    dict(shift=True),
    dict(n_kv_heads=1),
    dict(positions="learned", qk_norm=False),
    dict(local_window=6, global_every=2),
]


def options_and_configs():
    """Every option with a plain model; every model without a cache and with each of them, for rules
    look at logits alone, wherever these come from."""
    plain = [(options, dict()) for options in OPTIONS]
    return plain + [(options, config) for config in CONFIGS for options in OPTIONS[:4]]


@pytest.mark.parametrize("options, config", options_and_configs(), ids=str)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(options, config):
    model = tiny(vocab_size=40, seed=1, **config)
    # Nothing but masks looks the same from everywhere to RoPE: all predictions tie, and rounding
    # decides. So no empty prompt there.
    prompts = RAGGED if config.get("positions") == "learned" else [p for p in RAGGED if p]
    together = generate(model, prompts, 12, 6, 4, **options)
    assert together == [generate(model, [p], 12, 6, 4, **options)[0] for p in prompts]
    assert together == generate(model, iter(prompts), 12, 6, 4, **options)
    for prompt, answer in zip(prompts, together):
        assert (
            answer[: len(prompt)] == prompt
            and len(answer) == len(prompt) + 12
            and MASK not in answer
        )


@pytest.mark.parametrize("cache", [None, "block"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_length", [1, 3, 4])
def test_a_row_of_blocks_does_not_see_the_padding_after_it(block_length, shift, cache):
    """Any number of new tokens, so that the last block is a partial one; and rows that stop before
    others do."""
    for n in (1, 5, 7):
        model = tiny(vocab_size=40, seed=n, block_length=block_length, shift=shift)
        prompts = ragged_sequences(n, rows=3)
        alone = [generate(model, [p], n, 12, cache=cache)[0] for p in prompts]
        assert generate(model, prompts, n, 12, cache=cache) == alone, n
        model.config.eos_token_id = alone[0][
            len(prompts[0]) + (n - 1) // 2
        ]  # one row at least ends early or in its last block
        alone = [generate(model, [p], n, 12, cache=cache)[0] for p in prompts]
        assert generate(model, prompts, n, 12, cache=cache) == alone, n


@pytest.mark.parametrize("cache", [None, "block"])
@pytest.mark.parametrize("shift", [False, True])
def test_a_row_of_gaps_does_not_see_the_padding_after_it(shift, cache):
    for block_length in (1, 3, 4):
        model = tiny(
            vocab_size=40,
            seed=block_length,
            block_length=block_length,
            shift=shift,
            positions="learned",
            qk_norm=False,
        )
        for seed in range(2):
            sequences = ragged_sequences(seed, rows=3, longest=11)
            gaps = [
                [MASK if (i + seed) % 3 == 0 else token for i, token in enumerate(row)] + [MASK]
                for row in sequences
            ]
            alone = [infill(model, [row], 12, cache=cache)[0] for row in gaps]
            assert infill(model, gaps, 12, cache=cache) == alone, (block_length, seed)


@pytest.mark.parametrize(
    "config,caches",
    [
        (dict(), (None, "prefix", "dual", "block")),
        (dict(block_length=3), (None, "block")),
        (dict(block_length=3, shift=True), ("block",)),
        (dict(causal=True, shift=True), (None,)),
    ],
    ids=str,
)
def test_a_ragged_batch_may_fill_the_context(config, caches):
    """Rows shorter than the longest are fed at positions that exist, also where positions are
    learned and the longest takes all of them."""
    model = tiny(vocab_size=40, max_len=14, positions="learned", qk_norm=False, **config)
    prompts = ragged_sequences(1, longest=8)
    for cache in caches:
        alone = [generate(model, [p], 6, 6, 3, cache=cache)[0] for p in prompts]
        assert generate(model, prompts, 6, 6, 3, cache=cache) == alone, cache


@pytest.mark.parametrize(
    "options",
    [
        dict(remasking="low_confidence"),
        dict(remasking="random"),
        dict(remasking="ancestral"),
        dict(cache="dual"),
    ],
    ids=str,
)
def test_each_row_has_its_own_random_stream(options):
    model = tiny(vocab_size=40)
    call = lambda prompts, seed: generate(
        model, prompts, 12, 12, 4, temperature=1.0, seed=seed, **options
    )  # noqa: E731
    together = call(RAGGED, 5)
    assert together[0] == call(RAGGED[:1], 5)[0] and together[:2] == call(RAGGED[:2], 5)
    assert together == call(RAGGED, 5) != call(RAGGED, 6)
    assert all(MASK not in answer for answer in together)


@pytest.mark.parametrize("shift", [False, True])
def test_the_block_cache_is_exact(shift):
    model = tiny(vocab_size=40, block_length=4, shift=shift)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 1, 2], [5, 5, 5, 5]]
    for steps in (3, 6, 12):
        assert generate(model, prompts, 12, steps, cache="block") == generate(
            model, prompts, 12, steps
        )


def test_steps_in_which_a_row_writes_nothing_do_no_harm():
    """An autoregressive row that the coin leaves out feeds nothing, and so has no new keys in its
    cache."""
    model = tiny(causal=True, shift=True)
    options = dict(max_new_tokens=6, steps=12, remasking="ancestral")
    assert generate(model, [[1, 2, 3], [4, 5, 6]], seed=[3, 4], **options) == [
        generate(model, [p], seed=s, **options)[0] for p, s in (([1, 2, 3], 3), ([4, 5, 6], 4))
    ]


# --------------------------------------------------------------------------------------------------
# Ends of text


def test_autoregressive_models_decode_greedily_and_stop():
    model = tiny(vocab_size=40, causal=True, shift=True, mask_token_id=None, bos_token_id=0)
    greedy = []
    for prompt in ([1, 2, 3], [7]):
        x = list(prompt)
        for _ in range(10):
            x.append(model(torch.tensor([x]))[0, -1].argmax().item())
        greedy.append(x)
    assert generate(model, [[1, 2, 3], [7]], 10) == greedy
    model.config.eos_token_id = greedy[0][6]
    stopped = generate(model, [[1, 2, 3], [7]], 10)
    assert stopped[0] == greedy[0][: greedy[0].index(greedy[0][6], 3) + 1]
    assert len(generate(model, [[]], 5)[0]) <= 5


def test_a_block_model_stops_after_the_block_with_an_end_of_text():
    model = tiny(vocab_size=40, block_length=4)
    full = generate(model, [[1, 2, 3, 4]], 16, 16)[0]
    model.config.eos_token_id = full[9]
    where = full.index(full[9], 4)
    assert generate(model, [[1, 2, 3, 4]], 16, 16)[0] == full[: 4 + ((where - 4) // 4 + 1) * 4]


def test_any_of_several_ends_of_text_stops():
    """Llama 3 lists several: generation stops at the first that comes."""
    model = tiny(vocab_size=40, causal=True, shift=True, mask_token_id=None, bos_token_id=0)
    prompt = [1, 2, 3]
    full = generate(model, [prompt], 10)[0]
    absent = next(token for token in range(40) if token not in full)
    blocks = tiny(vocab_size=40, block_length=4)
    written = generate(blocks, [prompt], 16, 16)[0]
    unseen = next(token for token in range(40) if token not in written)
    for cache in (None, "block"):
        for order in (1, -1):
            model.config.set_ends([absent, full[6]][::order])
            assert generate(model, [prompt], 10)[0] == full[: full.index(full[6], 3) + 1]
            blocks.config.set_ends([unseen, written[8]][::order])
            after = 3 + ((written.index(written[8], 3) - 3) // 4 + 1) * 4
            assert (
                after < len(written)
                and generate(blocks, [prompt], 16, 16, cache=cache)[0] == written[:after]
            )
    model.config.set_ends([absent])
    assert generate(model, [prompt], 10)[0] == full


# --------------------------------------------------------------------------------------------------
# Seeds and mistakes


def test_seeds_and_temperatures_at_the_edge():
    model, prompts = tiny(), [[1, 2], [3]]
    state = torch.get_rng_state()
    assert generate(model, prompts, 8, 8, 8, temperature=1.0) != generate(
        model, prompts, 8, 8, 8, temperature=1.0
    ), "no seed: anew"
    assert torch.equal(state, torch.get_rng_state()), "and torch's own numbers are left alone"
    assert generate(model, prompts, 8, 8, 8, temperature=1.0, seed=np.int64(5)) == generate(
        model, prompts, 8, 8, 8, temperature=1.0, seed=5
    )
    assert generate(model, prompts, 8, 8, 8, temperature=1e-40) == generate(model, prompts, 8, 8, 8)
    assert infill(model, [[1, MASK, 2]], block_length=10**30) == infill(model, [[1, MASK, 2]])


BAD = [
    (dict(prompts=[[1, MASK]]), "mask token at position 1"),
    (dict(prompts=[[1, 40]]), "outside the vocabulary"),
    (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(max_new_tokens=80, block_length=8), "exceed the model's context of 64"),
    (dict(steps=0), "steps"),
    (dict(steps=2), "too few for 3 blocks"),
    (dict(block_length=0), "block_length"),
    (dict(block_length=13), "block_length"),
    (dict(temperature=-1.0), "temperature"),
    (dict(temperature=math.nan), "temperature"),
    (dict(temperature=math.inf), "temperature"),
    (dict(remasking="best"), "remasking must be one of"),
    (dict(threshold=1.5), "threshold"),
    (dict(factor=0.0), "factor"),
    (dict(factor=1.0, threshold=0.5), "exclude"),
    (dict(threshold=0.5, remasking="random"), "low_confidence"),
    (dict(cache="magic"), "cache"),
    (dict(cfg_scale=-1.0), "cfg_scale"),
    (dict(cfg_scale=1.0, cache="dual"), "without a cache"),
    (dict(schedule="fast"), "schedule"),
    (dict(top_p=1.5), "top_p must be"),
    (dict(top_k=0), "top_k"),
    (dict(alg_temp=-1.0), "alg_temp must not"),
    (dict(alg_temp=1.0, remasking="random"), "needs a rule that asks"),
    (dict(alg_temp=1.0, factor=1.0), "exclude"),
    (dict(entropy_bound=-0.1), "entropy_bound must not"),
    (dict(entropy_bound=0.1, threshold=0.5), "exclude"),
    (dict(defer=[1], remasking="random"), "asks the model"),
    (dict(remask=0.1), "remask needs"),
    (dict(remask=2.0, remasking="ancestral"), "remask must be"),
    (dict(remask_schedule="often"), "remask_schedule must be one of"),
    (dict(remask_schedule="conf"), "remask_schedule says how often remask"),
    (dict(schedule="timesteps", threshold=0.5), "schedule is how many .* and threshold decides"),
    (dict(schedule="even", factor=1.0), "and factor decides that itself"),
    (dict(schedule="even", entropy_bound=1.0), "and entropy_bound decides that itself"),
    (dict(schedule="even", remasking="ancestral"), "and remasking ancestral decides that itself"),
    (dict(suppress=[40]), "outside the vocabulary"),
    (dict(defer=[-1]), "outside the vocabulary"),
    (dict(seed=[1, 2]), "one for each row, 1, got"),
    (dict(top_p=math.nan), "top_p"),
    (dict(entropy_bound=math.nan), "entropy_bound"),
    (dict(prompts=[[1.5, 2.0]]), "token ids are whole numbers"),
]


@pytest.mark.parametrize("options,message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(options, message):
    options = {**dict(prompts=[[1, 2]], max_new_tokens=12, steps=6, block_length=4), **options}
    with pytest.raises(ValueError, match=message):
        generate(tiny(vocab_size=40), **options)


def test_other_bad_arguments_are_named():
    model = tiny()
    with pytest.raises(ValueError, match="nothing to fill"):
        infill(model, [[1, 2]])
    with pytest.raises(ValueError, match="cannot fill in the middle"):
        infill(tiny(causal=True), [[1, MASK]])
    with pytest.raises(TypeError):
        generate(model, [[1]], step=2)  # a misspelled option must not pass in silence
    assert generate(model, []) == []
    reader = tiny(causal=True, shift=True)      # one token a pass, from left to right
    for name, value in (("threshold", 0.5), ("factor", 1.0), ("entropy_bound", 1.0),
                        ("alg_temp", 1.0), ("defer", [1]), ("schedule", "even")):
        with pytest.raises(ValueError, match=f"{name} .*autoregressive model"):
            generate(reader, [[1]], 4, **{name: value})


def test_a_block_that_nobody_asked_for_is_never_too_long():
    model = tiny(vocab_size=40)
    assert generate(model, [[1, 2]], 8, 8) == generate(model, [[1, 2]], 8, 8, 8)
    assert generate(model, [[1, 2]], 40, 40) == generate(model, [[1, 2]], 40, 40, 32)
