"""What every script needs and no lesson lives in: settings, errors, processes, precision."""
import ast
import contextlib
import datetime
import difflib
import hashlib
import math
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# OpenMP's threads wait for each other by spinning. Where something else runs on one of the cores
# that costs most of the speed (3,800 tokens/s with two threads here, 10,200 with this limit); on an
# idle machine the limit costs nothing. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Settings


def override(constants, read=True):
    """Read --name=value from the command line into the caller's constants and return all of them as
    a dict: `settings = override(globals())`. read=False: as they stand.

    The public int, float, bool and str constants above the call are the settings; a constant's type
    reads the text. An unknown name or a wrong type ends the program with status 2 and one line;
    --help prints every constant and its comment.
    """
    kinds = (int, float, bool, str)
    defaults = {name: value for name, value in constants.items()
                if type(value) in kinds and not name.startswith("_")}
    if not read:
        return defaults
    show_errors_in_one_line()
    for argument in sys.argv[1:]:
        if argument in ("--help", "-h"):
            print(constants.get("__doc__") or "")
            for line in describe_settings(constants["__file__"], defaults):
                print(line)
            sys.exit(0)
        name, value = parse_setting(argument, defaults)
        constants[name] = value
    return {name: constants[name] for name in defaults}


def parse_setting(argument, defaults):
    """(name, value) of one --name=value. Raises ValueError."""
    if not argument.startswith("--"):
        raise ValueError(f"expected --name=value, got {argument!r}")
    name, equals, text = argument.removeprefix("--").partition("=")
    if name not in defaults:
        near = [longer for longer in defaults if longer.startswith(name)]       # --temp=0.5
        near += difflib.get_close_matches(name, defaults, 1, 0)
        raise ValueError(f"no setting called {name!r}; did you mean {near[0]!r}? (--help lists "
                         "all)")
    default = defaults[name]
    if not equals and type(default) is bool:
        return name, True                               # --show alone switches it on
    if not equals:
        raise ValueError(f"--{name} needs a value: --{name}={default!r}")
    kinds = {bool: "True or False", int: "an int", float: "a float", str: "a text"}
    truths = {"true": True, "1": True, "false": False, "0": False}
    try:
        value = truths[text.lower()] if type(default) is bool else type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} takes {kinds[type(default)]}, got {text!r} (default "
                         f"{default!r})") from None
    return name, value


def given(name, default):
    """The value of --name=... on the command line, a text, or `default`: for constants whose value
    depends on another setting, before `override` reads them all. The device auto is the default,
    which is what this machine has: sizes for a GPU must not follow from it on a CPU."""
    found = default
    for argument in sys.argv[1:]:
        if argument.startswith(f"--{name}="):
            found = argument.partition("=")[2]          # the last one counts
    return default if (name, found) == ("device", "auto") else found


def describe_settings(file, defaults):
    """One line a setting: name, default, and the comment that stands after it in the source."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in defaults:
                comment = lines[node.lineno - 1].partition("  # ")[2].strip()
                yield f"  --{name}={defaults[name]}".ljust(33) + " " + comment


def check(settings, at_least_1=(), not_negative=(), positive=(), shares=(), below_1=(),
          finite=(), **choices):
    """ValueError for the first setting that is out of range, each argument a list of names: shares
    from 0 to 1, those of below_1 from 0 to less, finite not inf. choices: name=(what it may be,
    ...)."""
    for name in at_least_1:
        if not settings[name] >= 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    for name in not_negative:
        if not settings[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {settings[name]}")
    for name in positive:
        if not settings[name] > 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    for name in shares:
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {settings[name]}")
    for name in below_1:
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {settings[name]}")
    for name in finite:
        if not math.isfinite(settings[name]):
            raise ValueError(f"{name} must be finite, got {settings[name]}")
    if not 0 <= settings["seed"] < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {settings['seed']}")
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {settings[name]!r}")


def note_without_effect(where, **has_effect):
    """Say of each setting that was given though has_effect[its name] is false that nothing reads it
    `where`."""
    for name, used in has_effect.items():
        if not used and given(name, None) is not None and os.environ.get("RANK", "0") == "0":
            print(f"note: {name} has no effect with {where}", file=sys.stderr)


def seed_for(name, seed, *numbers):
    """The seed of the random numbers called `name`, 63 bits; numbers: the step, the row and what
    else tells streams apart.

    It is a hash. With sums and products of seed and step two purposes easily get the same numbers,
    and what should be independent is not.
    """
    words = [name, *(str(int(number)) for number in (seed, *numbers))]
    digest = hashlib.sha256("/".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(name, seed, *numbers):
    """A generator with the seed of `seed_for`, on the CPU: every device draws the same numbers."""
    return torch.Generator().manual_seed(seed_for(name, seed, *numbers))


def streams(seed, B):
    """A generator for each of B rows to sample, seeded by (seed, row); seed None: anew each
    time."""
    if seed is None:
        seed = torch.Generator().seed()
    return [stream("sampling", seed, b) for b in range(B)]


# --------------------------------------------------------------------------------------------------
# Errors


def show_errors_in_one_line():
    """A user's mistake (ValueError, OSError, a missing package) ends with `error: ...` and status
    2, a number that is not finite with status 1. UNMASK_TRACEBACK=1 shows the traceback instead.

    Under torchrun a mistake that every process finds is told once.
    """
    sys.excepthook = tell_and_exit


def tell_and_exit(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    if issubclass(kind, BrokenPipeError):               # a reader like `head` that has seen enough
        os._exit(0)
    lost = lost_process(error)
    mistake = issubclass(kind, (ValueError, OSError, ImportError))
    known = mistake or issubclass(kind, (FloatingPointError, torch.OutOfMemoryError)) or lost
    if os.environ.get("UNMASK_TRACEBACK") or not known:
        return sys.__excepthook__(kind, error, traceback)
    for bar in list(tqdm._instances):
        bar.close()                                     # or the message would stand after the bar
    message = " ".join(str(error).split()) or kind.__name__
    if lost:
        message = (f"process {rank_and_size()[0]} lost another process of this run, which died or "
                   f"stopped answering for {TIMEOUT_S} s: its own message, if it left one, says "
                   f"why; --resume=True goes on from the last checkpoint ({message[:120]})")
    if issubclass(kind, torch.OutOfMemoryError):
        message = (f"{message.split('. ')[0]}: take a smaller batch_size or seq_len "
                   "(finetune_llada.py --plan tells what a step takes)")
    if first_to_say(message, lost):
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if mistake and not lost else 1)          # a hook cannot set the status otherwise


def lost_process(error):
    """Whether an error says that another process is gone."""
    signs = (r"gloo|NCCL|Connection (closed|reset)|Broken pipe|recvValue|"
             r"[Tt]imed out (after|waiting)")
    if not dist.is_initialized():
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search(signs, str(error)) is not None


def first_to_say(message, lost):
    """Whether no other process of the run has said this yet, nor (if `lost`) told why it ends."""
    rank, _ = rank_and_size()
    if not dist.is_initialized():                       # settings: all processes have the same
        return rank == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=5))
        key = "error " + hashlib.sha256(message.encode()).hexdigest()
        first = store.add(key, 1) == 1
        somebody_told = store.add("told", int(not lost)) > 0
        if rank == 0:
            time.sleep(1)       # without torchrun the store ends with process 0: let the others ask
        return first and not (lost and somebody_told)
    except RuntimeError:                               # process 0 is gone: it has said what it knew
        return lost


def write_atomically(path, write):
    """write(temporary name), flush to disk, rename: a kill at any moment leaves the old file or the
    new one, never half of one. Raises OSError, with the old file untouched, where there is no
    space."""
    temporary = f"{path}.tmp"
    try:
        open(temporary, "wb").close()
        mode = os.stat(temporary).st_mode
        write(temporary)
        os.chmod(temporary, mode)                    # safetensors makes files that only we can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:     # a full disk: OSError to Python, else RuntimeError
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}): free some space or choose another folder; "
                      "what stood there is untouched") from None


# --------------------------------------------------------------------------------------------------
# Processes

TIMEOUT_S = 60
# The same processes once more, for work that may take one of them long: preparing data, reading and
# writing weights.
patient = None


def rank_and_size():
    """(rank, world size) in torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def init_process(device="auto", threads=0):
    """(device, rank, world size), from torchrun's environment; a single process is the case of
    world size 1."""
    rank, world_size = rank_and_size()
    device = choose_device(device)
    if not 0 <= threads <= 1024:
        raise ValueError(f"threads must be between 0 (torch's choice) and 1024, got {threads}")
    if threads:
        torch.set_num_threads(threads)
    if world_size > 1 and not dist.is_initialized():
        # When a process dies the others see a closed connection at once; when one hangs they wait
        # this long for it. torch sets an exception hook that would take away what ours writes.
        hook, backend = sys.excepthook, "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store_of_this_start(), rank=rank,
                                world_size=world_size,
                                timeout=datetime.timedelta(seconds=TIMEOUT_S))
        sys.excepthook = hook
        global patient
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=4))
    return torch.device(device), rank, world_size


def store_of_this_start():
    """Where the processes of a run leave their addresses for each other.

    torchrun keeps one store for all starts of a job (--max_restarts). So that no process looks up
    the address of one that has died, each start has keys of its own in it.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start {start}", store)


def choose_device(device):
    """The name of the device for a setting: auto, cpu, mps, cuda or cuda:N. Of GPUs it becomes the
    one that torch takes. Raises ValueError."""
    match = re.fullmatch("auto|cpu|mps|cuda(?::([0-9]+))?", device)
    if not match:
        raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:N, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is mps, but torch sees no such GPU here")
    if device.startswith("cuda"):
        number = int(match[1] or os.environ.get("LOCAL_RANK", 0))
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= found:
            raise ValueError(f"device is cuda:{number}, but torch sees {found} such GPUs here, "
                             "numbered from 0: take another one or --device=cpu")
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


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
    """Every process's `thing`, anything that can be pickled, as a list on all of them."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing, group=patient)
    return things


def first_on_rank_0(function, *arguments):
    """function(*arguments), which makes something once and then finds it: on rank 0, then on the
    others."""
    if rank_and_size()[0] == 0:
        function(*arguments)
    barrier()
    return function(*arguments)


def share(function, work):
    """list(map(function, work)), every process doing each n-th item of it."""
    work, rank, size = list(work), 0, 1
    if dist.is_initialized():
        rank, size = rank_and_size()
    hidden = True if rank else None                     # None: where there is no terminal
    mine = tqdm(work[rank::size], disable=hidden, delay=2, unit="pass", leave=False)
    results = [None] * len(work)
    for other, part in enumerate(gather([function(item) for item in mine])):
        results[other::size] = part
    return results


def sum_over_ranks(values, device):
    """The sums of a list of numbers over all ranks."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, device=device, dtype=torch.float32)
    dist.all_reduce(total)
    return total.tolist()


def from_rank_0(value, device):
    """Rank 0's number, on every rank: what depends on the clock must be the same everywhere."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value), device=device, dtype=torch.float32)
    dist.broadcast(shared, 0)
    return shared.item()


# --------------------------------------------------------------------------------------------------
# Precision


def best_dtype(device):
    """"bfloat16" where the matrix products of this device are faster with it, else "float32"."""
    fast = torch.cpu._is_avx512_bf16_supported()
    if str(device).startswith("cuda"):
        fast = torch.cuda.is_available() and has_bfloat16()
    return "bfloat16" if fast else "float32"


def has_bfloat16():
    """Whether this GPU multiplies in bfloat16 itself: Nvidia's since Ampere."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def matrix_dtype(device, dtype):
    """torch.float32 or torch.bfloat16 for the setting "float32", "bfloat16" or "auto"
    (`best_dtype`). Raises ValueError."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    if dtype == "bfloat16" and str(device).startswith("cuda") and not has_bfloat16():
        raise ValueError(f"{torch.cuda.get_device_name()} does not multiply in bfloat16: take "
                         "--dtype=float32")
    return getattr(torch, best_dtype(device) if dtype == "auto" else dtype)


def weights_dtype(device, dtype):
    """What a checkpoint's weights are read as, for the same settings. "auto": as they are stored
    (None), but float32 where a CPU has no instructions for bfloat16 and is ten times slower with
    it."""
    slow = device.type == "cpu" and best_dtype(device) == "float32"
    if dtype == "auto" and not slow:
        return None
    return matrix_dtype(device, dtype)


def autocast(device, dtype):
    """The context in which a training step runs, for the setting `dtype` (see matrix_dtype)."""
    if matrix_dtype(device, dtype) == torch.bfloat16:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
