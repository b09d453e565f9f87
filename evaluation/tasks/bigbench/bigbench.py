"""Questions of BIG-bench (2206.04615) for lm-eval, read in place from the package's source archive.

    pip download --no-deps --no-binary :all: bigbench==1.0.0        358 MB; it need not be installed
    UNMASK_BIGBENCH=bigbench-1.0.0.tar.gz python eval.py --checkpoint=smollm2 \\
        --include_path=evaluation/tasks/bigbench --tasks=bigbench_verbs

$UNMASK_BIGBENCH is the archive, or a folder that it was unpacked to. What is read is evaluation
data: nothing in this repository trains on it.
"""
import json
import os
import tarfile
from pathlib import Path

import datasets


def load(files, one_word=False, **_):
    """{"test": Dataset} of the questions in task.json files that have exactly one right answer:
    prefix (the examples that the task puts before each question), query, choices, answer (an
    index).

    files     the ends of their paths in the archive, with * for any name.
    one_word  leave out questions with an answer of several words.
    """
    rows = []
    for text in read_tasks(files):
        task = json.loads(text)
        for example in task["examples"]:
            scores = example["target_scores"]
            right = [answer for answer, score in scores.items() if score == 1]
            is_short = all(len(answer.split()) == 1 for answer in scores)
            if len(right) == 1 and len(scores) > 1 and (is_short or not one_word):
                answers = list(scores)
                rows.append({"prefix": task.get("task_prefix", ""),
                             "query": example["input"].strip(), "choices": answers,
                             "answer": answers.index(right[0])})
    if not rows:
        raise ValueError(f"no questions in {', '.join(files)}")
    return {"test": datasets.Dataset.from_list(rows)}


def read_tasks(patterns):
    """The texts of the files in the archive or folder whose paths end with one of the patterns."""
    source = os.environ.get("UNMASK_BIGBENCH", "")
    if not source:
        raise FileNotFoundError("UNMASK_BIGBENCH is not set: pip download --no-deps --no-binary "
                                ":all: bigbench==1.0.0, and let it name the archive")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"UNMASK_BIGBENCH is {source}, which does not exist")
    patterns = [f"*/{pattern}" for pattern in patterns]
    texts = {}
    if path.is_dir():
        for file in path.rglob("*.json"):
            if any(file.match(pattern) for pattern in patterns):
                texts[str(file)] = file.read_text(encoding="utf-8")
    else:
        with tarfile.open(path) as archive:             # one pass over it, nothing is unpacked
            for member in archive:
                if member.isfile() and any(Path(member.name).match(p) for p in patterns):
                    texts[member.name] = archive.extractfile(member).read().decode("utf-8")
    if not texts:
        raise FileNotFoundError(f"{source} has no {', '.join(patterns)}")
    return [texts[name] for name in sorted(texts)]
