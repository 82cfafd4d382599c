"""One fork server for all tests of a worker."""

import pytest

from tests.faults.harness import Harness


@pytest.fixture(scope="session")
def harness(tmp_path_factory, model_dir, rows):
    with Harness(tmp_path_factory.mktemp("faults"), model_dir, rows) as made:
        yield made
