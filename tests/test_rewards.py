"""Rewards: equal to the reference's, arithmetic that is parsed and never run, and a reader's own
function that goes wrong."""
import json
import math
import random
import time
from types import SimpleNamespace

import pytest

from data.rewards import REWARDS, Judge, arithmetic, find_reward, plain_formula


def example(answer="", **facts):
    return SimpleNamespace(prompt="", answer=answer, facts=facts)


def value(name, text, **facts):
    answer = facts.pop("answer", "")
    return REWARDS[name].function(example(answer, **facts), text)


@pytest.fixture(scope="module")
def recorded():
    from conftest import ROOT

    file = ROOT.parent / "shared" / "fixtures" / "rewards.json"
    if not file.exists():
        pytest.skip(f"{file} is not here: it stands beside the project, not in it")
    return json.loads(file.read_text())


def test_rewards_are_the_references(recorded):
    for case in recorded["sudoku"]:
        facts = {"puzzle": case["puzzle"], "solution": case["solution"]}
        assert value("sudoku", case["completion"], **facts) == case["reward"], case
    for case in recorded["countdown"]:
        facts = {"numbers": case["numbers"], "target": case["target"]}
        assert value("countdown", case["completion"], **facts) == case["reward"], case
    for case in recorded["format"]:
        for name in ("xmlcount", "soft_format", "strict_format", "int", "correctness"):
            found = value(name, case["completion"], answer=case["answer"])
            assert found == case[name], (name, case)
    for case in recorded["math"]:
        found = value("math", case["completion"], answer=case["answer"])
        assert found == case["correctness_math"], case
        found = value("boxed", case["completion"])
        assert found == case["boxed_and_answer_tags"], case


def test_xmlcount_from_its_definition():
    """Of random heaps of tags, computed the long way."""
    rng = random.Random(0)
    pieces = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "\n", "42", "so"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
        expected = 0.0
        for tag in ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>"):
            expected += 0.125 * (text.count(tag) == 1)
        if text.count("\n<answer>\n") == 1:
            expected -= 0.001 * len(text[text.rfind("\n</answer>\n") + 11:]
                                    if "\n</answer>\n" in text else text)
        if text.count("\n</answer>") == 1:
            expected -= 0.001 * (len(text[text.rfind("\n</answer>") + 10:]) - 1)
        assert value("xmlcount", text) == pytest.approx(expected, abs=1e-12)


# --------------------------------------------------------------------------------------------------
# Arithmetic


def random_expression(rng, depth=0):
    if depth > 3 or rng.random() < 0.3:
        return rng.choice(["7", "2", "12", "0", "1.5", ".5", "3."])
    if rng.random() < 0.2:
        return f"{rng.choice('+-')}{random_expression(rng, depth + 1)}"
    inner = (f"{random_expression(rng, depth + 1)}{rng.choice(['+', '-', ' * ', '/', '//', '-'])}"
             f"{random_expression(rng, depth + 1)}")
    return f"({inner})" if rng.random() < 0.5 else inner


def test_arithmetic_is_pythons():
    """Of random expressions without names, which is what eval was used for."""
    rng, seen = random.Random(0), 0
    for _ in range(400):
        text = random_expression(rng)
        try:
            expected = eval(text, {"__builtins__": {}})
        except (ZeroDivisionError, OverflowError):
            expected = None
        found = arithmetic(text)
        assert found == expected and type(found) is type(expected), text
        seen += expected is not None
    assert seen > 200


@pytest.mark.parametrize("text", [
    "", "()", "1 2", "08", "1.2.3", "(1", "1)", "3x8", "__import__('os')", "a", "[1]", "1,2",
    "2(3)", "1+", "*2", "1=1", "1<2", "1;2", "~1", "1&2", "1@2", "1 if 1 else 2", "1e5", "0x10",
    "1_0", "'1'", "lambda:1", "(3)(4)", "1\n2", "٣", "3\u00d78", "9**9**9", "9**9999999",
    "10**400*1.0", "1/0", "0**-1", "1%2", "-" * 600 + "1", "(" * 300 + "1" + ")" * 300,
    "9" * 480 + "*" + "1" * 5 + "**999", "1" * 501, "(-8)**0.5", "((((((9**99)**99)**99)**99)))",
])
def test_what_is_no_arithmetic_is_none_at_once(text):
    begin = time.perf_counter()
    assert arithmetic(text) is None
    assert time.perf_counter() - begin < 1


def test_large_but_reasonable_numbers_count():
    assert arithmetic("2**100") == 2**100 and arithmetic("-2**2") == -4
    assert arithmetic("2**3**2") == 512 and arithmetic("7//2") == 3 and arithmetic("2**-1") == 0.5
    assert arithmetic("1**99999") == 1
    assert arithmetic("(3+\n8)") == 11          # inside brackets a line may end


def test_formulas_have_many_spellings():
    same = [(r"\frac12", "1/2"), ("0.5", r"\dfrac{1}{2}"), (r"\sqrt3", r"\sqrt{3}"),
            (r"90^\circ", "90"), (r"50\%", "50"), ("x=3", "3"), (r"\left(1\right)", "(1)"),
            (r"5\text{ cm}", "5"), (r"\$5", "5"), ("{.5}", "{0.5}"),
            (r"\frac1{72}", r"\frac{1}{72}")]
    for a, b in same:
        assert plain_formula(a) == plain_formula(b), (a, b)
    for a, b in [("1/3", "1/2"), ("abc=3", "3"), ("2", "-2"), ("01/2", "1/2")]:
        assert plain_formula(a) != plain_formula(b), (a, b)


# --------------------------------------------------------------------------------------------------
# By name


def test_numbers_and_words():
    assert value("number", "so it is 1,234.50.", answer="1234.5") == 1
    assert value("number", "<answer>7</answer> or 8?", answer="7") == 1
    assert value("number", "no idea", answer="7") == 0
    assert value("exact", " 7 \n", answer="7") == 1 and value("exact", "7.", answer="7") == 0
    assert value("contains", "It is seven.", answer="seven") == 1


def test_rewards_add_up_and_the_first_decides():
    judge = Judge("correctness+0.5*soft_format")
    form = "<reasoning>x</reasoning><answer>{}</answer>"
    right = judge(example("7"), form.format("7"))
    assert (right.value, right.solved) == (2.25, True)
    wrong = judge(example("7"), form.format("8"))
    assert (wrong.value, wrong.solved) == (0.25, False)


@pytest.mark.parametrize("name, words", [
    ("corectness", "no reward called 'corectness'; did you mean 'correctness'?"),
    ("x*int", "before a * stands a number, got 'x'"),
    ("task", "the task has no reward of its own"),
    ("nowhere.py:f", "there is no nowhere.py"),
])
def test_a_reward_that_nobody_knows(name, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words.replace("*", r"\*").replace(
            "?", r"\?")):
        Judge(name)


BROKEN = """
import time

class Odd(Exception):
    def __float__(self): raise RuntimeError("no number")
    def __repr__(self): raise RuntimeError("no text")
    __str__ = __repr__

def raises(prompt, answer, reference): return 1 / 0
def words(prompt, answer, reference): return "good"
def nothing(prompt, answer, reference): pass
def infinite(prompt, answer, reference): return float("inf")
def large(prompt, answer, reference): return 10**5000
def leaves(prompt, answer, reference): raise SystemExit(3)
def endless(prompt, answer, reference):
    while True:
        try:
            reference += "x"
        except Exception:
            pass
def stubborn(prompt, answer, reference):
    begin = time.time()
    while time.time() < begin + 2:
        try:
            time.sleep(0.01)
        except:
            pass
    return 1.0
def odd(prompt, answer, reference): return Odd()
def raises_odd(prompt, answer, reference): raise Odd
def gives_up(prompt, answer, reference): raise GeneratorExit("tired")
def picky(prompt, answer, reference): return {"four": 1.0}[answer]
def length(prompt, answer, reference): return len(answer) / 4
"""


def test_a_readers_own_function_and_what_can_go_wrong_with_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    judge = Judge(f"{file}:length")
    assert judge(example(), "four").solved and judge(example(), "two").value == 0.75
    for name, words in (("raises", "raised ZeroDivisionError"), ("words", "returned 'good', which"),
                        ("nothing", "returned None, which is no number"),
                        ("infinite", "returned inf,"), ("leaves", "raised SystemExit: 3"),
                        ("large", "returned a number that is too large,"),
                        ("odd", "returned a Odd, which is no number"),
                        ("raises_odd", "raised Odd: a Odd"),
                        ("gives_up", "raised GeneratorExit: tired"),
                        ("stubborn", "took longer than 0.3 s")):
        found = Judge(f"{file}:{name}", seconds=0.3)(example(), "an answer")
        assert found.value == 0 and not found.solved
        assert words in found.failure and "the answer 'an answer'" in found.failure
    judge = Judge(f"{file}:picky")      # all answers to one question may be such
    assert all("raised KeyError" in judge(example(), "two").failure for _ in range(20))
    assert judge(example(), "four").value == 1
    judge, begin = Judge(f"{file}:endless", seconds=0.1), time.perf_counter()
    failures = [judge(example(), "an answer").failure for _ in range(50)]
    assert time.perf_counter() - begin < 5              # after PATIENCE answers it is not asked
    assert all("took longer than 0.1 s" in failure for failure in failures)
    folder = tmp_path / "c++"                           # a + is no sum in the name of a file
    folder.mkdir()
    (folder / "mine.py").write_text(BROKEN)
    assert Judge(f"{folder}/mine.py:length")(example(), "four").value == 1
    with pytest.raises(ValueError, match="has no function called 'other'"):
        find_reward(f"{file}:other")
    file.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                    "@dataclass\nclass Worth:\n    value: float = 1.0\n"
                    "def worth(prompt, answer, reference): return Worth().value\n")
    assert Judge(f"{file}:worth")(example(), "x").value == 1
    file.write_text("import nothing_at_all")
    with pytest.raises(ValueError, match="cannot be run"):
        find_reward(f"{file}:length")
    assert math.isfinite(judge(example(), "x").value)
