"""Shared by all tests: the repository on the path, few threads, the fixtures beside the checkout
where they are."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in two processes, see pyproject.toml


@pytest.fixture
def fixture_path():
    """fixture_path(name): the folder ../shared/fixtures/name beside the checkout; the test skips
    where it is absent."""

    def path(name):
        folder = ROOT.parent / "shared" / "fixtures" / name
        if not folder.exists():
            pytest.skip(
                f"{folder} is not here: these checkpoints stand beside the project, not in it"
            )
        return folder

    return path


@pytest.fixture(scope="session", autouse=True)
def prepared_data(tmp_path_factory):
    """The folder where data sets are prepared, here and in the scripts that tests start: never
    data/prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_DATA", str(folder))
        yield folder
