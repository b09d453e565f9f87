"""How much memory fine-tuning takes, known before any weight is read.

The forward and backward pass runs on tensors that have shapes but no memory (torch's
FakeTensorMode), and a counter follows every allocation from its birth to its end. So the figures
are those of the code itself; what several processes share is then divided. RMSNorm is counted as it
runs on a CPU, by hand; where a GPU has no fused kernel for it, it keeps float32 copies besides
(LLaDA-8B, T 1024, without checkpointing: 0.6 GB).
"""
import contextlib
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import matrix_dtype, rank_and_size
from data.tokenizer import Tokenizer
from model import Config, Transformer
from pretrained.config import read_config
from pretrained.hub import find_checkpoint
from pretrained.tensors import put_rows
from pretrained.tiny import tiny_config
from training.finetuning import check_kind, check_replicas
from training.lora import add_lora
from training.nf4 import is_packed, packed_bytes

LLADA = dict(family="llada", vocab_size=126464, dim=4096, n_layers=32, n_heads=32,
             hidden_dim=12288, max_len=4096, qk_norm=False)
LLADA_MOE = dict(family="lladamoe", vocab_size=157184, dim=2048, n_layers=16, n_heads=16,
                 max_len=8192, n_experts=64, experts_per_token=8, expert_dim=1024)
LLADA2_MINI = dict(family="llada2", vocab_size=157184, dim=2048, n_layers=20, n_heads=16,
                   n_kv_heads=4, hidden_dim=5120, max_len=32768, n_experts=256, experts_per_token=8,
                   expert_dim=512, shared_dim=512, dense_layers=[0], router="sigmoid",
                   router_bias="choice", router_groups=8, router_top_groups=4, router_norm=True,
                   router_scale=2.5, rope_share=0.5, block_length=32, blocks_from_start=True)
DREAM = dict(family="Dream", vocab_size=152064, dim=3584, n_layers=28, n_heads=28, n_kv_heads=4,
             hidden_dim=18944, max_len=131072, qk_norm=False, qkv_bias=True, shift=True)
SHAPES = {                  # what can be planned without a network
    "GSAI-ML/LLaDA-8B-Base": LLADA,
    "GSAI-ML/LLaDA-8B-Instruct": LLADA,
    "GSAI-ML/LLaDA-1.5": LLADA,
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": LLADA_MOE,
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": LLADA_MOE,
    "inclusionAI/LLaDA2.0-mini": LLADA2_MINI,
    "inclusionAI/LLaDA2.1-mini": LLADA2_MINI,
    "Dream-org/Dream-v0-Base-7B": DREAM,
    "Dream-org/Dream-v0-Instruct-7B": DREAM,
}
MARGIN = 1e9                # bytes: CUDA's context and the gaps between allocations


@dataclass
class Plan:
    """Bytes on each process, but for the first two, which count parameters. Not all of it is alive
    at once: see `peak`."""
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int          # AdamW's two moments, float32, of what is trained
    activations: int        # inputs of the blocks, one block at work, the loss
    logits: int             # of one chunk of rows, and its softmax
    gathered: int         # with several processes: what they put together for a while, the block at
    #                         work and the next, embedding and head
    peak: int


class Counter(TorchDispatchMode):
    """Follows the bytes of all tensors made under it: `now` and `most` of each kind, and of all
    that a backward pass holds together, `most_together` (gradients are divided by `ranks`)."""

    def __init__(self, vocab_size, ranks):
        super().__init__()
        self.vocab_size, self.ranks = vocab_size, ranks
        self.alive, self.most_together = {}, 0          # storage -> its kind
        self.now = {"weights": 0, "gradients": 0, "activations": 0, "logits": 0}
        self.most = dict(self.now)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.nonzero.default:
            # How many there are depends on numbers; none is the usual case.
            return arguments[0].new_empty((0, arguments[0].dim()), dtype=torch.int64)
        result = function(*arguments, **keywords or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                of_vocabulary = tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
                self.count(tensor, "logits" if of_vocabulary else "activations")
        return result

    def count(self, tensor, kind, move=False):
        """A tensor was made; with `move`, it is of another kind than was thought."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive and not move:
            return                                      # a view
        if key in self.alive:
            self.now[self.alive[key]] -= size
        else:
            weakref.finalize(storage, self.free, key, size)
        self.alive[key] = kind
        self.now[kind] += size
        self.most[kind] = max(self.most[kind], self.now[kind])
        together = self.now["activations"] + self.now["logits"] + self.now["gradients"] / self.ranks
        self.most_together = max(self.most_together, together)

    def free(self, key, size):
        self.now[self.alive.pop(key)] -= size


def plan_memory(config, seq_len, batch_size, lora_rank, lora_targets="q,k,v,o,gate,up,down",
                dtype=torch.bfloat16, checkpoint_blocks=True, ranks=1, base_bits=16):
    """The Plan of one training step of batch_size sequences of seq_len tokens on each process,
    every token masked: the worst case. A model that writes in blocks reads each of them four times,
    twice noisy and twice clean (`diffusion.llada2_loss`).

    lora_rank 0 trains everything: weights are float32 then and products in `dtype`; else the base
    is stored in `dtype`, or its blocks' matrices in 4 bits (base_bits 4; nf4.py), one of which is
    unpacked at a time. With several processes everything is sharded (sharding.py), but 4-bit bases
    are not.
    """
    with torch.device("meta"):
        model = Transformer(config)
        if lora_rank:
            add_lora(model.to(dtype), lora_rank, 1.0, 0.0, lora_targets)
    model.checkpoint_blocks = checkpoint_blocks
    autocast = contextlib.nullcontext()
    if ranks > 1 and not lora_rank:
        model = model.to(dtype)                         # gathered weights are in dtype
    elif not lora_rank and dtype != torch.float32:
        autocast = torch.autocast("cpu", dtype, cache_enabled=False)
    counter = run_step(model, seq_len, batch_size, autocast, ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients, optimizer = elements(trained) * 4 // ranks, elements(trained) * 8 // ranks
    weights, unpacked = 0, 0
    for name, p in model.named_parameters():
        if base_bits == 4 and is_packed(name):
            weights += packed_bytes(p.numel())
            unpacked = max(unpacked, p.numel() * p.element_size())
        else:
            weights += p.numel() * (4 if p.requires_grad else p.element_size())
    weights //= ranks
    gathered = gathered_bytes(model, dtype) if ranks > 1 else 0
    together = max(int(counter.most_together) + unpacked, gradients)
    peak = weights + optimizer + gathered + together
    return Plan(elements(model.parameters()), elements(trained), weights, gradients, optimizer,
                counter.most["activations"], counter.most["logits"], gathered, peak)


def elements(parameters):
    return sum(p.numel() for p in parameters)


def run_step(model, seq_len, batch_size, autocast, ranks):
    """The Counter of a forward and backward pass without memory."""
    config, rows = model.config, batch_size * seq_len
    with FakeTensorMode(), Counter(config.vocab_size, ranks) as counter:
        for name, parameter in list(model.named_parameters()):
            put_rows(model, name, torch.empty(parameter.shape, dtype=parameter.dtype))
        if config.tie_embeddings:
            model.head.weight = model.embed.weight
        for parameter in model.parameters():
            counter.count(parameter, "weights", move=True)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: counter.count(p.grad, "gradients", move=True))
        counter.most_together = counter.most["activations"] = 0
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        if config.block_length and not config.causal:
            tokens = tokens.repeat(2, 2)
        select = torch.zeros(rows, dtype=torch.int64)
        with autocast:
            loss, _ = model.weighted_nll(tokens, select, select, torch.zeros(rows))
        loss.backward()
    return counter


def gathered_bytes(model, dtype):
    """What FSDP2 puts together for a while: embedding, head and last norm, two blocks, and the
    gradients of the largest group on their way to their process."""
    block = list(max(model.blocks, key=lambda block: elements(block.parameters())).parameters())
    outer = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    on_their_way = 0
    for group in (block, outer):
        on_their_way = max(on_their_way, elements(p for p in group if p.requires_grad))
    weights = (elements(outer) + 2 * elements(block)) * dtype.itemsize
    return weights + on_their_way * (dtype.itemsize + 4)


NOTES = {
    "weights": "frozen ones as they are, what learns in float32",
    "gradients": "float32",
    "optimizer": "AdamW's two moments, float32",
    "activations": "inputs of the blocks, one block at work, the loss",
    "logits": "of one chunk of rows",
    "gathered": "weights and gradients of the block at work, of embedding and head",
    "peak": "not all of it is alive at once",
}


def report(settings):
    """finetune_llada.py's settings -> the Plan as a table, and whether it fits the GPU."""
    s, name = settings, settings["init_from"]
    config, dtype = find_config(name, s), planned_dtype(s["dtype"])
    world_size = s["ranks"] or rank_and_size()[1]
    check_replicas(s["replicas"], world_size)
    ranks = world_size // s["replicas"]
    if s["base_bits"] == 4 or not s["fsdp"]:
        ranks = 1                       # each process has all of it
    seq_len = min(s["seq_len"], config.max_len)
    plan = plan_memory(config, seq_len, s["batch_size"], s["lora_rank"], s["lora_targets"], dtype,
                       s["checkpointing"], ranks, s["base_bits"])
    kind = f"LoRA of rank {s['lora_rank']}" if s["lora_rank"] else "full fine-tuning"
    if s["base_bits"] == 4:
        kind += " on a 4-bit base"
    processes = "1 process" if ranks == 1 else f"{ranks} processes"
    checkpointing = "on" if s["checkpointing"] else "off"
    lines = [f"{name}: {kind}, {s['batch_size']} x {seq_len} tokens a process, {processes}, "
             f"checkpointing {checkpointing}",
             f"  parameters    {plan.parameters:,}", f"  of them learn {plan.trained:,}",
             "  on each process, in GB (10^9 bytes):"]
    for part, note in NOTES.items():
        if part != "gathered" or ranks > 1:
            lines.append(f"  {part:12}{getattr(plan, part) / 1e9:9.3f}   {note}")
    return "\n".join([*lines, verdict(plan, s["memory_gb"])])


def report_of_rewards(settings):
    """The same for train_grpo.py: the passes that learn take the most, and beside them stand the
    logits of the answers (with their softmax and gradient, float32) and a frozen reference."""
    s = settings
    views = {"diffu": 1, "coupled": 3, "bound": s["bound_samples"]}
    views["trace"] = -(-(s["steps"] or s["max_new_tokens"]) // s["trace_together"])
    sequences = max(s["batch_size"], views[s["estimator"]])
    name, config = s["init_from"], find_config(s["init_from"], s | {"vocab_size": 260})
    dtype = planned_dtype(s["dtype"])
    seq_len = min(s["seq_len"], config.max_len)
    plan = plan_memory(config, seq_len, sequences, s["lora_rank"], s["lora_targets"], dtype,
                       s["checkpointing"])
    answer = min(s["max_new_tokens"], seq_len)
    logits = 3 * 4 * sequences * answer * config.vocab_size
    frozen = 4 * plan.parameters if s["beta"] and not s["lora_rank"] else 0
    kind = f"LoRA of rank {s['lora_rank']}" if s["lora_rank"] else "all weights"
    lines = [f"{name}: {kind}, {sequences} x {seq_len} tokens a pass, "
             f"{views[s['estimator']]} views an answer ({s['estimator']})",
             "  in GB (10^9 bytes):"]
    parts = {part: getattr(plan, part) for part in NOTES if part not in ("gathered", "peak")}
    parts["logits"] = logits
    notes = NOTES | {"logits": f"of {answer} tokens of each answer", "reference": "a frozen copy"}
    for part, size in {**parts, "reference": frozen}.items():
        lines.append(f"  {part:12}{size / 1e9:9.3f}   {notes[part]}")
    plan.peak += logits + frozen
    return "\n".join([*lines, f"  {'peak':12}{plan.peak / 1e9:9.3f}   {NOTES['peak']}",
                      verdict(plan, s["memory_gb"])])


def planned_dtype(name):
    """torch.float32 or torch.bfloat16 for a recipe's dtype; "auto" is bfloat16, for the plan is for
    a GPU, whatever this machine is. Raises ValueError."""
    if name == "auto":
        return torch.bfloat16
    return matrix_dtype("cpu", name)


def verdict(plan, memory_gb):
    """Whether it fits into memory_gb; 0: of the GPU here, else 24."""
    if not memory_gb:
        memory_gb = 24.0
        if torch.cuda.is_available():
            memory_gb = torch.cuda.mem_get_info()[1] / 1e9
    spare = memory_gb - (plan.peak + MARGIN) / 1e9
    answer = f"yes, {spare:.1f} GB to spare"
    if spare < 0:
        answer = (f"no, {-spare:.1f} GB are missing: take more processes, a smaller batch, shorter "
                  "sequences, checkpointing or LoRA")
    return f"fits into {memory_gb:g} GB: {answer} (1 GB left to CUDA itself)"


def find_config(name, settings):
    """The Config of init_from, without its weights. ValueError if it does not fill masks."""
    kind, _, family = name.partition(":")
    if kind == "tiny":
        config = tiny_config(family or "llada", Tokenizer.bytes(), settings["seq_len"])
        config.vocab_size = settings["vocab_size"]
    elif name in SHAPES and not Path(name).is_dir():
        config = Config(**SHAPES[name])
    else:
        config = read_config(find_checkpoint(name, weights=False))[0]
    check_kind(config, name)
    return config
