"""An adapter becomes part of its base's weights, in a folder of its own."""
from pathlib import Path

from data.tokenizer import Tokenizer
from pretrained.hub import adapter_base, tokenizer_folder
from pretrained.load import load


def check_target(setting, target, *sources):
    """ValueError if the folder `target`, where weights are to be written, is one that they, or the
    base of an adapter, come from. setting: the name of the setting that says `target`. What is
    empty names no folder."""
    if not target:
        return
    sources = [source for source in sources if source]
    bases = [adapter_base(source) for source in sources]
    target_path = Path(target).expanduser().resolve()
    for source in (*sources, *bases):
        if source is not None and target_path == Path(source).expanduser().resolve():
            raise ValueError(f"{setting}={target} is where the weights come from, and they would "
                             "be overwritten: choose another folder")


def write_merged(folder, target):
    """Write the model in `folder`, its adapter merged into the base, in the family's published
    layout, with a tokenizer. Returns a line about it.

    Our own models are written as they are: the layout that they export to, Qwen3's, stands for an
    autoregressive model.
    """
    check_target("merge", target, folder)
    target = Path(target).expanduser()
    model = load(folder)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(folder))
    if model.config.family == "unmask":
        model.save_pretrained(target)
    else:
        model.export_pretrained(target)
    # The base's tokenizer files were copied; those of the run may know more tokens.
    has_file = (Path(target) / "tokenizer.json").exists()
    if not has_file or Tokenizer.from_pretrained(target).vocab_size != tokenizer.vocab_size:
        tokenizer.save_pretrained(target)
    n = sum(p.numel() for p in model.parameters())
    return f"wrote {target}: {model.config.family}, {n:,} parameters, {model.embed.weight.dtype}"
