"""GGUF, the files of llama.cpp, LM Studio and Ollama: the sizes of a model, its tokenizer and its
tensors, mostly quantised, in one file.

`read_header` says what a file holds, `config_fields` what that means for `Config`, and `read_rows`
gives rows of a tensor as the numbers that they stand for. Which types of tensors there are and how
each is undone is the business of the package `gguf`, ggml's own. Its reader is not used: it
believes every length that a file claims, and takes 8 seconds for what takes 0.4 here.

The layout is described in ggml's docs/gguf.md: magic, version, the number of tensors and of
metadata entries; the entries; name, shape, type and place of each tensor; and, aligned, their data.
"""
import functools
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)                   # version 1 has other lengths, and no file in use
LONGEST = 2**26                     # bytes of a text, entries of a list: real ones are shorter
TEXT, LIST = 8, 9                   # kinds of metadata; the others are these numbers:
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}

# general.architecture -> a key of FAMILIES
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "llada": "llada",
                 "dream": "Dream", "llada-moe": "lladamoe"}
MIXTURES = ("llada-moe",)           # architectures with experts
# llama.cpp rotates neighbours, (x_2j, x_2j+1), in these; its converter puts the rows of q and k in
# that order. Here all rotate (x_j, x_j+C/2).
INTERLEAVED = ("llama", "llada")

# Our module -> its name in a GGUF, of whatever architecture.
TENSORS = {
    "embed": "token_embd",
    "blocks.*.attn_norm": "blk.*.attn_norm",
    "blocks.*.attn.q": "blk.*.attn_q",
    "blocks.*.attn.k": "blk.*.attn_k",
    "blocks.*.attn.v": "blk.*.attn_v",
    "blocks.*.attn.o": "blk.*.attn_output",
    "blocks.*.attn.q_norm": "blk.*.attn_q_norm",
    "blocks.*.attn.k_norm": "blk.*.attn_k_norm",
    "blocks.*.mlp_norm": "blk.*.ffn_norm",
    "blocks.*.mlp.gate": "blk.*.ffn_gate",
    "blocks.*.mlp.up": "blk.*.ffn_up",
    "blocks.*.mlp.down": "blk.*.ffn_down",
    "blocks.*.mlp.router": "blk.*.ffn_gate_inp",
    "blocks.*.mlp.gates": "blk.*.ffn_gate_exps",        # all experts in one tensor, as with us
    "blocks.*.mlp.ups": "blk.*.ffn_up_exps",
    "blocks.*.mlp.downs": "blk.*.ffn_down_exps",
    "norm": "output_norm",
    "head": "output",
}
HEAD = "output.weight"
Q_NORM = "blk.0.attn_q_norm.weight"
ROPE_FACTORS = "rope_freqs.weight"  # no weights: how Llama 3 stretches its RoPE

# Config field -> key of the metadata, after the name of the architecture.
KEYS = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "max_len": "context_length",
    "vocab_size": "vocab_size",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
# The same of architectures in MIXTURES alone.
MIXTURE_KEYS = {
    "n_experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "expert_dim": "expert_feed_forward_length",
}
# Keys that are read elsewhere, and keys that change no number here.
OTHER_KEYS = {
    "attention.causal", "attention.value_length", "attention.sliding_window",
    "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "pooling_type",
    "tensor_data_layout",
}
# Config field -> key of a special token's id
TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "mask_token_id": "tokenizer.ggml.mask_token_id",
}
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


# --------------------------------------------------------------------------------------------------
# The header


@dataclass
class Tensor:
    """A tensor in a file, known from its header."""
    file: Path
    shape: tuple            # as torch has it: the file lists the sizes in reverse
    kind: str               # "F32", "Q4_1": a name in gguf.GGMLQuantizationType
    offset: int             # of its first byte in the file
    row_bytes: int          # of shape[-1] numbers
    values: np.ndarray = None   # of a tensor that is not written yet


@dataclass
class Header:
    """What a file says of itself."""
    file: Path
    metadata: dict          # {"llama.block_count": 30, "tokenizer.ggml.tokens": [...], ...}
    tensors: dict           # {name: Tensor}

    @property
    def architecture(self):
        return self.metadata.get("general.architecture")


def is_gguf(path):
    """Whether a file is a GGUF by its name, or by its first bytes (Ollama's have no name)."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def parts_of(file):
    """All files of a GGUF that was split, of which `file` is one: model-00001-of-00003.gguf and so
    on. Raises FileNotFoundError for a missing one."""
    file = Path(file)
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", file.name)
    if match is None:
        return [file]
    stem, count = match.groups()
    parts = [file.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    if file not in parts:
        return [file]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"{file} is one of {int(count)} parts, and {part.name} is "
                                    "missing beside it")
    return parts


def read_header(file):
    """The Header of a file. Raises ValueError for whatever is wrong with it, before anything of a
    claimed size is made."""
    file = Path(file)
    status = file.stat()
    return parse_header(file, status.st_size, status.st_mtime_ns)


def read_whole_header(file):
    """The Header of a model: the metadata of its first part and the tensors of all."""
    parts = [read_header(part) for part in parts_of(file)]
    tensors = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise ValueError(f"{part.file} is damaged: the tensor {name!r} is in another part, "
                                 "too")
            tensors[name] = tensor
    return Header(parts[0].file, parts[0].metadata, tensors)


@functools.lru_cache(maxsize=16)             # a tokenizer of 150,000 tokens takes a second
def parse_header(file, size, changed):
    """`read_header` of a file of `size` bytes that was last changed at the time `changed`."""
    if size < 24:
        raise ValueError(f"{file} is truncated or no GGUF: it has {size} bytes")
    with open(file, "rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = Cursor(file, data)
            check_version(cursor)
            num_tensors, num_entries = cursor.number("Q"), cursor.number("Q")
            metadata = read_metadata(cursor, num_entries)
            infos = read_infos(cursor, num_tensors)
            tensors = place_tensors(cursor, infos, metadata.get("general.alignment", 32))
    return Header(file, metadata, tensors)


class Cursor:
    """Takes numbers and texts from a file's beginning, one after the other. Everything is little
    endian. ValueError where the file ends."""

    def __init__(self, file, data):
        self.file, self.data, self.position = file, data, 0

    def take(self, count):
        end = self.position + count
        if end > len(self.data):
            raise ValueError(f"{self.file} is truncated: it ends at byte {len(self.data)}, its "
                             f"header goes on to {end} or further")
        piece = self.data[self.position:end]
        self.position = end
        return piece

    def number(self, code):
        """A number of the kind that `struct` calls `code`."""
        value = struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]
        if code == "f":                     # 1e-05, and not the double nearest to that float
            value = float(str(np.float32(value)))
        return value

    def text(self):
        return self.texts(1)[0]

    def texts(self, count):
        """So many texts. A tokenizer has some 100,000, which is why nothing is called for each."""
        data, position, unpack = self.data, self.position, struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + unpack(data, position)[0]
                if position > min(len(data), begin + LONGEST):
                    raise struct.error
                found.append(data[begin:position].decode("utf-8"))
        except struct.error:                            # a length that cannot be
            raise ValueError(f"{self.file} is truncated or damaged: it has {len(data)} bytes, and "
                             f"its header goes on to {position}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{self.file} is damaged: the text at byte {begin} is not "
                             "UTF-8") from None
        self.position = position
        return found

    def value(self, kind):
        """A metadata value of a kind in NUMBERS, TEXT or LIST."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            return self.list()
        raise ValueError(f"{self.file} is damaged: metadata of the unknown kind {kind} at byte "
                         f"{self.position}")

    def list(self):
        kind, count = self.number("I"), self.number("Q")
        if count > LONGEST:
            raise ValueError(f"{self.file} is damaged: it claims a list of {count} entries at byte "
                             f"{self.position}")
        if kind == TEXT:
            return self.texts(count)
        if kind not in NUMBERS:
            raise ValueError(f"{self.file} is damaged: a list of the unknown kind {kind} at byte "
                             f"{self.position}")
        code = NUMBERS[kind]
        raw = self.take(count * struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", raw))


def check_version(cursor):
    """ValueError for another magic, another version, or a big-endian file."""
    magic, version = cursor.take(len(MAGIC)), cursor.number("I")
    if magic != MAGIC:
        raise ValueError(f"{cursor.file} is no GGUF: it begins with {magic!r}")
    if version in VERSIONS:
        return
    known = " and ".join(map(str, VERSIONS))
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise ValueError(f"{cursor.file} is a big-endian GGUF, which is not read: convert it with "
                         "llama.cpp's gguf_convert_endian.py")
    raise ValueError(f"{cursor.file} is a GGUF of version {version}; read are {known}")


def read_metadata(cursor, count):
    """{key: value} of so many entries."""
    metadata = {}
    for _ in range(count):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{cursor.file} is damaged: it has the metadata {key!r} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata


def read_infos(cursor, count):
    """{name: (shape, type number, offset in the data)} of so many tensors."""
    infos = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in infos:
            raise ValueError(f"{cursor.file} is damaged: it has the tensor {name!r} twice")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{cursor.file} is damaged: the tensor {name!r} has {dimensions} "
                             "dimensions")
        sizes = [cursor.number("Q") for _ in range(dimensions)]
        infos[name] = tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")
    return infos


def place_tensors(cursor, infos, alignment):
    """{name: Tensor} of `read_infos`, whose data begins after the cursor. ValueError for a tensor
    that does not lie within the file."""
    file, size = cursor.file, len(cursor.data)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise ValueError(f"{file} is damaged: general.alignment is {alignment!r}")
    begin = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, (shape, number, offset) in infos.items():
        kind, block, block_bytes = quantization(file, name, number)
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"{file} is damaged: the tensor {name} of shape {list(shape)} is no "
                             f"number of {kind} blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        end = begin + offset + math.prod(shape[:-1]) * row_bytes
        if end > size:
            raise ValueError(f"{file} is truncated: it has {size} bytes, and the tensor {name} of "
                             f"shape {list(shape)} ends at byte {end}")
        tensors[name] = Tensor(file, shape, kind, begin + offset, row_bytes)
    return tensors


# --------------------------------------------------------------------------------------------------
# Weights


def library():
    """The package `gguf`. ModuleNotFoundError that says what to do."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a GGUF is read with the package gguf: pip install "
                                  "gguf") from None
    return gguf


def quantization(file, name, number):
    """(name, numbers a block, bytes a block) of the type of the tensor `name`, by its number."""
    gguf = library()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{file}: the tensor {name} is of the type number {number}, which the "
                         "installed package gguf does not know") from None
    return kind.name, *gguf.GGML_QUANT_SIZES[kind]


@functools.cache
def can_be_undone(kind):
    """Whether the package gives the numbers of a type of tensor."""
    gguf = library()
    kind = gguf.GGMLQuantizationType[kind]
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    try:
        gguf.quants.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def stored_tensors(file):
    """{name: (shape, dtype as safetensors spells it)} of the weights in a file. What is quantised
    counts as F32, which holds its numbers exactly. Raises ValueError for what cannot be undone."""
    stored = {}
    for name, tensor in read_header(file).tensors.items():
        if name == ROPE_FACTORS:            # `rope_scaling` has read it
            continue
        if not can_be_undone(tensor.kind):
            raise ValueError(f"{file}: the tensor {name} is stored as {tensor.kind}, which the "
                             "package gguf cannot turn into numbers")
        plain = tensor.kind in ("F16", "BF16")
        stored[name] = tensor.shape, tensor.kind if plain else "F32"
    return stored


def read_rows(file, name, first, last):
    """Rows first to last - 1 of a tensor, float32, in the order that `Attention` expects."""
    tensor = read_header(file).tensors[name]
    order = row_order(read_header(parts_of(file)[0]), name, tensor.shape[0])
    if len(tensor.shape) == 1:
        values = read_stored_rows(tensor, 0, 1).flatten()
        if order is not None:
            values = values[order]
        return torch.from_numpy(values[first:last])
    if order is None:
        return torch.from_numpy(read_stored_rows(tensor, first, last))
    places = order[first:last]              # where in the file these rows stand: within their heads
    begin, end = places.min(), places.max() + 1
    return torch.from_numpy(read_stored_rows(tensor, begin, end)[places - begin])


def read_stored_rows(tensor, first, last):
    """Rows as they stand in the file, float32 [last - first, ...]; a vector is one row."""
    gguf = library()
    inner = tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape
    num_bytes = math.prod(inner[:-1]) * tensor.row_bytes
    with open(tensor.file, "rb") as opened:
        opened.seek(tensor.offset + first * num_bytes)
        raw = opened.read((last - first) * num_bytes)
    kind = gguf.GGMLQuantizationType[tensor.kind]
    size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.frombuffer(raw, dtype=np.uint8).reshape(-1, size_bytes)
    values = np.empty((len(blocks), size), dtype=np.float32)
    # The package goes through its rows 16 by 16: one long row at a time is 3 times as fast.
    step = 2**18 // size
    for begin in range(0, len(blocks), step):
        piece = blocks[begin:begin + step]
        values[begin:begin + step] = gguf.quants.dequantize(piece.reshape(1, -1), kind).reshape(
            len(piece), size)
    return values.reshape(last - first, *inner)


def row_order(header, name, num_rows):
    """Where in the file the rows of a tensor stand, int [rows]; None: in our order. header: of the
    first file, where there are several parts: it alone has the metadata.

    The converter writes head h's rows (x_0, x_C/2, x_1, x_C/2+1, ...) for us to read back as
    (x_0, x_1, ..., x_C/2, ...). Without it nothing fails, and the model talks nonsense.
    """
    heads = {}
    if header.architecture in INTERLEAVED:
        heads = {"attn_q": look_up(header, "n_heads"), "attn_k": look_up(header, "n_kv_heads")}
    return interleaved_order(heads, name, num_rows)


def interleaved_order(heads, name, num_rows):
    """`row_order`, given the heads of "attn_q" and "attn_k" where they are interleaved."""
    part = name.split(".")[-2]
    if part not in heads:
        return None
    return np.arange(num_rows).reshape(heads[part], -1, 2).swapaxes(1, 2).reshape(-1)


# --------------------------------------------------------------------------------------------------
# What the metadata mean for Config


def family_of(header):
    """The key of FAMILIES. Raises ValueError."""
    architecture = header.architecture
    if architecture not in list(ARCHITECTURES):         # a list: it may be of another type
        raise ValueError(f"{header.file} is of the architecture {architecture!r}; known are "
                         f"{', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]


def config_fields(header):
    """({Config field: value}, {Config field: where from}) of a file. Raises ValueError."""
    check_keys(header)
    fields, origin = {}, {}
    keys = KEYS
    if header.architecture in MIXTURES:
        keys = KEYS | MIXTURE_KEYS
    for field, key in keys.items():
        fields[field] = look_up(header, field)
        key = f"{header.architecture}.{key}"
        origin[field] = f"{key} not given"
        if key in header.metadata:
            origin[field] = f"{key} = {fields[field]!r}"
    check_heads(header, fields)
    fields["rope_scaling"] = rope_scaling(header, fields)
    origin["rope_scaling"] = "the metadata" if ROPE_FACTORS not in header.tensors else ROPE_FACTORS
    for field, name in {"qkv_bias": "blk.0.attn_q.bias", "out_bias": "blk.0.attn_output.bias",
                        "mlp_bias": "blk.0.ffn_gate.bias"}.items():
        fields[field] = name in header.tensors
        origin[field] = f"{name} is {'here' if fields[field] else 'not here'}"
    if header.architecture in MIXTURES:
        fields["qk_norm"] = Q_NORM in header.tensors
        origin["qk_norm"] = f"{Q_NORM} is {'here' if fields['qk_norm'] else 'not here'}"
    fields["tie_embeddings"] = HEAD not in header.tensors
    origin["tie_embeddings"] = f"{HEAD} is {'not here' if fields['tie_embeddings'] else 'here'}"
    for field, key in {"causal": f"{header.architecture}.attention.causal",
                       "shift": "diffusion.shift_logits", **TOKEN_IDS}.items():
        if key in header.metadata:
            fields[field] = header.metadata[key]
            origin[field] = f"{key} = {fields[field]!r}"
    ends = [header.metadata[key] for key in ENDS if key in header.metadata]
    fields["eos_token_id"] = ends or None
    origin["eos_token_id"] = f"{ENDS[0]} and its like = {ends}"
    return fields, origin


def check_keys(header):
    """ValueError for metadata that ask for what is not known here."""
    prefix = f"{header.architecture}."
    known = {*KEYS.values(), *OTHER_KEYS}
    if header.architecture in MIXTURES:
        known |= {*MIXTURE_KEYS.values()}
    for key, value in header.metadata.items():
        if key.startswith(prefix) and key.removeprefix(prefix) not in known and value != 0:
            raise ValueError(f"{header.file}: {key} = {value!r} is not supported")


def look_up(header, field):
    """The value of a Config field, or what stands for it where it is not given. Raises
    ValueError."""
    key = f"{header.architecture}.{(KEYS | MIXTURE_KEYS)[field]}"
    value = header.metadata.get(key)
    if isinstance(value, list):             # one number a layer
        if len(set(value)) != 1:
            raise ValueError(f"{header.file}: {key} differs from layer to layer, which is not "
                             "supported")
        value = value[0]
    if value is not None:
        check_number(header, key, value)
        if field in ("n_heads", "n_kv_heads") and (type(value) is not int or value < 1):
            raise ValueError(f"{header.file}: {key} must be a whole number, got {value!r}")
        return value
    if field == "n_kv_heads":
        return look_up(header, "n_heads")
    if field == "rope_theta":
        return 10000.0
    if field == "vocab_size":
        return len(header.metadata.get("tokenizer.ggml.tokens", []))
    if field == "hidden_dim" and header.architecture in MIXTURES:
        return 0                            # no layer is dense
    if field == "head_dim":
        dim, heads = look_up(header, "dim"), look_up(header, "n_heads")
        return dim // heads
    raise ValueError(f"{header.file} lacks the metadata {key}")


def check_number(header, key, value):
    """The value, if it is a number. Raises ValueError."""
    if type(value) not in (int, float):
        raise ValueError(f"{header.file}: {key} must be a number, got {value!r:.80}")
    return value


def check_heads(header, fields):
    """ValueError for attention of another kind: values longer than keys, a RoPE of some dimensions,
    a window."""
    prefix = f"{header.architecture}."
    for key in ("attention.value_length", "rope.dimension_count"):
        value = header.metadata.get(prefix + key, fields["head_dim"])
        if value != fields["head_dim"]:
            raise ValueError(f"{header.file}: {prefix}{key} = {value!r} is not supported, only "
                             f"the head size, {fields['head_dim']}")
    window = f"{prefix}attention.sliding_window"
    size = check_number(header, window, header.metadata.get(window, 0))
    if 0 < size < fields["max_len"]:
        raise ValueError(f"{header.file}: {window} = {size!r} is not supported")


def rope_scaling(header, fields):
    """What stretches the RoPE, as config.json has it; None: nothing does. Raises ValueError."""
    prefix = f"{header.architecture}.rope."
    kind = header.metadata.get(f"{prefix}scaling.type", "linear")
    factor = header.metadata.get(f"{prefix}scaling.factor")
    if factor is None:
        factor = header.metadata.get(f"{prefix}scale_linear", 1.0)
    if ROPE_FACTORS in header.tensors:
        return llama3_scaling(header, fields)
    if kind == "none" or kind == "linear" and factor in (0, 1):
        return None
    return {"rope_type": kind, "factor": factor}


def llama3_scaling(header, fields):
    """The "llama3" scaling that a table of factors, one a frequency, was made of. All published
    ones have the same bounds and differ in `factor`. ValueError for any other table."""
    C, tensor = fields["head_dim"], header.tensors[ROPE_FACTORS]
    other = f"{header.file}: {ROPE_FACTORS} is not the table of Llama 3, which alone is supported"
    if tensor.shape != (C // 2,) or tensor.kind != "F32":
        raise ValueError(other)
    found = tensor.values
    if found is None:
        found = read_stored_rows(tensor, 0, 1)[0]
    found = found.astype(np.float64)
    if (found == 1).all():
        return None
    scaling = {"rope_type": "llama3", "factor": float(f"{found.max():.6g}"),
               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    frequency = fields["rope_theta"] ** (-np.arange(0, C, 2) / C)
    ramp = np.clip((8192 * frequency / (2 * math.pi) - 1.0) / (4.0 - 1.0), 0, 1)
    wanted = 1 / (ramp + (1 - ramp) / scaling["factor"])
    if not np.allclose(found, wanted, rtol=1e-4, atol=0):
        raise ValueError(other)
    return scaling


# --------------------------------------------------------------------------------------------------


def describe(file):
    """How a file's tensors are stored: "0.098 GB, Q4_1 (210 tensors), F32 (61), Q8_0 (1)"."""
    header = read_whole_header(file)
    kinds = [tensor.kind for tensor in header.tensors.values()]
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds), key=kinds.count, reverse=True)}
    parts = [f"{kind} ({count})" for kind, count in counts.items()]
    size = sum(part.stat().st_size for part in parts_of(file))
    return f"{size / 1e9:.3f} GB: tensors of {', '.join(parts)}"
