"""Edit Flows: alignments, losses, steps and whole trajectories of dLLM, the bound by enumeration,
rows that are edited together and alone, checkpoints, and sample.py with a model that edits."""
import io
import itertools
import json
import math
import random
import re

import pytest
import torch
from runs import LAST_LINE, learned, rows, succeed
from safetensors.torch import load_file
from scripts import ROOT, run_here

import edits
import kernels
from data import damage
from data.documents import Documents, find_documents
from data.tokenizer import Tokenizer
from diffusion import denoise, mdlm_loss
from edit_tokens import (
    Orders,
    apply_labels,
    common_tokens,
    edit_labels,
    fit,
    label_loss,
    labels_to_apply,
    orders_of,
    spoiled,
)
from edits import (
    BLANK,
    DELETE,
    INSERT,
    SUBSTITUTE,
    align,
    align_answer,
    apply_edits,
    blend,
    edit_forward,
    edit_loss,
    edit_nelbo,
    fires,
    flow,
    flow_weight,
    protect,
    remaining_edits,
    stack,
    without_blanks,
)
from experiments import edits as experiment
from model import Config, Transformer
from pretrained.editing import become_corrector, become_editor
from sampling.correcting import correct, text_of
from sampling.editing import with_masks
from sampling.rewriting import EditStep, rewrite
from sampling.sampler import Sampler
from sampling.terminal import Terminal
from sampling.trace import EditTrace
from training.ahead import Ahead
from training.run import Run

EDITORS = ("llada", "dream", "modernbert")
KINDS = {"SUB": SUBSTITUTE, "DEL": DELETE, "INS": INSERT}


def tiny_editor(seed=0, **settings):
    """A Transformer that edits, with rates and logits far from uniform."""
    config = {"vocab_size": 24, "dim": 16, "n_layers": 1, "n_heads": 2, "max_len": 64,
              "mask_token_id": 23, "eos_token_id": 22, "edits": True, **settings}
    model = Transformer(Config(**config)).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name or "blocks" in name or "embed_time" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def records(fixture_path):
    """(editflow.json, the tensors beside it)."""
    path = fixture_path("editflow.json")
    return json.loads(path.read_text()), load_file(fixture_path("editflow.safetensors"))


@pytest.fixture
def editor(fixture_path):
    """editor(name): one of dLLM's checkpoints."""
    def load(name):
        return Transformer.from_pretrained(fixture_path(f"editflow_{name}"))

    return load


# --------------------------------------------------------------------------------------------------
# Alignments


def test_alignments_of_the_reference(records):
    for record in records[0]["alignments"]:
        costs = record.get("sub_cost", 1), record.get("gap_cost", 1)
        assert align(record["x0"], record["x1"], *costs) == (record["z0"], record["z1"])


def random_pairs(count, length):
    """Pairs of texts of fewer than `length` tokens, of few kinds or of many."""
    rng, pairs = random.Random(0), []
    for _ in range(count):
        letters = rng.choice((1, 2, 3, 9))
        pairs.append([[rng.randrange(letters) for _ in range(rng.randrange(length))]
                      for _ in range(2)])
    return pairs


def test_the_fast_alignment_is_the_plain_one(monkeypatch):
    pairs = random_pairs(400, 14)
    fast = [align(*pair) for pair in pairs]
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert fast == [align(*pair) for pair in pairs]


def cost(z_0, z_1):
    return sum(a != b for a, b in zip(z_0, z_1))


def test_an_alignment_is_of_the_two_texts_and_the_cheapest():
    """Against the distance by its definition: all ways of putting blanks into both."""
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1,
                   distance(a, b[1:]) + 1)

    for a, b in itertools.product(itertools.product((1, 2), repeat=4), ([], [1, 2, 1], [2] * 5)):
        z_0, z_1 = align(list(a), list(b))
        assert [x for x in z_0 if x != BLANK] == list(a)
        assert [x for x in z_1 if x != BLANK] == list(b)
        assert cost(z_0, z_1) == distance(list(a), list(b))


def test_texts_that_cannot_be_aligned():
    with pytest.raises(ValueError, match="x_1 holds a negative token id: -1 stands for a gap"):
        align([1], [2, -1])
    assert align([], []) == ([], []) and align([], [7]) == ([BLANK], [7])
    with pytest.raises(ValueError, match="the first 2 tokens of x_0 and x_1 differ: a prompt is"):
        align_answer([1, 2, 3], [1, 3, 3], 2)


@pytest.mark.parametrize("plain", [False, True])
def test_alignments_of_tensors_are_those_of_lists(monkeypatch, plain):
    """Two tensors of one token are no equal keys of a dict: [1, 2, 3] and [1, 2] had nothing in
    common."""
    monkeypatch.setattr(kernels, "PLAIN", plain)
    x_0, x_1 = torch.tensor([1, 2, 3]), torch.tensor([1, 2])
    assert align(x_0, x_1) == align((1, 2, 3), [1, 2]) == ([1, 2, 3], [1, 2, BLANK])
    assert align_answer(x_0, (1, 2), 1) == ([1, 2, 3], [1, 2, BLANK])
    assert common_tokens(x_0, x_1) == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"token ids are whole numbers, got \[1.5\]"):
        align([1.5], [1])


def test_a_prompt_is_never_edited():
    """The cheapest alignment of the whole would insert in front of it."""
    x_0, x_1 = [1, 2, 1, 3], [1, 2, 1, 2, 1, 3]
    z_0, z_1 = align_answer(x_0, x_1, 3)
    assert z_0[:3] == z_1[:3] == [1, 2, 1] and cost(z_0, z_1) == 2


# --------------------------------------------------------------------------------------------------
# Losses


def test_schedules_of_the_reference(records):
    tensors = records[1]
    t = tensors["schedule.t"]
    for name in ("linear", "cubic", "cosine", "cubic_a0_b2"):
        schedule = edits.FLOW_SCHEDULES.get(name, lambda t: edits.cubic(t, 0.0, 2.0))
        kappa, d_kappa = schedule(t)
        torch.testing.assert_close(kappa, tensors[f"schedule.{name}.kappa"])
        torch.testing.assert_close(d_kappa, tensors[f"schedule.{name}.dkappa"])
        if name in edits.FLOW_SCHEDULES:
            torch.testing.assert_close(flow_weight(t, name), tensors[f"schedule.{name}.weight"])


@pytest.mark.parametrize("name", edits.FLOW_SCHEDULES)
def test_a_schedule_goes_from_0_to_1_and_knows_its_slope(name):
    t = torch.linspace(0, 1, 21, dtype=torch.float64, requires_grad=True)
    kappa, d_kappa = edits.FLOW_SCHEDULES[name](t)
    slope, = torch.autograd.grad(kappa.sum(), t)
    torch.testing.assert_close(d_kappa, slope)
    assert kappa[0].abs() < 1e-12 and (kappa[-1] - 1).abs() < 1e-12 and (d_kappa >= 0).all()


def test_losses_of_the_reference(records, editor):
    model, (lists, tensors) = editor("llada"), records
    for i, record in enumerate(lists["losses"]):
        known = {name.partition(".")[2]: tensor for name, tensor in tensors.items()
                 if name.startswith(f"loss{i}.")}
        pairs = [align(*pair) for pair in zip(record["x0"], record["x1"])]
        assert pairs == list(zip(record["z0"], record["z1"]))
        z_0, z_1 = stack(pairs)
        z_t = blend(z_0, z_1, known["t"], known["u"], record["scheduler"])
        assert torch.equal(z_t, stack([(z, z) for z in record["zt"]])[0])
        x_t, shown = without_blanks(z_t)
        assert torch.equal(shown.long(), known["x_mask"])
        assert torch.equal(x_t[shown], known["x_t"][shown])
        assert found_edits(remaining_edits(z_t, z_1)) == listed_edits(record["edits"])
        loss = edit_loss(model, z_0, z_1, known["t"][:, 0], known["u"], record["scheduler"],
                         record["max_w"], record["normalize_per_position"])
        torch.testing.assert_close(loss.weight, known["w"], rtol=1e-5, atol=0)
        torch.testing.assert_close(loss.survival, known["survival"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss.positive, known["positive"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss.loss, known["loss"], rtol=1e-5, atol=0)


def found_edits(found):
    return sorted(zip(found.row.tolist(), found.kind.tolist(), found.position.tolist(),
                      found.token.tolist()))


def listed_edits(rows):
    listed = []
    for row, some in enumerate(rows):
        for kind, position, token in some:
            listed.append((row, KINDS[kind], position, BLANK if token is None else token))
    return sorted(listed)


class Constant(torch.nn.Module):
    """An editor that knows one text: from [0] it inserts `token` after token 0 at a rate, and does
    nothing else. So the texts have the law of a process that can be counted."""

    def __init__(self, rate, q=0.5):
        super().__init__()
        self.config = Config(vocab_size=3, dim=2, n_layers=1, n_heads=1, edits=True)
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.rate, self.q, self.substitute_head, self.head = rate, q, None, self.insert_head

    def hidden(self, tokens, attention_mask=None, t=None):
        return tokens[..., None].float()

    def rate_head(self, states):
        inserts = torch.where(states[..., 0] == 0, self.rate, 1e-9)
        nothing = torch.full_like(inserts, 1e-9)
        rates = torch.stack((nothing, nothing, inserts), dim=-1) + self.anchor
        return rates.expm1().log()                      # what softplus turns into the rates

    def insert_head(self, states):
        others = (1 - self.q) / 2
        p = torch.tensor([others, self.q, others]).expand(*states.shape[:-1], 3)
        return p.log()


def test_the_bound_is_exact_where_a_text_has_one_history():
    """The model inserts after token 0 at the rate r w(t), the right token with probability q, and
    goes on doing so. Until 1 - 1e-3 the number of its insertions is Poisson with mean r W, where
    W = -log(1 - kappa), so that p([0, 1] | [0]) = q r W exp(-r W). The bound is the integral of

        r w  +  (1 - kappa) w (-log(r q) - 1)

    for with probability 1 - kappa the insertion is still to come, and lies above."""
    model = Constant(rate=0.7)
    z_0, z_1 = stack([([0, BLANK], [0, 1])] * 400)
    value, error = edit_nelbo(model, z_0, z_1, num_samples=50, seed=1)
    nats = 2 * value                                    # two tokens a text
    t = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000 * (1 - 1e-3)
    kappa, d_kappa = edits.linear(t)
    w = d_kappa / (1 - kappa)
    still = 1 - kappa                                   # the share that is not inserted yet
    integrand = 0.7 * w + still * w * (-math.log(0.7 * 0.5) - 1)
    assert nats == pytest.approx((integrand.mean() * (1 - 1e-3)).item(), abs=8 * error)
    W = -math.log(1e-3)
    exact = -math.log(0.7 * 0.5 * W) + 0.7 * W
    assert nats > exact and error < 0.1


def test_edits_that_several_columns_ask_for_count_once():
    """Two columns that insert the same token after the same one: 2 - 2 log 2; two different ones:
    1 - 0 each."""
    same = remaining_edits(*stack([([5, BLANK, BLANK], [5, 7, 7])]))
    other = remaining_edits(*stack([([5, BLANK, BLANK], [5, 7, 8])]))
    assert edits.counted(same, 1).item() == pytest.approx(2 - 2 * math.log(2))
    assert edits.counted(other, 1).item() == 2


def test_padding_of_a_batch_changes_nothing():
    model = tiny_editor(time_features=8)
    pairs = [align([1, 2, 3, 4], [1, 2, 9, 8, 4]), align([1], [1, 5, 6, 7, 8, 9, 2]),
             align([1, 2, 2, 2], [1, 3])]
    t, u = torch.tensor([0.2, 0.5, 0.8]), torch.rand(3, 8, generator=torch.Generator())
    whole = edit_loss(model, *stack(pairs), t, u[:, :7])
    alone = [edit_loss(model, *stack([pair]), t[i:i + 1], u[i:i + 1, :len(pair[0])])
             for i, pair in enumerate(pairs)]
    torch.testing.assert_close(whole.loss, sum(one.loss for one in alone) / 3)
    torch.testing.assert_close(whole.token_nll, torch.cat([one.token_nll for one in alone]))
    assert whole.count == sum(one.count for one in alone) == 5 + 7 + 2


def test_the_loss_teaches_every_head():
    model = tiny_editor(time_features=8).train()
    loss = edit_loss(model, *stack([align([1, 2, 3], [1, 9, 8, 7]), align([1, 5, 5, 5], [1, 5])]),
                     torch.tensor([0.1, 0.1]), torch.full((2, 4), 0.9))
    loss.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_losses_that_cannot_be():
    model = tiny_editor()
    with pytest.raises(ValueError, match="a text to edit is empty: put a token in front"):
        edit_loss(model, *stack([align([], [1, 2])]), torch.zeros(1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="z_0 and z_1 must have one shape"):
        edit_loss(model, torch.ones(1, 2).long(), torch.ones(1, 3).long())
    pair, u = stack([align([1, 2], [1, 3])] * 2), torch.zeros(2, 2)
    for t in (-0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match="t must be between 0 and 1, got"):
            edit_loss(model, *pair, torch.tensor([0.5, t]), u)
    for t, wrong in ((torch.zeros(2, 1), u), (torch.zeros(1), u), (torch.zeros(2), u[0])):
        with pytest.raises(ValueError, match=r"t and u must have shapes \[2\] and \[2, 2\], got"):
            edit_loss(model, *pair, t, wrong)
    with pytest.raises(ValueError, match="schedule must be one of linear, cubic"):
        edit_loss(model, *stack([align([1], [1, 2])]), schedule="square")
    shifted = tiny_editor(shift=True)
    with pytest.raises(ValueError, match="cannot change the first token"):
        edit_loss(shifted, *stack([align([1, 2], [3, 2])]), torch.zeros(1), torch.ones(1, 2))
    masked = Transformer(Config(vocab_size=9, dim=8, n_layers=1, n_heads=1, mask_token_id=8))
    with pytest.raises(ValueError, match="this model has no edit heads: train_edits.py"):
        edit_loss(masked, *stack([align([1], [1, 2])]))
    with pytest.raises(ValueError, match="inserts, deletes and substitutes"):
        mdlm_loss(model, torch.ones(1, 3).long())
    with pytest.raises(ValueError, match="inserts, deletes and substitutes"):
        denoise(model, torch.full((1, 3), 23), 3)


# --------------------------------------------------------------------------------------------------
# Steps


def test_steps_of_the_reference(records):
    lists, tensors = records
    for i, record in enumerate(lists["steps"]):
        known = {name.partition(".")[2]: tensor for name, tensor in tensors.items()
                 if name.startswith(f"step{i}.")}
        rates = torch.stack([known[f"{kind}_rate_hat"] for kind in ("sub", "del", "ins")], dim=-1)
        u = torch.stack([known[f"u_{kind}"] for kind in ("comb", "del", "ins")])
        prompt_len = 0 if record["edit_prompt"] else record["prompt_len"]
        weight = flow_weight(torch.tensor([record["t"]]), "linear")
        fire = fires(rates, weight, record["tau"], u, *protect(len(record["x"]), prompt_len))
        written = apply_edits(record["x"], fire, known["sub_argmax"].tolist(),
                              known["ins_argmax"].tolist())
        assert written.tokens == record["x_next"] and bool(fire) == record["any_edit"]


def begin(record, ids):
    """(canvas, length of its prompt) of a recorded trajectory."""
    prompt = record["prompt"]
    if prompt[0] != ids["bos"]:
        prompt = [ids["bos"], *prompt]
    protected = 0 if record["edit_prompt"] else len(prompt)
    return prompt + [ids["mask"]] * record["mask_length"], protected


def test_trajectories_of_the_reference(records, editor):
    """dLLM samples with the linear schedule, whatever was trained: so it is asked for here."""
    model, (lists, tensors) = editor("llada"), records
    for i, record in enumerate(lists["trajectories"]):
        canvas, prompt_len = begin(record, lists["ids"])
        plain, fast, passes, u = [canvas], [canvas], [], tensors[f"trajectory{i}.u"]

        def uniform(step, length, u=u):
            return u[step, :, :length]

        def watch(step, fast=fast, passes=passes):
            fast.append(fast[-1] if step.rows[0] is None else step.rows[0].tokens)
            passes.append(step.passes)

        def take(step, written, plain=plain):
            plain.append(written.tokens)

        output = flow(model, canvas, record["tau"], "linear", prompt_len, uniform=uniform,
                      on_step=take)
        assert output == record["output"] and plain == record["history"]
        steps = round(1 / record["tau"])
        [output] = rewrite(model, [canvas], steps, [prompt_len], schedule="linear",
                           uniform=uniform, on_step=watch)
        assert output == record["output"] and fast == record["history"]
        assert passes[-1] <= record["forward_passes"]
        if record["time_independent"]:
            assert passes[-1] == record["forward_passes"]


@pytest.mark.parametrize("settings", [{}, {"time_features": 8}, {"shift": True}])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_gets_what_it_would_get_alone(settings, temperature):
    model = tiny_editor(edit_schedule="cubic", **settings)
    rows = [[22, 5, 6, 23, 23, 23], [22], [22, 1, 2, 3, 4, 5, 6, 7, 8]]
    prompts, seeds = [3, 1, 9], [5, 6, 7]
    together = rewrite(model, rows, 12, prompts, temperature=temperature, seed=seeds)
    assert together != rows
    for row, n, seed, answer in zip(rows, prompts, seeds, together):
        assert rewrite(model, [row], 12, [n], temperature=temperature, seed=[seed]) == [answer]
        plain = flow(model, row, 1 / 12, prompt_len=n, temperature=temperature, seed=seed)
        assert plain == answer and answer[:n] == row[:n]


def test_frozen_tokens_stay_and_gaps_alone_are_filled():
    model = tiny_editor(2)
    row, seen = [22, 1, 2, 3, 4], []
    closed = [True, True, False, True, True]
    [answer] = rewrite(model, [row], 32, frozen=[[True] * 5], closed=[closed], seed=1,
                       on_step=seen.append)
    assert answer[:3] == row[:3] and answer[-2:] == row[-2:] and len(answer) > 5
    assert any(step.rows[0] for step in seen)


def test_a_text_that_outgrows_the_context_stops_and_says_so():
    model = tiny_editor(max_len=8)
    with torch.no_grad():
        model.rate_head.weight.zero_()
        model.rate_head.bias.copy_(torch.tensor([-20.0, -20.0, 3.0]))
    with pytest.warns(UserWarning, match=r"has grown to \d+ tokens, past the model's context of 8"):
        grown = rewrite(model, [[22], [22, 1]], 16, [1, 2], seed=0)
    assert all(len(row) <= 8 for row in grown)
    with pytest.raises(ValueError, match="past the model's context of 8: it stops there"):
        flow(model, [22], 1 / 16, prompt_len=1, seed=0)


def test_a_text_may_vanish():
    model = tiny_editor()
    with torch.no_grad():
        model.rate_head.weight.zero_()
        model.rate_head.bias.copy_(torch.tensor([-20.0, 3.0, -20.0]))
    assert rewrite(model, [[22, 1, 2], [22, 1]], 16, [0, 1], seed=0) == [[], [22]]
    assert flow(model, [22, 1, 2], 1 / 16, seed=0) == []


@pytest.mark.parametrize("change, words", [
    (dict(sequences=[[]]), "row 0 is empty: there must be a token to insert after"),
    (dict(sequences=[[1] * 65]), "row 0 has 65 tokens, the model's context is 64"),
    (dict(sequences=[[24]]), "token 24 is outside the vocabulary of 24"),
    (dict(steps=0), "steps must be between 1 and 1000000, got 0"),
    (dict(temperature=-1), "temperature must not be negative, got -1"),
    (dict(prompt_lens=[3]), "row 0 has 2 tokens, a prompt of 3 is not in it"),
    (dict(prompt_lens=[1, 1]), "prompt_lens has one for each row, 1, got 2"),
    (dict(frozen=[]), "frozen has one for each row, 1, got 0"),
    (dict(closed=[[True]]), "row 0 has 2 tokens, but frozen 2 and closed 1"),
    (dict(seed=[0, 1]), "a list of seeds has one for each row, 1, got"),
    (dict(schedule="square"), "schedule must be one of linear, cubic, cube, cosine, got 'square'"),
])
def test_what_cannot_be_rewritten(change, words):
    with pytest.raises(ValueError, match=words):
        rewrite(tiny_editor(), **{"sequences": [[22, 1]], **change})
    if change == dict(sequences=[[24]]):
        with pytest.raises(ValueError, match=words):
            flow(tiny_editor(), [24], 0.5)


def test_what_the_plain_sampler_refuses_as_well():
    with pytest.raises(ValueError, match="token 99 is outside the vocabulary of"):
        flow(tiny_editor(), [22, 99], 0.5)
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        flow(tiny_editor(), [22], 0.5, temperature=-1)


def test_rates_that_overflow():
    model = tiny_editor()
    with torch.no_grad():
        model.rate_head.bias.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the model's rates overflow"):
        rewrite(model, [[22, 1]])


def test_edits_happen_at_their_rates():
    """In 20,000 positions with rates 0.2, 0.6 and 0.5, where w = 2 and tau = 0.1."""
    n = 20000
    u = torch.rand(3, n, generator=torch.Generator().manual_seed(0))
    fire = fires(torch.tensor([0.2, 0.6, 0.5]).expand(n, 3), torch.tensor([2.0]), 0.1, u,
                 *protect(n, 0))
    for flags, p in ((fire.substitute, 0.04), (fire.delete, 0.12), (fire.insert, 0.1)):
        assert sum(flags) / n == pytest.approx(p, abs=4 * math.sqrt(p / n))


# --------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("name", EDITORS)
def test_heads_of_the_reference(name, editor, fixture_path):
    model, known = editor(name), load_file(fixture_path(f"editflow_{name}") / "io.safetensors")
    shown = known["attention_mask"].bool()
    with torch.no_grad():
        substitutes, inserts, rates = edit_forward(model, known["input_ids"], shown)
    found = {"sub_logits": substitutes, "ins_logits": inserts, "sub_rate_hat": rates[..., 0],
             "del_rate_hat": rates[..., 1], "ins_rate_hat": rates[..., 2]}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor[shown], known[key][shown], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", EDITORS)
def test_a_checkpoint_is_written_back_as_it_was(name, editor, fixture_path, tmp_path):
    model, folder = editor(name), fixture_path(f"editflow_{name}")
    model.export_pretrained(tmp_path / "theirs")
    both = folder, tmp_path / "theirs"
    before, after = [load_file(path / "model.safetensors") for path in both]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((path / "config.json").read_text()) for path in both]
    assert configs[0] == configs[1]
    model.save_pretrained(tmp_path / "ours")
    again = Transformer.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    tokens = torch.tensor([[83, 1, 2, 3]])
    for ours, theirs in zip(edit_forward(again, tokens), edit_forward(model, tokens)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llada", "dream", "modernbert"])
def test_a_model_of_masks_becomes_an_editor(name, fixture_path, tmp_path):
    """What it writes is what its head predicts; dLLM's own layout comes out, and the head stays."""
    before = Transformer.from_pretrained(fixture_path(name))
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    model = become_editor(Transformer.from_pretrained(fixture_path(name)), "cubic")
    model.export_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == f"editflow-{name}"
    assert raw["architectures"][0].startswith("EditFlow")
    again = Transformer.from_pretrained(tmp_path)
    _, inserts, rates = edit_forward(again, tokens)
    if name != "modernbert":            # whose edit heads read what comes before the last norm
        torch.testing.assert_close(inserts, before(tokens))
    assert (rates[..., 2] - 0.1).abs().max() < 0.2
    assert become_editor(again, "cubic") is again
    with pytest.raises(ValueError, match="was trained to edit with schedule cubic"):
        become_editor(again, "linear")


def test_an_editor_that_goes_on_begins_with_the_masks_of_now():
    model = become_editor(tiny_editor(), "linear", num_masks=3)
    assert model.config.edit_masks == 3
    assert become_editor(model, "linear").config.edit_masks == 0


def test_models_that_cannot_become_editors():
    causal = Transformer(Config(vocab_size=9, dim=8, n_layers=1, n_heads=1, causal=True))
    with pytest.raises(ValueError, match="reads from left to right cannot edit: convert it"):
        become_editor(causal, "cubic")


def test_an_editor_of_ours_has_no_published_layout(tmp_path):
    with pytest.raises(ValueError, match="cannot have edits = True: save_pretrained"):
        tiny_editor().export_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------
# Data


def test_documents_end_where_the_separator_is():
    ids = torch.tensor([9, 1, 2, 9, 9, 3, 4, 5, 6, 7, 9, 8]).numpy()
    assert find_documents(ids, 9, 3).tolist() == [[1, 3], [5, 8], [8, 10], [11, 12]]


class FewTokens:
    train = val = torch.tensor([1, 2, 9, 3, 9, 4, 5, 6, 9]).numpy()
    eos_token_id, meta = 9, {"name": "few"}


def test_documents_need_room_for_a_token_of_text():
    with pytest.raises(ValueError, match="seq_len must be at least 2, .* got 1"):
        Documents(FewTokens, 9, 1)


def test_an_epoch_visits_each_document_once_however_it_is_shared():
    documents = Documents(FewTokens, 9, 8)
    whole = documents.batch("train", 3, seed=1, step=0)
    assert sorted(whole) == [[9, 1, 2], [9, 3], [9, 4, 5, 6]]
    pieces = [documents.batch("train", 1, 1, 0, piece, 3)[0] for piece in range(3)]
    assert pieces == whole
    assert documents.batch("train", 3, seed=1, step=1) != whole or \
        documents.batch("train", 3, seed=1, step=2) != whole
    assert documents.some("val", 6) == [[9, 1, 2], [9, 3]]


def test_sources_leave_the_first_token():
    rng, how = random.Random(0), damage.SourceSettings([1, 2, 3], 7, num_masks=4, max_damage=3)
    for name, source in damage.SOURCES.items():
        for length in (1, 2, 9):
            x_0 = source([8, *range(10, 9 + length)], rng, how)
            assert x_0[0] == 8, name
    assert damage.masks([8, 1, 2], rng, how) == [8, 7, 7, 7, 7]
    for _ in range(50):
        x_1 = list(range(20, 30))
        x_0 = damage.gap(x_1, rng, how)
        assert 5 <= len(x_0) < 10 and cost(*align(x_0, x_1)) == 10 - len(x_0)
        assert 1 <= cost(*align(damage.damage(x_1, rng, how), x_1)) <= 3 or \
            damage.damage(x_1, rng, how)


def test_a_gap_on_its_way():
    """Nothing stands there, or some of what is missing, and masks are too few or too many."""
    rng, how = random.Random(0), damage.SourceSettings([1, 2, 3], 7)
    x_1, lengths, is_empty = list(range(20, 50)), set(), []
    for _ in range(200):
        x_0 = damage.half_filled(x_1, rng, how)
        shown = [token for token in x_0 if token != 7]
        assert x_0[0] == 20 and shown == sorted(set(shown)) and set(shown) <= set(x_1)
        missing = len(x_1) - len(shown)
        assert len(x_0) - len(shown) <= 2 * missing
        jumps = [b - a for a, b in zip(shown, shown[1:] + [50]) if b - a > 1]
        is_empty.append(len(jumps) == 1)
        lengths.add((missing > len(x_0) - len(shown)) - (missing < len(x_0) - len(shown)))
    assert lengths == {-1, 0, 1} and 80 < sum(is_empty) < 150


def test_work_ahead_is_the_same_work():
    ahead = Ahead(lambda n: n * n)
    assert [ahead(n) for n in (3, 4, 5, 9, 2)] == [9, 16, 25, 81, 4]


# --------------------------------------------------------------------------------------------------
# Traces and sample.py


def bytes_editor(**settings):
    return tiny_editor(vocab_size=260, mask_token_id=257, eos_token_id=256, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editor")
    bytes_editor().save_pretrained(folder)
    Tokenizer.bytes().save_pretrained(folder)
    return folder


def test_sample_says_in_a_line_that_a_text_has_grown_too_long(tmp_path, monkeypatch):
    """Not in the two of Python's warnings, with a file and a number."""
    monkeypatch.chdir(ROOT)
    model = bytes_editor()
    with torch.no_grad():
        model.rate_head.weight.zero_()
        model.rate_head.bias.copy_(torch.tensor([-20.0, -20.0, 5.0]))
    model.save_pretrained(tmp_path)
    Tokenizer.bytes().save_pretrained(tmp_path)
    result = sample(tmp_path, "--edit=abc", "--num_samples=2", "--steps=16")
    assert result.status == 0, result
    assert re.fullmatch(r"(note: the text has grown to \d+ tokens, past [^\n]*\n)+", result.err)


def test_a_trace_tells_insertions_from_substitutions_and_deletions():
    sampler = Sampler(bytes_editor(), Tokenizer.bytes())
    row = [256, *b"abc"]
    trace = EditTrace(sampler, [row])
    fire = edits.Fires([False, True, False, False], [False, False, True, False],
                       [False, False, False, True])
    written = apply_edits(row, fire, [0, 0, ord("X"), 0], [0, 0, 0, ord("Y")])
    trace(EditStep(1, 1, [written]))
    assert trace.canvas == [[256, *b"XcY"]]
    assert [(cell.text, cell.kind) for cell in trace.view[0][1:]] == [
        ("a", "deleted"), ("X", "substituted"), ("c", "given"), ("Y", "inserted")]
    assert trace.view[0][2].before == "b"
    line = capture(trace, 1)
    assert line.endswith("[-a-][-b-]{+X+}c{+Y+}\n")
    trace(EditStep(2, 2, [None]))
    assert trace.messages[-1] == {"step": 2, "canvas": {}}
    assert capture(trace, 2).endswith("XcY\n")


def capture(trace, step):
    stream = io.StringIO()
    Terminal(stream).print_lines(trace, step)
    return stream.getvalue()


def sample(checkpoint, *arguments):
    return run_here("sample.py", f"--checkpoint={checkpoint}", "--device=cpu", "--threads=1",
                    "--steps=6", *arguments)


def test_sample_writes_continues_fills_and_repairs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.html"
    result = sample(checkpoint, "--prompt=Ab", "--num_samples=2", f"--html={page}", "--show")
    assert result.status == 0, result
    assert re.search(r"step   6  .*\n", result.out) and "--- 2 of 2\nAb" in result.out
    assert re.search(r"\d+ inserted, \d+ substituted, \d+ deleted; \d+ tokens in", result.out)
    trace = json.loads(re.search(r"const TRACE = (.*);\n", page.read_text())[1])
    assert trace["messages"][0]["edits"] is True and len(trace["messages"]) == 7
    filled = sample(checkpoint, "--infill=one [MASK] two [MASK] three")
    assert re.match(r"one.* two.* three\n\n", filled.out, re.DOTALL), filled
    edits = re.search(r"(\d+) inserted, \d+ substituted, (\d+) deleted; (-?\d+) tokens", filled.out)
    assert int(edits[3]) == int(edits[1]) - int(edits[2]), "what stays was not written"
    repaired = sample(checkpoint, "--edit=a text to repair")
    assert repaired.status == 0 and "substituted" in repaired.out


@pytest.mark.parametrize("arguments, words", [
    ("--cache=prefix", "cache is for models that fill masks"),
    ("--block_length=4", "block_length is for models that fill masks"),
    ("--threshold=0.9", "threshold is for models that fill masks"),
    ("--chat", "it takes --prompt, --infill and --edit, neither --chat nor --serve"),
    ("--edit= ", "the text to edit is empty: leave --edit out to write a new one"),
    ("--infill=nothing", "there is nothing to fill: write [MASK] where text is missing"),
    ("--infill=a[MASK:3]b", "[MASK:3] says how long a gap is, and"),
    ("--prompt=a[MASK]b", "the prompt contains [MASK] at character 1: use --infill"),
    ("--max_new_tokens=5", "decides itself how much it writes: leave max_new_tokens at 0"),
    ("--schedule=even", "schedule must be one of linear, cubic, cube, cosine, got 'even'"),
    ("--steps=-1", "steps must be between 1 and 1000000, got -1"),
    ("--temperature=warm", "temperature takes a number or auto, got 'warm'"),
    ("--prompt=" + "a" * 64, "65 tokens of prompt leave no room in the context of 64"),
])
def test_mistakes_with_a_model_that_edits(arguments, words, checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run_here("sample.py", f"--checkpoint={checkpoint}", "--device=cpu", arguments)
    assert result.status == 2 and result.out == "", result
    assert re.fullmatch(r"error: [^\n]*\n", result.err) and words in result.err


def test_what_is_for_masks_refuses_a_model_that_edits(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, data in (("finetune_llada.py", f"--dataset={text}"),
                         ("convert_bert.py", f"--dataset={text}"), ("train_grpo.py", "--beta=0")):
        result = run_here(script, f"--init_from={checkpoint}", f"--out_dir={tmp_path}", data,
                          "--device=cpu", "--dtype=float32")
        words = "inserts, deletes and substitutes: see train_edits.py"
        assert result.status == 2 and words in result.err, result


def test_a_model_of_masks_cannot_edit_a_text(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run_here("sample.py", "--device=cpu", "--edit=a text")
    assert result.status == 2 and "fills masks and cannot edit a text" in result.err


# --------------------------------------------------------------------------------------------------
# Edits as tokens

A, B, C, D, E, END, MASK, DEL, INS = range(9)
ORDERS = Orders(MASK, DEL, INS)


@pytest.mark.parametrize("x_t, x_1, labels", [
    ([A, B, D, E], [A, C, D], [A, C, D, DEL]),                  # substituted, kept, deleted
    ([A, D], [A, B, C, D], [A, INS]),                           # one insertion at a time
    ([A, MASK, D], [A, B, C, D], [A, B, INS]),                  # a mask counts as a token to write
    ([A, MASK, MASK, MASK, D], [A, B, D], [A, B, DEL, DEL, D]),
    ([A, B, C, D, E], [A, D, E], [A, DEL, DEL, D, E]),
    ([B, C], [A, B, C], [INS, C]),
    ([A], [A, B], [A]),                                         # nothing stands after it
    ([], [A], []),
])
def test_labels(x_t, x_1, labels):
    assert edit_labels(x_t, x_1, ORDERS) == labels


def test_a_common_subsequence_is_one_and_the_longest(monkeypatch):
    """Against all subsequences, and the fast form against the plain one."""
    pairs = random_pairs(300, 9)
    fast = [common_tokens(*pair) for pair in pairs]
    for (x_0, x_1), places in zip(pairs, fast):
        assert all(x_0[i] == x_1[j] for i, j in places)
        assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(places))
        parts = {part for n in range(len(x_1) + 1) for part in itertools.combinations(x_1, n)}
        assert len(places) == max(n for n in range(len(x_0) + 1)
                                  for part in itertools.combinations(x_0, n) if part in parts)
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert fast == [common_tokens(*pair) for pair in pairs]


@pytest.mark.parametrize("labels, after, origin", [
    ([A, B, C, D], [A, B, C, D], [0, 1, 2, 3]),
    ([A, E, C, D], [A, E, C, D], [0, 1, 2, 3]),
    ([A, DEL, C, D], [A, C, D, MASK], [0, 2, 3, None]),         # padded
    ([A, INS, C, D], [A, MASK, B, C], [0, None, 1, 2]),         # cut
    ([A, INS, DEL, D], [A, MASK, B, D], [0, None, 1, 3]),
])
def test_a_block_keeps_its_length(labels, after, origin):
    new = apply_labels([A, B, C, D], labels, ORDERS)
    assert (new.tokens, new.origin) == (after, origin)
    written = [i is None or token != [A, B, C, D][i] for token, i in zip(after, origin)]
    assert new.edited == written


@pytest.mark.parametrize("source", ["nothing", "damage", "gap", "masks", "mixed"])
def test_whoever_follows_the_labels_ends_at_the_text(source):
    rng, how = random.Random(source), damage.SourceSettings([A, B, C, D, E], MASK, 4, 8)
    for _ in range(60):
        x_1 = [END] + [rng.randrange(5) for _ in range(rng.randrange(14))]
        block = fit(x_1 + [END], 24, END)
        x_0, share = damage.block_source(x_1, source, rng, how)
        x, labels = spoiled(x_0, x_1, share, rng, 24, END, ORDERS)
        assert len(x) == len(labels) == 24 and x[0] == END
        assert MASK not in labels
        for _ in range(24):
            x = apply_labels(x, edit_labels(x, block, ORDERS), ORDERS).tokens
        assert x == block
        x, labels = spoiled(x_0, x_1, share, rng, 24, END, Orders(MASK))
        assert labels == block                          # without orders, token for token


def test_what_a_step_does():
    frozen = torch.tensor([True, True, False, False, False, False])
    closed = torch.tensor([True, False, False, False, False, False])
    x = torch.tensor([A, B, MASK, MASK, C, D])

    def done(chosen, p, minimum=1):
        return labels_to_apply(x, torch.tensor(chosen), torch.tensor(p), ORDERS, 0.9, 0.5, frozen,
                               closed, minimum).tolist()

    sure = [1.0] * 6
    assert done([B, C, D, E, E, E], sure) == [A, B, D, E, E, E]         # a prompt stays
    assert done([A, B, D, E, E, E], [1, 1, 0.3, 0.4, 0.5, 0.51]) == [A, B, MASK, E, C, E]
    assert done([A, B, D, E, E, E], [1, 1, 0.3, 0.4, 0.5, 0.5], minimum=2) == [A, B, D, E, C, D]
    assert done([INS, INS, DEL, INS, INS, DEL], sure) == [A, B, DEL, INS, INS, DEL]
    assert done([INS] * 6, sure)[:2] == [A, B]          # nothing comes between prompt tokens
    closed[1] = True
    assert done([A, B, INS, E, C, D], sure) == [A, B, MASK, E, C, D]
    closed[0] = closed[1] = False
    assert done([INS, INS, D, E, C, D], sure) == [A, INS, D, E, C, D]   # before a token that stays


def tiny_corrector(seed=0, orders=True, **settings):
    config = {"vocab_size": 24, "dim": 16, "n_layers": 1, "n_heads": 2, "max_len": 16,
              "mask_token_id": 23, "eos_token_id": 22, **settings}
    model = Transformer(Config(**config)).init_weights(seed).eval()
    model = become_corrector(model, config["max_len"], 0.02, orders)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def correct_plainly(model, tokens, steps, threshold, edit_threshold, prompt_len):
    """One row, by the rules as they are told."""
    config, orders, seen, fills_only = model.config, orders_of(model.config), [], False
    x = fit(tokens, config.max_len, config.eos_token_id)
    frozen = torch.arange(len(x)) < prompt_len
    closed = torch.arange(len(x)) < prompt_len - 1
    for step in range(1, steps + 1):
        logits = model(torch.tensor([x]))[0].detach()                                   # [L, V]
        logits[:, orders.mask] = -torch.inf
        if fills_only or step == steps:
            logits[:, [orders.delete, orders.insert]] = -torch.inf
            edit_threshold = 1.0
        p, chosen = logits.softmax(-1).max(-1)
        share = math.ceil(x.count(orders.mask) / (steps - step + 1))
        labels = labels_to_apply(torch.tensor(x), chosen, p, orders, threshold, edit_threshold,
                                 frozen, closed, share)
        if labels.tolist() == x:
            break
        x = apply_labels(x, labels.tolist(), orders).tokens     # the prompt never moves
        fills_only = fills_only or x in seen
        seen.append(x)
    return text_of(x, config)


@pytest.mark.parametrize("shift", [False, True])
def test_rows_are_corrected_as_if_alone(shift):
    model = tiny_corrector(shift=shift)
    rows_of_tokens = [[22, 3, 4, 23, 5], [22, 23], [22, 7, 8, 9, 10, 11, 12]]
    prompts, seen = [2, 1, 4], []
    how = dict(threshold=0.5, edit_threshold=0.3, seed=0)
    together = correct(model, rows_of_tokens, 9, prompts, **how, on_step=seen.append)
    for row, prompt, found in zip(rows_of_tokens, prompts, together):
        assert found == correct(model, [row], 9, [prompt], **how)[0]
        assert found[:prompt] == row[:prompt] and 23 not in found
        if not shift:
            assert found == correct_plainly(model, row, 9, 0.5, 0.3, prompt)
    # What the steps tell is what comes out.
    last = {}
    for step in seen:
        last |= {b: new.tokens for b, new in enumerate(step.rows) if new is not None}
    assert all(last[b] == found for b, found in enumerate(together) if b in last) and last
    assert correct(model, rows_of_tokens, 9, prompts, temperature=1.0, **how) != together


def test_a_block_that_would_lose_text_stops_and_says_so():
    model = tiny_corrector()
    model.forward = lambda x, select=None, **_: order(x, model.config.insert_token_id)
    full = [22, *range(1, 15), 3]
    with pytest.warns(UserWarning, match="past the model's context of 16: it stops there"):
        assert correct(model, [full], 3, [1]) == [full]
    model.forward = fill_or_insert(model)
    with pytest.warns(UserWarning, match="it stops there"):             # and yet fills its mask
        assert correct(model, [[22, 23, *full[2:]]], 3, [1]) == [[22, 7, *full[2:]]]
    model.forward = lambda x, select=None, **_: order(x, model.config.delete_token_id)
    assert correct(model, [[22, 1, 2]], 1, [1]) == [[22, 1, 2]]     # the last pass edits nothing


def order(x, token):
    """Logits of a model that says the same of every position."""
    logits = torch.zeros(x.numel(), 26)
    logits[:, token] = 9.0
    return logits


def fill_or_insert(model):
    """A forward pass that gives the order to insert at masks, and next to it token 7; else what
    stands there."""
    def forward(x, select=None, **_):
        tokens = x.flatten()
        logits = torch.nn.functional.one_hot(tokens, 26) * 9.0
        masks = tokens == 23
        logits[masks, model.config.insert_token_id] = 20.0
        logits[masks, 7] = 5.0
        return logits
    return forward


@pytest.mark.parametrize("change, words", [
    (dict(steps=0), "steps must be at least 1, got 0"),
    (dict(threshold=2.0), "threshold must be between 0 and 1, got 2.0"),
    (dict(edit_threshold=-1.0), "edit_threshold must be between 0 and 1, got -1.0"),
    (dict(temperature=-1.0), "temperature must not be negative, got -1.0"),
    (dict(sequences=[[]]), "row 0 has 0 tokens, and a block of this model from 1 to 16"),
    (dict(sequences=[[1] * 17]), "row 0 has 17 tokens, and a block of this model from 1 to 16"),
    (dict(sequences=[[99]]), "token 99 is outside the vocabulary of 26"),
    (dict(model=tiny_editor()), "this model does not edit by tokens"),
    (dict(model=Transformer(Config(block_length=4, edit_threshold=0.5))), "block by block"),
    (dict(model=Transformer(Config(edit_threshold=0.5))), "needs a mask, and an end of text"),
    (dict(prompt_lens=[2]), "row 0 has 1 tokens, a prompt of 2 is not in it"),
    (dict(prompt_lens=[]), "prompt_lens has one for each row, 1, got 0"),
])
def test_what_cannot_be_corrected(change, words):
    with pytest.raises(ValueError, match=words):
        correct(**dict(model=tiny_corrector(), sequences=[[1]]) | change)


def test_a_model_of_masks_becomes_a_corrector(published, tmp_path):
    """Its predictions are what they were; the two orders begin as the mask token."""
    before = Transformer.from_pretrained(published("llada"))
    model = become_corrector(Transformer.from_pretrained(published("llada")), 32, 0.5)
    tokens = torch.tensor([[1, 2, 3, before.config.mask_token_id]])
    V = before.config.vocab_size
    with torch.no_grad():
        ours, theirs = model(tokens), before(tokens)
    assert torch.equal(ours[..., :V], theirs) and ours.shape[-1] == V + 2
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path).config
    assert (again.delete_token_id, again.insert_token_id) == (V, V + 1)
    assert (again.edit_threshold, again.edit_masks) == (0.5, 31)
    for change, words in ((dict(block=10**6), "a context of"),
                          (dict(has_orders=False), "go on with --editing=tokens")):
        with pytest.raises(ValueError, match=words):
            become_corrector(model, **dict(block=32, edit_threshold=0.5) | change)
    with pytest.raises(ValueError, match="take a model of masks"):
        become_corrector(tiny_editor(), 16, 0.5)
    with pytest.raises(ValueError, match="both delete_token_id and insert_token_id"):
        Orders(0, 1)


def test_training_learns_to_correct():
    """Texts count upwards, so that what is wrong, missing or too much can be told."""
    config = Config(vocab_size=14, dim=32, n_layers=2, n_heads=2, max_len=12, mask_token_id=13,
                    eos_token_id=12)
    model = become_corrector(Transformer(config).init_weights(0), 12, edit_threshold=0.5)
    rng, how = random.Random(0), damage.SourceSettings(list(range(12)), 13, 4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(150):
        pairs = []
        for _ in range(32):
            begin, length = rng.randrange(4), rng.randrange(4, 8)
            x_1 = [12, *range(begin, begin + length)]
            x_0, share = damage.block_source(x_1, "damage", rng, how)
            pairs.append(spoiled(x_0, x_1, share, rng, 12, 12, orders_of(config)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 150)
        label_loss(model, *stack(pairs)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole, broken = [], []
    for begin, place in itertools.product(range(3), range(2, 5)):
        text = [12, *range(begin, begin + 6)]
        for new in ([], [11], [text[place], 11]):       # deleted, substituted, inserted after it
            whole.append(text)
            broken.append(text[:place] + new + text[place + 1:])
    found = correct(model.eval(), broken, prompt_lens=[1] * len(broken))
    restored = [sum(a == b for a, b in zip(found[kind::3], whole[kind::3])) for kind in range(3)]
    assert min(restored) >= 6, restored                 # of 9


# --------------------------------------------------------------------------------------------------
# The recipe


@pytest.mark.parametrize("editing", ["flows", "tokens"])
def test_a_run_is_resumed_exactly_and_its_model_writes(editing, small, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, cut, way = tmp_path / "whole", tmp_path / "cut", f"--editing={editing}"
    succeed(run_here(*small("train_edits.py", whole, way)))
    goes_on = Run.goes_on
    monkeypatch.setattr(Run, "goes_on", lambda run: run.step < 4 and goes_on(run))   # as if killed
    succeed(run_here(*small("train_edits.py", cut, way)))
    monkeypatch.setattr(Run, "goes_on", goes_on)
    result = succeed(run_here(*small("train_edits.py", cut, way, "--resume=True")))
    assert LAST_LINE.fullmatch(result.out.splitlines()[-1])
    assert rows(whole) == rows(cut) and [row["step"] for row in rows(cut)] == [3, 6]
    ours, theirs = learned(whole), learned(cut)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sample(whole, "--edit=the cat sat").status == 0


@pytest.mark.parametrize("settings", [
    ("--source=masks", "--num_masks=3", "--time_features=0", "--per_token=True"),
    ("--source=damage", "--schedule=cube", "--optimizer=adamw"),
    ("--source=gap", "--init_from=LLADA", "--seq_len=48", "--time_features=0"),
])
def test_every_source_and_start(settings, small, published, text, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = [one.replace("LLADA", str(published("llada"))) for one in settings]
    result = succeed(run_here(*small("train_edits.py", tmp_path, "--max_steps=2", *settings)))
    last = result.out.splitlines()[-1]
    assert LAST_LINE.fullmatch(last)
    if "--source=masks" in settings:        # eval.py says the same of what is written out of masks
        told = succeed(run_here("eval.py", f"--checkpoint={tmp_path}", "--max_tokens=256",
                                f"--dataset={text}", "--device=cpu", "--dtype=float32"))
        assert told.out.splitlines()[-1] == last
    model = Transformer.from_pretrained(tmp_path)
    assert model.config.edits and model.config.edit_masks == 3 * ("--source=masks" in settings)
    assert model.config.delete_token_id is None
    if model.config.keeps_head:
        before = Transformer.from_pretrained(published("llada"))
        assert torch.equal(model.head.weight, before.head.weight)
        assert not torch.equal(model.insert_head.weight, before.head.weight)


@pytest.mark.parametrize("settings", [
    ("--editing=replace", "--source=mixed"),
    ("--editing=tokens", "--source=masks", "--num_masks=3"),
    ("--editing=tokens", "--init_from=LLADA", "--seq_len=48", "--source=gap"),
])
def test_every_start_of_edits_by_tokens(settings, small, published, text, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = [one.replace("LLADA", str(published("llada"))) for one in settings]
    result = succeed(run_here(*small("train_edits.py", tmp_path, "--max_steps=2", *settings)))
    last = result.out.splitlines()[-1]
    assert LAST_LINE.fullmatch(last)
    told = succeed(run_here("eval.py", f"--checkpoint={tmp_path}", "--max_tokens=256",
                            f"--dataset={text}", "--device=cpu", "--dtype=float32"))
    assert told.out.splitlines()[-1] == last, "eval.py measures the same blocks"
    config = Transformer.from_pretrained(tmp_path).config
    assert not config.edits and config.edit_threshold == 0.5
    assert config.edit_masks == (47 if "--seq_len=48" in settings else 15)
    assert (config.delete_token_id is None) == ("--editing=replace" in settings)
    assert sample(tmp_path, "--edit=the cat sat").status == 0


@pytest.mark.parametrize("settings", [
    ("--init_from=tiny",), ("--init_from=tiny:modernbert", "--editing=tokens")])
def test_a_tiny_model_learns_to_edit(settings, small, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = succeed(run_here(*small("train_edits.py", tmp_path, "--max_steps=1", *settings)))
    assert LAST_LINE.fullmatch(result.out.splitlines()[-1])
    assert sample(tmp_path, "--edit=the cat sat").status == 0


@pytest.mark.parametrize("orders", [True, False])
def test_sample_corrects(orders, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    tiny_corrector(vocab_size=260, mask_token_id=257, eos_token_id=256, max_len=32,
                   orders=orders).save_pretrained(tmp_path)
    Tokenizer.bytes().save_pretrained(tmp_path)
    page = tmp_path / "page.html"
    result = sample(tmp_path, "--edit=a text", f"--html={page}", "--show", "--edit_threshold=0.01")
    assert re.search(r"\d+ inserted, \d+ substituted, \d+ deleted; \d+ tokens in", result.out)
    trace = json.loads(re.search(r"const TRACE = (.*);\n", page.read_text())[1])
    assert trace["messages"][0]["edits"] is True and len(trace["messages"]) > 1
    assert sample(tmp_path, "--edit=a text", "--edit_threshold=1").out.startswith("a text\n\n0 ins")
    assert sample(tmp_path, "--prompt=Ab").out.startswith("Ab")
    filled = sample(tmp_path, "--infill=one [MASK:3] two", "--num_samples=2")
    assert filled.status == 0 and re.search(r"one.* two", filled.out, re.DOTALL)
    if not orders:
        return
    for arguments, words in (
            ("--schedule=cubic", "schedule is for models that fill masks"),
            ("--cache=prefix", "takes steps, threshold, edit_threshold, temperature and seed"),
            ("--max_new_tokens=99", "1 tokens of prompt and 99 new ones exceed the block of 32"),
            ("--threshold=2", "threshold must be between 0 and 1, got 2.0"),
            ("--infill=a [MASK:0]", "[MASK:0] asks for 0 masks: between 1 and the context of 32"),
            ("--infill=a [MASK:99999999999]", "asks for 99999999999 masks"),
            ("--edit=a [MASK] b", "the text to edit contains [MASK] at character 2: use --infill"),
            ("--chat", "neither --chat nor --serve")):
        result = run_here("sample.py", f"--checkpoint={tmp_path}", "--device=cpu", arguments)
        assert result.status == 2 and result.out == "" and words in result.err, result


def test_training_from_nothing_learns_the_rates():
    """Texts are [0, 1], [0, 1, 2] and [0, 1, 2, 3]: what is there tells what is still to come, so
    that the bound of a perfect model is the entropy, log 3 a text; and of what is written about a
    third has each length (a step inserts one token after another at most: long ones are fewer)."""
    config = Config(vocab_size=4, dim=16, n_layers=1, n_heads=2, edits=True, max_len=16,
                    edit_schedule="linear", time_features=8)
    model = Transformer(config).init_weights(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    pairs = stack([align([0], list(range(n + 1))) for n in (1, 2, 3)] * 16)
    for step in range(160):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / 160)
        edit_loss(model, *pairs, max_weight=20.0, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    value, error = edit_nelbo(model, *pairs, num_samples=40)
    assert 3 * value == pytest.approx(math.log(3), abs=12 * error + 0.2)
    written = rewrite(model, [[0]] * 200, 32, [1] * 200, temperature=1.0, seed=0)
    shares = [sum(row == list(range(n + 1)) for row in written) / 200 for n in (1, 2, 3)]
    assert all(0.1 < share < 0.5 for share in shares) and sum(shares) > 0.8, shares


def test_what_is_measured_is_measured_once(tmp_path, capsys):
    calls = []

    def point(name, value):
        def measure():
            calls.append(name)
            return {"way": name, "edits": 1, **experiment.shares(consistent=[value, True],
                                                                 restored=[value, value])}
        return measure

    path = tmp_path / "points.jsonl"
    points = {"a": point("a", True), "b": point("b", False)}
    assert experiment.measured(path, points, minutes=0) == [] and calls == []
    assert "2 points are left" in capsys.readouterr().out
    rows = experiment.measured(path, points, minutes=1)
    assert [row["consistent"] for row in rows] == [1.0, 0.5] and calls == ["a", "b"]
    assert experiment.measured(path, points, minutes=1) == rows and calls == ["a", "b"]
    assert "consistent 0.500 +- 0.354, restored 0.000 +- 0.000" in capsys.readouterr().out
    experiment.draw(tmp_path, "points.png", rows, "edits", ("consistent", "restored"), "x", 2)
    assert (tmp_path / "points.png").stat().st_size > 5000


@pytest.mark.parametrize("arguments, words", [
    (["repair"], "repair: missing a required argument: 'out'"),
    (["repair", "nowhere"], "nowhere holds no model: python experiments/edits.py train nowhere"),
    (["repair", "nowhere", "--number=3"], "repair has no argument '--number=3'"),
    (["train", "nowhere", "flow"], "no way of editing called 'flow'"),
])
def test_mistakes_with_the_measurements(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        experiment.run(*arguments)


def test_the_measurements_run():
    """At a small size; what they find is docs/edits.md's."""
    assert experiment.distance([1, 2, 3, 4], [1, 2, 3, 4]) == 0
    assert experiment.distance([1, 1], [2, 2]) == 1
    steps = experiment.steps_of_training(B=2, T=8, V=20, D=8, layers=1)
    assert set(steps) == {"masks", "tokens from mixed", *(
        f"edits from {name}" for name in ("nothing", "damage", "gap", "mixed"))}
    for step in steps.values():
        step()
    sampler = Sampler(bytes_editor(max_len=1024), Tokenizer.bytes())
    texts, rows_of_tokens = experiment.damaged_tales(sampler, 2, 3)
    for text, row in zip(texts, rows_of_tokens):
        assert 1 <= cost(*align(list(text.encode()), row[1:])) <= 3
    canvases = [with_masks(sampler, row[:40], 2) for row in rows_of_tokens]
    after, passes = experiment.edited(sampler, canvases, 2)
    assert len(after) == 2 and passes in (1, 2)
