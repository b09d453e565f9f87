"""sampling/server.py with real sockets, the `openai` client and a real browser. Every server here
has a tiny random model."""

import http.client
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scripts import Script, run
from tiny import tiny_checkpoint, tiny_model, tiny_sampler
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import kernels
from data.tokenizer import Tokenizer
from sampling import server as serve
from sampling.api import Completion
from sampling.engine import Step
from sampling.sampler import Sampler

SETTINGS = {
    "max_new_tokens": 0,
    "steps": 0,
    "block_length": 0,
    "temperature": "auto",
    "remasking": "auto",
    "threshold": 0.0,
    "factor": 0.0,
    "cache": "auto",
    "cfg_scale": 0.0,
    "schedule": "",
    "seed": 1337,
}


def start(max_queue=serve.MAX_QUEUE, sampler=None, **model):
    server = serve.Server(sampler or tiny_sampler(**model), SETTINGS, 0, max_queue)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    return server


@pytest.fixture(scope="module")
def server():
    server = start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, path, body=None, method=None, headers=None, raw=None):
    """(status, answer): JSON read, text otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    connection.request(method or ("GET" if data is None else "POST"), path, data, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if response.headers[
        "Content-Type"
    ] == "application/json" else text


def events(text):
    """What a stream of server-sent events said."""
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def texts_of(completion):
    """The text of each chunk of a stream whose job is done."""
    chunks = []
    while (event := completion.job.events.get()) is not None:
        chunks += completion.chunks(*event)
    chunks += completion.last_chunks()
    return [chunk["choices"][0]["text"] for chunk in chunks]


def complete(server, **body):
    status, answer = ask(server, "/v1/completions", body)
    assert status == 200, answer
    return answer


class SlowSampler(Sampler):
    """Takes its time: each step waits."""

    delay = 0.02

    def run(self, sequences, arguments, gaps=False, on_step=None):
        def slowly(step):
            time.sleep(self.delay)
            on_step(step)

        return super().run(sequences, arguments, gaps, slowly)


def slow(delay=0.02):
    fast = tiny_sampler()
    sampler = SlowSampler(fast.model, fast.tokenizer, "slow")
    sampler.delay = delay
    return sampler


# ---- what it answers -----------------------------------------------------------------------------
def test_a_completion_has_the_shape_of_openai(server):
    answer = complete(server, model="any", prompt="Once", max_tokens=10, seed=1)
    [choice] = answer["choices"]
    assert (
        answer["object"] == "text_completion"
        and answer["id"].startswith("cmpl-")
        and answer["model"] == "tiny"
    )
    assert (
        choice["index"] == 0
        and choice["finish_reason"] in ("stop", "length")
        and isinstance(choice["text"], str)
    )
    assert (
        answer["usage"]["prompt_tokens"] == 4
        and answer["usage"]["total_tokens"] == 4 + answer["usage"]["completion_tokens"]
    )


def test_seed_n_temperature_and_lists_of_prompts(server):
    first, again, other = (
        complete(server, prompt="ab", max_tokens=20, temperature=1, seed=seed, n=2)["choices"]
        for seed in (5, 5, 6)
    )
    assert first == again != other and first[0]["text"] != first[1]["text"]
    greedy = complete(
        server, prompt=["ab", "cde"], max_tokens=9, temperature=0, remasking="low_confidence", n=2
    )["choices"]
    assert [c["index"] for c in greedy] == [0, 1, 2, 3]
    assert greedy[0]["text"] == greedy[1]["text"] and greedy[2]["text"] == greedy[3]["text"]
    tokens = complete(
        server,
        prompt=[[97, 98], [99, 100, 101]],
        max_tokens=9,
        temperature=0,
        remasking="low_confidence",
    )["choices"]
    assert [c["text"] for c in tokens] == [greedy[0]["text"], greedy[2]["text"]]
    assert (
        complete(server, prompt=[97, 98], max_tokens=9, temperature=0, remasking="low_confidence")[
            "choices"
        ][0]["text"]
        == greedy[0]["text"]
    )


def test_stop_strings_and_echo(server):
    whole = complete(server, prompt="ab", max_tokens=40, seed=3)["choices"][0]["text"]
    stop = whole[5:7]
    [choice] = complete(
        server, prompt="ab", max_tokens=40, seed=3, stop=["never there", stop], echo=True
    )["choices"]
    assert choice["text"] == "ab" + whole[: whole.index(stop)] and choice["finish_reason"] == "stop"


def test_infilling_by_suffix_and_by_gap(server):
    [choice] = complete(server, prompt="ab", suffix="yz", max_tokens=3, seed=1)["choices"]
    assert not choice["text"].startswith("ab") and not choice["text"].endswith("yz")
    [choice] = complete(server, prompt="ab[MASK:3]yz", seed=1)["choices"]
    assert choice["text"].startswith("ab") and choice["text"].endswith("yz")


def test_usage_counts_what_was_given_and_what_was_written(server):
    """Of gaps as well, wherever they stand."""
    for body, given, written in (
        (dict(prompt="ab", suffix="yz", max_tokens=3), 4, 3),
        (dict(prompt="ab[MASK:3]y[MASK]z", n=2), 4, 8),
    ):
        usage = complete(server, **body, seed=1)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (given, written)


@pytest.mark.parametrize("written, text", [("the capital", " the capital"), ("##s the", "s the")])
def test_a_completion_goes_on_after_its_prompt(written, text):
    """A word of WordPiece has its space, though it is the first that was written."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "the", "capital", "##s"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    model = tiny_model(vocab_size=9, mask_token_id=3, eos_token_id=2)
    sampler = FixedSampler(model, Tokenizer(backend, {"mask_token": "[MASK]"}), "fixed")
    sampler.answer = [vocab[word] for word in written.split()]
    for stream in (False, True):
        body = {"max_tokens": 2, "stream": stream}
        completion = Completion(sampler, SETTINGS, body, ["paris is"], ["paris is"])
        serve.Worker(sampler).work([completion.job])
        assert completion.whole()["choices"][0]["text"] == "paris is" + text
        if stream:
            assert "".join(texts_of(completion)) == "paris is" + text


def test_a_chat_completion(server):
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    status, answer = ask(
        server, "/v1/chat/completions", {"messages": messages, "max_completion_tokens": 8}
    )
    assert (
        status == 200
        and answer["object"] == "chat.completion"
        and answer["choices"][0]["message"]["role"] == "assistant"
    )


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", {"prompt": "ab", "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_a_stream_says_the_same_as_the_whole(server, path, body):
    body = {**body, "max_tokens": 30, "seed": 4, "n": 2, "temperature": 1}
    whole = [
        choice.get("text", choice.get("message", {}).get("content"))
        for choice in ask(server, path, body)[1]["choices"]
    ]
    status, text = ask(
        server, path, {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    *chunks, done = events(text)
    chunks = [json.loads(chunk) for chunk in chunks]
    assert (
        done == "[DONE]" and chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] > 0
    )
    said, reasons = ["", ""], []
    for chunk in chunks:
        for choice in chunk["choices"]:
            said[choice["index"]] += (
                choice["text"] if "text" in choice else choice["delta"].get("content", "")
            )
            reasons += [choice["finish_reason"]] * (choice["finish_reason"] is not None)
    assert said == whole and len(reasons) == 2
    assert len(chunks) > 5, "text comes as it is finished"


def test_a_stream_waits_where_tokens_may_be_masked_again(server):
    body = {
        "prompt": "ab",
        "max_tokens": 20,
        "steps": 60,
        "remask": 0.5,
        "remask_schedule": "rescale",
        "seed": 4,
        "temperature": 1,
    }
    chunks = [
        json.loads(chunk)
        for chunk in events(ask(server, "/v1/completions", {**body, "stream": True})[1])[:-1]
    ]
    assert [chunk["choices"][0]["text"] for chunk in chunks][-1] == complete(server, **body)[
        "choices"
    ][0]["text"]
    assert not any(chunk["choices"][0]["text"] for chunk in chunks[:-1])


@pytest.mark.filterwarnings("ignore:editing ended")
@pytest.mark.parametrize("blocks", [{}, {"block_length": 8, "blocks_from_start": True}])
def test_a_stream_waits_where_tokens_may_be_written_anew(blocks):
    """What was sent cannot be taken back, and LLaDA2.1 edits a block until nothing changes."""
    model = tiny_model(**blocks, threshold=0.9, edit_threshold=0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # now its blocks do something
        if parameter.ndim == 2:
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    model.head.weight.data[128:] = 0
    sampler = Sampler(model, Tokenizer.bytes(), "tiny")
    body = {"max_tokens": 32, "seed": 3, "threshold": 0.5, "edit_threshold": 0.0, "stream": True}
    completion = Completion(sampler, SETTINGS, body, ["ab"], [""])
    serve.Worker(sampler).work([completion.job])  # as its thread does
    texts = texts_of(completion)
    assert "".join(texts) == completion.whole()["choices"][0]["text"]
    assert sum(map(bool, texts)) > (3 if blocks else 0), "a block is sent after its edits"


def test_top_p_and_the_other_rules_reach_the_sampler(server):
    body = {"prompt": "ab", "max_tokens": 12, "temperature": 1, "remasking": "low_confidence"}
    greedy = complete(server, **{**body, "temperature": 0})["choices"][0]["text"]
    assert {
        complete(server, **body, top_p=0, seed=seed)["choices"][0]["text"] for seed in range(3)
    } == {greedy}
    assert {
        complete(server, **body, top_k=1, seed=seed)["choices"][0]["text"] for seed in range(3)
    } == {greedy}
    assert (
        len(
            {
                complete(server, **body, top_p=1, seed=seed)["choices"][0]["text"]
                for seed in range(3)
            }
        )
        == 3
    )

    def steps(**options):
        status, text = ask(server, "/generate", {"max_tokens": 12, "seed": 1, **options})
        return re.search(r"in (\d+) forward", text)[1]

    assert steps() == "12" and int(steps(entropy_bound=50.0)) < 12


def test_a_stream_holds_back_what_could_be_a_stop(server):
    body = {"prompt": "ab", "max_tokens": 30, "seed": 4, "temperature": 1}
    stop = complete(server, **body)["choices"][0]["text"][8:12]
    whole = complete(server, **body, stop=stop)["choices"][0]["text"]
    chunks = [
        json.loads(chunk)
        for chunk in events(
            ask(server, "/v1/completions", {**body, "stop": stop, "stream": True})[1]
        )[:-1]
    ]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole


class FixedSampler(Sampler):
    """Writes the same tokens whatever the model says."""

    answer = ()

    def run(self, sequences, arguments, gaps=False, on_step=None):
        rows = [list(sequence) + list(self.answer) for sequence in sequences]
        for n in range(len(self.answer) if on_step else 0):  # from the left to the right
            canvas = torch.tensor(
                [
                    row[: len(row) - len(self.answer) + n + 1]
                    + [self.mask_id] * (len(self.answer) - n - 1)
                    for row in rows
                ]
            )
            revealed = torch.zeros_like(canvas, dtype=torch.bool)
            revealed[:, canvas.shape[1] - len(self.answer) + n] = True
            on_step(
                Step(
                    n + 1,
                    canvas,
                    revealed,
                    torch.zeros(canvas.shape),
                    torch.tensor([len(row) for row in rows]),
                )
            )
        return rows


@pytest.mark.parametrize(
    "written, stop, text, reason, used",
    [
        ("4<|im_start|>the 5", "<|im_start|>", "4", "stop", 7),
        ("4<|im_start|>\n5", ["x", "<|im_start|>\n"], "4", "stop", 4),
        ("ab4<|im_start|>the 5", ["the", "<|im_start|>t"], "ab4", "stop", 9),
        ("4<|im_start|>5", ["<|im_end|>"], "45", "length", 3),
        ("4!<|im_start|>5<|endoftext|>6", ["!<|im_start|>"], "4", "stop", 4),
        ("4!<|endoftext|>6", ["!<|endoftext|>"], "4", "stop", 2),
    ],
)
def test_stops_that_are_special_tokens(written, stop, text, reason, used):
    fast = tiny_sampler()
    sampler = FixedSampler(fast.model, fast.tokenizer, "fixed")
    sampler.answer = fast.tokenizer.encode(written, parse_special=True)
    server = start(sampler=sampler)
    for path, body in (
        ("/v1/completions", {"prompt": "ab"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        body = body | {"max_tokens": len(sampler.answer), "stop": stop}
        [choice] = ask(server, path, body)[1]["choices"]
        assert (
            choice.get("text", choice.get("message", {}).get("content")),
            choice["finish_reason"],
        ) == (text, reason)
        assert ask(server, path, body)[1]["usage"]["completion_tokens"] == used
        chunks = [
            json.loads(chunk)["choices"][0]
            for chunk in events(ask(server, path, {**body, "stream": True})[1])[:-1]
        ]
        assert (
            "".join(
                chunk.get("text", chunk.get("delta", {}).get("content", "")) for chunk in chunks
            )
            == text
        )
        assert chunks[-1]["finish_reason"] == reason
    server.shutdown()
    server.server_close()


def test_the_page_and_its_runs(server):
    status, text = ask(server, "/")
    assert status == 200 and "const TRACE = /*TRACE*/ null" in text
    assert (
        ask(server, "/v1/models")[1]["data"][0]["id"]
        == "tiny"
        == ask(server, "/v1/models/tiny")[1]["id"]
    )
    first, *steps, last, report = [
        json.loads(event)
        for event in events(
            ask(server, "/generate", {"prompt": "ab[MASK:4]yz", "steps": 2, "seed": 1})[1]
        )
    ]
    assert first["rows"] == [["a", "b", None, None, None, None, "y", "z"]]
    assert [len(step["changes"]) for step in steps] == [2, 2] and "".join(
        last["pieces"][0]
    ) == report["texts"][0]
    assert report["report"].startswith("4 tokens in 2 forward passes")
    assert (
        ask(server, "/generate", {"prompt": "hi", "chat": True, "n": 2, "max_tokens": 8})[0] == 200
    )


def test_autoregressive_and_block_models_are_served_too():
    for model in ({"causal": True, "shift": True, "bos_token_id": 256}, {"block_length": 4}):
        server = start(**model)
        body = {"prompt": ["", "ab"], "max_tokens": 12, "temperature": 0}
        whole = [choice["text"] for choice in complete(server, **body)["choices"]]
        said = ["", ""]
        for event in events(ask(server, "/v1/completions", {**body, "stream": True})[1])[:-1]:
            for choice in json.loads(event)["choices"]:
                said[choice["index"]] += choice["text"]
        assert said == whole and all(whole)
        assert ask(server, "/generate", {"prompt": ""})[0] == 200
        server.shutdown()
        server.server_close()


# ---- mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path, body, status, words",
    [
        ("/v1/completions", b"{", 400, "not valid JSON"),
        ("/v1/completions", b"\xff", 400, "not valid JSON"),
        ("/v1/completions", b"[" * 100_000, 400, "not valid JSON"),
        ("/v1/completions", b'{"temperature": NaN}', 400, "not valid JSON"),
        ("/v1/completions", b"[]", 400, "must be a JSON object"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, ""),
        ("/v1/completions", {"prompt": 3}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": [10**9]}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": [257]}, 400, "mask token at position 0"),
        ("/v1/completions", {"prompt": "a" * 200}, 400, "exceed the context of 128"),
        ("/v1/completions", {"prompt": "a[MASK:200]"}, 400, "between 1 and the context"),
        ("/v1/completions", {"prompt": "a[MASK:100][MASK:100]"}, 400, "exceed the context of 128"),
        ("/v1/completions", {"max_tokens": "many"}, 400, "max_tokens must be a whole number"),
        ("/v1/completions", {"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ("/v1/completions", {"max_tokens": -3}, 400, "max_tokens must be at least 1"),
        ("/v1/completions", {"max_tokens": 10**30}, 400, "exceed the context"),
        ("/v1/completions", {"n": 0}, 400, "must be at least 1"),
        ("/v1/completions", {"n": True}, 400, "n must be a whole number"),
        ("/v1/completions", {"n": 99}, 400, "99 answers"),
        ("/v1/completions", {"temperature": -1}, 400, "temperature must not be negative"),
        ("/v1/completions", {"temperature": 1e308}, 400, "out of range"),
        ("/v1/completions", {"top_p": 1.5}, 400, "top_p must be between"),
        ("/v1/completions", {"top_k": -1}, 400, "top_k must be at least 1"),
        (
            "/v1/completions",
            {"alg_temp": 1, "remasking": "random"},
            400,
            "needs a rule that asks the model",
        ),
        ("/v1/completions", {"entropy_bound": -1}, 400, "entropy_bound must not be negative"),
        (
            "/v1/completions",
            {"remask": 0.5, "remasking": "entropy"},
            400,
            "remask needs remasking ancestral",
        ),
        ("/v1/completions", {"remask_schedule": "often"}, 400, "remask_schedule must be one of"),
        ("/v1/completions", {"suppress": "never heard of"}, 400, "suppress takes ids or names"),
        ("/v1/completions", {"suppress": "99999"}, 400, "outside the vocabulary"),
        ("/v1/completions", {"defer": [3]}, 400, "defer must be a string"),
        ("/v1/completions", {"seed": [1, 2]}, 400, "seed must be a whole number"),
        ("/v1/completions", {"logprobs": 3}, 400, "logprobs is not supported"),
        ("/v1/completions", {"promt": ""}, 400, "unrecognized request argument: promt"),
        ("/v1/completions", {"stop": [""]}, 400, "stop must be"),
        ("/v1/completions", {"stop": ["a"] * 5}, 400, "stop must be"),
        ("/v1/completions", {"stream": "yes"}, 400, "stream must be true or false"),
        (
            "/v1/completions",
            {"steps": 1, "block_length": 2, "max_tokens": 8},
            400,
            "too few for 4 blocks",
        ),
        ("/v1/completions", {"steps": 10**9}, 400, "steps must be at most"),
        ("/v1/completions", {"block_length": 99, "max_tokens": 8}, 400, "block_length"),
        ("/v1/completions", {"threshold": 2, "stream": True}, 400, "threshold must be"),
        (
            "/v1/completions",
            {"cfg_scale": 1, "cache": "dual"},
            400,
            "cfg_scale works without a cache",
        ),
        ("/v1/chat/completions", {}, 400, "at least one message"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "tools": [{}]},
            400,
            "tools is not supported",
        ),
        ("/generate", {"prompt": "a", "cache": "big"}, 400, "cache must be"),
        ("/nowhere", {}, 404, "nothing that this server knows"),
        ("/v1/models", {}, 405, "nothing that this server knows"),
        ("/v1/completions", b"x" * (serve.MAX_BODY + 1), 413, "longer than"),
    ],
)
def test_a_mistake_is_4xx_with_an_error_of_openai(server, path, body, status, words):
    got, answer = ask(
        server, path, **({"raw": body} if isinstance(body, bytes) else {"body": body})
    )
    assert (
        got == status
        and words in answer["error"]["message"]
        and answer["error"]["type"] == "invalid_request_error"
    ), answer
    assert complete(server, prompt="a", max_tokens=2), "and the server goes on"


def test_a_users_words_may_spell_the_mask(server):
    """In chats, prompts and suffixes; no answer takes them for something to fill in."""
    words = "What is <|mask|>?"
    asked = {"messages": [{"role": "user", "content": words}], "max_tokens": 2}
    status, answer = ask(server, "/v1/chat/completions", asked)
    assert status == 200, answer
    prompt = server.sampler.encode_chat(asked["messages"])
    assert answer["usage"]["prompt_tokens"] == len(prompt) and prompt.count(257) == 0
    answer = complete(server, prompt=words, max_tokens=2, echo=True)
    assert answer["choices"][0]["text"].startswith(words)
    answer = complete(server, prompt=words, suffix="[MASK] <|mask|>", max_tokens=2)
    assert answer["usage"]["prompt_tokens"] == len(words) + len("[MASK] <|mask|>")
    for chat in (False, True):
        status, text = ask(server, "/generate", {"prompt": words, "chat": chat, "max_tokens": 2})
        rows = json.loads(events(text)[0])["rows"]
        assert status == 200 and "<|mask|>" in "".join(piece or "" for piece in rows[0])
        assert rows[0].count(None) == 2


def test_chatml_for_want_of_a_template_is_said_once_and_not_for_each_request(tmp_path, capfd):
    tiny_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    server = start(sampler=Sampler.load(tmp_path))
    try:
        for _ in range(3):
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            assert ask(server, "/v1/chat/completions", body)[0] == 200
    finally:
        server.shutdown()
        server.server_close()
    assert capfd.readouterr().err.count("no chat template") == 1


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/", headers={"Host": "evil.example"})[0] == 403
    assert ask(server, "/", headers={"Host": "[bad"})[0] == 403
    assert ask(server, "/generate", {}, headers={"Origin": "https://evil.example"})[0] == 403
    assert ask(server, "/generate", {}, headers={"Origin": "null"})[0] == 403
    assert (
        ask(server, "/generate", {"max_tokens": 2}, headers={"Origin": "http://localhost:1234"})[0]
        == 200
    )


@pytest.mark.parametrize(
    "request_text, status",
    [
        ("GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        ("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        ("PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        ("nonsense\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 403),
        ("GET /" + "a" * 70_000 + " HTTP/1.1\r\n\r\n", 414),
        (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Length: 99999999999999\r\n\r\n",
            413,
        ),
    ],
)
def test_what_is_hardly_http(server, request_text, status):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request_text.encode())
        answer = connection.recv(65536).decode()
        assert (
            re.match(rf"HTTP/1\.\d {status} |\{{\"error\"", answer)
            and str(status) in answer[:60]
            or "Bad request" in answer
        ), answer


def test_a_port_in_use_is_one_line(server, tmp_path):
    result = run(
        "sample.py",
        f"--checkpoint={tiny_checkpoint(tmp_path / 'tiny')}",
        f"--serve={server.server_port}",
    )
    assert result.status == 2 and re.fullmatch(
        r"error: port \d+ cannot be used \(.*\): choose another with --serve=\.\.\.\n", result.err
    )


# ---- many at once --------------------------------------------------------------------------------
def test_500_requests_without_an_error_and_with_flat_memory(server):
    def one(i):
        if i % 10 == 9:
            return ask(server, "/v1/completions", {"prompt": "a" * 500})[0] == 400
        path, body = [
            ("/v1/completions", {"prompt": "x" * (i % 5)}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/completions", {"prompt": "abc", "stream": True}),
            ("/generate", {"prompt": "a[MASK:2]"}),
        ][i % 4]
        return (
            ask(server, path, {**body, "max_tokens": 4, **({"seed": i} if i % 7 == 0 else {})})[0]
            == 200
        )

    def memory():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    with ThreadPoolExecutor(16) as pool:
        # Each thread's first requests make room that stays: after some 400 nothing grows.
        assert all(pool.map(one, range(400)))
        before = memory()
        assert all(pool.map(one, range(100)))
    assert memory() - before < 8e6
    end = time.monotonic() + 5
    while threading.active_count() > 8 and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= 8, "no thread is left behind"


def test_32_ask_at_once_share_batches_and_the_page_answers():
    server = start(sampler=slow(0.01))
    body = {"prompt": "ab", "max_tokens": 24, "temperature": 0, "remasking": "low_confidence"}
    alone = complete(server, **body)
    with ThreadPoolExecutor(33) as pool:
        answers = [
            pool.submit(complete, server, **{**body, "prompt": "ab"[: i % 3]}) for i in range(32)
        ]
        time.sleep(0.1)
        assert not all(answer.done() for answer in answers)
        begin = time.monotonic()
        assert ask(server, "/")[0] == 200
        assert time.monotonic() - begin < 1
        answers = [answer.result() for answer in answers]
    assert {answer["choices"][0]["text"] for answer in answers[2::3]} == {
        alone["choices"][0]["text"]
    }, "a batch changes nothing"
    assert server.worker.batches <= 8
    server.shutdown()
    server.server_close()


def test_seeded_requests_share_a_batch_and_each_gets_what_it_gets_alone():
    server = start(sampler=slow(0.01))
    bodies = [
        {
            "prompt": "ab"[: i % 3],
            "max_tokens": 12,
            "temperature": 1,
            "seed": 20 + i % 5,
            "n": 1 + i % 2,
        }
        for i in range(10)
    ]

    def texts(answer):
        return [choice["text"] for choice in answer["choices"]]

    alone = [texts(complete(server, **body)) for body in bodies]
    before = server.worker.batches
    with ThreadPoolExecutor(10) as pool:
        together = [
            texts(answer) for answer in pool.map(lambda body: complete(server, **body), bodies)
        ]
    assert together == alone and server.worker.batches - before <= 4
    unseeded = [texts(complete(server, max_tokens=12, temperature=1, n=2)) for _ in range(2)]
    assert len({text for pair in unseeded for text in pair}) == 4
    server.shutdown()
    server.server_close()


def test_overload_is_429_and_passes():
    server = start(max_queue=2, sampler=slow())
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda seed: ask(server, "/v1/completions", {"max_tokens": 10, "seed": seed}),
                range(12),
            )
        )
    assert {status for status, _ in answers} == {200, 429}
    assert all(
        answer["error"]["type"] == "rate_limit_error" for status, answer in answers if status == 429
    )
    assert complete(server, max_tokens=2)
    server.shutdown()
    server.server_close()


def test_a_mistake_in_a_batch_is_nobody_elses_trouble():
    server = start(sampler=slow(0.01))
    with ThreadPoolExecutor(8) as pool:  # the mask token in a prompt is found by generate only
        answers = list(
            pool.map(
                lambda prompt: ask(server, "/v1/completions", {"prompt": prompt, "max_tokens": 8})[
                    0
                ],
                [[97], [257]] * 4,
            )
        )
    assert answers == [200, 400] * 4
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_run(stream):
    server = start(sampler=slow(0.05))
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({"max_tokens": 120, "stream": stream, "temperature": 1}),
    )
    time.sleep(0.3)
    connection.sock.close()
    connection.close()
    begin = time.monotonic()
    assert complete(server, max_tokens=1)
    assert time.monotonic() - begin < 4 and server.worker.passes < 100
    server.shutdown()
    server.server_close()


def test_the_matrices_are_packed_once_for_all_requests(monkeypatch):
    packed, plain = [], kernels.PackedProduct
    monkeypatch.setattr(kernels, "PackedProduct", lambda *a: packed.append(1) or plain(*a))
    server = start()
    complete(server, prompt="ab", max_tokens=4)
    first = len(packed)
    complete(server, prompt="abc", max_tokens=4)
    assert first > 0 and len(packed) == first
    server.shutdown()
    server.server_close()
    model = server.sampler.model
    assert all("forward" not in vars(module) for module in model.modules()), "as it was"


# ---- existing clients ----------------------------------------------------------------------------
def test_the_openai_client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0
    ) as client:
        assert client.models.list().data[0].id == "tiny"
        answer = client.completions.create(
            model="tiny",
            prompt="Once",
            max_tokens=8,
            temperature=0.5,
            n=2,
            seed=1,
            stop=["zzz"],
            extra_body={"steps": 4, "remasking": "low_confidence"},
        )
        assert len(answer.choices) == 2 and answer.usage.prompt_tokens == 4
        messages = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, seed=2
        )
        assert isinstance(answer.choices[0].message.content, str)
        stream = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, seed=2, stream=True
        )
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            == answer.choices[0].message.content
        )
        with pytest.raises(openai.BadRequestError, match="context"):
            client.completions.create(model="tiny", prompt="a" * 1000)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="tiny", input="a")


class Browser:
    """Headless Chromium by its DevTools protocol over two pipes: JSON messages that end in a zero
    byte."""

    def __init__(self, program, folder):
        (inner_read, self.write), (self.read, inner_write) = os.pipe(), os.pipe()
        # The browser expects to read from descriptor 3 and to write to 4.
        command = f'exec "$0" "$@" 3<&{inner_read} 4>&{inner_write}'
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                command,
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={folder}",
                "--window-size=1000,760",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            pass_fds=(inner_read, inner_write),
            env={**os.environ, "TMPDIR": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inner_read)
        os.close(inner_write)
        self.received, self.number, self.session = b"", 0, None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)[
            "sessionId"
        ]

    def call(self, method, **parameters):
        self.number += 1
        message = {
            "id": self.number,
            "method": method,
            "params": parameters,
            **({"sessionId": self.session} if self.session else {}),
        }
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.received:
                part = os.read(self.read, 65536)
                assert part, "the browser has gone"
                self.received += part
            answer, _, self.received = self.received.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.number:
                assert "result" in answer, answer
                return answer["result"]

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script, seconds=20):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)

    def type_into(self, id, text):
        self.run(f"document.getElementById('{id}').focus()")
        self.call("Input.insertText", text=text)

    def click(self, id):
        box = self.run(
            "(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.getElementById('{id}').getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not program:
        pytest.skip("there is no Chromium here")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_in_a_browser_one_types_a_prompt_and_watches_it_unmask(browser):
    server = start(sampler=slow(0.03))
    browser.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
    browser.wait_for(
        "['tiny', 'slow'].includes(document.getElementById('title')?.textContent)"
    )
    browser.type_into("prompt", "Hello <b>you</b>")
    browser.run("document.querySelector('[name=max_tokens]').focus()")
    browser.call("Input.insertText", text="20")
    browser.click("go")
    browser.wait_for("document.querySelectorAll('.mask').length > 0")
    masks = browser.run("document.querySelectorAll('.mask:not([hidden])').length")
    browser.wait_for(f"document.querySelectorAll('.mask:not([hidden])').length < {masks}")
    browser.wait_for("document.getElementById('report').textContent.includes('tokens/s')")
    assert browser.run("document.querySelectorAll('.mask').length") == 0
    assert browser.run("document.querySelectorAll('.written').length") == 20
    assert browser.run("document.querySelector('.row').textContent").startswith("Hello <b>you</b>")
    browser.run(
        "document.getElementById('slider').value = 5; document.getElementById('slider').oninput()"
    )
    assert browser.run("document.querySelectorAll('.mask').length") == 15, (
        "the run can be played again"
    )

    browser.run("document.getElementById('prompt').select()")  # infilling
    browser.type_into("prompt", "ab[MASK:6]yz")
    browser.click("go")
    browser.wait_for("document.getElementById('report').textContent.startsWith('6 tokens')")
    assert re.fullmatch(
        r"ab.*yz", browser.run("document.querySelector('.row').textContent"), re.DOTALL
    )

    browser.run("document.getElementById('prompt').select()")  # a mistake
    browser.type_into("prompt", "x" * 300)
    browser.click("go")
    browser.wait_for("document.getElementById('status').textContent.includes('exceed the context')")

    browser.run("document.getElementById('prompt').select()")  # stopping
    browser.type_into("prompt", "again")
    browser.run("document.querySelector('[name=max_tokens]').value = '100'")
    browser.click("go")
    browser.wait_for("document.getElementById('status').textContent === 'unmasking'")
    browser.click("stop")
    browser.wait_for("document.getElementById('status').textContent === 'stopped'")
    server.shutdown()
    server.server_close()


def test_in_a_browser_the_trace_plays(browser, tmp_path):
    result = run(
        "sample.py",
        f"--checkpoint={tiny_checkpoint(tmp_path / 'tiny')}",
        "--prompt=</script>&",
        "--max_new_tokens=8",
        f"--html={tmp_path}/t.html",
        "--remasking=low_confidence",
    )
    assert result.status == 0, result
    browser.call("Page.navigate", url=f"file://{tmp_path}/t.html#step=3&colour=order")
    browser.wait_for("document.querySelectorAll('.row').length === 1")
    assert browser.run("document.querySelectorAll('.mask').length") == 5
    assert browser.run("document.getElementById('view').className").endswith("order")
    assert browser.run("document.querySelector('.row').textContent").startswith("</script>&")
    browser.click("play")
    browser.wait_for("document.querySelectorAll('.mask').length === 0")
    assert browser.run("document.querySelectorAll('.written').length") == 8
    assert not browser.run("performance.getEntriesByType('resource').length"), "nothing is fetched"


def test_the_server_as_a_user_starts_it(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Script(
        "sample.py", f"--checkpoint={tiny_checkpoint(tmp_path / 'tiny')}", f"--serve={port}"
    )

    assert script.wait_for(lambda: "Ctrl-C stops" in Path(script.paths[0]).read_text())
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "POST", "/v1/completions", json.dumps({"max_tokens": 120, "steps": 120})
    )  # in the middle of work
    script.signal(2)
    result = script.wait(20)
    assert (
        result.status == 0
        and f"http://127.0.0.1:{port} for the page" in result.out
        and result.err == ""
    )
