#!/usr/bin/env bash
# Virtual environment in .venv with the tested set of packages. System packages are installed where we are root, and named where not.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 python3-venv
  else
    echo "error: Python's venv module is missing; install it with: sudo apt-get install python3 python3-venv" >&2
    exit 1
  fi
fi
python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
  echo "error: Python 3.10 to 3.13 is needed, python3 is $(python3 --version)" >&2
  exit 1
}

# For the compiled decoder (data_pipeline/native). Without them the install goes on, and images are decoded more slowly.
if ! printf '#include <stdio.h>\n#include <jpeglib.h>\n' | cc -E - >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq gcc libc6-dev libjpeg-dev || true
  else
    echo "warning: the compiled decoder needs a C compiler and the headers of libjpeg-turbo;" \
      "install them with: sudo apt-get install gcc libc6-dev libjpeg-dev, then run this again" >&2
  fi
fi

echo "setting up .venv (about 6 GB: torch is the CUDA build, which runs on the CPU too)"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
.venv/bin/python -c 'import data_pipeline.decode'  # warns where the compiled decoder is not built
touch .venv/ready
