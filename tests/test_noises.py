"""noises.py, its losses, recipe and sampler against recorded numbers of Duo and GIDD, against the
chain of tokens written out as matrices, and against distributions that are known."""
import itertools
import json
import math
import os
import re
import signal

import pytest
import torch
import torch.nn.functional as F
from models import MASK, Independent, counted, differs, probabilities, tiny, tokens_of
from runs import LAST_LINE, refused, rows, same_run
from safetensors.torch import load_file
from scripts import ROOT, run_here
from tiny import tiny_checkpoint, tiny_model, tiny_sampler

import noises
from diffusion import (
    SCHEDULES,
    denoise,
    hybrid_loss,
    mdlm_loss,
    nelbo,
    restored,
    uniform_loss,
    weight,
)
from evaluation.likelihood import log_likelihood
from model import Config, Transformer
from noises import (
    hybrid_bound,
    hybrid_marginal,
    hybrid_noise,
    hybrid_step,
    reverse,
    uniform_bound,
    uniform_marginal,
    uniform_noise,
    uniform_step,
)
from pretrained.editing import become_corrector, become_editor
from sampling.engine import generate, infill
from training.run import Run

SHARE = 0.3         # of uniform tokens in hybrid noise, in these tests
LOSSES = {"uniform": uniform_loss, "hybrid": hybrid_loss}
KINDS = list(LOSSES)


def noisy(kind, **settings):
    """The settings of a Config for a model of this noise."""
    return dict(noise=kind, uniform_share=SHARE if kind == "hybrid" else 0.0, **settings)


# --------------------------------------------------------------------------------------------------
# What Duo and GIDD compute


@pytest.fixture
def recorded(fixture_path):
    """recorded(case): its tensors by name."""
    tensors = load_file(fixture_path("uniform.safetensors"))

    def case(name):
        parts = {key.partition(".")[2]: value for key, value in tensors.items()
                 if key.startswith(f"{name}.")}
        assert parts
        return parts

    return case


@pytest.mark.parametrize("case, schedule", [("duo13", "linear"), ("duo64", "cosine")])
def test_the_bound_its_gradient_and_the_step_of_duo(case, schedule, recorded):
    r = recorded(case)
    x_t = torch.where(r["u_move"] < 1 - r["alpha"], r["u_token"], r["x0"])
    assert torch.equal(x_t, r["xt"])
    nats = uniform_bound(r["logits"], r["x0"], x_t, r["alpha"], r["dalpha"])
    torch.testing.assert_close(nats, r["nll"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(nats.double(), r["nll_float64"], rtol=1e-4, atol=1e-5)
    logits = r["logits"].double().requires_grad_()
    alpha, d_alpha = SCHEDULES[schedule](0.999 * r["t"].double()[:, None])
    torch.testing.assert_close(alpha.float(), r["alpha"], rtol=1e-4, atol=1e-6)
    if schedule == "linear":                            # with the cosine Duo leaves that factor out
        d_alpha = 0.999 * d_alpha
    nats = uniform_bound(logits, r["x0"], x_t, alpha, d_alpha)
    torch.testing.assert_close(nats.detach(), r["nll_float64"], rtol=1e-7, atol=1e-9)
    gradient = torch.autograd.grad(nats.mean(), logits)[0]
    recorded_positions = r["grad_float64"].shape[1]
    torch.testing.assert_close(gradient[:, :recorded_positions], r["grad_float64"], rtol=1e-6,
                               atol=1e-9)
    step = uniform_step(r["logits"].softmax(-1), x_t, r["alpha"], r["alpha_s"])
    torch.testing.assert_close(step, r["posterior"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["gidd0", "gidd1", "gidd2", "gidd3"])
def test_the_bound_and_the_steps_of_gidd(case, recorded):
    r = recorded(case)
    mask_id, share, z = int(r["mask_id"]), r["p_uniform"].item(), r["z"]
    nats = hybrid_bound(r["logits"], r["x"], z, r["t"], mask_id, share)
    torch.testing.assert_close(nats.double(), r["elbo_float64"], rtol=1e-4, atol=1e-5)
    exact = hybrid_bound(r["logits"].double(), r["x"], z, r["t"].double(), mask_id, share)
    torch.testing.assert_close(exact, r["elbo_float64"], rtol=1e-6, atol=1e-8)
    noise = hybrid_marginal(torch.zeros_like(r["beta_pi"]), r["t"], mask_id, share)
    torch.testing.assert_close(noise, r["beta_pi"], rtol=1e-5, atol=1e-8)
    p = noises.predicted(r["logits"], mask_id)
    t, s = r["step.t"], r["step.s"]
    for smallest, name in ((0.0, "step.q"), (0.02, "step.q_min_p0.02")):
        q = hybrid_step(p, z, t, s, mask_id, share, smallest)
        torch.testing.assert_close(q, r[name], rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# One token's chain written out. Q(t)[i, j] is the probability that i at time 0 is j at time t; from
# s to t it is the matrix that turns Q(s) into Q(t).

V, MASK_ID = 4, 3


def chain(kind, t):
    """Q(t), float64 [V, V], in words of its own."""
    if kind == "uniform":
        return (1 - t) * torch.eye(V).double() + t / V
    c = 2 * SHARE / (1 - SHARE) * math.sqrt(t * (1 - t))
    noise = torch.full((V,), c / (V - 1)).double()
    noise[MASK_ID] = t
    return ((1 - t) * torch.eye(V).double() + noise) / (1 + c)


def texts(kind):
    """The tokens that a text may hold."""
    return list(range(V if kind == "uniform" else V - 1))


def between(kind, s, t):
    """Probabilities of a token at t given it at s, [V, V]."""
    return torch.linalg.solve(chain(kind, s), chain(kind, t))


def true_step(kind, p, s, t):
    """q(x_s = j | x_t = i, x_0 drawn from p), [i, j], by Bayes' rule."""
    before = p @ chain(kind, s)                                                         # [j]
    joint = before[None] * between(kind, s, t).T                                        # [i, j]
    return joint / joint.sum(1, keepdim=True)


def our_step(kind, p, s, t):
    """The same by noises.py, for p [V] or [i, V]."""
    x_t = torch.arange(V)
    p = p.expand(V, V)
    s, t = torch.tensor([s, t], dtype=torch.float64)
    if kind == "uniform":
        return uniform_step(p, x_t, 1 - t, 1 - s)
    return hybrid_step(p, x_t, t, s, MASK_ID, SHARE)


def our_bound(kind, logits, x_0, x_t, t):
    """The bound at a time t, a float, of noises.py, for logits [N, V] and x_0, x_t int64 [N]."""
    logits, x_0, x_t = logits[:, None], x_0[:, None], x_t[:, None]                      # [N, 1]
    t = torch.full((len(x_0),), t, dtype=logits.dtype)
    if kind == "uniform":
        return uniform_bound(logits, x_0, x_t, 1 - t[:, None], -torch.ones_like(t)[:, None])[:, 0]
    return hybrid_bound(logits, x_0, x_t, t, MASK_ID, SHARE)[:, 0]


def prior(kind, seed=0):
    """A random distribution of x_0, float64 [V]."""
    p = torch.rand(V, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    p[[token for token in range(V) if token not in texts(kind)]] = 0
    return p / p.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_marginals(kind):
    p = prior(kind)
    for t in (0.05, 0.5, 0.98):
        now = torch.tensor(t, dtype=torch.float64)
        if kind == "uniform":
            ours = uniform_marginal(p, 1 - now)
        else:
            ours = hybrid_marginal(p, now, MASK_ID, SHARE)
        torch.testing.assert_close(ours, p @ chain(kind, t))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_by_counting(kind):
    generator, n = torch.Generator().manual_seed(0), 40000
    for t, token in itertools.product((0.1, 0.5, 0.9), texts(kind)):
        times = torch.full((n, 1), t)
        if kind == "uniform":
            mask, new = uniform_noise((n, 2), 1 - times, V, generator)
        else:
            mask, new = hybrid_noise((n, 2), times, V, MASK_ID, SHARE, generator)
        x_t = torch.where(mask, new, token)
        assert differs(counted(x_t.tolist(), 2, V), chain(kind, t)[token]) < 5


def test_the_mask_may_be_any_token():
    generator, t = torch.Generator().manual_seed(0), torch.full((40000, 1), 0.6)
    for mask_id in range(V):
        clean = (mask_id + 1) % V
        mask, new = hybrid_noise((40000, 1), t, V, mask_id, SHARE, generator)
        p = hybrid_marginal(F.one_hot(torch.tensor([clean]), V).float(), t[0], mask_id, SHARE)
        torch.testing.assert_close(p.sum(), torch.tensor(1.0))
        assert differs(counted(torch.where(mask, new, clean).tolist(), 1, V), p) < 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s, t", [(0.0, 0.4), (0.2, 0.25), (0.3, 0.999)])
def test_a_step_back_is_bayes_rule(kind, s, t):
    for p in (prior(kind), F.one_hot(torch.tensor(1), V).double()):
        ours = our_step(kind, p, s, t)
        torch.testing.assert_close(ours, true_step(kind, p, s, t))
        torch.testing.assert_close(ours.sum(1), torch.ones(V).double())


def test_small_probabilities_are_left_out_but_never_all():
    q = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    expected = torch.tensor([[0.625, 0.375, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(noises.without_small(q, 0.3), expected)
    torch.testing.assert_close(noises.without_small(q, 0.0), q)


def mean_bound(kind, logits, x_0, x_t_given_x_0, points=400):
    """The bound on -log p(x_0) of a model that says logits(t) [V, V], a row for each x_t, of a
    text of one token: the integral over t of the mean over x_t, by Gauss and Legendre."""
    nodes, weights = gauss(points)
    total = 0.0
    for t, w in zip(nodes, weights):
        nats = our_bound(kind, logits, torch.full((V,), x_0), torch.arange(V), t)
        total += w * (x_t_given_x_0(t) * nats).sum().item()
    return total


def gauss(points):
    """(nodes, weights) of an integral over t in (0, 1) with t = u^2 (3 - 2u): dense at both ends,
    where bounds grow like a logarithm and c_t like a root."""
    eigen = torch.arange(1, points).double()
    off = eigen / (4 * eigen**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    u = (values + 1) / 2
    return (u**2 * (3 - 2 * u)).tolist(), (vectors[0] ** 2 * 6 * u * (1 - u)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_the_limit_of_ever_more_steps(kind):
    """A model that says something else for each x_t, right or wrong. In N steps its bound is a sum
    of KL divergences between true and predicted steps; the error falls as 1 / N."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(V, V, generator=generator).double()
    p = noises.predicted(logits, None if kind == "uniform" else MASK_ID)
    for x_0 in (0, 2):
        clean = F.one_hot(torch.tensor(x_0), V).double()
        sums = []
        for N in (400, 800):
            total = 0.0
            for k in range(N):
                s, t = k / N, (k + 1) / N
                true, ours = true_step(kind, clean, s, t), our_step(kind, p, s, t)
                kl = torch.where(true > 0, true * (true / ours).log(), 0.0).sum(1)      # [x_t]
                total += (chain(kind, t)[x_0] * kl).nan_to_num().sum().item()
            sums.append(total)
        limit = 2 * sums[1] - sums[0]
        bound = mean_bound(kind, logits, x_0, lambda t, x_0=x_0: chain(kind, t)[x_0])
        assert abs(sums[1] - sums[0]) > 1e-5
        assert bound == pytest.approx(limit, rel=2e-3)


# --------------------------------------------------------------------------------------------------
# Two tokens that depend on each other

JOINT = torch.tensor([[6.0, 1, 1], [1, 8, 1], [2, 1, 4]]).double() / 25     # p(x_0), [3, 3]
PAIRS = torch.tensor(list(itertools.product(range(V), repeat=2)))           # all x_t, [V^2, 2]


def joint_of(kind):
    """p(x_0) as [V, V]."""
    return F.pad(JOINT, (0, 1, 0, 1))


def from_the_others(kind, t):
    """p(x_0^i | x_t without x_t^i), [V^2, 2, V]: of each token, what the other one says."""
    Q, p = chain(kind, t), joint_of(kind)
    first = (p @ Q).T                                   # [x_t of the second, x_0 of the first]
    second = (p.T @ Q).T
    said = torch.stack((first[PAIRS[:, 1]], second[PAIRS[:, 0]]), dim=1)
    return said / said.sum(-1, keepdim=True)


def from_all(kind, t):
    """p(x_0^i | x_t), [V^2, 2, V]: what its own noisy token says, too."""
    Q = chain(kind, t)
    said = from_the_others(kind, t) * torch.stack((Q[:, PAIRS[:, 0]].T, Q[:, PAIRS[:, 1]].T), dim=1)
    return said / said.sum(-1, keepdim=True)


def expected_bound(kind, predict):
    """The mean over texts, times and noise of the bound of a model that says predict(kind, t)."""
    total = 0.0
    for t, w in zip(*gauss(60)):
        Q, logits = chain(kind, t), predict(kind, t).log()
        for (a, b), p in zip(PAIRS.tolist(), joint_of(kind).flatten().tolist()):
            if not p:
                continue
            x_0 = torch.tensor([a, b]).expand(len(PAIRS), 2)
            nats = sum(our_bound(kind, logits[:, i], x_0[:, i], PAIRS[:, i], t) for i in (0, 1))
            total += w * p * (Q[a, PAIRS[:, 0]] * Q[b, PAIRS[:, 1]] * nats).sum().item()
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_of_the_best_prediction_is_the_entropy(kind):
    """The best prediction is what the other tokens say. Who adds what the token itself says counts
    it twice and pays for it."""
    entropy = -(JOINT * JOINT.log()).sum().item()
    assert expected_bound(kind, from_the_others) == pytest.approx(entropy, rel=1e-3)
    assert expected_bound(kind, from_all) > 1.05 * entropy


class Oracle(torch.nn.Module):
    """A model that says `predict` of pairs, and knows the time by counting the steps."""

    def __init__(self, kind, predict, steps):
        super().__init__()
        self.config = Config(vocab_size=V, dim=2, n_layers=1, n_heads=1, mask_token_id=MASK_ID,
                             **noisy(kind))
        self.kind, self.predict, self.steps, self.calls = kind, predict, steps, 0

    def forward(self, tokens, attention_mask=None):
        t = 1 - self.calls / self.steps
        self.calls += 1
        t = min(t, 1 - 1e-9)                            # at 1 some pairs cannot be
        return self.predict(self.kind, t).log()[tokens[:, 0] * V + tokens[:, 1]]


def sampled(kind, predict, n=3000, steps=48):
    """How often `reverse` with such a model writes each pair, [3, 3]."""
    model = Oracle(kind, predict, steps)
    written = reverse(model, torch.full((n, 2), MASK_ID), steps, seed=5)
    assert model.calls == steps and (written != MASK_ID).all()
    return (written[:, 0] * 3 + written[:, 1]).bincount(minlength=9).view(3, 3) / n


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_with_the_best_prediction_writes_the_data(kind):
    def distance(predict):
        return (sampled(kind, predict) - JOINT).abs().sum().item() / 2

    assert distance(from_the_others) < 0.04             # 3000 draws and 48 steps leave 0.02
    assert distance(from_all) > 0.06


# --------------------------------------------------------------------------------------------------
# float32, large vocabularies, times near 0 and 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [5, 150_000])
def test_float32_is_enough_at_all_times(kind, size):
    generator = torch.Generator().manual_seed(1)
    times = torch.tensor([1e-6, 1e-3, 0.3, 0.5, 0.999, 1 - 2**-20])
    B, mask_id = len(times), size - 1
    logits = 3 * torch.randn(B, 4, size, generator=generator)
    x_0 = torch.randint(size - 1, (B, 4), generator=generator)
    x_t = x_0.clone()
    x_t[:, 1] = (x_0[:, 1] + 1) % (size - 1)
    x_t[:, 2] = mask_id
    x_t[:, 3] = logits[:, 3, :-1].argmax(-1)            # noise that the model believes

    def bound(dtype):
        some, t = logits.to(dtype), times.to(dtype)
        if kind == "uniform":
            alpha = (1 - times[:, None]).to(dtype)
            return uniform_bound(some, x_0, x_t, alpha, -torch.ones(B, 1, dtype=dtype))
        return hybrid_bound(some, x_0, x_t, t, mask_id, SHARE)

    exact = bound(torch.float64)
    assert (exact > 0).all()
    torch.testing.assert_close(bound(torch.float32).double(), exact, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_time_are_finite(kind):
    model = tiny(**noisy(kind))
    tokens = tokens_of((3, 8))
    for t in (torch.full((3,), 1.0), torch.full((3,), 2.0**-24)):
        loss = LOSSES[kind](model, tokens, t, generator=torch.Generator().manual_seed(0))
        loss.loss.backward()
        assert loss.token_nll.isfinite().all() and (loss.token_nll >= 0).all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_hybrid_noise_without_uniform_tokens_is_masks():
    model = tiny(**noisy("hybrid") | {"uniform_share": 0.0})
    masks = tiny()                                      # the same weights
    tokens, t = tokens_of((4, 16)), torch.tensor([0.1, 0.4, 0.7, 0.95])
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < t[:, None]
    replacement = torch.full_like(tokens, MASK)
    ours = hybrid_loss(model, tokens, t, mask, replacement=replacement)
    with torch.no_grad():
        masks.head.weight[MASK] = 0                     # p without the mask
        bias = torch.zeros(12).index_fill(0, torch.tensor(MASK), -1e9)
    forward = masks.forward
    masks.forward = lambda *args, **how: forward(*args, **how) + bias
    masks.weighted_nll = None
    nll = F.cross_entropy(masks(torch.where(mask, MASK, tokens)).transpose(1, 2), tokens,
                          reduction="none") * mask / t[:, None]
    torch.testing.assert_close(ours.token_nll, nll.detach(), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Losses and the bound on a text


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_the_mean_of_the_bound_over_all_maskable_tokens(kind):
    model, tokens = tiny(**noisy(kind)), tokens_of((3, 10))
    t, maskable = torch.tensor([0.2, 0.6, 0.9]), torch.arange(10).expand(3, 10) >= 4
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.6
    replacement = torch.where(torch.arange(10) % 3 == 0, MASK, (tokens + 1) % 11)
    loss = LOSSES[kind](model, tokens, t, mask, maskable, replacement=replacement)
    x_t = torch.where(mask & maskable, replacement, tokens)
    logits = model(x_t)
    if kind == "uniform":
        nats = uniform_bound(logits, tokens, x_t, 1 - t[:, None], -torch.ones(3, 1))
    else:
        nats = hybrid_bound(logits, tokens, x_t, t, MASK, SHARE)
    assert (nats[maskable & ~mask] > 0).all(), "clean tokens are predicted, too"
    torch.testing.assert_close(loss.token_nll, (nats * maskable).detach())
    torch.testing.assert_close(loss.loss, (nats * maskable).sum() / 18)
    assert loss.count == 18 and torch.equal(loss.is_masked, mask & maskable)
    torch.testing.assert_close(loss.nelbo, loss.loss.detach())
    gradient = torch.autograd.grad(loss.loss, model.head.weight)[0]
    expected = torch.autograd.grad((nats * maskable).sum() / 18, model.head.weight)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clipped_weight_changes_the_loss_and_not_the_nelbo(kind):
    model, tokens, t = tiny(**noisy(kind)), tokens_of((2, 16)), torch.tensor([0.05, 0.9])
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    plain = LOSSES[kind](model, tokens, t, generator=generators[0])
    clipped = LOSSES[kind](model, tokens, t, max_weight=5.0, generator=generators[1])
    torch.testing.assert_close(clipped.nelbo, plain.nelbo)
    kept = torch.tensor([[5 / weight(t)[0].item()], [1.0]])
    torch.testing.assert_close(clipped.loss, (plain.token_nll * kept).mean())
    assert clipped.loss < 0.9 * plain.loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_of_uniform_noise_is_the_same_for_every_schedule(schedule):
    """Of a model that cannot know better it is the entropy."""
    p = probabilities(3, 6)[:, :5] + 0.02
    p = p / p.sum(-1, keepdim=True)
    model = Independent(p, **noisy("uniform"))
    tokens, nats = drawn_from(p, 8000)
    draws = torch.stack([
        uniform_loss(model, tokens, schedule=schedule,
                     generator=torch.Generator().manual_seed(seed)).nelbo for seed in range(40)])
    error = draws.std().item() / math.sqrt(40)
    # times below 1e-3 are not drawn: a thousandth of the bound at most
    assert error < 0.015 and abs(draws.mean() - nats.mean()) < 4 * error + 2e-3


def drawn_from(p, n):
    """(n rows of independent tokens with the probabilities p [T, V], -log p of each), [n, T]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(p, n, replacement=True, generator=generator).T
    return tokens, -p[torch.arange(len(p)), tokens].log()


@pytest.mark.parametrize("kind", KINDS)
def test_nelbo_of_the_best_prediction_is_log_p(kind):
    p = probabilities(4, 6) + F.pad(torch.full((4, 5), 0.02), (0, 1))
    p = p / p.sum(-1, keepdim=True)
    model = Independent(p, **noisy(kind))
    tokens, nats = drawn_from(p, 8000)
    value, error = nelbo(model, tokens, num_samples=20, seed=1, batch_size=3000)
    assert error < 0.02 and abs(value - nats.mean().item()) < 4 * error
    maskable = torch.arange(4).expand(8000, 4) >= 2
    value, error = nelbo(model, tokens, num_samples=20, seed=1, batch_size=8000, maskable=maskable)
    assert error < 0.02 and abs(value - nats[:, 2:].mean().item()) < 4 * error


class Watched(torch.nn.Module):
    """A model, and what it was shown."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.seen = model, model.config, []

    def forward(self, tokens, **how):
        self.seen.append(tokens.clone())
        return self.model(tokens, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_nelbo_leaves_given_tokens_and_padding_alone(kind):
    model = Watched(tiny(**noisy(kind)))
    tokens = tokens_of((5, 9))
    maskable = torch.arange(9).expand(5, 9) >= 3
    shown = torch.arange(9) < torch.tensor([9, 5, 4, 7, 6])[:, None]
    how = dict(num_samples=30, seed=3, batch_size=2, maskable=maskable, attention_mask=shown)
    value, error = nelbo(model, tokens, **how)
    changed = torch.zeros(5, 9, dtype=torch.bool)
    for i, seen in enumerate(model.seen):
        first = i % 3 * 2
        changed[first:first + 2, :seen.shape[1]] |= \
            seen != tokens[first:first + 2, :seen.shape[1]]
    assert torch.equal(changed, maskable & shown)
    padded = tokens.where(shown, 7)
    again = nelbo(model.model, padded, **how)
    assert again == pytest.approx((value, error), rel=1e-5), "padding is seen by nobody"


# --------------------------------------------------------------------------------------------------
# The sampler


@pytest.mark.parametrize("kind", KINDS)
def test_given_tokens_stay_and_every_other_is_written(kind):
    model = tiny(**noisy(kind))
    canvas = tokens_of((4, 12))
    canvas[0, 3:9], canvas[1], canvas[2, ::2] = MASK, MASK, MASK
    seen = []
    written = reverse(model, canvas, 5, seed=1, on_step=lambda *step: seen.append(step))
    given = canvas != MASK
    assert torch.equal(written[given], canvas[given]) and (written != MASK).all()
    assert [number for number, _, _ in seen] == [1, 2, 3, 4, 5]
    assert all(torch.equal(tokens[given], canvas[given]) for _, tokens, _ in seen)
    assert torch.equal(seen[-1][1], written)
    assert all((seen[i][1] != seen[i + 1][1]).any() for i in range(4))
    assert all((sure[given] == 0).all() and (sure <= 1).all() for _, _, sure in seen)
    assert torch.equal(reverse(model, canvas[3:], 5, seed=1), canvas[3:]), "nothing to write"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_is_the_row_alone(kind):
    model = tiny(**noisy(kind))
    canvas = tokens_of((3, 10))
    canvas[0, 2:], canvas[1, :7], canvas[2, 4:6] = MASK, MASK, MASK
    together = reverse(model, canvas, 7, seed=11)
    assert torch.equal(together[:1], reverse(model, canvas[:1], 7, seed=11))
    other = canvas[[0, 2, 1]]                           # the stream of row 0, beside others
    assert torch.equal(reverse(model, other, 7, seed=11)[0], together[0])
    assert not torch.equal(reverse(model, canvas, 7, seed=12), together)
    assert torch.equal(reverse(model, canvas, 7, seed=11), together)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 6])
def test_independent_tokens_are_drawn_from_their_distribution(kind, steps):
    p = probabilities(3, 6)
    model = Independent(p, **noisy(kind))
    written = reverse(model, torch.full((3000, 3), 5), steps, seed=2)
    assert differs(counted(written.tolist(), 3, 6), p) < 4.5
    sharp = (p.log() / 0.5).softmax(-1)
    written = reverse(model, torch.full((3000, 3), 5), steps, temperature=0.5, seed=2)
    assert differs(counted(written.tolist(), 3, 6), sharp) < 4.5


def test_it_begins_with_noise():
    canvas = torch.full((3000, 3), 5)
    canvas[:, 0] = 4
    for kind in KINDS:
        model = Watched(Independent(probabilities(3, 6), **noisy(kind)))
        reverse(model, canvas, 1, seed=4)
        first = model.seen[0]
        assert (first[:, 0] == 4).all()
        if kind == "hybrid":
            assert (first[:, 1:] == 5).all()
        else:
            assert differs(counted(first[:, 1:].tolist(), 2, 6), torch.full((6,), 1 / 6)) < 4.5


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_0_writes_the_most_probable(kind):
    p = probabilities(3, 6)
    for temperature in (0.0, 1e-9):
        written = reverse(Independent(p, **noisy(kind)), torch.full((4, 3), 5), 3, temperature)
        assert torch.equal(written, p.argmax(-1).expand(4, 3))


def test_improbable_tokens_can_be_left_out():
    p = torch.tensor([[0.9, 0.06, 0.04, 0.0]])
    for kind in KINDS:
        model = Independent(p, **noisy(kind))
        written = reverse(model, torch.full((2000, 1), 3), 1, min_probability=0.05, seed=0)
        expected = torch.tensor([[0.9375, 0.0625, 0, 0]])
        assert differs(counted(written.tolist(), 1, 4), expected) < 4.5


@pytest.mark.parametrize("change, words", [
    (dict(steps=0), "steps must be at least 1, got 0"),
    (dict(temperature=-1.0), "temperature must not be negative, got -1.0"),
    (dict(temperature=math.nan), "temperature must not be negative, got nan"),
    (dict(min_probability=2.0), "min_probability must be between 0 and 1, got 2.0"),
    (dict(tokens=torch.full((1, 4), 12)), "token 12 is outside the vocabulary of 12"),
    (dict(tokens=torch.full((1, 65), MASK)), "65 tokens exceed the model's context of 64"),
    (dict(model=tiny()), "this model was trained with masks: see diffusion.denoise"),
    (dict(model=tiny(noise="uniform", mask_token_id=None)), "has no mask token to say where"),
])
def test_arguments_of_the_sampler_that_cannot_be(change, words):
    arguments = dict(model=tiny(**noisy("uniform")), tokens=torch.full((1, 4), MASK), steps=2)
    with pytest.raises(ValueError, match=re.escape(words)):
        reverse(**arguments | change)


# --------------------------------------------------------------------------------------------------
# What refuses such a model, and mistakes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_for_masks_refuses(kind, tmp_path):
    model, tokens = tiny(**noisy(kind)), tokens_of((2, 6))
    canvas = torch.full((2, 6), MASK)
    hidden = torch.ones(2, 6, dtype=torch.bool)
    for ask in (
        lambda: denoise(model, canvas, 3), lambda: generate(model, [[1, 2]], 4),
        lambda: infill(model, [[1, MASK]]), lambda: mdlm_loss(model, tokens),
        lambda: log_likelihood(model, [[1]], [[2, 3]]),
        lambda: restored(model, tokens, hidden, hidden),
    ):
        with pytest.raises(ValueError, match=f"trained with {kind} noise .* cannot use it"):
            ask()
    for gguf in (False, True):
        with pytest.raises(ValueError, match=f"no published layout is for a model of {kind} noise"):
            model.export_pretrained(tmp_path, gguf=gguf)
    for become in (lambda: become_editor(model, "linear"),
                   lambda: become_corrector(model, 8, 0.5)):
        with pytest.raises(ValueError, match=f"undoes {kind} noise"):
            become()


@pytest.mark.parametrize("settings, words", [
    (dict(noise="gauss"), "noise must be one of mask, uniform, hybrid, got 'gauss'"),
    (dict(noise="uniform", uniform_share=0.1), "uniform_share is of hybrid noise, got 0.1 with"),
    (dict(noise="hybrid", uniform_share=1.0), "uniform_share must be at least 0 and below 1"),
    (dict(noise="hybrid", mask_token_id=None), "mask_token_id is missing"),
    (dict(noise="uniform", causal=True), "a model of uniform noise sees the whole text"),
    (dict(noise="uniform", shift=True), "a model of uniform noise sees the whole text"),
    (dict(noise="hybrid", block_length=4), "a model of hybrid noise sees the whole text"),
    (dict(noise="hybrid", edits=True), "a model of hybrid noise sees the whole text"),
])
def test_configs_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Config(**dict(vocab_size=12, mask_token_id=MASK) | settings)


def test_shapes_that_do_not_fit():
    model, tokens = tiny(**noisy("uniform")), tokens_of((2, 6))
    with pytest.raises(ValueError, match="replacement must have the shape of tokens"):
        uniform_loss(model, tokens, replacement=tokens[:1])
    with pytest.raises(ValueError, match="t must be above 0 and at most 1"):
        uniform_loss(model, tokens, t=torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match=r"logits of \[2, 6, 12\] do not fit x_0 of \[2, 5\]"):
        uniform_bound(model(tokens), tokens[:, :5], tokens, torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="uniform_share must be at least 0 and below 1, got 1"):
        hybrid_bound(model(tokens), tokens, tokens, torch.ones(2), MASK, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a random model of hybrid noise that knows bytes."""
    return tiny_checkpoint(tmp_path_factory.mktemp("hybrid"), **noisy("hybrid", max_len=64))


@pytest.mark.parametrize("script, arguments, words", [
    ("train_scratch.py", ["--noise=gauss"], "noise must be one of mask, uniform, hybrid"),
    ("train_scratch.py", ["--noise=uniform", "--objective=bd3lm"], "objective bd3lm is for masks"),
    ("train_scratch.py", ["--noise=hybrid", "--objective=ar"], "noise hybrid needs --objective"),
    ("train_scratch.py", ["--noise=hybrid", "--uniform_share=1"], "below 1, got 1.0"),
    ("finetune_llada.py", ["--init_from=HERE"], "undoes hybrid noise: this recipe takes models"),
    ("train_grpo.py", ["--init_from=HERE"], "undoes hybrid noise: this recipe takes models"),
    ("convert_bert.py", ["--init_from=HERE"], "undoes hybrid noise: this recipe takes models"),
    ("convert_ar.py", ["--init_from=HERE"], "is "),
    ("train_edits.py", ["--init_from=HERE"], "undoes hybrid noise"),
    ("eval.py", ["--checkpoint=HERE", "--tasks=piqa"], "its bound can be measured"),
    ("sample.py", ["--checkpoint=HERE", "--chat"], "it takes --prompt and --infill, neither"),
    ("sample.py", ["--checkpoint=HERE", "--serve=8000"], "it takes --prompt and --infill, neither"),
    ("sample.py", ["--checkpoint=HERE", "--cache=prefix"], "cache is for models that fill masks"),
    ("sample.py", ["--checkpoint=HERE", "--remasking=entropy"], "remasking is for models that"),
    ("sample.py", ["--checkpoint=HERE", "--schedule=even"], "schedule is for models that fill"),
    ("sample.py", ["--checkpoint=HERE", "--cfg_scale=1"], "takes steps, temperature and seed"),
    ("sample.py", ["--checkpoint=HERE", "--steps=-2"], "steps must be at least 1, got -2"),
    ("sample.py", ["--checkpoint=HERE", "--edit=a"], "cannot edit a text"),
])
def test_mistakes_end_in_one_line(
    script, arguments, words, checkpoint, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    arguments = [a.replace("HERE", str(checkpoint)) for a in arguments]
    if script not in ("sample.py", "eval.py"):
        arguments.append(f"--out_dir={tmp_path}")
    if script == "train_edits.py":
        arguments.append(f"--dataset={text}")
    assert refused(run_here(script, *arguments, "--device=cpu"), words)


def test_what_the_settings_of_the_sampler_mean():
    sampler = tiny_sampler(**noisy("uniform"))
    settings = dict(steps=0, temperature="auto", seed=7, cache="none")
    expected = dict(max_new_tokens=9, steps=9, temperature=0.5, seed=7)
    assert sampler.arguments(9, settings) == expected
    asked = settings | dict(steps=3, temperature="1.0")
    assert sampler.arguments(9, asked, gaps=True) == dict(steps=3, temperature=1.0, seed=7)
    with pytest.raises(ValueError, match="rows of one length together, got lengths"):
        sampler.run([[1, 2], [1]], sampler.arguments(9, settings))


# --------------------------------------------------------------------------------------------------
# The recipe, the sampler and the evaluation as a user runs them


def stopping_at(step):
    """Run.end_step that presses Ctrl-C when so many updates are done."""
    end_step = Run.end_step

    def end(run, tokens):
        end_step(run, tokens)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return end


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_samples_and_is_measured(kind, small, text, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def train(folder, *more):
        result = run_here(*small("train_scratch.py", tmp_path / folder, f"--noise={kind}", *more))
        assert result.status == 0, result
        return result

    drawn, draw = [], getattr(noises, f"{kind}_noise")

    def recorded(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(noises, f"{kind}_noise", recorded)
        result = train("whole")
    assert len({(str(mask), str(new)) for mask, new in drawn}) == 6, "each step has its own noise"
    said = LAST_LINE.fullmatch(result.out.splitlines()[-1])
    assert said and "step 3: " in result.out
    log = rows(tmp_path / "whole")
    assert [row["step"] for row in log] == [3, 6] and "restored" not in log[0]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stopping_at(4))
        assert "stopped at step 4" in train("broken").out
    train("broken", "--resume=True")
    same_run(tmp_path / "whole", tmp_path / "broken")
    train("parts", "--batch_size=2", "--grad_accum=2")
    losses = [rows(tmp_path / name)[0]["train_loss"] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "a step's noise follows from its number"
    other = run_here(*small("train_scratch.py", tmp_path / "broken", "--resume=True"))
    assert refused(other, "cannot resume: noise was")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["noise"] == kind and config["uniform_share"] == (0.1 if kind == "hybrid" else 0)
    assert Transformer.from_pretrained(tmp_path / "whole").config.noise == kind
    here = [f"--checkpoint={tmp_path / 'whole'}", "--device=cpu", "--threads=1"]
    measured = run_here("eval.py", *here, f"--dataset={text}", "--max_tokens=512")
    assert measured.status == 0 and measured.out.splitlines()[-1] == said[0], measured
    two = run_here("sample.py", *here, "--prompt=the", "--num_samples=2", "--seed=3", "--show")
    one = run_here("sample.py", *here, "--prompt=the", "--seed=3")
    assert two.status == one.status == 0, two
    assert one.out.splitlines()[0].startswith("the")
    shown, _, samples = two.out.partition("--- 1 of 2\n")
    assert shown.count("step  13  ") == 2 and samples.startswith(one.out.partition("\n\n")[0])
    filled = run_here("sample.py", *here, "--infill=the [MASK:4] sat", "--steps=3")
    assert filled.status == 0 and re.match(r"(?s)the.* sat\n\n5? ?4 tokens in 3 ", filled.out)


def test_a_model_is_what_it_was_after_saving(tmp_path):
    model = tiny_model(**noisy("hybrid"))
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config
    canvas = torch.full((1, 8), 257)
    assert torch.equal(reverse(model, canvas, 4, seed=0), reverse(again, canvas, 4, seed=0))
