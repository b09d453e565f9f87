"""From pieces of text, or conversations, to a folder that loader.py and chat.py read.

train.bin and val.bin (see loader.py), meta.json and the tokenizer; for conversations also the
masks and indices of chat.py. A folder gets its name when all of it is written.
"""
import contextlib
import hashlib
import itertools
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers

from data.chat import encode_rendered, render
from data.loader import SPLITS, VERSION, pack_header, token_dtype
from data.tokenizer import Tokenizer

BATCH_BYTES = 2**22         # text encoded in one go
BPE_BYTES = 32 * 2**20      # text that a BPE is learned from: more changes little
BATCH_CONVERSATIONS = 1000  # encoded in one go
RENDERING = 2               # the rules that mark responses; what older ones prepared is made again
MAX_SEQUENCE = 1024         # tokens: longer documents are cut, even if all have one length
ONE_DAY_S = 86400

# --------------------------------------------------------------------------------------------------
# Token files


class TokenWriter:
    """Appends ids to a token file and counts them; `close` fills in the header."""

    def __init__(self, path, vocab_size):
        self.file = path.open("wb")
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.file.write(pack_header(vocab_size, 0))
        self.tokens = self.bytes = self.documents = 0
        self.begin = 0                  # of the document that is being written
        self.document_lengths = set()   # in tokens, of the documents so far; two differ: enough
        self.longest = 0                # of the documents so far, tokens
        self.hash = hashlib.sha256()

    def write(self, text, ids):
        """A piece of text and its ids; None and the end token, if there is one, at the end of a
        document."""
        block = np.array(ids, dtype=self.dtype).tobytes()
        self.file.write(block)
        self.hash.update(block)
        self.tokens += len(ids)
        if text is None:
            self.end_document()
        else:
            self.bytes += len(text.encode("utf-8"))

    def end_document(self):
        self.documents += 1
        length = self.tokens - self.begin
        self.longest = max(self.longest, length)
        if len(self.document_lengths) < 2:
            self.document_lengths.add(length)
        self.begin = self.tokens

    def close(self):
        """Write the header, which counts the tokens, and flush all to the disk."""
        self.file.seek(0)
        self.file.write(pack_header(self.vocab_size, self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class ChatWriter(TokenWriter):
    """A TokenWriter that marks the responses and knows where conversations begin."""

    def __init__(self, folder, split, vocab_size):
        super().__init__(folder / f"{split}.bin", vocab_size)
        self.mask = (folder / f"{split}.mask").open("wb")
        self.index = (folder / f"{split}.index").open("wb")

    def add(self, text, ids, mask):
        """A conversation: its text, its ids, and as many uint8, 1 in a response."""
        place = np.array([self.tokens, len(ids), mask.argmax()], dtype="<i8")
        self.index.write(place.tobytes())
        self.mask.write(mask.tobytes())
        self.hash.update(mask.tobytes())
        self.write(text, ids)
        self.documents += 1

    def close(self):
        self.mask.close()
        self.index.close()
        super().close()


# --------------------------------------------------------------------------------------------------
# Text


def write_dataset(folder, pieces, tokenizer, vocab_size, max_tokens, facts):
    """Fill a folder: the tokenizer (if "bpe", learned here, from the training split), the token
    files, meta.json."""
    if tokenizer == "bpe":
        pieces = iter(pieces)
        head = next(batches(pieces, BPE_BYTES), [])
        texts = [text for split, text in head if split == "train" and text]
        tokenizer = Tokenizer.train(texts, vocab_size)
        pieces = itertools.chain(head, pieces)
    writers = write_tokens(pieces, tokenizer, folder, max_tokens)
    write_meta(folder, writers, tokenizer, facts)


def write_tokens(pieces, tokenizer, folder, max_tokens=None):
    """Encode a stream of pieces into folder/train.bin and val.bin, up to the document that reaches
    max_tokens. Returns {split: TokenWriter} with what was counted."""
    from tqdm import tqdm

    size = tokenizer.vocab_size
    writers = {split: TokenWriter(folder / f"{split}.bin", size) for split in SPLITS}
    written = 0
    bar = tqdm(total=max_tokens, desc="tokens", unit="", unit_scale=True, delay=2, disable=None)
    with bar:
        for split, text, ids in encode(pieces, tokenizer):
            writers[split].write(text, ids)
            written += len(ids)
            bar.update(len(ids))
            if text is None and max_tokens is not None and written >= max_tokens:
                break
    for writer in writers.values():
        writer.close()
    return writers


def encode(pieces, tokenizer):
    """(split, text, ids) of each piece. Without an end token documents stand one after the
    other."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in batches(pieces, BATCH_BYTES):
        texts = [text for _, text in batch if text is not None]
        encoded = iter(tokenizer.encode_batch(texts))
        for split, text in batch:
            yield split, text, end if text is None else next(encoded)


def batches(pieces, num_bytes):
    """Lists of pieces with about num_bytes of text each."""
    batch, size = [], 0
    for split, text in pieces:
        batch.append((split, text))
        size += len(text or "")
        if size >= num_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------
# Conversations


def write_conversations(folder, conversations, tokenizer, facts):
    """Fill a folder with conversations, (split, messages). What a template refuses, or has no
    response, is left out and counted."""
    from tqdm import tqdm

    size = tokenizer.vocab_size
    writers = {split: ChatWriter(folder, split, size) for split in SPLITS}
    left_out = {}                                       # {reason: conversations}
    waiting = []                                        # (split, rendered) each
    bar = tqdm(conversations, desc="conversations", unit="", unit_scale=True, delay=2, disable=None)
    for split, messages in bar:
        try:
            waiting.append((split, render(messages, tokenizer)))
        except ValueError as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
        if len(waiting) == BATCH_CONVERSATIONS:
            write_rendered(waiting, writers, tokenizer)
            waiting = []
    write_rendered(waiting, writers, tokenizer)
    for writer in writers.values():
        writer.close()
    if left_out and not any(writer.documents for writer in writers.values()):
        reason = max(left_out, key=left_out.get)
        raise ValueError(f"{facts['source']} has no conversation to learn from: {reason}")
    write_meta(folder, writers, tokenizer, facts | {"rendering": RENDERING, "left_out": left_out})


def write_rendered(waiting, writers, tokenizer):
    """Encode conversations, (split, (text, spans)) each, and append them to their files."""
    encoded = encode_rendered([rendered for _, rendered in waiting], tokenizer)
    for (split, (text, _)), (ids, mask) in zip(waiting, encoded):
        writers[split].add(text, ids, mask)


# --------------------------------------------------------------------------------------------------
# The folder


def write_meta(folder, writers, tokenizer, facts):
    """The tokenizer and meta.json, beside the token files that are written. ValueError if a split
    is empty."""
    counts = {}
    for name in ("tokens", "bytes", "documents"):
        counts[name] = {split: getattr(writers[split], name) for split in SPLITS}
    if not all(counts["bytes"].values()):
        raise ValueError(f"{facts['source']} is too short to split: {counts['bytes']['train']} "
                         f"bytes of text for training, {counts['bytes']['val']} for validation")
    lengths = writers["train"].document_lengths | writers["val"].document_lengths
    hashes = "".join(writers[split].hash.hexdigest() for split in SPLITS)
    fingerprint = hashlib.sha256(f"{tokenizer.vocab_size} {hashes}".encode()).hexdigest()
    meta = facts | {
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "document_length": common_length(lengths),
        "longest_document": max(writer.longest for writer in writers.values()),
        **counts,       # tokens count the end of each document; bytes are the text's in UTF-8 alone
        "fingerprint": fingerprint[:16],
        "versions": {"format": VERSION, "python": platform.python_version(),
                     "tokenizers": tokenizers.__version__},
    }
    tokenizer.save_pretrained(folder)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def common_length(lengths):
    """The length of all documents, {length, ...} in tokens; 0 where they differ or are too long to
    be one sequence."""
    if len(lengths) != 1 or max(lengths) > MAX_SEQUENCE:
        return 0
    return max(lengths)


def make_dataset(folder, fill, is_prepared):
    """Have fill(temporary folder) write a data set and give it its name.

    Renaming is atomic: whoever is killed, or prepares the same at once, leaves either nothing or a
    whole data set under that name. is_prepared(folder): whether it holds a whole one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, f".{folder.name}-")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)           # mkdtemp makes it private
        fill(temporary)
        install(temporary, folder, is_prepared)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def install(temporary, folder, is_prepared):
    """Rename a finished folder; what stands there damaged goes out of the way."""
    if folder.exists() and not is_prepared(folder):
        with contextlib.suppress(FileNotFoundError):
            folder.rename(f"{temporary}.old")
        shutil.rmtree(f"{temporary}.old", ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not is_prepared(folder):     # if it is, another process was faster, with the same data
            raise


def remove_leftovers(root, prefix):
    """Delete temporary folders of preparations that were killed: those a day old, so that none at
    work is hit."""
    for path in root.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):    # another process may just have renamed it
            if time.time() - path.stat().st_mtime > ONE_DAY_S:
                shutil.rmtree(path, ignore_errors=True)
