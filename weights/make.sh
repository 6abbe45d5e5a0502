#!/bin/bash
# Makes the weights here, from nothing but generated images, in a good hour on two CPU cores: weights/make.sh FOLDER
# Started again, it goes on. FOLDER/start.pth.tar, v98.pth.tar and v107.pth.tar are the weights, in half precision.
set -euo pipefail
[ $# = 1 ] || { echo "make.sh: error: give a folder to make the weights in" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # the number of threads decides the last bits
COMMON="-a test_byobnet --input-size 96 --reference-world-size 1 --log-every 10 --resume auto"
BATCH="--batch-size 64 --memory-size 4000"

python weights/pretraining/pretrain_mini.py "$OUT" --log-every 20
IMAGES=$OUT/input/training_images/
python exp/v83.py $COMMON $BATCH --weight "$OUT/start.pth.tar" --lr 0.001 --epochs 1 --output "$OUT/v83" "$IMAGES"
python exp/v86.py $COMMON $BATCH --weight "$OUT/v83/train/checkpoint_0000.pth.tar" --lr 0.001 --epochs 1 --output "$OUT/v86" "$IMAGES"
python exp/v98.py $COMMON $BATCH --weight "$OUT/v86/train/checkpoint_0000.pth.tar" --lr 0.01 --epochs 3 --output "$OUT/v98" "$IMAGES"
[ -d "$OUT/pairs" ] || python scripts/make_dataset.py "$OUT/pairs" --photos "$OUT/input" --size 128
python exp/v107.py $COMMON --batch-size 8 --memory-size 1000 --weight "$OUT/v98/train/checkpoint_0002.pth.tar" \
    --lr 0.001 --epochs 1 --output "$OUT/v107" "$OUT/pairs/training_images/"

python - "$OUT"/v98/train/checkpoint_0002.pth.tar "$OUT/v98.pth.tar" "$OUT"/v107/train/checkpoint_0000.pth.tar "$OUT/v107.pth.tar" <<'END'
import argparse, sys, torch
torch.serialization.add_safe_globals([argparse.Namespace])
for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    checkpoint = torch.load(source, map_location="cpu")
    state = {name: value.half() if value.is_floating_point() else value for name, value in checkpoint["state_dict"].items()}
    torch.save({"state_dict": state} | {name: checkpoint[name] for name in ("arch", "args", "epoch")}, target)
END
