"""policy.py against the reference's numbers, against what its docstrings promise, and its gradients
against finite differences."""
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

from common import stream
from model import Config, Transformer
from policy import (
    ESTIMATORS,
    Answers,
    Views,
    bound,
    coupled_views,
    diffu,
    even_sets,
    group_advantages,
    logps_of,
    policy_loss,
    policy_terms,
    spg_loss,
    token_weights,
    trace,
    view_logps,
    wd1_loss,
    wd1_weights,
)


def close(found, expected, tolerance=1e-4):
    """Equal to `tolerance`, relative to the largest number."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    found = found.detach().double()
    return (found - expected).abs().max() <= tolerance * max(expected.abs().max().item(), 1e-8)


# --------------------------------------------------------------------------------------------------
# The reference


@pytest.fixture(scope="module")
def fixtures():
    from conftest import ROOT

    folder = ROOT.parent / "shared" / "fixtures"
    if not folder.exists():
        pytest.skip(f"{folder} is not here: these files stand beside the project, not in it")
    return folder


@pytest.fixture(scope="module")
def reference(fixtures):
    return load_file(fixtures / "grpo.safetensors")


def completions(reference):
    """The Answers of the reference's batch."""
    prompt_mask, mask = reference["prompt_mask"].bool(), reference["completion_mask"].bool()
    tokens = torch.cat((reference["prompt_ids"], reference["completion_ids"]), dim=1)
    none = torch.zeros_like(prompt_mask)
    return Answers(tokens, torch.cat((prompt_mask, torch.zeros_like(mask)), 1),
                   torch.cat((none, mask), 1), torch.cat((prompt_mask, mask), 1))


def test_advantages_are_the_references(reference):
    weights = reference["reward_weights"]
    rewards = (reference["rewards_per_func"] * weights).nansum(1)
    assert close(group_advantages(rewards, 4), reference["advantages"])
    assert close(group_advantages(rewards, 4, scale=True), reference["advantages_scaled"])
    found = group_advantages(reference["coupled.rewards"], 4, leave_one_out=True)
    assert close(found, reference["coupled.advantages_leave_one_out"])


@pytest.mark.parametrize("iteration", ["it0", "it1"])
def test_log_p_of_diffu_is_the_references(iteration, reference, fixtures):
    model = Transformer.from_pretrained(fixtures / "llada", dtype=torch.float32)
    answers = completions(reference)
    noised = reference[f"{iteration}.noised"]
    masked = reference[f"{iteration}.prompt_masked"]
    views = Views(noised[None], answers.answer[None].float())
    mine = diffu(answers, model.config.mask_token_id, stream("views", 0))
    assert torch.equal(mine.tokens[0, :, 10:][answers.answer[:, 10:]],
                       noised[:, 10:][answers.answer[:, 10:]])
    assert (noised[:, :10][masked] == model.config.mask_token_id).all()
    with torch.no_grad():
        found = logps_of(model, answers, views)[:, 10:]
        assert close(found, reference[f"{iteration}.per_token_logps"])
        guided = logps_of(model, answers, views, cfg_scale=1.5)[:, 10:]
        assert close(guided, reference[f"{iteration}.per_token_logps_cfg1.5"])
        everything = torch.ones_like(answers.shown)
        counted = everything.clone()
        counted[:, :10] = False
        answers = Answers(answers.tokens, ~counted, counted, everything)
        found = logps_of(model, answers, Views(noised[None], counted[None].float()))[:, 10:]
        assert close(found, reference[f"{iteration}.per_token_logps_no_attention_mask"])


VARIANTS = {
    "loss": dict(clip=0.5, beta=0.04),
    "loss.grpo": dict(clip=0.5, beta=0.04, mean="answers"),
    "loss.dr_grpo": dict(clip=0.5, beta=0.04, mean="constant"),
    "loss.beta0_eps0_2": dict(clip=0.2, beta=0.0),
    "loss.eps_high": dict(clip=0.2, clip_high=0.28, beta=0.04),
    "loss.delta1_6": dict(clip=0.5, beta=0.04, ratio_cap=1.6),
    "loss.old_none": dict(clip=0.5, beta=0.04, old=None),
}


@pytest.mark.parametrize("iteration", ["it0", "it1"])
def test_losses_are_the_references(iteration, reference):
    def of(name):
        return reference[f"{iteration}.{name}"]

    logps = of("per_token_logps").clone().requires_grad_()
    mask, advantages = reference["completion_mask"], reference["advantages"]
    for name, how in VARIANTS.items():
        old = of("old_per_token_logps") if "old" not in how else None
        how = {key: value for key, value in how.items() if key != "old"}
        loss = policy_loss(logps, old, of("ref_per_token_logps"), advantages, mask, **how)
        assert close(loss, of(name)), name
        if name == "loss":
            loss.backward()
            assert close(logps.grad, of("loss_grad"))
    terms = policy_terms(logps, of("old_per_token_logps"), of("ref_per_token_logps"), advantages,
                         clip=0.5, beta=0.04)
    counted = token_weights(mask)
    assert close((terms.kl * counted).sum(), of("kl"))
    assert close((terms.clipped * counted).sum(), of("clip_ratio"))


def test_truncated_answers_can_be_left_out(reference):
    """A mask without any token of some answers, and one without any token at all."""
    logps, ref = reference["it0.per_token_logps"], reference["it0.ref_per_token_logps"]
    old, mask = reference["it0.old_per_token_logps"], reference["completion_mask_truncated"]
    rows = mask.any(1)
    advantages = reference["advantages"]
    whole = policy_loss(logps, old, ref, advantages, mask, 0.5, 0.04)
    part = policy_loss(logps[rows], old[rows], ref[rows], advantages[rows], mask[rows], 0.5, 0.04)
    assert close(whole, part)
    assert policy_loss(logps, old, ref, advantages, mask * 0, 0.5, 0.04) == 0


def test_coupled_is_the_references(reference, fixtures):
    model = Transformer.from_pretrained(fixtures / "dream", dtype=torch.float32)
    tokens, P = reference["coupled.input_ids"], int(reference["coupled.prompt_length"])
    prompt = (torch.arange(tokens.shape[1]) < P).expand(tokens.shape)
    answers = Answers(tokens, prompt, ~prompt, torch.ones_like(prompt))
    views = coupled_views(answers, model.config.mask_token_id, reference["coupled.mask"],
                          reference["coupled.mask_ratio"].item())
    for i, name in enumerate(("full", "masked", "complement")):
        assert torch.equal(views.tokens[i], reference[f"coupled.noised_{name}"])
    found = views.weight.double().amax((1, 2)) * 2
    assert close(found, reference["coupled.weights"])
    with torch.no_grad():
        found = logps_of(model, answers, views)[:, P:]
    assert close(found, reference["coupled.per_token_logps"])


def test_coupled_from_logits_is_the_references(reference):
    """The reference's own selection, given its logits: iteration, view, row."""
    logits, index = reference["coupled.pure.logits"], reference["coupled.pure.index"]
    mask, weights = reference["coupled.pure.mask"], reference["coupled.pure.weights"]
    logps = logits.log_softmax(-1).view(2, 3, 2, 5, 12)
    token = index.view(2, 1, 2, 5, 1).expand(2, 3, 2, 5, 1)
    found = logps.gather(-1, token)[..., 0]                             # [iteration, view, row, L]
    for i in range(2):
        rows = slice(2 * i, 2 * i + 2)
        everything = torch.ones(2, 5, dtype=torch.bool)
        answers = Answers(index[rows], ~everything, everything, everything)
        views = coupled_views(answers, 0, mask[rows], 1 / weights[3 * i + 1].item())
        estimate = (views.weight * found[i]).sum(0)
        assert close(estimate, reference["coupled.pure.logps"][rows])


def test_wd1_is_the_references(reference):
    logps, mask = reference["it0.per_token_logps"], reference["completion_mask"]
    advantages = reference["advantages"]
    both = wd1_weights(advantages)
    expected = reference["wd1.weights_negative"] - reference["wd1.weights_positive"]
    assert close(both, expected)
    for name, negative in (("wd1", True), ("wd1_positive", False)):
        variable = logps.clone().requires_grad_()
        loss = wd1_loss(variable, advantages, mask, negative)
        loss.backward()
        assert close(loss, reference[f"{name}.loss"])
        assert close(variable.grad, reference[f"{name}.loss_grad"])


# --------------------------------------------------------------------------------------------------
# What is promised


def batch(B=4, P=3, L=5, vocab=12, seed=0):
    """Random Answers of P + L tokens; the second ends early, the sampler wrote two tokens a
    step."""
    generator = stream("answers", seed)
    tokens = torch.randint(0, vocab - 2, (B, P + L), generator=generator)
    prompt = (torch.arange(P + L) < P).expand(B, -1)
    answer = ~prompt
    answer[1:2, P + L - 2:] = False
    order = torch.rand(B, L, generator=generator).argsort(1).argsort(1) // 2
    step = torch.cat((torch.zeros(B, P, dtype=torch.int64), order), dim=1)
    return Answers(tokens, prompt, answer, torch.ones(B, P + L, dtype=torch.bool), step)


def small_model(**settings):
    sizes = dict(vocab_size=12, dim=16, n_layers=1, n_heads=2, max_len=16, mask_token_id=11,
                 eos_token_id=10)
    return Transformer(Config(**sizes | settings)).init_weights(0).double()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_views_hide_what_they_count_and_nothing_else_is_given_away(name):
    """Every token that counts is masked in the view where it does, prompts but for diffu are left
    alone, and what the weights add up to is the number of tokens."""
    answers, totals = batch(), 0
    for seed in range(200):
        views = ESTIMATORS[name](answers, 11, stream("views", seed))
        hidden = views.tokens == 11
        assert (hidden | (views.weight == 0)).all()
        assert not views.weight[:, ~answers.answer].any()
        if name != "diffu":
            assert not hidden[:, answers.prompt].any()
        elif seed == 0:
            assert hidden[:, answers.answer].all()
        totals = totals + views.weight.sum(0)
    # E sum_k weight_k,i = 1: with equal predictions in all views the estimate is log p; coupled's,
    # as its paper has it, is 1.5 times that.
    expected = answers.answer.float() * (1.5 if name == "coupled" else 1.0)
    assert (totals / 200 - expected).abs().max() < 0.25


def test_diffu_masks_the_share_of_the_prompt_that_it_says():
    answers = batch(B=2000)
    hidden = diffu(answers, 11, stream("views", 0), prompt_mask=0.3).tokens[0] == 11
    assert abs(hidden[:, :3].float().mean().item() - 0.3) < 0.02


def test_trace_is_the_chain_of_the_samplers_own_conditionals():
    """Token by token: each is scored given exactly the tokens of earlier steps."""
    model, answers = small_model(), batch()
    views = trace(answers, 11)
    found = logps_of(model, answers, views)
    for b in range(4):
        for i in answers.answer[b].nonzero()[:, 0].tolist():
            seen = answers.tokens[b].clone()
            later = answers.generated[b] & (answers.step[b] >= answers.step[b, i])
            seen[later] = 11
            logp = model(seen[None])[0, i].log_softmax(-1)[answers.tokens[b, i]]
            assert abs(found[b, i] - logp) < 1e-5
    assert len(views.tokens) == 3
    assert len(trace(answers, 11, together=2).tokens) == 2
    with pytest.raises(ValueError, match="the step in which each token was written"):
        trace(Answers(answers.tokens, answers.prompt, answers.answer, answers.shown), 11)


def test_without_the_mask_its_logit_means_nothing():
    """Else a bad answer is made improbable by predicting masks, which no answer holds."""
    model = tiny_model(vocab_size=12, mask_token_id=11, eos_token_id=10)
    answers = Answers(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, True, False, False]]),
                      torch.tensor([[False, False, True, True]]), torch.ones(1, 4).bool())
    views = diffu(answers, 11, stream("views", 0), prompt_mask=0.0)
    for without_mask in (True, False):
        logps = logps_of(model, answers, views, without_mask=without_mask)
        assert logps.isfinite().all()
        gradient = torch.autograd.grad(logps.sum(), model.head.weight)[0][11]
        assert gradient.any().item() != without_mask
    guided = logps_of(model, answers, views, 1.5, without_mask=True)
    assert guided.isfinite().all()


def test_log_p_is_that_of_the_temperature_at_which_answers_were_drawn():
    """Else the policy that learns is another than the one that wrote them."""
    model = tiny_model(vocab_size=12, mask_token_id=11, eos_token_id=10)
    answers = Answers(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, True, False, False]]),
                      torch.tensor([[False, False, True, True]]), torch.ones(1, 4).bool())
    views = diffu(answers, 11, stream("views", 0), prompt_mask=0.0)
    logits = model(views.tokens[0])[0, 2:].index_fill(1, torch.tensor(11), -torch.inf)
    for temperature in (1.0, 0.5):
        found = logps_of(model, answers, views, without_mask=True, temperature=temperature)
        expected = (logits / temperature).log_softmax(-1)[[0, 1], [3, 4]]
        assert torch.allclose(found[0, 2:], expected, atol=1e-5)


def test_bound_is_the_average_over_all_sets():
    """The estimate is unbiased: its mean over draws is LLaDA's eq. 6 by brute force."""
    model, answers = small_model(), batch(B=1, L=3)
    L, exact = 3, 0.0
    for k in range(1, L + 1):
        for chosen in itertools.combinations(range(L), k):
            seen = answers.tokens.clone()
            places = [3 + i for i in chosen]
            seen[0, places] = 11
            logp = model(seen)[0, places].log_softmax(-1)
            nats = logp.gather(1, answers.tokens[0, places, None]).sum()
            exact = exact + nats / (k * math.comb(L, k))
    draws = []
    with torch.no_grad():
        for seed in range(150):
            views = bound(answers, 11, stream("views", seed), num_samples=2)
            draws.append(logps_of(model, answers, views).sum())
    draws = torch.stack(draws)
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(len(draws))


def every_set(L, num_samples, generator):
    """All sets of L tokens, with the weights that make their sum the bound itself."""
    masks = (torch.arange(1, 2**L)[:, None] >> torch.arange(L) & 1).bool()
    each = torch.tensor([1 / (k * math.comb(L, k)) for k in masks.sum(1).tolist()])
    return masks, masks * each[:, None]


def test_even_sets_have_every_size_once():
    masks, weights = even_sets(6, 6, stream("sets", 0))
    assert sorted(masks.sum(1).tolist()) == [1, 2, 3, 4, 5, 6]
    assert torch.allclose(weights.sum(1), torch.ones(6))


def test_views_of_block_diffusion_show_earlier_blocks_as_they_are():
    model, answers = small_model(block_length=4), batch()
    found = logps_of(model, answers, diffu(answers, 11, stream("views", 0), prompt_mask=0.0))
    # The tokens of the second block, 4..7, are asked given the first one as it is.
    clean = answers.tokens.clone()
    clean[:, 4:] = 11
    visible = torch.arange(8)[:, None] // 4 >= torch.arange(8) // 4
    logits = model(clean, attention_mask=visible[None].expand(4, -1, -1))
    expected = logits.log_softmax(-1).gather(2, answers.tokens[..., None])[..., 0]
    assert torch.allclose(found[:, 4:], (expected * answers.answer)[:, 4:].to(found), atol=1e-5)


def objective(name, model, answers, views):
    """A loss of each kind, with an old and a reference policy a little off."""
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=torch.float64)
    if name == "spg":
        found = view_logps(model, answers, views)
        return spg_loss(found, views.weight.double(), advantages, answers.answer)
    logps = logps_of(model, answers, views)
    if name == "wd1":
        return wd1_loss(logps, advantages, answers.answer)
    shift = 0.1 * torch.randn(logps.shape, generator=stream("shift", 0), dtype=torch.float64)
    old, ref = logps.detach() + shift, logps.detach() - 2 * shift
    return policy_loss(logps, old, ref, advantages, answers.answer, clip=0.1, beta=0.1)


@pytest.mark.parametrize("estimator, name", [*itertools.product(ESTIMATORS, ["grpo", "wd1"]),
                                             ("bound", "spg")])
def test_gradients_are_finite_differences(estimator, name):
    """In float64, along a random direction in the space of all weights."""
    model, answers = small_model(), batch()
    views = ESTIMATORS[estimator](answers, 11, stream("views", 1))
    objective(name, model, answers, views).backward()
    direction = [torch.randn(p.shape, generator=stream("direction", i), dtype=torch.float64)
                 for i, p in enumerate(model.parameters())]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction)).item()
    # Old and reference policy stay where they were.
    still = policy_still(name, model, answers, views)
    values = []
    step = 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction):
                p += sign * step * d
        values.append(still().item())
    difference = (values[0] - values[1]) / (2 * step)
    assert difference == pytest.approx(slope, rel=2e-4, abs=1e-7)


def policy_still(name, model, answers, views):
    """`objective` as a function of the model's weights alone."""
    if name != "grpo":
        return lambda: objective(name, model, answers, views)
    before = logps_of(model, answers, views).detach()
    shift = 0.1 * torch.randn(before.shape, generator=stream("shift", 0), dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=torch.float64)

    def loss():
        logps = logps_of(model, answers, views)
        return policy_loss(logps, before + shift, before - 2 * shift, advantages, answers.answer,
                           clip=0.1, beta=0.1)

    return loss


def test_spg_lies_between_its_bounds():
    """Of all sets the upper bound is above the lower one, and only bad answers feel it."""
    model, answers = small_model(), batch()
    views = bound(answers, 11, None, sets=every_set)
    weight = views.weight.sum(0)
    assert torch.allclose(weight, answers.answer.float())
    found, ones = view_logps(model, answers, views), torch.ones(4)
    lower = -spg_loss(found, views.weight, ones, answers.answer)
    upper = spg_loss(found, views.weight, -ones, answers.answer, mix=1.0, beta=1.0)
    mixed = spg_loss(found, views.weight, -ones, answers.answer, mix=0.25, beta=1.0)
    assert upper > lower
    assert torch.allclose(mixed, 0.25 * upper + 0.75 * lower)


def test_padding_and_company_change_nothing():
    """An answer's estimate is the same alone and in a batch, where others are longer."""
    model, answers = tiny_model(), batch(vocab=200)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.o.weight, std=0.3)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.3)
    views = trace(answers, 257)
    wide = [torch.nn.functional.pad(x, (0, 4)) for x in
            (answers.tokens, answers.prompt, answers.answer, answers.shown, answers.step)]
    padded = Answers(*wide)
    with torch.no_grad():
        found = logps_of(model, padded, trace(padded, 257))
        for b in range(4):
            alone = logps_of(model, answers.rows([b]), views.rows([b]))
            assert torch.allclose(found[b, :8], alone[0], atol=1e-5)
    assert not found[:, 8:].any()


def test_rewards_may_be_whole_numbers_in_any_memory():
    solved = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 0]])
    expected = group_advantages(torch.tensor([1.0, 0, 1, 1]), 2, leave_one_out=True)
    for rewards in (solved[:, 0], solved[:, 0].bool(), solved.float()[:, 0], [1, 0, 1, 1]):
        assert torch.equal(group_advantages(rewards, 2, leave_one_out=True), expected)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="7 rewards do not divide into groups of 2"):
        group_advantages(torch.zeros(7), 2)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        group_advantages(torch.zeros(7), 1, leave_one_out=True)
    with pytest.raises(ValueError, match="mean must be one of tokens, answers, constant"):
        token_weights(torch.ones(1, 2), "median")
    logps, A, answer = torch.randn(4, 5), torch.randn(4), torch.ones(4, 5, dtype=torch.bool)
    for wrong in (A[:, None], A[:1], logps):
        with pytest.raises(ValueError, match=r"advantages must have shape \[4\], got"):
            policy_loss(logps, None, None, wrong, answer)
        with pytest.raises(ValueError, match=r"advantages must have shape \[4\], got"):
            wd1_loss(logps, wrong, answer)
        with pytest.raises(ValueError, match=r"advantages must have shape \[4\], got"):
            spg_loss(logps[None], answer[None].float(), wrong, answer)
    for name, wrong in (("answer", dict(answer=answer[0])), ("old", dict(old=logps[:, :1])),
                        ("ref", dict(ref=logps[0]))):
        with pytest.raises(ValueError, match=rf"{name} must have shape \[4, 5\], got"):
            policy_loss(**{"logps": logps, "old": None, "ref": None, "advantages": A,
                           "answer": answer, **wrong})
    assert not group_advantages(torch.full((6,), 0.3), 3, scale=True).abs().max() > 1e-3
