"""Losses, gradients and weights that are not finite stop a run before anything is saved."""

import torch

from common.device import ComingTensor
from common.errors import UserError
from common.files import save_tensors

CURE = "lower the learning rates, or use optimization.autocast=false"


class FiniteCheck:
    """Looks at each update; on a GPU one update late, so that the next is launched without a wait.

    Args:
        directory: of the run.
    """

    def __init__(self, directory):
        self.directory, self.waiting = directory, []

    def add_update(self, update, batch, metrics, float16):
        """Takes an update's batch and metrics; `UserError` if one before was not finite.

        With float16 a gradient may overflow: loss scaling then skips the step.
        """
        names = [name for name in metrics if not (float16 and "grad_norm" in name)]
        finite = torch.stack([metrics[name] for name in names]).isfinite()
        # Asked for before the next update is launched, the answer does not come after it.
        self.waiting.append((ComingTensor(finite), names, update, batch, metrics))
        on_gpu = finite.device.type == "cuda"
        while len(self.waiting) > on_gpu:
            self.check_update(*self.waiting.pop(0))

    def check_update(self, finite, names, update, batch, metrics):
        """`UserError` if a loss or a gradient of an update is not finite; keeps its batch."""
        finite = finite.wait()
        if finite.all():
            return
        name = next(name for name, fine in zip(names, finite.tolist(), strict=True) if not fine)
        path = self.directory / f"not_finite_{update}.pt"
        batch_is = f"is in {path}"
        metrics = {name: value.cpu() for name, value in metrics.items()}
        try:
            save_tensors(path, {"batch": batch.cpu().to_dict(), "metrics": metrics})
        except OSError as error:  # a full disk must not hide what went wrong first
            batch_is = f"could not be kept ({error.strerror})"
        raise UserError(
            f"{name} is not finite in update {update}: its batch {batch_is}, the last finite"
            f" weights are in {self.directory / 'checkpoints'}; {CURE}"
        )

    def check_weights(self, agent, updates):
        """`UserError` if a weight is not finite: the simulator would only complain of actions.

        The norm of all weights waits for a GPU once, where a look at each would for each.
        """
        while self.waiting:
            self.check_update(*self.waiting.pop(0))
        parameters = [weight.detach() for weight in agent.parameters()]
        if torch.nn.utils.get_total_norm(parameters).isfinite():
            return
        for name, weight in agent.named_parameters():
            if not weight.isfinite().all():
                raise UserError(
                    f"{name} is not finite after update {updates}: the last finite weights are in"
                    f" {self.directory / 'checkpoints'}; {CURE}"
                )
