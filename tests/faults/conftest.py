"""One fork server for all tests of a worker, and one worker for all of these, so that unbroken runs are run once."""

from pathlib import Path

import pytest

from tests.faults.harness import Harness


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("faults"))


@pytest.fixture(scope="session")
def harness(tmp_path_factory, model_dir, rows):
    with Harness(tmp_path_factory.mktemp("faults"), model_dir, rows) as made:
        yield made
