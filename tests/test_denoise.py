"""The plain sampler, and the engine held to it: token for token, for every rule that both have."""
import math

import pytest
import torch

from diffusion import BLIND, REMASKING, denoise
from model import Config, Transformer
from sampling.engine import generate, infill

MASK = 39
SHAPE = dict(vocab_size=40, dim=16, n_layers=2, n_heads=2, max_len=64, mask_token_id=MASK,
             bos_token_id=1)
KINDS = {
    "ours": {},
    "shifted": dict(shift=True),
    "by Dream's steps": dict(shift=True, step_schedule="timesteps"),
    "in blocks": dict(block_length=4),
    "in shifted blocks": dict(block_length=5, shift=True),
    "local": dict(local_window=6, global_every=2),
}


def random_model(seed=0, **options):
    """A model whose predictions are far from uniform, and never the mask token."""
    model = Transformer(Config(**SHAPE | options)).init_weights(seed).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.4, generator=torch.Generator().manual_seed(p.numel() + seed))
    model.head.weight.data[MASK] = 0
    return model


def canvas(prompt, n):
    return torch.tensor([prompt + [MASK] * n])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_equals_the_plain_sampler(kind, remasking, temperature):
    model, prompt = random_model(**KINDS[kind]), [3, 1, 4, 1, 5, 9, 2]
    for steps, block_length in ((6, 12), (8, 4), (40, 5)):
        how = dict(temperature=temperature, remasking=remasking)
        plain = denoise(model, canvas(prompt, 12), steps, block_length=block_length, seed=5,
                        prompt_len=len(prompt), **how)
        assert not (plain == MASK).any() and plain[0, :7].tolist() == prompt
        assert generate(model, [prompt], 12, steps, block_length, seed=5, **how) == plain.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_thresholds_equal_the_plain_sampler(kind, threshold):
    model, prompt = random_model(1, **KINDS[kind]), [3, 1, 4]
    plain = denoise(model, canvas(prompt, 13), 1, block_length=5, threshold=threshold, prompt_len=3)
    assert generate(model, [prompt], 13, 1, 5, threshold=threshold) == plain.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_infill_of_a_batch_equals_the_plain_sampler(kind, remasking):
    """Two rows of one length: the second draws from the stream (seed, 1)."""
    model = random_model(2, **KINDS[kind])
    rows = torch.randint(0, 38, (2, 17), generator=torch.Generator().manual_seed(1))
    rows[0, 2:9] = MASK
    rows[1, [0, 5, 11, 16]] = MASK
    how = dict(temperature=1.0, remasking=remasking, seed=3)
    plain = denoise(model, rows, 6, block_length=6, **how)
    assert torch.equal(plain[rows != MASK], rows[rows != MASK])
    assert infill(model, rows.tolist(), 6, 6, **how) == plain.tolist()


@pytest.mark.parametrize("schedule, written", [("even", [2, 3, 1]), ("timesteps", [2, 1, 3])])
def test_blocks_from_the_start_may_hold_given_tokens(schedule, written):
    """LLaDA2's schedule divides all five positions of a block, but the masks alone are left: two in
    the first block, four in the second, two steps for each."""
    model = random_model(3, block_length=5, blocks_from_start=True, step_schedule=schedule)
    row = [MASK, MASK, 1, 2, 3, MASK, MASK, MASK, MASK, 4]
    seen = []
    filled = infill(model, [row], 4, 5, on_step=seen.append)
    assert [int(step.revealed.sum()) for step in seen] == written
    assert filled == denoise(model, torch.tensor([row]), 4, block_length=5).tolist()


def test_an_autoregressive_model_is_the_case_of_blocks_of_one():
    model = random_model(3, causal=True, mask_token_id=None)
    masks = torch.full((1, 12), 40)
    masks[0, :3] = torch.tensor([3, 1, 4])
    for how in (dict(), dict(temperature=0.9, seed=1)):
        plain = denoise(model, masks, 12, **how)
        assert generate(model, [[3, 1, 4]], 9, 9, **how) == plain.tolist()
    greedy = [3, 1, 4]
    while len(greedy) < 12:
        greedy.append(model(torch.tensor([greedy]))[0, -1].argmax().item())
    assert denoise(model, masks, 12)[0].tolist() == greedy


@pytest.mark.parametrize("name", sorted(set(REMASKING) - set(BLIND)))
def test_a_rule_decides_what_is_kept_first(name):
    """After one of two steps the kept half has the highest scores of a pass over all masks."""
    model, rows = random_model(4), torch.arange(20)[None]
    rows[0, 1:20:2] = MASK
    logits = model(rows)[0]
    score = REMASKING[name](logits, logits.argmax(-1)).masked_fill(rows[0] != MASK, -torch.inf)
    best = score.topk(5).indices.tolist()
    first = []
    infill(model, rows.tolist(), 2, remasking=name, on_step=first.append)
    assert sorted(best) == first[0].revealed[0].nonzero()[:, 0].tolist()


def test_a_temperature_next_to_zero_is_zero():
    """Where logits / temperature overflows, a token beyond the vocabulary was drawn."""
    model, tokens = random_model(), canvas([1], 6)
    assert torch.equal(denoise(model, tokens, 6, 1e-40), denoise(model, tokens, 6))


def test_denoise_says_what_cannot_be():
    with pytest.raises(ValueError, match="this model has no mask token"):
        denoise(random_model(mask_token_id=None), canvas([1], 3), 3)
    for wrong, words in ((dict(remasking="surest"), "remasking must be one of low_confidence"),
                         (dict(schedule="slow"), "schedule must be one of even, timesteps"),
                         (dict(steps=0), "steps and block_length must be at least 1, got 0"),
                         (dict(block_length=-1), "must be at least 1, got 3 and -1"),
                         (dict(temperature=-1.0), "temperature must not be negative, got -1.0"),
                         (dict(temperature=math.nan), "temperature must not be negative, got nan"),
                         (dict(threshold=1.5), "threshold needs low_confidence and must be betw"),
                         (dict(threshold=0.5, remasking="random"), "threshold needs low_confiden"),
                         (dict(tokens=canvas([1, 99], 3)), "token 99 is outside the vocabulary"),
                         (dict(tokens=canvas([-1], 3)), "token -1 is outside the vocabulary"),
                         (dict(tokens=canvas([1], 9999)), "exceed the model's context of")):
        with pytest.raises(ValueError, match=words):
            denoise(random_model(), **{"tokens": canvas([1], 3), "steps": 3, **wrong})
    autoregressive = random_model(causal=True, shift=True)
    with pytest.raises(ValueError, match="edit_threshold is not for autoregressive models"):
        denoise(autoregressive, canvas([1], 3), 3, threshold=0.5, edit_threshold=0.5)
