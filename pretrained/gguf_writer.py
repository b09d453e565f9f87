"""A Transformer becomes a GGUF, the file that llama.cpp, LM Studio and Ollama load.

The reverse of gguf.py: its tables of names and keys are read the other way round. What a file of an
architecture cannot say is refused, and found by reading: `check_readable` asks gguf.py what it
would make of the header before any weight is written. How numbers are packed is the business of
the package `gguf`.
"""
import warnings
from pathlib import Path

import numpy as np
import torch

from common import write_atomically
from config import Config
from pretrained import gguf
from pretrained.config import config_of_header
from pretrained.gguf_tokenizer import describe_tokenizer
from pretrained.tensors import tensor_table
from pretrained.tokenizer_files import read_tokenizer

# What `gguf` of export may say -> (type of the matrices, name in gguf.LlamaFileType)
KINDS = {"f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
         "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "f32": ("F32", "ALL_F32")}
# Family -> architecture, as gguf.ARCHITECTURES has it; our own models are Qwen3's, as in export.
ARCHITECTURES = {family: name for name, family in gguf.ARCHITECTURES.items()} | {"unmask": "qwen3"}
# Those whose models always see in both directions. llama.cpp reads the key in the others' files,
# too, or ignores it, by its version.
DIFFUSION = ("llada", "dream", "llada-moe")


def check_kind(kind):
    """The key of KINDS that `gguf` of `Transformer.export_pretrained` means. Raises ValueError."""
    kind = "f16" if kind is True else kind
    if kind not in KINDS:
        raise ValueError(f"gguf must be True, False or one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def write_gguf(model, folder, kind):
    """Write `folder`/model-KIND.gguf and return its path. kind: a key of KINDS.

    Vectors and routers are float32, matrices what `kind` says; in q8_0 those whose rows are no
    whole number of 32 are float16, as in llama.cpp's files. The tokenizer is that of `folder`, or
    of what the model was loaded from; without one that can be written the file has none, and a
    warning says why. Raises ValueError for a model that no file can hold, OSError.
    """
    config, folder = model.config, Path(folder)
    if config.family not in ARCHITECTURES:
        known = ", ".join(sorted(family for family in ARCHITECTURES if family != "unmask"))
        raise ValueError(f"no GGUF can hold a {config.family} model: llama.cpp has no architecture "
                         f"for it that is known here (only for {known})")
    architecture = ARCHITECTURES[config.family]
    tensors = named_tensors(model)
    check_size_of_numbers(model, tensors, kind)
    metadata = {"general.architecture": architecture, **describe_model(config, architecture)}
    stretch = rope_factors(config)
    check_readable(config, metadata, tensors, stretch)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model-{kind}.gguf"
    # The tokenizer knows special tokens by name, the model by id: where both speak, the model.
    metadata = {**find_tokenizer(model, folder, architecture), **metadata}
    write_atomically(path, lambda name: write_file(model, name, metadata, tensors, stretch, kind))
    return path


# --------------------------------------------------------------------------------------------------
# What a file says


def named_tensors(model):
    """{name in the file: our parameter's name}. ValueError for a parameter without a name."""
    names, left = {}, set(model.state_dict())
    if model.config.tie_embeddings:
        left.discard("head.weight")
    for theirs, ours, _ in tensor_table(model, gguf.TENSORS):
        if ours[0] in left:
            names[theirs] = ours[0]
            left.discard(ours[0])
    if left:
        raise ValueError(f"no GGUF can hold this {model.config.family} model: there is no name in "
                         f"it for {min(left)}")
    return names


def describe_model(config, architecture):
    """{key: value} of the metadata of a model, but for its tokenizer."""
    keys = dict(gguf.KEYS)
    if architecture in gguf.MIXTURES:
        keys |= gguf.MIXTURE_KEYS
    metadata = {f"{architecture}.{key}": getattr(config, field) for field, key in keys.items()}
    for key in ("attention.value_length", "rope.dimension_count"):
        metadata[f"{architecture}.{key}"] = config.head_dim
    if architecture in DIFFUSION or not config.causal:
        metadata[f"{architecture}.attention.causal"] = config.causal
        metadata["diffusion.shift_logits"] = config.shift
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        metadata[f"{architecture}.rope.scaling.type"] = "linear"
        metadata[f"{architecture}.rope.scaling.factor"] = float(scaling["factor"])
    for field, key in gguf.TOKEN_IDS.items():
        if getattr(config, field) is not None:
            metadata[key] = getattr(config, field)
    if len(config.ends) > len(gguf.ENDS):
        raise ValueError(f"a GGUF has room for {len(gguf.ENDS)} ends of text, this model has "
                         f"{len(config.ends)}")
    metadata |= zip(gguf.ENDS, config.ends)
    return metadata


def check_size_of_numbers(model, tensors, kind):
    """ValueError for a number beyond float16, which the scales of q8_0 are as well."""
    parameters = model.state_dict()
    for name, ours in tensors.items():
        is_small = kind_of(name, parameters[ours].shape, kind) in ("F16", "Q8_0")
        if is_small and parameters[ours].abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"{ours} holds a number that float16 cannot: take gguf='bf16'")


def rope_factors(config):
    """What Llama 3's frequencies are divided by, float32 [C/2]; None: its RoPE is not stretched
    so."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "llama3":
        return None
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    C = config.head_dim
    frequency = config.rope_theta ** (-np.arange(0, C, 2) / C)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    ramp = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (ramp + (1 - ramp) / scaling["factor"])).astype(np.float32)


def check_readable(config, metadata, tensors, stretch):
    """ValueError unless a reader of this header gets `config` back."""
    infos = {name: gguf.Tensor(None, (), "F32", 0, 0) for name in tensors}
    if stretch is not None:
        infos[gguf.ROPE_FACTORS] = gguf.Tensor(None, stretch.shape, "F32", 0, 0, stretch)
    header = gguf.Header(Path("the GGUF"), dict(metadata), infos)
    after, _ = config_of_header(header)
    for field in Config.__dataclass_fields__:
        no_matter = field in ("family", "published", "eos_token_ids")
        no_matter = no_matter or field == "shift" and config.causal
        # None of the layers is dense: said by an empty list, or not at all.
        wanted, found = getattr(config, field) or None, getattr(after, field) or None
        if not no_matter and wanted != found:
            raise ValueError(f"no GGUF of the architecture {header.architecture} can say that "
                             f"{field} is {wanted!r} (a reader would take {found!r})")


def find_tokenizer(model, folder, architecture):
    """The tokenizer's metadata, of the folder that is written to or of the model's source; {} with
    a warning where there is none."""
    source = getattr(model, "source", None)
    try:
        for place in (folder, source):
            if place is not None and gguf.is_gguf(place):
                known = gguf.read_whole_header(place).metadata
                return {key: value for key, value in known.items() if key.startswith("tokenizer.")}
            if place is not None and (place / "tokenizer.json").exists():
                found = read_tokenizer(place)
                return describe_tokenizer(found.backend, found.roles, found.templates,
                                          model.config.vocab_size, architecture)
        reason = "neither the folder nor the model's source has one"
    except ValueError as error:
        reason = str(error)
    warnings.warn(f"the GGUF gets no tokenizer, and llama.cpp will not run it: {reason}",
                  stacklevel=4)
    return {}


# --------------------------------------------------------------------------------------------------
# The file


def write_file(model, path, metadata, tensors, stretch, kind):
    """Write header and weights, one tensor in memory at a time."""
    library = gguf.library()
    writer = library.GGUFWriter(path, metadata["general.architecture"])
    writer.add_file_type(getattr(library.LlamaFileType, KINDS[kind][1]))
    for key, value in metadata.items():
        if key != "general.architecture":               # the writer has it already
            add_value(library, writer, key, value)
    if stretch is not None:
        writer.add_tensor_info(gguf.ROPE_FACTORS, stretch.shape, stretch.dtype, stretch.nbytes)
    parameters = model.state_dict()
    for name, ours in tensors.items():
        shape, packed = parameters[ours].shape, kind_of(name, parameters[ours].shape, kind)
        number = library.GGMLQuantizationType[packed]
        size, size_bytes = library.GGML_QUANT_SIZES[number]
        num_bytes = shape.numel() // size * size_bytes
        writer.add_tensor_info(name, shape, np.dtype("float32"), num_bytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if stretch is not None:
        writer.write_tensor_data(stretch)
    for name, ours in tensors.items():
        packed = kind_of(name, parameters[ours].shape, kind)
        writer.write_tensor_data(pack(model.config, name, parameters[ours], packed))
    writer.close()


def kind_of(name, shape, kind):
    """The type in which a tensor is stored. Routers choose between experts of like scores: they
    stay float32."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    packed = KINDS[kind][0]
    if packed == "Q8_0" and shape[-1] % 32:
        return "F16"
    return packed


def pack(config, name, tensor, packed):
    """A parameter as the bytes of its type, its rows in the file's order."""
    library = gguf.library()
    values = tensor.detach().cpu().to(torch.float32).numpy()
    heads = {}
    if ARCHITECTURES[config.family] in gguf.INTERLEAVED:
        heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    order = gguf.interleaved_order(heads, name, len(values))
    if order is not None:
        in_file = np.empty_like(values)
        in_file[order] = values
        values = in_file
    return library.quants.quantize(values, library.GGMLQuantizationType[packed])


def add_value(library, writer, key, value):
    """Add an entry, of the type that llama.cpp's converter gives it."""
    kinds = library.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
        writer.add_key_value(key, value, types[type(value)])
