"""Reading of images in parallel: endless and shuffled for training, one pass for evaluation."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

import numpy as np
from mindspore import Tensor

from dataset.classes import IGNORE_LABEL

ORDER, SCALE, MIRROR = range(3)  # uses of random numbers, each with a generator of its own


class DomainSampler:
    """The shuffled images of steps start to stop - 1, with their augmentation; epochs follow one another.

    An item is (input,), or (input, label, number of labelled pixels): the threads that read also count.

    Each process reads an equal part of the `per_step` images of a step. Order and augmentation depend on the
    seed and the position alone: a resumed run reads the same images. The scale is that of the whole step.
    """

    def __init__(self, data, start: int, stop: int, per_step: int, seed: list[int], mirror: bool, scale: bool,
                 rank: int = 0, processes: int = 1):
        self.data, self.start, self.stop, self.per_step = data, start, stop, per_step
        self.seed, self.random_mirror, self.random_scale = seed, mirror, scale
        self.per_process = per_step // processes
        self.offset = rank * self.per_process
        # Two epochs, as a step may have images of both.
        self._order = lru_cache(maxsize=2)(lambda epoch: self._rng(ORDER, epoch).permutation(len(data)))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.per_process

    def __getitem__(self, k: int) -> tuple[np.ndarray, ...]:
        step, i = self.start + k // self.per_process, k % self.per_process
        position = step * self.per_step + self.offset + i
        scale = 1.0
        if self.random_scale:
            r = self._rng(SCALE, step).random()
            scale = 1.1 if r > 0.7 else 0.8 if r < 0.3 else 1.0
        mirror = self.random_mirror and self._rng(MIRROR, position).random() < 0.5
        item = self.data.read(self.index(position), scale, mirror)
        return (*item, *(np.array(np.count_nonzero(label != IGNORE_LABEL)) for label in item[1:]))

    def index(self, position: int) -> int:
        """Return the index in the data set of the image at a position, counted from step 0."""
        epoch, i = divmod(position, len(self.data))
        return int(self._order(epoch)[i])

    def names(self, step: int) -> list[str]:
        """Return the names of the images of one step, of all processes."""
        first = step * self.per_step
        return [self.data.names[self.index(k)] for k in range(first, first + self.per_step)]

    def _rng(self, use: int, number: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, use, number])


def read_ahead(read: Callable, indices: Iterable[int], workers: int, batch_size: int) -> Iterator:
    """Yield read(i) for every index, in order; up to `workers` threads, one per processor, read ahead.

    At most workers + max(workers, batch_size) items are held: a full-size pair of GTA5 takes 15 MB, and
    MindSpore's own reader would hold 140 of them. An error of read(i) is raised when item i is due.
    """
    limit, waiting = workers + max(workers, batch_size), deque()
    pool = ThreadPoolExecutor(min(workers, os.cpu_count()))
    try:
        for i in indices:
            if len(waiting) == limit:
                yield waiting.popleft().result()
            waiting.append(pool.submit(read, i))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(data, batch_size: int, workers: int, indices: Sequence[int] | None = None) -> Iterator[tuple]:
    """Yield the items of `data` at `indices` (default: all) in batches, tuples of Tensors; read by threads.

    The last one may be smaller. The UserError of an item is raised after the batches before it.
    """
    indices = range(len(data)) if indices is None else indices
    items = read_ahead(data.__getitem__, indices, workers, batch_size)
    while group := list(islice(items, batch_size)):
        yield tuple(map(batch_of, zip(*group)))


def batch_of(arrays: Sequence[np.ndarray]) -> Tensor:
    """Return arrays of one shape as a Tensor (N, ...); a single array, the usual case, is not copied."""
    return Tensor.from_numpy(np.stack(arrays) if len(arrays) > 1 else arrays[0][None])
