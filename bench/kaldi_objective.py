"""The objective by Kaldi's own code: nnet3-chain-train with a network that costs next to nothing.

The network is one affine component from ten inputs; its minibatch is one merged example, some times over. What a
minibatch takes is the difference between a run of several and a run of one: both compile and start.
"""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.formats.fst import Fst, write_fst
from tests.cegs_data import ChainData, line, write_cegs

INPUTS, MINIBATCHES = 10, 3


def kaldi_seconds(root: Path, fst: Fst, pdfs: int, sequences: int, frames: int, leaky: float) -> float:
    """CPU seconds of one thread for a minibatch: forward, numerator, denominator, backward."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_fst(folder / "den.fst", fst)
        (folder / "config").write_text(
            f"input-node name=input dim={INPUTS}\n"
            f"component name=affine type=AffineComponent input-dim={INPUTS} output-dim={pdfs} learning-rate=1e-5\n"
            "component-node name=affine component=affine input=input\n"
            "output-node name=output input=affine objective=linear\n"
        )
        _run(root, "nnet3bin/nnet3-init", str(folder / "config"), str(folder / "0.raw"))
        generator = np.random.default_rng(2)
        example = ChainData(
            generator.normal(size=(sequences, frames, INPUTS)).astype(np.float32),
            [line(generator, sequences * frames, pdfs)],
            frames,
            0,
            subsampling=1,
            labels=pdfs,
            deriv_weights=np.ones((sequences, frames), dtype=np.float32),
        )

        def seconds(count: int) -> float:
            write_cegs(folder / "cegs.ark", [(f"merged-{number}", example) for number in range(count)])
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            _run(
                root, "chainbin/nnet3-chain-train", "--use-gpu=no", f"--leaky-hmm-coefficient={leaky}",
                str(folder / "0.raw"), str(folder / "den.fst"), f"ark:{folder / 'cegs.ark'}", str(folder / "out.raw"),
            )  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        return (seconds(1 + MINIBATCHES) - seconds(1)) / MINIBATCHES


def _run(root: Path, program: str, *words: str) -> None:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(root / "src" / program), *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise KaldiMpiError(f"{program} failed: {done.stderr.strip()[-500:]}")
