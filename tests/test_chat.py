"""Conversations: where their responses are, how they are stored, what a batch of them looks like,
and what is wrong with some."""
import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from scripts import run

from data import chat_sets, python_docs, tasks
from data import prepare as prepare_module
from data.chat import ChatDataset, encode_rendered, is_chat, open_dataset, render
from data.files import VAL_FRACTION, hash_fraction, split_by_hash
from data.prepare import prepare, prepare_chat
from data.tokenizer import CHAT_TEMPLATE, Tokenizer
from diffusion import corrupt, mask_tokens, mdlm_loss, nelbo, weighted_nll
from model import Config, Transformer

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))
TALK = [SYSTEM | {"content": "Be brief."}, USER | {"content": "One?"}, ASSISTANT | {"content": "1"},
        USER | {"content": "Two?"}, ASSISTANT | {"content": "2"}]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows), encoding="utf-8")
    return path


def pair(number, length=3):
    return {"prompt": f"question {number}", "response": f"answer {number} " + "x" * length}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A prepared set of 100 conversations whose answers have 10 to 109 bytes, a byte a token."""
    path = write(tmp_path_factory.mktemp("chat") / "many.jsonl",
                 *(pair(number, number) for number in range(100)))
    return prepare_chat(path, "byte")


def tiny(**config):
    """A model over bytes and our special tokens."""
    sizes = {"vocab_size": 260, "dim": 16, "n_layers": 2, "n_heads": 2, "max_len": 256}
    return Transformer(Config(**{**sizes, "mask_token_id": 257, **config})).init_weights()


def texts(folder, split):
    """[(what is given, what is a response, as text)] of each conversation of one turn."""
    data, tokenizer = ChatDataset(folder, 2**20), Tokenizer.from_pretrained(folder)
    return [tuple(tokenizer.decode(part) for part in data.prompt(split, n))
            for n in range(data.examples[split])]


# --------------------------------------------------------------------------------------------------
# Data sets


def test_pydocs_chat(tmp_path, monkeypatch):
    """Every docstring is an answer, its question names the signature, and the held-out ones are
    those of pydocs. An eighth of the library's modules, for all take ten seconds."""
    modules = list(python_docs.library_sources())[::8]
    monkeypatch.setattr(python_docs, "library_sources", lambda: modules)
    found = list(python_docs.docstrings())
    monkeypatch.setattr(chat_sets, "docstrings", lambda: found)
    folder = prepare("pydocs_chat", "byte", root=tmp_path)
    train, val = texts(folder, "train"), texts(folder, "val")
    known = {text: signature for signature, text in found}
    assert len(known) > 700
    for given, answer in train + val:
        assert known[answer.removesuffix("<|im_end|>\n")] in given
        assert given.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len(train) + len(val) == len(known) and 0.07 < len(val) / len(known) < 0.13
    first_words = {given.splitlines()[1].partition(" ")[0] for given, _ in val}
    assert len(first_words) >= 3                                    # asked in several ways
    documents = [f"{signature}\n{text}" for text, signature in known.items()]
    in_pydocs = split_by_hash(documents, VAL_FRACTION)
    held_out = {document for split, document in in_pydocs if split == "val" and document}
    answers = [answer.removesuffix("<|im_end|>\n") for _, answer in val]
    assert {f"{known[answer]}\n{answer}" for answer in answers} == held_out


def test_jsonl_files_and_mixtures(tmp_path):
    a = write(tmp_path / "a.jsonl", *map(pair, range(40)))
    b = write(tmp_path / "b.jsonl", {"messages": TALK}, "", {"messages": TALK[:2]},
              *(pair(n) for n in range(40, 60)))
    assert is_chat(a) and is_chat(f"{b}[train:3]+{a}") and is_chat("tulu3[train:5]+smoltalk")
    assert not is_chat("pydocs") and not is_chat(tmp_path)
    whole = prepare(a, "byte", root=tmp_path / "p")
    train, val = texts(whole, "train"), texts(whole, "val")
    assert len(train) + len(val) == 40 and not set(train) & set(val)
    mixed = prepare_chat(f"{a}[train:7]+{b}", "byte", tmp_path / "p")
    data = ChatDataset(mixed, 1000)
    assert data.meta["left_out"] == {"it has no response": 1}
    assert texts(mixed, "train")[:7] == train[:7] and texts(mixed, "train")[7] not in train
    # one for each split, whatever the hashes
    few = prepare_chat(write(tmp_path / "few.jsonl", pair(1), pair(2)), "byte", tmp_path / "p")
    assert len(texts(few, "train")) == len(texts(few, "val")) == 1
    assert prepare_chat(a, "byte", tmp_path / "p") == whole


def test_a_small_part_has_something_for_validation():
    """Where none of the first conversations is held out, the first one that is comes along; where
    no such one comes, the search ends."""
    held_out = [str(n) for n in range(99) if hash_fraction(str(n)) < VAL_FRACTION]
    learned = [str(n) for n in range(99) if hash_fraction(str(n)) >= VAL_FRACTION]

    def first(limit, keys):
        rows = ((key, key) for key in keys)
        part = chat_sets.Part("numbers", lambda: rows, VAL_FRACTION, limit)
        return list(chat_sets.conversations([part]))

    keys = [*learned[:9], held_out[0], *learned[9:], held_out[1]]
    three = [("train", key) for key in learned[:3]]
    assert first(3, keys) == [*three, ("val", held_out[0])]
    assert first(3, [held_out[1], *keys]) == [("val", held_out[1]), *three]
    assert first(3, itertools.cycle(learned)) == three


def test_the_hub_is_streamed(tmp_path, monkeypatch):
    """The published sets, each in the form of its rows. What is no conversation is left out and
    counted."""
    alpaca = [{"instruction": f"do {n}", "input": "this" * (n % 2), "output": f"done {n}"}
              for n in range(3000)]
    tulu = [{"messages": [USER | {"content": f"q{n}"}, ASSISTANT | {"content": f"a{n}"}]}
            for n in range(2000)]
    tulu += [{"messages": [{"role": "tool", "content": "x"}]},
             {"messages": [USER | {"content": None}]}]
    rows = {"tatsu-lab/alpaca": alpaca,
            "allenai/tulu-3-sft-mixture": tulu,
            "OpenCoder-LLM/opc-sft-stage1": [{"instruction": "i", "output": f"java {n}"}
                                             for n in range(9)],
            "OpenCoder-LLM/opc-sft-stage2": [{"instruction": "i", "output": f"python {n}"}
                                             for n in range(9)]}

    def stream_rows(repository, **options):
        return iter(rows[repository])

    monkeypatch.setattr(chat_sets, "stream_rows", stream_rows)
    folder = prepare_chat("alpaca[train:50]+tulu3", "byte", tmp_path)
    train = texts(folder, "train")
    assert sum("do " in given for given, _ in train) == 50
    assert train[0][0].endswith("user\ndo 0<|im_end|>\n<|im_start|>assistant\n")
    assert "do 1\n\nthis" in train[1][0] and train[1][1] == "done 1<|im_end|>\n"
    data, tokenizer = ChatDataset(folder, 99), Tokenizer.from_pretrained(folder)
    assert sum(data.meta["left_out"].values()) == 2
    few = [tokenizer.decode(row) for row in data.val_batch(4).tokens]  # from all over the mixture
    assert len(few) == 4 and any("user\ndo" in text for text in few)
    assert any("user\nq" in text for text in few)
    assert len(list(chat_sets.opc())) == 4 * 9


def test_gsm8k_holds_out_what_its_task_asks(tmp_path, monkeypatch):
    """Learned from solutions here, rewarded for numbers in data/tasks.py: no question of the one's
    training is in the other's validation."""
    rows = [{"question": f"{n} and {n}?", "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n:,}"}
            for n in range(900, 1100)]
    for module in (chat_sets, tasks):
        monkeypatch.setattr(module, "stream_rows", lambda repository, name: iter(rows))
    task = tasks.find_task("gsm8k")
    folder = prepare_chat("gsm8k", "byte", tmp_path)
    for split in ("train", "val"):
        found = texts(folder, split)
        asked = {given.splitlines()[1].removesuffix("<|im_end|>") for given, _ in found}
        assert asked == {example.prompt for example in task.rows[split]}
    assert found[0][1].splitlines()[0].startswith("<<")     # the whole solution


def test_off_line(tmp_path, monkeypatch):
    import urllib.request

    def unreachable(*arguments, **options):
        raise OSError("no route")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for name in ("alpaca", "tulu3", "smoltalk", "opc", "gsm8k"):
        with pytest.raises(ConnectionError, match="pydocs_chat"):
            prepare_chat(name, "byte", tmp_path)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "talk.jsonl", *map(pair, range(20)))
    started = dict(folder=tmp_path, environment={"UNMASK_DATA": str(tmp_path / "p")})
    result = run("data/prepare.py", "talk.jsonl", "--tokenizer=byte", **started)
    assert result.status == 0 and result.err == ""
    assert texts(result.out.splitlines()[-1], "val")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--help"])
    with pytest.raises(SystemExit):
        prepare_module.main()
    listed = capsys.readouterr().out
    for name in ("pydocs_chat", "alpaca", "tulu3", "smoltalk", "opc", "gsm8k"):
        assert re.search(rf"^  {name} +\S", listed, re.MULTILINE)
    write(path, "{")
    again = run("data/prepare.py", "talk.jsonl", **started)
    assert again.err == ("error: talk.jsonl, line 1 is not JSON: Expecting property name enclosed "
                         "in double quotes\n")


# --------------------------------------------------------------------------------------------------
# Where the responses are


def test_every_response_is_marked_exactly():
    tokenizer = Tokenizer.bytes()
    (ids, mask), = encode_rendered([render(TALK, tokenizer)], tokenizer)
    assert ids == tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    spans = []
    for marked, group in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
        if marked:
            spans.append(tokenizer.decode(token for token, _ in group))
    assert spans == ["1<|im_end|>\n", "2<|im_end|>\n"]
    for i in (2, 4):  # what stands before is what sampling would feed
        prompt = tokenizer.apply_chat_template(TALK[:i])
        assert ids[:len(prompt)] == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]


def test_a_template_that_rewrites_earlier_turns():
    """Qwen3's way: the thoughts of earlier turns are dropped, those of the last are written."""
    thought = "('<think>' if loop.last and message['role'] == 'assistant' else '')"
    template = CHAT_TEMPLATE.replace("message['content'] +", f"{thought} + message['content'] +")
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_templates = {"default": template}
    (ids, mask), = encode_rendered([render(TALK, tokenizer)], tokenizer)
    assert tokenizer.decode(np.array(ids)[mask == 1]) == "<think>2<|im_end|>\n"
    assert "1<|im_end|>" in tokenizer.decode(np.array(ids)[mask == 0])


def speaking(template):
    """A tokenizer of bytes with this template, in which ~ stands for a newline that jinja keeps."""
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_templates = {"default": template.replace("~", "{{ '\\n' }}")}
    return tokenizer


def for_each(user, assistant, system="", end=""):
    """A template: what is written for each message by its role, and at the end of all."""
    return ("{% for m in messages %}{% if m.role == 'user' %}" + user
            + "{% elif m.role == 'system' %}" + system + "{% else %}" + assistant
            + "{% endif %}{% endfor %}" + end)


LLADA = ("{% for m in messages %}{% set content = '<|start_header_id|>' + m['role']"
         " + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}"
         "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
         "{{ content }}{% endfor %}<|start_header_id|>assistant<|end_header_id|>~~")
CHATML_ALWAYS = ("{% for m in messages %}<|im_start|>{{ m.role }}~{{ m.content }}<|im_end|>~"
                 "{% endfor %}<|im_start|>assistant~")
DEFAULT_SYSTEM = ("{% if messages[0].role != 'system' %}<|im_start|>system~Be kind.<|im_end|>~"
                  "{% endif %}")
ASKED = "{% if add_generation_prompt %}"
THINKING = CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'")
# DeepSeek's: what is thought is not written, yet the prompt opens a thought.
DEEPSEEK = for_each("<｜User｜>{{ m.content }}",
                    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end｜>",
                    "{{ m.content }}", ASKED + "<｜Assistant｜><think>~{% endif %}")
# The template, and what the answers "4" and "6" are in it.
SPANS = {
    "llada": (LLADA, ["4<|eot_id|>", "6<|eot_id|>"]),
    "header always": (CHATML_ALWAYS, ["4<|im_end|>\n", "6<|im_end|>\n"]),
    "header always, a system turn": (
        DEFAULT_SYSTEM + CHATML_ALWAYS, ["4<|im_end|>\n", "6<|im_end|>\n"]),
    "header always, after a token that no role names": (
        "<|startoftext|>" + LLADA.replace("bos_token + ", ""), ["4<|eot_id|>", "6<|eot_id|>"]),
    "header always, that begins with the first token of the text": (
        CHATML_ALWAYS.replace("<|im_start|>", "{{ bos_token }}"),
        ["4<|im_end|>\n", "6<|im_end|>\n"]),
    "header always, one token at the beginning and at all ends": (
        "{{ bos_token }}" + for_each("User: {{ m.content }}{{ eos_token }}",
                                     "Bot:{{ m.content }}{{ eos_token }}", "", "Bot:"),
        ["4<|endoftext|>", "6<|endoftext|>"]),
    "header always, tags that begin alike": (
        for_each("<|user|>~{{ m.content }}</s>~", "<|assistant|>~{{ m.content }}</s>~",
                 "", "<|assistant|>~"), ["4</s>\n", "6</s>\n"]),
    "header always, no end": (
        for_each("<|user|>{{ m.content }}", "<|assistant|>{{ m.content }}", "", "<|assistant|>"),
        ["4", "6"]),
    "header always, in words": (
        for_each("User: {{ m.content }}~~", "Assistant: {{ m.content }}~~", "", "Assistant:"),
        [" 4\n\n", " 6\n\n"]),
    "header always, in words that begin alike": (
        for_each("### User:~{{ m.content }}~~", "### Bot:~{{ m.content }}~~", "",
                 "### Bot:~"), ["4\n\n", "6\n\n"]),
    "header and thought always": (
        CHATML_ALWAYS + "<think>~", ["4<|im_end|>\n", "6<|im_end|>\n"]),
    "thought": (THINKING, ["4<|im_end|>\n", "6<|im_end|>\n"]),
    "deepseek": (DEEPSEEK, ["4<｜end｜>", "6<｜end｜>"]),
    "phi-3": (
        for_each("<|user|>~{{ m.content }}<|end|>~", "<|assistant|>~{{ m.content }}<|end|>~",
                 "", ASKED + "<|assistant|>~{% else %}{{ eos_token }}{% endif %}"),
        ["4<|end|>\n", "6<|end|>\n<|endoftext|>"]),
    "mistral": (
        "{{ bos_token }}" + for_each("[INST] {{ m.content }} [/INST]", " {{ m.content }}</s>"),
        [" 4</s>", " 6</s>"]),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}~{{ m.content | trim }}<end_of_turn>~"
        "{% endfor %}" + ASKED + "<start_of_turn>model~{% endif %}",
        ["4<end_of_turn>\n", "6<end_of_turn>\n"]),
    "marked": (
        for_each("<|user|>{{ m.content }}",
                 "<|assistant|>{% generation %}{{ m.content }}</s>{% endgeneration %}~", "",
                 ASKED + "<|assistant|>{% endif %}"), ["4</s>\n", "6</s>\n"]),
    "nothing before an answer": (
        for_each("Q: {{ m.content }}~", "{{ m.content }}~"), ["4\n", "6\n"]),
}
SUMS = [USER | {"content": "2+2?"}, ASSISTANT | {"content": "4"},
        USER | {"content": "3+3?"}, ASSISTANT | {"content": "6"}]


@pytest.mark.parametrize("name", SPANS)
def test_answers_in_the_templates_of_others(name):
    """Both answers with what ends their turns, nothing else; and the text ends after the last."""
    tokenizer = speaking(SPANS[name][0])
    for before in ([], [SYSTEM | {"content": "Be brief."}]):
        text, spans = render(before + SUMS, tokenizer)
        assert [text[begin:end] for begin, end in spans] == SPANS[name][1]
        assert spans[-1][1] == len(text)
        for (begin, _), number in zip(spans, (1, 3)):             # what stands before is the prompt
            prompt = tokenizer.render_chat((before + SUMS)[:len(before) + number])
            assert prompt.removesuffix("<think>\n") == text[:begin]
        # One answer alone, and a question that nobody answers after both.
        alone, ((begin, end),) = render((before + SUMS)[:-2], tokenizer)
        assert alone[begin:].startswith(SPANS[name][1][0]) and end == len(alone)
        assert render([*before, *SUMS, USER | {"content": "?"}], tokenizer) == (text, spans)


def test_the_prompt_of_llada_is_what_sampling_feeds():
    tokenizer = speaking(LLADA)
    tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    (ids, mask), = encode_rendered([render(SUMS, tokenizer)], tokenizer)
    for number in (1, 3):
        prompt = tokenizer.apply_chat_template(SUMS[:number])
        assert ids[:len(prompt)] == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]
    eot = tokenizer.backend.token_to_id("<|eot_id|>")
    assert [token for token, marked in zip(ids, mask) if marked] == [ord("4"), eot, ord("6"), eot]
    assert mask[-1]


@pytest.mark.parametrize("template", [THINKING, CHATML_ALWAYS + "<think>~", DEEPSEEK])
@pytest.mark.parametrize("answer", ["<table>", "<think", "<", "\n<b>"])
def test_an_answer_that_begins_like_the_prompts_thought(template, answer):
    """No character of the answer is taken for the prompt's end."""
    tokenizer = speaking(template)
    more = [USER | {"content": "?"}, ASSISTANT | {"content": answer}]
    text, spans = render(SUMS + more, tokenizer)
    assert len(spans) == 3 and text[spans[-1][0]:].startswith(answer)


def test_an_answer_that_was_thought_about():
    """It begins after the prompt's <think> where the template writes it, else before."""
    messages = [SUMS[0], ASSISTANT | {"content": "<think>\nhm\n</think>\n\n4"}]
    for template, answer in ((THINKING, "hm\n</think>\n\n4<|im_end|>\n"),
                             (DEEPSEEK, "\n\n4<｜end｜>")):
        text, ((begin, end),) = render(messages, speaking(template))
        assert text[begin:end] == answer


def test_qwen3_writes_an_empty_thought_into_its_last_answer():
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}~"
                "{% if loop.last and m.role == 'assistant' %}<think>~~</think>~~{% endif %}"
                "{{ m.content.split('</think>')[-1] }}<|im_end|>~{% endfor %}"
                + ASKED + "<|im_start|>assistant~{% endif %}")
    for end in ("", ASKED + "<think>~~</think>~~{% endif %}"):      # with thinking, and without
        tokenizer = speaking(template + end)
        text, ((begin, _),) = render(SUMS, tokenizer)
        assert text[:begin] == tokenizer.render_chat(SUMS[:3])
        assert text[begin:] == ("6<|im_end|>\n" if end else "<think>\n\n</think>\n\n6<|im_end|>\n")


@pytest.mark.parametrize("template", [
    "{{ messages | length }}",
    "{% if add_generation_prompt %}Q{% endif %}{{ messages[-1].content }}",
])
def test_a_template_without_a_place_for_answers_is_refused(template):
    tokenizer = speaking(template)
    with pytest.raises(ValueError, match="template does not write a response after the prompt"):
        render(SUMS, tokenizer)


def test_bpe_never_merges_over_the_border():
    """A tokenizer to which the header and an answer are one piece: they are encoded apart."""
    tokenizer = Tokenizer.train(["Ayes Ayes"] * 50, 270)
    tokenizer.chat_templates = {"default": (
        "{% for m in messages %}{{ 'A' if m.role == 'assistant' else 'Q' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}A{% endif %}")}
    assert len(tokenizer.encode("Ayes")) == 1
    (ids, mask), = encode_rendered([render([USER | {"content": "?"},
                                            ASSISTANT | {"content": "yes"}], tokenizer)], tokenizer)
    assert tokenizer.decode(np.array(ids)[mask == 0]) == "Q?A"
    assert tokenizer.decode(np.array(ids)[mask == 1]) == "yes"


def test_nobodys_words_become_a_mask(tmp_path):
    """What a user or an assistant says of <|mask|> is text; the template's tokens are not."""
    rows = [{"prompt": f"What is <|mask|> {n}?", "response": f"A <|mask|> is {n}."}
            for n in range(20)]
    folder = prepare(write(tmp_path / "mask.jsonl", *rows), "byte", root=tmp_path / "p")
    data, tokenizer = ChatDataset(folder, 200), Tokenizer.from_pretrained(folder)
    for split in ("train", "val"):
        ids = np.asarray(getattr(data, split))
        assert data.mask_token_id not in ids and (ids == 258).sum() == 2 * data.examples[split]
        for _, answer in texts(folder, split):
            assert re.match(r"A <\|mask\|> is \d+\.<\|im_end\|>", answer)
    given, _ = data.prompt("train", 0)
    number = re.search(r"(\d+)\?", tokenizer.decode(given))[1]
    asked = [USER | {"content": f"What is <|mask|> {number}?"}]
    assert given == tokenizer.apply_chat_template(asked)


def test_what_older_rules_prepared_is_prepared_again(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(pair, range(20)))
    folder = prepare_chat(path, "byte", tmp_path / "p")
    meta = json.loads((folder / "meta.json").read_text())
    older = {name: value for name, value in meta.items() if name != "rendering"}
    (folder / "meta.json").write_text(json.dumps(older))
    assert prepare_chat(path, "byte", tmp_path / "p") == folder
    assert json.loads((folder / "meta.json").read_text()) == meta


def test_training_in_chatml_for_want_of_a_template_is_said(tmp_path, capsys):
    """Even where the conversations are prepared already."""
    path = write(tmp_path / "a.jsonl", *map(pair, range(20)))
    for number in range(2):
        folder = tmp_path / str(number)
        Tokenizer.bytes().save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        prepare_chat(path, Tokenizer.from_pretrained(folder), tmp_path / "p")
        said = capsys.readouterr().err
        assert said.count("no chat template") == said.count("note:") == 1
    assert len(list((tmp_path / "p").iterdir())) == 1


def test_the_template_is_part_of_the_name(tmp_path):
    path, other = write(tmp_path / "a.jsonl", *map(pair, range(20))), Tokenizer.bytes()
    other.chat_templates = {"default": CHAT_TEMPLATE.replace("\n", " ")}
    first = prepare_chat(path, Tokenizer.bytes(), tmp_path / "p")
    second = prepare_chat(path, other, tmp_path / "p")
    assert first != second
    given, _ = texts(second, "train")[0]
    assert given.split("user")[1].startswith(" ")


# --------------------------------------------------------------------------------------------------
# Batches


def test_a_batch(many):
    data, tokenizer = ChatDataset(many, 128), Tokenizer.from_pretrained(many)
    batch = data.batch("train", 4, seed=1, step=2)
    assert batch.tokens.shape == batch.maskable.shape and batch.tokens.shape[1] % 32 == 0
    assert batch.attention_mask is None
    for row, maskable in zip(batch.tokens, batch.maskable):
        given, response = tokenizer.decode(row[~maskable]), tokenizer.decode(row[maskable])
        assert given.endswith("assistant\n") and response.startswith("answer")
        first = int(maskable.int().argmax())
        assert not maskable[:first].any() and maskable[first:].all()    # to the end, padding too
        assert set(response.partition("<|im_end|>\n")[2].replace("<|endoftext|>", "")) == set()
    hidden = ChatDataset(many, 128, padding="hidden").batch("train", 4, seed=1, step=2)
    assert torch.equal(hidden.tokens, batch.tokens)
    assert torch.equal(hidden.maskable, batch.maskable & hidden.attention_mask)
    assert not hidden.attention_mask.all()
    assert all("<|endoftext|>" not in tokenizer.decode(row[seen]) for row,
               seen in zip(hidden.tokens, hidden.attention_mask))


def test_batches_are_pure_and_short(many):
    data, again = ChatDataset(many, 256), ChatDataset(many, 256)
    rows, padded, tokens = [], 0, 0
    steps = len(data.kept["train"]) // 4
    for step in range(steps):
        batch = data.batch("train", 4, seed=3, step=step)
        rows += [tuple(row[row != data.eos_token_id].tolist()) for row in batch.tokens]
        tokens, padded = tokens + batch.tokens.numel(), padded + (batch.tokens
                                                                  == data.eos_token_id).sum().item()
    assert len(set(rows)) == steps * 4                              # an epoch visits each once
    assert padded < 0.25 * tokens  # without sorting by length it is more than a third
    for step in (steps - 1, 0, 7 * steps + 2):
        assert torch.equal(again.batch("train", 4, 3, step).tokens,
                           data.batch("train", 4, 3, step).tokens)
    assert not torch.equal(data.batch("train", 4, 3, 0).tokens,
                           data.batch("train", 4, 3, steps).tokens)
    assert all(ChatDataset(many, 256, block_length=64).batch("train", 4, 3,
                                                             step).tokens.shape[1] % 64 == 0
               for step in range(4))


def test_ranks_share_a_step(many):
    """The slices of a step are its rows, all of one length, and their shares make a mean per token
    of all."""
    data = ChatDataset(many, 128)
    whole = data.batch("train", 8, seed=0, step=5)
    parts = [data.batch("train", 2, 0, 5, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert whole.share == 1
    assert sum(part.share for part in parts) == pytest.approx(4)
    values = [torch.rand(part.maskable.shape) for part in parts]
    mean = 0
    for value, part in zip(values, parts):
        mean += (value * part.maskable).sum() / part.maskable.sum() * part.share / 4
    of_all = (torch.cat(values) * whole.maskable).sum() / whole.maskable.sum()
    assert mean.item() == pytest.approx(of_all.item())
    with pytest.raises(ValueError, match="world_size"):
        data.batch("train", 2, 0, 0, rank=2, world_size=2)


def test_the_length_of_a_step_is_that_of_all_its_batches(many, tmp_path):
    """So that the noise of a step can be drawn before its batches, for conversations and text."""
    path = tmp_path / "words.txt"
    path.write_text("two words " * 200)
    folder = prepare(path, "byte", root=tmp_path / "p")
    conversations = open_dataset("many.jsonl", many, 128)
    text = open_dataset(path, folder, 128)
    for data in (conversations, text):
        for step in range(5):
            T = data.step_length(8, seed=3, step=step)
            parts = [data.batch("train", 2, 3, step, rank, 4) for rank in range(4)]
            assert [part.tokens.shape for part in parts] == 4 * [(2, T)]
    assert len({conversations.step_length(8, 3, step) for step in range(5)}) > 1
    assert text.step_length(8, 3, 0) == 128


def test_long_conversations_are_cut_or_dropped_and_counted(tmp_path):
    rows = [pair(n) for n in range(20)]
    rows += [{"prompt": "p" * 200, "response": "r"}] * 3
    rows += [{"prompt": "short", "response": "r" * 200 + str(n)} for n in range(5)]
    folder = prepare_chat(write(tmp_path / "long.jsonl", *rows), "byte", tmp_path / "p")
    data = ChatDataset(folder, 100)
    assert sum(data.dropped.values()) == 3 and sum(data.truncated.values()) == 5
    assert sum(data.examples.values()) == 28
    assert data.dropped["train"] > 0
    assert data.epoch_length() == data.examples["train"] - data.dropped["train"]
    assert all(data.batch("train", 4, 0, step).maskable.any(dim=1).all() for step in range(6))
    # no multiple of 32 above seq_len
    assert max(data.batch("train", 4, 0, step).tokens.shape[1] for step in range(6)) == 100
    assert f"{data.truncated['train']} of them cut" in data.summary()
    whole = ChatDataset(folder, 1000)
    assert not sum(whole.dropped.values()) + sum(whole.truncated.values())  # stored whole


def test_the_loss_is_on_responses_alone(many):
    """Another target for the tokens of prompts changes neither loss nor gradient; one for a
    response's does."""
    batch = ChatDataset(many, 128).batch("train", 4, 0, 0)
    model = tiny(max_len=128)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    t = torch.full((4,), 0.5)
    mask = mask_tokens(batch.tokens.shape, 0.5, torch.Generator().manual_seed(0))
    x_t, hidden = corrupt(model, batch.tokens, t[:, None], mask, batch.maskable)
    assert torch.equal(x_t[~batch.maskable], batch.tokens[~batch.maskable])     # never corrupted
    weights = torch.full(hidden.shape, 1 / 0.5)

    def gradient(targets):
        model.zero_grad()
        total, _ = weighted_nll(model, x_t, targets, hidden, weights)
        loss = total / batch.maskable.sum()
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    value, grad = gradient(batch.tokens)
    assert value == mdlm_loss(model, batch.tokens, t, mask, batch.maskable).loss.item()
    same, same_grad = gradient(torch.where(batch.maskable, batch.tokens, 7))
    assert same == value and torch.equal(same_grad, grad)
    other, other_grad = gradient(torch.where(batch.maskable, 7, batch.tokens))
    assert other != value and not torch.equal(other_grad, grad)


@pytest.mark.parametrize("config", [{}, {"shift": True}, {"block_length": 8},
                                    {"causal": True, "shift": True}])
def test_nelbo_of_responses(many, config):
    """Responses of one token are scored exactly, so the padded batch must give what each
    conversation gives alone; then a ratio of sums."""
    torch.manual_seed(0)
    model = tiny(**config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    val = ChatDataset(many, 256).val_batch()
    last = val.attention_mask.sum(1) - 2                            # <|im_end|> alone
    maskable = torch.arange(val.tokens.shape[1]) == last[:, None]
    value, error = nelbo(model, val.tokens, batch_size=3, maskable=maskable,
                         attention_mask=val.attention_mask)
    alone = []
    for row, marked, n in zip(val.tokens, maskable, val.attention_mask.sum(1).tolist()):
        alone.append(nelbo(model, row[None, :n], maskable=marked[None, :n])[0])
    assert value == pytest.approx(np.mean(alone), abs=1e-5)
    assert error == pytest.approx(np.std(alone, ddof=1) / len(alone) ** 0.5, abs=1e-5)
    whole, _ = nelbo(model, val.tokens, num_samples=4, maskable=val.maskable,
                     attention_mask=val.attention_mask)
    assert 3 < whole < 12
    with pytest.raises(ValueError, match="no token to score"):
        nelbo(model, val.tokens, maskable=torch.zeros_like(val.maskable))


def test_held_out_conversations_come_from_everywhere_the_shortest_first(many):
    data = ChatDataset(many, 256)
    every, some = data.val_batch(), data.val_batch(7)

    def conversations(batch):
        return [tuple(row[seen].tolist()) for row, seen in zip(batch.tokens, batch.attention_mask)]

    assert len(conversations(every)) == data.examples["val"] > 7 == len(conversations(some))
    assert set(conversations(some)) <= set(conversations(every))
    for batch in (every, some):
        lengths = [len(conversation) for conversation in conversations(batch)]
        assert lengths == sorted(lengths)


def test_the_error_of_a_ratio():
    """Against a bootstrap over rows of unequal length, for a model whose bound per token is
    known."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (100, 32), generator=generator)
    counts = torch.randint(1, 33, (100,), generator=generator)
    maskable = torch.arange(32) < counts[:, None]
    model = tiny(vocab_size=10, n_layers=1, causal=True, shift=True, mask_token_id=9)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    value, error = nelbo(model, tokens, maskable=maskable)
    scored = (counts - 1).double()                      # nothing predicts the first token
    nats = torch.zeros(100, dtype=torch.float64)
    for i in scored.nonzero()[:, 0].tolist():
        nats[i] = nelbo(model, tokens[i:i + 1], maskable=maskable[i:i + 1])[0] * scored[i]
    assert value == pytest.approx((nats.sum() / scored.sum()).item(), rel=1e-5)
    draws = torch.randint(0, 100, (2000, 100), generator=generator)
    assert error == pytest.approx((nats[draws].sum(1) / scored[draws].sum(1)).std().item(), rel=0.1)


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("rows, words", [
    ([pair(1), '{"messages": [', pair(2)], "line 2 is not JSON"),
    ([pair(1), "[]"], "line 2 has neither"),
    ([pair(1), {"prompt": "only"}], "line 2 has neither"),
    ([{"text": "plain"}], "two texts: a .jsonl holds conversations, plain texts go into .txt"),
    ([pair(1), {"messages": [USER | {"content": 5}]}], "line 2 has a message without"),
    ([pair(1), '{"prompt": "a", "response": "\\ud800"}'], "line 2 has a text that is not Unicode"),
    ([pair(1), "[" * 100_000], "line 2 is not JSON"),
    ([pair(1), {"messages": [{"role": "robot", "content": "beep"}]}],
     "line 2 has a message of the unknown role 'robot'"),
    ([{"messages": TALK[:2]}, {"messages": TALK[1:2]}],
     "no conversation to learn from: it has no response"),
    ([pair(1)], "too short to split"),
    ([], "is empty"),
])
def test_bad_files(tmp_path, rows, words):
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=words) as caught:
        prepare_chat(path, "byte", tmp_path / "p")
    assert "bad" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "p").exists() or not list((tmp_path / "p").iterdir())


def test_bad_settings(many, tmp_path):
    for options, words in (({"block_length": 24}, "block_length 24 does not divide seq_len 128"),
                           ({"padding": "none"}, "padding must be"),
                           ({"seq_len": 8}, "fill the context of 8 tokens")):
        with pytest.raises(ValueError, match=words):
            ChatDataset(many, **{"seq_len": 128, **options})
    for name, words in (("alpaka", "did you mean 'alpaca'"),
                        ("alpaca[test:5]", "name\\[train:1000\\]"),
                        ("nowhere.jsonl", "no chat data"), ("pydocs_chat+", "no chat")):
        with pytest.raises(FileNotFoundError, match=words):
            prepare_chat(name, "byte", tmp_path)
    with pytest.raises(FileNotFoundError, match="pydocs_chat"):
        prepare("pydoc_chat", "byte", root=tmp_path)
    with pytest.raises(ValueError, match="train:1000"):
        prepare("alpaca", "byte", max_tokens=5, root=tmp_path)


@pytest.mark.parametrize("damage", ["train.index", "val.mask", "meta.json", "train.bin"])
def test_damage_is_repaired(tmp_path, damage):
    path = write(tmp_path / "a.jsonl", *map(pair, range(20)))
    folder = prepare_chat(path, "byte", tmp_path / "p")
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / damage).write_bytes(good[damage][:-3])
    with pytest.raises(ValueError):
        ChatDataset(folder, 128)
    (folder / damage).unlink()
    with pytest.raises(FileNotFoundError):
        ChatDataset(folder, 128)
    assert prepare_chat(path, "byte", tmp_path / "p") == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == good
