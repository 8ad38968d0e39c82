#!/usr/bin/env bash
# Connected digits: from audio to the word error rate of a GMM and of an LSTM that MPI learners trained.
# With KALDI_ROOT set it uses Kaldi's scripts and programs, otherwise the embedded back end.

# Begin configuration section.
stage=1            # where to begin
stop_stage=5       # after which stage to end
train=             # Kaldi data directories of one's own: give both, or neither for synthetic speech
test=
nj=2               # parallel jobs
seed=1             # of the synthetic corpus
hours=1.5          # of synthetic training speech, about
test_hours=0.3
num_learners=2     # MPI learners
strategy=allreduce # see docs/strategies.md; periodic and bmuf need frames_per_average
frames_per_average=
train_opts=        # more options of steps_mpi/train.sh, one string
num_epochs=        # of the LSTM; default: local/train_lstm.sh's own
mpiexec=           # default: the one of the Python environment, else the one on PATH
# End configuration section.

help_message="Usage: $0 [--train DIR --test DIR] [--num-learners N] [--nj N] [--stage N] [--stop-stage N]
          [--strategy NAME] [--frames-per-average N] [--train-opts OPTIONS] [--mpiexec PROGRAM]
Stages: 1 data, 2 features, 3 GMM alignments and graph, 4 LSTM training, 5 decoding and scoring."

set -eu -o pipefail
. ./path.sh
. ./cmd.sh
. parse_options.sh

if [ $# -ne 0 ]; then printf '%b\n' "$help_message" >&2; exit 1; fi

if [ "$stage" -le 1 ] && [ "$stop_stage" -ge 1 ]; then
  echo "$0: stage 1: data"
  local/prepare_data.sh --train "$train" --test "$test" --nj "$nj" --seed "$seed" \
    --hours "$hours" --test-hours "$test_hours"
fi

if [ "$stage" -le 2 ] && [ "$stop_stage" -ge 2 ]; then
  echo "$0: stage 2: features"
  local/make_features.sh --nj "$nj" --cmd "$train_cmd"
fi

# The system that gives alignments and the decoding graph: triphones with Kaldi, monophones without.
gmm=mono
if [ -n "${KALDI_ROOT:-}" ]; then gmm=tri1; fi

if [ "$stage" -le 3 ] && [ "$stop_stage" -ge 3 ]; then
  echo "$0: stage 3: GMM, alignments, decoding graph"
  local/train_gmm.sh --nj "$nj" --cmd "$train_cmd"
fi

if [ "$stage" -le 4 ] && [ "$stop_stage" -ge 4 ]; then
  echo "$0: stage 4: LSTM, trained by $num_learners learner(s)"
  local/train_lstm.sh --num-learners "$num_learners" --cmd "$train_cmd" --strategy "$strategy" \
    --frames-per-average "$frames_per_average" --num-epochs "$num_epochs" --mpiexec "$mpiexec" \
    --train-opts "$train_opts" \
    data/train_hires exp/${gmm}_ali exp/lstm
fi

if [ "$stage" -le 5 ] && [ "$stop_stage" -ge 5 ]; then
  echo "$0: stage 5: decoding and scoring"
  decode.sh --nj "$nj" --cmd "$decode_cmd" exp/$gmm/graph data/test exp/$gmm/decode_test
  decode.sh --nj "$nj" --cmd "$decode_cmd" exp/$gmm/graph data/test_hires exp/lstm/decode_test
  echo "$0: word error rates, lattices in the same directories:"
  kaldi-mpi best-wer exp/$gmm/decode_test exp/lstm/decode_test
fi
