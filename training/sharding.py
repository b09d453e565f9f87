"""A model spread over many processes, and its resume state: written as shards, read by any number
of processes.

FSDP2 does the spreading, torch.distributed.checkpoint the writing. What is added here: a kill at
any moment loses nothing, damage is found, and nothing is ever unpickled.
"""
import hashlib
import json
import os
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import common
from training.files import check_match


def shard(model, device, dtype=torch.float32, replicas=1):
    """Spread the parameters of a Transformer over all processes, in place (FSDP2; ZeRO-3,
    Rajbhandari et al. 2020, 1910.02054). Returns it.

    Each process keeps 1/n of the rows of every parameter, its gradient and optimizer state; a
    block's parameters are gathered, in `dtype`, when the block runs, and freed after it.
    Embedding, head and last norm stay gathered from forward to backward pass. The model may be on
    the meta device: pretrained.load.fill then reads only the rows that belong here.

    replicas: so many copies of the model, each spread over the processes of a node or several
    (HSDP); they divide the processes. Parameters are then gathered within a copy only; between
    copies go the gradients of what a process keeps.
    """
    mesh = make_mesh(device.type, dist.get_world_size(), replicas)
    # Inputs are left alone: the angles of RoPE and the weights of the loss must stay float32.
    cast = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "weighted_nll")     # it gathers weights as `forward` does
    return model


def make_mesh(device_type, world_size, replicas):
    """The processes in a row, or in a table of copies and shards. Processes of a node stand after
    each other: a copy is one node, or some."""
    if replicas == 1:
        return init_device_mesh(device_type, (world_size,))
    return init_device_mesh(device_type, (replicas, world_size // replicas),
                            mesh_dim_names=("replicate", "shard"))


def training_tensors(model, optimizers):
    """{name: tensor} of all that training changes: the parameters that learn, what the optimizers
    keep for each of them, and the biases of routers, which balance.py moves."""
    states = {}
    for optimizer in optimizers:
        states |= dict(optimizer.state)
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.endswith("router_bias"):
            tensors[f"model.{name}"] = parameter.detach()
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in states.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def save_sharded(path, model, optimizers, **record):
    """Write the folder `path`: every process its part of `training_tensors` as .safetensors, and
    `record` as record.json.

    It is written under another name, flushed and renamed: a kill at any moment leaves the last good
    one, here or as path.old. Raises OSError, with the last state untouched.
    """
    path, rank = Path(path), common.rank_and_size()[0]
    new, old = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")
    if rank == 0:
        if old.exists() and not path.exists():
            os.rename(old, path)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    common.barrier()
    try:
        write_shards(new, model, optimizers)
        if rank == 0:
            record["files"] = sorted(file.name for file in new.glob("*.safetensors"))
            common.write_atomically(new / "record.json",
                                    lambda name: Path(name).write_text(json.dumps(record)))
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if common.lost_process(error):
            raise
        reason = " ".join(str(error).split())[-200:]
        raise OSError(f"cannot write {path} ({reason}): free some space or choose another folder; "
                      "the last state is untouched") from None
    common.barrier()


def write_shards(folder, model, optimizers):
    """Every process its shard, flushed to disk, with a checksum beside it."""
    rank, world_size = common.rank_and_size()
    # safetensors, where torch's default pickles
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    quietly(dcp.save, training_tensors(model, optimizers), storage_writer=writer)
    for file in sorted(folder.glob("*.safetensors"))[rank::world_size]:
        with open(file, "rb") as data:
            os.fsync(data.fileno())
        file.with_suffix(".crc32").write_text(str(checksum(file)))
    common.barrier()


def load_sharded(path, model, optimizers, must_match):
    """Read what `save_sharded` wrote into model and optimizers; the number of processes may be
    another one. Returns the record.

    ValueError if its "settings" differ in any item of `must_match`, or if any file is not what was
    written.
    """
    path = Path(path)
    if not path.exists():
        path = path.with_name(path.name + ".old")
    if not path.exists():
        raise FileNotFoundError(f"{path.with_suffix('')} does not exist: there is nothing to "
                                "resume; run without --resume first")
    record, files = read_record(path)
    check_match(path, record["settings"], must_match)
    check_files(path, files)
    for optimizer in optimizers:
        make_state(optimizer)
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        quietly(dcp.load, training_tensors(model, optimizers), storage_reader=reader)
    except Exception as error:      # whatever is wrong with the files
        if common.lost_process(error):
            raise
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"{path} is damaged or of another model ({reason}): delete it and start "
                         "again") from None
    return record


def read_record(path):
    """(record.json, the shards that it names). Raises ValueError."""
    try:
        record = json.loads((path / "record.json").read_text())
        record["settings"] = dict(record["settings"])
        files = [path / name for name in record["files"]]
        if not all(file.parent == path for file in files):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__} in record.json): delete it "
                         "and start again") from None
    return record, files


def check_files(path, files):
    """ValueError, on every process, for a shard that is not what was written. Each process reads
    some."""
    rank, world_size = common.rank_and_size()
    bad = len(files)
    for i in range(rank, len(files), world_size):
        if not is_whole(files[i]):
            bad = i
            break
    bad = torch.tensor(bad)
    if dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MIN, group=common.patient)
    if bad < len(files):
        raise ValueError(f"{files[int(bad)]} is damaged or missing: delete {path} and start again")


def check_ranks_agree(device, **values):
    """ValueError, on every process, if one of `values` (anything that JSON can hold) is not the
    same on all of them."""
    if not dist.is_initialized():
        return
    digests = []
    for value in values.values():
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        digests.append(int.from_bytes(digest[:7], "little"))
    mine = torch.tensor(digests, device=device)                     # [number of values]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for i, name in enumerate(values):
        for rank, theirs in enumerate(everyone):
            if theirs[i] != everyone[0][i]:
                raise ValueError(f"the processes disagree on {name}: process {rank} has not what "
                                 "process 0 has; start all of them with the same settings and give "
                                 "them the same files")


def make_state(optimizer):
    """Let an optimizer make its state, by a step of length 0 with gradients of 0: then there is
    something to load into."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr


def is_whole(file):
    """Whether a shard is what was written."""
    sums = file.with_suffix(".crc32")
    return file.is_file() and sums.is_file() and sums.read_text() == str(checksum(file))


def checksum(file):
    total = 0
    with open(file, "rb") as data:
        while part := data.read(2**22):
            total = zlib.crc32(part, total)
    return total


def quietly(function, *arguments, **options):
    """Call a function of torch.distributed.checkpoint; that there is but one process is no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, process_group=common.patient, **options)
