"""What an answer is worth: functions of its text, by name.

    reward(example, text) -> a number; example: the Example (data/tasks.py) that was asked

`xmlcount` to `boxed` are those that d1 (arXiv 2504.12216) and dLLM train with, number for number.
Several are added with +, with a factor before a *: "correctness+0.5*soft_format". A reader's own
function is FILE.py:function, with the same two arguments; the file is run, so it is his to trust.
No reward runs what a model wrote: arithmetic is parsed, and only numbers and signs are understood.
"""
import ast
import contextlib
import difflib
import importlib.util
import math
import operator
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.sudoku import SHAPES

# --------------------------------------------------------------------------------------------------
# Reading an answer


def last_answer(text):
    """What stands between the last <answer> and </answer>, or None."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else None


def final_answer(text):
    """What an answer says in the end: after its last <answer>, tag or not, up to </answer>; all of
    a text without tags."""
    after = text.rpartition("<answer>")[2]
    return after.partition("</answer>")[0].strip()


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def last_number(text):
    """The last number of a text as a float, or None: commas and a sign of money are left out."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


# --------------------------------------------------------------------------------------------------
# For any task with a reference answer


def exact(example, text):
    """1 if the answer is the reference's, white space around it aside"""
    return float(final_answer(text) == example.answer.strip())


def number(example, text):
    """1 if the last number of the answer is that of the reference"""
    found, wanted = last_number(final_answer(text)), last_number(example.answer)
    return float(found is not None and found == wanted)


def contains(example, text):
    """1 if the reference answer stands anywhere in the text"""
    return float(example.answer.strip() in text)


# --------------------------------------------------------------------------------------------------
# Form: <reasoning>, newline, ..., </reasoning>, <answer>, ..., </answer>


def correctness(example, text):
    """2 if what stands in the last <answer> is the reference's, letter for letter"""
    return 2.0 if final_answer(text) == example.answer else 0.0


def whole_number(example, text):
    """0.5 if what stands in the last <answer> is digits alone"""
    return 0.5 if final_answer(text).isdigit() else 0.0


def strict_format(example, text):
    """0.5 for both tags on lines of their own and nothing before or after"""
    form = r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    return 0.5 if re.match(form, text, re.DOTALL) else 0.0


def soft_format(example, text):
    """0.5 if the text begins with a <reasoning> that an <answer> follows"""
    form = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    return 0.5 if re.match(form, text, re.DOTALL) else 0.0


def xmlcount(example, text):
    """0.125 for each tag in its place, 0.001 off for each character after the end"""
    score = 0.0
    for tag in ("<reasoning>\n", "\n</reasoning>\n"):
        if text.count(tag) == 1:
            score += 0.125
    # What follows the end is taken off twice: after a line's end, and without one.
    if text.count("\n<answer>\n") == 1:
        score += 0.125
        score -= 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        score += 0.125
        score -= 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return score


# --------------------------------------------------------------------------------------------------
# Puzzles


def sudoku(example, text):
    """share of the empty cells that are right, read from the digits in the last <answer>"""
    puzzle, solution = example.facts["puzzle"], example.facts["solution"]
    empty = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    digits = re.sub(r"\D", "", last_answer(text) or "")
    right = sum(digits[cell:cell + 1] == solution[cell] for cell in empty)
    return right / len(empty) if empty and digits else 0.0


def units(example, text):
    """of a grid (data/sudoku.py), the share of its rows, columns and boxes that hold each digit
    once; 0 where a given digit was changed

    Unlike the share of cells that are as in the grid that a puzzle was made from, it favours none
    of the solutions of a puzzle that has several.
    """
    puzzle = example.facts["puzzle"]
    if not (text.isascii() and text.isdecimal()):
        return 0.0
    grid = [int(digit) for digit in text]
    kept = all(given in (0, digit) for given, digit in zip(puzzle, grid))
    if len(grid) != len(puzzle) or not kept:
        return 0.0
    shape = next(shape for shape in SHAPES.values() if shape.cells == len(grid))
    right = [len({grid[cell] for cell in cells}) == shape.size for cells in shape.units.values()]
    return sum(right) / len(right)


def countdown(example, text):
    """1 if the sum in the last <answer> uses each number once and is the target; 0.1 for a try"""
    expression = last_answer(text)
    if expression is None:
        return 0.0
    used = [int(digits) for digits in re.findall(r"\d+", expression[:LONGEST])]
    value = None
    if sorted(used) == sorted(example.facts["numbers"]):
        value = arithmetic(expression)
    is_right = value is not None and abs(value - example.facts["target"]) < 1e-5
    return 1.0 if is_right else 0.1


LONGEST = 500       # characters of an expression
LARGEST = 4096      # bits of a number on the way to its value
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
         ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
         ast.UAdd: operator.pos, ast.USub: operator.neg}


def arithmetic(expression):
    """The value of numbers, + - * / // ** and brackets, as Python reads them; None for anything
    else, for a division by 0 and for numbers beyond all reason. Nothing is run: the text becomes a
    tree, and of a tree only these signs are worked out."""
    if len(expression) > LONGEST or not re.fullmatch(r"[\d+\-*/().\s]+", expression):
        return None
    try:
        return value_of(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def value_of(node):
    """The value of a node of the tree. Raises ValueError for a sign that is not in SIGNS and for
    numbers that are too large."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](value_of(node.operand))
    if not isinstance(node, ast.BinOp) or type(node.op) not in SIGNS:
        raise ValueError("this is no arithmetic")
    left, right = value_of(node.left), value_of(node.right)
    if isinstance(node.op, ast.Pow) and abs(right) * (bits(left) - 1) > LARGEST:
        raise ValueError("too large a power")
    value = SIGNS[type(node.op)](left, right)
    if isinstance(value, complex) or bits(value) > LARGEST:
        raise ValueError("no number of reasonable size")
    return value


def bits(value):
    """How many bits the whole part of a number takes."""
    if isinstance(value, int):
        return value.bit_length()
    return math.frexp(value)[1] if math.isfinite(value) else math.inf


# --------------------------------------------------------------------------------------------------
# Mathematics: \boxed{...}, compared as the MATH data set compares (Hendrycks et al., 2103.03874)


def math_correctness(example, text):
    r"""2 if what stands in the last \boxed{} is what stands in that of the reference"""
    found, wanted = boxed_part(text), boxed_part(example.answer)
    found = text if found is None else found
    wanted = example.answer if wanted is None else wanted
    return 2.0 if plain_formula(found) == plain_formula(wanted) else 0.0


def boxed(example, text):
    r"""1 for \boxed in the first <answer>; 0.75 without it, 0.5 without a tag, 0.25 without both"""
    score = 0.5
    if "<answer>" in text:
        text = text.split("<answer>")[1].partition("</answer>")[0]
        score = 1.0
    return score if r"\boxed" in text else score - 0.25


def boxed_part(text):
    r"""The inside of the last \boxed{...}, whose brackets match, or what follows "\boxed "; None if
    there is none."""
    if r"\boxed " in text:
        return text.split(r"\boxed ")[-1].split("$")[0]
    begin, depth = text.rfind(r"\boxed{"), 0
    if begin < 0 or begin != text.rfind(r"\boxed"):
        return None
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and depth == 0:
            return text[begin + len(r"\boxed{"):i]
    return None


def plain_formula(text):
    """A formula in one of its spellings: no spaces, units, degrees and percent; fractions and roots
    with brackets; 1/2 and 0.5 as a fraction; no "x =" in front."""
    for old, new in SPELLINGS:
        text = text.replace(old, new)
    text = text.partition(r"\text{ ")[0].replace(r"\%", "")                # units and percent
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{]){", r"\\frac{\1}{", text)
    if text == "0.5":
        text = r"\frac{1}{2}"
    whole = re.fullmatch(r"(-?[1-9]\d*|0)/(-?[1-9]\d*|0)", text)
    return rf"\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text


SPELLINGS = [("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
             (r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")]

# --------------------------------------------------------------------------------------------------
# By name


@dataclass(frozen=True)
class Named:
    """A reward, the value of an answer that is right, and what it reads of an Example's facts."""
    function: Callable
    full: float
    reads: tuple = ()


REWARDS = {
    "exact": Named(exact, 1.0),
    "number": Named(number, 1.0),
    "contains": Named(contains, 1.0),
    "correctness": Named(correctness, 2.0),
    "int": Named(whole_number, 0.5),
    "strict_format": Named(strict_format, 0.5),
    "soft_format": Named(soft_format, 0.5),
    "xmlcount": Named(xmlcount, 0.5),
    "sudoku": Named(sudoku, 1.0, ("puzzle", "solution")),
    "units": Named(units, 1.0, ("puzzle",)),
    "countdown": Named(countdown, 1.0, ("numbers", "target")),
    "math": Named(math_correctness, 2.0),
    "boxed": Named(boxed, 1.0),
}


@dataclass
class Score:
    """What an answer is worth, and whether it solves its task; `failure`: what went wrong with the
    reward, which is 0 then."""
    value: float
    solved: bool
    failure: str = ""


TOO_LONG = "took longer than"       # how `run_reward` begins to say so


class OutOfTime(BaseException):
    """A reward took too long; no `except Exception` of a reader's function stops it."""


class Judge:
    """judge(example, text) -> Score, by the rewards that `names` adds up.

    names    "" or "task": what the task itself says; else as in the docstring above. An answer is
             solved if the first of them has its full value (of a reader's function, 1).
    own      Named, the task's own reward; None: it has none.
    seconds  that one answer may take.

    A reward that raises, returns no number or takes too long counts 0, and its Score says why. When
    it took too long for PATIENCE answers in a row it is not asked again before `forgive`. Raises
    ValueError for a name that nobody knows and FileNotFoundError for a file that is not there.
    """

    PATIENCE = 8

    def __init__(self, names="", own=None, seconds=5.0):
        self.parts, self.seconds = [], seconds
        self.late, self.last_failure = 0, ""            # too long so often in a row
        for part in split_names(names or "task"):
            factor, _, name = part.strip().rpartition("*")
            self.parts.append((read_factor(factor, part), name, find_reward(name.strip(), own)))

    def __call__(self, example, text):
        if self.late >= self.PATIENCE:
            return Score(0.0, False, self.last_failure)
        values = []
        for _, name, reward in self.parts:
            value, problem = run_reward(reward.function, example, text, self.seconds)
            if problem:
                self.late = self.late + 1 if problem.startswith(TOO_LONG) else 0
                self.last_failure = f"the reward {name or 'task'} {problem} for {shortened(text)}"
                return Score(0.0, False, self.last_failure)
            values.append(value)
        self.late = 0
        total = sum(factor * value for (factor, _, _), value in zip(self.parts, values))
        return Score(total, values[0] >= self.parts[0][2].full - 1e-6)

    def forgive(self):
        """A new step begins: ask again."""
        self.late = 0

    def check(self, example):
        """ValueError where a reward reads what the task does not say of its questions."""
        for _, name, reward in self.parts:
            missing = [fact for fact in reward.reads if fact not in example.facts]
            if missing:
                raise ValueError(f"the reward {name} reads {' and '.join(reward.reads)} of a "
                                 f"question, and this task has no {missing[0]}")


def split_names(names):
    """The parts of a sum of rewards; the name of a file that is there may hold a + itself."""
    file = names.rpartition(":")[0]
    if file.endswith(".py") and Path(file).expanduser().is_file():
        return [names]
    return names.split("+")


def run_reward(function, example, text, seconds):
    """(value, "") of a reward, or (0, what went wrong with it)."""
    try:
        with time_limit(seconds):
            value = function(example, text)
    except OutOfTime:
        return 0.0, f"{TOO_LONG} {seconds:g} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  a reader's function may raise anything
        return 0.0, f"raised {type(error).__name__}: {spelled(error, str)}"
    try:
        value = float(value)
    except OverflowError:                               # a whole number of 400 digits
        return 0.0, "returned a number that is too large,"
    except Exception:  # noqa: BLE001  and so may what it returns
        return 0.0, f"returned {spelled(value, repr)[:60]}, which is no number,"
    if not math.isfinite(value):
        return 0.0, f"returned {value},"
    return value, ""


def spelled(thing, how):
    """how(thing), str or repr; where a class of the reader's own cannot even do that, its name."""
    try:
        return how(thing)
    except Exception:  # noqa: BLE001
        return f"a {type(thing).__name__}"


def shortened(text):
    """A text for an error's line."""
    return f"the answer {text if len(text) <= 60 else text[:60] + '...'!r}"


@contextlib.contextmanager
def time_limit(seconds):
    """Raises OutOfTime in what runs under it for longer. By an alarm of the system: on Windows, and
    in a thread, there is no limit.

    A bare `except:` catches OutOfTime as well, and a loop around it would go on for ever. So the
    next line of the functions that were at work, which is in that `except:`, raises it again.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "SIGALRM") or not in_main_thread:
        yield
        return

    def stop(_, event, __):
        if event == "line":
            raise OutOfTime
        return stop

    def ring(_, frame):
        sys.settrace(lambda *_: None)                   # what is called from now on is left alone
        while frame is not None and frame.f_code is not run_reward.__code__:
            frame.f_trace = stop
            frame = frame.f_back
        raise OutOfTime

    before, tracer = signal.signal(signal.SIGALRM, ring), sys.gettrace()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.settrace(tracer)


def read_factor(text, part):
    """The factor before a *; 1 if there is none."""
    if not text:
        return 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise ValueError(f"reward has {part!r}: before a * stands a number, got {text!r}")


def find_reward(name, own=None):
    """The Named reward of this name. Raises ValueError, FileNotFoundError."""
    if name == "task" and own is not None:
        return own
    if name == "task":
        raise ValueError(f"the task has no reward of its own: take --reward={'|'.join(REWARDS)} or "
                         "FILE.py:function")
    if name in REWARDS:
        return REWARDS[name]
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return Named(own_function(Path(file).expanduser(), function), 1.0)
    if name.endswith(".py"):
        raise ValueError(f"reward says the file {name} and no function of it: take {name}:NAME")
    near = difflib.get_close_matches(name, ["task", *REWARDS], 1, 0)[0]
    raise ValueError(f"no reward called {name!r}; did you mean {near!r}? (there are task, "
                     f"{', '.join(REWARDS)}, and FILE.py:function)")


def own_function(path, name):
    """A reader's function(prompt, answer, reference) as a reward."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, which --reward names")
    spec = importlib.util.spec_from_file_location(f"reward {path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module     # where a dataclass looks for what its annotations mean
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  it may raise anything
        raise ValueError(f"{path} cannot be run ({type(error).__name__}: {error})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function called {name!r}")

    def reward(example, text):
        return function(example.prompt, text, example.answer)

    return reward
