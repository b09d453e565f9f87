"""Small random models of every family, for runs that need no download: `--init_from=tiny:gpt2`."""
import torch.nn as nn

from common import stream
from model import Config, ExpertLinear, Transformer
from pretrained.config import interpret, key_names
from pretrained.families import FAMILIES

# Of those families that have experts: some of eight, beside a shared one.
MIXTURE = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "expert_intermediate_size": 96, "num_shared_experts": 1, "shared_expert_intermediate_size": 96,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    "qk_layernorm": True, "use_bias": False, "moe_router_enable_expert_bias": True}


def tiny_config(family, tokenizer, max_len, dim=128, n_layers=4, n_heads=4):
    """The Config of a small model of a family. ValueError if the family is unknown."""
    if family not in FAMILIES:
        raise ValueError(f"no family called {family!r}; tiny models are made of "
                         f"{', '.join(FAMILIES)}")
    row = FAMILIES[family]
    sizes = dict(vocab_size=tokenizer.vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads,
                 n_kv_heads=n_heads, head_dim=dim // n_heads, hidden_dim=3 * dim, max_len=max_len)
    for name in ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id"):
        sizes[name] = getattr(tokenizer, name)
    if row.offset:          # its padding index places its positions: keep the usual one, which is 1
        del sizes["pad_token_id"]
        sizes["max_len"] += 2
    raw = {}
    for field, value in sizes.items():
        if field in row.keys:
            raw.update(dict.fromkeys(key_names(row, field), value))
    for keys in row.keys.values():
        raw.update({key: MIXTURE[key] for key in [keys] if key in MIXTURE})
    published = None if family == "unmask" else raw
    return Config(family=family, published=published, **interpret(row, raw)[0])


def tiny_model(family, tokenizer, max_len, seed=0, **size):
    """A small random model of a family with matrices as large as in trained ones, N(0, 1/fan-in):
    frozen small ones would teach an adapter little, and by AdamW all of them learn a little
    faster. size: arguments of `tiny_config`."""
    model = Transformer(tiny_config(family, tokenizer, max_len, **size)).init_weights(seed)
    generator = stream("matrices of a tiny model", seed)
    for module in model.modules():
        is_matrix = isinstance(module, nn.Linear | ExpertLinear)
        if is_matrix and module.weight is not model.embed.weight:
            std = module.weight.shape[-1] ** -0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
    return model
