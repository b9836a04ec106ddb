#!/usr/bin/env bash
# Virtual environment in .venv with the tested set of packages. System packages are installed where we are root, and named where not.
#   bash launch/setup.sh            what training needs
#   bash launch/setup.sh backends   FFCV, DALI and ONNX, too: for their tests and benches
#   bash launch/setup.sh slurm      SLURM's daemons and strace: for the tests that start a cluster of their own, and break disks
set -euo pipefail
cd "$(dirname "$0")/.."

apt_install() {  # false where we may not
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if [ "${1:-}" = backends ]; then
  if ! pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
    echo "installing what FFCV is compiled with (700 MB)"
    apt_install g++ pkg-config libopencv-dev libturbojpeg0-dev || {
      echo "warning: FFCV needs OpenCV's and TurboJPEG's headers; its tests are skipped. Install them with:" \
        "sudo apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev, then run this again" >&2
    }
  fi
  extras=dev,dali,export
  if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then extras=$extras,ffcv; fi
  echo "adding $extras to .venv (1 GB)"
  .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable ".[$extras]"
  touch .venv/backends
  exit
fi

if [ "${1:-}" = slurm ]; then
  PATH=$PATH:/usr/sbin:/sbin
  # A machine that has sbatch belongs to a cluster, whose SLURM is not ours to touch.
  if ! command -v sbatch >/dev/null; then
    echo "installing SLURM's daemons, which tests/launch/test_slurm.py starts"
    apt_install slurm-wlm munge iproute2 util-linux || {
      echo "warning: without SLURM its tests are skipped. Install it with:" \
        "sudo apt-get install slurm-wlm munge iproute2 util-linux, then run this again; the tests need root, too" >&2
    }
  fi
  command -v strace >/dev/null || apt_install strace || {
    echo "warning: without strace the tests of disks with errors are skipped. Install it with: sudo apt-get install strace" >&2
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

# For the compiled decoder (data_pipeline/native). Without them the install goes on, and images are decoded more slowly.
if ! printf '#include <stdio.h>\n#include <jpeglib.h>\n' | cc -E - >/dev/null 2>&1; then
  apt_install gcc libc6-dev libjpeg-dev || {
    echo "warning: the compiled decoder needs a C compiler and the headers of libjpeg-turbo;" \
      "install them with: sudo apt-get install gcc libc6-dev libjpeg-dev, then run this again" >&2
  }
fi

echo "setting up .venv (about 6 GB: torch is the CUDA build, which runs on the CPU too)"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
.venv/bin/python -c 'import data_pipeline.decode'  # warns where the compiled decoder is not built
touch .venv/ready
