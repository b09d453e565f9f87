"""What distinguishes one supported model from another: the fields of `Config`, and their checks.

model.py builds what they say; pretrained/ reads them from published files. A new field gets its
default and its comment here, and its meaning where it is read.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch.nn.functional as F


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}


# What a field may hold follows from its annotation, but for these.
CHOICES = {
    "positions": ("rope", "learned"), "norm": ("rms", "layer"), "activation": ACTIVATIONS,
    "head_activation": ACTIVATIONS, "router": ("softmax", "sigmoid"),
    "router_bias": ("none", "choice", "weight"), "step_schedule": ("even", "timesteps"),
    "edit_schedule": ("linear", "cubic", "cube", "cosine"), "noise": ("mask", "uniform", "hybrid")}
SIZES = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_len", "global_every",
         "experts_per_token", "router_groups", "router_top_groups")     # at least 1


def fits_field(name, kind, value):
    """(whether the field `name` of Config, annotated as `kind`, may have this value; what it must
    be, in words)."""
    is_number = type(value) in (int, float)     # isinstance would take True for a number
    if name in CHOICES:
        choices = list(CHOICES[name])
        return value in choices, f"one of {', '.join(choices)}"
    if kind is bool:
        return type(value) is bool, "true or false"
    if kind in (int, int | None):
        low = 1 if name in SIZES else 0
        fits = type(value) is int and low <= value <= 10**9
        return fits, f"a whole number from {low} to 10**9"
    if name == "uniform_share":
        return is_number and 0 <= value < 1, "at least 0 and below 1"
    if name == "rope_share":
        return is_number and 0 < value <= 1, "between 0 and 1, 0 excluded"
    if kind == float | None:                    # a probability
        return is_number and 0 <= value <= 1, "between 0 and 1"
    if kind is float:
        return is_number and 0 < value < 1e18, "a positive number"
    if kind is dict:
        return isinstance(value, dict), "a dict"
    if name == "dense_layers":
        return isinstance(value, list | tuple), "a list"
    return True, ""         # family: pretrained/ knows the names; eos_token_ids: see check_ends


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
    position_offset: int = 0        # RoBERTa's learned positions start after its padding index
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # None, or {"rope_type": "linear" or "llama3", "factor": ...}
    rope_share: float = 1.0         # of a head's dimensions, from the first on, that RoPE rotates
    local_window: int = 0     # a local layer sees local_window // 2 positions to each side; 0: none
    global_every: int = 1           # with local_window: layers 0, n, 2n... are global
    local_rope_theta: float = 10000.0
    norm: str = "rms"               # or "layer"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    post_norm: bool = False    # True: norm after each residual sum (BERT); False: before each part
    embed_norm: bool = False        # a norm right after the embedding
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
    shift: bool = False             # token i is predicted at position i - 1 (read by passes.py)
    noise: str = "mask"             # that it learned to undo: "mask", "uniform", "hybrid"
    uniform_share: float = 0.0      # of hybrid noise: uniform tokens at t = 1/2 (noises.py)
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
    delete_token_id: int | None = None      # of a model that edits by tokens: what stands here goes
    insert_token_id: int | None = None      # and: a mask comes before it (edit_tokens.py)
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
        self.check_noise()
        for name in ("mask_token_id", "delete_token_id", "insert_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.get("rope_type") not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling must be None or of rope_type linear or llama3, got "
                             f"{scaling!r}")
        self.check_ends()

    def check_noise(self):
        if self.uniform_share and self.noise != "hybrid":
            raise ValueError(f"uniform_share is of hybrid noise, got {self.uniform_share} with "
                             f"noise {self.noise}")
        if self.noise == "hybrid" and self.mask_token_id is None:
            raise ValueError("hybrid noise is masks in part: mask_token_id is missing")
        is_other = self.causal or self.shift or self.block_length or self.edits
        if self.noise != "mask" and is_other:
            raise ValueError(f"a model of {self.noise} noise sees the whole text and predicts each "
                             "token where it stands: causal, shift, block_length and edits do not "
                             "fit")

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
        if any(layer not in range(self.n_layers) for layer in layers):
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
        """Each value must be what its annotation above says, a size at least 1. None is allowed
        where it is the default."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            fits, wanted = fits_field(field.name, field.type, value)
            if not fits:
                raise ValueError(f"{field.name} must be {wanted}, got {value!r}")

    def is_local(self, layer):
        return self.local_window > 0 and layer % self.global_every != 0

    def is_sparse(self, layer):
        return self.n_experts > 0 and layer not in (self.dense_layers or ())

    @property
    def rope_dim(self):
        return int(self.head_dim * self.rope_share)
