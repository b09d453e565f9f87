"""Make the records of this folder: tiny checkpoints in published layouts, and what naive.py makes
of them.

    python tests/records/make.py

Writes llada/, dream/, qwen3/, lladamoe/ and llada2/ (config.json, model.safetensors),
records.safetensors (logits and losses) and records.json (one call of a sampler a line). Seeds are
fixed. Every sampler's answer must stay the same in float32 and with a little noise on the weights:
a record that hangs on rounding is refused.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import naive  # noqa: E402

V, EOS, MASK = 96, 90, 94       # the vocabulary: 90 tokens of text, the end of text, the mask
DIM, HEADS, HIDDEN, LAYERS = 24, 4, 40, 2

LLADA = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama",
    "activation_type": "silu", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True,
    "rope_theta": 500000.0, "d_model": DIM, "n_layers": LAYERS, "n_heads": HEADS,
    "n_kv_heads": HEADS, "mlp_hidden_size": HIDDEN, "vocab_size": V, "embedding_size": V,
    "max_sequence_length": 128, "include_bias": False, "include_qkv_bias": False,
    "weight_tying": False, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS,
    "dtype": "float32",
}
QWEN = {
    "hidden_act": "silu", "hidden_size": DIM, "intermediate_size": HIDDEN, "vocab_size": V,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None, "sliding_window": None,
    "use_sliding_window": False, "mask_token_id": MASK, "bos_token_id": EOS, "eos_token_id": EOS,
    "dtype": "float32",
}
DREAM = {**QWEN, "architectures": ["DreamModel"], "model_type": "Dream", "num_key_value_heads": 2,
         "pad_token_id": EOS, "tie_word_embeddings": False}
QWEN3 = {**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8,
         "num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": True}

MIXTURE = {
    **QWEN, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "num_experts": 6,
    "num_experts_per_tok": 2, "tie_word_embeddings": False, "pad_token_id": EOS}
LLADA_MOE = {
    **MIXTURE, "architectures": ["LLaDAMoEModelLM"], "model_type": "lladamoe", "head_dim": None,
    "partial_rotary_factor": 0.7,
    "dense_intermediate_size": HIDDEN, "expert_intermediate_size": 12, "moe_layer_freq": [1, 0],
    "shared_expert_intermediate_size": 20, "qk_layernorm": True, "attention_bias": False,
    "moe_router_enable_expert_bias": True}
LLADA2 = {
    **MIXTURE, "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "head_dim": 8,
    "moe_intermediate_size": 12, "num_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 3,
    "topk_group": 2, "routed_scaling_factor": 1.5, "use_qk_norm": True, "use_bias": True,
    "use_qkv_bias": True}

# What the samplers are asked: the lengths of the prompts, and the arguments.
CALLS = [
    dict(sampler="llada", prompts=[10], gen_length=16, steps=16, block_length=16),
    dict(sampler="llada", prompts=[7, 8], gen_length=32, steps=8, block_length=8),
    dict(sampler="llada", prompts=[3, 11, 6], gen_length=24, steps=15, block_length=8),
    dict(sampler="llada", prompts=[5, 9], gen_length=16, steps=8, block_length=8, cfg_scale=1.5),
    dict(sampler="infill", prompts=[20], steps=5),
    dict(sampler="infill", prompts=[12, 17], steps=3),
]
for cache in (None, "prefix", "dual"):
    shape = dict(sampler="fast_dllm", prompts=[8], gen_length=24, block_length=8, cache=cache)
    CALLS += [
        dict(shape, steps=24),
        dict(shape, steps=12, block_length=12),
        dict(shape, steps=24, threshold=0.5),
        dict(shape, steps=24, threshold=0.7),
        dict(shape, steps=24, factor=1.0),
        dict(shape, steps=24, factor=2.5),
    ]
for alg in ("entropy", "maskgit_plus", "topk_margin"):
    CALLS += [
        dict(sampler="dream", prompts=[10], max_new_tokens=16, steps=16, alg=alg),
        dict(sampler="dream", prompts=[4, 8], max_new_tokens=24, steps=7, alg=alg),
    ]
for block_length in (4, 8):
    CALLS.append(dict(sampler="block", prompts=[9, 6], gen_length=16, steps=8,
                      block_length=block_length))
MIXTURE_CALLS = [
    dict(sampler="llada2", prompts=[7, 10], max_new_tokens=16, block_length=8, steps=24,
         threshold=0.95),
    dict(sampler="llada2", prompts=[5], max_new_tokens=20, block_length=8, steps=8, threshold=0.6),
    dict(sampler="llada2", prompts=[9, 16, 3], max_new_tokens=12, block_length=4, steps=100,
         threshold=0.5),
    dict(sampler="llada2", prompts=[7, 10], max_new_tokens=16, block_length=8, steps=24,
         threshold=0.95, edit_threshold=0.2),
    dict(sampler="llada2", prompts=[6], max_new_tokens=24, block_length=8, steps=64, threshold=0.4,
         edit_threshold=0.3, edit_passes=3),
    dict(sampler="llada2", prompts=[5, 12], max_new_tokens=16, block_length=8, steps=1,
         threshold=0.7, edit_threshold=0.4, edit_passes=0, minimum=3),
    dict(sampler="llada2", prompts=[8], max_new_tokens=16, block_length=16, steps=16, threshold=0.3,
         edit_threshold=0.0, edit_passes=5, minimum=1),
]
CHECKPOINT_NAMES = ("llada", "dream", "qwen3", "lladamoe", "llada2")
# All other samplers run on llada.
CHECKPOINTS = {"llada2": "llada2", "dream": "dream", "block": "qwen3"}


# --------------------------------------------------------------------------------------------------
# Checkpoints


def shapes(config):
    """{published name: shape} of all tensors of a checkpoint."""
    names = naive.NAMES.get(config["model_type"], naive.QWEN)
    head_dim = config.get("head_dim") or DIM // HEADS
    queries = HEADS * head_dim
    keys = config.get("n_kv_heads", config.get("num_key_value_heads")) * head_dim
    parts = {
        "attention_norm": (DIM,), "query": (queries, DIM), "key": (keys, DIM),
        "value": (keys, DIM), "out": (DIM, queries), "mlp_norm": (DIM,), "gate": (HIDDEN, DIM),
        "up": (HIDDEN, DIM), "down": (DIM, HIDDEN),
    }
    if config["model_type"] in ("qwen3", "lladamoe", "llada2_moe"):
        parts.update(query_norm=(head_dim,), key_norm=(head_dim,))
    result = {f"{names['embedding']}.weight": (V, DIM), f"{names['final_norm']}.weight": (DIM,)}
    if not config.get("tie_word_embeddings"):
        result[f"{names['head']}.weight"] = (V, DIM)
    for layer in range(LAYERS):
        own = layer_parts(config, names, parts, layer)
        result.update({names["layer"].format(layer) + name: shape for name, shape in own.items()})
    return result


def layer_parts(config, names, parts, layer):
    """{name within the layer: shape} of all tensors of a layer."""
    result, sizes = {}, dict(parts)
    sparse = ("moe_layer_freq" in config and config["moe_layer_freq"][layer]
              or layer >= config.get("first_k_dense_replace", LAYERS))
    if "fused" in names:
        rows = sum(sizes.pop(part)[0] for part in ("query", "key", "value"))
        sizes["fused"] = (rows, DIM)
    if sparse:
        for part in ("gate", "up", "down"):
            del sizes[part]
        E, shared = config["num_experts"], config.get("shared_expert_intermediate_size")
        hidden = config.get("expert_intermediate_size", config.get("moe_intermediate_size"))
        sizes["router"] = (E, DIM)
        result[names["router_bias"]] = (E,)
        widths = {names["expert"].format(expert): hidden for expert in range(E)}
        widths[names["shared"]] = shared or hidden * config["num_shared_experts"]
        for prefix, width in widths.items():
            result[f"{prefix}gate_proj.weight"] = (width, DIM)
            result[f"{prefix}up_proj.weight"] = (width, DIM)
            result[f"{prefix}down_proj.weight"] = (DIM, width)
    for part, shape in sizes.items():
        result[f"{names[part]}.weight"] = shape
        has_bias = config["model_type"] == "Dream" and part in ("query", "key", "value")
        if has_bias or config.get("use_bias") and part in ("fused", "out"):
            result[f"{names[part]}.bias"] = shape[:1]
    return result


def make_checkpoint(folder, config, seed):
    """Random weights: large, so that an error in any of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        tensors[name] = 0.2 * torch.randn(shape, generator=generator)
        if "norm" in name or "ln_f" in name:
            tensors[name] += 1
    names = naive.NAMES.get(config["model_type"], naive.QWEN)
    head = tensors.get(f"{names['head']}.weight")
    if head is None:
        # The embedding is the head as well: the mask's row is short, which the first norm undoes.
        tensors[f"{names['embedding']}.weight"][[MASK, EOS]] *= 0.05
    else:
        head *= 3                                       # some predictions are sure, others are not
        head[MASK] = 0                                  # no sampler predicts the mask
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --------------------------------------------------------------------------------------------------
# What naive.py makes of them


def make_questions(generator):
    """The inputs of all records of tensors: tokens, masks, times."""
    asked = {}
    for name in ("llada", "dream", "qwen3"):
        tokens = torch.randint(EOS, (2, 12), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 0.3] = MASK
        asked[f"{name}.tokens"] = tokens
    # The second row has padding, which nobody sees.
    asked["attention_mask"] = torch.arange(12)[None, :] < torch.tensor([12, 7])[:, None]
    for name, blocks in (("mdlm", 1), ("bd3lm4", 8), ("bd3lm8", 4), ("bd3lm16", 2)):
        asked[f"{name}.tokens"] = torch.randint(EOS, (2, 32), generator=generator)
        t = 0.1 + 0.9 * torch.rand(2, blocks, generator=generator)
        each = t.repeat_interleave(32 // blocks, dim=1)
        asked[f"{name}.mask"] = torch.rand(2, 32, generator=generator) < each
        asked[f"{name}.t"] = t[:, 0].clone() if name == "mdlm" else t
    return asked


def answer_questions(models, asked):
    """{name: tensor}: logits [2, 12, V], losses [], token_nll [2, 32], by naive.py."""
    answers = {}
    order = torch.ones(12, 12, dtype=torch.bool).tril()             # an autoregressive model's
    for name in CHECKPOINT_NAMES:
        rows = asked[f"{name}.tokens"].tolist()
        logits = models[name].logits
        answers[f"{name}.logits"] = torch.stack([logits(row) for row in rows])
        if name == "qwen3":
            causal = torch.stack([logits(row, order) for row in rows])
            answers["qwen3.logits_causal"] = causal
        elif name == "llada2":
            block_of = torch.arange(12) // 4
            blocks = block_of[:, None] >= block_of[None, :]
            answers["llada2.logits_blocks"] = torch.stack([logits(row, blocks) for row in rows])
        else:
            padded = [logits(row, shown.expand(12, 12))
                      for row, shown in zip(rows, asked["attention_mask"])]
            answers[f"{name}.logits_padded"] = torch.stack(padded)
    for name in ("mdlm", "bd3lm4", "bd3lm8", "bd3lm16"):
        tokens, t, mask = (asked[f"{name}.{part}"] for part in ("tokens", "t", "mask"))
        if name == "mdlm":
            loss, token_nll = naive.mdlm_loss(models["llada"], tokens, t, mask)
        else:
            block_length = int(name.removeprefix("bd3lm"))
            loss, token_nll = naive.block_loss(models["qwen3"], tokens, block_length, t, mask)
        answers[f"{name}.loss"], answers[f"{name}.token_nll"] = loss, token_nll
    return answers


def make_prompt(length, with_masks):
    """Equal lengths give equal prompts, so that records of different rules can be compared."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(EOS, (length,), generator=generator)
    if with_masks:
        prompt[torch.rand(length, generator=generator) < 0.6] = MASK
    return prompt.tolist()


def sample(model, record):
    """(outputs, forward passes) of a record's call, one prompt after the other."""
    sampler = naive.SAMPLERS[record["sampler"]]
    results = [sampler(model, prompt, **record["arguments"]) for prompt in record["prompts"]]
    return [tokens for tokens, _ in results], [passes for _, passes in results]


def noisy(model, generator):
    """The model with noise of 2e-6 on its weights."""
    for name, tensor in model.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        model.tensors[name] = tensor * (1 + 2e-6 * noise)
    return model


def make_records(calls, generator):
    records = []
    for call in calls:
        arguments = {k: v for k, v in call.items() if k not in ("sampler", "prompts")}
        checkpoint = CHECKPOINTS.get(call["sampler"], "llada")
        prompts = [make_prompt(length, call["sampler"] == "infill")
                   for length in call["prompts"]]
        record = dict(sampler=call["sampler"], checkpoint=checkpoint, arguments=arguments,
                      prompts=prompts)
        folder = HERE / checkpoint
        outputs, passes = sample(naive.Model(folder), record)
        for other in (naive.Model(folder, torch.float32), noisy(naive.Model(folder), generator)):
            if sample(other, record) != (outputs, passes):
                raise ValueError(f"rounding decides in {call}: take another seed")
        record.update(outputs=outputs, forward_passes=passes)
        records.append(record)
    return records


def main():
    # LLaDA's seed is one of many: one for which caches, thresholds and factors give other answers.
    make_checkpoint(HERE / "llada", LLADA, seed=13)
    make_checkpoint(HERE / "dream", DREAM, seed=1)
    make_checkpoint(HERE / "qwen3", QWEN3, seed=2)
    make_checkpoint(HERE / "lladamoe", LLADA_MOE, seed=4)
    make_checkpoint(HERE / "llada2", LLADA2, seed=5)
    generator = torch.Generator().manual_seed(3)
    models = {name: naive.Model(HERE / name) for name in CHECKPOINT_NAMES}
    asked = make_questions(generator)
    later = torch.Generator().manual_seed(6)    # of its own: the older records stay as they are
    for name in ("lladamoe", "llada2"):
        asked[f"{name}.tokens"] = torch.randint(EOS, (2, 12), generator=later)
    answers = {name: x.float() for name, x in answer_questions(models, asked).items()}
    save_file({**asked, **answers}, HERE / "records.safetensors")
    records = make_records(CALLS, generator) + make_records(MIXTURE_CALLS, later)
    lines = [json.dumps(record) for record in records]
    (HERE / "records.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
