"""Tensors in .safetensors files and in models, some of which are sharded over processes (FSDP2)."""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from common import rank_and_size
from pretrained import gguf
from pretrained.families import FAMILIES

# safetensors' spelling of the types that are read.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# --------------------------------------------------------------------------------------------------
# In files, .safetensors and GGUF


@dataclass
class Stored:
    """A tensor in a file, known from its header."""
    file: Path
    shape: tuple
    dtype: str              # as safetensors spells it, see DTYPES


def open_tensors(file):
    """A .safetensors file, opened: a context. Raises ValueError."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error})") from None


def read_headers(files):
    """{tensor name: Stored} of some files; no weights are read. Raises ValueError."""
    stored = {}
    for file in files:
        if gguf.is_gguf(file):
            for name, (shape, dtype) in gguf.stored_tensors(file).items():
                stored[name] = Stored(file, shape, dtype)
            continue
        with open_tensors(file) as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                stored[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
    return stored


def read_rows(file, name, shape, first, last):
    """Yields (rows as a slice that counts from `first`, their values) of rows first to last - 1 of
    a tensor, 4 million numbers at a time. The file is mapped anew each time: no page of it outlives
    its copying."""
    step = max(1, 2**22 * shape[0] // max(1, math.prod(shape)))
    for begin in range(first, last, step):
        end = min(begin + step, last)
        rows = slice(begin - first, end - first)
        if gguf.is_gguf(file):
            yield rows, gguf.read_rows(file, name, begin, end)
            continue
        with open_tensors(file) as tensors:
            yield rows, tensors.get_slice(name)[begin:end]


# --------------------------------------------------------------------------------------------------
# In models


def tensor_table(model, names=None):
    """[(published name, our parameters, stored transposed)]: the family's table, or another one of
    its form, `names`, written out for every layer and expert of this model. The matrix of an expert
    is a slice of a parameter of ours: "blocks.1.mlp.gates.weight.3", see `stack_of`."""
    if names is None:
        names = FAMILIES[model.config.family].tensors
    parameters = model.state_dict(keep_vars=True)
    table = []
    for ours, theirs in names.items():
        ours = (ours,) if isinstance(ours, str) else ours
        transposed = theirs.endswith(" ^T")
        theirs = theirs.removesuffix(" ^T")
        layers = range(model.config.n_layers) if "*" in theirs else [0]
        for layer in map(str, layers):
            name = theirs.replace("*", layer, 1)
            own = [our.replace("*", layer) for our in ours]
            for suffix in ("", ".weight", ".bias"):     # "": the table has the name in full
                if own[0] + suffix not in parameters:
                    continue
                parts = [our + suffix for our in own]
                if "*" in name:
                    for expert in map(str, range(model.config.n_experts)):
                        table.append((name.replace("*", expert) + suffix, [f"{parts[0]}.{expert}"],
                                      False))
                else:
                    table.append((name + suffix, parts, transposed and suffix == ".weight"))
    return table


def stack_of(our):
    """("blocks.1.mlp.gates.weight", 3) of "blocks.1.mlp.gates.weight.3", the matrix of an expert;
    (our, None) of a whole parameter."""
    name, _, last = our.rpartition(".")
    return (name, int(last)) if last.isdecimal() else (our, None)


def is_head(ours):
    """Whether these of our modules or parameters turn a position's last vector into logits."""
    return ours[0].split(".")[0] in ("head", "head_dense", "head_norm")


def own_rows(parameter):
    """(first, last + 1) of the rows of a sharded parameter that belong to this process; all rows of
    any other parameter.

    FSDP2 cuts dimension 0 as torch.chunk does: equal pieces, the last ones smaller or empty.
    """
    n, mesh = len(parameter), getattr(parameter, "device_mesh", None)
    if mesh is None:
        return 0, n
    shards = mesh.ndim - 1              # the last dimension; one before it counts copies (HSDP)
    piece, rank = -(-n // mesh.size(shards)), mesh.get_local_rank(shards)
    return min(n, piece * rank), min(n, piece * (rank + 1))


def put_rows(model, name, rows):
    """Make `rows`, those of `own_rows`, the parameter `name` of the model; whether it learns stays
    as it was."""
    module, _, leaf = name.rpartition(".")
    known = model.get_parameter(name)
    if hasattr(known, "device_mesh"):
        from torch.distributed.tensor import DTensor
        rows = DTensor.from_local(rows, known.device_mesh, known.placements, run_check=False,
                                  shape=known.shape, stride=known.stride())
    parameter = nn.Parameter(rows, requires_grad=known.requires_grad)
    setattr(model.get_submodule(module), leaf, parameter)


def gathered(tensors):
    """{name: whole tensor on the CPU} of {name: sharded or plain tensor} on process 0, {} on the
    others, which must call it too."""
    whole = {}
    for name, tensor in tensors.items():                # one at a time: there is no memory for all
        tensor = tensor.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        if rank_and_size()[0] == 0:
            whole[name] = tensor.cpu()
    return whole
