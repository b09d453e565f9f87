"""How much arithmetic a token takes: what a run's use of the hardware (MFU) is reckoned from."""
import torch.nn as nn

from model import ExpertLinear


def flops_per_token(model, seq_len, head_share=1.0, training=True):
    """Floating-point operations per token of a Transformer: 2 per weight of each matrix product and
    4 H C T for attention, three times that with the backward pass (PaLM, arXiv 2204.02311, appendix
    B). head_share: the share of rows that reach the head."""
    c, matrices, experts = model.config, 0, 0
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            matrices += module.weight.numel()
        elif isinstance(module, ExpertLinear):
            experts += module.weight.numel()
    matrices += experts * c.experts_per_token // max(1, c.n_experts)    # a token uses k of E
    head = model.head.weight.numel()
    if model.head_dense is not None:
        head += model.head_dense.weight.numel()
    attention = 4 * c.n_layers * c.n_heads * c.head_dim * seq_len
    forward = 2 * (matrices + head_share * head) + attention
    return 3 * forward if training else forward
