"""Data parallel training and evaluation: several processes, started by msrun, share the images.

Each holds the complete networks. They exchange values through `all_reduce_sum`, which all of them have to
call; with a single process it returns its argument.
"""

import os
import sys
from shlex import quote

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.communication import get_group_size, get_rank
from tqdm import tqdm

from utils.system import interrupt
from utils.system.device import assign, launched


def processes() -> int:
    """Return the number of processes."""
    return get_group_size() if launched() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return get_rank() if launched() else 0


def command() -> str:
    """Return the command that started this script, without its options, for a hint in the log."""
    count, script = processes(), quote(os.path.abspath(sys.argv[0]))
    if count == 1:
        return f"python {script}"
    if os.environ.get("MS_SCHED_HOST") != "127.0.0.1":
        return f"the same msrun on each machine, {script}"
    return f"msrun --worker_num={count} --local_worker_num={count} --join=True {script}"


def indices_of_rank(count: int) -> range:
    """Return the indices of the images that this process takes of `count`."""
    return range(rank(), count, processes())


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """Return the sum of an array over the processes: floats in float32, counts below 2^48 exactly.

    Not every backend all-reduces integers: send 16-bit parts as float32, exact for up to 256 processes.
    """
    if processes() == 1:
        return values
    if values.dtype.kind == "f":
        return ops.AllReduce()(Tensor(values, mindspore.float32)).asnumpy()
    parts = np.stack([values >> bits & 0xFFFF for bits in (0, 16, 32)])
    low, middle, high = ops.AllReduce()(Tensor(parts, mindspore.float32)).asnumpy().astype(np.int64)
    return low + (middle << 16) + (high << 32)


def any_rank(condition: object) -> bool:
    """Return whether the condition is true in at least one process."""
    return bool(all_reduce_sum(np.array([bool(condition)], int))[0])


def all_equal(number: int) -> bool:
    """Return whether all processes pass the same number, which has up to 48 bits."""
    return not any_rank(all_reduce_sum(np.array([number]))[0] != processes() * number)


def barrier() -> None:
    """Wait until all processes have come here."""
    any_rank(False)


def broadcast_from_rank0(numbers: list[int]) -> list[int]:
    """Return the numbers, from 0 to below 2^48, that rank 0 passes; those of other processes are ignored."""
    numbers = numbers if rank() == 0 else []
    count = int(all_reduce_sum(np.array([len(numbers)]))[0])
    return all_reduce_sum(np.array(numbers or [0] * count)).tolist() if count else []


def average(parameters: list[Parameter]) -> None:
    """Replace float32 parameters by their mean over the processes, in place."""
    if processes() == 1:
        return
    values = [p.asnumpy() for p in parameters]
    mean = all_reduce_sum(np.concatenate([v.ravel() for v in values])) / np.float32(processes())
    for p, part in zip(parameters, np.split(mean, np.cumsum([v.size for v in values])[:-1])):
        assign(p, part.reshape(p.shape))


def print_rank0(text: str) -> None:
    """Print in rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def progress(**settings) -> tqdm:
    """Return a progress bar, which rank 0 shows if its output is a terminal."""
    return tqdm(disable=rank() > 0 or None, **settings)


def exit_if_signalled(i: int, count: int) -> None:
    """Exit at image i of `count` in all processes if any of them has a pending signal.

    The check is collective, so it skips the last images, which only some processes have.
    """
    if i // processes() < count // processes() and any_rank(interrupt.pending_signal()):
        interrupt.exit_for_signal(quiet=rank() > 0)
