"""Files that are no images, or odd ones, among the images: what can be read is used, and the rest
costs a line.
"""

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import postprocess
import v83
from stage_process import TRAINING, assert_same, extract, load, log_lines, make_images


def pixels(height, width, channels=3):
    return np.random.default_rng(height * width).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )


def image_file(mode="RGB", size=(60, 45), form="JPEG", **options):
    """What writes an image of this mode and size."""

    def write(path):
        Image.fromarray(pixels(size[1], size[0], 4), "RGBA").convert("RGB").convert(mode).save(
            path, form, **options
        )

    return write


def truncated(path):
    image_file()(path)
    path.write_bytes(path.read_bytes()[:-300])


def bomb(path):
    """A file of some kilobytes that says it has a few more than 100 million pixels."""
    Image.new("1", (10_001, 10_000)).save(path, "PNG")


def header_alone(path):
    """400 million pixels, of which the file holds none."""
    Image.new("L", (1, 1)).save(path, "PNG")
    content = path.read_bytes()
    path.write_bytes(content[:16] + (20_000).to_bytes(4, "big") * 2 + content[24:])


def huge_tile(path):
    """16 x 16 pixels in a tile of 24,000 x 24,000."""
    tags = {
        256: 16,
        257: 16,
        258: 8,
        259: 1,
        262: 1,
        322: 24_000,
        323: 24_000,
        324: 200,
        325: 24_000**2,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(100))


def animation(path):
    frames = [Image.fromarray(pixels(45, 60) // shade) for shade in (1, 2, 3)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def sixteen_bits(path):
    Image.fromarray(np.linspace(0, 65535, 45 * 60).astype(np.uint16).reshape(45, 60)).save(
        path, "PNG"
    )


def rotated_by_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image_file(exif=exif)(path)


BAD = {
    "missing.jpg": lambda path: path.symlink_to("nowhere.jpg"),
    "endless.jpg": lambda path: path.symlink_to("endless.jpg"),
    "empty.jpg": lambda path: path.touch(),
    "truncated.jpg": truncated,
    "text.jpg": lambda path: path.write_text("this is no image"),
    "folder.jpg": lambda path: path.mkdir(),
    "postscript.jpg": lambda path: path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    ),
    "icon.png": lambda path: Image.new("RGB", (16, 16)).save(path, "ICO"),
    "bomb.png": bomb,
    "header.png": header_alone,
    "tile.tif": huge_tile,
    os.fsdecode(b"\xe9mpty.jpg"): lambda path: path.touch(),
}
GOOD = {
    "gray.jpg": image_file("L"),
    "cmyk.jpg": image_file("CMYK"),
    "palette.png": image_file("P", form="PNG"),
    "transparent.png": image_file("P", form="PNG", transparency=3),
    "alpha.png": image_file("RGBA", form="PNG"),
    "gray-alpha.png": image_file("LA", form="PNG"),
    "bits.png": image_file("1", form="PNG"),
    "16-bit.png": sixteen_bits,
    "exif.jpg": rotated_by_exif,
    "animated.gif": animation,
    "1x1.png": image_file(size=(1, 1), form="PNG"),
    "1x20000.png": image_file(size=(1, 20000), form="PNG"),
    "20000x1.png": image_file(size=(20000, 1), form="PNG"),
    "30x20000.png": image_file(size=(30, 20000), form="PNG"),
    "a png.jpg": image_file(form="PNG"),
    "large.jpg": image_file(size=(3000, 2000)),
    os.fsdecode(b"caf\xe9.jpg"): image_file(),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The usual images, and in every folder all of the above."""
    root = make_images(tmp_path_factory.mktemp("odd") / "input")
    for folder in root.glob("*_images"):
        for name, write in (BAD | GOOD).items():
            write(folder / name)
    return root


# ---- one file ----


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_read(tmp_path, name):
    GOOD[name](tmp_path / name)
    image = v83.open_image(tmp_path / name)
    assert image.mode == "RGB"
    pixels = v83.read_pixels(tmp_path / name)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, image)
    with Image.open(tmp_path / name) as original:
        assert (
            image.size == original.size
        )  # EXIF's orientation is not looked at, as in the published code
    if name == "16-bit.png":
        assert np.abs(np.asarray(image)[..., 0].ravel() - np.linspace(0, 255, 45 * 60)).max() <= 1


@pytest.mark.parametrize("read", [v83.open_image, v83.read_pixels])
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(tmp_path, name, read):
    BAD[name](tmp_path / name)
    with pytest.raises(v83.InputError, match=str(tmp_path / name)):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "options", [{}, {"quality": 40, "subsampling": 0}, {"progressive": True}], ids=str
)
def test_pillow_judges_a_jpeg_with_garbage_inside(tmp_path, monkeypatch, options):
    """Its verdict and its values, also where another decoder is the first to look."""
    path, rng, verdicts = tmp_path / "image.jpg", np.random.default_rng(0), []
    image_file(size=(120, 90), **options)(path)
    whole = path.read_bytes()
    expected = np.asarray(v83.open_image(path))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", None)  # which what is left to Pillow would need
        assert np.array_equal(v83.read_pixels(path), expected)
    for position in rng.integers(2, len(whole), 150).tolist():
        damaged = bytearray(whole)
        damaged[position : position + 3] = rng.bytes(3)
        path.write_bytes(damaged)
        try:
            expected = v83.open_image(path)
        except v83.InputError:
            expected = None
            with pytest.raises(v83.InputError, match=str(path)):
                v83.read_pixels(path)
        else:
            assert np.array_equal(v83.read_pixels(path), expected)
        verdicts.append(expected is None)
    assert 0 < sum(verdicts) < 150


@pytest.mark.parametrize("read", [v83.open_image, v83.read_pixels])
def test_what_follows_an_image_takes_no_memory(tmp_path, read):
    path = tmp_path / "long.jpg"
    image_file()(path)
    expected = np.asarray(v83.open_image(path))
    os.truncate(path, 2**30)
    tracemalloc.start()
    image = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_32_bits_are_unreadable(tmp_path, mode):
    """Pillow would clip them to 0 and 255: black or white, silently."""
    Image.fromarray(pixels(45, 60)[..., 0]).convert(mode).save(tmp_path / "deep.tif")
    for read in (v83.open_image, v83.read_pixels):
        with pytest.raises(v83.InputError, match=r"deep\.tif.*32 bits"):
            read(tmp_path / "deep.tif")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(v83.InputError, match="no such file"):
        v83.open_image(tmp_path / "pipe.jpg")


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become somebody without permission and back"
)
def test_no_permission(tmp_path):
    path = tmp_path / "private.jpg"
    image_file()(path)
    path.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(v83.InputError, match="Permission denied"):
            v83.open_image(path)
    finally:
        os.seteuid(0)


# ---- training ----


def train(start, data, output, *flags, stage="v83", **options):
    argv = [*TRAINING, "--epochs", 2, "--output", output, *flags, data / "training_images"]
    return start(stage, *argv, folder=output / "ranks", **options)


def bad_images(output):
    """What the log says of images that could not be read."""
    return [line["bad_image"] for line in log_lines(output) if "bad_image" in line]


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_names_each_bad_image_once(start, odd, undisturbed, tmp_path, figure, world_size):
    run = train(start, odd, tmp_path, "--max-bad", 1, world_size=world_size)
    assert set(run.wait()) == {0}, run.errors()
    lines = bad_images(tmp_path)
    assert len(lines) == len(set(lines))
    assert {line.partition(": cannot be read")[0] for line in lines} == {
        str(odd / "training_images" / name) for name in BAD
    }
    assert load(tmp_path / "train" / "last.pth.tar")["step"] == 0
    if world_size == 1:
        clean = int((undisturbed[1] / "ranks" / "rank0" / "memory").read_text())
        assert run.memory() <= clean + 300
        figure(
            f"training on {len(BAD)} kinds of bad, {len(GOOD)} of odd images: "
            f"{run.memory() - clean:+d} MB at the peak"
        )


def test_the_stand_in_depends_on_the_index_alone(odd):
    """A bad sample's place is taken by a good one, the same in every batch, process and start."""
    dataset = v83.TrainDataset(odd / "training_images", 32, ncrops=2, sample_size=100, seed=9)
    names = [Path(path).name for path in dataset.paths]
    bad, good = names.index("text.jpg"), names.index("T000003.jpg")
    alone, messages = v83.load_samples(dataset, [bad])
    assert len(messages) == 1 and "text.jpg" in messages[0]
    other = alone.labels[0].item()
    assert names[other] not in BAD and alone.labels.tolist() == [other, other]
    among, messages = v83.load_samples(dataset, [good, bad, good])
    assert len(messages) == 1 and "text.jpg" in messages[0]
    assert among.labels.tolist() == [good, good, other, other, good, good]
    assert torch.equal(among.pixels[2:4], alone.pixels)


@pytest.mark.parametrize("flags", [["--bad-images", "error"], [], ["--max-bad", "0.1"]])
def test_too_many_bad_images_end_the_run(start, odd, tmp_path, flags):
    run = train(start, odd, tmp_path, *flags)
    assert run.wait() == [2]
    (line,) = [line for line in run.errors().splitlines() if "error:" in line]
    allowed = {"error": 0, "0.1": 6}.get((flags or [""])[-1], 1)
    number = int(line.split("error: ")[1].split()[0])
    assert number > allowed and line.count("cannot be read") == min(number, 10)
    assert "Traceback" not in run.errors()


def test_one_bad_image_never_ends_a_run(start, data, tmp_path):
    shutil.copytree(data, tmp_path / "input")
    bad = tmp_path / "input" / "training_images" / "T000007.jpg"
    bad.write_text("this is no image")
    run = train(start, tmp_path / "input", tmp_path)
    assert run.wait() == [0], run.errors()
    assert len(bad_images(tmp_path)) == 1 and str(bad) in bad_images(tmp_path)[0]


def test_a_resumed_run_does_not_name_them_again(start, data, tmp_path):
    shutil.copytree(data, tmp_path / "input")
    (tmp_path / "input" / "training_images" / "T000007.jpg").write_text("this is no image")
    assert train(start, tmp_path / "input", tmp_path).wait() == [0]
    assert train(start, tmp_path / "input", tmp_path, "--epochs", 3, "--resume", "auto").wait() == [
        0
    ]
    assert len(bad_images(tmp_path)) == 1
    assert len(load(tmp_path / "train" / "last.pth.tar")["bad_images"]) == 1


@pytest.mark.parametrize("stage", ["v98", "v107"])
def test_a_bad_image_of_several_in_a_sample(start, data, tmp_path, stage):
    """One that serves as negative, in turn, of many samples is named once, and its samples give
    way.
    """
    root = tmp_path / "input"
    shutil.copytree(data, root)
    pairs = "".join(f"Q{i:05d},R{i:06d}\n" for i in range(8))
    (root / "public_ground_truth.csv").write_text("query_id,reference_id\n" + pairs)
    bad = root / "reference_images" / "R000015.jpg"
    bad.write_text("this is no image")
    flags = {"v98": [], "v107": ["--num-negatives", 4]}[stage]
    run = train(start, root, tmp_path, *flags, "--epochs", 6, stage=stage)
    assert run.wait() == [0], run.errors()
    (line,) = bad_images(tmp_path)
    assert str(bad) in line
    labels = load(tmp_path / "train" / "last.pth.tar")["memory_bank"]["bank_labels"].tolist()
    first = {"v98": 40, "v107": 8}[stage]  # of the references' labels, after images or pairs
    number = {"v98": 15, "v107": 15 - 8}[stage]
    assert first + number not in labels and max(labels) >= first


def test_hidden_files_are_no_images(start, data, undisturbed, tmp_path):
    """As macOS leaves them beside each image on a foreign disk: training and extraction do as
    without them.
    """
    root = shutil.copytree(data, tmp_path / "input")
    for folder in root.glob("*_images"):
        for path in list(folder.iterdir()):
            (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    run = train(start, root, tmp_path, "--epochs", 1, "--checkpoint-every", 3)
    assert run.wait() == [0], run.errors()
    assert bad_images(tmp_path) == []
    weight, expected = (
        folder / "train" / "checkpoint_0000.pth.tar" for folder in (tmp_path, undisturbed[1])
    )
    assert_same(load(weight)["state_dict"], load(expected)["state_dict"])
    run = extract(start, root, tmp_path, weight)
    assert run.wait() == [0], run.errors()
    with h5py.File(tmp_path / "extract" / "fb-isc-submission.h5") as file:
        assert file["query_ids"][()].tolist() == [b"Q%05d" % i for i in range(9)]


def test_no_image_is_readable(start, tmp_path):
    (tmp_path / "training_images").mkdir()
    for i in range(8):
        (tmp_path / "training_images" / f"{i}.jpg").write_text("this is no image")
    run = train(start, tmp_path, tmp_path / "out", "--max-bad", 1)
    assert run.wait() == [2]
    (line,) = [line for line in run.errors().splitlines() if "error:" in line]
    assert "cannot be read" in line and "Traceback" not in run.errors()


# ---- extraction ----


@pytest.fixture(scope="module")
def weight(undisturbed):
    return undisturbed[1] / "train" / "last.pth.tar"


def printed(name):
    """A file's name as a terminal and an id show it: bytes that are no text are escaped."""
    return str(name).encode(errors="backslashreplace").decode()


@pytest.fixture(scope="module")
def clean(start, data, weight, tmp_path_factory):
    """An extraction of the usual images."""
    output = tmp_path_factory.mktemp("clean")
    run = extract(start, data, output, weight)
    assert run.wait() == [0], run.errors()
    return output, run.memory()


@pytest.mark.parametrize("world_size", [1, 2])
def test_extraction_ends_with_the_list_and_goes_on(start, data, odd, weight, tmp_path, world_size):
    """All others are done and kept: after the bad ones are replaced, only their batches are
    computed.
    """
    root = tmp_path / "input"
    shutil.copytree(odd, root, symlinks=True)
    run = extract(start, root, tmp_path, weight, world_size=world_size)
    assert run.wait() == [2] * world_size
    for line in [line for line in run.errors().splitlines() if "error:" in line]:
        assert f"{3 * len(BAD)} unreadable images" in line and "--bad-images zero" in line
        for folder in ("query_images", "reference_images", "training_images"):
            for name in BAD:
                assert f"{printed(root / folder / name)}: cannot be read" in line
    assert "Traceback" not in run.errors()
    assert not list((tmp_path / "extract").glob("*.*"))
    before = run.images()
    bad = [path for path in root.glob("*/*") if path.name in BAD]
    for path in bad:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copy(data / "query_images" / "Q00001.jpg", path)
    run = extract(start, root, tmp_path, weight, world_size=world_size)
    assert set(run.wait()) == {0}, run.errors()
    assert run.images() - before < before
    whole = extract(start, root, tmp_path / "whole", weight)
    assert whole.wait() == [0]
    for name in ("fb-isc-submission.h5", "train_feats.npy"):
        assert (tmp_path / "extract" / name).read_bytes() == (
            tmp_path / "whole" / "extract" / name
        ).read_bytes()


def test_rows_of_zeros(start, odd, weight, clean, tmp_path, capsys, figure):
    run = extract(start, odd, tmp_path, weight, "--bad-images", "zero")
    assert run.wait() == [0], run.errors()
    assert run.memory() <= clean[1] + 300
    figure(f"extraction of the same images: {run.memory() - clean[1]:+d} MB at the peak")
    with h5py.File(tmp_path / "extract" / "fb-isc-submission.h5") as file:
        rows = {name: values[()] for name, values in file.items()}
    train = np.load(tmp_path / "extract" / "train_feats.npy")
    expected = sorted(printed(name).rpartition(".")[0] for name in BAD)
    for name in ("query", "reference"):
        zero = ~rows[name].any(axis=1)
        assert sorted(id_.decode() for id_ in rows[f"{name}_ids"][zero]) == expected
        np.testing.assert_allclose(np.linalg.norm(rows[name][~zero], axis=1), 1, atol=1e-5)
    assert (~train.any(axis=1)).sum() == len(BAD)
    assert b"caf\\udce9" in rows["query_ids"]
    listed = (tmp_path / "extract" / "zero-rows.txt").read_text().splitlines()
    assert sorted(listed) == sorted(3 * expected)
    with h5py.File(
        clean[0] / "extract" / "fb-isc-submission.h5"
    ) as file:  # the others are what they were
        positions = [rows["query_ids"].tolist().index(id_) for id_ in file["query_ids"][()]]
        np.testing.assert_allclose(rows["query"][positions], file["query"][()], atol=1e-5)
    exp = tmp_path / "exp" / "v83"
    exp.mkdir(parents=True)
    (exp / "extract").symlink_to(tmp_path / "extract")
    assert postprocess.main(["v83", "--exp", str(tmp_path / "exp")]) == 0, capsys.readouterr().err
    with h5py.File(exp / "extract" / "v83_iso.h5") as file:
        assert np.array_equal(file["query"][()].any(axis=1), rows["query"].any(axis=1))


def test_all_images_of_a_set_are_bad(start, data, weight, tmp_path):
    root = tmp_path / "input"
    shutil.copytree(data, root)
    for path in (root / "query_images").iterdir():
        path.write_text("this is no image")
    run = extract(start, root, tmp_path, weight)
    assert run.wait() == [2]
    assert "9 unreadable images" in run.errors() and run.images() == 71
    run = extract(start, root, tmp_path, weight, "--bad-images", "zero")
    assert run.wait() == [0], run.errors()
    with h5py.File(tmp_path / "extract" / "fb-isc-submission.h5") as file:
        assert not file["query"][()].any() and file["reference"][()].any(axis=1).all()


def test_what_was_replaced_is_not_zero(start, data, weight, clean, tmp_path):
    root = tmp_path / "input"
    shutil.copytree(data, root)
    (root / "query_images" / "Q00004.jpg").write_text("this is no image")
    assert extract(start, root, tmp_path, weight).wait() == [2]
    shutil.copy(data / "query_images" / "Q00004.jpg", root / "query_images")
    run = extract(start, root, tmp_path, weight, "--bad-images", "zero")
    assert run.wait() == [0], run.errors()
    assert (tmp_path / "extract" / "zero-rows.txt").read_text() == ""
    h5 = "extract/fb-isc-submission.h5"
    assert (tmp_path / h5).read_bytes() == (clean[0] / h5).read_bytes()


@pytest.mark.parametrize(("mode", "policy"), [("train", "zero"), ("extract", "skip")])
def test_a_policy_of_the_other_mode(capsys, mode, policy):
    with pytest.raises(SystemExit, match="2"):
        v83.parse_args(["--mode", mode, "--bad-images", policy, "data"])
    assert f"--bad-images {policy}" in capsys.readouterr().err


def test_lines_are_plain_json(start, odd, tmp_path):
    """Whatever bytes a name has, the log is text."""
    assert train(start, odd, tmp_path, "--max-bad", 1, "--epochs", 1).wait() == [0]
    for line in (tmp_path / "train" / "log.jsonl").read_bytes().splitlines():
        json.loads(line.decode("ascii"))
