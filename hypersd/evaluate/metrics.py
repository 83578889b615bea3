"""Distances between sets of pictures, and scores within one set, in float64 on features of any extractor.

No number here is called FID or CLIP score: those names belong to one particular network each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hypersd.errors import HypersdError


class Moments:
    """Running mean and covariance of features, float64, one batch at a time (Chan, Golub & LeVeque 1983)."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._root: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of (N, D) features."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Take in (N, D) features of any dtype and device."""
        x = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(x).all():
            raise HypersdError("the features hold NaN or infinity: a generated picture or the extractor is broken")
        if len(x) == 0:
            return
        mean = x.mean(0)
        centred = x - mean
        total = self.count + len(x)
        delta = mean - self.mean
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * len(x) / total)
        self.mean += delta * (len(x) / total)
        self.count = total
        self._root = None

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased; needs two samples."""
        if self.count < 2:
            raise HypersdError(f"a covariance needs at least 2 pictures, not {self.count}; ask for more samples")
        return self._scatter / (self.count - 1)

    @property
    def root(self) -> Tensor:
        """(D, D) float64, the symmetric square root of the covariance; kept until the next update."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            self._root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return self._root


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C2^1/2 C1 C2^1/2)^1/2): the squared 2-Wasserstein distance of two Gaussians
    (Dowson & Landau 1982). The symmetric form needs only eigenvalues of symmetric matrices, so rank-deficient
    covariances (fewer pictures than features) are no special case. Biased upwards at small N: compare at equal N.
    """
    c1, c2, root = first.covariance, second.covariance, second.root
    product = root @ c1 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(first: Tensor, second: Tensor, *, block: int = 1024) -> float:
    """Unbiased squared MMD of (N, D) and (M, D) features under k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018).

    Its mean is 0 for two samples of one distribution at every N, so a single value may be negative.
    """
    x, y = (features.detach().to("cpu", torch.float64) for features in (first, second))
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise HypersdError(f"a kernel distance needs at least 2 pictures on each side, not {n} and {m}")

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float((rows @ b.T / a.shape[1] + 1).pow(3).sum()) for rows in a.split(block))

    def diagonal(a: Tensor) -> float:
        return float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())

    within = (total(x, x) - diagonal(x)) / (n * (n - 1)) + (total(y, y) - diagonal(y)) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def diversity(features: Tensor) -> float:
    """Mean Euclidean distance between pictures of the same caption: (captions, samples, D) features."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise HypersdError(f"diversity needs (captions, at least 2 samples, D) features, not {tuple(features.shape)}")
    return float(torch.stack([torch.pdist(group).mean() for group in features.double()]).mean())


def object_recall(logits: Tensor, objects: Sequence[Sequence[int]]) -> Tensor:
    """(N,) float64: the share of a picture's captioned objects among its top-scored ones, as many as were asked for."""
    if len(logits) != len(objects):
        raise HypersdError(f"{len(logits)} pictures, but objects of {len(objects)} captions")
    shares = []
    for row, wanted in zip(logits, objects, strict=True):
        found = set(row.topk(len(wanted)).indices.tolist())
        shares.append(len(found & set(wanted)) / len(wanted) if wanted else float("nan"))
    return torch.tensor(shares, dtype=torch.float64)


def bootstrap_interval(
    values: Tensor | np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of independent values (N,), by resampling with replacement (Efron 1979)."""
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(0, len(x), len(x))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample(
    rows: Tensor, statistic: Callable[[Tensor], float] | None = None, *, resamples: int = 1000, seed: int = 0
) -> Tensor:
    """(1 + resamples,) float64: `statistic` of (N, ...), one row a caption, then of N rows drawn with replacement, over
    and over. What is drawn depends on N and `seed` alone: results for the same captions may be subtracted draw by draw.

    statistic: the mean without NaN unless given.
    """
    measure = statistic or (lambda rows: float(rows.double().nanmean()))
    rng, count = np.random.default_rng(seed), len(rows)
    drawn = (torch.from_numpy(rng.integers(0, count, count)) for _ in range(resamples))
    return torch.tensor([measure(rows), *(measure(rows[index]) for index in drawn)], dtype=torch.float64)


def paired_difference(
    first: Sequence[Tensor], second: Sequence[Tensor], *, level: float = 0.95
) -> tuple[float, float, float]:
    """(difference, low, high): the mean over the runs of `first` less that over the runs of `second`, with its
    interval. Each run is what `resample` gives for the same captions in the same order: one draw of captions for all
    runs, so what makes a caption hard cancels out.

    The interval has the draws' percentiles about their own mean, laid around the difference: captions drawn twice raise
    a Frechet distance, by unequal amounts on either side, so that the draws do not lie around what they are draws of.
    """
    counts = {len(run) for run in [*first, *second]}
    if not first or not second or len(counts) != 1 or counts <= {0, 1}:
        raise HypersdError(f"a paired comparison needs runs with the same draws, got {sorted(counts)} of them")
    one, two = (np.mean([run.double().numpy() for run in runs], axis=0) for runs in (first, second))
    difference = one - two
    spread = difference[1:] - difference[1:].mean()
    low, high = difference[0] + np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return float(difference[0]), float(low), float(high)
