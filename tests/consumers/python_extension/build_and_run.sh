#!/usr/bin/env bash
# A Python package on top of the losses: built by torch.utils.cpp_extension, then tested. Exits with 77
# where that was not possible, or not for all.
#   build_and_run.sh FOLDER PYTHON
set -euo pipefail
folder=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)

skip() {
  echo "skipped: $1; cmake/install_dependencies.sh wheel FOLDER python installs it"
  exit 77
}
has() { reason=$("$python" -c "import $1" 2>&1) || ! reason=${reason##*$'\n'}; }

has torch || skip "$python cannot import torch ($reason)"
has "setuptools, sysconfig as s; open(s.get_path('include') + '/Python.h')" ||
  skip "$python builds no extensions ($reason)"

mkdir -p "$folder"
(cd "$here" && MAX_JOBS=1 "$python" setup.py --quiet build_ext --build-temp "$folder/objects" --build-lib "$folder")
export PYTHONPATH=$folder PYTHONDONTWRITEBYTECODE=1
"$python" "$here/losses_test.py"

has free_transformer || skip "the losses passed, but there is no model to train ($reason)"
"$python" "$here/model_test.py"
