"""docs/FINE_TUNING.md: its commands, run in bash as they are written."""

import json

import pandas as pd
import torch

import v107
from common.sample_images import dead_leaves, generator
from conftest import copy_repository, readme_block, run_as_written

SMALL = {
    "ARCH=tf_efficientnetv2_m_in21ft1k": "ARCH=test_resnet",
    "SIZE=512": "SIZE=32",
}  # the only replacements


def files(folder):
    return {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_commands_run_as_they_are_written(tmp_path):
    home, clone = tmp_path / "home", tmp_path / "clone"
    photos = home / "Pictures"
    (photos / "holiday").mkdir(parents=True)
    for i in range(48):
        dead_leaves(generator(7, "training", i), 72).save(photos / "holiday" / f"{i}.jpg")
    (photos / "broken.jpg").write_bytes((photos / "holiday" / "1.jpg").read_bytes()[:200])
    copy_repository(clone)
    weights = clone / "exp" / "v107" / "train" / "checkpoint_0009.pth.tar"
    weights.parent.mkdir(parents=True)
    torch.manual_seed(0)
    network = v107.create_model("test_resnet", 1.0, 1.0, torch.device("cpu"))
    torch.save({"state_dict": network.state_dict(prefix="module."), "arch": "test_resnet"}, weights)
    before = files(clone)

    script = readme_block("Commands", "docs/FINE_TUNING.md")
    for written, replaced in SMALL.items():
        assert script.count(written) == 1
        script = script.replace(written, replaced)
    result = run_as_written(script, clone, {}, HOME=str(home))
    assert files(clone) == before  # a clone stays clean

    own = home / "fine-tuning"
    assert f"{photos / 'broken.jpg'}: cannot be read" in result.stderr
    assert f"{own / 'input'}: no findings" in result.stdout
    statistics = json.loads((own / "input" / "statistics.json").read_text())
    assert statistics["sources"] == {"usable": 48, "used": 48, "unreadable": 1}
    scores = [
        json.loads(line)
        for line in result.stdout.splitlines()
        if line.startswith('{"average_precision"')
    ]
    assert len(scores) == 2 and scores[0] != scores[1]

    log = [
        json.loads(line)
        for line in (own / "exp" / "tuned" / "train" / "log.jsonl").read_text().splitlines()
    ]
    assert log[0]["args"]["weight"] == "exp/v107/train/checkpoint_0009.pth.tar"
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 10 and losses[-1] < losses[0]
    # Training used phase 1, the scores are of phase 2: no image may be in both.
    edits = pd.read_csv(own / "input" / "query_edits.csv")
    phases = [set(edits[edits.phase == phase].source) for phase in (1, 2)]
    assert not phases[0] & phases[1]
