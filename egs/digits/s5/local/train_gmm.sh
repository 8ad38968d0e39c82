#!/usr/bin/env bash
# From data/train to GMM-HMM alignments and decoding graphs.
#  With KALDI_ROOT: exp/mono, exp/mono_ali, exp/tri1, exp/tri1_ali by Kaldi's scripts.
#  Without: exp/mono, exp/mono_ali by the embedded back end. The files are the same.

# Begin configuration section.
nj=2
cmd=run.pl
totgauss=1000      # Gaussians of the monophone system
num_leaves=300     # of the triphone system's tree
tri_gauss=3000     # Gaussians of the triphone system
# End configuration section.

help_message="Usage: $0 [--nj N] [--cmd run.pl] [--totgauss N] [--num-leaves N] [--tri-gauss N]"

set -eu -o pipefail
. ./path.sh
. parse_options.sh

if [ $# -ne 0 ]; then echo "$help_message" >&2; exit 1; fi

local/prepare_dict.sh data/train

if [ -n "${KALDI_ROOT:-}" ]; then
  utils/prepare_lang.sh --position-dependent-phones false data/local/dict '<UNK>' data/local/lang data/lang
  arpa2fst --disambig-symbol='#0' --read-symbol-table=data/lang/words.txt data/local/lm/digits.arpa data/lang/G.fst

  steps/train_mono.sh --nj "$nj" --cmd "$cmd" --totgauss "$totgauss" data/train data/lang exp/mono
  steps/align_si.sh --nj "$nj" --cmd "$cmd" data/train data/lang exp/mono exp/mono_ali
  utils/mkgraph.sh data/lang exp/mono exp/mono/graph

  steps/train_deltas.sh --cmd "$cmd" "$num_leaves" "$tri_gauss" data/train data/lang exp/mono_ali exp/tri1
  steps/align_si.sh --nj "$nj" --cmd "$cmd" data/train data/lang exp/tri1 exp/tri1_ali
  utils/mkgraph.sh data/lang exp/tri1 exp/tri1/graph
  exit 0
fi

# One job each: they start their own processes.
run() { # LOG COMMAND...
  # shellcheck disable=SC2086 # $cmd may carry options
  $cmd --num-threads "$nj" "$@" || {
    grep -a '^ERROR' "$1" >&2 || tail -n 5 "$1" >&2
    exit 1
  }
}

kaldi-mpi prepare-lang --arpa data/local/lm/digits.arpa data/local/dict '<UNK>' \
  data/local/lang data/lang
run exp/mono/log/train.log \
  kaldi-mpi train-mono --nj "$nj" --totgauss "$totgauss" data/train data/lang exp/mono
run exp/mono_ali/log/align.log \
  kaldi-mpi align-si --nj "$nj" data/train data/lang exp/mono exp/mono_ali
run exp/mono/log/mkgraph.log \
  kaldi-mpi mkgraph data/lang exp/mono exp/mono/graph
grep -a -h -o 'done [0-9]*, retried.*' exp/mono_ali/log/align.log
