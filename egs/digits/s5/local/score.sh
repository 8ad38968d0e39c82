#!/usr/bin/env bash
# Scores the lattices of a decoding directory: what decoding scripts call as local/score.sh.

set -eu -o pipefail
. ./path.sh

if [ -n "${KALDI_ROOT:-}" ]; then exec steps/score_kaldi.sh "$@"; fi

# Begin configuration section: the options of steps/score_kaldi.sh that have a meaning here.
cmd=run.pl
min_lmwt=7
max_lmwt=17
word_ins_penalty=0.0,0.5,1.0
# End configuration section.

help_message="Usage: $0 [--cmd run.pl] [--min-lmwt N] [--max-lmwt N] <data-dir> <graph-dir> <decode-dir>"
. parse_options.sh

if [ $# -ne 3 ]; then echo "$help_message" >&2; exit 1; fi

log=$3/scoring_kaldi/log/score.log
# shellcheck disable=SC2086 # $cmd may carry options
$cmd "$log" kaldi-mpi score --min-lmwt "$min_lmwt" --max-lmwt "$max_lmwt" \
  --word-ins-penalty "$word_ins_penalty" "$1" "$2" "$3" || {
  grep -a '^ERROR' "$log" >&2 || tail -n 5 "$log" >&2
  exit 1
}
