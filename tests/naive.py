"""A second opinion: the models, samplers and losses once more, as plainly as they can be written.

Written from the papers and from the published tensor names alone; nothing is imported from
model.py, diffusion.py or sampling/. One row of tokens at a time, loops in place of batches,
float64: slow, and easy to check against a formula. test_records.py holds it equal to the reference
implementations (where their outputs are at hand), and the repository equal to it.

Shapes: T positions of the canvas, S positions that a pass is fed, V vocabulary, D width, H heads,
G key/value heads, C head size.

    model = Model("tests/records/llada")
    tokens, passes = llada_generate(model, [5, 6, 7], gen_length=16, steps=8, block_length=8)

References: LLaDA, Nie et al. 2025 (2502.09992); Dream, Ye et al. 2025 (2508.15487); Fast-dLLM, Wu
et al. 2025 (2505.22618); MDLM, Sahoo et al. 2024 (2406.07524); BD3-LM, Arriola et al. 2025
(2503.09573); LLaDA2.0 (2512.15745).
"""
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

# What the published files call each part. The layers' names follow the name of their layer.
LLADA = {
    "embedding": "model.transformer.wte",
    "layer": "model.transformer.blocks.{}.",
    "attention_norm": "attn_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "attn_out",
    "mlp_norm": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}
QWEN = {        # Dream has the names of Qwen 2 and 3
    "embedding": "model.embed_tokens",
    "layer": "model.layers.{}.",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
LLADA_MOE = {
    **QWEN,
    "router": "mlp.gate",
    "router_bias": "mlp.expert_bias",
    "expert": "mlp.experts.{}.",
    "shared": "shared_expert.",
}
LLADA2 = {
    **LLADA_MOE,
    "embedding": "model.word_embeddings",
    "fused": "attention.query_key_value",
    "query_norm": "attention.query_layernorm",
    "key_norm": "attention.key_layernorm",
    "out": "attention.dense",
    "router_bias": "mlp.gate.expert_bias",
    "shared": "mlp.shared_experts.",
}
NAMES = {"llada": LLADA, "lladamoe": LLADA_MOE, "llada2_moe": LLADA2, "llada21_moe": LLADA2}


# --------------------------------------------------------------------------------------------------
# The model


class Model:
    """A published checkpoint of the LLaDA, Dream, Qwen3, LLaDA-MoE or LLaDA2 shape: config.json,
    model.safetensors."""

    def __init__(self, folder, dtype=torch.float64):
        config = json.loads((Path(folder) / "config.json").read_text())
        self.tensors = load_file(Path(folder) / "model.safetensors")
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.to(dtype)
        self.mask_id = config.get("mask_token_id")
        self.theta, self.eps = config["rope_theta"], config["rms_norm_eps"]
        self.config, self.names = config, NAMES.get(config["model_type"], QWEN)
        self.rope_share = config.get("partial_rotary_factor", 1.0)
        if config["model_type"] == "llada":
            self.n_layers, self.n_heads = config["n_layers"], config["n_heads"]
            self.n_kv_heads = config["n_kv_heads"]
        else:
            self.n_layers = config["num_hidden_layers"]
            self.n_heads = config["num_attention_heads"]
            self.n_kv_heads = config["num_key_value_heads"]

    def tensor(self, part, kind="weight", layer=None):
        """The tensor of a part, or None where the checkpoint has none."""
        prefix = "" if layer is None else self.names["layer"].format(layer)
        return self.tensors.get(f"{prefix}{self.names.get(part)}.{kind}")

    def linear(self, x, part, layer=None):
        weight, bias = self.tensor(part, "weight", layer), self.tensor(part, "bias", layer)
        y = x @ weight.T
        return y if bias is None else y + bias

    def norm(self, x, part, layer=None):
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, over the last dimension (1910.07467)."""
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / (mean_square + self.eps).sqrt() * self.tensor(part, "weight", layer)

    def rotate(self, x, positions):
        """RoPE (2104.09864): x [S, heads, C]; turn each pair (x_j, x_(j + C/2)) by the angle
        position * theta^(-2j / C). Of some models, in the first dimensions alone."""
        turned = int(x.shape[-1] * self.rope_share)
        x, rest = x[..., :turned], x[..., turned:]
        half = turned // 2
        place = torch.tensor(positions, dtype=x.dtype)[:, None, None]                   # [S, 1, 1]
        angle = place * self.theta ** (-torch.arange(half, dtype=x.dtype) / half)      # [S, 1, C/2]
        a, b = x[..., :half], x[..., half:]
        y = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        return torch.cat([*y, rest], dim=-1)

    def attention(self, x, layer, positions, visible, memory):
        """x [S, D] -> [S, D]. `memory` holds keys and values [T, G, C] of each layer; those of the
        positions fed are replaced, and the queries see all of them."""
        S, H, G = len(x), self.n_heads, self.n_kv_heads
        if "fused" in self.names:                       # H query heads, G of keys, G of values
            heads = self.linear(x, "fused", layer).view(S, H + 2 * G, -1)
            q, k, v = heads[:, :H], heads[:, H:H + G], heads[:, H + G:]
        else:
            q = self.linear(x, "query", layer).view(S, H, -1)
            k = self.linear(x, "key", layer).view(S, G, -1)
            v = self.linear(x, "value", layer).view(S, G, -1)
        if self.tensor("query_norm", "weight", layer) is not None:
            q, k = self.norm(q, "query_norm", layer), self.norm(k, "key_norm", layer)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        if layer not in memory:                         # the first pass feeds all positions
            memory[layer] = torch.empty_like(k), torch.empty_like(v)
        keys, values = memory[layer]
        keys[positions], values[positions] = k, v
        heads = []
        for head in range(H):
            group = head // (H // G)                    # H / G heads share keys and values
            scores = q[:, head] @ keys[:, group].T / math.sqrt(q.shape[-1])             # [S, T]
            if visible is not None:
                scores = scores.masked_fill(~visible, -math.inf)
            heads.append(scores.softmax(-1) @ values[:, group])                         # [S, C]
        return self.linear(torch.cat(heads, dim=-1), "out", layer)

    def mlp(self, x, layer):
        """SwiGLU (2002.05202): down(silu(gate x) * up x); or a mixture of several."""
        if self.tensor("router", "weight", layer) is not None:
            return torch.stack([self.mixture(token, layer) for token in x])
        gate = self.linear(x, "gate", layer)
        return self.linear(gate * gate.sigmoid() * self.linear(x, "up", layer), "down", layer)

    def mixture(self, x, layer):
        """A token x [D] through its experts: the sum of what each of them says, weighted."""
        y = torch.zeros_like(x)
        for expert, weight in self.choose_experts(x, layer).items():
            y = y + weight * self.expert(x, layer, self.names["expert"].format(expert))
        if any(self.names["shared"] in name for name in self.tensors):
            y = y + self.expert(x, layer, self.names["shared"])
        return y

    def expert(self, x, layer, prefix):
        prefix = self.names["layer"].format(layer) + prefix
        gate = self.tensors[f"{prefix}gate_proj.weight"] @ x
        up = self.tensors[f"{prefix}up_proj.weight"] @ x
        return self.tensors[f"{prefix}down_proj.weight"] @ (gate * gate.sigmoid() * up)

    def choose_experts(self, x, layer):
        """{expert: its weight} for a token x [D]."""
        config, logits = self.config, self.tensor("router", "weight", layer) @ x        # [E]
        bias = self.tensors.get(self.names["layer"].format(layer) + self.names["router_bias"])
        bias = torch.zeros_like(logits) if bias is None else bias
        k = config["num_experts_per_tok"]
        if config["model_type"] == "lladamoe":          # the weights are the biased scores
            scores = dict(enumerate((logits.softmax(0) + bias).tolist()))
            return {expert: scores[expert] for expert in highest(scores, k)}
        scores = logits.sigmoid()
        biased = dict(enumerate((scores + bias).tolist()))
        size = len(biased) // config["n_group"]
        groups = [range(g * size, (g + 1) * size) for g in range(config["n_group"])]
        value = {}
        for g, group in enumerate(groups):              # a group is as good as its two best
            value[g] = sum(sorted((biased[e] for e in group), reverse=True)[:2])
        open_to = [e for g in highest(value, config["topk_group"]) for e in groups[g]]
        chosen = highest({e: biased[e] for e in open_to}, k)
        total = sum(float(scores[e]) for e in chosen) if k > 1 else 1.0
        return {e: config["routed_scaling_factor"] * float(scores[e]) / total for e in chosen}

    def logits(self, tokens, visible=None, positions=None, memory=None):
        """Logits [S, V] for a list of S tokens.

        visible    bool [S, T], true where query s sees key t; None: everybody sees everybody.
        positions  where the tokens stand; None: 0, 1, 2...
        memory     a dict to keep keys and values in, empty at first; None: they are forgotten.
        """
        positions = list(range(len(tokens))) if positions is None else list(positions)
        memory = {} if memory is None else memory
        x = self.tensor("embedding")[tokens]                                            # [S, D]
        for layer in range(self.n_layers):
            normed = self.norm(x, "attention_norm", layer)
            x = x + self.attention(normed, layer, positions, visible, memory)
            x = x + self.mlp(self.norm(x, "mlp_norm", layer), layer)
        x = self.norm(x, "final_norm")
        if self.tensor("head") is None:                 # tied to the embedding
            return x @ self.tensor("embedding").T
        return self.linear(x, "head")


# --------------------------------------------------------------------------------------------------
# Samplers at temperature 0. Each returns (tokens of prompt and completion, number of passes).


def predict(logits):
    """(the most probable tokens, their probabilities), a list each, of logits [S, V]."""
    best = logits.double().softmax(-1).max(-1)
    return best.indices.tolist(), best.values.tolist()


def highest(scores, count):
    """The `count` positions with the highest scores, of a dict position -> score."""
    return sorted(scores, key=scores.get, reverse=True)[:count]


def equal_shares(total, steps):
    """How many of `total` tokens each step reveals: as equal as can be, the larger shares first."""
    return [total // steps + (1 if step < total % steps else 0) for step in range(steps)]


def fill_block(model, logits_of, x, block, steps):
    """LLaDA's loop in one block: predict all masks, keep the surest (LLaDA, algorithm 5). Changes
    the list x; logits_of(x) gives the logits [T, V]."""
    masks = [i for i in block if x[i] == model.mask_id]
    for count in equal_shares(len(masks), steps):
        tokens, p = predict(logits_of(x))
        confidence = {i: p[i] for i in block if x[i] == model.mask_id}
        for i in highest(confidence, count):
            x[i] = tokens[i]


def llada_generate(model, prompt, gen_length, steps, block_length, cfg_scale=0.0):
    """LLaDA's `generate`, low-confidence remasking, blocks from left to right.

    cfg_scale w > 0: logits = (1 + w) * logits - w * logits with the prompt masked (eq. 16).
    """
    passes = 0

    def logits_of(x):
        nonlocal passes
        passes += 1
        logits = model.logits(x)
        if cfg_scale > 0:
            without = model.logits([model.mask_id] * len(prompt) + x[len(prompt):])
            logits = (1 + cfg_scale) * logits - cfg_scale * without
        return logits

    x = prompt + [model.mask_id] * gen_length
    for begin in range(len(prompt), len(x), block_length):
        block = range(begin, begin + block_length)
        fill_block(model, logits_of, x, block, steps // (gen_length // block_length))
    return x, passes


def llada_infill(model, prompt, steps):
    """The same loop for masks that stand anywhere among the tokens of `prompt`."""
    x = list(prompt)
    fill_block(model, model.logits, x, range(len(x)), steps)
    return x, steps


def block_generate(model, prompt, gen_length, steps, block_length):
    """Block diffusion (BD3-LM): LLaDA's loop in one new block after the other; nobody sees a block
    that comes after his own. Blocks are counted from the prompt's end, in the prompt backwards."""
    x, steps_a_block = list(prompt), steps // (gen_length // block_length)
    for begin in range(len(prompt), len(prompt) + gen_length, block_length):
        x += [model.mask_id] * block_length
        block_of = (torch.arange(len(x)) - len(prompt)) // block_length
        visible = block_of[:, None] >= block_of[None, :]                            # query, key

        def logits_of(x, visible=visible):
            return model.logits(x, visible)

        fill_block(model, logits_of, x, range(begin, len(x)), steps_a_block)
    return x, steps


def fast_dllm_generate(model, prompt, gen_length, steps, block_length, threshold=None,
                       factor=None, cache=None):
    """Fast-dLLM's `generate`: LLaDA's with approximate caches and with parallel decoding.

    cache      a block's first pass feeds all positions and remembers their keys and values. Further
               ones feed from the block's begin on ("prefix") or the block alone ("dual"); the other
               keys grow stale until the next block. None: always everything.
    threshold  keep every prediction of at least this probability, and the best in any case.
    factor     keep the n best: see `factor_count`.
    """
    x, passes = prompt + [model.mask_id] * gen_length, 0
    shares = equal_shares(block_length, steps // (gen_length // block_length))
    for begin in range(len(prompt), len(x), block_length):
        end, step, memory = begin + block_length, 0, {}
        while model.mask_id in x[begin:end]:
            fed = range(len(x))
            if step > 0 and cache == "prefix":
                fed = range(begin, len(x))
            if step > 0 and cache == "dual":
                fed = range(begin, end)
            tokens, p = predict(model.logits([x[i] for i in fed], positions=fed, memory=memory))
            passes += 1
            confidence = {}
            for i in range(begin, end):
                if x[i] == model.mask_id:
                    confidence[i] = p[i - fed.start]
            if threshold is not None:
                count = max(1, sum(p >= threshold for p in confidence.values()))
            elif factor is not None:
                count = factor_count(sorted(confidence.values(), reverse=True), factor)
            else:
                count = shares[step]
            for i in highest(confidence, count):
                x[i] = tokens[i - fed.start]
            step += 1
    return x, passes


def factor_count(confidences, factor):
    """How many of the confidences, highest first, are kept: they are taken one by one for as long
    as the n-th is at least 1 - factor / (n + 1) (section 3.3).

    The first is always taken, and so is the last if it alone fails: in the published loop `n` ends
    at the same number whether the last one passed or not.
    """
    n = 1
    while n < len(confidences) and confidences[n] >= 1 - factor / (n + 2):      # the (n + 1)-th
        n += 1
    return len(confidences) if n == len(confidences) - 1 else n


def dream_generate(model, prompt, max_new_tokens, steps, alg, eps=1e-3):
    """Dream's `diffusion_generate`: time runs evenly from 1 to eps, and a step from t to s reveals
    the integer part of masks * (1 - s / t), the last step the rest. Position i - 1 predicts token
    i. alg says what is sure: "maskgit_plus" the probability, "topk_margin" the distance to the
    second best, "entropy" the negative entropy."""
    x, passes = prompt + [model.mask_id] * max_new_tokens, 0
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        masks = [i for i, token in enumerate(x) if token == model.mask_id]
        count = int(len(masks) * (1 - times[step + 1] / times[step]))
        if step == steps - 1:
            count = len(masks)
        if count == 0:
            continue                                    # no need to ask
        p = model.logits(x).softmax(-1)                                                 # [T, V]
        passes += 1
        if alg == "maskgit_plus":
            sure = p.max(-1).values
        elif alg == "topk_margin":
            best = p.topk(2).values
            sure = best[:, 0] - best[:, 1]
        elif alg == "entropy":
            sure = (p * (p + 1e-10).log()).sum(-1)
        else:
            raise ValueError(f"alg must be maskgit_plus, topk_margin or entropy, got {alg!r}")
        scores = {i: float(sure[i - 1]) for i in masks}
        for i in highest(scores, count):
            x[i] = int(p[i - 1].argmax())
    return x, passes


def llada2_generate(model, prompt, max_new_tokens, block_length, steps, threshold, minimum=None,
                    edit_threshold=None, edit_passes=16):
    """LLaDA2.0's sampler and, with edit_threshold, LLaDA2.1's.

    Blocks lie at multiples of their length, the prompt's end in the first one. A pass keeps all
    predictions of at least `threshold`, and at least `minimum`, or the step's share of a block. Of
    the tokens written already it replaces those for which another is predicted with more than
    edit_threshold; when the masks are gone, too, until nothing changes or edit_passes times.
    Returns the canvas up to the end of its last block.
    """
    P, passes = len(prompt), 0
    end = math.ceil((P + max_new_tokens) / block_length) * block_length
    begins = range(P // block_length * block_length, end, block_length)
    shares = equal_shares(block_length, math.ceil(steps / len(begins)))
    x = prompt + [model.mask_id] * (end - P)
    for begin in begins:
        block, step, looks = range(begin, begin + block_length), 0, 0
        while True:
            masks = [i for i in block if x[i] == model.mask_id]
            if not masks:
                if edit_threshold is None or looks == edit_passes:
                    break
                looks += 1
            block_of = torch.arange(block.stop) // block_length
            visible = block_of[:, None] >= block_of[None, :]                        # query, key
            tokens, p = predict(model.logits(x[:block.stop], visible))
            passes += 1
            kept = [i for i in masks if p[i] >= threshold]
            least = 0
            if masks:
                least = min(minimum or shares[step], len(masks))
            if len(kept) < least:
                kept = highest({i: p[i] for i in masks}, least)
            replaced = []
            if edit_threshold is not None:
                for i in block:
                    if i >= P and i not in masks and tokens[i] != x[i] and p[i] > edit_threshold:
                        replaced.append(i)
            for i in [*kept, *replaced]:
                x[i] = tokens[i]
            step += 1
            if not masks and not replaced:
                break
    return x, passes


SAMPLERS = {"llada": llada_generate, "infill": llada_infill, "block": block_generate,
            "fast_dllm": fast_dllm_generate, "dream": dream_generate, "llada2": llada2_generate}


# --------------------------------------------------------------------------------------------------
# Losses: nats per token, weighted by 1/t, for tokens int64 [B, T] and mask bool [B, T]. Each gives
# (loss, token_nll [B, T], zero where not masked).


def mdlm_loss(model, tokens, t, mask):
    """-1/t log p(token | x_t) at the masks of x_t, t float [B] (MDLM eq. 11, LLaDA eq. 3)."""
    token_nll = torch.zeros(tokens.shape, dtype=torch.float64)
    for row in range(len(tokens)):
        noisy = torch.where(mask[row], model.mask_id, tokens[row])
        log_p = model.logits(noisy.tolist()).double().log_softmax(-1)
        for i in mask[row].nonzero()[:, 0].tolist():
            token_nll[row, i] = -log_p[i, tokens[row, i]] / t[row].double()
    return token_nll.sum() / tokens.numel(), token_nll


def block_loss(model, tokens, block_length, t, mask):
    """The same block by block, t float [B, blocks]: each is predicted from itself, with masks, and
    from the blocks before it without (BD3-LM eq. 8). One pass a block, over what stands up to its
    end; nobody sees a block that comes after his own, so the clean blocks know nothing of it."""
    token_nll = torch.zeros(tokens.shape, dtype=torch.float64)
    for row in range(len(tokens)):
        for begin in range(0, tokens.shape[1], block_length):
            end, block = begin + block_length, begin // block_length
            noisy = tokens[row, :end].clone()
            noisy[begin:end][mask[row, begin:end]] = model.mask_id
            block_of = torch.arange(end) // block_length
            visible = block_of[:, None] >= block_of[None, :]                        # query, key
            log_p = model.logits(noisy.tolist(), visible).double().log_softmax(-1)
            for i in range(begin, end):
                if mask[row, i]:
                    token_nll[row, i] = -log_p[i, tokens[row, i]] / t[row, block].double()
    return token_nll.sum() / tokens.numel(), token_nll
