#!/usr/bin/env bash
# Prepares data/train and data/test: a user's own Kaldi data directories, or a synthetic corpus.

# Begin configuration section.
train=        # data directory to train on; with --test
test=         # data directory to test on; with --train
nj=2          # processes for the synthetic corpus
seed=1        # of the synthetic corpus
hours=1.5     # about so much synthetic training speech
test_hours=0.3
# End configuration section.

help_message="Usage: $0 [--train DIR --test DIR]  # Kaldi data directories: wav.scp, text, utt2spk
   or: $0 [--hours H] [--test-hours H] [--seed S] [--nj N]  # digits spoken by espeak-ng"

set -eu -o pipefail
. ./path.sh
. parse_options.sh

if [ $# -ne 0 ]; then printf '%b\n' "$help_message" >&2; exit 1; fi
if [ "${train:+given}" != "${test:+given}" ]; then
  echo "$0: --train and --test belong together" >&2
  exit 1
fi

if [ -z "$train" ]; then
  corpus=data/local/synth
  mkdir -p $corpus
  local/synth.py --nj "$nj" --seed "$seed" --hours "$hours" \
    --test-hours "$test_hours" $corpus
  train=$corpus/train
  test=$corpus/test
fi

kaldi-mpi copy-data-dir "$train" data/train
kaldi-mpi copy-data-dir "$test" data/test
