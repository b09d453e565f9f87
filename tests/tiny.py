"""Small random models with a tokenizer of bytes, made on the spot: enough for everything that does
not depend on what the text says."""
import torch

from data.tokenizer import Tokenizer
from model import Config, Transformer
from sampling.sampler import Sampler


def tiny_model(seed=0, **settings):
    """A Transformer whose head is far from uniform, and whose blocks do nothing: where there are
    only masks, all positions tie exactly, and the order decides."""
    config = {"vocab_size": 260, "dim": 32, "n_layers": 2, "n_heads": 2, "max_len": 128,
              "mask_token_id": 257, "eos_token_id": 256, **settings}
    model = Transformer(Config(**config)).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
        head = model.head.weight
        head.copy_(torch.randn(head.shape, generator=generator) * 0.3)
        head[128:] *= 0                                 # mostly ASCII
    return model


def tiny_checkpoint(folder, **settings):
    """The folder, with such a model and its tokenizer in it."""
    tiny_model(**settings).save_pretrained(folder)
    Tokenizer.bytes().save_pretrained(folder)
    return folder


def tiny_sampler(**settings):
    return Sampler(tiny_model(**settings), Tokenizer.bytes(), "tiny")
