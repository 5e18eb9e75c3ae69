"""Further metrics on Inception: the inception score, and metrics on a slice of its features, such as sFID."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.metrics.distribution import GatheredFeatures, Metric
from ldm.metrics.features import Classifier, FeatureNet


def inception_score(logits: Tensor, block: int = 5000) -> Tensor:
    """Return the inception score exp E KL(p(y|x) || p(y)) (), in float64 (Salimans et al. 2016).

    logits: (N, K). The score is the mean over consecutive blocks of `block` samples.
    """
    scores = []
    for part in logits.double().split(block):
        log_p = part.log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean()


class InceptionScore(GatheredFeatures):
    """`inception_score` by the network's own classifier, over blocks of samples in the order of their seeds."""

    names = ("inception_score",)

    def __init__(self, net: Classifier, reference: Tensor, block: int = 5000):
        super().__init__(net, reference)
        self.classify, self.block = net.classify, block

    def update(self, features: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        super().update(self.classify(features))

    def compute(self) -> dict[str, float]:
        return {"inception_score": inception_score(self.values(), self.block).item()}


class FeatureSlice:
    """A feature network's name and size for a slice of its features, as a metric needs them; it is never called."""

    def __init__(self, name: str, num_features: int, net: FeatureNet):
        self.name, self.num_features, self.resize, self.identity = name, num_features, net.resize, net.identity

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError("the full network computes the features")


class SlicedMetric:
    """A metric on the features start..stop-1 alone, under a network name of its own."""

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
