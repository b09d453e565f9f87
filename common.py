"""What every script needs and no lesson lives in: settings, errors, processes and precision, optimizers."""
import ast
import contextlib
import datetime
import difflib
import functools
import hashlib
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# OpenMP's threads wait for each other by spinning. When something else runs on one of the cores that is a disaster: two threads
# got 3,800 tokens/s here, and 10,200 with this limit; on an idle machine it costs nothing. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------------------
# Settings and errors


def override(constants, read=True):
    """Read --name=value from the command line into the caller's constants: `settings = override(globals())`. read=False: as they stand.

    The public int, float, bool and str constants defined above the call are the settings; a constant's type reads the text.
    An unknown name or a wrong type ends the program with status 2 and one line; --help prints every constant and its comment.
    Returns all settings as a dict.
    """
    defaults = {k: v for k, v in constants.items() if type(v) in (int, float, bool, str) and not k.startswith("_")}
    if not read:
        return defaults
    show_errors_in_one_line()
    for argument in sys.argv[1:]:
        name, equals, text = argument.removeprefix("--").partition("=")
        if argument in ("--help", "-h"):
            print(constants.get("__doc__") or "", *_describe(constants["__file__"], defaults), sep="\n")
            sys.exit(0)
        if not argument.startswith("--"):
            raise ValueError(f"expected --name=value, got {argument!r}")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1, 0)
            raise ValueError(f"no setting called {name!r}; did you mean {near[0]!r}? (--help lists all)")
        if not equals and type(defaults[name]) is bool:
            text = "true"                                           # --show alone switches it on
        elif not equals:
            raise ValueError(f"--{name} needs a value: --{name}={defaults[name]!r}")
        constants[name] = _parse(name, text, defaults[name])
    return {name: constants[name] for name in defaults}


def fill_in(constants, settings, column, **sizes):
    """Settings that are 0 or "" take the value in this column of `sizes` (name=(value, value, ...)); max_minutes only without max_steps."""
    for name, values in sizes.items():
        if not settings.get(name) and not (name == "max_minutes" and settings["max_steps"]):
            settings[name] = constants[name] = values[column]


def check(settings, at_least_1="", not_negative="", positive="", **choices):
    """ValueError for the first setting that is out of range; the names in a text, with spaces. choices: name=(what it may be, ...)."""
    for names, limit, wrong in ((at_least_1, "be at least 1", lambda value: value < 1), (not_negative, "not be negative", lambda value: value < 0),
                                (positive, "be positive", lambda value: value <= 0)):
        for name in names.split():
            if wrong(settings.get(name, -1)):                       # a constant edited to None is no setting
                raise ValueError(f"{name} must {limit}, got {settings.get(name)}")
    if settings["seed"] >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {settings['seed']}")
    for name, allowed in choices.items():
        if settings.get(name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {settings.get(name)!r}")


def _parse(name, text, default):
    try:
        if type(default) is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = {bool: "True or False", int: "an int", float: "a float"}[type(default)]
        raise ValueError(f"{name} takes {kind}, got {text!r} (default {default!r})") from None


def _describe(file, defaults):
    """One line a setting: name, default, and the comment that stands behind it in the source."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in defaults:
            name, _, comment = node.targets[0].id, *lines[node.lineno - 1].partition("  # ")[1:]
            yield f"  --{name}={defaults[name]}".ljust(33) + " " + comment.strip()


def show_errors_in_one_line():
    """A user's mistake (ValueError, OSError, a missing package) ends with `error: ...` and status 2, a number that is not finite with status 1.

    Under torchrun a mistake that every process finds is told once. UNMASK_TRACEBACK=1 shows the traceback instead.
    """
    def hook(kind, error, traceback):
        lost = lost_process(error)
        status = 2 if issubclass(kind, (ValueError, OSError, ImportError)) and not lost else 1
        if issubclass(kind, (KeyboardInterrupt, BrokenPipeError)):  # Ctrl-C, or a reader like `head` that has seen enough
            os._exit(130 if kind is KeyboardInterrupt else 0)
        known = issubclass(kind, (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)) or lost
        if os.environ.get("UNMASK_TRACEBACK") or not known:
            return sys.__excepthook__(kind, error, traceback)
        for bar in list(tqdm._instances):
            bar.close()                                             # or the message would stand behind the progress bar
        message = " ".join(str(error).split()) or kind.__name__
        if lost:
            message = (f"process {rank_and_size()[0]} lost another process of this run, which died or stopped answering for {TIMEOUT_S} s: its own "
                       f"message, if it left one, says why; --resume=True goes on from the last checkpoint ({message[:120]})")
        if issubclass(kind, torch.OutOfMemoryError):
            message = f"{message.split('. ')[0]}: take a smaller batch_size or seq_len (finetune_llada.py --plan tells what a step takes)"
        if _first_to_say(message, lost):
            print(f"error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)                                            # an exception hook cannot set the status otherwise

    sys.excepthook = hook


def lost_process(error):
    """Whether an error says that another process is gone."""
    signs = r"gloo|NCCL|Connection (closed|reset)|Broken pipe|recvValue|[Tt]imed out (after|waiting)"
    return dist.is_initialized() and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(signs, str(error)) is not None)


def _first_to_say(message, lost):
    """Whether no other process of the run has said this yet, nor (if `lost`) told why it ends."""
    rank, _ = rank_and_size()
    if not dist.is_initialized():                                   # settings: all processes have the same
        return rank == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=5))
        first = store.add("error " + hashlib.sha256(message.encode()).hexdigest(), 1) == 1 and not (store.add("told", not lost) and lost)
        if rank == 0:
            time.sleep(1)                                           # without torchrun the store ends with process 0: let the others ask
        return first
    except RuntimeError:                                            # process 0 is gone: it has said what it knew
        return lost


# ------------------------------------------------------------------------------------------------------------------------------
# Processes and precision


def rank_and_size():
    """(rank, world size) in torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def init_process(device="auto", threads=0):
    """(device, rank, world size), from torchrun's environment; a single process is the case of world size 1."""
    rank, world_size = rank_and_size()
    if device not in ("auto", "cpu", "mps") and not device.startswith("cuda"):
        raise ValueError(f"device must be auto, cpu, mps or cuda, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {device}, but torch sees no such GPU here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if threads:
        if not 0 < threads <= 1024:
            raise ValueError(f"threads must be between 0 (torch's choice) and 1024, got {threads}")
        torch.set_num_threads(threads)
    if world_size > 1 and not dist.is_initialized():
        # When a process dies the others see a closed connection at once; when one hangs they wait this long for it.
        hook = sys.excepthook
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
        sys.excepthook = hook                                       # torch's own would take away what ours writes
        global patient
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=4))
    return torch.device(device), rank, world_size


TIMEOUT_S = 60
patient = None              # the same processes once more, for work that may take one of them long: preparing data, reading and writing weights


def barrier():
    """Wait until all processes are here, however long one of them works."""
    if dist.is_initialized():
        dist.barrier(group=patient)


def end_process():
    """Leave the other processes when all are done."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def gather(thing):
    """Every process's `thing`, anything that can be pickled, as a list on all of them, however long one of them works."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing, group=patient)
    return things


def first_on_rank_0(function, *arguments):
    """function(*arguments), which makes something once and then finds it: on rank 0, and then on the others."""
    if rank_and_size()[0] == 0:
        function(*arguments)
    barrier()
    return function(*arguments)


def share(function, work):
    """list(map(function, work)), every process doing each n-th item of it: what `map=` of diffusion's likelihoods takes."""
    work, (rank, size) = list(work), rank_and_size() if dist.is_initialized() else (0, 1)
    mine = [function(item) for item in tqdm(work[rank::size], disable=bool(rank) or None, delay=2, unit="pass", leave=False)]
    results = [None] * len(work)
    for other, part in enumerate(gather(mine)):
        results[other::size] = part
    return results


def matrix_dtype(device, dtype):
    """torch.float32 or torch.bfloat16 for the setting "float32", "bfloat16", or "auto": bfloat16 where the device is faster with it."""
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if fast else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    return getattr(torch, dtype)


def weights_dtype(device, dtype):
    """What a checkpoint's weights are read as, for the same settings; "auto": as they are stored (None), but where a CPU has no instructions
    for bfloat16, and is ten times slower with it, float32."""
    as_stored = dtype == "auto" and (device.type != "cpu" or matrix_dtype(device, dtype) == torch.bfloat16)
    return None if as_stored else matrix_dtype(device, dtype)


def autocast(device, dtype):
    """The context in which the forward pass runs, for the setting `dtype` (see matrix_dtype)."""
    return torch.autocast(device.type, torch.bfloat16) if matrix_dtype(device, dtype) == torch.bfloat16 else contextlib.nullcontext()


def is_on(setting, auto):
    """A setting that is "auto", "True" or "False", as a bool."""
    values = {"auto": auto, "true": True, "false": False}
    if str(setting).lower() not in values:
        raise ValueError(f"expected auto, True or False, got {setting!r}")
    return values[str(setting).lower()]


def sum_over_ranks(values):
    """A tensor of numbers, summed over all ranks, as a list."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def mean_over_ranks(value, device):
    """The mean of a number over all ranks."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), device=device, dtype=torch.float32)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def from_rank_0(value, device):
    """Rank 0's number, on every rank: what depends on the clock must be the same everywhere."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value), device=device, dtype=torch.float32)
    dist.broadcast(shared, 0)
    return shared.item()


# --------------------------------------------------------------------------------------------------
# Random numbers


def seed_for(name, seed, *numbers):
    """The seed, 63 bits, of the random numbers called `name`; numbers: step, row and the like.

    It is a hash. With sums and products of seed and step two purposes easily get the same numbers,
    or one seed's rows those of another seed, and what should be independent is not.
    """
    words = [name, *(str(int(number)) for number in (seed, *numbers))]
    digest = hashlib.sha256("/".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(name, seed, *numbers):
    """A generator on the CPU for the random numbers called `name`, see seed_for."""
    return torch.Generator().manual_seed(seed_for(name, seed, *numbers))


# ------------------------------------------------------------------------------------------------------------------------------
# Optimizers, learning rate, the end of a run


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: of each matrix's momentum U S V^T only U V^T is applied (Jordan et al. 2024).

    Five steps of a Newton-Schulz iteration, X <- aX + b(XX^T)X + c(XX^T)^2 X, drive the singular values to about 1. Matrices of one shape are
    stacked and go through it together, which takes half the time of one after the other (torch.optim.Muon).
    """

    def __init__(self, matrices, lr=0.02, momentum=0.9, weight_decay=0.0):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(momentum, group["momentum"])                       # Nesterov's look ahead
                    by_shape.setdefault((min(p.shape), max(p.shape)), []).append((p, update.T if p.shape[0] > p.shape[1] else update))
            for parameters, updates in (zip(*pairs) for pairs in by_shape.values()):
                for p, update in zip(parameters, orthogonal(torch.stack(updates))):
                    update = update.T if p.shape[0] > p.shape[1] else update
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrices, steps=5):
    """Roughly U V^T of each of the matrices U S V^T, [N, rows, columns] with rows <= columns, in bfloat16 where that is fast."""
    x = matrices.to(matrix_dtype(matrices.device, "auto"))
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)                                       # singular values at most 1
    for _ in range(steps):
        a = x @ x.mT                                                                        # [N, rows, rows]
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizers(model, kind, learning_rate, muon_lr=0.0, beta2=0.99, weight_decay=0.0):
    """[optimizer, ...] of what learns in a Transformer: Muon for the matrices of its blocks and AdamW for the rest, or (kind "adamw") AdamW for all.

    Only the matrices of the blocks decay.
    """
    matrices = {p for p in model.blocks.parameters() if p.ndim == 2 and p.requires_grad}
    others = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    matrices = [p for p in model.parameters() if p in matrices]     # in the model's order
    adamw = functools.partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0, fused=True)
    if kind == "muon":
        return [Muon(matrices, muon_lr, weight_decay=weight_decay), adamw(others)]
    return [adamw([{"params": matrices, "weight_decay": weight_decay}, {"params": others}])]


def set_learning_rate(optimizers, factor):
    """Every parameter's learning rate: `factor` times the peak that its optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor


def learning_rate_factor(progress, warmup=0.02, decay="linear", decay_from=0.0):
    """What the peak learning rate is multiplied by at `progress` in [0, 1]: up over `warmup`, level, down to 0 from `decay_from` on."""
    if progress >= 1:
        return 0.0
    if progress < warmup:
        return progress / warmup
    left = min(1.0, (1 - progress) / (1 - max(decay_from, warmup)))
    return 0.5 - 0.5 * math.cos(math.pi * left) if decay == "cosine" else left


def check_finite(value, step, folder, what="the loss"):
    """FloatingPointError for a number that is none."""
    if not math.isfinite(value):
        from data.state import has_state  # it builds on this file
        last = f"the last checkpoint is in {folder}" if has_state(folder) else "no checkpoint was written yet"
        raise FloatingPointError(f"{what} is {value} at step {step}: lower the learning rate; {last}")


def stop_signals():
    """A list that is empty until Ctrl-C, or until a machine about to be taken says so: finish the step, save, leave."""
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    return stop
