"""The server of `sample.py --serve=PORT`: page.html, where one watches tokens unmask, and OpenAI's
API, on 127.0.0.1 alone.

    GET  /                      the page
    GET  /v1/models             the checkpoint
    POST /generate              a run for the page, step by step (server-sent events)
    POST /v1/completions        OpenAI's API, see api.py
    POST /v1/chat/completions

Each connection has a thread; one more thread, the `Worker`, owns the model.
"""
import contextlib
import json
import queue
import select
import socket
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sampling.api import (
    COMMON_FIELDS,
    SAMPLER_FIELDS,
    Completion,
    answer_text,
    check_names,
    get,
    make_job,
    read_messages,
    read_prompts,
)
from sampling.worker import MAX_QUEUE, Refusal, Worker

MAX_CONNECTIONS = 256       # threads; one more gets 429
MAX_BODY = 2**20            # bytes of a request; more gets 413
IDLE = 30                   # seconds after which a silent connection is closed

# What the page may do in a browser: run its own script and style, ask this server, nothing else.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
               "connect-src 'self'; img-src data:; frame-ancestors 'none'")


class Handler(BaseHTTPRequestHandler):
    """A connection: one request after the other."""
    protocol_version = "HTTP/1.1"
    timeout = IDLE

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        self.body_read = self.command == "GET"          # there is nothing (left) to read
        self.begun = False                              # a stream of events has been begun
        try:
            self.check_origin()
            self.find_route()()
        except Refusal as refusal:
            self.refuse(refusal)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except ValueError as error:     # a text that cannot be encoded, a template that fails...
            self.refuse(Refusal(400, str(error)))

    def find_route(self):
        """The method that answers this request. Raises Refusal."""
        readers = {"/": self.page, "/v1/models": self.models}
        writers = {"/generate": self.generate, "/v1/completions": self.completions,
                   "/v1/chat/completions": self.chat_completions}
        path = urllib.parse.unquote(self.path.partition("?")[0])
        routes = readers if self.command == "GET" else writers
        if path in routes:
            return routes[path]
        if path.startswith("/v1/models/") and self.command == "GET":
            return self.model
        status = 405 if path in readers or path in writers else 404
        raise Refusal(status, f"{self.command} {path[:200]} is nothing that this server knows")

    def check_origin(self):
        """Other web sites must not reach this server through their visitors' browsers (DNS
        rebinding, cross-site requests)."""
        addresses = [f"//{self.headers.get('Host', '')}"]
        if self.headers.get("Origin") is not None:
            addresses.append(self.headers["Origin"])
        for address in addresses:
            try:
                host = urllib.parse.urlsplit(address).hostname
            except ValueError:
                host = None
            if host not in ("127.0.0.1", "localhost", "::1"):
                raise Refusal(403, "this server answers its own machine only: use http://127.0.0.1")

    # ------------------------------------------------------------------------ what it serves

    def page(self):
        self.send(200, "text/html; charset=utf-8", self.server.page,
                  {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"})

    def models(self):
        self.send_json({"object": "list", "data": [self.describe_model()]})

    def model(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        name, known = path.removeprefix("/v1/models/"), self.server.sampler.name
        if name != known:
            raise Refusal(404, f"there is no model {name[:200]!r} here, only {known!r}", "model",
                          "model_not_found")
        self.send_json(self.describe_model())

    def describe_model(self):
        return {"id": self.server.sampler.name, "object": "model", "created": self.server.created,
                "owned_by": "unmask"}

    def generate(self):
        """A run for the page: the messages of its Trace, then {"report": ..., "texts": [...]}."""
        body, sampler = self.read_body(), self.server.sampler
        check_names(body, {"prompt", "chat", "max_tokens", "n", *SAMPLER_FIELDS})
        prompt, chat = get(body, "prompt", str, ""), get(body, "chat", bool, False)
        if chat:
            prompt = sampler.encode_chat([{"role": "user", "content": prompt}])
        job, spans = make_job(sampler, self.server.settings, body, [prompt], chat, watched=True)
        for message, _ in self.follow(job):
            self.event(message)
        texts = []
        for row, (first, end) in zip(job.result, spans):
            texts.append(answer_text(sampler, row[first:end], [], job)[0])
        if job.gaps:
            new_tokens = sum(row.count(sampler.mask_id) for row in job.sequences)
        else:
            new_tokens = sum(map(len, job.result)) - sum(map(len, job.sequences))
        report = job.trace.report(new_tokens)
        if sampler.grid is not None:
            report = "; ".join([*map(sampler.verdict, job.result), report])
        self.event({"report": report, "texts": texts})

    def completions(self):
        body, sampler = self.read_body(), self.server.sampler
        check_names(body, {"prompt", "suffix", "echo", *COMMON_FIELDS})
        prompts, before = read_prompts(sampler, body), []
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else sampler.tokenizer.decode(prompt)
            before.append(text if get(body, "echo", bool, False) else "")
        self.complete(Completion(sampler, self.server.settings, body, prompts, before,
                                 suffix=get(body, "suffix", str, "")))

    def chat_completions(self):
        body, sampler = self.read_body(), self.server.sampler
        check_names(body, {"messages", "max_completion_tokens", *COMMON_FIELDS})
        if body.get("max_completion_tokens") is not None:
            body["max_tokens"] = body["max_completion_tokens"]
        prompt = sampler.encode_chat(read_messages(body))
        self.complete(Completion(sampler, self.server.settings, body, [prompt], [""], chat=True))

    def complete(self, completion):
        """Answer whole, or with `stream` in events."""
        for event in self.follow(completion.job):       # none if it is not watched
            for chunk in completion.chunks(*event):
                self.event(chunk)
        if not completion.stream:
            self.send_json(completion.whole())
            return
        for chunk in completion.last_chunks():
            self.event(chunk)
        self.wfile.write(b"data: [DONE]\n\n")

    def follow(self, job):
        """Submit the job and yield its events until it is done. Raises its Refusal; a client that
        has gone cancels it."""
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
            job.cancelled = True                        # done, or nobody listens any more

    def client_has_gone(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    # ------------------------------------------------------------------------ HTTP: reading

    def read_body(self):
        """The JSON object that was posted. Raises Refusal."""
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
            body = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not valid JSON in UTF-8") from None
        if not isinstance(body, dict):
            raise Refusal(400, "the body must be a JSON object")
        return body

    def drain(self):
        """Read on a little, so that a client that is still sending sees the refusal and not a
        broken pipe."""
        length, left = self.headers.get("Content-Length", ""), 0
        if length.isascii() and length.isdigit() and len(length) <= 12:
            left = min(int(length), 2**26)
        while left > 0:
            part = self.rfile.read(min(left, 2**16))
            if not part:
                break
            left -= len(part)

    # ------------------------------------------------------------------------ HTTP: writing

    def send(self, status, kind, content, headers=()):
        if not self.body_read:
            self.close_connection = True                # what follows here is not a request
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)),
                   "X-Content-Type-Options": "nosniff", **dict(headers)}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, value, status=200, headers=()):
        self.send(status, "application/json", json.dumps(value).encode(), headers)

    def refuse(self, refusal):
        try:
            if self.begun:                              # in the middle of a stream
                self.event(refusal.body())
                return
            if not self.body_read:
                self.drain()
            headers = {"Retry-After": "1"} if refusal.status == 429 else {}
            self.send_json(refusal.body(), refusal.status, headers)
        except OSError:
            self.close_connection = True

    def event(self, value):
        """One server-sent event."""
        if not self.begun:
            self.begin_stream()
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def begin_stream(self):
        self.begun = self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        """What the base class calls for a malformed request."""
        self.body_read, self.begun = True, False
        self.close_connection = True
        self.refuse(Refusal(code, message or "bad request"))

    def log_message(self, *_):
        """The base class would write a line for each request."""


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")             # NaN, Infinity


class Server(ThreadingHTTPServer):
    """`Server(sampler, settings, port).serve_forever()`; port 0 takes a free one, `server_port`
    says which."""
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
            raise OSError(f"port {port} cannot be used ({error.strerror}): choose another with "
                          "--serve=...") from None
        self.worker.start()

    def process_request(self, request, client_address):
        """Begin a thread for a connection, unless there are too many."""
        if self.slots.acquire(blocking=False):
            return super().process_request(request, client_address)
        body = json.dumps(Refusal(429, "too many connections").body())
        request.sendall("\r\n".join((
            "HTTP/1.1 429 Too Many Requests", "Content-Type: application/json",
            "Connection: close", f"Content-Length: {len(body)}", "", body)).encode())
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        """A connection that breaks is the client's affair; anything else is a fault of ours that
        must be seen."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_close(self):
        super().server_close()
        self.worker.stop()


def serve_forever(sampler, settings):
    """Serve on port settings["serve"] until Ctrl-C. Raises ValueError, OSError."""
    port = settings["serve"]
    if not 1 <= port <= 65535:
        raise ValueError(f"serve must be a port between 1 and 65535, got {port}")
    try:
        with Server(sampler, settings, port) as server:
            print(f"http://127.0.0.1:{port} for the page, http://127.0.0.1:{port}/v1 for OpenAI's "
                  "clients; Ctrl-C stops", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print("\nstopped")
