"""bench.py's measurements of the model: a forward pass and its logits beside those of transformers,
and what loading takes."""
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from experiments.timing import in_own_process, interleaved, memory
from model import Config, Transformer

V, D, T, LAYERS, HEADS = 8192, 512, 512, 8, 8
_LLAMA = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
              intermediate_size=1376)
_BERT = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
             intermediate_size=4 * D)
_MODERNBERT = dict(_BERT, intermediate_size=768, reference_compile=False, pad_token_id=0,
                   bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
REFERENCES = {      # our family: (the family of transformers with the same weights, its config)
    "llada": ("llama", dict(_LLAMA, num_key_value_heads=8)),
    "Dream": ("qwen2", dict(_LLAMA, num_key_value_heads=2)),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", dict(_BERT, max_position_embeddings=T + 2)),
    "modernbert": ("modernbert", _MODERNBERT),
    "gpt2": ("gpt2", dict(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=T)),
    "llama": ("llama", dict(_LLAMA, num_key_value_heads=2)),
    "qwen2": ("qwen2", dict(_LLAMA, num_key_value_heads=2)),
    "qwen3": ("qwen3", dict(_LLAMA, num_key_value_heads=2, head_dim=64)),
}


def random_reference(family):
    """A random model of transformers that stands for our `family`: sdpa attention, float32, in
    evaluation mode; LLaDA's and Dream's sees to both sides."""
    import transformers
    their_family, settings = REFERENCES[family]
    config = transformers.AutoConfig.for_model(
        their_family, attn_implementation="sdpa", **settings)
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM
    if "bert" in family:
        kind = transformers.AutoModelForMaskedLM
    model = kind.from_config(config).eval()
    if is_opened(family):
        open_attention(model)
    return model


def is_opened(family):
    """Whether our family is one of transformers' autoregressive ones that looks to both sides."""
    return family in ("llada", "Dream")


def open_attention(reference):
    """Everyone sees everyone, without a mask: the reference at its fastest."""
    for module in reference.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def ours_of(reference, family):
    """Our Transformer with the reference's weights."""
    causal = False if is_opened(family) else None
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return Transformer.from_pretrained(folder, causal=causal)


@torch.inference_mode()
def forward(*families):
    """A forward pass against transformers (sdpa), same weights: T 512, D 512, 8 layers, float32,
    batch 1 and 8; `forward qwen3 bert` for some families."""
    print("family       batch   transformers        ours   ratio of wall clocks, of CPU times "
          "(above 1: ours is faster)")
    for family in families or REFERENCES:
        reference = random_reference(family)
        ours = ours_of(reference, family)
        for batch_size in (1, 8):
            theirs, mine = forward_times(reference, ours, family, batch_size)
            print(f"{family:12} {batch_size:5}   {theirs.wall * 1e3:9.1f} ms "
                  f"{mine.wall * 1e3:8.1f} ms   {theirs.wall / mine.wall:5.3f}  "
                  f"{theirs.cpu / mine.cpu:5.3f}", flush=True)


def forward_times(reference, ours, family, batch_size):
    """(Timing of transformers, of ours) for a batch; the logits are compared first."""
    tokens = torch.randint(8, V, (batch_size, T), generator=torch.Generator().manual_seed(0))
    how = {"attention_mask": torch.ones_like(tokens)}   # of ones: only so an opened model is open
    if "bert" not in family:
        how["use_cache"] = False

    def run_theirs():
        return reference(tokens, **how).logits

    def run_ours():
        return ours(tokens)

    expected = run_theirs()
    assert (expected - run_ours()).abs().max() < 2e-4 * expected.abs().max(), family
    rounds = 21 if batch_size == 1 else 7
    times = interleaved({"theirs": run_theirs, "ours": run_ours}, rounds)
    return times["theirs"], times["ours"]


@torch.inference_mode()
def parity():
    """The largest difference of logits from the reference's, relative to the largest logit:
    float32 and bfloat16."""
    print("family       float32    bfloat16: ours - theirs, ours - float32, theirs - float32 "
          "(root mean square / largest)")
    tokens = torch.randint(8, V, (2, T), generator=torch.Generator().manual_seed(0))
    for family in REFERENCES:
        reference = random_reference(family)
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
        exact = reference(tokens).logits
        mine = ours_of(reference, family)(tokens)
        reference.bfloat16()
        rounded = reference(tokens).logits.float()
        mine_rounded = ours_of(reference, family)(tokens).float()
        largest = exact.abs().max()
        figures = []
        for difference in (mine_rounded - rounded, mine_rounded - exact, rounded - exact):
            figures.append(f"{difference.square().mean().sqrt() / largest:.1e}")
        print(f"{family:12} {(mine - exact).abs().max() / largest:.1e}   {'   '.join(figures)}",
              flush=True)


def load():
    """Peak memory of from_pretrained on a checkpoint of a gigabyte (as loaded): at most 1.15 times
    the weights and 300 MB."""
    cases = [("single", "float32", "float32"), ("single", "bfloat16", "float32"),
             ("single", "bfloat16", "bfloat16"), ("sharded", "float32", "float32"),
             ("sharded", "bfloat16", "float32"), ("tied", "float32", "float32")]
    print("layout     stored     loaded      weights       peak   peak / weights")
    for layout, stored, loaded in cases:
        size, peak = loading_memory(layout, stored, loaded, megabytes=1000)
        print(f"{layout:10} {stored:10} {loaded:10} {size / 1e6:6.0f} MB  {peak / 1e6:6.0f} MB   "
              f"{peak / size:6.3f}", flush=True)
        assert peak < 1.15 * size + 300e6


def loading_memory(layout, stored, loaded, megabytes):
    """(bytes of the weights as loaded, peak bytes of loading them above what the imports took), in
    a process of its own. Mapped pages of files count."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(folder, layout, stored, loaded, megabytes)
        return size, in_own_process(peaks_of_loading, [(folder, loaded)])[0]


def write_checkpoint(folder, layout, stored, loaded, megabytes):
    """Bytes of its weights as loaded, about `megabytes` of them.

    layout: "single" file, "sharded" into four, or "tied" (one file; head and embedding are one
    matrix). stored, loaded: names of dtypes.
    """
    size = getattr(torch, loaded).itemsize
    tied = layout == "tied"
    # 12 D^2 a layer; V = 50 D, in and out
    dim = round((megabytes * 1e6 / size / (8 * 12 + 100)) ** 0.5 / 64) * 64
    config = Config(vocab_size=(100 if tied else 50) * dim, dim=dim, n_layers=8,
                    n_heads=dim // 64, hidden_dim=8 * dim // 3, tie_embeddings=tied)
    with torch.no_grad():
        model = Transformer(config).init_weights().to(getattr(torch, stored))
        model.save_pretrained(folder)
    if layout == "sharded":
        cut_into_shards(folder, model.state_dict(), shards=4)
    return sum(parameter.numel() for parameter in model.parameters()) * size


def cut_into_shards(folder, weights, shards):
    """Several files and their index in place of model.safetensors, as large models have them."""
    os.remove(Path(folder, "model.safetensors"))
    files = {}                                          # name of a file -> its tensors
    places = {}                                         # name of a tensor -> its file
    for i, (name, tensor) in enumerate(weights.items()):
        file = f"model-0000{1 + i * shards // len(weights)}-of-0000{shards}.safetensors"
        files.setdefault(file, {})[name] = tensor
        places[name] = file
    for file, tensors in files.items():
        save_file(tensors, Path(folder, file))
    index = json.dumps({"weight_map": places})
    Path(folder, "model.safetensors.index.json").write_text(index)


def peaks_of_loading(checkpoints):
    """What `loading_memory` measures of each (folder, name of a dtype), in this process: bytes
    above what it had; the model is still there when they are read."""
    peaks = []
    for folder, dtype in checkpoints:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")       # the high-water mark starts here
        model = Transformer.from_pretrained(folder, dtype=getattr(torch, dtype))
        peaks.append(memory("VmHWM") - before)
        del model
    return peaks
