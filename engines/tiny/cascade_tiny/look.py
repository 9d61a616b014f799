"""Looks at what the networks make while they train: `python -m cascade_tiny.look --out DIR`.

Runs the whole cascade in torch on captions that training never shows, and judges the pictures with `judge`. The
shipped bundle is measured through the runtime instead, by `benchmarks/tiny_accuracy.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cascade_export.models import StageA
from cascade_rt.loop import Denoising
from cascade_rt.noise import Noise, PictureNoise
from cascade_rt.sampling import make_schedule
from cascade_tiny import data, diffusion, recipe, scenes
from cascade_tiny.judge import Verdict, judge, psnr
from cascade_tiny.meaning import meaning
from cascade_tiny.recipe import TextEncoder
from cascade_tiny.text import build_tokenizer, encode
from cascade_tiny.train import autocast
from cascade_tiny.weights import TrainingError, trained


class Cascade:
    """The trained averages in a training folder, run one after another."""

    def __init__(self, out: Path, device: torch.device) -> None:
        self.device = device
        self.a = cast("StageA", trained(out, "a", device)["a"])
        self.prior = trained(out, "text-c", device)
        joint = (out / "joint.pt").is_file()
        self.b = trained(out, "joint" if joint else "b", device)["b"]
        encoder = "joint" if joint else "semantic"
        self.encoder = trained(out, encoder, device)["encoder"] if (out / f"{encoder}.pt").is_file() else None
        self.tokenizer = build_tokenizer()

    def generate(
        self, captions: Sequence[str], seed: int, steps: tuple[int, int], guidance: float, shift: float
    ) -> NDArray[np.float32]:
        """Captions to pictures.

        Args:
            captions: one a picture.
            seed: of all noise.
            steps: of Stage C and of Stage B.
            guidance: of Stage C; up to 1 is none.
            shift: of the log signal-to-noise ratio in Stage C, 2 in the original, 1 in DDPM.

        Returns:
            float32 [B, 256, 256, 3] in 0..1.
        """
        noise = self._noise(seed, len(captions))
        denoising = Denoising(
            schedule=make_schedule("original", steps[0], "v_prediction", shift=shift),
            latents=noise.normal((len(captions), *recipe.LATENTS_C)),
            noise=noise,
            scales=(guidance,) * len(captions),
            name="stage_c",
        )
        wanted, unwanted = self._conditions(captions), self._conditions([""] * len(captions))
        hidden, pooled = (self._rows(denoising, *pair) for pair in zip(wanted, unwanted, strict=True))
        image = torch.zeros(denoising.rows, 1, recipe.STAGE_C.clip_image_in_channels or 0, device=self.device)
        c = self.prior["c"]
        semantic = diffusion.denoise(lambda x, r: c(x, r, pooled, hidden, image), denoising, self.device)
        return self._pictures(semantic, wanted[1], steps[1], noise)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, 256, 256] to semantic latents float32 [B, 16, 6, 6]."""
        if self.encoder is None:
            raise TrainingError("the semantic encoder is not trained yet; train it: --stage semantic")
        with torch.inference_mode():
            return cast("Tensor", self.encoder(data.for_semantic(data.to_unit(pictures.to(self.device)))))

    def decode(self, semantic: Tensor, seed: int, steps: int) -> NDArray[np.float32]:
        """Semantic latents float32 [B, 16, 6, 6] through Stage B and Stage A: float32 [B, 256, 256, 3] in 0..1."""
        _, pooled = self._conditions([""] * len(semantic))
        return self._pictures(semantic.to(self.device), pooled, steps, self._noise(seed, len(semantic)))

    def through_a(self, pictures: Tensor) -> NDArray[np.float32]:
        """Pictures uint8 [B, 3, 256, 256] through Stage A alone: float32 [B, 256, 256, 3]."""
        with torch.inference_mode():
            return _to_numpy(self.a.decode(self.a.encode(data.to_unit(pictures.to(self.device)))))

    def _conditions(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = (torch.from_numpy(x).to(self.device) for x in encode(self.tokenizer, captions))
        with torch.inference_mode():
            return cast("TextEncoder", self.prior["text"]).conditions(ids, mask)

    def _rows(self, denoising: Denoising, wanted: Tensor, unwanted: Tensor) -> Tensor:
        """A condition in the order of a call's rows."""
        rows = denoising.with_negative(wanted.cpu().numpy(), unwanted.cpu().numpy())
        return torch.from_numpy(rows).to(self.device)

    def _noise(self, seed: int, pictures: int) -> Noise:
        return PictureNoise("torch-cpu", [seed], pictures)

    def _pictures(self, semantic: Tensor, pooled: Tensor, steps: int, noise: Noise) -> NDArray[np.float32]:
        """Semantic latents through Stage B, without guidance, and Stage A."""
        b = self.b

        def network(x: Tensor, r: Tensor) -> Tensor:
            with autocast(self.device):
                return b(x, r, pooled, effnet=semantic)  # type: ignore[no-any-return]

        denoising = Denoising(
            schedule=make_schedule("original", steps, "v_prediction"),
            latents=noise.normal((len(semantic), *recipe.LATENTS_B)),
            noise=noise,
            name="stage_b",
        )
        made = diffusion.denoise(network, denoising, self.device)
        with torch.inference_mode():
            return _to_numpy(self.a.decode(made))


def _to_numpy(pixels: Tensor) -> NDArray[np.float32]:
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()


def report(verdicts: Sequence[Verdict]) -> str:
    """Shares of what was right, in per cent."""
    names = ("valid", "background", "colour_at_place", "shape", "size", "right")
    return "  ".join(f"{n} {100 * np.mean([getattr(v, n) for v in verdicts]):.1f}" for n in names)


def sheet(pictures: NDArray[np.float32], columns: int) -> Image.Image:
    """Pictures [N, side, side, 3] in rows: a picture of pictures."""
    rows = len(pictures) // columns
    grid = pictures[: rows * columns].reshape(rows, columns, *pictures.shape[1:]).transpose(0, 2, 1, 3, 4)
    whole = grid.reshape(rows * pictures.shape[1], columns * pictures.shape[2], 3)
    return Image.fromarray((whole * 255 + 0.5).astype(np.uint8))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cascade_tiny.look",
        description="Sample held-out captions from training in progress, and judge them.",
        epilog="example: python -m cascade_tiny.look --out training --pictures 48 --png now.png",
    )
    parser.add_argument("--out", type=Path, required=True, help="the training's folder")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 10), metavar=("C", "B"))
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--shift", type=float, default=1.0, help="1: DDPM, 2: as the original samples Stage C")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--png", type=Path, help="write the pictures there")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        cascade = Cascade(arguments.out, torch.device(arguments.device))
        known = [data.held_out_scene(i) for i in range(arguments.pictures)]
        drawn = data.pictures(known)
        clean = data.to_unit(drawn).permute(0, 2, 3, 1).numpy()
        steps = (arguments.steps[0], arguments.steps[1])
        meant = torch.from_numpy(np.stack([meaning(s) for s in known]))
        ways = {"stage A": cascade.through_a(drawn), "meaning -> B -> A": cascade.decode(meant, 0, steps[1])}
        if cascade.encoder is not None:
            read = cascade.encode(drawn)
            print(f"semantic encoder: mean squared error {float(F.mse_loss(read.cpu(), meant)):.4f}")
            ways["encoder -> B -> A"] = cascade.decode(read, 0, steps[1])
        rows: list[NDArray[np.float32]] = [clean]
        for name, made in ways.items():
            quality = np.array([psnr(m, c) for m, c in zip(made, clean, strict=True)])
            print(f"{name}: mean {quality.mean():.2f} dB, worst {quality.min():.2f} dB")
            print(f"    {report([judge(m, s) for m, s in zip(made, known, strict=True)])}")
            rows.append(made)
        wishes = scenes.held_out_wishes()[: arguments.pictures]
        captions = [scenes.canonical(w) for w in wishes]
        made = cascade.generate(captions, 1, steps, arguments.guidance, arguments.shift)
        print(f"from captions: {report([judge(m, w) for m, w in zip(made, wishes, strict=True)])}")
        rows.append(made)
        if arguments.png:
            sheet(np.concatenate([r[:24] for r in rows]), 12).resize((12 * 128, len(rows) * 256)).save(arguments.png)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
