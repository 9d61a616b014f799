"""``optimum-cli export cascade``. Optimum loads every file of this folder, which holds no ``__init__.py`` (PEP 420)."""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from cascade_export.cli import add_export_options, make_bundle
from cascade_rt.commands import as_path, as_place, run_command


class CascadeExportCommand(BaseOptimumCLICommand):
    """``cascade-export`` under Optimum's words; without ``--stage`` it exports all that the checkpoint has."""

    COMMAND = CommandInfo(name="cascade", help="Export Stable Cascade to a bundle of ONNX graphs for cascade-rt.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options to the parser that Optimum made."""
        parser.add_argument(
            *("-m", "--model"),
            dest="checkpoint",
            type=as_place,
            required=True,
            metavar="CHECKPOINT",
            help="diffusers folder, original or ComfyUI .safetensors, bundle, hub id, or random:SEED",
        )
        parser.add_argument("out", type=as_path, metavar="OUT", help="bundle to make or add to")
        add_export_options(parser)

    def run(self) -> None:
        """Export, and end the process with the exit code of ``cascade-export``."""
        args = self.args
        args.stage = args.stage or ["all"]
        sys.exit(run_command(lambda: make_bundle(args), {"--checkpoint": "--model", "--out": "OUT"}, ends=True))


# An iterator, because it gives its command once: where two of these folders are on the path, a checkout and an
# installation, Optimum goes through this module twice, and argparse refuses a second command of the same name.
REGISTER_COMMANDS = iter([(CascadeExportCommand, ExportCommand)])
