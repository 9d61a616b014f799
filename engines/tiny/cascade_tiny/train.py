"""Trains cascade-tiny: `python -m cascade_tiny.train --out DIR`.

    a         pixels <-> 64 x 64 x 4 latents, a plain autoencoder
    text-c    captions -> 6 x 6 x 16 semantic latents: Stage C, and the text encoder with it
    b         semantic latents -> Stage A's latents: Stage B, for which `a` must be trained, and `text-c` begun
    semantic  pixels -> semantic latents: the semantic encoder
    joint     pixels -> semantic latents -> Stage A's latents: Stage B and the semantic encoder together
    image     pictures -> embedding: the image encoder; see `image_prompts`
    prompts   pictures -> embedding -> semantic latents: the image encoder, and Stage C's tokens of the embedding
    canny     edges -> residuals for Stage C -> semantic latents: a ControlNet; see `control`

What the semantic latents hold is given by `meaning`; the last stage lets the encoder depart from it where that helps
Stage B to draw. Stage B and Stage C learn the velocity instead of the noise: read
from a predicted noise, the picture at the first step is the error times a hundred.

Every stage keeps `DIR/STAGE.pt`, written whole or not at all. Ctrl-C saves; the same command goes on from there. More
`--steps` prolong a stage that has ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from cascade_export.models import Denoiser, StageA
from cascade_tiny import data, diffusion, outline, recipe
from cascade_tiny.control import TrainCanny
from cascade_tiny.image_prompts import TrainImage, TrainPrompts
from cascade_tiny.meaning import meaning
from cascade_tiny.publish import publish
from cascade_tiny.recipe import SEED, TRAININGS, TextEncoder
from cascade_tiny.task import Task, semantic_loss
from cascade_tiny.text import PAD_ID, build_tokenizer, encode
from cascade_tiny.weights import STAGES, TrainingError, check_origin, fingerprint, origin, trained

_SHAPE_STANDS_OUT = 0.4  # by how much a latent must differ from the corner's to belong to a shape
_SHAPE_WEIGHT = 6.0


class TrainA(Task):
    """Pixels through the latents and back, by absolute and squared error."""

    stage = "a"

    def begin(self, steps: range) -> None:  # noqa: D102
        batches = data.Batches(self.stream, self.training.batch, recipe.SCENES_B)
        self.batches: Iterator[tuple[Tensor, Tensor]] = data.load(batches, steps, self.workers)

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        del rng
        _, drawn = next(self.batches)
        top, left = np.random.default_rng((SEED, 20, step)).integers(0, drawn.shape[-1] - recipe.CROP + 1, 2)
        crop = drawn[:, :, top : top + recipe.CROP, left : left + recipe.CROP]
        pixels = data.to_unit(crop.to(self.device))
        a = cast("StageA", self.networks["a"])
        error: Tensor = a.decode(a.encode(pixels)) - pixels
        return error.abs().mean() + error.square().mean()


class TrainSemantic(Task):
    """Pixels to semantic latents, by squared error."""

    stage = "semantic"

    def begin(self, steps: range) -> None:  # noqa: D102
        batches = data.Batches(self.stream, self.training.batch, recipe.SCENES_C)
        self.batches: Iterator[tuple[Tensor, Tensor]] = data.load(batches, steps, self.workers)

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        del rng
        numbers, drawn = next(self.batches)
        # either way of shrinking a picture must do: callers have both
        pixels = data.for_semantic(data.to_unit(drawn.to(self.device)), nearest=step % 2 == 1)
        target = np.stack([meaning(data.scene(int(i))) for i in numbers])
        return F.mse_loss(self.networks["encoder"](pixels), torch.from_numpy(target).to(self.device))


class TrainTextC(Task):
    """Captions to semantic latents: the velocity, by squared error."""

    stage = "text-c"

    def prepare(self, out: Path, quiet: bool) -> None:  # noqa: D102
        del out, quiet
        self.semantic = data.meanings(recipe.SCENES_C).to(self.device)
        self.ids = data.caption_ids(len(self.semantic)).to(self.device)
        self.empty = torch.from_numpy(encode(build_tokenizer(), [""])[0][0]).to(self.device)

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        numbers = self.numbers(step, len(self.semantic)).to(self.device)
        which, dropped, high, t = torch.rand(4, len(numbers), generator=rng, device=self.device)
        # a mean over 36 points shows through much noise: only at the very beginning is the caption needed for it
        t = torch.where(high < 0.7, 0.85 + 0.15 * t, t)
        ids = self.ids[numbers, (which * recipe.CAPTIONS).long()]
        ids = torch.where(dropped[:, None] < recipe.CAPTION_DROPOUT, self.empty, ids)
        hidden, pooled = cast("TextEncoder", self.networks["text"]).conditions(ids, (ids != PAD_ID).long())
        x0 = self.semantic[numbers].float()
        noisy, velocity = diffusion.noised(x0, self.noise(x0.shape, rng), t)
        image = x0.new_zeros(len(x0), 1, recipe.STAGE_C.clip_image_in_channels or 0)
        return semantic_loss(self.networks["c"](noisy, t, pooled, hidden, image), velocity)


class TrainB(Task):
    """Semantic latents to Stage A's latents: the velocity, by squared error."""

    stage = "b"

    def prepare(self, out: Path, quiet: bool) -> None:  # noqa: D102
        if not (out / f"{self.stage}.pt").is_file():
            self.first_weights(out, quiet)
        cast("Denoiser", self.networks["b"]).effnet_mapper.requires_grad_(False)  # it was taught, and would forget
        self.latents = latents_a(out, self.device, self.workers, quiet).to(self.device)
        self.semantic = data.meanings(len(self.latents)).to(self.device)
        self.ids = data.caption_ids(len(self.latents)).to(self.device)
        self.text = cast("TextEncoder", trained(out, "text-c", self.device)["text"])
        self.empty = torch.from_numpy(encode(build_tokenizer(), [""])[0][0]).to(self.device)

    def first_weights(self, out: Path, quiet: bool) -> None:
        """Sets what is not to begin at random."""
        del out
        outline.teach(cast("Denoiser", self.networks["b"]).effnet_mapper, self.device, quiet)

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        numbers = self.numbers(step, len(self.latents)).to(self.device)
        return self.drawing_error(numbers, self.meant(numbers, rng), rng)

    def meant(self, numbers: Tensor, rng: torch.Generator) -> Tensor:
        """What scenes mean, not quite exactly: float32 [B, 16, 6, 6]."""
        semantic = self.semantic[numbers].float()
        return semantic + recipe.CONDITION_NOISE * self.noise(semantic.shape, rng)

    def drawing_error(self, numbers: Tensor, semantic: Tensor, rng: torch.Generator) -> Tensor:
        """Stage B's error at drawing scenes from semantic latents."""
        which, dropped, blind, high, t = torch.rand(5, len(numbers), generator=rng, device=self.device)
        ids = self.ids[numbers, (which * recipe.CAPTIONS).long()]
        ids = torch.where(dropped[:, None] < recipe.CAPTION_DROPOUT, self.empty, ids)
        with torch.no_grad():
            _, pooled = self.text.conditions(ids, (ids != PAD_ID).long())
        semantic = torch.where(blind[:, None, None, None] < recipe.EFFNET_DROPOUT, 0.0, semantic)
        # the picture is decided while hardly anything of it shows: most steps go there
        t = torch.where(high < 0.7, 0.75 + 0.25 * t, t)
        x0 = self.latents[numbers].float()
        noisy, velocity = diffusion.noised(x0, self.noise(x0.shape, rng), t)
        error = (self.networks["b"](noisy, t, pooled, effnet=semantic) - velocity) ** 2
        # shapes cover a twelfth of a picture; counted alike, they are learned long after the background. Their
        # surroundings count as much as they do, or every outline that is not certain yet would be drawn too wide
        stands_out = (x0 - x0[:, :, :1, :1]).abs().amax(1, keepdim=True) > _SHAPE_STANDS_OUT
        weight = 1 + (_SHAPE_WEIGHT - 1) * F.max_pool2d(stands_out.float(), 9, stride=1, padding=4)
        loss: Tensor = (error * weight).mean() / weight.mean()
        return loss


class TrainJoint(TrainB):
    """Stage B and the semantic encoder as one: the error of the drawing reaches the encoder.

    Every other picture is drawn from what it means instead, as Stage C will say it; and the encoder is held near that
    meaning, so that what it says stays what Stage C says.
    """

    stage = "joint"

    def first_weights(self, out: Path, quiet: bool) -> None:  # noqa: D102
        del quiet
        for stage in ("b", "semantic"):
            for name, network in trained(out, stage, self.device).items():
                self.networks[name].load_state_dict(network.state_dict())

    def begin(self, steps: range) -> None:  # noqa: D102
        self.networks["encoder"].eval()  # few pictures a step: its batch norms keep the averages of its own training
        batches = data.Batches(self.stream, self.training.batch, len(self.latents))
        self.batches: Iterator[tuple[Tensor, Tensor]] = data.load(batches, steps, self.workers)

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        numbers, drawn = next(self.batches)
        numbers = numbers.to(self.device)
        pixels = data.for_semantic(data.to_unit(drawn.to(self.device)), nearest=step % 2 == 1)
        read, meant = self.networks["encoder"](pixels).float(), self.meant(numbers, rng)
        from_picture = torch.arange(len(numbers), device=self.device).view(-1, 1, 1, 1) % 2 == 0
        semantic = torch.where(from_picture, read, meant)
        return self.drawing_error(numbers, semantic, rng) + recipe.MEANING_WEIGHT * F.mse_loss(read, meant)


TASKS: dict[str, type[Task]] = {
    task.stage: task
    for task in (TrainA, TrainTextC, TrainB, TrainSemantic, TrainJoint, TrainImage, TrainPrompts, TrainCanny)
}


def autocast(device: torch.device) -> torch.autocast:
    """bf16 for the matrix products: half the time on CPUs that have it, and the same pictures."""
    return torch.autocast(device.type, torch.bfloat16)


def latents_a(out: Path, device: torch.device, workers: int, quiet: bool) -> Tensor:
    """Stage A's latents of the training scenes: float16 [SCENES_B, 4, 64, 64]."""
    networks = trained(out, "a", device)

    def make(pixels: Tensor) -> Tensor:
        with autocast(device):
            return cast("StageA", networks["a"]).encode(pixels.to(device))

    return data.kept(
        out / "latents-a.pt",
        fingerprint(networks),
        recipe.SCENES_B,
        make,
        what="Stage A's latents",
        workers=workers,
        quiet=quiet,
    )


def rate_at(step: int, steps: int, peak: float) -> float:
    """The learning rate: a rise over 100 steps, level, and a fall over the second half."""
    rise = min(1.0, (step + 1) / 100)
    fall = min(1.0, (steps - step) / (steps / 2))
    return peak * rise * fall


class Trainer:
    """A task with its optimizer, the average of its weights, and its file."""

    def __init__(self, task: Task, path: Path) -> None:
        self.task, self.path, self.step = task, path, 0
        self.parameters = [p for p in task.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {k: v.clone() for k, v in task.networks.state_dict().items()}
        self.origin = origin(path.parent, task.stage)
        if path.is_file():
            state = torch.load(path, map_location=task.device, weights_only=True)
            check_origin(state, path.parent, task.stage)
            self._load(state)
        # optimizers and loading write weights in place, so these lists stay true
        current = task.networks.state_dict()
        names = [k for k, v in current.items() if v.is_floating_point()]
        self.current, self.averaged = [current[k] for k in names], [self.average[k] for k in names]

    def _load(self, state: dict[str, object]) -> None:
        self.task.networks.load_state_dict(state["weights"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.average = state["average"]  # type: ignore[assignment]
        self.step = int(state["step"])  # type: ignore[call-overload]

    def save(self) -> None:
        """Writes the state that the next run goes on from."""
        data.save(
            {
                "step": self.step,
                "origin": self.origin,
                "weights": self.task.networks.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
            },
            self.path,
        )

    def take_step(self, steps: int) -> Tensor:
        """One optimizer step. Returns the loss as a tensor: reading it would make a GPU wait."""
        task, training = self.task, self.task.training
        rng = torch.Generator(task.device).manual_seed((SEED * 10 + task.stream) * 10**7 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, steps, training.rate)
        # on a CPU the plain attention is faster: the fused one's backward pass took 40 % of Stage C's whole step
        kernels = [SDPBackend.MATH] if task.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with autocast(task.device), sdpa_kernel(kernels):
            loss = task.loss(self.step, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(training.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averaged, self.current, 1 - keep)
        return loss.detach()

    def run(self, steps: int, quiet: bool, save_every: float = 60.0) -> None:
        """Trains up to this number of steps, saving every minute and when interrupted."""
        if self.step >= steps:
            return
        self.task.networks.train()
        self.task.begin(range(self.step, steps))
        smooth, saved = 0.0, time.monotonic()
        bar = tqdm(total=steps, initial=self.step, desc=self.task.stage, unit="step", disable=quiet, mininterval=2)
        try:
            while self.step < steps:
                loss = self.take_step(steps)
                if self.step % 20 == 0 or self.step == steps:
                    value = float(loss)
                    if not np.isfinite(value):
                        raise TrainingError(
                            f"stage {self.task.stage}: the loss is {value} at step {self.step}; "
                            f"{self.path} holds the last good state"
                        )
                    smooth = value if smooth == 0 else smooth + 0.1 * (value - smooth)
                    bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
                    if time.monotonic() - saved > save_every:
                        self.save()
                        saved = time.monotonic()
                bar.update()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
        self.save()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cascade_tiny.train",
        description="Train cascade-tiny. Stopped training goes on where it was.",
        epilog="example: python -m cascade_tiny.train --out training --publish training/published",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="what to train (default: all)")
    parser.add_argument("--steps", type=int, help="steps of each chosen stage (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="pictures a step (default: the recipe's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures (default: 0, none beside)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="then write the checkpoint folder there")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    for name in ("steps", "batch", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: a number from 1 is needed")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code. Call it in the main thread: it takes over Ctrl-C."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # started in the background, a process ignores Ctrl-C's signal; both signals mean: save and stop
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    device = torch.device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
            usual = TRAININGS[arguments.device][stage]
            training = replace(usual, steps=arguments.steps or usual.steps, batch=arguments.batch or usual.batch)
            task = TASKS[stage](arguments.out, device, training, arguments.workers, arguments.quiet)
            Trainer(task, arguments.out / f"{stage}.pt").run(training.steps, arguments.quiet)
        if arguments.publish:
            publish(arguments.out, arguments.publish)
            print(arguments.publish)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
