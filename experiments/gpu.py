"""Everything that wants a GPU, in one command of eight minutes: correctness, speed, memory.

    python experiments/gpu.py                   all parts, in the order of their worth
    python experiments/gpu.py train sampling    these alone
    python experiments/gpu.py --toy             on a CPU at sizes of a second each: does it run?
    python experiments/gpu.py --report FILE...  the figures of runs as the table in docs/gpu.md

Each part is a process of its own with a limit of its own: one that crashes or hangs costs nothing
but itself. Every figure is a line of JSON in out/gpu/figures.jsonl, and in the folder that the
environment variable OUT names, from the moment that it is known; of what fails, the traceback.
It needs Python 3.12, torch 2.11, tokenizers, safetensors and matplotlib, and no network.
"""
import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MINUTES = 8.0       # for all parts together
SHORTEST = 10       # seconds without which a part is not begun
FIGURES = "figures.jsonl"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- figures: python experiments/gpu.py --report -->", "<!-- end of figures -->"

CHILD = [sys.executable, __file__]      # what runs a part

# Seconds that a part may take, in the order of their worth. They are written in gpu_parts.py.
LIMITS = {"versions": 30, "checks": 75, "train": 110, "blocks": 80, "lora": 80, "sampling": 120,
          "mixture": 40, "recipe": 100}


@dataclass
class Options:
    """What stands on the command line."""
    parts: list             # names in LIMITS
    toy: bool = False       # on a CPU, everything tiny
    part: str = ""          # this process is that of one part
    report: list = None     # files of figures, to be turned into a table
    out_dir: str = str(ROOT / "out" / "gpu")


def read_options(arguments):
    """The Options. Raises ValueError."""
    if arguments[:1] == ["--report"]:
        if len(arguments) == 1:
            raise ValueError("--report takes the files of figures: --report out/gpu/figures.jsonl")
        return Options([], report=arguments[1:])
    options = Options([])
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument == "--toy":
            options.toy = True
        elif name in ("part", "out_dir") and value:
            setattr(options, name, value)
        elif argument.startswith("-"):
            raise ValueError(f"no option {argument}: there are --toy, --out_dir=FOLDER and "
                             "--report FILES")
        else:
            options.parts.append(argument)
    for name in [*options.parts, options.part]:
        if name and name not in LIMITS:
            raise ValueError(f"no part called {name!r}: there are {', '.join(LIMITS)}")
    options.parts = options.parts or list(LIMITS)
    return options


# --------------------------------------------------------------------------------------------------
# Figures


class Book:
    """Where figures are written, a JSON object a line: `folder`, and the folder OUT besides."""

    def __init__(self, folder):
        self.folders = [Path(folder)]
        if os.environ.get("OUT"):
            self.folders.append(Path(os.environ["OUT"]))
        for place in self.folders:
            place.mkdir(parents=True, exist_ok=True)

    def write(self, part, what, **figures):
        """Add a line, now: the process may be ended at any moment."""
        row = json.dumps({"part": part, "what": what, **figures})
        for place in self.folders:
            with open(place / FIGURES, "a") as file:
                file.write(row + "\n")
        print(row[:400], flush=True)

    def keep(self, file):
        """Copy a file of a run, its curve, into all folders."""
        file = Path(file)
        for place in self.folders:
            if file.exists() and file.parent.resolve() != place.resolve():
                (place / file.name).write_bytes(file.read_bytes())


def read_figures(files):
    """The rows of some files. Raises ValueError and FileNotFoundError."""
    rows = []
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}: gpu.py writes its figures into "
                                    "out/gpu/figures.jsonl and into the folder OUT")
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append({"part": row["part"], "what": row["what"], **row})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number}, is no figure of gpu.py") from None
    return rows


# --------------------------------------------------------------------------------------------------
# Parts, each in a process of its own


def run_all(options):
    """Run the parts one after the other, for MINUTES at most. Returns how many failed."""
    book, end, failed = Book(options.out_dir), time.monotonic() + 60 * MINUTES, 0
    for name in options.parts:
        left = end - time.monotonic()
        if left < SHORTEST:
            book.write(name, "not begun", failed=f"{MINUTES:g} minutes are over")
            failed += 1
            continue
        failed += not run_in_own_process(name, min(LIMITS[name], left), options, book)
    return failed


def run_in_own_process(name, limit, options, book):
    """Whether the part ended well within `limit` seconds; if not, a row says why."""
    command = [*CHILD, f"--part={name}", f"--out_dir={options.out_dir}"]
    if options.toy:
        command.append("--toy")
    begin, log = time.monotonic(), Path(options.out_dir) / f"{name}.log"
    with open(log, "w") as file:
        # A group of its own: the part may have started processes, which end with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = None
    seconds = round(time.monotonic() - begin, 1)
    if status == 0:
        book.write(name, "part", seconds=seconds)
        return True
    reason = f"ended with status {status}" if status is not None else f"stopped after {limit:.0f} s"
    book.write(name, "part", seconds=seconds, failed=reason, said=log.read_text()[-4000:])
    return False


def run_part(options):
    """This process is that of one part."""
    from experiments.gpu_parts import PARTS, Bench
    bench = Bench(options.part, Book(options.out_dir), options.toy)
    for measure in PARTS[options.part]:
        bench.attempt(measure)
    return bench.failures


# --------------------------------------------------------------------------------------------------
# The report


def report(files, page=PAGE):
    """Put the figures of `files` into `page`, between its two marks, and return them."""
    rows = read_figures(files)
    text = "\n".join([BEGIN, *describe_runs(rows), END])
    page = Path(page)
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the marks {BEGIN} and {END}, between which the figures go")
    page.write_text(before + text + after)
    return text


def describe_runs(rows):
    """Lines of Markdown: a heading a machine, a table a part."""
    runs = []
    for row in rows:
        if row["part"] == "versions" and row["what"] == "machine" or not runs:
            runs.append([])
        runs[-1].append(row)
    lines = []
    for run in runs:
        machine = run[0]
        lines += ["", f"### {machine.get('date', 'no date')}, {machine.get('card', 'no card')}", ""]
        lines.append(", ".join(f"{name} {value}" for name, value in machine.items()
                               if name not in ("part", "what", "date", "card")))
        for part in dict.fromkeys(row["part"] for row in run[1:]):
            lines += ["", *table_of(part, [row for row in run[1:] if row["part"] == part])]
    return [*lines, ""]


def table_of(part, rows):
    """A table of the rows of a part: a column for every figure that one of them has."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if name not in ("part", "what", "said", "curve")]
    lines = [f"| {part} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row in rows:
        cells = [show(row.get(name)) for name in columns]
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return lines


def show(value):
    if value is None:
        return ""
    if type(value) is float:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")[:200]


def has_gpu():
    import torch
    return torch.cuda.is_available()


def main(arguments):
    """The exit status: 1 if a part failed."""
    from common import show_errors_in_one_line
    show_errors_in_one_line()
    if "--help" in arguments:
        print(__doc__)
        return 0
    options = read_options(arguments)
    if options.report:
        print(report(options.report))
        return 0
    if options.part:
        return int(run_part(options) > 0)
    if not options.toy and not has_gpu():
        raise ValueError("torch sees no GPU here: --toy tries all parts on a CPU")
    failed = run_all(options)
    print(f"{datetime.datetime.now():%H:%M:%S} {len(options.parts) - failed} of "
          f"{len(options.parts)} parts ended well; figures in {options.out_dir}/{FIGURES}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
