"""What a diffusion model of whole Sudoku grids solves, what its sampler decides, and what its
autoregressive twin solves that was trained on "puzzle -> solution" in the same minutes.

    python experiments/sudoku.py train  OUT DATASET MINUTES SEED,...
        OUT/diffusion-SEED by train_scratch.py, OUT/twin-SEED with the same settings and minutes
    python experiments/sudoku.py empty  OUT [N]
        puzzles solved against the number of empty cells, both models -> docs/DATASET-empty.png
    python experiments/sudoku.py givens OUT [N]
        the same with puzzles of a unique solution, against the number of givens
    python experiments/sudoku.py rules  OUT EMPTY [N]
        the guessing order: every rule, one cell a step (Kim et al. 2025, arXiv 2502.06768)
    python experiments/sudoku.py steps  OUT EMPTY [N]
        fewer steps, all cells at once, threshold, entropy bound    -> docs/DATASET-steps.png
    python experiments/sudoku.py remask OUT EMPTY [N]
        ReMDM's corrections (2503.00307): cells that may be emptied again

Each model gets N (200) puzzles of its own from held-out grids; runs of several seeds in OUT are
averaged, and the standard error is that of the mean over seeds (of one seed: over puzzles). Solved
means that no rule is broken and every given is kept: a puzzle with several solutions may end in
another grid than it was made from, and "same" is the share that ends in that one. Every run takes
one thread.
"""
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.sudoku import (  # noqa: E402
    SHAPES,
    empty_cells,
    grid_shape,
    is_solved,
    make_puzzle,
    shape_of,
)
from data.tokenizer import Tokenizer  # noqa: E402
from diffusion import SCHEDULES, mask_tokens, sample_t  # noqa: E402
from experiments.results import Curve, draw, train as train_scratch  # noqa: E402
from model import Config, Transformer  # noqa: E402
from passes import weighted_nll  # noqa: E402
from sampling.engine import generate, infill  # noqa: E402
from training.optimizers import (  # noqa: E402
    clip_gradients,
    learning_rate_factor,
    make_optimizers,
    set_learning_rate,
)
from training.state import load_state  # noqa: E402

CPU = torch.device("cpu")
RULES = ("low_confidence", "margin", "entropy", "random", "ancestral")

# --------------------------------------------------------------------------------------------------
# Training


def train(out, dataset, minutes, seeds):
    """A diffusion model and its twin for each seed; what is there already is not repeated."""
    for seed in seeds.split(","):
        folder, twin = Path(out, f"diffusion-{seed}"), Path(out, f"twin-{seed}")
        train_scratch(folder, dataset=dataset, max_minutes=minutes, seed=seed)
        if not (twin / "model.safetensors").exists():
            model, updates = train_twin(folder)
            model.save_pretrained(twin)
            print(f"{twin}: {updates} updates", flush=True)


def train_twin(folder):
    """(autoregressive Transformer, updates) that reads a puzzle, a token a cell, and writes the
    solution: sequences of 2 x cells tokens, the loss that of the second half.

    folder: the diffusion run, whose settings it shares: data, batch, model, optimizer, minutes or
    steps. A puzzle hides as many cells as a diffusion step masks. The mask's id is the empty cell.
    """
    s = load_state(folder / "train_state.pt", {})["settings"]
    data = TokenDataset(prepare(dataset_of(folder)))
    T = data.document_length
    config = Config(vocab_size=data.vocab_size, dim=s["dim"], n_layers=s["n_layers"],
                    n_heads=s["n_heads"], max_len=2 * T, positions=s["positions"], causal=True,
                    shift=True)
    model = Transformer(config).init_weights(s["seed"])
    optimizers = make_optimizers(model, s["optimizer"], s["learning_rate"], s["muon_lr"],
                                 s["beta2"], s["weight_decay"])
    is_solution = torch.arange(2 * T).expand(s["batch_size"], -1) >= T                  # [B, 2T]
    weights = torch.full(is_solution.shape, 1 / int(is_solution.sum()))
    begin, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        set_learning_rate(optimizers, learning_rate_factor(progress, s["warmup"], s["decay"]))
        grids = data.batch("train", s["batch_size"], T, s["seed"], step)                # [B, T]
        noise = common.stream("noise", s["seed"], step)
        alpha, _ = SCHEDULES[s["schedule"]](sample_t((len(grids), 1), noise))
        hidden = mask_tokens(grids.shape, 1 - alpha, noise)
        puzzles = torch.where(hidden, data.mask_token_id, grids)
        tokens = torch.cat((puzzles, grids), dim=1)                                     # [B, 2T]
        with common.autocast(CPU, s["dtype"]):
            loss, _ = weighted_nll(model, tokens, tokens, is_solution, weights)
        loss.backward()
        clip_gradients(model, s["grad_clip"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        progress = (time.perf_counter() - begin) / 60 / (s["max_minutes"] or math.inf)
        if s["max_steps"]:
            progress = step / s["max_steps"]
    return model.eval(), step


# --------------------------------------------------------------------------------------------------
# Puzzles and answers


@dataclass
class Trained:
    """A trained model and what it is measured on."""
    name: str               # "diffusion" or "twin"
    dataset: str
    seed: int
    model: Transformer
    grids: list             # held-out ones, in random order
    blank: int              # the id of an empty cell


def trained_models(out, name):
    """All Trained of this name in OUT. FileNotFoundError if there is none."""
    found = []
    for folder in sorted(Path(out).glob(f"{name}-*")):
        seed = int(folder.name.rpartition("-")[2])
        dataset = dataset_of(Path(out, f"diffusion-{seed}"))
        data = TokenDataset(prepare(dataset))
        grids = (data.windows("val", data.document_length) + 1).tolist()    # id 0 is the digit 1
        random.Random(seed).shuffle(grids)
        model = Transformer.from_pretrained(folder, dtype=torch.float32)
        found.append(Trained(name, dataset, seed, model, grids, data.mask_token_id))
    if not found:
        raise FileNotFoundError(f"there is no {name}-SEED in {out}: run `python "
                                "experiments/sudoku.py train` first")
    return found


def dataset_of(folder):
    """The name of the data set that a diffusion run learned from: its tokenizer tells."""
    shape = grid_shape(Tokenizer.from_pretrained(folder))
    return next(name for name, other in SHAPES.items() if other == shape)


def random_puzzles(trained, empty, count):
    """(grids, puzzles): `empty` random cells of each of `count` grids are emptied."""
    rng, grids = random.Random(trained.seed), trained.grids[:int(count)]
    return grids, [empty_cells(grid, int(empty), rng) for grid in grids]


def unique_puzzles(trained, givens, count):
    """(grids, puzzles) with one solution each and so many givens; grids for which that cannot be
    reached are left out."""
    rng, grids, puzzles = random.Random(trained.seed), [], []
    for grid in trained.grids[:int(count)]:
        puzzle = make_puzzle(grid, givens, rng)
        if len(puzzle) - puzzle.count(0) == givens:
            grids.append(grid)
            puzzles.append(puzzle)
    return grids, puzzles


@torch.no_grad()
def answer(trained, puzzles, **how):
    """(the grids that the model writes, forward passes for each). `how`: arguments of `infill`;
    one cell a step and the most probable digit if it does not say otherwise."""
    blank = trained.blank
    rows = [[digit - 1 if digit else blank for digit in puzzle] for puzzle in puzzles]
    if trained.model.config.causal:
        cells = len(puzzles[0])
        written = [row[cells:] for row in generate(trained.model, rows, cells, cells)]
        passes = [cells] * len(rows)
    else:
        passes = [0] * len(rows)

        def count_passes(step):
            for row in step.revealed.any(1).nonzero()[:, 0].tolist():
                passes[row] += 1

        masks = max(row.count(blank) for row in rows)
        written = infill(trained.model, rows, **{"steps": masks, "on_step": count_passes, **how})
    return [[token + 1 for token in row] for row in written], passes


@dataclass
class Score:
    """Of the puzzles of all seeds: a share, its standard error, and what stands beside it."""
    solved: float
    error: float
    same: float         # share that ends in the grid it was made from
    passes: float       # forward passes a puzzle


def score(models, puzzles_of, **how):
    """The Score of some Trained; puzzles_of(trained): (grids, puzzles). None where there are no
    puzzles."""
    solved, same, passes = [], [], []           # a tensor a seed
    for trained in models:
        grids, puzzles = puzzles_of(trained)
        if not puzzles:
            return None
        answers, used = answer(trained, puzzles, **how)
        right = [is_solved(found, puzzle) for found, puzzle in zip(answers, puzzles)]
        equal = [found == grid for found, grid in zip(answers, grids)]
        solved.append(torch.tensor(right).double())
        same.append(torch.tensor(equal).double())
        passes.append(torch.tensor(used).double())
    means = torch.stack([share.mean() for share in solved])
    spread = means if len(models) > 1 else solved[0]
    error = spread.std().item() / math.sqrt(len(spread))
    return Score(means.mean().item(), error, torch.cat(same).mean().item(),
                 torch.cat(passes).mean().item())


def say(label, found):
    print(f"{label:44} solved {found.solved:.3f} +- {found.error:.3f}, same {found.same:.3f}, "
          f"{found.passes:5.1f} passes", flush=True)


# --------------------------------------------------------------------------------------------------
# What is measured


def empty(out, count=200):
    """More and more random cells are emptied, up to all of them."""
    curves = {}
    for name in ("diffusion", "twin"):
        models = trained_models(out, name)
        cells = len(models[0].grids[0])
        curves[name] = Curve()
        for number in [cells * k // 12 for k in range(2, 13)]:
            found = score(models, lambda trained, n=number: random_puzzles(trained, n, count))
            say(f"{name}, {number} of {cells} cells empty", found)
            curves[name].add(number, found.solved, found.error)
    draw(f"{models[0].dataset}-empty.png", curves, title_of(models, "random cells emptied"),
         "empty cells", "share solved")


def givens(out, count=200):
    """Puzzles with a unique solution, from easy to as few givens as are reached."""
    for name in ("diffusion", "twin"):
        models = trained_models(out, name)
        cells = len(models[0].grids[0])
        for number in [cells * k // 36 for k in (28, 24, 20, 18, 16, 14, 13, 12, 11, 10)]:
            found = score(models, lambda trained, n=number: unique_puzzles(trained, n, count))
            if found is not None:
                say(f"{name}, unique, {number} of {cells} given", found)


def rules(out, number, count=200):
    """Which cell is guessed next."""
    models = trained_models(out, "diffusion")

    def puzzles(trained):
        return random_puzzles(trained, number, count)

    for rule in RULES:
        for temperature in (0.0, 1.0):
            found = score(models, puzzles, remasking=rule, temperature=temperature, seed=0)
            say(f"{rule}, temperature {temperature:g}", found)


def steps(out, number, count=200):
    """Fewer passes than cells, by number and by what the model is sure of."""
    models, number = trained_models(out, "diffusion"), int(number)

    def puzzles(trained):
        return random_puzzles(trained, number, count)

    curves = {}
    fewer = sorted({max(1, number // 2**k) for k in range(8)})
    for rule in ("low_confidence", "margin", "random"):
        curves[rule] = Curve()
        for k in fewer:
            found = score(models, puzzles, steps=k, remasking=rule, seed=0)
            say(f"{rule}, {k} steps", found)
            curves[rule].add(found.passes, found.solved, found.error)
    bounds = {"threshold": (0.5, 0.8, 0.9, 0.99, 0.999), "entropy_bound": (1.0, 0.3, 0.1, 0.03)}
    for rule, values in bounds.items():
        curves[rule] = Curve()
        for value in values:
            found = score(models, puzzles, **{rule: value})
            say(f"{rule} {value}", found)
            curves[rule].add(found.passes, found.solved, found.error)
    draw(f"{models[0].dataset}-steps.png", curves, title_of(models, f"{number} cells empty"),
         "forward passes a puzzle", "share solved", xscale="log")


def remask(out, number, count=200):
    """Does it help to empty cells again that were written?"""
    models, number = trained_models(out, "diffusion"), int(number)

    def puzzles(trained):
        return random_puzzles(trained, number, count)

    settings = [("cap", 0.0), ("cap", 0.02), ("cap", 0.1), ("rescale", 0.1), ("conf", 0.5),
                ("conf", 1.0)]
    for temperature in (0.0, 1.0):
        for schedule, eta in settings:
            for times in (1, 4):
                found = score(models, puzzles, remasking="ancestral", temperature=temperature,
                              remask=eta, remask_schedule=schedule, steps=times * number, seed=0)
                say(f"T {temperature:g}, {schedule} {eta}, {times * number} steps", found)


def title_of(models, what):
    """The title of a plot."""
    size = shape_of(models[0].grids[0]).size
    return f"{size} x {size} grids, {what}; {len(models)} seeds"


COMMANDS = {"train": train, "empty": empty, "givens": givens, "rules": rules, "steps": steps,
            "remask": remask}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    common.show_errors_in_one_line()
    torch.set_num_threads(1)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
