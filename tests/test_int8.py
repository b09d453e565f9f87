"""8-bit weights: the product, its error, and a checkpoint sampled with them."""
import json

import pytest
import torch
from tiny import publish, tiny_checkpoint, tiny_sampler

from model import Transformer
from sampling.engine import generate
from sampling.int8 import Int8Linear, load_int8, quantize
from sampling.sampler import Sampler


def test_a_product_is_that_of_the_rounded_matrix():
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(64, 96)
    with torch.no_grad():
        base.weight.copy_(torch.randn(96, 64, generator=generator))
    linear = Int8Linear(base)
    linear.q, linear.scale = quantize(base.weight)
    rounded = linear.q.float() * linear.scale.float()[:, None]
    # Half a step of 255, and what a scale that was rounded down cuts off.
    step = base.weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - base.weight).abs() <= 1.1 * step).all()
    assert (rounded - base.weight).norm() / base.weight.norm() < 0.01
    x = torch.randn(2, 5, 64, generator=generator)
    wanted = x.bfloat16().float() @ rounded.T + base.bias
    assert torch.allclose(linear(x), wanted, rtol=0.02, atol=0.02)
    assert linear(x).dtype == torch.float32


@pytest.mark.parametrize("family", ["llada", "Dream", "bert", "qwen2"])
def test_a_checkpoint(family, tmp_path):
    folder = publish(family, tmp_path)
    whole, packed = Transformer.from_pretrained(folder), load_int8(folder)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted, found = whole(tokens), packed(tokens)
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05
    for name, module in packed.named_modules():
        if isinstance(module, torch.nn.Linear) and not packed.config.tie_embeddings:
            assert module.q.dtype == torch.int8 and module.weight.is_meta, name


def test_it_samples(tmp_path):
    """As a user loads it; most tokens are those of the whole weights."""
    tiny_checkpoint(tmp_path)
    packed, whole = Sampler.load(tmp_path, weights="int8"), tiny_sampler()
    found = generate(packed.model, [[1, 2, 3]], 16, 16, 8, cache="dual")[0]
    wanted = generate(whole.model, [[1, 2, 3]], 16, 16, 8, cache="dual")[0]
    assert sum(a == b for a, b in zip(found, wanted)) >= 15


def test_what_is_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="weights=int8 is for CPUs, got device cuda"):
        load_int8(folder, "cuda")
    (tmp_path / "adapter").mkdir()
    settings = json.dumps({"base_model_name_or_path": str(folder)})
    (tmp_path / "adapter" / "adapter_config.json").write_text(settings)
    with pytest.raises(ValueError, match="merge it into its base first"):
        load_int8(tmp_path / "adapter")
