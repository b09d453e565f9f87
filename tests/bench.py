"""The measurements that README quotes: `python tests/bench.py NAME`, or without a name for the list.

Candidates are compared in one run, in turns, so that whatever else the machine does hits all of them alike.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# glibc gives large freed blocks back to the system and asks for them anew at the next step. Whether it does is luck, hits either
# candidate and can cost more than all that is compared (the same silu took 19 or 398 ms). So it is told to keep what it has; it
# reads that when a process starts, hence the second start.
KEEP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "200000000"}
if __name__ == "__main__" and "MALLOC_TRIM_THRESHOLD_" not in os.environ and sys.argv[1:2] != ["load"]:
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)

import torch  # noqa: E402

from model import Config, Transformer  # noqa: E402

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))     # of the machine's cores
COMMANDS = {}


def command(function):
    """`python tests/bench.py <the function's name>` runs it."""
    COMMANDS[function.__name__] = function
    return function


def machine():
    """What the figures below it were measured on, in a line."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")] or [platform.processor()]
    return (f"{names[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"load {os.getloadavg()[0]:.1f}")


class Timing(typing.NamedTuple):
    median: float       # seconds
    fastest: float      # what other work on the machine disturbs least


def interleaved(functions, rounds=9, warmup=2):
    """{name: Timing}: every function once a round, in an order that turns round each time, after `warmup` rounds."""
    seconds = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name in list(functions) if number % 2 else reversed(functions):
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(values[warmup:]), min(values[warmup:])) for name, values in seconds.items()}


def random_reference(family, **config):
    """A random model of transformers with sdpa attention, float32, in evaluation mode."""
    import transformers
    config = transformers.AutoConfig.for_model(family, attn_implementation="sdpa", **config)
    torch.manual_seed(0)
    if family in ("bert", "roberta", "modernbert"):
        return transformers.AutoModelForMaskedLM.from_config(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def open_attention(reference, opened=True):
    """Everyone sees everyone, without a mask: the reference at its fastest. (Only an attention mask of ones tells it that.)"""
    for module in reference.modules() if opened else []:
        if hasattr(module, "is_causal"):
            module.is_causal = False


def ours_of(reference, **options):
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return Transformer.from_pretrained(folder, **options)


# -------------------------------------------------------------------------------------------------------------------------------

V, D, T, LAYERS, HEADS = 8192, 512, 512, 8, 8
_LLAMA = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=1376)
_BERT = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * D)
REFERENCES = {      # our family: (the family of transformers with the same weights, its config)
    "llada": ("llama", dict(_LLAMA, num_key_value_heads=8)),
    "Dream": ("qwen2", dict(_LLAMA, num_key_value_heads=2)),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", dict(_BERT, max_position_embeddings=T + 2)),
    "modernbert": ("modernbert", dict(_BERT, intermediate_size=768, reference_compile=False, pad_token_id=0, bos_token_id=1,
                                      eos_token_id=2,
                                      cls_token_id=1, sep_token_id=2)),
    "gpt2": ("gpt2", dict(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=T)),
    "llama": ("llama", dict(_LLAMA, num_key_value_heads=2)),
    "qwen2": ("qwen2", dict(_LLAMA, num_key_value_heads=2)),
    "qwen3": ("qwen3", dict(_LLAMA, num_key_value_heads=2, head_dim=64)),
}


@command
@torch.inference_mode()
def forward():
    """A forward pass against transformers (sdpa), same weights: T 512, D 512, 8 layers, float32, batch 1 and 8."""
    print("family       batch   transformers        ours   ratio of medians, of the fastest rounds (above 1: ours is faster)")
    for family in [name for name in REFERENCES if not sys.argv[2:] or name in sys.argv[2:]]:
        reference = random_reference(REFERENCES[family][0], **REFERENCES[family][1])
        opened = family in ("llada", "Dream")
        ours = ours_of(reference, causal=False if opened else None)
        open_attention(reference, opened)
        for batch_size in (1, 8):
            tokens = torch.randint(8, V, (batch_size, T), generator=torch.Generator().manual_seed(0))
            keywords = {"attention_mask": torch.ones_like(tokens)} | ({} if "bert" in family else {"use_cache": False})
            functions = {"theirs": lambda: reference(tokens, **keywords).logits, "ours": lambda: ours(tokens)}      # noqa: B023
            a, b = functions["theirs"](), functions["ours"]()
            assert (a - b).abs().max() < 2e-4 * a.abs().max(), family
            times = interleaved(functions, rounds=15 if batch_size == 1 else 5)
            (theirs, their_best), (mine, my_best) = times["theirs"], times["ours"]
            print(f"{family:12} {batch_size:5}   {theirs * 1e3:9.1f} ms {mine * 1e3:8.1f} ms   "
                  f"{theirs / mine:5.3f}  {their_best / my_best:5.3f}",
                  flush=True)


def loading_memory(layout, stored, loaded, megabytes):
    """(bytes of the weights as loaded, peak bytes of loading them above what the imports took), in a process of its own.

    layout: "single" file, "sharded" into four, or "tied" (one file, head and embedding one matrix). Mapped pages of files count.
    """
    from safetensors.torch import save_file
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    tied, layers = layout == "tied", 8
    dim = round((megabytes * 1e6 / size[loaded] / (8 * 12 + 100)) ** 0.5 / 64) * 64        # 12 D^2 a layer, V = 50 D, in and out
    config = Config(vocab_size=(100 if tied else 50) * dim, dim=dim, n_layers=layers, n_heads=dim // 64, hidden_dim=8 * dim // 3,
                    tie_embeddings=tied)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = Transformer(config).init_weights().to(getattr(torch, stored))
        model.save_pretrained(folder)
        count = sum(parameter.numel() for parameter in model.parameters())
        if layout == "sharded":
            os.remove(f"{folder}/model.safetensors")
            weights = model.state_dict()
            places = {name: f"model-0000{1 + i * 4 // len(weights)}-of-00004.safetensors" for i, name in enumerate(weights)}
            for shard in set(places.values()):
                save_file({name: weights[name] for name in weights if places[name] == shard}, f"{folder}/{shard}")
            Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        del model
        script = f"""
import torch
from model import Transformer
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
model = Transformer.from_pretrained({folder!r}, dtype=torch.{loaded})
print(status("VmHWM") - before)
"""
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return count * size[loaded], int(result.stdout)


@command
def load():
    """Peak memory of from_pretrained on a checkpoint of a gigabyte (as loaded): at most 1.15 times the weights and 300 MB."""
    print("layout     stored     loaded      weights       peak   peak / weights")
    for layout, stored, loaded in (("single", "float32", "float32"), ("single", "bfloat16", "float32"),
                                   ("single", "bfloat16", "bfloat16"),
                                   ("sharded", "float32", "float32"), ("sharded", "bfloat16", "float32"),
                                   ("tied", "float32", "float32")):
        size, peak = loading_memory(layout, stored, loaded, megabytes=1000)
        print(f"{layout:10} {stored:10} {loaded:10} {size / 1e6:6.0f} MB  {peak / 1e6:6.0f} MB   {peak / size:6.3f}", flush=True)
        assert peak < 1.15 * size + 300e6


@command
@torch.inference_mode()
def parity():
    """The largest difference of logits from the reference's, relative to the largest logit: float32 and bfloat16."""
    print("family       float32    bfloat16: ours - theirs, ours - float32, theirs - float32 (root mean square / largest)")
    for family, (name, config) in REFERENCES.items():
        reference = random_reference(name, **config)
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
        opened = family in ("llada", "Dream")
        open_attention(reference, opened)
        tokens = torch.randint(8, V, (2, T), generator=torch.Generator().manual_seed(0))
        exact, mine = reference(tokens).logits, ours_of(reference, causal=False if opened else None)(tokens)
        reference.bfloat16()
        rounded, mine16 = reference(tokens).logits.float(), ours_of(reference, causal=False if opened else None)(tokens).float()
        scale, rms = exact.abs().max(), lambda x: x.square().mean().sqrt()
        figures = [rms(x) / scale for x in (mine16 - rounded, mine16 - exact, rounded - exact)]
        print(f"{family:12} {(mine - exact).abs().max() / scale:.1e}   " + "   ".join(f"{figure:.1e}" for figure in figures),
              flush=True)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        width = max(map(len, COMMANDS))
        sys.exit(print("\n".join(f"python tests/bench.py {name:{width}}  {function.__doc__.splitlines()[0]}" for name,
                                 function in COMMANDS.items()),
                       file=sys.stderr) or 2)
    print(machine())
    COMMANDS[sys.argv[1]]()
