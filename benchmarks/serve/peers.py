"""Servers that `load` compares with cascade-serve: batches that start and end together, and a script of diffusers.

python benchmarks/serve/peers.py lockstep|eager PORT
"""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from PIL import Image

MAX_PICTURES = 8
"""Of one batch: with guidance 16 rows, as cascade-serve's."""
WAIT_SECONDS = 0.02
PRIOR_STEPS = 20
Asked = tuple[dict[str, Any], "asyncio.Future[Image.Image]"]


def lockstep_app() -> FastAPI:
    """Pictures of equal step counts share a batch that starts and ends together, as most servers do it."""
    from cascade_rt import CascadePipeline, LoopSettings
    from cascade_rt import Request as Wanted

    pipe = CascadePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)

    def draw(bodies: list[dict[str, Any]]) -> list[Image.Image]:
        steps = bodies[0].get("num_inference_steps", PRIOR_STEPS)
        request = Wanted(
            prompt=tuple(body["prompt"] for body in bodies),
            seeds=tuple(body["seed"] for body in bodies),
            prior=LoopSettings(num_inference_steps=steps),
        )
        return list(pipe.run(request).images)

    draw([{"prompt": "", "seed": 0}])
    return _app(draw, MAX_PICTURES)


def eager_app() -> FastAPI:
    """One pipeline of diffusers behind FastAPI, one request at a time, as its ``examples/server`` does it."""
    import torch

    from cascade_bench.peers import torch_pipeline
    from cascade_rt.bundle import find_bundle

    bundle = find_bundle(None)
    pipe = torch_pipeline(bundle, torch.float32, "cpu")
    preset = bundle.manifest.sampling["diffusers"]

    def draw(bodies: list[dict[str, Any]]) -> list[Image.Image]:
        (body,) = bodies
        out = pipe(
            body["prompt"],
            height=bundle.manifest.model.height,
            width=bundle.manifest.model.width,
            prior_num_inference_steps=body.get("num_inference_steps", PRIOR_STEPS),
            num_inference_steps=preset.decoder.num_inference_steps,
            prior_guidance_scale=preset.prior.guidance_scale,
            decoder_guidance_scale=preset.decoder.guidance_scale,
            generator=torch.Generator().manual_seed(body["seed"]),
        )
        return list(out.images)

    draw([{"prompt": "", "seed": 0}])
    return _app(draw, 1)


def _app(draw: Callable[[list[dict[str, Any]]], list[Image.Image]], most: int) -> FastAPI:
    app, waiting, arrived = FastAPI(), deque[Asked](), asyncio.Event()

    async def work() -> None:
        while True:
            await arrived.wait()
            if most > 1:
                await asyncio.sleep(WAIT_SECONDS)
            first = waiting[0][0].get("num_inference_steps")
            batch = [one for one in waiting if one[0].get("num_inference_steps") == first][:most]
            for one in batch:
                waiting.remove(one)
            if not waiting:
                arrived.clear()
            batch = [one for one in batch if not one[1].cancelled()]
            if batch:
                images = await asyncio.to_thread(draw, [body for body, _ in batch])
                for (_, future), image in zip(batch, images, strict=True):
                    if not future.cancelled():
                        future.set_result(image)

    tasks: set[asyncio.Task[None]] = set()

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        if not tasks:
            tasks.add(asyncio.create_task(work()))
        future: asyncio.Future[Image.Image] = asyncio.get_running_loop().create_future()
        waiting.append((await request.json(), future))
        arrived.set()
        gone = asyncio.create_task(_left(request))
        either: set[asyncio.Future[Any]] = {future, gone}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not future.done():
            future.cancel()
            return {}
        file = io.BytesIO()
        future.result().save(file, "JPEG", quality=95)
        return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


if __name__ == "__main__":
    made = {"lockstep": lockstep_app, "eager": eager_app}[sys.argv[1]]()
    uvicorn.run(made, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
