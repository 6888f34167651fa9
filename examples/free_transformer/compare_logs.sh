#!/bin/sh
# The largest relative difference of two training logs in each column but the seconds, and the step where it is; status 1 if
# one is above its limit, or the logs have other rows: compare_logs.sh LOG OTHER_LOG LIMIT_OF_FIRST_ROW LIMIT
set -eu
[ "$(wc -l <"$1")" -eq "$(wc -l <"$2")" ] || { echo "$1 and $2 have other numbers of rows" >&2; exit 1; }
paste -d, "$1" "$2" | awk -F, -v first_limit="$3" -v limit="$4" '
  function size(value) { return value < 0 ? -value : value }
  NR == 1 { columns = NF / 2; for (i = 1; i <= columns; i++) name[i] = $i }
  NR > 1 {
    for (i = 1; i <= columns; i++) {
      if (name[i] == "seconds") continue
      difference = size($i - $(i + columns))
      if (difference > 0 && size($i) > 0) difference /= size($i)
      if (difference > largest[i]) { largest[i] = difference; step[i] = $1 }
      if (!(difference <= (NR == 2 ? first_limit : limit))) { bad = 1; print "step " $1 ", " name[i] ": " $i " and " $(i + columns) }
    }
  }
  END {
    for (i = 2; i <= columns; i++) {
      if (name[i] != "seconds") printf("%-24s %.1e%s\n", name[i], largest[i], largest[i] > 0 ? " at step " step[i] : "")
    }
    exit bad || NR < 3
  }'
