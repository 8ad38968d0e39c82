"""The LDA-like transform at the input of a network: statistics and estimate.

Formulas: Kaldi's nnet-get-feature-transform with its defaults, which is how train_rnn.py calls it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class LdaStats:
    """Statistics of feature vectors by class, in float64.

    Attributes:
        counts: (num_classes,) vectors seen.
        sums: (num_classes, dim).
        squares: (dim, dim), the sum of outer products over all classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        self.counts = np.zeros(num_classes)
        self.sums = np.zeros((num_classes, dim))
        self.squares = np.zeros((dim, dim))

    def arrays(self) -> list[NDArray[np.float64]]:
        """The three arrays themselves, to be summed over learners in place."""
        return [self.counts, self.sums, self.squares]

    def __iadd__(self, other: LdaStats) -> LdaStats:
        for mine, theirs in zip(self.arrays(), other.arrays(), strict=True):
            mine += theirs
        return self

    def accumulate(self, feats: NDArray[Any], classes: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
        """Add vectors `feats` (n, dim) of `classes` (n,); those whose class is negative are left out.

        Args:
            weights: (n,), how much each vector counts; None: 1.

        Raises:
            ValueError: a class beyond the number of classes, or shapes that do not fit.
        """
        if feats.shape != (len(classes), self.sums.shape[1]):
            raise ValueError(f"feats {feats.shape} for {len(classes)} classes of dim {self.sums.shape[1]}")
        kept = np.flatnonzero(classes >= 0)
        if not len(kept):
            return
        order = kept[np.argsort(classes[kept], kind="stable")]
        data, classes = feats[order].astype(np.float64), classes[order]
        if classes[-1] >= len(self.counts):
            raise ValueError(f"class {classes[-1]} of {len(self.counts)}")
        present, begins, counts = np.unique(classes, return_index=True, return_counts=True)
        if weights is None:
            self.counts[present] += counts
            self.sums[present] += np.add.reduceat(data, begins, axis=0)
            self.squares += data.T @ data
            return
        weight = weights[order].astype(np.float64)
        weighted = data * weight[:, None]
        self.counts[present] += np.add.reduceat(weight, begins)
        self.sums[present] += np.add.reduceat(weighted, begins, axis=0)
        self.squares += weighted.T @ data

    def estimate(
        self,
        dim: int = -1,
        within_class_factor: float = 0.001,
        max_singular_value: float = 5.0,
        remove_offset: bool = True,
    ) -> NDArray[np.float32]:
        """The transform: (dim, input dim + 1) float32, the last column is the offset.

        Directions of the discriminant, of which each is scaled to have the variance `within_class_factor`
        + its between-class variance instead of 1 + that, so that directions which tell classes apart weigh
        more; singular values of the whole are limited to `max_singular_value`.

        Args:
            dim: rows; not positive: all.

        Raises:
            ValueError: no data.
        """
        total = self.counts.sum()
        if total <= 0:
            raise ValueError("no frames: the LDA transform cannot be estimated")
        mean = self.sums.sum(axis=0) / total
        covariance = self.squares / total - np.outer(mean, mean)
        seen = self.counts > 0
        means = self.sums[seen] / self.counts[seen, None]
        between = (means * (self.counts[seen, None] / total)).T @ means - np.outer(mean, mean)
        within = covariance - between
        try:
            root = np.linalg.cholesky(within)
        except np.linalg.LinAlgError:
            within += np.eye(len(within)) * (1e-3 * np.trace(within) / len(within))
            root = np.linalg.cholesky(within)
        whiten = np.linalg.inv(root)
        directions, variances, _ = np.linalg.svd(whiten @ between @ whiten.T)
        matrix = directions.T @ whiten
        matrix *= np.sqrt((within_class_factor + variances) / (1.0 + variances))[:, None]
        matrix = matrix[: dim if dim > 0 else len(matrix)]
        if max_singular_value > 0:
            u, values, vt = np.linalg.svd(matrix, full_matrices=False)
            if values[0] > max_singular_value:
                matrix = (u * np.minimum(values, max_singular_value)) @ vt
        if remove_offset:
            matrix = np.column_stack([matrix, -matrix @ mean])
        return matrix.astype(np.float32)
