"""BIG-bench's questions, read in place: from a folder or an archive of the package's layout."""
import json
import tarfile

import pytest
from conftest import ROOT
from lm_eval.tasks import TaskManager

pytest.importorskip("datasets")
TASKS = ROOT / "evaluation" / "tasks" / "bigbench"
FILES = {
    "subject_verb_agreement/adv_english.json": {"examples": [
        {"input": "The cat ", "target_scores": {"sleeps": 1, "sleep": 0}},
        {"input": "The cats ", "target_scores": {"run home": 1, "runs home": 0}}]},
    "subject_verb_agreement/adv_italian.json": {"examples": [
        {"input": "Il gatto ", "target_scores": {"dorme": 1, "dormono": 0}}]},
    "social_iqa/task.json": {"examples": [
        {"input": "Why? ", "target_scores": {"Because.": 0, "He is kind.": 1, "No.": 0}},
        {"input": "Two? ", "target_scores": {"a": 1, "b": 1}}]},
    "truthful_qa/task_mc.json": {"task_prefix": "Q: One?\nA: Two.\n", "examples": [
        {"input": "Three?", "target_scores": {"Four.": 1, "Five.": 0}}]},
}


@pytest.fixture(params=["folder", "archive"])
def tasks(request, tmp_path, monkeypatch):
    """{name: lm-eval's task}, with FILES as their data."""
    folder = tmp_path / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    source = tmp_path / "bigbench-1.0.0"
    if request.param == "archive":
        source = tmp_path / "bigbench-1.0.0.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(tmp_path / "bigbench-1.0.0", "bigbench-1.0.0")
    monkeypatch.setenv("UNMASK_BIGBENCH", str(source))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return manager.load(["bigbench_verbs", "bigbench_social_iqa", "bigbench_truthful_qa"])["tasks"]


def asked(task):
    """[(text before, choices, number of the right one)] of all questions."""
    return [(task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc))
            for doc in task.test_docs()]


def test_questions_with_one_right_answer(tasks):
    assert asked(tasks["bigbench_verbs"]) == [("The cat", ["sleeps", "sleep"], 0)]
    assert asked(tasks["bigbench_social_iqa"]) == [
        ("Q: Why?\nA:", ["Because.", "He is kind.", "No."], 1)]
    assert asked(tasks["bigbench_truthful_qa"]) == [
        ("Q: One?\nA: Two.\n\nQ: Three?\nA:", ["Four.", "Five."], 0)]


@pytest.mark.parametrize("source, words", [
    ("", "UNMASK_BIGBENCH is not set"), ("nowhere", "which does not exist"),
    (str(TASKS), "has no .*task.json")])
def test_data_that_is_not_there(source, words, monkeypatch):
    monkeypatch.setenv("UNMASK_BIGBENCH", source)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        TaskManager(include_path=str(TASKS), include_defaults=False).load(["bigbench_social_iqa"])
