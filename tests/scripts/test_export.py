"""scripts/export.py: a file gives the network's descriptors and says what its input is, or is not
kept.
"""

import copy
import hashlib
import json
import pickle
import re
from argparse import Namespace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import export
import v107
from common.sample_images import dead_leaves
from conftest import ROOT, run

SMALL = "test_resnet"
SAME = "tf_mobilenetv3_small_minimal_100"  # its padding ("SAME") depends on the size
SIZE = 64
FORMATS = [".onnx", ".pt", ".safetensors"]


def generated(number, size=SIZE):
    """Generated images, none of which the parity gate sees."""
    return [dead_leaves(np.random.default_rng([9, i]), size) for i in range(number)]


def preprocess(model, images, size=SIZE):
    config = model.backbone.default_cfg
    transform = v107.evaluation_transform(size, config["mean"], config["std"])
    return torch.stack([transform(image) for image in images])


@pytest.fixture(scope="module")
def models():
    """Networks of random weights by name, with BatchNorm's statistics of images: with others,
    activations would explode.
    """
    torch.manual_seed(0)
    found = {}
    for arch in (SMALL, SAME):
        model = v107.ISCNet(timm.create_model(arch, features_only=True))
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        with torch.no_grad():
            model(preprocess(model, generated(24)))
        found[arch] = model.eval()
    return found


@pytest.fixture(scope="module", autouse=True)
def cheaper():
    """The gate's images are generated once for all tests, and torch's threads do not wait for
    each other.
    """
    threads = torch.get_num_threads()
    generate = export.parity_images
    torch.set_num_threads(1)
    kept = generate(None, SIZE)

    def parity_images(photos, input_size):
        return generate(photos, input_size) if photos else kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "parity_images", parity_images)
        yield
    torch.set_num_threads(threads)


def save(model, path):
    """A checkpoint as the author's are: keys with a prefix, and a Namespace of arguments."""
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 9, "state_dict": weights, "args": Namespace(arch="any")}, path)
    return path


@pytest.fixture
def checkpoint(models, tmp_path):
    return save(models[SMALL], tmp_path / "small.pth.tar")


def export_to(output, checkpoint, *flags, arch=SMALL):
    return export.main(
        [str(checkpoint), str(output), "-a", arch, "--input-size", str(SIZE), *map(str, flags)]
    )


def contents(folder):
    """{path: bytes} of the files in a folder."""
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refuse(capsys, output, checkpoint, *flags, words, arch=SMALL):
    """The command ends with 2 and one line that holds all words; no file has appeared, changed or
    gone.
    """
    before = contents(checkpoint.parent)
    assert export_to(output, checkpoint, *flags, arch=arch) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error:" in line]
    assert captured.out == "" and len(errors) == 1, captured
    assert errors[0].startswith("export.py: error: ")
    assert "Traceback" not in captured.err and errors[0].endswith("; nothing was written")
    for word in words:
        assert str(word) in errors[0], errors[0]
    assert contents(checkpoint.parent) == before


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def reader(path):
    """The file's network, a function from images to descriptors, without export.py."""
    if path.suffix == ".onnx":
        opened = session(path)
        return lambda images: torch.from_numpy(opened.run(None, {"images": images.numpy()})[0])
    if path.suffix == ".pt":
        return torch.jit.load(path)
    model = v107.ISCNet(timm.create_model(SMALL, features_only=True)).eval()
    model.load_state_dict(load_file(path))
    return model


def config_of(path):
    if path.suffix == ".onnx":
        return json.loads(session(path).get_modelmeta().custom_metadata_map["config"])
    if path.suffix == ".pt":
        files = {"config.json": ""}
        torch.jit.load(path, _extra_files=files)
        return json.loads(files["config.json"])
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["config"])


@torch.no_grad()
def assert_agrees(read, model, images, cosine=0.9999, difference=1e-4):
    expected, actual = model(images), read(images)
    assert actual.dtype == torch.float32 and actual.shape == (len(images), 256)
    assert (actual.norm(dim=1) - 1).abs().max() < 1e-5
    assert (expected * actual).sum(dim=1).min() > cosine
    assert (expected - actual).abs().max() < difference


# ---- what is written ----


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_gives_the_descriptors_of_the_network(models, checkpoint, tmp_path, capsys, suffix):
    output = tmp_path / f"isc{suffix}"
    assert export_to(output, checkpoint) == 0
    line = (
        rf"{output}: (\d+\.\d) MB, smallest cosine (\d\.\d{{7}}), largest difference (\S+) of "
        rf"32 images\n"
    )
    size, cosine, difference = map(float, re.fullmatch(line, capsys.readouterr().out).groups())
    assert (
        size == pytest.approx(output.stat().st_size / 1e6, abs=0.06)
        and cosine > 0.9999
        and difference < 1e-4
    )
    beside = {"isc.json"} if suffix == ".safetensors" else set()
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.name, output.name} | beside
    read = reader(output)
    for number in (1, 5):
        assert_agrees(read, models[SMALL], preprocess(models[SMALL], generated(number)))
    config = config_of(output)
    assert (
        config.items()
        >= {
            "arch": SMALL,
            "input_size": SIZE,
            "mean": list(models[SMALL].backbone.default_cfg["mean"]),
            "std": list(models[SMALL].backbone.default_cfg["std"]),
            "colour": "RGB",
            "resize": "bilinear, antialias, to a square",
            "scale": "1/255, then (x - mean) / std",
            "gem_eval_p": 1.0,
            "size": "fixed",
            "precision": "fp32",
            "dim": 256,
            "weights_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        }.items()
    )
    if beside:
        assert json.loads((tmp_path / "isc.json").read_text()) == config


def test_the_interface_of_onnx(checkpoint, tmp_path):
    for size, sides in (("dynamic", ["height", "width"]), ("fixed", [SIZE, SIZE])):
        assert export_to(tmp_path / "isc.onnx", checkpoint, "--size", size) == 0
        opened = session(tmp_path / "isc.onnx")
        (images,), (descriptors,) = opened.get_inputs(), opened.get_outputs()
        assert (images.name, images.type, images.shape) == (
            "images",
            "tensor(float)",
            ["n", 3, *sides],
        )
        assert (descriptors.name, descriptors.type, descriptors.shape) == (
            "descriptors",
            "tensor(float)",
            ["n", 256],
        )
        assert config_of(tmp_path / "isc.onnx")["size"] == size
        exported = onnx.load(tmp_path / "isc.onnx", load_external_data=False)
        assert all(
            weight.data_location == TensorProto.DEFAULT for weight in exported.graph.initializer
        )
    with pytest.raises(Exception, match="invalid dimensions"):
        opened.run(None, {"images": np.zeros((1, 3, SIZE, SIZE + 1), np.float32)})


@pytest.mark.parametrize("suffix", [".onnx", ".pt"])
def test_any_size_where_the_padding_depends_on_it(models, tmp_path, suffix):
    output = tmp_path / f"isc{suffix}"
    checkpoint = save(models[SAME], tmp_path / "same.pth.tar")
    assert export_to(output, checkpoint, "--size", "dynamic", arch=SAME) == 0
    read, images = reader(output), preprocess(models[SAME], generated(3), 160)
    for height, width in ((SIZE, SIZE), (160, 160), (97, 130), (51, 148)):
        assert_agrees(read, models[SAME], images[:, :, :height, :width].contiguous())


def test_fp16_computes_the_backbone_in_float16_and_sizes_in_float32(models, tmp_path):
    output = tmp_path / "isc.onnx"
    checkpoint = save(models[SAME], tmp_path / "same.pth.tar")
    assert export_to(output, checkpoint, "--size", "dynamic", "--precision", "fp16", arch=SAME) == 0
    assert output.stat().st_size < 0.65 * checkpoint.stat().st_size
    assert config_of(output)["precision"] == "fp16"
    graph = onnx.shape_inference.infer_shapes(onnx.load(output)).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]
    }
    found = {
        (node.op_type, types[node.output[0]])
        for node in graph.node
        if node.op_type in ("Conv", "Ceil", "MatMul")
    }
    assert found == {
        ("Conv", TensorProto.FLOAT16),
        ("Ceil", TensorProto.FLOAT),
        ("MatMul", TensorProto.FLOAT),
    }
    casts = [value for name, value in types.items() if "cast" in name]
    assert casts.count(TensorProto.FLOAT16) == 1  # of the input
    read, images = reader(output), preprocess(models[SAME], generated(3))
    assert_agrees(read, models[SAME], images, 0.9995, 1e-2)
    # float16 would round 4099.
    tall = torch.nn.functional.interpolate(images[:1], (4099, 33), mode="bilinear")
    assert_agrees(read, models[SAME], tall, 0.9995, 1e-2)


def test_weights_in_half_precision_are_stored_so(models, checkpoint, tmp_path):
    """The file is half as large; it computes in float32, and with the same weights."""
    model = models[SMALL]
    single = tmp_path / "single.onnx"
    assert export_to(single, checkpoint) == 0
    rounded = {}
    for name, value in model.state_dict().items():
        rounded[name] = value.half().float() if value.is_floating_point() else value
    torch.save({"state_dict": rounded}, checkpoint)
    half = tmp_path / "half.onnx"
    assert export_to(half, checkpoint) == 0
    assert half.stat().st_size < 0.6 * single.stat().st_size
    model = copy.deepcopy(model)
    model.load_state_dict(rounded)
    assert_agrees(reader(half), model, preprocess(model, generated(5)))


def test_fp16_weights(models, checkpoint, tmp_path):
    output = tmp_path / "isc.safetensors"
    assert export_to(output, checkpoint, "--precision", "fp16") == 0
    kinds = {name: value.dtype for name, value in load_file(output).items()}
    assert kinds.keys() == models[SMALL].state_dict().keys()
    for name, kind in kinds.items():
        half = name.startswith("backbone.") and not name.endswith("num_batches_tracked")
        assert kind == (torch.float16 if half else models[SMALL].state_dict()[name].dtype), name
    assert_agrees(
        reader(output), models[SMALL], preprocess(models[SMALL], generated(5)), 0.9995, 1e-2
    )


def test_the_pooling_exponent_is_exported(models, checkpoint, tmp_path):
    assert export_to(tmp_path / "isc.onnx", checkpoint, "--gem-eval-p", 3) == 0
    model = v107.ISCNet(timm.create_model(SMALL, features_only=True), eval_p=3.0).eval()
    model.load_state_dict(models[SMALL].state_dict())
    images = preprocess(model, generated(3))
    assert_agrees(reader(tmp_path / "isc.onnx"), model, images)
    with torch.no_grad():
        assert (model(images) - models[SMALL](images)).abs().max() > 0.01


WITHOUT_TORCH = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
config = json.loads(session.get_modelmeta().custom_metadata_map["config"])
side = config["input_size"]
image = Image.open(sys.argv[2]).convert(config["colour"])
pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
images = (pixels.astype(np.float32) / 255 - np.float32(config["mean"])) / np.float32(config["std"])
descriptors = session.run([config["output"]], {config["input"]: images.transpose(2, 0, 1)[None]})[0]
assert "torch" not in sys.modules
print(json.dumps(descriptors[0].tolist()))
"""


def test_the_config_suffices_without_torch(models, checkpoint, tmp_path):
    """A descriptor by onnxruntime, Pillow and the config alone."""
    assert export_to(tmp_path / "isc.onnx", checkpoint) == 0
    image = dead_leaves(np.random.default_rng(3), 120).crop((0, 0, 120, 80))
    image.save(tmp_path / "image.png")
    result = run("-c", WITHOUT_TORCH, tmp_path / "isc.onnx", tmp_path / "image.png")
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = models[SMALL](
            preprocess(models[SMALL], [v107.open_image(tmp_path / "image.png")])
        )
    np.testing.assert_allclose(json.loads(result.stdout), expected[0].numpy(), rtol=0, atol=1e-4)


# ---- the gate ----


def damaged(function, damage):
    """The writer of a format, whose weight of the head is damaged."""

    def write(model, config, images):
        other = v107.ISCNet(timm.create_model(SMALL, features_only=True)).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            damage(other.fc.weight)
        return function(other, config, images)

    return write


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_differs_is_not_kept(checkpoint, tmp_path, monkeypatch, capsys, suffix):
    write, read = export.FORMATS[suffix]
    monkeypatch.setitem(
        export.FORMATS, suffix, (damaged(write, lambda weight: weight[:, :9].mul_(1.01)), read)
    )
    words = [
        f"isc{suffix}",
        "smallest cosine 0.99",
        "largest difference 0.0",
        "above 0.9999 and below 0.0001",
    ]
    if suffix == ".onnx":
        (tmp_path / "isc.onnx").write_text("what was there before")
    refuse(capsys, tmp_path / f"isc{suffix}", checkpoint, words=words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weight: weight[0, 0].fill_(torch.nan), "NaN or infinity"),
        (lambda weight: weight.zero_(), "same numbers"),
    ],
)
def test_a_file_of_a_collapsed_network_is_not_kept(
    checkpoint, tmp_path, monkeypatch, capsys, damage, words
):
    write, read = export.FORMATS[".onnx"]
    monkeypatch.setitem(export.FORMATS, ".onnx", (damaged(write, damage), read))
    refuse(capsys, tmp_path / "isc.onnx", checkpoint, words=["isc.onnx", words])


@pytest.mark.parametrize(("value", "words"), [(torch.nan, "NaN or infinity"), (0, "same numbers")])
def test_a_collapsed_network_is_refused(models, tmp_path, capsys, value, words):
    model = v107.ISCNet(timm.create_model(SMALL, features_only=True))
    model.load_state_dict(models[SMALL].state_dict())
    torch.nn.init.constant_(model.fc.weight, value)
    checkpoint = save(model, tmp_path / "small.pth.tar")
    refuse(capsys, tmp_path / "isc.safetensors", checkpoint, words=["small.pth.tar", words])


@pytest.mark.parametrize("suffix", [".onnx", ".pt"])
def test_a_size_that_was_baked_in_is_refused(models, tmp_path, monkeypatch, capsys, suffix):
    """Of the padding, for example: timm computes it with tensors while the network is traced."""
    padding = timm.layers.padding.get_same_padding
    monkeypatch.setattr(
        timm.layers.padding, "get_same_padding", lambda x, *others: padding(int(x), *others)
    )
    checkpoint = save(models[SAME], tmp_path / "same.pth.tar")
    output = tmp_path / f"isc{suffix}"
    refuse(
        capsys,
        output,
        checkpoint,
        "--size",
        "dynamic",
        arch=SAME,
        words=[output.name, "smallest cosine"],
    )
    if suffix == ".onnx":
        assert export_to(output, checkpoint, "--size", "fixed", arch=SAME) == 0


def test_what_the_gate_compares(models, tmp_path):
    """32 different images, in batches of several sizes; those of --photos come first, preprocessed
    as in extraction.
    """
    for number, image in enumerate(generated(3, 90)):
        image.crop((0, 0, 90, 50)).save(tmp_path / f"{number}.png")
    flags = [
        "small.pth.tar",
        "isc.onnx",
        "--input-size",
        str(SIZE),
        "--photos",
        str(tmp_path),
        "--size",
    ]
    batches = export.parity_batches(export.parse_args([*flags, "fixed"]), models[SMALL])
    assert [len(batch) for batch in batches] == [1, 3, 4, 8, 8, 8]
    images = torch.cat(batches)
    assert images.shape == (32, 3, SIZE, SIZE) and len(images.flatten(1).unique(dim=0)) == 32
    opened = [v107.open_image(tmp_path / f"{number}.png") for number in range(3)]
    assert torch.equal(images[:3], preprocess(models[SMALL], opened))
    *same, small, large = export.parity_batches(
        export.parse_args([*flags, "dynamic"]), models[SMALL]
    )
    assert torch.equal(torch.cat(same), images)
    assert (small.shape, large.shape) == ((8, 3, 33, 64), (8, 3, 97, 66))


def test_bounds_are_strict():
    expected = np.eye(3, 256)
    for precision, difference in (("fp32", 1e-4), ("fp16", 0.03)):
        for factor, refused in ((1.01, True), (0.99, False)):
            actual = expected.copy()
            actual[1, 7] = factor * difference
            if refused:
                with pytest.raises(v107.InputError, match=r"isc.onnx: .* largest difference"):
                    export.check(expected, actual, precision, "isc.onnx")
            else:
                assert "smallest cosine" in export.check(expected, actual, precision, "isc.onnx")
    # No number is off by 0.03, but the cosine is too small.
    expected = np.ones((1, 256)) / 16
    actual = (1 + 0.06 * (-1.0) ** np.arange(256))[None] / 16
    with pytest.raises(v107.InputError, match=r"smallest cosine 0\.998"):
        export.check(expected, actual, "fp16", "isc.onnx")


# ---- wrong input ----


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_the_small_network_is_the_default(tmp_path, capsys):
    assert export.main([str(tmp_path / "small.onnx")]) == 0
    captured = capsys.readouterr()
    assert "export.py: weights/v98.pth.tar is exported" in captured.err
    config = config_of(tmp_path / "small.onnx")
    assert (config["arch"], config["input_size"]) == (export.SMALL_ARCH, export.SMALL_SIZE)
    weights = (ROOT / "weights" / "v98.pth.tar").read_bytes()
    assert config["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert config["threshold"] == export.SMALL_THRESHOLDS["threshold"]
    assert "precision 0.99" in config["threshold_source"]


def test_the_threshold_is_in_the_file(checkpoint, tmp_path):
    for suffix in FORMATS:
        assert export_to(tmp_path / f"isc{suffix}", checkpoint, "--threshold", 0.6) == 0
        config = config_of(tmp_path / f"isc{suffix}")
        source = "the command line of export.py"
        assert (config["threshold"], config["threshold_source"]) == (0.6, source)
        assert "normalized_threshold" not in config
    assert export_to(tmp_path / "isc.onnx", checkpoint) == 0
    assert not {"threshold", "threshold_source"} & config_of(tmp_path / "isc.onnx").keys()


@pytest.mark.parametrize(
    ("flags", "thresholds"),
    [
        ([], export.SMALL_THRESHOLDS),
        (["--precision", "fp16"], export.SMALL_THRESHOLDS),
        (["--threshold", "0.8"], {"threshold": 0.8}),
        (["--normalized-threshold-of-views", "0.3"], {"normalized_threshold_of_views": 0.3}),
        (["--input-size", "96"], {}),
        (["--gem-eval-p", "3"], {}),
    ],
)
def test_the_small_network_has_its_thresholds_where_they_were_measured(flags, thresholds):
    assert export.parse_args(["small.onnx", *flags]).thresholds == thresholds


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_an_export_is_byte_identical(checkpoint, tmp_path, suffix):
    files = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for file in files:
        assert export_to(file, checkpoint) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_code_in_a_checkpoint_does_not_run(checkpoint, tmp_path, capsys):
    checkpoint.write_bytes(pickle.dumps({"state_dict": Code()}))
    export_to(tmp_path / "isc.onnx", checkpoint)
    assert "this ran" not in capsys.readouterr().out
    refuse(
        capsys,
        tmp_path / "isc.onnx",
        checkpoint,
        words=["small.pth.tar: cannot be read as a checkpoint"],
    )


def test_refuses_what_cannot_be_used(checkpoint, tmp_path, capsys):
    missing = checkpoint.with_name("none.pth.tar")
    output = tmp_path / "isc.onnx"
    refuse(capsys, output, missing, words=["none.pth.tar: no such checkpoint"])
    refuse(
        capsys,
        output,
        checkpoint,
        arch="test_efficientnet",
        words=["small.pth.tar: holds other weights than --arch has"],
    )
    refuse(
        capsys,
        output,
        checkpoint,
        arch="resnet99999",
        words=["resnet99999: timm has no such backbone"],
    )
    refuse(
        capsys,
        tmp_path / "none" / "isc.onnx",
        checkpoint,
        words=["none/isc.onnx", "name of a file"],
    )
    refuse(capsys, output, checkpoint, "--photos", tmp_path / "none", words=[tmp_path / "none"])
    (tmp_path / "text.jpg").write_text("no image")
    refuse(
        capsys,
        output,
        checkpoint,
        "--photos",
        tmp_path,
        words=["text.jpg: cannot be read as an image"],
    )
    same = checkpoint.rename(tmp_path / "small.pt")
    refuse(capsys, same, same, words=["small.pt: is the checkpoint itself"])


def test_refuses_flags_in_one_line(capsys):
    flags = {
        "isc.pt --precision fp16": "--precision",
        "isc.onnx --input-size 8": "--input-size",
        "isc.bin": ".onnx, .pt",
        "isc.onnx --threshold 1.5": "--threshold: invalid float from -1 to 1 value: '1.5'",
        "isc.onnx --threshold nan": "--threshold",
    }
    for wrong, words in flags.items():
        with pytest.raises(SystemExit, match="2"):
            export.parse_args(["small.pth.tar", *wrong.split()])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
        assert words in line


def test_a_full_disk_is_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.Path, "write_bytes", full)
    refuse(
        capsys, tmp_path / "isc.onnx", checkpoint, words=["isc.onnx: ", "No space left on device"]
    )


def test_images_of_any_kind_are_photos(checkpoint, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("L", (20, 900), 50).save(folder / "gray.png")
    assert export_to(tmp_path / "isc.safetensors", checkpoint, "--photos", folder) == 0
