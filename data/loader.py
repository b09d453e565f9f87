"""Serve batches from a folder that prepare.py wrote.

A split is one file: a 32-byte header and then the token ids, nothing else. It is memory-mapped, so
a corpus larger than RAM costs no RAM. A batch is a pure function of (seed, step, rank): resuming a
run needs no state of the loader, and the windows of a step do not depend on how many GPUs share it.
"""
import functools
import json
import struct
from pathlib import Path

import numpy as np
import torch

# magic, version, bytes per token (2 or 4), vocabulary size, number of tokens; the ids follow,
# little endian.
HEADER = struct.Struct("<8sIIQQ")
MAGIC = b"unmaskTK"
VERSION = 1
SPLITS = ("train", "val")
NEEDED_META = {"name", "vocab_size", "fingerprint", "mask_token_id", "eos_token_id"}


def token_dtype(vocab_size):
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def pack_header(vocab_size, num_tokens):
    """The 32 bytes in front of the ids."""
    return HEADER.pack(MAGIC, VERSION, token_dtype(vocab_size).itemsize, vocab_size, num_tokens)


def open_tokens(path):
    """Map a token file: (np.memmap of its ids, vocabulary size). ValueError when it is not one, or
    not all of one."""
    path = Path(path)
    again = f"delete {path.parent} and run `python data/prepare.py` again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {again}")
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is not a token file of unmask: {again}")
    _, version, itemsize, vocab_size, num_tokens = HEADER.unpack(header)
    dtype = token_dtype(vocab_size)
    if version != VERSION or itemsize != dtype.itemsize:
        raise ValueError(f"{path} has format version {version} with {itemsize}-byte ids, not "
                         f"{VERSION}: {again}")
    found = path.stat().st_size
    expected = HEADER.size + num_tokens * itemsize
    if found != expected:
        raise ValueError(f"{path} has {found:,} bytes but {num_tokens:,} tokens need "
                         f"{expected:,}: {again}")
    if num_tokens == 0:
        raise ValueError(f"{path} holds no tokens: {again}")
    ids = np.memmap(path, dtype=dtype, mode="r", offset=HEADER.size, shape=(num_tokens,))
    return ids, vocab_size


def read_meta(folder):
    """The dictionary in meta.json. FileNotFoundError when nothing was prepared here, ValueError
    when it is damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"no prepared data in {folder}: run `python data/prepare.py "
                                "NAME_OR_PATH` first")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        missing = NEEDED_META - meta.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        for split in SPLITS:
            if not (meta["bytes"][split] > 0 and meta["tokens"][split] > 0):
                raise ValueError("a split is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete {folder} and run "
                         "`python data/prepare.py` again") from None
    return meta


class TokenDataset:
    """A prepared data set: `train` and `val` (np.memmap of ids), `vocab_size`, `mask_token_id`,
    `eos_token_id`, `fingerprint` (a hash of all ids: equal means the same data set),
    `document_length` (tokens of each document where all have the same number, as Sudoku grids do;
    else 0), `longest_document` (tokens, its end of text included; 0 if unknown) and `meta` (all of
    meta.json).

    Raises FileNotFoundError and ValueError for a folder that is missing, truncated or of another
    format.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.fingerprint = self.meta["fingerprint"]
        self.mask_token_id = self.meta["mask_token_id"]
        self.eos_token_id = self.meta["eos_token_id"]
        self.document_length = self.meta.get("document_length", 0)
        self.longest_document = self.meta.get("longest_document", 0)
        for split in SPLITS:
            ids, self.vocab_size = open_tokens(self.folder / f"{split}.bin")
            found = (len(ids), self.vocab_size)
            expected = (self.meta["tokens"][split], self.meta["vocab_size"])
            if found != expected:
                raise ValueError(f"{folder}: {split}.bin and meta.json disagree on (tokens, "
                                 f"vocabulary), {found} against {expected}: delete it and prepare "
                                 "again")
            setattr(self, split, ids)
        self._begins = {}               # what `beginnings` found, by split and T

    def bytes_per_token(self, split):
        """UTF-8 bytes of text per token; nats per token / this / ln 2 = bits per byte. Separators
        count as 0 bytes."""
        return self.meta["bytes"][split] / self.meta["tokens"][split]

    def batch(self, split, batch_size, seq_len, seed, step, rank=0, world_size=1):
        """The windows that `rank` of `world_size` sees at `step`: int64 [B, T], the same for the
        same arguments.

        An epoch cuts the split, from a random offset, into windows of T tokens and visits them in a
        random order, each once. Where documents fit into T, its windows are those that `beginnings`
        gives instead. No two ranks see the same window in a step, unless a step takes more windows
        than there are. With gradient accumulation pass micro_step * world_size + rank as rank, and
        grad_accum * world_size as world_size. Raises ValueError when the split is shorter than T.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} but world_size {world_size}: pass the number of "
                             "slices of a step")
        ids = self._long_enough(split, seq_len)
        begins = self.beginnings(split, seq_len)
        if begins is not None:
            num_windows, num_offsets = len(begins), 1
        else:                                   # as many windows as fit for every offset below T
            num_windows = max(1, (len(ids) - seq_len + 1) // seq_len)
            num_offsets = min(seq_len, len(ids) - num_windows * seq_len + 1)
        steps_of_epoch = max(1, num_windows // (batch_size * world_size))
        epoch, step = divmod(step, steps_of_epoch)      # no step spans two epochs
        epoch_seed = (SPLITS.index(split), seed % 2**64, epoch)
        offset, order = _epoch_order(num_windows, num_offsets, epoch_seed)
        first = (step * world_size + rank) * batch_size
        windows = order[np.arange(first, first + batch_size) % num_windows]             # [B]
        starts = offset + seq_len * windows if begins is None else begins[windows]      # [B]
        return self._cut(ids, starts, seq_len)

    def windows(self, split, seq_len, max_tokens=None):
        """Windows from the split's start on, for evaluation: int64 [N, T], N * T <= max_tokens or
        N = 1. None overlaps another; they are consecutive but where documents fit into T."""
        ids = self._long_enough(split, seq_len)
        begins = self.beginnings(split, seq_len)
        if begins is None:
            starts = np.arange(len(ids) // seq_len) * seq_len
        else:
            starts = apart(begins, seq_len)
        if max_tokens is not None:
            starts = starts[:max(1, max_tokens // seq_len)]
        return self._cut(ids, starts, seq_len)

    def beginnings(self, split, seq_len):
        """Where windows of T tokens begin with a document, int64 [N]; None where documents are
        longer than T and have to be cut.

        Documents that all have one length are taken whole, one after the other. Others begin
        after the end of text of the one before, and that token stands first: it is what a sampler
        starts from. What is left of T holds the beginning of the next document.
        """
        ids = self._long_enough(split, seq_len)
        if self.document_length and seq_len % self.document_length == 0:
            return np.arange(len(ids) // seq_len) * seq_len
        if self.eos_token_id is None or not 0 < self.longest_document < seq_len:
            return None
        if (split, seq_len) not in self._begins:
            ends = positions_of(ids, self.eos_token_id)
            self._begins[split, seq_len] = ends[ends + seq_len <= len(ids)]
        begins = self._begins[split, seq_len]
        return begins if len(begins) else None

    @staticmethod
    def _cut(ids, starts, seq_len):
        """The windows that begin at `starts`, int64 [N, T]."""
        positions = starts[:, None] + np.arange(seq_len)
        return torch.from_numpy(ids[positions].astype(np.int64))

    def _long_enough(self, split, seq_len):
        """The ids of a split. ValueError if it has no sequence of this length."""
        if split not in SPLITS:
            raise ValueError(f"no split called {split!r}; there are train and val")
        ids = getattr(self, split)
        if not 1 <= seq_len <= len(ids):
            raise ValueError(f"the {split} split of {self.meta['name']} has {len(ids):,} tokens, "
                             f"a sequence {seq_len:,}: take a smaller seq_len or more text")
        return ids


def positions_of(ids, token):
    """Where a token stands in ids, int64 [N]; a block at a time, for ids may be larger than RAM."""
    block = 2**24
    found = [start + np.flatnonzero(ids[start:start + block] == token)
             for start in range(0, len(ids), block)]
    return np.concatenate(found)


def apart(begins, seq_len):
    """Those of ascending starts, from the first on, whose windows do not overlap."""
    kept, end = [], 0
    for begin in begins.tolist():
        if begin >= end:
            kept.append(begin)
            end = begin + seq_len
    return np.array(kept)


@functools.lru_cache(maxsize=4)
def _epoch_order(num_windows, num_offsets, seed):
    """An epoch's first offset and the order of its windows: 8 bytes a window, under 1 % of the
    corpus, kept in RAM."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(num_offsets)), rng.permutation(num_windows)
