#!/usr/bin/env bash
# The losses in units of different flags, linked into one program: each computes the same numbers, sees a NaN, refuses
# what it should, and shares no function with a unit whose flags would change its code. Of the flags that make up -ffast-math,
# each that the compiler's macros tell leaves the vector kernels out.
#   build_and_run.sh FOLDER COMPILER LIBTORCH_FLAG…       FOLDER is made anew
set -euo pipefail
folder=$1 compiler=$2 libtorch=("${@:3}")
here=$(cd "$(dirname "$0")" && pwd)

rm -rf "$folder"
mkdir -p "$folder"
compile=("$compiler" -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wfloat-equal -Werror -Wno-unused-command-line-argument -I "$here/../../include" "${libtorch[@]}" -c)

# Those that change arithmetic come first: the linker keeps the first copy of a function.
flags=("-O2 -ffast-math" "-O2 -funsafe-math-optimizations" "-O0" "-O3 -march=native" "-O2")
objects=()
for index in "${!flags[@]}"; do
  read -ra unit_flags <<<"${flags[index]}"
  objects+=("$folder/unit$index.o")
  "${compile[@]}" "${unit_flags[@]}" -DFLAGS="\"${flags[index]}\"" "$here/unit.cpp" -o "${objects[index]}"
done
"${compile[@]}" -O1 "$here/main.cpp" -o "$folder/main.o"
"$compiler" "${objects[@]}" "$folder/main.o" -o "$folder/losses" "${libtorch[@]}" -ltorch_cpu -lc10

tags_of() {
  echo FREE_TRANSFORMER_FLAGS |
    "$compiler" -x c++ -E -P -I "$here/../../include" -include free_transformer/detail/compilation.hpp "$@" - | tr -d ' '
}
told=(-ffast-math -ffinite-math-only)
case $compiler in *clang*) ;; *) told+=("-fassociative-math -fno-signed-zeros -fno-trapping-math" -freciprocal-math) ;; esac
for flag in "${told[@]}"; do
  read -ra part <<<"$flag"
  if [[ $(tags_of -O2 "${part[@]}") != *_plain_* ]]; then
    echo "$flag does not leave the vector kernels out" && exit 1
  fi
done
if [[ $(tags_of -O2) != *_vector_* ]]; then
  echo "-O2 alone leaves the vector kernels out" && exit 1
fi

functions_of() {
  nm --defined-only --demangle "$1" | grep -oE ' [WwVu] .*' | grep -E 'free_transformer::(detail|functions)_' | sort -u
}
fast=0 exact=$((${#flags[@]} - 1))
functions_of "${objects[fast]}" >"$folder/fast.txt"
functions_of "${objects[exact]}" >"$folder/exact.txt"
if [[ ! -s $folder/fast.txt || ! -s $folder/exact.txt ]]; then
  echo "no functions were found to compare" && exit 1
fi
if comm -12 "$folder/fast.txt" "$folder/exact.txt" | grep .; then
  echo "these functions are shared between units of '${flags[fast]}' and '${flags[exact]}'" && exit 1
fi
"$folder/losses"
