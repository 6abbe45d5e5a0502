"""pretrain_mini.py: images and views depend on the seed alone; a resumed run ends like one that was
not interrupted.
"""

import json

import numpy as np
import pytest
import torch

import pretrain_mini
import v98


@pytest.fixture
def small(monkeypatch):
    """Few images and textures; one thread, because such small steps are faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain_mini, "CHUNK", 6)
    monkeypatch.setattr(pretrain_mini, "TEXTURES", 6)
    yield
    torch.set_num_threads(threads)


def command(out, *more):
    flags = "--pictures 2 --input-size 48 --early-size 32 --pairs 4 --warmup 2"
    return [
        str(out),
        *flags.split(),
        *["--workers", "0", "--log-every", "2", "--checkpoint-every", "3"],
        *more,
    ]


def views(seed=0):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 128, 128, 3), dtype=np.uint8)
    made = pretrain_mini.Views(images, 48)
    made.seed(seed)
    return made


def test_generated_images_depend_on_seed_and_number(small, tmp_path):
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        (tmp_path / name).mkdir()
        pretrain_mini.write_pictures(3, tmp_path / name, seed)
    a, b, c = (np.load(tmp_path / name / "0003.npy") for name in "abc")
    assert a.shape == (6, 128, 128, 3) and a.dtype == np.uint8
    assert (a == b).all() and (a != c).any()
    assert len({image.tobytes() for image in a}) == 6


def test_existing_images_are_kept(tmp_path):
    (tmp_path / "0000.npy").write_bytes(b"kept")
    pretrain_mini.write_pictures(0, tmp_path, 0)
    assert (tmp_path / "0000.npy").read_bytes() == b"kept"


@pytest.mark.parametrize("strength", [0.5, 1])
def test_views_depend_on_the_seed(strength):
    first, again, other = (views(seed).pairs(40, strength) for seed in (0, 0, 1))
    assert first.shape == (80, 48, 48, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()


def test_the_stages_augmentation_makes_a_quarter_of_the_hard_views():
    made = views()
    made.augment = lambda image: torch.full((3, 48, 48), 2.0)  # whiter than white
    white = (made.pairs(200, 1) == 255).all(axis=(1, 2, 3))
    assert not white[:200].any()
    assert 30 <= white[200:].sum() <= 70


def test_views_before_the_rate_falls_do_not_depend_on_the_number_of_steps(small, tmp_path):
    (tmp_path / "pictures").mkdir()
    pretrain_mini.write_pictures(0, tmp_path / "pictures", 0)
    pretrain_mini.write_images(tmp_path)
    ten, hundred = (
        pretrain_mini.Batches(pretrain_mini.parse_args(command(tmp_path, "--steps", steps)))
        for steps in ("10", "100")
    )
    assert torch.equal(ten[6], hundred[6]) and ten[6].shape == (8, 32, 32, 3)
    assert ten[7].shape == (8, 48, 48, 3) and torch.equal(ten[7], ten[7])


def test_identity_places_the_image_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    placed = views().place(image, np.eye(3), np.zeros_like(image))
    assert (placed == image).all()


def test_embedding_keeps_the_background():
    image, ground = np.full((128, 128, 3), 200, np.uint8), np.full((48, 48, 3), 7, np.uint8)
    placed = views().place(
        image, pretrain_mini.around_center(pretrain_mini.scale(0.5, 0.25)), ground
    )
    assert (placed[24, 13:35] == 200).all() and (placed[19:29, 24] == 200).all()
    assert (placed[:, :11] == 7).all() and (placed[:17] == 7).all()


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_orthogonal_keeps_directions_and_evens_lengths(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ pretrain_mini.orthogonal(matrix, steps=5) @ right.T
    assert inner.diagonal().min() > 0.3 and inner.diagonal().max() < 1.3
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-3


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(small, tmp_path):
    assert pretrain_mini.main(command(tmp_path / "whole", "--steps", "6")) == 0
    original, stop = pretrain_mini.write_checkpoint, KeyboardInterrupt

    def interrupted(path, content):
        original(path, content)
        raise stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_mini, "write_checkpoint", interrupted)
        assert pretrain_mini.main(command(tmp_path / "parts", "--steps", "6")) == 130
    assert torch.load(tmp_path / "parts/last.pth.tar", weights_only=False)["step"] == 3
    assert pretrain_mini.main(command(tmp_path / "parts", "--steps", "6")) == 0

    whole, parts = (v98.create_model("test_byobnet", 1.0, 1.0, "cpu") for _ in range(2))
    for name, model in ("whole", whole), ("parts", parts):
        path = tmp_path / name / "start.pth.tar"
        checkpoint = v98.read_checkpoint(path)
        v98.load_weights(model, checkpoint, path)
        halves = {
            value.dtype for value in checkpoint["state_dict"].values() if value.is_floating_point()
        }
        assert halves == {torch.float16} and checkpoint["arch"] == "test_byobnet"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    images = sorted((tmp_path / "whole/input").glob("*/*.jpg"))
    assert [path.parent.name for path in images] == ["reference_images"] * 4 + [
        "training_images"
    ] * 8
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6] and lines[0]["args"]["pairs"] == 4


def test_other_weights_in_the_folder_are_refused_in_one_line(small, tmp_path, capsys):
    (tmp_path / "last.pth.tar").write_bytes(b"no checkpoint")
    assert pretrain_mini.main(command(tmp_path, "--steps", "3")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("pretrain_mini.py: error: ") and "last.pth.tar" in message


def test_numbers_out_of_range_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain_mini.main(command(tmp_path, "--steps", "0"))
    assert "--steps 0: is too small" in capsys.readouterr().err
