#!/bin/sh
# Trains a small model by one process, and again by two on this machine; prints the largest relative differences of their
# logs, and draws both curves: compare_processes.sh PROGRAM [SETTINGS OF TRAIN...]
set -eu
program=$1
shift
scripts=$(cd "$(dirname "$0")" && pwd)
folder=compare_processes
mkdir -p $folder

for ranks in 1 2; do
  "$scripts/launch.sh" $ranks "$program" train --output-folder $folder/$ranks --steps 400 --minutes 0 --width 64 --latent-dim 8 \
    --batch-size 16 "$@" >$folder/$ranks.out
  tail -n 1 $folder/$ranks/training_log.csv | sed 's/.*,//; s/^/seconds of '"$ranks"' rank(s): /'
done
"$scripts/compare_logs.sh" $folder/1/training_log.csv $folder/2/training_log.csv 1 1
gnuplot -c "$scripts/plot_processes.gp" $folder/1/training_log.csv $folder/2/training_log.csv $folder/processes.svg
echo "curves: $folder/processes.svg"
