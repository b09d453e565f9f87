"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3): the matrices stay as they are,
a thin product beside each learns.

    y = x W^T + alpha / rank * (x A^T) B^T

    W [out, in] frozen, A [rank, in] random at first, B [out, rank] zero at first

The matrices of experts get one each, in stacks. Adapters are stored in PEFT's layout under the
family's published names, so PEFT reads ours and we read PEFT's.
"""
import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from common import stream
from model import ExpertLinear
from pretrained.config import read_json
from pretrained.families import FAMILIES
from pretrained.hub import find_checkpoint
from pretrained.tensors import (
    is_head,
    open_tensors,
    own_rows,
    put_rows,
    read_headers,
    stack_of,
    tensor_table,
)
from training import nf4
from training.files import write_json, write_tensors

TARGETS = {
    "q": ("attn.q",),
    "k": ("attn.k",),
    "v": ("attn.v",),
    "o": ("attn.o",),
    "gate": ("mlp.gate", "mlp.gates", "mlp.shared.gate"),       # dense; of experts; of a shared one
    "up": ("mlp.up", "mlp.ups", "mlp.shared.up"),
    "down": ("mlp.down", "mlp.downs", "mlp.shared.down"),
}
ADAPTER = ("lora_A", "lora_B")


class LoRALinear(nn.Linear):
    """An nn.Linear, frozen, and its adapter in float32: `lora_A` [rank, in] and `lora_B`
    [out, rank]. Its `weight` keeps its name."""
    active = True               # see without_adapters

    def __init__(self, base, rank, alpha, dropout):
        nn.Module.__init__(self)                        # nn.Linear's own would make weights
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.packed = None                              # or the weight in 4 bits: nf4.py
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / rank if rank else 0.0
        with torch.device(base.weight.device):
            self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features))
            self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x):
        y = self.product(x)                                                             # [..., out]
        if not (self.rank and self.active):
            return y
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.lora_A.to(x.dtype))                                     # [..., rank]
        return torch.add(y, F.linear(low, self.lora_B.to(x.dtype)), alpha=self.scale)

    def product(self, x):
        """What the frozen layer says."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        y = nf4.FrozenProduct.apply(x, self.packed)
        return y if self.bias is None else y + self.bias

    @property
    def device(self):
        """Where the frozen weights are."""
        return self.weight.device if self.packed is None else self.packed.numbers.device


class LoRAExperts(ExpertLinear):
    """The same for an ExpertLinear, the matrices of all experts: `lora_A` [E, rank, in] and
    `lora_B` [E, out, rank]."""
    active = True

    def __init__(self, base, rank, alpha, dropout):
        nn.Module.__init__(self)
        E, self.out_features, self.in_features = base.weight.shape
        self.weight, self.rank, self.alpha, self.dropout = base.weight, rank, alpha, dropout
        self.scale = alpha / rank if rank else 0.0
        with torch.device(base.weight.device):
            self.lora_A = nn.Parameter(torch.zeros(E, rank, self.in_features))
            self.lora_B = nn.Parameter(torch.zeros(E, self.out_features, rank))

    @property
    def device(self):
        """Where the frozen weights are."""
        return self.weight.device

    def forward(self, x, counts):
        y = kernels.expert_linear(x, self.weight, counts)                               # [N, out]
        if not (self.rank and self.active):
            return y
        x = F.dropout(x, self.dropout, self.training)
        low = kernels.expert_linear(x, self.lora_A.to(x.dtype), counts)                 # [N, rank]
        more = kernels.expert_linear(low, self.lora_B.to(low.dtype), counts)
        return torch.add(y, more, alpha=self.scale)


def adapted(base, rank, alpha, dropout):
    """A matrix, or a stack of them, with its adapter."""
    kind = LoRAExperts if isinstance(base, ExpertLinear) else LoRALinear
    return kind(base, rank, alpha, dropout)


def lora_layers(model):
    """{our module name: LoRALinear or LoRAExperts}"""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear | LoRAExperts)}


def refuse_second(model):
    """ValueError for a model with an adapter, whose places a second one would take."""
    if lora_layers(model):
        raise ValueError("this model has an adapter already: merge that into it (merge_lora) first")


def replace_module(model, name, module):
    """Put a module in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, module.train(old.training))


def add_lora(model, rank, alpha, dropout=0.0, targets="q,k,v,o,gate,up,down"):
    """Freeze `model` and put a LoRALinear in place of each of its matrices in `targets` ("q,v";
    names as in TARGETS), LoRAExperts in place of a stack of them. Returns it.

    Works on a model without memory (the meta device) too. The adapters are zero: `init_lora` makes
    them ready to learn. Raises ValueError for an unknown target, a rank beyond a matrix, a dropout
    outside [0, 1), a model that has none of the targets, or an adapter already.
    """
    names = [name.strip() for name in targets.split(",")]
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"lora_targets is a list of {', '.join(TARGETS)}, got {name!r}")
    if not 0 <= dropout < 1 or not alpha > 0:
        raise ValueError(f"lora_dropout must be in [0, 1) and lora_alpha positive, got {dropout} "
                         f"and {alpha}")
    refuse_second(model)
    model.requires_grad_(False)
    matrices = {name: module for name, module in model.named_modules()
                if isinstance(module, nn.Linear | ExpertLinear)}
    for layer in range(len(model.blocks)):
        for name in names:
            for target in TARGETS[name]:
                place = f"blocks.{layer}.{target}"
                if place not in matrices:
                    continue
                out_features, in_features = matrices[place].weight.shape[-2:]
                largest = min(out_features, in_features)
                if not 0 <= rank <= largest:
                    raise ValueError(f"lora_rank {rank} does not fit {place}, a matrix of "
                                     f"{out_features} x {in_features}: from 0 to {largest} is "
                                     "possible")
                replace_module(model, place, adapted(matrices[place], rank, alpha, dropout))
    if not lora_layers(model):
        raise ValueError(f"lora_targets {targets} name no matrix of a {model.config.family} model: "
                         f"choose others of {', '.join(TARGETS)}")
    return model


def init_lora(model, seed=0):
    """A ~ U(-1, 1) / sqrt(in), B = 0, as PEFT begins: at first the adapted model is the base."""
    generator = stream("adapters", seed)
    for name, layer in lora_layers(model).items():
        A = 2 * torch.rand(layer.lora_A.shape, generator=generator) - 1
        A = A / math.sqrt(layer.in_features)
        B = torch.zeros(layer.lora_B.shape)
        device = layer.device
        put_rows(model, f"{name}.lora_A", A[slice(*own_rows(layer.lora_A))].to(device))
        put_rows(model, f"{name}.lora_B", B[slice(*own_rows(layer.lora_B))].to(device))


@contextlib.contextmanager
def without_adapters(model):
    """For as long as this lasts the model is its base."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def freeze_in_4_bits(model):
    """Prepare a model of `add_lora` that has no memory yet for nf4.py's `put_packed`: every matrix
    of its blocks without an adapter becomes a FrozenLinear. Returns it. ValueError for a mixture of
    experts."""
    nf4.library()                                       # fail early if the package is missing
    if model.config.n_experts:
        raise ValueError("base_bits=4 is for dense models: the matrices of experts are not packed")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.startswith("blocks."):
            replace_module(model, name, nf4.FrozenLinear(module))
    return model


@torch.no_grad()
def merge_lora(model):
    """Add the adapters into their matrices, W + alpha / rank * B A in float32, and make them plain
    nn.Linear or ExpertLinear again. Returns the model."""
    for name, layer in lora_layers(model).items():
        if isinstance(layer, LoRAExperts):
            for W, A, B in zip(layer.weight, layer.lora_A, layer.lora_B):
                W.copy_(torch.addmm(W.float(), B.float(), A.float(), alpha=layer.scale))
            with torch.device("meta"):
                plain = ExpertLinear(len(layer.weight), layer.in_features, layer.out_features)
            plain.weight = layer.weight
            replace_module(model, name, plain)
            continue
        merged = torch.addmm(layer.weight.float(), layer.lora_B.float(), layer.lora_A.float(),
                             alpha=layer.scale)
        layer.weight.copy_(merged)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        replace_module(model, name, plain)
    return model


# --------------------------------------------------------------------------------------------------
# Files

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."                       # PEFT wraps the model twice
# The keys of PEFT's LoraConfig (0.21) that may have any value. They said where adapters went, how
# they began and were trained, which the stored tensors show or no longer need; the `..._config` of
# an initialisation counts only where init_lora_weights names it.
HARMLESS = {
    "peft_type", "r", "lora_alpha", "bias", "init_lora_weights",    # checked one by one below
    "rank_pattern", "alpha_pattern", "base_bits",                   # these as well
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "ensure_weight_tying",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# Initialisations of A and B that leave the base's weights as they are. Others (pissa, olora, corda,
# loftq, lora_ga, ...) take the product of A and B out of them: what is stored then belongs to
# weights that are stored nowhere.
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")             # and true, false, null
# The matrices that hold several of ours, each of which has an adapter of its own: the only ones
# that PEFT's patterns may give another rank.
FUSED = {theirs.rpartition(".")[2] for family in FAMILIES.values()
         for ours, theirs in family.tensors.items() if isinstance(ours, tuple)}
# Keys and parts of tensors' names of an adapter that learned more than matrices of the blocks.
WHOLE_KEYS = ("modules_to_save", "trainable_token_indices")
WHOLE_TENSORS = r"lora_embedding_[AB]|trainable_tokens|modules_to_save|base_layer\.(weight|bias)"
MERGE_THERE = "merge it with PEFT (merge_and_unload, save_pretrained) and load the result"
LEARNED_MORE = ("this adapter learned the embedding, the head or other whole modules too, perhaps "
                "for a vocabulary of another size; only LoRA on the matrices of the blocks can be "
                f"read: {MERGE_THERE}")


def holds_a_run(folder):
    """Whether an adapter or a model lies in a folder."""
    return (Path(folder) / WEIGHTS).exists() or (Path(folder) / "config.json").exists()


def name_of_base(init_from, base, folder):
    """How an adapter in `folder` names the checkpoint `base` that it belongs to, which `init_from`
    led to: "base", the run's own folder, which moves with it; an absolute path for any other local
    folder or GGUF file; else the hub id."""
    if Path(base) == Path(folder) / "base":
        return "base"
    if Path(init_from).expanduser().exists():
        return str(Path(base).resolve())
    return init_from


@dataclass
class Place:
    """What a published matrix is with us."""
    names: list             # our modules: one, or those that a fused matrix holds
    expert: int = None      # the expert whose matrix it is in an ExpertLinear


def published_modules(model):
    """{published name: Place} of the matrices in TARGETS. ValueError where the family stores them
    transposed."""
    places = {}
    targets = "|".join(re.escape(place) for some in TARGETS.values() for place in some)
    for theirs, ours, transposed in tensor_table(model):
        if not re.fullmatch(rf"blocks\.\d+\.({targets})\.weight(\.\d+)?", ours[0]):
            continue
        if transposed:
            raise ValueError(f"adapters of {model.config.family} models cannot be stored: {theirs} "
                             "is stored transposed")
        names = [stack_of(our)[0].removesuffix(".weight") for our in ours]
        places[theirs.removesuffix(".weight")] = Place(names, stack_of(ours[0])[1])
    return places


def save_adapter(model, folder, base, state=None):
    """Write adapter_model.safetensors and adapter_config.json, which names `base`, the checkpoint
    that the adapter belongs to.

    state: the model's tensors by name where the model itself holds but a part of them (FSDP2).
    """
    folder, layers = Path(folder).expanduser(), lora_layers(model)
    tensors, ranks = {}, {}
    state = state or model.state_dict()
    layer = next(iter(layers.values()))
    for theirs, place in published_modules(model).items():
        if not any(name in layers for name in place.names):
            continue
        A, B = published_pair(model, place, layers, state)
        tensors[f"{PEFT_PREFIX}{theirs}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{theirs}.lora_B.weight"] = B
        ranks[theirs] = len(A)
    fused = sorted({name.rpartition(".")[2] for name, rank in ranks.items() if rank != layer.rank})
    factor = {name: rank // layer.rank for name, rank in ranks.items() if layer.rank}
    factors = {name.rpartition(".")[2]: factor for name, factor in factor.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base),
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout,
        "target_modules": pattern_of(list(ranks)),
        "rank_pattern": {name: factors[name] * layer.rank for name in fused},
        "alpha_pattern": {name: factors[name] * layer.alpha for name in fused},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if getattr(layer, "packed", None) is not None:
        settings["base_bits"] = 4                       # PEFT ignores the key, and says so
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / SETTINGS, settings)


def published_pair(model, place, layers, state):
    """A [rank, in] and B [out, rank], float32, of a published matrix.

    One that holds several of ours, each with an adapter of its own, gets an adapter of their ranks
    together, whose B is zero where an adapter does not belong to the rows:

        [B_q A_q; B_k A_k] = [[B_q, 0], [0, B_k]] [A_q; A_k]
    """
    adapters, sizes, blocks = [], [], []
    for name in place.names:
        sizes.append(model.get_submodule(name).weight.shape[-2])
        blocks.append(torch.zeros(sizes[-1], 0))
        if name in layers:
            pair = [state[f"{name}.{key}"].detach().float().cpu() for key in ADAPTER]
            if place.expert is not None:
                pair = [stack[place.expert] for stack in pair]
            adapters.append(pair[0])
            blocks[-1] = pair[1]
    return torch.cat(adapters), torch.block_diag(*blocks)


def pattern_of(names):
    """A pattern of full module names, for every layer and expert: a LLaDA's head and the last
    matrix of its blocks are both called ff_out, so the last part of a name would not do."""
    in_all_layers = set()
    for name in names:
        in_all_layers.add(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)))
    return "|".join(sorted(in_all_layers))


def read_settings(folder):
    """adapter_config.json of an adapter that is a plain LoRA. Raises FileNotFoundError and
    ValueError."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {SETTINGS}: is it the folder of an adapter?")
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}, only LORA can be "
                         "read")
    for key in WHOLE_KEYS:
        if settings.get(key):
            raise ValueError(f"{path}: {key} = {settings[key]!r}: {LEARNED_MORE}")
    check_init(path, settings.get("init_lora_weights", True))
    if settings.get("base_bits", 4) != 4:
        raise ValueError(f"{path}: base_bits = {settings['base_bits']!r} is not supported, only 4 "
                         "is, which means NF4")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias = {settings['bias']!r} is not supported: {MERGE_THERE}")
    for key, value in settings.items():
        is_off = value is None or value is False or value in ("", [], {})
        is_read = key in HARMLESS
        if key.endswith("_pattern") and isinstance(value, dict):
            is_read = is_read and set(value) <= FUSED
        if not is_off and not is_read:
            raise ValueError(f"{path}: {key} = {value!r} is not supported, only plain LoRA is: "
                             f"{MERGE_THERE}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    is_rank = type(rank) is int and rank >= 0
    if not is_rank or type(alpha) not in (int, float) or not 0 <= alpha < 1e30:
        raise ValueError(f"{path}: r must be a whole number and lora_alpha a number, got {rank!r} "
                         f"and {alpha!r}")
    return settings


def check_init(path, init):
    """ValueError for an initialisation that changes the base's weights, or may."""
    if init is None or type(init) is bool:
        return
    if isinstance(init, str) and init.lower() in PLAIN_INITS:
        return
    raise ValueError(f"{path}: init_lora_weights = {init!r} is not supported: it changes the "
                     "base's own weights, or may. Save the adapter with "
                     f"path_initial_model_for_weight_conversion, or {MERGE_THERE}")


def setting_of(settings, kind, theirs):
    """A module's "r" or "lora_alpha", which PEFT's patterns overrule for the modules they name."""
    patterns = settings.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[kind]) or {}
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", theirs):
            return value
    return settings[kind]


def load_adapter(model, folder):
    """Put the adapter in `folder` on `model`, ours or PEFT's. Returns the model, adapted.
    ValueError if it belongs to another, or `model` has one already.

    The adapter of a run on a 4-bit base was trained on what NF4 leaves of the weights: `model`,
    which has the original ones, is rounded to that first.
    """
    folder = find_checkpoint(folder)
    settings = read_settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}")
    refuse_second(model)            # before `round_to_nf4` changes its weights
    places = published_modules(model)
    if settings.get("base_bits") == 4:
        nf4.round_to_nf4(model)
    with open_tensors(folder / WEIGHTS) as tensors:
        for theirs, pair in match_adapter(model, places, folder / WEIGHTS, settings).items():
            A, B = (tensors.get_tensor(pair[key]) for key in ADAPTER)
            put_adapter(model, places[theirs], A, B, setting_of(settings, "lora_alpha", theirs))
    return model


def put_adapter(model, place, A, B, alpha):
    """Adapt the modules of ours that a published matrix is by its A [rank, in] and B [out, rank]. A
    fused one gives each of them all of A and its own rows of B."""
    start = 0
    for name in place.names:
        module = model.get_submodule(name)
        if not isinstance(module, LoRALinear | LoRAExperts):
            module = adapted(module, len(A), alpha, 0.0)
            replace_module(model, name, module)
        rows = module.weight.shape[-2]
        index = slice(None) if place.expert is None else place.expert
        module.lora_A.data[index] = A.to(module.lora_A)
        module.lora_B.data[index] = B[start:start + rows].to(module.lora_B)
        start += rows


def match_adapter(model, places, file, settings):
    """{published module name: {"lora_A": name in the file, "lora_B": name in the file}}. ValueError
    for what does not belong to this model, or is more than a LoRA of its blocks."""
    family = model.config.family
    prefix = FAMILIES[family].prefix
    embedding_and_head = {theirs for theirs, parts, _ in tensor_table(model)
                          if parts[0].startswith("embed") or is_head(parts)}
    found = {}
    for name, tensor in read_headers([file]).items():
        match = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.(lora_[AB])(?:\.default)?\.weight",
                             name)
        place = match[1] if match else name.removeprefix(PEFT_PREFIX)
        if match and place not in places:
            place = prefix + place                      # trained without the head
        spellings = {place, place + ".weight", prefix + place}
        if re.search(WHOLE_TENSORS, name) or embedding_and_head & spellings:
            raise ValueError(f"{file} holds {name}: {LEARNED_MORE}")
        if not match or place not in places:
            raise ValueError(f"{file}: {name} has no place in this {family} model: the adapter "
                             "belongs to another one")
        rank = setting_of(settings, "r", place)
        weights = [model.get_submodule(our).weight for our in places[place].names]
        asked = [rank, weights[0].shape[-1]]
        if match[2] == "lora_B":
            asked = [sum(weight.shape[-2] for weight in weights), rank]
        if list(tensor.shape) != asked:
            raise ValueError(f"{file}: {name} has shape {list(tensor.shape)}, this model and r = "
                             f"{rank} ask for {asked}: the adapter belongs to another model")
        found.setdefault(place, {})[match[2]] = name
    if not found:
        raise ValueError(f"{file} lacks half of the adapter of any matrix")
    for name, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{file} lacks half of the adapter of {name}")
    return found
