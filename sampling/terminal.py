"""The terminal view of a run: masks turn into text, step by step, coloured by confidence."""
import shutil
import sys
import time
import unicodedata

from data.sudoku import draw_cells


class Terminal:
    """Draws a Trace as it grows: in place in a terminal, elsewhere a line a step."""

    palette = (203, 209, 215, 221, 185, 149, 113, 77)   # of 256 colours: from unsure, red, to green

    def __init__(self, stream=None, begin=0, pause=0.0, grid=None):
        """begin: the first position to show. pause: seconds to wait after each step. grid: the
        Shape of what is written, if that is a grid."""
        self.stream, self.begin, self.pause = stream or sys.stdout, begin, pause
        self.grid = grid
        self.height = 0                                 # lines that stand there
        self.in_place = self.stream.isatty()

    def draw(self, trace, message):
        """Called with each message of a Trace."""
        if "step" not in message:
            return
        if self.in_place:
            self.redraw(trace, message["step"])
        else:
            self.print_lines(trace, message["step"])

    def print_lines(self, trace, step):
        for row in trace.view:
            if self.grid is not None:
                print(f"step {step}\n{self.draw_grid(row)}\n", file=self.stream, flush=True)
                continue
            text = "".join(marked(cell, step) for cell in row[self.begin:])
            line = f"step {step:3}  {printable(text, newline='⏎')}"
            print(line, file=self.stream, flush=True)

    def redraw(self, trace, step):
        size = shutil.get_terminal_size()
        lines = []
        for row in trace.view:
            if self.grid is not None:
                lines += [*self.draw_grid(row, step).split("\n"), ""]
            else:
                lines += self.wrap(row[self.begin:], step, size.columns - 1)
        lines = lines[-(size.lines - 2):] + [f"\033[2mstep {step}\033[0m"]
        self.clear()
        self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()
        self.height = len(lines)
        time.sleep(self.pause)
        trace.began += self.pause                       # a pause is no work

    def clear(self):
        """Take back what stands there."""
        if self.height:
            self.stream.write(f"\033[{self.height}A\033[J")
            self.height = 0

    def wrap(self, row, step, width):
        """The lines of a row of cells, coloured, at most `width` columns each."""
        lines, column = [""], 0
        for cell in row:
            style = self.style(cell, step)
            lines[-1] += f"\033[{style}m"
            for character in printable("░" if cell.text is None else cell.text):
                columns = columns_of(character)
                if character == "\n" or column + columns > width:
                    lines[-1] += "\033[0m"
                    lines.append(f"\033[{style}m")
                    column = 0
                if character != "\n":
                    lines[-1] += character
                    column += columns
            lines[-1] += "\033[0m"
        return lines

    def draw_grid(self, row, step=None):
        """A row of cells as a grid; in a terminal they are coloured, and the givens bold."""
        texts = []
        for cell in row:
            text = cell.text or "."
            if self.in_place:
                text = f"\033[{self.style(cell, step)}m{text}\033[0m"
            texts.append(text)
        return draw_cells(texts, self.grid)

    def style(self, cell, step):
        """The numbers of the escape sequence that a cell is drawn with."""
        if cell.kind == "deleted":
            return "2;9;31"                             # dim, crossed out, red
        if cell.text is None:
            return "2"                                  # dim
        if cell.kind in ("inserted", "substituted"):
            hue = "32" if cell.kind == "inserted" else "33"         # green, yellow
            return f"{hue};4" if cell.step == step else hue
        if cell.step == 0:
            return "1"                                  # bold: given
        colour = self.palette[min(int(8 * cell.confidence**0.5), 7)]
        if cell.step == step:
            return f"38;5;{colour};4"                   # underlined: new
        return f"38;5;{colour}"


def marked(cell, step):
    """The text of a cell without colours: what this step inserts is {+so+}, what it deletes [-so-],
    a substitution both."""
    text = "░" if cell.text is None else cell.text
    if cell.step != step or cell.kind == "written":
        return text
    if cell.kind == "deleted":
        return f"[-{text}-]"
    if cell.kind == "substituted":
        return f"[-{cell.before or '░'}-]{{+{text}+}}"
    return f"{{+{text}+}}"


def columns_of(character):
    """How many columns of a terminal a character takes."""
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return 0 if unicodedata.combining(character) else 1


def printable(text, newline="\n"):
    """The text without control characters, which a terminal would obey."""
    characters = []
    for c in text:
        if c == "\n":
            c = newline
        elif c == "\t":
            c = "    "
        elif unicodedata.category(c) in ("Cc", "Cs"):
            c = "\ufffd"
        characters.append(c)
    return "".join(characters)
