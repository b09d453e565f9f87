"""Files of a run in our own layout, and what else several modules of a run build on.

This module imports nothing of the house but common. So pretrained/, which writes our layout too,
may import it, and a recipe that was copied without pretrained/ still saves its model.
"""
import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from common import write_atomically


def save_model(model, folder, state=None):
    """Write a Transformer as config.json and model.safetensors in our own layout: the fields of
    `Config` and our names of the parameters.

    state: the model's tensors by name where the model itself holds but a part of them (FSDP).
    Raises OSError, with the old files untouched, where there is no space.
    """
    config = model.config
    tensors = dict(state or model.state_dict())
    if config.tie_embeddings:
        tensors.pop("head.weight", None)                # it is the embedding, stored once
    fields = dataclasses.asdict(config)
    fields["eos_token_ids"] = list(config.ends) if len(config.ends) > 1 else None
    write_checkpoint(folder, {"model_type": "unmask", **fields}, tensors)


def write_checkpoint(folder, config, tensors):
    """Write config.json (`config`, a dict) and model.safetensors ({name: tensor})."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes to a temporary name of its own as well: a kill leaves such a file.
    for leftover in folder.glob(".tmp??????"):
        leftover.unlink(missing_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)


def write_tensors(path, tensors):
    """Write {name: tensor} as a .safetensors file, whole or not at all. Raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary):
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:                # a full disk
            raise OSError(str(error)) from None

    write_atomically(path, write)


def write_json(path, content):
    """Write an object as a .json file, whole or not at all. Raises OSError."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def check_match(path, settings, must_match):
    """ValueError if the settings of the run that wrote `path` differ from `must_match`."""
    for name, value in must_match.items():
        if settings.get(name) != value:
            raise ValueError(f"cannot resume: {name} was {settings.get(name)!r} in {path} and is "
                             f"{value!r} now")


def local_part(parameter):
    """What this process holds of a parameter that may be sharded (FSDP2)."""
    return parameter.to_local() if hasattr(parameter, "device_mesh") else parameter
