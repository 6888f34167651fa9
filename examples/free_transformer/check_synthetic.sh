#!/bin/sh
# `synthetic` goes through its four budgets, here with next to no training, and leaves a table and what the picture is drawn
# from: check_synthetic.sh PROGRAM
set -eu
program=$1

fail() {
  echo "$1" >&2
  exit 1
}

rm -rf check_synthetic
"$program" synthetic --output-folder check_synthetic --lines 200 --width 16 --steps 3 --minutes 0 --latents 3 --samples 2
cd check_synthetic

cat text/*.txt | grep -c -E '^([A-Z])>[_!]*[A-Z!]{8}[_!]*$' >lines || true
[ "$(cat lines)" -eq 200 ] || fail "the text must have 200 lines of the task, got $(cat lines)"

# Four rows; agreements and the well-formed are shares, and no KL is above the 10 latent bits.
awk -F, 'NR == 1 { columns = NF; next }
         { rows++; budgets = budgets " " $1; if (NF != columns) bad = 1
           for (i = 4; i <= 8; i++) if (!($i >= 0 && $i <= 1)) bad = 1
           if (!($2 > 0 && $3 >= 0 && $3 <= 10)) bad = 1 }
         END { if (bad || rows != 4 || budgets != " 0.015625 0.125 1 8") { print "rows: " rows budgets; exit 1 } }' table.csv ||
  fail "the table is not one of four budgets"

for budget in kappa_1_64 kappa_1_8 kappa_1 kappa_8; do
  for file in own_latents.dat one_latent.dat; do
    awk '{ rows++; if (NF != 64) exit 1 } END { exit rows != 2 }' "$budget/$file" || fail "$budget/$file: not two samples of 64"
  done
done
