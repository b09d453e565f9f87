"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3): the matrices stay as they are, a thin product beside each learns.

    y = x W^T + alpha / rank * (x A^T) B^T      W [out, in] frozen, A [rank, in] random, B [out, rank] zero at first

Adapters are stored in PEFT's layout under the family's published names, so PEFT reads ours and we read PEFT's.
"""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from common import stream
from data import checkpoints
from data.tokenizer import Tokenizer

TARGETS = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o", "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."                                       # PEFT wraps the model twice
# The keys of PEFT's LoraConfig (0.21) that may have any value. They said where adapters went, how
# they began and were trained, which the stored tensors show or no longer need; the `..._config` of
# an initialisation counts only where init_lora_weights names it.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "bias", "init_lora_weights",    # checked one by one below
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "ensure_weight_tying",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# Initialisations of A and B that leave the base's weights as they are. Others (pissa, olora, corda,
# loftq, lora_ga, ...) take the product of A and B out of them: what is stored then belongs to
# weights that are stored nowhere.
_PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")            # and true, false, null
# Keys and parts of tensors' names of an adapter that learned more than matrices of the blocks.
_WHOLE_KEYS = ("modules_to_save", "trainable_token_indices")
_WHOLE_TENSORS = r"lora_embedding_[AB]|trainable_tokens|modules_to_save|base_layer\.(weight|bias)"
_MERGE_THERE = "merge it with PEFT (merge_and_unload, save_pretrained) and load the result"


class LoRALinear(nn.Linear):
    """An nn.Linear, frozen, and its adapter in float32: `lora_A` [rank, in] and `lora_B` [out, rank]. Its `weight` keeps its name."""

    def __init__(self, base, rank, alpha, dropout):
        nn.Module.__init__(self)                                    # nn.Linear's own would make weights
        self.in_features, self.out_features, self.weight, self.bias = base.in_features, base.out_features, base.weight, base.bias
        self.rank, self.alpha, self.dropout, self.scale = rank, alpha, dropout, alpha / rank if rank else 0.0
        with torch.device(base.weight.device):
            self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features))
            self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.rank:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))             # [..., rank]
        return torch.add(y, F.linear(low, self.lora_B.to(x.dtype)), alpha=self.scale)


def lora_layers(model):
    """{our module name: LoRALinear}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model, rank, alpha, dropout=0.0, targets="q,k,v,o,gate,up,down"):
    """Freeze `model` and put a LoRALinear in place of each of its matrices in `targets` ("q,v"; names as in TARGETS). Returns it.

    Works on a model without memory (the meta device) too. The adapters are zero: `init_lora` makes them ready to learn. Raises
    ValueError for an unknown target, a rank beyond a matrix, or a dropout outside [0, 1).
    """
    names = [name.strip() for name in targets.split(",")]
    if unknown := [name for name in names if name not in TARGETS]:
        raise ValueError(f"lora_targets is a list of {', '.join(TARGETS)}, got {unknown[0]!r}")
    if not 0 <= dropout < 1 or alpha <= 0:
        raise ValueError(f"lora_dropout must be in [0, 1) and lora_alpha positive, got {dropout} and {alpha}")
    model.requires_grad_(False)
    for layer, block in enumerate(model.blocks):
        for place in (TARGETS[name] for name in names):
            parent, leaf = block.get_submodule(place.split(".")[0]), place.split(".")[1]
            if (linear := getattr(parent, leaf)) is None:           # an MLP without gate
                continue
            if not 0 <= rank <= min(linear.weight.shape):
                raise ValueError(f"lora_rank {rank} does not fit blocks.{layer}.{place}, a matrix of {linear.out_features} x {linear.in_features}: "
                                 f"from 0 to {min(linear.weight.shape)} is possible")
            setattr(parent, leaf, LoRALinear(linear, rank, alpha, dropout).train(linear.training))
    return model


def init_lora(model, seed=0):
    """A ~ U(-1, 1) / sqrt(in), B = 0, as PEFT begins: at first the adapted model is the base."""
    generator = stream("adapters", seed)
    for name, layer in lora_layers(model).items():
        A = (2 * torch.rand(layer.rank, layer.in_features, generator=generator) - 1) / math.sqrt(layer.in_features)
        device, B = layer.weight.device, torch.zeros(layer.out_features, layer.rank)
        for key, tensor in (("lora_A", A), ("lora_B", B)):
            checkpoints.put_rows(model, f"{name}.{key}", tensor[slice(*checkpoints.own_rows(getattr(layer, key)))].to(device))


@torch.no_grad()
def merge_lora(model):
    """Add the adapters into their matrices, W + alpha / rank * B A in float32, and make them plain nn.Linear again. Returns the model."""
    for name, layer in lora_layers(model).items():
        merged = torch.addmm(layer.weight.float(), layer.lora_B.float(), layer.lora_A.float(), alpha=layer.scale)
        layer.weight.copy_(merged)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain.train(layer.training))
    return model


# ---- files -------------------------------------------------------------------------------------------------------------------


def published_modules(model):
    """{our module name: its published name}, of the matrices in TARGETS. ValueError where the family stores several as one."""
    names = {}
    for theirs, ours, transposed in checkpoints.tensor_table(model):
        if re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", ours[0]) and ours[0].split(".")[3] in TARGETS:
            if len(ours) > 1 or transposed:
                raise ValueError(f"adapters of {model.config.family} models cannot be stored: {theirs} holds several of our matrices, or one transposed")
            names[ours[0].removesuffix(".weight")] = theirs.removesuffix(".weight")
    return names


def save_adapter(model, folder, base, state=None):
    """Write adapter_model.safetensors and adapter_config.json, which names `base`, the checkpoint that the adapter belongs to.

    state: the model's tensors by name where the model itself holds but a part of them (FSDP).
    """
    folder, names, layers = Path(folder), published_modules(model), lora_layers(model)
    state = state or {f"{name}.{key}": getattr(layer, key) for name, layer in layers.items() for key in ("lora_A", "lora_B")}
    tensors = {f"{_PREFIX}{names[name]}.{key}.weight": state[f"{name}.{key}"].detach().float().cpu().contiguous()
               for name in layers for key in ("lora_A", "lora_B")}
    layer = next(iter(layers.values()))
    # Full names as one pattern: a LLaDA's head and the last matrix of its blocks are both called ff_out.
    pattern = "|".join(sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(names[name])) for name in layers}))
    settings = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": str(base), "r": layer.rank, "lora_alpha": layer.alpha,
                "lora_dropout": layer.dropout, "target_modules": pattern, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    checkpoints.write_atomically(folder / SETTINGS, lambda path: Path(path).write_text(json.dumps(settings, indent=2) + "\n"))


def read_settings(folder):
    """adapter_config.json of an adapter that is a plain LoRA. Raises FileNotFoundError and ValueError."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {SETTINGS}: is it the folder of an adapter?")
    settings = checkpoints.read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}, only LORA can be read")
    for key in _WHOLE_KEYS:
        if settings.get(key):
            raise ValueError(f"{path}: {key} = {settings[key]!r}: {_learned_more()}")
    init = settings.get("init_lora_weights", True)
    is_plain = init is None or type(init) is bool
    if isinstance(init, str):
        is_plain = init.lower() in _PLAIN_INITS
    if not is_plain:
        raise ValueError(f"{path}: init_lora_weights = {init!r} is not supported: it changes the "
                         "base's own weights, or may. Save the adapter with "
                         f"path_initial_model_for_weight_conversion, or {_MERGE_THERE}")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias = {settings['bias']!r} is not supported: {_MERGE_THERE}")
    for key, value in settings.items():
        neutral = value is None or value is False or value in ("", [], {})
        if not neutral and key not in _HARMLESS:
            raise ValueError(f"{path}: {key} = {value!r} is not supported, only plain LoRA is: "
                             f"{_MERGE_THERE}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 0 or type(alpha) not in (int, float) or not 0 <= alpha < 1e30:
        raise ValueError(f"{path}: r must be a whole number and lora_alpha a number, got {rank!r} and {alpha!r}")
    return settings


def _learned_more():
    return ("this adapter learned the embedding, the head or other whole modules too, perhaps for "
            "a vocabulary of another size; only LoRA on the matrices of the blocks can be read: "
            + _MERGE_THERE)


def load_adapter(model, folder):
    """Put the adapter in `folder` on `model`, ours or PEFT's. Returns the model, adapted. ValueError if it belongs to another."""
    folder = checkpoints.find_checkpoint(folder)
    settings = read_settings(folder)
    rank, alpha, found = settings["r"], settings["lora_alpha"], {}
    ours = {theirs: name for name, theirs in published_modules(model).items()}
    prefix = checkpoints.FAMILIES[model.config.family].prefix
    embedding_and_head = {theirs for theirs, parts, _ in checkpoints.tensor_table(model)
                          if parts[0].startswith("embed") or checkpoints.is_head(parts)}
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}")
    for name, (file, shape, _) in checkpoints.read_headers([folder / WEIGHTS]).items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name)
        place = match[1] if match else name.removeprefix(_PREFIX)
        if match and place not in ours:
            place = prefix + place                                  # trained without the head
        spellings = {place, place + ".weight", prefix + place}
        if re.search(_WHOLE_TENSORS, name) or embedding_and_head & spellings:
            raise ValueError(f"{file} holds {name}: {_learned_more()}")
        if not match or place not in ours:
            raise ValueError(f"{file}: {name} has no place in this {model.config.family} model: the adapter belongs to another one")
        linear = model.get_submodule(ours[place])
        asked = (rank, linear.in_features) if match[2] == "lora_A" else (linear.out_features, rank)
        if shape != asked:
            raise ValueError(f"{file}: {name} has shape {list(shape)}, this model and r = {rank} ask for {list(asked)}: "
                             "the adapter belongs to another model")
        found.setdefault(ours[place], {})[match[2]] = name
    if lacking := [name for name, pair in found.items() if len(pair) < 2] or (["any matrix"] if not found else []):
        raise ValueError(f"{folder / WEIGHTS} lacks half of the adapter of {lacking[0]}")
    with checkpoints.open_tensors(folder / WEIGHTS) as tensors:
        for name, pair in found.items():
            parent, _, leaf = name.rpartition(".")
            layer = LoRALinear(model.get_submodule(name), rank, alpha, 0.0)
            setattr(model.get_submodule(parent), leaf, layer.train(model.training))
            for key, stored in pair.items():
                getattr(layer, key).data.copy_(tensors.get_tensor(stored))
    return model


def check_target(setting, target, *sources):
    """ValueError if the folder `target`, where weights are to be written, is one that they, or the base of an adapter, come from."""
    bases = [base for source in sources if (base := checkpoints.adapter_base(source))]
    for source in (*sources, *bases):
        if Path(target).expanduser().resolve() == Path(source).expanduser().resolve():
            raise ValueError(f"{setting}={target} is where the weights come from, and they would be overwritten: choose another folder")


def write_merged(folder, target):
    """Write the model in `folder`, its adapter merged into the base, in the family's published layout, with a tokenizer. Returns a line about it.

    Our own models are written as they are: the layout that they export to, Qwen3's, stands for an autoregressive model.
    """
    check_target("merge", target, folder)
    model = checkpoints.load(folder)
    tokenizer = Tokenizer.from_pretrained(checkpoints.tokenizer_folder(folder))
    (model.save_pretrained if model.config.family == "unmask" else model.export_pretrained)(target)
    if not (Path(target) / "tokenizer.json").exists() or tokenizer.vocab_size != Tokenizer.from_pretrained(target).vocab_size:
        tokenizer.save_pretrained(target)
    return f"wrote {target}: {model.config.family}, {sum(p.numel() for p in model.parameters()):,} parameters, {model.embed.weight.dtype}"
