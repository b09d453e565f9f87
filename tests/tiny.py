"""Small random models with a tokenizer of bytes, made on the spot: enough for everything that does
not depend on what the text says."""
import torch
from tokenizers import AddedToken, models

from data.tokenizer import EOS, Tokenizer, _byte_level, _byte_vocab
from model import Config, Transformer
from pretrained.tiny import tiny_config
from sampling.sampler import Sampler

ENCODERS, DECODERS = ("bert", "roberta", "modernbert"), ("gpt2", "llama", "qwen2", "qwen3")


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


def publish(family, folder):
    """The folder, with a random checkpoint in the family's own layout; a decoder's tokenizer knows
    bytes and an end of text, no mask."""
    tokenizer = Tokenizer.bytes()
    if family in DECODERS:
        backend = _byte_level(models.BPE(vocab=_byte_vocab(), merges=[]))
        backend.add_special_tokens([AddedToken(EOS, special=True)])
        tokenizer = Tokenizer(backend, {"eos_token": EOS})
    sizes = dict(dim=16, n_layers=2, n_heads=2)
    model = Transformer(tiny_config(family, tokenizer, 96, **sizes)).init_weights()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    for block in model.blocks:                          # a new one's blocks do nothing
        torch.nn.init.normal_(block.attn.o.weight, std=0.5)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.5)
    model.export_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
