"""What training and evaluation share: predictions of G, confusion matrix, re-estimated BN statistics."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from dataset.classes import NUM_CLASSES
from dataset.file_lists import evenly_spaced_indices
from dataset.images import Images
from dataset.pipeline import batch_of, batches, read_ahead
from model.CLAN_G import Res_Deeplab
from model.upsample import up
from utils.metrics import confusion_matrix
from utils.softmax import softmax
from utils.system import interrupt, parallel
from utils.system.device import assign
from utils.system.errors import UserError

argmax = ops.Argmax(axis=1, output_type=mindspore.int32)
mirror = ops.ReverseV2(axis=[3])
AVERAGED_PIXELS = 2**24  # of an image whose probabilities are averaged: those of 19 classes take 1.3 GB
STRIP = 256  # rows: a softmax takes several times the memory of its logits


class Predict(nn.Cell):
    """Compute trainIds (N, H, W) int32 of images (N, 3, h, w) for size (H, W), as one graph to export."""

    def __init__(self, net_G: Res_Deeplab, size: tuple[int, int], classifier: str = "sum"):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net_G, self.size, self.classifier = net_G, size, classifier

    def construct(self, x):
        return best_class(self.net_G(x), self.size, self.classifier)


def best_class(logits: tuple[Tensor, Tensor], size: tuple[int, int], classifier: str = "sum") -> Tensor:
    """Return trainIds (N, H, W) int32 for size (H, W), by C1, C2 or the sum of their logits (N, C, h, w)."""
    return argmax(logits_at(logits, size, classifier))


def logits_at(logits: tuple[Tensor, Tensor], size: tuple[int, int], classifier: str) -> Tensor:
    """Return the logits of C1, C2 or their sum for size (H, W), (N, C, H, W) float32."""
    C1, C2 = logits
    return up(C1 if classifier == "1" else C2 if classifier == "2" else C1 + C2, size)


def best_mean_class(views: list[tuple], size: tuple[int, int], classifier: str, flip: bool) -> Tensor:
    """Return trainIds (1, H, W) int32 by the mean over views of the probabilities at size (H, W).

    views: logits of C1 and C2 (1, C, h, w) for each input of `read_views`. A single view is `best_class`.
    """
    if len(views) == 1:
        return best_class(views[0], size, classifier)
    tops = range(0, size[0], STRIP)
    totals = [0] * len(tops)
    for n, logits in enumerate(views):
        logits = logits_at(logits, size, classifier)
        for k, top in enumerate(tops):
            p = softmax(logits[:, :, top : top + STRIP])
            totals[k] += mirror(p) if flip and n >= len(views) // 2 else p
    return ops.concat([argmax(total) for total in totals], axis=1)


def evaluate(
    net_G: Res_Deeplab, data: Images, classifier: str = "sum", batch_size: int = 1,
    workers: int = 4, each: Callable[[int, np.ndarray, np.ndarray, tuple], None] | None = None,
    scales: tuple[float, ...] = (1.0,), flip: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return the confusion matrix (C, C) int64 of net_G over `data`: rows ground truth, columns prediction.

    `each` is called with what `predictions` yields for every image. scales, flip: see `read_views`. Several
    processes share the images; all get the complete matrix.
    """
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    mine = parallel.indices_of_rank(len(data))
    items = read_ahead(lambda i: read_views(data, i, scales, flip), mine, workers, batch_size)
    for i, label, trainIds, logits in predictions(net_G, items, len(mine), classifier, batch_size, flip):
        confusion += confusion_matrix(label, trainIds)
        if each:
            each(i, label, trainIds, logits)
    return parallel.all_reduce_sum(confusion)


def read_views(
    data: Images, i: int, scales: tuple[float, ...] = (1.0,), flip: bool = False
) -> tuple[int, list[np.ndarray], np.ndarray]:
    """Return i, the inputs (3, h, w) for item i of `data`, and its label (H, W) or image (H, W, 3).

    The inputs are the image at each of `scales` and, with `flip`, their mirror images after them. UserError
    if there are several and the label or image, at whose size they are averaged, exceeds AVERAGED_PIXELS.
    """
    inputs, shown = data.read_scales(i, scales)
    if flip:
        inputs += [np.ascontiguousarray(x[:, :, ::-1]) for x in inputs]
    height, width = shown.shape[:2]
    if len(inputs) > 1 and height * width > AVERAGED_PIXELS:
        raise UserError(f"{data.images[i]}: {width} x {height} pixels are too many for --scales and --flip; "
                        "make it smaller or leave them out")
    return i, inputs, shown


def predictions(
    net_G: Res_Deeplab, items: Iterator[tuple], count: int, classifier: str, batch_size: int, flip: bool
) -> Iterator[tuple[int, np.ndarray, np.ndarray, tuple[Tensor, Tensor]]]:
    """Yield index, label or image, trainIds (H, W) at its size and logits of C1 and C2, (1, C, h, w) each.

    items: from `read_views`; `count` of them, for the progress bar. The logits are those of the first scale.
    They are computed in batches and in evaluation mode, which ends with the iteration. Only the upsampling,
    outside the network's graph, depends on the size of an image or label: the graph is compiled once per
    scale.
    """
    training = net_G.training
    net_G.set_train(False)
    with parallel.progress(total=count, desc="predict", unit="image", leave=False) as bar:
        while group := list(islice(items, batch_size)):
            computed = [net_G(batch_of(same)) for same in zip(*(inputs for _, inputs, _ in group))]
            for k, (i, _, shown) in enumerate(group):
                views = [(C1[k : k + 1], C2[k : k + 1]) for C1, C2 in computed]
                trainIds = best_mean_class(views, shown.shape[:2], classifier, flip).asnumpy()[0]
                yield i, shown, trainIds, views[0]
                bar.update()
    net_G.set_train(training)


def adapt_bn(net_G: Res_Deeplab, data: Sequence, count: int, batch_size: int = 1, workers: int = 4) -> None:
    """Replace batch norm's running statistics by the mean over batches of `count` images of `data`.

    Before each batch the statistics are set to zero: a pass in training mode then adds 0.1 of the batch's
    own. Batches are weighted by their images, as the last may have fewer. Several processes share them.
    """
    statistics = [p for p in net_G.get_parameters() if p.name.endswith(("moving_mean", "moving_variance"))]
    indices = evenly_spaced_indices(len(data), count)  # over all cities
    cuts = range(0, len(indices), batch_size)
    mine = [i for k in parallel.indices_of_rank(len(cuts)) for i in indices[cuts[k] : cuts[k] + batch_size]]
    total = np.zeros(sum(p.size for p in statistics))
    training = net_G.training
    net_G.set_train(True)
    for images, *_ in batches(data, batch_size, workers, mine):
        if parallel.processes() == 1:
            interrupt.exit_if_pending()
        for p in statistics:
            assign(p, np.zeros(p.shape))
        net_G(images)
        total += len(images) * np.concatenate([p.asnumpy() for p in statistics]) / 0.1
    net_G.set_train(training)
    mean = parallel.all_reduce_sum(total) / len(indices)
    for p, part in zip(statistics, np.split(mean, np.cumsum([p.size for p in statistics])[:-1])):
        assign(p, part)
