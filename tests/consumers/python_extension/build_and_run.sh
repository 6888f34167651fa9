#!/usr/bin/env bash
# A Python package on top of the losses: built by torch.utils.cpp_extension, then tested. Exits with 77 where that was not
# possible, or was not possible for all.
#   build_and_run.sh FOLDER PYTHON
set -euo pipefail
folder=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)

skip() {
  echo "skipped: $1; cmake/install_dependencies.sh wheel FOLDER python installs it"
  exit 77
}
has() { "$python" -c "import $1" 2>&1 | tail -n 1; }

missing=$(has torch)
[[ -z $missing ]] || skip "$python cannot import torch ($missing)"
missing=$(has "setuptools, sysconfig as s; open(s.get_path('include') + '/Python.h')")
[[ -z $missing ]] || skip "$python builds no extensions ($missing)"

mkdir -p "$folder"
(cd "$here" && MAX_JOBS=1 "$python" setup.py --quiet build_ext --build-temp "$folder/objects" --build-lib "$folder")
export PYTHONPATH=$folder PYTHONDONTWRITEBYTECODE=1
"$python" "$here/losses_test.py"

missing=$(has free_transformer)
[[ -z $missing ]] || skip "the losses passed, but there is no model to train ($missing)"
"$python" "$here/model_test.py"
