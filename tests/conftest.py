"""Shared by every test: a fixed number of threads, so that timings and block plans are the same on any machine."""

import os

# Workers of pytest-xdist share the cores: more threads than cores make tiny matrices many times slower. Set before
# torch is imported, so that it holds for the interpreters that tests start, too.
_ALONE = "PYTEST_XDIST_WORKER" not in os.environ
if not _ALONE:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2 if _ALONE else 1)


@pytest.fixture
def loud_again():
    """The commands silence transformers; put that back for the tests that follow."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()
