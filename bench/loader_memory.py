"""How much memory one rank's loader takes at its peak.

``python bench/loader_memory.py [--hours 100] [--folder FOLDER]`` writes a synthetic corpus (14 MB an hour, see
synthetic_corpus.py) and reads alignments, corpus and one epoch of minibatches as rank 0 of 2, with the default options,
in fresh processes. Each looks at the high-water mark of its resident memory (VmHWM) after its imports, and again
after each of these stages; what is added is the loader's.

    streamed     the corpus is opened with alignments that are read and mapped to pdf-ids one utterance at a time
    at once      all alignments are read, then mapped, then the corpus is opened
    given        the labels are in memory before the measurement begins, as a caller of the library may have them

``--folder`` keeps the corpus there for the next time. The last line of standard output is one JSON object; peak_mb
is that of `streamed`, in MB of 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from synthetic_corpus import NUM_PDFS, write_corpus

from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader, PdfAlignments, read_alignments, to_pdfs

BYTES_PER_HOUR = 15_000_000
MODES = ["streamed", "at once", "given"]


def status(field: str) -> float:
    """A figure of /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"bench/loader_memory.py: this system does not tell {field}")


def child(options: argparse.Namespace) -> dict[str, float]:
    """Measure in this process."""
    ali, tid_to_pdf = options.folder / "ali", np.arange(-1, NUM_PDFS, dtype=np.int32)
    labels: Any = to_pdfs(read_alignments(ali), tid_to_pdf) if options.child == "given" else None
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark begins anew
    before = status("VmHWM")
    result = {"before": before}
    if options.child == "at once":
        labels = to_pdfs(read_alignments(ali), tid_to_pdf)
        result["alignments"] = status("VmHWM") - before
    elif options.child == "streamed":
        labels = PdfAlignments(ali, tid_to_pdf).pairs()
    corpus = Corpus.open(options.folder / "feats.scp", labels)
    result["opened"] = status("VmHWM") - before
    if options.child == "at once":
        del labels  # the corpus has its own
    shape = ChunkShape(options.width, options.left, options.right)
    began, frames = time.perf_counter(), 0
    with MinibatchReader(
        corpus, shape, options.chunks, seed=0, rank=0, size=2, threads=options.threads, num_epochs=1
    ) as reader:
        for minibatch in reader:
            frames += minibatch.frames
            if options.frames and frames >= options.frames:
                break
        result["resident at the end"] = status("VmRSS") - before
        result["counted by the reader"] = reader.counters().memory / 1e6
    result["peak"] = status("VmHWM") - before
    result["frames"] = frames
    result["seconds"] = time.perf_counter() - began
    return result


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Peak memory of one rank's loader.")
    add = parser.add_argument
    add("--hours", type=float, default=100.0, help="of the corpus")
    add("--folder", type=Path, help="for the corpus; one that is there is used. By default a temporary one")
    add("--width", type=int, default=20, help="labelled frames of a chunk")
    add("--left", type=int, default=40, help="context before")
    add("--right", type=int, default=7, help="context after")
    add("--chunks", type=int, default=128, help="in a rank's minibatch")
    add("--threads", type=int, default=1, help="reader threads")
    add("--frames", type=int, default=0, help="stop after so many labelled frames; 0: at the epoch's end")
    add("--child", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Write the corpus and start the processes, or be one of them."""
    options = parse(sys.argv[1:])
    if options.child:
        print(json.dumps(child(options)))
        return 0
    kept = options.folder is not None
    folder = options.folder if kept else Path(tempfile.mkdtemp(prefix="loader_memory."))
    try:
        if not (folder / "ali" / "num_jobs").exists():
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < 2 * options.hours * BYTES_PER_HOUR:
                raise SystemExit(f"bench/loader_memory.py: too little space on the disk of {folder}")
            write_corpus(folder, options.hours)
        results: dict[str, Any] = {}
        for name in MODES:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--child", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name] = {key: round(value, 1) for key, value in json.loads(done.stdout).items()}
            print(f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in results[name].items()), flush=True)
    finally:
        if not kept:
            shutil.rmtree(folder)
    peak = results["streamed"]["peak"]
    print(json.dumps({"peak_mb": peak, "hours": options.hours, "cores": os.cpu_count(), **results}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KaldiMpiError as error:
        sys.exit(f"bench/loader_memory.py: {error}")
