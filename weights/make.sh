#!/bin/bash
# Makes the checkpoints and logs of weights/ from start.pth.tar of an earlier commit: weights/make.sh FOLDER
# It takes an hour on two CPU cores, and needs 16 GB of memory, requirements-dev.txt and the history of this repository.
# Started again, it resumes; after a change in this file or in pretraining/, give a new FOLDER.
# Afterwards copy the files to weights/, export v98.onnx (python scripts/export.py weights/v98.onnx), measure its thresholds
# (scripts/dev/match_thresholds.py), put them into scripts/export.py, export and measure again. Renew the sums in
# weights/README.md and docs/known_answers.json.
set -euo pipefail
[ $# = 1 ] || { echo "make.sh: error: give a folder to make the weights in" >&2; exit 2; }
mkdir -p "$1"
ROOT=$(realpath "$(dirname "$0")/..")
OUT=$(realpath --relative-base="$ROOT" "$1")  # the files record their paths
cd "$ROOT"
export OMP_NUM_THREADS=1  # the number of threads decides the last bits
# Let glibc keep what is freed: the page faults of each step's large tensors cost a third of its time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647

# Dead leaves to train with; references, which are v98's negatives; queries, of which v107 takes the copies.
[ -d "$OUT/images" ] || python scripts/make_dataset.py "$OUT/images" --size 160 --training 10000 --references 1000
LEAVES=$OUT/images/training_images

# The start of an earlier commit: earlier versions of this script made it from ImageNet weights, in four legs
# (weights/README.md). Without --weight, pretrain.py begins with ImageNet weights; the result scores lower.
git show 0ccfbff:weights/start.pth.tar > "$OUT/before.pth.tar" || {
    echo "make.sh: error: commit 0ccfbff is not here; clone the repository with its history" >&2
    exit 2
}

# Two runs side by side, one on each core. With exec, killing the background job kills Python.
pretrain() {
    exec python weights/pretraining/pretrain.py "$OUT/pretrain-$1" "$LEAVES" --seed "$1" \
        --weight "$OUT/before.pth.tar" --steps 450 --lr 2e-4
}
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT  # leave no run behind
pretrain 0 &
pretrain 1 &
wait -n  # ends the script if the run failed
wait -n

finish() {  # OUT CHECKPOINT...
    [ -e "$1" ] || python weights/pretraining/finish.py "$@" --images "$LEAVES"
}
finish "$OUT/start.pth.tar" "$OUT"/{pretrain-0/last,pretrain-1/last,before}.pth.tar --new-head

# --reference-world-size 1: the rates are for a loss that is not divided by the author's number of GPUs.
COMMON="-a tf_efficientnet_lite0 --reference-world-size 1 --epochs 1 --log-every 10 --resume auto"
BATCH="--batch-size 64 --memory-size 4000 --sample-size 2000"
python exp/v83.py $COMMON $BATCH --input-size 96 --weight "$OUT/start.pth.tar" --lr 0.001 --output "$OUT/v83" "$LEAVES/"
python exp/v86.py $COMMON $BATCH --input-size 128 --weight "$OUT/v83/train/checkpoint_0000.pth.tar" --lr 0.001 --output "$OUT/v86" "$LEAVES/"
python exp/v98.py $COMMON $BATCH --input-size 160 --weight "$OUT/v86/train/checkpoint_0000.pth.tar" --lr 0.0003 --output "$OUT/v98" "$LEAVES/"
python exp/v107.py $COMMON --batch-size 8 --memory-size 1000 --input-size 160 \
    --weight "$OUT/v98/train/checkpoint_0000.pth.tar" --lr 0.0003 --output "$OUT/v107" "$LEAVES/"

for stage in v98 v107; do
    finish "$OUT/$stage.pth.tar" "$OUT/$stage/train/checkpoint_0000.pth.tar" --statistics "$OUT/start.pth.tar"
done

cat "$OUT"/pretrain-{0,1}/log.jsonl > "$OUT/start.jsonl"
cat "$OUT"/v83/train/log.jsonl "$OUT"/v86/train/log.jsonl "$OUT"/v98/train/log.jsonl > "$OUT/v98.jsonl"
cp "$OUT/v107/train/log.jsonl" "$OUT/v107.jsonl"
