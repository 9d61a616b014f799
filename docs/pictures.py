"""Make the pictures of README.md by the commands that stand beside them.

python docs/pictures.py
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "docs" / "pictures"
NAMES = ("circle.png", "varied.png", "edges.png", "both.png")


def _commands() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_commands", ROOT / "docs" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Entry point."""
    commands = _commands()
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(found for found in commands.blocks_of("README.md", page) if NAMES[0] in found.text)
    PLACE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        commands.run(block, Path(folder))
        for name in NAMES:
            shutil.copyfile(Path(folder) / name, PLACE / name)
    print(f"pictures: {PLACE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
