"""Solved Sudoku grids, texts that are right or wrong beyond dispute: `sudoku` (9 x 9), `sudoku6`
(6 x 6, boxes of 2 rows and 3 columns) and `sudoku4` (4 x 4).

A document is one grid: its digits row after row, one token each, without an end token, so that all
documents of a set have one length. A model of whole grids solves puzzles that it has never seen: a
puzzle is a grid in which some cells are masked.

A grid stays one when its digits are renamed, when bands (rows of boxes) or stacks (columns of
boxes) trade places, or rows within a band, or columns within a stack; where boxes are square, also
when it is transposed. Backtracking makes a few random grids, the bases, and these symmetries make
many of each. What is held out are classes: no validation grid can be made from a training grid by
symmetries (see `split_bases`). Only sudoku4 is too small for that (see `sudoku4`).

Grids and puzzles are lists of size * size ints, row after row; 0 is an empty cell.
"""
import collections
import functools
import itertools
import random
from dataclasses import dataclass

import numpy as np

from data.files import VAL_FRACTION, hash_fraction, shuffled, split_by_hash

BLANKS = ".0_"          # what an empty cell of a puzzle may be written as
# White space and what the lines of a drawing are made of mean nothing in a puzzle.
SEPARATORS = " \t\r\n|+-" + "".join(map(chr, range(0x2500, 0x2580)))


@dataclass(frozen=True)
class Shape:
    """size digits, rows and columns; boxes of box_rows x box_columns cells."""
    size: int
    box_rows: int
    box_columns: int

    @property
    def cells(self):
        return self.size**2

    @property
    def digits(self):
        """The digits as they are written: "123456"."""
        return "".join(str(digit) for digit in range(1, self.size + 1))

    @functools.cached_property
    def units(self):
        """{name: its cells from left to right and top to bottom} of all rows, columns and boxes."""
        rows, columns, boxes = {}, {}, {}
        for cell in range(self.cells):
            row, column = divmod(cell, self.size)
            rows.setdefault(f"row {row + 1}", []).append(cell)
            columns.setdefault(f"column {column + 1}", []).append(cell)
            box = f"box {self.box_of(row, column) + 1}"
            boxes.setdefault(box, []).append(cell)
        return rows | columns | boxes

    @functools.cached_property
    def units_of(self):
        """For each cell the numbers of the units that hold it: its row, its column, its box."""
        places = []
        for cell in range(self.cells):
            row, column = divmod(cell, self.size)
            box = self.box_of(row, column)
            places.append((row, self.size + column, 2 * self.size + box))
        return places

    def box_of(self, row, column):
        """The number of the box, from left to right and top to bottom."""
        boxes_in_a_band = self.size // self.box_columns
        return row // self.box_rows * boxes_in_a_band + column // self.box_columns


SHAPES = {"sudoku": Shape(9, 3, 3), "sudoku6": Shape(6, 2, 3), "sudoku4": Shape(4, 2, 2)}

# How many random grids, and how many symmetric images of each are in its split.
SEED = 1
NUM_BASES = 1000
TRAIN_IMAGES = 120
VAL_IMAGES = 50

# --------------------------------------------------------------------------------------------------
# The sets


def sudoku():
    """solved Sudoku grids, 9 x 9, a token a cell: 108,000, generated"""
    return grids(SHAPES["sudoku"])


def sudoku6():
    """solved grids of 6 x 6, boxes of 2 rows and 3 columns: 108,000, generated"""
    return grids(SHAPES["sudoku6"])


def sudoku4():
    """all 288 solved grids of 4 x 4, a tenth of them held out"""
    # There are but two classes of them, so single grids are held out, by their hash. Symmetric
    # images of a held-out grid are in the training split.
    found = solutions([0] * SHAPES["sudoku4"].cells)
    return split_by_hash(shuffled(map(text_of, found)), VAL_FRACTION)


SETS = {"sudoku": sudoku, "sudoku6": sudoku6, "sudoku4": sudoku4}


def grids(shape):
    """Pieces (see files.py) of the grids of a shape: symmetric images of random bases."""
    shuffler, rng = random.Random(SEED), np.random.default_rng(SEED)
    empty = [0] * shape.cells
    bases = [next(solutions(empty, shuffler)) for _ in range(NUM_BASES)]
    train, val = split_bases(bases, shape)
    for split, members, count in (("train", train, TRAIN_IMAGES), ("val", val, VAL_IMAGES)):
        for grid in images(np.array(members), shape, count, rng).tolist():
            yield split, text_of(grid)
            yield split, None


def split_bases(bases, shape):
    """(bases for training, bases for validation): whole classes of grids are held out, a tenth of
    the bases or a little more.

    Grids that symmetries turn into each other have equal `class_key`s, and grids of one key are in
    one split. So no validation grid is a symmetric image of a training grid. (9 x 9: 5.5 * 10^9
    classes, and here nearly every base is of its own; 6 x 6: 49 classes, of which the hash of their
    keys chooses some.)
    """
    classes = collections.defaultdict(list)
    for base in bases:
        classes[class_key(base, shape)].append(base)
    train, val = [], []
    for key in sorted(classes, key=hash_fraction):
        part = val if len(val) < VAL_FRACTION * len(bases) else train
        part.extend(classes[key])
    return train, val


def text_of(grid):
    """The digits of a grid as a document."""
    return "".join(map(str, grid))


# --------------------------------------------------------------------------------------------------
# Symmetries


def images(bases, shape, count, rng):
    """int [N * count, cells]: `count` random symmetric images of each base, bases [N, cells], in
    random order; rng: a NumPy generator."""
    n = shape.size
    found = np.repeat(bases, count, axis=0)
    rng.shuffle(found)
    found = found.reshape(-1, n, n)                                                     # [M, n, n]
    rows = line_orders(len(found), n, shape.box_rows, rng)                              # [M, n]
    columns = line_orders(len(found), n, shape.box_columns, rng)
    found = np.take_along_axis(found, rows[:, :, None], axis=1)
    found = np.take_along_axis(found, columns[:, None, :], axis=2)
    if shape.box_rows == shape.box_columns:
        turned = rng.random(len(found)) < 0.5
        found[turned] = found[turned].transpose(0, 2, 1)
    names = rng.random((len(found), n)).argsort(1) + 1                                  # [M, n]
    return np.take_along_axis(names, found.reshape(-1, n * n) - 1, axis=1)


def line_orders(count, size, width, rng):
    """int [count, size]: random orders of `size` lines, rows or columns, in which bands of `width`
    lines stay together: the bands in any order, and the lines of each band."""
    bands = rng.random((count, size // width, 1)).argsort(1)                    # [M, bands, 1]
    lines = rng.random((count, size // width, width)).argsort(2)                # [M, bands, width]
    return (bands * width + lines).reshape(count, size)


def class_key(grid, shape):
    """A text that no symmetry changes: grids with different keys are of different classes.

    Two rows make a permutation, which takes each digit to the one below it in the other row.
    Renaming digits and moving columns leave the lengths of its cycles as they are; moving rows
    changes only which pair of rows it belongs to. So the cycles of all pairs, counted for pairs in
    one band and for others, are the same for the whole class. Likewise for columns.
    """
    rows = np.array(grid).reshape(shape.size, shape.size)
    keys = [pairs_key(rows.tolist(), shape.box_rows),
            pairs_key(rows.T.tolist(), shape.box_columns)]
    if shape.box_rows == shape.box_columns:
        keys.sort()                                     # transposing changes rows for columns
    return " / ".join(keys)


def pairs_key(lines, width):
    """The cycles of all pairs of lines, as a text; bands are of `width` lines."""
    counts = collections.Counter()
    for a, b in itertools.combinations(range(len(lines)), 2):
        kind = "near" if a // width == b // width else "far"
        counts[f"{kind} {cycles(lines[a], lines[b])}"] += 1
    return ", ".join(f"{counts[kind]} x {kind}" for kind in sorted(counts))


def cycles(line, other):
    """The sorted lengths of the cycles of the permutation line[i] -> other[i]."""
    below = dict(zip(line, other))
    lengths = []
    while below:
        digit, length = next(iter(below)), 0
        while digit in below:
            digit = below.pop(digit)
            length += 1
        lengths.append(length)
    return sorted(lengths)


# --------------------------------------------------------------------------------------------------
# An exact solver: it makes the bases, and checks what models write


def shape_of(grid):
    """The Shape of a grid or puzzle. ValueError for a number of cells that no shape has."""
    for shape in SHAPES.values():
        if shape.cells == len(grid):
            return shape
    known = ", ".join(str(shape.cells) for shape in SHAPES.values())
    raise ValueError(f"no grid has {len(grid)} cells: {known} are possible")


def solutions(puzzle, rng=None):
    """Yield all grids, lists of ints, that complete a puzzle; rng, a random.Random: in random
    order. A puzzle whose givens break a rule has none."""
    if conflict(puzzle) is None:
        yield from search(Board(puzzle), rng)


def count_solutions(puzzle, limit=2):
    """How many solutions a puzzle has, `limit` at most: 1 says that the solution is unique."""
    return sum(1 for _ in itertools.islice(solutions(puzzle), limit))


class Board:
    """A puzzle on the way to its solution. `used`: for each row, column and box the digits that it
    holds, bit d for digit d."""

    def __init__(self, puzzle):
        self.shape = shape_of(puzzle)
        self.grid = [0] * len(puzzle)
        self.used = [0] * (3 * self.shape.size)
        self.empty = set(range(len(puzzle)))
        for cell, digit in enumerate(puzzle):
            if digit:
                self.write(cell, 1 << digit)

    def write(self, cell, bit):
        self.grid[cell] = bit.bit_length() - 1
        self.empty.discard(cell)
        for unit in self.shape.units_of[cell]:
            self.used[unit] |= bit

    def erase(self, cell, bit):
        self.grid[cell] = 0
        self.empty.add(cell)
        for unit in self.shape.units_of[cell]:
            self.used[unit] &= ~bit

    def most_constrained(self):
        """(the empty cell that the fewest digits fit into, those digits as bits)"""
        all_digits = (1 << self.shape.size + 1) - 2
        fewest, found = self.shape.size + 1, None
        for cell in self.empty:
            row, column, box = self.shape.units_of[cell]
            fitting = all_digits & ~(self.used[row] | self.used[column] | self.used[box])
            count = fitting.bit_count()
            if count < fewest:
                fewest, found = count, (cell, fitting)
                if count < 2:
                    break
        return found


def search(board, rng):
    """Yield the completions of a board: try each digit of the most constrained cell."""
    if not board.empty:
        yield list(board.grid)
        return
    cell, fitting = board.most_constrained()
    bits = [1 << digit for digit in range(1, board.shape.size + 1) if fitting >> digit & 1]
    if rng is not None:
        rng.shuffle(bits)
    for bit in bits:
        board.write(cell, bit)
        yield from search(board, rng)
        board.erase(cell, bit)


def make_puzzle(grid, givens, rng):
    """A puzzle that `grid` alone solves, with so many givens or, where no more cells can be emptied
    one by one, the fewest that this order of cells reaches. rng: a random.Random."""
    puzzle, cells = list(grid), list(range(len(grid)))
    rng.shuffle(cells)
    left = len(cells)
    for cell in cells:
        if left <= givens:
            break
        digit, puzzle[cell] = puzzle[cell], 0
        if count_solutions(puzzle) == 1:
            left -= 1
        else:
            puzzle[cell] = digit
    return puzzle


def empty_cells(grid, count, rng):
    """The grid with `count` random cells emptied. The puzzle may have several solutions."""
    puzzle = list(grid)
    for cell in rng.sample(range(len(grid)), count):
        puzzle[cell] = 0
    return puzzle


# --------------------------------------------------------------------------------------------------
# Rules


def conflict(grid):
    """The first row, column or box with a digit twice, in words, or None. Empty cells break no
    rule."""
    shape = shape_of(grid)
    for name, cells in shape.units.items():
        seen = {}
        for cell in cells:
            digit = grid[cell]
            if digit and digit in seen:
                return f"{digit} stands twice in {name} ({where(seen[digit], cell, shape)})"
            seen[digit] = cell
    return None


def where(first, second, shape):
    """Two cells in words."""
    places = []
    for cell in (first, second):
        row, column = divmod(cell, shape.size)
        places.append(f"row {row + 1}, column {column + 1}")
    return " and ".join(places)


def is_solved(grid, puzzle):
    """Whether a grid is whole, breaks no rule and keeps the givens of the puzzle."""
    keeps = all(given in (0, digit) for given, digit in zip(puzzle, grid))
    return keeps and 0 not in grid and conflict(grid) is None


def verdict(grid):
    """What to say of a grid that a model has completed, one line."""
    broken = conflict(grid)
    if broken:
        return f"not solved: {broken}"
    empty = list(grid).count(0)
    if empty:
        return f"not solved: {empty} cells are empty"
    return "solved: every row, column and box has each digit once"


# --------------------------------------------------------------------------------------------------
# Texts


def grid_shape(tokenizer):
    """The Shape of the grids that a tokenizer is for, or None: its tokens are the digits alone."""
    for shape in SHAPES.values():
        if tokenizer.vocab_size == shape.size + 1:                      # and the mask
            pieces = tokenizer.backend.get_vocab(with_added_tokens=False)
            return shape if set(pieces) == set(shape.digits) else None
    return None


def parse_puzzle(text, shape):
    """A puzzle of a Shape as it is typed or drawn: digits for givens, a dot, 0 or _ for empty
    cells, row after row. ValueError, with the place, for what is no puzzle."""
    puzzle = []
    for i, character in enumerate(text):
        if character in shape.digits:
            puzzle.append(int(character))
        elif character in BLANKS:
            puzzle.append(0)
        elif character not in SEPARATORS:
            raise ValueError(f"the puzzle has {character!r} at character {i}: givens are the "
                             f"digits 1 to {shape.size}, empty cells a dot, 0 or _")
    if len(puzzle) != shape.cells:
        raise ValueError(f"the puzzle has {len(puzzle)} cells, but this model's grids have "
                         f"{shape.cells}: {shape.size} rows of {shape.size}, a dot for each empty "
                         "cell")
    broken = conflict(puzzle)
    if broken:
        raise ValueError(f"no grid has these givens: {broken}")
    if 0 not in puzzle:
        raise ValueError("the puzzle has no empty cell: there is nothing to fill (a dot, 0 or _ "
                         "is an empty cell)")
    return puzzle


def draw(grid):
    """A grid or puzzle as a text: boxes stand apart, empty cells are dots. `parse_puzzle` reads
    it."""
    cells = [str(digit or ".") for digit in grid]
    return draw_cells(cells, shape_of(grid))


def draw_cells(cells, shape):
    """The drawing of a grid whose cells are texts, one column wide each."""
    lines = []
    for row in range(shape.size):
        if row and row % shape.box_rows == 0:
            lines.append("")
        line = []
        for column in range(shape.size):
            gap = "  " if column and column % shape.box_columns == 0 else " "
            if column:
                line.append(gap)
            line.append(cells[row * shape.size + column])
        lines.append("".join(line))
    return "\n".join(lines)
