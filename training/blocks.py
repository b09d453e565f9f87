"""Blocks that grow and then shrink while an autoregressive model learns to write in blocks.

An autoregressive model is one of blocks of a single token. LLaDA2 (arXiv 2512.15745) lets them grow
until a block is the whole sequence, trains like that for most of the time, as MDLM does, and then
lets them shrink to the length that sampling uses: warm-up, stable, decay.
"""
from dataclasses import dataclass


@dataclass
class Stage:
    length: int         # tokens in a block; 0: the whole sequence
    end: float          # the progress of the run, from 0 to 1, at which the stage ends


def parse_schedule(text):
    """The Stages in "1,4,32,T*4,32*2": block lengths in their order, T for the whole sequence, each
    for an equal part of the run, or for so many parts (*4). Raises ValueError."""
    lengths, parts = [], []
    for word in text.split(","):
        length, times, part = word.strip().partition("*")
        if not times:
            part = "1"
        if not part.isdecimal() or int(part) == 0 or not (length == "T" or length.isdecimal()):
            raise ValueError(f"block_schedule is a list like 1,4,32,T*4,32 of block lengths, T for "
                             f"a whole sequence, *4 for four parts of the time, got {word!r}")
        if length == "0":
            raise ValueError("block_schedule: a block has at least 1 token, got 0")
        lengths.append(0 if length == "T" else int(length))
        parts.append(int(part))
    ends = [sum(parts[:i + 1]) / sum(parts) for i in range(len(parts))]
    return [Stage(length, end) for length, end in zip(lengths, ends)]


def block_length_at(stages, progress):
    """Tokens in a block at this progress of the run, from 0 to 1; 0: the whole sequence."""
    for stage in stages:
        if progress < stage.end:
            return stage.length
    return stages[-1].length
