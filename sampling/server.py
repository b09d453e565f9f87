"""The server of `sample.py --serve=PORT`: page.html, where one watches tokens unmask, and OpenAI's API, on 127.0.0.1 alone.

    GET  /                      the page                        POST /generate               a run, step by step (server-sent events)
    GET  /v1/models             the checkpoint                  POST /v1/completions, /v1/chat/completions

Each connection has a thread; one more thread, the `Worker`, owns the model. Requests wait in its queue, and those with the same
sampler settings share a batch, whatever their seeds. Besides OpenAI's fields a request may set the sampler's, SAMPLER_FIELDS, which mean
what they do in sample.py. A `suffix`, or [MASK] in a prompt, asks for infilling.
"""
import collections
import contextlib
import dataclasses
import json
import queue
import secrets
import select
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from common import seed_for
from sampling.sampler import GAP, Trace

MAX_BATCH = 16              # rows in a forward pass; also the largest n times prompts of one request
MAX_QUEUE = 64              # requests waiting; one more gets 429
MAX_CONNECTIONS = 256       # threads; one more gets 429
MAX_BODY = 2**20            # bytes of a request; more gets 413
MAX_STEPS = 10_000
IDLE = 30                   # seconds after which a silent connection is closed


class Refusal(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self):
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ---- the worker ----------------------------------------------------------------------------------------------------------------
class Job:
    """One request: sequences with one set of arguments. `events` receives the Trace's messages, if `watched`, and at last None."""

    def __init__(self, sequences, arguments, gaps=False, watched=False, chat=False):
        self.sequences, self.arguments, self.gaps, self.watched, self.chat = sequences, dict(arguments), gaps, watched, chat
        seed = self.arguments.pop("seed")                           # one a row, so that a batch gives each what it gets alone
        seed = secrets.randbits(62) if seed is None else seed
        others = range(1, len(sequences))
        self.seeds = [seed] + [seed_for("sequence of a request", seed, i) for i in others]
        self.events, self.trace = queue.SimpleQueue(), None
        self.result = self.error = None
        self.cancelled = False                                      # set when the client has gone

    def key(self):
        """Jobs with equal keys may share a batch."""
        return self.gaps, tuple(sorted(self.arguments.items()))


class Cancelled(Exception):
    pass


class Worker(threading.Thread):
    """The only thread that runs the model."""

    def __init__(self, sampler, max_queue=MAX_QUEUE):
        super().__init__(daemon=True)
        self.sampler, self.max_queue, self.jobs, self.change = sampler, max_queue, collections.deque(), threading.Condition()
        self.passes, self.batches, self.stopping = 0, 0, False

    def submit(self, job):
        """Raises Refusal, 429, when too many wait."""
        with self.change:
            if len(self.jobs) >= self.max_queue:
                raise Refusal(429, f"{len(self.jobs)} requests are waiting already: try again later", code="overloaded")
            self.jobs.append(job)
            self.change.notify()

    def stop(self):
        """End after the current step: a thread inside torch must not outlive the interpreter."""
        with self.change:
            self.stopping = True
            self.change.notify()
        if self.is_alive():
            self.join(10)

    def run(self):
        while batch := self.next_batch():
            self.work(batch)

    def next_batch(self):
        """The oldest job and those behind it that fit to it, MAX_BATCH rows at most; None at the end."""
        with self.change:
            while not self.jobs and not self.stopping:
                self.change.wait()
            if self.stopping:
                return None
            batch, rows = [self.jobs.popleft()], 0
            rows, key = len(batch[0].sequences), batch[0].key()
            for job in list(self.jobs):
                if job.key() == key and rows + len(job.sequences) <= MAX_BATCH:
                    self.jobs.remove(job)
                    batch.append(job)
                    rows += len(job.sequences)
            return batch

    def work(self, batch):
        """Run the jobs of a batch together; if that fails, each alone, so that a mistake in one is no other's trouble."""
        batch = [job for job in batch if not job.cancelled]
        if not batch:
            return
        ends = torch.tensor([len(job.sequences) for job in batch]).cumsum(0).tolist()
        rows = [slice(end - len(job.sequences), end) for job, end in zip(batch, ends)]
        for job in batch:
            job.trace = Trace(self.sampler, job.arguments["remasking"], self.tell(job) if job.watched else None)

        def on_step(step):
            if self.stopping or all(job.cancelled for job in batch):
                raise Cancelled
            self.passes += 1
            for job, part in zip(batch, rows):
                job.trace.passes = step.number
                if job.watched and not job.cancelled:
                    job.trace(dataclasses.replace(step, **{f.name: value[part] for f in dataclasses.fields(step)
                                                           if isinstance(value := getattr(step, f.name), torch.Tensor)}))

        try:
            sequences = [sequence for job in batch for sequence in job.sequences]
            self.batches += 1
            arguments = batch[0].arguments | {"seed": [seed for job in batch for seed in job.seeds]}
            results = self.sampler.run(sequences, arguments, batch[0].gaps, on_step)
            for job, part in zip(batch, rows):
                job.result = results[part]
        except Cancelled:
            for job in batch:
                job.error = Refusal(503, "the server is shutting down")
        except Exception as error:  # noqa: BLE001  whatever it was, the next request must be answered
            if len(batch) > 1:
                for job in batch:
                    self.work([job])
                return
            batch[0].error = Refusal(400, str(error)) if isinstance(error, ValueError) else Refusal(500, f"{type(error).__name__}: {error}")
        for job in batch:
            if job.watched and job.result is not None:
                job.trace.finish()
            job.events.put(None)

    def tell(self, job):
        def watch(trace, message):
            if message.get("changes") != []:
                # What is finished from the left on is what a stream of text can send; the canvas changes, so it is read here.
                mask = self.sampler.mask_id
                again = job.arguments["remask"]                     # then nothing is finished before the end
                done = [[] if again else row[:row.index(mask)] if mask in row else row for row in trace.canvas]
                job.events.put((message, done))
            trace.messages.clear()                                  # nobody plays it again
        return watch


# ---- reading a request ---------------------------------------------------------------------------------------------------------
SAMPLER_FIELDS = {"steps": int, "block_length": int, "temperature": float, "top_p": float, "top_k": int, "remasking": str, "alg_temp": float,
                  "threshold": float, "factor": float, "entropy_bound": float, "remask": float, "remask_schedule": str, "suppress": str, "defer": str,
                  "cache": str, "cfg_scale": float, "schedule": str, "seed": int}
COMMON_FIELDS = {"model", "max_tokens", "n", "stop", "stream", "stream_options", "user", "metadata", "store", "service_tier", *SAMPLER_FIELDS}
# OpenAI's fields that exist here with one value only, which clients may well send.
NEUTRAL = {"frequency_penalty": (0,), "presence_penalty": (0,), "best_of": (1,), "logprobs": (False,), "logit_bias": ({},),
           "tools": ([],), "functions": ([],), "response_format": ({"type": "text"},), "top_logprobs": (0,), "tool_choice": ("none", "auto"),
           "parallel_tool_calls": (True, False), "modalities": (["text"],)}
NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list", dict: "an object"}


def get(body, name, kind, default=None):
    """body[name], which must be of this kind; `default` where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) and kind is not bool or not isinstance(value, (int, float) if kind is float else kind):
        raise Refusal(400, f"{name} must be {NAMES[kind]}, got {json.dumps(value)[:80]}", name)
    if kind is float and not abs(value) < 1e30:
        raise Refusal(400, f"{name} is out of range", name)
    return value


def check_names(body, known):
    for name, value in body.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise Refusal(400, f"{name} is not supported here", name)
        if name not in known and name not in NEUTRAL:
            raise Refusal(400, f"unrecognized request argument: {name[:80]}", name[:80])


def read_settings(body, settings):
    """The sampler settings of a request: its own, and for the rest those that sample.py was started with."""
    own = {name: get(body, name, kind) for name, kind in SAMPLER_FIELDS.items()}
    own = {**settings, "seed": None, **{name: value for name, value in own.items() if value is not None}}
    if own["steps"] > MAX_STEPS:
        raise Refusal(400, f"steps must be at most {MAX_STEPS}, got {own['steps']}", "steps")
    return {**own, "cache": "" if own["cache"] == "none" else own["cache"]}


def read_stops(body):
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else get(body, "stop", list, [])
    if len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refusal(400, "stop must be a string or a list of up to four strings", "stop")
    return stops


def read_messages(body):
    """[{"role": ..., "content": text}, ...] of a chat request; a content may be a list of text parts."""
    messages = []
    for message in get(body, "messages", list, []):
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise Refusal(400, "each message needs a role: system, developer, user or assistant", "messages")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Refusal(400, "the content of a message must be text", "messages")
        messages.append({"role": "system" if message["role"] == "developer" else message["role"], "content": content})
    if not messages:
        raise Refusal(400, "messages must be a list of at least one message", "messages")
    return messages


def make_job(sampler, settings, body, prompts, chat=False, suffix="", watched=False):
    """(Job, [(first, end) position of the answer in each row]) for prompts: texts or lists of tokens, each of them n times."""
    own, n, asked = read_settings(body, settings), get(body, "n", int, 1), get(body, "max_tokens", int, settings["max_new_tokens"])
    if n < 1 or asked < 0 or body.get("max_tokens") == 0:
        raise Refusal(400, f"n and max_tokens must be at least 1, got {n} and {asked}", "n" if n < 1 else "max_tokens")
    if n * len(prompts) > MAX_BATCH:
        raise Refusal(400, f"{n * len(prompts)} answers asked for, {MAX_BATCH} are possible in one request", "n")
    gaps = bool(suffix) or any(isinstance(prompt, str) and GAP.search(prompt) for prompt in prompts) and not chat
    if gaps and not suffix:
        rows = [sampler.encode_gaps(prompt if isinstance(prompt, str) else sampler.tokenizer.decode(prompt)) for prompt in prompts]
        if longest := max((len(row) for row in rows if len(row) > sampler.config.max_len), default=0):
            raise Refusal(400, f"{longest} tokens exceed the context of {sampler.config.max_len}", code="context_length_exceeded")
        count, spans = max(row.count(sampler.mask_id) for row in rows), [(0, len(row)) for row in rows]
    else:
        rows = [prompt or list(sampler.start) if isinstance(prompt, list) else sampler.encode_prompt(prompt) for prompt in prompts]
        after = sampler.tokenizer.encode(suffix) + sampler.tail if suffix else []
        try:
            count = min(sampler.fit(row + after, asked) for row in rows)
        except ValueError as error:
            raise Refusal(400, str(error), "max_tokens", "context_length_exceeded") from None
        spans = [(len(row), len(row) + count) for row in rows]
        rows = [row + [sampler.mask_id] * count + after for row in rows] if suffix else rows
    if not body.get("block_length"):
        own["block_length"] = min(own["block_length"], count)       # the server's own setting must not forbid short answers
    arguments = sampler.arguments(count, own, gaps, chat)
    job = Job([row for row in rows for _ in range(n)], arguments, gaps, watched, chat)
    return job, [span for span in spans for _ in range(n)]


def answer_text(sampler, tokens, stops, job, final=True):
    """(text, tokens used, finish_reason or None) of the tokens of an answer, all of them or, not `final`, the first ones."""
    if job.gaps:
        text, used, ended = sampler.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), True
    else:
        text, used, ended = sampler.decode(tokens, job.chat)
    text, stopped = sampler.cut_at_special(tokens[:used + 1], text, stops)
    ended = ended or stopped
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)
    if cut >= 0:
        return text[:cut], used, "stop"
    if not final and not ended:                                     # what may still change: half a character, half a stop string
        text = text.rstrip("\ufffd")
        text = text[:len(text) - max(map(len, stops), default=1) + 1]
    return text, used, "stop" if ended else "length" if final else None


# ---- HTTP ----------------------------------------------------------------------------------------------------------------------
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE

    def do_GET(self):
        self.answer({"/": self.page, "/v1/models": self.models}, {"/generate", "/v1/completions", "/v1/chat/completions"})

    def do_POST(self):
        self.answer({"/generate": self.generate, "/v1/completions": self.completions, "/v1/chat/completions": self.chat_completions},
                    {"/", "/v1/models"})

    def answer(self, routes, other_method):
        self.body_read, self.begun = self.command == "GET", False
        try:
            self.check_origin()
            path = urllib.parse.unquote(self.path.partition("?")[0])
            if path in routes:
                routes[path]()
            elif path.startswith("/v1/models/") and self.command == "GET":
                self.models(path.removeprefix("/v1/models/"))
            else:
                raise Refusal(405 if path in other_method else 404, f"{self.command} {path[:200]} is nothing that this server knows")
        except Refusal as refusal:
            self.refuse(refusal)
        except ConnectionError:
            self.close_connection = True
        except TimeoutError:
            self.close_connection = True
        except ValueError as error:                                 # a text that cannot be encoded, a chat template that fails...
            self.refuse(Refusal(400, str(error)))

    def check_origin(self):
        """Other web sites must not reach this server through their visitors' browsers (DNS rebinding, cross-site requests)."""
        origin = self.headers.get("Origin")
        for value in (f"//{self.headers.get('Host', '')}", *([origin] if origin is not None else [])):
            try:
                host = urllib.parse.urlsplit(value).hostname
            except ValueError:
                host = None
            if host not in ("127.0.0.1", "localhost", "::1"):
                raise Refusal(403, "this server answers its own machine only: use http://127.0.0.1")

    def send(self, status, kind, content, **headers):
        if not self.body_read:
            self.close_connection = True                            # what follows on this connection is not a request
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), "X-Content-Type-Options": "nosniff", **headers}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, value, status=200, **headers):
        self.send(status, "application/json", json.dumps(value).encode(), **headers)

    def refuse(self, refusal):
        try:
            if self.begun:                                          # in the middle of a stream
                self.event(refusal.body())
                return
            if not self.body_read:
                self.drain()
            self.send_json(refusal.body(), refusal.status, **({"Retry_After": 1} if refusal.status == 429 else {}))
        except OSError:
            self.close_connection = True

    def send_error(self, code, message=None, explain=None):
        """What the base class calls for a malformed request."""
        self.body_read, self.begun = True, False
        self.close_connection = True
        self.refuse(Refusal(code, message or "bad request"))

    def log_message(self, *_):
        pass

    def read_body(self):
        """The JSON object that was posted."""
        length = self.headers.get("Content-Length", "")
        if not length or self.headers.get("Transfer-Encoding"):
            raise Refusal(411, "send the body with a Content-Length")
        if not length.isascii() or not length.isdigit():
            raise Refusal(400, "the Content-Length is not a number")
        if len(length) > 12 or int(length) > MAX_BODY:
            raise Refusal(413, f"the body is longer than {MAX_BODY} bytes")
        data = self.rfile.read(int(length))
        self.body_read = len(data) == int(length)
        try:
            body = json.loads(data.decode("utf-8"), parse_constant=lambda name: {}[name])           # no NaN, no Infinity
        except (ValueError, KeyError, RecursionError):
            raise Refusal(400, "the body is not valid JSON in UTF-8") from None
        if not isinstance(body, dict):
            raise Refusal(400, "the body must be a JSON object")
        return body

    def drain(self):
        """Read on a little, so that a client that is still sending sees the refusal and not a broken pipe."""
        length = self.headers.get("Content-Length", "")
        left = min(int(length), 2**26) if length.isascii() and length.isdigit() and len(length) <= 12 else 0
        while left > 0 and (part := self.rfile.read(min(left, 2**16))):
            left -= len(part)

    # ---------------------------------------------------------------- what it serves

    def page(self):
        csp = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'"
        self.send(200, "text/html; charset=utf-8", self.server.page, Content_Security_Policy=csp, Cache_Control="no-store")

    def models(self, name=None):
        model = {"id": self.server.sampler.name, "object": "model", "created": self.server.created, "owned_by": "unmask"}
        if name is not None and name != model["id"]:
            raise Refusal(404, f"there is no model {name[:200]!r} here, only {model['id']!r}", "model", "model_not_found")
        self.send_json({"object": "list", "data": [model]} if name is None else model)

    def generate(self):
        """A run for the page: the messages of its Trace, then {"report": ..., "texts": [...]}."""
        body, sampler = self.read_body(), self.server.sampler
        check_names(body, {"prompt", "chat", "max_tokens", "n", *SAMPLER_FIELDS})
        prompt, chat = get(body, "prompt", str, ""), get(body, "chat", bool, False)
        prompt = sampler.encode_chat([{"role": "user", "content": prompt}]) if chat else prompt
        job, spans = make_job(sampler, self.server.settings, body, [prompt], chat, watched=True)
        for message, _ in self.follow(job):
            self.event(message)
        texts = [answer_text(sampler, row[first:end], [], job)[0] for row, (first, end) in zip(job.result, spans)]
        count = sum(row.count(sampler.mask_id) for row in job.sequences) or sum(map(len, job.result)) - sum(map(len, job.sequences))
        self.event({"report": job.trace.report(count), "texts": texts})

    def completions(self):
        body, sampler = self.read_body(), self.server.sampler
        check_names(body, {"prompt", "suffix", "echo", *COMMON_FIELDS})
        prompts = body.get("prompt")
        prompts = [""] if prompts is None else prompts if isinstance(prompts, list) and any(isinstance(p, str | list) for p in prompts) else [prompts]
        for prompt in prompts:
            is_tokens = isinstance(prompt, list) and all(type(token) is int and 0 <= token < sampler.config.vocab_size for token in prompt)
            if not (isinstance(prompt, str) or is_tokens):
                raise Refusal(400, "prompt must be a text, a list of tokens, or a list of such", "prompt")
        before = [""] * len(prompts)
        if get(body, "echo", bool, False):
            before = [prompt if isinstance(prompt, str) else sampler.tokenizer.decode(prompt) for prompt in prompts]
        self.complete(body, prompts, before, suffix=get(body, "suffix", str, ""))

    def chat_completions(self):
        body = self.read_body()
        check_names(body, {"messages", "max_completion_tokens", *COMMON_FIELDS})
        if body.get("max_completion_tokens") is not None:
            body["max_tokens"] = body["max_completion_tokens"]
        self.complete(body, [self.server.sampler.encode_chat(read_messages(body))], [""], chat=True)

    def complete(self, body, prompts, before, chat=False, suffix=""):
        """Answer in OpenAI's shape: whole, or with `stream` as the text is finished from the left on."""
        sampler, stream, stops = self.server.sampler, get(body, "stream", bool, False), read_stops(body)
        include_usage = get(get(body, "stream_options", dict, {}), "include_usage", bool, False)
        get(body, "model", str)                                     # any name will do: there is one model
        job, spans = make_job(sampler, self.server.settings, body, prompts, chat, suffix, watched=stream)
        before = [text for text in before for _ in range(len(spans) // len(before))]
        head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:24]}", "created": int(time.time()), "model": sampler.name,
                "object": ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"}

        def choice(index, text, reason, first=False):
            content = {"text": text} if not chat else {"delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}}
            return {"index": index, **content, "logprobs": None, "finish_reason": reason}

        sent = [""] * len(spans)
        for message, done in self.follow(job, stream):
            if message.get("rows") is not None:
                for i, text in enumerate(before):
                    self.event({**head, "choices": [choice(i, text, None, first=True)]})
            for i, (first, end) in enumerate(spans):
                text = answer_text(sampler, done[i][first:end], stops, job, final=False)[0]
                if len(text) > len(sent[i]) and text.startswith(sent[i]):
                    self.event({**head, "choices": [choice(i, text[len(sent[i]):], None)]})
                    sent[i] = text
        answers = [answer_text(sampler, row[first:end], stops, job) for row, (first, end) in zip(job.result, spans)]
        given, used = sum(first for first, _ in spans[::len(spans) // len(prompts)]), sum(count for _, count, _ in answers)
        usage = {"prompt_tokens": given, "completion_tokens": used, "total_tokens": given + used}
        if stream:
            for i, (text, _, reason) in enumerate(answers):
                self.event({**head, "choices": [choice(i, text.removeprefix(sent[i]) if text.startswith(sent[i]) else "", reason)]})
            if include_usage:
                self.event({**head, "choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
            return
        choices = [{"index": i, "text": text + answer, "logprobs": None, "finish_reason": reason} if not chat else
                   {"index": i, "message": {"role": "assistant", "content": answer}, "logprobs": None, "finish_reason": reason}
                   for i, (text, (answer, _, reason)) in enumerate(zip(before, answers))]
        self.send_json({**head, "choices": choices, "usage": usage})

    def follow(self, job, stream=True):
        """Submit the job and yield its events until it is done. Raises its Refusal; a client that has gone cancels it."""
        self.server.worker.submit(job)
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    event = job.events.get(timeout=0.5)
                    if event is None:
                        break
                    yield event
                if self.client_has_gone():
                    raise ConnectionError
            if job.error:
                raise job.error
        finally:
            job.cancelled = True                                    # done, or nobody listens any more
        if stream and not self.begun:
            self.begin_stream()

    def client_has_gone(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def begin_stream(self):
        self.begun = self.close_connection = True
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store"), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()

    def event(self, value):
        """One server-sent event."""
        if not self.begun:
            self.begin_stream()
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")


class Server(ThreadingHTTPServer):
    """`Server(sampler, settings, port).serve_forever()`; port 0 takes a free one, `server_port` says which."""
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, sampler, settings, port, max_queue=MAX_QUEUE):
        """settings: sample.py's. Raises OSError, one line, when the port cannot be had."""
        self.sampler, self.settings, self.created = sampler, settings, int(time.time())
        self.page = Path(__file__).with_name("page.html").read_bytes()
        self.slots, self.worker = threading.Semaphore(MAX_CONNECTIONS), Worker(sampler, max_queue)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise OSError(f"port {port} cannot be used ({error.strerror}): choose another with --serve=...") from None
        self.worker.start()

    def process_request(self, request, client_address):
        if self.slots.acquire(blocking=False):
            return super().process_request(request, client_address)
        body = json.dumps(Refusal(429, "too many connections").body()).encode()
        request.sendall(b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nConnection: close\r\n"
                        b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        """A connection that breaks is the client's affair; anything else is a fault of ours that must be seen."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_close(self):
        super().server_close()
        self.worker.stop()


def serve_forever(sampler, settings):
    """Serve on port settings["serve"] until Ctrl-C."""
    port = settings["serve"]
    if not 1 <= port <= 65535:
        raise ValueError(f"serve must be a port between 1 and 65535, got {port}")
    try:
        with Server(sampler, settings, port) as server:
            print(f"http://127.0.0.1:{port} for the page, http://127.0.0.1:{port}/v1 for OpenAI's clients; Ctrl-C stops", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print("\nstopped")
