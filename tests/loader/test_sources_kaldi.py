"""Sources as a real Kaldi reads them: the same numbers, whatever the kind of value. Needs KALDI_ROOT."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.alignments import read_alignments
from kaldi_mpi.loader.posteriors import read_posteriors, to_pdf_posteriors
from tests.loader.test_alignments import tid_to_pdf
from tests.loader.test_posteriors import frames_of
from tests.loader.test_sources import read_all, write_kinds, write_whole_archives
from tests.paths import golden, kaldi_root

pytestmark = pytest.mark.kaldi


def kaldi(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(kaldi_root() / "src" / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def copied(source: str, folder: Path) -> dict[str, np.ndarray]:
    """What copy-feats makes of a source, read from the plain archive that it writes."""
    done = kaldi("featbin/copy-feats", source, f"ark:{folder}/copied.ark")
    assert done.returncode == 0, done.stderr
    return read_all(f"ark:{folder}/copied.ark")


def test_every_kind_of_value(tmp_path: Path) -> None:
    scp, expected = write_kinds(tmp_path)
    kaldis, ours = copied(f"scp:{scp}", tmp_path), read_all(scp)
    assert list(kaldis) == list(ours) == list(expected)
    for key, values in ours.items():
        np.testing.assert_array_equal(values, kaldis[key], err_msg=key)


def test_a_kaldi_program_as_the_command(tmp_path: Path) -> None:
    """Compressed by it, so that the bytes come from Kaldi, and its text as well."""
    expected = write_whole_archives(tmp_path)
    copy_feats, copy_matrix = kaldi_root() / "src/featbin/copy-feats", kaldi_root() / "src/bin/copy-matrix"
    for options in ("--compress=true", "--compress=true --compression-method=3", "--compress=false"):
        pipe = f"ark:{copy_feats} {options} scp:{tmp_path}/all.scp ark:- 2>/dev/null |"
        kaldis, ours = copied(pipe, tmp_path), read_all(pipe)
        assert list(ours) == list(expected)
        for key, values in ours.items():
            np.testing.assert_array_equal(values, kaldis[key], err_msg=key)
    (tmp_path / "one.mat").write_bytes((tmp_path / "all.ark").read_bytes()[3:])
    lines = [
        f"u{i} {copy_matrix} --binary={b} {tmp_path}/one.mat - 2>/dev/null |\n" for i, b in enumerate(("true", "false"))
    ]
    (tmp_path / "feats.scp").write_text("".join(lines))
    kaldis, ours = copied(f"scp:{tmp_path}/feats.scp", tmp_path), read_all(tmp_path / "feats.scp")
    for key, values in ours.items():
        np.testing.assert_array_equal(values, kaldis[key], err_msg=key)


@pytest.mark.parametrize("value", ["-", "[0:15]", "[2:1]", "[12:13]", "[0:1,0:5]", "[0:1,2:1]", "[1]", "[:,]", "]"])
def test_what_kaldi_refuses_is_refused(value: str, tmp_path: Path) -> None:
    write_kinds(tmp_path)
    (tmp_path / "feats.scp").write_text(f"utt {value if value == '-' else f'{tmp_path}/FM.mat{value}'}\n")
    assert kaldi("featbin/copy-feats", f"scp:{tmp_path}/feats.scp", "ark:/dev/null").returncode != 0
    with pytest.raises(DataError):
        read_all(tmp_path / "feats.scp")


def test_text_of_a_kaldi_program_to_the_last_bit(tmp_path: Path) -> None:
    """Numbers with more digits than a float has, half-way cases among them, as Kaldi's reader rounds them."""
    numbers = [
        "0.1",
        "1e-40",
        "16777217",
        "1.00000017881393432617187499",
        "-3.4028234e38",
        "7.0064923e-46",
        "-0",
        "5e-324",
    ]
    (tmp_path / "feats.txt").write_text("utt [ " + " ".join(numbers[:6]) + "\n 1 2 3 4 5 -0 ]\n")
    ours = read_all(f"ark:{tmp_path}/feats.txt")["utt"]
    np.testing.assert_array_equal(
        ours.view(np.int32), copied(f"ark,t:{tmp_path}/feats.txt", tmp_path)["utt"].view(np.int32)
    )


def test_alignments_and_posteriors(tmp_path: Path) -> None:
    model, ali = golden("trans.mdl"), golden("ali.ark")
    pipe = f"ark:{kaldi_root()}/src/bin/ali-to-pdf {model} ark:{ali} ark,t:- 2>/dev/null |"
    pdfs = read_alignments(pipe)
    assert len(pdfs) == len(read_alignments(ali)) > 0
    for text in ("ark:", "ark,t:"):
        assert kaldi("bin/ali-to-post", f"ark:{ali}", f"{text}{tmp_path}/post").returncode == 0
        # Mixed with itself moved by a frame, so that frames have several ids, some of the same pdf.
        one = read_posteriors(tmp_path / "post")
        lines = []
        for key, posterior in one.items():
            tids = posterior.ids.tolist()
            frames = [f"[ {a} 0.7 {b} 0.2 {a} 0.1 ]" for a, b in zip(tids, [*tids[1:], tids[0]], strict=True)]
            lines.append(f"{key} {' '.join(frames)}\n")
        (tmp_path / "mixed").write_text("".join(lines))
        assert kaldi("bin/post-to-pdf-post", model, f"ark:{tmp_path}/mixed", f"{text}{tmp_path}/pdfs").returncode == 0
        kaldis = read_posteriors(tmp_path / "pdfs")
        ours = to_pdf_posteriors(read_posteriors(tmp_path / "mixed"), tid_to_pdf())
        assert list(ours) == list(kaldis)
        for key, posterior in ours.items():
            got, want = frames_of(posterior), [sorted(frame) for frame in frames_of(kaldis[key])]
            assert [[i for i, _ in frame] for frame in got] == [[i for i, _ in frame] for frame in want]
            tolerance = 0.0 if text == "ark:" else 1e-6  # text has seven digits
            np.testing.assert_allclose(
                [w for frame in got for _, w in frame], [w for frame in want for _, w in frame], rtol=0, atol=tolerance
            )
