#!/bin/bash
# Trains the next starting point from ImageNet weights, in legs of some hours on two CPU cores: weights/make_lite0.sh FOLDER
# Started again, it goes on. Each leg begins with what the one before wrote, FOLDER/legN/start.pth.tar.
set -euo pipefail
[ $# = 1 ] || { echo "make_lite0.sh: error: give a folder to make the weights in" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # the number of threads decides the last bits

python weights/pretraining/pretrain.py "$OUT/leg1" --steps 2000
python weights/pretraining/pretrain.py "$OUT/leg2" --weight "$OUT/leg1/start.pth.tar" --seed 1 --input-size 128 --steps 450 --lr 0.0002
