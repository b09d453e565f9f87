"""Tasks of reasoning-gym as lm-eval's: eval.py --tasks=gym:countdown.

The held-out questions that train_grpo.py measures as well, scored by the package. The answer is
written; `solved` is the share that gets the full score, with lm-eval's standard error.
"""
from data.tasks import GymTask

QUESTIONS = 200         # of a task; --limit takes fewer


def gym_task(name):
    """lm-eval's task for gym:NAME. Raises ValueError for a name that the package does not know,
    ImportError without it."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    gym = GymTask(name)
    examples = [gym.example("val", number) for number in range(QUESTIONS)]
    rows = [{"number": number, "question": one.prompt, "answer": one.answer}
            for number, one in enumerate(examples)]

    def score(document, answers):
        value = gym.reward(examples[document["number"]], answers[0])
        return {"score": value, "solved": float(value >= 1 - 1e-6)}

    return ConfigurableTask(config={
        "task": name, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "process_results": score,
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                        for metric in ("solved", "score")],
        "metadata": {"version": 1.0}})
