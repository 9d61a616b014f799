"""Write ``vectors.json``: cases that the Python package and the C++ library are both tested against.

    python tests/cpp/vectors.py

Arrays are stored as the SHA-256 of their bytes, little-endian, with their first numbers for people.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from cascade_rt import CascadePipeline
from cascade_rt.bundle import default_bundle_path
from cascade_rt.control import control_pixels, enlarged, on_grid
from cascade_rt.errors import CascadeError, shown
from cascade_rt.image import resize_bilinear
from cascade_rt.manifest import MANIFEST, Manifest, TokenizerRecord
from cascade_rt.noise import PictureNoise
from cascade_rt.pictures import clip_pixels, encoder_pixels, mask_on_grid, open_mask, open_picture
from cascade_rt.plan import Plan, plan
from cascade_rt.request import Request, Tensors
from cascade_rt.sampling import PREDICTION_TYPES, SAMPLERS, guide, make_schedule, timestep_embedding
from cascade_rt.text import PromptTokenizer

HERE = Path(__file__).parent
VECTORS = HERE / "vectors.json"
CLIP = HERE / "clip_tokenizer.json"
CLIP_RECORD = TokenizerRecord(file=CLIP.name, max_length=77, pad_id=1)
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def told(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array's hash, size and first numbers."""
    flat = np.ascontiguousarray(array)
    first = [float(x) for x in flat.reshape(-1)[:3]]
    return {"sha256": hashlib.sha256(flat.tobytes()).hexdigest(), "count": flat.size, "first": first}


def noise_cases() -> Iterator[dict[str, Any]]:
    """Every kind, with sizes around torch's blocks of 16 and the threads of a GPU, several calls in turn."""
    shapes = [
        [[1, 3]],
        [[1, 15], [1, 4]],
        [[1, 16]],
        [[1, 17]],
        [[1, 31], [1, 16, 6, 6]],
        [[2, 16, 8, 8], [2, 16, 8, 8]],
    ]
    shapes += [[[3, 4, 64, 48]], [[1, 4, 256, 256]], [[1, 1_100_003]]]
    for kind in ("torch-cpu", "torch-cuda", "notebook"):
        for index, several in enumerate(shapes):
            pictures = several[0][0]
            seeds = [index, 2**64 - 1, 2**32 + 5][:pictures] if index % 2 else [2**63 + index]
            if len(seeds) not in (1, pictures):
                continue
            source = PictureNoise(kind, seeds, pictures)
            parts = [source.initial(tuple(several[0])), *(source.normal(tuple(shape)) for shape in several[1:])]
            yield {"kind": kind, "seeds": seeds, "shapes": several, "made": [told(part) for part in parts]}


def schedule_cases() -> Iterator[dict[str, Any]]:
    """Every sampler and prediction type."""
    for sampler in SAMPLERS:
        for prediction_type in PREDICTION_TYPES:
            for steps in (1, 2, 3, 10, 20, 29, 60, 1000):
                for shift, scaler, start in ((1.0, 1.0, 1.0), (2.0, 0.7, 1.0), (0.5, 1.8, 0.35)):
                    made = make_schedule(sampler, steps, prediction_type, shift=shift, scaler=scaler, start=start)
                    tables = [made.ratios, made.x0.astype(np.float32), made.update.astype(np.float32)]
                    yield {
                        "sampler": sampler,
                        "steps": steps,
                        "prediction_type": prediction_type,
                        "shift": shift,
                        "scaler": scaler,
                        "start": start,
                        "returns_x0": made.returns_x0,
                        "made": told(np.concatenate([np.asarray(table, np.float32).reshape(-1) for table in tables])),
                        "embedding": told(timestep_embedding(made.ratios, 64)),
                    }


def array_cases() -> dict[str, Any]:
    """Resizes and guidance, of arrays that are drawn from a seed."""

    def drawn(seed: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return PictureNoise("torch-cpu", [seed], shape[0]).normal(shape)

    resizes = [
        {
            "seed": i,
            "shape": shape,
            "size": size,
            "corners": corners,
            "made": told(resize_bilinear(drawn(i, tuple(shape)), *size, corners=corners)),
        }
        for corners in (True, False)
        for i, (shape, size) in enumerate(
            (([1, 16, 6, 6], [32, 32]), ([2, 16, 5, 9], [20, 48]), ([1, 4, 1, 7], [1, 3]), ([1, 2, 24, 24], [128, 128]))
        )
    ]
    grids = [
        {"seed": i, "shape": shape, "size": size, "made": told(on_grid(drawn(i, tuple(shape)), *size))}
        for i, (shape, size) in enumerate(
            (([1, 4, 6, 6, 5], [6, 6]), ([1, 3, 8, 5, 7], [3, 9]), ([1, 1, 1, 1, 4], [2, 2]))
        )
    ]
    doubled = {"seed": 3, "shape": [2, 16, 3, 5], "made": told(enlarged(drawn(3, (2, 16, 3, 5))))}
    guides = [
        {
            "seed": seed,
            "shape": [2, 16, 7, 5],
            "scale": scale,
            "rescale": rescale,
            "made": told(
                guide(
                    drawn(seed, (2, 16, 7, 5)), drawn(seed + 1, (2, 16, 7, 5)), np.float32([scale, scale + 1]), rescale
                )
            ),
        }
        for seed, scale, rescale in ((1, 1.5, 0.7), (2, 4.0, 0.0), (3, 7.3, 1.0))
    ]
    return {"resizes": resizes, "guides": guides, "grids": grids, "enlarged": [doubled]}


WORDS = [
    "a",
    "large",
    "red",
    "circle",
    "at",
    "the",
    "left",
    "of",
    "blue",
    "background",
    "Star",
    "GREEN",
    "square,",
    "small!",
    "on",
    "top?",
    "don't",
    "they're",
    "we've",
    "I'm",
    "he'll",
    "it'd",
    "'s",
    "café",
    "naïve",
    "Ångström",
    "ﬁne",
    "ﬀ",
    "\uff12\uff13",
    "½",
    "Ⅷ",
    "①",
    "Ⓐ",
    "İstanbul",
    "ΣΑΣ",
    "ß",
    "日本語",
    "한국어",
    "각",
    "العربية",
    "हिन्दी",
    "ไทย",
    "emoji",
    "😀👩\u200d👩\u200d👧",
    "é",
    "ọ̈",
    "Å",
    "한",
    "tab\t",
    "new\nline",
    "nbsp\xa0x",
    "ideographic\u3000y",
    "zero\u200bwidth",
    "soft\xadhyphen",
    "snake_case",
    "kebab-case",
    "1,000.5",
    "$%^&*",
    "<|startoftext|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<pad>",
    "[mask]",
    "...",
    "—dash",
    "\u2018quoted\u2019",
    "“text”",
    "ͅ",
    "ำ",
    "̈́",
    "Ω",
    "Å",
    "ﬃ",
    "ﷺ",
    "각",
    "\x01",
    "\x7f",
    "\ufeff",
    "\u2028",
    "\U0001d400",
    "𠀀",
    "Ǆ",
]


def prompts() -> list[str]:
    """Strings of words, of letters of all kinds, and of what tokenizers treat specially."""
    dice = random.Random(7)
    made = ["", " ", "  a  ", "a" * 300, "é" * 90, "the " * 40, "<|endoftext|><|startoftext|>a", "'s't're've'm'll'd"]
    made += [" ".join(dice.choice(WORDS) for _ in range(dice.randint(1, 12))) for _ in range(500)]
    made += ["".join(dice.choice(WORDS) for _ in range(dice.randint(1, 5))) for _ in range(200)]
    ranges = [(0x20, 0x17F), (0x300, 0x36F), (0x370, 0x5FF), (0x900, 0xDFF), (0x1100, 0x11FF), (0x1E00, 0x22FF)]
    ranges += [
        (0x2460, 0x24FF),
        (0x3040, 0x30FF),
        (0xAC00, 0xADFF),
        (0xF900, 0xFB1D),
        (0xFF00, 0xFFEF),
        (0x1F100, 0x1F6FF),
    ]
    for _ in range(500):
        low, high = dice.choice(ranges)
        made.append("".join(chr(dice.randint(low, high)) for _ in range(dice.randint(1, 10))))
    return made


def clip_tokenizer() -> str:
    """A tokenizer of CLIP's kind with a small vocabulary."""
    tokenizer = Tokenizer(
        models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for word in WORDS for _ in range(3)], trainer)
    document = json.loads(tokenizer.to_str())
    # every byte also at the end of a word, as in CLIP's vocabulary
    vocab = document["model"]["vocab"]
    for letter in alphabet:
        vocab.setdefault(f"{letter}</w>", len(vocab))
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens(
        [
            AddedToken(word, normalized=normal, special=True)
            for word, normal in zip(("<|startoftext|>", "<|endoftext|>"), (True, False), strict=True)
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0), False, False)
    return tokenizer.to_str(pretty=False)


def token_cases() -> dict[str, Any]:
    """Token ids of both kinds of tokenizer, without padding."""
    import warnings

    bundle = default_bundle_path()
    record = Manifest.from_json((bundle / MANIFEST).read_bytes(), "tiny").tokenizer
    assert record is not None
    texts = prompts()
    ids = {}
    for name, made in (
        ("tiny", PromptTokenizer(bundle / record.file, record)),
        ("clip", PromptTokenizer(CLIP, CLIP_RECORD)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numbers, mask = made(texts)
        ids[name] = [[int(x) for x in row[: int(kept.sum())]] for row, kept in zip(numbers, mask, strict=True)]
    return {"texts": texts, "ids": ids}


def refusal(error: CascadeError) -> dict[str, Any]:
    """What both sides must say of an error."""
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "field": error.field or "",
        "accepted": error.accepted or "",
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    depth: int,
    colour: int,
    size: tuple[int, int],
    clear: bytes | None = None,
    more: bytes = b"",
    late: bytes = b"",
    colours: int | None = None,
) -> bytes:
    """A PNG of any colour type and depth, with rows that are drawn from a seed.

    Args:
        depth: bits of a sample.
        colour: type by the PNG specification.
        size: width and height.
        clear: a tRNS chunk.
        more: chunks before the pixels.
        late: chunks behind them.
        colours: of the palette; None: all that the depth has.
    """
    dice = random.Random(depth * 10 + colour)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width, height = size
    rows = b"".join(b"\0" + dice.randbytes((width * channels * depth + 7) // 8) for _ in range(height))
    if colours is not None:
        rows = b"".join(b"\0" + bytes(dice.randrange(colours) for _ in range(width)) for _ in range(height))
    made = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + more
    if colour == 3:
        made += chunk(b"PLTE", dice.randbytes(3 * (colours or 2**depth)))
    if clear is not None:
        made += chunk(b"tRNS", clear)
    return made + chunk(b"IDAT", zlib.compress(rows)) + late + chunk(b"IEND", b"")


def uri(size: tuple[int, int]) -> str:
    """A small picture as a place that a request may name."""
    return "data:image/png;base64," + base64.b64encode(png(1, 0, size)).decode()


INIT, SMALL, LONG = uri((40, 24)), uri((24, 40)), uri((1, 400))
REQUESTS: list[dict[str, Any] | Any] = [
    {"prompt": "a"},
    {"prompt": ["a", "b"], "seeds": [1, 2]},
    {"prompt": "a", "seeds": [1, 2, 3], "height": 200, "width": 333},
    {"prompt": "a", "sampler": "diffusers", "height": 128, "width": 256, "seeds": [18446744073709551615]},
    {"prompt": "a", "prior": {"num_inference_steps": 5, "guidance_scale": 4, "guidance_end": 0.5}, "seeds": [0]},
    {"prompt": "a", "prior": {"guidance_per_step": [1.0, 5.0]}, "decoder": {"guidance_scale": 2.5}, "seeds": [0]},
    {"prompt": ["a", "b"], "num_images_per_prompt": 2, "seeds": [1, 2, 3, 4], "prior": {"guidance_scale": [1.0, 3.0]}},
    {"prompt": 'Zürich "quoted" \n 日本', "negative_prompt": "b", "seeds": [5], "output_type": "np"},
    {"prompt": "a", "preset": "fast", "seeds": [1]},
    {"prompt": "a", "preset": "balanced", "seeds": [1]},
    *({"prompt": "a", "seeds": [1], "height": h, "width": w} for h in (64, 65, 100, 1000) for w in (96, 257)),
    {},
    [],
    "text",
    {"prompt": 7},
    {"prompt": []},
    {"prompt": ["a", None]},
    {"prompt": {"a": 1}},
    {"prompt": "a", "promt": 1},
    {"prompt": "a" * 100_001},
    {"prompt": "a", "height": 63},
    {"prompt": "a", "height": 4097},
    {"prompt": "a", "height": 128.5},
    {"prompt": "a", "height": "128"},
    {"prompt": "a", "height": True},
    {"prompt": "a", "width": -5},
    {"prompt": "a", "height": 4096, "width": 4096, "seeds": [1]},
    {"prompt": "a", "seeds": []},
    {"prompt": "a", "seeds": [-1]},
    {"prompt": "a", "seeds": [1.5]},
    {"prompt": "a", "seeds": "x\x1b[31m"},
    {"prompt": "a", "seeds": [1, 2], "num_images_per_prompt": 3},
    {"prompt": ["a", "b"], "seeds": [1, 2, 3]},
    {"prompt": "a", "num_images_per_prompt": 0},
    {"prompt": "a", "num_images_per_prompt": 1025},
    {"prompt": "a", "num_images_per_prompt": 40, "seeds": [1]},
    {"prompt": "a", "noise": "gauss"},
    {"prompt": "a", "noise": None},
    {"prompt": "a", "sampler": "ddim"},
    {"prompt": "a", "sampler": "lcm"},
    {"prompt": "a", "preset": "best"},
    {"prompt": "a", "prior": None},
    {"prompt": "a", "prior": {"steps": 3}},
    {"prompt": "a", "prior": {"num_inference_steps": 0}},
    {"prompt": "a", "prior": {"num_inference_steps": 1001}},
    {"prompt": "a", "prior": {"guidance_scale": "3"}},
    {"prompt": "a", "prior": {"guidance_scale": 1001}},
    {"prompt": "a", "prior": {"guidance_scale": []}},
    {"prompt": "a", "prior": {"guidance_scale": [1, 2, 3]}},
    {"prompt": "a", "prior": {"guidance_scale": 2, "guidance_per_step": [1.0, 2.0]}},
    {"prompt": "a", "prior": {"guidance_per_step": [1.0, 2.0, 3.0]}},
    {"prompt": "a", "prior": {"guidance_start": 0.8, "guidance_end": 0.25}},
    {"prompt": "a", "decoder": {"guidance_end": 1.5}},
    {"prompt": "a", "decoder": {"guidance_start": None}},
    {"prompt": "a", "output_type": "tensor"},
    {"prompt": "a", "negative_prompt": ["b", "c"]},
    {"prompt": "a", "strength": 0.5},
    {"prompt": "a", "strength": 2},
    {"prompt": "a", "init_image": ""},
    {"prompt": "a", "images": "x.png"},
    {"prompt": "a", "images": [{"weight": 1}]},
    {"prompt": "a", "images": [{"image": "x.png", "weight": 11}]},
    {"prompt": "a", "mask_image": 3},
    {"prompt": "a", "init_image": "/nowhere/x.png"},
    {"prompt": "a", "mask_image": INIT, "seeds": [1]},
    {"init_image": INIT, "seeds": [1]},
    {"prompt": "a", "init_image": INIT, "strength": 0, "seeds": [1]},
    {"prompt": "a", "init_image": INIT, "strength": 0.5, "seeds": [1, 2], "height": 128, "width": 192},
    {"prompt": "a", "init_image": INIT, "strength": 0.01, "seeds": [1], "prior": {"num_inference_steps": 20}},
    {"prompt": "a", "init_image": INIT, "mask_image": INIT, "seeds": [1]},
    {"prompt": "a", "init_image": INIT, "mask_image": SMALL, "seeds": [1]},
    {"prompt": "a", "init_image": LONG, "seeds": [1]},
    {"prompt": "a", "images": [{"image": INIT}], "seeds": [1]},
    {"prompt": "a", "control_image": INIT, "seeds": [1]},
    {"control_image": INIT, "control_filtered": True, "seeds": [1, 2], "prior": {"guidance_scale": 3}},
    {"prompt": "a", "control_image": SMALL, "control_scale": -2, "control_kind": "canny", "height": 128, "seeds": [1]},
    {"prompt": "a", "control_image": INIT, "init_image": INIT, "mask_image": INIT, "strength": 0.5, "seeds": [1]},
    {"prompt": "a", "control_image": INIT, "images": [{"image": SMALL}], "seeds": [1]},
    {"prompt": "a", "control_image": LONG, "seeds": [1]},
    {"prompt": "a", "control_image": 3},
    {"prompt": "a", "control_image": ""},
    {"prompt": "a", "control_image": "/nowhere/x.png"},
    {"prompt": "a", "control_scale": 10.5},
    {"prompt": "a", "control_scale": "1"},
    {"prompt": "a", "control_scale": None},
    {"prompt": "a", "control_kind": "depth"},
    {"prompt": "a", "control_kind": 1},
    {"prompt": "a", "control_filtered": 1},
    {"prompt": "a", "control_filtered": None},
    {"prompt": "a", "control_kind": "canny"},
    {"prompt": "a", "control_filtered": True, "control_scale": 2, "seeds": [1]},
    {"prompt": "a", "control_image": INIT, "control_kind": "picture"},
    {"prompt": "a", "control_image": INIT, "control_kind": "inpainting"},
    {"prompt": "a", "control_image": INIT, "control_kind": "inpainting", "mask_image": INIT},
    {"prompt": "a", "control_image": INIT, "control_kind": "super_resolution", "seeds": [1]},
    {"prompt": "a", "control_image": INIT, "mask_image": INIT},
    {"prompt": "a", "control_image": INIT, "mask_image": SMALL},
    {"prompt": "a", "control_image": INIT, "strength": 0.5},
    {"prompt": "a", "control_image": INIT, "init_image": INIT, "strength": 0},
    {"prompt": "a", "loras": [{"file": "x.safetensors", "scale": 0.5}, {"file": "y"}], "seeds": [1]},
    {"prompt": "a", "loras": [{"scale": 1}]},
    {"prompt": "a", "loras": [{"file": ""}]},
    {"prompt": "a", "loras": [{"file": "x", "scale": 1001}]},
    {"prompt": "a", "loras": "x"},
    {"prompt": "a", "loras": [{"file": "x"}] * 17},
]


def request_cases() -> Iterator[dict[str, Any]]:
    """Requests, and what the shipped bundle makes of them; refusals of both."""
    manifest = Manifest.from_json((default_bundle_path() / MANIFEST).read_bytes(), "tiny")
    runner = CascadePipeline.from_pretrained(provider="cpu")._runner
    for values in REQUESTS:
        case: dict[str, Any] = {"request": values}
        try:
            request = Request.from_dict(values)
            case["json"] = request.to_json()
            made = plan(request, manifest, runner.gather(request, Tensors()))
        except CascadeError as error:
            yield {**case, "error": refusal(error)}
            continue
        yield {**case, "plan": planned(made, request)}


def planned(made: Plan, request: Request) -> dict[str, Any]:
    """What both sides must say of a plan."""
    loops = [loop for loop in (made.prior, made.decoder) if loop is not None]
    full = json.loads(made.request.to_json())
    if request.seeds is None:
        del full["seeds"]
    facts = {
        "pictures": made.pictures,
        "sizes": [*made.sizes.prior, *made.sizes.decoder, *made.sizes.picture],
        "engines": [[name, list(features)] for name, features in made.engine_keys],
        "memory": made.memory,
        "request": full,
        "scales": [told(np.asarray(loop.scales, np.float64)) for loop in loops],
    }
    if made.control is not None:
        facts["control"] = [made.control.engine, *made.control.pixels, made.control.channels]
    return facts


def with_controlnets() -> dict[str, Any]:
    """The shipped manifest with a ControlNet of every kind: the canny one's record under other names."""
    document: dict[str, Any] = json.loads((default_bundle_path() / MANIFEST).read_text())
    canny = next(record for record in document["engines"] if record["name"] == "controlnet.canny")
    for kind, channels in (("inpainting", 4), ("super_resolution", 16), ("picture", 3)):
        record = copy.deepcopy(canny) | {"name": f"controlnet.{kind}"}
        record["inputs"][0]["axes"][1] = channels
        document["engines"].append(record)
        document["models"][f"controlnet_{kind}"] = copy.deepcopy(document["models"]["controlnet_canny"])
    return document


CONFIG = ("models", "controlnet_canny", "config")
CONTROLLED: list[tuple[dict[str, Any], tuple[tuple[Any, ...], Any] | None]] = [
    ({}, None),
    ({"control_kind": "canny"}, None),
    ({"control_kind": "picture", "height": 200, "width": 328}, None),
    ({"control_kind": "super_resolution"}, None),
    ({"control_kind": "super_resolution", "height": 600, "prior": {"guidance_scale": 3}, "preset": "fast"}, None),
    ({"control_kind": "super_resolution", "init_image": INIT}, None),
    ({"control_kind": "super_resolution", "height": 64, "width": 64}, None),
    ({"control_kind": "inpainting", "mask_image": INIT}, None),
    ({"control_kind": "inpainting", "mask_image": INIT, "init_image": INIT}, None),
    ({"control_kind": "inpainting"}, None),
    ({"control_kind": "canny", "mask_image": INIT}, None),
    ({"control_kind": "canny"}, ((*CONFIG, "proj_blocks"), [0, 1, 3])),
    ({"control_kind": "canny"}, ((*CONFIG, "proj_blocks"), [0, "x"])),
    ({"control_kind": "canny"}, ((*CONFIG, "proj_blocks"), None)),
    ({"control_kind": "canny"}, (("models", "stage_c", "config", "control_blocks"), 5)),
    ({"control_kind": "canny"}, ((*CONFIG, "pixels_per_latent"), "32")),
    ({"control_kind": "canny"}, ((*CONFIG, "pixels_per_latent"), True)),
    ({"control_kind": "canny"}, ((*CONFIG, "pixels_per_latent"), 0.5)),
    ({"control_kind": "canny"}, ((*CONFIG, "pixels_per_latent"), 20)),
    ({"control_kind": "canny"}, ((*CONFIG, "pixels_per_latent"), 1000)),
    ({"control_kind": "canny"}, (("engines", 11, "inputs", 0, "axes", 1), "height")),
    ({"control_kind": "canny"}, (("engines", 5, "features"), ["other"])),
    ({"control_kind": "canny"}, (("engines", 3, "features"), ["other"])),
]
"""Fields of requests with a control picture, and a change of the manifest: its path and the value."""


def control_cases() -> Iterator[dict[str, Any]]:
    """What a bundle with every kind of ControlNet makes of requests, and of damages of its own."""
    document = with_controlnets()
    runner = CascadePipeline.from_pretrained(provider="cpu")._runner
    for fields, change in CONTROLLED:
        values = {"prompt": "a", "control_image": INIT, "seeds": [1, 2], **fields}
        changed = copy.deepcopy(document)
        case: dict[str, Any] = {"request": values}
        if change is not None:
            owner = changed
            for key in change[0][:-1]:
                owner = owner[key]
            owner[change[0][-1]] = change[1]
            case |= {"path": list(change[0]), "value": change[1]}
        try:
            request = Request.from_dict(values)
            manifest = Manifest.from_json(json.dumps(changed), "tiny")
            case["plan"] = planned(plan(request, manifest, runner.gather(request, Tensors())), request)
        except CascadeError as error:
            case["error"] = refusal(error)
        yield case


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    1e30,
    0.5,
    "",
    "x\x1b",
    "../a",
    [],
    [1],
    {},
    "height/0",
    "batch*height",
]


UNKNOWN: list[tuple[Any, ...]] = [
    ("a",),
    ("model", "a"),
    ("sampling", "a"),
    ("sampling", "original", "prior", "a"),
    ("models", "A"),
    ("models", "stage_c", "a"),
    ("engines", 0, "a"),
    ("engines", 1, "inputs", 0, "a"),
    ("files", "tokenizer.json", "a"),
]
"""Keys that no part of a manifest has."""


def damaged_manifests() -> Iterator[dict[str, Any]]:
    """The shipped manifest with one value changed or taken away."""
    document = json.loads((default_bundle_path() / MANIFEST).read_text())
    document["engines"] = document["engines"][:2]  # of every kind of value one is enough
    document["models"] = {name: document["models"][name] for name in ("stage_c", "text_encoder")}
    dice = random.Random(11)
    paths: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        paths.append(path)
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, below in entries:
            if "config" not in path:
                walk(below, (*path, key))

    walk(document, ())
    yield {"path": [], "remove": False, "value": document}
    for index in range(400):
        path = dice.choice(paths[1:])
        remove = dice.random() < 0.2
        value = None if remove else dice.choice(ODD)
        if index < len(UNKNOWN):
            path, remove, value = UNKNOWN[index], False, 1
        case: dict[str, Any] = {"path": list(path), "remove": remove, "value": value}
        changed = copy.deepcopy(document)
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        if remove:
            del owner[path[-1]]
        else:
            owner[path[-1]] = value
        try:
            Manifest.from_json(json.dumps(changed), "bundle/cascade.json")
        except CascadeError as error:
            case["error"] = refusal(error)
        yield case


def turned(orientation: int, big: bool = False) -> bytes:
    """EXIF data that say how a picture is to be turned."""
    order, mark = (">", b"MM\0*") if big else ("<", b"II*\0")
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return mark + struct.pack(f"{order}IH", 8, 1) + entry + struct.pack(f"{order}I", 0)


def pngs() -> Iterator[tuple[str, bytes]]:
    """Pictures of every colour type and depth, with transparency, and turned."""
    for depth, colour in (
        *((depth, 0) for depth in (1, 2, 4, 8, 16)),
        *((depth, 3) for depth in (1, 2, 4, 8)),
        *((depth, colour) for colour in (2, 4, 6) for depth in (8, 16)),
    ):
        yield f"colour type {colour}, {depth} bits", png(depth, colour, (23, 17))
    for depth in (1, 2, 4, 8, 16):
        grey = png(depth, 0, (9, 4))
        first = zlib.decompress(grey[grey.index(b"IDAT") + 4 : -16])[1:3]
        value = int.from_bytes(first, "big") >> (16 - depth)
        yield f"grey, {depth} bits, a transparent one", png(depth, 0, (9, 4), struct.pack(">H", value))
        yield f"grey, {depth} bits, none is transparent", png(depth, 0, (9, 4), struct.pack(">H", value ^ 1))
    yield "grey, white is transparent", png(1, 0, (9, 4), struct.pack(">H", 1))
    for depth in (8, 16):
        plain = png(depth, 2, (9, 4))
        first = zlib.decompress(plain[plain.index(b"IDAT") + 4 : -16])[1:7]
        colour = struct.pack(">HHH", *(first[:3] if depth == 8 else struct.unpack(">HHH", first)))
        yield f"rgb, {depth} bits, a transparent one", png(depth, 2, (9, 4), colour)
    yield "palette, one transparent", png(4, 3, (9, 4), b"\xff\xff\0\xff")
    yield "palette, several half transparent", png(4, 3, (9, 4), bytes(range(0, 256, 16)))
    yield "palette, none transparent", png(4, 3, (9, 4), b"\xff" * 16)
    yield "palette of 5 colours", png(8, 3, (9, 4), b"\0\x7f", colours=5)
    for orientation in range(10):
        yield f"turned {orientation}", png(8, 2, (7, 4), more=chunk(b"eXIf", turned(orientation, orientation % 2 == 1)))
    yield "turned behind the pixels", png(8, 2, (7, 4), late=chunk(b"eXIf", turned(6)))
    profile = b"\nexif\n%8d\n" % len(turned(8)) + (b"Exif\0\0" + turned(8)).hex().encode() + b"\n"
    yield "turned by a profile", png(8, 2, (7, 4), more=chunk(b"tEXt", b"Raw profile type exif\0" + profile))
    packet = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="3"/>'
    yield "turned by XMP", png(8, 6, (7, 4), more=chunk(b"iTXt", packet))
    for size in ((1, 1), (2, 40), (64, 48), (97, 33), (50, 50)):
        yield f"{size[0]} x {size[1]}", png(8, 2, size)


BROKEN = {
    "no base64": "data:image/png;base64,*",
    "cut base64": "data:image/png;base64,iVBORw0KGg",
    "base64 with padding inside": "data:image/png;base64,iVBO=w0K",
    "no comma": "data:image/png;base64",
    "no base64 at all": "data:image/png,x",
    "no such file": "/nowhere/at all/a.png",
    "a folder": "/",
    "blanks": " ",
}


def picture_cases() -> list[dict[str, Any]]:
    """Pictures, what the encoders are given of them, and places that are no pictures."""
    made: list[dict[str, Any]] = []
    for what, data in pngs():
        place = "data:image/png;base64," + base64.b64encode(data).decode()
        picture, mask = open_picture("image", place), open_mask("image", place)
        made.append(
            {
                "what": what,
                "place": place,
                "size": picture.size,
                "rgb": told(np.asarray(picture)),
                "mask": told(mask.astype(np.uint8)),
                "clip": told(clip_pixels(picture, 16)),
                "pixels": told(encoder_pixels(picture, 24, 40)),
                "large": told(encoder_pixels(picture, 70, 35)),
                "grid": told(mask_on_grid(mask, 3, 5)),
                "control": [
                    told(control_pixels(kind, picture, mask, size, channels, True))
                    for kind, channels in (("canny", 1), ("picture", 1), ("picture", 3), ("inpainting", 4))
                    for size in ((24, 40), (70, 35))
                ],
            }
        )
    for what, place in BROKEN.items():
        try:
            open_picture("image", place)
        except CascadeError as error:
            made.append({"what": what, "place": place, "error": refusal(error)})
    return made


def shown_cases() -> list[dict[str, Any]]:
    """How values are quoted."""
    values = [None, True, 0, -5, 2**64 - 1, 1.0, 0.1, 1e16, 1e-5, 123456789.25, -0.0, 1e300, "a'b", 'a"b', "a'b\"c"]
    values += ["tab\t\x1b[31m\u200b\u2028\U000e0001é日", "long " * 60, [1, "a", None], {"a": [1.5, {}]}, [], {}]
    return [{"value": value, "shown": shown(value)} for value in values]


def vectors() -> dict[str, Any]:
    """Everything that the file holds."""
    return {
        "noise": list(noise_cases()),
        "schedules": list(schedule_cases()),
        **array_cases(),
        "shown": shown_cases(),
        "requests": list(request_cases()),
        "controls": {"manifest": with_controlnets(), "cases": list(control_cases())},
        "manifests": list(damaged_manifests()),
        "pictures": picture_cases(),
        "tokens": token_cases(),
    }


def text() -> str:
    """The file's text: one case a line."""
    parts = []
    for key, value in vectors().items():
        inside = (
            "[\n" + ",\n".join(json.dumps(case, ensure_ascii=True, separators=(",", ":")) for case in value) + "\n]"
            if isinstance(value, list)
            else json.dumps(value, ensure_ascii=True, separators=(",", ":"))
        )
        parts.append(f"{json.dumps(key)}: {inside}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Write the files."""
    if not CLIP.exists():  # training breaks ties in no fixed order
        CLIP.write_text(clip_tokenizer() + "\n", encoding="utf-8")
    VECTORS.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
