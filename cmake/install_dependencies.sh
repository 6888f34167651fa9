#!/usr/bin/env bash
# Brings a Debian machine what this project needs; quick and silent when it is there already.
#   install_dependencies.sh [examples] [tests] [sanitizers] [docs] [matrix] [wheel FOLDER [torch VERSION] [python]]
# FOLDER becomes a Python virtual environment with LibTorch from PyPI, the newest where no version is said; `python` adds the
# gigabytes without which Python itself cannot import it, and what tests/consumers/python_extension builds with and trains.
set -euo pipefail

packages=(g++ ninja-build libtorch-dev libopenblas0-openmp)
wheel=
torch=torch
for_python=
while (($#)); do
  case $1 in
    examples) packages+=(libcli11-dev gnuplot-nox) ;;
    tests) packages+=(catch2 clang-14 libbenchmark-dev valgrind) ;;
    sanitizers) packages+=(libclang-rt-14-dev libomp-14-dev) ;;
    docs) packages+=(doxygen) ;;
    matrix) packages+=(clang-14 clang-tidy-14 g++-aarch64-linux-gnu qemu-user) ;;
    wheel) packages+=(python3-venv) wheel=$2 && shift ;;
    torch) torch=torch==$2 && shift ;;
    python) packages+=(python3-dev) for_python=yes ;;
    *) echo "install_dependencies.sh: unknown part $1" >&2 && exit 2 ;;
  esac
  shift
done

is_installed() {
  dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed
}

install_packages() {
  local package missing=() as_root=(env DEBIAN_FRONTEND=noninteractive)
  for package in "${packages[@]}"; do
    is_installed "$package" || missing+=("$package")
  done
  ((${#missing[@]})) || return 0

  if ! command -v apt-get >/dev/null; then
    echo "Not a Debian machine: install the likes of ${missing[*]} by hand, and" >&2
    echo "configure with -D FREE_TRANSFORMER_INSTALL_DEPENDENCIES=OFF." >&2
    return 1
  fi
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
      echo "Packages are missing, and there is neither root nor sudo to install them. As root, run:" >&2
      echo "  apt-get update && apt-get install --yes ${missing[*]}" >&2
      return 1
    fi
    as_root=(sudo "${as_root[@]}")
  fi
  echo "Installing ${missing[*]}"
  "${as_root[@]}" apt-get update --quiet=2
  "${as_root[@]}" apt-get install --yes --quiet=2 --no-install-recommends "${missing[@]}"
}

wheel_is_complete() {
  local library
  library=$(echo "$wheel"/lib/python3*/site-packages/torch/lib/libtorch_cpu.so)
  [[ -e $library ]] && ! ldd "$library" | grep -q 'not found'
}

# C++ on the CPU needs two of the CUDA libraries that the wheel asks for, and none of the other gigabytes.
install_wheel() {
  local pip=("$wheel/bin/python3" -m pip --quiet --disable-pip-version-check install --no-warn-conflicts)
  echo "Installing $torch from PyPI into $wheel"
  python3 -m venv "$wheel"
  "${pip[@]}" --no-deps "$torch"
  "$wheel/bin/python3" - <<'PYTHON' | xargs --no-run-if-empty "${pip[@]}"
import re
from importlib.metadata import requires

for requirement in requires("torch"):
    if version := re.match(r"cuda-toolkit\[.*\](==[^;]+)", requirement):
        print("cuda-toolkit[cudart,cupti]" + version[1])
    elif version := re.match(r"(nvidia-cuda-(?:runtime|cupti)-cu\d+) ?\(?(==[^;)]+)", requirement):  # before CUDA 13
        print(version[1] + version[2])
PYTHON
  wheel_is_complete || "${pip[@]}" "$torch"
}

python_is_complete() {
  "$wheel/bin/python3" -c 'import torch, setuptools, numpy, yaml, free_transformer' 2>/dev/null
}

# The model names dozens of tools for its own development as requirements.
install_for_python() {
  local pip=("$wheel/bin/python3" -m pip --quiet --disable-pip-version-check install)
  echo "Installing what Python needs for LibTorch into $wheel"
  "${pip[@]}" torch setuptools numpy pyyaml
  "${pip[@]}" --no-deps free-transformer==0.1.2
}

install_packages
# A folder that is no virtual environment is the user's own wheel.
if [[ -n $wheel && (! -e $wheel || -e $wheel/pyvenv.cfg) ]] && ! wheel_is_complete; then
  install_wheel
fi
if [[ -n $for_python && -e $wheel/pyvenv.cfg ]] && ! python_is_complete; then
  install_for_python
fi
