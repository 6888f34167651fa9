#!/usr/bin/env bash
# The C++ blocks of README.md and docs/, each in a function of its own beside the names in snippets.hpp: they must compile.
#   compile_snippets.sh UNIT COMPILER LIBTORCH_FLAG…       UNIT is written
set -euo pipefail
unit=$1 compiler=$2 libtorch=("${@:3}")
here=$(cd "$(dirname "$0")" && pwd)
source=$here/../..

# Whole programs are compiled elsewhere: they include what they need.
{
  echo '#include "snippets.hpp"'
  awk '/^```cpp$/ { inside = 1; block = ""; line = FNR + 1; next }
       /^```/ && inside { inside = 0
         if (block !~ /#include/) printf "void block_%d() {\n#line %d \"%s\"\n%s}\n", ++count, line, FILENAME, block }
       inside { block = block $0 "\n" }' "$source"/README.md "$source"/docs/*.md
} >"$unit"
(($(grep -c '^void block_' "$unit") >= 2))
"$compiler" -fsyntax-only -Wall -Wextra -Werror -Wno-unused -I "$source/include" -I "$here" "${libtorch[@]}" "$unit"
