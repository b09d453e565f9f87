"""The README's moving picture: a text comes out of the noise, a frame for each denoising step.

Grey blocks are masks, each as wide as the word that will stand there; what a step writes is
highlighted and settles to black.

    python experiments/picture.py
    python experiments/picture.py --checkpoint=out/scratch --prompt='Once upon a time' --seed=3
"""
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import matplotlib  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from sampling.engine import generate  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402
from sampling.trace import Trace  # noqa: E402

# ---- settings: change them here or with --name=value ---------------------------------------------
checkpoint = "checkpoints/mdlm"     # a folder or hub id, as for sample.py
output = "docs/denoise.gif"         # the file to write
# the text
prompt = "def read(self, size=-1):\n"   # what stands there from the beginning
max_new_tokens = 56         # masks
steps = 28                  # denoising steps, a frame each
block_length = 0            # tokens denoised together, from the left; 0: all of them
temperature = 0.35          # 0: the most probable token
remasking = "random"        # which predictions a step keeps: a key of diffusion.REMASKING
seed = 16                   # another seed, another text
seconds = 10.0              # of the loop, the pauses at both ends included
settings = common.override(globals())

WIDTH = 700                 # pixels
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
        for row in wrapper.wrap(paragraph) or [""]:
            for column in range(len(row)):
                where[index + column] = line, column
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


class Page:
    """Draws the text as it stands after a step."""

    def __init__(self, cells, footer):
        """cells: the tokens of a finished Trace. footer: a line below the text."""
        self.font, self.small = font(FONT_SIZE), font(FONT_SIZE - 4)
        self.advance = self.font.getlength("x")         # pixels from one column to the next
        self.line_height = round(1.6 * FONT_SIZE)
        self.words = place(cells, int((WIDTH - 2 * MARGIN) / self.advance))
        self.footer, self.steps = footer, max(cell.step for cell in cells)
        last = max((line for word in self.words for line, _, _ in word.characters), default=0)
        self.height = MARGIN + (last + 1) * self.line_height + 44

    def draw(self, step):
        """The picture, WIDTH x height pixels, after so many steps; behind the last step its words
        settle."""
        image = Image.new("RGB", (WIDTH, self.height), WHITE)
        self.pen = ImageDraw.Draw(image)
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
        self.progress(min(step, self.steps))
        return image

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

    def progress(self, step):
        """The step counter, and how far it is."""
        top = self.height - 34
        counter = f"step {step:{len(str(self.steps))}} of {self.steps}"
        self.pen.text((MARGIN, top), counter, GREY, self.small)
        left = WIDTH - MARGIN - self.small.getlength(self.footer)
        self.pen.text((left, top), self.footer, GREY, self.small)
        end = WIDTH - MARGIN
        self.pen.rectangle((MARGIN, top + 20, end, top + 21), fill=BLOCK)
        if step:
            done = MARGIN + (end - MARGIN) * step / self.steps
            self.pen.rectangle((MARGIN, top + 20, done, top + 21), fill=BAR)


def write_text():
    """The cells of a finished Trace of one run; ends of text become empty lines."""
    sampler = Sampler.load(checkpoint, dtype=torch.float32)         # the same text everywhere
    trace = Trace(sampler)
    generate(sampler.model, [sampler.encode_prompt(prompt)], max_new_tokens, steps,
             block_length or max_new_tokens, temperature, remasking, seed=seed, on_step=trace)
    cells = trace.finish().rows[0]
    ends = [sampler.tokenizer.decode([token]) for token in sampler.ends]
    for cell in cells:
        if cell.text in ends:
            cell.text = "\n\n"
    return cells


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
cells = write_text()
page = Page(cells, f"{max_new_tokens} tokens, {checkpoint}")
frames = [page.draw(step) for step in range(page.steps + FADE + 1)]
moving = max(seconds - FIRST_PAUSE - LAST_PAUSE, 1)     # seconds of all frames but first and last
milliseconds = round(1000 * moving / (len(frames) - 2))
durations = [round(1000 * FIRST_PAUSE), *[milliseconds] * (len(frames) - 2),
             round(1000 * LAST_PAUSE)]
save(frames, durations)
print("".join(cell.text for cell in cells))
print(f"\nwrote {output}: {page.steps} steps, {Path(output).stat().st_size / 1000:.0f} kB")
