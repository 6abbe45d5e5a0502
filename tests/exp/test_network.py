"""The network, its checkpoint keys, the optimizer groups and the learning rate, against the golden
values.
"""

import json
import zlib

import numpy as np
import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm

import v83
import v98
import v107
from conftest import GOLDEN
from v83 import ISCNet, gem, parameter_groups


@pytest.fixture(scope="module")
def values():
    with np.load(GOLDEN / "network.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def set_weights(model, seed, gain):
    """Fill the state dict by the rule of the golden README, section 3."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        shape = tuple(tensor.shape)
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, size=shape)
        elif len(shape) >= 2:
            value = rng.standard_normal(shape) * gain / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(".weight"):
            value = 1 + 0.1 * rng.standard_normal(shape)
        else:
            value = 0.02 * rng.standard_normal(shape)
        state[name] = torch.from_numpy(value.astype(np.float32))
    model.load_state_dict(state)
    return model


def network(values, p=1.0, eval_p=1.0):
    backbone = timm.create_model(str(values["arch"]), features_only=True)
    return set_weights(ISCNet(backbone, 256, p, eval_p), int(values["seed"]), float(values["gain"]))


@pytest.fixture(scope="module")
def real_network(values):
    backbone = timm.create_model("tf_efficientnetv2_m.in21k_ft_in1k", features_only=True)
    return set_weights(ISCNet(backbone), int(values["seed"]), float(values["real_arch_gain"]))


def assert_close(actual, expected, atol, rtol=0):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else actual
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def test_the_weight_rule_itself(values):
    state = network(values).state_dict()
    for name, first in zip(values["check_names"], values["check_first4"], strict=True):
        assert_close(state[str(name)].flatten()[:4], first, atol=0)


@pytest.mark.parametrize("p", [1, 3, 4])
@torch.no_grad()
def test_evaluation_mode(values, p):
    model = network(values, p=2.0, eval_p=float(p)).eval()
    for i in range(2):
        output = model(torch.from_numpy(values[f"input_{i}"]))
        assert_close(output, values[f"eval_p{p}_{i}"], atol=2e-5)
        assert_close(output.norm(dim=1), 1, atol=1e-6)


@torch.no_grad()
def test_last_feature_map(values):
    """In float64; the stored map is of single precision, off by up to 6e-4 where values reach
    30.
    """
    feature = (
        network(values).eval().double().backbone(torch.from_numpy(values["input_0"]).double())[-1]
    )
    assert_close(feature, values["last_feature_0"], atol=1e-3)


@pytest.mark.parametrize("p", [1, 3])
def test_training_mode(values, p):
    model = network(values, p=float(p), eval_p=2.0).train()
    output = model(torch.from_numpy(values["input_0"]))
    (output * torch.from_numpy(values["grad_output"])).sum().backward()
    assert_close(output, values[f"train_p{p}_output"], atol=2e-5)
    assert_close(model.bn.running_mean, values[f"train_p{p}_bn_running_mean"], atol=5e-5)
    assert_close(model.bn.running_var, values[f"train_p{p}_bn_running_var"], atol=5e-5)
    assert_close(
        model.backbone.bn1.running_mean, values[f"train_p{p}_backbone_bn1_running_mean"], atol=5e-5
    )
    assert_close(
        model.backbone.bn1.running_var, values[f"train_p{p}_backbone_bn1_running_var"], atol=5e-5
    )
    assert model.bn.num_batches_tracked.item() == values[f"train_p{p}_num_batches_tracked"]
    assert_close(model.bn.weight.grad, values[f"train_p{p}_grad_bn_weight"], atol=1e-4)
    assert_close(model.fc.weight.grad[0], values[f"train_p{p}_grad_fc_weight_row0"], atol=1e-4)
    assert_close(
        model.backbone.conv_stem.weight.grad, values[f"train_p{p}_grad_conv_stem"], atol=5e-3
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert list(names) == values["param_names"].tolist()
    norms, expected = (
        np.array([q.grad.norm().item() for q in parameters]),
        values[f"train_p{p}_grad_norm"],
    )
    assert_close(norms[expected > 0.01], expected[expected > 0.01], atol=0, rtol=1e-3)


def test_the_full_size_network(values, real_network):
    model = real_network.eval()
    for p in (1, 3, 4):
        model.eval_p = float(p)
        with torch.no_grad():
            output = model(torch.from_numpy(values["real_arch_input"]))
        assert_close(output, values[f"real_arch_eval_p{p}"], atol=2e-5)


def test_both_names_of_the_published_backbone_work(values):
    assert timm.is_model(str(values["real_arch"]).split(".")[0]) or timm.is_model(
        "tf_efficientnetv2_m"
    )
    assert v83.parse_args(["data"]).arch in (
        str(values["real_arch"]),
        "tf_efficientnetv2_m.in21k_ft_in1k",
    )


@pytest.mark.parametrize("p", [1, 3, 4])
def test_gem(values, p):
    expected = values[f"gem_p{p}"].squeeze((2, 3))
    x = torch.from_numpy(values["gem_input"])
    pooled = gem(x.double(), float(p))
    assert pooled.shape == (3, 6)
    assert_close(pooled, expected, atol=1e-12)
    assert_close(gem(x, float(p)), expected, atol=0, rtol=1e-5)


def test_gem_clips_before_averaging():
    x = torch.tensor([[[[-4.0, 2.0]]]])
    assert gem(x, 1.0).item() == pytest.approx((1e-6 + 2) / 2)
    assert gem(x, 1.0, eps=0.5).item() == pytest.approx(1.25)


def test_the_head_starts_as_published():
    torch.manual_seed(0)
    model = ISCNet(timm.create_model("test_efficientnet", features_only=True))
    assert model.fc.bias is None
    bound_std = np.sqrt(2 / (model.fc.in_features + 256))
    assert model.fc.weight.std().item() == pytest.approx(bound_std, rel=0.03)
    assert (model.bn.weight == 1).all()
    assert (model.bn.bias == 0).all()


def test_state_dict_of_the_full_size_network(real_network):
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())
    entries = [
        [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in real_network.state_dict().items()
    ]
    assert entries == expected["entries"]
    assert len(entries) == expected["num_entries"]
    assert sum(q.numel() for q in real_network.parameters()) == expected["num_parameters"]


def test_weight_decay_groups(real_network):
    expected = json.loads((GOLDEN / "optimizer.json").read_text())["parameter_groups"]
    no_decay, decay = parameter_groups(real_network, 1e-6)
    for group, name, weight_decay in ((no_decay, "no_decay", 0.0), (decay, "decay", 1e-6)):
        assert group["weight_decay"] == weight_decay
        assert len(group["params"]) == expected[f"{name}_tensors"]
        assert sum(q.numel() for q in group["params"]) == expected[f"{name}_params"]
    assert all(q.ndim > 1 for q in decay["params"])
    assert [len(group["params"]) for group in parameter_groups(real_network, 0.0)] == [
        402,
        245,
    ]  # resuming needs both


def test_a_gain_is_not_decayed():
    model = torch.nn.ParameterDict({"gain": torch.ones(3, 3), "weight": torch.ones(3, 3)})
    no_decay, decay = parameter_groups(model, 0.1)
    assert [q is model["gain"] for q in no_decay["params"]] == [True]
    assert [q is model["weight"] for q in decay["params"]] == [True]


@pytest.mark.parametrize(
    ("number", "stage", "flags"), [(0, v98, []), (1, v107, ["--num-negatives", "2"])]
)
def test_linear_schedule(data, tmp_path, number, stage, flags):
    """Of a run of one step an epoch, with the default learning rate and number of epochs."""
    schedule = json.loads((GOLDEN / "optimizer.json").read_text())["schedule"]["linear"][number]
    small = "-a test_efficientnet --input-size 32 -j 0 --no-pretrained --log-every 1"
    small += " --sample-size 4 --batch-size 4 --memory-size 16"
    argv = [*small.split(), *flags, "--output", str(tmp_path), str(data / "training_images")]
    assert stage.main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "train" / "log.jsonl").open()]
    args = lines[0]["args"]
    assert (args["lr"], args["epochs"]) == (schedule["lr"], schedule["epochs"])
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx(schedule["values"], rel=1e-12)


@torch.no_grad()
def test_sync_batchnorm_keeps_the_activation(values):
    model = network(values).eval()
    x = torch.from_numpy(values["input_0"])
    expected = model.backbone(x)
    converted = convert_sync_batchnorm(model).eval()
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    for feature, reference in zip(converted.backbone(x), expected, strict=True):
        assert_close(feature, reference.numpy(), atol=1e-5, rtol=1e-5)
    assert_close(converted(x), values["eval_p1_0"], atol=2e-5)


def test_activations_are_not_computed_in_place():
    """Autograd would copy their inputs."""
    model = v83.create_model("test_efficientnet", 1.0, 1.0, torch.device("cpu"))
    activations = [module for module in model.modules() if isinstance(module, torch.nn.SiLU)]
    assert activations and not any(module.inplace for module in activations)
