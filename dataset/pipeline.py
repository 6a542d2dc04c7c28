"""Parallel reading with mindspore.dataset: endless and shuffled for training, one pass for scoring."""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache

import mindspore
import numpy as np

from utils.errors import UserError


class Stream:
    """The pictures of steps start, …, stop - 1 of an endless walk through `data`, shuffled anew each epoch.

    A step has `per_step` pictures, of which process `rank` gets its share. Order and augmentation are
    functions of (seed, position) alone, so that a run can go on at any step with the pictures it would have
    seen. The scale (released recipe) is drawn per step, to keep a batch of one size.
    """

    def __init__(
        self,
        data,
        start: int,
        stop: int,
        per_step: int,
        seed: list[int],
        mirror: bool,
        scale: bool,
        rank: int = 0,
        processes: int = 1,
    ):
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
        """Which picture of the data set stands at position k (counted from step 0)."""
        epoch, i = divmod(k, len(self.data))
        return int(self._order(epoch)[i])

    def names(self, step: int) -> list[str]:
        """The pictures of one step, counted from 0, of all processes."""
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return [self.data.names[self.index(k)] for k in positions]

    def _rng(self, use: int, k: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, use, k])


def spread(total: int, count: int) -> np.ndarray:
    """`count` indices, or as many as there are, spread evenly over `total`."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def batches(data, batch_size: int, workers: int, indices: Sequence[int] | None = None) -> Iterator[tuple]:
    """The items of `data` at `indices` (default: all, in order), read ahead by `workers` threads, in batches.

    Yields tuples of Tensors. An error about a file comes out as the UserError it was.
    """
    errors: dict[int, UserError] = {}
    indices = range(len(data)) if indices is None else indices
    if not len(indices):  # more processes than pictures
        return
    first = data[0]

    class Items:
        def __len__(self):
            return len(indices)

        def __getitem__(self, i):
            try:
                return data[indices[i]]
            except UserError as error:
                errors[i] = error  # raised when it is its turn: the batches before it are read ahead
                return first

    columns = [f"column{i}" for i in range(len(first))]
    pipeline = mindspore.dataset.GeneratorDataset(
        Items(),
        columns,
        shuffle=False,
        python_multiprocessing=False,
        num_parallel_workers=min(workers, len(indices), os.cpu_count()),
    )
    iterator = pipeline.batch(batch_size).create_tuple_iterator(num_epochs=1, do_copy=False)
    try:
        for k, batch in enumerate(iterator):
            for i in range(k * batch_size, (k + 1) * batch_size):
                if i in errors:
                    raise errors[i]
            yield batch
    except RuntimeError:
        if errors:
            raise min(errors.items())[1] from None
        raise
