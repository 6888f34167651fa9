#!/bin/sh
# A step in micro-batches, here of two, three and three windows, is the step of the whole batch, to rounding:
# check_accumulation.sh PROGRAM
set -eu
program=$1

fail() {
  echo "$1" >&2
  exit 1
}

rm -rf check_accumulation
mkdir -p check_accumulation/text
cd check_accumulation
for number in 1 2 3 4 5 6 7 8 9 10 11 12; do
  seq "$number" 7 2000 >"text/$number.txt"
done

# A checkpoint each step, so that each step has a row of its own. At this rate a rounding does not grow from step to step until it turns
# a latent bit around.
train() {
  folder=$1
  shift
  "$program" text --output-folder "$folder" --steps 5 --minutes 0 --width 16 --blocks 2 --heads 2 --context 16 --latent-dim 4 \
    --batch-size 8 --free-bits 0 --beta 2 --learning-rate 1e-5 --checkpoint-every 1 --evaluation-batches 1 --sample-bytes 1 "$@" >"$folder.out"
}

# What is compared: the total loss and the gradient's norm, which Adam would hide.
columns_of() {
  awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i }
           NR > 1 { print $column["loss/total"], $column["gradient_norm"] }' "$1/training_log.csv"
}

# Float32 sums of 128 tokens keep five digits; Adam divides by the gradient's size and may make the difference of two
# roundings a hundred times as large in the steps that follow.
compare() {
  columns_of "$1" >"$1.columns"
  columns_of "$2" >"$2.columns"
  [ "$(wc -l <"$1.columns")" -eq 5 ] || fail "$1 must have five rows"
  paste -d ' ' "$1.columns" "$2.columns" | awk -v names="$1 and $2" '
    function differs(a, b) { return (a - b > limit * a) || (b - a > limit * a) }
    { limit = NR == 1 ? 1e-5 : 1e-3
      if (!($1 > 0 && $2 > 0) || differs($1, $3) || differs($2, $4)) { print names " differ: " $0; bad = 1 } }
    END { exit bad }'
}

train whole
train parts --micro-batches 3
compare whole parts || fail "micro-batches give other numbers"

train whole_baseline --baseline
train parts_baseline --micro-batches 3 --baseline
compare whole_baseline parts_baseline || fail "micro-batches of the baseline give other numbers"
