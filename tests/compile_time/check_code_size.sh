#!/usr/bin/env bash
# How much code a call of compute_vae_loss brings into a unit, as a stand-in for the time it takes to compile, which no test
# can hold on a busy machine. A row body that is compiled once more, for an element type, an option or a policy of its own,
# shows here.
#   check_code_size.sh OBJECT COMPILER LIBTORCH_FLAG…
set -euo pipefail
object=$1 compiler=$2 libtorch=("${@:3}")
here=$(cd "$(dirname "$0")" && pwd)

# Bytes with Debian 12's compilers and LibTorch 1.13, and a tenth more: g++ 198,282, clang 208,065.
case $(basename "$compiler")-$("$compiler" -dumpversion) in
  g++-12*) limit=218000 ;;
  clang++-14-14*) limit=229000 ;;
  *) echo "no limit is known for $compiler" && exit 77 ;;
esac

"$compiler" -O2 -I "$here/../../include" "${libtorch[@]}" -c "$here/compute_vae_loss.cpp" -o "$object"
bytes=$(nm --print-size --radix=d --defined-only --demangle "$object" |
  awk '/free_transformer::/ { bytes += $2 } END { print bytes + 0 }')
echo "$bytes bytes of functions and constants that name free_transformer, at most $limit"
if ((bytes == 0)); then
  echo "no functions were found to measure" && exit 1
fi
((bytes <= limit))
