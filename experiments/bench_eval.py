"""bench.py's measurements of evaluation: how much the passes of `log_likelihood` say, and how fast
they are."""
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from data.loader import TokenDataset
from data.prepare import prepare
from evaluation.likelihood import ESTIMATORS, log_likelihood
from experiments.recipes import run_recipe
from experiments.timing import interleaved
from model import Config, Transformer


@torch.inference_mode()
def likelihoods(folder="/tmp/unmask-bench-eval", size="full"):
    """log_likelihood against LLaDA's: standard errors, bias, requests/s, "auto"; `eval FOLDER
    [small]` with a model of pydocs."""
    small = size == "small"
    evaluator = pydocs_evaluator(folder)
    text = torch.from_numpy(TokenDataset(prepare("pydocs", folder)).val[:].astype("int64"))
    pairs = []
    for prefix, target in requests_of(text, 10 if small else 100, longest=20, shortest=2):
        pairs.append((prefix[-100:], target))
    compare_errors(evaluator.model, pairs)
    if small:
        compare_bias(evaluator.model, pairs[:4], many=1000)
        compare_choices(evaluator, text, documents=10)
        compare_speed(requests=16, few=4)
    else:
        compare_bias(evaluator.model, pairs[:10], many=10_000)
        compare_choices(evaluator, text, documents=150)
        compare_speed(requests=200, few=24)


def pydocs_evaluator(folder):
    """The Evaluator of a checkpoint trained on pydocs; made here in a minute and a half if `folder`
    has none."""
    import eval as eval_script
    from evaluation.evaluator import Evaluator
    if not Path(folder, "config.json").exists():
        run_recipe("train_scratch.py", folder, "--dataset=pydocs", "--max_minutes=1.5", "--dim=96",
                   "--n_heads=3")
    return Evaluator({**eval_script.settings, "checkpoint": str(folder)})


def requests_of(tokens, n, longest, shortest=1, seed=0):
    """n pairs (context of 30 to 100 tokens, answer of shortest to longest tokens) out of a corpus,
    lists of ids."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    pairs = []
    for _ in range(n):
        context, answer = number(30, 100), number(shortest, longest)
        begin = number(0, len(tokens) - 128)
        middle = begin + context
        pairs.append((tokens[begin:middle].tolist(), tokens[middle:middle + answer].tolist()))
    return pairs


def spread_of(model, pairs, repeats, **options):
    """(mean of log_likelihood over random streams [N], its standard deviation from stream to stream
    [N])."""
    prefixes, targets = [], []
    for prefix, target in pairs:
        prefixes += [prefix] * repeats
        targets += [target] * repeats
    streams = range(len(targets))
    values, _ = log_likelihood(model, prefixes, targets, streams=streams, **options)
    values = values.view(-1, repeats)                                       # [N, repeats]
    return values.mean(1), values.std(1)


def compare_errors(model, pairs):
    """The standard error of each estimator at equal passes."""
    print(f"standard error, from 8 streams, over {len(pairs)} requests of 2 to 20 tokens, relative "
          "to LLaDA's with as many passes")
    errors = {}                                         # (estimator, passes) -> [N]
    for n in (8, 12, 32):
        ratios = []
        for name in ESTIMATORS:
            _, errors[name, n] = spread_of(model, pairs, 8, num_samples=n, estimator=name)
        for name in ESTIMATORS:
            ratios.append(f"{name} {(errors[name, n] / errors['llada', n]).mean():.3f}")
        print(f"  {n:4} passes: {', '.join(ratios)}   (LLaDA's: {errors['llada', n].mean():.3f} "
              "nats)", flush=True)
    few = errors["dealt", 12].mean() / errors["llada", 32].mean()
    print(f"  dealt with 12 passes / LLaDA's with 32: {few:.3f}")


def compare_bias(model, pairs, many):
    """How far the mean over 16 streams is from `many` samples of LLaDA's."""
    prefixes, targets = zip(*pairs)
    exact, exact_error = log_likelihood(model, prefixes, targets, many, seed=1, estimator="llada")
    for name in ("llada", "dealt"):
        mean, spread = spread_of(model, pairs, 16, num_samples=32, estimator=name, seed=2)
        error = torch.hypot(spread / 4, exact_error)                                    # [N]
        within = int(((mean - exact).abs() <= 2 * error).sum())
        total_error = error.square().sum().sqrt() / len(pairs)
        print(f"bias of {name}, against {many:,} samples of LLaDA's: {within} of {len(pairs)} "
              f"requests within 2 standard errors, mean difference {(mean - exact).mean():+.4f} +- "
              f"{total_error:.4f} nats", flush=True)


def compare_choices(evaluator, text, documents):
    """Which of four spans goes on? The true one, and three from elsewhere of the same 6 to 12
    tokens."""
    choices = choices_of(text, documents)
    cases = [("LLaDA's, 120 passes", 120, "llada"), ("dealt, 120 passes", 120, "dealt"),
             ("dealt, auto", None, "dealt")]
    first_cost = None
    for label, n, estimator in cases:
        evaluator.num_samples, evaluator.settings["estimator"] = n, estimator
        evaluator.tokens = 0
        found = list(evaluator.score(choices).values())
        right = []
        for i in range(documents):
            four = found[4 * i:4 * i + 4]
            right.append(float(four.index(max(four)) == 0))
        first_cost = first_cost or evaluator.tokens
        error = (statistics.variance(right) / len(right)) ** 0.5
        print(f"choice of 4, {label:20}: accuracy {statistics.mean(right):.3f} +- {error:.3f}, "
              f"{evaluator.tokens:,} tokens through the model "
              f"({evaluator.tokens / first_cost:.2f})", flush=True)


def choices_of(text, documents):
    """What Evaluator.score takes: {document: {(prefix, target): characters}}, the true target
    first."""
    questions = requests_of(text, documents, longest=12, shortest=6, seed=3)
    spans = requests_of(text, 3 * documents, longest=12, shortest=12, seed=4)
    choices = {}
    for i, (prefix, target) in enumerate(questions):
        prefix, four = tuple(prefix[-40:]), {}
        four[prefix, tuple(target)] = 1
        for _, other in spans[3 * i:3 * i + 3]:
            four[prefix, tuple(other[:len(target)])] = 1
        choices["spans", i] = four
    return choices


def compare_speed(requests, few):
    """Requests a second, beside one request at a time."""
    V, mask_id = 50304, 50303
    model = Transformer(Config(vocab_size=V, dim=384, n_layers=6, n_heads=6, mask_token_id=mask_id))
    model.init_weights().eval()
    words = torch.randint(0, mask_id, (100_000,), generator=torch.Generator().manual_seed(0))
    pairs = requests_of(words, requests, longest=20)
    prefixes, targets = zip(*pairs)
    generator = torch.Generator().manual_seed(0)

    def yardstick():
        for prefix, target in pairs[:few]:
            published_log_likelihood(model, prefix, target, 32, generator)

    def ours_32():
        log_likelihood(model, prefixes, targets, num_samples=32, batch_size=2048)

    def ours_12():
        log_likelihood(model, prefixes, targets, num_samples=12, batch_size=2048)

    functions = {"yardstick": yardstick, "ours, 32 passes": ours_32, "ours, 12 passes": ours_12}
    times = interleaved(functions, rounds=1, warmup=0)
    print(f"requests/s, V {V}, 6 layers, D 384, {requests} requests (the yardstick: {few} of them, "
          "32 samples each)")
    base = few / times["yardstick"].wall
    for name, timing in times.items():
        speed = (few if name == "yardstick" else requests) / timing.wall
        print(f"  {name:16} {speed:8.2f}   {speed / base:5.2f} x")


def published_log_likelihood(model, prefix, target, num_samples, generator):
    """The yardstick: LLaDA's estimator (eq. 6), one request at a time repeated as the batch, all
    logits."""
    L, mask_id = len(target), model.config.mask_token_id
    tokens = torch.tensor(prefix + target).repeat(num_samples, 1)                       # [n, T]
    k = torch.randint(1, L + 1, (num_samples, 1), generator=generator)
    order = torch.rand(num_samples, L, generator=generator).argsort(1).argsort(1)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, len(prefix):] = order < k
    logits = model(torch.where(mask, mask_id, tokens))                                  # [n, T, V]
    nll = F.cross_entropy(logits[mask].float(), tokens[mask], reduction="none")
    return -(nll * (L / k).expand(tokens.shape)[mask]).sum().item() / num_samples
