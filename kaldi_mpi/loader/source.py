"""What minibatches are read from: units that lie in archives and are read independently of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Source(Protocol):
    """Utterances of a corpus (`Corpus`) or examples of a directory (`Examples`).

    A unit is one run of bytes of one archive. The arrays have one element a unit, and are read-only.

    Attributes:
        num_units: how many there are, at least 1.
        feat_dim: columns of the features.
        ivector_dim: elements of the i-vector of each chunk; 0 where there is none.
        num_targets: most labels of a frame.
        has_weights: whether labels have weights other than 1.
        num_frames: labelled frames of each unit, at least 1.
        total_frames: their sum.
        paths: the archives.
        file_of: the archive of each unit, an index into `paths`.
        begin: byte offset of each unit in its archive.
        end: byte offset behind each unit.
        unit_bytes: their difference; 0 for a unit whose bytes are those of the unit before (of a merged example).
        num_without_labels: units that were left out because they have no labels.
    """

    @property
    def num_units(self) -> int: ...
    @property
    def feat_dim(self) -> int: ...
    @property
    def ivector_dim(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def has_weights(self) -> bool: ...
    @property
    def num_frames(self) -> NDArray[np.int32]: ...
    @property
    def total_frames(self) -> int: ...
    @property
    def paths(self) -> Sequence[str]: ...
    @property
    def file_of(self) -> NDArray[np.int32]: ...
    @property
    def begin(self) -> NDArray[np.int64]: ...
    @property
    def end(self) -> NDArray[np.int64]: ...
    @property
    def unit_bytes(self) -> NDArray[np.int64]: ...
    @property
    def num_without_labels(self) -> int: ...

    def location_of(self, unit: int) -> tuple[str, str]:
        """The archive and the key of a unit; for messages."""
        ...
