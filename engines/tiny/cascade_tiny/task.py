"""What every stage of the training has: its networks, its random numbers, and the loss of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from cascade_tiny import data
from cascade_tiny.meaning import AT
from cascade_tiny.recipe import SEED, Training
from cascade_tiny.weights import STAGES, build

_PLACE_WEIGHT = 40.0


def semantic_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Stage C's error at velocities [B, 16, 6, 6]: the mean of squares, in which a shape's place has more weight.

    The place moves two channels of sixteen by less than their spread. With equal weights, 2,000 steps did not learn it.
    """
    error = (predicted - velocity) ** 2
    weight = error.new_ones(1, error.shape[1], 1, 1)
    weight[:, AT] = _PLACE_WEIGHT
    loss: Tensor = (error * weight).mean() / weight.mean()
    return loss


class Task(ABC):
    """One stage's training: its networks and the loss of each step."""

    stage: str

    def __init__(self, out: Path, device: torch.device, training: Training, workers: int, quiet: bool) -> None:
        self.device, self.training, self.workers = device, training, workers
        self.stream = STAGES.index(self.stage)
        torch.manual_seed(SEED * 100 + self.stream)
        self.networks = build(self.stage).to(device)
        self.prepare(out, quiet)

    def prepare(self, out: Path, quiet: bool) -> None:
        """Loads what earlier stages made; Stage A needs nothing."""
        del out, quiet

    def begin(self, steps: range) -> None:
        """Called once before these steps are taken in order; a task that draws pictures starts drawing."""
        del steps

    @abstractmethod
    def loss(self, step: int, rng: torch.Generator) -> Tensor:
        """The loss of one step; everything random in it comes from the step's number or from `rng`."""

    def numbers(self, step: int, count: int) -> Tensor:
        """The scene numbers of a step whose pictures are not needed."""
        return torch.from_numpy(data.step_numbers(self.stream, step, self.training.batch, count))

    def noise(self, shape: tuple[int, ...] | torch.Size, rng: torch.Generator) -> Tensor:
        """Standard normal noise, float32."""
        return torch.randn(shape, generator=rng, device=self.device)
