"""8-bit weights for sampling on a CPU: half the memory of bfloat16, a quarter of float32's.

    W ~ scale * q,      q int8 [out, in], scale [out] = largest |W| of the row / 127

Products are torch's own for such weights (`torch._weight_int8pack_mm`), in bfloat16. Embedding and
norms stay as they are, and the head where it is tied to the embedding.
"""
import ctypes
import sys

import torch
import torch.nn as nn

from pretrained.hub import adapter_base
from pretrained.load import fill, open_checkpoint
from pretrained.tensors import put_rows
from training.lora import replace_module


def quantize(weight):
    """(q int8 [out, in], scale bfloat16 [out]) of a matrix [out, in]."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    scale = scale.to(torch.bfloat16)                    # first, so that q makes up for its rounding
    q = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


class Int8Linear(nn.Linear):
    """An nn.Linear whose matrix is given to `put_int8`; its `weight` keeps its shape but no
    memory."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.q, self.scale = None, None

    def forward(self, x):
        flat = x.reshape(-1, self.in_features).to(torch.bfloat16)                       # [N, in]
        y = torch._weight_int8pack_mm(flat, self.q, self.scale).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)                                    # [..., out]
        return y if self.bias is None else y + self.bias


def put_int8(model, name, rows):
    """`put_rows`, but of an Int8Linear's matrix in 8 bits."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Int8Linear) and name.endswith(".weight"):
        module.q, module.scale = quantize(rows)
        give_back_memory()
    else:
        put_rows(model, name, rows)


def give_back_memory():
    """Let glibc return what was freed: the temporary matrices leave holes between the packed ones,
    which would stay the process's own and take more than these."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)      # musl has none
        if trim is not None:
            trim(0)


def load_int8(folder, device="cpu", dtype=None):
    """The model in a folder with its matrices in 8 bits, packed one by one as they are read; dtype:
    of all else. ValueError for an adapter, a mixture of experts, or a GPU."""
    if torch.device(device).type != "cpu":
        raise ValueError(f"weights=int8 is for CPUs, got device {device}: leave it at full")
    if adapter_base(folder) is not None:
        raise ValueError(f"{folder} is an adapter, which cannot be added to 8-bit weights: merge "
                         "it into its base first (finetune_llada.py --merge)")
    model, plan = open_checkpoint(folder)
    if model.config.n_experts:
        raise ValueError("weights=int8 is for dense models: the matrices of experts are not packed")
    tied = model.head if model.config.tie_embeddings else None
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not tied:
            replace_module(model, name, Int8Linear(module))
    fill(model, plan, device, dtype, put_int8)
    return model.eval()
