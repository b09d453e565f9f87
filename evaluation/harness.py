"""lm-evaluation-harness: our Evaluator as a model of its own, its tasks off-line, its results with
our error bars."""
import difflib
from pathlib import Path

from data.gym import PREFIX
from evaluation.evaluator import Evaluator
from evaluation.gym_tasks import gym_task


def harness_model(settings):
    """The Evaluator as a class of lm-eval's, whose arguments change some of `settings`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import simple_parse_args_string

    class Unmask(Evaluator, TemplateLM):
        def __init__(self, **arguments):
            for name in arguments:
                if name not in settings:
                    near = difflib.get_close_matches(name, settings, 1, 0)[0]
                    raise ValueError(f"no setting called {name!r}; did you mean {near!r}?")
            TemplateLM.__init__(self)
            Evaluator.__init__(self, {**settings, **arguments})

        # From --model_args alone: lm-eval's own batch_size counts requests, its device is cuda.

        @classmethod
        def create_from_arg_obj(cls, arguments, _=None):
            return cls(**arguments)

        @classmethod
        def create_from_arg_string(cls, arguments, _=None):
            return cls(**simple_parse_args_string(arguments))

        def _loglikelihood_tokens(self, requests, **_):     # lm-eval's `loglikelihood` would ask it
            raise NotImplementedError
    return Unmask


def run_tasks(evaluator, names, settings):
    """lm-eval's results, with our settings and passes, on rank 0; elsewhere None."""
    from lm_eval.evaluator import simple_evaluate
    num_fewshot, limit = settings["num_fewshot"], settings["limit"]
    unsafe = settings["confirm_run_unsafe_code"]
    if num_fewshot < 0:
        num_fewshot = None
    if limit >= 1:
        limit = int(limit)
    ours = [name for name in names if name.startswith(PREFIX)]
    names = [name for name in names if name not in ours]
    tasks, manager = load_tasks(names, settings["include_path"], unsafe)
    tasks += [gym_task(name) for name in ours]
    results = simple_evaluate(
        evaluator, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, limit=limit or None,
        apply_chat_template=settings["apply_chat_template"], confirm_run_unsafe_code=unsafe,
        log_samples=False)
    if results:
        add_our_errors(results["results"], evaluator.answers)
    return results


def add_our_errors(results, answers):
    """Beside lm-eval's standard error, of which documents there are, put that of the sets of hidden
    tokens: the mean over a task's answers."""
    for task, figures in results.items():
        errors = []
        for answer in answers:
            if answer["task"] == task and answer["stderr"] is not None:
                errors.append(answer["stderr"])
        if errors:
            figures["nats_error,none"] = sum(errors) / len(errors)


def load_tasks(names, include_path, confirm_run_unsafe_code):
    """(what lm-eval's `simple_evaluate` takes as tasks, its TaskManager). ValueError for unknown
    names, for data that is not here and for code that may not run."""
    manager = task_manager(names, include_path)
    tasks, items = [], []
    for name in names:
        tasks += [task for task in manager.match_tasks([name]) if task not in tasks]
    for task in tasks:
        loaded = load_task(manager, task)
        if not confirm_run_unsafe_code:
            refuse_unsafe_code(loaded["tasks"])
        if task in loaded["groups"]:
            items.append(loaded["groups"][task])
        else:
            items += loaded["tasks"].values()
    return items, manager


def task_manager(names, include_path):
    """The TaskManager that knows these names. Raises ValueError, FileNotFoundError."""
    from lm_eval.tasks import TaskManager
    if include_path and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path {include_path} is no folder: it takes one with "
                                ".yaml files of lm-eval's tasks")
    # Reading lm-eval's own 14,000 tasks takes ten seconds: only if need be.
    manager = TaskManager(include_path=include_path or None, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path or None)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, ["nelbo", *manager.all_tasks], 3, 0.5)
            advice = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no task called {name!r}{advice} (lm-eval's `lm_eval ls tasks` lists "
                             "all; tasks of one's own want --include_path)")
    return manager


def load_task(manager, task):
    try:
        return manager.load([task])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"the data of task {task} cannot be loaded ({type(error).__name__}: {error}). "
            "Off-line, run it once where there is a network, with --limit=1, and copy "
            "~/.cache/huggingface (or $HF_HOME) here") from None


def refuse_unsafe_code(tasks):
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(f"task {name} runs what the model writes: add "
                             "--confirm_run_unsafe_code if this machine may be harmed")
