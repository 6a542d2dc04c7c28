"""Parallel reading: endless and shuffled for training, one pass for evaluation."""

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import numpy as np
from mindspore import Tensor

T = TypeVar("T")


class DomainSampler:
    """The images of steps start, …, stop - 1 of infinite sampling of `data`, reshuffled every epoch.

    A step has `per_step` images, of which process `rank` gets its share. Order and augmentation are
    functions of (seed, position) alone, so that a run can be resumed at any step with the images it would
    have seen. The scale (released recipe) is sampled per step, to keep a batch of one size.
    """

    def __init__(self, data, start: int, stop: int, per_step: int, seed: list[int], mirror: bool, scale: bool,
                 rank: int = 0, processes: int = 1):
        self.data, self.start, self.stop, self.per_step = data, start, stop, per_step
        self.seed, self.mirror, self.scale = seed, mirror, scale
        self.share = per_step // processes
        self.offset = rank * self.share
        self._order = lru_cache(maxsize=2)(lambda epoch: self._rng(0, epoch).permutation(len(data)))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.share

    def __getitem__(self, k: int) -> tuple[np.ndarray, ...]:
        step, i = self.start + k // self.share, k % self.share
        k, scale = step * self.per_step + self.offset + i, 1.0
        if self.scale:
            r = self._rng(1, step).random()
            scale = 1.1 if r > 0.7 else 0.8 if r < 0.3 else 1.0
        mirror = self.mirror and self._rng(2, k).random() < 0.5
        return self.data.read(self.index(k), scale, mirror)

    def index(self, k: int) -> int:
        """Return the index in the data set of the image at position k (counted from step 0)."""
        epoch, i = divmod(k, len(self.data))
        return int(self._order(epoch)[i])

    def names(self, step: int) -> list[str]:
        """The images of one step, counted from 0, of all processes."""
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return [self.data.names[self.index(k)] for k in positions]

    def _rng(self, use: int, k: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, use, k])


def evenly_spaced_indices(total: int, count: int) -> np.ndarray:
    """`count` indices, or as many as there are, evenly spaced over `total`."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def read_ahead(
    read: Callable[[int], T], indices: Iterable[int], workers: int, batch_size: int = 1
) -> Iterator[T]:
    """Yield read(i) for every index, in order; `workers` threads read what comes next.

    At most workers + max(workers, batch_size) items are in flight or queued, whatever their size: a full-size
    pair of GTA5 takes 15 MB, and MindSpore's own reader would hold 140 of them. An error of read(i) is raised
    when item i is due.
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
    """The items of `data` at `indices` (default: all, in order), read ahead by `workers` threads, in batches.

    Yields tuples of Tensors; the last batch may be smaller. UserError for an item that cannot be read, once
    the batches before it are handed over.
    """
    indices = range(len(data)) if indices is None else indices
    items = read_ahead(data.__getitem__, indices, workers, batch_size)
    while group := list(islice(items, batch_size)):
        yield tuple(map(batch_of, zip(*group)))


def batch_of(arrays: Sequence[np.ndarray]) -> Tensor:
    """Arrays of one shape -> Tensor (N, ...); a single one, the usual case, is not copied."""
    return Tensor.from_numpy(np.stack(arrays) if len(arrays) > 1 else arrays[0][None])


def names_crc32(data) -> int:
    """A checksum of which images a data set has, in which order."""
    return zlib.crc32("\n".join(data.names).encode(errors="surrogateescape"))  # names of any encoding
