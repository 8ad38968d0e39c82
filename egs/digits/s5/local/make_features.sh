#!/usr/bin/env bash
# Features of data/train and data/test: 13 MFCCs there, for the GMM, and 40 in data/train_hires and
# data/test_hires, for the network; with CMVN statistics by speaker. Archives go to mfcc/.

# Begin configuration section.
nj=2
cmd=run.pl
# End configuration section.

help_message="Usage: $0 [--nj N] [--cmd run.pl]"

set -eu -o pipefail
. ./path.sh
. parse_options.sh

if [ $# -ne 0 ]; then echo "$help_message" >&2; exit 1; fi

for part in train test; do
  kaldi-mpi copy-data-dir data/$part data/${part}_hires
  for kind in "" _hires; do
    data=data/$part$kind config=conf/mfcc$kind.conf log=exp/make_mfcc/$part$kind
    if [ -n "${KALDI_ROOT:-}" ]; then
      steps/make_mfcc.sh --nj "$nj" --cmd "$cmd" --mfcc-config $config $data $log mfcc
      steps/compute_cmvn_stats.sh $data $log mfcc
    else
      kaldi-mpi make-mfcc --nj "$nj" --mfcc-config $config $data $log mfcc
      kaldi-mpi compute-cmvn-stats $data $log mfcc
    fi
    # Kaldi's scripts leave out audio they cannot read; this names it.
    kaldi-mpi validate-data-dir --feats $data
  done
done
