"""Tiny GGUF files in the layout of llama.cpp's converter, written with the package `gguf`."""

import functools

import numpy as np
import torch

from data.tokenizer import Tokenizer
from model import Config, Transformer
from pretrained.tensors import tensor_table

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "llada": "llada",
                 "Dream": "dream"}
NAMES = {
    "embed": "token_embd",
    "blocks.*.attn_norm": "blk.*.attn_norm",
    "blocks.*.attn.q": "blk.*.attn_q",
    "blocks.*.attn.k": "blk.*.attn_k",
    "blocks.*.attn.v": "blk.*.attn_v",
    "blocks.*.attn.o": "blk.*.attn_output",
    "blocks.*.attn.q_norm": "blk.*.attn_q_norm",
    "blocks.*.attn.k_norm": "blk.*.attn_k_norm",
    "blocks.*.mlp_norm": "blk.*.ffn_norm",
    "blocks.*.mlp.gate": "blk.*.ffn_gate",
    "blocks.*.mlp.up": "blk.*.ffn_up",
    "blocks.*.mlp.down": "blk.*.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
TEXTS = [
    "The fox and the owl sat by the river, and the owl said: it's 12 o'clock.\n",
    "In 1999 there were 3456 foxes;\n\n  they'd all gone by 2001 (or so).\n",
] * 8
FAMILY = {
    "llama": dict(qk_norm=False, causal=True),
    "qwen2": dict(qk_norm=False, causal=True, qkv_bias=True),
    "qwen3": dict(causal=True, head_dim=32),
    "llada": dict(qk_norm=False),
    "Dream": dict(qk_norm=False, qkv_bias=True, shift=True, step_schedule="timesteps",
                  confidence_at_temperature=True),
}


def tiny_model(family, seed=0, **changes):
    """A random model of a family, large enough for blocks of 32 and for several heads."""
    settings = dict(vocab_size=320, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96,
                    max_len=128, rope_theta=500000.0, norm_eps=1e-5, bos_token_id=315,
                    eos_token_id=312, mask_token_id=313)
    settings |= FAMILY[family] | changes
    model = Transformer(Config(family=family, **settings)).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name != "embed.weight":
                parameter.mul_(10)          # or attention would hardly depend on order and RoPE
    return model


def interleaved(tensor, heads):
    """Rows of q or k as the converter writes them for llama and llada."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


class GGUFFile:
    """A file in the making: `metadata` ({key: value}) and `tensors` ({name: (array, type)}) may be
    changed before it is written. Undone quantisation has gone back into the model, so that it is
    what a reader should find."""

    def __init__(self, model, kind="F32"):
        import gguf
        config = model.config
        self.architecture = ARCHITECTURES[config.family]
        self.metadata = metadata_of(config, self.architecture)
        self.tensors = {}
        for name, (ours,), _ in tensor_table(model, NAMES):
            if ours == "head.weight" and config.tie_embeddings:
                continue
            parameter = model.get_parameter(ours)
            values, type_ = parameter.detach().numpy(), gguf.GGMLQuantizationType.F32
            if ".attn.q." in ours and self.architecture in ("llama", "llada"):
                values = interleaved(values, config.n_heads)
            if ".attn.k." in ours and self.architecture in ("llama", "llada"):
                values = interleaved(values, config.n_kv_heads)
            if parameter.dim() == 2:
                type_ = gguf.GGMLQuantizationType[kind]
                values = gguf.quants.quantize(values, type_)
            self.tensors[name] = values, type_
        undo_in_model(model, self.tensors, self.architecture)

    def write(self, path, **options):
        import gguf
        writer = gguf.GGUFWriter(str(path), self.architecture, **options)
        for key, value in self.metadata.items():
            if key != "general.architecture":
                add(writer, key, value)
        for name, (values, type_) in self.tensors.items():
            writer.add_tensor(name, values, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def undo_in_model(model, tensors, architecture):
    """Give the model the numbers that its quantised tensors stand for."""
    import gguf
    config = model.config
    for name, (ours,), _ in tensor_table(model, NAMES):
        if name not in tensors:
            continue
        values = torch.tensor(gguf.quants.dequantize(*tensors[name]))
        heads = {".attn.q.": config.n_heads, ".attn.k.": config.n_kv_heads}
        for part, count in heads.items():
            if part in ours and architecture in ("llama", "llada"):
                # The other way round: (C/2, 2) back to (2, C/2).
                pairs = values.reshape(count, -1, 2, values.numel() // values.shape[0])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
        model.get_parameter(ours).data.copy_(values)


def add(writer, key, value):
    """Add an entry of the type that llama.cpp's converter would give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def metadata_of(config, architecture):
    sizes = {
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "feed_forward_length": config.hidden_dim,
        "context_length": config.max_len,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    if config.head_dim * config.n_heads != config.dim:
        sizes["attention.key_length"] = sizes["attention.value_length"] = config.head_dim
    if architecture in ("llama", "llada"):
        sizes |= {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    if architecture in ("llada", "dream"):
        sizes["attention.causal"] = False
    metadata = {f"{architecture}.{key}": value for key, value in sizes.items()}
    if architecture == "llada":
        metadata["diffusion.shift_logits"] = False
    return metadata | tokenizer_metadata(config.vocab_size)


@functools.cache
def tokenizer_metadata(vocab_size=320):
    """A small byte-level BPE with tokens of every kind: 310 pieces, two unused ones, EOS, mask, one
    that is not special, BOS, and unused ones to the end."""
    trained = Tokenizer.train(TEXTS, 260 + 54)
    vocab = {piece: i for piece, i in trained.backend.get_vocab(False).items() if i < 310}
    tokens = sorted(vocab, key=vocab.get)
    kinds = [1] * len(tokens)
    tokens += ["[PAD310]", "[PAD311]", "<|end|>", "<|mdm_mask|>", "<tool>", "<|begin|>"]
    kinds += [5, 5, 3, 3, 4, 3]
    while len(tokens) < vocab_size:
        tokens.append(f"[PAD{len(tokens)}]")
        kinds.append(5)
    merges = []
    for piece in sorted(vocab, key=vocab.get):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                break
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 315,
        "tokenizer.ggml.eos_token_id": 312,
        "tokenizer.ggml.mask_token_id": 313,
        "tokenizer.chat_template":
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}",
    }


def random_blocks(kind, rows, columns, seed=0):
    """Bytes of a tensor of a type that the package can read and not write, uint8 [rows, bytes]."""
    import gguf
    size, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (rows, columns // size * size_bytes), dtype=np.uint8)
