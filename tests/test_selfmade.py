"""Conversations that a model writes itself: the prompts, the request in a data set's name, answers
that are kept."""
import json
import re

import pytest
import torch
from tiny import tiny_model

from data import selfmade
from data.chat import ChatDataset
from data.chat_sets import is_chat
from data.prepare import prepare
from data.selfmade import Request, answers_file, ask, parse_request, prompts, read_answers
from data.tokenizer import Tokenizer
from pretrained.vocabulary import resize_vocabulary

FEW = """\
# a comment
What is {}?
Explain {}.
---
rain; snow;
wind

Sing about {}.
---
rain"""


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Seven prompts in place of all; returns the file of them."""
    path = tmp_path / "prompts.txt"
    path.write_text(FEW)
    monkeypatch.setattr(selfmade, "PROMPTS", path)
    return path


@pytest.fixture
def teacher(tmp_path):
    """A folder with a model that says a, b, c or the end of text, each as often."""
    model = tiny_model(max_len=256)
    text = Tokenizer.bytes()
    text.add_chat_tokens()
    resize_vocabulary(model, text.vocab_size)
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([[257]]))[0, 0]          # the same of every mask
        unit = hidden / hidden.square().sum()
        model.head.weight.copy_(-20 * unit.expand(model.head.weight.shape))
        model.head.weight[[97, 98, 99, 256]] = 0                    # a, b, c and the end
    model.save_pretrained(tmp_path / "teacher")
    text.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_prompts(few):
    assert sorted(prompts()) == ["Explain rain.", "Explain snow.", "Explain wind.",
                                 "Sing about rain.", "What is rain?", "What is snow?",
                                 "What is wind?"]
    for text in ("What is {}?\nrain", "What?\n---\nrain"):
        with pytest.raises(ValueError, match="a group is ways of asking"):
            prompts(text)


def test_all_prompts_are_questions_and_requests_of_ours():
    found = prompts()
    assert len(found) > 1500 and len(set(found)) == len(found)
    assert all(re.fullmatch(r"[A-Z][^{}\n]*[.?]", prompt) for prompt in found)
    assert found != sorted(found)                       # mixed: a part of them is of all kinds


def test_an_answer_that_is_cut_ends_with_its_last_sentence():
    for text, whole in (("One. Two! Thr", "One. Two!"), ('He said "no." Then', 'He said "no."'),
                        ("Do this:\n1. Stir it.\n2. Wait", "Do this:\n1. Stir it."),
                        ("It is 3.5 km. And", "It is 3.5 km."),
                        ("What?! (Yes.) I", "What?! (Yes.)")):
        assert selfmade.SENTENCES.match(text)[0] == whole
    for text in ("", "No end", "1. Wash", "a.b", "... and"):
        assert not selfmade.SENTENCES.match(text)


def test_a_request_in_a_name():
    assert parse_request("selfmade:smollm2") == Request("smollm2")
    name = "selfmade:a/b.gguf?temperature=0.5&seed=2&tokens=9"
    assert parse_request(name) == Request("a/b.gguf", 0.5, 2, 9)
    assert is_chat(name) and is_chat("pydocs_chat+selfmade:x[train:9]") and not is_chat("selfmade")
    for name, words in (("selfmade:", "needs a checkpoint"),
                        ("selfmade:x?heat=1", "no option called 'heat'"),
                        ("selfmade:x?seed=1.5", "seed takes a number, got '1.5'"),
                        ("selfmade:x?temperature=nan", "must not be negative"),
                        ("selfmade:x?tokens=0", "tokens at least 1")):
        with pytest.raises(ValueError, match=words):
            parse_request(name)


def test_answers_are_kept_and_go_on(few, teacher, tmp_path, monkeypatch):
    """Three runs: one that is interrupted after its first batch, one that goes on, one that finds
    everything; then the same answers as data to train on."""
    monkeypatch.setattr(selfmade, "BATCH", 3)
    request = Request(str(teacher), 1.0, 1, 24)
    path, asked = answers_file(request, tmp_path), []
    monkeypatch.setattr(selfmade, "ask", lambda *a: asked.append(a[1]) or ask(*a))
    conversations = selfmade.conversations(request, path)
    next(conversations)
    conversations.close()
    assert len(read_answers(path)) == len(asked[0]) == 3
    with path.open("a") as file:
        file.write('{"prompt": "cut sho')               # as a kill in the middle would leave it
    first = list(selfmade.conversations(request, path))
    assert [len(batch) for batch in asked] == [3, 3, 1]
    assert list(selfmade.conversations(request, path)) == first and len(asked) == 3
    answers = read_answers(path)
    assert list(answers) == prompts() and 0 < len(first) < 7    # some did not come to an end
    assert all(answer is None or set(answer) <= set("abc") for answer in answers.values())
    assert answers_file(Request(str(teacher), 1.0, 2, 24), tmp_path) != path
    again = selfmade.load_teacher(str(teacher))
    alone = ask(again, [prompts()[4]], request)
    assert alone == {prompts()[4]: answers[prompts()[4]]}       # whoever else is asked


def test_another_models_answers_are_in_another_file(few, tmp_path):
    """Models that differ behind the first megabyte only, as a base and what LoRA made of it do; and
    small ones in a single byte."""
    folder, found = tmp_path / "teacher", set()
    folder.mkdir()
    request = Request(str(folder))
    for size, start in ((2**24, 2**24), (2**24, 2**20), (2**21, 2**21), (2**21, 2**21 - 1)):
        (folder / "model.safetensors").write_bytes(bytes(start) + b"x" * (size - start))
        assert answers_file(request, tmp_path) == answers_file(request, tmp_path)
        found.add(answers_file(request, tmp_path))
    assert len(found) == 4


def test_a_data_set_of_them(few, teacher, tmp_path):
    name = f"selfmade:{teacher}?temperature=1.0&seed=1&tokens=24"
    text = Tokenizer.from_pretrained(teacher)
    folder = prepare(name, text, root=tmp_path / "prepared")
    data = ChatDataset(folder, 128)
    assert data.examples["train"] + data.examples["val"] >= 2
    [file] = (tmp_path / "prepared").glob("selfmade-teacher-*.jsonl")
    said = [json.loads(line)["response"] for line in file.read_text().splitlines()]
    prompt, answer = data.prompt("train", 0)
    assert text.decode(answer, skip_special_tokens=True).strip() in said
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare("selfmade:out/nowhere", text, root=tmp_path / "prepared")
