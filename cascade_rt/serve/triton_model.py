"""The model ``cascade`` of a Triton repository that `triton` writes; only Triton's python backend can import it."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb  # type: ignore[import-not-found]  # Triton brings it

from ..backends import EngineOptions
from ..bundle import Bundle
from ..errors import CascadeError
from ..request import LoopSettings, Request
from ..runner import Runner
from ..seeds import new_seeds
from .batcher import Batcher
from .limits import Limits
from .orders import Event, Failed, Finished, Order, Preview
from .pictures import Picture
from .watch import Watch

MAX_PREVIEWS = 3
WAIT_SECONDS = 600.0
MODEL = "cascade"


class TritonPythonModel:
    """Hands requests to a `Batcher`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engines."""
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"]) / args["model_version"] / parameters["bundle"]["string_value"]
        device = int(args.get("model_instance_device_id") or 0) if args.get("model_instance_kind") == "GPU" else 0
        runner = Runner(Bundle(folder), parameters["provider"]["string_value"], False, EngineOptions(device_id=device))
        self._stream = parameters["stream"]["string_value"] == "true"
        self._batcher = Batcher({MODEL: runner}, Limits(pictures=1024), Watch())
        self._batcher.start()
        self._batcher.wait_ready()

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Draw; what runs already goes on, and these join it."""
        if self._stream:
            for request in requests:
                self._follow(request)
            return None
        heard: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        answers: list[Any] = [None] * len(requests)
        taken: list[list[Picture]] = []
        for index, request in enumerate(requests):
            try:
                order = order_of(request)
                taken.append(self._batcher.submit(order, _numbered(heard, index)))
            except CascadeError as error:
                answers[index] = _refused(error)
        seeds = {index: _seed_of(pictures) for index, pictures in zip(_open(answers), taken, strict=True)}
        while _open(answers):
            index, event = heard.get()
            answers[index] = _refused(event.error) if isinstance(event, Failed) else _answer(event, seeds[index], True)
        return answers

    def _follow(self, request: Any) -> None:
        """Take a request on whose answers are sent as they come, on the batcher's thread."""
        sender = request.get_response_sender()
        seeds: list[int] = []
        taken: list[Picture] = []

        def tell(event: Event) -> None:
            if request.is_cancelled():
                self._batcher.cancel(taken)
            if isinstance(event, Failed):
                sender.send(_refused(event.error))
                sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                return
            sender.send(_answer(event, seeds[0], False))
            if isinstance(event, Finished):
                sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

        try:
            order = order_of(request)
            seeds.extend(order.request.seeds or ())
            taken.extend(self._batcher.submit(order, tell))
        except CascadeError as error:
            tell(Failed(error=error))

    def finalize(self) -> None:
        """Give the engines back."""
        self._batcher.close()


def _numbered(heard: queue.SimpleQueue[tuple[int, Event]], index: int) -> Callable[[Event], None]:
    return lambda event: heard.put((index, event))


def _open(answers: list[Any]) -> list[int]:
    return [index for index, answer in enumerate(answers) if answer is None]


def _seed_of(pictures: list[Picture]) -> int:
    return pictures[0].planned.seeds[0]


def order_of(request: Any) -> Order:
    """The order of a request of Triton's.

    Raises:
        RequestError: a value that is not accepted.
    """

    def value(name: str) -> Any:
        tensor = pb.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        one = tensor.as_numpy().reshape(-1).tolist()[0]
        return one.decode("utf-8", "replace") if isinstance(one, bytes) else one

    seed = value("seed")
    return Order(
        id=request.request_id() or "triton",
        model=MODEL,
        request=Request(
            prompt=value("prompt"),
            negative_prompt=value("negative_prompt"),
            width=value("width"),
            height=value("height"),
            seeds=new_seeds(1) if seed is None else (seed,),
            prior=LoopSettings(
                num_inference_steps=value("num_inference_steps"), guidance_scale=value("guidance_scale")
            ),
            decoder=LoopSettings(
                num_inference_steps=value("decoder_num_inference_steps"), guidance_scale=value("decoder_guidance_scale")
            ),
        ),
        previews=min(max(value("partial_images") or 0, 0), MAX_PREVIEWS),
        deterministic=bool(value("deterministic")),
        seconds=WAIT_SECONDS,
    )


def _answer(event: Preview | Finished, seed: int, batched: bool) -> Any:
    """A picture; with an axis of one in front where the model is batched."""
    pixels = event.pixels[None] if batched else event.pixels
    shape = (1, 1) if batched else (1,)
    tensors = [pb.Tensor("image", pixels), pb.Tensor("used_seed", np.full(shape, seed, np.uint64))]
    if not batched:
        index = event.index if isinstance(event, Preview) else -1
        tensors.append(pb.Tensor("partial_image_index", np.array([index], np.int32)))
    return pb.InferenceResponse(output_tensors=tensors)


def _refused(error: Exception) -> Any:
    return pb.InferenceResponse(error=pb.TritonError(str(error)))
