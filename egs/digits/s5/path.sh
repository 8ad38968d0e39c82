# shellcheck shell=sh
# Sourced from this directory by run.sh and by Kaldi's scripts, some of which run under plain sh.
# With KALDI_ROOT set the recipe runs on Kaldi's scripts and programs, otherwise on the embedded back end.

_add_to_path() { case ":$PATH:" in *":$1:"*) ;; *) PATH=$1:$PATH ;; esac; }

KALDI_MPI_ROOT=$(cd ../../.. && pwd)
export KALDI_MPI_ROOT
_add_to_path "$KALDI_MPI_ROOT/steps_mpi"
# The environment that "make" set up, unless another one is active.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$KALDI_MPI_ROOT/.venv/bin/python3" ]; then
  _add_to_path "$KALDI_MPI_ROOT/.venv/bin"
fi
if ! command -v kaldi-mpi >/dev/null; then
  echo "path.sh: no kaldi-mpi on PATH: run make in $KALDI_MPI_ROOT, or activate the environment it is installed in" >&2
  return 1
fi
case ":${PYTHONPATH:-}:" in
  *":$KALDI_MPI_ROOT:"*) ;;
  *) export PYTHONPATH="$KALDI_MPI_ROOT${PYTHONPATH:+:$PYTHONPATH}" ;;
esac

if [ -n "${KALDI_ROOT:-}" ]; then
  if [ ! -d "$KALDI_ROOT/egs/wsj/s5/utils" ] || [ ! -f "$KALDI_ROOT/tools/config/common_path.sh" ]; then
    echo "path.sh: KALDI_ROOT=$KALDI_ROOT is no Kaldi (unset it to run without)" >&2
    return 1
  fi
  for _name in steps utils; do
    if [ "$(readlink "$_name")" != "$KALDI_ROOT/egs/wsj/s5/$_name" ]; then
      ln -sfn "$KALDI_ROOT/egs/wsj/s5/$_name" "$_name" || return 1
    fi
  done
  # shellcheck source=/dev/null
  if [ -f "$KALDI_ROOT/tools/env.sh" ]; then . "$KALDI_ROOT/tools/env.sh"; fi
  if ! command -v compute-mfcc-feats >/dev/null; then
    # shellcheck source=/dev/null
    . "$KALDI_ROOT/tools/config/common_path.sh"
  fi
  _add_to_path "$KALDI_ROOT/tools/openfst/bin"
  _add_to_path "$PWD/utils"
  if ! command -v compute-mfcc-feats >/dev/null; then
    echo "path.sh: KALDI_ROOT=$KALDI_ROOT is not compiled: no compute-mfcc-feats in src/featbin" >&2
    return 1
  fi
fi

unset -f _add_to_path
unset _name
export PATH
export LC_ALL=C                # the order of all tables
export PYTHONUNBUFFERED=1      # logs as they happen
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the jobs are the parallelism
