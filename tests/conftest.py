"""What all tests share: the repository on the path, no network, and which tests need what."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Iterator, List

import pytest

# Read by huggingface_hub and transformers when they are imported, so before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes or many gigabytes")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    from cldm.machine import available_cores

    torch.set_num_threads(available_cores())


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    import torch

    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes or many gigabytes; run with --slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and there is none"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose networks are so small that threads cost more than they bring, and far more on a busy machine.

    They ask for it with `pytestmark = pytest.mark.usefixtures("one_thread")`.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_config():
    """The configuration of the tiny model, `models/tiny.yaml`."""
    from cldm.config import load_config

    return load_config("tiny")


@pytest.fixture(scope="session")
def tiny_weights(tiny_config):
    """The tiny model's trained weights. They ship with the repository: without them its tests fail, none is skipped."""
    from cldm.weights import find_weights

    path = Path(tiny_config.folder) / tiny_config.checkpoint[0]
    if not path.is_file():
        pytest.fail(f"{path}, which ships with the repository, is not there: get it back with git checkout", False)
    return find_weights(tiny_config, str(path))
