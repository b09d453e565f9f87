"""Data sets that come over the network, row by row as they arrive. Off-line each is one
ConnectionError that says what there is without a network."""
import contextlib
import shutil
import tempfile
from pathlib import Path

from data.files import split_by_hash, split_files

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
STREAM_VAL_FRACTION = 0.01      # of a streamed text: about 4 MB


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


def download(url, path):
    """Fetch a URL to a file with a progress bar. ConnectionError off-line."""
    import urllib.request

    from tqdm import tqdm

    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(file, "write", total or None, desc=path.stem,
                               disable=None) as sink:
                shutil.copyfileobj(answer, sink)
        if path.stat().st_size < total:
            raise ConnectionError(f"only {path.stat().st_size} of {total} bytes came")
    except OSError as error:
        raise offline(url, error) from None


def stream(repository, **options):
    """Pieces of the documents of a data set on the Hugging Face hub, as they arrive."""
    documents = (row["text"] for row in stream_rows(repository, **options))
    return split_by_hash(documents, STREAM_VAL_FRACTION)


def stream_rows(repository, **options):
    """The rows of a data set on the hub, dicts. ConnectionError off-line, ValueError without the
    package that reads it."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{repository} needs a package: pip install datasets") from None
    try:
        check_online(f"{datasets.config.HF_ENDPOINT}/api/datasets/{repository}")
        yield from datasets.load_dataset(repository, split="train", streaming=True, **options)
    except Exception as error:  # noqa: BLE001  many kinds, and each means that no data came
        raise offline(repository, error) from None


def check_online(url):
    """Fail at once where `datasets` would retry for half a minute. Any answer will do."""
    import urllib.error
    import urllib.request

    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(url, timeout=30).close()


def offline(source, error):
    """The ConnectionError for a source that could not be read."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConnectionError(f"cannot fetch {source} ({reason}): try again with a network, or take "
                           "pydocs, pystdlib, pydocs_chat or a file of your own, which need none")
