"""evaluation/likelihood.py: log p of an answer against enumeration, its estimators' errors against
their spread, and guidance against its formula."""
import math

import pytest
import torch
import torch.nn.functional as F
from models import MASK, ragged_sequences, tiny, tokens_of

import diffusion
from evaluation.likelihood import ESTIMATORS, guided_nll, log_likelihood


def test_log_likelihood_is_exact_where_it_can_be():
    prefixes, targets = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], [[3, 1], [2, 2, 4], [7]]
    causal = tiny(causal=True, shift=True)
    values, errors = log_likelihood(causal, prefixes, targets, batch_size=2)
    for prefix, target, value in zip(prefixes, targets, values):
        logp = causal(torch.tensor([prefix + target])).log_softmax(-1)[0]
        assert value.item() == pytest.approx(
            sum(logp[len(prefix) + i - 1, token].item() for i, token in enumerate(target)), rel=1e-5
        )
    assert (errors == 0).all()
    model = tiny()
    values, errors = log_likelihood(model, prefixes[2:], targets[2:])
    assert errors[0] == 0 and values[0].item() == pytest.approx(
        model(torch.tensor([prefixes[2] + [MASK]])).log_softmax(-1)[0, -1, 7].item(), rel=1e-5
    )


@pytest.mark.parametrize("settings", [{}, {"block_length": 4}, {"shift": True}])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_are_unbiased_and_their_errors_honest(estimator, settings):
    """Of a target whose sets can all be listed: the mean over streams is the exact bound, the
    spread what the errors say."""
    model, prefixes, targets, n = tiny(**settings), [[1, 2, 3]], [[3, 1, 4, 1, 5]], 300
    exact, error = log_likelihood(model, prefixes, targets, num_samples=31)
    assert error[0] == 0
    values, errors = log_likelihood(
        model,
        prefixes * n,
        targets * n,
        num_samples=10,
        estimator=estimator,
        streams=range(n),
        batch_size=20_000,
    )
    spread = values.std().item()
    assert abs(values.mean() - exact[0]) < 3.5 * spread / math.sqrt(n)
    assert 0.85 < errors.square().mean().sqrt() / spread < 1.15


def test_dealt_sets_beat_lladas():
    model, (prefixes, targets) = tiny(), ([[1, 2, 3]] * 200, [[3, 1, 4, 1, 5, 9, 2, 6]] * 200)
    spread = {
        name: log_likelihood(
            model,
            prefixes,
            targets,
            num_samples=24,
            estimator=name,
            streams=range(200),
            batch_size=20_000,
        )[0]
        .std()
        .item()
        for name in ("llada", "dealt")
    }
    assert spread["dealt"] < 0.6 * spread["llada"]


def test_a_request_does_not_depend_on_its_company():
    model, prefixes, targets = (
        tiny(),
        [[1, 2, 3], [4], [], [5, 6]],
        [[3, 1, 4, 1, 5, 9], [2, 6], [1, 1, 1, 2, 3, 4], []],
    )
    together, errors = log_likelihood(model, prefixes, targets, num_samples=8, batch_size=100)
    for i in range(4):
        alone, error = log_likelihood(
            model, prefixes[i : i + 1], targets[i : i + 1], num_samples=8, batch_size=1
        )
        assert alone[0].item() == pytest.approx(together[i].item(), rel=1e-5) and error[
            0
        ].item() == pytest.approx(errors[i].item(), abs=1e-4)
    assert together[3] == 0 and errors[3] == 0  # nothing is certain
    passes = []
    log_likelihood(
        model,
        prefixes,
        targets,
        num_samples=8,
        run_passes=lambda run, work: [passes.append(len(w)) or run(w) for w in work],
    )
    assert len(passes) == 1 and sum(passes) <= 8 + 3 + 8  # a set that is drawn twice is asked once


def test_guidance_equals_the_formula():
    """LLaDA's eq. 16: logits without the prefix plus (1 + scale) times the difference that it
    makes."""
    model, prefix, target = tiny(), [1, 2, 3], [4]
    (value,), _ = log_likelihood(model, [prefix], [target], cfg_scale=0.5)
    with_prefix, without = (
        model(torch.tensor([prefix + [MASK]]))[0, -1],
        model(torch.tensor([[MASK] * 4]))[0, -1],
    )
    assert value.item() == pytest.approx(
        (without + 1.5 * (with_prefix - without)).log_softmax(-1)[4].item(), rel=1e-5
    )


def nll_of(model, tokens, mask, shown, given, cfg_scale):
    if cfg_scale:
        return guided_nll(model, tokens, mask, shown, given, cfg_scale)
    return diffusion.masked_nll(model, tokens, mask, shown)


@pytest.mark.parametrize(
    "config",
    [
        dict(block_length=4),
        dict(block_length=4, shift=True),
        dict(causal=True, shift=True),
        dict(shift=True),
        dict(local_window=4, global_every=2),
    ],
    ids=str,
)
@torch.no_grad()
def test_padding_changes_no_likelihood(config):
    """masked_nll of a row among longer ones is that of the row alone, whatever stands in the
    padding; log_likelihood and cfg too."""
    model, rows = tiny(**config), ragged_sequences(5, longest=11)
    width = max(map(len, rows))
    tokens = torch.stack([F.pad(torch.tensor(row), (0, width - len(row)), value=7) for row in rows])
    shown = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    mask = (
        (torch.arange(width) % 3 < 2)
        & shown
        & ((torch.arange(width) > 0) | (not model.config.causal))
    )
    scales = (0.0,) if model.config.causal or model.config.block_length else (0.0, 1.5)
    given = torch.arange(width).expand(tokens.shape) < 1
    for cfg_scale in scales:
        together = nll_of(model, tokens, mask, shown, given, cfg_scale)
        assert (together[~mask] == 0).all()
        for b, row in enumerate(rows):
            alone = nll_of(
                model,
                torch.tensor([row]),
                mask[b : b + 1, : len(row)],
                None,
                given[b : b + 1, : len(row)],
                cfg_scale,
            )
            torch.testing.assert_close(together[b, : len(row)], alone[0], rtol=1e-4, atol=1e-5)


def test_tokens_of_a_tensor_are_those_of_a_list():
    """The sets that are hidden are drawn by the tokens, whatever they came in."""
    model, prefix, target = tiny(), tokens_of((3,)), tokens_of((8,), seed=1)
    lists = log_likelihood(model, [prefix.tolist()], [target.tolist()], num_samples=8)
    assert log_likelihood(model, [prefix], [target], num_samples=8) == lists
    assert log_likelihood(model, prefix[None], target.numpy()[None], num_samples=8) == lists


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_samples=0), "num_samples must be at least 1"),
        (dict(estimator="best"), "estimator must be one of llada, stratified, dealt"),
        (dict(cfg_scale=-1.0), "cfg_scale must not be negative"),
    ],
)
def test_log_likelihood_says_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(tiny(), [[1]], [[2, 3]], **arguments)
    with pytest.raises(ValueError, match="exceed the context of 64"):
        log_likelihood(tiny(max_len=64), [[1] * 60], [[2] * 5])
    for prefix, target in (([1], [2, 10**6]), ([-1], [2])):
        with pytest.raises(ValueError, match="is outside the vocabulary of"):
            log_likelihood(tiny(), [prefix], [target])
