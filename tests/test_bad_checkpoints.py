"""A damaged or foreign checkpoint is one clear line: ValueError or an OSError in Python, exit
status 2 from `python model.py`."""

import json
import random
import re
import resource
import struct
import time
import warnings
from pathlib import Path

import pytest
import torch
from runs import refused
from safetensors.torch import load_file, save_file
from scripts import run

from model import Config, Transformer
from pretrained.config import read_config
from pretrained.families import FAMILIES
from pretrained.hub import similar_folder, weight_files
from pretrained.load import describe, fill, match_tensors
from pretrained.tensors import read_headers

ROOT = Path(__file__).resolve().parent.parent


def write_checkpoint(folder, family="qwen3"):
    """A tiny checkpoint in its family's published layout."""
    shape = dict(
        vocab_size=40,
        dim=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        head_dim=8,
        hidden_dim=24,
        max_len=32,
    )
    plain = dict(qk_norm=False)
    encoder = dict(plain, norm="layer", embed_norm=True, head_transform=True, tie_embeddings=True)
    learned = dict(
        positions="learned",
        norm="layer",
        norm_bias=True,
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation="gelu",
    )
    options = {
        "qwen3": dict(causal=True),
        "llama": dict(plain, causal=True),
        "llada": plain,
        "gpt2": dict(learned, causal=True, activation="gelu_tanh", tie_embeddings=True),
        "bert": dict(
            learned,
            post_norm=True,
            embed_norm=True,
            head_transform=True,
            head_bias=True,
            token_types=2,
            tie_embeddings=True,
        ),
        "modernbert": dict(
            encoder,
            first_norm=False,
            local_window=8,
            global_every=2,
            activation="gelu",
            head_transform_bias=False,
            head_bias=True,
        ),
        "unmask": {},
    }
    Transformer(Config(family=family, **shape, **options[family])).init_weights().export_pretrained(
        folder
    )
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in raw.items() if value is not ...})
    )


def change_weights(folder, function):
    weights = load_file(folder / "model.safetensors")
    function(weights)
    save_file(weights, folder / "model.safetensors")


def refuses(folder, words, error=ValueError):
    """Loading and describing both say `words`, in one line."""
    for read in (Transformer.from_pretrained, describe):
        with pytest.raises(error, match=words) as raised:
            read(folder)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(model_type="mamba"),
            "unknown model_type 'mamba'; known are unmask, qwen3, llama, qwen2, Dream, llada, "
            "gpt2, bert, roberta, modernbert",
        ),
        (dict(model_type=...), "unknown model_type None"),
        (dict(model_type=["llama"]), "unknown model_type"),
        (dict(hidden_size=...), "hidden_size is missing"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(hidden_size="16"), r"dim must be a whole number from 1 to 10\*\*9, got '16'"),
        (
            dict(hidden_size=10**9, num_attention_heads=10**9, num_key_value_heads=10**9),
            "config.json asks for too large a model",
        ),
        (dict(hidden_size=16.0), "dim must be a whole number"),
        (
            dict(vocab_size=10**12),
            r"vocab_size must be a whole number from 1 to 10\*\*9, got 1000000000000",
        ),
        (
            dict(vocab_size=10**8),
            r"weight has shape \[40, 16\], config.json asks for \[100000000, 16\]",
        ),
        (dict(num_hidden_layers=10**10), "n_layers must be a whole number from 1 to"),
        (dict(num_hidden_layers=10**9), "config.json says 1000000000 layers, the weights hold 2"),
        (dict(num_hidden_layers=10**4), "config.json says 10000 layers, the weights hold 2"),
        (dict(num_hidden_layers=1), "config.json says 1 layers, the weights hold 2"),
        (dict(num_attention_heads=3), "3 heads cannot share 2 key/value heads"),
        (dict(num_attention_heads=0), "n_heads must be"),
        (dict(num_attention_heads=True), "n_heads must be"),
        (dict(head_dim=7), "must be even, got 7"),
        (
            dict(intermediate_size=25),
            r"mlp.\w+_proj.weight has shape \[\d+, \d+\], config.json asks for",
        ),
        (dict(rms_norm_eps=-1), "norm_eps must be a positive number"),
        (dict(rope_theta=10**400), "rope_theta must be a positive number"),
        (dict(rope_theta=10**20), "rope_theta must be a positive number"),  # torch: int too big
        (dict(rope_theta=float("nan")), "rope_theta must be a positive number"),
        (dict(hidden_act="laplace"), "activation must be one of"),
        (dict(hidden_act={}), "activation must be one of"),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            "rope_scaling 'yarn' is not supported",
        ),
        (dict(rope_scaling={"rope_type": "linear"}), "rope_scaling needs a positive factor"),
        (dict(rope_scaling="linear"), "rope_scaling .* is not supported"),
        (dict(rope_scaling={"rope_type": ["linear"]}), "rope_scaling .* is not supported"),
        (dict(use_sliding_window=True), "use_sliding_window = True is not supported"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "pattern of local layers"),
        (dict(quantization_config={"bits": 4}), "quantization_config = .* is not supported"),
        (dict(mask_token_id=40), "mask_token_id 40 is outside the vocabulary of 40"),
        (dict(eos_token_id="</s>"), "eos_token_id must be a token id"),
        (dict(eos_token_id=[]), "eos_token_id must be a token id"),
        (dict(tie_word_embeddings="no"), "tie_embeddings must be true or false"),
        (
            dict(tie_word_embeddings=True),
            "lm_head.weight differs from embed.weight, which it should equal",
        ),
    ],
)
def test_config(folder, changes, words):
    change_config(folder, **changes)
    if "differs" in words:  # only reading the weights shows this
        change_weights(folder, lambda weights: weights["lm_head.weight"].fill_(1))
        with pytest.raises(ValueError, match=words):
            Transformer.from_pretrained(folder)
    else:
        refuses(folder, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"1" * 5000, "is not valid JSON"),
    ],
)
def test_config_that_is_not_an_object(folder, text, words):
    (folder / "config.json").write_bytes(text)
    refuses(folder, words)


def test_our_own_config(tmp_path):
    Transformer(Config(vocab_size=40, dim=16, n_layers=1, n_heads=2)).save_pretrained(tmp_path)
    good = (tmp_path / "config.json").read_text()
    for changes, words in (
        (dict(dimension=16), "unknown field 'dimension'"),
        (dict(family="mamba"), "unknown family 'mamba'"),
        (dict(rope_scaling={"factor": 2}), "rope_scaling None is not supported"),
        (dict(vocab_size=10**12), "vocab_size must be"),
        (dict(n_layers=2), "config.json says 2 layers, the weights hold 1"),
        (dict(causal=1), "causal must be true or false"),
    ):
        (tmp_path / "config.json").write_text(good)
        change_config(tmp_path, **changes)
        refuses(tmp_path, words)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            "the weights lack the tensor model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if "mlp.up" in name or "q_norm" in name],
            "the weights lack the tensor .* and 3 more",
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.up_proj.bias": torch.ones(24)}),
            "holds the tensor model.layers.1.mlp.up_proj.bias, which has no place",
        ),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}),
            "config.json says 2 layers, the weights hold 3",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(17)}),
            r"model.norm.weight has shape \[17\], config.json asks for \[16\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(16, 1)}),
            r"model.norm.weight has shape \[16, 1\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
            "model.norm.weight is stored as I8; quantised weights",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
            "model.norm.weight is stored as F8_E4M3; quantised weights",
        ),
        (
            lambda w: w.update(
                {"model.layers.0.mlp.up_proj.SCB": torch.ones(16, dtype=torch.int32)}
            ),
            "SCB is stored as I32; quantised weights",
        ),
        (
            lambda w: w.update({"model.embeddings.position_ids": torch.arange(16)}),
            "holds model.embeddings.position_ids, a buffer of type I64 and no weights, which has "
            "no place",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.mask": torch.ones(16, dtype=torch.bool)}),
            "holds model.layers.0.self_attn.mask, a buffer of type BOOL and no weights",
        ),
        (lambda w: w.clear(), "config.json says 2 layers, the weights hold 0"),
    ],
)
def test_weights_that_do_not_fit(folder, function, words):
    change_weights(folder, function)
    refuses(folder, words)


def test_a_second_bias_must_equal_the_first(tmp_path):
    """Files of BERT hold the head's bias under two names; those of an untied head written by
    transformers 5 may differ."""
    folder = write_checkpoint(tmp_path, "bert")
    change_weights(
        folder,
        lambda weights: weights.update(
            {"cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone()}
        ),
    )
    Transformer.from_pretrained(folder)
    change_weights(folder, lambda weights: weights["cls.predictions.decoder.bias"].add_(1))
    with pytest.raises(
        ValueError,
        match="cls.predictions.decoder.bias differs from head.bias, which it should equal",
    ):
        Transformer.from_pretrained(folder)


def test_nan_is_warned_about(folder):
    change_weights(
        folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan"))
    )
    with pytest.warns(UserWarning, match="model.layers.1.mlp.up_proj.weight contains NaN") as seen:
        Transformer.from_pretrained(folder)
    assert len(seen) == 1


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(folder, "model.safetensors is truncated or no safetensors file")


@pytest.mark.parametrize(
    ("index", "words", "error"),
    [
        (
            {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
            "names the shard model-00001-of-00002.safetensors, which is missing",
            FileNotFoundError,
        ),
        (
            {"weight_map": {"a": "../model.safetensors"}},
            "only .safetensors files of the same folder are read",
            ValueError,
        ),
        (
            {"weight_map": {"a": "/etc/passwd"}},
            "only .safetensors files of the same folder are read",
            ValueError,
        ),
        (
            {"weight_map": {"a": "sub/x.safetensors"}},
            "only .safetensors files of the same folder are read",
            ValueError,
        ),
        ({"weight_map": {"a": ".."}}, "only .safetensors files", ValueError),
        ({"weight_map": {"a": "x\0.safetensors"}}, "missing", FileNotFoundError),
        ({"weight_map": {"a": 3}}, "names the shard 3", ValueError),
        ({"weight_map": {"a": ["x"]}}, "names the shard", ValueError),
        ({"weight_map": {}}, "no weight_map", ValueError),
        ({"weight_map": []}, "no weight_map", ValueError),
        ({}, "no weight_map", ValueError),
        ([], "must hold a JSON object", ValueError),
    ],
)
def test_index(folder, index, words, error):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, words, error)


def test_files_that_are_not_there(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refuses(folder, "holds no model.safetensors", FileNotFoundError)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refuses(
        folder,
        "holds pickled weights only, which are never opened here: convert them with transformers, "
        "AutoModel",
        FileNotFoundError,
    )
    (folder / "config.json").unlink()
    refuses(folder, "holds no config.json: is it a checkpoint folder", FileNotFoundError)
    refuses(folder / "pytorch_model.bin", "is a file: pass the folder", FileNotFoundError)
    refuses(tmp_path / "nothing", "there is no folder", FileNotFoundError)
    refuses("a/b/c", "there is no folder a/b/c", FileNotFoundError)


def test_a_checkpoint_of_the_same_name_elsewhere_is_suggested(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "tales").mkdir(parents=True)
    (tmp_path / "checkpoints" / "tales" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("tales", "checkpoint/tales"):
        assert similar_folder(Path(name)) == "did you mean checkpoints/tales? Else "
    assert similar_folder(Path("nothing")) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: change_config(folder, model_type="mamba"),
            "unknown model_type 'mamba'; known are",
        ),
        (
            lambda folder: change_config(folder, vocab_size=10**12),
            "vocab_size must be a whole number",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
            "truncated or no safetensors file",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    ],
)
def test_command_line(folder, change, words):
    change(folder)
    assert refused(run("model.py", str(folder)), words)


# --------------------------------------------------------------------------------------------------
# mutations

VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    16,
    10**4,
    10**6,
    10**9,
    10**12,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "16",
    "silu",
    "x" * 10_000,
    [],
    [1],
    [[]],
    ["full_attention"] * 3,
    {},
    {"rope_type": "linear"},
    {"rope_type": "llama3", "factor": 1e300},
    {"full_attention": 3},
    {"full_attention": {}, "sliding_attention": {"rope_theta": "x"}},
)


def read(folder):
    """What from_pretrained does; whatever a file holds, only these errors may come out."""
    try:
        config, _ = read_config(folder)
        model, plan = match_tensors(config, read_headers(weight_files(folder)))
        fill(model, plan)
        return model
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)[:300]
        return None


def mutate_config(text, draw):
    """One of: a value replaced, a key dropped, a key of another family added, the text itself
    damaged."""
    raw, kind = json.loads(text), draw.random()
    keys = sorted(raw)
    if kind < 0.6:
        raw[draw.choice(keys)] = draw.choice(VALUES)
    elif kind < 0.7:
        del raw[draw.choice(keys)]
    elif kind < 0.85:
        family = FAMILIES[draw.choice(sorted(FAMILIES))]
        names = [
            key
            for names in family.keys.values()
            for key in ((names,) if isinstance(names, str) else names)
        ]
        key = draw.choice(
            [*names, *family.only, "layer_types", "rope_parameters", "rope_scaling", "model_type"]
        )
        raw[key] = draw.choice([*VALUES, *FAMILIES])
    else:
        data = bytearray(text.encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
    return json.dumps(raw).encode()


def mutate_header(data, draw):
    """A field of a safetensors header replaced, its length changed, or its bytes damaged; the
    weights themselves are left."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body, kind = json.loads(data[8 : 8 + length]), data[8 + length :], draw.random()
    if kind < 0.6:
        name = draw.choice(sorted(header))
        entry = header[name]
        key = draw.choice(sorted(entry))
        if draw.random() < 0.5 and isinstance(entry[key], list):
            sizes = (0, 1, 2, 8, 16, 64, 10**9, 2**63, 2**64 - 1, 2**64, -1, 1.5)
            entry[key] = [draw.choice((*sizes, number)) for number in entry[key]]
        else:
            entry[key] = draw.choice(
                [
                    *VALUES[:8],
                    "F32",
                    "I32",
                    "BF16",
                    "U8",
                    "F64",
                    "C64",
                    "F4",
                    "E8M0",
                    "F8_E5M2",
                    "BOOL",
                    [],
                    [40, 16],
                    [16, 40],
                ]
            )
        if draw.random() < 0.2:
            header[
                draw.choice(
                    (name + "x", "model.layers.9.mlp.up_proj.weight", "", "0." * 50, "\ud800")
                )
            ] = header.pop(name)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body
    if kind < 0.75:
        return (
            struct.pack(
                "<Q",
                draw.choice((0, 1, length - 1, length + 1, length * 2, 10**8, 2**63, 2**64 - 1)),
            )
            + data[8:]
        )
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        damaged[draw.randrange(8 + length)] = draw.randrange(256)
    return bytes(damaged)


def test_five_hundred_mutations(tmp_path):
    draw, started, before = (
        random.Random(0),
        time.time(),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    loaded = 0
    for family in ("qwen3", "llama", "llada", "gpt2", "bert", "modernbert"):
        folder = write_checkpoint(tmp_path / family, family)
        assert read(folder) is not None
        config, weights = (
            (folder / "config.json").read_text(),
            (folder / "model.safetensors").read_bytes(),
        )
        for number in range(84):
            (folder / "config.json").write_bytes(
                mutate_config(config, draw) if number % 2 else config.encode()
            )
            (folder / "model.safetensors").write_bytes(
                weights if number % 2 else mutate_header(weights, draw)
            )
            one = time.time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NaN, where a number type was exchanged
                model = read(folder)
            if model is not None:  # harmless, so it must run
                loaded += 1
                with torch.no_grad():
                    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (
                        1,
                        4,
                        model.config.vocab_size,
                    )
            assert time.time() - one < 5, (family, number)
    assert loaded > 25
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500e6
    assert time.time() - started < 120


def test_the_messages_name_the_file(folder):
    change_config(folder, hidden_size="x")
    with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))):
        read_config(folder)
