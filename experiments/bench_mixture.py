"""bench.py's measurements of mixtures of experts: the layer beside a loop over its experts, and
sampling in blocks beside the way that the reference has it."""
import functools
import time

import torch
import torch.nn.functional as F

from experiments.bench_sampling import random_prompt
from experiments.timing import interleaved
from model import MLP, Config, Experts, Transformer
from sampling.engine import generate

# --------------------------------------------------------------------------------------------------
# The layer

LAYER = dict(dim=512, n_heads=8, n_experts=32, experts_per_token=4, expert_dim=256, shared_dim=256,
             router_norm=True)
B, T = 4, 512


def loop_over_experts(layer, x):
    """The mixture as published code has it: a mask over all tokens for each expert, whose part of
    the sum is added where it belongs. x [B, T, D]."""
    config, rows = layer.config, x.flatten(0, 1)
    weights, chosen = layer.route(rows)
    y = torch.zeros_like(rows)
    of_expert = F.one_hot(chosen, config.n_experts).permute(2, 1, 0)                    # [E, k, N]
    for e in range(config.n_experts):
        rank, token = torch.where(of_expert[e])
        part = rows[token]
        hidden = F.silu(part @ layer.gates.weight[e].T) * (part @ layer.ups.weight[e].T)
        out = hidden @ layer.downs.weight[e].T
        y.index_add_(0, token, out * weights[token, rank, None])
    return (y + layer.shared(rows)).view(x.shape)


def experts(rounds="9"):
    """A layer of 32 experts of 256, top 4 and one shared, D 512, T 512, B 4, against a loop over
    the experts and against a dense MLP of the active size: forward, and with the backward pass."""
    config = Config(**LAYER)
    layer, dense = Experts(config), MLP(config, 5 * config.expert_dim)
    generator = torch.Generator().manual_seed(0)
    for p in [*layer.parameters(), *dense.parameters()]:
        p.data.normal_(std=0.05, generator=generator)
    x = torch.randn(B, T, config.dim, generator=generator)
    ways = {
        "ours": layer,
        "loop": functools.partial(loop_over_experts, layer),
        "dense": dense,
    }
    with torch.no_grad():
        expected = ways["loop"](x)
        assert (layer(x) - expected).abs().max() < 2e-5 * expected.abs().max()
    for title, with_backward in (("forward", False), ("forward and backward", True)):
        functions = {name: timed_pass(way, x, with_backward) for name, way in ways.items()}
        times = interleaved(functions, int(rounds))
        ours, loop, dense_mlp = (times[name] for name in ("ours", "loop", "dense"))
        print(f"{title:21} ours {ours.wall * 1e3:7.1f} ms   wall clock and CPU time in ours: "
              f"loop over experts {loop.wall / ours.wall:5.2f}, {loop.cpu / ours.cpu:5.2f}   "
              f"dense MLP of the active size {dense_mlp.wall / ours.wall:5.2f}, "
              f"{dense_mlp.cpu / ours.cpu:5.2f}", flush=True)


def timed_pass(way, x, with_backward):
    """A function without arguments that runs a layer forward, and backward if asked."""
    def run():
        with torch.set_grad_enabled(with_backward):
            inputs = x.clone().requires_grad_(with_backward)
            y = way(inputs)
            if with_backward:
                y.sum().backward()
    return run


# --------------------------------------------------------------------------------------------------
# Sampling

V, MASK, BLOCK = 157184, 156895, 32
LLADA2 = dict(vocab_size=V, dim=256, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=512,
              n_experts=32, experts_per_token=4, expert_dim=64, shared_dim=64, dense_layers=[0],
              router="sigmoid", router_bias="choice", router_groups=8, router_top_groups=4,
              router_norm=True, router_scale=2.5, rope_share=0.5, block_length=BLOCK,
              blocks_from_start=True, threshold=0.95, mask_token_id=MASK, max_len=1024)


def reference_blocks(model, prompt, new_tokens, threshold):
    """LLaDA2's sampler as published, done plainly: each pass reads everything up to the end of the
    block, without a cache, and makes the logits of all of it. Writes the sure tokens, one a pass at
    least."""
    end_of_all = -(-(len(prompt) + new_tokens) // BLOCK) * BLOCK
    x = torch.full((1, end_of_all), MASK)
    x[0, :len(prompt)] = torch.tensor(prompt)
    for end in range((len(prompt) // BLOCK + 1) * BLOCK, end_of_all + 1, BLOCK):
        block_of = torch.arange(end) // BLOCK
        visible = (block_of <= block_of[:, None])[None]
        while (x[0, end - BLOCK:end] == MASK).any():
            logits = model(x[:, :end], attention_mask=visible)[0, -BLOCK:]          # [BLOCK, V]
            confidence, token = logits.softmax(-1).max(-1)
            is_mask = x[0, end - BLOCK:end] == MASK
            confidence = torch.where(is_mask, confidence, -torch.inf)
            keep = confidence >= threshold
            keep[confidence.argmax()] = True
            x[0, end - BLOCK:end] = torch.where(keep, token, x[0, end - BLOCK:end])
    return x[0].tolist()


@torch.inference_mode()
def blocks(tokens="128", prompt_len="64", threshold="0.95", rounds="3"):
    """LLaDA2's sampler on a small model of its shape: V 157184, D 256, 4 layers, blocks of 32,
    prompt 64, 128 tokens; against the published way. `blocks TOKENS PROMPT THRESHOLD ROUNDS`."""
    tokens, threshold = int(tokens), float(threshold)
    model = Transformer(Config(**LLADA2)).init_weights()
    torch.nn.init.normal_(model.head.weight, std=0.05)
    model.head.weight[MASK] = 0
    prompt = random_prompt(int(prompt_len))
    generate(model, [prompt], BLOCK, block_length=BLOCK, threshold=threshold, minimum=1)   # warm-up
    ours, theirs = [], []
    for _ in range(int(rounds)):
        begin = time.perf_counter()
        answer = generate(model, [prompt], tokens, block_length=BLOCK, threshold=threshold,
                          minimum=1, cache="block")[0]
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        published = reference_blocks(model, prompt, tokens, threshold)
        theirs.append(time.perf_counter() - begin)
    assert answer == published[:len(answer)], "the tokens differ"
    mine, other = sorted(ours)[len(ours) // 2], sorted(theirs)[len(theirs) // 2]
    print(f"LLaDA2's sampler, {tokens} tokens: published {tokens / other:6.1f} tokens/s, ours "
          f"{tokens / mine:6.1f} tokens/s: {other / mine:.2f} x, equal tokens", flush=True)
