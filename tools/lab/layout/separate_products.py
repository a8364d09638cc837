"""Each matrix is orthogonalized by products of its own, not with its bank."""

from __future__ import annotations

from train_gpt import Optimizer, OwnedMatrices, nn


def single_matrices(matrices: OwnedMatrices) -> list[OwnedMatrices]:
    """Split the matrices of a parameter into groups of one: views."""
    count = len(matrices.weights)
    parts = [[None] * count if part is None else part.split(1) for part in matrices]
    return [OwnedMatrices(*one) for one in zip(*parts)]


class SeparateProducts(Optimizer):
    """Updates the matrices that a rank owns one by one."""

    def make_bank(self, buffer: str, members: dict[str, nn.Parameter]) -> None:
        """Make a bank, and own each of this rank's matrices apart."""
        super().make_bank(buffer, members)
        self.owned[buffer] = [one for matrices in self.owned[buffer] for one in single_matrices(matrices)]


REPLACES = {"Optimizer": SeparateProducts}
