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
    prefix: str = ""        # of the body's names; left out where the body was saved alone
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
_ROPE_ONLY = dict(partial_rotary_factor=(None, 1.0))
_PLAIN = dict(qk_norm=False)                                        # RMSNorm, SwiGLU and RoPE are Config's defaults already

_QWEN3 = Family(
    "Qwen3ForCausalLM", dict(_LLAMA_KEYS, qkv_bias="attention_bias", out_bias="attention_bias"), dict(causal=True),
    {**_LLAMA_TENSORS,
     "blocks.*.attn.q_norm": "model.layers.*.self_attn.q_norm",
     "blocks.*.attn.k_norm": "model.layers.*.self_attn.k_norm"},
    dict(_LLAMA_DEFAULTS, head_dim=128), dict(_ROPE_ONLY, **_NO_WINDOW), _LLAMA_UNUSED, "model.")

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
        dict(_PLAIN, causal=True), _LLAMA_TENSORS, _LLAMA_DEFAULTS, _ROPE_ONLY, _LLAMA_UNUSED,
        "model."),
    "qwen2": Family(
        "Qwen2ForCausalLM", _LLAMA_KEYS, dict(_PLAIN, causal=True, qkv_bias=True), _LLAMA_TENSORS,
        dict(_LLAMA_DEFAULTS, max_position_embeddings=32768), dict(_ROPE_ONLY, **_NO_WINDOW),
        _LLAMA_UNUSED, "model."),
    "Dream": Family(
        "DreamModel", _LLAMA_KEYS, dict(_PLAIN, qkv_bias=True, shift=True), _LLAMA_TENSORS,
        _LLAMA_DEFAULTS, dict(_ROPE_ONLY, **_NO_WINDOW), _LLAMA_UNUSED, "model."),
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
             bias_for_layer_norm=(None, False), layer_norm_with_affine=(True,),
             block_group_size=(1,), rope_scaling=(None,)),
        prefix="model."),
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
        r"transformer\.h\.\d+\.attn\.(masked_)?bias", "transformer."),
    "bert": Family(
        "BertForMaskedLM", dict(_BERT_KEYS, head_activation="hidden_act"), _BERT_FIXED,
        {**_bert_tensors("bert"),
         "head_dense": "cls.predictions.transform.dense",
         "head_norm": "cls.predictions.transform.LayerNorm",
         "head.weight": "cls.predictions.decoder.weight",
         "head.bias": "cls.predictions.bias"},
        _BERT_DEFAULTS, _BERT_ONLY,
        r"bert\.pooler\..*|cls\.seq_relationship\..*"
        r"|bert\.embeddings\.(position_ids|token_type_ids)", "bert.",
        copies={"cls.predictions.decoder.bias": "head.bias"}),
    "roberta": Family(
        "RobertaForMaskedLM", _BERT_KEYS, _BERT_FIXED,
        {**_bert_tensors("roberta"),
         "head_dense": "lm_head.dense",
         "head_norm": "lm_head.layer_norm",
         "head.weight": "lm_head.decoder.weight",
         "head.bias": "lm_head.bias"},
        dict(_BERT_DEFAULTS, pad_token_id=1, eos_token_id=2, bos_token_id=0), _BERT_ONLY,
        r"roberta\.pooler\..*|roberta\.embeddings\.(position_ids|token_type_ids)", "roberta.",
        copies={"lm_head.decoder.bias": "head.bias"}, offset=True),
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
             classifier_activation="gelu", decoder_bias=True, tie_word_embeddings=True),
        dict(_ROPE_ONLY, rope_scaling=(None,)), prefix="model."),
}
# What a family's own config.json cannot say, and is written into it where a model was turned into another kind. transformers 5 and vLLM
# read `is_causal`, too; dLLM has model types of its own instead, "a2d-qwen3".
ROLE_KEYS = {"causal": "is_causal", "shift": "shift", "block_length": "block_length"}
_ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu",
                     "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}     # safetensors' spelling


# ------------------------------------------------------------------------------------------------------------------------------
# Load, save, export: what the methods of Transformer do.


def load(path_or_hub_id, causal=None, device="cpu", dtype=None, fresh_head=False):
    """See Transformer.from_pretrained. fresh_head: as in `open_checkpoint`."""
    folder = find_checkpoint(path_or_hub_id)
    if base := adapter_base(folder):
        from scale.lora import load_adapter, merge_lora  # it builds on this file
        return merge_lora(load_adapter(load(base, causal, device, dtype, fresh_head), folder))
    model, plan = open_checkpoint(folder, causal, fresh_head)
    fill(model, plan, device, dtype)
    return model.eval()


def open_checkpoint(folder, causal=None, fresh_head=False):
    """(the model on the meta device, the plan by which `fill` gives it its weights): in between it
    can be changed and sharded.

    fresh_head: an encoder that was saved without its masked-LM head gets a new one, tied to the
    embedding, and `model.fresh_head` is True. Without this argument such a file is a ValueError.
    """
    config, _ = read_config(folder)
    if causal is not None:
        config.causal = causal
    stored = read_headers(weight_files(folder))
    fresh_head = fresh_head and lacks_encoder_head(config, stored)
    if fresh_head:
        config.tie_embeddings = True
        if config.published:                                        # an export says what it is now
            architectures = [FAMILIES[config.family].architecture]
            config.published = dict(config.published, architectures=architectures)
    model, plan = match_tensors(config, stored, fresh_head)
    model.source, model.fresh_head = Path(folder), fresh_head
    return model, plan


def has_weights(folder):
    """Whether a folder holds the weights of a model, of whatever kind."""
    patterns = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    return any(True for pattern in patterns for _ in Path(folder).glob(pattern))


def adapter_base(folder):
    """The checkpoint that an adapter in `folder` belongs to; None: the folder holds a model.

    A config.json beside an adapter, which some tools write, makes it no model: weights do.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    if not path.exists() or (folder / "config.json").exists() and has_weights(folder):
        return None
    settings = read_json(path)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} does not name its base: {_PASS_BOTH}")
    if (folder / base).is_dir():                                    # it moves with the adapter
        base = folder / base
    if Path(base).expanduser().resolve() == folder.resolve():
        raise ValueError(f"{path} names its own folder as its base: {_PASS_BOTH}")
    is_local = Path(base).expanduser().is_dir()
    if settings.get("revision") not in (None, "main") and not is_local:
        raise ValueError(f"{path} belongs to revision {settings['revision']!r} of {base}, and only "
                         f"the newest is fetched: download that one, {_PASS_BOTH}")
    return base


_PASS_BOTH = "pass the model, and this folder with --adapter="


def model_folder(path_or_hub_id):
    """The local folder of a checkpoint that is a model of its own. ValueError for an adapter."""
    folder = find_checkpoint(path_or_hub_id)
    if adapter_base(folder):
        raise ValueError(f"{path_or_hub_id} is an adapter: --merge it into its base first and "
                         "start from the result")
    return folder


def tokenizer_folder(path_or_hub_id):
    """The local folder of a checkpoint's tokenizer: an adapter may leave it to its base."""
    folder = find_checkpoint(path_or_hub_id)
    vocabularies = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
    brings_one = any((folder / name).exists() for name in vocabularies)
    base = None if brings_one else adapter_base(folder)
    return tokenizer_folder(base) if base else folder


def save(model, folder, state=None):
    """See Transformer.save_pretrained. state: the model's tensors where the model itself holds but a part of them (FSDP)."""
    state = dict(state or model.state_dict())
    if model.config.tie_embeddings:
        state.pop("head.weight", None)
    raw = dataclasses.asdict(model.config)
    raw["eos_token_ids"] = list(model.config.ends) if len(model.config.ends) > 1 else None
    _write(model, folder, {"model_type": "unmask", **raw}, state, TOKENIZER_FILES)


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
            is_generation = file.name == "generation_config.json"
            if is_generation and model.config.ends != read_config(source)[0].ends:
                _correct_generation_config(folder / file.name, model.config.ends)


def _correct_generation_config(path, ends):
    """Write the ends of a model that has others than its source into the copy of its file."""
    raw = read_json(path)
    raw["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0] if ends else None
    text = json.dumps(raw, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


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
        config = Config(family=name, published=raw, **values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # `transformers` stops at those of generation_config.json; training, and what loads without
    # that file, knows those of config.json. A text ends at either.
    more = [token for token in _generation_ends(folder) if token not in config.ends]
    if more:
        config.set_ends([*config.ends, *more])
        origin["eos_token_ids"] = "with those of generation_config.json"
    return config, origin


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
    flat = _flatten_rope(family, raw)
    values, origin = dict(family.fixed), dict.fromkeys(family.fixed, f"every {family.architecture}")
    for field, keys in family.keys.items():
        keys = (keys,) if isinstance(keys, str) else keys
        given = [key for key in keys if flat.get(key) is not None]
        if not given and not field.endswith("_token_id") and not family.defaults.keys() & set(keys):
            raise ValueError(f"{keys[-1]} is missing")
        value = flat[given[0]] if given else family.defaults.get(keys[0])
        origin[field] = f"{given[0]} = {value!r}" if given else f"{keys[-1]} not given"
        if field == "eos_token_id":                             # Llama 3 lists several
            tokens = _read_ids(value, keys[-1])
            value = tokens[0] if tokens else None
            values["eos_token_ids"] = tokens if len(tokens) > 1 else None
            origin["eos_token_ids"] = origin[field]
        elif field.endswith("_token_id"):
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            value = None if value == -1 else value                  # -1 stands for none
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


def _read_ids(value, name):
    """The token ids, each once, in a config's value, a number or a list; None and -1 are none."""
    tokens = value if isinstance(value, list) and value else [value]
    tokens = [token for token in tokens if token is not None and token != -1]
    for token in tokens:
        if type(token) is not int or token < 0:
            raise ValueError(f"{name} must be a token id or a list of them, got {value!r}")
    return list(dict.fromkeys(tokens))


def _generation_ends(folder):
    """The ends of text in a folder's generation_config.json; some list them only there."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return []
    try:
        return _read_ids(read_json(path).get("eos_token_id"), "eos_token_id")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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


def _flatten_rope(family, raw):
    """A published config with what transformers 5 writes, `layer_types` and `rope_parameters`, as
    the older keys of the table.

    A config may spell a thing in both ways (see `_spell_rope_twice`): then both must say the same.
    """
    flat, kinds, rope = dict(raw), raw.get("layer_types"), raw.get("rope_parameters")
    has_local_layers = "local_rope_theta" in family.keys

    def put(key, value):
        if value is not None:
            if flat.get(key) is not None and flat[key] != value:
                raise ValueError(f"{key} is {flat[key]!r}, but another key of this config says "
                                 f"{value!r}")
            flat[key] = value

    if isinstance(kinds, list) and kinds:
        every = next((layer for layer in range(1, len(kinds)) if kinds[layer] == "full_attention"), len(kinds))
        if kinds != _layer_kinds(len(kinds), every) or every > 1 and not has_local_layers:
            raise ValueError("layer_types with this pattern of local layers are not supported")
        given = flat.get("global_attn_every_n_layers")
        if type(given) is not int or given < 1 or kinds != _layer_kinds(len(kinds), given):
            put("global_attn_every_n_layers", every)
    if "rope_theta" not in family.keys:
        return flat
    if isinstance(flat.get("rope_scaling"), dict):                  # transformers 5 looks there
        put("rope_theta", flat["rope_scaling"].get("rope_theta"))
    if not isinstance(rope, dict) or not rope:
        return flat
    if has_local_layers:
        parts = {"global_rope_theta": rope.get("full_attention"),
                 "local_rope_theta": rope.get("sliding_attention")}
    else:
        parts = {"rope_theta": rope}
    if any(kind in rope for kind in ("full_attention", "sliding_attention")) != has_local_layers:
        layers = "each kind of layer" if has_local_layers else "all layers"
        raise ValueError(f"rope_parameters = {rope!r} is not supported: a {family.architecture} "
                         f"has one RoPE for {layers}")
    for key, part in parts.items():
        part = {} if part is None else part
        if not isinstance(part, dict):
            raise ValueError(f"rope_parameters = {rope!r} is not supported")
        put(key, part.get("rope_theta"))
        scaling = _check_rope_scaling(part if "type" in part else {"rope_type": "default", **part})
        if scaling is not None and "rope_scaling" not in family.keys:
            raise ValueError(f"rope_parameters = {rope!r} is not supported: "
                             f"a {family.architecture} does not scale its RoPE")
        flat["rope_scaling"] = _check_rope_scaling(flat.get("rope_scaling"))
        put("rope_scaling", scaling)
    return flat


def _layer_kinds(n_layers, every):
    """transformers 5's `layer_types` where each `every`-th layer, from the first on, sees all."""
    return ["sliding_attention" if layer % every else "full_attention" for layer in range(n_layers)]


def _spell_rope_twice(family, raw, config):
    """Where a published config has the keys of transformers 5, write them anew, and those of
    transformers 4 beside them.

    transformers 4 does not know `rope_parameters` and would silently take a rope_theta of 10000.
    """
    if isinstance(raw.get("layer_types"), list):
        every = config.global_every if config.local_window else 1
        raw["layer_types"] = _layer_kinds(config.n_layers, every)
        if "global_every" in family.keys:
            raw["global_attn_every_n_layers"] = config.global_every
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in family.keys:
        return
    if "local_rope_theta" in family.keys:
        thetas = {"full_attention": config.rope_theta, "sliding_attention": config.local_rope_theta}
        raw["global_rope_theta"], raw["local_rope_theta"] = thetas.values()
        raw["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": theta}
                                  for kind, theta in thetas.items()}
        return
    raw["rope_theta"] = config.rope_theta
    scaling = config.rope_scaling or {"rope_type": "default"}
    raw["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    if "rope_scaling" in family.keys:
        raw["rope_scaling"] = config.rope_scaling


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
    if scaling.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor = {scaling['partial_rotary_factor']!r} is not "
                         "supported")
    return None if kind == "default" else {"rope_type": kind, **{key: scaling[key] for key in needs[kind]}}


def publish_config(config, dtype):
    """The published config.json of a model: the one it was read from, changed where the model was. ValueError if none fits."""
    family, raw = FAMILIES[config.family], dict(config.published or {})
    before = Config(**interpret(family, raw)[0]) if raw else None
    raw.setdefault("architectures", [family.architecture])
    raw.setdefault("model_type", "qwen3" if config.family == "unmask" else config.family)
    for key in [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]:
        raw[key] = str(dtype).removeprefix("torch.")
    for field, keys in family.keys.items():
        value = getattr(config, field)
        if field == "eos_token_id" and config.ends != (before.ends if before else ()):
            raw["eos_token_id"] = list(config.ends) if len(config.ends) > 1 else value
        elif before is None or value != getattr(before, field):
            value = "gelu_new" if value == "gelu_tanh" else value + config.position_offset if field == "max_len" else value
            raw.update(dict.fromkeys((keys,) if isinstance(keys, str) else keys, value))
    _spell_rope_twice(family, raw, config)
    after = Config(**interpret(family, raw)[0])                     # what a reader of it will understand
    for field in (field.name for field in dataclasses.fields(Config)):
        value = getattr(config, field)
        if field in ("eos_token_id", "eos_token_ids") and config.ends == after.ends:
            continue                            # the list may be that of a former eos_token_id
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


def lacks_encoder_head(config, stored):
    """Whether the tensors of `read_headers` are an encoder's without any part of its masked-LM
    head: those of a BertModel instead of a BertForMaskedLM."""
    if not config.head_transform:                                   # a decoder has no such head
        return False
    family, heads = FAMILIES[config.family], ["head", "head_dense", "head_norm"]
    heads += [theirs for ours, theirs in family.tensors.items() if is_head([ours])]
    heads += [theirs for theirs, ours in family.copies.items() if is_head([ours])]
    return not any(name == head or name.startswith(head + ".") for name in stored for head in heads)


def is_head(ours):
    """Whether these of our modules or parameters turn a position's last vector into logits."""
    return str(ours[0]).split(".")[0] in ("head", "head_dense", "head_norm")


def match_tensors(config, stored, fresh_head=False):
    """(a model without memory, where its weights are: [(file, name, shape, dtype, our parameters, transposed)]).

    Every tensor of `read_headers` is accounted for: a missing, extra or misshapen one is a ValueError that names it.
    fresh_head: the head is not looked for, see `open_checkpoint`.
    """
    family, own = FAMILIES[config.family], "embed.weight" in stored or "head.weight" in stored
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
            copies[name] = ["embed.weight"], False                  # stored too, or alone
        elif not (fresh_head and is_head(ours)):
            wanted[name] = ours, transposed
    names = {name: _full_name(name, family, {*wanted, *copies}) for name in stored}
    for name, (ours, transposed) in copies.items():                 # alone it is the original
        original = next((known for known in wanted if wanted[known][0] == ours), None)
        if name in names.values() and original is not None and original not in names.values():
            del wanted[original]
            wanted[name] = ours, transposed
    for name, (file, shape, dtype) in stored.items():
        known = names[name]
        if known not in wanted and known not in copies:
            if any(re.fullmatch(family.unused, full) for full in (name, family.prefix + name)):
                continue
            if dtype in ("I64", "BOOL"):
                raise ValueError(f"{file} holds {name}, a buffer of type {dtype} and no weights, "
                                 f"which has no place in a {config.family} model: write the file "
                                 "without it if it is but a table of positions or the like")
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is stored as {dtype}; quantised weights cannot be read (only {', '.join(DTYPES)})")
        if known not in wanted and known not in copies:
            raise ValueError(f"{file} holds the tensor {name}, which has no place in a {config.family} model of this config.json")
        is_copy = known not in wanted
        ours, transposed = copies[known] if is_copy else wanted.pop(known)
        asked = (sum(shapes[our][0] for our in ours), *shapes[ours[0]][1:])[::-1 if transposed else 1]
        if shape != asked:
            raise ValueError(f"{file}: {name} has shape {list(shape)}, config.json asks for {list(asked)}")
        row = file, name, shape, DTYPES[dtype], ours, transposed
        (plan_of_copies if is_copy else plan).append(row)
    if wanted:
        lacking = next(iter(wanted))
        message = f"the weights lack the tensor {lacking}"
        if len(wanted) > 1:
            message += f" and {len(wanted) - 1} more"
        lacks_head_only = all(is_head(ours) for ours, _ in wanted.values())
        if lacks_head_only and lacks_encoder_head(config, stored):
            message += (": they are an encoder without the head that predicts tokens; "
                        "convert_bert.py gives it a new one")
        elif lacks_head_only and not config.tie_embeddings:
            message += (": the head that predicts tokens is missing, and config.json does not tie "
                        "it to the embedding")
        raise ValueError(message)
    return model, plan + plan_of_copies


def _full_name(name, family, known):
    """A stored tensor's name as the family's table has it: with the prefix, and without
    TensorFlow's names of the norms."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    return name if name in known else family.prefix + name


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
    if getattr(model, "fresh_head", False):
        _init_head(model, device, dtype)


def _init_head(model, device, dtype, seed=0):
    """A new masked-LM head on a tied embedding, as BERT's began: N(0, 0.02^2) for its matrix, ones
    for the norm's weight, zeros for all biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        if is_head([name]) and name != "head.weight":
            values = torch.zeros(parameter.shape)
            if name == "head_dense.weight":
                values.normal_(std=0.02, generator=generator)
            elif name == "head_norm.weight":
                values.fill_(1)
            put_rows(model, name, values[slice(*own_rows(parameter))].to(device, dtype))


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
    folder = model_folder(path_or_hub_id)
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
