"""The transformer by itself: the cache, the loss without logits, masks and Config."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion import STEP_SCHEDULES
from edits import FLOW_SCHEDULES
from kernels import HandRMSNorm, LinearCrossEntropy
from model import Config, RMSNorm, Transformer, rotate
from sampling.cache import Cache

KINDS = {
    "ours": {},
    "llama": dict(qk_norm=False, n_kv_heads=1, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "gpt2": dict(
        positions="learned",
        norm="layer",
        norm_bias=True,
        qk_norm=False,
        qkv_bias=True,
        gated=False,
        activation="gelu_tanh",
    ),
    "modernbert": dict(
        norm="layer",
        embed_norm=True,
        first_norm=False,
        qk_norm=False,
        local_window=6,
        global_every=2,
        head_transform=True,
    ),
}


def random_model(seed=0, **options):
    model = Transformer(
        Config(
            **dict(
                dict(vocab_size=60, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, max_len=64),
                **options,
            )
        )
    ).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def random_tokens(batch_size, length):
    return torch.randint(0, 60, (batch_size, length), generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() < tolerance * b.abs().max()


# ------------------------------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_token_by_token_is_the_full_pass(kind):
    model, tokens = random_model(**KINDS[kind], causal=True), random_tokens(2, 20)
    full, cache = model(tokens), Cache(model.config, 2, 24)
    parts = [
        model(tokens[:, :7], cache=cache, positions=torch.arange(7))
    ]  # the prompt at once, then one by one
    parts += [
        model(tokens[:, i : i + 1], cache=cache, positions=torch.tensor([i])) for i in range(7, 20)
    ]
    assert close(torch.cat(parts, dim=1), full)


@pytest.mark.parametrize("kind", ["ours", "llama", "gpt2"])
@torch.no_grad()
def test_decoding_rows_of_different_lengths(kind):
    """Row 0 has 9 tokens before the first step, row 1 has 4: each position [B, S] is the row's
    own."""
    model, tokens, lengths = (
        random_model(**KINDS[kind], causal=True),
        random_tokens(2, 16),
        torch.tensor([9, 4]),
    )
    full, cache = model(tokens), Cache(model.config, 2, 16)
    model(
        tokens[:, :9], cache=cache, positions=torch.arange(9)
    )  # row 1's last five are overwritten below before anyone sees them
    for step in range(7):
        positions = (lengths + step)[:, None]  # [2, 1]
        logits = model(tokens.gather(1, positions), cache=cache, positions=positions)
        assert close(logits[:, 0], full[torch.arange(2), lengths + step])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_refreshing_everything_is_the_full_pass(kind):
    model, before, after = (
        random_model(**KINDS[kind]),
        random_tokens(2, 20),
        random_tokens(4, 20)[2:],
    )
    cache, positions = Cache(model.config, 2, 20), torch.arange(20)
    assert close(model(before, cache=cache, positions=positions), model(before))
    assert close(
        model(after, cache=cache, positions=positions), model(after)
    )  # nothing of `before` is left
    assert close(model(after, cache=cache, positions=positions.expand(2, 20)), model(after))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert close(
        model(after[:, shuffled], cache=cache, positions=shuffled), model(after)[:, shuffled]
    )


@torch.no_grad()
def test_refreshing_a_slice_keeps_the_rest():
    """What a slice sees outside itself is what was written there: with one layer that is exact if
    the rest has not changed."""
    model, tokens = random_model(n_layers=1), random_tokens(2, 20)
    cache, changed = Cache(model.config, 2, 20), tokens.clone()
    model(tokens, cache=cache, positions=torch.arange(20))
    changed[:, 8:12] = 5
    assert close(
        model(changed[:, 8:12], cache=cache, positions=torch.arange(8, 12)), model(changed)[:, 8:12]
    )
    keys = cache.keys[0].clone()
    model(tokens[:, 8:12], cache=cache, positions=torch.arange(8, 12))
    assert torch.equal(cache.keys[0][:, :, :8], keys[:, :, :8]) and not torch.equal(
        cache.keys[0][:, :, 8:12], keys[:, :, 8:12]
    )
    keys, cache.rows = cache.keys.clone(), torch.tensor([1])  # a pass for one row of the batch
    assert close(
        model(tokens[1:, 3:4], cache=cache, positions=torch.tensor([3])), model(tokens[1:])[:, 3:4]
    )
    assert torch.equal(cache.keys[:, 0], keys[:, 0])


@torch.no_grad()
def test_hidden_cache_positions_do_not_count():
    model, tokens, cache = random_model(), random_tokens(1, 12), Cache(random_model().config, 1, 20)
    visible = torch.arange(20)[None] < 12
    assert close(
        model(tokens, attention_mask=visible, cache=cache, positions=torch.arange(12)),
        model(tokens),
    )


# ------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(tie_embeddings=True),
        dict(head_bias=True),
        dict(tie_embeddings=True, head_bias=True, head_transform=True),
    ],
)
def test_loss_and_gradients_are_those_of_cross_entropy(options, chunk, autocast):
    model, tokens = random_model(**options), random_tokens(3, 10)
    select = torch.rand(3, 10, generator=torch.Generator().manual_seed(2)) < 0.6
    targets, weights = (
        tokens.flip(1)[select],
        torch.rand(int(select.sum()), generator=torch.Generator().manual_seed(3)) * 3,
    )
    model.chunk = chunk
    results = []
    for ours in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if ours:
                loss, nll = model.weighted_nll(tokens, select, targets, weights)
            else:
                nll = F.cross_entropy(
                    model(tokens, select=select).float(), targets, reduction="none"
                )
                loss = (nll * weights).sum()
        (loss / 5).backward()
        results.append(
            (
                loss.detach(),
                nll.detach(),
                {name: parameter.grad for name, parameter in model.named_parameters()},
            )
        )
    (loss, nll, grads), (expected_loss, expected_nll, expected_grads) = results
    tolerance = 2e-2 if autocast else 1e-5
    assert nll.dtype == torch.float32 and not nll.requires_grad
    assert close(loss, expected_loss, tolerance) and close(nll, expected_nll, tolerance)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - expected_grads[name]).norm() < (5e-2 if autocast else 1e-5) * expected_grads[
            name
        ].norm(), name


def test_loss_in_float64():
    """In float64, against autograd."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 4), (7, 4), (7,))
    )
    targets, weights = torch.randint(0, 7, (5,), generator=draw), torch.rand(5, generator=draw)
    loss, _ = LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, 2)
    loss.backward()
    a, b, c = (x.detach().clone().requires_grad_() for x in (hidden, weight, bias))
    (F.cross_entropy(a @ b.T + c, targets, reduction="none") * weights).sum().backward()
    for ours, theirs in ((hidden, a), (weight, b), (bias, c)):
        assert close(ours.grad, theirs.grad, 1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_loss_of_no_rows(tie):
    model, tokens = random_model(tie_embeddings=tie, head_bias=True), random_tokens(2, 5)
    loss, nll = model.weighted_nll(
        tokens, torch.zeros(2, 5, dtype=torch.bool), torch.empty(0, dtype=torch.int64)
    )
    assert loss.item() == 0 and nll.shape == (0,)
    loss.backward()
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in model.parameters()
    )


def test_loss_everywhere_and_by_index():
    model, tokens = random_model(), random_tokens(2, 6)
    loss, nll = model.weighted_nll(tokens, None, tokens)  # [B, T], every weight one
    expected = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="none")
    assert close(nll, expected) and close(loss, expected.sum())
    rows = torch.tensor([11, 0, 3])
    assert close(model(tokens, select=rows), model(tokens).flatten(0, 1)[rows])
    assert close(model.weighted_nll(tokens, rows, tokens.flatten()[rows])[1], expected[rows])
    with torch.no_grad():
        assert close(model.weighted_nll(tokens, None, tokens)[0], expected.sum())
    model.requires_grad_(False)  # frozen: nothing to differentiate
    assert not model.weighted_nll(tokens, None, tokens)[0].requires_grad


def test_the_loss_can_be_differentiated_once():
    loss, _ = random_model().weighted_nll(random_tokens(1, 4), None, random_tokens(1, 4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        loss.backward()


# ------------------------------------------------------------------------------------------------
# masks and sizes


def test_masks_that_would_be_read_as_something_else_are_refused():
    """0, to be added to a score that is seen, as false; a selection of 0 and 1 as two indices.
    Zeros and ones may be floats."""
    model, tokens = random_model(), random_tokens(2, 4)
    with pytest.raises(ValueError, match=r"select is bool \[2, 4\], or one index for each"):
        model(tokens, select=torch.ones(2, 4, dtype=torch.int64))
    added = torch.tensor([[0, 0, 0, -torch.inf]]).repeat(2, 1)
    with pytest.raises(ValueError, match="attention_mask is true, or 1, where a key may be seen"):
        model(tokens, attention_mask=added)
    shown = added == 0
    with torch.no_grad():
        assert torch.equal(model(tokens, attention_mask=shown.float()),
                           model(tokens, attention_mask=shown))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind, causal):
    """Padding far longer than a local window, where a padded query sees nobody, must not become NaN
    either."""
    model, tokens = random_model(**KINDS[kind], causal=causal), random_tokens(2, 40)
    alone = model(tokens[:1, :5])
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 5:] = False
    right = model(tokens, attention_mask=mask)
    assert right.isfinite().all() and close(right[:1, :5], alone)
    if model.config.positions == "rope":  # only distances count
        left = model(tokens.roll(35, dims=1), attention_mask=mask.roll(35, dims=1))
        assert left.isfinite().all() and close(left[:1, 35:], alone, 1e-4)


def test_gradients_of_the_norm_and_of_the_loss_by_hand():
    """gradcheck of the two functions whose backward pass is written out, in float64."""
    torch.manual_seed(0)
    x, weight = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (4,))
    )
    assert torch.autograd.gradcheck(HandRMSNorm.apply, (x, weight, 1e-6))
    assert HandRMSNorm.apply(x, weight, 1e-6).dtype == torch.float64
    torch.testing.assert_close(
        HandRMSNorm.apply(x, weight, 1e-6),
        F.rms_norm(x, (4,), weight, 1e-6),
        rtol=1e-13,
        atol=1e-13,
    )
    hidden, head, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 4), (9, 4), (9,))
    )
    targets, weights = torch.randint(0, 9, (7,)), torch.rand(7, dtype=torch.float64)
    for chunk in (2, 100):  # of rows: twice as many bytes a number, half the rows
        for b in (bias, None):
            loss, nll = LinearCrossEntropy.apply(hidden, head, b, targets, weights, chunk)
            assert loss.dtype == nll.dtype == torch.float64
            torch.testing.assert_close(
                nll,
                F.cross_entropy(F.linear(hidden, head, b), targets, reduction="none").detach(),
                rtol=1e-12,
                atol=1e-12,
            )
            assert torch.autograd.gradcheck(
                lambda *inputs: LinearCrossEntropy.apply(*inputs, targets, weights, chunk)[0],
                (hidden, head, b), fast_mode=True,
            )
    with torch.no_grad():
        far = hidden * 1000  # where exp underflows
        torch.testing.assert_close(
            LinearCrossEntropy.apply(far, head, bias, targets, weights, 4)[1],
            F.cross_entropy(F.linear(far, head, bias), targets, reduction="none"),
            rtol=1e-12,
            atol=1e-12,
        )


def test_padding_far_from_the_text_is_no_nan_in_bfloat16_either():
    """Training on a CPU takes another path there, whose softmax of nothing is NaN, and NaN times a
    weight of 0 is NaN."""
    model, tokens = random_model(**KINDS["modernbert"]).train(), random_tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 5:] = False
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, attention_mask=mask)
        alone = model(tokens[:1, :5])
    assert logits.isfinite().all() and close(logits[:1, :5], alone, 0.05)
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_who_depends_on_whom(kind):
    for causal in (False, True):
        model, tokens = random_model(**KINDS[kind], causal=causal), random_tokens(1, 12)
        base = model(tokens)
        for i in range(12):
            changed = tokens.clone()
            changed[0, i] = (changed[0, i] + 1) % 60
            moved = (model(changed) - base)[0].abs().amax(dim=-1) > 1e-6
            assert moved[i:].all()
            assert moved[:i].any() == (not causal and i > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 4, 8), (1, 2)])
def test_norm_by_hand_is_torchs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, g = (
        torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[-1:], shape)
    )
    x[0] *= 1e-4  # where eps counts
    norm = RMSNorm(shape[-1], 1e-6)
    norm.weight.data = weight.float()
    results = []
    for function in (norm, lambda x: F.rms_norm(x, weight.shape, norm.weight.to(x.dtype), 1e-6)):
        leaf, norm.weight.grad = x.clone().requires_grad_(), None
        y = function(leaf)
        y.backward(g)
        results.append((y, leaf.grad, norm.weight.grad))
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= (
            1e-6 if dtype == torch.float32 else 1e-2
        ) * theirs.abs().max()


@torch.no_grad()
def test_checkpointed_blocks_give_the_same_gradients():
    with torch.enable_grad():
        grads = []
        for checkpointed in (False, True):
            model = random_model()
            model.checkpoint_blocks = checkpointed
            model.weighted_nll(random_tokens(2, 8), None, random_tokens(2, 8))[0].backward()
            grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_too_long_for_learned_positions():
    model = random_model(**KINDS["gpt2"])
    with pytest.raises(
        ValueError, match="65 tokens are too long for this model's 64 learned positions"
    ):
        model(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize("tied", [False, True])
def test_first_loss_is_about_that_of_a_uniform_guess(tied):
    model = Transformer(
        Config(vocab_size=60, dim=32, n_layers=2, n_heads=4, tie_embeddings=tied)
    ).init_weights()
    _, nll = model.weighted_nll(random_tokens(2, 8), None, random_tokens(2, 8).flip(1))
    assert (
        abs(nll.mean().item() - math.log(60)) < 0.05
        and (model.head.weight is model.embed.weight) == tied
    )
    assert all(
        p.std().item()
        == pytest.approx(1.0 if p is model.embed.weight and not tied else 0.02, rel=0.2)
        for p in model.parameters()
        if p.ndim == 2
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(dim=30, n_heads=4), "dim 30 does not divide into 4 heads"),
        (dict(n_heads=4, n_kv_heads=3), "4 heads cannot share 3"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_scaling must be None or of"),
        (dict(rope_scaling="linear"), "rope_scaling must be a dict, got 'linear'"),
        (dict(positions="alibi"), "positions must be one of rope, learned, got 'alibi'"),
        (dict(step_schedule="fast"), "step_schedule must be one of even, timesteps, got 'fast'"),
        (dict(step_schedule=["even"]), "step_schedule must be one of even, timesteps"),
        (dict(edit_schedule="fast"), "edit_schedule must be one of linear, cubic, cube, cosine"),
        (dict(n_experts=2, dense_layers=1), "dense_layers must be a list, got 1"),
        (dict(n_experts=2, dense_layers=[[0]]), "dense_layers must be layers below"),
        (dict(published="x"), "published must be a dict, got 'x'"),
        (dict(mask_token_id=60, vocab_size=60), "outside the vocabulary"),
        (dict(vocab_size=0), "vocab_size must be"),
        (dict(n_layers="3"), "n_layers must be"),
        (dict(norm_eps=0), "norm_eps must be a positive"),
    ],
)
def test_config_says_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


def test_config_knows_the_schedules_that_there_are():
    """config.py, which knows nothing of diffusion, names them once more."""
    for field, schedules in (("step_schedule", STEP_SCHEDULES), ("edit_schedule", FLOW_SCHEDULES)):
        for name in schedules:
            Config(**{field: name})
        with pytest.raises(ValueError, match=f"{field} must be one of {', '.join(schedules)}, got"):
            Config(**{field: "another"})


def test_config_derives_sizes():
    assert Config(dim=256).hidden_dim == 704 and Config(dim=768, gated=False).hidden_dim == 3072
    assert Config(dim=20, n_heads=1, gated=False).hidden_dim == 80
    assert Config(dim=256, n_heads=4).head_dim == 64 and Config(n_heads=6, dim=96).n_kv_heads == 6


# --------------------------------------------------------------------------------------------------
# Initial weights


@pytest.mark.parametrize("heads", [dict(n_heads=4), dict(n_heads=4, n_kv_heads=1),
                                   dict(n_heads=1, head_dim=24), dict(rope_share=0.5)], ids=str)
@torch.no_grad()
def test_two_heads_begin_by_looking_beside(heads):
    """Head 0 at the token before, head 1 at the one after; others see all alike."""
    options = dict(vocab_size=200, dim=96, n_layers=2, n_heads=4) | heads
    model = Transformer(Config(**options)).init_weights(1).look_beside()
    attention, T = model.blocks[0].attn, 30
    x = model.blocks[0].attn_norm(model.embed(torch.arange(T)[None]))
    H, G, C = attention.shape
    q = attention.q_norm(attention.q(x).view(1, T, H, C)).transpose(1, 2)
    k = attention.k_norm(attention.k(x).view(1, T, G, C)).transpose(1, 2)
    angles, _ = model.ropes(torch.arange(T))
    q, k = rotate(q, *angles), rotate(k, *angles).repeat_interleave(H // G, 1)
    p = (q @ k.transpose(-1, -2) / C**0.5).softmax(-1)[0]                               # [H, T, T]
    before, after = p[0].diagonal(-1), p[min(1, H - 1)].diagonal(1)
    assert before.min() > 0.2 and (p[0].argmax(-1)[1:] == torch.arange(T - 1)).all()
    if H > 1:
        assert after.min() > 0.2 and (p[1].argmax(-1)[:-1] == torch.arange(1, T)).all()
        assert p[2:].diagonal(-1, 1, 2).mean() < 0.1


def test_looking_beside_needs_rope():
    with pytest.raises(ValueError, match="look_beside is for positions rope, not learned"):
        random_model(positions="learned").look_beside()
