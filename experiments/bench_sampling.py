"""bench.py's measurements of sampling: the published loops beside ours, batches, the server."""
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from data.tokenizer import Tokenizer
from experiments.timing import ROOT, in_own_process, interleaved, memory
from model import Config, Transformer
from sampling.cache import Cache
from sampling.engine import generate
from sampling.int8 import load_int8

BLOCK = 32          # tokens of a block

# --------------------------------------------------------------------------------------------------
# The published loops, done plainly: the yardstick


def published_choice(x, logits, begin, end, mask_id, temperature):
    """Write the surest token: what the loops of LLaDA and Fast-dLLM do with logits [1, S, V] of the
    positions from `begin` on, softmax (and noise) in float64 over all of them. `end`: of the
    block."""
    scores = logits
    if temperature:
        noise = torch.rand(logits.shape, dtype=torch.float64)
        scores = logits.double().exp() / (-torch.log(noise)) ** temperature
    token = scores.argmax(-1)                                                           # [1, S]
    confidence = logits.double().softmax(-1).gather(-1, token[..., None])[0, :, 0]      # [S]
    confidence[end - begin:] = -torch.inf
    confidence[x[0, begin:begin + len(confidence)] != mask_id] = -torch.inf
    best = confidence.argmax()
    x[0, begin + best] = token[0, best]


def published_loop(model, prompt, new_tokens, temperature, passes):
    """LLaDA's loop, a token a step: every logit of the canvas, `passes` passes at most. (tokens,
    seconds that a pass took)"""
    mask_id, passes = model.config.mask_token_id, min(passes, new_tokens)
    x = torch.tensor([prompt + [mask_id] * new_tokens])
    begin = time.perf_counter()
    for done in range(passes):
        end = len(prompt) + (done // BLOCK + 1) * BLOCK
        published_choice(x, model(x), 0, end, mask_id, temperature)
    return x[0].tolist(), (time.perf_counter() - begin) / passes


def published_cache_loop(model, prompt, new_tokens, kind):
    """Fast-dLLM's loop: a pass over everything at the start of each block, then over the block
    (kind "dual") or all from it on ("prefix"), all logits."""
    mask_id = model.config.mask_token_id
    x = torch.tensor([prompt + [mask_id] * new_tokens])
    T = x.shape[1]
    cache = Cache(model.config, 1, T)
    for begin in range(len(prompt), T, BLOCK):
        end = begin + BLOCK
        for step in range(BLOCK):
            fed_from, fed_to = begin, end
            if kind == "prefix":
                fed_to = T
            if step == 0:
                fed_from, fed_to = 0, T
            positions = torch.arange(fed_from, fed_to)
            logits = model(x[:, fed_from:fed_to], cache=cache, positions=positions)
            published_choice(x, logits, fed_from, end, mask_id, 0)
    return x[0].tolist()


# --------------------------------------------------------------------------------------------------
# Ours


@torch.inference_mode()
def sample(part="all", tokens="128"):
    """LLaDA's sampler, V 126464, D 256, 4 layers, prompt 64, 128 tokens in as many steps, blocks of
    32; `sample published|cache|batch [tokens]`; `sample int8` is another model, of 1 B."""
    parts = {"published": sample_published, "cache": sample_cache, "batch": sample_batch}
    if part == "int8":
        sample_int8(int(tokens))
    elif part in parts:
        parts[part](int(tokens))
    else:
        for function in parts.values():
            function(int(tokens))


def random_model(vocab_size=126464, mask_id=126336):
    """A small model of LLaDA's shape and vocabulary whose predictions are far from uniform."""
    model = Transformer(Config(vocab_size=vocab_size, dim=256, n_layers=4, n_heads=4, qk_norm=False,
                               mask_token_id=mask_id, max_len=512)).init_weights()
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model


def random_prompt(length, vocab_size=126464):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size - 200, (length,), generator=generator).tolist()


def sample_published(tokens):
    """Against LLaDA's loop."""
    model, prompt = random_model(), random_prompt(64)
    for temperature, goal in ((0.0, 6), (0.7, 20)):
        # With noise, where a pass is long, one block of the published loop will do: each of its
        # passes costs the same.
        passes = BLOCK if temperature else tokens
        ours, theirs = [], []
        generate(model, [prompt], BLOCK, BLOCK, BLOCK, temperature, seed=0)         # warm-up
        for _ in range(3):
            begin = time.perf_counter()
            answer = generate(model, [prompt], tokens, tokens, BLOCK, temperature, seed=0)[0]
            ours.append((time.perf_counter() - begin) / tokens)
            published, seconds = published_loop(model, prompt, tokens, temperature, passes)
            theirs.append(seconds)
        note = ""
        if not temperature:
            assert answer == published, "the tokens differ"
            note = ", identical tokens"
        mine, yardstick = statistics.median(ours), statistics.median(theirs)
        print(f"temperature {temperature}: published loop {1 / yardstick:7.2f} tokens/s, "
              f"ours {1 / mine:7.2f}, {yardstick / mine:5.1f} x (goal {goal}){note}", flush=True)


def sample_cache(tokens):
    """Against Fast-dLLM's loops."""
    model, prompt = random_model(), random_prompt(64)
    for kind in ("prefix", "dual"):
        times = compare_caches(model, prompt, tokens, kind)
        theirs, ours = times["theirs"].wall, times["ours"].wall
        print(f"{kind} cache: all rows {tokens / theirs:7.2f} tokens/s, ours {tokens / ours:7.2f}, "
              f"{theirs / ours:5.2f} x (goal 2), identical tokens", flush=True)


def compare_caches(model, prompt, tokens, kind):
    def ours():
        return generate(model, [prompt], tokens, tokens, BLOCK, cache=kind)[0]

    def theirs():
        return published_cache_loop(model, prompt, tokens, kind)

    assert ours() == theirs(), "the tokens differ"
    return interleaved({"theirs": theirs, "ours": ours}, rounds=2, warmup=0)


def sample_batch(tokens):
    """Eight rows against one."""
    model, prompt = random_model(260, 257), random_prompt(32, 260)
    for cache in (None, "dual"):
        times = compare_batches(model, prompt, tokens, cache)
        one, eight = times["one"].wall, times["eight"].wall
        print(f"D 256, bytes, cache {cache}: batch 1 {tokens / one:.0f} tokens/s, batch 8 "
              f"{8 * tokens / eight:.0f}, {8 * one / eight:.2f} x (goal 2.5)", flush=True)


def compare_batches(model, prompt, tokens, cache):
    def run(rows):
        generate(model, [prompt] * rows, tokens, tokens, BLOCK, cache=cache, seed=0)

    functions = {"one": lambda: run(1), "eight": lambda: run(8)}
    return interleaved(functions, rounds=3, warmup=1)


def sample_int8(tokens):
    """A LLaDA of 1 B random weights, prompt 64: `--weights=int8` beside bfloat16 and float32, the
    same blocks; memory of the process when the model is there and when it has sampled."""
    with tempfile.TemporaryDirectory() as folder:
        made = Transformer(Config(**ONE_BILLION)).to(torch.bfloat16)
        for parameter in made.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        made.export_pretrained(folder)
        del made
        for weights, dtype in (("int8", "float32"), ("full", "bfloat16"), ("full", "float32")):
            found = in_own_process(int8_figures, folder, weights, dtype, tokens,
                                   torch.get_num_threads())
            print(f"{weights:5} {dtype:9} {found['loaded'] / 1e9:5.2f} GB, "
                  f"{found['peak'] / 1e9:5.2f} GB at most, {found['tokens_per_s']:6.2f} tokens/s",
                  flush=True)


ONE_BILLION = dict(family="llada", vocab_size=32000, dim=2048, n_layers=18, n_heads=16,
                   hidden_dim=5632, max_len=1024, qk_norm=False, mask_token_id=31999)


@torch.inference_mode()
def int8_figures(folder, weights, dtype, tokens, threads):
    """Memory and speed of a model of `sample_int8`."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype)
    if weights == "int8":
        model = load_int8(folder, "cpu", dtype)
    else:
        model = Transformer.from_pretrained(folder, dtype=dtype)
    loaded = memory("VmRSS")
    prompt = random_prompt(64, 31000)
    generate(model, [prompt], 8, 2, 8)                                              # warm-up
    begin = time.perf_counter()
    generate(model, [prompt], tokens, tokens, min(BLOCK, tokens), cache="dual")
    seconds = time.perf_counter() - begin
    return {"loaded": loaded, "peak": memory("VmHWM"), "tokens_per_s": tokens / seconds}


# --------------------------------------------------------------------------------------------------
# The server


@dataclass
class Answer:
    status: int         # of HTTP
    tokens: int         # of the completion
    seconds: float


def serve(new_tokens="32"):
    """sample.py --serve, D 256 bytes: 1 and 32 clients, with and without seeds; 500 mixed requests,
    errors, memory; `serve [new tokens]`."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(260, 257).save_pretrained(folder)
        Tokenizer.bytes().save_pretrained(folder)
        port = free_port()
        command = [sys.executable, "sample.py", f"--checkpoint={folder}", f"--serve={port}"]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            server.stdout.readline()                    # it listens
            for clients, seeded in ((1, False), (32, False), (32, True)):
                serve_clients(port, clients, seeded, int(new_tokens))
            serve_mixed(port, server.pid)
        finally:
            server.terminate()
            server.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port, body, path="/v1/completions"):
    """The Answer to a request; body None: a GET."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    content, tokens = response.read(), 0
    connection.close()
    if response.status == 200 and content.startswith(b"{"):
        tokens = json.loads(content)["usage"]["completion_tokens"]
    return Answer(response.status, tokens, time.perf_counter() - begin)


def serve_clients(port, clients, seeded, new_tokens):
    """So many clients at once, 8 requests at least; somebody looks at the page meanwhile."""
    body = {"prompt": "Once upon a time", "max_tokens": new_tokens, "temperature": 0.7,
            "suppress": "eos"}

    def one_request(number):
        return ask(port, {**body, "seed": number} if seeded else body)

    def look_at_page():
        time.sleep(0.2)
        return ask(port, None, "/")

    one_request(0)                                                                  # warm-up
    with ThreadPoolExecutor(clients + 1) as pool:
        begin = time.perf_counter()
        answers = pool.map(one_request, range(max(clients, 8)))
        page = pool.submit(look_at_page).result()
        answers = list(answers)
        seconds = time.perf_counter() - begin
    assert all(answer.status == 200 for answer in [*answers, page])
    label = ", seeded" if seeded else ""
    speed = sum(answer.tokens for answer in answers) / seconds
    longest = max(answer.seconds for answer in answers)
    print(f"{clients:2} clients{label:8}: {speed:7.1f} tokens/s, longest answer {longest:5.2f} s, "
          f"the page meanwhile {page.seconds * 1e3:.0f} ms", flush=True)


def serve_mixed(port, process):
    """Requests of all kinds: none may fail, and memory must not grow."""
    message = {"role": "user", "content": "hi"}
    kinds = [("/v1/completions", {"prompt": "ab"}),
             ("/v1/completions", {"prompt": "", "stream": True}),
             ("/generate", {"prompt": "a[MASK:4]b"}),
             ("/v1/chat/completions", {"messages": [message]}),
             ("/v1/completions", {"prompt": "a", "seed": 1, "n": 2})]

    def one_request(number):
        path, body = kinds[number % len(kinds)]
        return ask(port, {**body, "max_tokens": 8}, path).status

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one_request, range(200)))         # until every buffer has its size
        before = memory("VmRSS", process) / 2**20
        wrong = sum(status != 200 for status in pool.map(one_request, range(500)))
        after = memory("VmRSS", process) / 2**20
    print(f"500 mixed requests of 32 clients: {wrong} errors, memory {before:.0f} MB before and "
          f"{after:.0f} MB after")
