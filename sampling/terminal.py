"""The terminal view of a run: masks turn into text, step by step, coloured by confidence."""
import shutil
import sys
import time
import unicodedata


class Terminal:
    """Draws a Trace as it grows: in place in a terminal, elsewhere a line a step."""

    palette = (203, 209, 215, 221, 185, 149, 113, 77)               # of 256 colours: from unsure, red, to sure, green

    def __init__(self, stream=None, begin=0, pause=0.0):
        """begin: the first position to show. pause: seconds to wait after each step."""
        self.stream, self.begin, self.pause, self.height = stream or sys.stdout, begin, pause, 0
        self.in_place = self.stream.isatty()

    def draw(self, trace, message):
        """Called with each message of a Trace."""
        if "changes" not in message:
            return
        if not self.in_place:
            for row in trace.rows:
                text = "".join("░" if cell[0] is None else cell[0] for cell in row[self.begin:])
                print(f"step {message['step']:3}  {printable(text, newline='⏎')}", file=self.stream, flush=True)
            return
        size = shutil.get_terminal_size()
        lines = [line for row in trace.rows for line in self.wrap(row[self.begin:], message["step"], size.columns - 1)]
        lines = lines[-(size.lines - 2):] + [f"\033[2mstep {message['step']}\033[0m"]
        self.clear()
        self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()
        self.height = len(lines)
        time.sleep(self.pause)
        trace.start += self.pause                                        # a pause is no work

    def clear(self):
        """Take back what stands there."""
        if self.height:
            self.stream.write(f"\033[{self.height}A\033[J")
            self.height = 0

    def wrap(self, row, step, width):
        """The lines of a row of tokens, coloured."""
        lines, column = [""], 0
        for text, confidence, written in row:
            if text is None:
                text, style = "░", "2"                              # dim
            elif not written:
                style = "1"                                         # bold: given
            else:
                style = "38;5;117" if confidence is None else f"38;5;{self.palette[min(int(8 * confidence**0.5), 7)]}"
                style += ";4" * (written == step)                   # underlined: new
            lines[-1] += f"\033[{style}m"
            for character in printable(text):
                cells = 2 if unicodedata.east_asian_width(character) in "WF" else int(not unicodedata.combining(character))
                if character == "\n" or column + cells > width:
                    lines[-1] += "\033[0m"
                    lines.append(f"\033[{style}m")
                    column = 0
                if character != "\n":
                    lines[-1] += character
                    column += cells
            lines[-1] += "\033[0m"
        return lines


def printable(text, newline="\n"):
    """The text without control characters, which a terminal would obey."""
    return "".join(newline if c == "\n" else "    " if c == "\t" else "�" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
