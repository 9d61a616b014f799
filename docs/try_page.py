"""Put the browser page together: the page, the shipped bundle and onnxruntime-web, in one folder that any host serves.

    python docs/try_page.py build/try
    python -m http.server --directory build/try 8001

onnxruntime-web is fetched once from the npm registry, by npm, at the version and hash that are written here, and is
served from the same folder: the page asks no other host for anything.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "try"
BUNDLE = ROOT / "engines" / "tiny" / "cascade_tiny" / "bundle"
VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
ENGINES = ("text_encoder", "stage_c.context", "stage_c.step", "stage_b.context", "stage_b.step", "stage_a.decode")


def fetch_runtime(cache: Path) -> Path:
    """The package onnxruntime-web, from the npm registry or from an earlier call.

    Args:
        cache: folder that keeps it.

    Returns:
        The ``.tgz``, whose hash is right.

    Raises:
        OSError: npm is not installed, or did not fetch it.
        ValueError: what came is not what is expected.
    """
    path = cache / f"onnxruntime-web-{VERSION}.tgz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        if npm is None:
            raise OSError("npm is not installed, which fetches onnxruntime-web: apt-get install npm")
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--silent", "--pack-destination", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
        if done.returncode != 0 or not path.is_file():
            raise OSError(f"npm did not fetch onnxruntime-web {VERSION}: {done.stderr.strip()[-300:]}")
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise ValueError(f"{path} is not onnxruntime-web {VERSION}: its hash is {digest}")
    return path


def build(out: Path, cache: Path) -> None:
    """Write the page into ``out``, which is made anew.

    Args:
        out: folder of the page.
        cache: folder that keeps the npm package between calls.
    """
    package = fetch_runtime(cache)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(PAGE, out)
    (out / "ort").mkdir()
    with tarfile.open(package) as archive:
        for place in ("package.json", *(f"dist/{name}" for name in RUNTIME)):  # the former names its licence, MIT
            member = archive.extractfile(f"package/{place}")
            if member is None:
                raise ValueError(f"onnxruntime-web {VERSION} has no {place}")
            (out / "ort" / Path(place).name).write_bytes(member.read())
    manifest = json.loads((BUNDLE / "cascade.json").read_text())
    records = [row for row in manifest["engines"] if row["name"] in ENGINES and not row["features"]]
    files = {name for row in records for name in (row["file"], *row["weights"])}
    (out / "bundle").mkdir()
    for name in ("cascade.json", manifest["tokenizer"]["file"], *sorted(files)):
        shutil.copyfile(BUNDLE / name, out / "bundle" / name)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that is made anew")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "npm", help="keeps onnxruntime-web")
    args = parser.parse_args()
    try:
        build(args.out, args.cache)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"page: {args.out}; look at it with: python -m http.server --directory {args.out} 8001")
    return 0


if __name__ == "__main__":
    sys.exit(main())
