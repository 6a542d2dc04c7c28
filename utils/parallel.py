"""Several processes, started by msrun, that share every step's images: data parallel training and evaluation.

Each holds the whole networks. What they must agree on goes through `all_reduce_sum`, which all of them have to call;
a process alone agrees with itself.
"""

import os
import sys
from shlex import quote

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.communication import get_group_size, get_rank

from utils.device import launched


def processes() -> int:
    """How many processes share the work."""
    return get_group_size() if launched() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return get_rank() if launched() else 0


def command() -> str:
    """How this script was started, without its options; of several machines no more than "msrun"."""
    count, script = processes(), quote(sys.argv[0])
    if count == 1:
        return f"python {script}"
    if os.environ.get("MS_SCHED_HOST") != "127.0.0.1":
        return f"the same msrun on each machine, {script}"
    return f"msrun --worker_num={count} --local_worker_num={count} --join=True {script}"


def share(count: int) -> range:
    """Which of `count` images this process takes."""
    return range(rank(), count, processes())


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """The sum over the processes: of floats in float32, of counts below 2^48 exactly.

    No integer type is summed on every device: counts go in float32, 16 bits at a time (up to 256 processes).
    """
    if processes() == 1:
        return values
    if values.dtype.kind == "f":
        return ops.AllReduce()(Tensor(values, mindspore.float32)).asnumpy()
    parts = np.stack([values >> bits & 0xFFFF for bits in (0, 16, 32)])
    low, middle, high = ops.AllReduce()(Tensor(parts, mindspore.float32)).asnumpy().astype(np.int64)
    return low + (middle << 16) + (high << 32)


def any_rank(condition: object) -> bool:
    """Whether it is true in one of the processes at least."""
    return bool(all_reduce_sum(np.array([bool(condition)], int))[0])


def all_equal(number: int) -> bool:
    """Whether all processes have the same number, of up to 48 bits."""
    own = np.array([number])
    return not any_rank((all_reduce_sum(own) != processes() * own).any())


def barrier() -> None:
    """Until all processes have come here."""
    any_rank(False)


def broadcast_from_rank0(numbers: list[int]) -> list[int]:
    """The numbers, from 0 to below 2^48, that process 0 passes; what the others pass does not count."""
    numbers = numbers if rank() == 0 else []
    shared = np.zeros(int(all_reduce_sum(np.array([len(numbers)]))[0]), np.int64)
    shared[: len(numbers)] = numbers
    return all_reduce_sum(shared).tolist() if len(shared) else []


def average(parameters: list[Parameter]) -> None:
    """Put the mean over the processes into float32 parameters."""
    if processes() == 1:
        return
    values = [p.asnumpy() for p in parameters]
    mean = all_reduce_sum(np.concatenate([v.ravel() for v in values])) / np.float32(processes())
    for p, part in zip(parameters, np.split(mean, np.cumsum([v.size for v in values])[:-1])):
        # In place: set_data would give the parameter memory of its own, and compiled graphs keep the old one.
        ops.assign(p, Tensor(part.reshape(p.shape)))


def say(text: str) -> None:
    """Print, in process 0 alone."""
    if rank() == 0:
        print(text, flush=True)
