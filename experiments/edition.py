"""One side of `bench.py against`: a process that runs the code of one edition, a case at a time.

    python experiments/edition.py FOLDER THREADS

It reads lines of JSON and answers each with one. {"prepare": NAME} builds a case of CASES;
{"times": n} runs it n times and answers {"wall", "cpu", "result"}: seconds for one run, and a
number or list of tokens by which two editions can be compared. What is imported is the code in
FOLDER, in which names may stand where the first edition had them.
"""
import gc
import json
import os
import sys
import time

FOLDER = sys.argv[1]
sys.path[0] = FOLDER            # its modules, not those beside this file

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from diffusion import (  # noqa: E402
    ar_loss, block_loss, mask_tokens, mdlm_loss, nelbo, sample_t)
from model import Config, Transformer  # noqa: E402

if os.path.exists(os.path.join(FOLDER, "kernels.py")):
    from evaluation.likelihood import log_likelihood
    from kernels import linear_cross_entropy
    from sampling.engine import generate
    from training.optimizers import make_optimizers
else:                           # the first edition
    from common import make_optimizers
    from diffusion import generate, log_likelihood
    from model import LinearCrossEntropy
    linear_cross_entropy = LinearCrossEntropy.apply

# --------------------------------------------------------------------------------------------------
# Training: train_scratch.py's default shape on a CPU

V, T, B = 2048, 128, 16


def small_model(**more):
    torch.manual_seed(0)
    settings = dict(vocab_size=V, dim=192, n_layers=4, n_heads=4, max_len=T, mask_token_id=V - 1,
                    eos_token_id=V - 2, bos_token_id=V - 2)
    return Transformer(Config(**{**settings, **more})).init_weights(0)


def training_step(objective, block_length=T):
    """Noise, loss, backward, update. The result is the loss."""
    causal = objective == "ar"
    model = small_model(causal=causal, shift=causal)
    optimizers = make_optimizers(model, "muon", 3e-3, 0.02)
    tokens = torch.randint(0, V - 2, (B, T), generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)

    def run():
        t = sample_t((B, T // block_length), noise)
        mask = mask_tokens((B, T), t.repeat_interleave(block_length, dim=1), noise)
        with common.autocast(torch.device("cpu"), "auto"):
            if objective == "mdlm":
                loss = mdlm_loss(model, tokens, t[:, 0], mask, max_weight=10.0)
            elif objective == "bd3lm":
                loss = block_loss(model, tokens, block_length, t, mask, max_weight=10.0)
            else:
                loss = ar_loss(model, tokens)
        loss.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.nelbo.item()
    return run


def large_loss():
    """The loss over a large vocabulary with its gradients: V 50304, D 768, N 1024."""
    vocab_size, dim, rows = 50304, 768, 1024
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, dim, generator=generator).mul_(0.02).requires_grad_()
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    row_weights = torch.rand(rows, generator=generator)
    chunk = max(64, 2**25 // vocab_size)

    def run():
        total, _ = linear_cross_entropy(hidden, weight, None, targets, row_weights, chunk)
        total.backward()
        hidden.grad = weight.grad = None
        return total.item()
    return run


# --------------------------------------------------------------------------------------------------
# Sampling

BLOCK = 32


def llada_model(vocab_size=126464, mask_token_id=126336, **more):
    """LLaDA's shape in small, its predictions far from uniform."""
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=vocab_size, dim=256, n_layers=4, n_heads=4, qk_norm=False,
                               mask_token_id=mask_token_id, max_len=512, **more)).init_weights(0)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model.eval()


def sampling(model, prompt_len, new_tokens, rows=1, **how):
    """`generate` of so many tokens in as many steps. The result is the answers."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size - 200, (prompt_len,), generator=generator)
    prompts = [prompt.tolist()] * rows
    block_length = min(BLOCK, new_tokens)

    def run():
        answers = generate(model, prompts, new_tokens, new_tokens, block_length, seed=0, **how)
        return sum(answers, [])
    return run


# --------------------------------------------------------------------------------------------------
# Evaluation


def likelihoods():
    """log p of 40 answers of up to 20 tokens, by 12 passes each."""
    model = small_model().eval()
    generator = torch.Generator().manual_seed(0)
    prefixes, targets = [], []
    for i in range(40):
        tokens = torch.randint(0, V - 2, (30 + i + i // 2 + 1,), generator=generator).tolist()
        prefixes.append(tokens[:30 + i])
        targets.append(tokens[30 + i:])

    def run():
        values, _ = log_likelihood(model, prefixes, targets, num_samples=12, batch_size=2048)
        return values.sum().item()
    return run


def bound():
    """`nelbo` of 64 windows."""
    model = small_model().eval()
    tokens = torch.randint(0, V - 2, (64, T), generator=torch.Generator().manual_seed(0))

    def run():
        value, _ = nelbo(model, tokens)
        return value
    return run


CASES = {
    "step-mdlm": lambda: training_step("mdlm"),
    "step-bd3lm": lambda: training_step("bd3lm", block_length=4),
    "step-ar": lambda: training_step("ar"),
    "loss": large_loss,
    "sample": lambda: sampling(llada_model(), 64, 32),
    "sample-0.7": lambda: sampling(llada_model(), 64, 32, temperature=0.7),
    "cache-prefix": lambda: sampling(llada_model(), 64, 64, cache="prefix"),
    "cache-dual": lambda: sampling(llada_model(), 64, 64, cache="dual"),
    "batch-8": lambda: sampling(llada_model(260, 257), 32, 16, rows=8),
    "batch-8-dual": lambda: sampling(llada_model(260, 257), 32, 64, rows=8, cache="dual"),
    "cache-block": lambda: sampling(llada_model(260, 257, block_length=8), 32, 64, cache="block"),
    "autoregressive": lambda: sampling(small_model(causal=True, shift=True).eval(), 32, 64),
    "autoregressive-8": lambda: sampling(small_model(causal=True, shift=True).eval(), 32, 64, 8),
    "eval": likelihoods,
    "nelbo": bound,
}


def answer_requests(requests, answers):
    """Until there are no more lines to read."""
    run = None
    for line in requests:
        request = json.loads(line)
        answer = {}
        if "prepare" in request:
            run = None
            gc.collect()
            run = CASES[request["prepare"]]()
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(request["times"]):
                answer["result"] = run()
            answer["wall"] = (time.perf_counter() - wall) / request["times"]
            answer["cpu"] = (time.process_time() - cpu) / request["times"]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    pipe, sys.stdout = sys.stdout, sys.stderr           # what a library prints is no answer
    answer_requests(sys.stdin, pipe)
