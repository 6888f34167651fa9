#!/usr/bin/env bash
# Several ranks train as one process does, to rounding; when one is lost the others name it and stop, and a training goes on
# from the last checkpoint: check_distributed.sh PROGRAM
set -eu
program=$1
scripts=$(cd "$(dirname "$0")" && pwd)

fail() {
  echo "$1" >&2
  exit 1
}

rm -rf check_distributed
mkdir -p check_distributed/text
cd check_distributed
for number in 1 2 3 4 5 6 7 8 9 10 11 12; do
  seq "$number" 7 2000 >"text/$number.txt"
done

# train RANKS FOLDER ARGUMENTS...; the file FOLDER.pid.RANK has the process of each rank.
train() {
  ranks=$1
  folder=$2
  shift 2
  "$scripts/launch.sh" "$ranks" sh -c 'echo $$ >"$0.pid.$RANK"; exec "$@"' "$folder" \
    "$program" text --output-folder "$folder" --minutes 0 --width 16 --blocks 2 --heads 2 --context 16 --latent-dim 4 \
    --batch-size 8 --free-bits 0 --beta 2 --validate-every 10 --validation-batches 2 --evaluation-batches 1 --sample-bytes 1 \
    "$@" >"$folder.out" 2>"$folder.err"
}

log_of() { sed 's/,[^,]*$//' "$1/training_log.csv"; }  # all columns but the last one, the seconds

# Two ranks add up two gradients, as one process does with those of two micro-batches.
diff <(log_of parts) <(log_of two) || fail "two ranks give other numbers than one process with two micro-batches"

# A row is one step. The sums over 128 tokens and 20,000 weights are the same but for their order, each within some roundings of
# 6e-8. Adam divides by the gradient's size, so that a weight whose gradient is all rounding may take another step.
compare() { "$scripts/compare_logs.sh" "$1/training_log.csv" "$2/training_log.csv" 1e-6 1e-4; }

short="--steps 30 --checkpoint-every 1"
train 1 one $short
train 2 two $short
train 1 parts $short --micro-batches 2
train 3 three $short --micro-batches 2  # shares of two, three and three windows
compare one two || fail "two ranks give other numbers than one process"
compare one three || fail "three ranks give other numbers than one process"
"$scripts/compare_logs.sh" one/validation_log.csv two/validation_log.csv 1e-4 1e-4 || fail "validation gives other numbers"
[ "$(grep -c 'files to learn from' two.out)" -eq 1 ] || fail "more ranks than the first speak"

# What ranks disagree on is an error of both.
if "$scripts/launch.sh" 2 sh -c 'exec "$0" text --output-folder other --steps 2 --seed "$RANK"' "$program" >other.out 2>&1; then
  fail "ranks with other seeds were taken"
fi
[ "$(grep -c 'must have the same settings and text, got others on rank 1' other.out)" -eq 2 ] ||
  fail "not both ranks say that rank 1 has other settings"

long="--steps 400 --checkpoint-every 7 --timeout 3"

is_unfinished() { ! grep -q '^400,' "$1/training_log.csv"; }

# lose SIGNAL RANK FOLDER: starts a training, and sends the signal to the rank once there are two checkpoints; $status is what
# the launch ends with. A machine that is busy may let the training finish before.
lose() {
  for _ in 1 2 3 4; do
    rm -rf "$3"
    train 2 "$3" $long &
    launched=$!
    while kill -0 $launched 2>/dev/null && [ ! -e "$3/checkpoint.previous.pt" ]; do
      sleep 0.01
    done
    kill "-$1" "$(cat "$3.pid.$2")" 2>/dev/null || true
    status=0
    wait $launched || status=$?
    if is_unfinished "$3"; then return; fi
  done
  fail "each training was over before a rank could be lost: give it more steps"
}

lose KILL 1 killed
[ "$status" -eq 137 ] || fail "the launch of a killed rank ended with status $status"
grep -q 'error: rank 0 stops: rank 1 no longer answers (--timeout 3)' killed.err || fail "rank 0 does not name the killed rank"
grep -q 'launch.sh: rank 0 ended with status 1' killed.err || fail "rank 0 did not end by itself with an error"
lose KILL 0 first_killed
grep -q 'error: rank 1 stops: rank 0 no longer answers (--timeout 3)' first_killed.err || fail "rank 1 does not name rank 0"
lose STOP 1 stopped
grep -q 'error: rank 0 stops: rank 1 no longer answers (--timeout 3)' stopped.err || fail "rank 0 does not name the stopped rank"
grep -q 'launch.sh: rank 1 ended with status 137' stopped.err || fail "the launch did not stop the rank that does not end"

# The rest of the training, by two ranks and by one process. Two numbers have one sum: two ranks repeat each other's bits.
cp -r killed killed_alone
train 2 unbroken $long
train 2 killed $long --resume
grep -q 'going on after step' killed.out || fail "the last checkpoint was not taken"
diff <(log_of unbroken) <(log_of killed) || fail "the resumed training's numbers are others"
train 1 killed_alone $long --resume
"$scripts/compare_logs.sh" unbroken/training_log.csv killed_alone/training_log.csv 0 1e-3 ||
  fail "one process that goes on for two ranks gets other numbers"
