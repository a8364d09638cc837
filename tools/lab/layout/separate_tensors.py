"""Weights and gradients of matrices lie outside the banks and are copied in and out, matrix by matrix."""

from __future__ import annotations

from typing import NamedTuple

from train_gpt import GPT, Config, Machine, Optimizer, Snapshot, Tensor, nn, torch


class Copies(NamedTuple):
    """The matrices of all banks, outside of them and inside, in one order."""

    weights: list[Tensor]
    gradients: list[Tensor]
    weights_in_banks: list[Tensor]
    gradients_in_banks: list[Tensor]


class SeparateTensors(Optimizer):
    """Has the model compute with tensors of its own, which no collective sees."""

    def __init__(self, model: GPT, h: Config, m: Machine) -> None:
        self.copies = Copies([], [], [], [])
        super().__init__(model, h, m)

    def make_bank(self, buffer: str, members: dict[str, nn.Parameter]) -> None:
        """Make a bank, then take its parameters out of it again."""
        super().make_bank(buffer, members)
        for p in members.values():
            weights_in_bank = p.data
            gradients_in_bank = p.grad
            p.data = weights_in_bank.clone()
            p.grad = torch.zeros_like(p)
            self.copies.weights.extend(p.data.unbind())
            self.copies.gradients.extend(p.grad.unbind())
            self.copies.weights_in_banks.extend(weights_in_bank.unbind())
            self.copies.gradients_in_banks.extend(gradients_in_bank.unbind())

    @torch.no_grad()
    def schedule(self) -> None:
        """Copy the gradients into the banks, do what the trainer does, and copy the weights out."""
        torch._foreach_copy_(self.copies.gradients_in_banks, self.copies.gradients)
        torch._foreach_zero_(self.copies.gradients)
        super().schedule()
        torch._foreach_copy_(self.copies.weights, self.copies.weights_in_banks)

    @torch.no_grad()
    def restore(self, saved: Snapshot) -> None:
        """Return to a snapshot, bit for bit, and clear the gradients."""
        super().restore(saved)
        torch._foreach_copy_(self.copies.weights, self.copies.weights_in_banks)

    def clear_gradients(self) -> None:
        """Zero all gradients."""
        super().clear_gradients()
        torch._foreach_zero_(self.copies.gradients)


REPLACES = {"Optimizer": SeparateTensors}
