"""What papers count on Inception beside its distance: the inception score, and any metric on a part of its features, as sFID is."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.metrics.distribution import GatheredFeatures, Metric
from ldm.metrics.features import Classifier, FeatureNet


def inception_score(logits: Tensor, block: int = 5000) -> Tensor:
    """exp E KL(p(y|x) || p(y)) () of logits (N, K), the mean over blocks of so many in their order, in float64 (Salimans et al. 2016)."""
    scores = []
    for part in logits.double().split(block):
        log_p = part.log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean()


class InceptionScore(GatheredFeatures):
    """`inception_score`: by the network's own classifier, the mean over blocks of so many samples in the order of their seeds."""

    names = ("inception_score",)

    def __init__(self, net: Classifier, reference: Tensor, block: int = 5000):
        super().__init__(net, reference)
        self.classify, self.block = net.classify, block

    def update(self, features: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        super().update(self.classify(features))

    def compute(self) -> dict[str, float]:
        return {"inception_score": inception_score(self.values(), self.block).item()}


class FeatureSlice:
    """A part of a network's features under a name of its own, to a metric; never called."""

    def __init__(self, name: str, num_features: int, net: FeatureNet):
        self.name, self.num_features, self.resize, self.identity = name, num_features, net.resize, net.identity

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError("the whole network makes the features")


class SlicedMetric:
    """A metric of the features start..stop-1 alone, under a network's name of their own."""

    def __init__(
        self,
        net: FeatureNet,
        reference: Tensor,
        metric: Callable[[FeatureNet, Tensor], Metric],
        name: str,
        start: int,
        stop: int,
    ):
        self.columns = slice(start, stop)
        self.metric = metric(FeatureSlice(name, stop - start, net), reference[:, self.columns])

    def update(self, features: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        self.metric.update(features[:, self.columns], label, caption)

    def compute(self) -> dict[str, float]:
        return self.metric.compute()

    def reset(self) -> None:
        self.metric.reset()
