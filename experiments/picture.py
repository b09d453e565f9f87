"""The README's moving picture: a text and a grid come out of the noise, a frame for each denoising
step of the text.

Grey blocks are masks, each as wide as the word that will stand there; what a step writes is
highlighted and settles to black. Beside the text a puzzle is solved in the same time.

    python experiments/picture.py
    python experiments/picture.py --checkpoint=out/scratch --prompt='Once upon a time' --seed=3
    python experiments/picture.py --grid_checkpoint=            the text alone
"""
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import matplotlib  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from sampling.engine import generate, infill  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402
from sampling.trace import Trace  # noqa: E402

# ---- settings: change them here or with --name=value ---------------------------------------------
checkpoint = "checkpoints/tales"    # a folder or hub id, as for sample.py
output = "docs/denoise.gif"         # the file to write
# the text
prompt = ""                 # what stands there from the beginning
max_new_tokens = 110        # masks; what is written after an end of text is left out
steps = 55                  # denoising steps, a frame each
block_length = 0            # tokens denoised together, from the left; 0: all of them
temperature = 0.5           # 0: the most probable token
remasking = "entropy"       # which predictions a step keeps: a key of diffusion.REMASKING
seed = 3                    # another seed, another text
# the grid
grid_checkpoint = "checkpoints/sudoku6"     # a model of grids; empty: none
puzzle = "3.5.24 .2.5.1 2.31.6 65.3.2 ..2.65 5..21."      # its dots are masks
# time
seconds = 10.0              # of the loop, the pauses at both ends included
settings = common.override(globals())

WIDTH = 840                 # pixels
GRID_WIDTH = 270            # pixels of the grid
FONT_SIZE = 16              # pixels
MARGIN = 28                 # pixels around the text
FIRST_PAUSE = 1.0           # seconds on the canvas of masks
LAST_PAUSE = 3.0            # seconds on the finished text
FADE = 4                    # frames until a new word is black
WHITE = (255, 255, 255)
BLACK = (36, 41, 47)
GREY = (130, 138, 146)      # of the line below the text
BLOCK = (224, 228, 232)     # a mask
NEW_WORD = (176, 58, 0)
NEW_GROUND = (255, 226, 178)
BAR = (224, 122, 40)


@dataclass
class Word:
    """A token on the page."""
    characters: list            # (line, column, character) of each one that is visible
    step: int                   # that wrote it; 0: given


def place(cells, columns):
    """[Word, ...] of the tokens, the cells of a Trace, in lines of at most so many columns that
    break between words."""
    where = line_and_column("".join(cell.text for cell in cells), columns)
    words, index = [], 0
    for cell in cells:
        characters = []
        for character in cell.text:
            if not character.isspace():
                characters.append((*where[index], character))
            index += 1
        words.append(Word(characters, cell.step))
    return words


def line_and_column(text, columns):
    """Where each character of the text stands: {its index: (line, column)}."""
    wrapper = textwrap.TextWrapper(columns, expand_tabs=False, replace_whitespace=False,
                                   drop_whitespace=False)           # it keeps every character
    where, line, index = {}, 0, 0
    for paragraph in text.split("\n"):
        for number, row in enumerate(wrapper.wrap(paragraph) or [""]):
            # The space at which a line was broken stands before its first column.
            first = -1 if number and row.startswith(" ") else 0
            for column in range(len(row)):
                where[index + column] = line, first + column
            index += len(row)
            line += 1
        index += 1                                      # the end of the line
    return where


def mix(a, b, share):
    """The colour that lies `share` of the way from a to b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


def font(size):
    """DejaVu Sans Mono, which comes with matplotlib; all its characters have the same width."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / "DejaVuSansMono.ttf"), size)


class Text:
    """The text as it stands after a step."""

    def __init__(self, cells, width):
        """cells: the tokens of a finished Trace. width: pixels."""
        self.font = font(FONT_SIZE)
        self.advance = self.font.getlength("x")         # pixels from one column to the next
        self.line_height = round(1.6 * FONT_SIZE)
        self.words = place(cells, int(width / self.advance))
        self.steps = max(cell.step for cell in cells)
        last = max((line for word in self.words for line, _, _ in word.characters), default=0)
        self.height = (last + 1) * self.line_height

    def draw(self, pen, step):
        """Behind the last step the words settle."""
        self.pen = pen
        for word in self.words:
            if word.step > step:
                self.ground(word, BLOCK)
                continue
            age = min((step - word.step) / FADE, 1) if word.step else 1
            if age < 1:
                self.ground(word, mix(NEW_GROUND, WHITE, age))
            for line, column, character in word.characters:
                position = self.corner(line, column)
                self.pen.text(position, character, mix(NEW_WORD, BLACK, age), self.font)

    def corner(self, line, column):
        """The pixel (x, y) where a character begins."""
        return MARGIN + column * self.advance, MARGIN + line * self.line_height

    def ground(self, word, colour):
        """A box behind each part of a token that stands in one line without a space."""
        runs = []                                       # (line, first column, last column)
        for line, column, _ in word.characters:
            if runs and runs[-1][0] == line and runs[-1][2] == column - 1:
                runs[-1][2] = column
            else:
                runs.append([line, column, column])
        for line, first, last in runs:
            left, top = self.corner(line, first)
            right, _ = self.corner(line, last + 1)
            box = left + 0.5, top - 1, right - 1.5, top + 1.25 * FONT_SIZE
            self.pen.rounded_rectangle(box, radius=3, fill=colour)


class Grid:
    """A Sudoku grid as it stands after a step of the text, in whose time it is solved."""

    def __init__(self, cells, shape, left, text_steps):
        """cells: of a finished Trace. shape: of data/sudoku.py. left: pixels."""
        self.cells, self.shape, self.left, self.text_steps = cells, shape, left, text_steps
        self.steps = max(cell.step for cell in cells)
        self.side = GRID_WIDTH // shape.size            # of a cell, pixels
        self.height = shape.size * self.side
        self.font = font(round(0.6 * self.side))

    def draw(self, pen, step):
        for number, cell in enumerate(self.cells):
            row, column = divmod(number, self.shape.size)
            left, top = self.left + column * self.side, MARGIN + row * self.side
            box = left + 1, top + 1, left + self.side - 1, top + self.side - 1
            # The step of the text at which this cell is written.
            written = math.ceil(cell.step * self.text_steps / self.steps)
            age = min((step - written) / FADE, 1) if cell.step else 1
            if age < 0:
                pen.rectangle(box, fill=BLOCK)
                continue
            pen.rectangle(box, fill=mix(NEW_GROUND, WHITE, age))
            ink = mix(NEW_WORD, BLACK, age)
            middle = left + self.side / 2, top + self.side / 2
            pen.text(middle, cell.text, ink, self.font, anchor="mm")
        self.lines(pen)

    def lines(self, pen):
        """Thin lines around cells, thick ones around boxes."""
        size, end = self.shape.size, self.height
        for i in range(size + 1):
            at = i * self.side
            thick = 2 if i % self.shape.box_rows == 0 else 1
            pen.line((self.left, MARGIN + at, self.left + end, MARGIN + at), BLACK, thick)
            thick = 2 if i % self.shape.box_columns == 0 else 1
            pen.line((self.left + at, MARGIN, self.left + at, MARGIN + end), BLACK, thick)


class Page:
    """Text, grid and how far they are."""

    def __init__(self, text, grid, footer):
        """grid: None for a text alone. footer: a line below them."""
        self.parts = [part for part in (text, grid) if part is not None]
        self.steps, self.footer, self.font = text.steps, footer, font(FONT_SIZE - 4)
        self.height = MARGIN + max(part.height for part in self.parts) + 50

    def draw(self, step):
        """The picture, WIDTH x height pixels, after so many steps."""
        image = Image.new("RGB", (WIDTH, self.height), WHITE)
        pen = ImageDraw.Draw(image)
        for part in self.parts:
            part.draw(pen, step)
        self.progress(pen, min(step, self.steps))
        return image

    def progress(self, pen, step):
        """The step counter, and how far it is."""
        top, end = self.height - 34, WIDTH - MARGIN
        counter = f"step {step:{len(str(self.steps))}} of {self.steps}"
        pen.text((MARGIN, top), counter, GREY, self.font)
        pen.text((end - self.font.getlength(self.footer), top), self.footer, GREY, self.font)
        pen.rectangle((MARGIN, top + 20, end, top + 21), fill=BLOCK)
        if step:
            done = MARGIN + (end - MARGIN) * step / self.steps
            pen.rectangle((MARGIN, top + 20, done, top + 21), fill=BAR)


def write_text():
    """The cells of a finished Trace of one run, up to an end of text."""
    sampler = Sampler.load(checkpoint, dtype=torch.float32)         # the same text everywhere
    trace, tokens = Trace(sampler), sampler.encode_prompt(prompt)
    generate(sampler.model, [tokens], max_new_tokens, steps, block_length or max_new_tokens,
             temperature, remasking, seed=seed, on_step=trace)
    trace.finish()
    begin = 0 if prompt else len(tokens)
    _, used, _ = sampler.decode(trace.canvas[0][len(tokens):])
    return trace.rows[0][begin:len(tokens) + used]


def solve_puzzle():
    """(cells of a finished Trace, Shape) of the puzzle, a cell a step, the surest first."""
    sampler = Sampler.load(grid_checkpoint, dtype=torch.float32)
    if sampler.grid is None:
        raise ValueError(f"{grid_checkpoint} is no model of grids")
    tokens, trace = sampler.encode_gaps(puzzle), Trace(sampler)
    infill(sampler.model, [tokens], steps=tokens.count(sampler.mask_id), on_step=trace)
    print(sampler.verdict(trace.canvas[0]), end="\n\n")
    return trace.finish().rows[0], sampler.grid


def make_palette():
    """An image whose palette has every colour of the picture: each text colour on its ground, with
    the shades between them at the edges of letters."""
    colours, shades = [BLOCK, BAR], [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]
    texts = [(WHITE, GREY)]                             # (ground, colour on it)
    for age in range(FADE + 1):
        texts.append((mix(NEW_GROUND, WHITE, age / FADE), mix(NEW_WORD, BLACK, age / FADE)))
    for ground, ink in texts:
        colours += [ground, ink, *(mix(ground, ink, shade) for shade in shades)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in colours for value in colour])
    return palette


def save(frames, durations):
    """The frames as a GIF that repeats for ever, in one palette, so that what does not change costs
    nothing. durations: milliseconds of each."""
    palette = make_palette()
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(output, save_all=True, append_images=frames[1:], duration=durations, loop=0,
                   optimize=True)


common.check(settings, at_least_1=["max_new_tokens", "steps"],
             not_negative=["block_length"], positive=["seconds"])
cells, grid, width = write_text(), None, WIDTH - 2 * MARGIN
if grid_checkpoint:
    width -= GRID_WIDTH + MARGIN
text = Text(cells, width)
if grid_checkpoint:
    grid = Grid(*solve_puzzle(), WIDTH - MARGIN - GRID_WIDTH, text.steps)
page = Page(text, grid, "masks turn into a tale, and into a solved puzzle" if grid else checkpoint)
frames = [page.draw(step) for step in range(page.steps + FADE + 1)]
moving = max(seconds - FIRST_PAUSE - LAST_PAUSE, 1)     # seconds of all frames but first and last
milliseconds = round(1000 * moving / (len(frames) - 2))
durations = [round(1000 * FIRST_PAUSE), *[milliseconds] * (len(frames) - 2),
             round(1000 * LAST_PAUSE)]
save(frames, durations)
print("".join(cell.text for cell in cells))
print(f"\nwrote {output}: {page.steps} steps, {Path(output).stat().st_size / 1000:.0f} kB")
