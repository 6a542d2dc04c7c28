"""Fixtures: small images for the tests that run the scripts, and a run on them that they share."""

import fcntl
import gc
import signal

import pytest
from mindspore.common.api import _CellGraphExecutor

from tests.golden import write_city, write_gta5
from tests.scripts import RUN, STEPS, TRAIN, run, train_words


def pytest_collection_modifyitems(items):
    """Sort the long files to the front: a long one at the end would keep one worker busy, others idle."""
    long = ["parity", "survival", "parallel", "precision", "memory"]
    first = {f"test_{name}.py": place for place, name in enumerate(long)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session", autouse=True)
def default_signals():
    """Restore signals that a nohup or a shell's "&" has ignored: the scripts would inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with four GTA5 images, and three of Cityscapes to train on and three for validation."""
    folder = tmp_path_factory.mktemp("data")
    write_gta5(folder / "GTA5", {f"{i:05d}": i for i in range(1, 5)}, (191, 105))
    for k, name in enumerate(("train", "val")):
        write_city(folder / "City", name, {f"{i:06d}": 10 + 5 * k + i for i in range(3)}, (204, 102))
    return folder


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory, worker_id):
    """The folder of an uninterrupted run with a checkpoint and a validation after every step: copy it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "reference"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker of pytest-xdist trains, the others wait
        if not (folder / "run" / f"GTA5_{STEPS}.ckpt").exists():
            run(TRAIN, *train_words(data, folder / "run", *RUN))
    return folder / "run"


@pytest.fixture
def compiled(monkeypatch):
    """The list of cells that MindSpore compiles during a test, in order."""
    gc.collect()  # when MindSpore deletes cells of earlier tests while it compiles, it compiles a cell again
    cells, compile_graph = [], _CellGraphExecutor.compile

    def counted(self, cell, *args, **kwargs):
        phase, new = compile_graph(self, cell, *args, **kwargs)
        cells.extend([cell] if new else [])
        return phase, new

    monkeypatch.setattr(_CellGraphExecutor, "compile", counted)
    return cells
