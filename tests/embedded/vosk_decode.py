"""Decoding a data directory with Vosk, as a program of its own.

``python -m tests.embedded.vosk_decode [--mbr] VOSK_DIR DATA_DIR [UTTERANCE...]`` prints one JSON object:
utterance -> words. It must be a program: Vosk's library carries OpenFst, which does not go together with the
embedded back end's wheels in one process.

The words are those of the best path or, with ``--mbr``, those that minimise the expected word errors, which
is what Vosk's users get. Vosk scales the lattice's graph costs by `GRAPH_SCALE` before either.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.wave import read_utterances
from kaldi_mpi.errors import ConfigError

GRAPH_SCALE = 0.9


def decode(
    vosk_dir: str, data_dir: str, utterances: Sequence[str] | None = None, *, mbr: bool = False
) -> dict[str, list[str]]:
    """Decode utterances of a data directory, all by default; see the module's text.

    Raises:
        ConfigError: Vosk is not installed, or cannot load the model.
        DataError: audio that cannot be read.
    """
    try:
        import vosk
    except ImportError as error:
        raise ConfigError(f"Vosk cannot be imported ({error}): pip install 'kaldi-mpi[vosk]'") from error

    vosk.SetLogLevel(-1)
    try:
        model = vosk.Model(model_path=str(vosk_dir))
    except Exception as error:
        raise ConfigError(f"{vosk_dir}: Vosk cannot load the model") from error
    data = DataDir(data_dir)
    results = {}
    for key, samples, rate in read_utterances(data, list(utterances or data.utterances)):
        recogniser = vosk.KaldiRecognizer(model, rate)
        recogniser.SetMaxAlternatives(0 if mbr else 1)
        # All at once: Vosk looks for the end of an utterance after each call only, so that none is cut.
        recogniser.AcceptWaveform(np.asarray(samples, dtype="<i2").tobytes())
        answer = json.loads(recogniser.FinalResult())
        results[key] = (answer if mbr else answer["alternatives"][0])["text"].split()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vosk_dir")
    parser.add_argument("data_dir")
    parser.add_argument("utterance", nargs="*")
    parser.add_argument("--mbr", action="store_true")
    chosen = parser.parse_args()
    answers = decode(chosen.vosk_dir, chosen.data_dir, chosen.utterance or None, mbr=chosen.mbr)
    json.dump(answers, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
