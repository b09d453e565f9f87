"""A Transformer becomes a checkpoint folder, in our own layout or in its family's."""
import functools
import shutil
import warnings
from pathlib import Path

import torch

from common import write_atomically
from pretrained.config import publish_config, read_config, read_json
from pretrained.gguf import is_gguf
from pretrained.gguf_tokenizer import write_tokenizer
from pretrained.tensors import stack_of, tensor_table
from training.files import save_model, write_checkpoint, write_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json")


def save(model, folder, state=None):
    """See Transformer.save_pretrained. state: the model's tensors where the model itself holds but
    a part of them (FSDP2)."""
    refuse_adapter(model)
    folder = Path(folder).expanduser()
    save_model(model, folder, state)
    copy_from_source(model, folder, TOKENIZER_FILES)


def export(model, folder, gguf=False):
    """See Transformer.export_pretrained."""
    refuse_adapter(model)
    folder = Path(folder).expanduser()
    if model.config.noise != "mask":
        raise ValueError(f"no published layout is for a model of {model.config.noise} noise: "
                         "save_pretrained writes it in ours")
    if gguf is not False:
        from pretrained.gguf_writer import check_kind, write_gguf
        return write_gguf(model, folder, check_kind(gguf))
    config = publish_config(model.config, model.embed.weight.dtype)
    tensors, parameters = {}, model.state_dict()
    for theirs, ours, transposed in tensor_table(model):
        if ours == ["head.weight"] and model.config.tie_embeddings:
            continue
        name, expert = stack_of(ours[0])
        if expert is not None:
            tensors[theirs] = parameters[name][expert]
            continue
        tensor = torch.cat([parameters[name] for name in ours])
        tensors[theirs] = tensor.T if transposed else tensor
    write_checkpoint(folder, config, tensors)
    # The family's own code, which some folders hold, is copied and never run.
    copy_from_source(model, folder, (*TOKENIZER_FILES, "*.py"))


def refuse_adapter(model):
    """ValueError for a model with an adapter beside its matrices, for which no layout has a
    name."""
    if any(name.endswith(".lora_A") for name, _ in model.named_parameters()):
        raise ValueError("this model has an adapter, which would be left out: add it to the "
                         "weights with training.lora.merge_lora, or write it alone with "
                         "save_adapter")


def copy_from_source(model, folder, patterns):
    """Copy what stands beside the weights in the checkpoint that the model was loaded from; a GGUF
    becomes the files of its tokenizer."""
    folder, source = Path(folder), getattr(model, "source", None)
    if source is None or source.resolve() == folder.resolve():
        return
    if is_gguf(source):
        try:
            write_tokenizer(source, folder)
        except ValueError as error:                     # the weights are worth having without
            warnings.warn(f"no tokenizer was written: {error}", stacklevel=4)
        return
    for pattern in patterns:
        for file in source.glob(pattern):
            write_atomically(folder / file.name, functools.partial(shutil.copyfile, file))
    generation = folder / "generation_config.json"
    if (source / generation.name).exists() and model.config.ends != read_config(source)[0].ends:
        write_ends(generation, model.config.ends)


def write_ends(path, ends):
    """Write the ends of a model that has others than its source into the copy of its
    generation_config.json, which `transformers` reads first."""
    raw = read_json(path)
    raw["eos_token_id"] = None
    if len(ends) == 1:
        raw["eos_token_id"] = ends[0]
    if len(ends) > 1:
        raw["eos_token_id"] = list(ends)
    write_json(path, raw)
