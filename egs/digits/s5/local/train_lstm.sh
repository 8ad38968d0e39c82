#!/usr/bin/env bash
# Trains the LSTM on the alignments of a GMM: the network's definition, then steps_mpi/train.sh.
# This is all that a Kaldi recipe needs in place of its call of steps/nnet3/train_rnn.py.

# Begin configuration section.
num_learners=2               # MPI learners
strategy=allreduce           # see docs/strategies.md; periodic and bmuf need frames_per_average
frames_per_average=
num_epochs=                  # default 5
chunks_per_minibatch=32      # over all learners
initial_lrate=0.0015         # effective, as Kaldi's recipes have it for small corpora
final_lrate=0.00015
dropout_schedule=0,0@0.20,0.3@0.50,0 # of the LSTM's gates
seed=0
mpiexec=                     # default: the one of the Python environment, else the one on PATH
mpiexec_opts=
use_gpu=auto
xconfig=                     # another network than the one below; DIR and NUM_TARGETS in it are replaced
train_opts=                  # more options of train.sh, as in "--staleness-bound 4"
cmd=run.py                   # how to run the job; may carry options
# End configuration section.

help_message="Usage: $0 [options] <data-dir> <ali-dir> <exp-dir>
 e.g.: $0 --num-learners 4 data/train_hires exp/mono_ali exp/lstm"

set -eu -o pipefail
. ./path.sh
. parse_options.sh

if [ $# -ne 3 ]; then printf '%b\n' "$help_message" >&2; exit 1; fi
: "${num_epochs:=5}"
data=$1
ali=$2
dir=$3

for file in "$data/feats.scp" "$ali/final.mdl" "$ali/tree" "$ali/num_jobs"; do
  if [ ! -f "$file" ]; then echo "$0: no such file $file" >&2; exit 1; fi
done

num_targets=$(kaldi-mpi model-info "$ali/final.mdl" | awk '$1 == "num-pdfs" {print $2}')
mkdir -p "$dir/configs"
# An LDA of an older run belongs to older data.
rm -f "$dir/configs/lda.mat"
if [ -n "$xconfig" ]; then
  sed -e "s|DIR|$dir|g" -e "s|NUM_TARGETS|$num_targets|g" "$xconfig" > "$dir/configs/network.xconfig"
else
  cat > "$dir/configs/network.xconfig" <<EOF
input dim=40 name=input
# The splice and its transform, as in Kaldi's recipes; lda.mat is estimated at the start of the training. The label
# delay stands in both lines, as Kaldi's xconfig_to_configs.py wants it.
fixed-affine-layer name=lda delay=3 input=Append(-2,-1,0,1,2) affine-transform-file=$dir/configs/lda.mat
fast-lstmp-layer name=lstm1 cell-dim=128 recurrent-projection-dim=48 non-recurrent-projection-dim=48 decay-time=20 delay=-1 dropout-proportion=0.0 l2-regularize=0.001
fast-lstmp-layer name=lstm2 cell-dim=128 recurrent-projection-dim=48 non-recurrent-projection-dim=48 decay-time=20 delay=-1 dropout-proportion=0.0 l2-regularize=0.001
output-layer name=output output-delay=3 dim=$num_targets max-change=1.5 l2-regularize=0.001
EOF
fi

options=()
# A network without dropout has nothing to schedule.
if [ -z "$xconfig" ]; then options+=("--trainer.dropout-schedule=$dropout_schedule"); fi
if [ -n "$frames_per_average" ]; then options+=(--frames-per-average "$frames_per_average"); fi
if [ -n "$mpiexec" ]; then options+=(--mpiexec "$mpiexec"); fi
if [ -n "$mpiexec_opts" ]; then options+=("--mpiexec-opts=$mpiexec_opts"); fi
per_learner=$((chunks_per_minibatch / num_learners))
if [ "$per_learner" -lt 1 ]; then per_learner=1; fi

# shellcheck disable=SC2086 # several options in one string
train.sh --num-learners "$num_learners" --cmd "$cmd" --strategy "$strategy" \
  ${options[@]+"${options[@]}"} \
  --feat.cmvn-opts="--norm-means=false --norm-vars=false" \
  --egs.chunk-width=40 \
  --egs.chunk-left-context=20 \
  --egs.opts="--num-utts-subset 100" \
  --trainer.srand="$seed" \
  --trainer.num-epochs="$num_epochs" \
  --trainer.rnn.num-chunk-per-minibatch="$per_learner" \
  --trainer.samples-per-iter=$((6000 / num_learners)) \
  --trainer.optimization.initial-effective-lrate="$initial_lrate" \
  --trainer.optimization.final-effective-lrate="$final_lrate" \
  --use-gpu="$use_gpu" \
  $train_opts \
  "$data" "$ali" "$dir"
