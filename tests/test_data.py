"""data/prepare.py and what it is made of, data/loader.py: what is written is what was read, splits
do not meet, batches are pure."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from runs import refused
from scripts import run

from data import files, hub, python_docs, writer
from data import prepare as prepare_module
from data.loader import HEADER, TokenDataset, apart, pack_header
from data.prepare import generator_of, prepare
from data.tokenizer import Tokenizer

SCRIPT = Path(prepare_module.__file__)
ALPHABET = "abc def ghi jkl mno pqr stu vwx yz .,;\n é中🙂"


def words(seed, length):
    rng = random.Random(seed)
    return "".join(rng.choice(ALPHABET) for _ in range(length))


def text_of(folder, split):
    """The text of a split, documents joined by the end token."""
    tokenizer = Tokenizer.from_pretrained(folder)
    return tokenizer.decode(getattr(TokenDataset(folder), split))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(words(0, 20_000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def docstrings():
    """Those of every third module of the library, of bisect and of asyncio: all take four seconds.
    Read once, and kept for the tests that go through them again."""
    with pytest.MonkeyPatch.context() as patch:
        sources = list(python_docs.library_sources())
        some = sources[::3] + [pair for pair in sources if pair[0] in ("bisect", "asyncio.tasks")]
        patch.setattr(python_docs, "library_sources", lambda: some)
        found = list(python_docs.docstrings())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "docstrings", lambda: found)
        yield found


@pytest.fixture(scope="module")
def pydocs(root, docstrings):
    return prepare("pydocs", root=root)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A data set whose tokens are their own positions: 5000 for training, 500 for validation."""
    folder = tmp_path_factory.mktemp("numbers")
    for split, n in (("train", 5000), ("val", 500)):
        ids = np.arange(n, dtype="<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(pack_header(6000, n) + ids)
    meta = {"name": "numbers", "vocab_size": 6000, "mask_token_id": None, "eos_token_id": 0,
            "fingerprint": "x", "tokens": {"train": 5000, "val": 500},
            "bytes": {"train": 20000, "val": 1000}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenDataset(folder)


# --------------------------------------------------------------------------------------------------
# Embedded data sets


def test_pydocs(pydocs):
    data = TokenDataset(pydocs)
    assert pydocs.name == "pydocs-bpe-2048"
    assert data.vocab_size == 2048 == Tokenizer.from_pretrained(pydocs).vocab_size
    assert 750_000 < data.meta["bytes"]["train"] < 2_000_000
    share = data.meta["bytes"]["val"] / sum(data.meta["bytes"].values())
    assert 0.05 < share < 0.15
    for split in ("train", "val"):
        documents = [text for where, text in python_docs.pydocs()
                     if where == split and text is not None]
        assert data.meta["bytes"][split] == sum(len(text.encode()) for text in documents)
        assert data.meta["documents"][split] == len(documents)
        assert text_of(pydocs, split) == "".join(f"{text}<|endoftext|>" for text in documents)
        assert getattr(data, split).max() < data.vocab_size
    assert 2.0 < data.bytes_per_token("val") < 5.0
    assert data.eos_token_id != data.mask_token_id
    assert not (np.asarray(data.train) == data.mask_token_id).any()
    assert (np.asarray(data.train) == data.eos_token_id).sum() == data.meta["documents"]["train"]


def test_pydocs_splits_do_not_meet(docstrings):
    documents = {"train": [], "val": []}
    for split, text in python_docs.pydocs():
        if text is not None:
            documents[split].append(text)
    everything = documents["train"] + documents["val"]
    assert len(set(everything)) == len(everything) > 2000
    bodies, paragraphs = {}, {}
    for split, texts in documents.items():
        bodies[split] = {text.split("\n", 1)[-1] for text in texts}         # signature aside
        paragraphs[split] = {part for text in texts for part in text.split("\n\n")
                             if len(part) > 80}
    assert not bodies["train"] & bodies["val"]
    shared = paragraphs["train"] & paragraphs["val"]                # some docstrings quote others
    assert sum(map(len, shared)) < 0.03 * sum(map(len, paragraphs["val"]))


def test_docstrings_read_naturally(docstrings):
    found = {text: signature for signature, text in docstrings}
    bisect = next(text for text in found
                  if text.startswith("Insert item x in list a, and keep it sorted"))
    assert found[bisect].startswith("def insort_right(a, x, lo=0, hi=None")
    assert "\n    " not in bisect.split("\n\n")[0]
    assert any(signature.startswith("class ") for signature in found.values())
    assert any(signature == "module bisect" for signature in found.values())
    assert any(signature.startswith("async def ") for signature in found.values())


def test_pystdlib_is_the_library_without_tests():
    names = [name for name, _ in python_docs.library_sources()]
    assert names == list(dict.fromkeys(names))
    assert {"bisect", "json", "json.decoder"} <= set(names)
    assert not [name for name in names if "test" in name.split(".") or "site-packages" in name]


def test_sections():
    text = ("Title\n*****\n\nIntro - with dash\n\nPart one\n========\n\n"
            "Text\n-----\n\nrow | of\n----+---\n")
    assert list(python_docs.sections(text)) == ["Title\n*****\n\nIntro - with dash",
                                                "Part one\n========",
                                                "Text\n-----\n\nrow | of\n----+---"]


# --------------------------------------------------------------------------------------------------
# Files and folders


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_file_is_cut_at_nine_tenths(book, tmp_path, tokenizer):
    folder = prepare(book, tokenizer, vocab_size=300, root=tmp_path / "prepared")
    text = book.read_text(encoding="utf-8")
    train = text_of(folder, "train").removesuffix("<|endoftext|>")
    val = text_of(folder, "val").removesuffix("<|endoftext|>")
    assert train + val == text
    data = TokenDataset(folder)
    assert data.meta["bytes"] == {"train": len(train.encode()), "val": len(val.encode())}
    assert abs(len(train.encode()) - 0.9 * len(text.encode())) < 4
    assert data.bytes_per_token("val") == len(val.encode()) / len(data.val)
    if tokenizer == "byte":
        assert bytes(data.train[:-1].astype(np.uint8)) == train.encode()
        assert data.train[-1] == data.eos_token_id == 256


def test_pieces_join_without_a_seam(tmp_path, monkeypatch):
    """Whatever the size of the pieces and wherever the cut falls, the text is read once and
    whole."""
    path = tmp_path / "text"
    for seed in range(20):
        text = words(seed, 200)
        path.write_text(text, encoding="utf-8", newline="")
        size = path.stat().st_size
        monkeypatch.setattr(files, "PIECE_BYTES", 1 + seed)
        for cut in range(0, size + 1, 7):
            head = "".join(files.read_pieces(path, 0, cut))
            tail = "".join(files.read_pieces(path, cut, size))
            assert head + tail == text and abs(len(head.encode()) - cut) <= 3


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Some editors write it at the beginning of a file."""
    path = tmp_path / "text.txt"
    path.write_text("één", encoding="utf-8-sig")
    size = path.stat().st_size
    for cut in range(size + 1):
        head = "".join(files.read_pieces(path, 0, cut))
        assert head + "".join(files.read_pieces(path, cut, size)) == "één"


def test_the_offset_of_a_fault_between_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 4)
    # read as 4 + 4 bytes, then the fault
    (tmp_path / "x.txt").write_bytes(b"a" * 7 + b"\xc3" + b"(" * 20)
    with pytest.raises(ValueError, match="byte 7 is 0xc3"):
        prepare(tmp_path / "x.txt", "byte", root=tmp_path)


def test_a_folder(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    texts = {f"deep/er/{i}.md": words(i, 500 + 100 * i) for i in range(20)} | {
        "copy.md": words(3, 800),
        "a.py": "x = 1\n",
    }
    others = {".hidden.txt": "secret", ".git/config.txt": "secret", "image.png": "\ud800"}
    for name, text in (texts | others).items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    prepared = prepare(folder, "byte", root=tmp_path / "prepared")
    train = text_of(prepared, "train").split("<|endoftext|>")[:-1]
    val = text_of(prepared, "val").split("<|endoftext|>")[:-1]
    if len(train) + len(val) > len(set(texts.values())):  # the file on the border was cut
        train[-1] += val.pop(0)
    assert sorted(train + val) == sorted(set(texts.values()))  # the copy is there once
    assert prepared.name.startswith("notes-") and prepared.name.endswith("-byte")
    (folder / "a.py").write_text("x = 2\n")
    # changed, so prepared again
    assert prepare(folder, "byte", root=tmp_path / "prepared") != prepared


def test_two_files_of_one_name(tmp_path):
    folders = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "same.txt").write_text(words(i, 1000))
        folders.append(prepare(tmp_path / str(i) / "same.txt", "byte", root=tmp_path / "prepared"))
    assert folders[0] != folders[1]
    assert TokenDataset(folders[0]).fingerprint != TokenDataset(folders[1]).fingerprint


def test_control_tokens_in_a_corpus_stay_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a<|endoftext|>b<|mask|>c " * 100)
    for tokenizer in ("byte", "bpe"):
        data = TokenDataset(prepare(path, tokenizer, root=tmp_path / "prepared"))
        assert (np.asarray(data.train) == data.eos_token_id).sum() == 1
        assert data.mask_token_id not in data.train


def test_a_mask_that_is_no_special_token_stays_text_in_a_corpus(tmp_path):
    """The library finds an added token that is not special in text, whatever one says."""
    tokenizer = Tokenizer.train(["a b " * 50], 270)         # not bytes alone: those need no library
    tokenizer.backend.add_tokens([tokenizers.AddedToken("<|m|>", special=False, normalized=False)])
    tokenizer = Tokenizer(tokenizer.backend, {"eos_token": "<|endoftext|>", "mask_token": "<|m|>"})
    path = tmp_path / "x.txt"
    path.write_text("a<|m|>b " * 100)
    folder = prepare(path, tokenizer, root=tmp_path / "prepared")
    data = TokenDataset(folder)
    assert data.mask_token_id == tokenizer.vocab_size - 1 and data.mask_token_id not in data.train
    assert text_of(folder, "train").startswith("a<|m|>b a<|m|>b")


def test_the_bpe_has_not_seen_the_validation_split(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("abc " * 900 + "xyz " * 90)  # the last tenth has other words
    folder = prepare(path, vocab_size=300, root=tmp_path)
    vocab = Tokenizer.from_pretrained(folder).backend.get_vocab()
    assert any("bc" in piece for piece in vocab) and not any("yz" in piece for piece in vocab)


def test_a_checkpoint_tokenizer_of_many_ids(book, tmp_path):
    vocab = Tokenizer.bytes().backend.get_vocab(with_added_tokens=False) | {
        f"<unused {i}>": i for i in range(256, 70_000)
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    Tokenizer(backend, {"eos_token": "<|endoftext|>"}).save_pretrained(tmp_path / "checkpoint")
    folder = prepare(book, tmp_path / "checkpoint", root=tmp_path / "prepared")
    data = TokenDataset(folder)
    assert data.vocab_size == 70_001 and data.train.dtype == np.uint32
    assert (data.train[-1], data.mask_token_id) == (70_000, None)
    joined = text_of(folder, "train") + text_of(folder, "val")
    assert joined.replace("<|endoftext|>", "") == book.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Prepared once, whole or not at all


def test_prepared_once(book, tmp_path, monkeypatch):
    folder = prepare(book, "byte", root=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_dataset", None)  # would fail if called
        assert prepare(book, "byte", root=tmp_path) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_pieces_that_were_learned_here_are_known_again(book, tmp_path):
    """A model's own tokenizer prepares nothing anew where it was learned; another one does."""
    folder = prepare(name_or_path=book, tokenizer="bpe", vocab_size=300, root=tmp_path / "data")
    model = tmp_path / "model"
    Tokenizer.from_pretrained(folder).save_pretrained(model)
    assert prepare(book, model, root=tmp_path / "data") == folder
    Tokenizer.train(["other words of another book"] * 9, 290).save_pretrained(model)
    other = prepare(book, model, root=tmp_path / "data")
    assert other != folder
    assert TokenDataset(other).vocab_size < TokenDataset(folder).vocab_size


def test_a_part_of_a_stream_does_not_stand_for_all_of_it(tmp_path, monkeypatch):
    """What was prepared with --max_tokens is another data set, whoever learned the pieces there."""
    documents = [words(i, 300) for i in range(400)]
    monkeypatch.setattr(hub, "stream", lambda repository: files.split_by_hash(documents, 0.1))
    part = prepare("tinystories", vocab_size=300, max_tokens=30_000, root=tmp_path)
    tokenizer = Tokenizer.from_pretrained(part)
    whole = prepare("tinystories", tokenizer, root=tmp_path)
    assert whole != part
    assert len(TokenDataset(whole).train) > 2 * len(TokenDataset(part).train)


def test_a_tokenizer_with_another_end_of_text_prepares_anew(book, tmp_path):
    """A base and its chat model share all tokens and differ in which of them ends a text."""
    kinds, found = [Tokenizer.bytes(), Tokenizer.bytes()], []
    kinds[1].roles = {**kinds[1].roles, "eos_token": "<|im_end|>"}
    kinds[1].save_pretrained(tmp_path / "chat")
    kinds[1] = Tokenizer.from_pretrained(tmp_path / "chat")
    talk = tmp_path / "talk.jsonl"
    talk.write_text("".join(f'{{"prompt": "{n}", "response": "so"}}\n' for n in range(40)))
    for dataset in (book, str(talk)):
        for tokenizer in kinds:
            folder = prepare(dataset, tokenizer, root=tmp_path / "data")
            found.append(TokenDataset(folder).eos_token_id)
            assert Tokenizer.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    assert found == [256, 259, 256, 259]


def test_who_changes_a_generator_is_given_new_texts(tmp_path, monkeypatch):
    folder = prepare("sudoku4", root=tmp_path)
    made = (folder / "train.bin").stat().st_mtime_ns
    prepare("sudoku4", root=tmp_path)
    assert (folder / "train.bin").stat().st_mtime_ns == made
    changed = tmp_path / "data" / "prepare.py"
    changed.parent.mkdir()
    (changed.parent / "sudoku.py").write_text("# other grids")
    monkeypatch.setattr(prepare_module, "__file__", str(changed))
    assert prepare("sudoku4", root=tmp_path) == folder
    assert (folder / "train.bin").stat().st_mtime_ns != made


def test_what_prepared_texts_follow_from():
    grids, tales = generator_of(["sudoku6"]), generator_of(["tales"])
    assert grids != tales and "" not in (grids, tales)
    assert generator_of(["tales_chat", "pydocs_chat"]).startswith(f"{tales}, Python 3.")
    assert generator_of(["shakespeare", "some.jsonl"]) == ""


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer.json"])
def test_damage_is_repaired(book, tmp_path, name):
    folder = prepare(book, "byte", root=tmp_path)
    whole = (folder / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", None):
        (folder / name).unlink()
        if damaged is not None:
            (folder / name).write_bytes(damaged)
        assert prepare(book, "byte", root=tmp_path) == folder
        assert (folder / name).read_bytes() == whole  # deterministic, too
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt", folder.name}


def test_a_failure_leaves_nothing(book, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.TokenWriter, "close", full)
    with pytest.raises(OSError, match="No space"):
        prepare(book, "byte", root=tmp_path / "prepared")
    assert not list((tmp_path / "prepared").iterdir())


def test_killed_at_any_moment(book, tmp_path):
    """Kill at each of several delays: the name is either absent or whole, and preparing again
    works."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from data import files, prepare, writer\n"
        "write = writer.TokenWriter.write\n"
        "def slow(self, *arguments): time.sleep(0.02); write(self, *arguments)\n"
        "writer.TokenWriter.write, files.PIECE_BYTES = slow, 1000\n"
        "print('go', flush=True); prepare.prepare(sys.argv[2], 'byte', root=sys.argv[3])"
    )
    root = tmp_path / "prepared"
    command = [sys.executable, "-c", code, str(SCRIPT.parent.parent), str(book), str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.time() + 20
    while not list(root.glob("**/train.bin")) and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = list(root.iterdir())
    assert left and all(path.name.startswith(".") for path in left)  # only a temporary folder
    folder = prepare(book, "byte", root=root)
    assert text_of(folder, "train")
    os.utime(left[0], (0, 0))  # as if a day had passed
    (folder / "meta.json").unlink()
    prepare(book, "byte", root=root)
    assert [path.name for path in root.iterdir()] == [folder.name]


def test_leftover_that_vanishes(tmp_path):
    """Whoever prepares the same at once renames its folder between our listing and our stat: to
    stat, a dangling link."""
    (tmp_path / ".book-gone").symlink_to(tmp_path / "nowhere")
    writer.remove_leftovers(tmp_path, ".book-")


def test_many_at_once(book, tmp_path):
    results, errors = [], []

    def work():
        try:
            results.append(prepare(book, "byte", root=tmp_path))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set(results)) == 1 and TokenDataset(results[0])
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt", results[0].name}


def test_streamed_documents(tmp_path, monkeypatch):
    """What `datasets` streams goes through in batches, bounded by max_tokens; copies land in one
    split."""
    documents = [words(i % 900, 300) for i in range(1000)]
    taken = []

    def rows():
        for text in documents * 10:
            taken.append(text)
            yield text

    monkeypatch.setattr(writer, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(hub, "stream", lambda repository: files.split_by_hash(rows(), 0.1))
    folder = prepare("tinystories", "byte", max_tokens=500_000, root=tmp_path)
    data = TokenDataset(folder)
    assert folder.name == "tinystories-byte-500000"
    # the last document has <= 1200
    assert 500_000 <= sum(data.meta["tokens"].values()) < 501_400 and len(taken) < 1600
    train = set(text_of(folder, "train").split("<|endoftext|>")[:-1])
    val = set(text_of(folder, "val").split("<|endoftext|>")[:-1])
    assert not train & val and train | val <= set(documents)
    with pytest.raises(ValueError, match="max_tokens"):
        prepare("pydocs", max_tokens=5, root=tmp_path)


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "content, words_expected",
    [
        (b"", "is empty"),
        (b"x", "too short"),
        (b"good \xff bad", "byte 5 is 0xff"),
        (b"a" * 300_000 + b"\n\xc3(" + b"b" * 9, "byte 300001 is 0xc3"),
        (b"ends inside " + "é".encode()[:1], "byte 12 is 0xc3"),
    ],
)
def test_bad_files(tmp_path, content, words_expected):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words_expected) as caught:
        prepare(path, "byte", root=tmp_path / "prepared")
    assert "bad.txt" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, words_expected",
    [
        (["pydoc"], "did you mean 'pydocs'?"),
        ([""], "no data set"),
        (["pydocs", "bytes"], "did you mean 'byte'?"),
        (["pydocs", "bpe", 100], "260"),
        (["pydocs", ""], "no tokenizer"),
        (["/no/such/file.txt"], "no data set, file or folder"),
    ],
)
def test_bad_names(tmp_path, arguments, words_expected):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare(*arguments, root=tmp_path)
    assert words_expected in str(caught.value)


def test_a_folder_without_text(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89")
    with pytest.raises(ValueError, match="no text in the folder"):
        prepare(tmp_path, root=tmp_path / "prepared")


def test_download(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text("to be or not to be " * 1000)
    monkeypatch.setattr(hub, "SHAKESPEARE_URL", (tmp_path / "input.txt").as_uri())
    folder = prepare("shakespeare", "byte", root=tmp_path / "prepared")
    assert folder.name == "shakespeare-byte"
    assert TokenDataset(folder).meta["bytes"] == {"train": 17_100, "val": 1900}


def test_off_line(tmp_path, monkeypatch):
    import urllib.request

    def unreachable(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for name in ("shakespeare", "tinystories", "fineweb_edu", "openwebtext"):
        with pytest.raises(ConnectionError, match="pydocs") as caught:
            prepare(name, "byte", root=tmp_path)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words_expected",
    [
        (["pydoc"], "did you mean 'pydocs'"),
        (["pydocs", "--vocab_size=many"], "vocab_size"),
    ],
)
def test_command_line_mistakes(tmp_path, arguments, words_expected):
    assert refused(run(SCRIPT, *arguments, folder=tmp_path), words_expected)


def test_command_line(book, tmp_path):
    """From another folder than the repository's; data goes to a folder there."""
    environment = os.environ | {"UNMASK_DATA": str(tmp_path / "prepared")}
    command = [sys.executable, SCRIPT, "book.txt", "--tokenizer=byte"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0 and not result.stderr
    folder = Path(result.stdout.splitlines()[-1])
    assert TokenDataset(folder).vocab_size == 260 and folder.parent == tmp_path / "prepared"


# --------------------------------------------------------------------------------------------------
# The loader


def test_memory_mapped(pydocs):
    data = TokenDataset(pydocs)
    assert isinstance(data.train, np.memmap) and isinstance(data.val, np.memmap)
    assert not data.train.flags.writeable
    assert len(data.fingerprint) == 16 and data.meta["name"] == "pydocs"


def test_batch_is_pure(numbers):
    batch = numbers.batch("train", 4, 32, seed=1, step=7)
    assert batch.shape == (4, 32) and batch.dtype == torch.int64
    numbers.batch("train", 4, 32, seed=1, step=8)
    assert torch.equal(batch, numbers.batch("train", 4, 32, seed=1, step=7))
    assert torch.equal(batch, TokenDataset(numbers.folder).batch("train", 4, 32, seed=1, step=7))
    for other in (
        {"seed": 2, "step": 7},
        {"seed": 1, "step": 8},
        {"seed": 1, "step": 7, "rank": 1, "world_size": 2},
        {"seed": -1, "step": 7},
    ):
        assert not torch.equal(batch, numbers.batch("train", 4, 32, **other))
    assert ((batch[:, 1:] - batch[:, :-1]) == 1).all()  # consecutive tokens of the corpus


def test_an_epoch_visits_every_window_once(numbers):
    """(5000 - 31) // 32 = 155 windows = 38 steps of 4, 3 left over; two epochs differ in offset and
    order."""
    steps = torch.stack([numbers.batch("train", 4, 32, 0, step) for step in range(2 * 38)])
    epochs = steps.view(2, 38 * 4, 32)
    for epoch in epochs:
        assert len(epoch.unique()) == epoch.numel() == 38 * 4 * 32
    assert not torch.equal(epochs[0], epochs[1])
    offsets = {int(numbers.batch("train", 4, 32, 0, 38 * e)[0, 0]) % 32 for e in range(8)}
    assert len(offsets) > 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_a_step(numbers, world_size):
    for step in range(40):
        parts = torch.cat([numbers.batch("train", 4, 32, 3, step, rank, world_size)
                           for rank in range(world_size)])
        assert len(parts.unique()) == parts.numel()
        # however it is divided
        assert torch.equal(parts, numbers.batch("train", 4 * world_size, 32, 3, step))


def test_short_corpora(numbers):
    # exactly one window, again and again
    assert numbers.batch("val", 64, 500, 0, 3).shape == (64, 500)
    assert numbers.batch("val", 5, 300, 0, 3).shape == (5, 300)
    starts = {int(numbers.batch("val", 1, 300, 0, step)[0, 0]) for step in range(50)}
    assert len(starts) > 10 and max(starts) <= 200
    assert {int(numbers.batch("val", 1, 1, 0, step)) for step in range(500)} == set(range(500))
    with pytest.raises(ValueError, match="500 tokens, a sequence 501"):
        numbers.batch("val", 1, 501, 0, 0)
    with pytest.raises(ValueError, match="500 tokens, a sequence 501"):
        numbers.windows("val", 501)
    with pytest.raises(ValueError, match="no split called 'test'"):
        numbers.batch("test", 1, 2, 0, 0)
    with pytest.raises(ValueError, match="world_size 1"):
        numbers.batch("train", 4, 32, 0, 0, rank=1)


def test_windows(numbers):
    windows = numbers.windows("val", 32)
    assert windows.shape == (15, 32) and windows.dtype == torch.int64
    assert torch.equal(windows.flatten(), torch.arange(480))
    assert numbers.windows("val", 32, max_tokens=100).shape == (3, 32)
    assert numbers.windows("val", 32, max_tokens=1).shape == (1, 32)
    assert numbers.bytes_per_token("train") == 4.0 and numbers.bytes_per_token("val") == 2.0


def test_windows_begin_where_short_documents_begin(tmp_path, monkeypatch):
    """Each document but the first, of 6 to 11 tokens, once an epoch, after the end of text of the
    one before; in windows of fewer tokens they would be cut, so those begin anywhere."""

    def pieces():
        for i in range(200):
            yield ("val" if i % 10 == 0 else "train"), f"line {i * i}"
            yield ("val" if i % 10 == 0 else "train"), None

    monkeypatch.setitem(prepare_module.DATASETS, "lines", pieces)
    data = TokenDataset(prepare("lines", "byte", root=tmp_path))
    assert data.longest_document == len("line 39601") + 1
    fit = [data.batch("train", 4, 12, 0, step) for step in range(2 * 44)]       # two epochs
    assert all((batch[:, 0] == data.eos_token_id).all() for batch in fit)
    for epoch in (fit[:44], fit[44:]):
        rows = torch.cat(epoch)[:, 1:].tolist()
        lines = {tuple(row[:row.index(data.eos_token_id)]) for row in rows}
        assert len(lines) == 44 * 4
    assert (data.windows("val", 12)[:, 0] == data.eos_token_id).all()
    assert apart(np.array([3, 5, 9, 14, 15, 30]), 6).tolist() == [3, 9, 15, 30]
    assert data.beginnings("train", 11) is None
    cut = torch.cat([data.batch("train", 4, 11, 0, step) for step in range(40)])
    assert (cut[:, 0] != data.eos_token_id).any()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda content: content[:-1], "bytes but"),
        (lambda content: content + b"x", "bytes but"),
        (lambda content: content[:20], "not a token file"),
        (lambda content: b"X" + content[1:], "not a token file"),
        (lambda content: HEADER.pack(b"unmaskTK", 9, 2, 260, 5) + content[32:], "version"),
        (lambda content: HEADER.pack(b"unmaskTK", 1, 4, 260, 5) + content[32:], "4-byte ids"),
        (lambda content: pack_header(260, 0), "no tokens"),
        (lambda content: pack_header(261, len(content) // 2 - 16) + content[32:], "disagree"),
    ],
)
def test_damaged_token_files(book, tmp_path, damage, reason):
    folder = prepare(book, "byte", root=tmp_path / "prepared")
    path = folder / "train.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=reason) as caught:
        TokenDataset(folder)
    assert "train.bin" in str(caught.value) and "prepare" in str(caught.value)


def test_nothing_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match="python data/prepare.py"):
        TokenDataset(tmp_path / "nothing")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        TokenDataset(tmp_path)
