"""The building blocks of Stable Cascade's denoisers, in channels-last layout.

Every block takes and returns ``[batch, height, width, channels]``. LayerNorm, Linear, GRN and attention work on the
last axis, so the only operator that wants another layout is the depthwise convolution; in eager PyTorch the permuted
view is the `channels_last` memory format and costs nothing, and in an exported graph two transposes a residual block
remain instead of six.

**The residual stream may be kept divided by a power of two**, each block's ``stream_scale``: fp16 ends at 65,504, and
the stream of the published 3.6B Stage C goes beyond. Norms take the factor out again, so nothing changes but the
norms' epsilon, which is divided by the factor's square; what a block adds to the stream is divided where it is still
small. With a factor of 1 no operation is added.

**Weights behind which the stream is divided may be stored divided themselves**, where fp16 does not hold them: by
their module's ``stored_scale`` (weight and bias) or ``bias_scale`` (the bias alone), powers of two up to the stream's.
Then so much less is divided in the graph. `Divisible` says which parameters these are.

Sub-module names are diffusers', so a checkpoint's keys are this package's state-dict keys.
Matches: ``diffusers/models/unets/unet_stable_cascade.py`` (checked in ``tests/parity``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6
GRN_EPS = 1e-6
_LEAST_SQUARES = 1e-30
_BOTH = ("weight", "bias")


class Divisible(NamedTuple):
    """Parameters that may be stored divided by a power of two, because the graph divides what they make.

    Attributes:
        module: that holds them.
        attribute: of the module: the power of two.
        parameters: their names in the module.
        most: the largest power of two: what the graph divides by.
    """

    module: nn.Module
    attribute: str
    parameters: tuple[str, ...]
    most: float


def layer_norm(x: Tensor, stream_scale: float = 1.0) -> Tensor:
    """LayerNorm over the last axis without weights, accumulated in float32 whatever the dtype of ``x``.

    Args:
        x: ``[..., C]``, holding the true values divided by ``stream_scale``.
        stream_scale: see the module.
    """
    normed: Tensor = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS / stream_scale**2)
    return normed


def shrink(x: Tensor, stream_scale: float) -> Tensor:
    """``x / stream_scale``, without an operation where there is nothing to divide."""
    shrunk: Tensor = x if stream_scale == 1 else x * (1 / stream_scale)
    return shrunk


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` over the last axis as one product of two matrices.

    It is exported as one Gemm that adds the bias and takes the weight as the checkpoint has it. Over more axes it would
    be a MatMul behind a Transpose of the weight, of which ONNX Runtime makes a second copy of every weight when it
    loads, and an Add that goes over the wide activation once more.
    """
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """``nn.Linear`` by way of `linear`."""

    stored_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """`layer_norm` as a module: it holds the place that diffusers' norm has in an ``nn.Sequential``."""

    stream_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.stream_scale)


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution with a convolution's weight ``[out, in, 1, 1]``, applied to the last axis as a Linear."""

    stream_scale = 1.0
    stored_scale = 1.0
    bias_scale = 1.0

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else shrink(self.bias, self.stream_scale / self.bias_scale)
        return linear(x, self.weight.flatten(1), bias)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` on ``[B, H, W, C]``."""

    stream_scale = 1.0
    stored_scale = 1.0
    bias_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else shrink(self.bias, self.stream_scale / self.bias_scale)
        y: Tensor = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, bias)
        return y.permute(0, 2, 3, 1)


class PlainConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` on ``[B, C, H, W]``, computed in float32 where its weights are bfloat16.

    TensorRT-RTX 1.7 builds no transposed convolution in bfloat16 ("Could not infer output types for operation:
    deconv"); in float16 and float32 it does.
    """

    stored_scale = 1.0

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.weight.dtype != torch.bfloat16:
            return super().forward(x, output_size)
        bias = None if self.bias is None else self.bias.float()
        y = F.conv_transpose2d(x.float(), self.weight.float(), bias, self.stride, self.padding)  # type: ignore[arg-type]
        return y.to(x.dtype)


class ConvTranspose2d(PlainConvTranspose2d):
    """The same on ``[B, H, W, C]``."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalisation over height and width.

    The reduction runs in float32: a half-precision sum of squares over 24 x 24 positions overflows at a root mean
    square of 10. It is written as a sum of squares: ONNX Runtime has a fast path for sums over these axes and none for
    norms, which took five times as long. ``gamma * (x * n) + beta + x`` is computed as ``x * (1 + gamma * n) + beta``,
    which touches the wide activation twice instead of four times.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    stored_scale = 1.0

    def forward(self, x: Tensor, divide: float = 1.0) -> Tensor:
        """Normalise ``[B, H, W, C]``, and divide by ``divide``: what comes behind then adds small numbers."""
        wide = x.float()
        # the gradient of a square root is infinite at 0, which a channel that is 0 everywhere would bring into training
        response = (wide * wide).sum(dim=(1, 2), keepdim=True).clamp_min(_LEAST_SQUARES).sqrt()
        response = response / (response.mean(dim=-1, keepdim=True) + GRN_EPS)
        gamma = shrink(self.gamma.float(), 1 / self.stored_scale)
        scale = shrink(1 + gamma * response, divide).to(x.dtype)  # the division costs nothing here
        y: Tensor = x * scale + shrink(self.beta, divide / self.stored_scale)
        return y


class ResBlock(nn.Module):
    """Depthwise convolution, LayerNorm, and a gated MLP of four times the width; ``skip`` joins before the MLP."""

    stream_scale = 1.0

    def __init__(self, channels: int, skip_channels: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.channelwise = nn.Sequential(
            Linear(channels + skip_channels, channels * 4),
            nn.GELU(),
            GlobalResponseNorm(channels * 4),
            nn.Dropout(dropout),
            Linear(channels * 4, channels),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return ``x`` plus the residual.

        Args:
            x: ``[B, H, W, C]``.
            skip: ``[B, H, W, C_skip]``, needed exactly when the block was made with ``skip_channels > 0``.
        """
        h = layer_norm(self.depthwise(x), self.stream_scale)
        if skip is not None:
            h = torch.cat([h, skip], dim=-1)
        widen, activate, respond, dropout, narrow = self.channelwise
        assert isinstance(narrow, Linear)
        divide = self.stream_scale / narrow.stored_scale
        h = dropout(respond(activate(widen(h)), divide))
        return x + linear(h, narrow.weight, shrink(narrow.bias, divide))

    def set_stream_scale(self, scale: float) -> None:
        """Keep the stream divided by ``scale``, a power of two."""
        self.stream_scale = self.depthwise.stream_scale = scale

    def divisible(self) -> Iterator[Divisible]:
        """Its parameters that may be stored divided."""
        _, _, respond, _, narrow = self.channelwise
        yield Divisible(self.depthwise, "bias_scale", ("bias",), self.stream_scale)
        yield Divisible(respond, "stored_scale", ("gamma", "beta"), self.stream_scale)
        yield Divisible(narrow, "stored_scale", _BOTH, self.stream_scale)


class TimestepBlock(nn.Module):
    """Scale and shift by the timestep. `modulation` is the part that does not depend on the latents."""

    stream_scale = 1.0
    stored_scale = 1.0

    def __init__(self, channels: int, embedding_dim: int, conditions: tuple[str, ...]) -> None:
        super().__init__()
        self.channels = channels
        self.mapper = nn.Linear(embedding_dim, channels * 2)
        self.condition_mappers = tuple(f"mapper_{name}" for name in conditions)
        for name in self.condition_mappers:
            setattr(self, name, nn.Linear(embedding_dim, channels * 2))

    def modulation(self, embedding: Tensor, zero_embedding: Tensor) -> Tensor:
        """``[1 + a | b]`` for every row of ``embedding``, in float32.

        The extra conditions (`sca`, `crp`) are always zero at inference; their mappers see ``zero_embedding``.

        Args:
            embedding: ``[rows, embedding_dim]`` float32, sinusoidal embedding of the timestep ratios.
            zero_embedding: ``[1, embedding_dim]`` float32, the embedding of ratio 0.

        Returns:
            ``[rows, 2 * channels]`` float32.
        """
        total = _linear_fp32(self.mapper, embedding)
        for name in self.condition_mappers:
            total = total + _linear_fp32(getattr(self, name), zero_embedding)
        scale, shift = shrink(total, 1 / self.stored_scale).chunk(2, dim=-1)
        return torch.cat([1 + scale, shrink(shift, self.stream_scale)], dim=-1)

    def set_stream_scale(self, scale: float) -> None:
        """Keep the stream divided by ``scale``, a power of two."""
        self.stream_scale = scale

    def divisible(self) -> Iterator[Divisible]:
        """Its parameters that may be stored divided."""
        names = tuple(f"{mapper}.{part}" for mapper in ("mapper", *self.condition_mappers) for part in _BOTH)
        yield Divisible(self, "stored_scale", names, self.stream_scale)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Apply the two halves of a `modulation`, ``[B, 1, 1, channels]``, to ``x`` ``[B, H, W, channels]``."""
        return x * scale + shift


def _linear_fp32(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)`` in float32, also when the weights are stored in half precision (the timestep path stays exact)."""
    return F.linear(x, linear.weight.float(), linear.bias.float())


class Attention(nn.Module):
    """Multi-head attention of image tokens over themselves and the condition tokens.

    Keys and values of the condition tokens come in ready made (`condition_kv`): they are the same in every step.
    """

    stream_scale = 1.0

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = channels // heads * heads
        self.inner = inner
        self.to_q = Linear(channels, inner)
        self.to_k = Linear(channels, inner)
        self.to_v = Linear(channels, inner)
        self.to_out = nn.ModuleList([Linear(inner, channels)])

    def condition_kv(self, condition: Tensor) -> Tensor:
        """Keys and values of the condition tokens: ``[B, T, channels]`` -> ``[B, 2, T, inner]``."""
        return torch.stack([self.to_k(condition), self.to_v(condition)], dim=1)

    def forward(self, x: Tensor, condition_kv: tuple[Tensor, Tensor], self_attention: bool) -> Tensor:
        """Attend.

        Args:
            x: normalised image tokens ``[B, N, channels]``.
            condition_kv: keys and values of the condition tokens, each ``[B, T, inner]``.
            self_attention: whether image tokens are keys too.

        Returns:
            ``[B, N, channels]``.
        """
        key, value = condition_kv
        if self_attention:
            key = torch.cat([self.to_k(x), key], dim=1)
            value = torch.cat([self.to_v(x), value], dim=1)
        query, key, value = (self._split_heads(t) for t in (self.to_q(x), key, value))
        # written out: exported from `scaled_dot_product_attention`, keys are reshaped and transposed three times over
        # and both they and the queries are scaled
        scores = (query * (self.inner // self.heads) ** -0.5) @ key.transpose(-1, -2)
        out = scores.softmax(dim=-1) @ value
        project = self.to_out[0]
        assert isinstance(project, Linear)
        divide = self.stream_scale / project.stored_scale
        out = shrink(out.transpose(1, 2).flatten(2), divide)
        return linear(out, project.weight, shrink(project.bias, divide))

    def _split_heads(self, x: Tensor) -> Tensor:
        y: Tensor = x.unflatten(-1, (self.heads, self.inner // self.heads))
        return y.transpose(1, 2)


class AttnBlock(nn.Module):
    """LayerNorm, attention over image and condition tokens, residual."""

    stream_scale = 1.0

    def __init__(self, channels: int, condition_dim: int, heads: int, self_attention: bool) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.attention = Attention(channels, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), Linear(condition_dim, channels))

    def condition_kv(self, condition: Tensor) -> Tensor:
        """Condition tokens ``[B, T, condition_dim]`` -> their keys and values ``[B, 2, T, inner]``."""
        return self.attention.condition_kv(self.kv_mapper(condition))

    def forward(self, x: Tensor, condition_kv: tuple[Tensor, Tensor]) -> Tensor:
        """``x`` ``[B, H, W, C]`` plus attention over itself and the condition tokens' keys and values."""
        tokens = layer_norm(x, self.stream_scale).flatten(1, 2)
        out = self.attention(tokens, condition_kv, self.self_attention)
        y: Tensor = x + out.unflatten(1, x.shape[1:3])
        return y

    def set_stream_scale(self, scale: float) -> None:
        """Keep the stream divided by ``scale``, a power of two."""
        self.stream_scale = self.attention.stream_scale = scale

    def divisible(self) -> Iterator[Divisible]:
        """Its parameters that may be stored divided."""
        yield Divisible(self.attention.to_out[0], "stored_scale", _BOTH, self.stream_scale)
