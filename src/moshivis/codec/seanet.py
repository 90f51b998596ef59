"""SEANet: the convolutional encoder and decoder of Mimi (reference facts, mimi.md 2.3 to 2.5).

Module indices equal the released ones (`model.N`), activations included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from moshivis.config import SEANetConfig
from moshivis.layers.conv import CausalConv1d, CausalConvTranspose1d


class Chain(nn.Module):
    """Layers one after the other, over a whole signal or streamed. Layers without memory need no `step`."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.model = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x)
        return x

    def _layers(self) -> list[Any]:
        return list(self.model)

    def new_state(self, batch: int) -> list[Any]:
        """One state a layer that has memory, in order."""
        return [layer.new_state(batch) for layer in self._layers() if hasattr(layer, "new_state")]

    def step(self, state: list[Any], x: Tensor, active: Tensor | None = None) -> Tensor:
        """The next inputs of every row; `state` is updated in place for the `active` rows [B]."""
        states = iter(state)
        for layer in self._layers():
            x = layer.step(next(states), x, active) if hasattr(layer, "step") else layer(x)
        return x


class ResidualBlock(nn.Module):
    """x + conv1(ELU(conv3(ELU(x)))), hidden width = width / compress."""

    def __init__(self, channels: int, dilation: int, config: SEANetConfig):
        super().__init__()
        hidden = channels // config.compress
        convs = [
            nn.ELU(),
            CausalConv1d(channels, hidden, config.residual_kernel_size, dilation=dilation),
            nn.ELU(),
            CausalConv1d(hidden, channels, 1),
        ]
        self.block = Chain(convs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        return x + self.block(x)

    def new_state(self, batch: int) -> list[Any]:
        return self.block.new_state(batch)

    def step(self, state: list[Any], x: Tensor, active: Tensor | None = None) -> Tensor:
        return x + self.block.step(state, x, active)


class SEANetEncoder(Chain):
    """Waveform [B, 1, T] -> [B, dimension, T / hop]."""

    def __init__(self, config: SEANetConfig, dimension: int):
        widths = config.channels
        layers: list[nn.Module] = [CausalConv1d(1, widths[0], config.kernel_size)]
        for stage, ratio in enumerate(config.ratios):
            layers += _residuals(widths[stage], stage, config)
            layers += [nn.ELU(), CausalConv1d(widths[stage], widths[stage + 1], 2 * ratio, stride=ratio)]
        layers += [nn.ELU(), CausalConv1d(widths[-1], dimension, config.last_kernel_size)]
        super().__init__(layers)


class SEANetDecoder(Chain):
    """[B, dimension, T] -> waveform [B, 1, T * hop]: the encoder's stages walked backwards."""

    def __init__(self, config: SEANetConfig, dimension: int):
        widths = config.channels
        layers: list[nn.Module] = [CausalConv1d(dimension, widths[-1], config.kernel_size)]
        for stage in reversed(range(len(config.ratios))):
            layers += [nn.ELU(), CausalConvTranspose1d(widths[stage + 1], widths[stage], config.ratios[stage])]
            layers += _residuals(widths[stage], stage, config)
        layers += [nn.ELU(), CausalConv1d(widths[0], 1, config.last_kernel_size)]
        super().__init__(layers)


def _residuals(width: int, stage: int, config: SEANetConfig) -> list[nn.Module]:
    return [ResidualBlock(width, config.dilation_base**j, config) for j in range(config.residual_layers[stage])]
