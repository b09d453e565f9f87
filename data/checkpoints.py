"""Checkpoints on disk: config.json and .safetensors, in our layout and in those of the published families.

How LLaDA, Dream, BERT, RoBERTa, ModernBERT, GPT-2, Llama, Qwen2 and Qwen3 name what `model.Config` and `model.Transformer` hold is
a table each in `FAMILIES`, read in both directions. Nothing is unpickled and no remote code runs.
"""
import dataclasses
import difflib
import json
import math
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import rank_and_size, stream
from model import Config, Transformer

# ------------------------------------------------------------------------------------------------------------------------------
# The published families. To add one, write down its names; model.py changes only if it computes something new.


@dataclass
class Family:
    """How one published family writes down what `Config` and `Transformer` hold."""
    architecture: str       # the class that its own code loads it with
    keys: dict              # Config field -> key of its config.json (or several: the first that is there counts, all are written)
    fixed: dict             # Config fields that the family does not vary
    tensors: dict           # our module (or a tuple of them: one fused tensor) -> its module; " ^T": stored transposed
    defaults: dict = dataclasses.field(default_factory=dict)        # key -> what its code takes when the key is missing
    only: dict = dataclasses.field(default_factory=dict)            # key -> the values that this transformer can compute
    unused: str = r"$^"     # a pattern of tensors that its files may hold and its logits do not need
    prefix: str = ""        # what older files leave out in front of every name
    copies: dict = dataclasses.field(default_factory=dict)          # tensor that some files hold too -> ours that it must equal
    offset: bool = False    # its learned positions start behind the padding index (RoBERTa)


_IDS = {f"{name}_token_id": f"{name}_token_id" for name in ("mask", "eos", "pad", "bos")}
_LLAMA_KEYS = dict(
    vocab_size="vocab_size", dim="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads", head_dim="head_dim", hidden_dim="intermediate_size", max_len="max_position_embeddings",
    norm_eps="rms_norm_eps", rope_theta="rope_theta", rope_scaling="rope_scaling", activation="hidden_act",
    tie_embeddings="tie_word_embeddings", **_IDS)
_LLAMA_DEFAULTS = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
                       hidden_act="silu", max_position_embeddings=2048, tie_word_embeddings=False, attention_bias=False,
                       mlp_bias=False)
_LLAMA_TENSORS = {
    "embed": "model.embed_tokens",
    "blocks.*.attn_norm": "model.layers.*.input_layernorm",
    "blocks.*.attn.q": "model.layers.*.self_attn.q_proj",
    "blocks.*.attn.k": "model.layers.*.self_attn.k_proj",
    "blocks.*.attn.v": "model.layers.*.self_attn.v_proj",
    "blocks.*.attn.o": "model.layers.*.self_attn.o_proj",
    "blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
    "blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
_LLAMA_UNUSED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
_NO_WINDOW = dict(use_sliding_window=(False,))
_PLAIN = dict(qk_norm=False)                                        # RMSNorm, SwiGLU and RoPE are Config's defaults already

_QWEN3 = Family(
    "Qwen3ForCausalLM", dict(_LLAMA_KEYS, qkv_bias="attention_bias", out_bias="attention_bias"), dict(causal=True),
    {**_LLAMA_TENSORS,
     "blocks.*.attn.q_norm": "model.layers.*.self_attn.q_norm",
     "blocks.*.attn.k_norm": "model.layers.*.self_attn.k_norm"},
    dict(_LLAMA_DEFAULTS, head_dim=128), _NO_WINDOW, _LLAMA_UNUSED)

_BERT_KEYS = dict(
    vocab_size="vocab_size", dim="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
    hidden_dim="intermediate_size", max_len="max_position_embeddings", norm_eps="layer_norm_eps", activation="hidden_act",
    token_types="type_vocab_size", tie_embeddings="tie_word_embeddings", **_IDS)
_BERT_FIXED = dict(
    positions="learned", norm="layer", norm_bias=True, post_norm=True, embed_norm=True, qk_norm=False, qkv_bias=True,
    out_bias=True, mlp_bias=True, gated=False, head_transform=True, head_bias=True)
_BERT_DEFAULTS = dict(layer_norm_eps=1e-12, hidden_act="gelu", type_vocab_size=2, tie_word_embeddings=True)
_BERT_ONLY = dict(position_embedding_type=("absolute",), is_decoder=(False,), add_cross_attention=(False,))


def _bert_tensors(base):
    layer = base + ".encoder.layer.*."
    return {
        "embed": base + ".embeddings.word_embeddings",
        "embed_positions": base + ".embeddings.position_embeddings",
        "embed_types": base + ".embeddings.token_type_embeddings",
        "embed_norm": base + ".embeddings.LayerNorm",
        "blocks.*.attn.q": layer + "attention.self.query",
        "blocks.*.attn.k": layer + "attention.self.key",
        "blocks.*.attn.v": layer + "attention.self.value",
        "blocks.*.attn.o": layer + "attention.output.dense",
        "blocks.*.attn_norm": layer + "attention.output.LayerNorm",
        "blocks.*.mlp.up": layer + "intermediate.dense",
        "blocks.*.mlp.down": layer + "output.dense",
        "blocks.*.mlp_norm": layer + "output.LayerNorm",
    }


FAMILIES = {
    "unmask": _QWEN3,
    "qwen3": _QWEN3,
    "llama": Family(
        "LlamaForCausalLM", dict(_LLAMA_KEYS, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
        dict(_PLAIN, causal=True), _LLAMA_TENSORS, _LLAMA_DEFAULTS, {}, _LLAMA_UNUSED),
    "qwen2": Family(
        "Qwen2ForCausalLM", _LLAMA_KEYS, dict(_PLAIN, causal=True, qkv_bias=True), _LLAMA_TENSORS,
        dict(_LLAMA_DEFAULTS, max_position_embeddings=32768), _NO_WINDOW, _LLAMA_UNUSED),
    "Dream": Family(
        "DreamModel", _LLAMA_KEYS, dict(_PLAIN, qkv_bias=True, shift=True), _LLAMA_TENSORS, _LLAMA_DEFAULTS, _NO_WINDOW,
        _LLAMA_UNUSED),
    "llada": Family(
        "LLaDAModelLM",
        dict(vocab_size=("embedding_size", "vocab_size"), dim="d_model", n_layers="n_layers", n_heads="n_heads",
             n_kv_heads="n_kv_heads", hidden_dim="mlp_hidden_size", max_len="max_sequence_length", norm_eps="rms_norm_eps",
             rope_theta="rope_theta", activation="activation_type", tie_embeddings="weight_tying", qkv_bias="include_qkv_bias",
             **_IDS),
        _PLAIN,
        {"embed": "model.transformer.wte",
         "blocks.*.attn_norm": "model.transformer.blocks.*.attn_norm",
         "blocks.*.attn.q": "model.transformer.blocks.*.q_proj",
         "blocks.*.attn.k": "model.transformer.blocks.*.k_proj",
         "blocks.*.attn.v": "model.transformer.blocks.*.v_proj",
         "blocks.*.attn.o": "model.transformer.blocks.*.attn_out",
         "blocks.*.mlp_norm": "model.transformer.blocks.*.ff_norm",
         "blocks.*.mlp.gate": "model.transformer.blocks.*.ff_proj",
         "blocks.*.mlp.up": "model.transformer.blocks.*.up_proj",
         "blocks.*.mlp.down": "model.transformer.blocks.*.ff_out",
         "norm": "model.transformer.ln_f",
         "head": "model.transformer.ff_out"},
        dict(embedding_size=None, n_kv_heads=None, rms_norm_eps=1e-5, rope_theta=10000.0, activation_type="silu",
             weight_tying=False, include_qkv_bias=False),
        dict(include_bias=(False,), block_type=("llama",), layer_norm_type=("rms",), rope=(True,), alibi=(False,),
             attention_layer_norm=(False,), input_emb_norm=(False,), scale_logits=(False,), multi_query_attention=(None, False),
             bias_for_layer_norm=(None, False), layer_norm_with_affine=(True,), block_group_size=(1,))),
    "gpt2": Family(
        "GPT2LMHeadModel",
        dict(vocab_size="vocab_size", dim="n_embd", n_layers="n_layer", n_heads="n_head", hidden_dim="n_inner",
             max_len="n_positions", norm_eps="layer_norm_epsilon", activation="activation_function",
             tie_embeddings="tie_word_embeddings", **_IDS),
        dict(causal=True, positions="learned", norm="layer", norm_bias=True, qk_norm=False, qkv_bias=True, out_bias=True,
             mlp_bias=True, gated=False),
        {"embed": "transformer.wte",
         "embed_positions": "transformer.wpe",
         "blocks.*.attn_norm": "transformer.h.*.ln_1",
         ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"): "transformer.h.*.attn.c_attn ^T",
         "blocks.*.attn.o": "transformer.h.*.attn.c_proj ^T",
         "blocks.*.mlp_norm": "transformer.h.*.ln_2",
         "blocks.*.mlp.up": "transformer.h.*.mlp.c_fc ^T",
         "blocks.*.mlp.down": "transformer.h.*.mlp.c_proj ^T",
         "norm": "transformer.ln_f",
         "head": "lm_head"},
        dict(n_inner=None, layer_norm_epsilon=1e-5, activation_function="gelu_new", tie_word_embeddings=True),
        dict(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)),
        r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", "transformer."),
    "bert": Family(
        "BertForMaskedLM", dict(_BERT_KEYS, head_activation="hidden_act"), _BERT_FIXED,
        {**_bert_tensors("bert"),
         "head_dense": "cls.predictions.transform.dense",
         "head_norm": "cls.predictions.transform.LayerNorm",
         "head.weight": "cls.predictions.decoder.weight",
         "head.bias": "cls.predictions.bias"},
        _BERT_DEFAULTS, _BERT_ONLY,
        r"bert\.pooler\..*|cls\.seq_relationship\..*|bert\.embeddings\.position_ids",
        copies={"cls.predictions.decoder.bias": "head.bias"}),
    "roberta": Family(
        "RobertaForMaskedLM", _BERT_KEYS, _BERT_FIXED,
        {**_bert_tensors("roberta"),
         "head_dense": "lm_head.dense",
         "head_norm": "lm_head.layer_norm",
         "head.weight": "lm_head.decoder.weight",
         "head.bias": "lm_head.bias"},
        dict(_BERT_DEFAULTS, pad_token_id=1, eos_token_id=2, bos_token_id=0), _BERT_ONLY,
        r"roberta\.pooler\..*|roberta\.embeddings\.position_ids", copies={"lm_head.decoder.bias": "head.bias"}, offset=True),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        dict(vocab_size="vocab_size", dim="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
             hidden_dim="intermediate_size", max_len="max_position_embeddings", norm_eps="norm_eps", norm_bias="norm_bias",
             activation="hidden_activation", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias",
             local_window="local_attention", global_every="global_attn_every_n_layers", rope_theta="global_rope_theta",
             local_rope_theta="local_rope_theta", head_transform_bias="classifier_bias", head_activation="classifier_activation",
             head_bias="decoder_bias", tie_embeddings="tie_word_embeddings", **_IDS),
        dict(norm="layer", embed_norm=True, first_norm=False, qk_norm=False, head_transform=True),
        {"embed": "model.embeddings.tok_embeddings",
         "embed_norm": "model.embeddings.norm",
         "blocks.*.attn_norm": "model.layers.*.attn_norm",
         ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"): "model.layers.*.attn.Wqkv",
         "blocks.*.attn.o": "model.layers.*.attn.Wo",
         "blocks.*.mlp_norm": "model.layers.*.mlp_norm",
         ("blocks.*.mlp.gate", "blocks.*.mlp.up"): "model.layers.*.mlp.Wi",
         "blocks.*.mlp.down": "model.layers.*.mlp.Wo",
         "norm": "model.final_norm",
         "head_dense": "head.dense",
         "head_norm": "head.norm",
         "head": "decoder"},
        dict(norm_eps=1e-5, norm_bias=False, hidden_activation="gelu", attention_bias=False, mlp_bias=False, local_attention=128,
             global_attn_every_n_layers=3, global_rope_theta=160000.0, local_rope_theta=10000.0, classifier_bias=False,
             classifier_activation="gelu", decoder_bias=True, tie_word_embeddings=True)),
}
# What a family's own config.json cannot say, and is written into it where a model was turned into another kind. transformers 5 and vLLM
# read `is_causal`, too; dLLM has model types of its own instead, "a2d-qwen3".
ROLE_KEYS = {"causal": "is_causal", "shift": "shift", "block_length": "block_length"}
_ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu",
                     "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}     # safetensors' spelling


# ------------------------------------------------------------------------------------------------------------------------------
# Load, save, export: what the methods of Transformer do.


def load(path_or_hub_id, causal=None, device="cpu", dtype=None):
    """See Transformer.from_pretrained."""
    folder = find_checkpoint(path_or_hub_id)
    if base := adapter_base(folder):
        from scale.lora import load_adapter, merge_lora  # it builds on this file
        return merge_lora(load_adapter(load(base, causal, device, dtype), folder))
    model, plan = open_checkpoint(folder, causal)
    fill(model, plan, device, dtype)
    return model.eval()


def open_checkpoint(folder, causal=None):
    """(the model on the meta device, the plan by which `fill` gives it its weights): in between it can be changed and sharded."""
    config, _ = read_config(folder)
    if causal is not None:
        config.causal = causal
    model, plan = match_tensors(config, read_headers(weight_files(folder)))
    model.source = Path(folder)
    return model, plan


def adapter_base(folder):
    """The checkpoint that an adapter in `folder` belongs to, if that is all the folder holds; None: it holds a model."""
    folder = Path(folder)
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return None
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / 'adapter_config.json'} does not name its base: pass the model, and this folder with --adapter=")
    return folder / base if (folder / base).is_dir() else base      # one that lies in the adapter's own folder moves with it


def save(model, folder, state=None):
    """See Transformer.save_pretrained. state: the model's tensors where the model itself holds but a part of them (FSDP)."""
    state = dict(state or model.state_dict())
    if model.config.tie_embeddings:
        state.pop("head.weight", None)
    _write(model, folder, {"model_type": "unmask", **dataclasses.asdict(model.config)}, state, TOKENIZER_FILES)


def export(model, folder):
    """See Transformer.export_pretrained."""
    state, parameters = {}, model.state_dict()
    for theirs, ours, transposed in tensor_table(model):
        if ours != ["head.weight"] or not model.config.tie_embeddings:
            tensor = torch.cat([parameters[name] for name in ours])
            state[theirs] = tensor.T if transposed else tensor
    _write(model, folder, publish_config(model.config, model.embed.weight.dtype), state, (*TOKENIZER_FILES, "*.py"))


def _write(model, folder, raw_config, state, beside):
    folder, source = Path(folder), getattr(model, "source", None)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for leftover in folder.glob(".tmp??????"):                      # safetensors writes aside as well: a kill leaves such a file
        leftover.unlink(missing_ok=True)
    write_atomically(folder / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", lambda path: Path(path).write_text(json.dumps(raw_config, indent=2) + "\n"))
    if source is not None and source.resolve() != folder.resolve():
        for file in (file for pattern in beside for file in source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json")


def write_atomically(path, write):
    """write(temporary name), flush to disk, rename: a kill at any moment leaves the old file or the new one, never half of one.

    Raises OSError, with the old file untouched, where there is no space.
    """
    temporary = f"{path}.tmp"
    try:
        open(temporary, "wb").close()
        mode = os.stat(temporary).st_mode
        write(temporary)
        os.chmod(temporary, mode)                                   # safetensors makes files that nobody else can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:       # a full disk: OSError to Python, RuntimeError to torch
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}): free some space or choose another folder; what stood there is untouched") from None


# ------------------------------------------------------------------------------------------------------------------------------
# config.json and tensors: found, checked, matched.


def read_config(folder):
    """(Config, {field: where its value came from}) of the config.json in `folder`. Raises ValueError or FileNotFoundError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: is it a checkpoint folder?")
    raw = read_json(path)
    try:
        name = raw.get("model_type")
        if name == "unmask":
            values = {key: value for key, value in raw.items() if key != "model_type"}
            if unknown := values.keys() - {field.name for field in dataclasses.fields(Config)}:
                raise ValueError(f"unknown field {min(unknown)!r}")
            if values.get("family", "unmask") not in list(FAMILIES):
                raise ValueError(f"unknown family {values['family']!r}; known are {', '.join(FAMILIES)}")
            values["rope_scaling"] = _check_rope_scaling(values.get("rope_scaling"))
            return Config(**values), dict.fromkeys(values, "our config.json")
        name = name.removeprefix("a2d-") if isinstance(name, str) else name     # dLLM's word for "opened": see ROLE_KEYS
        if name not in list(FAMILIES):
            raise ValueError(f"unknown model_type {name!r}; known are {', '.join(FAMILIES)}")
        values, origin = interpret(FAMILIES[name], raw)
        return Config(family=name, published=raw, **values), origin
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path):
    """The object in a JSON file. Raises ValueError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def interpret(family, raw):
    """({Config field: value}, {Config field: where from}) of a published config, by the family's table."""
    for key, allowed in {"quantization_config": (None,), **family.only}.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(f"{key} = {raw[key]!r} is not supported (only {' or '.join(map(repr, allowed))})")
    flat = _flatten_rope(raw)
    values, origin = dict(family.fixed), dict.fromkeys(family.fixed, f"every {family.architecture}")
    for field, keys in family.keys.items():
        keys = (keys,) if isinstance(keys, str) else keys
        given = [key for key in keys if flat.get(key) is not None]
        if not given and not field.endswith("_token_id") and not family.defaults.keys() & set(keys):
            raise ValueError(f"{keys[-1]} is missing")
        value = flat[given[0]] if given else family.defaults.get(keys[0])
        origin[field] = f"{given[0]} = {value!r}" if given else f"{keys[-1]} not given"
        if field.endswith("_token_id"):                             # Llama 3 lists several ends of text; -1 stands for none
            value = value[0] if isinstance(value, list) and value else value
            value = None if value == -1 else value
        elif field in ("activation", "head_activation"):
            value = _ACTIVATION_NAMES.get(value, value) if isinstance(value, str) else value
        elif field == "rope_scaling":
            value = _check_rope_scaling(value)
        elif value is None:
            value = 0                                               # Config derives it
        values[field] = value
    if family.offset and type(values["max_len"]) is type(values["pad_token_id"]) is int:
        values["position_offset"], origin["position_offset"] = values["pad_token_id"] + 1, "pad_token_id + 1"
        values["max_len"] -= values["position_offset"]
    if str(raw.get("model_type")).startswith("a2d-"):
        values["causal"], origin["causal"] = False, f"model_type = {raw['model_type']!r}"
    for field, key in ROLE_KEYS.items():
        if raw.get(key) is not None:
            values[field], origin[field] = raw[key], f"{key} = {raw[key]!r}"
    return values, origin


def tiny_config(family, tokenizer, max_len, dim=128, n_layers=4, n_heads=4):
    """The Config of a small model of a family, for runs that need no download: `--init_from=tiny:gpt2`. ValueError if unknown."""
    if family not in FAMILIES:
        raise ValueError(f"no family called {family!r}; tiny models are made of {', '.join(FAMILIES)}")
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id")}
    if FAMILIES[family].offset:                                     # its padding index places its positions: keep the usual one
        del ids["pad_token_id"]
    size = dict(vocab_size=tokenizer.vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, head_dim=dim // n_heads,
                hidden_dim=3 * dim, max_len=max_len + 2 * FAMILIES[family].offset, **ids)
    keys = {field: (keys,) if isinstance(keys, str) else keys for field, keys in FAMILIES[family].keys.items()}
    raw = {key: size[field] for field in size for key in keys.get(field, ())}
    return Config(family=family, published=None if family == "unmask" else raw, **interpret(FAMILIES[family], raw)[0])


def tiny_model(family, tokenizer, max_len, seed=0, **size):
    """A small random model of a family with matrices as large as in trained ones, N(0, 1/fan-in): frozen small ones would teach an adapter
    little, and by AdamW all of them learn a little faster."""
    model = Transformer(tiny_config(family, tokenizer, max_len, **size)).init_weights(seed)
    generator = stream("matrices of a tiny model", seed)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not model.embed.weight:
            nn.init.normal_(module.weight, std=module.in_features ** -0.5, generator=generator)
    return model


def _flatten_rope(raw):
    """A published config with what transformers 5 writes, `layer_types` and `rope_parameters`, as the older keys of the table."""
    flat, kinds, rope = dict(raw), raw.get("layer_types"), raw.get("rope_parameters")
    if isinstance(kinds, list) and kinds:
        every = next((layer for layer in range(1, len(kinds)) if kinds[layer] == "full_attention"), len(kinds))
        pattern = ["sliding_attention" if layer % every else "full_attention" for layer in range(len(kinds))]
        if kinds != pattern or every > 1 and raw.get("model_type") != "modernbert":
            raise ValueError("layer_types with this pattern of local layers are not supported")
        flat["global_attn_every_n_layers"] = every
    if isinstance(rope, dict):
        both = rope.get("full_attention"), rope.get("sliding_attention")
        if all(isinstance(part, dict) for part in both):
            flat["global_rope_theta"], flat["local_rope_theta"] = (part.get("rope_theta") for part in both)
        else:
            flat["rope_theta"], flat["rope_scaling"] = rope.get("rope_theta", raw.get("rope_theta")), rope
    return flat


def _check_rope_scaling(scaling):
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else repr(scaling)
    needs = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if kind not in list(needs):
        raise ValueError(f"rope_scaling {kind!r} is not supported (only {', '.join(needs)})")
    for key in needs[kind]:
        if type(scaling.get(key)) not in (int, float) or not 0 < scaling[key] < 1e30:
            raise ValueError(f"rope_scaling needs a positive {key}, got {scaling.get(key)!r}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("rope_scaling needs low_freq_factor < high_freq_factor")
    return None if kind == "default" else {"rope_type": kind, **{key: scaling[key] for key in needs[kind]}}


def publish_config(config, dtype):
    """The published config.json of a model: the one it was read from, changed where the model was. ValueError if none fits."""
    family, raw = FAMILIES[config.family], dict(config.published or {})
    before = Config(**interpret(family, raw)[0]) if raw else None
    raw.setdefault("architectures", [family.architecture])
    raw.setdefault("model_type", "qwen3" if config.family == "unmask" else config.family)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
    for field, keys in family.keys.items():
        value = getattr(config, field)
        if before is None or value != getattr(before, field):
            value = "gelu_new" if value == "gelu_tanh" else value + config.position_offset if field == "max_len" else value
            raw.update(dict.fromkeys((keys,) if isinstance(keys, str) else keys, value))
    after = Config(**interpret(family, raw)[0])                     # what a reader of it will understand
    for field in (field.name for field in dataclasses.fields(Config)):
        value = getattr(config, field)
        if value == getattr(after, field) or field in ("family", "published") or field == "shift" and config.causal:
            continue
        if field in ROLE_KEYS:
            raw[ROLE_KEYS[field]] = value
        else:
            raise ValueError(f"a {family.architecture} cannot have {field} = {value!r}: save_pretrained can write this model")
    return raw


def tensor_table(model):
    """[(published name, our parameters, stored transposed)]: the family's table written out for every layer of this model."""
    parameters, table = model.state_dict(keep_vars=True), []
    for ours, theirs in FAMILIES[model.config.family].tensors.items():
        ours = (ours,) if isinstance(ours, str) else ours
        theirs, transposed = theirs.removesuffix(" ^T"), theirs.endswith(" ^T")
        for layer in range(model.config.n_layers if "*" in theirs else 1):
            names, name = [our.replace("*", str(layer)) for our in ours], theirs.replace("*", str(layer))
            for suffix in ("", ".weight", ".bias"):                 # "": the table has the name in full
                if names[0] + suffix in parameters:
                    table.append((name + suffix, [our + suffix for our in names], transposed and suffix == ".weight"))
    return table


def find_checkpoint(path_or_hub_id, weights=True):
    """The local folder of a checkpoint; a hub id is downloaded (without weights: all but them), or found in the cache. Raises
    FileNotFoundError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file: pass the folder that holds config.json")
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(path_or_hub_id)):
        raise FileNotFoundError(f"there is no folder {path_or_hub_id}")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", *["*.safetensors"] * weights, "*.txt", "*.jinja", "*.py"],
                                      ignore_patterns=["*/*"]))     # the .py are copied on export, never run
    except Exception as error:          # the hub's errors have no common class; whatever it was, the reader needs the same advice
        reason, here = type(error).__name__, [str(file.parent) for depth in ("*", "*/*") for file in Path().glob(f"{depth}/config.json")]
        near = "".join(f"did you mean {name}? Else " for name in difflib.get_close_matches(str(folder), here, 1, 0.8))
        raise FileNotFoundError(f"there is no folder {path_or_hub_id}, and it could not be fetched from the hub ({reason}): {near}pass "
                                "a local folder with config.json and .safetensors, or connect and check the name") from None


def weight_files(folder):
    """The .safetensors files of a checkpoint folder. Raises FileNotFoundError or ValueError."""
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index} is not an index of shards (no weight_map)")
        for shard in shards.values():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{index} names the shard {shard!r}: only .safetensors files of the same folder are read")
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{index} names the shard {shard}, which is missing from {folder}")
        return [folder / shard for shard in sorted(set(shards.values()))]
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt*")):
        raise FileNotFoundError(f"{folder} holds pickled weights only, which are never opened here: convert them with "
                                "transformers, AutoModelForCausalLM (or ...MaskedLM).from_pretrained(folder).save_pretrained(new_folder)")
    raise FileNotFoundError(f"{folder} holds no model.safetensors")


def open_tensors(file):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error})") from None


def read_headers(files):
    """{tensor name: (file, shape, dtype as safetensors spells it)}; no weights are read."""
    stored = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                stored[name] = file, tuple(part.get_shape()), part.get_dtype()
    return stored


def match_tensors(config, stored):
    """(a model without memory, where its weights are: [(file, name, shape, dtype, our parameters, transposed)]).

    Every tensor of `read_headers` is accounted for: a missing, extra or misshapen one is a ValueError that names it.
    """
    family, own = FAMILIES[config.family], "embed.weight" in stored
    layers = {match[1] for match in (re.search(r"(?:^|\.)(\d+)\.", name) for name in stored) if match}
    if len(layers) != config.n_layers:                              # said before anything of that size is built
        raise ValueError(f"config.json says {config.n_layers} layers, the weights hold {len(layers)}")
    with torch.device("meta"):
        model = Transformer(config)
    shapes, plan, plan_of_copies = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, [], []
    copies = {name: ([our], False) for name, our in family.copies.items()}
    wanted = {}
    for name, ours, transposed in [(name, [name], False) for name in shapes] if own else tensor_table(model):
        if config.tie_embeddings and ours == ["head.weight"]:
            copies[name] = ["embed.weight"], False                  # some files hold it all the same
        else:
            wanted[name] = ours, transposed
    for name, (file, shape, dtype) in stored.items():
        known = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        known = known if known in wanted or known in copies else family.prefix + known
        if known not in wanted and re.fullmatch(family.unused, name):
            continue
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is stored as {dtype}; quantised weights cannot be read (only {', '.join(DTYPES)})")
        if known not in wanted and known not in copies:
            raise ValueError(f"{file} holds the tensor {name}, which has no place in a {config.family} model of this config.json")
        ours, transposed = wanted.pop(known) if known in wanted else copies[known]
        asked = (sum(shapes[our][0] for our in ours), *shapes[ours[0]][1:])[::-1 if transposed else 1]
        if shape != asked:
            raise ValueError(f"{file}: {name} has shape {list(shape)}, config.json asks for {list(asked)}")
        (plan_of_copies if known in copies else plan).append((file, name, shape, DTYPES[dtype], ours, transposed))
    if wanted:
        raise ValueError(f"the weights lack the tensor {next(iter(wanted))}" + f" and {len(wanted) - 1} more" * (len(wanted) > 1))
    return model, plan + plan_of_copies


def fill(model, plan, device="cpu", dtype=None):
    """Give the model of `match_tensors` its weights, 4 million numbers at a time; a sharded model (FSDP) reads its own rows only."""
    dtype = dtype or stored_dtype(plan)
    for file, name, shape, _, ours, transposed in plan:
        known, nan = model.get_parameter(ours[0]), False
        whole = transposed or len(ours) > 1                         # then our rows are not the file's
        first, last = (0, shape[0]) if whole else own_rows(known)
        tensor = torch.empty((last - first, *shape[1:]), dtype=dtype) if known.is_meta else local_part(known.detach())
        for rows, part in _read_rows(file, name, shape, first, last):
            nan = nan or part.isnan().any().item()
            if known.is_meta:
                tensor[rows] = part
            elif not torch.equal(part.to(tensor), tensor[rows]):    # a copy, or a head that config.json ties
                raise ValueError(f"{file}: {name} differs from {ours[0]}, which it should equal")
        if nan:
            warnings.warn(f"{file}: {name} contains NaN", stacklevel=3)
        for our, part in zip(ours if known.is_meta else [], (tensor.T if transposed else tensor).chunk(len(ours))):
            if whole:
                part = part[slice(*own_rows(model.get_parameter(our)))].clone(memory_format=torch.contiguous_format)
            put_rows(model, our, part.to(device))
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight


def stored_dtype(plan):
    """The dtype of a checkpoint: its embedding's."""
    return next(row[3] for row in plan if row[4] == ["embed.weight"])


def own_rows(parameter):
    """(first, last + 1) of the rows of a sharded parameter that belong to this process; all rows of any other parameter.

    FSDP2 cuts dimension 0 as torch.chunk does: equal pieces, the last ones smaller or empty.
    """
    n, mesh = len(parameter), getattr(parameter, "device_mesh", None)
    if mesh is None:
        return 0, n
    piece = -(-n // mesh.size())
    return min(n, piece * mesh.get_local_rank()), min(n, piece * (mesh.get_local_rank() + 1))


def local_part(parameter):
    return parameter.to_local() if hasattr(parameter, "device_mesh") else parameter


def gathered(tensors):
    """{name: whole tensor on the CPU} of {name: sharded or plain tensor} on process 0, {} on the others, which must call it too."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor                 # one at a time: no memory for all
        if rank_and_size()[0] == 0:
            whole[name] = tensor.cpu()
    return whole


def put_rows(model, name, rows):
    """Make `rows`, those of `own_rows`, the parameter `name` of the model; whether it learns stays as it was."""
    module, _, leaf = name.rpartition(".")
    known = model.get_parameter(name)
    if hasattr(known, "device_mesh"):
        from torch.distributed.tensor import DTensor
        rows = DTensor.from_local(rows, known.device_mesh, known.placements, run_check=False, shape=known.shape, stride=known.stride())
    setattr(model.get_submodule(module), leaf, nn.Parameter(rows, requires_grad=known.requires_grad))


def _read_rows(file, name, shape, first=0, last=None):
    """Yields (rows counted from `first`, those of a tensor), mapped from the file anew each time: no page of it outlives its copying."""
    last = shape[0] if last is None else last
    step = max(1, 2**22 * shape[0] // max(1, math.prod(shape)))
    for start in range(first, last, step):
        with open_tensors(file) as tensors:
            yield slice(start - first, min(start + step, last) - first), tensors.get_slice(name)[start:min(start + step, last)]


def describe(path_or_hub_id):
    """The architecture of a checkpoint as text: sizes, parameters, memory, and where each Config field came from."""
    folder = find_checkpoint(path_or_hub_id)
    config, origin = read_config(folder)
    model, _ = match_tensors(config, read_headers(weight_files(folder)))
    n, embed = sum(p.numel() for p in model.parameters()), model.embed.weight.numel()
    lines = [f"{folder}: family {config.family}, {n:,} parameters, {embed:,} of them in the embedding"
             + (", which is the head too" if config.tie_embeddings else f" and {model.head.weight.numel():,} in the head"),
             f"{config.n_layers} layers of width {config.dim}, {config.n_heads} heads of {config.head_dim} ({config.n_kv_heads} "
             f"key/value heads), MLP {config.hidden_dim}, vocabulary {config.vocab_size}, context {config.max_len}",
             f"weights: float32 {n * 4 / 1e9:.3f} GB, bfloat16 and float16 {n * 2 / 1e9:.3f} GB"]
    for field in dataclasses.fields(config):
        if field.name != "published":
            lines.append(f"  {field.name:19}  {str(getattr(config, field.name)):12}  {origin.get(field.name, 'default')}")
    return "\n".join(lines)
