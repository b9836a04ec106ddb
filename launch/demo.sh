#!/usr/bin/env bash
# The demo: draw a dataset, pack it into shards, and train cat_nano on two ranks on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

python examples/draw_dataset.py datasets/shapes-images
python launch/prepare.py datasets/shapes-images datasets/shapes
rm -rf runs/quickstart
deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart.yaml
echo "show the curves with: .venv/bin/tensorboard --logdir runs/quickstart/tensorboard"
