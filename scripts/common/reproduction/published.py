"""What was published: commands, scores, numbers of images, memory and times, as data.

The training commands are those of the README, the scores those of its table "Results", memory and
times those of docs/PERFORMANCE.md. Tests compare them.
"""

from dataclasses import dataclass

ARCH = "tf_efficientnetv2_m_in21ft1k"
SAME_ARCH = "tf_efficientnetv2_m.in21k_ft_in1k"  # timm's newer name for it
PUBLISHED_KEYS = 1118  # tensors of a published checkpoint
INPUT_SIZE = 512  # of extraction

# ---- training ----

COMMON = (
    "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 "
    "--wd 1e-6 --gem-p 1.0 --pos-margin 0.0 --sample-size 1000000"
)


@dataclass(frozen=True)
class Training:
    """One training run.

    name: of its folder; script: the stage; flags: the published ones beyond COMMON; start: (run,
    epoch) whose checkpoint it starts from, resumed where the script is the same; result: epoch of
    the checkpoint that is used afterwards.
    """

    name: str
    script: str
    input_size: int
    epochs: int
    flags: str
    start: tuple | None
    result: int

    @property
    def resumes(self):
        """Whether it goes on from its start, epochs counted on, rather than with its weights."""
        return self.start is not None and self.start[0].partition("-")[0] == self.script

    @property
    def first_epoch(self):
        """The number of its first epoch."""
        return self.start[1] + 1 if self.resumes else 0


TRAININGS = (
    Training(
        name="v83-first",
        script="v83",
        input_size=256,
        epochs=5,
        flags="--lr 0.1 --batch-size 128 --ncrops 2 --neg-margin 1.0 --memory-size 20000 --seed 9",
        start=None,
        result=4,
    ),
    Training(
        name="v83",
        script="v83",
        input_size=256,
        epochs=10,
        flags="--lr 0.1 --batch-size 128 --ncrops 2 --neg-margin 1.0 --memory-size 20000 --seed 90",
        start=("v83-first", 4),
        result=5,
    ),
    Training(
        name="v86",
        script="v86",
        input_size=384,
        epochs=7,
        flags="--lr 0.1 --batch-size 128 --ncrops 2 --neg-margin 1.0 --memory-size 20000 --seed 99",
        start=("v83", 5),
        result=5,
    ),
    Training(
        name="v98",
        script="v98",
        input_size=512,
        epochs=3,
        flags="--lr 0.1 --batch-size 64 --ncrops 2 --neg-margin 1.0 --memory-size 20000 --seed 999",
        start=("v86", 5),
        result=1,
    ),
    Training(
        name="v107",
        script="v107",
        input_size=512,
        epochs=10,
        flags="--lr 0.5 --neg-margin 1.1 --memory-size 1000 --seed 99999",
        start=("v98", 1),
        result=9,
    ),
)

# ---- scores ----


@dataclass(frozen=True)
class Score:
    """Micro average precision and recall at 90% precision; None where nobody published it."""

    average_precision: float
    recall_p90: float | None


SCORES = {
    "v98": Score(0.6519, 0.5710),
    "v107": Score(0.9399, 0.8964),
    "v107 + NES": Score(0.9479039, 0.9192547),
    "v107 + NES, phase 2": Score(0.6354, None),
}
CONTAMINATED = "contaminated: v107 trains on these very pairs"  # its scores of phase 1
TOLERANCE = {"published": 0.001, "trained": 0.01}

# ---- data ----

IMAGES = {
    "training_images": 1_000_000,
    "reference_images": 1_000_000,
    "query_images": 50_000,
    "query_images_phase2": 50_000,
}
BYTES_OF_DATA = 350e9  # all four folders
BUCKET = "s3://drivendata-competition-fb-isc-data/all"
IN_BUCKET = {"training_images": "train_images"}  # where its name is another
GROUND_TRUTH = (
    "git clone --depth 1 https://github.com/facebookresearch/isc2021 && "
    "cp isc2021/list_files/public_ground_truth.csv"
)

PRIVATE_GROUND_TRUTH = (
    "the labels of phase 2, columns query_id,reference_id: see Meta's DISC21 page, "
    "https://ai.meta.com/datasets/disc21-dataset/; the challenge's repository has phase 1's alone"
)

# ---- memory, disk and times: docs/PERFORMANCE.md ----

NUMBERS_OF_GPUS = (1, 2, 4, 8, 16)
# Peak memory of one GPU in GB: without --grad-checkpointing, and with it.
MEMORY = {
    "v83": ((43.1, 21.8, 11.3, 5.9, 3.3), (16.3, 8.5, 4.7, 2.6, 1.6)),
    "v86": ((95.9, 48.2, 24.4, 12.6, 6.6), (36.0, 18.3, 9.5, 5.2, 2.9)),
    "v98": ((169.7, 85.2, 43.0, 21.7, 11.2), (63.3, 32.0, 16.3, 8.5, 4.7)),
    "v107": ((338.9, 169.7, 85.2, 43.0, 21.7), (125.8, 63.2, 31.9, 16.3, 8.5)),
}
# Of extraction in fp16, in GB: the weights, and for each image of 512 pixels its input and the
# largest feature maps that are there at once. Computed with PyTorch's meta device, not measured.
NETWORK_GB = 0.2
EXTRACTED_IMAGE_GB = 0.03
CONTEXT = 0.5  # GB of a GPU that CUDA itself takes
TIGHT = 0.85  # share of a GPU's memory above which a stage fits tightly

CHECKPOINT_GB = 0.44
DESCRIPTOR_GB = 1024e-9 * 2  # of an image: its row, and as much again in extract/unfinished

A100_SECONDS_AN_IMAGE = 0.088  # of extraction: 0.0055 s on 16 of them
# Lower bounds in minutes, for all epochs on 16 A100s and 96 cores: GPU, kernel launches, data
# loading. To plan a run, the longest is doubled.
TRAINING_MINUTES = {
    "v83": (14, 58, 18),
    "v86": (22, 40, 15),
    "v98": (34, 35, 17),
    "v107": (4.5, 2, 2),
}
CORES_OF_THE_TABLE = 96
CHECKPOINTING_COST = 1.38  # times as much work on the GPU
CPU_SECONDS_AN_IMAGE = 2
