"""Text to token files: python data/prepare.py NAME_OR_PATH [--tokenizer=bpe] [--vocab_size=2048]

Writes data/prepared/<name>-<tokenizer>/ with train.bin, val.bin (see loader.py), meta.json and the
tokenizer; of conversations also what chat.py reads. A new data set is a function that yields pieces
(see files.py) or conversations (see chat_sets.py), and a row of the table here or there. The first
line of its docstring is what --help says of it.
"""
import argparse
import functools
import os
import platform
import re
import sys
from pathlib import Path

if __name__ == "__main__":      # `python data/prepare.py` has data/ on its path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.chat import ChatDataset
from data.chat_sets import CHAT_SETS, conversations, find_parts, is_chat
from data.files import did_you_mean, file_digest, file_name, short_hash, split_files, text_files
from data.hub import fineweb_edu, openwebtext, shakespeare, tinystories
from data.loader import SPLITS, TokenDataset
from data.python_docs import pydocs, pystdlib
from data.sudoku import SETS as SUDOKU
from data.sudoku import SHAPES
from data.tales import tales
from data.tokenizer import Tokenizer, check_vocab_size
from data.writer import RENDERING, make_dataset, write_conversations, write_dataset

DATASETS = {
    "tales": tales,
    **SUDOKU,
    "pydocs": pydocs,
    "pystdlib": pystdlib,
    "shakespeare": shakespeare,
    "tinystories": tinystories,
    "fineweb_edu": fineweb_edu,
    "openwebtext": openwebtext,
}
STREAMED = (tinystories, fineweb_edu, openwebtext)
# What is generated follows from files in data/.
GENERATORS = {"tales": "tales*.py", "tales_chat": "tales*.py", **dict.fromkeys(SHAPES, "sudoku.py")}
FROM_PYTHON = ("pydocs", "pydocs_chat", "pystdlib")
MAX_TOKENS = 100_000_000        # of a streamed data set, unless max_tokens says otherwise


def prepare(name_or_path="tales", tokenizer="bpe", vocab_size=2048, max_tokens=None, root=None):
    """The folder (a Path) of a prepared data set, for TokenDataset and Tokenizer.from_pretrained;
    made if need be.

    name_or_path    a name in DATASETS, a text file or folder, or chat data as data/chat_sets.py
                describes it.
    tokenizer   "bpe" (learned from the training split, vocab_size ids), "byte", "gpt2", a
                checkpoint's folder or GGUF file, or a Tokenizer. Sudoku grids bring their own, the
                digits: they take "bpe" for it, and a Tokenizer or folder that is equal.
    max_tokens  how much of a streamed text to take.
    root        where prepared data sets are kept.
    Raises ValueError, FileNotFoundError or another OSError (off-line, disk full).
    """
    if is_chat(name_or_path):
        if max_tokens is not None:
            raise ValueError("max_tokens bounds text; of conversations take a part by "
                             f"{name_or_path}[train:1000]")
        return prepare_chat(name_or_path, tokenizer, root, vocab_size)
    name, source, read = find_dataset(name_or_path)
    if max_tokens is not None and read not in STREAMED:
        raise ValueError(f"max_tokens bounds what is streamed, as tinystories; {name} is taken "
                         "whole")
    if name in SHAPES:
        tokenizer_name, tokenizer = digits_tokenizer(name, tokenizer, vocab_size)
    else:
        tokenizer_name, tokenizer = find_tokenizer(tokenizer, vocab_size)
    folder_name = f"{name}-{tokenizer_name}"
    if max_tokens is not None:
        folder_name = f"{folder_name}-{max_tokens}"
    folder, generator = prepared_root(root) / folder_name, generator_of([name])
    holds = functools.partial(holds_text, generator=generator)
    if holds(folder):
        return folder
    if isinstance(tokenizer, Tokenizer) and max_tokens is None:
        # A model that was trained here brings the pieces that were learned here.
        for learned in prepared_root(root).glob(f"{name}-bpe-*"):
            is_whole = re.fullmatch(r"\d+", learned.name.removeprefix(f"{name}-bpe-"))
            if is_whole and holds(learned) and same_pieces(learned, tokenizer):
                return learned
    if read in STREAMED and max_tokens is None:
        max_tokens = MAX_TOKENS
    facts = {"name": name, "source": source, "tokenizer": tokenizer_name, "generator": generator}

    def fill(temporary):
        write_dataset(temporary, read(), tokenizer, vocab_size, max_tokens, facts)

    return make_dataset(folder, fill, holds)


def prepare_chat(dataset, tokenizer, root=None, vocab_size=2048):
    """The folder (a Path) of prepared conversations, for ChatDataset and Tokenizer.from_pretrained;
    made if need be.

    dataset: see data/chat_sets.py. tokenizer: a Tokenizer with its chat template, or whatever
    `prepare` takes. Raises ValueError (a broken line, an unknown role, no responses),
    FileNotFoundError or another OSError (off-line).
    """
    parts = find_parts(dataset, prepared_root(root))
    tokenizer_name, tokenizer = find_tokenizer(tokenizer, vocab_size)
    name = file_name("+".join(part.label() for part in parts))
    if tokenizer != "bpe":
        tokenizer.note_missing_template()
        tokenizer.add_chat_tokens()
        # The template is the tokenizer's as much as its vocabulary is.
        content = f"{contents(tokenizer)}{tokenizer.chat_templates}"
        tokenizer_name = short_hash(content.encode())
    folder = prepared_root(root) / f"{name}-{tokenizer_name}"
    generator = generator_of(part.name for part in parts)
    holds = functools.partial(holds_conversations, generator=generator)
    if holds(folder):
        return folder
    facts = {"name": name, "source": str(dataset), "tokenizer": tokenizer_name,
             "generator": generator}

    def fill(temporary):
        rows, learned = conversations(parts), tokenizer
        if tokenizer == "bpe":
            rows = list(rows)           # a mixture that is streamed comes with its own tokenizer
            learned = learn_tokenizer(rows, vocab_size)
        write_conversations(temporary, rows, learned, facts)

    return make_dataset(folder, fill, holds)


def learn_tokenizer(rows, vocab_size):
    """A BPE learned from what is said in the training conversations, (split, messages) each."""
    texts = []
    for split, messages in rows:
        if split == "train":
            texts += [message["content"] for message in messages]
    return Tokenizer.train(texts, vocab_size)


# --------------------------------------------------------------------------------------------------
# What was asked for


def find_dataset(dataset):
    """(name, where it comes from, a function that gives an iterator of its pieces) of a data set's
    name or a path. FileNotFoundError for neither."""
    dataset = str(dataset)
    if dataset in DATASETS:
        return dataset, DATASETS[dataset].__doc__, DATASETS[dataset]
    path = Path(dataset).expanduser()
    if not dataset or not path.exists():
        known = [*DATASETS, *CHAT_SETS]
        raise FileNotFoundError(f"no data set, file or folder called {dataset!r}"
                                f"{did_you_mean(dataset, known)} (the data sets are "
                                f"{', '.join(known)})")
    files = {file_digest(file): file for file in text_files(path)}
    # The name holds the content: two files of one name never meet, and a file that changed is
    # prepared again.
    name = f"{file_name(path.resolve().stem)}-{short_hash(b''.join(sorted(files)))}"
    return name, str(path), functools.partial(split_files, files)


def find_tokenizer(tokenizer, vocab_size):
    """(name, the Tokenizer, or "bpe" for one still to be learned) of a tokenizer, its name or a
    checkpoint's folder. FileNotFoundError for none of these."""
    if isinstance(tokenizer, Tokenizer):
        return short_hash(contents(tokenizer).encode()), tokenizer
    tokenizer = str(tokenizer)
    if tokenizer == "bpe":
        check_vocab_size(vocab_size)             # now, not after a download
        return f"bpe-{vocab_size}", "bpe"
    if tokenizer == "byte":
        return "byte", Tokenizer.bytes()
    if tokenizer == "gpt2":
        return "gpt2", Tokenizer.gpt2()
    folder = Path(tokenizer).expanduser()
    if not tokenizer or not folder.exists():
        hint = did_you_mean(tokenizer, ("bpe", "byte", "gpt2"))
        raise FileNotFoundError(f"no tokenizer called {tokenizer!r}{hint} (take bpe, byte, gpt2 or "
                                "the folder of a checkpoint)")
    loaded = Tokenizer.from_pretrained(folder)
    content = short_hash(contents(loaded).encode())
    return f"{file_name(folder.resolve().name)}-{content}", loaded


def contents(tokenizer):
    """What a tokenizer makes of a text, as text: its vocabulary and rules, and which of its tokens
    end a text, pad and mask. A base and its chat model often differ in the latter alone."""
    roles = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
             tokenizer.bos_token_id)
    return f"{tokenizer.backend.to_str()}{roles}"


def digits_tokenizer(name, tokenizer, vocab_size):
    """("digits", the Tokenizer) of a set of Sudoku grids. ValueError where another tokenizer was
    asked for."""
    digits = Tokenizer.characters(SHAPES[name].digits)
    equal = tokenizer == "bpe"                          # the default: nothing was asked for
    if tokenizer not in ("bpe", "byte", "gpt2"):
        _, asked = find_tokenizer(tokenizer, vocab_size)
        equal = asked.backend.to_str() == digits.backend.to_str()
    if not equal:
        raise ValueError(f"{name} has a tokenizer of its own, a token for each of its digits: "
                         "leave --tokenizer away (a checkpoint with another cannot read grids)")
    return "digits", digits


def prepared_root(root=None):
    """Where data sets are kept: `root`, $UNMASK_DATA, data/prepared, or a cache folder if the
    repository is read-only."""
    if root is not None:
        return Path(root)
    if "UNMASK_DATA" in os.environ:
        return Path(os.environ["UNMASK_DATA"])
    here = Path(__file__).resolve().parent
    prepared = here / "prepared"
    if os.access(prepared if prepared.exists() else here, os.W_OK):
        return prepared
    return Path.home() / ".cache" / "unmask" / "prepared"


def generator_of(names):
    """What data sets follow from besides their names, as text: the files in data/ that generate
    them, Python's version for its own documentation; "" for what is read. Who changes the grammar
    of the tales is given new tales."""
    facts = []
    for name in names:
        if name in GENERATORS:
            files = sorted(Path(__file__).parent.glob(GENERATORS[name]))
            facts.append(short_hash(b"".join(file.read_bytes() for file in files)))
        elif name in FROM_PYTHON:
            facts.append(f"Python {platform.python_version()}")
    return ", ".join(facts)


def holds_text(folder, generator):
    """Whether a folder holds a whole data set: files that belong together, made by this generator,
    and a tokenizer that can be read."""
    try:
        meta = TokenDataset(folder).meta
        Tokenizer.from_pretrained(folder)
    except (FileNotFoundError, ValueError):
        return False
    return meta.get("generator") == generator


def same_pieces(folder, tokenizer):
    """Whether a data set was prepared with an equal tokenizer."""
    return contents(Tokenizer.from_pretrained(folder)) == contents(tokenizer)


def holds_conversations(folder, generator):
    """The same for conversations, marked by the rules of today."""
    try:
        data = ChatDataset(folder, seq_len=2**40, padding="hidden")
        Tokenizer.from_pretrained(folder)
    except (FileNotFoundError, ValueError):
        return False
    return data.meta.get("rendering") == RENDERING and data.meta.get("generator") == generator


# --------------------------------------------------------------------------------------------------
# The command line


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
        tokens, num_bytes = meta["tokens"][split], meta["bytes"][split]
        print(f"{split:5} {tokens:>13,} tokens {num_bytes:>13,} bytes")
    print(folder)


def parse_arguments():
    """The command line's arguments, under the names that `prepare` has for them."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=describe_datasets(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name_or_path", metavar="NAME_OR_PATH",
                        help="a data set below, a text file or a folder of them")
    parser.add_argument("--tokenizer", default="bpe",
                        help="bpe (learned here), byte, gpt2, or a checkpoint's folder")
    parser.add_argument("--vocab_size", type=int, default=2048,
                        help="ids of a bpe, special tokens included (2048)")
    parser.add_argument("--max_tokens", type=int,
                        help=f"how much of a streamed data set to take ({MAX_TOKENS:,})")
    parser.error = fail                  # argparse would print its usage, too
    return parser.parse_args()


def describe_datasets():
    """The end of --help: a line a data set."""
    lines = ["data sets:"]
    for name, function in (DATASETS | CHAT_SETS).items():
        lines.append(f"  {name:12} {function.__doc__}")
    lines.append("  gym:NAME     questions of reasoning-gym with their answers: generated, see "
                 "data/gym.py")
    lines.append("  PATH         a text file or a folder of them; conversations if its name ends "
                 "in .jsonl (see data/chat_sets.py)")
    return "\n".join(lines)


def fail(message):
    """End with one line and status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
