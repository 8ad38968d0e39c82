#!/usr/bin/env bash
# Kaldi's chain recipe of mini_librispeech with one line changed: the learners of kaldi_mpi train in place of chain/train.py.
# In egs/mini_librispeech/s5 of a Kaldi, after stages 0 to 8 of its run.sh and `kaldi-mpi link .`:
#   local/kaldi_mpi/run_tdnn_chain.sh [options of the recipe]
# What the recipe is called with is handed on: --stage, --train-stage, ...

set -eu -o pipefail

recipe=${RECIPE:-local/chain/tuning/run_tdnn_1k.sh}
if [ ! -f "$recipe" ]; then
  echo "$0: no $recipe here: run it in egs/mini_librispeech/s5 of a Kaldi" >&2
  exit 1
fi
if [ ! -x steps_mpi/nnet3/chain/train.py ]; then
  echo "$0: no steps_mpi here: kaldi-mpi link $PWD" >&2
  exit 1
fi
calls=$(grep -c '^ *steps/nnet3/chain/train\.py ' "$recipe" || true)
if [ "$calls" != 1 ]; then
  echo "$0: $recipe calls steps/nnet3/chain/train.py $calls times, and once is expected" >&2
  exit 1
fi

# Beside the recipe: it may look for other files from where it lies.
changed=$(dirname "$recipe")/.kaldi_mpi.$(basename "$recipe")
trap 'rm -f "$changed"' EXIT
sed 's:^\( *\)steps/nnet3/chain/train\.py :\1steps_mpi/nnet3/chain/train.py :' "$recipe" > "$changed"
bash "$changed" "$@"
