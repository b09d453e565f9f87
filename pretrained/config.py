"""config.json: a published one read as a `Config`, a `Config` written as a published one."""
import dataclasses
import json
from pathlib import Path

from config import Config
from pretrained import gguf
from pretrained.families import FAMILIES

# What a family's own config.json cannot say is written under these keys where a model was turned
# into another kind. transformers 5 and vLLM read `is_causal`, too; dLLM has model types of its own
# instead, "a2d-qwen3".
ROLE_KEYS = {"causal": "is_causal", "shift": "shift", "block_length": "block_length",
             "blocks_from_start": "blocks_from_start", "threshold": "threshold",
             "edit_threshold": "edit_threshold", "edit_schedule": "edit_schedule",
             "edit_masks": "edit_masks", "delete_token_id": "delete_token_id",
             "insert_token_id": "split_token_id"}       # as LLaDA2.2 calls them
ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
                    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


# --------------------------------------------------------------------------------------------------
# Read


def read_config(folder):
    """(Config, {field: where its value came from}) of the config.json in `folder`, ours or a
    published one, or of a GGUF file. Raises ValueError or FileNotFoundError."""
    if gguf.is_gguf(folder):
        return read_gguf(folder)
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: is it a checkpoint folder?")
    raw = read_json(path)
    try:
        if raw.get("model_type") == "unmask":
            return read_own(raw)
        config, origin = read_published(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # `transformers` stops at the ends of generation_config.json; training, and what loads without
    # that file, knows those of config.json. A text ends at either.
    more = [token for token in generation_ends(folder) if token not in config.ends]
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


def read_own(raw):
    """`read_config` for our own layout: the fields of Config by their names. A field that is newer
    than the file has the value that the family's row in FAMILIES gives it. Raises ValueError."""
    values = dict(raw)
    del values["model_type"]
    unknown = values.keys() - field_names()
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    family = values.get("family", "unmask")
    if family not in list(FAMILIES):                    # a list: the name may not be hashable
        raise ValueError(f"unknown family {family!r}; known are {', '.join(FAMILIES)}")
    values["rope_scaling"] = check_rope_scaling(values.get("rope_scaling"))
    origin = dict.fromkeys(values, "our config.json")
    row = FAMILIES[family]
    for field, value in row.fixed.items():
        if field not in values and field not in ROLE_KEYS:
            values[field] = value
            origin[field] = f"every {row.architecture}"
    return Config(**values), origin


def read_published(raw):
    """`read_config` for a published layout. Raises ValueError."""
    name = family_name(raw)
    values, origin = interpret(FAMILIES[name], raw)
    return Config(family=name, published=raw, **values), origin


def read_gguf(file):
    """`read_config` for a GGUF file: its metadata become the config.json that its family would
    have. Raises ValueError."""
    return config_of_header(gguf.read_whole_header(file))


def config_of_header(header):
    """`read_gguf` of a header."""
    file = header.file
    name = gguf.family_of(header)
    fields, where = gguf.config_fields(header)
    family = FAMILIES[name]
    raw = {"architectures": [family.architecture], "model_type": name}
    for key, allowed in family.only.items():            # their own code may have other defaults
        known = [value for value in allowed if value is not None]
        if known:
            raw[key] = known[0]
    for field, value in fields.items():
        if field in family.keys:
            raw.update(dict.fromkeys(key_names(family, field), value))
        elif field in ROLE_KEYS and value != family.fixed.get(field, False):
            raw[ROLE_KEYS[field]] = value
    raw.update(dict.fromkeys(key_names(family, "activation"), "silu"))
    try:
        config, origin = read_published(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for field, value in fields.items():
        absent = field == "hidden_dim" and not value    # of a mixture without a dense layer
        if not field.endswith("_token_id") and not absent and getattr(config, field) != value:
            raise ValueError(f"{file}: {field} is {value!r}, a {family.architecture} has "
                             f"{getattr(config, field)!r}")
    return config, {**origin, **where}


def family_name(raw):
    """The key in FAMILIES of a published config. Raises ValueError."""
    model_type = raw.get("model_type")
    if isinstance(model_type, str):
        model_type = model_type.removeprefix("a2d-")    # dLLM's word for "opened": see ROLE_KEYS
    if model_type == "llada" and raw.get("num_experts"):        # the published LLaDA-MoE
        return "lladamoe"
    known = []
    for name, family in FAMILIES.items():
        spellings = family.spellings or (name,)
        if model_type == name or model_type == spellings[0]:
            return name
        known.append(spellings[0])
    raise ValueError(f"unknown model_type {raw.get('model_type')!r}; known are {', '.join(known)}")


def field_names():
    return [field.name for field in dataclasses.fields(Config)]


def key_names(family, field):
    """The keys that a family has for a field of Config: a tuple, often of one."""
    keys = family.keys[field]
    return (keys,) if isinstance(keys, str) else keys


def interpret(family, raw):
    """({Config field: value}, {Config field: where from}) of a published config, by the family's
    table. Raises ValueError."""
    check_only(family, raw)
    flat = flatten_rope(family, raw)
    values = dict(family.fixed)
    origin = dict.fromkeys(family.fixed, f"every {family.architecture}")
    for field in family.keys:
        value, origin[field] = look_up(family, flat, field)
        if field == "eos_token_id":                     # Llama 3 lists several
            tokens = read_ids(value, key_names(family, field)[-1])
            value = tokens[0] if tokens else None
            values["eos_token_ids"] = tokens if len(tokens) > 1 else None
            origin["eos_token_ids"] = origin[field]
        values[field] = translate(field, value)
    if "local_rope_theta" in family.keys and flat.get("local_rope_theta", 0) is None:
        values["local_rope_theta"] = values["rope_theta"]       # null: that of the global layers
        origin["local_rope_theta"] = "as rope_theta"
    read_experts(family, values)
    if family.offset and type(values["max_len"]) is type(values["pad_token_id"]) is int:
        values["position_offset"] = values["pad_token_id"] + 1
        origin["position_offset"] = "pad_token_id + 1"
        values["max_len"] -= values["position_offset"]
    if str(raw.get("model_type")).startswith("a2d-"):
        values["causal"] = False
        origin["causal"] = f"model_type = {raw['model_type']!r}"
    for field, key in ROLE_KEYS.items():
        if raw.get(key) is not None:
            values[field] = raw[key]
            origin[field] = f"{key} = {raw[key]!r}"
    return values, origin


def check_only(family, raw):
    """ValueError for a key whose value asks for what this transformer does not compute."""
    for key, allowed in {"quantization_config": (None,), **family.only}.items():
        if key in raw and raw[key] not in allowed:
            known = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"{key} = {raw[key]!r} is not supported (only {known})")


def look_up(family, flat, field):
    """(value, where from) of a Config field in a published config: the first of its keys that is
    there, else the family's default. Raises ValueError."""
    keys = key_names(family, field)
    for key in keys:
        if flat.get(key) is not None:
            return flat[key], f"{key} = {flat[key]!r}"
    may_lack = field.endswith("_token_id") or any(key in family.defaults for key in keys)
    if not may_lack:
        raise ValueError(f"{keys[-1]} is missing")
    return family.defaults.get(keys[0]), f"{keys[-1]} not given"


def translate(field, value):
    """A published value as Config has it. Raises ValueError."""
    if field.endswith("_token_id"):
        tokens = read_ids(value, field)
        if len(tokens) > 1:
            raise ValueError(f"{field} must be a token id, got {value!r}")
        return tokens[0] if tokens else None
    if field in ("activation", "head_activation"):
        return ACTIVATION_NAMES.get(value, value) if isinstance(value, str) else value
    if field == "rope_scaling":
        return check_rope_scaling(value)
    if field == "dense_layers":
        return value
    return 0 if value is None else value                # 0: Config derives it


def read_experts(family, values):
    """Turn what the families' keys say of experts in ways of their own into Config's. Raises
    ValueError."""
    key = family.keys.get("dense_layers")
    if key is None:
        return
    layers = values["dense_layers"]
    if key == "first_k_dense_replace":
        if type(layers) is not int or not 0 <= layers <= values["n_layers"]:
            raise ValueError(f"{key} must be a number of layers, got {layers!r}")
        layers = list(range(layers))
    elif not isinstance(layers or [], list):
        raise ValueError(f"{key} must be a list, got {layers!r}")
    if key == "moe_layer_freq" and layers:
        layers = [layer for layer, is_sparse in enumerate(layers) if not is_sparse]
    values["dense_layers"] = layers or None
    if family.keys["expert_dim"] == "moe_intermediate_size" and "shared_dim" in values:
        if type(values["shared_dim"]) is type(values["expert_dim"]) is int:
            values["shared_dim"] *= values["expert_dim"]        # num_shared_experts
    if family.keys.get("router_bias") and values["router_bias"] in (0, True, False):
        values["router_bias"] = "weight" if values["router_bias"] else "none"


def publish_experts(key, config, value):
    """The other way round: what a family's key says, where that is not Config's own value. Raises
    ValueError for what it cannot say."""
    layers = config.dense_layers or []
    if key == "first_k_dense_replace":
        if layers != list(range(len(layers))):
            raise ValueError(f"{key} cannot say dense_layers = {layers}: save_pretrained can write "
                             "this model")
        return len(layers)
    if key == "moe_layer_freq":
        return [int(layer not in layers) for layer in range(config.n_layers)]
    if key == "mlp_only_layers":
        return layers
    if key == "num_shared_experts":
        return value // config.expert_dim if config.expert_dim else 0
    if key == "moe_router_enable_expert_bias":
        return value == "weight"
    if key == "shared_expert_intermediate_size":
        return value or None
    return value


def read_ids(value, name):
    """The token ids, each once, in a config's value, a number or a list; None and -1 are none.
    Raises ValueError."""
    tokens = value if isinstance(value, list) and value else [value]
    tokens = [token for token in tokens if token is not None and token != -1]
    for token in tokens:
        if type(token) is not int or token < 0:
            raise ValueError(f"{name} must be a token id or a list of them, got {value!r}")
    return list(dict.fromkeys(tokens))


def generation_ends(folder):
    """The ends of text in a folder's generation_config.json; some checkpoints list them only
    there. Raises ValueError."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return []
    try:
        return read_ids(read_json(path).get("eos_token_id"), "eos_token_id")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --------------------------------------------------------------------------------------------------
# RoPE: transformers 4 and 5 spell its settings differently


def flatten_rope(family, raw):
    """A published config with what transformers 5 writes, `layer_types` and `rope_parameters`, as
    the older keys of the table.

    A config may spell a thing in both ways (see `spell_rope_twice`): then both must say the same,
    else ValueError.
    """
    flat = dict(raw)
    flatten_layer_types(family, flat)
    if "rope_theta" not in family.keys:
        return flat
    if isinstance(flat.get("rope_scaling"), dict):      # transformers 5 looks there
        put(flat, "rope_theta", flat["rope_scaling"].get("rope_theta"))
        put_rope_share(family, flat, flat["rope_scaling"])
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return flat
    for key, part in rope_parts(family, rope).items():
        put(flat, key, part.get("rope_theta"))
        put_rope_share(family, flat, part)
        named = part if "type" in part else {"rope_type": "default", **part}
        scaling = check_rope_scaling(named)
        if scaling is not None and "rope_scaling" not in family.keys:
            raise ValueError(f"rope_parameters = {rope!r} is not supported: "
                             f"a {family.architecture} does not scale its RoPE")
        flat["rope_scaling"] = check_rope_scaling(flat.get("rope_scaling"))
        put(flat, "rope_scaling", scaling)
    return flat


def put_rope_share(family, flat, part):
    """Set the partial_rotary_factor that a part of the RoPE settings holds. Raises ValueError."""
    share = part.get("partial_rotary_factor")
    if "rope_share" in family.keys:
        put(flat, "partial_rotary_factor", share)
    elif share not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor = {share!r} is not supported")


def put(flat, key, value):
    """Set a key that another spelling gave. ValueError if it is there with another value."""
    if value is None:
        return
    if flat.get(key) is not None and flat[key] != value:
        raise ValueError(f"{key} is {flat[key]!r}, but another key of this config says {value!r}")
    flat[key] = value


def flatten_layer_types(family, flat):
    """`layer_types` as `global_attn_every_n_layers`. ValueError for a pattern that this cannot
    say."""
    kinds = flat.get("layer_types")
    if not isinstance(kinds, list) or not kinds:
        return
    every = len(kinds)
    if "full_attention" in kinds[1:]:
        every = kinds.index("full_attention", 1)
    is_regular = kinds == layer_kinds(len(kinds), every)
    if not is_regular or every > 1 and "local_rope_theta" not in family.keys:
        raise ValueError("layer_types with this pattern of local layers are not supported")
    # Where only the first layer is global, several numbers say so.
    told = flat.get("global_attn_every_n_layers")
    is_told = type(told) is int and told >= 1 and kinds == layer_kinds(len(kinds), told)
    if not is_told:
        put(flat, "global_attn_every_n_layers", every)


def layer_kinds(n_layers, every):
    """transformers 5's `layer_types` where each `every`-th layer, from the first on, sees all."""
    return ["sliding_attention" if layer % every else "full_attention" for layer in range(n_layers)]


def rope_parts(family, rope):
    """{older key of theta: settings} of `rope_parameters`, one part or one each kind of layer.
    Raises ValueError."""
    by_kind = "local_rope_theta" in family.keys
    if ("full_attention" in rope or "sliding_attention" in rope) != by_kind:
        layers = "each kind of layer" if by_kind else "all layers"
        raise ValueError(f"rope_parameters = {rope!r} is not supported: a {family.architecture} "
                         f"has one RoPE for {layers}")
    parts = {"rope_theta": rope}
    if by_kind:
        parts = {"global_rope_theta": rope.get("full_attention"),
                 "local_rope_theta": rope.get("sliding_attention")}
    for key, part in parts.items():
        if part is None:
            parts[key] = {}
        elif not isinstance(part, dict):
            raise ValueError(f"rope_parameters = {rope!r} is not supported")
    return parts


def check_rope_scaling(scaling):
    """Config's rope_scaling from a published one: None, or the kind and the numbers that it needs.
    Raises ValueError."""
    if scaling is None or scaling is False:            # False: RND1
        return None
    needs = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings")}
    kind = repr(scaling)
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in list(needs):                         # a list: the kind may not be hashable
        raise ValueError(f"rope_scaling {kind!r} is not supported (only {', '.join(needs)})")
    for key in needs[kind]:
        value = scaling.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e18:
            raise ValueError(f"rope_scaling needs a positive {key}, got {value!r}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("rope_scaling needs low_freq_factor < high_freq_factor")
    if kind == "default":
        return None
    return {"rope_type": kind, **{key: scaling[key] for key in needs[kind]}}


def spell_rope_twice(family, raw, config):
    """Where a published config has the keys of transformers 5, write them anew, and those of
    transformers 4 beside them.

    transformers 4 does not know `rope_parameters` and would silently take a rope_theta of 10000.
    """
    if isinstance(raw.get("layer_types"), list):
        every = config.global_every if config.local_window else 1
        raw["layer_types"] = layer_kinds(config.n_layers, every)
        if "global_every" in family.keys:
            raw["global_attn_every_n_layers"] = config.global_every
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in family.keys:
        return
    if "local_rope_theta" in family.keys:
        raw["global_rope_theta"] = config.rope_theta
        raw["local_rope_theta"] = config.local_rope_theta
        raw["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta}}
        return
    raw["rope_theta"] = config.rope_theta
    scaling = config.rope_scaling or {"rope_type": "default"}
    raw["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    if "partial_rotary_factor" in rope:
        raw["rope_parameters"]["partial_rotary_factor"] = config.rope_share
    if "rope_scaling" in family.keys:
        raw["rope_scaling"] = config.rope_scaling


# --------------------------------------------------------------------------------------------------
# Write


def publish_config(config, dtype):
    """The published config.json of a model: the one it was read from, changed where the model was.
    ValueError if none fits."""
    family = FAMILIES[config.family]
    raw = dict(config.published or {})
    before = Config(**interpret(family, raw)[0]) if raw else None
    raw.setdefault("architectures", [family.architecture])
    name = "qwen3" if config.family == "unmask" else config.family
    raw.setdefault("model_type", (family.spellings or (name,))[0])
    known = [key for key in ("dtype", "torch_dtype") if key in raw]
    for key in known or ["torch_dtype"]:
        raw[key] = str(dtype).removeprefix("torch.")
    write_fields(family, raw, config, before)
    spell_rope_twice(family, raw, config)
    write_roles(family, raw, config)
    return raw


def write_fields(family, raw, config, before):
    """Write into `raw` what differs from `before`, the Config that was read from it; None: all."""
    for field in family.keys:
        value = getattr(config, field)
        changed = before is None or value != getattr(before, field)
        if field == "eos_token_id":
            changed = before is None or config.ends != before.ends
            if len(config.ends) > 1:
                value = list(config.ends)
        if value == "gelu_tanh":
            value = "gelu_new"
        if field == "max_len":
            value += config.position_offset
        for key in key_names(family, field):
            if changed:
                raw[key] = publish_experts(key, config, value)


def write_roles(family, raw, config):
    """Compare what a reader of `raw` will understand with the config: ROLE_KEYS say what else is to
    be said. ValueError for a difference that they cannot."""
    after = Config(**interpret(family, raw)[0])
    for field in field_names():
        value = getattr(config, field)
        # The list of ends may be that of a former eos_token_id.
        same_ends = field in ("eos_token_id", "eos_token_ids") and config.ends == after.ends
        no_matter = field in ("family", "published") or field == "shift" and config.causal
        if value == getattr(after, field) or same_ends or no_matter:
            continue
        if field not in ROLE_KEYS:
            raise ValueError(f"a {family.architecture} cannot have {field} = {value!r}: "
                             "save_pretrained can write this model")
        raw[ROLE_KEYS[field]] = value
