#!/usr/bin/env bash
# Writes each line of seeds.txt, a name and bytes in hexadecimal, as a file of these bytes.
#   unpack_seeds.sh SEEDS FOLDER
set -euo pipefail
mkdir -p "$2"
while read -r name bytes; do
  [[ -z $name || $name == \#* ]] && continue
  printf '%b' "$(sed 's/../\\x&/g' <<<"$bytes")" >"$2/$name"
done <"$1"
