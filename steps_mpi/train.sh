#!/usr/bin/env bash
# Trains an nnet3 acoustic model with N persistent MPI learners, in place of steps/nnet3/train_rnn.py.

set -eu -o pipefail

usage() {
  cat <<EOF
Usage: $0 [options] <data-dir> <ali-dir> <exp-dir>
   or: $0 [options] --feat-dir <data-dir> --ali-dir <ali-dir> --dir <exp-dir>
 e.g.: $0 --num-learners 4 --cmd "\$train_cmd" --strategy periodic --frames-per-average 100000 \\
          data/train_hires exp/tri_ali exp/lstm
The network stands in <exp-dir>/configs/network.xconfig.
Main options, as "--name value" or "--name=value":
  --num-learners <n>            # number of learners, one process each, on this machine unless --mpiexec-opts says
                                # otherwise; default: the GPUs that the job has, else num-jobs-final, at most the cores
  --cmd <run.pl|queue.pl ...>   # how to run the job; may carry options; default: run.pl, or what stands beside this
  --mpiexec <program>           # which mpiexec; default: the Python environment's own, else the one on PATH
  --mpiexec-opts <string>       # more options for it, e.g. "--hostfile hosts"
  --on-hang <wait|end>          # where all learners stand still: only tell, or end the run; default: wait
  --restarts <n>                # how often to start again from the last checkpoint after a learner's death; default: 0
  --python <program|python3>    # Python of the environment with kaldi_mpi
All other options are those of steps/nnet3/train_rnn.py and train_dnn.py by their names there
(--feat.online-ivector-dir, --egs.dir, --egs.chunk-width=20,15, ...; with --egs.dir, --feat-dir is not needed), and
--strategy, --frames-per-average and others (docs/strategies.md); "$python -m kaldi_mpi start --help" lists them.
EOF
}

python=python3
dir=
num_learners=1
options=()      # each as --name=value
positional=()
while [ $# -gt 0 ]; do
  case "$1" in
    --help|-h) usage; exit 0 ;;
    --*=*) name=${1%%=*}; value=${1#*=}; shift ;;
    --*)
      if [ $# -lt 2 ]; then
        echo "$0: option $1 needs a value" >&2; exit 1
      fi
      name=$1; value=$2; shift 2 ;;
    *) positional+=("$1"); shift; continue ;;
  esac
  case "$name" in
    --python) python=$value ;;
    --num-learners) num_learners=$value; options+=("$name=$value") ;;
    --dir) dir=$value; options+=("--dir=$value") ;;
    *) options+=("$name=$value") ;;
  esac
done

case ${#positional[@]} in
  0) ;;
  3) dir=${positional[2]}
     options+=("--feat-dir=${positional[0]}" "--ali-dir=${positional[1]}" "--dir=$dir") ;;
  *) usage >&2; exit 1 ;;
esac
if [ -z "$dir" ]; then
  echo "$0: no --dir given" >&2; usage >&2; exit 1
fi
case "$num_learners" in
  ''|*[!0-9]*|0) echo "$0: --num-learners $num_learners: expected a number above 0" >&2; exit 1 ;;
esac
if ! "$python" -c 'import kaldi_mpi, importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
  echo "$0: $python cannot import kaldi_mpi: install it there, or name another with --python" >&2; exit 1
fi
exec "$python" -m kaldi_mpi start "${options[@]}"
