"""The model card of a published bundle: what it is, pictures, figures, licence. Pure: a manifest in, Markdown out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import cascade_rt
from cascade_rt.errors import plain
from cascade_rt.manifest import EngineRecord, Manifest

from .official import DECODER_REPO, OFFICIAL_LICENCE

IDENTIFIERS = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "openrail", "openrail++")
"""Licences that the hub knows by name; every other one is ``other`` with a name of its own."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture of a card.

    Attributes:
        file: its place in the repository.
        prompt: that it was drawn from.
        seed: likewise.
        png: its bytes.
    """

    file: str
    prompt: str
    seed: int
    png: bytes


def card_of(manifest: Manifest, repo: str, pictures: Sequence[Drawn]) -> str:
    """The text of a repository's ``README.md``.

    Args:
        manifest: of the bundle.
        repo: ``OWNER/NAME``.
        pictures: drawn with the bundle.
    """
    from huggingface_hub import ModelCardData

    facts = manifest.model
    data = ModelCardData(
        library_name="cascade-rt",
        pipeline_tag="text-to-image",
        tags=["stable-cascade", "onnx", *sorted({record.runtime for record in manifest.engines} - {"onnx"})],
        base_model=facts.source if facts.source.count("/") == 1 else None,
        **_licence(facts.licence),
    )
    loras = dict.fromkeys(lora for model in manifest.models.values() for lora in model.loras)
    revision = f" at revision {plain(facts.revision)}" if facts.revision else ""
    folded = f" LoRA files: {plain(', '.join(loras))}." if loras else ""
    mebibytes = sum(file.bytes for file in manifest.files.values()) / 2**20
    prompt = pictures[0].prompt if pictures else "a red circle"
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {plain(facts.name)}\n",
            f"Engines of Stable Cascade for cascade-rt {cascade_rt.__version__}: text to picture without a "
            f"deep-learning framework at run time. {facts.width} x {facts.height} pixels unless a request says "
            "otherwise.\n",
            *_shown(pictures),
            "## Use\n",
            "```",
            "pip install 'cascade-rt[onnxruntime]' huggingface_hub",
            f"cascade-run {shlex.quote(prompt)} --bundle {repo} --seed 0 -o picture.png",
            "```\n",
            "```python",
            "from cascade_rt import CascadePipeline\n",
            f'with CascadePipeline.from_pretrained("{repo}") as pipe:',
            f"    pipe({prompt!r}, seed=0).images[0].save('picture.png')",
            "```\n",
            "## Figures\n",
            "How far each engine is from fp32 PyTorch on the same weights, as the export measured it.\n",
            "| engine | features | runtime | precision | relative L2 | largest difference | measured on |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(_row(record) for record in manifest.engines),
            "",
            f"{len(manifest.files)} files, {mebibytes:.1f} MiB. Weights: {plain(facts.source)}{revision}.{folded}\n",
            "## Licence\n",
            f"Of the weights: {plain(facts.licence)}. The code that runs them is Apache-2.0.\n",
        ]
    )


def _licence(licence: str) -> dict[str, str]:
    """The licence as the card's metadata have it."""
    if licence.lower() in IDENTIFIERS:
        return {"license": licence.lower()}
    if OFFICIAL_LICENCE in licence:
        link = f"https://huggingface.co/{DECODER_REPO}/blob/main/LICENSE"
        return {"license": "other", "license_name": "stable-cascade-nc-community", "license_link": link}
    return {"license": "other", "license_name": "".join(c if c.isalnum() else "-" for c in licence.lower())[:60]}


def _shown(pictures: Sequence[Drawn]) -> list[str]:
    if not pictures:
        return []
    return [
        f"| {' | '.join(f'![{plain(row.prompt)}]({row.file})' for row in pictures)} |",
        f"|{' --- |' * len(pictures)}",
        f"| {' | '.join(f'{plain(row.prompt)}, seed {row.seed}' for row in pictures)} |\n",
    ]


def _row(record: EngineRecord) -> str:
    found = record.verification
    figures = (f"{found.rel_l2:.1e}", f"{found.max_abs:.1e}", found.provider) if found else ("not verified", "", "")
    cells = (record.name, ", ".join(record.features), record.runtime, record.precision.name, *figures)
    return f"| {' | '.join(cells)} |"
