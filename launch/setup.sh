#!/usr/bin/env bash
# Create a virtual environment in .venv with the tested versions of all packages. Missing system packages are installed
# if the user is root; otherwise the command to install them is printed.
#   bash launch/setup.sh            packages for training
#   bash launch/setup.sh backends   also FFCV, DALI and ONNX, for their tests and benchmarks
#   bash launch/setup.sh slurm      also SLURM's daemons and strace, for tests that start a cluster or inject I/O errors
set -euo pipefail
cd "$(dirname "$0")/.."

apt_install() {  # false if the user is not root
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

pip_install() {  # this project with the given extras, in the tested versions
  .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint constraints.txt \
    --editable "$1"
}

if [ "${1:-}" = backends ]; then
  if ! pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
    echo "installing the libraries that FFCV is compiled with (700 MB)"
    apt_install g++ pkg-config libopencv-dev libturbojpeg0-dev || {
      echo "warning: FFCV needs the headers of OpenCV and TurboJPEG; its tests are skipped. Install them with:" \
        "sudo apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev, then run this again" >&2
    }
  fi
  extras=dev,dali,export
  if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then extras=$extras,ffcv; fi
  echo "adding $extras to .venv (1 GB)"
  pip_install ".[$extras]"
  touch .venv/backends
  exit
fi

if [ "${1:-}" = slurm ]; then
  PATH=$PATH:/usr/sbin:/sbin
  # A machine with sbatch belongs to a cluster, whose SLURM must not be changed.
  if ! command -v sbatch >/dev/null; then
    echo "installing SLURM's daemons for tests/launch/test_slurm.py"
    apt_install slurm-wlm munge iproute2 util-linux || {
      echo "warning: without SLURM its tests are skipped. Install it with:" \
        "sudo apt-get install slurm-wlm munge iproute2 util-linux, then run this again; the tests need root, too" >&2
    }
  fi
  command -v strace >/dev/null || apt_install strace || {
    echo "warning: without strace the tests of I/O errors are skipped." \
      "Install it with: sudo apt-get install strace" >&2
  }
  touch .venv/slurm
  exit
fi

if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
  apt_install python3 python3-venv || {
    echo "error: Python's venv module is missing; install it with: sudo apt-get install python3 python3-venv" >&2
    exit 1
  }
fi
python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
  echo "error: Python 3.10 to 3.13 is needed, python3 is $(python3 --version)" >&2
  exit 1
}

# For the compiled decoder (data_pipeline/native). Without it, images are decoded more slowly.
if ! printf '#include <stdio.h>\n#include <jpeglib.h>\n' | cc -E - >/dev/null 2>&1; then
  apt_install gcc libc6-dev libjpeg-dev || {
    echo "warning: the compiled decoder needs a C compiler and the headers of libjpeg-turbo;" \
      "install them with: sudo apt-get install gcc libc6-dev libjpeg-dev, then run this again" >&2
  }
fi

echo "setting up .venv (about 6 GB: torch is the CUDA build, which also runs on the CPU)"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
pip_install '.[dev]'
.venv/bin/python -c 'import data_pipeline.decode'  # warns if the compiled decoder is not built
touch .venv/ready
