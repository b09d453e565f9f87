"""What gpu.py compares with: nanoGPT's step and the published samplers, done plainly in torch.

None of it uses this repository's code but the model whose logits the samplers ask for. Shapes: B
batch, T positions, S positions fed, V vocabulary, D width.
"""
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# nanoGPT: an autoregressive transformer with learned positions, LayerNorm without bias, GELU, and a
# head tied to the embedding; all logits, all positions


class PlainBlock(nn.Module):
    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.n_heads, -1).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                           is_causal=True)                            # [B, H, T, C]
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    """The yardstick of training speed: tokens [B, T] and the next ones -> their mean nll."""

    def __init__(self, vocab_size, dim, n_layers, n_heads, max_len):
        super().__init__()
        self.embed, self.places = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, following):
        x = self.embed(tokens) + self.places.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)                              # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    def flops_per_token(self, seq_len):
        """Of a training step, as training/flops.py counts them."""
        D = self.embed.weight.shape[1]
        products = self.embed.weight.numel()            # as the head
        for module in self.modules():
            if isinstance(module, nn.Linear):
                products += module.weight.numel()
        return 6 * products + 12 * len(self.blocks) * D * seq_len


# --------------------------------------------------------------------------------------------------
# The loops of LLaDA and Fast-dLLM at temperature 0


def write_surest(x, logits, begin, end, mask_id):
    """Write the surest masked token of every row of x [B, T] before `end`, from logits [B, S, V] of
    the positions from `begin` on: softmax in float64 over all of them."""
    token = logits.argmax(-1)                                                           # [B, S]
    confidence = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]       # [B, S]
    confidence[:, end - begin:] = -torch.inf
    fed = x[:, begin:begin + confidence.shape[1]]
    confidence[fed != mask_id] = -torch.inf
    rows, best = torch.arange(len(x), device=x.device), confidence.argmax(-1)
    x[rows, begin + best] = token[rows, best]


def llada_loop(model, prompts, new_tokens, block, passes):
    """LLaDA's loop, a token a step, every logit of the canvas, `passes` passes at most. prompts [B,
    P] -> (tokens [B, P + new_tokens], seconds a pass)."""
    mask_id, P = model.config.mask_token_id, prompts.shape[1]
    x = F.pad(prompts, (0, new_tokens), value=mask_id)
    passes = min(passes, new_tokens)
    begin = now(x.device)
    for done in range(passes):
        write_surest(x, model(x), 0, P + (done // block + 1) * block, mask_id)
    return x, (now(x.device) - begin) / passes


def fast_dllm_loop(model, prompts, new_tokens, block, kind, cache):
    """Fast-dLLM's loop: a pass over everything when a block begins, then over the block (kind
    "dual") or all from it on ("prefix"), all logits. Returns what `llada_loop` does. cache: an
    empty `Cache` for these rows."""
    mask_id, P = model.config.mask_token_id, prompts.shape[1]
    x = F.pad(prompts, (0, new_tokens), value=mask_id)
    T, clock = x.shape[1], now(x.device)
    for begin in range(P, T, block):
        end = begin + block
        for step in range(block):
            first, last = begin, end
            if kind == "prefix":
                last = T
            if step == 0:
                first, last = 0, T
            places = torch.arange(first, last, device=x.device)
            logits = model(x[:, first:last], cache=cache, positions=places)
            write_surest(x, logits, first, end, mask_id)
    return x, (now(x.device) - clock) / new_tokens


def now(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
