"""The transformer: one hand-written network for every model in this repository.

It maps tokens to logits and knows nothing of diffusion. What differs between LLaDA, Dream, BERT,
RoBERTa, ModernBERT, GPT-2, Llama, Qwen and the models trained here is a field of `Config`;
how their files are read and written stands in pretrained/. What is computed otherwise for speed
(norm, attention, experts, the loss) stands in kernels.py, beside the plain line that it equals.
Left out: dropout, tensor parallelism.

Shapes: B batch, T positions, S positions of this forward pass (T without a cache), V vocabulary,
D width, H heads, G key/value heads, C head size, N selected rows, E experts, k of them a token.

References: Vaswani et al. 2017 (arXiv 1706.03762); RoPE, Su et al. 2021 (2104.09864), eq. 34;
RMSNorm, Zhang & Sennrich 2019 (1910.07467), eq. 4; SwiGLU and GeGLU, Shazeer 2020 (2002.05202), eq.
6; grouped queries, Ainslie et al. 2023 (2305.13245); q/k norm, Henry et al. 2020 (2010.04245);
alternating local attention, ModernBERT, Warner et al. 2024 (2412.13663); mixtures of experts,
Shazeer et al. 2017 (1701.06538), their sigmoid scores and groups, DeepSeek-V3 (2412.19437).

    python model.py CHECKPOINT      prints the architecture as read; a folder, .gguf or hub id
"""
import dataclasses
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

import kernels


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}


@dataclass
class Config:
    """Everything that distinguishes one supported model from another.

    The defaults are our own family, which has the shape of Qwen3. Raises ValueError for a field
    that cannot be, naming it.
    """
    family: str = "unmask"          # a key of FAMILIES in pretrained/families.py
    vocab_size: int = 2048          # V, the mask token included
    dim: int = 256                  # D
    n_layers: int = 6
    n_heads: int = 4                # H
    n_kv_heads: int = 0             # G; 0: as many as n_heads
    head_dim: int = 0               # C; 0: dim / n_heads
    hidden_dim: int = 0             # of the MLP; 0: 4 dim, or 8/3 dim to a multiple of 32 if gated
    max_len: int = 1024             # longest context in tokens
    causal: bool = False            # True: a position sees itself and what stands before it
    positions: str = "rope"         # or "learned". RoPE knows distances alone: on a canvas of
    #                                 nothing but masks it predicts the same at every position
    position_offset: int = 0        # RoBERTa's learned positions start behind its padding index
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # None, or {"rope_type": "linear" or "llama3", "factor": ...}
    rope_share: float = 1.0         # of a head's dimensions, from the first on, that RoPE rotates
    local_window: int = 0     # a local layer sees local_window // 2 positions to each side; 0: none
    global_every: int = 1           # with local_window: layers 0, n, 2n... are global
    local_rope_theta: float = 10000.0
    norm: str = "rms"               # or "layer"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    post_norm: bool = False    # True: norm behind each residual sum (BERT); False: before each part
    embed_norm: bool = False        # a norm right behind the embedding
    first_norm: bool = True         # False: none before the first attention (ModernBERT)
    qk_norm: bool = True            # RMSNorm of queries and keys, per head
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"        # a key of ACTIVATIONS
    gated: bool = True              # True: down(act(gate x) * up x); False: down(act(up x))
    n_experts: int = 0              # E, in the place of each MLP; 0: MLPs are dense
    experts_per_token: int = 1      # k, that see a token
    expert_dim: int = 0             # hidden width of an expert; 0: hidden_dim / k
    shared_dim: int = 0             # hidden width of an expert more, which sees all tokens; 0: none
    dense_layers: list = None       # layers that have a dense MLP all the same
    router: str = "softmax"         # what makes scores of the router's logits; or "sigmoid"
    router_bias: str = "none"       # added to the scores: "choice", for the choice alone; "weight"
    router_groups: int = 1          # experts stand in groups of equal size,
    router_top_groups: int = 1      # and a token's are chosen from its so many best groups
    router_norm: bool = False       # a token's k weights are divided by their sum,
    router_scale: float = 1.0       # and then multiplied by this
    token_types: int = 0        # rows of BERT's segment embedding; every token here is of segment 0
    head_transform: bool = False    # BERT's masked-LM head: dense, activation, norm, vocabulary
    head_transform_bias: bool = True
    head_activation: str = "gelu"
    head_bias: bool = False
    tie_embeddings: bool = False
    shift: bool = False             # token i is predicted at position i - 1 (read by diffusion.py)
    block_length: int = 0           # trained block by block with so many tokens a block; 0: not
    blocks_from_start: bool = False     # blocks are counted from position 0, not from the prompt's
    #                                 end, and may have another length than this one (LLaDA2)
    threshold: float | None = None  # of sampling, where none is given; with it, a step keeps what
    #                                 the schedule says at least (LLaDA2)
    edit_threshold: float | None = None     # of sampling, where none is given (LLaDA2.1)
    step_schedule: str = "even"     # tokens a sampling step reveals: "even", "timesteps" (Dream)
    confidence_at_temperature: bool = False     # read from softmax(logits / temperature) (Dream)
    edits: bool = False             # heads that edit: substitute, insert, rates (edits.py)
    keeps_head: bool = False        # `head` stays beside them, unused, as dLLM has it
    edits_before_norm: bool = False     # they read what comes before the last norm (dLLM's encoder)
    edit_schedule: str = "linear"   # kappa_t that they were trained with (edits.py)
    edit_masks: int = 0             # masks that a text to be written begins with
    delete_token_id: int | None = None      # of a model that edits by tokens (edits.Orders): what
    insert_token_id: int | None = None      # stands here goes; a mask comes before it (LLaDA2.2)
    time_features: int = 0          # sines and cosines of t that the model is told; 0: not told t
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: list = None      # all ends of text where there are several (Llama 3); see `ends`
    published: dict = None          # the published config.json that this was read from, for export

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.check_fields()
        if not self.head_dim and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.n_heads} heads")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if not self.hidden_dim:
            self.hidden_dim = 32 * math.ceil(self.dim / 12) if self.gated else 4 * self.dim
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads")
        if self.positions == "rope" and self.rope_dim % 2:
            raise ValueError(f"RoPE rotates pairs: the head size must be even, got {self.rope_dim}")
        if self.time_features % 2:
            raise ValueError(f"time_features are pairs of a sine and a cosine: their number must "
                             f"be even, got {self.time_features}")
        if self.n_experts:
            self.check_experts()
        for name in ("mask_token_id", "delete_token_id", "insert_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")
        self.check_ends()

    def check_experts(self):
        E, k, groups = self.n_experts, self.experts_per_token, self.router_groups
        self.expert_dim = self.expert_dim or max(1, self.hidden_dim // k)
        if not self.gated or self.mlp_bias:
            raise ValueError("experts are gated MLPs without biases: gated must be true, mlp_bias "
                             "false")
        if k > E or E % groups:
            raise ValueError(f"{k} experts a token (experts_per_token) cannot be chosen of {E}, "
                             f"or {E} do not divide into {groups} groups (router_groups)")
        if not k <= E // groups * self.router_top_groups <= E:
            raise ValueError(f"router_top_groups {self.router_top_groups} does not fit: {k} of {E} "
                             f"experts are to be chosen in the best of {groups} groups")
        layers = self.dense_layers or []
        if not set(layers) <= set(range(self.n_layers)):
            raise ValueError(f"dense_layers must be layers below {self.n_layers}, got {layers}")

    def check_ends(self):
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
        """Make `token`, the tokenizer's end of text, eos_token_id. Where there are several ends,
        the others stay."""
        others = self.ends if token is not None and len(self.ends) > 1 else ()
        self.set_ends([token, *others])

    def check_fields(self):
        """Each value must be what its annotation above says, a size at least 1."""
        sizes = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_len",
                 "global_every", "experts_per_token", "router_groups", "router_top_groups")
        choices = {"positions": ("rope", "learned"), "norm": ("rms", "layer"),
                   "activation": tuple(ACTIVATIONS), "head_activation": tuple(ACTIVATIONS),
                   "router": ("softmax", "sigmoid"), "router_bias": ("none", "choice", "weight")}
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type in (int | None, float | None) and value is None:
                continue
            if field.type in (int, int | None):
                low = int(name in sizes)
                if type(value) is not int or not low <= value <= 10**9:
                    raise ValueError(f"{name} must be a whole number from {low} to 10**9, got "
                                     f"{value!r}")
            if field.type is float and (type(value) not in (int, float) or not 0 < value < 1e18):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
            is_share = name == "rope_share" or field.type == float | None
            if is_share and (type(value) not in (int, float) or not 0 <= value <= 1):
                raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r}")
            if name in choices and value not in choices[name]:
                raise ValueError(f"{name} must be one of {', '.join(choices[name])}, got {value!r}")

    def is_local(self, layer):
        return self.local_window > 0 and layer % self.global_every != 0

    def is_sparse(self, layer):
        return self.n_experts > 0 and layer not in (self.dense_layers or ())

    @property
    def rope_dim(self):
        return int(self.head_dim * self.rope_share)


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


class Cache:
    """Keys and values of all T positions of a canvas, per layer [B, G, T, C].

    A forward pass of S tokens writes their keys and values at their positions and attends to all T.
    sampling/engine.py says which positions it feeds: one for autoregressive decoding, a block or
    more for diffusion.
    """

    def __init__(self, config, batch_size, length, device=None, dtype=None):
        shape = (config.n_layers, batch_size, config.n_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = length    # positions that are in use, from the first on
        self.rows = None        # int64 [A]: the next pass is for these rows of the batch; None: all

    def place(self, positions, A):
        """The next pass writes its keys and values at positions [S] or [A, S] of A rows."""
        G, T = self.keys.shape[2:4]
        device = positions.device
        rows = torch.arange(A, device=device) if self.rows is None else self.rows
        heads = rows[:, None] * G + torch.arange(G, device=device)                      # [A, G]
        places = heads[..., None] * T + positions.expand(A, -1)[:, None]              # [A, G, S]
        self.places = places.flatten()                  # of B * G * T

    def update(self, layer, k, v):
        """Write k, v [A, G, S, C] where `place` said. Returns all keys and values in use of those
        rows, [A, G, length, C] each."""
        found = []
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):      # [B, G, T, C] each
            C = kept.shape[-1]
            kept.view(-1, C).index_copy_(0, self.places, new.reshape(-1, C).to(kept.dtype))
            in_use = kept[:, :, :self.length]
            found.append(in_use if self.rows is None else in_use[self.rows])
        return found


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
    indices select [N]; None: x as it is."""
    if select is None:
        return x
    if select.dtype == torch.bool:
        return x[select]
    return x.flatten(0, 1)[select]


def one_later(x):
    """x [B, S, ...] shifted by one position; zeros at the first."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


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

    def __init__(self, config):
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
        """Random weights: matrices and tied embeddings N(0, 0.02^2) as in GPT-2, other embeddings
        N(0, 1), biases zero. So the first loss is about log V. Returns self."""
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

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size, new=()):
        """Make room for at least vocab_size tokens. Rows that are added, and those of the ids
        `new`, become the mean of all others: a new token is as likely as an average one. Returns
        self.

        A published vocabulary is often padded, so that a new token's row exists already, untrained.
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
        self.head.weight = self.embed.weight if tied else grown(self.head.weight)
        self.head.out_features = size
        if self.head.bias is not None:
            self.head.bias = grown(self.head.bias)
        self.config.vocab_size = size
        return self

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
        cache           a `Cache` of T positions to write to and to attend to; None: attend to
                        `tokens`.
        positions       int64 [S] or [B, S]; None: 0, 1, 2...
        Raises ValueError for more positions than a model with learned ones has.
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
        head, entropy_weights = (self.head.weight, self.head.bias), None
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
        x = self.embed(tokens)                                                          # [B, S, D]
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + config.position_offset)
        if self.embed_types is not None:
            x = x + self.embed_types.weight[0]
        if self.embed_time is not None and t is not None:
            x = x + self.embed_time(time_waves(t, config.time_features))[:, None]
        if self.embed_norm is not None:
            x = self.embed_norm(x)
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
            x = self.head_norm(ACTIVATIONS[self.config.head_activation](self.head_dense(x)))
        return x

    def edit_forward(self, tokens, attention_mask=None, t=None):
        """(substitution logits [B, S, V], insertion logits [B, S, V], rates [B, S, 3]: to
        substitute and delete token i, to insert behind it) of a model that edits."""
        states = self.edit_states(tokens, attention_mask, t)
        return self.edit_logits(states, 0), self.edit_logits(states, 2), self.edit_rates(states)

    def edit_states(self, tokens, attention_mask=None, t=None):
        """What the edit heads read, [B, S, D]. attention_mask bool [B, S]; t float [B]."""
        return self.hidden(tokens, attention_mask, t=t)

    def edit_rates(self, states):
        """Rates [B, S, 3], float32 at least, in the order substitute, delete, insert. With `shift`
        those of a token are read one position earlier, but what comes behind it at its own."""
        rates = self.rate_head(states)
        rates = F.softplus(rates.to(torch.promote_types(rates.dtype, torch.float32)))
        if not self.config.shift:
            return rates
        return torch.cat((one_later(rates[..., :2]), rates[..., 2:]), dim=-1)

    def edit_logits(self, states, kind):
        """Logits [B, S, V], float32 at least, of what is written in the place of each token (kind
        0) or behind it (kind 2)."""
        logits = self.edit_head(kind)(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return one_later(logits) if self.config.shift and kind == 0 else logits

    def edit_nll(self, states, kind, rows, targets):
        """-log p in nats [N], with its gradient, of the tokens `targets` [N] that are written at
        the flat rows int64 [N] of states [B, S, D]; kind as in `edit_logits`."""
        if self.config.shift and kind == 0:
            rows = rows - 1
        states = states.flatten(0, 1)[rows]
        logits = self.edit_head(kind)(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="none")

    def edit_head(self, kind):
        if kind == 2:
            return self.insert_head
        return self.head if self.substitute_head is None else self.substitute_head

    def who_sees_whom(self, positions, attention_mask, cache):
        """((mask of the global layers, mask of the local layers), causal), as `kernels.attend`
        takes them: None or bool broadcastable to [B, H, S, T]; `causal` stands for the mask of a
        causal model that needs no other."""
        config = self.config
        if isinstance(attention_mask, BlockMask):
            if config.local_window:
                raise ValueError("a BlockMask cannot be combined with local attention: pass a bool "
                                 "mask")
            return (attention_mask, None), False
        given = None if attention_mask is None else attention_mask.bool()
        if given is not None and given.dim() == 3 and not config.local_window:
            return (kernels.tiled(given), None), False
        causal = config.causal and (given is None or given.dim() == 2)
        if causal and given is None and cache is None and not config.local_window:
            return (None, None), True
        mask = None
        if given is not None:
            keys_only = given.dim() == 2
            mask = given[:, None, None, :] if keys_only else given[:, None]     # [B, 1, 1 or S, T]
        keys = positions
        if cache is not None:
            keys = torch.arange(cache.length, device=positions.device)
        ahead = keys[..., None, :] - positions[..., :, None]  # key minus query: [S, T] or [B, S, T]
        if ahead.dim() == 3:
            ahead = ahead[:, None]                                                    # [B, 1, S, T]
        if causal and mask is None:
            mask = ahead <= 0
        elif causal:
            mask = mask & (ahead <= 0) | (ahead == 0)         # a row that sees nothing would be NaN
        if cache is not None and mask is not None:
            mask = kernels.unless_all(mask)
        if not config.local_window:
            return (mask, None), False
        near = ahead.abs() <= config.local_window // 2
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

    def expert_parameters(self):
        """How many parameters all experts have together; a token uses k / E of them."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, ExpertLinear))

    def flops_per_token(self, seq_len, head_share=1.0, training=True):
        """Floating-point operations per token: 2 per weight of each matrix product and 4 H C T for
        attention, three times that with the backward pass (PaLM, arXiv 2204.02311, appendix B).
        head_share: the share of rows that reach the head."""
        c = self.config
        matrices = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        matrices += self.expert_parameters() * c.experts_per_token // max(1, c.n_experts)
        head = self.head.weight.numel()
        if self.head_dense is not None:
            head += self.head_dense.weight.numel()
        attention = 4 * c.n_layers * c.n_heads * c.head_dim * seq_len
        forward = 2 * (matrices + head_share * head) + attention
        return 3 * forward if training else forward

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
        checkpoint that was loaded."""
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
