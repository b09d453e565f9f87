"""4-bit weights for the matrices that LoRA leaves alone (QLoRA; Dettmers et al. 2023, 2305.14314).

    W ~ absmax * code[q],       q 4 bits a number, absmax one number for 64 of them

`code` are the 16 levels of NF4, which a normal distribution fills evenly; the absmax themselves are
stored in 8 bits, 256 to a block ("double quantisation", section 3): 4.13 bits a number. How numbers
are packed is the business of the package `bitsandbytes`, which runs on CPUs and GPUs. A product
puts the matrix together, uses it and forgets it, in the backward pass once more:

    y = x W^T       dx = g W
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from pretrained.tensors import put_rows

BLOCK, ABSMAX_BLOCK = 64, 256       # numbers to an absmax, absmax to one of theirs


def library():
    """bitsandbytes.functional. ModuleNotFoundError that says what to do."""
    try:
        import bitsandbytes.functional
    except ModuleNotFoundError:
        raise ModuleNotFoundError("4-bit weights need the package bitsandbytes: pip install "
                                  "bitsandbytes") from None
    return bitsandbytes.functional


@dataclass
class Packed:
    """A matrix in NF4."""
    numbers: torch.Tensor       # uint8, two numbers a byte
    state: object               # bitsandbytes' QuantState: absmax, shape, dtype

    @property
    def nbytes(self):
        """Bytes of numbers and absmax."""
        absmax, above = self.state.absmax, self.state.state2.absmax
        return self.numbers.nbytes + absmax.nbytes + above.nbytes


def pack(weight):
    """A matrix [out, in] as Packed, where it is."""
    numbers, state = library().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return Packed(numbers, state)


def unpack(packed):
    """The matrix [out, in] that a Packed stands for, in the dtype that it had."""
    return library().dequantize_4bit(packed.numbers, packed.state)


def packed_bytes(num_weights):
    """What `Packed.nbytes` will be, from the number of weights alone."""
    absmax = -(-num_weights // BLOCK)
    return -(-num_weights // 2) + absmax + 4 * -(-absmax // ABSMAX_BLOCK)


class FrozenProduct(torch.autograd.Function):
    """x W^T for a packed W that does not learn: x [..., in] -> [..., out]. Autograd by itself would
    keep the unpacked matrix for the backward pass."""

    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed = packed
        return F.linear(x, unpack(packed).to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        return g @ unpack(ctx.packed).to(g.dtype), None


class FrozenLinear(nn.Linear):
    """An nn.Linear without memory until `put_packed` gives it a packed matrix."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.packed = base.weight, base.bias, None

    def forward(self, x):
        y = FrozenProduct.apply(x, self.packed)                                         # [..., out]
        return y if self.bias is None else y + self.bias


def is_packed(name):
    """Whether `put_packed` packs a parameter, by its name: the matrices of blocks. Embedding and
    head stay as they are."""
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def put_packed(model, name, rows):
    """`put_rows` for a model of lora.py's `freeze_in_4_bits`: its matrices are packed, and their
    `weight` keeps its shape but no memory."""
    if is_packed(name):
        model.get_submodule(name.removesuffix(".weight")).packed = pack(rows)
    else:
        put_rows(model, name, rows)


@torch.no_grad()
def round_to_nf4(model):
    """Give every matrix of the blocks the numbers that NF4 would leave of it, in place: the base
    that an adapter of a 4-bit run was trained on. Returns the model."""
    for name, parameter in model.named_parameters():
        if is_packed(name):
            parameter.copy_(unpack(pack(parameter)))
    return model
