"""Sudoku: the solver against known counts, symmetries and what is held out, whole documents as
sequences, puzzles in and grids out; mistakes."""

import io
import json
import random
import re

import numpy as np
import pytest
import torch
from scripts import run

from data import prepare as preparing
from data import sudoku
from data.loader import TokenDataset
from data.prepare import prepare
from data.sudoku import (
    SHAPES,
    class_key,
    conflict,
    count_solutions,
    draw,
    empty_cells,
    images,
    is_solved,
    make_puzzle,
    parse_puzzle,
    solutions,
    split_bases,
    verdict,
)
from data.tokenizer import Tokenizer
from experiments import sudoku as experiment
from model import Config, Transformer
from sampling.sampler import Sampler
from sampling.server import Server
from sampling.terminal import Terminal
from sampling.trace import Trace

# Made by make_puzzle: 24 givens, one solution.
PUZZLE = """
. 7 .  . . .  4 2 3
6 . .  4 . .  . . 5
. . .  . . .  . . .

. . .  8 2 .  . . .
2 4 .  . . 1  . . .
. . 1  5 . .  . 7 6

. . .  . . .  . 5 8
. 8 6  1 7 .  . . .
. . .  . 5 .  9 . .
"""
FOUR = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]


@pytest.fixture(scope="module")
def fours():
    """All grids of 4 x 4."""
    return list(solutions([0] * 16))


def random_grid(name, seed=0):
    return next(solutions([0] * SHAPES[name].cells, random.Random(seed)))


# ---- the solver ----------------------------------------------------------------------------------
def test_known_numbers_of_solutions(fours):
    assert len(fours) == len(set(map(tuple, fours))) == 288
    assert all(is_solved(grid, [0] * 16) for grid in fours)
    puzzle = parse_puzzle(PUZZLE, SHAPES["sudoku"])
    assert count_solutions(puzzle, limit=1000) == 1
    solution = next(solutions(puzzle))
    assert is_solved(solution, puzzle)
    # There are 28,200,960 grids of 6 x 6, equally many for each of the 6! first rows.
    assert count_solutions([*range(1, 7), *[0] * 30], limit=10**6) == 28_200_960 // 720


def test_a_rectangle_of_two_digits_has_two_solutions():
    """1 and 2 at the corners of a rectangle in two boxes may trade places."""
    puzzle = list(FOUR)
    for cell in (0, 1, 8, 9):           # 1 2 above 2 1, in one stack
        puzzle[cell] = 0
    assert count_solutions(puzzle, limit=9) == 2
    assert {grid[0] for grid in solutions(puzzle)} == {1, 2}


def test_puzzles_without_a_solution():
    assert count_solutions([1, 1] + [0] * 14) == 0
    no_rule_is_broken = [1, 2, 3, 0] + [0, 0, 0, 4] + [0] * 8       # nothing fits into the corner
    assert conflict(no_rule_is_broken) is None and count_solutions(no_rule_is_broken) == 0
    with pytest.raises(ValueError, match="no grid has 5 cells"):
        count_solutions([0] * 5)


def test_puzzles_with_one_solution():
    for name, givens in (("sudoku", 30), ("sudoku6", 14), ("sudoku4", 6)):
        grid = random_grid(name)
        puzzle = make_puzzle(grid, givens, random.Random(1))
        assert len(grid) - puzzle.count(0) == givens
        assert list(solutions(puzzle)) == [grid]
    fewest = make_puzzle(FOUR, 0, random.Random(2))
    for cell in np.flatnonzero(fewest):
        fewer = list(fewest)
        fewer[cell] = 0
        assert count_solutions(fewer) == 2
    assert empty_cells(FOUR, 5, random.Random(0)).count(0) == 5


# ---- symmetries and splits -----------------------------------------------------------------------
@pytest.mark.parametrize("name", list(SHAPES))
def test_images_are_grids_of_the_same_class(name):
    shape, base = SHAPES[name], random_grid(name)
    found = images(np.array([base]), shape, 60, np.random.default_rng(0)).tolist()
    assert len(set(map(tuple, found))) > 30
    assert all(is_solved(grid, [0] * shape.cells) for grid in found)
    assert {class_key(grid, shape) for grid in found} == {class_key(base, shape)}


def test_all_images_of_a_small_grid_are_reached(fours):
    """4 x 4 has two classes, of 96 and 192 grids: as many as keys tell apart, and the images of one
    grid are its class."""
    shape, classes = SHAPES["sudoku4"], {}
    for grid in fours:
        classes.setdefault(class_key(grid, shape), set()).add(tuple(grid))
    assert sorted(map(len, classes.values())) == [96, 192]
    found = images(np.array([FOUR]), shape, 5000, np.random.default_rng(0)).tolist()
    assert set(map(tuple, found)) == classes[class_key(FOUR, shape)]


def test_whole_classes_are_held_out(monkeypatch):
    monkeypatch.setattr(sudoku, "NUM_BASES", 60)
    monkeypatch.setattr(sudoku, "TRAIN_IMAGES", 4)
    monkeypatch.setattr(sudoku, "VAL_IMAGES", 3)
    shape, keys = SHAPES["sudoku6"], {"train": set(), "val": set()}
    pieces = list(sudoku.sudoku6())
    for (split, text), (same, end) in zip(pieces[::2], pieces[1::2]):
        grid = [int(digit) for digit in text]
        assert end is None and split == same and is_solved(grid, [0] * 36)
        keys[split].add(class_key(grid, shape))
    assert keys["train"] and keys["val"] and not keys["train"] & keys["val"]
    assert pieces == list(sudoku.sudoku6()), "the same grids every time"
    bases = [random_grid("sudoku6", seed) for seed in range(60)]
    train, val = split_bases(bases, shape)
    assert len(train) + len(val) == 60 and 6 <= len(val) < 30


# ---- the data set --------------------------------------------------------------------------------
def test_a_digit_is_a_token(tmp_path):
    tokenizer = Tokenizer.characters("123456")
    assert tokenizer.encode("6153") == [5, 0, 4, 2]
    assert tokenizer.encode("6153", parse_special=True) == [5, 0, 4, 2], "the library's own answer"
    assert tokenizer.decode([5, 0, 4, 2]) == "6153"
    assert (tokenizer.vocab_size, tokenizer.mask_token_id, tokenizer.eos_token_id) == (7, 6, None)
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode("6153") == [5, 0, 4, 2] and again.mask_token_id == 6
    assert sudoku.grid_shape(again) == SHAPES["sudoku6"]
    for text in ("6 1", "7", "<|mask|>"):
        with pytest.raises(ValueError, match="the tokenizer has no '.', only 123456"):
            again.encode(text)
    assert sudoku.grid_shape(Tokenizer.characters("12345.")) is None
    assert sudoku.grid_shape(Tokenizer.bytes()) is None


def test_sequences_are_whole_grids():
    data = TokenDataset(prepare("sudoku4"))
    assert data.document_length == 16 and len(data.train) % 16 == 0
    for split in ("train", "val"):
        rows = [*data.windows(split, 16), *data.batch(split, 20, 16, seed=3, step=5)]
        assert all(is_solved((row + 1).tolist(), [0] * 16) for row in rows)
    both = data.batch("train", 4, 32, seed=3, step=0)              # two grids a sequence
    assert all(is_solved((half + 1).tolist(), [0] * 16) for half in both.view(-1, 16))
    cut = data.batch("train", 50, 15, seed=3, step=0)               # no whole ones: as any text
    assert any(conflict([*(row + 1).tolist(), 0]) for row in cut)
    epoch = torch.cat([data.batch("train", 16, 16, 3, step) for step in range(16)])
    assert len(set(map(tuple, epoch.tolist()))) == 256, "each grid once"
    val = set(map(tuple, data.windows("val", 16).tolist()))
    train = set(map(tuple, data.windows("train", 16).tolist()))
    assert len(val) + len(train) == 288 and not val & train


def test_other_documents_of_one_length(tmp_path, monkeypatch):
    def pieces():
        for i in range(40):
            yield ("val" if i % 10 == 0 else "train"), f"line {i:04}"
            yield ("val" if i % 10 == 0 else "train"), None

    monkeypatch.setitem(preparing.DATASETS, "equal", pieces)
    assert TokenDataset(prepare("equal", "byte", root=tmp_path)).document_length == 9 + 1
    (tmp_path / "text.txt").write_text("A text of two unequal documents.\n" * 20)
    text = prepare(tmp_path / "text.txt", "byte", root=tmp_path)
    assert TokenDataset(text).document_length == 0
    monkeypatch.setattr("data.writer.MAX_SEQUENCE", 9)
    assert TokenDataset(prepare("equal", "byte", root=tmp_path / "b")).document_length == 0


def test_grids_have_a_tokenizer_of_their_own(tmp_path):
    folder = prepare("sudoku4")
    assert prepare("sudoku4", str(folder)) == folder, "as eval.py asks for a checkpoint's"
    assert prepare("sudoku4", Tokenizer.characters("1234")) == folder
    for tokenizer in ("byte", "gpt2", Tokenizer.characters("123456")):
        with pytest.raises(ValueError, match="sudoku4 has a tokenizer of its own"):
            prepare("sudoku4", tokenizer)


# ---- puzzles as texts ----------------------------------------------------------------------------
def test_puzzles_are_read_as_they_are_drawn():
    puzzle = parse_puzzle(PUZZLE, SHAPES["sudoku"])
    assert draw(puzzle) == PUZZLE.strip()
    four = empty_cells(FOUR, 6, random.Random(0))
    assert draw(FOUR) == "1 2  3 4\n3 4  1 2\n\n2 1  4 3\n4 3  2 1"
    written = "".join(map(str, four))
    for text in (draw(four), written, written.replace("0", "_"), written.replace("0", ".")):
        assert parse_puzzle(text, SHAPES["sudoku4"]) == four
    lines = "1 . | 3 4\n. 4 | 1 2\n----+----\n2 1 │ 4 3\n────┼────\n4 3 | 2 ."
    assert parse_puzzle(lines, SHAPES["sudoku4"])[:3] == [1, 0, 3]


MISTAKES = {
    "12": "the puzzle has 2 cells, but this model's grids have 16: 4 rows of 4",
    "5" * 16: "the puzzle has '5' at character 0: givens are the digits 1 to 4",
    "12x4" + "." * 12: "the puzzle has 'x' at character 2",
    "1..1" + "." * 12: r"1 stands twice in row 1 \(row 1, column 1 and row 1, column 4\)",
    "..2." * 2 + "." * 8: r"2 stands twice in column 3 \(row 1, column 3 and row 2, column 3\)",
    "." * 8 + "...3..3.": r"3 stands twice in box 4 \(row 3, column 4 and row 4, column 3\)",
    "1234341221434321": "the puzzle has no empty cell",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_what_is_no_puzzle(text):
    with pytest.raises(ValueError, match=MISTAKES[text]):
        parse_puzzle(text, SHAPES["sudoku4"])


def test_verdicts():
    assert verdict(FOUR) == "solved: every row, column and box has each digit once"
    assert verdict([0, *FOUR[1:]]) == "not solved: 1 cells are empty"
    assert verdict([2, *FOUR[1:]]).startswith("not solved: 2 stands twice in row 1")
    assert not is_solved(FOUR, [2, *[0] * 15]), "it must keep the givens"


# ---- from training to a drawing ------------------------------------------------------------------
TINY = ("--device=cpu", "--threads=1", "--dtype=float32", "--dim=16", "--n_layers=1",
        "--n_heads=2", "--batch_size=4", "--max_steps=3", "--final_eval_tokens=64",
        "--eval_tokens=64", "--dataset=sudoku4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint after a few updates, and what its training printed."""
    folder = tmp_path_factory.mktemp("grids")
    result = run("train_scratch.py", *TINY, f"--out_dir={folder}", "--seq_len=99")
    assert result.status == 0, result
    return folder, result.out


def sample(folder, *arguments):
    return run("sample.py", f"--checkpoint={folder}", "--device=cpu", *arguments)


def test_a_recipe_trains_on_whole_grids(trained):
    folder, out = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["max_len"] == 16 and config["positions"] == "learned"
    assert re.search(r"step 3:\n[1-4] [1-4]  [1-4] [1-4]\n", out), "grids are drawn"
    assert out.splitlines()[-1].startswith("val nelbo ")


@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
def test_other_objectives_take_grids(objective, tmp_path):
    settings = (*TINY, f"--out_dir={tmp_path}", f"--objective={objective}", "--positions=rope")
    result = run("train_scratch.py", *settings)
    assert result.status == 0, result
    assert json.loads((tmp_path / "config.json").read_text())["positions"] == "rope"


def test_mistakes_with_grids(tmp_path):
    for setting, message in (
        ("--tokenizer=byte", "sudoku4 has a tokenizer of its own"),
        ("--positions=none", "positions must be one of rope, learned"),
    ):
        result = run("train_scratch.py", *TINY, f"--out_dir={tmp_path}", setting)
        assert result.status == 2 and result.err.startswith("error: ") and message in result.err
    settings = (*TINY, f"--out_dir={tmp_path}", "--objective=bd3lm", "--block_length=3")
    result = run("train_scratch.py", *settings)
    assert "block_length 3 does not divide seq_len 16" in result.err


def test_a_puzzle_in_and_a_grid_out(trained, tmp_path):
    folder, _ = trained
    puzzle = "\ufeff1 . | 3 4\r\n3 4 | . 2\r\n----+----\r\n2 1 | 4 .\r\n4 . | 2 1\r\n"
    (tmp_path / "puzzle.txt").write_bytes(puzzle.encode())      # as editors of Windows write it
    out = sample(folder, f"--infill=FILE:{tmp_path}/puzzle.txt", "--show").out
    shown = re.findall(r"step \d\n((?:.*\n){5})\n", out)
    assert [text.count(".") for text in shown] == [3, 2, 1, 0], "a grid a step"
    grid = parse_puzzle(shown[0], SHAPES["sudoku4"])
    assert [grid[cell] for cell in (0, 2, 3, 4)] == [1, 3, 4, 3]
    end = out.split("step 4\n")[1].split("\n\n")
    assert "\n\n".join(end[2:4]) == "\n\n".join(end[:2]) and verdict_line(out) == end[4]
    assert "4 tokens in 4 forward passes" in out


def verdict_line(out):
    """The line that says whether the grid that was printed before it is one; checked here."""
    [line] = re.findall(r"^(?:not )?solved: .*$", out, re.MULTILINE)
    drawn = out.split(line)[0].strip().split("\n")[-5:]
    digits = [int(digit) for digit in "".join(drawn) if digit.isdigit()]
    assert len(digits) == 16
    assert line == verdict(digits)
    return line


def test_grids_out_of_nothing_and_a_page(trained, tmp_path):
    folder, _ = trained
    result = sample(folder, "--num_samples=2", f"--html={tmp_path}/trace.html")
    assert result.status == 0 and len(re.findall("solved: ", result.out)) == 2
    assert len(re.findall(r"^[1-4] [1-4]  [1-4] [1-4]$", result.out, re.MULTILINE)) == 8
    assert '"grid": [4, 2, 2]' in (tmp_path / "trace.html").read_text()


def test_a_puzzle_without_a_solution_is_answered(trained):
    result = sample(trained[0], "--infill=123. ...4 .... ....")
    assert result.status == 0 and "not solved: " in verdict_line(result.out)


@pytest.mark.parametrize("arguments, message", [
    (["--infill=12"], "the puzzle has 2 cells, but this model's grids have 16"),
    (["--infill=1..1" + "." * 12], "no grid has these givens: 1 stands twice in row 1"),
    (["--infill=[MASK:3]"], "the puzzle has '[' at character 0"),
    (["--max_new_tokens=5"], "this model writes whole grids, 16 cells"),
    (["--chat"], "writes grids, it cannot chat"),
    (["--prompt=a"], "the tokenizer has no 'a'"),
])
def test_mistakes_are_told_in_one_line(trained, arguments, message):
    result = sample(trained[0], *arguments)
    assert result.status == 2 and result.err.count("\n") == 1, result
    assert result.err.startswith("error: ") and message in result.err


def test_eval_takes_grids(trained):
    result = run("eval.py", f"--checkpoint={trained[0]}", "--dataset=sudoku4", "--max_tokens=64")
    assert result.status == 0 and "| sudoku4 | 64 |" in result.out, result


# ---- the terminal and the page -------------------------------------------------------------------
class Screen(io.StringIO):
    def isatty(self):
        return True


def tiny_grids():
    config = Config(vocab_size=5, dim=16, n_layers=1, n_heads=2, max_len=16, mask_token_id=4,
                    positions="learned")
    return Sampler(Transformer(config).init_weights(0), Tokenizer.characters("1234"), "grids")


def test_a_terminal_tells_givens_from_what_was_written():
    sampler = tiny_grids()
    terminal = Terminal(Screen(), grid=sampler.grid)
    trace = Trace(sampler, watch=terminal.draw)
    tokens = sampler.encode_gaps("1234 3412 2143 432.")
    sampler.run([tokens], sampler.arguments(1, {
        "steps": 0, "block_length": 0, "temperature": "auto", "remasking": "auto", "cache": "auto",
        "cfg_scale": 0.0, "schedule": "", "seed": 1}, gaps=True), gaps=True, on_step=trace)
    lines = terminal.draw_grid(trace.rows[0]).split("\n")
    assert lines[0].count("\033[1m") == 4, "givens are bold"
    assert lines[-1].count("\033[1m") == 3 and "\033[38;5;" in lines[-1]
    screen = terminal.stream.getvalue()
    assert screen.count("\033[1m") == 15 and "step 1" in screen


def test_the_sampler_solves_greedily_and_writes_freely():
    sampler = tiny_grids()
    auto = {"steps": 0, "block_length": 0, "temperature": "auto", "remasking": "auto",
            "cache": "auto", "cfg_scale": 0.0, "schedule": "", "seed": 1}
    solving = sampler.arguments(3, auto, gaps=True)
    assert (solving["temperature"], solving["remasking"]) == (0.0, "low_confidence")
    writing = sampler.arguments(16, auto)
    assert (writing["temperature"], writing["remasking"]) == (0.5, "low_confidence")


def test_the_page_gets_a_grid():
    import threading

    from test_serve import SETTINGS, ask, events

    server = Server(tiny_grids(), SETTINGS, 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        puzzle = "1 .  3 4\n3 4  1 2\n\n2 1  4 3\n4 3  2 ."
        status, text = ask(server, "/generate", {"prompt": puzzle})
        messages = [json.loads(event) for event in events(text)]
        assert status == 200 and messages[0]["grid"] == [4, 2, 2]
        assert messages[0]["rows"][0][:3] == ["1", None, "3"]
        [grid] = messages[-1]["texts"]
        assert messages[-1]["report"].startswith(verdict([int(digit) for digit in grid]))
        status, refused = ask(server, "/generate", {"prompt": "1 1"})
        assert status == 400 and "the puzzle has 2 cells" in refused["error"]["message"]
    finally:
        server.shutdown()
        server.server_close()


# ---- the experiment ------------------------------------------------------------------------------
def test_a_twin_is_trained_and_both_are_measured(trained, tmp_path, capsys):
    folder, _ = trained
    (tmp_path / "diffusion-1337").symlink_to(folder)
    model, updates = experiment.train_twin(folder)
    assert updates == 3
    assert model.config.causal and model.config.max_len == 32
    model.save_pretrained(tmp_path / "twin-1337")
    for name in ("diffusion", "twin"):
        [one] = experiment.trained_models(tmp_path, name)
        grids, puzzles = experiment.random_puzzles(one, 6, 5)
        assert all(is_solved(grid, puzzle) for grid, puzzle in zip(grids, puzzles))
        answers, passes = experiment.answer(one, puzzles)
        assert passes == [6 if name == "diffusion" else 16] * 5
        assert all(len(answer) == 16 for answer in answers)
    [one] = experiment.trained_models(tmp_path, "diffusion")
    _, passes = experiment.answer(one, puzzles, steps=1)
    assert passes == [1] * 5
    grids, puzzles = experiment.unique_puzzles(one, 7, 5)
    assert puzzles and all(count_solutions(puzzle) == 1 for puzzle in puzzles)
    experiment.rules(tmp_path, "4", "3")
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(experiment.RULES)


def test_scores(monkeypatch):
    """A model that knows the answers, but for every second puzzle."""
    one = experiment.Trained("diffusion", "sudoku4", 0, None, [FOUR] * 4, 4)

    def knows(trained, puzzles, **how):
        wrong = [2, *FOUR[1:]]
        return [FOUR, wrong, FOUR, wrong], [3] * 4

    monkeypatch.setattr(experiment, "answer", knows)
    found = experiment.score([one], lambda trained: experiment.random_puzzles(trained, 3, 4))
    assert (found.solved, found.same, found.passes) == (0.5, 0.5, 3)
    assert found.error == pytest.approx(0.5774 / 2, abs=1e-3)
    with pytest.raises(FileNotFoundError, match="there is no twin-SEED"):
        experiment.trained_models("nowhere", "twin")
