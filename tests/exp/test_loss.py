"""The contrastive loss with memory bank: golden sequences, pytorch-metric-learning as the oracle,
several processes.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conftest import GOLDEN
from v83 import MemoryBankContrastiveLoss

SINGLE_PROCESS_CASES = ["pairs", "nondivisor", "unfilled", "varying", "edge"]
SEVERAL_PROCESSES_CASES = ["dist2", "dist_finetune"]
LIBRARIES = [
    "hypothesis.strategies",
    "pytorch_metric_learning.losses",
    "timm",
    "pylibmagic",
    "augly.image",
    "torchvision",
]


def load(case):
    """The arrays of one golden case, by name."""
    with np.load(GOLDEN / f"membank_{case}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def loss_like(case, embedding_size):
    return MemoryBankContrastiveLoss(
        int(case["memory_size"]),
        embedding_size,
        float(case["pos_margin"]),
        float(case["neg_margin"]),
    )


class LikeOnCuda(torch.Tensor):
    """A tensor on the CPU for which the loss compares all pairs, as it does on CUDA."""

    is_cuda = True


def step(criterion, embeddings, labels):
    """One step: (loss, gradient of the embeddings), both on the CPU."""
    embeddings = torch.as_tensor(embeddings).clone().requires_grad_()
    loss = criterion(embeddings, torch.as_tensor(labels))
    loss.backward()
    return loss.item(), embeddings.grad


def bank_state(criterion):
    return {
        name: getattr(criterion, name).clone()
        for name in ("bank", "bank_labels", "cursor", "filled")
    }


def assert_bank_matches(bank, bank_labels, source_row, labels, rows):
    """Every written bank row holds its source row, every other row is untouched (zero)."""
    written = source_row >= 0
    np.testing.assert_array_equal(bank_labels, labels)
    np.testing.assert_allclose(bank[written], rows[source_row[written]], rtol=0, atol=1e-6)
    assert not bank[~written].any()


@pytest.mark.parametrize("name", SINGLE_PROCESS_CASES)
def test_golden_sequence(name):
    case = load(name)
    criterion = loss_like(case, case["embeddings"].shape[1])
    memory_size = int(case["memory_size"])
    for t, (first, last) in enumerate(zip(case["offsets"][:-1], case["offsets"][1:], strict=True)):
        loss, grad = step(criterion, case["embeddings"][first:last], case["labels"][first:last])
        stats = criterion.stats
        np.testing.assert_allclose(loss, case["loss"][t], rtol=0, atol=2e-6)
        np.testing.assert_allclose(loss, case["loss_float32"][t], rtol=0, atol=2e-6)
        np.testing.assert_allclose(stats["pos_loss"].item(), case["pos_loss"][t], rtol=0, atol=2e-6)
        np.testing.assert_allclose(stats["neg_loss"].item(), case["neg_loss"][t], rtol=0, atol=2e-6)
        np.testing.assert_allclose(grad, case["grad"][first:last], rtol=1e-4, atol=2e-6)
        assert stats["pos_pairs"].item() == case["num_pos_nonzero"][t]
        assert stats["neg_pairs"].item() == case["num_neg_nonzero"][t]
        assert criterion.cursor.item() == case["queue_idx"][t]
        assert criterion.filled.item() == (
            memory_size if case["has_been_filled"][t] else case["queue_idx"][t]
        )
        assert_bank_matches(
            criterion.bank.numpy(),
            criterion.bank_labels.numpy(),
            case["memory_source_row"][t],
            case["memory_labels"][t],
            case["embeddings"],
        )
    final = case["memory_embeddings_final"]
    np.testing.assert_allclose(criterion.bank[: len(final)].numpy(), final, rtol=0, atol=1e-6)


def test_stats_are_detached_and_the_bank_is_part_of_the_state():
    criterion = MemoryBankContrastiveLoss(8, 4)
    criterion(torch.randn(4, 4, requires_grad=True), torch.tensor([0, 0, 1, 1]))
    assert criterion.stats.keys() >= {"pos_loss", "neg_loss", "pos_pairs", "neg_pairs"}
    assert not any(value.requires_grad for value in criterion.stats.values())
    buffers = {name: (tuple(b.shape), b.dtype) for name, b in criterion.named_buffers()}
    assert buffers == {
        "bank": ((8, 4), torch.float32),
        "bank_labels": ((8,), torch.int64),
        "cursor": ((), torch.int64),
        "filled": ((), torch.int64),
    }


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_pytorch_metric_learning(seed):
    rng = np.random.default_rng(seed)
    memory_size, size = int(rng.integers(12, 60)), 16
    pos_margin, neg_margin = float(rng.choice([0.0, 0.1, 0.3])), float(rng.uniform(0.5, 1.5))
    criterion = MemoryBankContrastiveLoss(memory_size, size, pos_margin, neg_margin)
    oracle = CrossBatchMemory(ContrastiveLoss(pos_margin, neg_margin), size, memory_size)
    for t in range(30):
        # Not one row: there the oracle keeps the row's own copy (its test for wrapping, end <=
        # start, holds by chance).
        n = int(rng.integers(2, memory_size + 1 if t % 10 == 9 else 13))
        embeddings = torch.from_numpy(rng.normal(scale=rng.uniform(0.5, 2), size=(n, size))).float()
        labels = torch.from_numpy(rng.integers(0, 6, n))
        loss, grad = step(criterion, embeddings, labels)
        expected, expected_grad = step(oracle, embeddings, labels)
        assert loss == pytest.approx(expected, abs=2e-6)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=2e-6)
        assert criterion.cursor.item() == oracle.queue_idx
        assert (criterion.filled.item() == memory_size) == oracle.has_been_filled


@pytest.mark.parametrize("alike", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("filled", [4000, 9000])
def test_few_some_or_all_pairs_cost_something(alike, filled):
    """In a bank that is not full, and a full one."""
    generator = torch.Generator().manual_seed(filled)
    rows = torch.nn.functional.normalize(torch.randn(filled + 32, 64, generator=generator) + alike)
    labels = torch.randint(2000, (len(rows),), generator=generator)
    criterion = MemoryBankContrastiveLoss(9000, 64)
    oracle = CrossBatchMemory(ContrastiveLoss(pos_margin=0.0, neg_margin=1.0), 64, memory_size=9000)
    criterion.bank[:filled], criterion.bank_labels[:filled] = rows[:filled], labels[:filled]
    criterion.cursor.fill_(filled % 9000), criterion.filled.fill_(filled)
    oracle.embedding_memory[:filled], oracle.label_memory[:filled] = rows[:filled], labels[:filled]
    oracle.queue_idx, oracle.has_been_filled = filled % 9000, filled == 9000
    loss, gradient = step(criterion, rows[filled:], labels[filled:])
    expected, expected_gradient = step(oracle, rows[filled:], labels[filled:])
    assert loss == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("pos_margin", "neg_margin"), [(0.0, 1.0), (0.1, 1.1), (0.0, 2.0)])
@pytest.mark.parametrize("alike", [0.0, 0.6, 3.0])
def test_chosen_pairs_give_what_all_pairs_give(pos_margin, neg_margin, alike):
    """On a CPU the loss chooses the pairs that may cost something; on CUDA it compares all."""
    generator = torch.Generator().manual_seed(5)
    chosen, dense = (
        MemoryBankContrastiveLoss(100, 16, pos_margin, neg_margin) for _ in ("CPU", "CUDA")
    )
    for t in range(8):
        rows = torch.randn(24, 16, generator=generator) + alike
        labels = torch.randint(0, 30, (24,), generator=generator)
        if t == 5:
            rows[7, 3] = torch.nan
        loss, gradient = step(chosen, rows, labels)
        dense_rows = rows.clone().as_subclass(LikeOnCuda).requires_grad_()
        dense_loss = dense(dense_rows, labels)
        dense_loss.backward()
        assert dense_loss.item() == pytest.approx(loss, rel=0, abs=1e-6, nan_ok=True)
        dense_gradient = dense_rows.grad.as_subclass(torch.Tensor)
        torch.testing.assert_close(dense_gradient, gradient, rtol=0, atol=1e-6, equal_nan=True)
        for name, value in chosen.stats.items():
            assert dense.stats[name].item() == pytest.approx(value.item(), rel=0, abs=1e-6), name
        for name, value in bank_state(chosen).items():
            assert torch.equal(getattr(dense, name), value), name
    assert chosen.filled.item() == 100


@pytest.mark.parametrize(("first", "labels"), [([0.0, 1.0], [3, 1]), ([0.8, 0.6], [5, 6])])
def test_far_negatives_are_pairs_too(first, labels):
    """One positive, or one near negative, is not the only pair where others are far."""
    criterion = MemoryBankContrastiveLoss(2000, 2)
    oracle = CrossBatchMemory(ContrastiveLoss(pos_margin=0.0, neg_margin=1.0), 2, memory_size=2000)
    for batch, names in (([[1.0, 0.0], [-1.0, 0.0]], [3, 9]), ([first, [0.0, -1.0]], labels)):
        loss, expected = (
            step(module, torch.tensor(batch), names)[0] for module in (criterion, oracle)
        )
        assert loss == pytest.approx(expected, abs=1e-6)
    assert loss > 0.1


def test_one_pair_of_each_kind_at_most_is_no_loss():
    criterion = MemoryBankContrastiveLoss(8, 2)
    first, _ = step(criterion, [[1.0, 0.0]], [0])
    second, grad = step(criterion, [[0.0, 1.0]], [0])
    assert (first, second) == (0.0, 0.0)
    assert not grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_a_non_finite_row_never_enters_the_bank(bad, steps_before):
    torch.manual_seed(0)
    criterion = MemoryBankContrastiveLoss(16, 8)
    for _ in range(steps_before):
        criterion(torch.randn(6, 8), torch.arange(6) // 2)
    before = bank_state(criterion)
    poisoned = torch.randn(6, 8)
    poisoned[3, 5] = bad
    loss = criterion(poisoned, torch.arange(6) // 2)
    assert not torch.isfinite(loss)
    for name, value in bank_state(criterion).items():
        assert torch.equal(value, before[name]), name
    after = criterion(torch.randn(6, 8), torch.arange(6) // 2)
    assert torch.isfinite(after)
    assert criterion.cursor.item() == 6 * (steps_before + 1) % 16


@pytest.mark.parametrize("tensor", [torch.Tensor, LikeOnCuda], ids=["CPU", "CUDA"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_spoils_the_gradients_of_all_rows(bad, tensor):
    """Also where no pair costs anything, so that the scaler skips the whole update."""
    criterion = MemoryBankContrastiveLoss(16, 8)
    rows = torch.eye(6, 8)  # farther apart than the margin
    labels = torch.arange(6)
    loss, gradient = step(criterion, rows, labels)
    assert loss == 0
    assert not gradient.any()
    rows[3, 5] = bad
    rows = rows.as_subclass(tensor).requires_grad_()
    loss = criterion(rows, labels)
    loss.backward()
    assert loss.isnan()
    assert not rows.grad.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype):
    torch.manual_seed(1)
    low, full = MemoryBankContrastiveLoss(16, 32), MemoryBankContrastiveLoss(16, 32)
    for _ in range(4):
        embeddings, labels = torch.randn(6, 32).to(dtype), torch.randint(0, 3, (6,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = low(embeddings, labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, full(embeddings.float(), labels), rtol=0, atol=0)
    assert low.bank.dtype == torch.float32
    assert torch.equal(low.bank, full.bank)


batches = st.tuples(st.integers(2, 10), st.integers(0, 2**31 - 1))


def warm_criterion(generator):
    """A loss with half a bank, the same for the same generator state."""
    criterion = MemoryBankContrastiveLoss(20, 8, 0.1, 1.1)
    criterion(
        torch.randn(10, 8, generator=generator), torch.randint(0, 4, (10,), generator=generator)
    )
    return criterion


@settings(max_examples=30, deadline=None)
@given(batches)
def test_order_within_the_batch_does_not_matter(batch):
    n, seed = batch
    results = []
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for rows in (torch.arange(n), order):
        generator = torch.Generator().manual_seed(seed)
        criterion = warm_criterion(generator)
        embeddings = torch.randn(n, 8, generator=generator)
        labels = torch.randint(0, 4, (n,), generator=generator)
        results.append(step(criterion, embeddings[rows], labels[rows]))
    (loss, grad), (permuted_loss, permuted_grad) = results
    assert permuted_loss == pytest.approx(loss, abs=2e-6)
    torch.testing.assert_close(permuted_grad, grad[order], rtol=1e-4, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(batches, st.permutations([0, 7, 1_000_003, -2]))
def test_only_equality_of_labels_matters(batch, names):
    n, seed = batch
    losses = []
    for rename in (torch.arange(4), torch.tensor(names)):
        generator = torch.Generator().manual_seed(seed)
        criterion = MemoryBankContrastiveLoss(20, 8, 0.1, 1.1)
        for size in (10, n):
            embeddings = torch.randn(size, 8, generator=generator)
            labels = torch.randint(0, 4, (size,), generator=generator)
            loss, _ = step(criterion, embeddings, rename[labels])
        losses.append(loss)
    assert losses[1] == losses[0]


@settings(max_examples=30, deadline=None)
@given(batches)
def test_only_a_rows_own_copy_is_left_out(batch):
    """n equal rows of one label: n x (n - 1) pairs, all at distance 0, and n more per row with each
    further step.
    """
    n, seed = batch
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
    criterion = MemoryBankContrastiveLoss(40, 8, pos_margin=-1.0)
    for earlier in range(3):
        criterion(row.repeat(n, 1), torch.zeros(n, dtype=torch.int64))
        assert criterion.stats["pos_pairs"].item() == n * (n - 1 + earlier * n)
        assert criterion.stats["neg_pairs"].item() == 0


def play(rank, name, folder):
    """One process of a golden case with several processes; writes what it saw to `folder`."""
    case = load(name)
    world_size = int(case["world_size"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    embedding_size, input_size = case["weight"].shape
    head = nn.Linear(input_size, embedding_size, bias=False)
    head.weight.data.copy_(torch.from_numpy(case["weight"]))
    head = DistributedDataParallel(head)
    criterion = loss_like(case, embedding_size)
    seen = {
        key: []
        for key in (
            "loss",
            "grad_embeddings",
            "grad_weight",
            "bank",
            "bank_labels",
            "cursor",
            "filled",
        )
    }
    for inputs, labels in zip(case["inputs"][:, rank], case["labels"][:, rank], strict=True):
        head.zero_grad()
        embeddings = nn.functional.normalize(head(torch.from_numpy(inputs)))
        embeddings.retain_grad()
        loss = criterion(embeddings, torch.from_numpy(labels))
        loss.backward()
        seen["loss"].append(loss.item())
        seen["grad_embeddings"].append(embeddings.grad.numpy())
        seen["grad_weight"].append(head.module.weight.grad.numpy().copy())
        for key, value in bank_state(criterion).items():
            seen[key].append(value.numpy())
    before = bank_state(criterion)
    poisoned = torch.randn(2, embedding_size)
    if rank == world_size - 1:
        poisoned[0, 0] = float("nan")
    poisoned.requires_grad_()
    poisoned_loss = criterion(poisoned, torch.zeros(2, dtype=torch.int64))
    poisoned_loss.backward()
    untouched = all(torch.equal(value, before[key]) for key, value in bank_state(criterion).items())
    np.savez(
        f"{folder}/rank{rank}.npz",
        **seen,
        untouched=untouched,
        poisoned_loss_finite=poisoned_loss.isfinite().item(),
        some_gradient_finite=poisoned.grad.isfinite().any().item(),
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SEVERAL_PROCESSES_CASES)
def test_golden_sequence_in_several_processes(name, tmp_path):
    case = load(name)
    world_size = int(case["world_size"])
    mp.get_context("forkserver").set_forkserver_preload(
        LIBRARIES
    )  # imported once, not in every process
    mp.start_processes(
        play, args=(name, str(tmp_path)), nprocs=world_size, start_method="forkserver"
    )
    rows = case["embeddings"].reshape(-1, case["embeddings"].shape[-1])
    filled = np.where(case["has_been_filled"], case["memory_size"], case["queue_idx"])
    for rank in range(world_size):
        seen = np.load(tmp_path / f"rank{rank}.npz")
        np.testing.assert_allclose(seen["loss"], case["loss"][:, rank], rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(
            seen["grad_embeddings"], case["grad_embeddings"][:, rank], rtol=1e-4, atol=2e-6
        )
        np.testing.assert_allclose(
            seen["grad_weight"], case["grad_weight_ddp"], rtol=1e-4, atol=2e-6
        )
        np.testing.assert_array_equal(seen["cursor"], case["queue_idx"])
        np.testing.assert_array_equal(seen["filled"], filled)
        for t in range(len(seen["bank"])):
            assert_bank_matches(
                seen["bank"][t],
                seen["bank_labels"][t],
                case["memory_source_row"][t],
                case["memory_labels"][t],
                rows,
            )
        assert seen["untouched"]
        assert not seen["poisoned_loss_finite"]
        assert not seen["some_gradient_finite"]
