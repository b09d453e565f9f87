"""The mathematics of diffusion.py against closed forms, enumeration, naive re-implementations and
the reference samplers."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import diffusion
import kernels
from diffusion import (
    ar_loss,
    block_loss,
    mask_tokens,
    mdlm_loss,
    nelbo,
    sample_t,
    sample_tokens,
    sft_loss,
    weight,
)
from evaluation.likelihood import ESTIMATORS, guided_nll, log_likelihood
from kernels import packed
from model import Config, Transformer
from sampling import rules
from sampling.engine import generate, infill

MASK = 11


def tiny(seed=0, **options):
    """A small random model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    options = {
        **dict(
            vocab_size=12,
            dim=16,
            n_layers=2,
            n_heads=2,
            max_len=64,
            mask_token_id=MASK,
            eos_token_id=None,
        ),
        **options,
    }
    model = Transformer(Config(**options)).init_weights(seed)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def tokens_of(shape, seed=0, vocab=11):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- schedules and corruption
# --------------------------------------------------------------------------------------------------


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


# ---- the bound
# --------------------------------------------------------------------------------------------------


class ExactPosterior(torch.nn.Module):
    """The true p(x_i | visible tokens) of a joint distribution over V^T, as a model with logits and
    `select`."""

    def __init__(self, T=3, V=3, seed=0):
        super().__init__()
        self.config = Config(vocab_size=V + 1, dim=2, n_layers=1, n_heads=1, mask_token_id=V)
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.joint = (
            torch.rand((V,) * T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            ** 3
        )
        self.joint /= self.joint.sum()

    def forward(self, tokens, attention_mask=None, select=None):
        V, T = self.joint.shape[0], self.joint.dim()
        states = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [V^T, T]
        fits = ((tokens[:, None] == states) | (tokens[:, None] == V)).all(-1)  # [B, V^T]
        p = fits * self.joint.flatten()
        marginal = torch.stack(
            [(p[:, None] * (states[:, i] == torch.arange(V)[:, None])).sum(-1) for i in range(T)],
            dim=1,
        )  # [B, T, V]
        logits = F.pad(marginal.log(), (0, 1), value=-torch.inf) + self.anchor
        return logits if select is None else logits[select]

    def entropy(self):
        return -(self.joint * self.joint.log()).sum().item()

    def sample(self, n, seed):
        flat = torch.multinomial(
            self.joint.flatten(), n, replacement=True, generator=torch.Generator().manual_seed(seed)
        )
        states = torch.tensor(
            list(itertools.product(range(self.joint.shape[0]), repeat=self.joint.dim()))
        )
        return states[flat]


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


def test_a_prompt_is_never_masked_even_if_the_caller_masks_it():
    model, tokens = tiny(), tokens_of((2, 12))
    maskable = torch.arange(12).expand(2, 12) >= 5
    mask = maskable & mask_tokens((2, 12), torch.tensor(0.5), torch.Generator().manual_seed(0))
    loss = mdlm_loss(model, tokens, torch.full((2,), 0.5), mask | ~maskable, maskable)
    assert torch.equal(loss.is_masked, mask)
    assert (loss.token_nll[~maskable] == 0).all() and loss.count == maskable.sum()


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


# ---- block diffusion and the autoregressive baseline
# ---------------------------------------------------------------------------


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


# ---- sampling
# --------------------------------------------------------------------------------------------------


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


def naive_llada(model, prompt, n, steps, block_length):
    """LLaDA's published loop, every logit of the canvas each step."""
    x = torch.tensor([prompt + [MASK] * n])
    per_block = steps // (n // block_length)
    for block in range(n // block_length):
        lo, hi = len(prompt) + block * block_length, len(prompt) + (block + 1) * block_length
        for step in range(per_block):
            p = model(x).double().softmax(-1)
            p[:, :, MASK] = 0
            confidence, token = p.max(-1)
            confidence[(x != MASK) | (torch.arange(x.shape[1]) >= hi)] = -1
            k = block_length // per_block + (step < block_length % per_block)
            keep = confidence[0].topk(k).indices
            x[0, keep] = token[0, keep]
        assert not (x[0, lo:hi] == MASK).any()
    return x[0].tolist()


def never_mask(model):
    """A trained model never predicts the mask token; make a random one like that."""
    with torch.no_grad():
        model.head.weight[MASK] = 0
        model.norm.weight.fill_(1)
    forward = model.forward

    def masked(*args, **kwargs):
        out = forward(*args, **kwargs)
        if kwargs.get("targets") is None:
            out[..., MASK] = -1e9
        return out

    model.forward = masked
    return model


@pytest.mark.parametrize(
    "n,steps,block_length", [(12, 12, 12), (12, 6, 4), (12, 3, 4), (16, 8, 16), (8, 6, 4)]
)
def test_low_confidence_equals_the_naive_loop(n, steps, block_length):
    model, prompt = never_mask(tiny(vocab_size=40, seed=3)), [1, 2, 3, 4]
    assert generate(model, [prompt], n, steps, block_length)[0] == naive_llada(
        model, prompt, n, steps, block_length
    )


RAGGED = [[1, 2, 3, 4, 5, 6, 7], [], [8, 9], [3, 1, 4, 1, 5, 9, 2, 6, 5]]


@pytest.mark.parametrize(
    "options",
    [
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
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(shift=True),
        dict(n_kv_heads=1),
        dict(positions="learned", qk_norm=False),
        dict(local_window=6, global_every=2),
    ],
    ids=str,
)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(options, config):
    model = tiny(vocab_size=40, seed=1, **config)
    # Nothing but masks looks the same from everywhere to RoPE: all predictions tie, and rounding
    # decides. So no empty prompt there.
    prompts = RAGGED if config.get("positions") == "learned" else [p for p in RAGGED if p]
    together = generate(model, prompts, 12, 6, 4, **options)
    assert together == [generate(model, [p], 12, 6, 4, **options)[0] for p in prompts]
    for prompt, answer in zip(prompts, together):
        assert (
            answer[: len(prompt)] == prompt
            and len(answer) == len(prompt) + 12
            and MASK not in answer
        )


def nll_of(model, tokens, mask, shown, given, cfg_scale):
    if cfg_scale:
        return guided_nll(model, tokens, mask, shown, given, cfg_scale)
    return diffusion.masked_nll(model, tokens, mask, shown)


def ragged_sequences(seed, rows=4, longest=9):
    """Rows of 1 to `longest` tokens; the first is the longest and the second the shortest."""
    lengths = torch.randint(
        1, longest + 1, (rows,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    lengths[:2] = longest, 1
    return [
        tokens_of((length,), seed=100 * seed + row).tolist() for row, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("cache", [None, "block"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 5])
def test_a_row_of_blocks_does_not_see_the_padding_behind_it(block_length, shift, cache):
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
def test_a_row_of_gaps_does_not_see_the_padding_behind_it(shift, cache):
    for block_length in range(1, 6):
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


def test_block_sampling_equals_the_naive_block_loop():
    """dLLM's BD3-LM sampler: append a block of masks, denoise it given the blocks before, go on."""
    model, prompt, size = never_mask(tiny(vocab_size=40, block_length=4)), [1, 2, 3, 4, 5, 6], 4
    x = list(prompt)
    for _ in range(3):
        canvas = torch.tensor([x + [MASK] * size])
        block = (torch.arange(canvas.shape[1]) - len(prompt)) // size
        sees = (block[None, :] <= block[:, None])[None]
        for _ in range(2):
            confidence, token = model(canvas, attention_mask=sees).softmax(-1).max(-1)
            confidence[canvas != MASK] = -1
            keep = confidence[0].topk(2).indices
            canvas[0, keep] = token[0, keep]
        x = canvas[0].tolist()
    assert generate(model, [prompt], 12, 6, cache="block")[0] == x


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


def test_a_block_model_stops_behind_the_block_with_an_end_of_text():
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
            behind = 3 + ((written.index(written[8], 3) - 3) // 4 + 1) * 4
            assert (
                behind < len(written)
                and generate(blocks, [prompt], 16, 16, cache=cache)[0] == written[:behind]
            )
    model.config.set_ends([absent])
    assert generate(model, [prompt], 10)[0] == full


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


@pytest.mark.parametrize("draw", [sample_tokens, kernels.sample_tokens], ids=["plain", "fast"])
def test_drawn_tokens_follow_the_distribution(draw):
    torch.manual_seed(0)
    V = 1300  # three pieces of 512, the last one short
    logits = torch.randn(1, V) * 2
    n, temperature = 60_000, 0.7
    u = (
        torch.arange(n, dtype=torch.float64) + 0.5
    ) / n  # evenly spread numbers: counts are n * p up to 1
    counts = torch.zeros(V)
    for part in u.split(20_000):
        counts += torch.bincount(draw(logits.expand(len(part), V), temperature, part), minlength=V)
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


def test_confidence_near_one_still_orders():
    logits = torch.tensor([[30.0, 0.0, 0.0], [31.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    score = diffusion.low_confidence(logits.clone(), torch.tensor([0, 0, 1]))
    exact = logits.double().softmax(-1).gather(1, torch.tensor([[0], [0], [1]]))[:, 0]
    torch.testing.assert_close(score, exact, rtol=1e-6, atol=0)
    assert score[1] > score[0]


def test_factor_and_threshold_rules_equal_their_loops():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n = int(torch.randint(1, 9, (), generator=generator))
        score = torch.rand(1, 10, generator=generator, dtype=torch.float64).pow(0.2)
        eligible = torch.zeros(1, 10, dtype=torch.bool)
        eligible[0, torch.randperm(10, generator=generator)[:n]] = True
        best = score[eligible].sort(descending=True).values
        factor = float(torch.rand((), generator=generator)) * 2
        top = 0  # Fast-dLLM's loop, written out
        limits = [-1.0] + [1 - factor / (i + 1) for i in range(2, n + 1)]
        for top in range(n):
            if best[top] < limits[top]:
                break
        if top == 0 or top == n - 1:
            top += 1
        keep = rules.keep_factor(score, eligible, factor)
        assert keep.sum() == top and torch.equal(
            score[keep].sort(descending=True).values, best[:top]
        )
        keep = rules.keep_confident(score, eligible, 0.9)
        assert torch.equal(
            score[keep].sort(descending=True).values, best[: max(1, int((best >= 0.9).sum()))]
        )


def test_schedules_reveal_everything():
    for start in range(1, 40):
        for steps in range(1, 12):
            assert sum(diffusion.even(start, None, step, steps) for step in range(steps)) == start
            left = start
            for step in range(steps - 1):
                left -= diffusion.timesteps(start, left, step, steps)
                assert left >= 0


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


# ---- Dream's filters, LLaDA's suppression, ReMDM, EB-Sampler, seeds
# ---------------------------------------------------------------


def test_filters_keep_the_tokens_that_dream_keeps():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = torch.randn(1, 12, generator=generator) * 2
        top_p, top_k = (
            float(torch.rand((), generator=generator)),
            int(torch.randint(1, 14, (), generator=generator)),
        )
        p, kept, total = logits.softmax(-1)[0], [], 0.0
        for token in p.argsort(
            descending=True
        ).tolist():  # a token stays as long as what stands before it is not beyond top_p
            if total > top_p:
                break
            kept.append(token)
            total += p[token].item()
        for options, expected in (
            (dict(top_p=top_p), kept),
            (dict(top_k=top_k), p.argsort(descending=True)[:top_k].tolist()),
            (dict(top_p=top_p, top_k=top_k), kept[:top_k]),
            (dict(top_p=1.0), range(12)),
            (dict(top_p=0.0), kept[:1]),
        ):
            filtered = rules.filter_logits(logits, **options)[0]
            assert filtered.isfinite().nonzero()[:, 0].tolist() == sorted(expected)
            assert torch.equal(filtered[filtered.isfinite()], logits[0, sorted(expected)])


class Independent(torch.nn.Module):
    """A model that predicts p [T, V] at each position, whatever it sees."""

    def __init__(self, p, mask_id=None, **config):
        super().__init__()
        self.config = Config(
            vocab_size=p.shape[1],
            dim=2,
            n_layers=1,
            n_heads=1,
            mask_token_id=p.shape[1] - 1 if mask_id is None else mask_id,
            **config,
        )
        self.logits = torch.nn.Parameter(p.log(), requires_grad=False)

    def forward(self, tokens, attention_mask=None, select=None):
        logits = self.logits.expand(*tokens.shape, -1)
        return logits if select is None else logits[select]


def steps_of(model, n, **options):
    """Every Step of filling n masks, one a step."""
    seen = []
    infill(model, [[model.config.mask_token_id] * n], n, on_step=seen.append, **options)
    return seen


def differs(counts, p):
    """The largest deviation of counts from a multinomial with probabilities p, in standard
    deviations."""
    n = counts.sum(-1, keepdim=True)
    return ((counts - n * p).abs() / (n * p * (1 - p)).sqrt().clamp(min=1e-9)).max().item()


def counted(rows, T, V):
    return torch.stack(
        [torch.tensor([row[i] for row in rows]).bincount(minlength=V) for i in range(T)]
    ).double()


def probabilities(T, V, seed=0, mask=True):
    p = torch.rand(T, V, generator=torch.Generator().manual_seed(seed)) ** 2
    p[:, -1] *= not mask
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "scales", [(8,), (8, 2), (8, 2, 0.1)], ids=["256 suffice", "4096 suffice", "all"]
)
def test_top_p_of_a_large_vocabulary_is_what_sorting_all_of_it_finds(scales):
    logits = (
        torch.randn(len(scales), 10_000, generator=torch.Generator().manual_seed(0))
        * torch.tensor(scales)[:, None]
    )
    p, order = logits.double().softmax(-1).sort(-1, descending=True)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, p.cumsum(-1) - p <= 0.9)
    filtered = rules.filter_logits(logits, top_p=0.9)
    found = filtered.isfinite()
    assert (
        torch.equal(filtered[found], logits[found]) and (found != kept).sum() <= 1
    )  # where float32 rounds
    assert (
        [256, 4096, 10_000][len(scales) - 1] >= kept.sum(-1).max() > [0, 256, 4096][len(scales) - 1]
    )


def test_equal_tokens_pass_top_p_together_alone_or_in_a_batch():
    logits = torch.stack(
        (torch.arange(10_000) % 100 * 0.5, torch.zeros(10_000), torch.arange(10_000) * 1.0)
    )  # ties of 100, of all, none
    together = rules.filter_logits(logits, top_p=0.7)
    assert torch.equal(
        together, torch.cat([rules.filter_logits(row[None], top_p=0.7) for row in logits])
    )
    assert together.isfinite().sum(1).tolist() == [
        300,
        10_000,
        2,
    ]  # of the first, a hundred hold 0.39, two 0.63, three 0.78


@pytest.mark.parametrize(
    "options",
    [
        dict(top_p=0.6),
        dict(top_k=2),
        dict(top_p=0.8, top_k=3),
        dict(suppress=[1, 2]),
        dict(suppress=[0], top_k=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["generate", "infill"])
def test_filtered_tokens_are_drawn_with_their_probabilities(options, how):
    p, temperature = probabilities(3, 7), 0.7
    tempered = p.log() / temperature
    tempered[:, options.get("suppress", [])] = -torch.inf
    expected = torch.stack(
        [
            rules.filter_logits(row[None], options.get("top_p"), options.get("top_k"))[0].softmax(
                -1
            )
            for row in tempered
        ]
    )
    model, n = Independent(p), 3000
    rows = (
        generate(model, [[]] * n, 3, 1, 3, temperature=temperature, seed=1, **options)
        if how == "generate"
        else infill(model, [[6] * 3] * n, 1, temperature=temperature, seed=1, **options)
    )
    counts = counted(rows, 3, 7)
    assert differs(counts, expected.double()) < 4.5 and not counts[expected == 0].any()


def test_confidence_is_that_of_the_filtered_tokens_where_dream_samples():
    p, seen = probabilities(3, 7), []
    call = lambda **options: generate(
        Independent(p, confidence_at_temperature=options.pop("dream", False)),
        [[]],
        3,
        1,
        3,
        on_step=seen.append,
        **options,
    )  # noqa: E731
    (
        call(),
        call(top_k=2),
        call(dream=True, temperature=0.5, seed=0),
        call(temperature=0.5, seed=0),
    )
    best = p.sort(descending=True).values
    torch.testing.assert_close(seen[0].confidence[0], best[:, 0].double())
    torch.testing.assert_close(seen[1].confidence[0], (best[:, 0] / best[:, :2].sum(1)).double())
    chosen = seen[2].tokens[0][:, None]
    torch.testing.assert_close(
        seen[2].confidence[0], (p**2 / (p**2).sum(1, keepdim=True)).gather(1, chosen)[:, 0].double()
    )
    torch.testing.assert_close(
        seen[3].confidence[0], p.gather(1, seen[3].tokens[0][:, None])[:, 0].double()
    )


@pytest.mark.parametrize("rule", ["low_confidence", "entropy", "margin"])
def test_alg_temp_draws_positions_from_the_softmax_of_their_scores(rule):
    """The first two positions of four, by counting against draws without replacement, p_a p_b / (1
    - p_a) + p_b p_a / (1 - p_b)."""
    p, alg_temp, n, seen = probabilities(4, 7, seed=3), 0.3, 4000, []
    generate(
        Independent(p),
        [[]] * n,
        4,
        2,
        4,
        remasking=rule,
        alg_temp=alg_temp,
        seed=5,
        on_step=seen.append,
    )
    score = diffusion.REMASKING[rule](p.log(), p.argmax(-1)).double()
    chance = (score / alg_temp).softmax(-1)
    pairs = list(itertools.combinations(range(4), 2))
    expected = torch.tensor(
        [chance[a] * chance[b] * (1 / (1 - chance[a]) + 1 / (1 - chance[b])) for a, b in pairs]
    )
    counts = torch.tensor([float(seen[0].revealed[:, [a, b]].all(1).sum()) for a, b in pairs])
    assert counts.sum() == n and differs(counts, expected) < 4.5
    cold = generate(
        Independent(p), [[]], 4, 4, 4, remasking=rule, alg_temp=1e-6, seed=5, on_step=seen.append
    )
    assert [s.revealed[0].nonzero().item() for s in seen[-4:]] == score.argsort(
        descending=True
    ).tolist() and cold
    assert generate(Independent(p), [[]], 4, 4, 4, alg_temp=0.0) == generate(
        Independent(p), [[]], 4, 4, 4
    )


def test_suppressed_tokens_never_come_and_deferred_ones_come_last():
    model, prompt = never_mask(tiny(vocab_size=40, seed=3)), [1, 2, 3]
    plain = generate(model, [prompt], 16, 16, 16)[0][3:]
    common = max(set(plain), key=plain.count)
    for options in (
        dict(),
        dict(temperature=1.0, seed=0),
        dict(remasking="random", seed=0),
        dict(threshold=0.2),
        dict(cache="dual", block_length=4),
    ):
        assert (
            common
            not in generate(
                model,
                [prompt],
                16,
                **{**dict(steps=16, block_length=16), **options},
                suppress=[common],
            )[0][3:]
        )
        assert common not in infill(model, [[1, *[MASK] * 8, 2]], suppress=[common], seed=0)[0][1:9]
    p = torch.full((3, 7), 0.02)
    p[0, 5], p[1, 4], p[2, 4] = 0.9, 0.6, 0.5  # the end of text, 5, is the surest of all
    for rule in ("low_confidence", "entropy", "margin"):
        order = lambda **options: [
            s.revealed[0].nonzero().item()
            for s in steps_of(Independent(p), 3, remasking=rule, **options)
        ]  # noqa: B023, E731
        assert (
            order() == [0, 1, 2]
            and order(defer=[5]) == [1, 2, 0]
            and order(defer=[5, 4]) == [0, 1, 2]
        )
        assert order(defer=[5], alg_temp=0.01, seed=0) == [1, 2, 0]


def test_deferring_equals_llada_s_published_loop():
    """confidence_eos_eot_inf at temperature 0, where its two tensors are one: the logits of both
    tokens are -inf before the softmax."""
    model, prompt, n = never_mask(tiny(vocab_size=40, seed=4)), [1, 2, 3, 4], 12
    plain = generate(model, [prompt], n, n, n)[0][4:]
    ends = sorted(set(plain), key=plain.count)[-2:]
    x = torch.tensor([prompt + [MASK] * n])
    for _ in range(n):
        logits = model(x).double()
        token = logits.argmax(-1)
        logits[..., ends] = -torch.inf
        confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
        confidence[x != MASK] = -1
        if confidence.max() == 0:  # nothing but ends is left: any order, and ours is from the left
            x[0, (x[0] == MASK).nonzero()[0]] = token[0, (x[0] == MASK).nonzero()[0]]
        else:
            x[0, confidence[0].argmax()] = token[0, confidence[0].argmax()]
    assert generate(model, [prompt], n, n, n, defer=ends)[0] == x[0].tolist()


def test_entropy_bound_keeps_the_largest_set_under_the_bound():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, gamma = (
            int(torch.randint(1, 9, (), generator=generator)),
            float(torch.rand((), generator=generator)) * 2,
        )
        score, entropies = torch.rand(2, 1, 10, generator=generator, dtype=torch.float64)
        eligible = torch.zeros(1, 10, dtype=torch.bool)
        eligible[0, torch.randperm(10, generator=generator)[:n]] = True
        order = sorted(eligible[0].nonzero()[:, 0].tolist(), key=lambda i: -score[0, i])
        sets = [order[:k] for k in range(1, n + 1)]
        largest = [s for s in sets if sum(entropies[0, s]) - max(entropies[0, s]) <= gamma][-1]
        assert rules.keep_entropy_bound(score, entropies, eligible, gamma)[0].nonzero()[
            :, 0
        ].tolist() == sorted(largest)
    p, seen = probabilities(6, 9, seed=2), []
    H = -(p * (p + 1e-10).log()).sum(-1)
    generate(
        Independent(p),
        [[]],
        6,
        6,
        6,
        remasking="entropy",
        entropy_bound=float(H.sort().values[:3].sum()) + 1e-4,
        on_step=seen.append,
    )
    assert (
        int(seen[0].revealed.sum()) == 4 and len(seen) < 6
    )  # three of the lowest and the next, which is the maximum
    seen.clear()
    generate(Independent(p), [[]], 6, 6, 6, entropy_bound=0.0, on_step=seen.append)
    assert len(seen) == 6  # never less than one


@pytest.mark.parametrize(
    "schedule,eta", [("cap", 0.05), ("rescale", 0.5), ("rescale", 1.0), ("cap", 0.0)]
)
def test_remasking_leaves_the_share_of_masks_and_the_tokens_as_they_are(schedule, eta):
    n, steps, p, masked, changed = 1500, 8, probabilities(4, 7), {}, 0
    model = Independent(p)

    def watch(step):
        nonlocal changed
        masked[len(masked) + 1] = (step.tokens == 6).double().mean().item()

    rows = generate(
        model,
        [[]] * n,
        4,
        steps,
        4,
        temperature=1.0,
        remasking="ancestral",
        remask=eta,
        remask_schedule=schedule,
        seed=2,
        on_step=watch,
    )
    t = torch.linspace(1, 1e-3, steps + 1)
    for step in range(1, steps):
        assert abs(masked[step] - t[step]) < 4.5 * math.sqrt(t[step] * (1 - t[step]) / (4 * n)), (
            step
        )
    assert masked[steps] == 0 and differs(counted(rows, 4, 7), p.double()) < 4.5
    for step in range(steps):  # the written share alpha_s follows from alpha_t
        write, sigma = rules.reverse_step(step, steps, eta, schedule)
        s = 0.0 if step == steps - 1 else float(t[step + 1])
        assert (
            write * t[step] + (1 - sigma) * (1 - t[step]) == pytest.approx(1 - s, abs=1e-6)
            and 0 <= write <= 1 + 1e-9
        )
        largest = min(1.0, s / (1 - float(t[step]))) if step else 1.0
        wanted = {"cap": min(eta, largest), "rescale": eta * largest}[schedule]
        assert sigma == pytest.approx(0.0 if step == steps - 1 else wanted)


@pytest.mark.parametrize("how", ["generate", "infill"])
def test_remasking_samples_the_joint_distribution_and_rewrites(how):
    model, n, before, rewritten, V = ExactPosterior(), 1500, None, 0, 3
    model.joint = (model.joint + 0.01) / (
        model.joint + 0.01
    ).sum()  # no cell that a chi-square test could not count

    def watch(step):
        nonlocal before, rewritten
        rewritten += 0 if before is None else int(((before != V) & (step.tokens == V)).sum())
        before = step.tokens

    options = dict(temperature=1.0, remasking="ancestral", remask=0.02, seed=0, on_step=watch)
    rows = (
        generate(model, [[]] * n, 3, 60, 3, **options)
        if how == "generate"
        else infill(model, [[V] * 3] * n, 60, **options)
    )
    counts = torch.zeros(model.joint.shape, dtype=torch.float64)
    for row in rows:
        counts[tuple(row)] += 1
    expected = n * model.joint
    assert ((counts - expected) ** 2 / expected).sum() < 26 + 5 * 7.2 and rewritten > n / 2


def test_remasking_by_confidence_takes_the_unsure_first():
    """Of a sure and an unsure token, both written, exactly sigma_max are masked again a step,
    shared out by softmax(-confidence)."""
    sure, n, steps = 0.97, 1500, 20
    p = torch.tensor([[sure, 0.01, 0.01, 0.01, 1e-9], [0.25, 0.25, 0.25, 0.25, 1e-9]])
    seen, again, expected = [], torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    rows = generate(
        Independent(p),
        [[]] * n,
        2,
        steps,
        2,
        temperature=1.0,
        remasking="ancestral",
        remask=1.0,
        remask_schedule="conf",
        seed=0,
        on_step=lambda step: seen.append(step.tokens.clone()),
    )
    for step, (before, after) in enumerate(zip(seen, seen[1:]), 1):
        both = (before != 4).all(1)
        again += ((after == 4) & (before != 4))[both].sum(0)
        confidence = torch.where(
            before[both] == torch.tensor([0, 9]), sure, torch.tensor([0.01, 0.25]).double()
        )
        expected += rules.reverse_step(step, steps, 1.0, "conf")[1] * (-confidence).softmax(1).sum(
            0
        )
    assert (
        ((again - expected).abs() < 4.5 * expected.sqrt()).all()
        and expected.min() > 50
        and expected[1] > 1.5 * expected[0]
    )
    assert differs(counted(rows, 2, 5)[:, :4], p[:, :4].double()) < 4.5
    assert [rules.reverse_step(step, steps, 1.0, "conf")[0] for step in range(steps)] == [
        rules.reverse_step(step, steps)[0] for step in range(steps)
    ]


def test_remasking_never_touches_what_was_given_or_other_blocks():
    model, given, seen = tiny(vocab_size=40), [1, MASK, 3, MASK, MASK, 6, MASK, MASK], []
    for options in (dict(), dict(cache="dual"), dict(cache="prefix"), dict(cache="block")):
        seen.clear()
        answer = infill(
            model,
            [given],
            40,
            4,
            temperature=1.0,
            remasking="ancestral",
            remask=0.5,
            remask_schedule="rescale",
            seed=1,
            on_step=seen.append,
            **options,
        )[0]
        assert MASK not in answer and all(a == g for a, g in zip(answer, given) if g != MASK)
        states = torch.stack([s.tokens[0] for s in seen])
        second = next(
            i for i, state in enumerate(states) if (state[4:] != torch.tensor(given[4:])).any()
        )
        assert (states[second:, :4] == torch.tensor(answer[:4])).all(), "a finished block stays"
        assert ((states[:-1] != MASK) & (states[1:] == MASK)).any(), "a token was masked again"
    exact = [
        generate(
            tiny(vocab_size=40, block_length=4),
            [[1, 2]],
            8,
            40,
            temperature=1.0,
            remasking="ancestral",
            remask=0.4,
            seed=3,
            cache=cache,
        )
        for cache in ("block", None)
    ]
    assert exact[0] == exact[1]


RULES = [
    dict(top_p=0.8, temperature=1.0),
    dict(top_k=3, temperature=0.5, remasking="entropy"),
    dict(alg_temp=0.5),
    dict(alg_temp=0.3, temperature=1.0),
    dict(suppress=[5, 6]),
    dict(defer=[5, 6, 7]),
    dict(entropy_bound=1.0),
    dict(entropy_bound=0.5, remasking="entropy", cache="dual"),
    dict(remasking="ancestral", remask=0.3, temperature=1.0),
    dict(remasking="ancestral", remask=0.5, remask_schedule="rescale", cache="prefix"),
    dict(remasking="ancestral", remask=1.0, remask_schedule="conf", temperature=0.7),
]


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize(
    "config",
    [dict(), dict(shift=True, step_schedule="timesteps", confidence_at_temperature=True)],
    ids=str,
)
def test_every_rule_gives_a_row_of_a_batch_what_it_gets_alone(options, config):
    model, seeds = tiny(vocab_size=40, seed=1, **config), [3, 1, 4]
    prompts = [p for p in RAGGED if p]
    together = generate(model, prompts, 12, 9, 4, seed=seeds, **options)
    assert together == [
        generate(model, [p], 12, 9, 4, seed=s, **options)[0] for p, s in zip(prompts, seeds)
    ]
    assert generate(model, prompts, 12, 9, 4, seed=3, **options)[0] == together[0]
    assert all(
        MASK not in answer and answer[: len(p)] == p and len(answer) == len(p) + 12
        for p, answer in zip(prompts, together)
    )
    gaps = [[1, MASK, 3, MASK, MASK, 6], [2, 4, MASK], [5, 6, 7, 8, MASK, 1, 2, 3, MASK]]
    together = infill(model, gaps, 9, 3, seed=seeds, **options)
    assert together == [infill(model, [g], 9, 3, seed=s, **options)[0] for g, s in zip(gaps, seeds)]
    assert all(
        MASK not in answer and all(a == g for a, g in zip(answer, gap) if g != MASK)
        for gap, answer in zip(gaps, together)
    )


def test_packed_matrices_give_the_same_logits_and_are_forgotten():
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    for options in (
        {},
        {
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "gated": False,
            "tie_embeddings": True,
        },
    ):
        model = tiny(vocab_size=50, dim=32, mask_token_id=49, **options)
        plain = lambda: not any("forward" in vars(module) for module in model.modules())  # noqa: E731
        with torch.no_grad():
            expected = model(tokens)
            with packed(model):
                assert not plain()
                torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
                alone = [model(tokens[:, :T], select=torch.tensor([0])) for T in (1, 9)]
                assert alone[1].shape == (1, 50)
            with packed(model, limit=4 * 50 * 32):  # the head's matrix, and no other
                assert "forward" in vars(model.head) and not any(
                    "forward" in vars(module) for module in model.blocks.modules()
                )
        with pytest.raises(KeyboardInterrupt), packed(model):
            raise KeyboardInterrupt
        assert plain() and model(tokens).requires_grad, (
            "training takes the product that has a gradient"
        )
        with packed(model.bfloat16()):
            assert plain()
    with packed(Independent(probabilities(4, 7))):
        pass
    model = tiny()
    model.blocks[0].compile()  # nothing is compiled before its first call
    with packed(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_steps_in_which_a_row_writes_nothing_do_no_harm():
    """An autoregressive row that the coin leaves out feeds nothing, and so has no new keys in its
    cache."""
    model = tiny(causal=True, shift=True)
    options = dict(max_new_tokens=6, steps=12, remasking="ancestral")
    assert generate(model, [[1, 2, 3], [4, 5, 6]], seed=[3, 4], **options) == [
        generate(model, [p], seed=s, **options)[0] for p, s in (([1, 2, 3], 3), ([4, 5, 6], 4))
    ]


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


def test_ancestral_sampling_flips_every_coin():
    """The share of masks falls as the time does even when a step reveals less than a token a
    row."""
    n, steps, masked = 400, 20, []
    generate(
        Independent(probabilities(4, 7)),
        [[]] * n,
        4,
        steps,
        4,
        remasking="ancestral",
        seed=0,
        on_step=lambda s: masked.append((s.tokens == 6).double().mean()),
    )
    for t, share in zip(torch.linspace(1, 1e-3, steps + 1)[1:-1], masked):
        assert abs(share - t) < 5 * math.sqrt(t * (1 - t) / (4 * n))


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
    (dict(suppress=[40]), "outside the vocabulary"),
    (dict(defer=[-1]), "outside the vocabulary"),
    (dict(seed=[1, 2]), "one for each row, 1, got"),
    (dict(top_p=math.nan), "top_p"),
    (dict(entropy_bound=math.nan), "entropy_bound"),
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
    with pytest.raises(ValueError, match="no mask token"):
        mdlm_loss(tiny(mask_token_id=None), tokens_of((1, 4)))
    with pytest.raises(ValueError, match="does not divide"):
        block_loss(model, tokens_of((1, 10)), 4)
    with pytest.raises(ValueError, match="t must have shape"):
        mdlm_loss(model, tokens_of((2, 4)), t=torch.ones(3))
    with pytest.raises(ValueError, match="mask must have the shape"):
        mdlm_loss(
            model, tokens_of((2, 4)), t=torch.ones(2), mask=torch.ones(2, 5, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="cannot fill in the middle"):
        infill(tiny(causal=True), [[1, MASK]])
    with pytest.raises(TypeError):
        generate(model, [[1]], step=2)  # a misspelled option must not pass in silence
    assert generate(model, []) == []
