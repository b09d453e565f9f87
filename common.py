"""What every script needs and no lesson lives in: settings, errors, processes, the learning-rate schedule, resume state, the log."""
import ast
import contextlib
import datetime
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# OpenMP's threads wait for each other by spinning. When something else runs on one of the cores that is a disaster: two threads
# got 3,800 tokens/s here, and 10,200 with this limit; on an idle machine it costs nothing. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from data.checkpoints import write_atomically  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------------------
# Settings and errors


def override(constants):
    """Read --name=value from the command line into the caller's constants: `settings = override(globals())`.

    The public int, float, bool and str constants defined above the call are the settings; a constant's type reads the text.
    An unknown name or a wrong type ends the program with status 2 and one line; --help prints every constant and its comment.
    Returns all settings as a dict.
    """
    show_errors_in_one_line()
    defaults = {k: v for k, v in constants.items() if type(v) in (int, float, bool, str) and not k.startswith("_")}
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
        lost = _lost_process(error)
        status = 2 if issubclass(kind, (ValueError, OSError, ImportError)) and not lost else 1
        if issubclass(kind, (KeyboardInterrupt, BrokenPipeError)):  # Ctrl-C, or a reader like `head` that has seen enough
            os._exit(130 if kind is KeyboardInterrupt else 0)
        known = issubclass(kind, (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)) or lost
        if os.environ.get("UNMASK_TRACEBACK") or not known:
            return sys.__excepthook__(kind, error, traceback)
        for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []:
            bar.close()                                             # or the message would stand behind the progress bar
        message = " ".join(str(error).split()) or kind.__name__
        if lost:
            message = (f"process {os.environ.get('RANK')} lost another process of this run, which died or stopped answering for {TIMEOUT_S} s: its own "
                       f"message, if it left one, says why; --resume=True goes on from the last checkpoint ({message[:120]})")
        if issubclass(kind, torch.OutOfMemoryError):
            message = f"{message.split('. ')[0]}: take a smaller batch_size or seq_len (finetune_llada.py --plan tells what a step takes)"
        if _first_to_say(message, lost):
            print(f"error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)                                            # an exception hook cannot set the status otherwise

    sys.excepthook = hook


def _lost_process(error):
    """Whether an error says that another process is gone."""
    signs = r"gloo|NCCL|Connection (closed|reset)|Broken pipe|recvValue|[Tt]imed out (after|waiting)"
    return dist.is_initialized() and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(signs, str(error)) is not None)


def _first_to_say(message, lost):
    """Whether no other process of the run has said this yet, nor (if `lost`) told why it ends."""
    rank = int(os.environ.get("RANK", 0))
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


def init_process(device="auto", threads=0):
    """(device, rank, world size), from torchrun's environment; a single process is the case of world size 1."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
        torch.set_num_threads(threads)
    if world_size > 1 and not dist.is_initialized():
        # When a process dies the others see a closed connection at once; when one hangs they wait this long for it.
        hook = sys.excepthook
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
        sys.excepthook = hook                                       # torch's own would take away what ours writes
        global _patient
        _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=4))
    return torch.device(device), rank, world_size


TIMEOUT_S = 60
_patient = None             # the same processes once more, for work that may take one of them long: preparing data, reading and writing weights


def barrier():
    """Wait until all processes are here, however long one of them works."""
    if dist.is_initialized():
        dist.barrier(group=_patient)


def gather(thing):
    """Every process's `thing`, anything that can be pickled, as a list on all of them, however long one of them works."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing, group=_patient)
    return things


def matrix_dtype(device, dtype):
    """torch.float32 or torch.bfloat16 for the setting "float32", "bfloat16", or "auto": bfloat16 where the device is faster with it."""
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if fast else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    return getattr(torch, dtype)


def autocast(device, dtype):
    """The context in which the forward pass runs, for the setting `dtype` (see matrix_dtype)."""
    return torch.autocast(device.type, torch.bfloat16) if matrix_dtype(device, dtype) == torch.bfloat16 else contextlib.nullcontext()


def is_on(setting, auto):
    """A setting that is "auto", "True" or "False", as a bool."""
    if str(setting).lower() not in ("auto", "true", "false"):
        raise ValueError(f"expected auto, True or False, got {setting!r}")
    return auto if str(setting).lower() == "auto" else str(setting).lower() == "true"


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


def check_ranks_agree(device, **values):
    """ValueError, on every process, if one of `values` (anything that JSON can hold) is not the same on all of them."""
    if not dist.is_initialized():
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:7] for value in values.values()]
    mine = torch.tensor([int.from_bytes(digest, "little") for digest in digests], device=device)    # [number of values]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for i, name in enumerate(values):
        if differ := [rank for rank, theirs in enumerate(everyone) if theirs[i] != everyone[0][i]]:
            raise ValueError(f"the processes disagree on {name}: process {differ[0]} has not what process 0 has; start all of them with the same "
                             "settings and give them the same files")


def shard(model, device, dtype=torch.float32):
    """Spread the parameters of a Transformer over all processes, in place (FSDP2; ZeRO-3, Rajbhandari et al. 2020, 1910.02054).

    Each process keeps 1/n of the rows of every parameter, its gradient and optimizer state; a block's parameters are gathered, in
    `dtype`, when the block runs, and freed behind it. Embedding, head and last norm stay gathered from forward to backward pass.
    The model may be on the meta device: checkpoints.fill then reads only the rows that belong here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Inputs are left alone: the angles of RoPE and the weights of the loss must stay float32.
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def gathered(tensors):
    """{name: whole tensor on the CPU} of {name: sharded or plain tensor} on process 0, {} on the others, which must call it too."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor                 # one at a time: no memory for all
        if int(os.environ.get("RANK", 0)) == 0:
            whole[name] = tensor.cpu()
    return whole


def peak_flops(device):
    """Dense bf16 FLOP/s that the maker states for this GPU, or None; for model FLOP/s utilisation (MFU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    table = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12, "T4": 65e12}
    return next((flops for key, flops in table.items() if key in name), None)


# ------------------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, state, log


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: of each matrix's momentum U S V^T only U V^T is applied (Jordan et al. 2024).

    Five steps of a Newton-Schulz iteration, X <- aX + b(XX^T)X + c(XX^T)^2 X in bfloat16, drive the singular values to about 1. Matrices
    of one shape are stacked and go through it together, which takes half the time of one after the other (torch.optim.Muon).
    """

    def __init__(self, matrices, lr=0.02, momentum=0.95, weight_decay=0.0):
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
    """Roughly U V^T of each of the matrices U S V^T, [N, rows, columns] with rows <= columns, in bfloat16."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)                                       # singular values at most 1
    for _ in range(steps):
        a = x @ x.mT                                                                        # [N, rows, rows]
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def learning_rate_factor(progress, warmup=0.02, decay="linear", decay_from=0.0):
    """What the peak learning rate is multiplied by at `progress` in [0, 1]: up over `warmup`, level, down to 0 from `decay_from` on."""
    if progress >= 1:
        return 0.0
    if progress < warmup:
        return progress / warmup
    left = min(1.0, (1 - progress) / (1 - max(decay_from, warmup)))
    return 0.5 - 0.5 * math.cos(math.pi * left) if decay == "cosine" else left


def save_state(path, state):
    """torch.save: a kill or a full disk at any moment leaves the last good file."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path, must_match):
    """The state that `save_state` wrote; ValueError if its "settings" differ in any item of `must_match`."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: there is nothing to resume; run without --resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = dict(state["settings"])
    except Exception as error:      # unpickling a damaged file can raise anything
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it and start again") from None
    _check_settings(path, settings, must_match)
    return state


def _check_settings(path, settings, must_match):
    for name, value in must_match.items():
        if settings.get(name) != value:
            raise ValueError(f"cannot resume: {name} was {settings.get(name)!r} in {path} and is {value!r} now")


def training_tensors(model, optimizers):
    """{name: tensor} of all that training changes: the parameters that learn and what the optimizers keep for each of them."""
    tensors, states = {}, {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            tensors |= {f"optimizer.{name}.{key}": value for key, value in states.get(parameter, {}).items() if isinstance(value, torch.Tensor)}
    return tensors


def save_sharded(path, model, optimizers, **record):
    """Write the folder `path`: every process its part of `training_tensors` as .safetensors, and `record` as record.json.

    It is written under another name, flushed and renamed: a kill at any moment leaves the last good one, here or as path.old.
    """
    import torch.distributed.checkpoint as dcp
    path, rank, world_size = Path(path), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    new, old = (path.with_name(f"{path.name}.{suffix}") for suffix in ("new", "old"))
    if rank == 0:
        if old.exists() and not path.exists():
            os.rename(old, path)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    barrier()
    try:
        writer = dcp.HuggingFaceStorageWriter(str(new), save_distributed=True)      # safetensors, where torch's default pickles
        _quietly(dcp.save, training_tensors(model, optimizers), storage_writer=writer, process_group=_patient)
        for file in sorted(new.glob("*.safetensors"))[rank::world_size]:
            with open(file, "rb") as data:
                os.fsync(data.fileno())
            file.with_suffix(".crc32").write_text(str(_checksum(file)))
        barrier()
        if rank == 0:
            record |= {"files": sorted(file.name for file in new.glob("*.safetensors"))}
            write_atomically(new / "record.json", lambda temporary: Path(temporary).write_text(json.dumps(record)))
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if _lost_process(error):
            raise
        raise OSError(f"cannot write {path} ({' '.join(str(error).split())[-200:]}): free some space or choose another folder; the last state is "
                      "untouched") from None
    barrier()


def read_record(path, must_match):
    """(folder, record) of what `save_sharded` wrote; ValueError if its "settings" differ in any item of `must_match`."""
    path = Path(path)
    path = path if path.exists() else path.with_name(path.name + ".old")
    if not path.exists():
        raise FileNotFoundError(f"{path.with_suffix('')} does not exist: there is nothing to resume; run without --resume first")
    try:
        record = json.loads((path / "record.json").read_text())
        settings = dict(record["settings"])
        if not all(Path(name).name == name for name in record["files"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__} in record.json): delete it and start again") from None
    _check_settings(path, settings, must_match)
    return path, record


def load_sharded(path, model, optimizers):
    """Read the tensors of the folder that `read_record` found into model and optimizers; the number of processes may be another one."""
    import torch.distributed.checkpoint as dcp
    for optimizer in optimizers:
        _make_state(optimizer)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    files = [path / name for name in json.loads((path / "record.json").read_text())["files"]]
    bad = torch.tensor(next((i for i in range(rank, len(files), world_size) if not _is_whole(files[i])), len(files)))
    if dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MIN, group=_patient)
    if bad < len(files):
        raise ValueError(f"{files[int(bad)]} is damaged or missing: delete {path} and start again")
    try:
        _quietly(dcp.load, training_tensors(model, optimizers), storage_reader=dcp.HuggingFaceStorageReader(str(path)), process_group=_patient)
    except Exception as error:      # whatever is wrong with the files
        if _lost_process(error):
            raise
        raise ValueError(f"{path} is damaged or of another model ({' '.join(str(error).split())[-200:]}): delete it and start again") from None


def _make_state(optimizer):
    """Let an optimizer make its state, by a step of length 0 with gradients of 0: then there is something to load into."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr


def _is_whole(file):
    """Whether a shard is what was written."""
    sums = file.with_suffix(".crc32")
    return file.is_file() and sums.is_file() and sums.read_text() == str(_checksum(file))


def _checksum(file):
    total = 0
    with open(file, "rb") as data:
        while part := data.read(2**22):
            total = zlib.crc32(part, total)
    return total


def _quietly(function, *arguments, process_group, **options):
    """Call a function of torch.distributed.checkpoint; that there is but one process is no news."""
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, process_group=process_group, **options)


def make_folder(out_dir):
    """Create out_dir and see that it can be written to, before hours of work depend on it."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_text("")
        (folder / ".writable").unlink(missing_ok=True)              # every rank does this at once
    except OSError as error:
        raise OSError(f"cannot write to out_dir {out_dir} ({error.strerror or error}): choose another with --out_dir=...") from None
    return folder


class Log:
    """log.jsonl, a JSON object a line. A resumed run drops what the killed one wrote behind its checkpoint."""

    def __init__(self, path, keep_up_to=None):
        self.path, self.rows = Path(path), []
        if keep_up_to is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):               # a line cut short by a kill
                    self.rows.append(json.loads(line))
            self.rows = [row for row in self.rows if row["step"] < keep_up_to]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def write(self, **row):
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def plot(self, path, ylabel="nats per token"):
        """Draw training loss and validation bound over minutes, where matplotlib is installed."""
        try:
            from matplotlib.figure import Figure  # no pyplot: no global state, no display
        except ImportError:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, label, style in (("train_loss", "training loss", dict(alpha=0.4)), ("val_nelbo", "validation NELBO", dict(marker="o", ms=3))):
            rows = [row for row in self.rows if row.get(key) is not None and math.isfinite(row[key])]
            axes.plot([row["elapsed_s"] / 60 for row in rows], [row[key] for row in rows], label=label, **style)
        axes.set(xlabel="minutes", ylabel=ylabel)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


class Clock:
    """Seconds of work, continued over a resume."""

    def __init__(self, before=0.0):
        self.start = time.perf_counter() - before

    def seconds(self):
        return time.perf_counter() - self.start
