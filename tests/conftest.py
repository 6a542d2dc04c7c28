"""Small images for the tests that run the scripts, and one run on them that they share."""

import fcntl
import gc
import signal

import pytest
from mindspore.common.api import _CellGraphExecutor

from tests.golden import write_city, write_gta5
from tests.scripts import RUN, STEPS, TRAIN, run, train_words


def pytest_configure(config):
    """Files in our order: pytest-xdist would begin with those of many tests, which are short."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The long files first: one at the end would be left to one worker while others idle."""
    long = ["parity", "survival", "parallel", "precision", "memory"]
    first = {f"test_{name}.py": place for place, name in enumerate(long)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session", autouse=True)
def default_signals():
    """What a nohup, or a script's "&", around the tests ignores would be inherited by the programs here."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Four GTA5 images; three of Cityscapes to train on and three to validate."""
    folder = tmp_path_factory.mktemp("data")
    write_gta5(folder / "GTA5", {f"{i:05d}": i for i in range(1, 5)}, (191, 105))
    for k, name in enumerate(("train", "val")):
        write_city(folder / "City", name, {f"{i:06d}": 10 + 5 * k + i for i in range(3)}, (204, 102))
    return folder


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory, worker_id):
    """A run that nothing happened to, with a checkpoint and a validation after every step. To be copied.

    The first worker of pytest-xdist that needs it trains; the others wait.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "reference"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run" / f"GTA5_{STEPS}.ckpt").exists():
            run(TRAIN, *train_words(data, folder / "run", *RUN))
    return folder / "run"


@pytest.fixture
def compiled(monkeypatch):
    """The cells that MindSpore compiles during a test, one after the other.

    Cells of earlier tests go first: MindSpore deletes those that nobody holds while it compiles, and then
    compiles the same once more.
    """
    gc.collect()
    cells, compile_graph = [], _CellGraphExecutor.compile

    def counted(self, cell, *args, **kwargs):
        phase, new = compile_graph(self, cell, *args, **kwargs)
        cells.extend([cell] if new else [])
        return phase, new

    monkeypatch.setattr(_CellGraphExecutor, "compile", counted)
    return cells
