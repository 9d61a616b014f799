"""Every command and every program of README, the tutorial and the how-tos, typed as printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import ROOT, load_script

commands = load_script("commands")


@pytest.mark.slow
@pytest.mark.parametrize("page", commands.PAGES)
def test_every_command_works_as_printed(page: str, tmp_path: Path) -> None:
    found = list(commands.blocks_of(page, (ROOT / page).read_text(encoding="utf-8")))
    assert found, f"{page} has no commands, and need not be in this list"
    for block in found:
        if block.reason is None:
            commands.run(block, tmp_path)
    if page == "README.md":  # its pictures are what its commands make, but for the last bits of another processor
        for shown in (ROOT / "docs" / "pictures").glob("*.png"):
            pixels = [np.asarray(Image.open(file)).astype(float) for file in (shown, tmp_path / shown.name)]
            assert np.abs(pixels[0] - pixels[1]).mean() < 4, f"{shown} is another picture: python docs/pictures.py"
