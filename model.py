"""The transformer: one hand-written network for every model in this repository.

It maps tokens to logits and knows nothing of diffusion. What differs between LLaDA, Dream, BERT,
RoBERTa, ModernBERT, GPT-2, Llama, Qwen and the models trained here is a field of `Config`
(config.py); how their files are read and written stands in pretrained/. What is computed otherwise
for speed (norm, attention, experts, the loss) stands in kernels.py, beside the plain line that it
equals. Left out: dropout, tensor parallelism.

Shapes: B batch, T positions, S positions of this forward pass (T without a cache), V vocabulary,
D width, H heads, G key/value heads, C head size, N selected rows, E experts, k of them a token.

References: Vaswani et al. 2017 (arXiv 1706.03762); RoPE, Su et al. 2021 (2104.09864), eq. 34;
RMSNorm, Zhang & Sennrich 2019 (1910.07467), eq. 4; SwiGLU and GeGLU, Shazeer 2020 (2002.05202), eq.
6; grouped queries, Ainslie et al. 2023 (2305.13245); q/k norm, Henry et al. 2020 (2010.04245);
alternating local attention, ModernBERT, Warner et al. 2024 (2412.13663); mixtures of experts,
Shazeer et al. 2017 (1701.06538), their sigmoid scores and groups, DeepSeek-V3 (2412.19437).

    python model.py CHECKPOINT      prints the architecture as read; a folder, .gguf or hub id
"""
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

import kernels
from config import ACTIVATIONS, Config

LOOK_BESIDE = 3.0       # size of the numbers that queries and keys of `look_beside` begin with


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight  (arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


def make_norm(config):
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.norm_bias)


def rope_table(positions, head_dim, theta, scaling=None):
    """cos and (-sin, sin) of the angles position * theta^(-2j / C), j < C/2, float32 [..., S, C]
    each, for positions [..., S].

    `scaling` stretches the context: "linear" divides every frequency by `factor`; "llama3" only
    those whose wavelength is long against the original context, with a smooth ramp between (Llama
    3.1).
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)   # [C/2]
    frequency = 1 / theta ** (pair / head_dim)
    if scaling and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    if scaling and scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        ramp = ((turns - low) / (high - low)).clamp(0, 1)           # 0: divide by factor, 1: keep
        frequency = frequency * (ramp + (1 - ramp) / scaling["factor"])
    angle = positions[..., None].float() * frequency                                 # [..., S, C/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)               # [..., S, C]


def rotate(x, cos, sin):
    """Rotate the pairs (a, b) = (x_j, x_{j + C/2}) of x [B, H, S, C] by the angles of `rope_table`:
    a cos - b sin, b cos + a sin. In float32 at least. Of a longer x, the first C dimensions."""
    C = cos.shape[-1]
    if C < x.shape[-1]:
        return torch.cat((rotate(x[..., :C], cos, sin), x[..., C:]), dim=-1)
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = precise.chunk(2, dim=-1)                                                 # [B, H, S, C/2]
    return torch.addcmul(precise * cos, torch.cat((b, a), dim=-1), sin).to(x.dtype)


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

    def forward(self, x, rope, visible, causal, cache=None):
        B, S, _ = x.shape
        H, G, C = self.shape
        q, k, v = kernels.products(x, self.q, self.k, self.v)
        q, k, v = q.view(B, S, H, C), k.view(B, S, G, C), v.view(B, S, G, C)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # [B, H or G, S, C]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                          # [B, G, length, C]
        y = kernels.attend(q, k, v, visible, causal)                                  # [B, H, S, C]
        return self.o(y.transpose(1, 2).reshape(B, S, H * C))


class MLP(nn.Module):
    def __init__(self, config, hidden):
        super().__init__()
        D, bias = config.dim, config.mlp_bias
        self.act = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(D, hidden, bias=bias) if config.gated else None
        self.up = nn.Linear(D, hidden, bias=bias)
        self.down = nn.Linear(hidden, D, bias=bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        gate, up = kernels.products(x, self.gate, self.up)
        return self.down(self.act(gate) * up)


class ExpertLinear(nn.Module):
    """A matrix for each of E experts, [E, out, in]."""

    def __init__(self, E, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(E, out_features, in_features))

    def forward(self, x, counts):
        """x [N, in], sorted by expert, counts [E] of them for each -> [N, out]."""
        return kernels.expert_linear(x, self.weight, counts)


class Experts(nn.Module):
    """A mixture of E small MLPs, of which a token goes through the k that the router chooses, and
    perhaps a shared one:

        y = sum over the chosen e of weight_e * down_e(act(gate_e x) * up_e x) + shared(x)
    """

    def __init__(self, config):
        super().__init__()
        E, D, hidden = config.n_experts, config.dim, config.expert_dim
        self.config, self.act = config, ACTIVATIONS[config.activation]
        self.router = nn.Linear(D, E, bias=False)
        self.router_bias = None
        if config.router_bias != "none":        # no gradient teaches it: see training/balance.py
            self.router_bias = nn.Parameter(torch.zeros(E), requires_grad=False)
        self.gates = ExpertLinear(E, D, hidden)
        self.ups = ExpertLinear(E, D, hidden)
        self.downs = ExpertLinear(E, hidden, D)
        self.shared = MLP(config, config.shared_dim) if config.shared_dim else None
        self.load = None            # int64 [E]: tokens of each expert in the last training pass
        self.mean_score = None      # [E]: their share of the scores there, with its gradient

    def forward(self, x):
        rows = x.flatten(0, -2)                                                         # [N, D]
        N, k = len(rows), self.config.experts_per_token
        weights, chosen = self.route(rows)                                          # [N, k] each
        # Each expert sees its tokens at once: those of the first expert come first, and so on.
        order = chosen.flatten().argsort(stable=True)                                   # [N k]
        counts = chosen.new_zeros(self.config.n_experts)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order))
        own = rows[order // k]                                                          # [N k, D]
        hidden = self.act(self.gates(own, counts)) * self.ups(own, counts)
        out = self.downs(hidden, counts)[order.argsort()].view(N, k, -1)                # [N, k, D]
        y = (weights[:, None] @ out.to(weights.dtype))[:, 0].to(x.dtype)
        if self.shared is not None:
            y = y + self.shared(rows)
        if self.training:
            self.load = counts
        return y.view(x.shape)

    def route(self, x):
        """(weights [N, k], float32 at least; experts int64 [N, k]) for tokens x [N, D]."""
        c, precise = self.config, torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(precise), self.router.weight.to(precise))            # [N, E]
        scores = logits.softmax(-1) if c.router == "softmax" else logits.sigmoid()
        if self.training:
            self.mean_score = (scores / scores.sum(-1, keepdim=True)).mean(0)
        biased = scores if self.router_bias is None else scores + self.router_bias
        chosen = self.in_best_groups(biased).topk(c.experts_per_token).indices
        weights = (biased if c.router_bias == "weight" else scores).gather(1, chosen)
        # LLaDA2 leaves the sigmoid of a single expert as it is.
        if c.router_norm and (c.experts_per_token > 1 or c.router == "softmax"):
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.router_scale, chosen

    def in_best_groups(self, scores):
        """scores [N, E], -inf outside the router_top_groups groups whose two best together score
        highest."""
        c = self.config
        if c.router_top_groups == c.router_groups:
            return scores
        groups = scores.view(len(scores), c.router_groups, -1)                  # [N, groups, size]
        value = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        best = value.topk(c.router_top_groups, dim=-1).indices
        outside = torch.ones_like(value, dtype=torch.bool).scatter(1, best, False)
        return groups.masked_fill(outside[..., None], -torch.inf).flatten(1)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.post_norm = config.post_norm
        self.attn_norm = make_norm(config) if layer or config.first_norm else nn.Identity()
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = Experts(config) if config.is_sparse(layer) else MLP(config, config.hidden_dim)

    def forward(self, x, rope, visible, causal, cache=None, select=None):
        """x [B, S, D] -> [B, S, D]; with `select` only those rows go through the MLP, [N, D]."""
        how = rope, visible, causal, cache
        if self.post_norm:
            x = take(self.attn_norm(x + self.attn(x, *how)), select)
            return self.mlp_norm(x + self.mlp(x))
        x = take(x + self.attn(self.attn_norm(x), *how), select)
        return x + self.mlp(self.mlp_norm(x))


def take(x, select):
    """Rows of x [B, S, D] -> [N, D]: those where select [B, S] is true, or those with the flat
    indices select [N]; None: x as it is. Raises ValueError for what is neither."""
    if select is None:
        return x
    if select.dtype == torch.bool:
        return x[select]
    if select.dim() != 1:               # a mask of 0 and 1 would be read as indices
        raise ValueError(f"select is bool {list(x.shape[:2])}, or one index for each row, got "
                         f"{select.dtype} {list(select.shape)}")
    return x.flatten(0, 1)[select]


def keys_ahead(positions, cache):
    """By how much a key stands after a query, int64 [S, T] or [B, 1, S, T]; positions [S] or
    [B, S] of the queries, and of the keys unless a cache has them."""
    keys = positions
    if cache is not None:
        keys = torch.arange(cache.length, device=positions.device)
    ahead = keys[..., None, :] - positions[..., :, None]
    return ahead[:, None] if ahead.dim() == 3 else ahead


def in_order(mask, ahead):
    """The keys of a mask, bool or None for all of them, that do not stand after the query; `ahead`
    as `keys_ahead` has it."""
    if mask is None:
        return ahead <= 0
    return mask & (ahead <= 0) | (ahead == 0)       # a query that sees nothing would become NaN


def time_waves(t, size):
    """cos and sin of 1000 t at size / 2 frequencies from 1 to 1/10000, [B, size] for t [B]: what
    diffusion models are told of the time (Ho et al. 2020, arXiv 2006.11239, appendix B)."""
    half = size // 2
    steps = torch.arange(half, device=t.device) / max(half - 1, 1)
    angle = 1000 * t[:, None].float() * 10000 ** -steps                                 # [B, half]
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def zero_embedding(rows, dim):
    # The random numbers that nn.Embedding would draw cost a second of imports on the meta device.
    return nn.Embedding.from_pretrained(torch.zeros(rows, dim), freeze=False)


class Transformer(nn.Module):
    """Embedding, blocks, vocabulary head. See `Config` for the variants."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D, V = config.dim, config.vocab_size
        learned = config.positions == "learned"
        rows = config.max_len + config.position_offset
        self.embed = zero_embedding(V, D)
        self.embed_positions = zero_embedding(rows, D) if learned else None
        self.embed_types = zero_embedding(config.token_types, D) if config.token_types else None
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = None if config.post_norm else make_norm(config)
        self.head_dense, self.head_norm = None, None
        if config.head_transform:
            self.head_dense = nn.Linear(D, D, bias=config.head_transform_bias)
            self.head_norm = make_norm(config)
        self.head = nn.Linear(D, V, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.embed_time, self.substitute_head = None, None
        self.insert_head, self.rate_head = None, None
        if config.time_features:
            self.make_time_embedding()
        if config.edits:
            self.make_edit_heads()
        self.checkpoint_blocks = False      # True: the backward pass computes each block again
        self.chunk = max(64, 2**25 // V)    # rows whose logits exist at once in `weighted_nll`

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Random weights: matrices N(0, 0.02^2) as in GPT-2, biases zero, embeddings N(0, 1), or
        as the matrices where the head is tied to them. So the first loss is about log V. Returns
        self."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                is_embedding = isinstance(module, nn.Embedding)
                std = 1.0 if is_embedding and not self.config.tie_embeddings else 0.02
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
            if isinstance(module, ExpertLinear):
                module.weight.normal_(std=0.02, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        return self

    @torch.no_grad()
    def look_beside(self):
        """Let the first two heads of the first block begin by looking at the token before and at
        the one after: that need not be learned then. Call it after `init_weights`. Returns self.
        ValueError for a model without RoPE.

        An eighth of every embedding is set to 1, so that there is something which all tokens share.
        Of it the heads make the same key for every token, and the same query, turned by one
        position. RoPE turns keys at position j and queries at i further, and their product is
        greatest at j = i - 1 or i + 1. Only pairs of numbers that turn fast tell one position from
        the next: the others stay small.
        """
        c, attention = self.config, self.blocks[0].attn
        if c.positions != "rope":
            raise ValueError(f"look_beside is for positions rope, not {c.positions}")
        H, G, C, half = c.n_heads, c.n_kv_heads, c.head_dim, c.rope_dim // 2
        shared, pairs = max(c.dim // 8, 1), min(3, half)
        self.embed.weight[:, :shared] = 1
        angle = c.rope_theta ** (-torch.arange(pairs) / half)       # by which a position turns them
        size = LOOK_BESIDE / shared
        q = attention.q.weight.view(H, C, c.dim)[..., :shared]
        k = attention.k.weight.view(G, C, c.dim)[..., :shared]
        for head, offset in zip(range(H), (-1, 1)):
            own_k = k[head * G // H]
            own_k[:pairs], own_k[half:half + pairs] = size, 0
            q[head, :pairs] = size * (offset * angle).cos()[:, None]
            q[head, half:half + pairs] = size * (offset * angle).sin()[:, None]
        return self

    def make_time_embedding(self):
        """What is added to every token's embedding at a time t, a matrix without values."""
        self.embed_time = nn.Linear(self.config.time_features, self.config.dim, bias=False)

    def make_edit_heads(self):
        """The heads of a model that edits, without values. `head` is the substitutions', unless
        the config has it that it stays beside them."""
        c = self.config
        if c.keeps_head:
            self.substitute_head = nn.Linear(c.dim, c.vocab_size, bias=c.head_bias)
        self.insert_head = nn.Linear(c.dim, c.vocab_size, bias=c.head_bias)
        self.rate_head = nn.Linear(c.dim, 3)

    def compile_blocks(self):
        """torch.compile each block in place. One graph serves all but the last, whose MLP gets
        another number of rows every time."""
        for block in self.blocks[:-1]:
            block.compile()
        self.blocks[-1].compile(dynamic=True)

    def forward(self, tokens, attention_mask=None, select=None, cache=None, positions=None):
        """tokens int64 [B, S] -> logits [B, S, V], raw and unshifted; with `select` [N, V].

        attention_mask  bool [B, T], true where a key may be seen; or, in place of the model's own
                        order of attention, bool [1 or B, S, T], who sees whom, or a BlockMask.
        select          bool [B, S], or int64 [N], indices into the flattened B * S rows.
        cache           keys and values of T positions to write to and to attend to
                        (sampling/cache.py); None: attend to `tokens`.
        positions       int64 [S] or [B, S]; None: 0, 1, 2...
        Raises ValueError for more positions than a model with learned ones has, and for a mask of
        numbers to be added.
        """
        return self.head(self.hidden(tokens, attention_mask, select, cache, positions))

    def weighted_nll(self, tokens, select, targets, weights=None, attention_mask=None,
                     positions=None, cap_weight=0.0):
        """(sum of weights * nll, with its gradient; nll [N], for reading only): the cross-entropy
        in nats of targets int64 [N] at the rows `select` of the pass, without ever holding the
        logits.

        weights [N], None: all one. cap_weight: how much the mean entropy of those rows counts
        whose most probable token is the target. The other arguments as in `forward`.
        Differentiable once.
        """
        N, targets = targets.numel(), targets.flatten()
        if weights is None:
            weights = torch.ones(N, device=targets.device)
        weights = weights.flatten()
        if select is not None and select.dtype == torch.int64:
            # Up to 63 rows of weight 0 make N a round number: each new size of a matrix product
            # costs time (its kernel is chosen anew) and, on a CPU, memory.
            fill = (0, -N % 64)
            select, targets = F.pad(select, fill), F.pad(targets, fill)
            weights = F.pad(weights, fill)
        hidden = self.hidden(tokens, attention_mask, select, None, positions).flatten(0, -2)
        head = self.head.weight, self.head.bias
        entropy_weights = None
        if cap_weight:
            right = kernels.linear_argmax(hidden, *head, self.chunk) == targets
            right[N:] = False
            entropy_weights = cap_weight * right / right.sum().clamp(min=1)
        total, nll = kernels.linear_cross_entropy(hidden, *head, targets, weights, self.chunk,
                                                  entropy_weights)
        return total, nll[:N]

    def hidden(self, tokens, attention_mask=None, select=None, cache=None, positions=None, t=None):
        """What the head reads, [B, S, D] or [N, D]; arguments as in `forward`. t, float [B], is for
        models that are told the time."""
        config = self.config
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            if config.positions == "learned" and tokens.shape[1] > config.max_len:
                raise ValueError(f"{tokens.shape[1]} tokens are too long for this model's "
                                 f"{config.max_len} learned positions")
        x = self.embedded(tokens, positions, t)                                         # [B, S, D]
        if cache is not None:
            cache.place(positions, len(tokens))
        visible, causal = self.who_sees_whom(positions, attention_mask, cache)
        ropes = self.ropes(positions)
        for block in self.blocks:
            # The last MLP runs, like the head, on the rows that are asked for only.
            rows = select if block is self.blocks[-1] else None
            local = block.attn.is_local
            arguments = x, ropes[local], visible[local], causal, cache, rows
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        if self.norm is not None and not config.edits_before_norm:
            x = self.norm(x)
        if self.head_dense is not None:
            x = self.head_norm(ACTIVATIONS[config.head_activation](self.head_dense(x)))
        return x

    def embedded(self, tokens, positions, t=None):
        """What the first block reads, [B, S, D]; arguments as in `hidden`."""
        x = self.embed(tokens)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + self.config.position_offset)
        if self.embed_types is not None:
            x = x + self.embed_types.weight[0]
        if self.embed_time is not None and t is not None:
            x = x + self.embed_time(time_waves(t, self.config.time_features))[:, None]
        return x if self.embed_norm is None else self.embed_norm(x)

    def who_sees_whom(self, positions, attention_mask, cache):
        """((mask of the global layers, mask of the local layers), causal), as `kernels.attend`
        takes them: None or bool broadcastable to [B, H, S, T]; `causal` stands for the mask of a
        causal model that needs no other."""
        window = self.config.local_window
        if isinstance(attention_mask, BlockMask):
            if window:
                raise ValueError("a BlockMask cannot be combined with local attention: pass a bool "
                                 "mask")
            return (attention_mask, None), False
        is_number = attention_mask is not None and attention_mask.is_floating_point()
        if is_number and (attention_mask < 0).any():
            raise ValueError("attention_mask is true, or 1, where a key may be seen; numbers that "
                             "are to be added to the scores, 0 and -inf, would say the opposite")
        # Whoever gives a mask with a row for each query [B, S, T] says who sees whom, in place of
        # the model's own order. A mask of keys [B, T] leaves that order as it is.
        has_order = attention_mask is not None and attention_mask.dim() == 3
        causal = self.config.causal and not has_order
        if has_order and not window:
            return (kernels.tiled(attention_mask.bool()), None), False
        if causal and not window and attention_mask is None and cache is None:
            return (None, None), True
        mask = None                                                     # [B, 1, 1 or S, T]
        if attention_mask is not None:
            mask = attention_mask.bool()
            mask = mask[:, None] if has_order else mask[:, None, None]
        if not causal and not window:
            return (mask, None), False
        ahead = keys_ahead(positions, cache)
        if causal:
            mask = in_order(mask, ahead)
        if cache is not None and mask is not None:
            mask = kernels.unless_all(mask)
        if not window:
            return (mask, None), False
        near = ahead.abs() <= window // 2
        return (mask, near if mask is None else mask & near), False

    def ropes(self, positions):
        """(angles of global layers, angles of local layers), each (cos, sin) as `rotate` takes
        them; None for learned positions."""
        config = self.config
        if config.positions != "rope":
            return None, None
        if positions.dim() == 2:
            positions = positions[:, None]                                              # [B, 1, S]
        angles = rope_table(positions, config.rope_dim, config.rope_theta, config.rope_scaling)
        if not config.local_window:
            return angles, None
        return angles, rope_table(positions, config.rope_dim, config.local_rope_theta)

    # Files are the business of pretrained/, which builds on this module: hence the imports inside.

    @classmethod
    def from_pretrained(cls, path_or_hub_id, causal=None, device="cpu", dtype=None):
        """The model in a folder of ours or a published checkpoint (config.json and .safetensors),
        or in a GGUF file.

        causal  None: as published; False opens the attention of an autoregressive model.
        dtype   of the loaded weights; None: as the embedding is stored, float32 if quantised.
        The model is built without memory and filled tensor by tensor: the peak is the weights once
        and little more. Raises FileNotFoundError or ValueError with one line that says what is
        wrong.
        """
        from pretrained.load import load
        return load(path_or_hub_id, causal, device, dtype)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors in our layout, and the tokenizer files of the
        checkpoint that was loaded. ValueError for a model with an adapter that is not merged."""
        from pretrained.export import save
        save(self, folder)

    def export_pretrained(self, folder, gguf=False):
        """Write the published layout of the model's family, which the family's own code loads; a
        model of our own family becomes a Qwen3.

        gguf  True or "f16", "bf16", "q8_0", "f32": the file model-KIND.gguf for llama.cpp
              instead; its path is returned.
        """
        from pretrained.export import export
        return export(self, folder, gguf)


if __name__ == "__main__":
    from common import show_errors_in_one_line
    from pretrained.load import describe
    show_errors_in_one_line()
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError("usage: python model.py FOLDER_OR_GGUF_OR_HUB_ID")
    print(describe(sys.argv[1]))
