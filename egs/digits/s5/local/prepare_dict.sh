#!/usr/bin/env bash
# Writes data/local/dict, a pronunciation dictionary of the English digits, and data/local/lm/digits.arpa, a
# language model in which every digit, and the end, is as likely as any other.

help_message="Usage: $0 [data-dir]  # whose transcripts must be made of the dictionary's words; data/train"

set -eu -o pipefail
. ./path.sh
. parse_options.sh

if [ $# -gt 1 ]; then echo "$help_message" >&2; exit 1; fi
data=${1:-data/train}
dict=data/local/dict
lm=data/local/lm

mkdir -p $dict $lm
rm -f $dict/lexiconp.txt # made from lexicon.txt by utils/prepare_lang.sh, which would prefer an old one

cat >$dict/lexicon.txt <<EOF
!SIL SIL
<UNK> SPN
EIGHT EY T
FIVE F AY V
FOUR F AO R
NINE N AY N
OH OW
ONE W AH N
SEVEN S EH V AH N
SIX S IH K S
THREE TH R IY
TWO T UW
ZERO Z IH R OW
ZERO Z IY R OW
EOF
printf 'SIL\nSPN\n' >$dict/silence_phones.txt
echo SIL >$dict/optional_silence.txt
echo SIL SPN >$dict/extra_questions.txt

words=$(awk '$1 !~ /^[!<]/ {print $1}' $dict/lexicon.txt | sort -u)
# OH is another word for ZERO that many corpora do not have: there it would only be mistaken for FOUR.
if [ -f "$data/text" ] && ! grep -q -w OH "$data/text"; then words=$(grep -v -w OH <<<"$words"); fi
awk '$1 !~ /^[!<]/ {for (n = 2; n <= NF; n++) print $n}' $dict/lexicon.txt | sort -u >$dict/nonsilence_phones.txt

# shellcheck disable=SC2086 # one argument per word
printf '%s\n' $words | awk '
  {word[NR] = $1}
  END {
    logprob = -log(NR + 1) / log(10)
    printf "\\data\\\nngram 1=%d\n\n\\1-grams:\n-99 <s>\n", NR + 2
    for (n = 1; n <= NR; n++) printf "%.7f %s\n", logprob, word[n]
    printf "%.7f </s>\n\n\\end\\\n", logprob
  }' >$lm/digits.arpa

if [ -f "$data/text" ]; then
  awk -v data="$data" -v name="$0" '
    NR == FNR {known[$1] = 1; next}
    {for (n = 2; n <= NF; n++) {total++; if (!($n in known)) {unknown[$n] = 1; bad++}}}
    END {
      if (!bad) exit 0
      for (word in unknown) list = list " " word
      printf "%s: %d of %d words in %s/text are not in the dictionary:%s\n", name, bad, total, data, substr(list, 1, 200) > "/dev/stderr"
      if (2 * bad > total) {
        print name ": this recipe is for the words ZERO, OH, ONE ... NINE in capitals" > "/dev/stderr"
        exit 1
      }
    }' $dict/lexicon.txt "$data/text"
fi
