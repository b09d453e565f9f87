"""4-bit bases: products and gradients, the error of NF4, whole runs of finetune_llada.py, the
plan, what is refused."""
import json
import sys

import pytest
import torch
from runs import SignalAt, equal, learned, refused, succeed
from scripts import run, run_here

from data.tokenizer import Tokenizer
from model import Config, Transformer
from pretrained.load import load
from pretrained.tiny import tiny_config
from training import nf4
from training.lora import LoRALinear, add_lora, freeze_in_4_bits, load_adapter
from training.memory import LLADA, plan_memory

SCRIPT = "finetune_llada.py"


@pytest.fixture(scope="module", autouse=True)
def package():
    pytest.importorskip("bitsandbytes")


def random(*shape, seed=0, std=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient(dtype):
    weight, x = random(96, 64).to(dtype), random(5, 64, std=1.0).to(dtype).requires_grad_()
    packed = nf4.pack(weight)
    whole = nf4.unpack(packed)
    assert whole.dtype == dtype and whole.shape == weight.shape
    y = nf4.FrozenProduct.apply(x, packed)
    g = random(5, 96, seed=1, std=1.0).to(dtype)
    y.backward(g)
    assert torch.equal(y, x @ whole.T) and torch.equal(x.grad, g @ whole)


def test_levels_and_size():
    """Sixteen levels to a block of 64, their largest exactly +-absmax; 4.13 bits a number. Of a
    normal distribution the error is 0.09 of its size."""
    weight = random(256, 256)
    packed = nf4.pack(weight)
    whole = nf4.unpack(packed)
    assert packed.nbytes == nf4.packed_bytes(weight.numel())
    assert nf4.packed_bytes(2**24) * 8 / 2**24 == pytest.approx(4.127, abs=1e-3)
    blocks = whole.view(-1, 64)
    assert max(len(block.unique()) for block in blocks) <= 16
    largest = weight.view(-1, 64).abs().amax(1)
    assert torch.allclose(blocks.abs().amax(1), largest, rtol=0.02)     # absmax has 8 bits
    assert 0.08 < ((whole - weight).norm() / weight.norm()).item() < 0.1


def test_logits_of_a_tiny_llada():
    model = Transformer(Config(family="llada", vocab_size=300, dim=128, n_layers=2, n_heads=4,
                               qk_norm=False)).init_weights().eval()
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        before = model(tokens)
        after = nf4.round_to_nf4(model)(tokens)
    assert 0 < (after - before).norm() / before.norm() < 0.1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("base"), Tokenizer.bytes()
    text.add_chat_tokens()
    config = tiny_config("llada", text, 96, dim=64, n_layers=2, n_heads=2)
    Transformer(config).init_weights().export_pretrained(folder)        # matrices of size 0.02
    text.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(base, talk):
    def made(out_dir, *settings):
        return [f"--init_from={base}", f"--dataset={talk}", f"--out_dir={out_dir}", "--threads=1",
                "--dtype=float32", "--seq_len=64", "--batch_size=4", "--max_steps=20",
                "--eval_interval=0", "--final_eval_sequences=4", "--eval_sequences=2",
                "--sample_tokens=0", "--lora_rank=4", "--lora_alpha=8", "--learning_rate=0.005",
                "--lora_targets=q,v,down", *settings]
    return made


@pytest.fixture(scope="module")
def four_bits(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    succeed(run(SCRIPT, *arguments(out, "--base_bits=4")))
    return out


def losses(folder):
    return json.loads((folder / "train_state" / "record.json").read_text())["losses"]


def test_losses_are_those_of_the_whole_base(arguments, four_bits, tmp_path):
    succeed(run(SCRIPT, *arguments(tmp_path)))
    whole, packed = losses(tmp_path), losses(four_bits)
    assert len(whole) == 20 and whole != packed
    assert max(abs(a - b) for a, b in zip(whole, packed)) < 0.05


def test_a_killed_run_goes_on_exactly(arguments, four_bits, tmp_path):
    result = run(SCRIPT, *arguments(tmp_path, "--base_bits=4"), before=SignalAt(9))
    assert "stopped at step" in result.out, result
    succeed(run(SCRIPT, *arguments(tmp_path, "--base_bits=4", "--resume=True")))
    assert equal(learned(tmp_path), learned(four_bits))
    again = run(SCRIPT, *arguments(tmp_path, "--resume=True"))
    assert refused(again, "base_bits")


def test_merged_it_is_what_was_trained(base, four_bits, tmp_path):
    """base + adapter, and the merged folder: what NF4 leaves of the base, and B A."""
    settings = json.loads((four_bits / "adapter_config.json").read_text())
    assert settings["base_bits"] == 4
    succeed(run(SCRIPT, f"--out_dir={four_bits}", f"--merge={tmp_path / 'merged'}"))
    tokens = torch.arange(40)[None]
    adapted = load_adapter(load(base), four_bits).eval()
    q = adapted.blocks[0].attn.q
    original = load(base).blocks[0].attn.q.weight
    assert isinstance(q, LoRALinear) and torch.equal(q.weight, nf4.unpack(nf4.pack(original)))
    with torch.no_grad():
        for folder in (four_bits, tmp_path / "merged"):
            assert torch.allclose(load(folder)(tokens), adapted(tokens), atol=1e-4)


def test_peft_reads_the_adapter(base, four_bits):
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="base_bits"):
        settings = peft.PeftConfig.from_pretrained(four_bits)
    assert settings.r == 4


def test_the_plan():
    """LLaDA-8B, rank 64, T 1024, batch 1: under 9 GB."""
    config = Config(**dict(LLADA, n_layers=2))
    whole = plan_memory(config, 1024, 1, 64)
    packed = plan_memory(config, 1024, 1, 64, base_bits=4)
    matrices = 2 * (4 * 4096**2 + 3 * 4096 * 12288)
    assert whole.weights - packed.weights == 2 * matrices - nf4.packed_bytes(matrices)
    assert whole.peak - packed.peak == whole.weights - packed.weights - 2 * 4096 * 12288
    # Thirty more layers, each with its matrices, norms, adapter, and its input kept.
    rank = 64 * (4 * 8192 + 3 * 16384)
    layer = nf4.packed_bytes(matrices // 2) + 2 * 2 * 4096 + 16 * rank + 2 * 1024 * 4096
    assert packed.peak + 30 * layer < 9e9


@pytest.mark.parametrize("settings, words", [
    (["--base_bits=3"], "base_bits must be 16 (the base as dtype says) or 4 (NF4), got 3"),
    (["--base_bits=4", "--lora_rank=0"], "lora_rank=0 leaves nothing to learn"),
])
def test_mistakes(settings, words, arguments, tmp_path):
    assert refused(run_here(SCRIPT, *arguments(tmp_path / "out", *settings)), words)
    assert not (tmp_path / "out").exists()


def test_without_the_package(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = run_here(SCRIPT, *arguments(tmp_path / "out", "--base_bits=4"))
    assert refused(result, "4-bit weights need the package bitsandbytes: pip install bitsandbytes")


def test_a_merge_without_the_original_weights(four_bits, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
                 "tokenizer_config.json"):
        (copy / name).write_bytes((four_bits / name).read_bytes())
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    result = run_here(SCRIPT, f"--out_dir={copy}", f"--merge={tmp_path / 'merged'}")
    assert refused(result, "gone")


def test_mixtures_are_refused():
    model = Transformer(tiny_config("llada2", Tokenizer.bytes(), 64, dim=32, n_layers=2, n_heads=2))
    with pytest.raises(ValueError, match="base_bits=4 is for dense models"):
        freeze_in_4_bits(add_lora(model, 2, 2.0, targets="q"))


def test_a_card_without_bfloat16(monkeypatch):
    import common
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert common.best_dtype("cuda") == "float32"
    with pytest.raises(ValueError, match="Tesla T4 does not multiply in bfloat16: take --dtype"):
        common.matrix_dtype("cuda:0", "bfloat16")
