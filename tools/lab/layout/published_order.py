"""Each rank clips by the norm of its own gradients before they are averaged; small parameters are updated
while banks are in flight, and each bank is waited for just before its update.

That is the order of the Parallel Muon record, parameter-golf #399.
"""

from __future__ import annotations

from train_gpt import Optimizer, StepScalars, all_gather, dist, reduce_scatter, torch


def launch_average(optimizer: Optimizer, buffer: str) -> dist.Work:
    """Launch the reduce-scatter of a bank's gradient, level by level. Returns the work of the last level."""
    wire = optimizer.wire[buffer].copy_(optimizer.bank_grad[buffer])
    arrival = None
    for level in optimizer.m.levels:
        if arrival is not None:
            arrival.wait()
        arrival = reduce_scatter(
            wire[level.kept], wire[level.whole], op=dist.ReduceOp.AVG, group=level.group, async_op=True
        )
    return arrival


class PublishedOrder(Optimizer):
    """Launches the collectives of a step in the published order."""

    @torch.no_grad()
    def schedule(self) -> None:
        """Launch every collective of a step, and the updates between them."""
        # 1. Clip by the norm of this rank's gradients.
        gradients = [*self.bank_grad.values(), self.flat_grad]
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square()
        torch._foreach_mul_(gradients, self.gradient_factor(squares))
        factor = torch.ones((), device=self.m.device)  # nothing is left to clip

        # 2. Average the gradients, and wait for those of the small parameters.
        arrivals = {buffer: launch_average(self, buffer) for buffer in self.bank}
        flat_wire = self.wire["flat"].copy_(self.flat_grad)
        dist.all_reduce(flat_wire, op=dist.ReduceOp.AVG, async_op=True).wait()

        scalars = StepScalars(*self.scalars.unbind())

        with self.m.lanes() as lane:
            # 3. Update the small parameters, identically on every rank.
            with lane():
                self.adam_update(self.adam_buffers, factor, scalars, self.h)
                self.flat_grad.zero_()

            # 4. Wait for a bank, update the matrices of it that this rank owns, gather it.
            for buffer in reversed(self.bank):
                with lane():
                    arrivals[buffer].wait()
                    for matrices in self.owned[buffer]:
                        self.matrix_update(matrices, factor, scalars, self.h)
                    self.bank_grad[buffer].zero_()
                    bank = self.bank[buffer]
                    for level in reversed(self.m.levels):
                        all_gather(bank[level.whole], bank[level.kept], level.group, async_op=True).wait()


REPLACES = {"Optimizer": PublishedOrder}
