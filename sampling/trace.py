"""The record of a run: what each denoising step changed, as text, and the page that plays it."""
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import write_atomically


@dataclass
class Cell:
    """A token of a row, as one sees it."""
    text: str = None            # None: still a mask
    confidence: float = None    # the probability that it was written with; None: it was given
    step: int = 0               # that wrote it, 0: it was given
    kind: str = "written"       # of an edit: inserted, substituted or deleted
    before: str = ""            # what stood there before it was substituted


class Trace:
    """`on_step` of a run. The terminal draws `rows`; a web page plays the `messages`.

    rows      for each sequence a list of Cell
    canvas    for each sequence the list of its tokens, the same with ids
    settled   for each sequence how many of them will stay, or None: see `Step`
    messages  {"rows": [[text, ...], ...]} at the beginning; of grids also {"grid": [size, rows of a
              box, columns of a box]},
              {"step": n, "changes": [[row, position, text, confidence], ...], "lengths": [...]} for
              each step,
              {"pieces": [[text, ...], ...]} at the end, when every token knows its neighbours
    """

    def __init__(self, sampler, remasking="low_confidence", watch=None):
        """watch(trace, message): called with each message."""
        self.sampler, self.remasking, self.watch = sampler, remasking, watch
        self.rows, self.messages, self.canvas, self.passes = [], [], None, 0
        self.settled = None
        self.began = time.perf_counter()

    def __call__(self, step):
        """Take in a `Step` of the engine."""
        self.passes = step.number
        if self.canvas is None:
            self.begin(step)
        self.settled = None if step.settled is None else step.settled.tolist()
        changes = []
        for b, length in enumerate(step.lengths.tolist()):
            changes += self.change_row(b, step, step.tokens[b, :length].tolist())
        lengths = [len(row) for row in self.canvas]
        self.tell({"step": step.number, "changes": changes, "lengths": lengths})

    def begin(self, step):
        """What stood there before the first step."""
        before = torch.where(step.revealed, self.sampler.mask_id, step.tokens)
        self.canvas = [row[:n] for row, n in zip(before.tolist(), step.lengths.tolist())]
        texts = [self.sampler.pieces(row) for row in self.canvas]
        self.rows = [[Cell(text) for text in row] for row in texts]
        message, grid = {"rows": texts}, self.sampler.grid
        if grid is not None:
            message["grid"] = [grid.size, grid.box_rows, grid.box_columns]
        self.tell(message)

    def change_row(self, b, step, tokens):
        """Make `tokens` row b; returns [[b, position, text, confidence], ...] of what changed."""
        changed = [i for i, token in enumerate(tokens) if token != self.canvas[b][i]]
        pieces = self.sampler.pieces(tokens) if changed else []
        changes = []
        for i in changed:
            confidence = None
            if pieces[i] is not None:                   # else it was masked again
                confidence = self.probability(step.confidence[b, i].item())
            self.rows[b][i] = Cell(pieces[i], confidence, step.number)
            changes.append([b, i, pieces[i], confidence])
        self.canvas[b], self.rows[b] = tokens, self.rows[b][:len(tokens)]
        return changes

    def probability(self, score):
        """A number from 0 to 1 to colour by. Entropy's score is -H, the logarithm of one; deferred
        tokens have a score of -1e9."""
        if self.remasking == "entropy" or score < 0:
            score = math.exp(score)
        return round(score, 4)

    def tell(self, message):
        self.messages.append(message)
        if self.watch:
            self.watch(self, message)

    @property
    def view(self):
        """The rows as the last step leaves them to be seen."""
        return self.rows

    def finish(self):
        """Correct the text of tokens that were written before their neighbours. Returns self."""
        pieces = [self.sampler.pieces(row) for row in self.canvas or []]
        for row, texts in zip(self.rows, pieces):
            for cell, text in zip(row, texts):
                cell.text = text
        self.tell({"pieces": pieces})
        return self

    def report(self, new_tokens):
        """The speed of the run, one line."""
        seconds = time.perf_counter() - self.began
        return (f"{new_tokens} tokens in {self.passes} forward passes "
                f"({new_tokens / max(self.passes, 1):.2f} tokens a pass), {seconds:.2f} s, "
                f"{new_tokens / max(seconds, 1e-9):.1f} tokens/s")

    def write_html(self, path, arguments):
        """Write the run as one self-contained page: page.html with the messages in it, and the
        `arguments` of the run. Raises OSError."""
        unset = (None, "", [], ())
        settings = {name: value for name, value in arguments.items() if value not in unset}
        data = json.dumps({"title": self.sampler.name, "settings": settings,
                           "messages": self.messages})
        data = data.replace("<", "\\u003c")             # no text can end the script element
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        page = page.replace("/*TRACE*/ null", data)
        write_atomically(path, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))


class EditTrace(Trace):
    """`on_step` of sampling/rewriting.py: a record of texts that grow and shrink.

    view      for each sequence its Cells after the last step, those that it deleted among them
    messages  {"rows": [[text, ...], ...], "edits": true} at the beginning,
              {"step": n, "canvas": {row: [[text, kind, step, before], ...]}} for each step: whole
              rows, only those that changed; kind is given, inserted, substituted or deleted
    """

    def __init__(self, sampler, sequences, watch=None):
        super().__init__(sampler, watch=watch)
        self.canvas = [list(row) for row in sequences]
        texts = [sampler.pieces(row) for row in self.canvas]
        self.rows = [[Cell(text, kind="given") for text in row] for row in texts]
        self.marked = self.rows
        self.tell({"rows": texts, "edits": True})

    @property
    def view(self):
        return self.marked

    def __call__(self, step):
        """Take in an `EditStep`."""
        self.passes = step.passes
        self.marked, canvas = list(self.rows), {}
        for b, written in enumerate(step.rows):
            if written is None:
                continue
            self.marked[b] = self.change(b, written, step.number)
            canvas[b] = [[cell.text, cell.kind, cell.step, cell.before] for cell in self.marked[b]]
        self.tell({"step": step.number, "canvas": canvas})

    def change(self, b, written, number):
        """Make edits.Written row b. Returns its Cells, with the deleted ones in their places."""
        old, new = self.rows[b], []
        pieces, marked, seen = self.sampler.pieces(written.tokens), [], 0
        for text, origin, edited in zip(pieces, written.origin, written.edited):
            if origin is None:
                cell = Cell(text, step=number, kind="inserted")
            else:
                marked += [self.deleted(cell, number) for cell in old[seen:origin]]
                cell, seen = old[origin], origin + 1
            if edited and origin is not None:
                cell = Cell(text, None, number, "substituted", cell.text or "")
            new.append(cell)
            marked.append(cell)
        marked += [self.deleted(cell, number) for cell in old[seen:]]
        self.canvas[b], self.rows[b] = list(written.tokens), new
        return marked

    def deleted(self, cell, number):
        return Cell(cell.text, None, number, "deleted")
