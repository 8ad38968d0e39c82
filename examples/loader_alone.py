"""The loader alone: minibatches of a Kaldi data directory and its alignments, as NumPy arrays.

Neither Kaldi, PyTorch nor MPI is needed. Of several trainers each gives its `rank` and their number as `size`, and gets
its own part of each step. docs/loader.md tells what may stand in the directories and what order is promised.
Run: python examples/loader_alone.py data/train exp/tri3_ali
"""

import sys

from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader, read_alignments, to_pdfs

data_dir, ali_dir = sys.argv[1:]
tid_to_pdf = read_transition_model(f"{ali_dir}/final.mdl").tid_to_pdf
corpus = Corpus.open(f"{data_dir}/feats.scp", to_pdfs(read_alignments(ali_dir), tid_to_pdf))

chunks = ChunkShape(20, left=40, right=7)  # labelled frames, and context to each side
with MinibatchReader(corpus, chunks, 64, seed=0, num_epochs=2, rank=0, size=1) as reader:
    for minibatch in reader:  # feats (B, 67, D) float32; labels (B, 20) int64, -1 where there is none
        print(
            f"epoch {minibatch.epoch} step {minibatch.step}: features {minibatch.feats.shape},"
            f" labels {minibatch.labels.shape}, {minibatch.frames} labelled frames"
        )
    print(reader.counters())
