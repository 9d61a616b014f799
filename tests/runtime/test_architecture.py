"""The picture in ARCHITECTURE.md is drawn from the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_picture_of_the_modules_is_up_to_date() -> None:
    script = ROOT / "docs" / "modules.py"
    if not script.is_file():
        pytest.skip("the documents are in the checkout only")
    spec = importlib.util.spec_from_file_location("modules", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = module.picture()
    assert "runner --> loop" in picture
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert module.BEGIN + picture + module.END in text, "type: python docs/modules.py --write"
