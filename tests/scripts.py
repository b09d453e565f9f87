"""Run the repository's scripts as a user does, each in a process of its own, without paying for
`import torch` every time.

A server imports torch once and is forked for every run (multiprocessing's forkserver). The script
runs from its file, as __main__; its signals, files, streams and exit status are those of a real
process.
"""

import ctypes
import gc
import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3      # of glibc's malloc.h
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed",
        "torch.nn.parallel",
        "tokenizers",
        "lm_eval.evaluator",
        "pytablewriter",
        "scipy.sparse",
        "transformers.utils",
        "diffusion",
        "data.prepare",
        "evaluation.harness",
        "pretrained.export",
        "pretrained.load",
        "pretrained.tiny",
        "sampling.sampler",
        "sampling.terminal",
        "sampling.trace",
        "training.memory",
        "training.merge",
        "training.run",
        "training.sharding",
        "scripts",
    ]
)


@dataclass
class Result:
    status: int  # of exit; -9 after a kill
    out: str
    err: str


class Script:
    """A script at work: `Script("train_scratch.py", "--seed=1").wait()`.

    before: a function that the process calls first, to do some damage. environment: variables on
    top of this process's. folder: where it is started. plots: matplotlib is there; drawing loss.png
    takes as long as the other half of a small run.
    """

    def __init__(
        self, script, *arguments, environment=None, before=None, folder=ROOT, plots=False
    ):
        descriptors, self.paths = zip(
            *(tempfile.mkstemp(prefix=f"unmask-{name}-") for name in ("out", "err"))
        )
        for descriptor in descriptors:
            os.close(descriptor)
        variables = {
            name: value for name, value in os.environ.items() if name.startswith("UNMASK")
        } | (environment or {})
        self.process = _forks.Process(
            target=_main,
            args=(str(ROOT / script), arguments, self.paths, variables, before, folder, plots),
            daemon=True,
        )
        self.process.start()

    def wait(self, seconds=120):
        """The Result, or a TimeoutError with what was said so far."""
        self.process.join(seconds)
        status = self.process.exitcode
        self.process.kill()
        self.process.join()
        result = Result(
            status,
            *(Path(path).read_bytes().decode("utf-8", errors="replace") for path in self.paths),
        )
        for path in self.paths:
            os.unlink(path)
        if status is None:
            raise TimeoutError(f"still running after {seconds} s: {result}")
        return result

    def wait_for(self, condition, seconds=60):
        """Whether condition() became true before the process ended."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.exitcode is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError("the condition never came true")
            time.sleep(0.001)
        return True

    def signal(self, number):
        os.kill(self.process.pid, number)


def run(script, *arguments, **options):
    return Script(script, *arguments, **options).wait()


def status_of(error):
    """What the interpreter makes of a SystemExit."""
    if error.code is None:
        return 0
    return error.code if type(error.code) is int else 1


class Left(BaseException):
    """What os._exit raises in run_here."""

    def __init__(self, status):
        self.status = status


def run_here(script, *arguments):
    """The Result of a script that runs in this process, with its exception hook: ten times as fast,
    and enough where only what it says is asked for."""

    def leave(status):
        raise Left(status)

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(3)]
    plain = sys.argv, sys.excepthook, os._exit, sys.stdin, sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv, os._exit, status = [str(script), *arguments], leave, 0
    sys.stdin, sys.stdout, sys.stderr = streams
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        status = status_of(error)
    except Exception:
        try:
            sys.excepthook(*sys.exc_info())
        except Left as left:
            status = left.status
    finally:
        sys.argv, sys.excepthook, os._exit, sys.stdin, sys.stdout, sys.stderr = plain
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = []
    for stream in streams[1:]:
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return Result(status, *said)


def in_fork(function, *arguments):
    """function(*arguments) in a process of its own whose peak of memory is its own, as
    `in_own_process` of experiments/timing.py gives it, but a fork of the server: it need not import
    torch. What it frees goes back to the system at once. EOFError where it dies."""
    ours, theirs = _forks.Pipe(duplex=False)
    process = _forks.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _answer(connection, function, arguments):
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, 65536), (M_TRIM_THRESHOLD, 65536), (M_TOP_PAD, 0)):
        libc.mallopt(option, value)
    libc.malloc_trim(0)
    connection.send(function(*arguments))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_parallel(world_size, script, *arguments, **options):
    """The Results of all ranks, in the environment that torchrun makes."""
    torchrun = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
    }
    ranks = []
    for rank in range(world_size):
        environment = torchrun | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(Script(script, *arguments, environment=environment, **options))
    return [script.wait() for script in ranks]


def leave_out_what_nobody_reads(set_attribute=setattr):
    """A process that is killed loses nothing of what it wrote: to wait for the disk helps only
    against a power cut. lm-eval notes all installed packages with each result; asking pip for them
    takes a second."""
    from torch.utils import collect_env

    set_attribute(os, "fsync", lambda file: None)
    set_attribute(collect_env, "get_pip_packages", lambda run, patterns=None: ("pip", ""))


def _main(path, arguments, streams, environment, before, folder, plots):
    gc.freeze()  # what is imported already is no garbage: it need not be looked through
    for stream, file in zip((1, 2), streams):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (
        open(stream, "w", buffering=1, encoding="utf-8", closefd=False) for stream in (1, 2)
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    multiprocessing.set_start_method(
        "fork", force=True
    )  # what a process started by a user has: tqdm makes a lock with it
    os.environ.update(environment)
    os.chdir(folder)
    if not plots:
        sys.modules["matplotlib.figure"] = None  # what Python makes of a package that is missing
    leave_out_what_nobody_reads()
    sys.argv, sys.path[0] = [path, *arguments], str(ROOT)
    status = 0
    try:
        if before:
            before()
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        status = status_of(error)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter would; multiprocessing does not
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
