"""A trained model as a directory that the Vosk speech recognition toolkit loads.

`write_vosk_dir` lays out ``am``, ``conf`` and ``graph`` (Vosk's second layout). Vosk holds Kaldi's own online
nnet3 decoder; networks that look forward without limit, such as bidirectional ones, cannot be run by it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kaldi_mpi.embedded.decode import DecodeOptions
from kaldi_mpi.errors import DataError

_FILES = {
    "HCLG.fst": "graph/HCLG.fst",
    "words.txt": "graph/words.txt",
}


def write_vosk_dir(
    model_dir: str | Path,
    graph_dir: str | Path,
    mfcc_conf: str | Path,
    out_dir: str | Path,
    *,
    options: DecodeOptions | None = None,
    max_active: int = 7000,
) -> None:
    """Write a Vosk model directory.

    Args:
        model_dir: with ``final.mdl``, an nnet3 model over plain MFCCs (no CMVN, no i-vectors).
        graph_dir: with HCLG.fst, words.txt and phones/silence.csl.
        mfcc_conf: compute-mfcc-feats options of the model's features.
        out_dir: is made.
        options: beams and acoustic scale.
        max_active: limit on active states.

    Raises:
        DataError: a file is missing, or the model normalises its features.
    """
    chosen = options or DecodeOptions()
    model, graph, out = Path(model_dir), Path(graph_dir), Path(out_dir)
    cmvn_opts = model / "cmvn_opts"
    if cmvn_opts.exists() and "--norm-means=false" not in cmvn_opts.read_text(encoding="utf-8"):
        raise DataError("Vosk cannot normalise features by speaker", file=str(cmvn_opts))
    for folder in ("am", "conf", "graph/phones"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _copy(model / "final.mdl", out / "am" / "final.mdl")
    for source, target in _FILES.items():
        _copy(graph / source, out / target)
    _copy(Path(mfcc_conf), out / "conf" / "mfcc.conf")
    try:
        silence = (graph / "phones" / "silence.csl").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise DataError("cannot read the silence phones", file=str(graph / "phones" / "silence.csl")) from error
    lines = [
        f"--beam={chosen.beam}",
        f"--lattice-beam={chosen.lattice_beam}",
        f"--acoustic-scale={chosen.acwt}",
        f"--max-active={max_active}",
        "--frame-subsampling-factor=1",
        f"--endpoint.silence-phones={silence}",
    ]
    (out / "conf" / "model.conf").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copy(source, target)
    except OSError as error:
        raise DataError(f"cannot copy: {error.strerror or error}", file=str(source)) from error
