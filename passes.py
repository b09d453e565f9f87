"""One forward pass: how a loss, a bound or a sampler asks a model for its predictions.

A model may predict a token where it stands or one position earlier (`shift`), and see a text as a
whole, in blocks or from left to right. All of that is settled here, so that diffusion.py can speak
of tokens and their predictions alone. Pure functions of tensors; the model is anything that maps
tokens to logits as model.Transformer does and has its `config`.

Shapes: B batch, T positions, V vocabulary, N tokens that are asked about.
"""
import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import kernels

# --------------------------------------------------------------------------------------------------
# What a model is


def config_of(model):
    return getattr(model, "module", model).config       # DistributedDataParallel keeps it there


def noise_of(model):
    """What noise makes of tokens: "mask", unless the config says otherwise."""
    return getattr(config_of(model), "noise", "mask")


def mask_token_id(model):
    """The id of the mask token. Raises ValueError for a model that has none, or that does something
    else with a text than to fill its masks."""
    config = config_of(model)
    if getattr(config, "edits", False):
        raise ValueError("this model inserts, deletes and substitutes (train_edits.py): what fills "
                         "or scores masks cannot use it")
    if noise_of(model) != "mask":
        raise ValueError(f"this model was trained with {noise_of(model)} noise (noises.py): what "
                         "fills or scores masks cannot use it")
    token = config.mask_token_id
    if token is None:
        raise ValueError("this model has no mask token: convert it first (convert_bert.py, "
                         "convert_ar.py)")
    return token


def canvas_mask_id(model):
    """The id that stands for a mask on a canvas to be filled. An autoregressive model has no mask
    token and never reads it: there it is vocab_size."""
    config = config_of(model)
    return config.vocab_size if config.causal else mask_token_id(model)


def own_block_length(config, asked):
    """How many tokens are denoised together: the model's own number where it has one. `asked`, None
    for no wish, counts with all other models and with LLaDA2, whose blocks may have any length."""
    if config.causal:
        return 1
    if config.block_length and not (config.blocks_from_start and asked is not None):
        return config.block_length
    return asked


# --------------------------------------------------------------------------------------------------
# -log p of tokens


def weighted_nll(model, inputs, targets, mask, weights, shift=None, block_length=0,
                 cap_weight=0.0, **how):
    """(sum over masked of weights * nll, with its gradient; nll [B, T], detached, 0 elsewhere),
    where

        nll = -log p(target | inputs)       in nats

    inputs [B, T], or [B, 2T] for [x_t, x_0]; targets, mask, weights [B, T]. shift None: the
    model's. cap_weight times the mean entropy of the right predictions is added to the sum.
    """
    B, T = targets.shape
    shift = config_of(model).shift if shift is None else shift
    masked = mask.flatten().nonzero()[:, 0]                                             # [N]
    rows = prediction_rows(masked, T, inputs.shape[1], shift, block_length)
    if inputs.shape[1] == 2 * T:
        how["positions"] = torch.arange(T, device=inputs.device).repeat(2)              # [2T]
    target, row_weights = targets.flatten()[masked], weights.flatten()[masked]
    if hasattr(model, "weighted_nll"):      # the same without ever holding the logits: kernels.py
        if cap_weight:
            how["cap_weight"] = cap_weight
        total, found = model.weighted_nll(inputs, rows, target, row_weights, **how)
    else:
        logits = row_logits(model, inputs, rows, **how)                                 # [N, V]
        found = F.cross_entropy(logits, target, reduction="none")
        total = (row_weights * found).sum()
        if cap_weight:
            total = total + cap_weight * right_entropy(logits, target)
    nll = torch.zeros(B * T, dtype=found.dtype, device=found.device)
    nll[masked] = found.detach()
    return total, nll.view(B, T)


def right_entropy(logits, targets):
    """The mean entropy, in nats, of those rows of logits [N, V] whose most probable token is the
    target [N]; 0 if none is right (CAP; LLaDA2, 2512.15745)."""
    right = logits.argmax(-1) == targets
    entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)                  # [N]
    return (entropies * right).sum() / right.sum().clamp(min=1)


def block_nll(model, x_t, tokens, mask, weights, block_length, cap_weight=0.0):
    """`weighted_nll` of tokens int64 [B, T] that stand in blocks: each block is predicted from
    itself, noisy, and the blocks before it, clean. One pass over [x_t, x_0] does all blocks at once
    (BD3-LM, 2503.09573, section 3.2)."""
    T = tokens.shape[1]
    return weighted_nll(model, torch.cat((x_t, tokens), dim=1), tokens, mask, weights,
                        block_length=block_length, cap_weight=cap_weight,
                        attention_mask=block_attention(T, block_length, tokens.device))


def masked_nll(model, tokens, mask, attention_mask=None):
    """-log p in nats [B, T] of the tokens int64 [B, T] at `mask`, which are hidden from the model;
    0 elsewhere.

    A block-diffusion model sees the blocks before a token's own without masks, by one pass over
    [noisy, clean] as in training; an autoregressive model sees the tokens before. Raises ValueError
    if it shall predict the first token.
    """
    config, mask = config_of(model), mask.to(tokens.device)
    ones = torch.ones(tokens.shape, device=tokens.device)
    if config.causal:
        if mask[:, 0].any():
            raise ValueError("an autoregressive model does not predict the first token")
        how = {} if attention_mask is None else {"attention_mask": attention_mask}
        return weighted_nll(model, tokens, tokens, mask, ones, shift=True, **how)[1]
    noisy = torch.where(mask, mask_token_id(model), tokens)
    if not config.block_length:
        return weighted_nll(model, noisy, tokens, mask, ones, attention_mask=attention_mask)[1]
    inputs, targets, mask, visible = in_blocks(config, noisy, tokens, mask, attention_mask)
    ones = torch.ones(targets.shape, device=tokens.device)
    nll = weighted_nll(model, inputs, targets, mask, ones, block_length=config.block_length,
                       attention_mask=visible)[1]
    return nll[:, :tokens.shape[1]]


# --------------------------------------------------------------------------------------------------
# Logits: which row of a pass predicts a token


def all_logits(model, tokens, attention_mask=None):
    """Logits [B, T, V], float32 or better, at all positions of tokens [B, T]."""
    logits = model(tokens, attention_mask=attention_mask)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def row_logits(model, tokens, rows, **how):
    """Logits [N, V], float32 or better, at the flat rows int64 [N] of a pass over tokens."""
    select = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device)
    select[rows] = True
    logits = model(tokens, select=select.view(tokens.shape), **how)                     # [<= N, V]
    logits = logits[(select.cumsum(0) - 1)[rows]]       # a row may be asked for twice
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def prediction_rows(masked, T, width, shift, block_length):
    """The rows of a pass, int64 [N] into B * width, that predict the tokens at `masked`, int64 [N]
    into B * T.

    Without `shift` a token is predicted where it stands; with it, one position earlier (token 0: at
    its own). The row before a block's first token is taken from the clean half, where there is one:
    it has seen all that stands before the block.
    """
    batch, position = masked // T, masked % T
    row = position
    if shift:
        row = (position - 1).clamp(min=0)
    if shift and width == 2 * T:
        first_of_block = (position % block_length == 0) & (position > 0)
        row = torch.where(first_of_block, row + T, row)
    return batch * width + row


def predict(model, x, where, block_of, device):
    """Logits [N, V] of the tokens at the positions `where` [N] of a row x [T]."""
    config, T, how = config_of(model), len(x), {}
    if config.block_length and not config.causal:       # a block never sees later ones
        how["attention_mask"] = (block_of <= block_of[:, None])[None].to(device)        # [1, T, T]
    rows = prediction_rows(where, T, T, config.shift or config.causal, config.block_length)
    x = x.clamp(max=config.vocab_size - 1)              # an autoregressive model knows no mask
    return row_logits(model, x[None].to(device), rows.to(device), **how)


def token_ids(tokens):
    """A list of int of a list of token ids or a tensor [T]: two tensors of one token are no equal
    keys of a dict. Raises ValueError for what is no whole number."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise ValueError(f"token ids are whole numbers, got {tokens!r:.80}") from None


def check_tokens(config, sequences, is_canvas=False):
    """ValueError for a token outside the vocabulary, or what is no token, in one of the lists. The
    canvas of an autoregressive model may hold vocab_size, which stands for a mask."""
    size = config.vocab_size + 1 if is_canvas and config.causal else config.vocab_size
    for tokens in sequences:
        for token in token_ids(tokens):
            if not 0 <= token < size:
                raise ValueError(f"token {token} is outside the vocabulary of {config.vocab_size}")


def check_canvas(config, tokens):
    """ValueError for tokens [B, T] outside the vocabulary, or more of them than the context has; of
    an autoregressive model also for a mask that nothing stands before."""
    check_tokens(config, tokens.tolist(), is_canvas=True)
    if tokens.shape[1] > config.max_len:
        raise ValueError(f"{tokens.shape[1]} tokens exceed the model's context of "
                         f"{config.max_len}")
    if config.causal and (tokens[:, :1] == config.vocab_size).any():
        raise ValueError("an autoregressive model does not predict the first token: it must be "
                         "given")


def guided(logits, without_prompt, cfg_scale):
    """Classifier-free guidance: the logits of a pass with the prompt masked, plus (1 + cfg_scale)
    times the difference that the prompt makes (LLaDA, 2502.09992, eq. 16)."""
    return without_prompt + (cfg_scale + 1) * (logits - without_prompt)


# --------------------------------------------------------------------------------------------------
# Blocks: who sees whom


@functools.lru_cache(maxsize=8)
def block_attention(T, block_length, device):
    """Who sees whom in a pass over [x_t, x_0], both of T tokens: bool [1, 2T, 2T]; on a GPU a
    BlockMask.

    A noisy token sees its own noisy block and the clean blocks before it; a clean token sees the
    clean blocks up to its own.
    """
    def visible(batch, head, query, key):
        query_block, key_block = query % T // block_length, key % T // block_length
        own_noisy_block = (query < T) & (key < T) & (query_block == key_block)
        clean_before = (query < T) & (key >= T) & (query_block > key_block)
        clean_up_to_own = (query >= T) & (key >= T) & (query_block >= key_block)
        return own_noisy_block | clean_before | clean_up_to_own

    if device.type == "cuda":       # flex_attention skips what nobody sees
        return create_block_mask(visible, None, None, 2 * T, 2 * T, device=device)
    index = torch.arange(2 * T, device=device)
    return kernels.remember_tiles(visible(None, None, index[:, None], index[None, :])[None])


def in_blocks(config, noisy, tokens, mask, attention_mask):
    """([noisy, clean] int64 [B, 2T], tokens, mask, who sees whom) with T rounded up to whole
    blocks; what fills the last block, and padding, is seen by nobody but itself."""
    B, T = tokens.shape
    fill = (0, -T % config.block_length)
    shown = torch.ones(B, T, dtype=torch.bool, device=tokens.device)
    if attention_mask is not None:
        shown = attention_mask.bool()
    noisy, tokens, mask, shown = (F.pad(x, fill) for x in (noisy, tokens, mask, shown))
    T = tokens.shape[1]
    visible = block_attention(T, config.block_length, torch.device("cpu")).to(tokens.device)
    visible = visible & shown.repeat(1, 2)[:, None, :]                                 # [B, 2T, 2T]
    visible = visible | torch.eye(2 * T, dtype=torch.bool, device=tokens.device)
    return torch.cat((noisy, tokens), dim=1), tokens, mask, visible


# --------------------------------------------------------------------------------------------------
# What many passes say together


def ratio_error(nats, counts, value):
    """The standard error of value = sum of nats / sum of counts, for nats [N, draws] and counts
    [N].

        sqrt(N / (N - 1) * sum over rows of (n_i - value c_i)^2) / sum of c_i

    With one row it is the spread of its draws, with one draw of one row nan.
    """
    N, draws = nats.shape
    if N == 1 and draws == 1:
        return float("nan")
    if N == 1:
        return (nats[0] / counts[0]).std().item() / math.sqrt(draws)
    residual = nats.mean(1) - value * counts
    return (residual.square().sum() * N / (N - 1)).sqrt().item() / counts.sum().item()
