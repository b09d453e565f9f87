"""lm-evaluation-harness: our Evaluator as a model of its own, its tasks off-line, its results with our error bars."""
import difflib
from pathlib import Path

from evaluation.evaluator import Evaluator


def harness_model(settings):
    """The Evaluator as a class of lm-eval's, whose arguments change some of `settings`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import simple_parse_args_string

    class Unmask(Evaluator, TemplateLM):
        def __init__(self, **arguments):
            for name in arguments:
                if name not in settings:
                    raise ValueError(f"no setting called {name!r}; did you mean {difflib.get_close_matches(name, settings, 1, 0)[0]!r}?")
            TemplateLM.__init__(self)
            Evaluator.__init__(self, {**settings, **arguments})

        @classmethod
        def create_from_arg_obj(cls, arguments, _=None):            # --model_args alone: lm-eval's batch_size counts requests, its device is cuda
            return cls(**arguments)

        @classmethod
        def create_from_arg_string(cls, arguments, _=None):
            return cls(**simple_parse_args_string(arguments))

        def _loglikelihood_tokens(self, requests, **_):             # of lm-eval's own `loglikelihood`, which ours replaces
            raise NotImplementedError
    return Unmask


def load_tasks(names, include_path, confirm_run_unsafe_code):
    """(what lm-eval's `simple_evaluate` takes as tasks, its TaskManager). ValueError for unknown names and data that is not here."""
    from lm_eval.tasks import TaskManager
    if include_path and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path {include_path} is no folder: it takes one with .yaml files of lm-eval's tasks")
    manager = TaskManager(include_path=include_path or None, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):      # reading lm-eval's 14,000 takes ten seconds: only if need be
        manager = TaskManager(include_path=include_path or None)
    loaded = {}
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, ["nelbo", *manager.all_tasks], 3, 0.5)
            near = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no task called {name!r}{near} (lm-eval's `lm_eval ls tasks` lists all; tasks of one's own want --include_path)")
        for task in manager.match_tasks([name]):
            try:
                loaded[task] = manager.load([task])
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                raise ValueError(f"the data of task {task} cannot be loaded ({type(error).__name__}: {error}). Off-line, run it once where there is a "
                                 f"network, with --limit=1, and copy ~/.cache/huggingface (or $HF_HOME) here") from None
    for name, task in ((name, task) for part in loaded.values() for name, task in part["tasks"].items()):
        if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
            raise ValueError(f"task {name} runs what the model writes: add --confirm_run_unsafe_code if this machine may be harmed")
    return [item for task, part in loaded.items() for item in ([part["groups"][task]] if task in part["groups"] else part["tasks"].values())], manager


def run_tasks(evaluator, names, settings):
    """lm-eval's results, with our settings and passes, on rank 0; elsewhere None."""
    from lm_eval.evaluator import simple_evaluate
    limit, num_fewshot, unsafe = (settings[name] for name in ("limit", "num_fewshot", "confirm_run_unsafe_code"))
    items, manager = load_tasks(names, settings["include_path"], unsafe)
    results = simple_evaluate(evaluator, tasks=items, task_manager=manager, num_fewshot=None if num_fewshot < 0 else num_fewshot,
                              limit=(int(limit) if limit >= 1 else limit) or None, apply_chat_template=settings["apply_chat_template"],
                              confirm_run_unsafe_code=unsafe, log_samples=False)
    for task in results["results"] if results else ():              # beside lm-eval's error, of which documents, that of the sets
        errors = [answer["stderr"] for answer in evaluator.answers if answer["task"] == task and answer["stderr"] is not None]
        if errors:
            results["results"][task]["nats_error,none"] = sum(errors) / len(errors)
    return results
