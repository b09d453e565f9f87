"""The transformer: one hand-written network for every model in this repository.

It maps tokens to logits and knows nothing of diffusion. What differs between LLaDA, Dream, BERT, RoBERTa, ModernBERT, GPT-2,
Llama, Qwen2, Qwen3 and the models trained here is a field of `Config`; how their files are read and written is in data/checkpoints.py.
Left out: dropout, tensor parallelism, quantisation.

Shapes: B batch, T positions, S positions of this forward pass (T without a cache), V vocabulary, D width, H heads,
G key/value heads, C head size, N selected rows.

References: Vaswani et al. 2017 (arXiv 1706.03762); RoPE, Su et al. 2021 (2104.09864), eq. 34; RMSNorm, Zhang & Sennrich 2019
(1910.07467), eq. 4; SwiGLU and GeGLU, Shazeer 2020 (2002.05202), eq. 6; grouped queries, Ainslie et al. 2023 (2305.13245);
q/k norm, Henry et al. 2020 (2010.04245); alternating local attention, ModernBERT, Warner et al. 2024 (2412.13663).

    python model.py FOLDER_OR_HUB_ID      prints the architecture as read
"""
import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@dataclass
class Config:
    """Everything that distinguishes one supported model from another. The defaults are our own family (the shape of Qwen3)."""
    family: str = "unmask"          # a key of checkpoints.FAMILIES: whose names and config export_pretrained writes
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
    eos_token_ids: list = None      # all ends of text where there are several (Llama 3); see `ends`
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
        ends = [] if self.eos_token_ids is None else self.eos_token_ids
        is_list = isinstance(ends, list | tuple)
        if not is_list or any(type(token) is not int or token < 0 for token in ends):
            raise ValueError(f"eos_token_ids must be a list of token ids, got {ends!r}")
        if ends and self.eos_token_id not in (None, *ends):
            raise ValueError(f"eos_token_id {self.eos_token_id} is not one of eos_token_ids {ends}")
        self.set_ends([self.eos_token_id, *ends])

    @property
    def ends(self):
        """The tokens that end a text, a tuple, eos_token_id first. Whoever sets eos_token_id to a
        token outside the list, or to None, means that alone."""
        if self.eos_token_id is None:
            return ()
        others = self.eos_token_ids or []
        if self.eos_token_id not in others:
            return (self.eos_token_id,)
        return tuple(dict.fromkeys([self.eos_token_id, *others]))

    def set_ends(self, tokens):
        """Let these tokens end a text, the first of them as eos_token_id; None is no token."""
        tokens = list(dict.fromkeys(token for token in tokens if token is not None))
        self.eos_token_id = tokens[0] if tokens else None
        self.eos_token_ids = tokens if len(tokens) > 1 else None

    def put_end_first(self, token):
        """Make `token`, the tokenizer's end of text, eos_token_id. Where there are several
        ends, the others stay."""
        others = self.ends if token is not None and len(self.ends) > 1 else ()
        self.set_ends([token, *others])

    def is_local(self, layer):
        return self.local_window > 0 and layer % self.global_every != 0


def at_least_float32(dtype):
    """float64 for float64, else float32: the precision of sums and angles."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight  (arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return HandRMSNorm.apply(x, self.weight.to(x.dtype), self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class HandRMSNorm(torch.autograd.Function):
    """RMSNorm and its gradient by hand: on a CPU torch composes them of a dozen operations, which take four times as long for [2048, 128].

        n = x / rms(x),  y = n * weight,  dx = (g * weight - n * mean(g * weight * n)) / rms(x),  dweight = sum over rows of g * n
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least_float32(x.dtype))
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        n = (x * scale).to(x.dtype)
        ctx.save_for_backward(n, scale, weight)
        return n * weight

    @staticmethod
    def backward(ctx, g):
        n, scale, weight = ctx.saved_tensors
        grad_weight = (g * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        g = g * weight
        return (g - n * (g * n).mean(-1, keepdim=True)) * scale.to(g.dtype), grad_weight, None


def make_norm(config):
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.norm_bias)


def rope_table(positions, head_dim, theta, scaling=None, dtype=torch.float32):
    """cos and (-sin, sin) of the angles position * theta^(-2j / C), j < C/2: [..., S, C] each.

    For positions [..., S]; in `dtype`.

    `scaling` stretches the context: "linear" divides every frequency by `factor`; "llama3" only those whose wavelength is
    long against the original context, with a smooth ramp between (Llama 3.1's published rule).
    """
    even = torch.arange(0, head_dim, 2, dtype=dtype, device=positions.device)
    frequency = 1 / theta ** (even / head_dim)                                      # [C/2]
    if scaling:
        factor = scaling["factor"]
        if scaling["rope_type"] == "linear":
            frequency = frequency / factor
        else:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)   # rotations over the original context
            ramp = ((turns - low) / (high - low)).clamp(0, 1)                       # 0: stretch by factor, 1: keep
            frequency = frequency * (ramp + (1 - ramp) / factor)
    angle = positions[..., None].to(dtype) * frequency                               # [..., S, C/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)            # [..., S, C]


def rotate(x, cos, sin):
    """Rotate the pairs (a, b) = (x_j, x_{j + C/2}) of x [B, H, S, C] as `rope_table` says: a cos - b sin, b cos + a sin."""
    wide = x.to(cos.dtype)
    a, b = wide.chunk(2, dim=-1)                                    # [B, H, S, C/2] each
    return torch.addcmul(wide * cos, torch.cat((b, a), dim=-1), sin).to(x.dtype)


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
    """softmax(q k^T / sqrt(C)) v over the keys that `mask` shows: None, "causal", bool broadcastable to [B, H, S, T], a BlockMask, or a
    list of pieces: (queries, a slice; keys that any of them sees, slices; bool of their sizes), which together are all queries in order.

    q [B, H, S, C], k and v [B, G, T, C] -> [B, H, S, C].
    """
    (H, S, C), (G, T) = q.shape[1:], k.shape[1:3]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=H != G)
    if isinstance(mask, list):                                      # on a CPU: what nobody sees costs nothing
        part = lambda x, slices: torch.cat([x[:, :, s] for s in slices], dim=2)  # noqa: E731
        return torch.cat([attend(q[:, :, queries], part(k, keys), part(v, keys), shown) for queries, keys, shown in mask], dim=2)
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


@contextlib.contextmanager
def packed(model, limit=2**31):
    """While this lasts, a Transformer's products in float32 on a CPU read copies of its matrices in oneDNN's order, up to `limit` bytes.

    For many passes with the same weights: meanwhile they must not be trained, moved or copied. MKL puts a matrix in its own order for
    every product, which for few rows takes longer than the product (V 126464, D 256, 16 rows, two threads: 26 ms instead of 7). Making
    the copies takes as long as three products. Compiled models keep their own.
    """
    usable = (isinstance(model, Transformer) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and not torch.is_autocast_enabled("cpu")
              and all(m._compiled_call_impl is None for m in model.modules()))
    linears = [m for m in (model.head, *model.blocks.modules()) if type(m) is nn.Linear and type(m.weight.data) is torch.Tensor
               and m.weight.device.type == "cpu" and m.weight.dtype == torch.float32 and "forward" not in vars(m)] if usable else []
    try:
        for linear in linears:
            if (limit := limit - linear.weight.nbytes) >= 0:
                matrix = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
                linear.forward = lambda x, w=matrix, b=linear.bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


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
        wide = at_least_float32(dtype)                              # of sums
        ctx.dtypes = hidden.dtype, weight.dtype, wide
        need_h, need_w, need_b, *_ = ctx.needs_input_grad           # a frozen head (LoRA) needs no gradient of the size of the vocabulary
        need_grad = need_h or need_w or need_b
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            nll = torch.empty(len(targets), dtype=wide, device=hidden.device)
            chunk = max(1, chunk * 4 // dtype.itemsize)             # half the bytes, twice the rows: fewer sums into grad_w
            grad_h = torch.empty_like(hidden) if need_h else None
            grad_w = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_w else None
            grad_b = torch.zeros(len(weight), dtype=wide, device=weight.device) if need_b else None
            buffer = torch.empty(min(chunk, len(targets)), len(weight), dtype=dtype, device=hidden.device)
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                target, row_weight = targets[rows, None], row_weights[rows, None]                 # [chunk, 1]
                p = logits = buffer[:len(target)]                                                 # [chunk, V]
                torch.mm(hidden[rows], weight.T, out=logits)
                if bias is not None:
                    logits += bias
                torch.softmax(logits, dim=-1, out=p)                                              # in place
                nll[rows] = -p.gather(1, target)[:, 0].to(wide).log()
                if need_grad:
                    p.scatter_add_(1, target, p.new_full(target.shape, -1))                       # d nll / d logits
                if need_h:
                    grad_h[rows] = (p @ weight) * row_weight.to(dtype)                            # [chunk, D]
                if need_w:
                    weighted = hidden[rows] * row_weight.to(dtype)
                    if dtype == wide:
                        grad_w.addmm_(p.T, weighted)
                    else:
                        grad_w.add_(p.T @ weighted)
                if need_b:
                    grad_b += (p.to(wide) * row_weight).sum(0)
            for rows in (nll > (9 if dtype == torch.float16 else 80)).nonzero()[:, 0].split(chunk):     # exp underflows there: the long way
                logits = F.linear(hidden[rows], weight, None if bias is None else bias.to(dtype))
                nll[rows] = F.cross_entropy(logits.to(wide), targets[rows], reduction="none")
        ctx.grads = grad_h, grad_w, grad_b
        ctx.mark_non_differentiable(nll)
        return (nll * row_weights).sum(), nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were used already: call backward once")
        grads = ctx.grads
        if ctx.dtypes[2] == torch.float64:                          # gradcheck goes backward often
            grads = [None if grad is None else grad.clone() for grad in grads]
        else:
            ctx.grads = None
        scaled = [None if grad is None else grad.mul_(grad_loss).to(dtype)
                  for grad, dtype in zip(grads, ctx.dtypes)]
        return *scaled, None, None, None


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
        self.chunk = max(64, 2**25 // V)    # rows whose logits exist at once in the loss (float32; twice as many in bf16)

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Random weights: N(0, 0.02^2) for matrices and tied embeddings, as GPT-2 has them, N(0, 1) for other embeddings, zero for biases.

        So the first loss is about log V. What writes into the residual stream is often made zero instead; here that costs (README, "What pays").
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 1.0 if isinstance(module, nn.Embedding) and not self.config.tie_embeddings else 0.02
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        return self

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size, new=()):
        """Make room for at least vocab_size tokens. Rows that are added, and those of the ids `new`, become the mean of all others.

        A published vocabulary is often padded, so that a new token's row exists already, untrained. With the mean row a new token
        is as likely as an average one and means nothing yet. A head that is tied stays tied.
        """
        V, tied = self.config.vocab_size, self.config.tie_embeddings
        size = max(vocab_size, V)
        known = torch.ones(V, dtype=torch.bool)
        known[[token for token in new if token < V]] = False

        def grown(weight):                                          # [V] or [V, D]
            rows = weight.new_empty(size, *weight.shape[1:]).copy_(weight[known].mean(0))
            rows[:V][known] = weight[known]
            return nn.Parameter(rows)

        self.embed.weight, self.embed.num_embeddings = grown(self.embed.weight), size
        self.head.weight, self.head.out_features = self.embed.weight if tied else grown(self.head.weight), size
        if self.head.bias is not None:
            self.head.bias = grown(self.head.bias)
        self.config.vocab_size = size
        return self

    def compile_blocks(self):
        """torch.compile each block in place: one graph serves all but the last, whose MLP gets another number of rows every time."""
        for block in self.blocks[:-1]:
            block.compile()
        self.blocks[-1].compile(dynamic=True)

    def forward(self, tokens, attention_mask=None, select=None, cache=None, positions=None, targets=None, weights=None):
        """tokens int64 [B, S] -> logits [B, S, V], raw and unshifted; with `select` only those rows, [N, V].

        attention_mask  [B, T], true (or 1) where a key may be seen; or, instead of the model's own order of attention, bool
                        [1 or B, S, T], who sees whom, a BlockMask, or pieces as `attend` takes them.
        select          bool [B, S], or int64 [N]: indices into the flattened B * S rows.
        cache           a `Cache` of T positions to refresh at `positions` and to attend to; None: attend to `tokens` alone.
        positions       int64 [S] or [B, S]; None: 0, 1, 2...
        targets         int64 [N] (with `select`) or [B, S]: returns (sum of weights * nll, nll float32 [N]) instead, nll in
                        nats (float64 if the model is), without ever holding the logits; `weights` float32 of the same shape, None: all one.
        Raises ValueError for more positions than a model with learned ones has.
        """
        hidden = self.hidden(tokens, attention_mask, select, cache, positions)      # [B, S, D] or [N, D]
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.head_dense is not None:
            hidden = self.head_norm(ACTIVATIONS[self.config.head_activation](self.head_dense(hidden)))
        if targets is None:
            return self.head(hidden)
        weights = torch.ones(targets.shape, device=targets.device) if weights is None else weights
        weight, bias = self.head.weight, self.head.bias
        if not torch.is_grad_enabled():                     # or the function, which cannot know, would make gradients that nobody asks for
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, bias, targets.flatten(), weights.flatten(), self.chunk)

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
        if isinstance(attention_mask, BlockMask | list):
            if config.local_window:
                raise ValueError("a BlockMask or pieces cannot be combined with local attention: pass a bool mask")
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
        if mask is not None:
            near = mask & near
            # Padding far from the text sees nobody, and the softmax of nothing is NaN: show it all.
            near = near | ~near.any(-1, keepdim=True)
        return mask, near

    def _ropes(self, positions):
        """(angles of global layers, angles of local layers), each (cos, sin) as `rotate` takes them, or None."""
        config = self.config
        if config.positions != "rope":
            return None, None
        positions = positions if positions.dim() == 1 else positions[:, None]      # [S] or [B, 1, S]: heads share the angles
        dtype = at_least_float32(self.embed.weight.dtype)
        size = config.head_dim
        ropes = rope_table(positions, size, config.rope_theta, config.rope_scaling, dtype)
        if not config.local_window:
            return ropes, None
        return ropes, rope_table(positions, size, config.local_rope_theta, dtype=dtype)

    def flops_per_token(self, seq_len, head_share=1.0, training=True):
        """Floating-point operations per token: 2 per weight of each matrix product, 4 H C T for attention, three times that with
        the backward pass (the PaLM paper's appendix B, arXiv 2204.02311). head_share: the share of rows that reach the head."""
        c, matrices = self.config, sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        head = self.head.weight.numel() + (self.head_dense.weight.numel() if self.head_dense is not None else 0)
        forward = 2 * (matrices + head_share * head) + 4 * c.n_layers * c.n_heads * c.head_dim * seq_len
        return forward * (3 if training else 1)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, causal=None, device="cpu", dtype=None):
        """A model from one of our folders or a published checkpoint (config.json and .safetensors) of any family in checkpoints.FAMILIES.

        causal  None: as published; False opens the attention of an autoregressive model.
        dtype   of the loaded weights; None: as the embedding is stored.
        The model is built without memory and filled tensor by tensor: the peak is the weights once and little more.
        Raises FileNotFoundError or ValueError, one line that says what is wrong, for a folder that is not such a checkpoint.
        """
        from data import checkpoints  # here and below: it builds on this file
        return checkpoints.load(path_or_hub_id, causal, device, dtype)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors in our layout, and the tokenizer files of the checkpoint that was loaded."""
        from data import checkpoints
        checkpoints.save(self, folder)

    def export_pretrained(self, folder):
        """Write the published layout of the model's family (`unmask` exports as Qwen3), which the family's own code loads."""
        from data import checkpoints
        checkpoints.export(self, folder)


if __name__ == "__main__":
    from common import show_errors_in_one_line
    from data.checkpoints import describe
    show_errors_in_one_line()
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError("usage: python model.py FOLDER_OR_HUB_ID")
    print(describe(sys.argv[1]))
