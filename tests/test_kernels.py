"""kernels.py: each fast form equals its plain line, in values and in gradients."""
import pytest
import torch
from models import Independent, probabilities, tiny

import diffusion
import kernels
from kernels import packed
from model import Config, Transformer
from passes import block_attention
from sampling.cache import Cache
from sampling.engine import generate

SHAPE = dict(vocab_size=700, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_len=512,
             mask_token_id=699)
KINDS = {
    "ours": {},
    "causal": dict(causal=True),
    "learned positions": dict(positions="learned", norm="layer", norm_bias=True, qk_norm=False),
    "local": dict(local_window=6, global_every=2),
    "tied": dict(tie_embeddings=True, head_bias=True),
}


def random_model(dtype=torch.float32, **options):
    model = Transformer(Config(**SHAPE | options)).init_weights(1).to(dtype)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def random_tokens(B=2, T=24):
    return torch.randint(0, 699, (B, T), generator=torch.Generator().manual_seed(0))


def both_ways(monkeypatch, run):
    """What `run()` returns by the plain lines and by the fast forms."""
    results = []
    for plain in (True, False):
        monkeypatch.setattr(kernels, "PLAIN", plain)
        results.append(run())
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_model_is_the_same_by_the_plain_lines(kind, dtype, monkeypatch):
    model, tokens = random_model(dtype, **KINDS[kind]), random_tokens()
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[1, 15:] = False
    select = (torch.rand(2, 24, generator=torch.Generator().manual_seed(2)) < 0.5) & padding
    weights = torch.rand(int(select.sum()), generator=torch.Generator().manual_seed(3), dtype=dtype)

    def run():
        model.zero_grad()
        total, nll = model.weighted_nll(tokens, select, tokens[select], weights, padding)
        total.backward()
        with torch.no_grad():
            logits = model(tokens, padding)[padding]
        return total.detach(), nll, logits, *[p.grad for p in model.parameters()]

    for plain, fast in zip(*both_ways(monkeypatch, run)):
        assert plain.dtype == fast.dtype
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        assert (plain - fast).abs().max() <= tolerance * plain.abs().max().clamp(min=1e-3)


def test_tiles_of_a_block_mask_equal_the_mask(monkeypatch):
    """350 tokens do not divide into tiles of 128; many of the pairs are never computed."""
    visible = block_attention(350, 7, torch.device("cpu"))
    tiles = kernels.tiled(visible)
    assert isinstance(tiles, list)
    assert sum(shown.numel() for _, _, shown in tiles) < 0.6 * visible.numel()
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 700, 8, generator=draw) for heads in (4, 2, 2))
    expected = kernels.attend_by_formula(q, k, v, visible[:, None])
    torch.testing.assert_close(kernels.attend(q, k, v, tiles), expected)
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert torch.equal(kernels.tiled(visible), visible[:, None])


def test_a_mask_without_large_holes_is_no_tiles():
    visible = torch.rand(1, 300, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    assert kernels.tiled(kernels.remember_tiles(visible)).shape == (1, 1, 300, 300)


@pytest.mark.parametrize("V", [7, 512, 1300])
def test_fast_drawing_equals_plain_drawing(V, monkeypatch):
    draw = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(200, V, generator=draw)
    uniform = torch.rand(200, generator=draw, dtype=torch.float64)
    for temperature in (0, 0.3, 1.0, 2.0):
        plain = diffusion.sample_tokens(logits, temperature, uniform)
        assert torch.equal(kernels.sample_tokens(logits, temperature, uniform), plain)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    ends = kernels.sample_tokens(logits[:2], 1.0, edges)
    assert ends[0] == 0 and (ends < V).all()
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert torch.equal(kernels.sample_tokens(logits, temperature, uniform), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_equal_the_plain_ones(dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 products in oneDNN")
    model, tokens = random_model(dtype, qkv_bias=True, head_bias=True), random_tokens()
    largest = 2e-2 if dtype == torch.bfloat16 else 1e-5
    tolerance = dict(rtol=largest, atol=largest)
    with torch.no_grad():
        expected = model(tokens)
        linears = kernels.pack(model)
        assert len(linears) == 2 * 7 + 1
        torch.testing.assert_close(model(tokens), expected, **tolerance)
        with kernels.packed(model):                     # packed already: nothing to do or to undo
            torch.testing.assert_close(model(tokens), expected, **tolerance)
        assert "forward" in vars(model.head) and "together" in vars(model.blocks[0].attn.q)
        kernels.unpack(linears)
    for name in ("forward", "together"):
        assert not any(name in vars(module) for module in model.modules())
    assert model(tokens).requires_grad


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
        with packed(model.bfloat16()):                  # where the CPU multiplies in bfloat16
            assert plain() != torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with packed(Independent(probabilities(4, 7))):
        pass
    model = tiny()
    model.blocks[0].compile()  # nothing is compiled before its first call
    with packed(model):
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("hidden", ["nobody", "some", "by head"])
def test_one_query_of_grouped_heads_is_as_exact_as_torch(hidden):
    """Both in float32 against the formula in float64: neither is further away."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, 1, 8, generator=draw)
    k, v = (torch.randn(3, 2, 50, 8, generator=draw) for _ in range(2))
    visible = None
    if hidden != "nobody":
        shape = (3, 6, 1, 50) if hidden == "by head" else (3, 1, 1, 50)
        visible = torch.rand(shape, generator=draw) < 0.6
    exact = kernels.attend_by_formula(q.double(), k.double(), v.double(), visible)
    ours = kernels.attend(q, k, v, visible)
    torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
    largest = (torchs - exact).abs().max()
    assert ours.shape == exact.shape and (ours - exact).abs().max() <= 2 * largest < 1e-6
    in_double = kernels.attend(q.double(), k.double(), v.double(), visible)
    torch.testing.assert_close(in_double, exact, rtol=0, atol=1e-14)
    rounded = kernels.attend(*(x.bfloat16() for x in (q, k, v)), visible)
    assert (rounded - exact).abs().max() < 2e-2


@pytest.mark.parametrize("V", [130, 256, 1280])
def test_the_largest_of_many_is_the_first_of_equals(V, monkeypatch):
    draw = torch.Generator().manual_seed(V)
    logits = torch.randint(0, 9, (64, V), generator=draw).float()       # many are equal
    logits[3] = -torch.inf
    logits[4, :7] = torch.inf
    plain, fast = both_ways(monkeypatch, lambda: kernels.largest(logits))
    assert torch.equal(plain, fast) and torch.equal(plain, logits.argmax(-1))


def test_a_mask_that_hides_nobody_is_none(monkeypatch):
    everyone = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    some = everyone.clone()
    some[1, 0, 2, 4] = False
    assert kernels.unless_all(everyone) is None and kernels.unless_all(some) is some
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert kernels.unless_all(everyone) is everyone


@pytest.mark.parametrize("causal", [True, False])
def test_a_cache_that_is_longer_than_what_is_in_use_changes_nothing(causal, monkeypatch):
    """Token by token with grouped heads: `length` positions are attended to, or all of them by a
    mask."""
    model, tokens = random_model(causal=causal), random_tokens(2, 12)

    def run():
        found = {}
        for rule in ("length", "mask"):
            cache, logits = Cache(model.config, 2, 20), []
            for i in range(12):
                mask = None
                if rule == "length":
                    cache.length = i + 1
                else:
                    mask = (torch.arange(20) <= i).expand(2, -1)
                logits.append(model(tokens[:, i:i + 1], mask, cache=cache,
                                    positions=torch.full((2, 1), i)))
            found[rule] = torch.cat(logits, dim=1)
        return found

    with torch.no_grad():
        plain, fast = both_ways(monkeypatch, run)
    for found in (fast["length"], fast["mask"], plain["length"]):
        torch.testing.assert_close(found, plain["mask"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_by_the_fast_forms_writes_the_same_tokens(dtype, monkeypatch):
    """Two rows of different length with grouped heads. The seed is one by which the most probable
    token leads by 0.13 standard deviations of the logits, which is more than bfloat16 rounds."""
    config = Config(vocab_size=128, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_len=64,
                    causal=True, bos_token_id=0)
    model = Transformer(config).init_weights(5)
    for p in model.parameters():
        draw = torch.Generator().manual_seed(p.numel() + 5)
        p.data += 0.3 * torch.randn(p.shape, generator=draw)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    monkeypatch.setattr(kernels, "PLAIN", True)
    expected = generate(model, prompts, 8)
    plain, fast = both_ways(monkeypatch, lambda: generate(model.to(dtype), prompts, 8))
    assert plain == fast == expected
