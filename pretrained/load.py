"""A checkpoint folder becomes a Transformer: `load`, or in two steps `open_checkpoint` and `fill`,
between which the model can be changed and sharded.

Every tensor is accounted for, nothing is unpickled and no remote code runs.
"""
import dataclasses
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from common import stream
from model import ExpertLinear, Transformer
from pretrained import gguf
from pretrained.config import read_config
from pretrained.families import FAMILIES
from pretrained.hub import adapter_base, find_checkpoint, model_folder, weight_files
from pretrained.tensors import (
    DTYPES,
    is_head,
    own_rows,
    put_rows,
    read_headers,
    read_rows,
    stack_of,
    tensor_table,
)
from training.files import local_part


def load(path_or_hub_id, causal=None, device="cpu", dtype=None, fresh_head=False):
    """See Transformer.from_pretrained. fresh_head: as in `open_checkpoint`."""
    folder = find_checkpoint(path_or_hub_id)
    base = adapter_base(folder)
    if base is not None:
        from training.lora import load_adapter, merge_lora
        return merge_lora(load_adapter(load(base, causal, device, dtype, fresh_head), folder))
    model, plan = open_checkpoint(folder, causal, fresh_head)
    fill(model, plan, device, dtype)
    return model.eval()


def open_checkpoint(folder, causal=None, fresh_head=False):
    """(the model on the meta device, the plan by which `fill` gives it its weights).

    fresh_head: an encoder that was saved without its masked-LM head gets a new one, tied to the
    embedding, and `model.fresh_head` is True. Without this argument such a file is a ValueError.
    """
    config, _ = read_config(folder)
    if causal is not None:
        config.causal = causal
    stored = read_headers(weight_files(folder))
    fresh_head = fresh_head and lacks_encoder_head(config, stored)
    if fresh_head:
        config.tie_embeddings = True
        if config.published:                            # an export says what it is now
            architectures = [FAMILIES[config.family].architecture]
            config.published = dict(config.published, architectures=architectures)
    model, plan = match_tensors(config, stored, fresh_head)
    model.source, model.fresh_head = Path(folder), fresh_head
    return model, plan


# --------------------------------------------------------------------------------------------------
# The plan: which stored tensor becomes which parameters


@dataclass
class Part:
    """A stored tensor and what it becomes."""
    file: Path
    name: str               # in the file
    shape: tuple            # in the file
    dtype: torch.dtype      # in the file
    ours: list              # our parameters; several, if it holds them one after the other
    transposed: bool


def match_tensors(config, stored, fresh_head=False):
    """(a model without memory, the plan: the Part of every tensor that is read).

    Every tensor of `read_headers` is accounted for: a missing, extra or misshapen one is a
    ValueError that names it. fresh_head: the head is not looked for, see `open_checkpoint`.
    """
    check_layers(config, stored)                        # before anything of that size is built
    model = model_without_memory(config, stored)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted, copies = wanted_tensors(model, stored, fresh_head)
    family = FAMILIES[config.family]
    names = {name: full_name(name, family, {*wanted, *copies}) for name in stored}
    let_copies_replace_originals(wanted, copies, names.values())
    plan, plan_of_copies = [], []
    for name, tensor in stored.items():
        known = names[name]
        if known in wanted:
            ours, transposed = wanted.pop(known)
            parts = plan
        elif known in copies:
            ours, transposed = copies[known]
            parts = plan_of_copies
        elif is_unused(family, name):
            continue
        else:
            refuse(config, name, stored)                # raises
        check_dtype(name, tensor)
        check_shape(name, stored, [shape_of(shapes, our) for our in ours], transposed)
        dtype = DTYPES[tensor.dtype]
        parts.append(Part(tensor.file, name, tensor.shape, dtype, ours, transposed))
    if wanted:
        refuse_incomplete(config, stored, wanted)
    return model, plan + plan_of_copies


def from_gguf(stored):
    """Whether the tensors of `read_headers` stand in a GGUF."""
    return any(gguf.is_gguf(file) for file in {tensor.file for tensor in stored.values()})


def described_in(stored):
    """What says how large the model is, for messages."""
    return "its metadata" if from_gguf(stored) else "config.json"


def shape_of(shapes, our):
    """The shape of one of our parameters, or of an expert's matrix in it."""
    name, expert = stack_of(our)
    return shapes[name] if expert is None else shapes[name][1:]


def model_without_memory(config, stored):
    """A Transformer on the meta device. ValueError if no memory could ever hold it."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except RuntimeError as error:                       # its size overflows 64 bits
        reason = str(error).splitlines()[0]
        raise ValueError(f"{described_in(stored)} asks for too large a model ({reason})") from None


def check_layers(config, stored):
    """ValueError if the files hold another number of layers than config.json says."""
    layers = set()
    for name in stored:
        match = re.search(r"(?:^|\.)(\d+)\.", name)
        if match:
            layers.add(match[1])
    if len(layers) != config.n_layers:
        raise ValueError(f"{described_in(stored)} says {config.n_layers} layers, the weights hold "
                         f"{len(layers)}")


def wanted_tensors(model, stored, fresh_head):
    """(what must be in the files, what may be there too), each {name in the file: (our parameters,
    stored transposed)}. A file of ours has our names, a GGUF those of llama.cpp, any other its
    family's."""
    config = model.config
    is_own = "embed.weight" in stored or "head.weight" in stored
    table = tensor_table(model)
    if from_gguf(stored):
        table = tensor_table(model, gguf.TENSORS)
    if is_own:
        table = [(name, [name], False) for name in model.state_dict()]
    wanted, copies = {}, {}
    for name, our in FAMILIES[config.family].copies.items():
        copies[name] = [our], False
    for name, ours, transposed in table:
        if config.tie_embeddings and ours == ["head.weight"]:
            copies[name] = ["embed.weight"], False
        elif not (fresh_head and is_head(ours)):
            wanted[name] = ours, transposed
    return wanted, copies


def full_name(name, family, known):
    """A stored tensor's name as the family's table has it: with the prefix, and without
    TensorFlow's names of the norms."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    return name if name in known else family.prefix + name


def let_copies_replace_originals(wanted, copies, names):
    """A copy that is stored without its original (a tied head without the embedding) is wanted in
    its place. names: those of all stored tensors."""
    for name, (ours, transposed) in copies.items():
        for original, (parts, _) in list(wanted.items()):
            if parts == ours and name in names and original not in names:
                del wanted[original]
                wanted[name] = ours, transposed


def is_unused(family, name):
    """Whether a tensor may be in the family's files and is not needed."""
    spellings = (name, family.prefix + name)
    return any(re.fullmatch(family.unused, spelling) for spelling in spellings)


def refuse(config, name, stored):
    """ValueError for a stored tensor that has no place in the model."""
    tensor = stored[name]
    if tensor.dtype in ("I64", "BOOL"):
        raise ValueError(f"{tensor.file} holds {name}, a buffer of type {tensor.dtype} and no "
                         f"weights, which has no place in a {config.family} model: write the file "
                         "without it if it is but a table of positions or the like")
    check_dtype(name, tensor)
    raise ValueError(f"{tensor.file} holds the tensor {name}, which has no place in a "
                     f"{config.family} model as {described_in(stored)} has it")


def check_dtype(name, tensor):
    """ValueError for a type that is not one of floating-point numbers."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{tensor.file}: {name} is stored as {tensor.dtype}; quantised weights "
                         f"cannot be read (only {', '.join(DTYPES)})")


def check_shape(name, stored, shapes, transposed):
    """ValueError if a stored tensor is not of the size of our parameters, of these shapes."""
    tensor = stored[name]
    asked = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
    if transposed:
        asked.reverse()
    if list(tensor.shape) != asked:
        raise ValueError(f"{tensor.file}: {name} has shape {list(tensor.shape)}, "
                         f"{described_in(stored)} asks for {asked}")


def refuse_incomplete(config, stored, wanted):
    """ValueError for tensors, those of `wanted`, that the files lack."""
    message = f"the weights lack the tensor {next(iter(wanted))}"
    if len(wanted) > 1:
        message += f" and {len(wanted) - 1} more"
    lacks_head_only = all(is_head(ours) for ours, _ in wanted.values())
    if lacks_head_only and lacks_encoder_head(config, stored):
        message += (": they are an encoder without the head that predicts tokens; convert_bert.py "
                    "gives it a new one")
    elif lacks_head_only and not config.tie_embeddings:
        message += (": the head that predicts tokens is missing, and config.json does not tie it "
                    "to the embedding")
    raise ValueError(message)


def lacks_encoder_head(config, stored):
    """Whether the tensors of `read_headers` are an encoder's without any part of its masked-LM
    head: those of a BertModel instead of a BertForMaskedLM."""
    if not config.head_transform:                       # a decoder has no such head
        return False
    family, heads = FAMILIES[config.family], ["head", "head_dense", "head_norm"]
    for ours, theirs in family.tensors.items():
        if isinstance(ours, str) and is_head([ours]):   # a head is never a fused tensor
            heads.append(theirs)
    for theirs, our in family.copies.items():
        if is_head([our]):
            heads.append(theirs)
    for name in stored:
        if any(name == head or name.startswith(head + ".") for head in heads):
            return False
    return True


# --------------------------------------------------------------------------------------------------
# The weights


def fill(model, plan, device="cpu", dtype=None, put=put_rows):
    """Give the model of `match_tensors` its weights, 4 million numbers at a time; a sharded model
    (FSDP2) reads its own rows only.

    dtype: of the weights; None: as the embedding is stored. A tensor with NaN is warned about.
    put(model, name, rows): what makes the rows read a parameter, instead of `put_rows`.
    Raises ValueError for a copy that differs from its original.
    """
    dtype = dtype or stored_dtype(plan)
    for part in plan:
        name, expert = stack_of(part.ours[0])
        if expert is not None:
            fill_expert(model, part, name, expert, device, dtype)
        elif model.get_parameter(name).is_meta:
            fill_parameters(model, part, device, dtype, put)
        else:                               # a copy, or a head that config.json ties
            check_copy(model, part)
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight
    if getattr(model, "fresh_head", False):
        init_head(model, device, dtype)


def stored_dtype(plan):
    """The dtype of a checkpoint: its embedding's."""
    return next(part.dtype for part in plan if part.ours == ["embed.weight"])


def fill_parameters(model, part, device, dtype, put=put_rows):
    """Read a stored tensor into the parameters that it becomes."""
    # Published in float32 beside bfloat16 weights: it decides between experts of like scores.
    if part.ours[0].endswith("router_bias"):
        dtype = torch.promote_types(part.dtype, dtype)
    # If it is one parameter as it is, a process reads its rows alone.
    as_it_is = len(part.ours) == 1 and not part.transposed
    first, last = 0, part.shape[0]
    if as_it_is:
        first, last = own_rows(model.get_parameter(part.ours[0]))
    tensor = torch.empty((last - first, *part.shape[1:]), dtype=dtype)
    has_nan = False
    for rows, values in read_rows(part.file, part.name, part.shape, first, last):
        has_nan = has_nan or values.isnan().any().item()
        tensor[rows] = values
    if has_nan:
        warnings.warn(f"{part.file}: {part.name} contains NaN", stacklevel=4)
    if part.transposed:
        tensor = tensor.T
    # q, k and v of one tensor differ in size where query heads share keys.
    sizes = [model.get_parameter(our).shape[0] for our in part.ours]
    if as_it_is:
        sizes = [len(tensor)]
    for our, piece in zip(part.ours, tensor.split(sizes)):
        if not as_it_is:
            piece = piece[slice(*own_rows(model.get_parameter(our)))]
            piece = piece.clone(memory_format=torch.contiguous_format)
        put(model, our, piece.to(device))


def fill_expert(model, part, name, expert, device, dtype):
    """Read a stored matrix into its place in the stack `name` of all experts' matrices."""
    stack = model.get_parameter(name)
    first, last = own_rows(stack)
    if stack.is_meta:                                   # the first expert makes room for all
        put_rows(model, name, torch.empty((last - first, *stack.shape[1:]), dtype=dtype,
                                          device=device))
        stack = model.get_parameter(name)
    if not first <= expert < last:
        return                                          # another process has it
    matrix, has_nan = local_part(stack.detach())[expert - first], False
    for rows, values in read_rows(part.file, part.name, part.shape, 0, part.shape[0]):
        has_nan = has_nan or values.isnan().any().item()
        matrix[rows] = values.to(matrix)
    if has_nan:
        warnings.warn(f"{part.file}: {part.name} contains NaN", stacklevel=4)


def check_copy(model, part):
    """ValueError if a stored tensor differs from the parameter that it should equal."""
    parameter = model.get_parameter(part.ours[0]).detach()
    known = local_part(parameter)
    for rows, values in read_rows(part.file, part.name, part.shape, *own_rows(parameter)):
        if not torch.equal(values.to(known), known[rows]):
            raise ValueError(f"{part.file}: {part.name} differs from {part.ours[0]}, which it "
                             "should equal")


def init_head(model, device, dtype):
    """A new masked-LM head on a tied embedding, as BERT's began: N(0, 0.02^2) for its matrix, ones
    for the norm's weight, zeros for all biases."""
    generator = stream("fresh head", seed=0)
    for name, parameter in list(model.named_parameters()):
        if is_head([name]) and name != "head.weight":
            values = torch.zeros(parameter.shape)
            if name == "head_dense.weight":
                values.normal_(std=0.02, generator=generator)
            elif name == "head_norm.weight":
                values.fill_(1)
            put_rows(model, name, values[slice(*own_rows(parameter))].to(device, dtype))


# --------------------------------------------------------------------------------------------------


def describe(path_or_hub_id):
    """The architecture of a checkpoint as text: sizes, parameters, memory, and where each Config
    field came from."""
    folder = model_folder(path_or_hub_id)
    config, origin = read_config(folder)
    model, _ = match_tensors(config, read_headers(weight_files(folder)))
    n, embedding = sum(p.numel() for p in model.parameters()), model.embed.weight.numel()
    head = f" and {model.head.weight.numel():,} in the head"
    if config.tie_embeddings:
        head = ", which is the head too"
    heads = f"{config.n_heads} heads of {config.head_dim} ({config.n_kv_heads} key/value heads)"
    lines = [f"{folder}: family {config.family}, {n:,} parameters, {embedding:,} of them in the "
             f"embedding{head}"]
    if config.n_experts:
        experts = sum(m.weight.numel() for m in model.modules() if isinstance(m, ExpertLinear))
        idle = config.n_experts - config.experts_per_token
        active = n - experts * idle // config.n_experts
        lines.append(f"a token uses {active:,} of them: {config.experts_per_token} of "
                     f"{config.n_experts} experts of width {config.expert_dim} a layer")
    lines.append(f"{config.n_layers} layers of width {config.dim}, {heads}, MLP "
                 f"{config.hidden_dim}, vocabulary {config.vocab_size}, context {config.max_len}")
    lines.append(f"weights: float32 {n * 4 / 1e9:.3f} GB, bfloat16 and float16 "
                 f"{n * 2 / 1e9:.3f} GB")
    if gguf.is_gguf(folder):
        lines.append(f"file: {gguf.describe(folder)}")
    width = max(len(field.name) for field in dataclasses.fields(config))
    for field in dataclasses.fields(config):
        if field.name != "published":
            value = str(getattr(config, field.name))
            came_from = origin.get(field.name, "default")
            lines.append(f"  {field.name:{width}}  {value:12}  {came_from}")
    return "\n".join(lines)
