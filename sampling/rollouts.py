"""Answers to learn from: a task's questions as tokens, many answers to each at once, and when each
token was written."""
import math
from dataclasses import dataclass

import torch

from data.sudoku import draw
from policy import Answers
from sampling.engine import generate, infill


@dataclass
class Rollout:
    """An answer that the model wrote: lists over the positions of prompt and answer."""
    tokens: list
    prompt: list            # bool: what was given
    answer: list            # bool: the answer, up to its end of text, with it
    step: list              # the sampler's step in which a token was written, 0, 1, ...
    text: str
    ended: bool             # an end of text was written
    reward: float = 0.0
    solved: bool = False


class Asker:
    """Asks a Sampler what a Task asks; settings: the recipe's constants."""

    def __init__(self, sampler, task, settings):
        """Raises ValueError where the model cannot be asked such things."""
        self.sampler, self.task, self.settings = sampler, task, settings
        self.context = settings["seq_len"]
        is_grid = sampler.grid is not None
        if is_grid != (task.kind == "grid") or is_grid and sampler.grid != task.shape:
            raise ValueError(f"{sampler.name} writes {'grids' if is_grid else 'texts'}, which task "
                             f"{task.name} is not for")
        if settings["system"] and task.kind != "chat":
            raise ValueError(f"system is what stands before a question, and task {task.name} asks "
                             "none: leave it empty")
        self.ends = set(sampler.ends)
        if task.kind == "chat":
            self.ends |= sampler.end_of_turn

    def canvas(self, example):
        """The tokens of a prompt and masks for the answer."""
        s, n = self.sampler, self.settings["max_new_tokens"]
        if self.task.kind == "grid":
            return s.encode_puzzle(example.prompt)
        if self.task.kind == "text":
            return s.opening + s.tokenizer.encode(example.prompt) + [s.mask_id] * n
        messages = [{"role": "user", "content": example.prompt}]
        if self.settings["system"]:
            messages.insert(0, {"role": "system", "content": self.settings["system"]})
        return s.encode_chat(messages) + [s.mask_id] * n

    def question(self, split, number):
        """(Example, its canvas): the n-th question of a split; one that does not fit into seq_len
        is passed over for another. ValueError where none fits."""
        for attempt in range(16):
            # A prime: a set of 2^n questions, which begins anew after the last one, would have the
            # same one again at a distance that is a power of 2.
            example = self.task.example(split, number + attempt * 16_777_213)
            canvas = self.canvas(example)
            if len(canvas) <= self.context:
                return example, canvas
        raise ValueError(f"the prompts of {self.task.name} and {self.settings['max_new_tokens']} "
                         f"tokens of an answer do not fit into seq_len {self.context}: this one "
                         f"takes {len(canvas)}; take a smaller max_new_tokens or a larger context")

    def write(self, canvases, seeds, temperature):
        """A Rollout for each canvas, without reward; row r draws from the stream of seeds[r]."""
        s, found = self.settings, []
        for begin in range(0, len(canvases), s["rollout_size"]):
            part = slice(begin, begin + s["rollout_size"])
            found += self.write_some(canvases[part], seeds[part], temperature)
        return found

    def write_some(self, canvases, seeds, temperature):
        s, mask_id, numbers = self.settings, self.sampler.mask_id, []

        def remember(step):
            numbers.append((step.number, step.revealed))

        how = dict(steps=s["steps"], block_length=s["block_length"] or None, seed=seeds,
                   temperature=temperature, remasking=s["remasking"], cfg_scale=s["cfg_scale"],
                   threshold=s["threshold"] or None, on_step=remember)
        if s["cache"] != "none":
            how["cache"] = s["cache"]
        if self.task.kind == "grid":
            how["steps"] = s["steps"] or max(canvas.count(mask_id) for canvas in canvases)
            rows = infill(self.sampler.model, canvases, **how)
        else:
            n = s["max_new_tokens"]
            how["steps"], how["block_length"] = s["steps"] or n, s["block_length"] or n
            prompts = [canvas[:-n] for canvas in canvases]
            rows = generate(self.sampler.model, prompts, n, **how)
        T = max(map(len, rows))
        written = torch.zeros(len(rows), T, dtype=torch.int64)
        for number, revealed in numbers:
            written[revealed[:, :T]] = number
        return [self.rollout(*each) for each in zip(canvases, rows, written)]

    def rollout(self, canvas, row, written):
        """The Rollout of one row; written [T]: the number of the pass that wrote each token."""
        places = [i for i, token in enumerate(canvas[:len(row)]) if token == self.sampler.mask_id]
        ends = [i for i in places if row[i] in self.ends]
        counted = [i for i in places if not ends or i <= ends[0]]
        said = row
        if self.task.kind != "grid":
            said = [row[i] for i in counted if row[i] not in self.ends]
        text = self.sampler.tokenizer.decode(said, skip_special_tokens=True)
        prompt, answer, step = [True] * len(row), [False] * len(row), [0] * len(row)
        # Passes in which other rows of the batch wrote something are no steps of this one.
        order = written[places].unique(return_inverse=True)[1].tolist()
        for i, number in zip(places, order):
            prompt[i], step[i] = False, number
        for i in counted:
            answer[i] = True
        return Rollout(row, prompt, answer, step, text, bool(ends))

    def shown(self, example, rollout):
        """Question and answer for a reader, in a line; grids as they are drawn."""
        if self.task.kind == "grid":
            return f"\n{draw([int(digit) for digit in rollout.text])}\n"
        return f"{example.prompt[-100:]!r} -> {rollout.text!r}"


def collate(rollouts):
    """The Answers of some Rollouts, padded on the right."""
    T = max(len(one.tokens) for one in rollouts)
    shape = (len(rollouts), T)
    tokens, step = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    prompt, answer = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    shown = torch.zeros(shape, dtype=torch.bool)
    for b, one in enumerate(rollouts):
        n = len(one.tokens)
        tokens[b, :n], step[b, :n] = torch.tensor(one.tokens), torch.tensor(one.step)
        prompt[b, :n], answer[b, :n] = torch.tensor(one.prompt), torch.tensor(one.answer)
        shown[b, :n] = True
    return Answers(tokens, prompt, answer, shown, step)


def mean_and_error(values):
    """(mean, its standard error) of some numbers."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))
