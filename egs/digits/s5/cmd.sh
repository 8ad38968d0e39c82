# shellcheck shell=sh
# How jobs are run. On this machine: run.pl of Kaldi, or run.py, which takes its place without Kaldi.
# On a cluster with Kaldi: queue.pl or slurm.pl with options, for example "queue.pl --mem 4G".

if [ -n "${KALDI_ROOT:-}" ]; then _run=run.pl; else _run=run.py; fi

export train_cmd="$_run --mem 2G"
export decode_cmd="$_run --mem 4G"
export mkgraph_cmd="$_run --mem 4G"
unset _run
