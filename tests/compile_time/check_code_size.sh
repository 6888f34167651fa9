#!/usr/bin/env bash
# How much code a call of compute_vae_loss brings into a unit, as a stand-in for the time it takes to compile, which no test
# can hold on a busy machine. A row body that is compiled once more, for an element type, an option or a policy of its own,
# shows here. Where another unit compiles the losses, nothing may be left.
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

# Bytes of functions and constants that name free_transformer.
weigh() {
  "$compiler" -O2 -I "$here/../../include" "${libtorch[@]}" -c "$here/$1.cpp" -o "$object"
  nm --print-size --radix=d --defined-only --demangle "$object" | awk '/free_transformer::/ { bytes += $2 } END { print bytes + 0 }'
}

bytes=$(weigh compute_vae_loss)
elsewhere=$(weigh extern_compute_vae_loss)
echo "$bytes bytes name free_transformer, at most $limit; $elsewhere where another unit compiles the losses, none"
if ((bytes == 0)); then
  echo "no functions were found to measure" && exit 1
fi
((bytes <= limit && elsewhere == 0))
