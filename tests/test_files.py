"""Small files of one number, which Kaldi's scripts leave beside their archives."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import read_number


def test_a_number_is_read_whatever_white_space_is_around_it(tmp_path: Path) -> None:
    path = tmp_path / "num_jobs"
    path.write_text(" -12 \n\n")
    assert read_number(path) == -12
    assert read_number(tmp_path / "none", 7) == 7


@pytest.mark.parametrize("content", [b"", b"four", b"1.5", b"1 2", b"\xff", b"9" * 10, b"3", "\u0663".encode()])
def test_anything_else_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "frames"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: a number of frames is expected, not '") as caught:
        read_number(path, what="a number of frames", low=4)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}/none: cannot read: No such file"):
        read_number(tmp_path / "none")
