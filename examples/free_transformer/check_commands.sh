#!/bin/sh
# `evaluate` and `generate` take up what `train` has left: check_commands.sh PROGRAM [SEED]
set -eu
program=$1
seed=${2:-1}

fail() {
  echo "$1" >&2
  exit 1
}

# The bits a byte of a row of `evaluate`'s table.
bits_of() { sed -n "s/^$1  *[0-9.]*  *\([0-9.]*\) .*/\1/p" "$2"; }

holds() { awk "BEGIN { exit !($1) }"; }

rm -rf check_commands
mkdir -p check_commands/text
cd check_commands
for number in 1 2 3 4 5 6 7 8 9 10 11 12; do
  seq "$number" 7 2000 >"text/$number.txt"
done
size="--width 16 --blocks 2 --heads 2 --context 16 --latent-dim 4"

# shellcheck disable=SC2086
"$program" text $size --output-folder model --steps 300 --minutes 0 --free-bits 4 --learning-rate 1e-2 --sample-bytes 1 \
  --seed "$seed" >model.out

# With four bits free of four, the KL costs nothing; at a weight of 100 it leaves nothing.
grep -a -q 'warning, step [0-9]*: the free bits are saturated' model.out || fail "no warning of saturated free bits"
if grep -a -q 'collapsed' model.out; then fail "a latent that carries much is called collapsed"; fi
# shellcheck disable=SC2086
"$program" text $size --output-folder collapsed --steps 200 --minutes 0 --beta 100 --free-bits 0 --learning-rate 1e-2 \
  --sample-bytes 1 --evaluation-batches 1 --seed "$seed" >collapsed.out
grep -a -q 'warning, step [0-9]*: the latent has collapsed' collapsed.out || fail "no warning of a collapsed latent"

"$program" evaluate text --checkpoint model/checkpoint.pt >evaluation
cat evaluation
cross_entropy=$(bits_of 'posterior cross entropy' evaluation)
kl=$(bits_of 'latent KL' evaluation)
lower=$(bits_of 'evidence lower bound' evaluation)
weighted=$(bits_of 'importance-weighted bound, K = 16' evaluation)
holds "$kl > 0.1" || fail "the latent carries nothing"
holds "($lower - $cross_entropy - $kl) ^ 2 < 0.0002 ^ 2" || fail "the bound is not cross entropy and KL"
holds "$weighted < $lower" || fail "sixteen samples do not tighten the bound"
bits=$(sed -n 's/^KL of each latent bit.*: *//p' evaluation | tr ' ' '+')
holds "($bits - $kl) ^ 2 < 0.0004 ^ 2" || fail "the KL of the bits does not add up"

# Z is looked at itself, as a model need not have learnt to use it: two codes of the prompt, and thirty of 16 possible ones, which two
# samples draw alike once in 16^30. At this temperature chance has no part in a byte: where Z is the same, so is the text.
generate() {
  "$program" generate --checkpoint model/checkpoint.pt --prompt 12 --sample-bytes 30 --temperature 1e-6 --show-latent "$@" |
    sed '/^---/d'
}
generate --samples 1 --one-latent >single
generate --samples 8 --one-latent >one
for copy in 1 2 3 4 5 6 7 8; do cat single; done | diff - one || fail "samples with one Z differ without a temperature"
generate --samples 8 | grep '^Z' >fresh
awk 'NF != 33 { exit 1 } END { exit NR != 8 }' fresh || fail "Z must have a code for each of 32 bytes"
[ "$(sort -u fresh | wc -l)" -eq 8 ] || fail "Z is not drawn anew"

# Without Z all bounds are the cross entropy, and that of the training's own evaluation.
# shellcheck disable=SC2086
"$program" text $size --baseline --output-folder baseline --steps 60 --minutes 0 --sample-bytes 1 --evaluation-batches 16 \
  >baseline.out
"$program" evaluate text --checkpoint baseline/checkpoint.pt >evaluation
cat evaluation
trained=$(sed -n 's/.*bound.elbo [0-9.]* nats a byte (\([0-9.]*\) bits).*/\1/p' baseline.out)
for row in 'posterior cross entropy' 'evidence lower bound' 'importance-weighted bound, K = 1'; do
  holds "($(bits_of "$row" evaluation) - $trained) ^ 2 < 0.0002 ^ 2" || fail "the baseline's $row is not its cross entropy"
done
holds "$(bits_of 'latent KL' evaluation) == 0" || fail "the baseline has a latent"
"$program" generate --checkpoint baseline/checkpoint.pt --samples 1 --sample-bytes 5 | grep -q 'without Z' ||
  fail "the baseline does not write"

if "$program" evaluate text --checkpoint model/training_log.csv 2>error; then fail "a log was taken for a checkpoint"; fi
grep -q 'no complete checkpoint' error || fail "the refusal does not say what is wrong"
