"""export_pretrained(folder, gguf=...): what is written is read back equal, by our own reader, by
the package gguf and by transformers; what a GGUF cannot say is refused."""
import re

import gguf as library
import numpy as np
import pytest
import torch
from gguf_files import TEXTS, interleaved, tiny_model

from data.tokenizer import Tokenizer
from model import Config, Transformer
from pretrained import gguf
from pretrained.config import read_config
from pretrained.gguf_writer import ARCHITECTURES
from sampling.sampler import Sampler

KINDS = ["f16", "bf16", "q8_0", "f32"]
DENSE = ["llama", "qwen2", "qwen3", "llada", "Dream"]
MIXTURE = dict(family="lladamoe", vocab_size=320, dim=64, n_layers=2, n_heads=4, n_kv_heads=4,
               hidden_dim=0, max_len=128, norm_eps=1e-5, n_experts=4, experts_per_token=2,
               expert_dim=32, qk_norm=True, mask_token_id=313, eos_token_id=312)


def mixture():
    model = Transformer(Config(**MIXTURE)).init_weights().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def model_of(family):
    return mixture() if family == "lladamoe" else tiny_model(family)


def logits_of(model):
    tokens = torch.arange(40).view(2, 20) * 7 % 300
    with torch.no_grad():
        return model(tokens)


def undone(values, kind):
    """The numbers that a matrix has when it was written as `kind` and read again."""
    number = library.GGMLQuantizationType[kind.upper()]
    values = values.detach().numpy()
    return torch.from_numpy(library.quants.dequantize(library.quants.quantize(values, number),
                                                      number))


@pytest.mark.filterwarnings("ignore:the GGUF gets no tokenizer")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*DENSE, "lladamoe"])
def test_it_is_read_back_equal(tmp_path, family, kind):
    model = model_of(family)
    file = model.export_pretrained(tmp_path, gguf=kind)
    assert file == tmp_path / f"model-{kind}.gguf" and list(tmp_path.iterdir()) == [file]
    again = Transformer.from_pretrained(file, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        wanted = parameter
        if parameter.dim() > 1 and not name.endswith("router.weight"):
            wanted = undone(parameter, kind)
        assert torch.equal(again.get_parameter(name), wanted), name
    again.config.published = None
    assert again.config == model.config
    error = (logits_of(again) - logits_of(model)).norm() / logits_of(model).norm()
    assert error < {"f16": 0.01, "bf16": 0.05, "q8_0": 0.1, "f32": 1e-6}[kind]


@pytest.mark.filterwarnings("ignore:the GGUF gets no tokenizer")
@pytest.mark.parametrize("family", ["llada", "lladamoe"])
def test_the_package_reads_the_same(tmp_path, family):
    """ggml's own reader: names, types, numbers, and the order of the rows of q and k, neighbours
    for llada and halves for the mixture."""
    model = model_of(family)
    reader = library.GGUFReader(model.export_pretrained(tmp_path, gguf=True))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = ARCHITECTURES[family]
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == architecture and fields["general.file_type"] == 1
    assert fields[f"{architecture}.attention.causal"] is False
    assert fields["diffusion.shift_logits"] is False
    assert fields["tokenizer.ggml.mask_token_id"] == 313
    known = library.MODEL_TENSORS[library.MODEL_ARCH[architecture.upper().replace("-", "_")]]
    names = {library.TENSOR_NAMES[tensor] for tensor in known}
    for name in tensors:
        assert re.sub(r"^blk\.\d+", "blk.{bid}", name).removesuffix(".weight") in names
    q = model.blocks[1].attn.q.weight.detach().numpy()
    if family == "llada":
        q = interleaved(q, 4)
    found = tensors["blk.1.attn_q.weight"]
    assert np.array_equal(found.data, q.astype(np.float16)) and found.tensor_type.name == "F16"
    if family == "lladamoe":
        stack = tensors["blk.0.ffn_down_exps.weight"]
        assert np.array_equal(stack.data, model.blocks[0].mlp.downs.weight.detach().half().numpy())
        assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_same(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(family, tie_embeddings=family == "llama")
    write_tokenizer(tmp_path, 320)
    model.export_pretrained(tmp_path, gguf="f16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model-f16.gguf", dtype=torch.float32)
    ours = Transformer.from_pretrained(tmp_path / "model-f16.gguf", dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20) * 7 % 300
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-3)


def write_tokenizer(folder, vocab_size):
    tokenizer = Tokenizer.train(TEXTS, vocab_size - 8)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_tokenizer_goes_along(tmp_path):
    """From the folder that is written to, from where the model was loaded, and from GGUF to
    GGUF."""
    tokenizer = write_tokenizer(tmp_path / "published", 320)
    model = tiny_model("llada", mask_token_id=tokenizer.mask_token_id,
                       eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model.export_pretrained(tmp_path / "published")
    first = model.export_pretrained(tmp_path / "published", gguf="bf16")
    loaded = Transformer.from_pretrained(tmp_path / "published")
    second = loaded.export_pretrained(tmp_path / "new", gguf="bf16")
    third = Transformer.from_pretrained(second).export_pretrained(tmp_path / "again", gguf="bf16")
    assert first.read_bytes() == second.read_bytes()
    for file in (second, third):
        copy = Tokenizer.from_pretrained(file)
        for text in [*TEXTS, "Un été à 1999\n\n  don't"]:
            assert copy.encode(text) == tokenizer.encode(text)
            assert copy.decode(copy.encode(text)) == text
        assert copy.mask_token_id == tokenizer.mask_token_id
        assert copy.eos_token_id == tokenizer.eos_token_id
        assert copy.chat_templates == tokenizer.chat_templates


def test_a_file_below_out_can_be_asked(tmp_path, monkeypatch):
    """Sampler.load says of a folder out/... that is not there yet how to make one."""
    tokenizer = write_tokenizer(tmp_path / "out", 320)
    model = tiny_model("llada", mask_token_id=tokenizer.mask_token_id,
                       eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model.export_pretrained(tmp_path / "out", gguf="f32")
    monkeypatch.chdir(tmp_path)
    assert Sampler.load("out/model-f32.gguf").config.family == "llada"
    with pytest.raises(FileNotFoundError, match="run python train_scratch.py first"):
        Sampler.load("out/model-q8_0.gguf")


@pytest.mark.filterwarnings("ignore:the GGUF gets no tokenizer")
@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}])
def test_a_stretched_rope(tmp_path, scaling):
    model = tiny_model("llama", rope_scaling=scaling)
    file = model.export_pretrained(tmp_path, gguf="f16")
    assert read_config(file)[0].rope_scaling == scaling
    has_table = gguf.ROPE_FACTORS in gguf.read_header(file).tensors
    assert has_table == (scaling["rope_type"] == "llama3")


@pytest.mark.filterwarnings("ignore:the GGUF gets no tokenizer")
def test_our_own_models_and_converted_ones(tmp_path):
    """They see in both directions, which the file says."""
    for family, changes in {"unmask": {}, "qwen2": dict(qk_norm=False, qkv_bias=True, shift=True)
                            }.items():
        config = Config(family=family, vocab_size=300, dim=32, n_layers=1, n_heads=2, causal=False,
                        mask_token_id=299, **changes)
        model = Transformer(config).init_weights()
        again = read_config(model.export_pretrained(tmp_path / family, gguf="f16"))[0]
        assert (again.causal, again.shift, again.mask_token_id) == (False, config.shift, 299)


def test_without_a_tokenizer_it_warns(tmp_path):
    with pytest.warns(UserWarning, match="gets no tokenizer, and llama.cpp will not run it"):
        tiny_model("llada").export_pretrained(tmp_path, gguf=True)


REFUSED = [
    (dict(family="gpt2", positions="learned"), True, "no GGUF can hold a gpt2 model"),
    (dict(family="unmask", positions="learned"), True, "no name in it for embed_positions.weight"),
    (dict(family="unmask", block_length=4), True, "can say that block_length is 4"),
    (dict(family="llada", qk_norm=False, activation="relu"), True, "activation is 'relu'"),
    (dict(family="llada", qk_norm=False), "q4_0", "gguf must be True, False or one of f16, bf16"),
    (MIXTURE | dict(shared_dim=32), True, "no name in it for blocks.0.mlp.shared"),
    (MIXTURE | dict(router_norm=True), True, "can say that router_norm is True"),
]


@pytest.mark.parametrize("settings, kind, words", REFUSED)
def test_what_it_cannot_say_is_refused(tmp_path, settings, kind, words):
    model = Transformer(Config(**dict(vocab_size=320, dim=32, n_layers=1, n_heads=2) | settings))
    with pytest.raises(ValueError, match=re.escape(words)):
        model.export_pretrained(tmp_path / "out", gguf=kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:the GGUF gets no tokenizer")
def test_a_number_beyond_float16(tmp_path):
    model = tiny_model("llada")
    model.blocks[0].mlp.up.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="holds a number that float16 cannot: take gguf='bf16'"):
        model.export_pretrained(tmp_path, gguf="f16")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob("*.tmp"))
    model.export_pretrained(tmp_path, gguf="bf16")
