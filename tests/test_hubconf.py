"""The entry points for torch.hub, called as a user calls them, with a small checkpoint in place of
the published one.
"""

import ast
import hashlib
import importlib
import pickle
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import v98
import v107
from conftest import ROOT

SMALL = {"source": "local", "arch": "test_efficientnet", "input_size": 64}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return v107.ISCNet(timm.create_model("test_efficientnet", features_only=True)).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    """A file in the author's format: keys with a prefix, and a Namespace of arguments."""
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    content = {
        "epoch": 9,
        "arch": "test_efficientnet",
        "state_dict": weights,
        "args": v107.parse_args(["data"]),
    }
    torch.save(content, tmp_path / "small.pth.tar")
    return tmp_path / "small.pth.tar"


@pytest.fixture
def hubconf(monkeypatch):
    """The module itself."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("hubconf")


def load(name="isc_ft_v107", **options):
    return torch.hub.load(str(ROOT), name, **SMALL, **options)


@pytest.mark.parametrize("name", ["isc_ft_v107", "isc_selfsup_v98"])
def test_gives_the_descriptors_of_extraction(model, checkpoint, name):
    loaded, preprocess = load(name, weights=str(checkpoint))
    assert not loaded.training
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    config = model.backbone.default_cfg
    expected = v98.evaluation_transform(64, config["mean"], config["std"])(image)
    assert torch.equal(preprocess(image), expected)
    with torch.inference_mode():
        descriptor = loaded(preprocess(image)[None])
        expected_descriptor = model(expected[None])
    torch.testing.assert_close(descriptor, expected_descriptor, rtol=0, atol=1e-5)
    assert descriptor.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_takes_images_of_any_mode(checkpoint, mode):
    _, preprocess = load(weights=str(checkpoint))
    assert preprocess(Image.new(mode, (30, 20))).shape == (3, 64, 64)


def test_the_release_is_downloaded_once(checkpoint, tmp_path, monkeypatch):
    fetched = []

    def download(url, path):
        fetched.append(url)
        checkpoint.rename(path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlretrieve", download)
    for _ in range(2):
        load("isc_selfsup_v98")
    assert len(fetched) == 1 and fetched[0].endswith("/v1.0.1/isc_selfsup_v98.pth.tar")


def test_a_download_that_breaks_off_is_not_kept(tmp_path, monkeypatch):
    def download(url, path):
        path.write_bytes(b"the beginning")
        raise urllib.error.ContentTooShortError("no end", b"")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlretrieve", download)
    with pytest.raises(OSError, match="no end"):
        load()
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_random_weights_need_no_network():
    load(pretrained=False)


def test_half_needs_cuda(checkpoint):
    with pytest.raises(ValueError, match=r"^half=True: is for a CUDA device, not cpu; [^\n]+$"):
        load(weights=str(checkpoint), half=True)


def test_half_changes_neither_names_nor_types_of_weights(hubconf, model):
    half = hubconf._HalfISCNet(timm.create_model("test_efficientnet", features_only=True)).eval()
    half.load_state_dict(model.state_dict())
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in half.state_dict().items()} == dtypes
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        descriptors = half(images)
        assert descriptors.dtype == torch.float32
        assert torch.equal(descriptors, model(images))  # on a CPU, where autocast is off


def test_dependencies_are_what_is_imported(hubconf):
    imported = set()
    for path in (ROOT / "hubconf.py", ROOT / "exp" / "v107.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names - {"v107"} == set(hubconf.dependencies)


def test_the_checksum_is_checked(checkpoint):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    load(weights=str(checkpoint), sha256=digest.upper())
    with pytest.raises(
        ValueError, match=f"small.pth.tar: is not the file that sha256 names but {digest}"
    ):
        load(weights=str(checkpoint), sha256="0" * 64)


@pytest.mark.parametrize("version", ["2.9.1", "1.13.1+cu117"])
def test_refuses_a_torch_that_may_run_code(checkpoint, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    with pytest.raises(ValueError, match=r"torch>=2\.10"):
        load(weights=str(checkpoint))


class Code:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("kind", ["code", "missing", "another network"])
def test_refuses_what_is_no_checkpoint(checkpoint, kind, capsys):
    if kind == "code":
        checkpoint.write_bytes(pickle.dumps({"state_dict": Code()}))
    elif kind == "missing":
        checkpoint.unlink()
    else:
        torch.save({"state_dict": {"module.fc.weight": torch.zeros(1)}}, checkpoint)
    with pytest.raises(ValueError, match=r"small\.pth\.tar"):
        load(weights=str(checkpoint))
    assert "this ran" not in capsys.readouterr().out
