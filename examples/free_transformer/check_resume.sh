#!/bin/sh
# A training that is killed again and again, and resumed, must log what an unbroken one logs, digit for digit:
# check_resume.sh PROGRAM
set -eu
program=$1
starter=

fail() {
  echo "$1" >&2
  exit 1
}

train() {
  folder=$1
  shift
  $starter "$program" resume_text --output-folder "$folder" --steps 200 --minutes 0 --width 16 --blocks 2 --heads 2 --context 16 \
    --batch-size 2 --latent-dim 4 --beta cosine:0:1:200 --checkpoint-every 7 --validate-every 9 --validation-batches 2 \
    --evaluation-batches 2 --sample-bytes 1 "$@" >"$folder.out" 2>"$folder.err"
}

# Every column but the last one, which is the time.
log_of() { sed 's/,[^,]*$//' "$1/training_log.csv"; }

is_unfinished() { ! grep -q '^200,' "$1/training_log.csv"; }

# Kills the training once it has saved the checkpoint after the one that is there. Fails if it was over sooner.
train_and_kill() {
  rm -f killed/checkpoint.previous.pt
  (starter=exec && train killed --resume) & # the program itself takes the kill, not a shell around it
  running=$!
  while kill -0 $running 2>/dev/null && [ ! -e killed/checkpoint.previous.pt ]; do
    sleep 0.01
  done
  kill -9 $running 2>/dev/null || true
  wait $running 2>/dev/null || true
  is_unfinished killed
}

rm -rf check_resume
mkdir check_resume
cd check_resume
mkdir resume_text
for number in 1 2 3 4 5 6 7 8 9 10 11 12; do
  seq "$number" 7 2000 >"resume_text/$number.txt"
done
train unbroken

# A machine that is busy may let it finish before the kill.
for attempt in 1 2 3 4; do
  rm -rf killed
  mkdir killed
  if train_and_kill && train_and_kill; then break; fi
done
is_unfinished killed || fail "each training was over before it could be killed: give it more steps"
[ "$(wc -l <killed/training_log.csv)" -gt 1 ] || fail "nothing was logged before the kill"

# What a kill in the midst of a checkpoint leaves, a file that lost its end afterwards, and a row that was cut short.
head -c 1000 killed/checkpoint.pt >killed/checkpoint.pt.partial
head -c 20000 killed/checkpoint.pt >killed/cut
mv killed/cut killed/checkpoint.pt
printf '299,0.1' >>killed/training_log.csv
train killed --resume
grep -q 'not complete' killed.err || fail "a checkpoint cut short was not named"
grep -q 'going on after step' killed.out || fail "the checkpoint before it was not taken"

log_of unbroken >unbroken.log
log_of killed >killed.log
[ "$(wc -l <unbroken.log)" -gt 40 ] || fail "the unbroken training logged too little"
diff unbroken.log killed.log || fail "the resumed training's numbers are others"
diff unbroken/validation_log.csv killed/validation_log.csv || fail "the resumed training's validation is another"

# A finished training has nothing left to do, and other settings are refused.
train killed --resume
log_of killed | diff unbroken.log - || fail "a finished training went on"
if train killed --resume --learning-rate 1e-3; then fail "other settings were taken"; fi
grep -q 'learning_rate' killed.err || fail "the refusal does not name the setting"
