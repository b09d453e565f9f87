"""What is computed otherwise for speed: norm, attention, experts, the loss over a large vocabulary,
drawing, products, alignments.

Nothing here is an idea of its own. Every function equals a plain line of mathematics, written in
its docstring and computed by that line when `PLAIN` is true; tests/test_kernels.py holds the two
equal. (A BlockMask is read by flex_attention alone; the plain alignments stand in edits.py and
edit_tokens.py.) Read model.py first. Whoever changes the mathematics there sets PLAIN = True and
forgets this file.

Shapes as in model.py: B batch, S queries, T keys, V vocabulary, D width, H heads, G key/value
heads, C head size, N rows, E experts.
"""
import contextlib
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

PLAIN = False       # True: everything below is computed by its plain line

# --------------------------------------------------------------------------------------------------
# Norm


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension of x [..., D]."""
    weight = weight.to(x.dtype)
    if PLAIN:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and torch.is_grad_enabled():
        return HandRMSNorm.apply(x, weight, eps)
    if on_cpu and x.dtype in (torch.float32, torch.float64):
        # Torch composes it of seven operations there; these are five, two of them on all of x.
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(x.shape[-1]**-0.5)
        return (x / root.hypot_(scalar(eps**0.5, x.dtype))).mul_(weight)
    return F.rms_norm(x, weight.shape, weight, eps)


@functools.lru_cache(maxsize=64)
def scalar(value, dtype):
    """A number as a tensor on the CPU, made once."""
    return torch.tensor(value, dtype=dtype)


class HandRMSNorm(torch.autograd.Function):
    """`rms_norm` and its gradient by hand.

        n = x / rms(x)      y = n * weight
        dx = (g * weight - n * mean(g * weight * n)) / rms(x)      dweight = sum over rows of g * n

    On a CPU torch composes them of a dozen operations, which take four times as long for [2048,
    128].
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        precise = torch.promote_types(x.dtype, torch.float32)       # float64 stays float64
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()                     # 1 / rms(x)
        n = (x * scale).to(x.dtype)
        ctx.save_for_backward(n, scale, weight)
        return n * weight

    @staticmethod
    def backward(ctx, g):
        n, scale, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (g * n).flatten(0, -2).sum(0)
        g = g * weight
        grad_x = (g - n * (g * n).mean(-1, keepdim=True)) * scale.to(g.dtype)
        return grad_x, grad_weight, None


# --------------------------------------------------------------------------------------------------
# Attention


def attend(q, k, v, visible=None, causal=False):
    """softmax(q k^T / sqrt(C)) v over the keys that a query sees: [B, H, S, C].

    q [B, H, S, C], k and v [B, G, T, C]: H / G query heads share a key/value head.
    visible     None: all keys; bool broadcastable to [B, H, S, T]; a BlockMask (flex_attention); or
                what `tiled` makes of a bool mask.
    causal      with visible None: a query sees the keys up to its own position.
    """
    H, S, C = q.shape[1:]
    G, T = k.shape[1:3]
    if isinstance(visible, BlockMask):
        # Under autocast a norm may have made q and k float32, which only this kernel minds.
        return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=visible,
                              enable_gqa=H != G)
    if isinstance(visible, list):
        return attend_tiles(q, k, v, visible)
    small_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16 and S * T <= 2**16
    if PLAIN or small_bf16 and torch.is_grad_enabled():
        # Training short sequences in bfloat16 on a CPU, torch's fused kernel takes up to three
        # times as long as the formula.
        return attend_by_formula(q, k, v, visible, causal)
    if H != G and S == 1 and not causal and q.device.type == "cpu":
        return attend_in_groups(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=H != G)


def attend_by_formula(q, k, v, visible=None, causal=False):
    """The plain form of `attend`."""
    H, S, C = q.shape[1:]
    G, T = k.shape[1:3]
    if H != G:
        k = k.repeat_interleave(H // G, dim=1)                                        # [B, H, T, C]
        v = v.repeat_interleave(H // G, dim=1)
    if causal:
        visible = torch.ones(S, T, dtype=torch.bool, device=q.device).tril()
    scores = (q * C**-0.5) @ k.transpose(-1, -2)                                      # [B, H, S, T]
    if visible is not None:
        # Not -inf: a query that sees nobody, as padding may, would become NaN.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ v


def attend_in_groups(q, k, v, visible=None):
    """`attend` for one query, S = 1: the H / G heads that share keys and values become that many
    queries of one head, so that torch's kernel reads those once and not H / G times."""
    B, H, _, C = q.shape
    G = k.shape[1]
    if visible is not None and visible.dim() == 4 and visible.shape[1] != 1:
        visible = visible.expand(-1, H, -1, -1).reshape(len(visible), G, H // G, -1)
    y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, C), k, v, visible)
    return y.view(B, H, 1, C)


def unless_all(visible):
    """A bool mask, or None if it hides nobody: attention without a mask takes less time. Only on a
    CPU, where one may look at a tensor without waiting for it."""
    if PLAIN or visible.device.type != "cpu" or not visible.all():
        return visible
    return None


_tiles = WeakIdKeyDictionary()      # mask -> its tiles, for as long as somebody keeps the mask


def remember_tiles(visible):
    """The same mask, bool [1, S, T], which `tiled` will know again.

    Block diffusion's mask over [x_t, x_0] hides three quarters of all pairs. On a CPU such a mask
    is cut into tiles of 128 queries with the keys that any of them sees; what nobody sees costs
    nothing.
    """
    tiles = find_tiles(visible[0])
    saved = sum(shown.numel() for _, _, shown in tiles) < 0.75 * visible.numel()
    if saved and visible.device.type == "cpu":
        _tiles[visible] = tiles
    return visible


def tiled(visible):
    """A mask, bool [1 or B, S, T], as `attend` takes it: its tiles, or bool [1 or B, 1, S, T]."""
    if PLAIN or visible not in _tiles:
        return visible[:, None]
    return _tiles[visible]


def find_tiles(visible, size=128):
    """[(queries, a slice; keys, slices; bool of their sizes), ...] of a mask [S, T]."""
    S, T = visible.shape
    tiles = []
    for start in range(0, S, size):
        queries = slice(start, min(start + size, S))
        seen = visible[queries].any(0)                                                  # [T]
        edges = F.pad(seen, (1, 1)).int().diff().nonzero()[:, 0].tolist()        # in turn: from, to
        keys = [slice(begin, end) for begin, end in zip(edges[::2], edges[1::2])]
        tiles.append((queries, keys, visible[queries][:, seen]))
    return tiles


def attend_tiles(q, k, v, tiles):
    """`attend` for the tiles of a mask, which together are all queries in order."""
    parts = []
    for queries, keys, visible in tiles:
        some_k = torch.cat([k[:, :, part] for part in keys], dim=2)
        some_v = torch.cat([v[:, :, part] for part in keys], dim=2)
        parts.append(attend(q[:, :, queries], some_k, some_v, visible))
    return torch.cat(parts, dim=2)


# --------------------------------------------------------------------------------------------------
# Experts


def expert_linear(x, weight, counts):
    """y_n = weight[e] x_n for rows x [N, in] that are sorted by their expert e: [N, out].

    weight [E, out, in]; counts int64 [E], rows of each expert, on the device of x.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if PLAIN:
        parts = x.split(counts.tolist())
        return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight)])
    # A GPU has a kernel that learns `counts` without asking them back; its rows must be of whole
    # 16 bytes.
    of_whole_pieces = weight.shape[1] % 8 == weight.shape[2] % 8 == 0
    if x.is_cuda and x.dtype == torch.bfloat16 and of_whole_pieces:
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).int())
    return ExpertLinearProduct.apply(x, weight, shares(counts, len(x)))


def shares(counts, total):
    """`counts` as a list. Where tensors have no numbers (FakeTensorMode, which plans memory), the
    first gets all: it makes no difference to the memory."""
    try:
        return counts.tolist()
    except DataDependentOutputException:
        return [total] + [0] * (len(counts) - 1)


class ExpertLinearProduct(torch.autograd.Function):
    """`expert_linear` by one product for each expert that has rows, written where it belongs.

        dx_n = weight[e]^T g_n      dweight[e] = sum over the rows n of e of g_n x_n^T

    Composed of torch's own pieces, the backward pass would copy all of `weight` for each expert.
    """

    @staticmethod
    def forward(ctx, x, weight, counts):
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(len(x), weight.shape[1])
        for part, matrix, out in zip(x.split(counts), weight, y.split(counts)):
            if len(part):
                torch.mm(part, matrix.T, out=out)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        parts = g.split(ctx.counts)
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for part, matrix, out in zip(parts, weight, grad_x.split(ctx.counts)):
                if len(part):
                    torch.mm(part, matrix, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for part, rows, out in zip(parts, x.split(ctx.counts), grad_weight):
                torch.mm(part.T, rows, out=out)         # 0 for an expert without rows
        return grad_x, grad_weight, None


# --------------------------------------------------------------------------------------------------
# Loss over a large vocabulary


def linear_cross_entropy(hidden, weight, bias, targets, row_weights, chunk, entropy_weights=None):
    """(sum_n w_n * nll_n + e_n * H_n, with its gradient; nll [N], for reading only), in nats:

        nll_n = logsumexp(z_n) - z_n[target_n],     z = hidden @ weight.T + bias
        H_n = -sum_v p_nv log p_nv,                 p = softmax(z)

    hidden [N, D], weight [V, D], bias [V] or None, targets int64 [N], row_weights w [N],
    entropy_weights e [N] or None for none. `chunk` rows of the logits z [N, V] exist at once
    (float32; twice as many in bfloat16), with entropies twice.
    """
    if PLAIN:
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, targets, reduction="none")
        total = (nll * row_weights).sum()
        if entropy_weights is not None:
            entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
            total = total + (entropy * entropy_weights).sum()
        return total, nll.detach()
    if not torch.is_grad_enabled():  # the function cannot know, and would make gradients for nobody
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, row_weights, chunk,
                                    entropy_weights)


@torch.no_grad()
def linear_argmax(hidden, weight, bias, chunk):
    """The most probable token int64 [N] of each row: argmax over V of hidden @ weight.T + bias;
    arguments as of `linear_cross_entropy`."""
    if PLAIN:
        return F.linear(hidden, weight, bias).argmax(-1)
    chosen = [largest(F.linear(rows, weight, bias)) for rows in hidden.split(max(1, chunk))]
    return torch.cat(chosen)


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` without ever holding the logits.

    Each chunk of rows makes its logits, reads its losses off, turns the logits in place into their
    own gradient, softmax(z) - onehot(target), and adds that to the gradients of hidden and weight,
    all in the forward pass, where the logits are at hand. To compute them again in the backward
    pass would cost a third more.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weights, chunk, entropy_weights=None):
        device, dtype = hidden.device, hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        precise = torch.promote_types(dtype, torch.float32)         # of sums and of nll
        ctx.dtypes = hidden.dtype, weight.dtype, precise
        # A frozen head (LoRA) needs no gradient of the size of the vocabulary.
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        with torch.autocast(device.type, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            N, V, step = len(targets), len(weight), max(1, chunk * 4 // dtype.itemsize)
            nll = torch.empty(N, dtype=precise, device=device)
            entropy = torch.zeros(N, dtype=precise, device=device)
            grad_h = torch.empty_like(hidden) if need_h else None
            grad_w = torch.zeros(weight.shape, dtype=precise, device=device) if need_w else None
            grad_b = torch.zeros(V, dtype=precise, device=device) if need_b else None
            buffer = torch.empty(min(step, N), V, dtype=dtype, device=device)
            for start in range(0, N, step):
                rows = slice(start, start + step)
                target, row_weight = targets[rows, None], row_weights[rows, None]       # [step, 1]
                p = buffer[:len(target)]                                                # [step, V]
                torch.mm(hidden[rows], weight.T, out=p)
                if bias is not None:
                    p += bias
                torch.softmax(p, dim=-1, out=p)                                         # in place
                nll[rows] = -p.gather(1, target)[:, 0].to(precise).log()
                if entropy_weights is not None:
                    part = torch.special.entr(p)                                        # -p log p
                    H = part.sum(-1, keepdim=True)                                      # [step, 1]
                    entropy[rows] = H[:, 0].to(precise)
                    part.addcmul_(p, -H)                                                # d H / d z
                if need_h or need_w or need_b:
                    p.scatter_add_(1, target, p.new_full(target.shape, -1))            # d nll / d z
                if entropy_weights is not None:         # both are weighed here, and below no more
                    p.mul_(row_weight.to(dtype))
                    p.addcmul_(part, entropy_weights[rows, None].to(dtype))
                    row_weight = torch.ones_like(row_weight)
                if need_h:
                    grad_h[rows] = (p @ weight) * row_weight.to(dtype)                  # [step, D]
                if need_w:
                    weighted = hidden[rows] * row_weight.to(dtype)
                    if dtype == precise:
                        grad_w.addmm_(p.T, weighted)
                    else:
                        grad_w.add_(p.T @ weighted)
                if need_b:
                    grad_b += (p.to(precise) * row_weight).sum(0)
            # Where exp underflows to 0 the loss is computed the long way.
            largest = {torch.float16: 9, torch.float64: 700}.get(dtype, 80)
            for rows in (nll > largest).nonzero()[:, 0].split(step):
                logits = F.linear(hidden[rows], weight, None if bias is None else bias.to(dtype))
                nll[rows] = F.cross_entropy(logits.to(precise), targets[rows], reduction="none")
        ctx.grads = grad_h, grad_w, grad_b
        ctx.mark_non_differentiable(nll)
        total = (nll * row_weights).sum()
        if entropy_weights is not None:
            total = total + (entropy * entropy_weights).sum()
        return total, nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were used already: call backward once")
        grads = ctx.grads
        if ctx.dtypes[2] == torch.float64:                          # gradcheck goes backward often
            grads = [None if grad is None else grad.clone() for grad in grads]
        else:
            ctx.grads = None
        scaled = []
        for grad, dtype in zip(grads, ctx.dtypes):
            scaled.append(None if grad is None else grad.mul_(grad_loss).to(dtype))
        return *scaled, None, None, None, None


# --------------------------------------------------------------------------------------------------
# Drawing from a large vocabulary


def sample_tokens(logits, temperature, uniform):
    """Token ids [N] from softmax(logits / temperature), logits [N, V], by inverting the
    distribution function at uniform float64 [N]: equal to diffusion.sample_tokens, which adds up
    all V entries.

    First the piece of 512 entries is found, then the entry in it. Pieces are summed in float32,
    which copies nothing, and added up in float64.
    """
    if temperature == 0:
        return largest(logits)
    N, V = logits.shape
    p = (logits / temperature).softmax(dim=-1)
    if PLAIN:
        cumulative = p.double().cumsum(-1)                                          # [N, V]
        target = uniform.to(p.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0]
    if V % 512:
        p = F.pad(p, (0, -V % 512))
    p = p.view(N, -1, 512)                                                        # [N, pieces, 512]
    cumulative = p.sum(-1).double().cumsum(-1)                                      # [N, pieces]
    target = uniform.to(logits.device, torch.float64)[:, None] * cumulative[:, -1:]
    piece = torch.searchsorted(cumulative, target, right=True)                      # [N, 1]
    piece = piece.clamp(max=cumulative.shape[1] - 1)
    before = cumulative.gather(1, (piece - 1).clamp(min=0))
    before = torch.where(piece > 0, before, 0.0)
    inside = p[torch.arange(N, device=p.device), piece[:, 0]].double()              # [N, 512]
    entry = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    index = torch.arange(512, device=p.device)
    last = torch.where(inside > 0, index, 0).amax(-1, keepdim=True)
    entry = torch.minimum(entry, last)      # rounding must not lead past the last possible one
    return (piece * 512 + entry)[:, 0]


def largest(logits, size=128):
    """logits.argmax(-1) int64 [N] for logits [N, V]: the first of the largest.

    On a CPU torch's argmax takes twenty times as long as its amax, so first the piece of `size`
    entries is found, then the entry in it.
    """
    N, V = logits.shape
    if PLAIN or V % size or logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    pieces = logits.unflatten(1, (-1, size))                                     # [N, pieces, size]
    piece = pieces.amax(dim=-1).argmax(dim=-1)                                      # [N]
    entry = pieces[torch.arange(N), piece].argmax(dim=-1)
    return piece * size + entry


# --------------------------------------------------------------------------------------------------
# Products of few rows with the same weights again and again


def pack(model, limit=2**31):
    """Let the nn.Linear layers of a model on a CPU read copies of their matrices in oneDNN's order,
    up to `limit` bytes of them. Returns the layers that were changed, for `unpack`.

    MKL puts a matrix in its own order for every product, which for few rows takes longer than the
    product (V 126464, D 256, 16 rows, two threads: 26 ms in place of 7). A copy takes as long to
    make as three products. A call of oneDNN takes 25 to 45 us besides the product, so layers that
    read the same vectors become one product, see `products`. While a layer is packed its weights
    must not be trained, moved or copied. Compiled models keep their own products.
    """
    if PLAIN or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return []
    if torch.is_autocast_enabled("cpu"):
        return []
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return []
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    changed = []
    for linears in linears_by_input(model):
        size = sum(linear.weight.nbytes for linear in linears)
        if size > limit or not all(can_pack(linear, dtypes) for linear in linears):
            continue
        limit -= size
        if len(linears) == 1:
            linears[0].forward = PackedProduct(linears[0].weight.detach(), linears[0].bias)
        else:
            linears[0].together = pack_together(linears)
        changed.extend(linears)
    return changed


def can_pack(linear, dtypes):
    """Whether an nn.Linear layer has an ordinary matrix on a CPU, of one of these types, and is not
    packed already."""
    weight = linear.weight.data
    is_packed = "forward" in vars(linear) or "together" in vars(linear)
    on_cpu = type(weight) is torch.Tensor and weight.device.type == "cpu"
    return on_cpu and weight.dtype in dtypes and not is_packed


def unpack(linears):
    """Undo `pack`."""
    for linear in linears:
        vars(linear).pop("forward", None)
        vars(linear).pop("together", None)


@contextlib.contextmanager
def packed(model, limit=2**31):
    """`pack` for as long as this lasts; nothing if the model is packed already."""
    changed = pack(model, limit)
    try:
        yield
    finally:
        unpack(changed)


def linears_by_input(model):
    """The nn.Linear layers of a model in lists of those that read the same vectors, as model.py
    names them; the last layer alone, its head, first: it is the largest."""
    groups = []
    for module in model.modules():
        for names in (("q", "k", "v"), ("gate", "up")):
            group = [getattr(module, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in group):
                groups.append(group)
    grouped = {id(linear) for group in groups for linear in group}
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    return [[linear] for linear in layers[::-1] if id(linear) not in grouped] + groups


def products(x, *linears):
    """[linear(x) for linear in linears], by one product if `pack` made one matrix of theirs."""
    together = getattr(linears[0], "together", None)
    if together is None or is_one_row(x):
        return [linear(x) for linear in linears]
    return together(x).split([linear.out_features for linear in linears], dim=-1)


def pack_together(linears):
    """The PackedProduct of layers that read the same vectors: their matrices, one below the other.
    For a single row `products` asks the layers themselves."""
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in linears])
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return PackedProduct(weight, bias, False)


def is_one_row(x):
    """Whether x [..., in] is a single row that MKL multiplies by the matrix as it is in less time
    than oneDNN by its copy. That is so on one thread: MKL's product of one row never uses more."""
    one_row = x.dtype == torch.float32 and x.numel() == x.shape[-1]
    return one_row and torch.get_num_threads() == 1


class PackedProduct:
    """x @ weight.T + bias, with the matrix in oneDNN's order. keep_plain: for a single row the
    matrix as it was may be read instead, see `is_one_row`."""

    def __init__(self, weight, bias, keep_plain=True):
        self.plain = weight if keep_plain else None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias

    def __call__(self, x):
        if self.plain is not None and is_one_row(x):
            y = torch.mv(self.plain, x.flatten())
            if self.bias is not None:
                y = y + self.bias
            return y.view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


# --------------------------------------------------------------------------------------------------
# Alignments


def align_at_unit_cost(x_0, x_1, blank):
    """edits.align where a substitution and a gap cost 1: (z_0, z_1).

    Neighbours in the table of costs differ by -1, 0 or 1, so that a column is a few whole numbers
    with a bit a row, and a dozen operations on them make the next column (Myers 1999, Hyyro 2001).
    Two columns of bits tell the way back: where a pair is among the cheapest, and where a deletion
    is. 1,024 tokens take 2 ms in place of 600.
    """
    n, ones = len(x_0), (1 << len(x_0)) - 1
    places = {}                                 # token -> the rows that hold it
    for i, token in enumerate(x_0):
        places[token] = places.get(token, 0) | 1 << i
    up, down = ones, 0                          # rows that cost one more, less, than the row above
    pairs, deletions = [], []
    for token in x_1:
        equal = places.get(token, 0)
        same = ((equal & up) + up ^ up) | equal | down      # as the entry above and to the left
        right = (down | ~(same | up)) << 1 | 1              # one more than the entry to the left
        less = (same & up) << 1                             # one less than that
        up, down = (less | ~(same | right)) & ones, right & same & ones
        pairs.append(equal | ~same & ones)
        deletions.append(up)
    i, j, z_0, z_1 = n, len(x_1), [], []
    while i or j:
        if i and j and (pairs[j - 1] >> (i - 1)) & 1:
            i, j = i - 1, j - 1
            z_0.append(x_0[i])
            z_1.append(x_1[j])
        elif i and (j == 0 or (deletions[j - 1] >> (i - 1)) & 1):
            i = i - 1
            z_0.append(x_0[i])
            z_1.append(blank)
        else:
            j = j - 1
            z_0.append(blank)
            z_1.append(x_1[j])
    return z_0[::-1], z_1[::-1]


def common_tokens(x_0, x_1):
    """What edit_tokens.common_tokens finds, faster: 1,024 tokens take 1 to 2 ms in place of 260.

    Each row of its table of lengths is kept as one whole number with a bit for each token of x_1.
    Bit j is 0 where the subsequence grows by one as x_1[j] is added, so that a sum and a difference
    of whole numbers make the next row of the last (Hyyro 2004).
    """
    ones = (1 << len(x_1)) - 1
    places, row, rows = {}, ones, []                    # token -> the bits of x_1 that hold it
    for j, token in enumerate(x_1):
        places[token] = places.get(token, 0) | (1 << j)
    for token in x_0:
        equal = row & places.get(token, 0)
        row = ((row + equal) | (row - equal)) & ones
        rows.append(row)
    i, j, found = len(x_0), len(x_1), []
    while i and j:
        if x_0[i - 1] == x_1[j - 1]:
            i, j = i - 1, j - 1
            found.append((i, j))
        elif (rows[i - 1] >> (j - 1)) & 1:              # without x_1[j - 1] it is as long
            j = j - 1
        else:
            i = i - 1
    return found[::-1]
