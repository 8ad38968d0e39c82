#!/usr/bin/env bash
# Trains an nnet3 acoustic model with N persistent MPI learners, in place of steps/nnet3/train_rnn.py.

# Begin configuration section.
num_learners=2      # learners, one process each, on this machine unless --mpiexec-opts says otherwise
num_servers=0       # 1 with --dedicated-server true: one more process
cmd=                # how to run it: run.pl, queue.pl ... or what stands beside this script; may carry options
mpiexec=            # the mpiexec to use; default: the Python environment's own, else the one on PATH
mpiexec_opts=       # more options for mpiexec, e.g. "--hostfile hosts"
python=python3      # of the environment where kaldi_mpi is installed
# End configuration section.

set -eu -o pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<EOF
Usage: $0 [options] <data-dir> <ali-dir> <exp-dir>
   or: $0 [options] --feat-dir <data-dir> --ali-dir <ali-dir> --dir <exp-dir>
 e.g.: $0 --num-learners 4 --cmd "\$train_cmd" --strategy periodic --frames-per-average 100000 \\
          data/train_hires exp/tri_ali exp/lstm
The network stands in <exp-dir>/configs/network.xconfig.
Main options, as "--name value" or "--name=value":
  --num-learners <n|2>          # number of learners
  --cmd <run.pl|queue.pl ...>   # how to run the job
  --mpiexec <program>           # which mpiexec
  --mpiexec-opts <string>       # more options for it
  --python <program|python3>    # Python of the environment with kaldi_mpi
All other options go to the learners: those of steps/nnet3/train_rnn.py by their names there
(--feat.online-ivector-dir, --egs.dir, --egs.chunk-width=20,15, ...; with --egs.dir, --feat-dir is not needed), and
--strategy, --frames-per-average and others (docs/strategies.md); "$python -m kaldi_mpi train --help" lists them.
EOF
}

dir=
options=()      # for the learners, each as --name=value
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
    --num-learners) num_learners=$value ;;
    --cmd) cmd=$value ;;
    --mpiexec) mpiexec=$value ;;
    --mpiexec-opts) mpiexec_opts=$value ;;
    --python) python=$value ;;
    --dedicated-server) options+=("$name=$value"); if [ "$value" = true ]; then num_servers=1; fi ;;
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
if [ -z "$cmd" ]; then
  if command -v run.pl >/dev/null; then cmd=run.pl; else cmd=$here/run.py; fi
fi
if ! "$python" -c 'import kaldi_mpi' 2>/dev/null; then
  echo "$0: $python cannot import kaldi_mpi: install it there, or name another with --python" >&2; exit 1
fi

mkdir -p "$dir/log"
log=$dir/log/train.log
launch=("$python" -m kaldi_mpi launch --num-learners $((num_learners + num_servers)))
[ -z "$mpiexec" ] || launch+=(--mpiexec "$mpiexec")
[ -z "$mpiexec_opts" ] || launch+=("--mpiexec-opts=$mpiexec_opts")

status=0
# $cmd unquoted: it may carry options of its own, as in Kaldi's cmd.sh.
# shellcheck disable=SC2086
"$python" -m kaldi_mpi progress "$dir/progress.json" -- \
  $cmd --num-threads "$num_learners" "$log" \
  "${launch[@]}" -- "$python" -m kaldi_mpi train "${options[@]}" || status=$?
if [ $status -ne 0 ]; then
  echo "$0: training failed; the reason, from $log:" >&2
  grep -a -E '^(ERROR|WARNING) |Error' "$log" | tail -n 5 >&2 || tail -n 5 "$log" >&2
  exit 1
fi
grep -a -o "iteration final: Overall.*" "$log" | head -n 2 || true
echo "$0: trained $dir/final.mdl with $num_learners learner(s)"
