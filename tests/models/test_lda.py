"""LDA statistics and transform."""

from __future__ import annotations

import numpy as np
import pytest

from kaldi_mpi.models import LdaStats


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 5, 400)
    feats = (rng.normal(size=(400, 4)) + 3 * rng.normal(size=(5, 4))[classes]) @ rng.normal(size=(4, 4))
    return (feats + 7).astype(np.float32), classes


def stats_of(feats: np.ndarray, classes: np.ndarray) -> LdaStats:
    stats = LdaStats(4, 6)
    stats.accumulate(feats, classes)
    return stats


def test_statistics() -> None:
    feats, classes = data()
    stats = stats_of(feats, classes)
    for c in range(6):
        assert stats.counts[c] == (classes == c).sum()
        assert np.allclose(stats.sums[c], feats[classes == c].sum(0), rtol=1e-6)
    assert np.allclose(stats.squares, feats.astype(np.float64).T @ feats)
    assert all(array.dtype == np.float64 for array in stats.arrays())


def test_parts_add_up() -> None:
    feats, classes = data()
    whole = stats_of(feats, classes)
    part = stats_of(feats[:123], classes[:123])
    part += stats_of(feats[123:], classes[123:])
    for a, b in zip(whole.arrays(), part.arrays(), strict=True):
        assert np.allclose(a, b)


def test_a_weight_counts_as_that_many_vectors() -> None:
    feats, classes = data()
    times = np.random.default_rng(2).integers(0, 4, 400)
    repeated = stats_of(feats.repeat(times, axis=0), classes.repeat(times))
    weighted = LdaStats(4, 6)
    weighted.accumulate(feats, classes, times.astype(np.float32))
    for a, b in zip(repeated.arrays(), weighted.arrays(), strict=True):
        assert np.allclose(a, b)


def test_negative_classes_are_left_out() -> None:
    feats, classes = data()
    classes[::3] = -1
    kept = stats_of(feats[classes >= 0], classes[classes >= 0])
    for a, b in zip(kept.arrays(), stats_of(feats, classes).arrays(), strict=True):
        assert np.allclose(a, b)
    assert stats_of(feats[:2], np.array([-1, -1])).counts.sum() == 0


def test_what_the_transform_does_to_variances() -> None:
    """Mean 0; within-class covariance diag(w), between-class diag(b) with w + b = factor + b/(w) scaled."""
    feats, classes = data()
    matrix = stats_of(feats, classes).estimate(within_class_factor=0.01, max_singular_value=0)
    assert matrix.shape == (4, 5) and matrix.dtype == np.float32
    y = feats @ matrix[:, :-1].T + matrix[:, -1]
    assert np.allclose(y.mean(0), 0, atol=1e-4)
    total = np.cov(y.T, bias=True)
    means = np.stack([y[classes == c].mean(0) for c in classes])
    between = np.cov(means.T, bias=True)
    within = total - between
    ratio = np.diag(between) / np.diag(within)
    assert np.all(np.diff(ratio) < 0), "the most discriminative direction comes first"
    assert np.allclose(np.diag(total), 0.01 + ratio, rtol=1e-3)
    assert np.abs(total - np.diag(np.diag(total))).max() < 1e-3


def test_dim_singular_values_and_offset() -> None:
    stats = stats_of(*data())
    full = stats.estimate(max_singular_value=0)
    assert np.allclose(stats.estimate(dim=2, max_singular_value=0), full[:2], atol=1e-5)
    assert stats.estimate(remove_offset=False).shape == (4, 4)
    limit = float(np.linalg.svd(full[:, :-1])[1][1])
    limited = stats.estimate(max_singular_value=limit)
    assert np.linalg.svd(limited[:, :-1])[1].max() == pytest.approx(limit, rel=1e-4)


def test_singular_covariance_is_smoothed() -> None:
    feats, classes = data()
    feats[:, 3] = 0.0
    assert np.isfinite(stats_of(feats, classes).estimate()).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="no frames"):
        LdaStats(4, 6).estimate()
    with pytest.raises(ValueError, match="class 6 of 6"):
        stats_of(np.zeros((2, 4), np.float32), np.array([6, 0]))
    with pytest.raises(ValueError, match=r"feats \(2, 3\) for 2 classes of dim 4"):
        stats_of(np.zeros((2, 3), np.float32), np.array([1, 0]))
