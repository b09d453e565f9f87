"""Four processes as two copies of two shards, a job that torchrun starts anew, and the arithmetic
of experiments/scaling.py."""
import os
import signal
import time

import pytest
import torch.distributed as dist
from runs import SignalAt, equal, learned, refused, rows, succeed
from scripts import Script, free_port, run, run_here, run_parallel

from experiments import scaling
from model import Config
from training.memory import plan_memory
from training.state import resumes

SCRIPT = "finetune_llada.py"


@pytest.fixture(scope="module")
def arguments(published, talk):
    def made(out_dir, *settings):
        return [f"--init_from={published('llada')}", f"--dataset={talk}", f"--out_dir={out_dir}",
                "--threads=1", "--dtype=float32", "--seq_len=96", "--max_steps=6",
                "--eval_interval=3", "--final_eval_sequences=4", "--eval_sequences=4",
                "--sample_tokens=0", "--lora_rank=0", "--learning_rate=0.001", *settings]
    return made


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The folder of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("alone")
    succeed(run(SCRIPT, *arguments(out, "--batch_size=4")))
    return out


def test_two_copies_of_two_shards_are_one(arguments, alone, tmp_path):
    """HSDP on four processes: losses and weights of one; then one process goes on from there."""
    results = run_parallel(4, SCRIPT, *arguments(tmp_path, "--batch_size=1", "--replicas=2"))
    succeed(*results)
    assert all(result.out == "" for result in results[1:])
    assert equal(rows(tmp_path), rows(alone), 1e-4)
    assert equal(learned(tmp_path), learned(alone), 1e-3)


class KillOnce(SignalAt):
    """SignalAt, but not in the processes that torchrun starts anew."""

    def __call__(self):
        super().__call__()
        from data.chat import ChatDataset

        counted, original = ChatDataset.batch, self.original

        def batch(*arguments, **options):
            first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
            return (counted if first else original)(*arguments, **options)

        ChatDataset.batch = batch
        join = dist.init_process_group

        def join_late(*arguments, **options):
            # Process 0 then looks for the address of process 1 before that has one: it shall wait
            # for it, and not find the one of the process that was killed.
            started_anew = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1"
            if started_anew and os.environ["RANK"] == "1":
                time.sleep(1)
            return join(*arguments, **options)

        dist.init_process_group = join_late


def test_torchrun_starts_a_job_anew(arguments, alone, tmp_path):
    """One of two processes is killed; torchrun starts both with the same command, which goes on
    from the last checkpoint and ends with the weights of an undisturbed run."""
    from data.chat import ChatDataset

    kill = KillOnce(7, signal.SIGKILL, rank=1)
    kill.original = ChatDataset.batch
    result = Script("tests/torchrun.py", "--nproc_per_node=2", "--max_restarts=1",
                    "--master_addr=127.0.0.1", f"--master_port={free_port()}", SCRIPT,
                    *arguments(tmp_path, "--batch_size=2"), before=kill).wait(300)
    assert result.status == 0, result
    assert result.out.count("parameters,") == 2         # it began twice
    assert equal(rows(tmp_path), rows(alone), 1e-4)
    assert equal(learned(tmp_path), learned(alone), 1e-3)


def test_when_a_run_goes_on(tmp_path, monkeypatch):
    assert resumes(True, tmp_path) and not resumes(False, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not resumes(False, tmp_path)                 # killed before the first checkpoint
    (tmp_path / "train_state").mkdir()
    assert resumes(False, tmp_path)
    (tmp_path / "train_state").rename(tmp_path / "train_state.old")
    assert resumes(False, tmp_path)                     # killed between two renames
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not resumes(False, tmp_path)


@pytest.mark.parametrize("settings, words", [
    ("--replicas=2", "replicas must divide the 1 processes, got 2"),
    ("--replicas=0", "replicas must be at least 1, got 0")])
def test_mistakes(settings, words, arguments, tmp_path):
    assert refused(run_here(SCRIPT, *arguments(tmp_path / "out", settings)), words)


# --------------------------------------------------------------------------------------------------
# On paper


def test_traffic():
    """Of 1000 parameters: two gathers in two bytes, a scatter in four, and a ring between
    copies."""
    near, far = scaling.traffic(1000, cards=8, copies=1, node=8)
    assert near == pytest.approx(7 / 8 * 8000) and far == 0
    near, far = scaling.traffic(1000, cards=16, copies=1, node=8)
    assert near + far == pytest.approx(15 / 16 * 8000) and near / far == pytest.approx(7 / 8)
    near, far = scaling.traffic(1000, cards=16, copies=2, node=8)
    assert near == pytest.approx(7 / 8 * 8000) and far == pytest.approx(2 / 2 * 4000 / 8)
    assert scaling.traffic(1000, cards=1, copies=1, node=8) == (0, 0)


def test_copies(monkeypatch):
    monkeypatch.setattr(scaling, "replicas", 8)
    assert [scaling.copies_of(cards) for cards in (1, 8, 16, 64, 512)] == [1, 1, 2, 8, 8]


def test_a_step_on_paper():
    config = Config(family="llada", vocab_size=300, dim=32, n_layers=2, n_heads=2, max_len=4096)
    step = scaling.step_of(config, cards=8, copies=1)
    plan = plan_memory(config, scaling.seq_len, scaling.batch_size, 0, ranks=8)
    assert step.memory_gb == plan.peak / 1e9 and step.network_s == 0
    assert step.seconds == max(step.products_s, step.nvlink_s) and step.limit == "products"
