"""Text files and folders as a stream of pieces, and how documents are divided into two splits.

A corpus goes through the whole of data/ as pieces: (split, text) is a piece of a document, (split,
None) the end of one. So memory holds a few pieces, never the corpus.

No text is in both splits. A document goes to the validation split by its hash, so a copy goes where
the original went; a text file or folder gives its last tenth.
"""
import codecs
import difflib
import hashlib
import os
import re
from pathlib import Path

PIECE_BYTES = 2**18     # what is read and encoded together of a long file
VAL_FRACTION = 0.1      # for validation, of a data set that this machine holds
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".json", ".jsonl", ".csv",
                 ".tsv", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".sh")

# --------------------------------------------------------------------------------------------------
# Names and hashes


def digest(text):
    """The SHA-256 of a text, 32 bytes."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def file_digest(path):
    """The SHA-256 of a file, 32 bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def short_hash(content):
    """The first 8 hexadecimal digits of the SHA-256 of some bytes: for names of folders."""
    return hashlib.sha256(content).hexdigest()[:8]


def file_name(text):
    """The text with whatever does not belong into a file's name replaced."""
    return re.sub(r"[^\w.-]+", "_", text) or "text"


def did_you_mean(name, known):
    """The end of an error about an unknown name: "; did you mean 'pydocs'?", or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def hash_fraction(text):
    """A number in [0, 1) that follows from the text alone, evenly spread over texts."""
    return int.from_bytes(digest(text)[-8:], "big") / 2**64


# --------------------------------------------------------------------------------------------------
# Documents


def shuffled(documents):
    """Distinct documents in the order of their hashes: mixed, and the same on every machine."""
    by_hash = {digest(text): text for text in documents}
    return [by_hash[key] for key in sorted(by_hash)]


def split_by_hash(documents, val_fraction):
    """Pieces of whole documents, each in a split by its hash alone: copies go together, wherever
    in a stream they are."""
    for text in documents:
        split = "val" if hash_fraction(text) < val_fraction else "train"
        yield split, text
        yield split, None


# --------------------------------------------------------------------------------------------------
# Files


def text_files(path):
    """[path] of a file, or the text files in a folder and its subfolders, hidden ones aside,
    sorted. ValueError when there is no text."""
    files = [path] if path.is_file() else files_in_folder(path)
    if not files:
        raise ValueError(f"no text in the folder {path}: looked for files that end in "
                         f"{' '.join(TEXT_SUFFIXES)}")
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{path} is empty")
    return sorted(files)


def files_in_folder(folder):
    """The files of a folder and its subfolders whose names end as text files do."""
    files = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            file = Path(parent) / name
            is_text = file.suffix.lower() in TEXT_SUFFIXES and not name.startswith(".")
            if is_text and file.is_file():              # no broken links, no pipes
                files.append(file)
    return files


def split_files(files):
    """Pieces of text files, {hash: path}, in the order of their hashes; the last tenth of all bytes
    is for validation. The file on that border is cut in two, so that one file makes two splits as
    well as a thousand do."""
    ordered = [files[key] for key in sorted(files)]
    border = int((1 - VAL_FRACTION) * sum(path.stat().st_size for path in ordered))
    for path in ordered:
        size = path.stat().st_size
        cut = min(max(border, 0), size)
        for split, begin, end in (("train", 0, cut), ("val", cut, size)):
            if begin == end:
                continue
            for text in read_pieces(path, begin, end):
                yield split, text
            yield split, None
        border -= size


def read_pieces(path, begin, end):
    """The text between two byte offsets, a piece at a time, cut at lines where there are any.

    An offset inside a character moves to its end, so neighbouring ranges share nothing. ValueError
    naming file and byte if it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        position = skip_character(file, begin)
        end = skip_character(file, end)
        file.seek(position)
        while position < end:
            block = file.read(min(PIECE_BYTES, end - position))
            block += file.readline(min(PIECE_BYTES, end - position - len(block)))
            if not block:                               # the file has become shorter meanwhile
                return
            pending = len(decoder.getstate()[0])        # bytes of a character that began before
            try:
                text = decoder.decode(block, final=position + len(block) >= end)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: byte "
                                 f"{position - pending + error.start} is "
                                 f"{error.object[error.start]:#04x}; convert it to UTF-8 "
                                 "first") from None
            position += len(block)
            if text:
                yield text


def skip_character(file, offset):
    """The first offset from here on that is not inside a UTF-8 character (10xxxxxx are the bytes
    inside one), nor in a byte order mark at the beginning, which is no text."""
    if offset < len(codecs.BOM_UTF8):
        file.seek(0)
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            return len(codecs.BOM_UTF8)
    if offset == 0:
        return 0
    file.seek(offset)
    for byte in file.read(3):
        if byte & 0xC0 != 0x80:
            break
        offset += 1
    return offset
