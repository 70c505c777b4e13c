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

# `make test` shares the files among processes, with pytest-xdist; how many they are, in each of them.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# Each holds up to 2 GB, and from four on the longest file alone decides how long all take.
MOST_PROCESSES = 4
# These begin first, or one process would be left with one of them at the end.
LONG_FILES = (
    "test_tiny_model.py",
    "test_pipeline.py",
    "test_surgery.py",
    "test_fused_networks.py",
    "test_group_norm_emulated.py",
    "test_group_norm_reference.py",
    "test_export.py",
    "test_tiny_training.py",
    "test_checkpoint.py",
    "test_fused_compile.py",
    "test_compute_score.py",
    "test_engine_build.py",
    "test_graphs.py",
    "test_cuda_graph.py",
    "test_measure_sampler.py",
    "test_fused_kernels.py",
    "test_benchmarks.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes or many gigabytes")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `-n auto` starts: one a core, and none where they would share a GPU or need much memory."""
    from cldm.machine import available_cores

    shared = config.getoption("--slow") or any(Path("/dev").glob("nvidia[0-9]*"))
    cores = 1 if shared else min(available_cores(), MOST_PROCESSES)
    return cores if cores > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # it starts the others, and runs no test itself
    threads = _share_of_cores()
    if PROCESSES > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the programs that tests start
    import torch

    torch.set_num_threads(threads)


def _share_of_cores() -> int:
    from cldm.machine import available_cores

    return max(1, available_cores() // PROCESSES)


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    import torch

    if PROCESSES > 1:
        places = {name: place for place, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes or many gigabytes; run with --slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and there is none"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def share_of_cores() -> Iterator[None]:
    """Keep ONNX Runtime, which counts the cores itself, to this process's share of them."""
    with pytest.MonkeyPatch.context() as patch:
        if PROCESSES > 1:
            patch.setattr("runtime.ort_session.available_cores", _share_of_cores)
        yield


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
