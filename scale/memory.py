"""How much memory fine-tuning takes, known before any weight is read.

The forward and backward pass runs on tensors that have shapes but no memory (torch's FakeTensorMode), and a counter follows every
allocation from its birth to its end. So the figures are those of the code itself; what several processes share is then divided.
RMSNorm is counted as it runs on a CPU, by hand; where a GPU has no fused kernel for it, it keeps float32 copies besides (LLaDA-8B, T 1024,
without checkpointing: 0.6 GB).
"""
import contextlib
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import rank_and_size
from data.checkpoints import find_checkpoint, put_rows, read_config, tiny_config
from data.tokenizer import Tokenizer
from model import Config, Transformer
from scale.lora import add_lora

_LLADA = dict(family="llada", vocab_size=126464, dim=4096, n_layers=32, n_heads=32, hidden_dim=12288, max_len=4096, qk_norm=False)
_DREAM = dict(family="Dream", vocab_size=152064, dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, hidden_dim=18944, max_len=131072, qk_norm=False,
              qkv_bias=True, shift=True)
SHAPES = {                  # what can be planned without a network
    "GSAI-ML/LLaDA-8B-Base": _LLADA, "GSAI-ML/LLaDA-8B-Instruct": _LLADA, "GSAI-ML/LLaDA-1.5": _LLADA,
    "Dream-org/Dream-v0-Base-7B": _DREAM, "Dream-org/Dream-v0-Instruct-7B": _DREAM,
}


MARGIN = 1e9                # what CUDA's context and the gaps between allocations take


@dataclass
class Plan:
    """Bytes on each of `ranks` processes, but for the first two, which count parameters. Not all of it is alive at once: see `peak`."""
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int      # AdamW's two moments, float32, of what is trained
    activations: int    # the most that passes hold besides: inputs of the blocks, one block at work, the loss
    logits: int         # of one chunk of rows, and its softmax
    gathered: int       # with several ranks: what they put together for a while, the block at work and the next, embedding and head
    peak: int


class Counter(TorchDispatchMode):
    """Follows the bytes of all tensors made under it: `now` and `most` of each kind, and `most_together` of all, gradients / ranks."""

    def __init__(self, vocab_size, ranks):
        super().__init__()
        self.vocab_size, self.ranks, self.alive, self.most_together = vocab_size, ranks, {}, 0
        self.now, self.most = ({"weights": 0, "gradients": 0, "activations": 0, "logits": 0} for _ in range(2))

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.nonzero.default:              # how many there are depends on numbers; none is the usual case
            return arguments[0].new_empty((0, arguments[0].dim()), dtype=torch.int64)
        result = function(*arguments, **keywords or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor, "logits" if tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size else "activations")
        return result

    def count(self, tensor, kind, move=False):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive and not move:
            return                                                  # a view
        if key in self.alive:
            self.now[self.alive[key]] -= size
        else:
            weakref.finalize(storage, self.free, key, size)
        self.alive[key] = kind
        self.now[kind] += size
        self.most[kind] = max(self.most[kind], self.now[kind])
        self.most_together = max(self.most_together, self.now["activations"] + self.now["logits"] + self.now["gradients"] / self.ranks)

    def free(self, key, size):
        self.now[self.alive.pop(key)] -= size


def plan_memory(config, seq_len, batch_size, lora_rank, lora_targets="q,k,v,o,gate,up,down", dtype=torch.bfloat16, checkpoint_blocks=True, ranks=1):
    """The Plan of one training step of batch_size sequences of seq_len tokens on each rank, every token masked: the worst case.

    lora_rank 0 trains everything: weights are float32 then and products in `dtype`; else the base is stored in `dtype`. With
    several ranks everything is sharded (sharding.py).
    """
    with torch.device("meta"):
        model = Transformer(config)
        if lora_rank:
            add_lora(model.to(dtype), lora_rank, 1.0, 0.0, lora_targets)
    model.checkpoint_blocks, rows = checkpoint_blocks, batch_size * seq_len
    trained = [p for p in model.parameters() if p.requires_grad]
    autocast = contextlib.nullcontext() if lora_rank or dtype == torch.float32 else torch.autocast("cpu", dtype, cache_enabled=False)
    if ranks > 1 and not lora_rank:                                 # gathered weights are in dtype
        model, autocast = model.to(dtype), contextlib.nullcontext()
    with FakeTensorMode(), Counter(config.vocab_size, ranks) as counter:
        for name, parameter in list(model.named_parameters()):
            put_rows(model, name, torch.empty(parameter.shape, dtype=parameter.dtype))
        if config.tie_embeddings:
            model.head.weight = model.embed.weight
        for parameter in model.parameters():
            counter.count(parameter, "weights", move=True)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: counter.count(p.grad, "gradients", move=True))
        counter.most_together = counter.most["activations"] = 0
        tokens, select = torch.zeros(batch_size, seq_len, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        with autocast:
            loss, _ = model(tokens, select=select, targets=select, weights=torch.zeros(rows))
        loss.backward()
    size = lambda parameters, bytes_each: sum(p.numel() for p in parameters) * bytes_each       # noqa: E731
    weights = sum(p.numel() * (4 if p.requires_grad else p.element_size()) for p in model.parameters()) // ranks
    gradients, optimizer, gathered = size(trained, 4) // ranks, size(trained, 8) // ranks, 0
    if ranks > 1:
        block, outer = model.blocks[0], [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
        largest = max((outer, list(block.parameters())), key=lambda group: size([p for p in group if p.requires_grad], 1))
        gathered = size(outer, dtype.itemsize) + 2 * size(block.parameters(), dtype.itemsize)
        gathered += size([p for p in largest if p.requires_grad], dtype.itemsize + 4)           # gradients on their way to their rank
    together = int(counter.most_together)
    return Plan(sum(p.numel() for p in model.parameters()), size(trained, 1), weights, gradients, optimizer, counter.most["activations"],
                counter.most["logits"], gathered, weights + optimizer + gathered + max(together, gradients))


def report(settings):
    """finetune_llada.py's settings -> the Plan as a table, and whether it fits the GPU."""
    start, dtype, lora_rank = settings["init_from"], torch.float32 if settings["dtype"] == "float32" else torch.bfloat16, settings["lora_rank"]
    ranks = (settings["ranks"] or rank_and_size()[1]) if settings["fsdp"] else 1
    memory_gb = settings["memory_gb"] or (torch.cuda.mem_get_info()[1] / 1e9 if torch.cuda.is_available() else 24.0)
    config = find_config(start, settings)
    seq_len = min(settings["seq_len"], config.max_len)
    plan = plan_memory(config, seq_len, settings["batch_size"], lora_rank, settings["lora_targets"], dtype,
                       settings["checkpointing"], ranks)
    lines = [f"{start}: {f'LoRA of rank {lora_rank}' if lora_rank else 'full fine-tuning'}, {settings['batch_size']} x {seq_len} tokens a "
             f"process, {ranks} process{'es' * (ranks > 1)}, checkpointing {'on' if settings['checkpointing'] else 'off'}",
             f"  parameters    {plan.parameters:,}", f"  of them learn {plan.trained:,}", "  on each process, in GB (10^9 bytes):"]
    for name, note in (("weights", "frozen ones as they are, what learns in float32"), ("gradients", "float32"), ("optimizer", "AdamW's two moments, float32"),
                       ("activations", "inputs of the blocks, one block at work, the loss"), ("logits", "of one chunk of rows"),
                       ("gathered", "weights and gradients of the block at work, of embedding and head"), ("peak", "not all of it is alive at once")):
        if name != "gathered" or ranks > 1:
            lines.append(f"  {name:12}{getattr(plan, name) / 1e9:9.3f}   {note}")
    spare = memory_gb - (plan.peak + MARGIN) / 1e9
    return "\n".join([*lines, f"fits into {memory_gb:g} GB: " + (
        f"yes, {spare:.1f} GB to spare" if spare >= 0 else
        f"no, {-spare:.1f} GB are missing: take more processes, a smaller batch, shorter sequences, checkpointing or LoRA") + " (1 GB left to CUDA itself)"])


def find_config(start, settings):
    """The Config of init_from, without its weights."""
    name, _, family = start.partition(":")
    if name == "tiny":
        config = tiny_config(family or "llada", Tokenizer.bytes(), settings["seq_len"])
        config.vocab_size = settings["vocab_size"]
        return config
    if start in SHAPES and not Path(start).is_dir():
        return Config(**SHAPES[start])
    return read_config(find_checkpoint(start, weights=False))[0]
