"""Conversations that a model writes itself: what it answers to the prompts of prompts.txt.

A conversion that has not the teacher's training data learns from the teacher's own answers. They
are the text that it knows best, in its own words and with its own ends, and nothing has to be
downloaded.

    python convert_ar.py --init_from=smollm2 --dataset=selfmade:smollm2
    python convert_ar.py --init_from=smollm2 --dataset='selfmade:smollm2[train:1000]'
    python convert_ar.py --init_from=smollm2 --dataset='selfmade:smollm2?temperature=0.5&seed=2'

The answers are kept in a file beside the prepared data sets, `selfmade-....jsonl`, and are written
there as they come: who is interrupted goes on from there.
"""
import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from common import seed_for, write_atomically
from data.files import digest, file_name, short_hash

PROMPTS = Path(__file__).with_name("prompts.txt")
BATCH = 16              # answers that are written together
BLOCKS = 64             # that are read of a file of weights, evenly spread, to know it again
BLOCK_BYTES = 2**16
# All sentences of a text but one that is cut short; "2." of a list ends none.
SENTENCES = re.compile(r"""(?s).*[^\d\s.!?][.!?]+["')\]]*(?=\s)""")


@dataclass
class Request:
    """What is asked of whom."""
    checkpoint: str             # the teacher: a folder, GGUF file, installed package or hub id
    temperature: float = 0.7    # of its sampling
    seed: int = 1337            # of its sampling: the answer to a prompt follows from it
    tokens: int = 192           # an answer that is longer ends with its last whole sentence


def is_selfmade(name):
    """Whether the name of a data set asks for such conversations."""
    return str(name).startswith("selfmade:")


def parse_request(name):
    """The Request in "selfmade:CHECKPOINT?temperature=0.7&seed=1&tokens=192". Raises ValueError."""
    checkpoint, _, options = name.removeprefix("selfmade:").partition("?")
    if not checkpoint:
        raise ValueError("selfmade: needs a checkpoint that writes the answers: selfmade:smollm2")
    request = Request(checkpoint)
    kinds = {field.name: field.type for field in fields(Request)[1:]}
    for option in filter(None, options.split("&")):
        key, _, text = option.partition("=")
        if key not in kinds:
            raise ValueError(f"{name}: no option called {key!r}; there are {', '.join(kinds)}")
        try:
            setattr(request, key, kinds[key](text))
        except ValueError:
            raise ValueError(f"{name}: {key} takes a number, got {text!r}") from None
    if not 0 <= request.temperature < 100 or request.tokens < 1 or request.seed < 0:
        raise ValueError(f"{name}: temperature and seed must not be negative, tokens at least 1")
    return request


def prompts(text=None):
    """All prompts of prompts.txt, or of a text of its form, in an order that mixes them and is the
    same everywhere. Raises ValueError."""
    if text is None:
        text = PROMPTS.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = {}
    for group in re.split(r"\n\s*\n", "\n".join(lines).strip()):
        ways, dashes, topics = group.partition("\n---\n")
        if not dashes or not all("{}" in way for way in ways.splitlines()):
            raise ValueError(f"prompts: a group is ways of asking with {{}}, ---, and topics, got "
                             f"{group[:60]!r}")
        for topic in re.split(r"[;\n]", topics):
            for way in ways.splitlines():
                if topic.strip():
                    found[way.replace("{}", topic.strip())] = None
    return sorted(found, key=digest)


def answers_file(request, folder):
    """Where the answers to a Request are kept, in `folder`. The name holds a hash of the request,
    the prompts and blocks of the weights: another model's answers are in another file. Raises
    FileNotFoundError if there is no such checkpoint."""
    from pretrained.hub import find_checkpoint
    source, sign = Path(find_checkpoint(request.checkpoint)), hashlib.sha256()
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        sign.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for number in range(BLOCKS):
                weights.seek(max(0, size - BLOCK_BYTES) * number // (BLOCKS - 1))
                sign.update(weights.read(BLOCK_BYTES))
    for value in (request.temperature, request.seed, request.tokens, SENTENCES.pattern, *prompts()):
        sign.update(f"{value}\n".encode())
    label = file_name(Path(request.checkpoint).name)
    return Path(folder) / f"selfmade-{label}-{short_hash(sign.digest())}.jsonl"


def read_answers(path):
    """{prompt: answer, or None where there is none} of a file of answers; a last line that was cut
    short by a kill does not count."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            found[row["prompt"]] = row["response"]
    return found


def conversations(request, path):
    """(prompt, answer) of each prompt that has an answer, read from the file `path` or
    written now, and then there."""
    everything, found = prompts(), read_answers(path)
    teacher = None
    for start in tqdm(range(0, len(everything), BATCH), unit="batch", delay=2, leave=False):
        batch = everything[start:start + BATCH]
        missing = [prompt for prompt in batch if prompt not in found]
        if missing:
            teacher = teacher or load_teacher(request.checkpoint)
            found.update(ask(teacher, missing, request))
            write_answers(path, found)
        for prompt in batch:
            if found[prompt]:
                yield prompt, found[prompt]


def write_answers(path, found):
    """All answers so far, in place of the file."""
    text = "".join(json.dumps({"prompt": prompt, "response": response}) + "\n"
                   for prompt, response in found.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


# The teacher is a model. data/ knows nothing of models, so all that does is imported where it is
# needed.


def load_teacher(checkpoint):
    """The Sampler of a checkpoint, on a GPU if there is one."""
    import torch

    from sampling.sampler import Sampler
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = Sampler.load(checkpoint, device=device)
    # An answer is over where its turn is.
    teacher.config.set_ends([*teacher.config.ends, *sorted(teacher.end_of_turn)])
    return teacher


def ask(teacher, questions, request):
    """{question: what the teacher answers, None if it finishes no sentence}. An answer depends on
    the question and the seed, not on who else is asked."""
    messages = [[{"role": "user", "content": question}] for question in questions]
    begins = [teacher.encode_chat(conversation) for conversation in messages]
    tokens = min(request.tokens, teacher.config.max_len - max(map(len, begins)))
    seeds = [seed_for(question, request.seed) for question in questions]
    settings = dict(steps=0, block_length=0, temperature=request.temperature, remasking="auto",
                    cache="auto", cfg_scale=0.0, schedule="", seed=seeds)
    arguments = teacher.arguments(tokens, settings, chat=True)
    rows = teacher.run(begins, arguments)
    found = {}
    for question, begin, row in zip(questions, begins, rows):
        answer, _, ended = teacher.decode(row[len(begin):], chat=True)
        if not ended:
            whole = SENTENCES.match(answer)
            answer = whole[0] if whole else ""
        found[question] = answer.strip() or None
    return found
