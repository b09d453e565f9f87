"""Text to token files: python data/prepare.py NAME_OR_PATH [--tokenizer=bpe] [--vocab_size=2048]

Writes data/prepared/<name>-<tokenizer>/ with train.bin, val.bin (see loader.py), meta.json and the tokenizer. A corpus
goes through as a stream of pieces: (split, text) is a piece of a document, (split, None) the end of one, which becomes
the end-of-text token. So memory holds one batch of pieces, never the corpus.

No text is in both splits. A document goes to the validation split by its hash, so a copy goes where the original went;
a text file or folder gives its last tenth.
"""

import argparse
import ast
import codecs
import contextlib
import difflib
import gc
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

if __name__ == "__main__":       # `python data/prepare.py` has data/ on its path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import tokenizers

from data.loader import SPLITS, VERSION, TokenDataset, pack_header, token_dtype
from data.tokenizer import Tokenizer, check_vocab_size

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
PIECE_BYTES = 2**18               # what is read and encoded together of a long file
BATCH_BYTES = 2**22               # text encoded in one go
BPE_BYTES = 32 * 2**20            # text that a BPE is learned from: more changes little
MAX_TOKENS = 100_000_000          # of a streamed data set, unless max_tokens says otherwise
VAL_FRACTION = 0.1                # of a data set that this machine holds
STREAM_VAL_FRACTION = 0.01        # of a streamed one: about 4 MB of text
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".json", ".jsonl", ".csv", ".tsv",
                 ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".sh")


# ---------------------------------------------------------------- data sets: a function each, with its --help line

def pydocs():
    """Python's language reference and the docstrings of its library: 2 MB, embedded"""
    documents = list(language_reference()) + [f"{signature}\n{text}" for signature, text in docstrings()]
    return split_by_hash(shuffled(documents), VAL_FRACTION)


def pystdlib():
    """the source code of Python's library: 11 MB, embedded"""
    return split_by_hash(shuffled(source for _, source in library_sources()), VAL_FRACTION)


def shakespeare():
    """tiny Shakespeare, the last tenth for validation as in nanoGPT: 1 MB, downloaded"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shakespeare.txt"
        download(SHAKESPEARE_URL, path)
        yield from split_files({b"": path})


def tinystories():
    """TinyStories, short stories in the words of a 4-year-old: 2 GB, streamed"""
    return stream("roneneldan/TinyStories")


def fineweb_edu():
    """FineWeb-Edu sample-10BT, educational web pages: 28 GB, streamed"""
    return stream("HuggingFaceFW/fineweb-edu", name="sample-10BT")


def openwebtext():
    """OpenWebText, the web pages that GPT-2's authors would have read: 40 GB, streamed"""
    return stream("Skylion007/openwebtext")


STREAMED = (tinystories, fineweb_edu, openwebtext)
DATASETS = {function.__name__: function for function in (pydocs, pystdlib, shakespeare, *STREAMED)}


# ---------------------------------------------------------------- what every Python installation carries

def library_sources():
    """(module name, source) of each module of the standard library but its tests, in the order of their paths."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    paths = sorted(path for path in library.rglob("*.py") if not skipped & set(path.relative_to(library).parts))
    if not paths:
        raise FileNotFoundError(f"this Python has no library sources in {library}: give a text file or folder instead")
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:           # a few files are in Latin-1 on purpose
            continue
        yield ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__"), source


def docstrings():
    """(signature, docstring) of the library's modules, classes and functions, each docstring once. The sources are
    parsed, not imported: no side effects, and the same documents on every machine with this version of Python."""
    seen = set()
    for module, source in library_sources():
        for node in definitions(parse(source)):
            text = (ast.get_docstring(node) or "").strip()
            if text and text not in seen:
                seen.add(text)
                yield signature(node, module), text


def parse(source):
    """The syntax tree of a module. Garbage collection would look through it again and again and find nothing."""
    collecting = gc.isenabled()
    gc.disable()                                 # halves the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # invalid escapes in old modules
            return ast.parse(source)
    finally:
        if collecting:
            gc.enable()


def definitions(node):
    """The module, class and function nodes of a syntax tree, in source order; expressions have none, so are skipped."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from definitions(child)


def signature(node, module):
    """The line of source above a docstring: `def get(self, key, default=None):`, `class Queue:`, or `module queue`."""
    if isinstance(node, ast.Module):
        return f"module {module}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def language_reference():
    """The sections of pydoc's topics. Topics quote each other at length, so a paragraph is kept only where it comes
    first: with copies in both splits, the validation loss would measure memory."""
    from pydoc_data.topics import topics

    seen = set()
    for _, topic in sorted(topics.items()):
        for section in sections(topic):
            paragraphs = [text for text in section.split("\n\n") if text not in seen]
            seen.update(text for text in paragraphs if len(text) > 80)      # shorter ones: "Changed in version 3.8:"
            if any(len(text) > 80 for text in paragraphs):
                yield "\n\n".join(paragraphs)


def sections(text):
    """Cut reStructuredText above each heading (a line underlined by a row of one punctuation character)."""
    lines = text.strip().split("\n")
    starts = [i for i, (line, under) in enumerate(itertools.pairwise(lines))
              if line.strip() and len(under) >= len(line) > 2 and set(under) <= set("*=-~^\"") and len(set(under)) == 1]
    for start, end in zip([0, *starts], [*starts, len(lines)]):
        if section := "\n".join(lines[start:end]).strip():
            yield section


# ---------------------------------------------------------------- from documents to (split, text)

def digest(text):
    return hashlib.sha256(text.encode("utf-8")).digest()


def shuffled(documents):
    """Distinct documents in the order of their hashes: mixed, and the same on every machine."""
    return [text for _, text in sorted({digest(text): text for text in documents}.items())]


def split_by_hash(documents, val_fraction):
    """Each document to a split by its hash alone: copies go together, wherever in a stream they are."""
    for text in documents:
        split = "val" if hash_fraction(text) < val_fraction else "train"
        yield split, text
        yield split, None


def hash_fraction(text):
    """A number in [0, 1) that follows from the text alone, evenly spread over texts."""
    return int.from_bytes(digest(text)[-8:], "big") / 2**64


def split_files(files):
    """Text files, {hash: path}, in the order of their hashes; the last tenth of all bytes is for validation. The file
    on that border is cut in two, so that one file makes two splits as well as a thousand do."""
    ordered = [files[key] for key in sorted(files)]
    border = int((1 - VAL_FRACTION) * sum(path.stat().st_size for path in ordered))
    for path in ordered:
        size = path.stat().st_size
        cut = min(max(border, 0), size)
        for split, start, end in (("train", 0, cut), ("val", cut, size)):
            if start < end:
                yield from ((split, text) for text in read_pieces(path, start, end))
                yield split, None
        border -= size


def read_pieces(path, start, end):
    """The text between two byte offsets, a piece at a time, cut at lines where there are any. An offset inside a
    character moves to its end, so neighbouring ranges share nothing. ValueError naming file and byte if not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        start, end = (skip_character(file, offset) for offset in (start, end))
        file.seek(start)
        while block := file.read(min(PIECE_BYTES, end - (position := file.tell()))):
            block += file.readline(min(PIECE_BYTES, end - file.tell()))
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=file.tell() >= end)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: byte {position - pending + error.start} is "
                                 f"{error.object[error.start]:#04x}; convert it to UTF-8 first") from None
            if text:
                yield text


def skip_character(file, offset):
    """The first offset from here on that is not inside a UTF-8 character (10xxxxxx are the bytes inside one)."""
    file.seek(offset)
    following = file.read(3) if offset else b""
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def file_digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def text_files(path):
    """A file, or the text files in a folder and its subfolders, hidden ones aside. ValueError when there is no text."""
    if path.is_file():
        files = [path]
    else:
        files = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            files += [Path(folder) / name for name in names
                      if not name.startswith(".") and Path(name).suffix.lower() in TEXT_SUFFIXES]
        files = [file for file in files if file.is_file()]          # no broken links, no pipes
        if not files:
            raise ValueError(f"no text in the folder {path}: looked for files that end in {' '.join(TEXT_SUFFIXES)}")
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{path} is empty")
    return sorted(files)


# ---------------------------------------------------------------- the network

def download(url, path):
    """Fetch a URL to a file with a progress bar. ConnectionError off-line."""
    import urllib.request

    from tqdm import tqdm

    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, desc=path.stem, unit="B", unit_scale=True, disable=None) as bar:
                while block := answer.read(2**16):
                    file.write(block)
                    bar.update(len(block))
        if path.stat().st_size < total:
            raise ConnectionError(f"only {path.stat().st_size} of {total} bytes came")
    except OSError as error:
        raise offline(url, error) from None


def stream(repository, **options):
    """The documents of a data set on the Hugging Face hub, one by one as they arrive."""
    return split_by_hash((row["text"] for row in stream_rows(repository, **options)), STREAM_VAL_FRACTION)


def stream_rows(repository, **options):
    """The rows of a data set on the hub, dicts. ConnectionError off-line."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{repository} needs a package: pip install datasets") from None
    try:
        check_online(f"{datasets.config.HF_ENDPOINT}/api/datasets/{repository}")
        yield from datasets.load_dataset(repository, split="train", streaming=True, **options)
    except Exception as error:  # noqa: BLE001  the library raises many kinds, and each means that no data came
        raise offline(repository, error) from None


def check_online(url):
    """Fail at once where `datasets` would retry for half a minute. Any answer will do."""
    import urllib.error
    import urllib.request

    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(url, timeout=30).close()


def offline(source, error):
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConnectionError(f"cannot fetch {source} ({reason}): try again with a network, or take pydocs, pystdlib, "
                           "pydocs_chat or a file of your own, which need none")


# ---------------------------------------------------------------- writing

class TokenWriter:
    """Appends ids to a token file and counts them; `close` fills in the header."""

    def __init__(self, path, vocab_size):
        self.file = path.open("wb")
        self.vocab_size, self.dtype = vocab_size, token_dtype(vocab_size)
        self.file.write(pack_header(vocab_size, 0))
        self.tokens = self.bytes = self.documents = 0
        self.hash = hashlib.sha256()

    def write(self, text, ids):
        """A piece of text and its ids; None and the end token, if there is one, at the end of a document."""
        block = np.array(ids, dtype=self.dtype).tobytes()
        self.file.write(block)
        self.hash.update(block)
        self.tokens += len(ids)
        self.bytes += 0 if text is None else len(text.encode("utf-8"))
        self.documents += text is None

    def close(self):
        self.file.seek(0)
        self.file.write(pack_header(self.vocab_size, self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


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


def encode(pieces, tokenizer):
    """(split, text, ids) of each piece. Without an end token documents stand one behind the other."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in batches(pieces, BATCH_BYTES):
        encoded = iter(tokenizer.encode_batch(text for _, text in batch if text is not None))
        for split, text in batch:
            yield split, text, end if text is None else next(encoded)


def write_tokens(pieces, tokenizer, folder, max_tokens=None):
    """Encode a stream of pieces into folder/train.bin and val.bin, up to the document that reaches max_tokens.
    Returns {split: TokenWriter} with what was counted."""
    from tqdm import tqdm

    writers = {split: TokenWriter(folder / f"{split}.bin", tokenizer.vocab_size) for split in SPLITS}
    written = 0
    with tqdm(total=max_tokens, desc="tokens", unit="", unit_scale=True, delay=2, disable=None) as bar:
        for split, text, ids in encode(pieces, tokenizer):
            writers[split].write(text, ids)
            written += len(ids)
            bar.update(len(ids))
            if text is None and max_tokens is not None and written >= max_tokens:
                break
    for writer in writers.values():
        writer.close()
    return writers


def write_dataset(folder, pieces, tokenizer, vocab_size, max_tokens, facts):
    """Fill a folder: the tokenizer (if "bpe", learned here, from the training split), the token files, meta.json."""
    if tokenizer == "bpe":
        pieces = iter(pieces)
        head = next(batches(pieces, BPE_BYTES), [])
        tokenizer = Tokenizer.train((text for split, text in head if split == "train" and text), vocab_size)
        pieces = itertools.chain(head, pieces)
    write_meta(folder, write_tokens(pieces, tokenizer, folder, max_tokens), tokenizer, facts)


def write_meta(folder, writers, tokenizer, facts):
    """The tokenizer and meta.json, beside the token files that are written; ValueError if a split is empty."""
    counts = {name: {split: getattr(writers[split], name) for split in SPLITS}
              for name in ("tokens", "bytes", "documents")}
    if not all(counts["bytes"].values()):
        raise ValueError(f"{facts['source']} is too short to split: {counts['bytes']['train']} bytes of text for "
                         f"training, {counts['bytes']['val']} for validation")
    hashes = "".join(writers[split].hash.hexdigest() for split in SPLITS)
    meta = facts | {
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **counts,              # tokens include the end token of each document; bytes are the text's in UTF-8, alone
        "fingerprint": hashlib.sha256(f"{tokenizer.vocab_size} {hashes}".encode()).hexdigest()[:16],
        "versions": {"format": VERSION, "python": platform.python_version(), "tokenizers": tokenizers.__version__},
    }
    tokenizer.save_pretrained(folder)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def is_prepared(folder):
    """Whether a folder holds a whole data set: files that belong together and a tokenizer that can be read."""
    try:
        TokenDataset(folder)
        Tokenizer.from_pretrained(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


def make_dataset(folder, fill, is_prepared=is_prepared):
    """Have fill(temporary folder) write a data set and give it its name. Renaming is atomic: whoever is killed, or
    prepares the same at once, leaves either nothing or a whole data set under that name."""
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
            folder.rename(f"{temporary}.old")        # damaged: out of the way
        shutil.rmtree(f"{temporary}.old", ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not is_prepared(folder):      # if it is, another process was faster, with the same result
            raise


def remove_leftovers(root, prefix):
    """Temporary folders of preparations that were killed: a day old, so that none at work is hit."""
    for path in root.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):     # who prepares the same at once may just have renamed it
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- choosing

def prepared_root(root=None):
    """Where data sets are kept: `root`, $UNMASK_DATA, data/prepared, or a cache folder if the repository is read-only."""
    if root is not None:
        return Path(root)
    if "UNMASK_DATA" in os.environ:
        return Path(os.environ["UNMASK_DATA"])
    here = Path(__file__).resolve().parent
    if os.access(here / "prepared" if (here / "prepared").exists() else here, os.W_OK):
        return here / "prepared"
    return Path.home() / ".cache" / "unmask" / "prepared"


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:8]


def file_name(text):
    return re.sub(r"[^\w.-]+", "_", text) or "text"


def did_you_mean(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def find_dataset(dataset):
    """(name, where it comes from, a function that starts its stream of pieces) of a data set's name or a path."""
    dataset = str(dataset)
    if dataset in DATASETS:
        return dataset, DATASETS[dataset].__doc__, DATASETS[dataset]
    path = Path(dataset).expanduser()
    if not dataset or not path.exists():
        from data.chat import CHAT_SETS
        known = [*DATASETS, *CHAT_SETS]
        raise FileNotFoundError(f"no data set, file or folder called {dataset!r}{did_you_mean(dataset, known)} "
                                f"(the data sets are {', '.join(known)})")
    files = {file_digest(file): file for file in text_files(path)}
    # The name holds the content: two files of one name never meet, and a file that changed is prepared again.
    name = f"{file_name(path.resolve().stem)}-{short_hash(b''.join(sorted(files)))}"
    return name, str(path), lambda: split_files(files)


def find_tokenizer(tokenizer, vocab_size):
    """(name, the Tokenizer, or "bpe" for one still to be learned) of a tokenizer, its name or a checkpoint's folder."""
    if isinstance(tokenizer, Tokenizer):
        return short_hash(tokenizer.backend.to_str().encode()), tokenizer
    tokenizer = str(tokenizer)
    if tokenizer == "bpe":
        check_vocab_size(vocab_size)             # now, not after a download
        return f"bpe-{vocab_size}", "bpe"
    if tokenizer == "byte":
        return "byte", Tokenizer.bytes()
    if tokenizer == "gpt2":
        return "gpt2", Tokenizer.gpt2()
    folder = Path(tokenizer).expanduser()
    if not tokenizer or not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer called {tokenizer!r}{did_you_mean(tokenizer, ('bpe', 'byte', 'gpt2'))} "
                                "(take bpe, byte, gpt2 or the folder of a checkpoint)")
    loaded = Tokenizer.from_pretrained(folder)
    return f"{file_name(folder.resolve().name)}-{short_hash(loaded.backend.to_str().encode())}", loaded


def prepare(dataset="pydocs", tokenizer="bpe", vocab_size=2048, max_tokens=None, root=None):
    """The folder (a Path) of a prepared data set, for TokenDataset and Tokenizer.from_pretrained; made if need be.

    dataset: a name in DATASETS, a text file or folder, or chat data as data/chat.py describes it. tokenizer: "bpe"
    (learned from the training split, vocab_size ids), "byte", "gpt2", a checkpoint's folder, or a Tokenizer. max_tokens:
    how much of a streamed text to take. root: where prepared data sets are kept. Raises ValueError, FileNotFoundError
    or another OSError (off-line, disk full).
    """
    from data.chat import is_chat, prepare_chat

    if is_chat(dataset):
        if max_tokens is not None:
            raise ValueError(f"max_tokens bounds text; of conversations take a part by {dataset}[train:1000]")
        return prepare_chat(dataset, tokenizer, root, vocab_size)
    name, source, start = find_dataset(dataset)
    if max_tokens is not None and start not in STREAMED:
        raise ValueError(f"max_tokens bounds what is streamed, as tinystories; {name} is taken whole")
    tokenizer_name, tokenizer = find_tokenizer(tokenizer, vocab_size)
    folder = prepared_root(root) / "-".join([name, tokenizer_name, *([str(max_tokens)] if max_tokens is not None else [])])
    if is_prepared(folder):
        return folder
    if start in STREAMED and max_tokens is None:
        max_tokens = MAX_TOKENS
    facts = {"name": name, "source": source, "tokenizer": tokenizer_name}
    return make_dataset(folder, lambda path: write_dataset(path, start(), tokenizer, vocab_size, max_tokens, facts))


# ---------------------------------------------------------------- the command line

def parse_arguments():
    from data.chat import CHAT_SETS

    names = "\n".join(f"  {name:12} {function.__doc__}" for name, function in (DATASETS | CHAT_SETS).items())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog=f"data sets:\n{names}\n  PATH         a text file or a folder of them; conversations if its "
                                            "name ends in .jsonl (see data/chat.py)",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="NAME_OR_PATH", help="a data set below, a text file or a folder of them")
    parser.add_argument("--tokenizer", default="bpe", help="bpe (learned here), byte, gpt2, or a checkpoint's folder")
    parser.add_argument("--vocab_size", type=int, default=2048, help="ids of a bpe, special tokens included (2048)")
    parser.add_argument("--max_tokens", type=int, help=f"how much of a streamed data set to take ({MAX_TOKENS:,})")
    parser.error = fail                  # argparse would print its usage, too
    return parser.parse_args()


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main():
    arguments = vars(parse_arguments())
    try:
        folder = prepare(**arguments)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    meta = TokenDataset(folder).meta
    for split in SPLITS:
        print(f"{split:5} {meta['tokens'][split]:>13,} tokens {meta['bytes'][split]:>13,} bytes")
    print(folder)


if __name__ == "__main__":
    main()
