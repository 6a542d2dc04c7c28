"""What training and evaluation share: predictions of G, confusion matrix, re-estimated BN statistics."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import NUM_CLASSES
from dataset.file_lists import evenly_spaced_indices
from dataset.pipeline import batch_of, batches, read_ahead
from model.CLAN_G import Res_Deeplab
from model.upsample import up
from utils.metrics import confusion_matrix
from utils.system import interrupt, parallel
from utils.system.device import assign


class Predict(nn.Cell):
    """Compute trainIds (N, H, W) int32 of images (N, 3, h, w) for size (H, W), as one graph to export."""

    def __init__(self, net_G: Res_Deeplab, size: tuple[int, int], classifier: str = "sum"):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net_G, self.size, self.classifier = net_G, size, classifier

    def construct(self, x):
        return best_class(self.net_G(x), self.size, self.classifier)


def best_class(logits: tuple[Tensor, Tensor], size: tuple[int, int], classifier: str = "sum") -> Tensor:
    """Return trainIds (N, H, W) int32 for size (H, W), by C1, C2 or the sum of their logits (N, C, h, w)."""
    C1, C2 = logits
    chosen = C1 if classifier == "1" else C2 if classifier == "2" else C1 + C2
    return ops.Argmax(axis=1, output_type=mindspore.int32)(up(chosen, size))


def evaluate(
    net_G: Res_Deeplab, data: cityscapesDataSet, classifier: str = "sum", batch_size: int = 1,
    workers: int = 4, each: Callable[[int, np.ndarray, np.ndarray, tuple], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """Return the confusion matrix (C, C) int64 of net_G over `data`: rows ground truth, columns prediction.

    `each` is called with what `predictions` yields for every image. Several processes share the images; all
    get the complete matrix.
    """
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    mine = parallel.indices_of_rank(len(data))
    items = ((i, *item) for i, item in zip(mine, read_ahead(data.__getitem__, mine, workers, batch_size)))
    for i, label, trainIds, logits in predictions(net_G, items, len(mine), classifier, batch_size):
        confusion += confusion_matrix(label, trainIds)
        if each:
            each(i, label, trainIds, logits)
    return parallel.all_reduce_sum(confusion)


def predictions(
    net_G: Res_Deeplab, items: Iterator[tuple], count: int, classifier: str, batch_size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, tuple[Tensor, Tensor]]]:
    """Yield index, label or image, trainIds (H, W) at its size and logits of C1 and C2, (1, C, h, w) each.

    items: index, input (3, h, w) and label (H, W) or image (H, W, 3); `count` of them, for the progress bar.
    They are computed in batches and in evaluation mode, which ends with the iteration. Only the upsampling,
    outside the network's graph, depends on the size of an image or label: the graph is compiled once.
    """
    training = net_G.training
    net_G.set_train(False)
    with parallel.progress(total=count, desc="predict", unit="image", leave=False) as bar:
        while group := list(islice(items, batch_size)):
            C1, C2 = net_G(batch_of([x for _, x, _ in group]))
            for k, (i, _, shown) in enumerate(group):
                logits = C1[k : k + 1], C2[k : k + 1]
                yield i, shown, best_class(logits, shown.shape[:2], classifier).asnumpy()[0], logits
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
