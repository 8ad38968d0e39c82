"""Diagonal-covariance GMMs of HMM states: likelihoods, statistics, re-estimation, splitting.

Written in numpy, not with kaldi-hmm-gmm's AmDiagGmm, for three reasons: a call per frame into the wheel is a
hundred times slower than matrix products over whole utterances, its accumulators cannot be filled from
sums, and its splitting draws from a generator that cannot be seeded. The formulas are those of Kaldi's
gmm-acc-stats-ali and gmm-est.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MIN_WEIGHT = 1e-5
_MIN_VARIANCE = 1e-3
_MIN_COUNT_TO_SPLIT = 20.0
_PERTURBATION = 0.01


@dataclass(frozen=True)
class Gmms:
    """The Gaussians of all pdfs in one table, in the order of the pdfs.

    Attributes:
        first: (num_pdfs + 1) int64; the Gaussians of pdf p are rows ``first[p]`` up to ``first[p + 1]``.
        weights: (G,) float32, summing to 1 within each pdf.
        means_invvars: (G, D) float32, means times inverse variances.
        inv_vars: (G, D) float32.
    """

    first: NDArray[np.int64]
    weights: NDArray[np.float32]
    means_invvars: NDArray[np.float32]
    inv_vars: NDArray[np.float32]

    @classmethod
    def single(cls, num_pdfs: int, mean: NDArray[np.float64], variance: NDArray[np.float64]) -> Gmms:
        """One and the same Gaussian for each pdf, as gmm-init-mono makes; mean and variance are (D,)."""
        inverse = 1.0 / np.maximum(variance, _MIN_VARIANCE)
        return cls(
            np.arange(num_pdfs + 1),
            np.ones(num_pdfs, dtype=np.float32),
            np.tile((mean * inverse).astype(np.float32), (num_pdfs, 1)),
            np.tile(inverse.astype(np.float32), (num_pdfs, 1)),
        )

    @property
    def num_pdfs(self) -> int:
        """Number of pdfs."""
        return len(self.first) - 1

    @property
    def num_gauss(self) -> int:
        """Number of Gaussians G over all pdfs."""
        return len(self.weights)

    @property
    def dim(self) -> int:
        """Dimension D of the features."""
        return int(self.inv_vars.shape[1])

    @functools.cached_property
    def gconsts(self) -> NDArray[np.float32]:
        """(G,) float32: the part of each Gaussian's weighted log-likelihood that needs no features."""
        inverse = self.inv_vars.astype(np.float64)
        constants = np.log(self.weights.astype(np.float64)) - 0.5 * (
            self.dim * np.log(2 * np.pi)
            - np.log(inverse).sum(axis=1)
            + (self.means_invvars.astype(np.float64) ** 2 / inverse).sum(axis=1)
        )
        result: NDArray[np.float32] = constants.astype(np.float32)
        return result

    def log_likelihoods(self, feats: NDArray[np.float32]) -> NDArray[np.float32]:
        """log p(x_t | pdf) as a (T, num_pdfs) float32 matrix, for features (T, D)."""
        # Gaussians by frames, so that the sums over a pdf's Gaussians run along contiguous rows.
        scores = self._linear() @ _with_squares(feats).T
        scores += self.gconsts[:, None]
        first = self.first[:-1]
        best = np.maximum.reduceat(scores, first, axis=0)
        scores -= np.repeat(best, np.diff(self.first), axis=0)
        np.exp(scores, out=scores)
        result = np.log(np.add.reduceat(scores, first, axis=0))
        result += best
        return np.ascontiguousarray(result.T)

    def accumulate(self, feats: NDArray[np.float32], pdfs: NDArray[np.int32]) -> GmmStatistics:
        """Statistics of frames (T, D) that are aligned with `pdfs` (T,)."""
        statistics = GmmStatistics.zeros(self)
        order = np.argsort(pdfs, kind="stable")
        bounds = np.searchsorted(pdfs[order], np.arange(self.num_pdfs + 1))
        linear, gconsts = self._linear(), self.gconsts
        for pdf in range(self.num_pdfs):
            rows = order[bounds[pdf] : bounds[pdf + 1]]
            if not len(rows):
                continue
            own = slice(int(self.first[pdf]), int(self.first[pdf + 1]))
            observed = _with_squares(feats[rows])
            scores = observed @ linear[own].T + gconsts[own]
            best = scores.max(axis=1, keepdims=True)
            posteriors = np.exp(scores - best)
            total = posteriors.sum(axis=1, keepdims=True)
            posteriors /= total
            statistics.occupancy[own] = posteriors.sum(axis=0, dtype=np.float64)
            statistics.sums[own] = posteriors.T @ observed
            statistics.log_like += float(np.sum(best + np.log(total), dtype=np.float64))
        statistics.frames = len(pdfs)
        return statistics

    def estimate(self, statistics: GmmStatistics, *, min_occupancy: float = 10.0) -> Gmms:
        """Re-estimate weights, means and variances by maximum likelihood.

        Args:
            statistics: accumulated with these GMMs.
            min_occupancy: Gaussians with a smaller count are removed, but the last one of a pdf never is.
        """
        pdf_of = self._pdf_of()
        total = np.add.reduceat(statistics.occupancy, self.first[:-1])[pdf_of]
        count = np.diff(self.first)[pdf_of]
        share = np.where(total > 0, statistics.occupancy / np.where(total > 0, total, 1.0), 1.0 / count)
        good = (statistics.occupancy > min_occupancy) & (share > _MIN_WEIGHT)
        # A pdf none of whose Gaussians has enough frames keeps its largest, as it is.
        kept = good.copy()
        for pdf in np.flatnonzero(~np.logical_or.reduceat(good, self.first[:-1])):
            begin = int(self.first[pdf])
            kept[begin + int(np.argmax(statistics.occupancy[begin : self.first[pdf + 1]]))] = True
        occupancy = np.where(good, statistics.occupancy, 1.0)[:, None]
        mean = statistics.sums[:, : self.dim] / occupancy
        variance = np.maximum(statistics.sums[:, self.dim :] / occupancy - mean**2, _MIN_VARIANCE)
        means_invvars = np.where(good[:, None], mean / variance, self.means_invvars)[kept]
        inv_vars = np.where(good[:, None], 1.0 / variance, self.inv_vars)[kept]
        first = np.concatenate([[0], np.cumsum(np.add.reduceat(kept.astype(np.int64), self.first[:-1]))])
        share = np.maximum(share[kept], _MIN_WEIGHT)
        share /= np.repeat(np.add.reduceat(share, first[:-1]), np.diff(first))
        return Gmms(first, share.astype(np.float32), means_invvars.astype(np.float32), inv_vars.astype(np.float32))

    def split(self, occupancy: NDArray[np.float64], num_gauss: int, *, power: float, rng: np.random.Generator) -> Gmms:
        """Split Gaussians until there are `num_gauss`, or no pdf has frames enough for one more.

        Pdfs get Gaussians in proportion to their count to the `power`; within a pdf the heaviest Gaussian
        is halved, and the halves' means move apart by a hundredth of a random standard deviation.

        Args:
            occupancy: (num_pdfs,) frames of each pdf.
            num_gauss: wanted number over all pdfs.
            power: see above.
            rng: source of the perturbations.
        """
        targets = _split_targets(occupancy, np.diff(self.first), num_gauss, power)
        weights, means, variances = [], [], []
        for pdf in range(self.num_pdfs):
            own = slice(int(self.first[pdf]), int(self.first[pdf + 1]))
            pdf_weights = self.weights[own].astype(np.float64).tolist()
            pdf_variances = list(1.0 / self.inv_vars[own].astype(np.float64))
            pdf_means = list(self.means_invvars[own] * pdf_variances)
            while len(pdf_weights) < targets[pdf]:
                heaviest = int(np.argmax(pdf_weights))
                pdf_weights[heaviest] /= 2
                shift = _PERTURBATION * rng.standard_normal(self.dim) * np.sqrt(pdf_variances[heaviest])
                pdf_weights.append(pdf_weights[heaviest])
                pdf_variances.append(pdf_variances[heaviest])
                pdf_means.append(pdf_means[heaviest] - shift)
                pdf_means[heaviest] = pdf_means[heaviest] + shift
            weights += pdf_weights
            means += pdf_means
            variances += pdf_variances
        inverse = 1.0 / np.array(variances)
        return Gmms(
            np.concatenate([[0], np.cumsum(targets)]),
            np.array(weights, dtype=np.float32),
            (np.array(means) * inverse).astype(np.float32),
            inverse.astype(np.float32),
        )

    def select(self, pdfs: NDArray[np.int32]) -> Gmms:
        """The GMMs of some pdfs only, in the order given."""
        counts = np.diff(self.first)[pdfs]
        first = np.concatenate([[0], np.cumsum(counts)])
        rows = np.repeat(self.first[pdfs] - first[:-1], counts) + np.arange(first[-1])
        chosen = Gmms(first, self.weights[rows], self.means_invvars[rows], self.inv_vars[rows])
        chosen.__dict__["gconsts"] = self.gconsts[rows]  # not computed again for each utterance
        return chosen

    def _linear(self) -> NDArray[np.float32]:
        return np.concatenate([self.means_invvars, np.float32(-0.5) * self.inv_vars], axis=1)

    def _pdf_of(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(self.num_pdfs), np.diff(self.first))


@dataclass
class GmmStatistics:
    """Sums over frames for the Gaussians of a `Gmms`.

    Attributes:
        occupancy: (G,) float64, sums of posteriors.
        sums: (G, 2 D) float64, weighted sums of the features and of their squares.
        log_like: sum of the frames' log-likelihoods.
        frames: number of frames.
    """

    occupancy: NDArray[np.float64]
    sums: NDArray[np.float64]
    log_like: float = 0.0
    frames: int = 0

    @classmethod
    def zeros(cls, gmms: Gmms) -> GmmStatistics:
        """Statistics of no frames."""
        return cls(np.zeros(gmms.num_gauss), np.zeros((gmms.num_gauss, 2 * gmms.dim)))

    def add(self, other: GmmStatistics) -> None:
        """Add those of other frames."""
        self.occupancy += other.occupancy
        self.sums += other.sums
        self.log_like += other.log_like
        self.frames += other.frames


def _with_squares(feats: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([feats, np.square(feats)], axis=1)


def _split_targets(
    occupancy: NDArray[np.float64], counts: NDArray[np.int64], num_gauss: int, power: float
) -> list[int]:
    """Number of Gaussians wanted for each pdf; never less than it has."""
    targets = [int(count) for count in counts]
    queue = [(-(float(occ) ** power) / n, pdf) for pdf, (occ, n) in enumerate(zip(occupancy, targets, strict=True))]
    heapq.heapify(queue)
    total = sum(targets)
    while total < num_gauss and queue:
        _, pdf = heapq.heappop(queue)
        if occupancy[pdf] < (targets[pdf] + 1) * _MIN_COUNT_TO_SPLIT:
            continue  # never looked at again: its Gaussians would have too few frames each
        targets[pdf] += 1
        total += 1
        heapq.heappush(queue, (-(float(occupancy[pdf]) ** power) / targets[pdf], pdf))
    return targets
