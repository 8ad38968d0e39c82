#!/usr/bin/env bash
# Decodes a data directory with the model one level above <decode-dir>, a GMM or an nnet3 network, and scores
# it with local/score.sh. To be run from a recipe's directory. With KALDI_ROOT it calls Kaldi's own
# steps/nnet3/decode.sh or steps/decode.sh, otherwise the embedded back end.

# Begin configuration section: names as in steps/nnet3/decode.sh.
nj=4
cmd=run.pl             # how to run jobs; where there is no run.pl, run.py beside this script
iter=final
acwt=                  # default 0.1 for networks, 0.083333 for GMMs, as in Kaldi's scripts
beam=                  # default 15 for networks, 13 for GMMs
lattice_beam=          # default 8 for networks, 6 for GMMs
frames_per_chunk=0     # 0: whole utterances, so that a recurrence is never cut
extra_left_context=0
extra_right_context=0
extra_left_context_initial=-1
extra_right_context_final=-1
online_ivector_dir=    # for networks that take i-vectors
max_active=7000        # only Kaldi's decoders know limits on active states
min_active=200
scoring_opts=
skip_scoring=false
# End configuration section.

help_message="Usage: $0 [options] <graph-dir> <data-dir> <decode-dir>
 e.g.: $0 --nj 2 exp/mono/graph data/test_hires exp/lstm/decode_test
Main options:
  --nj <n>                    # number of parallel jobs
  --cmd <run.pl|queue.pl...>  # how to run jobs
  --iter <iter|final>         # which model, <decode-dir>/../<iter>.mdl
  --frames-per-chunk <n|0>    # of networks; 0 means whole utterances
  --extra-left-context <n|0>  # and its relatives, as in steps/nnet3/decode.sh
  --online-ivector-dir <dir>  # for networks that take i-vectors
  --acwt, --beam, --lattice-beam, --skip-scoring, --scoring-opts: as there"

set -eu -o pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null # the recipe's
if [ -f ./path.sh ]; then . ./path.sh; fi
. "$here/parse_options.sh"

if [ $# -ne 3 ]; then printf '%b\n' "$help_message" >&2; exit 1; fi
graph=$1
data=$2
dir=$3
model=$(dirname "$dir")/$iter.mdl

for file in "$graph/HCLG.fst" "$graph/words.txt" "$data/feats.scp" "$model"; do
  if [ ! -f "$file" ]; then echo "$0: no such file $file" >&2; exit 1; fi
done
ivectors=()
[ -z "$online_ivector_dir" ] || ivectors=(--online-ivector-dir "$online_ivector_dir")
if [ "$cmd" == run.pl ] && ! command -v run.pl >/dev/null; then cmd=$here/run.py; fi

# The token after the transition model tells what the model is.
if grep -a -q '<Nnet3> ' "$model"; then kind=nnet3; else kind=gmm; fi
if [ $kind == nnet3 ]; then
  : "${acwt:=0.1}" "${beam:=15.0}" "${lattice_beam:=8.0}"
else
  : "${acwt:=0.083333}" "${beam:=13.0}" "${lattice_beam:=6.0}"
fi

if [ -n "${KALDI_ROOT:-}" ]; then
  options=(--nj "$nj" --cmd "$cmd" --acwt "$acwt" --beam "$beam" --lattice-beam "$lattice_beam"
    --max-active "$max_active" --skip-scoring "$skip_scoring")
  [ -z "$scoring_opts" ] || options+=(--scoring-opts "$scoring_opts")
  if [ $kind == gmm ]; then
    # steps/decode.sh looks for --model, where steps/nnet3/decode.sh has --iter.
    steps/decode.sh "${options[@]}" --model "$model" "$graph" "$data" "$dir"
  else
    if [ "$frames_per_chunk" -eq 0 ]; then
      frames_per_chunk=$(awk '$2 > longest {longest = $2} END {print longest}' "$data/utt2num_frames")
    fi
    steps/nnet3/decode.sh "${options[@]}" --iter "$iter" --min-active "$min_active" \
      --frames-per-chunk "$frames_per_chunk" \
      --extra-left-context "$extra_left_context" --extra-right-context "$extra_right_context" \
      --extra-left-context-initial "$extra_left_context_initial" \
      --extra-right-context-final "$extra_right_context_final" ${ivectors[@]+"${ivectors[@]}"} \
      "$graph" "$data" "$dir"
  fi
  exit 0
fi

mkdir -p "$dir/log"
rm -f "$dir"/lat.*.gz
# shellcheck disable=SC2086 # $cmd may carry options
$cmd JOB=1:"$nj" "$dir/log/decode.JOB.log" \
  kaldi-mpi decode --nj "$nj" --job JOB --iter "$iter" \
  --acwt "$acwt" --beam "$beam" --lattice-beam "$lattice_beam" \
  --frames-per-chunk "$frames_per_chunk" \
  --extra-left-context "$extra_left_context" --extra-right-context "$extra_right_context" \
  --extra-left-context-initial "$extra_left_context_initial" \
  --extra-right-context-final "$extra_right_context_final" ${ivectors[@]+"${ivectors[@]}"} \
  "$graph" "$data" "$dir" || {
  grep -a -h '^ERROR' "$dir"/log/decode.*.log | sort -u >&2 || tail -n 5 "$dir"/log/decode.1.log >&2
  exit 1
}
echo "$nj" >"$dir/num_jobs"

if [ "$skip_scoring" == false ]; then
  if [ ! -x local/score.sh ]; then
    echo "$0: not scoring: local/score.sh does not exist or is not executable" >&2
    exit 1
  fi
  # shellcheck disable=SC2086 # several options in one string
  local/score.sh $scoring_opts --cmd "$cmd" "$data" "$graph" "$dir"
fi
echo "$0: decoded $data into $dir"
