#!/usr/bin/env bash
# A project without CMake: a copy of include/, and one line that builds it.
#   build_and_run.sh FOLDER COMPILER LIBTORCH_FLAG…       FOLDER is made anew
set -euo pipefail
folder=$1 compiler=$2 libtorch=("${@:3}")
here=$(cd "$(dirname "$0")" && pwd)

rm -rf "$folder"
mkdir -p "$folder"
cp -r "$here/../../../include" "$here/../main.cpp" "$folder"
cd "$folder"
"$compiler" -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wfloat-equal -Werror -I include main.cpp -o consumer "${libtorch[@]}" -ltorch_cpu -lc10
./consumer
