#!/bin/sh
# `synthetic` goes through its seeds and budgets, here with next to no training, and leaves a table and what the pictures are drawn
# from: check_synthetic.sh PROGRAM
set -eu
program=$1

fail() {
  echo "$1" >&2
  exit 1
}

synthetic() {
  "$program" synthetic --output-folder check_synthetic --seeds 4 2 --lines 200 --width 16 --steps 3 --annealing 4 \
    --latents 3 --samples 2 "$@"
}

rm -rf check_synthetic
synthetic | tee check_synthetic.out

for seed in 4 2; do
  cat check_synthetic/seed_$seed/text/*.txt >check_synthetic/text
  lines=$(grep -c -E '^([A-Z])>[_!]*[A-Z!]{8}[_!]*$' check_synthetic/text || true)
  [ "$lines" -eq 200 ] || fail "the text of seed $seed must have 200 lines of the task, got $lines"
  for budget in 0.015625 0.125 1 8; do
    for file in own_latents.dat one_latent.dat; do
      awk '{ rows++; if (NF != 64) exit 1 } END { exit rows != 2 }' "check_synthetic/seed_$seed/kappa_$budget/$file" ||
        fail "seed $seed, $budget free bits, $file: not two samples of 64"
    done
  done
done

# The third of three steps is half way from the first budget, 8 bits, to its own.
for pair in 0.125:4.0625 1:4.5 8:8; do
  awk -F, -v expected="${pair#*:}" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "free_bits") column = i }
                                    END { exit !(NR == 2 && ($column - expected) ^ 2 < 1e-12) }' \
    "check_synthetic/seed_4/kappa_${pair%:*}/training_log.csv" || fail "${pair%:*} free bits are not ${pair#*:} in the third step"
done

# Four rows a seed; agreements and the well-formed are shares, and the KL of the 8 latent bits, each at most 1, adds up.
awk -F, 'NR == 1 { columns = NF; for (i = 1; i <= NF; i++) column[$i] = i; next }
         { rows++; order = order " " $1 ":" $2; if (NF != columns) bad = 1
           split("largest_bit position_one_z position_other_z noise_one_z noise_other_z well_formed", shares, " ")
           for (i in shares) if (!($column[shares[i]] >= 0 && $column[shares[i]] <= 1)) bad = 1
           kl = 0
           for (i = 1; i <= 8; i++) { bit = $column["kl_bit_" i]; kl += bit; if (!(bit >= 0 && bit <= 1)) bad = 1 }
           if (!($column["bound_bits"] > 0) || (kl - $column["kl_bits"]) ^ 2 > 1e-8) bad = 1 }
         END { if (bad || order != " 4:0.015625 4:0.125 4:1 4:8 2:0.015625 2:0.125 2:1 2:8") { print "rows:" order; exit 1 } }' \
  check_synthetic/table.csv || fail "the table is not one of two seeds and four budgets"

# The summary's mean of the bound at 8 bits is that of the rows.
mean=$(awk -F, '$2 == 8 { sum += $3; rows++ } END { printf "%.3f", sum / rows }' check_synthetic/table.csv)
grep '^bound, bits' check_synthetic.out | awk -v mean="$mean" '{ exit ($9 - mean) ^ 2 > 0.0011 ^ 2 }' ||
  fail "the summary does not have the mean bound $mean"

# Trainings that are done are not done again, and give the same table.
cp check_synthetic/table.csv check_synthetic/first_table.csv
synthetic --resume >resumed.out
[ "$(grep -c 'going on after step 3' resumed.out)" -eq 8 ] || fail "trainings that were done are done again"
diff check_synthetic/first_table.csv check_synthetic/table.csv || fail "the table of the same trainings is another"
