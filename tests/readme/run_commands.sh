#!/usr/bin/env bash
# Runs the commands of the README as they stand there, beside a copy of this repository, and fails at one it does not know.
#   run_commands.sh FOLDER [WHEEL]       FOLDER is made anew; with a wheel's torch folder the command for that alone is run
# A workflow is not run: that would be this test once more. Its preset must exist, and .ci/run must call the tests.
set -euo pipefail
folder=$1 wheel=${2-}
source=$(cd "$(dirname "$0")/../.." && pwd)
readme=$source/README.md

fail() { echo "README.md: $*" && exit 1; }

# The text of the fenced blocks of a language.
blocks() { awk -v start="\`\`\`$1" '/^```/ { if (inside) inside = 0; else inside = $0 == start; next } inside' "$readme"; }

# The user's CMakeLists.txt, which finds the library by the one or the other line of the README.
write_project() {
  {
    echo "cmake_minimum_required(VERSION 3.24)"
    echo "project(my_program LANGUAGES CXX)"
    blocks cmake | grep -E "^(target_link_libraries|$1)\(" | sed '/^target_link/i add_executable(my_program my_program.cpp)'
  } >CMakeLists.txt
  # tests/consumers compiles a call; here the commands are what is tested.
  echo '#include <free_transformer/version.hpp>
int main() { return FREE_TRANSFORMER_VERSION_MAJOR; }' >my_program.cpp
  rm -rf build
}

check_workflow() {
  local preset=${1##* }
  grep -A 200 '"workflowPresets"' "$source/CMakePresets.json" | grep -q "\"name\": \"$preset\",$" ||
    fail "there is no workflow preset $preset"
  case $preset in
    test*) grep -qE -- "--preset $preset( |$)" "$source/.ci/run" || fail ".ci/run does not call the preset $preset" ;;
  esac
}

run() { [[ $wheel ]] || { echo "+ $1" && eval "$1"; }; }

run_or_check() {
  case $1 in
    "cmake --workflow --preset "*) check_workflow "$1" ;;
    "cmake --preset "*" --target compile_time")
      grep -q 'add_custom_target(compile_time ' "$source/tests/benchmark/CMakeLists.txt" || fail "no target for: $1" ;;
    "cmake --build build/benchmark --target "*)
      grep -q "add_custom_target(${1##* }\$" "$source/tests/benchmark/CMakeLists.txt" || fail "no target for: $1" ;;
    "apt-get install -y git cmake") ;;  # where cmake is missing, .ci/run does it
    "mkdir -p vendor && "* | "g++ "* | ./my_program | "cmake --install "* | "cmake -S free_transformer "*) run "$1" ;;
    "cmake -B build "*FREE_TRANSFORMER_TORCH_WHEEL=venv*)
      [[ $wheel ]] || return 0
      mkdir -p venv/bin && printf '#!/bin/sh\necho "%s"\n' "$wheel" >venv/bin/python3 && chmod +x venv/bin/python3
      write_project add_subdirectory
      echo "+ $1" && eval "$1"
      grep -q "$wheel/lib/libtorch_cpu.so" build/build.ninja build/CMakeFiles/my_program.dir/link.txt 2>/dev/null ||
        fail "another LibTorch was found by: $1" ;;
    "cmake -B build "*CMAKE_PREFIX_PATH=*) run "write_project find_package" && run "$1" ;;
    "cmake -B build "*) run "write_project add_subdirectory" && run "$1" ;;
    *) fail "$(basename "$0") does not know the command: $1" ;;
  esac
}

rm -rf "$folder"
mkdir -p "$folder/free_transformer"
cp -r "$source"/{CMakeLists.txt,cmake,include} "$folder/free_transformer"
cd "$folder"

unknown=$(awk '/^```/ { if (inside) inside = 0; else { inside = 1; print } }' "$readme" | grep -vE '^```(sh|cpp|cmake)$' || true)
[[ -z $unknown ]] || fail "its blocks must be sh, cpp or cmake, got $unknown"

awk '/^```cpp$/ { inside = 1; next } /^```/ { if (inside) exit } inside' "$readme" >my_program.cpp
diff my_program.cpp "$source/examples/minimal.cpp" || fail "its program is no longer examples/minimal.cpp"

{ blocks sh && grep -oE '`(cmake|ctest|g\+\+|clang\+\+|apt-get|pip|python3|git|\./)[^`]* [^`]*`' "$readme" | tr -d '`'; } |
  sed -E 's/ *(^|  )#.*//; /^$/d' >commands.txt
while read -r command; do run_or_check "$command"; done <commands.txt
echo "$(wc -l <commands.txt) commands"
