"""The loss with its memory bank against pytorch-metric-learning's."""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory

import v83
from benchmarks.comparison import Comparison
from benchmarks.inputs import random_descriptors


def published_loss(memory_size):
    return CrossBatchMemory(ContrastiveLoss(pos_margin=0, neg_margin=1), 256, memory_size)


class Loss(Comparison):
    """A case is (rows of a batch, rows of the bank)."""

    description = (
        "Forward and backward pass on the CPU, of random descriptors of two views an image, "
        "against a full memory bank. A case is the rows of a batch and of the bank."
    )
    published = "pytorch-metric-learning's CrossBatchMemory(ContrastiveLoss(0, 1))"
    own = "v83.MemoryBankContrastiveLoss"
    unit = "images"
    cases = {"256 x 20000": (256, 20_000), "512 x 20000": (512, 20_000)}

    def __init__(self, case, _photos, _folder):
        self.amount, memory_size = case
        torch.manual_seed(0)
        first_views = random_descriptors((memory_size + self.amount) // 2)
        noise = F.normalize(torch.randn_like(first_views))
        second_views = F.normalize(first_views + 0.5 * noise)
        views = torch.stack([first_views, second_views], dim=1).flatten(0, 1)
        labels = torch.arange(len(views)) // 2
        self.bank = views[:memory_size]
        self.batch = views[memory_size:]
        self.labels = labels[memory_size:]

        self.published_loss = published_loss(memory_size)
        self.published_loss.embedding_memory[:] = self.bank
        self.published_loss.label_memory[:] = labels[:memory_size]
        self.published_loss.has_been_filled = True

        self.own_loss = v83.MemoryBankContrastiveLoss(memory_size)
        self.own_loss.bank[:] = self.bank
        self.own_loss.bank_labels[:] = labels[:memory_size]
        self.own_loss.filled.fill_(memory_size)

    def baseline(self, _number):
        self.published_loss.queue_idx = 0  # so that every batch takes the same place in the bank
        return self.forward_and_backward(self.published_loss)

    def ours(self, _number):
        self.own_loss.cursor.zero_()
        return self.forward_and_backward(self.own_loss)

    def forward_and_backward(self, loss_function):
        """(loss, its gradient by the descriptors)."""
        batch = self.batch.clone().requires_grad_()
        value = loss_function(batch, self.labels)
        value.backward()
        return value.item(), batch.grad

    def agreement(self, a, b):
        loss_a, gradient_a = a
        loss_b, gradient_b = b
        # A squared distance below neg_margin = 1 is a cosine above 0.5.
        active = self.batch @ self.bank.T > 0.5
        return {
            "loss difference": abs(loss_a - loss_b),
            "gradient difference": (gradient_a - gradient_b).abs().max().item(),
            "of at most": gradient_a.abs().max().item(),
            "active negatives %": 100 * active.float().mean().item(),
        }
