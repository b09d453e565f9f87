"""Mixtures of experts and LLaDA2: the layer against its formula, the families against their
references, sampling in blocks with editing, likelihood, and what else walks over parameters."""
import copy
import dataclasses
import json
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from naive import Model
from naive import block_loss as naive_block_loss
from safetensors.torch import load_file, save_file
from test_records import assert_close, llada2_arguments

import kernels
from data.tokenizer import Tokenizer
from diffusion import block_loss, denoise, nelbo
from evaluation.likelihood import log_likelihood
from model import Config, Experts, Transformer
from pretrained.families import FAMILIES
from pretrained.load import describe
from pretrained.tensors import tensor_table
from pretrained.tiny import tiny_model
from sampling.engine import generate, infill
from sampling.sampler import Sampler
from training.balance import balance_loss, expert_counts, expert_loads, move_biases
from training.flops import flops_per_token
from training.lora import add_lora, init_lora, load_adapter, lora_layers, merge_lora, save_adapter
from training.memory import plan_memory
from training.optimizers import Muon, make_optimizers

RECORDS = ROOT / "tests" / "records"
MIXTURES = [name for name in FAMILIES if "n_experts" in FAMILIES[name].keys]
MASK = 59
SHAPE = dict(vocab_size=60, dim=16, n_layers=2, n_heads=2, max_len=64, mask_token_id=MASK,
             n_experts=6, experts_per_token=2, expert_dim=10)
KINDS = {
    "softmax": dict(),
    "softmax, normalised": dict(router_norm=True),
    "biased weights, shared": dict(router_bias="weight", shared_dim=12),
    "sigmoid in groups": dict(router="sigmoid", router_bias="choice", router_norm=True,
                              router_groups=3, router_top_groups=2, router_scale=2.5),
    "one expert": dict(router="sigmoid", experts_per_token=1, router_norm=True, router_scale=1.5),
    "every expert": dict(experts_per_token=6),
}


def random_experts(seed=0, dtype=torch.float64, **options):
    layer = Experts(Config(**SHAPE | options)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return layer


def naive_sum(layer, x):
    """The mixture by its formula: every expert says something to every token, with weight 0 where
    it was not chosen."""
    weights, chosen = layer.route(x)
    dense = torch.zeros(len(x), layer.config.n_experts, dtype=weights.dtype)
    dense = dense.scatter(1, chosen, weights)                                           # [N, E]
    y = 0 if layer.shared is None else layer.shared(x)
    for e in range(layer.config.n_experts):
        gate, up, down = (m.weight[e] for m in (layer.gates, layer.ups, layer.downs))
        y = y + dense[:, e, None] * (F.silu(x @ gate.T) * (x @ up.T) @ down.T)
    return y


def random_model(seed=0, **options):
    """A model whose predictions are far from uniform, and never the mask token."""
    model = Transformer(Config(**SHAPE | options)).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim >= 2 or name.endswith("router_bias"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    model.head.weight.data[MASK] = 0
    return model


LLADA2 = dict(KINDS["sigmoid in groups"], dense_layers=[0], shared_dim=10, rope_share=0.5,
              block_length=8, blocks_from_start=True, threshold=0.95)


# ---- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_equal_the_sum_over_all_of_them(kind, dtype):
    layer = random_experts(dtype=dtype, **KINDS[kind])
    x = torch.randn(3, 5, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    ours, theirs = layer(x), naive_sum(layer, x.view(15, 16)).view(3, 5, 16)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert_close(ours, theirs.detach(), tolerance)
    g = torch.randn(ours.shape, dtype=dtype)
    for mine, other in zip(torch.autograd.grad(ours, inputs, g),
                           torch.autograd.grad(theirs, inputs, g)):
        assert_close(mine, other, tolerance)


def test_the_plain_form_and_the_gradient(monkeypatch):
    """With an expert that nobody chose, and one product in which no weight learns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    counts = torch.tensor([2, 0, 5])
    fast = kernels.expert_linear(x, weight, counts)
    assert torch.autograd.gradcheck(lambda x, w: kernels.expert_linear(x, w, counts), (x, weight))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda x: kernels.expert_linear(x, frozen, counts), (x,))
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert torch.allclose(kernels.expert_linear(x, weight, counts), fast)


def test_autocast_rounds_the_products_and_not_the_router():
    layer, x = random_experts(dtype=torch.float32), torch.randn(40, 16)
    exact, weights = layer(x), layer.route(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.route(x)[0], weights)
        assert_close(layer(x), exact, 0.03)


@pytest.mark.parametrize("kind", ["softmax", "biased weights, shared"])
def test_the_order_of_the_experts_does_not_matter(kind):
    layer, x = random_experts(**KINDS[kind]), torch.randn(9, 16, dtype=torch.float64)
    before, order = layer(x), torch.randperm(6, generator=torch.Generator().manual_seed(2))
    for part in (layer.router, layer.gates, layer.ups, layer.downs):
        part.weight.data = part.weight.data[order]
    if layer.router_bias is not None:
        layer.router_bias.data = layer.router_bias.data[order]
    assert_close(layer(x), before.detach(), 1e-12)


def test_partial_rope_rotates_the_first_dimensions_alone():
    """Shifting all positions changes nothing, as with RoPE of the whole head; and with a share so
    small that nothing is rotated, no order is seen."""
    model, tokens = random_model(rope_share=0.5), torch.arange(8)[None]
    assert_close(model(tokens, positions=torch.arange(8) + 13), model(tokens).detach(), 2e-5)
    assert not torch.allclose(model(tokens.flip(1)).flip(1), model(tokens), atol=1e-3)
    model = random_model(rope_share=0.1)
    assert model.config.rope_dim == 0
    assert_close(model(tokens.flip(1)).flip(1), model(tokens).detach(), 2e-5)


@pytest.mark.parametrize("options, words", [
    (dict(experts_per_token=7), "7 experts a token .* cannot be chosen of 6"),
    (dict(router_groups=4), "6 do not divide into 4 groups"),
    (dict(router_groups=3, router_top_groups=4), "router_top_groups 4 does not fit"),
    (dict(router_groups=6, router_top_groups=1), "router_top_groups 1 does not fit: 2 of 6"),
    (dict(dense_layers=[2]), r"dense_layers must be layers below 2, got \[2\]"),
    (dict(router="tanh"), "router must be one of softmax, sigmoid"),
    (dict(router_bias=True), "router_bias must be one of none, choice, weight"),
    (dict(gated=False), "experts are gated MLPs without biases"),
    (dict(rope_share=1.5), "rope_share must be between 0 and 1"),
    (dict(rope_share=0), "rope_share must be between 0 and 1, 0 excluded, got 0"),
    (dict(rope_scaling="linear"), "rope_scaling must be a dict, got 'linear'"),
    (dict(rope_share=0.5, dim=12), "the head size must be even"),
    (dict(edit_threshold=2), "edit_threshold must be between 0 and 1"),
])
def test_a_mixture_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**SHAPE | options)


# ---- files ---------------------------------------------------------------------------------------


def tiny(family, seed=0):
    """A small random model of a family, its biases random too."""
    model = tiny_model(family, Tokenizer.bytes(), 64, seed, dim=32, n_layers=2).eval()
    for name, p in model.named_parameters():
        if "bias" in name:
            p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_tiny_models_go_out_and_back(family, tmp_path):
    model, tokens = tiny(family), torch.arange(12)[None]
    assert model.config.n_experts == 8
    model.export_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "ours")
    raw = json.loads((tmp_path / "published" / "config.json").read_text())
    assert raw["model_type"] == (FAMILIES[family].spellings or (family,))[0]
    for folder in ("published", "ours"):
        again = Transformer.from_pretrained(tmp_path / folder)
        assert again.config.family == family
        assert torch.equal(again(tokens), model(tokens))
    assert load_file(tmp_path / "ours" / "model.safetensors")["blocks.1.mlp.gates.weight"].ndim == 3


def changed(family, tmp_path, change):
    """An exported tiny model with its tensors changed."""
    tiny(family).export_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_the_bias_of_a_router_keeps_its_precision(tmp_path):
    """Published in float32 beside bfloat16 weights, it is exported so."""
    tiny("llada2").to(torch.bfloat16).export_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[BIAS] = torch.arange(8) / 7 + 1e-4
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = Transformer.from_pretrained(tmp_path)
    assert model(torch.arange(9)[None]).isfinite().all()
    model.export_pretrained(tmp_path / "again")
    exported = load_file(tmp_path / "again" / "model.safetensors")
    assert all(exported[name].dtype == weights[name].dtype for name in weights)
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.expert_bias"


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop(EXPERT), f"the weights lack the tensor {re.escape(EXPERT)}"),
    (lambda w: w.update({EXPERT: torch.zeros(95, 32)}),
     f"{re.escape(EXPERT)} has shape \\[95, 32\\], config.json asks for \\[96, 32\\]"),
    (lambda w: w.update({BIAS: torch.zeros(7)}),
     f"{re.escape(BIAS)} has shape \\[7\\], config.json asks for \\[8\\]"),
    (lambda w: w.update({EXPERT.replace("5", "8"): torch.zeros(96, 32)}),
     "experts.8.up_proj.weight, which has no place"),
])
def test_damaged_mixtures_are_refused(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Transformer.from_pretrained(changed("llada2", tmp_path, change))


@pytest.mark.parametrize("change, words", [
    (dict(num_experts_per_tok=9), "9 experts a token .* cannot be chosen of 8"),
    (dict(n_group=3), "8 do not divide into 3 groups"),
    (dict(topk_group=5), "router_top_groups 5 does not fit"),
    (dict(num_experts=4), r"experts\.4\.down_proj\.weight, which has no place"),
])
def test_a_config_that_does_not_fit_its_weights(change, words, tmp_path):
    """In the published spelling, as they stand in config.json."""
    tiny("llada2").export_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert change.keys() <= raw.keys()
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=words):
        Transformer.from_pretrained(tmp_path)


def test_nan_in_an_expert_is_told(tmp_path):
    folder = changed("llada2", tmp_path, lambda w: w[EXPERT].fill_(math.nan))
    with pytest.warns(UserWarning, match="experts.5.up_proj.weight contains NaN"):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("family, model_type, expected", [
    ("lladamoe", "llada", "lladamoe"),          # as LLaDA-MoE was published
    ("lladamoe", "lladamoe", "lladamoe"),
    ("llada2", "llada2_moe", "llada2"),         # as LLaDA2.1 was published, too
    ("llada21", "llada21_moe", "llada21"),
])
def test_spellings(family, model_type, expected, tmp_path):
    tiny(family).export_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": model_type}))
    config = Transformer.from_pretrained(tmp_path).config
    assert config.family == expected
    assert config.edit_threshold == (0.9 if expected == "llada21" else None)


def test_experts_of_whole_blocks_are_refused(tmp_path):
    """LLaDA2.2, whose config.json says llada2_moe, too."""
    tiny("llada2").export_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"expert_capacity": 48}))
    with pytest.raises(ValueError, match="expert_capacity = 48 is not supported"):
        Transformer.from_pretrained(tmp_path)


def test_keys_that_need_translating(tmp_path):
    """Which layers are dense, how wide the shared expert is, no key/value heads: there and back."""
    cases = {
        "lladamoe": dict(moe_layer_freq=[1, 0], shared_expert_intermediate_size=None,
                         moe_router_enable_expert_bias=False),
        "llada2": dict(num_shared_experts=2, first_k_dense_replace=0, num_key_value_heads=0),
        "qwen3_moe": dict(mlp_only_layers=[1]),
    }
    for family, changes in cases.items():
        model = tiny(family)
        raw = model.config.published | changes
        from pretrained.config import interpret, publish_config
        config = Config(family=family, published=raw, **interpret(FAMILIES[family], raw)[0])
        written = publish_config(config, torch.float32)
        assert {key: written[key] for key in raw} == raw
        again = dataclasses.replace(config, published=None)
        afresh = publish_config(again, torch.float32)
        read = Config(family=family, published=None, **interpret(FAMILIES[family], afresh)[0])
        assert read == again
    assert config.dense_layers == [1] and not hasattr(Transformer(config).blocks[1].mlp, "router")


def test_describe_tells_active_parameters(tmp_path):
    model = tiny("llada2")
    model.export_pretrained(tmp_path)
    total = sum(p.numel() for p in model.parameters())
    idle = 6 / 8 * 3 * 8 * 96 * 32                       # of one sparse layer
    assert f"a token uses {total - int(idle):,} of them: 2 of 8 experts" in describe(tmp_path)
    assert flops_per_token(model, 0, training=False) == 2 * (
        total - idle - 260 * 32 - sum(p.numel() for p in model.parameters() if p.ndim == 1))


# ---- sampling ------------------------------------------------------------------------------------


def up_to_end(tokens, P, end):
    """Prompt and answer, cut after the first end of text."""
    answer = tokens[P:]
    return tokens[:P] + (answer[:answer.index(end) + 1] if end in answer else answer)


@pytest.mark.parametrize("name, count", [("llada2", 21), ("llada21", 17)])
def test_every_record_of_the_references(fixture_path, name, count):
    """Token for token, in the same number of passes, with and without the cache in turns; not so
    where the reference leaves a block unfinished: see the notes in the records."""
    model = Transformer.from_pretrained(fixture_path(name))
    references = json.loads((fixture_path("samplers") / f"{name}.json").read_text())
    assert len(references) == count
    for number, reference in enumerate(references):
        end, prompts, passes = reference["eos_id"], reference["prompts"], [0]
        if "EOS in the prompt's tail" in reference.get("note", ""):
            continue
        stops = reference["eos_early_stop"] or "generate" in reference["reference"]
        model.config.set_ends([end] if stops else [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # some edit to the limit
            arguments = llada2_arguments(reference)
            outputs = generate(model, prompts, cache=(None, "block")[number % 2],
                               on_step=lambda step: passes.append(step.number), **arguments)
        for prompt, output, expected in zip(prompts, outputs, reference["outputs"]):
            expected = expected[:len(prompt) + arguments["max_new_tokens"]]
            if stops:
                output, expected = (up_to_end(row, len(prompt), end) for row in (output, expected))
            assert output == expected
        if len(prompts) == 1 and "note" not in reference:
            assert passes[-1] == reference["forward_passes"]


def test_llada_moe_samples_as_llada(fixture_path):
    model = Transformer.from_pretrained(fixture_path("lladamoe"))
    references = json.loads((fixture_path("samplers") / "lladamoe.json").read_text())
    for r in references:
        shape = (r["gen_length"], r["steps"], r["block_length"])
        assert generate(model, r["prompts"], *shape) == r["outputs"]
    assert len(references) == 3


HOW = {
    "schedule": dict(steps=20, threshold=1.0),
    "threshold": dict(steps=9, threshold=0.3),
    "minimum": dict(threshold=0.5, minimum=2),
    "edited": dict(threshold=0.3, edit_threshold=0.4),
    "speed": dict(threshold=0.5, edit_threshold=0.0, edit_passes=3),
    "drawn": dict(steps=20, threshold=0.4, edit_threshold=0.4, temperature=0.8, seed=[5, 6, 7]),
}


@pytest.mark.filterwarnings("ignore:editing ended")
@pytest.mark.parametrize("kind, shift", [(kind, kind in ("edited", "schedule")) for kind in HOW])
def test_rows_of_a_batch_are_what_they_are_alone(kind, shift):
    """With an exact cache and without one, whatever the lengths; some rows stop at an end of
    text, and a canvas that is longer than the answer is not seen."""
    model = random_model(1, **LLADA2, shift=shift, eos_token_id=7)
    prompts, how = [[1, 2, 3], [5] * 9, [4, 7, 4, 2, 7, 6, 1, 3]], dict(HOW[kind])
    seeds, alone = how.pop("seed", [None] * 3), []
    for prompt, seed in zip(prompts, seeds):
        alone += generate(model, [prompt], 21, block_length=4,
                          seed=None if seed is None else [seed], **how)
    together = generate(model, prompts, 21, block_length=4, seed=seeds if seeds[0] else None, **how)
    cached = generate(model, prompts, 21, block_length=4, cache="block",
                      seed=seeds if seeds[0] else None, **how)
    assert together == alone == cached
    for prompt, row in zip(prompts, together):
        assert row[:len(prompt)] == prompt and MASK not in row
        stopped = 7 in row[len(prompt):]
        assert len(row) == len(prompt) + 21 or stopped and len(row) % 4 == 0


@pytest.mark.filterwarnings("ignore:editing ended")
@pytest.mark.parametrize("kind", [kind for kind in HOW if kind != "minimum"])
def test_the_engine_equals_the_plain_sampler(kind):
    model, how = random_model(2, **LLADA2), dict(HOW[kind])
    how["seed"] = 3
    prompt = [4, 9, 1, 1, 5]
    canvas = torch.tensor([prompt + [MASK] * 19])                   # to the end of a block
    plain = denoise(model, canvas, how.pop("steps", 24), block_length=8, **how)[0].tolist()
    how.setdefault("steps", 24)
    steps = HOW[kind].get("steps", 24)
    assert generate(model, [prompt], 19, **how | {"steps": steps}, block_length=8) == [plain]
    assert generate(model, [prompt], 16, **how | {"steps": steps}, block_length=8) == [plain[:21]]


def test_what_is_not_said_is_as_the_model_has_it():
    model, prompt = random_model(3, **LLADA2 | dict(threshold=0.2, edit_threshold=0.6)), [1, 2, 3]

    def answer(**how):
        passes = [0]
        row = generate(model, [prompt], 21, on_step=lambda step: passes.append(step.number), **how)
        return row, passes[-1]

    said = dict(steps=24, block_length=8, threshold=0.2, edit_threshold=0.6, minimum=0)
    assert answer(steps=24) == answer(**said)
    assert answer(steps=24)[1] < answer(steps=24, threshold=1.0, edit_threshold=1.0)[1] == 24
    random = dict(remasking="random", seed=1)                       # no rule that asks a threshold
    assert MASK not in generate(model, [prompt], 21, 24, **random)[0]
    row = [3, MASK, MASK, 8, MASK, 1, MASK, MASK, MASK, 2]
    filled = infill(model, [row], 8)[0]
    assert MASK not in filled and [filled[i] for i in (0, 3, 5, 9)] == [3, 8, 1, 2]


def test_an_end_of_text_in_the_prompt_s_tail_stops_nothing():
    """The reference leaves the first block unfinished there."""
    model = random_model(1, **LLADA2, eos_token_id=7)
    prompt = [1, 2, 7]
    answer = generate(model, [prompt], 13)[0]
    assert len(answer) == 16 and MASK not in answer


class Flipping(torch.nn.Module):
    """Where token 1 stands it is sure of 2, elsewhere of 1: editing never ends."""

    def __init__(self):
        super().__init__()
        self.config = Config(vocab_size=5, mask_token_id=4, dim=4, n_heads=2, block_length=4,
                             blocks_from_start=True, threshold=0.9)
        self.weight, self.passes = torch.nn.Parameter(torch.zeros(1)), 0

    def forward(self, tokens, attention_mask=None, select=None):
        self.passes += 1
        return 20 * F.one_hot(torch.where(tokens == 1, 2, 1), 5).float()[select]


@pytest.mark.parametrize("edit_passes", [0, 1, 6, 7])
def test_editing_ends_and_says_so(edit_passes):
    model = Flipping()
    canvas, how = torch.tensor([[3, 3, 4, 4]]), dict(edit_threshold=0.5, edit_passes=edit_passes)
    expected = [3, 3] + [1 + edit_passes % 2] * 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert generate(model, [[3, 3]], 2, **how) == [expected]
    assert model.passes == 1 + edit_passes
    words = [str(warning.message) for warning in told]
    if edit_passes:
        assert words == [f"editing ended at its limit of {edit_passes} passes in 1 blocks, where "
                         "tokens went on replacing each other"]
    else:
        assert words == []
    assert denoise(model, canvas, 2, **how)[0].tolist() == expected


@pytest.mark.parametrize("arguments, words", [
    (dict(edit_threshold=1.5), "edit_threshold must be between 0 and 1"),
    (dict(threshold=0.5, edit_threshold=0.9, edit_passes=math.inf), "edit_passes must be between"),
    (dict(edit_passes=-1), "edit_passes must be between 0"),
    (dict(factor=1.0, edit_threshold=0.5), "edit_threshold needs a threshold"),
    (dict(factor=1.0, minimum=2), "minimum is for sampling with a threshold"),
    (dict(block_length=0), "block_length must be between 1"),
    (dict(cache="prefix"), "cache 'prefix' is for bidirectional models"),
])
def test_sampling_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(random_model(**LLADA2), [[1, 2]], 8, **arguments)
    with pytest.raises(ValueError, match="edit_threshold is not for autoregressive models"):
        generate(random_model(causal=True), [[1]], 4, threshold=0.5, edit_threshold=0.5)


# ---- likelihood ----------------------------------------------------------------------------------


def test_losses_of_llada2_equal_the_second_opinion_s():
    model = Transformer.from_pretrained(RECORDS / "llada2")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(90, (2, 16), generator=generator)
    t = 0.1 + 0.9 * torch.rand(2, 2, generator=generator)
    mask = torch.rand(2, 16, generator=generator) < t.repeat_interleave(8, dim=1)
    loss, token_nll = naive_block_loss(Model(RECORDS / "llada2"), tokens, 8, t, mask)
    ours = block_loss(model, tokens, 8, t, mask)
    assert_close(ours.token_nll, token_nll.float(), 1e-5)
    assert_close(ours.loss.detach(), loss.float(), 1e-5)


@torch.no_grad()
def test_likelihood_of_llada2_is_exact_for_one_token_and_goes_block_by_block():
    """log p of a token after a prefix: what the model says of a mask in its place, seeing its block
    and those before. With blocks of one token the bound is the chain rule, hence exact."""
    model = random_model(4, **LLADA2)
    prefix, target = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], 8
    value, error = log_likelihood(model, [prefix], [[target]])
    tokens = torch.tensor([prefix + [MASK]])
    block_of = torch.arange(11) // 8
    logits = model(tokens, (block_of[:, None] >= block_of)[None])
    assert error == 0 and value.item() == pytest.approx(
        logits[0, -1].log_softmax(-1)[target].item(), abs=1e-5)
    model.config.block_length = 1
    row = torch.tensor([prefix])
    exact, _ = nelbo(model, row)
    by_chain = 0.0
    for i in range(len(prefix)):
        seen = torch.tensor([prefix[:i] + [MASK]])
        order = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()[None]
        by_chain -= model(seen, order)[0, -1].log_softmax(-1)[prefix[i]].item()
    assert exact == pytest.approx(by_chain / len(prefix), abs=1e-5)


# ---- training ------------------------------------------------------------------------------------


def test_muon_takes_each_expert_s_matrix_by_itself():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 5), (3, 5, 8)):
        stack = torch.nn.Parameter(torch.randn(shape, generator=generator))
        singles = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
        gradient = torch.randn(shape, generator=generator)
        stack.grad = gradient.clone()
        for single, part in zip(singles, gradient):
            single.grad = part.clone()
        Muon([stack], lr=0.1, weight_decay=0.1).step()
        Muon(singles, lr=0.1, weight_decay=0.1).step()
        assert torch.allclose(stack, torch.stack(list(singles)), atol=1e-6)


def test_optimizers_take_stacks_and_leave_biases():
    model = random_model(**LLADA2)
    muon, adamw = make_optimizers(model, "muon", 1e-3, 0.02)
    in_muon = set(muon.param_groups[0]["params"])
    layer = model.blocks[1].mlp
    assert {layer.gates.weight, layer.ups.weight, layer.downs.weight} <= in_muon
    everything = in_muon | set(adamw.param_groups[0]["params"])
    assert layer.router_bias not in everything
    assert len(everything) == sum(p.requires_grad for p in model.parameters())


def test_balance():
    """The loss is 1 for an even router, has a gradient that evens out an uneven one; so do the
    biases, and without one."""
    tokens = torch.randint(0, 58, (8, 64), generator=torch.Generator().manual_seed(0))
    model = random_model(n_layers=1).train()
    router = model.blocks[0].mlp.router.weight
    spreads = []
    for _ in range(40):
        model(tokens)
        loss = balance_loss(model)
        spreads.append(expert_loads(model).std().item())
        assert loss > 1 or spreads[-1] < 0.02
        router.data -= 0.3 * torch.autograd.grad(loss, router)[0]
    assert spreads[-1] < spreads[0] / 2
    model = random_model(**KINDS["sigmoid in groups"]).train()
    model(tokens)
    before = expert_loads(model)
    assert before.shape == (2, 6) and torch.allclose(before.sum(1), torch.ones(2))
    for _ in range(60):
        move_biases(model, 0.02)
        model(tokens)
    assert expert_loads(model).std(1).max() < before.std(1).min() / 2
    for layer in (block.mlp for block in model.blocks):
        layer.router.weight.data.zero_()
    model(tokens)
    assert balance_loss(model).item() == pytest.approx(1, abs=1e-5)


def test_biases_move_by_the_load_of_a_whole_update():
    """However an update is divided into passes, as it is however many processes share it."""
    tokens = torch.randint(0, 58, (4, 32), generator=torch.Generator().manual_seed(0))
    moved = []
    for slices in (1, 4):
        model, counts = random_model(**KINDS["sigmoid in groups"]).train(), 0
        for part in tokens.chunk(slices):
            model(part)
            counts = counts + expert_counts(model)
        moved.append(counts)
        move_biases(model, 0.02, counts)
        moved.append(torch.stack([block.mlp.router_bias for block in model.blocks]))
    assert torch.equal(moved[0], moved[2]) and torch.equal(moved[1], moved[3])


def test_gradients_with_checkpointed_blocks():
    """The backward pass computes each block again, and all of it is the same."""
    grads = []
    for checkpointed in (False, True):
        model = random_model(5, **LLADA2).train()
        model.checkpoint_blocks = checkpointed
        loss, _ = model.weighted_nll(torch.arange(16)[None], None, torch.arange(16))
        (loss + balance_loss(model)).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-6)


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for p in (layer.lora_A, layer.lora_B):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def twin_of(model):
    """A module with the family's published names, as its own code has it, for PEFT."""
    twin, parameters = torch.nn.Module(), model.state_dict()
    for theirs, ours, _ in tensor_table(model):
        name, _, kind = theirs.rpartition(".")
        if kind != "weight" or "norm" in name or "embed" in name:
            continue
        stack, _, last = ours[0].rpartition(".")
        weight = torch.cat([parameters[our] for our in ours]) if not last.isdecimal() \
            else parameters[stack][int(last)]
        parent = twin
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent._modules[part]
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight.data.copy_(weight)
        parent.add_module(leaf, linear)
    return twin


@pytest.mark.parametrize("family, targets", [
    ("llada2", "q,k,v,o,gate"), ("llada2", "q,v"), ("lladamoe", "q,o,down"),
    ("qwen3_moe", "gate,up"),
])
def test_peft_reads_adapters_of_experts_and_of_fused_matrices(family, targets, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny(family)
    ours = randomize(add_lora(copy.deepcopy(model), 3, 5, targets=targets))
    save_adapter(ours, tmp_path, "base")
    again = load_adapter(copy.deepcopy(model), tmp_path)
    tokens = torch.arange(10)[None]
    assert not torch.allclose(ours(tokens), model(tokens), atol=1e-2)
    assert_close(again(tokens).detach(), ours(tokens).detach(), 1e-5)
    merged = merge_lora(ours)
    assert not lora_layers(merged)
    assert_close(merged(tokens).detach(), again(tokens).detach(), 1e-5)
    theirs = peft.PeftModel.from_pretrained(twin_of(model), tmp_path).merge_and_unload()
    expected = dict(twin_of(merged).named_parameters())
    found = dict(theirs.named_parameters())
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name


def test_we_read_an_adapter_of_peft_s(tmp_path):
    """One A for the whole of a fused matrix; experts and the shared one by their last name."""
    peft = pytest.importorskip("peft")
    model = tiny("llada2")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query_key_value", "up_proj"])
    theirs = peft.get_peft_model(twin_of(model), config)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    theirs.save_pretrained(tmp_path)
    ours = merge_lora(load_adapter(model, tmp_path))
    expected = dict(theirs.merge_and_unload().named_parameters())
    for name, p in twin_of(ours).named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-5), name


def test_adapters_begin_at_the_base_and_learn_alone():
    model, tokens = random_model(**LLADA2), torch.arange(10)[None]
    before = model(tokens).detach()
    init_lora(add_lora(model, 2, 2), 0)
    assert torch.equal(model(tokens), before)
    model(tokens).square().sum().backward()
    assert all(("lora_" in name) == (p.grad is not None) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="lora_rank 11 does not fit blocks.1.mlp.gates, a matrix"):
        add_lora(random_model(**LLADA2), 11, 2, targets="gate")


def test_the_plan_counts_experts():
    config = Config(**SHAPE | LLADA2 | dict(max_len=256))
    whole = plan_memory(config, 64, 2, lora_rank=0, dtype=torch.float32)
    parameters = sum(p.numel() for p in Transformer(config).parameters())
    assert whole.parameters == parameters and whole.trained == parameters - 6    # the router's bias


# ---- text ----------------------------------------------------------------------------------------


def test_from_text_to_text(tmp_path):
    """Mask and end of text from the tokenizer, as in the published folders; blocks, threshold and
    editing from the family, one token a step at least; and what is said counts."""
    tiny("llada21").export_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for name in ("mask_token_id", "eos_token_id", "bos_token_id"):
        raw.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    Tokenizer.bytes().save_pretrained(tmp_path)
    sampler = Sampler.load(tmp_path)
    assert (sampler.config.mask_token_id, sampler.config.eos_token_id) == (257, 256)
    settings = dict(steps=0, block_length=0, temperature="auto", remasking="auto", cache="auto",
                    cfg_scale=0.0, schedule="", seed=1)
    arguments = sampler.arguments(21, settings)
    assert arguments["block_length"] == 32 and arguments["cache"] == "block"
    assert arguments["threshold"] is None and "edit_threshold" not in arguments
    prompt, steps = sampler.encode_prompt("Once"), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [row] = sampler.run([prompt], arguments, on_step=steps.append)
        again = generate(sampler.model, [prompt], 21, block_length=32, threshold=0.95, minimum=1,
                         edit_threshold=0.9)
    assert again == [row] and steps[-1].lengths.tolist() == [len(row)] == [25]
    said = sampler.arguments(21, settings | dict(threshold=0.5, edit_threshold=0.0, block_length=8))
    assert [said[name] for name in ("threshold", "edit_threshold", "block_length")] == [0.5, 0.0, 8]
