"""Does a device compute what the CPU computes, and the fast form what the plain one does? The
checks of gpu.py, which tests/test_gpu.py runs too, on whatever device is there.

Each check is a function of (device, dtype) and returns {name: error}, numbers that must be below
`LIMITS[dtype]`; errors are relative: the norm of the difference over the norm of the CPU's result
in float32.
"""
import copy

import torch

import kernels
from diffusion import ar_loss, block_loss, denoise, mdlm_loss, sft_loss
from model import Config, Transformer
from sampling.engine import generate, infill

LIMITS = {torch.float32: 2e-4, torch.bfloat16: 0.08}

SMALL = dict(vocab_size=300, dim=64, n_layers=2, n_heads=4, max_len=128, mask_token_id=299,
             eos_token_id=298)
BERT = dict(positions="learned", norm="layer", norm_bias=True, post_norm=True, embed_norm=True,
            qk_norm=False, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False,
            activation="gelu", head_transform=True, head_bias=True, token_types=2)
LLADA2 = dict(n_kv_heads=2, n_experts=8, experts_per_token=2, expert_dim=32, shared_dim=32,
              dense_layers=[0], router="sigmoid", router_bias="choice", router_groups=4,
              router_top_groups=2, router_norm=True, router_scale=2.5, rope_share=0.5,
              block_length=8, blocks_from_start=True)
CONFIGS = {
    "ours": {},
    "llada": dict(qk_norm=False),
    "dream": dict(qk_norm=False, qkv_bias=True, shift=True, n_kv_heads=2),
    "bert": BERT,
    "local attention": dict(local_window=16, global_every=2),
    "mixture": LLADA2,
}


def build(device, seed=0, **settings):
    """A small model whose predictions are far from uniform, on a device."""
    model = Transformer(Config(**SMALL | settings)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter is not model.embed.weight:
                fan_in = parameter.shape[-1]
                values = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
                parameter.copy_(values)
        model.head.weight.mul_(3)
    return model.to(device)


def random_tokens(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"] - 2, (rows, length), generator=generator)


def error_of(found, wanted):
    """|found - wanted| / |wanted|, of tensors or lists of them."""
    if isinstance(found, torch.Tensor):
        found, wanted = [found], [wanted]
    found = torch.cat([tensor.detach().double().cpu().flatten() for tensor in found])
    wanted = torch.cat([tensor.detach().double().cpu().flatten() for tensor in wanted])
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


# --------------------------------------------------------------------------------------------------
# Checks


@torch.no_grad()
def transformer(device, dtype):
    """Logits of every kind of model, with and without padding."""
    errors = {}
    tokens = random_tokens(2, 64)
    shown = torch.arange(64) < torch.tensor([[64], [40]])
    for name, settings in CONFIGS.items():
        model = build("cpu", **settings)
        wanted = model(tokens, shown)[shown]
        there = copy.deepcopy(model).to(device, dtype)
        found = there(tokens.to(device), shown.to(device))[shown.to(device)]
        # In bfloat16 near ties of experts go either way: of a mixture most tokens must agree.
        errors[name] = error_of(found, wanted)
        if name == "mixture" and dtype != torch.float32:
            each = (found.float().cpu() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            errors[name] = each.median().item()
    return errors


def objective(name, model, tokens):
    """A loss by its name, of the same masks wherever the model is."""
    device = tokens.device
    t = torch.linspace(0.3, 0.9, len(tokens)).to(device)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = mask.to(device)
    if name == "ar":
        return ar_loss(model, tokens)
    if name == "block":
        return block_loss(model, tokens, 16, t, mask)
    return {"mdlm": mdlm_loss, "sft": sft_loss}[name](model, tokens, t=t, mask=mask)


def diffusion(device, dtype):
    """Losses and their gradients: masks, blocks (flex_attention on a GPU), answers, next tokens."""
    errors = {}
    tokens = random_tokens(2, 64)
    for name in ("mdlm", "block", "sft", "ar"):
        # One head size that flex_attention knows.
        model = build("cpu", n_heads=2, causal=name == "ar", shift=name == "ar")
        wanted = objective(name, model, tokens).loss
        wanted.backward()
        there = build(device, n_heads=2, causal=name == "ar", shift=name == "ar")
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            found = objective(name, there, tokens.to(device)).loss
        found.backward()
        errors[f"{name} loss"] = error_of(found, wanted)
        errors[f"{name} gradients"] = error_of([p.grad for p in there.parameters()],
                                               [p.grad for p in model.parameters()])
    return errors


def fast_forms(device, dtype):
    """What kernels.py computes, against its plain lines, on the device itself."""
    errors = {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def compare(name, function):
        found = function()
        kernels.PLAIN = True
        try:
            errors[name] = error_of(found, function())
        finally:
            kernels.PLAIN = False

    x, weight = random(64, 32), random(32)
    compare("norm", lambda: kernels.rms_norm(x, weight, 1e-6))
    q, k = random(2, 4, 32, 16), random(2, 2, 32, 16)
    compare("attention", lambda: kernels.attend(q, k, k))
    compare("causal attention", lambda: kernels.attend(q, k, k, causal=True))
    stack, counts = random(4, 16, 32), torch.tensor([10, 0, 30, 24]).to(device)
    compare("experts", lambda: kernels.expert_linear(x, stack, counts))
    head, targets = random(200, 32), torch.arange(64).to(device)
    ones = torch.ones(64, device=device)
    compare("loss", lambda: kernels.linear_cross_entropy(x, head, None, targets, ones, 16)[1])
    return errors


@torch.no_grad()
def engine(device, dtype):
    """Tokens of generate and infill against the plain sampler on the same device: the share that
    differs, and of the caches against the CPU in float32."""
    errors = {}
    model = build(device).to(dtype)
    prompts = [random_tokens(1, 8)[0].tolist(), random_tokens(1, 8, seed=1)[0].tolist()]
    mask_id = model.config.mask_token_id
    for name, how in {"greedy": {}, "threshold": dict(threshold=0.5),
                      "entropy": dict(remasking="entropy"),
                      "drawn": dict(temperature=0.8, seed=3)}.items():
        canvas = torch.tensor([prompt + [mask_id] * 16 for prompt in prompts]).to(device)
        wanted = denoise(model, canvas, 16, block_length=8, prompt_len=8, **how)
        found = generate(model, prompts, 16, 16, 8, **how)
        errors[name] = share_that_differs(found, wanted.tolist())
    gaps = [[1, 2, mask_id, mask_id, 5, mask_id]]
    canvas = torch.tensor(gaps).to(device)
    errors["infill"] = share_that_differs(infill(model, gaps, 3),
                                          denoise(model, canvas, 3).tolist())
    if dtype == torch.float32:
        there = build("cpu")
        for cache in ("prefix", "dual"):
            errors[f"{cache}, as on a CPU"] = share_that_differs(
                generate(model, prompts, 16, 16, 8, cache=cache),
                generate(there, prompts, 16, 16, 8, cache=cache))
    return errors


def share_that_differs(found, wanted):
    pairs = [pair for mine, theirs in zip(found, wanted) for pair in zip(mine, theirs)]
    return sum(mine != theirs for mine, theirs in pairs) / len(pairs)


@torch.no_grad()
def compiled(device, dtype):
    """Logits of compiled blocks."""
    model = build(device).to(dtype)
    tokens = random_tokens(2, 64).to(device)
    wanted = model(tokens)
    model.compile_blocks()
    return {"blocks": error_of(model(tokens), wanted)}


CHECKS = {"transformer": transformer, "diffusion": diffusion, "fast forms": fast_forms,
          "engine": engine, "compiled": compiled}
# In bfloat16 a pass over the selected rows rounds otherwise than one over all of them, and tokens
# that are nearly as probable as others change.
ENGINE_LIMIT = {torch.float32: 0.0, torch.bfloat16: 0.5}


def wrong(name, errors, dtype):
    """{name: error} of those errors that are too large."""
    limit = ENGINE_LIMIT[dtype] if name == "engine" else LIMITS[dtype]
    return {key: error for key, error in errors.items() if not error <= limit}
