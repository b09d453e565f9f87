"""sampling/rules.py: Dream's filters and temperatures, Fast-dLLM's rules, LLaDA's suppression,
ReMDM and EB-Sampler. Each is held to its loop or counted by what comes out."""
import itertools
import math

import pytest
import torch
from models import (
    MASK,
    RAGGED,
    ExactPosterior,
    Independent,
    counted,
    differs,
    never_mask,
    probabilities,
    steps_of,
    tiny,
)

import diffusion
from sampling import rules
from sampling.engine import generate, infill

# --------------------------------------------------------------------------------------------------
# Which tokens may come


def test_filters_keep_the_tokens_that_dream_keeps():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = torch.randn(1, 12, generator=generator) * 2
        top_p, top_k = (
            float(torch.rand((), generator=generator)),
            int(torch.randint(1, 14, (), generator=generator)),
        )
        p, kept, total = logits.softmax(-1)[0], [], 0.0
        for token in p.argsort(
            descending=True
        ).tolist():  # a token stays as long as what stands before it is not beyond top_p
            if total > top_p:
                break
            kept.append(token)
            total += p[token].item()
        for options, expected in (
            (dict(top_p=top_p), kept),
            (dict(top_k=top_k), p.argsort(descending=True)[:top_k].tolist()),
            (dict(top_p=top_p, top_k=top_k), kept[:top_k]),
            (dict(top_p=1.0), range(12)),
            (dict(top_p=0.0), kept[:1]),
        ):
            filtered = rules.filter_logits(logits, **options)[0]
            assert filtered.isfinite().nonzero()[:, 0].tolist() == sorted(expected)
            assert torch.equal(filtered[filtered.isfinite()], logits[0, sorted(expected)])


@pytest.mark.parametrize(
    "scales", [(8,), (8, 2), (8, 2, 0.1)], ids=["256 suffice", "4096 suffice", "all"]
)
def test_top_p_of_a_large_vocabulary_is_what_sorting_all_of_it_finds(scales):
    logits = (
        torch.randn(len(scales), 10_000, generator=torch.Generator().manual_seed(0))
        * torch.tensor(scales)[:, None]
    )
    p, order = logits.double().softmax(-1).sort(-1, descending=True)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, p.cumsum(-1) - p <= 0.9)
    filtered = rules.filter_logits(logits, top_p=0.9)
    found = filtered.isfinite()
    assert (
        torch.equal(filtered[found], logits[found]) and (found != kept).sum() <= 1
    )  # where float32 rounds
    assert (
        [256, 4096, 10_000][len(scales) - 1] >= kept.sum(-1).max() > [0, 256, 4096][len(scales) - 1]
    )


def test_equal_tokens_pass_top_p_together_alone_or_in_a_batch():
    logits = torch.stack(
        (torch.arange(10_000) % 100 * 0.5, torch.zeros(10_000), torch.arange(10_000) * 1.0)
    )  # ties of 100, of all, none
    together = rules.filter_logits(logits, top_p=0.7)
    assert torch.equal(
        together, torch.cat([rules.filter_logits(row[None], top_p=0.7) for row in logits])
    )
    assert together.isfinite().sum(1).tolist() == [
        300,
        10_000,
        2,
    ]  # of the first, a hundred hold 0.39, two 0.63, three 0.78


@pytest.mark.parametrize(
    "options",
    [
        dict(top_p=0.6),
        dict(top_k=2),
        dict(top_p=0.8, top_k=3),
        dict(suppress=[1, 2]),
        dict(suppress=[0], top_k=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["generate", "infill"])
def test_filtered_tokens_are_drawn_with_their_probabilities(options, how):
    p, temperature = probabilities(3, 7), 0.7
    tempered = p.log() / temperature
    tempered[:, options.get("suppress", [])] = -torch.inf
    expected = torch.stack(
        [
            rules.filter_logits(row[None], options.get("top_p"), options.get("top_k"))[0].softmax(
                -1
            )
            for row in tempered
        ]
    )
    model, n = Independent(p), 3000
    rows = (
        generate(model, [[]] * n, 3, 1, 3, temperature=temperature, seed=1, **options)
        if how == "generate"
        else infill(model, [[6] * 3] * n, 1, temperature=temperature, seed=1, **options)
    )
    counts = counted(rows, 3, 7)
    assert differs(counts, expected.double()) < 4.5 and not counts[expected == 0].any()


def test_confidence_is_that_of_the_filtered_tokens_where_dream_samples():
    p, seen = probabilities(3, 7), []
    call = lambda **options: generate(
        Independent(p, confidence_at_temperature=options.pop("dream", False)),
        [[]],
        3,
        1,
        3,
        on_step=seen.append,
        **options,
    )  # noqa: E731
    (
        call(),
        call(top_k=2),
        call(dream=True, temperature=0.5, seed=0),
        call(temperature=0.5, seed=0),
    )
    best = p.sort(descending=True).values
    torch.testing.assert_close(seen[0].confidence[0], best[:, 0].double())
    torch.testing.assert_close(seen[1].confidence[0], (best[:, 0] / best[:, :2].sum(1)).double())
    chosen = seen[2].tokens[0][:, None]
    torch.testing.assert_close(
        seen[2].confidence[0], (p**2 / (p**2).sum(1, keepdim=True)).gather(1, chosen)[:, 0].double()
    )
    torch.testing.assert_close(
        seen[3].confidence[0], p.gather(1, seen[3].tokens[0][:, None])[:, 0].double()
    )


def test_suppressed_tokens_never_come_and_deferred_ones_come_last():
    model, prompt = never_mask(tiny(vocab_size=40, seed=3)), [1, 2, 3]
    plain = generate(model, [prompt], 16, 16, 16)[0][3:]
    common = max(set(plain), key=plain.count)
    for options in (
        dict(),
        dict(temperature=1.0, seed=0),
        dict(remasking="random", seed=0),
        dict(threshold=0.2),
        dict(cache="dual", block_length=4),
    ):
        assert (
            common
            not in generate(
                model,
                [prompt],
                16,
                **{**dict(steps=16, block_length=16), **options},
                suppress=[common],
            )[0][3:]
        )
        assert common not in infill(model, [[1, *[MASK] * 8, 2]], suppress=[common], seed=0)[0][1:9]
    p = torch.full((3, 7), 0.02)
    p[0, 5], p[1, 4], p[2, 4] = 0.9, 0.6, 0.5  # the end of text, 5, is the surest of all
    for rule in ("low_confidence", "entropy", "margin"):
        order = lambda **options: [
            s.revealed[0].nonzero().item()
            for s in steps_of(Independent(p), 3, remasking=rule, **options)
        ]  # noqa: B023, E731
        assert (
            order() == [0, 1, 2]
            and order(defer=[5]) == [1, 2, 0]
            and order(defer=[5, 4]) == [0, 1, 2]
        )
        assert order(defer=[5], alg_temp=0.01, seed=0) == [1, 2, 0]


def test_deferring_equals_llada_s_published_loop():
    """confidence_eos_eot_inf at temperature 0, where its two tensors are one: the logits of both
    tokens are -inf before the softmax."""
    model, prompt, n = never_mask(tiny(vocab_size=40, seed=4)), [1, 2, 3, 4], 12
    plain = generate(model, [prompt], n, n, n)[0][4:]
    ends = sorted(set(plain), key=plain.count)[-2:]
    x = torch.tensor([prompt + [MASK] * n])
    for _ in range(n):
        logits = model(x).double()
        token = logits.argmax(-1)
        logits[..., ends] = -torch.inf
        confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
        confidence[x != MASK] = -1
        if confidence.max() == 0:  # nothing but ends is left: any order, and ours is from the left
            x[0, (x[0] == MASK).nonzero()[0]] = token[0, (x[0] == MASK).nonzero()[0]]
        else:
            x[0, confidence[0].argmax()] = token[0, confidence[0].argmax()]
    assert generate(model, [prompt], n, n, n, defer=ends)[0] == x[0].tolist()


# --------------------------------------------------------------------------------------------------
# Which positions are kept


def test_factor_and_threshold_rules_equal_their_loops():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n = int(torch.randint(1, 9, (), generator=generator))
        score = torch.rand(1, 10, generator=generator, dtype=torch.float64).pow(0.2)
        eligible = torch.zeros(1, 10, dtype=torch.bool)
        eligible[0, torch.randperm(10, generator=generator)[:n]] = True
        best = score[eligible].sort(descending=True).values
        factor = float(torch.rand((), generator=generator)) * 2
        top = 0  # Fast-dLLM's loop, written out
        limits = [-1.0] + [1 - factor / (i + 1) for i in range(2, n + 1)]
        for top in range(n):
            if best[top] < limits[top]:
                break
        if top == 0 or top == n - 1:
            top += 1
        keep = rules.keep_factor(score, eligible, factor)
        assert keep.sum() == top and torch.equal(
            score[keep].sort(descending=True).values, best[:top]
        )
        keep = rules.keep_confident(score, eligible, 0.9, torch.ones(1, dtype=torch.int64))
        assert torch.equal(
            score[keep].sort(descending=True).values, best[: max(1, int((best >= 0.9).sum()))]
        )


@pytest.mark.parametrize("rule", ["low_confidence", "entropy", "margin"])
def test_alg_temp_draws_positions_from_the_softmax_of_their_scores(rule):
    """The first two positions of four, by counting against draws without replacement, p_a p_b / (1
    - p_a) + p_b p_a / (1 - p_b)."""
    p, alg_temp, n, seen = probabilities(4, 7, seed=3), 0.3, 4000, []
    generate(
        Independent(p),
        [[]] * n,
        4,
        2,
        4,
        remasking=rule,
        alg_temp=alg_temp,
        seed=5,
        on_step=seen.append,
    )
    score = diffusion.REMASKING[rule](p.log(), p.argmax(-1)).double()
    chance = (score / alg_temp).softmax(-1)
    pairs = list(itertools.combinations(range(4), 2))
    expected = torch.tensor(
        [chance[a] * chance[b] * (1 / (1 - chance[a]) + 1 / (1 - chance[b])) for a, b in pairs]
    )
    counts = torch.tensor([float(seen[0].revealed[:, [a, b]].all(1).sum()) for a, b in pairs])
    assert counts.sum() == n and differs(counts, expected) < 4.5
    cold = generate(
        Independent(p), [[]], 4, 4, 4, remasking=rule, alg_temp=1e-6, seed=5, on_step=seen.append
    )
    assert [s.revealed[0].nonzero().item() for s in seen[-4:]] == score.argsort(
        descending=True
    ).tolist() and cold
    assert generate(Independent(p), [[]], 4, 4, 4, alg_temp=0.0) == generate(
        Independent(p), [[]], 4, 4, 4
    )


def test_entropy_bound_keeps_the_largest_set_under_the_bound():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, gamma = (
            int(torch.randint(1, 9, (), generator=generator)),
            float(torch.rand((), generator=generator)) * 2,
        )
        score, entropies = torch.rand(2, 1, 10, generator=generator, dtype=torch.float64)
        eligible = torch.zeros(1, 10, dtype=torch.bool)
        eligible[0, torch.randperm(10, generator=generator)[:n]] = True
        order = sorted(eligible[0].nonzero()[:, 0].tolist(), key=lambda i: -score[0, i])
        sets = [order[:k] for k in range(1, n + 1)]
        largest = [s for s in sets if sum(entropies[0, s]) - max(entropies[0, s]) <= gamma][-1]
        assert rules.keep_entropy_bound(score, entropies, eligible, gamma)[0].nonzero()[
            :, 0
        ].tolist() == sorted(largest)
    p, seen = probabilities(6, 9, seed=2), []
    H = -(p * (p + 1e-10).log()).sum(-1)
    generate(
        Independent(p),
        [[]],
        6,
        6,
        6,
        remasking="entropy",
        entropy_bound=float(H.sort().values[:3].sum()) + 1e-4,
        on_step=seen.append,
    )
    assert (
        int(seen[0].revealed.sum()) == 4 and len(seen) < 6
    )  # three of the lowest and the next, which is the maximum
    seen.clear()
    generate(Independent(p), [[]], 6, 6, 6, entropy_bound=0.0, on_step=seen.append)
    assert len(seen) == 6  # never less than one


def test_ancestral_sampling_flips_every_coin():
    """The share of masks falls as the time does even when a step reveals less than a token a
    row."""
    n, steps, masked = 400, 20, []
    generate(
        Independent(probabilities(4, 7)),
        [[]] * n,
        4,
        steps,
        4,
        remasking="ancestral",
        seed=0,
        on_step=lambda s: masked.append((s.tokens == 6).double().mean()),
    )
    for t, share in zip(torch.linspace(1, 1e-3, steps + 1)[1:-1], masked):
        assert abs(share - t) < 5 * math.sqrt(t * (1 - t) / (4 * n))


# --------------------------------------------------------------------------------------------------
# Which tokens are masked again


@pytest.mark.parametrize(
    "schedule,eta", [("cap", 0.05), ("rescale", 0.5), ("rescale", 1.0), ("cap", 0.0)]
)
def test_remasking_leaves_the_share_of_masks_and_the_tokens_as_they_are(schedule, eta):
    n, steps, p, masked, changed = 1500, 8, probabilities(4, 7), {}, 0
    model = Independent(p)

    def watch(step):
        nonlocal changed
        masked[len(masked) + 1] = (step.tokens == 6).double().mean().item()

    rows = generate(
        model,
        [[]] * n,
        4,
        steps,
        4,
        temperature=1.0,
        remasking="ancestral",
        remask=eta,
        remask_schedule=schedule,
        seed=2,
        on_step=watch,
    )
    t = torch.linspace(1, 1e-3, steps + 1)
    for step in range(1, steps):
        assert abs(masked[step] - t[step]) < 4.5 * math.sqrt(t[step] * (1 - t[step]) / (4 * n)), (
            step
        )
    assert masked[steps] == 0 and differs(counted(rows, 4, 7), p.double()) < 4.5
    for step in range(steps):  # the written share alpha_s follows from alpha_t
        write, sigma = rules.reverse_step(step, steps, eta, schedule)
        s = 0.0 if step == steps - 1 else float(t[step + 1])
        assert (
            write * t[step] + (1 - sigma) * (1 - t[step]) == pytest.approx(1 - s, abs=1e-6)
            and 0 <= write <= 1 + 1e-9
        )
        largest = min(1.0, s / (1 - float(t[step]))) if step else 1.0
        wanted = {"cap": min(eta, largest), "rescale": eta * largest}[schedule]
        assert sigma == pytest.approx(0.0 if step == steps - 1 else wanted)


@pytest.mark.parametrize("how", ["generate", "infill"])
def test_remasking_samples_the_joint_distribution_and_rewrites(how):
    model, n, before, rewritten, V = ExactPosterior(), 1500, None, 0, 3
    model.joint = (model.joint + 0.01) / (
        model.joint + 0.01
    ).sum()  # no cell that a chi-square test could not count

    def watch(step):
        nonlocal before, rewritten
        rewritten += 0 if before is None else int(((before != V) & (step.tokens == V)).sum())
        before = step.tokens

    options = dict(temperature=1.0, remasking="ancestral", remask=0.02, seed=0, on_step=watch)
    rows = (
        generate(model, [[]] * n, 3, 60, 3, **options)
        if how == "generate"
        else infill(model, [[V] * 3] * n, 60, **options)
    )
    counts = torch.zeros(model.joint.shape, dtype=torch.float64)
    for row in rows:
        counts[tuple(row)] += 1
    expected = n * model.joint
    assert ((counts - expected) ** 2 / expected).sum() < 26 + 5 * 7.2 and rewritten > n / 2


def test_remasking_by_confidence_takes_the_unsure_first():
    """Of a sure and an unsure token, both written, exactly sigma_max are masked again a step,
    shared out by softmax(-confidence)."""
    sure, n, steps = 0.97, 1500, 20
    p = torch.tensor([[sure, 0.01, 0.01, 0.01, 1e-9], [0.25, 0.25, 0.25, 0.25, 1e-9]])
    seen, again, expected = [], torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    rows = generate(
        Independent(p),
        [[]] * n,
        2,
        steps,
        2,
        temperature=1.0,
        remasking="ancestral",
        remask=1.0,
        remask_schedule="conf",
        seed=0,
        on_step=lambda step: seen.append(step.tokens.clone()),
    )
    for step, (before, after) in enumerate(zip(seen, seen[1:]), 1):
        both = (before != 4).all(1)
        again += ((after == 4) & (before != 4))[both].sum(0)
        confidence = torch.where(
            before[both] == torch.tensor([0, 9]), sure, torch.tensor([0.01, 0.25]).double()
        )
        expected += rules.reverse_step(step, steps, 1.0, "conf")[1] * (-confidence).softmax(1).sum(
            0
        )
    assert (
        ((again - expected).abs() < 4.5 * expected.sqrt()).all()
        and expected.min() > 50
        and expected[1] > 1.5 * expected[0]
    )
    assert differs(counted(rows, 2, 5)[:, :4], p[:, :4].double()) < 4.5
    assert [rules.reverse_step(step, steps, 1.0, "conf")[0] for step in range(steps)] == [
        rules.reverse_step(step, steps)[0] for step in range(steps)
    ]


def test_remasking_never_touches_what_was_given_or_other_blocks():
    model, given, seen = tiny(vocab_size=40), [1, MASK, 3, MASK, MASK, 6, MASK, MASK], []
    for options in (dict(), dict(cache="dual"), dict(cache="prefix"), dict(cache="block")):
        seen.clear()
        answer = infill(
            model,
            [given],
            40,
            4,
            temperature=1.0,
            remasking="ancestral",
            remask=0.5,
            remask_schedule="rescale",
            seed=1,
            on_step=seen.append,
            **options,
        )[0]
        assert MASK not in answer and all(a == g for a, g in zip(answer, given) if g != MASK)
        states = torch.stack([s.tokens[0] for s in seen])
        second = next(
            i for i, state in enumerate(states) if (state[4:] != torch.tensor(given[4:])).any()
        )
        assert (states[second:, :4] == torch.tensor(answer[:4])).all(), "a finished block stays"
        assert ((states[:-1] != MASK) & (states[1:] == MASK)).any(), "a token was masked again"
    exact = [
        generate(
            tiny(vocab_size=40, block_length=4),
            [[1, 2]],
            8,
            40,
            temperature=1.0,
            remasking="ancestral",
            remask=0.4,
            seed=3,
            cache=cache,
        )
        for cache in ("block", None)
    ]
    assert exact[0] == exact[1]


# --------------------------------------------------------------------------------------------------
# All of them in a batch


RULES = [
    dict(top_p=0.8, temperature=1.0),
    dict(top_k=3, temperature=0.5, remasking="entropy"),
    dict(alg_temp=0.5),
    dict(alg_temp=0.3, temperature=1.0),
    dict(suppress=[5, 6]),
    dict(defer=[5, 6, 7]),
    dict(entropy_bound=1.0),
    dict(entropy_bound=0.5, remasking="entropy", cache="dual"),
    dict(remasking="ancestral", remask=0.3, temperature=1.0),
    dict(remasking="ancestral", remask=0.5, remask_schedule="rescale", cache="prefix"),
    dict(remasking="ancestral", remask=1.0, remask_schedule="conf", temperature=0.7),
]


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize(
    "config",
    [dict(), dict(shift=True, step_schedule="timesteps", confidence_at_temperature=True)],
    ids=str,
)
def test_every_rule_gives_a_row_of_a_batch_what_it_gets_alone(options, config):
    model, seeds = tiny(vocab_size=40, seed=1, **config), [3, 1, 4]
    prompts = [p for p in RAGGED if p]
    together = generate(model, prompts, 12, 9, 4, seed=seeds, **options)
    assert together == [
        generate(model, [p], 12, 9, 4, seed=s, **options)[0] for p, s in zip(prompts, seeds)
    ]
    assert generate(model, prompts, 12, 9, 4, seed=3, **options)[0] == together[0]
    assert all(
        MASK not in answer and answer[: len(p)] == p and len(answer) == len(p) + 12
        for p, answer in zip(prompts, together)
    )
    gaps = [[1, MASK, 3, MASK, MASK, 6], [2, 4, MASK], [5, 6, 7, 8, MASK, 1, 2, 3, MASK]]
    together = infill(model, gaps, 9, 3, seed=seeds, **options)
    assert together == [infill(model, [g], 9, 3, seed=s, **options)[0] for g, s in zip(gaps, seeds)]
    assert all(
        MASK not in answer and all(a == g for a, g in zip(answer, gap) if g != MASK)
        for gap, answer in zip(gaps, together)
    )
