"""The mathematics of diffusion.py against closed forms, enumeration, naive re-implementations and
recorded losses. The samplers are in test_denoise.py, test_engine.py and test_rules.py."""
import itertools
import math
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import MASK, ExactPosterior, tiny, tokens_of
from safetensors.torch import load_file

import diffusion
import kernels
from diffusion import (
    ar_loss,
    block_loss,
    hybrid_loss,
    mask_tokens,
    mdlm_loss,
    nelbo,
    sample_t,
    sample_tokens,
    sft_loss,
    uniform_loss,
    weight,
)
from evaluation.likelihood import log_likelihood
from model import Config, Transformer
from sampling.engine import generate

# --------------------------------------------------------------------------------------------------
# Schedules and corruption


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_schedule_ends_and_derivative(name):
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64, requires_grad=True)
    alpha, d_alpha = diffusion.SCHEDULES[name](t)
    torch.testing.assert_close(torch.autograd.grad(alpha.sum(), t)[0], d_alpha)
    ends = diffusion.SCHEDULES[name](torch.tensor([0.0, 1.0]))[0]
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(weight(t, name), -d_alpha / (1 - alpha))
    if name == "linear":
        torch.testing.assert_close(weight(t), 1 / t)


def test_times_are_uniform_and_evenly_spread():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample_t((16,), generator) for _ in range(2000)])  # [2000, 16]
    assert draws.min() > 0 and draws.max() <= 1
    for bin in range(10):  # every sequence sees every time equally
        share = ((draws > bin / 10) & (draws <= (bin + 1) / 10)).float().mean(0)
        assert (share - 0.1).abs().max() < 5 * math.sqrt(0.09 / 2000)
    cells = (
        (draws * 16).ceil().sort(dim=1).values
    )  # one time in each sixteenth, up to rounding at its edge
    assert ((cells - torch.arange(1, 17)).abs() <= 1).all()


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_mask_probability_by_counting(name):
    model = tiny()
    tokens = tokens_of((20000, 8))
    for t in (0.1, 0.5, 0.9):
        times = torch.full((20000,), t)
        x_t, mask = diffusion.corrupt(
            model,
            tokens,
            times[:, None].expand(-1, 8),
            schedule=name,
            generator=torch.Generator().manual_seed(1),
        )
        expected = 1 - diffusion.SCHEDULES[name](torch.tensor(t))[0].item()
        assert abs(mask.float().mean().item() - expected) < 5 * math.sqrt(
            expected * (1 - expected) / mask.numel()
        )
        assert (x_t[mask] == MASK).all() and torch.equal(x_t[~mask], tokens[~mask])


def test_only_maskable_tokens_are_masked_or_counted():
    model, tokens = tiny(), tokens_of((4, 10))
    maskable = torch.zeros(4, 10, dtype=torch.bool)
    maskable[:, 6:] = True
    loss = mdlm_loss(model, tokens, t=torch.ones(4), maskable=maskable)
    assert torch.equal(loss.is_masked, maskable) and loss.count == 16
    torch.testing.assert_close(loss.loss, loss.token_nll.sum() / 16)


def test_a_prompt_is_never_masked_even_if_the_caller_masks_it():
    model, tokens = tiny(), tokens_of((2, 12))
    maskable = torch.arange(12).expand(2, 12) >= 5
    mask = maskable & mask_tokens((2, 12), torch.tensor(0.5), torch.Generator().manual_seed(0))
    loss = mdlm_loss(model, tokens, torch.full((2,), 0.5), mask | ~maskable, maskable)
    assert torch.equal(loss.is_masked, mask)
    assert (loss.token_nll[~maskable] == 0).all() and loss.count == maskable.sum()


# --------------------------------------------------------------------------------------------------
# The bound


def test_nelbo_of_the_exact_posterior_is_the_entropy():
    model = ExactPosterior()
    value, error = nelbo(model, model.sample(20000, 1), num_samples=2, seed=2, batch_size=5000)
    assert error < 0.01 and abs(value - model.entropy() / 3) < 4 * error


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_mdlm_loss_of_the_exact_posterior_is_the_entropy_for_every_schedule(name):
    model = ExactPosterior()
    estimates = torch.stack(
        [
            mdlm_loss(
                model,
                model.sample(500, s),
                schedule=name,
                generator=torch.Generator().manual_seed(s),
            ).nelbo.detach()
            for s in range(60)
        ]
    )
    # times below 1e-3 are not drawn: a thousandth of the bound at most
    assert abs(estimates.mean() - model.entropy() / 3) < 4 * estimates.std() / math.sqrt(60) + 1e-3


def test_bound_by_enumeration_of_all_masks_and_all_orders():
    """For T = 3: sum over the 7 masks with weights (k-1)! (T-k)! / T! = mean over the 6 orders of
    the chain rule."""
    model, x, T = tiny(), tokens_of((1, 3)), 3

    def nll(visible, i):
        inputs = torch.where(torch.tensor([[j in visible for j in range(T)]]), x, MASK)
        return -model(inputs).log_softmax(-1)[0, i, x[0, i]].item()

    by_mask = sum(
        math.factorial(k - 1)
        * math.factorial(T - k)
        / math.factorial(T)
        * sum(
            nll(set(range(T)) - set(masked), i)
            for masked in itertools.combinations(range(T), k)
            for i in masked
        )
        for k in (1, 2, 3)
    )
    by_order = (
        sum(
            nll(set(order[:n]), i)
            for order in itertools.permutations(range(T))
            for n, i in enumerate(order)
        )
        / 6
    )
    assert by_mask == pytest.approx(by_order, rel=1e-5)
    value, error = nelbo(model, x.repeat(4000, 1), seed=0, batch_size=4000)
    assert abs(value * 3 - by_mask) < 4 * error * 3
    values, errors = log_likelihood(
        model, [[]], [x[0].tolist()], num_samples=7
    )  # enough for all seven
    assert -values[0].item() == pytest.approx(by_mask, rel=1e-5) and errors[0] == 0


def test_a_uniform_model_costs_log_v():
    model = Transformer(
        Config(vocab_size=12, dim=16, n_layers=1, n_heads=2, mask_token_id=MASK)
    ).init_weights()
    torch.nn.init.zeros_(model.head.weight)
    value, error = nelbo(model, tokens_of((64, 16)), seed=3)
    assert value == pytest.approx(math.log(12), abs=4 * error + 1e-6)


# --------------------------------------------------------------------------------------------------
# The losses and their gradients


def test_loss_and_gradient_equal_the_plain_formula():
    model, tokens, t = tiny(), tokens_of((4, 16)), torch.tensor([0.2, 0.5, 0.7, 1.0])
    mask = mask_tokens((4, 16), t[:, None], torch.Generator().manual_seed(0))
    model.chunk = 5  # does not divide the number of masked tokens
    ours = mdlm_loss(model, tokens, t, mask)
    ours.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    nll = (
        F.cross_entropy(
            model(torch.where(mask, MASK, tokens)).transpose(1, 2), tokens, reduction="none"
        )
        * mask
        / t[:, None]
    )
    (nll.sum() / tokens.numel()).backward()
    torch.testing.assert_close(ours.token_nll, nll.detach(), rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_clipped_weight_changes_the_loss_and_not_the_nelbo():
    model, tokens, t = tiny(), tokens_of((2, 16)), torch.tensor([0.05, 0.9])
    mask = torch.ones(2, 16, dtype=torch.bool)
    clipped, plain = (
        mdlm_loss(model, tokens, t, mask, max_weight=5.0),
        mdlm_loss(model, tokens, t, mask),
    )
    torch.testing.assert_close(clipped.nelbo, plain.nelbo)
    expected = (plain.token_nll * torch.tensor([[5 * 0.05], [1.0]])).mean()
    torch.testing.assert_close(clipped.loss, expected)


def test_no_masked_token_is_a_loss_of_zero_with_a_gradient():
    model = tiny()
    loss = mdlm_loss(
        model, tokens_of((2, 8)), t=torch.full((2,), 0.5), mask=torch.zeros(2, 8, dtype=torch.bool)
    )
    loss.loss.backward()
    assert loss.loss.item() == 0 and all(
        p.grad is None or (p.grad == 0).all() for p in model.parameters()
    )


class LossOf(torch.nn.Module):
    """A loss of a model, as a module whose parameters gradcheck can move."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self):
        return self.loss(self.model)


def check_gradients(model, loss):
    """torch's gradcheck of loss(model), a scalar, by every parameter of the model."""
    holder = LossOf(model, loss)
    names, values = zip(*holder.named_parameters())
    values = [value.detach().clone().requires_grad_() for value in values]

    def value_of(*moved):
        return torch.func.functional_call(holder, dict(zip(names, moved)), ())

    return torch.autograd.gradcheck(value_of, values, fast_mode=True)


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(
            shift=True,
            n_kv_heads=1,
            tie_embeddings=True,
            rope_scaling=dict(rope_type="linear", factor=2.0),
        ),
        dict(
            norm="layer",
            norm_bias=True,
            embed_norm=True,
            local_window=4,
            global_every=2,
            head_transform=True,
            head_bias=True,
        ),
        dict(
            positions="learned",
            norm="layer",
            post_norm=True,
            gated=False,
            qkv_bias=True,
            token_types=2,
            qk_norm=False,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mdlm", "clipped", "sft", "cart", "block", "ar"])
def test_gradients_of_the_losses_in_float64(config, name):
    model, tokens = tiny(dim=8, hidden_dim=8, **config).double(), tokens_of((2, 6))
    t, maskable = torch.tensor([0.3, 0.8], dtype=torch.float64), torch.arange(6).expand(2, 6) > 0
    mask = mask_tokens((2, 6), 0.6, torch.Generator().manual_seed(0))
    shown = torch.ones(2, 6, dtype=torch.bool)
    shown[0, 4:] = False
    losses = {
        "mdlm": lambda m: mdlm_loss(m, tokens, t, mask & shown, maskable & shown, shown),
        "clipped": lambda m: mdlm_loss(m, tokens, t, mask, max_weight=2.0),
        "sft": lambda m: sft_loss(m, tokens, maskable, t, mask),
        "cart": lambda m: sft_loss(m, tokens, maskable, t, mask, cart=0.3),
        "block": lambda m: block_loss(m, tokens, 3, t, mask),
        "ar": lambda m: ar_loss(m, tokens),
    }
    loss = losses[name](model)
    assert loss.loss.dtype == loss.token_nll.dtype == loss.nelbo.dtype == torch.float64
    assert check_gradients(model, lambda m: losses[name](m).loss)


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(shift=True),
        dict(block_length=3),
        dict(causal=True, shift=True),
        dict(local_window=4, global_every=2),
    ],
    ids=str,
)
@torch.no_grad()
def test_float64_is_float64_all_the_way(config):
    """A model in float64 gives likelihoods and losses that a float32 step anywhere between would
    spoil: nothing is rounded to 24 bits."""
    model, tokens = tiny(**config), tokens_of((3, 8))
    mask = torch.arange(8).expand(3, 8) % 2 == 1
    coarse = diffusion.masked_nll(model, tokens, mask)
    exact = diffusion.masked_nll(model.double(), tokens, mask)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(coarse.double(), exact, rtol=1e-4, atol=1e-4)
    assert not torch.equal(exact, exact.float().double())
    moved = tiny(**config).double()
    for parameter in moved.parameters():  # a change that float32 cannot hold
        parameter.mul_(1 + 1e-11)
    change = (diffusion.masked_nll(moved, tokens, mask) - exact).abs()
    assert 0 < change.max() < 1e-8
    value, error = nelbo(model, tokens, seed=3)
    assert value == pytest.approx(
        nelbo(tiny(**config), tokens, seed=3)[0], rel=1e-4
    ) and math.isfinite(error)
    values, _ = log_likelihood(model, [[1, 2], [3]], [[4, 5], [6, 7, 8]])
    torch.testing.assert_close(
        values,
        log_likelihood(tiny(**config), [[1, 2], [3]], [[4, 5], [6, 7, 8]])[0],
        rtol=1e-4,
        atol=1e-4,
    )
    prompts = [[1, 2, 3], [4]]
    assert generate(model, prompts, 6, 6, 6) == [generate(model, [p], 6, 6, 6)[0] for p in prompts]


def test_losses_of_the_fixtures(fixture_path):
    folder = fixture_path("llada").parent
    stored = load_file(folder / "losses.safetensors")
    llada = Transformer.from_pretrained(folder / "llada")
    loss = mdlm_loss(llada, stored["mdlm.tokens"], stored["mdlm.t"], stored["mdlm.mask"])
    torch.testing.assert_close(loss.token_nll, stored["mdlm.token_nll"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.loss.detach(), stored["mdlm.loss"], rtol=1e-4, atol=0)
    qwen = Transformer.from_pretrained(folder / "qwen3", causal=False)
    qwen.config.mask_token_id = qwen.config.vocab_size - 2
    for size in (4, 8, 16):
        loss = block_loss(
            qwen,
            stored[f"bd3lm{size}.tokens"],
            size,
            stored[f"bd3lm{size}.t"],
            stored[f"bd3lm{size}.mask"],
        )
        torch.testing.assert_close(
            loss.loss.detach(), stored[f"bd3lm{size}.loss"], rtol=1e-4, atol=0
        )
        torch.testing.assert_close(
            loss.token_nll, stored[f"bd3lm{size}.token_nll"], rtol=1e-4, atol=1e-4
        )


def test_a_loss_says_what_cannot_be():
    model = tiny()
    with pytest.raises(ValueError, match="no mask token"):
        mdlm_loss(tiny(mask_token_id=None), tokens_of((1, 4)))
    with pytest.raises(ValueError, match="does not divide"):
        block_loss(model, tokens_of((1, 10)), 4)
    with pytest.raises(ValueError, match="t must have shape"):
        mdlm_loss(model, tokens_of((2, 4)), t=torch.ones(3))
    for t in (0.0, 1.5, -1.0, math.nan):                # weights that are infinite or mean nothing
        for loss in (mdlm_loss, sft_loss, lambda *args, t: block_loss(*args, 2, t=t)):
            with pytest.raises(ValueError, match="t must be above 0 and at most 1, got"):
                loss(model, tokens_of((2, 4)), t=torch.tensor([1.0, t]))
    with pytest.raises(ValueError, match="mask must have the shape"):
        mask = torch.ones(2, 5, dtype=torch.bool)
        mdlm_loss(model, tokens_of((2, 4)), t=torch.ones(2), mask=mask)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        nelbo(model, tokens_of((2, 4)), num_samples=0)
    for nothing in (tokens_of((0, 4)), tokens_of((2, 0))):
        with pytest.raises(ValueError, match="there is no token to score"):
            nelbo(model, nothing)


# --------------------------------------------------------------------------------------------------
# Block diffusion and the autoregressive baseline


def test_one_block_of_the_whole_sequence_is_mdlm():
    model, tokens, t = tiny(), tokens_of((3, 12)), torch.tensor([0.3, 0.6, 0.9])
    mask = mask_tokens((3, 12), t[:, None], torch.Generator().manual_seed(0))
    whole, plain = (
        block_loss(model, tokens, 12, t[:, None], mask),
        mdlm_loss(model, tokens, t, mask),
    )
    torch.testing.assert_close(whole.token_nll, plain.token_nll, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_agree_with_the_autoregressive_loss():
    """E[block_loss] over t and masks is the autoregressive loss of the same model: masked tokens
    weigh 1 / t and are masked with t."""
    model, tokens = tiny(causal=True, shift=True), tokens_of((4, 9))
    exact = ar_loss(model, tokens)
    everything = block_loss(model, tokens, 1, torch.ones(4, 9))  # t = 1 masks all, weight 1
    torch.testing.assert_close(
        everything.token_nll[:, 1:], exact.token_nll[:, 1:], rtol=1e-4, atol=1e-5
    )
    draws = torch.stack(
        [
            block_loss(model, tokens, 1, generator=torch.Generator().manual_seed(s))
            .token_nll[:, 1:]
            .mean()
            for s in range(400)
        ]
    )
    assert abs(draws.mean() - exact.loss.item()) < 4 * draws.std() / 20 + 2e-3 * exact.loss.item()


@pytest.mark.parametrize("shift", [False, True])
def test_a_block_sees_itself_noisy_and_the_blocks_before_it_clean(shift):
    model, tokens = tiny(shift=shift), tokens_of((1, 12))
    mask = torch.tensor([[False, True, True, False] * 3])
    t = torch.full((1, 3), 0.5)

    def losses(tokens):
        return block_loss(model, tokens, 4, t, mask).token_nll[0]

    base = losses(tokens)
    for position in range(12):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 11
        differs = (losses(changed) - base).abs() > 1e-6
        if mask[0, position]:  # its own target changes, and later blocks see it clean
            differs[position] = False
        block = position // 4
        may = torch.tensor(
            [
                bool(mask[0, i]) and (i // 4 > block or (i // 4 == block and not mask[0, position]))
                for i in range(12)
            ]
        )
        assert not (differs & ~may).any(), (position, differs)
        assert (differs == may).all()


@pytest.mark.parametrize("config", [{}, dict(block_length=4), dict(causal=True)])
def test_padding_may_stand_in_front(config):
    """RoPE knows distances alone, and blocks are counted from the left. With one token to score
    nothing is drawn."""
    model, tokens = tiny(**config), tokens_of((2, 3))
    last = torch.tensor([False, False, True]).expand(2, 3)
    padded, shown = F.pad(tokens, (4, 0), value=5), torch.arange(7).expand(2, 7) >= 4
    want = pytest.approx(nelbo(model, tokens, maskable=last)[0], rel=1e-4)
    assert nelbo(model, padded, maskable=F.pad(last, (4, 0)), attention_mask=shown)[0] == want
    if model.config.causal:         # and padding does not predict the first token
        want = pytest.approx(nelbo(model, tokens)[0], rel=1e-4)
        assert nelbo(model, padded, attention_mask=shown)[0] == want


@pytest.mark.parametrize("loss", [mdlm_loss, sft_loss, uniform_loss, hybrid_loss])
def test_padding_is_neither_masked_nor_counted(loss):
    how = {"uniform_loss": dict(noise="uniform"), "hybrid_loss": dict(noise="hybrid")}
    model, tokens = tiny(**how.get(loss.__name__, {})), tokens_of((2, 5))
    t, mask = torch.tensor([0.4, 0.8]), torch.ones(2, 5, dtype=torch.bool)
    more = {"replacement": tokens.flip(1)} if "replacement" in signature(loss).parameters else {}
    alone = loss(model, tokens, t=t, mask=mask, **more)
    shown = torch.arange(8).expand(2, 8) < 5
    more = {name: F.pad(value, (0, 3)) for name, value in more.items()}
    padded = loss(model, F.pad(tokens, (0, 3), value=5), t=t, mask=F.pad(mask, (0, 3), value=True),
                  attention_mask=shown, **more)
    assert padded.count == alone.count
    assert padded.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
    assert padded.nelbo.item() == pytest.approx(alone.nelbo.item(), rel=1e-5)
    assert not padded.is_masked[:, 5:].any()


def test_numbers_of_masks_are_spread_over_rows_and_samples():
    """Two rows of 8 tokens in 4 samples: of 8 numbers of masks each is drawn once."""
    maskable = torch.ones(2, 8, dtype=torch.bool)
    config, generator = tiny().config, torch.Generator().manual_seed(5)
    drawn = diffusion.draw_masks(config, maskable, 4, generator)
    counts = torch.cat([mask.sum(1) for mask, _ in drawn])
    assert counts.sort().values.tolist() == list(range(1, 9))
    weights = torch.cat([weights[:, 0] for _, weights in drawn])
    torch.testing.assert_close(weights, 8 / counts)


def test_a_model_is_a_function_with_a_config():
    """What a model of somebody else's must have to be trained and scored: these fields."""
    model, tokens = tiny(), tokens_of((4, 8))

    def other(inputs, attention_mask=None, select=None):
        return model(inputs, attention_mask=attention_mask, select=select)

    other.config = SimpleNamespace(vocab_size=model.config.vocab_size, mask_token_id=MASK,
                                   shift=False, causal=False, block_length=0)
    assert nelbo(other, tokens)[0] == pytest.approx(nelbo(model, tokens)[0], rel=1e-5)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours, others = (mdlm_loss(m, tokens, generator=g) for m, g in zip((model, other), draws))
    torch.testing.assert_close(ours.loss, others.loss)


def test_nothing_predicts_the_first_token_of_an_autoregressive_model():
    model, tokens = tiny(causal=True, shift=True), tokens_of((2, 4))
    with pytest.raises(ValueError, match="does not predict the first token"):
        diffusion.restored(model, tokens, torch.ones(2, 4) > 0, torch.ones(2, 4) > 0)
    with pytest.raises(ValueError, match="does not predict the first token: it must be given"):
        diffusion.denoise(model, torch.full((1, 4), model.config.vocab_size), 4)


def test_nelbo_of_a_block_model_and_of_an_autoregressive_one():
    tokens = tokens_of((200, 8))
    model = tiny(block_length=4)
    value, error = nelbo(model, tokens, num_samples=8, seed=1, batch_size=100)
    draws = torch.stack(
        [
            block_loss(model, tokens, 4, generator=torch.Generator().manual_seed(s)).nelbo
            for s in range(200)
        ]
    )
    assert (
        abs(value - draws.mean())
        < 4 * math.hypot(error, draws.std() / math.sqrt(200)) + 1e-3 * value
    )
    causal = tiny(causal=True, shift=True)
    value, _ = nelbo(causal, tokens)
    logp = causal(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert value == pytest.approx(-logp.mean().item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# The pieces of the sampler


@pytest.mark.parametrize("draw", [sample_tokens, kernels.sample_tokens], ids=["plain", "fast"])
def test_drawn_tokens_follow_the_distribution(draw):
    torch.manual_seed(0)
    V = 1300  # three pieces of 512, the last one short
    logits = torch.randn(1, V) * 2
    n, temperature = 20_000, 0.7
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n    # evenly: counts are n * p up to 1
    counts = torch.bincount(draw(logits.expand(n, V), temperature, u), minlength=V)
    p = (logits[0].double() / temperature).softmax(-1)
    assert (counts.double() - n * p).abs().max() < 2.0
    extreme = torch.full((2, V), -torch.inf)
    extreme[0, 600], extreme[1, 1299] = 0.0, 0.0
    for value in (0.0, 0.5, 1 - 1e-16):
        assert draw(extreme, 1.0, torch.full((2,), value, dtype=torch.float64)).tolist() == [
            600,
            1299,
        ]
    assert draw(logits, 0.0, None).item() == logits.argmax().item()


def test_confidence_near_one_still_orders():
    logits = torch.tensor([[30.0, 0.0, 0.0], [31.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    score = diffusion.low_confidence(logits.clone(), torch.tensor([0, 0, 1]))
    exact = logits.double().softmax(-1).gather(1, torch.tensor([[0], [0], [1]]))[:, 0]
    torch.testing.assert_close(score, exact, rtol=1e-6, atol=0)
    assert score[1] > score[0]


def test_schedules_reveal_everything():
    for start in range(1, 40):
        for steps in range(1, 12):
            assert sum(diffusion.even(start, None, step, steps) for step in range(steps)) == start
            left = start
            for step in range(steps - 1):
                left -= diffusion.timesteps(start, left, step, steps)
                assert left >= 0
