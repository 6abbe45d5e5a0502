"""What has to be there before a command can run: files that no command of its own makes."""

import json
import shutil

import numpy as np

from common.errors import InputError
from common.files import atomic
from common.reproduction import checks
from common.sample_images import dead_leaves, generator
from common.submissions import read_csv

SEED = 20  # of the generated images and of the random references
SIDE = 640  # pixels of the generated images: more than any --input-size


def draw_images(root):
    """Draw the images of the known answers, as PNG: the same pixels wherever NumPy's and Pillow's
    versions are the pinned ones.
    """
    folder = root / "query_images"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(checks.PROBE_IMAGES):
        path = folder / f"Q{number:05}.png"
        if not path.exists():
            image = dead_leaves(generator(SEED, "training", number), SIDE)
            with atomic(path) as file:
                image.save(file, format="png")


def copy_once(source, target):
    """Copy a checkpoint, unless the copy is there."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target) as file:
        shutil.copyfile(source, file)


def target_set_of(folder):
    """The --target-set of an extraction that was stopped, which left this folder; None where there
    is none.
    """
    try:
        inputs = json.loads((folder / "inputs.json").read_text())
        return inputs["--target-set"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # the stage itself takes such a folder as new


def check_number(data, truth, number):
    """Raise InputError unless a first look at so many references can hold those of the ground
    truth, and the data can give the others; returns the ids that the truth names.
    """
    named = set(read_csv(truth, ("query_id", "reference_id"))["reference_id"]) - {""}
    present = checks.images_by_id(data, "reference_images")
    if not len(named) <= number <= len(present):
        raise InputError(
            f"--references {number}: must lie between {len(named)}, those of the ground truth, and "
            f"{len(present)}, all"
        )
    return named


def link_part(data, root, truth, folder, number):
    """Link the queries of a ground truth, its references and random others into `root`.

    data: folder of all images; folder: name of that of the queries; number: of references. Raises
    InputError where the data hold fewer, or the ground truth has more.
    """
    wanted = check_number(data, truth, number)
    pairs = read_csv(truth, ("query_id", "reference_id"))
    references = checks.images_by_id(data, "reference_images")
    missing = sorted(wanted - references.keys())
    if missing:
        raise InputError(f"{truth}: {missing[0]} has no image in {data}/reference_images")
    others = sorted(references.keys() - wanted)
    drawn = np.random.default_rng(SEED).choice(len(others), number - len(wanted), replace=False)
    chosen = wanted | {others[i] for i in drawn}
    queries = checks.images_by_id(data, folder)
    link_all(root / "reference_images", [references[name] for name in sorted(chosen)])
    present = sorted(set(pairs["query_id"]) & queries.keys())
    link_all(root / folder, [queries[name] for name in present])


def link_all(folder, paths):
    """Link files into a folder; links to these stay, others go, such as those of a moved input."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = {path.name: path.resolve() for path in paths}
    for link in folder.iterdir():
        if link.is_symlink() and link.readlink() != targets.get(link.name):
            link.unlink()
        else:
            targets.pop(link.name, None)
    for name, target in targets.items():
        (folder / name).symlink_to(target)
