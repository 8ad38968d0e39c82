"""Reading of Kaldi's training data: archives, alignments, chunks and minibatches.

The work is done by the C library in csrc/, without the GIL. A corpus is opened once, and any number of
readers take minibatches from it::

    labels = to_pdfs(read_alignments("exp/mono_ali"), transition_model.tid_to_pdf)
    corpus = Corpus.open("data/train_hires/feats.scp", labels)
    with MinibatchReader(corpus, ChunkShape(20, left=40, right=7), 64, seed=0, num_epochs=3) as reader:
        for minibatch in reader:
            ...  # minibatch.feats (B, 67, D), minibatch.labels (B, 20)
"""

from kaldi_mpi.formats.cmvn_options import CmvnOptions, parse_cmvn_opts
from kaldi_mpi.loader.alignments import PdfAlignments, read_alignments, to_pdfs
from kaldi_mpi.loader.chain_examples import ChainExamples
from kaldi_mpi.loader.chunks import Chunking, ChunkShape, MinibatchRule
from kaldi_mpi.loader.corpus import Corpus
from kaldi_mpi.loader.examples import Examples
from kaldi_mpi.loader.labels import Labels
from kaldi_mpi.loader.minibatch import Buffer, ChainSupervision, Minibatch, NumpyMinibatch, new_buffers
from kaldi_mpi.loader.plan import ChunkPlan, Position, Source
from kaldi_mpi.loader.posteriors import Posterior, read_posteriors, to_pdf_posteriors
from kaldi_mpi.loader.reader import Counters, MinibatchReader
from kaldi_mpi.loader.targets import Targets
from kaldi_mpi.loader.transforms import DeltaOptions, SpliceOptions, parse_delta_opts, parse_splice_opts

__all__ = [
    "Buffer",
    "ChainExamples",
    "ChainSupervision",
    "ChunkPlan",
    "ChunkShape",
    "Chunking",
    "CmvnOptions",
    "Corpus",
    "Counters",
    "DeltaOptions",
    "Examples",
    "Labels",
    "Minibatch",
    "MinibatchReader",
    "MinibatchRule",
    "NumpyMinibatch",
    "PdfAlignments",
    "Position",
    "Posterior",
    "Source",
    "SpliceOptions",
    "Targets",
    "new_buffers",
    "parse_cmvn_opts",
    "parse_delta_opts",
    "parse_splice_opts",
    "read_alignments",
    "read_posteriors",
    "to_pdf_posteriors",
    "to_pdfs",
]
