"""Write ``src/tables.hpp``: what the C++ kit takes from the Python package, so that nothing is typed twice.

Run it after a change of the tensor table, the manifest, the limits of a request or ONNX Runtime's settings::

    python engines/cpp/generate.py          # writes
    python engines/cpp/generate.py --check  # exit code 1 where the file is not what would be written
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import PIL.Image

import cascade_rt
from cascade_rt import __version__, entry, pictures, request, sampling, tensor_file
from cascade_rt.backends import MAX_THREADS
from cascade_rt.backends.ort_options import CONFIGURATION, EXACT_INT8, TABLE, WIDE_INPUTS
from cascade_rt.backends.providers import OPENVINO_INT8_GROUP, PROVIDERS
from cascade_rt.bundle import MAX_MANIFEST_BYTES
from cascade_rt.image import MAX_PICTURE_BYTES, REQUEST_KEY
from cascade_rt.manifest import FORMAT_VERSION, MANIFEST, PRESETS, Manifest, json_schema
from cascade_rt.noise import NoiseKind
from cascade_rt.plan import CONTROL
from cascade_rt.sampling import PREDICTION_TYPES, SAMPLERS
from cascade_rt.stages import CONTROLS, ENGINES, ITEM_SIZE

HEADER = Path(__file__).parent / "src" / "tables.hpp"
_LITERAL = 12_000  # bytes; some compilers take string literals of up to 16 KiB


def constant(name: str) -> Any:
    """A constant of the runtime, from whichever module defines it."""
    for module in pkgutil.iter_modules(cascade_rt.__path__):
        path = Path(cascade_rt.__path__[0]) / f"{module.name}.py"
        if not module.ispkg and re.search(rf"^{name}\b.* = ", path.read_text(encoding="utf-8"), re.MULTILINE):
            return getattr(importlib.import_module(f"cascade_rt.{module.name}"), name)
    raise LookupError(f"no module of cascade_rt defines {name}")


def quoted(text: str) -> str:
    """A C++ string literal."""
    return json.dumps(text, ensure_ascii=True)


def texts(name: str, values: Iterable[str]) -> str:
    """An array of texts, ended by a null pointer."""
    return f"inline constexpr const char* {name}[] = {{{', '.join(map(quoted, values))}, nullptr}};"


def pairs(name: str, values: Mapping[str, str]) -> str:
    """An array of pairs of texts, ended by null pointers."""
    rows = "".join(f"\n    {{{quoted(key)}, {quoted(value)}}}," for key, value in values.items())
    return f"inline constexpr Pair {name}[] = {{{rows}\n    {{nullptr, nullptr}}}};"


def defaults(kind: Any) -> dict[str, str]:
    """The fields of a dataclass in their order, each with its default as JSON."""
    plain = asdict(kind())
    return {f.name: json.dumps(plain[f.name]) for f in fields(kind)}


def bare(value: Any) -> Any:
    """A JSON Schema without what is only for people."""
    if isinstance(value, dict):
        names = {"properties", "$defs"}
        kept = {k: v for k, v in value.items() if k not in ("description", "title", "$schema", "$id")}
        return {k: ({n: bare(s) for n, s in v.items()} if k in names else bare(v)) for k, v in kept.items()}
    return [bare(entry) for entry in value] if isinstance(value, list) else value


def schema() -> dict[str, Any]:
    """The manifest's JSON Schema, with the keys of every mapping."""
    made: dict[str, Any] = bare(json_schema())
    # msgspec's schema does not say that keys of a mapping are words of a list, as msgspec itself checks
    for name, hint in get_type_hints(Manifest).items():
        if get_origin(hint) is dict and get_origin(get_args(hint)[0]) is Literal:
            made["$defs"]["Manifest"]["properties"][name]["propertyNames"] = {
                "enum": sorted(get_args(get_args(hint)[0]))
            }
    return made


def header() -> str:
    """The text of the header."""
    schemas = {
        "kSchema": schema(),
        "kTensorSchema": bare(msgspec.json.schema(tensor_file.HEADER)),
        "kMetadataSchema": bare(msgspec.json.schema(tensor_file.METADATA)),
    }
    constants = {
        "kFormatVersion": FORMAT_VERSION,
        "kMaxManifestBytes": MAX_MANIFEST_BYTES,
        "kMaxTokenizerBytes": constant("MAX_TOKENIZER_BYTES"),
        "kMaxPictureBytes": MAX_PICTURE_BYTES,
        "kMaxInputBytes": pictures.MAX_PICTURE_BYTES,
        "kMaxInputPixels": PIL.Image.MAX_IMAGE_PIXELS,
        "kMinPixels": constant("MIN_PIXELS"),
        "kMaxPixels": constant("MAX_PIXELS"),
        "kMaxGuidance": constant("MAX_GUIDANCE"),
        "kMaxPictures": constant("MAX_PICTURES"),
        "kMaxImages": constant("MAX_IMAGES"),
        "kMaxWeight": constant("MAX_WEIGHT"),
        "kMaxControlScale": constant("MAX_CONTROL_SCALE"),
        "kCannySide": constant("CANNY_SIDE"),
        "kMaxLoras": constant("MAX_LORAS"),
        "kMaxLoraScale": constant("MAX_LORA_SCALE"),
        "kMostRank": constant("MOST_RANK"),
        "kMostHeaderBytes": constant("MOST_HEADER_BYTES"),
        "kMaxPromptCharacters": constant("MAX_PROMPT_CHARACTERS"),
        "kMaxSteps": constant("MAX_STEPS"),
        "kMaxThreads": MAX_THREADS,
        "kEncoderStride": constant("ENCODER_STRIDE"),
    }
    lines = [
        "// Generated by generate.py from the Python package; do not edit.",
        "#pragma once",
        "#include <cstdint>",
        "",
        "namespace cascade_rt::tables {",
        "",
        "struct Pair { const char* key; const char* value; };",
        "",
        f"inline constexpr char kVersion[] = {quoted(__version__)};",
        f"inline constexpr char kManifest[] = {quoted(MANIFEST)};",
        f"inline constexpr char kRequestKey[] = {quoted(REQUEST_KEY)};",
        *(f"inline constexpr std::int64_t {name} = {value};" for name, value in constants.items()),
        f"inline constexpr char kOpenVinoInt8Group[] = {quoted(OPENVINO_INT8_GROUP)};",
        f"inline constexpr double kMaxTensorValue = {constant('MAX_TENSOR_VALUE')!r};",
        f"inline constexpr double kInitStrength = {constant('INIT_STRENGTH')!r};",
        f"inline constexpr double kCannyThresholds[] = {{{', '.join(map(str, constant('CANNY_THRESHOLDS')))}}};",
        f"inline constexpr char kControl[] = {quoted(CONTROL)};",
        f"inline constexpr double kAlphaRange[] = {{{', '.join(map(repr, sampling.ALPHA_RANGE))}}};",
        f"inline constexpr float kClipMean[] = {{{', '.join(f'{x!r}F' for x in constant('CLIP_MEAN'))}}};",
        f"inline constexpr float kClipStd[] = {{{', '.join(f'{x!r}F' for x in constant('CLIP_STD'))}}};",
        texts("kSamplers", SAMPLERS),
        texts("kPresets", PRESETS),
        texts("kPredictionTypes", PREDICTION_TYPES),
        texts("kNoiseKinds", get_args(NoiseKind)),
        texts("kControlKinds", CONTROLS),
        texts("kOutputTypes", get_args(request.OutputType)),
        "// Every field of a request in its order, with its default as JSON",
        pairs("kRequestFields", defaults(request.Request)),
        pairs("kLoopFields", defaults(request.LoopSettings)),
        pairs("kFlags", entry.FLAGS),
        "",
        "/// An engine of the tensor table; coupled: it hands tensors to another engine of its stage on the device.",
        "struct EngineRow { const char* name; const char* stage; const char* model; bool coupled; };",
        "inline constexpr EngineRow kEngines[] = {",
    ]
    for spec in ENGINES.values():
        coupled = str(any(tensor.constant for tensor in spec.tensors)).lower()
        lines.append(f"    {{{', '.join(map(quoted, (spec.name, spec.stage, spec.model)))}, {coupled}}},")
    lines += [
        "};",
        "",
        "/// How many axes a tensor of an engine has.",
        "struct RankRow { const char* engine; const char* tensor; int axes; };",
        "inline constexpr RankRow kRanks[] = {",
    ]
    for spec in ENGINES.values():
        for tensor in spec.tensors:
            lines.append(f"    {{{quoted(spec.name)}, {quoted(tensor.name)}, {len(tensor.axes)}}},")
    lines += [
        "};",
        "",
        "struct ItemSize { const char* dtype; std::int64_t bytes; };",
        "inline constexpr ItemSize kItemSizes[] = {",
        *(f"    {{{quoted(dtype)}, {size}}}," for dtype, size in ITEM_SIZE.items()),
        "};",
        "",
        "struct ProviderRow { const char* name; const char* extra; const char* runtime; const char* device;",
        "                     const char* computes[4]; const char* linear[6]; };",
        "inline constexpr ProviderRow kProviders[] = {",
    ]
    for name, row in PROVIDERS.items():
        computes, linear = (", ".join(map(quoted, words)) for words in (row.computes, row.linear))
        first = ", ".join(map(quoted, (name, row.extra, row.runtime, row.device)))
        lines.append(f"    {{{first}, {{{computes}}}, {{{linear}}}}},")
    lines += ["};", "", "// ONNX Runtime's settings, by provider", texts("kConfiguration", CONFIGURATION)]
    lines.append(pairs("kExactInt8", EXACT_INT8))
    lines.append(pairs("kWideInputs", WIDE_INPUTS))
    for name, told in TABLE.items():
        ident = "".join(part.capitalize() for part in name.split("-"))
        lines += [pairs(f"kSession{ident}", told.session), pairs(f"kOptions{ident}", told.options)]
    lines += [
        "struct OrtRow { const char* provider; const char* ep; const char* device; bool plans_memory;",
        "                const char* bf16; const Pair* session; const Pair* options; };",
        "inline constexpr OrtRow kOrt[] = {",
    ]
    for name, told in TABLE.items():
        ident = "".join(part.capitalize() for part in name.split("-"))
        words = ", ".join(map(quoted, (name, told.ep, told.device)))
        plans = str(told.plans_memory).lower()
        lines.append(f"    {{{words}, {plans}, {quoted(told.bf16)}, kSession{ident}, kOptions{ident}}},")
    lines += [
        "};",
        "",
        "// JSON Schemas of the manifest and of a safetensors header, in pieces that every compiler takes",
    ]
    for name, value in schemas.items():
        document = json.dumps(value, separators=(",", ":"))
        lines.append(texts(name, [document[i : i + _LITERAL] for i in range(0, len(document), _LITERAL)]))
    return "\n".join([*lines, "", "}  // namespace cascade_rt::tables", ""])


def main() -> int:
    """Write the header, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    made = header()
    if not check:
        HEADER.write_text(made, encoding="utf-8")
        return 0
    same = HEADER.exists() and HEADER.read_text(encoding="utf-8") == made
    if not same:
        print(f"{HEADER.name} is out of step; write it with: python engines/cpp/generate.py", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
