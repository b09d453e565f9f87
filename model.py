"""The transformer: one hand-written network for every model in this repository.

It maps tokens to logits and knows nothing of diffusion. What differs between LLaDA, Dream, BERT, RoBERTa, ModernBERT, GPT-2,
Llama, Qwen2, Qwen3 and the models trained here is a field of `Config`; where their files name things differently is a table
in `FAMILIES`, read in both directions. Left out: dropout, tensor parallelism, quantisation.

Shapes: B batch, T positions, S positions of this forward pass (T without a cache), V vocabulary, D width, H heads,
G key/value heads, C head size, N selected rows.

References: Vaswani et al. 2017 (arXiv 1706.03762); RoPE, Su et al. 2021 (2104.09864), eq. 34; RMSNorm, Zhang & Sennrich 2019
(1910.07467), eq. 4; SwiGLU and GeGLU, Shazeer 2020 (2002.05202), eq. 6; grouped queries, Ainslie et al. 2023 (2305.13245);
q/k norm, Henry et al. 2020 (2010.04245); alternating local attention, ModernBERT, Warner et al. 2024 (2412.13663).

    python model.py FOLDER_OR_HUB_ID      prints the architecture as read
"""
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@dataclass
class Config:
    """Everything that distinguishes one supported model from another. The defaults are our own family (the shape of Qwen3)."""
    family: str = "unmask"          # a key of FAMILIES: whose names and config export_pretrained writes
    vocab_size: int = 2048          # V, the mask token included
    dim: int = 256                  # D
    n_layers: int = 6
    n_heads: int = 4                # H
    n_kv_heads: int = 0             # G; 0: as many as n_heads
    head_dim: int = 0               # C; 0: dim / n_heads
    hidden_dim: int = 0             # width of the MLP; 0: 4 dim, or 8/3 dim to a multiple of 32 when gated
    max_len: int = 1024             # longest context in tokens
    causal: bool = False            # True: a position sees only itself and what stands before it
    positions: str = "rope"         # or "learned"
    position_offset: int = 0        # RoBERTa's learned positions start behind its padding index
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # None, or {"rope_type": "linear" | "llama3", "factor": ...}
    local_window: int = 0           # a local layer sees local_window // 2 positions to each side; 0: all layers are global
    global_every: int = 1           # with local_window: layers 0, n, 2n... are global
    local_rope_theta: float = 10000.0
    norm: str = "rms"               # or "layer"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    post_norm: bool = False         # True: norm after the residual sum (BERT); False: before attention and MLP, and once at the end
    embed_norm: bool = False        # a norm right after the embedding
    first_norm: bool = True         # False: no norm before the first attention (ModernBERT, whose embedding is normed already)
    qk_norm: bool = True            # RMSNorm of queries and keys, per head
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"        # or "gelu", "gelu_tanh", "relu"
    gated: bool = True              # True: down(act(gate x) * up x), SwiGLU or GeGLU; False: down(act(up x))
    token_types: int = 0            # rows of BERT's segment embedding; every token here is of segment 0
    head_transform: bool = False    # BERT's masked-LM head: dense, activation, norm before the vocabulary
    head_transform_bias: bool = True
    head_activation: str = "gelu"
    head_bias: bool = False
    tie_embeddings: bool = False
    shift: bool = False             # the model predicts token i at position i - 1 (used by diffusion.py, not here)
    block_length: int = 0           # trained block by block (BD3-LM) with this many tokens a block; 0: not (likewise)
    mask_token_id: int = None
    eos_token_id: int = None
    pad_token_id: int = None
    bos_token_id: int = None
    published: dict = None          # the published config.json that this was read from, kept for export

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        for name, low, high in (("vocab_size", 1, 10**8), ("dim", 1, 10**6), ("n_layers", 1, 10**4), ("n_heads", 1, 10**5),
                                ("n_kv_heads", 1, 10**5), ("head_dim", 0, 10**5), ("hidden_dim", 0, 10**7), ("max_len", 1, 10**9),
                                ("local_window", 0, 10**9), ("global_every", 1, 10**4), ("token_types", 0, 10**4),
                                ("position_offset", 0, 10**6), ("block_length", 0, 10**9)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        for name in ("rope_theta", "local_rope_theta", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e30:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for field in dataclasses.fields(self):
            if field.type is bool and type(getattr(self, field.name)) is not bool:
                raise ValueError(f"{field.name} must be true or false, got {getattr(self, field.name)!r}")
        for name, allowed in (("positions", ("rope", "learned")), ("norm", ("rms", "layer")), ("activation", tuple(ACTIVATIONS)),
                              ("head_activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.head_dim and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.n_heads} heads")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.hidden_dim = self.hidden_dim or (32 * math.ceil(self.dim / 12) if self.gated else 4 * self.dim)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs, so the head size must be even, got {self.head_dim}")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name} must be a token id, got {value!r}")
        if self.mask_token_id is not None and self.mask_token_id >= self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}")

    def is_local(self, layer):
        return self.local_window > 0 and layer % self.global_every != 0


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight  (arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.norm_bias)


def rope_table(positions, head_dim, theta, scaling=None):
    """cos and (-sin, sin) of the angles position * theta^(-2j / C), j < C/2: [..., S, C] float32 each, for positions [..., S].

    `scaling` stretches the context: "linear" divides every frequency by `factor`; "llama3" only those whose wavelength is
    long against the original context, with a smooth ramp between (Llama 3.1's published rule).
    """
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)    # [C/2]
    if scaling:
        factor = scaling["factor"]
        if scaling["rope_type"] == "linear":
            frequency = frequency / factor
        else:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)   # rotations over the original context
            ramp = ((turns - low) / (high - low)).clamp(0, 1)                       # 0: stretch by factor, 1: keep
            frequency = frequency * (ramp + (1 - ramp) / factor)
    angle = positions[..., None].float() * frequency                                # [..., S, C/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)            # [..., S, C]


def rotate(x, cos, sin):
    """Rotate the pairs (a, b) = (x_j, x_{j + C/2}) of x [B, H, S, C] as `rope_table` says: a cos - b sin, b cos + a sin."""
    a, b = x.float().chunk(2, dim=-1)                                               # [B, H, S, C/2] each
    return torch.addcmul(x.float() * cos, torch.cat((b, a), dim=-1), sin).to(x.dtype)


class Cache:
    """Keys and values of all T positions of a canvas, per layer [B, G, T, C].

    A forward pass of S tokens writes their keys and values at their positions and attends to the whole. Prefix cache: refresh
    all that stands right of the finished text. Dual cache: refresh one block. Block cache: what stands left of the block is
    final and what stands right of it hidden. Autoregressive decoding: S = 1.
    """

    def __init__(self, config, batch_size, length, device=None, dtype=None):
        shape = (config.n_layers, batch_size, config.n_kv_heads, length, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = length
        self.rows = None        # int64 [A]: the next pass is for these rows of the batch only; None: all

    def update(self, layer, positions, k, v):
        """Write k, v [A, G, S, C] at positions [S] or [A, S]; returns all keys and values of those rows, [A, G, T, C]."""
        positions = positions.expand(k.shape[0], -1)
        rows = torch.arange(len(k), device=k.device) if self.rows is None else self.rows
        stores = self.keys[layer], self.values[layer]
        for store, new in zip(stores, (k, v)):
            store[rows[:, None], :, positions] = new.transpose(1, 2).to(store.dtype)        # [A, S, G, C]
        return stores if self.rows is None else tuple(store[rows] for store in stores)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(C)) v over the keys that `mask` shows: None, "causal", bool broadcastable to [B, H, S, T], or a BlockMask.

    q [B, H, S, C], k and v [B, G, T, C] -> [B, H, S, C].
    """
    (H, S, C), (G, T) = q.shape[1:], k.shape[1:3]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=H != G)
    causal = isinstance(mask, str)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and S * T <= 2**16:
        # Training short sequences in bf16 on a CPU: torch's fused kernel takes up to three times as long as the formula itself.
        k, v = (t if H == G else t.repeat_interleave(H // G, dim=1) for t in (k, v))
        scores = (q * C**-0.5) @ k.transpose(-1, -2)                                # [B, H, S, T]
        if mask is not None:
            scores = scores.masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1) if causal else ~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal, enable_gqa=H != G)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        H, G, C, D = config.n_heads, config.n_kv_heads, config.head_dim, config.dim
        self.layer, self.shape, self.is_local = layer, (H, G, C), config.is_local(layer)
        self.q = nn.Linear(D, H * C, bias=config.qkv_bias)
        self.k = nn.Linear(D, G * C, bias=config.qkv_bias)
        self.v = nn.Linear(D, G * C, bias=config.qkv_bias)
        self.o = nn.Linear(H * C, D, bias=config.out_bias)
        self.q_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope, mask, cache=None, positions=None):
        (B, S, _), (H, G, C) = x.shape, self.shape
        q, k, v = self.q(x).view(B, S, H, C), self.k(x).view(B, S, G, C), self.v(x).view(B, S, G, C)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # [B, H or G, S, C]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)                        # [B, G, T, C]
        y = attend(q, k, v, mask)                                                   # [B, H, S, C]
        return self.o(y.transpose(1, 2).reshape(B, S, H * C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias) if config.gated else None
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.post_norm = config.post_norm
        self.attn_norm = make_norm(config) if layer or config.first_norm else nn.Identity()
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache=None, positions=None, select=None):
        """x [B, S, D] -> [B, S, D]; with `select` (as in Transformer.forward) only those rows go through the MLP, [N, D]."""
        if self.post_norm:
            x = take(self.attn_norm(x + self.attn(x, rope, mask, cache, positions)), select)
            return self.mlp_norm(x + self.mlp(x))
        x = take(x + self.attn(self.attn_norm(x), rope, mask, cache, positions), select)
        return x + self.mlp(self.mlp_norm(x))


def take(x, select):
    """Rows of x [B, S, D]: all of them, those where select [B, S] is true, or those with the flat indices select [N] -> [N, D]."""
    if select is None:
        return x
    return x[select] if select.dtype == torch.bool else x.flatten(0, 1)[select]


def project(linear, x):
    """linear(x). For few rows and a large matrix on a CPU, without gradients, by oneDNN's product: it reads the matrix once, where
    MKL's packs all of it first, which takes longer than the product (V 126464, D 256, 16 rows: 24 ms against 33 on one core)."""
    few = not torch.is_grad_enabled() and x.dtype == torch.float32 == linear.weight.dtype and x.device.type == "cpu" and x[..., 0].numel() <= 64
    if few and linear.weight.numel() >= 2**20 and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not torch.is_autocast_enabled("cpu"):
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "none", [], "")
    return linear(x)


class LinearCrossEntropy(torch.autograd.Function):
    """(sum_n w_n * nll_n, nll) with nll_n = logsumexp(z_n) - z_n[target_n], z = hidden @ weight.T + bias, rows in chunks.

    The [N, V] logits never exist: each chunk makes its logits, reads its losses off, turns the logits into their own gradient
    and adds that to the gradients of hidden and weight, all in the forward pass, where the logits are at hand. So a chunk's
    logits are computed once (recomputing them in the backward pass would cost a third more). nll is for reading only.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weights, chunk):
        # hidden [N, D], weight [V, D], bias [V] or None, targets int64 [N], row_weights float32 [N]
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        ctx.dtypes = hidden.dtype, weight.dtype
        need_grad = any(ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight, nll = hidden.to(dtype), weight.to(dtype), torch.empty(len(targets), device=hidden.device)
            chunk = chunk * 4 // dtype.itemsize                     # half the bytes, twice the rows: fewer sums into grad_w
            grad_h = torch.empty_like(hidden) if need_grad else None
            grad_w = torch.zeros(weight.shape, device=weight.device) if need_grad else None      # float32: a sum over chunks
            grad_b = torch.zeros(len(weight), device=weight.device) if need_grad and bias is not None else None
            buffers = torch.empty(2, min(chunk, len(targets)), len(weight), dtype=dtype, device=hidden.device)
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                target, row_weight = targets[rows, None], row_weights[rows, None]                 # [chunk, 1]
                logits, p = buffers[:, :len(target)]                                              # [chunk, V] each
                torch.mm(hidden[rows], weight.T, out=logits)
                if bias is not None:
                    logits += bias
                torch.softmax(logits, dim=-1, out=p)
                # logsumexp = max z - log max p: two reads where a float32 copy and a second exp would be needed
                lse = logits.amax(-1, keepdim=True).float() - p.amax(-1, keepdim=True).float().log()
                nll[rows] = (lse - logits.gather(1, target))[:, 0]
                if need_grad:
                    p.scatter_add_(1, target, p.new_full(target.shape, -1))                       # d nll / d logits
                    grad_h[rows] = (p @ weight) * row_weight.to(dtype)                            # [chunk, D]
                    weighted = hidden[rows] * row_weight.to(dtype)
                    grad_w = grad_w.addmm_(p.T, weighted) if dtype == torch.float32 else grad_w.add_(p.T @ weighted)
                    if bias is not None:
                        grad_b += (p.float() * row_weight).sum(0)
        ctx.grads = grad_h, grad_w, grad_b
        ctx.mark_non_differentiable(nll)
        return (nll * row_weights).sum(), nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were used already: call backward once")
        (grad_h, grad_w, grad_b), ctx.grads = ctx.grads, None
        grad_h, grad_w = grad_h.mul_(grad_loss).to(ctx.dtypes[0]), grad_w.mul_(grad_loss).to(ctx.dtypes[1])
        return grad_h, grad_w, None if grad_b is None else grad_b.mul_(grad_loss), None, None, None


class Transformer(nn.Module):
    """Embedding, blocks, vocabulary head. See `Config` for the variants."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, V = config.dim, config.vocab_size
        # Zeros, as the random numbers that nn.Embedding draws cost a second of imports on the meta device.
        embedding = lambda rows: nn.Embedding.from_pretrained(torch.zeros(rows, D), freeze=False)  # noqa: E731
        self.embed = embedding(V)
        self.embed_positions = embedding(config.max_len + config.position_offset) if config.positions == "learned" else None
        self.embed_types = embedding(config.token_types) if config.token_types else None
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = None if config.post_norm else make_norm(config)
        self.head_dense = nn.Linear(D, D, bias=config.head_transform_bias) if config.head_transform else None
        self.head_norm = make_norm(config) if config.head_transform else None
        self.head = nn.Linear(D, V, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.checkpoint_blocks = False      # True: keep only the blocks' inputs for the backward pass and recompute the rest
        self.chunk = max(64, 2**24 // V)    # rows whose logits exist at once in the loss (float32; twice as many in bf16)

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Random weights: N(0, 1/fan_in) for matrices, N(0, 1) for embeddings, zero for what writes into the residual stream.

        Blocks begin as the identity, and the head, zero unless tied, gives a uniform distribution: the first loss is log V.
        """
        generator = torch.Generator().manual_seed(seed)
        draw = lambda weight, std: weight.copy_(torch.randn(weight.shape, generator=generator) * std)  # noqa: E731
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if not name.endswith((".o", ".down", "head")):
                    draw(module.weight, module.in_features ** -0.5)
                elif name != "head" or not self.config.tie_embeddings:
                    module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                draw(module.weight, 0.02 if self.config.tie_embeddings else 1.0)
        return self

    def compile_blocks(self):
        """torch.compile each block in place: one graph serves all but the last, whose MLP gets another number of rows every time."""
        for block in self.blocks[:-1]:
            block.compile()
        self.blocks[-1].compile(dynamic=True)

    def forward(self, tokens, attention_mask=None, select=None, cache=None, positions=None, targets=None, weights=None):
        """tokens int64 [B, S] -> logits [B, S, V], raw and unshifted; with `select` only those rows, [N, V].

        attention_mask  [B, T], true (or 1) where a key may be seen; or, instead of the model's own order of attention, bool
                        [1 or B, S, T], who sees whom, or a BlockMask.
        select          bool [B, S], or int64 [N]: indices into the flattened B * S rows.
        cache           a `Cache` of T positions to refresh at `positions` and to attend to; None: attend to `tokens` alone.
        positions       int64 [S] or [B, S]; None: 0, 1, 2...
        targets         int64 [N] (with `select`) or [B, S]: returns (sum of weights * nll, nll float32 [N]) instead, nll in
                        nats, without ever holding the logits; `weights` float32 of the same shape, None: all one.
        Raises ValueError for more positions than the model has.
        """
        hidden = self.hidden(tokens, attention_mask, select, cache, positions)      # [B, S, D] or [N, D]
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.head_dense is not None:
            hidden = self.head_norm(ACTIVATIONS[self.config.head_activation](self.head_dense(hidden)))
        if targets is None:
            return project(self.head, hidden)
        weights = torch.ones(targets.shape, device=targets.device) if weights is None else weights
        return LinearCrossEntropy.apply(hidden.flatten(0, -2), self.head.weight, self.head.bias, targets.flatten(),
                                        weights.flatten(), self.chunk)

    def hidden(self, tokens, attention_mask=None, select=None, cache=None, positions=None):
        """The residual stream behind the last block, [B, S, D] or [N, D]; arguments as in `forward`."""
        config = self.config
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            if config.positions == "learned" and tokens.shape[1] > config.max_len:
                raise ValueError(f"{tokens.shape[1]} tokens are too long for this model's {config.max_len} learned positions")
        x = self.embed(tokens)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + config.position_offset)
        if self.embed_types is not None:
            x = x + self.embed_types.weight[0]
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        masks = self._masks(positions, attention_mask, cache)
        ropes = self._ropes(positions)
        for block in self.blocks:
            last = block is self.blocks[-1]             # the last MLP runs, like the head, on the rows that are asked for only
            arguments = x, ropes[block.attn.is_local], masks[block.attn.is_local], cache, positions, select if last else None
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return x

    def _masks(self, positions, attention_mask, cache):
        """(mask of global layers, mask of local layers): each None, "causal", a BlockMask or bool broadcastable to [B, H, S, T]."""
        config = self.config
        if isinstance(attention_mask, BlockMask):
            if config.local_window:
                raise ValueError("a BlockMask cannot be combined with local attention: pass a bool mask")
            return attention_mask, None
        mask = None
        if attention_mask is not None:
            visible = attention_mask.bool()
            mask = visible[:, None, None, :] if visible.dim() == 2 else visible[:, None]            # [B, 1, 1 or S, T]
        causal = config.causal and (attention_mask is None or attention_mask.dim() == 2)    # who sees whom overrules "causal"
        if causal and mask is None and cache is None and not config.local_window:
            return "causal", None
        key = positions if cache is None else torch.arange(cache.length, device=positions.device)
        ahead = key[..., None, :] - positions[..., :, None]                         # [S, T] or [B, S, T]: key minus query
        ahead = ahead if ahead.dim() == 2 else ahead[:, None]                       # [S, T] or [B, 1, S, T]
        if causal:
            mask = ahead <= 0 if mask is None else (mask & (ahead <= 0)) | (ahead == 0)     # a row that sees nothing would be NaN
        if not config.local_window:
            return mask, None
        near = ahead.abs() <= config.local_window // 2
        return mask, near if mask is None else mask & near

    def _ropes(self, positions):
        """(angles of global layers, angles of local layers), each (cos, sin) as `rotate` takes them, or None."""
        config = self.config
        if config.positions != "rope":
            return None, None
        positions = positions if positions.dim() == 1 else positions[:, None]      # [S] or [B, 1, S]: heads share the angles
        ropes = rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        if not config.local_window:
            return ropes, None
        return ropes, rope_table(positions, config.head_dim, config.local_rope_theta)

    def flops_per_token(self, seq_len, head_share=1.0, training=True):
        """Floating-point operations per token: 2 per weight of each matrix product, 4 H C T for attention, three times that with
        the backward pass (the PaLM paper's appendix B, arXiv 2204.02311). head_share: the share of rows that reach the head."""
        c, matrices = self.config, sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        head = self.head.weight.numel() + (self.head_dense.weight.numel() if self.head_dense is not None else 0)
        forward = 2 * (matrices + head_share * head) + 4 * c.n_layers * c.n_heads * c.head_dim * seq_len
        return forward * (3 if training else 1)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, causal=None, device="cpu", dtype=None):
        """A model from one of our folders or a published checkpoint (config.json and .safetensors) of any family in `FAMILIES`.

        causal  None: as published; False opens the attention of an autoregressive model.
        dtype   of the loaded weights; None: as the embedding is stored.
        The model is built without memory and filled tensor by tensor: the peak is the weights once and little more.
        Raises FileNotFoundError or ValueError, one line that says what is wrong, for a folder that is not such a checkpoint.
        """
        folder = find_checkpoint(path_or_hub_id)
        config, _ = read_config(folder)
        if causal is not None:
            config.causal = causal
        model, plan = match_tensors(config, read_headers(weight_files(folder)))
        fill(model, plan, device, dtype)
        model.source = folder
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors in our layout, and the tokenizer files of the checkpoint that was loaded."""
        state = self.state_dict()
        if self.config.tie_embeddings:
            del state["head.weight"]
        self._write(folder, {"model_type": "unmask", **dataclasses.asdict(self.config)}, state, TOKENIZER_FILES)

    def export_pretrained(self, folder):
        """Write the published layout of the model's family (`unmask` exports as Qwen3), which the family's own code loads."""
        state, parameters = {}, self.state_dict()
        for theirs, ours, transposed in tensor_table(self):
            if ours != ["head.weight"] or not self.config.tie_embeddings:
                tensor = torch.cat([parameters[name] for name in ours])
                state[theirs] = tensor.T if transposed else tensor
        self._write(folder, publish_config(self.config, self.embed.weight.dtype), state, (*TOKENIZER_FILES, "*.py"))

    def _write(self, folder, raw_config, state, beside):
        folder, source = Path(folder), getattr(self, "source", None)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        for leftover in folder.glob(".tmp??????"):                  # safetensors writes aside as well: a kill leaves such a file
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
# The published families. To add one, write down its names; nothing above changes unless it computes something new.


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
_ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu",
                     "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}     # safetensors' spelling


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
    return values, origin


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
        if value != getattr(after, field) and field not in ("family", "published", "causal", "shift", "block_length"):
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


def find_checkpoint(path_or_hub_id):
    """The local folder of a checkpoint; a hub id is downloaded, or found in the cache. Raises FileNotFoundError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file: pass the folder that holds config.json")
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(path_or_hub_id)):
        raise FileNotFoundError(f"there is no folder {path_or_hub_id}")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"],
                                      ignore_patterns=["*/*"]))     # the .py are copied on export, never run
    except Exception as error:          # the hub's errors have no common class; whatever it was, the reader needs the same advice
        reason = type(error).__name__
        raise FileNotFoundError(f"there is no folder {path_or_hub_id}, and it could not be fetched from the hub ({reason}): pass "
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
    """Give the model of `match_tensors` its weights, 4 million numbers at a time."""
    dtype = dtype or next(row[3] for row in plan if row[4] == ["embed.weight"])
    for file, name, shape, _, ours, transposed in plan:
        known, nan = model.get_parameter(ours[0]), False
        tensor = torch.empty(shape, dtype=dtype) if known.is_meta else known.detach()
        for rows, part in _read_rows(file, name, shape):
            nan = nan or part.isnan().any().item()
            if known.is_meta:
                tensor[rows] = part
            elif not torch.equal(part.to(tensor), tensor[rows]):    # a copy, or a head that config.json ties
                raise ValueError(f"{file}: {name} differs from {ours[0]}, which it should equal")
        if nan:
            warnings.warn(f"{file}: {name} contains NaN", stacklevel=3)
        for our, part in zip(ours if known.is_meta else [], (tensor.T if transposed else tensor).chunk(len(ours))):
            module, _, leaf = our.rpartition(".")
            part = part.clone(memory_format=torch.contiguous_format) if transposed or len(ours) > 1 else part
            setattr(model.get_submodule(module), leaf, nn.Parameter(part.to(device)))
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight


def _read_rows(file, name, shape):
    """Yields (rows, those rows of a tensor), mapped from the file anew each time: no page of it outlives its copying."""
    step = max(1, 2**22 * shape[0] // math.prod(shape))
    for start in range(0, shape[0], step):
        with open_tensors(file) as tensors:
            yield slice(start, start + step), tensors.get_slice(name)[start:start + step]


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


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python model.py FOLDER_OR_HUB_ID")
        print(describe(sys.argv[1]))
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
