"""Frozen dataclasses that describe a model, and their JSON form.

A config is plain data: it is saved as `config.json` beside the weights and compared by value. A variant in which the
released back-ends differ (reference facts, model.md section 10) is a named field here, if we have it; the defaults
follow the PyTorch release.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

NormName = Literal[
    "rms_norm", "rms_norm_f32", "real_rms_norm", "real_rms_norm_f32", "layer_norm", "layer_norm_f32"
]  # "real" = mean of squares; without it the statistic is the unbiased variance (model.md 3.1)
Activation = Literal[
    "silu", "gelu", "relu", "elu", "leaky_relu", "mish", "softsign", "sigmoid", "tanh", "identity"
]  # gelu is the exact (erf) form
T = typing.TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SEANetConfig:
    """Convolutional encoder and, mirrored, decoder (mimi.md sections 2.4, 2.5)."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)  # width after the first convolution and after every stage
    ratios: tuple[int, ...] = (4, 5, 6, 8)  # strides in encoder order; the decoder walks them backwards
    residual_layers: tuple[int, ...] = (1, 1, 1, 1)  # residual blocks of every stage, encoder order
    kernel_size: int = 7  # first convolution
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_base: int = 2  # residual block j of a stage dilates by base**j
    compress: int = 2  # hidden width of a residual block = width / compress


@dataclass(frozen=True, kw_only=True)
class CodecTransformerConfig:
    """Causal transformer at the SEANet rate; encoder and decoder each own one (mimi.md 2.6)."""

    num_layers: int = 8
    num_heads: int = 8
    feed_forward: int = 2048
    context: int = 250  # keys that a query sees, itself included
    max_period: float = 10000.0
    layer_scale: float = 0.01  # initial value


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Split residual vector quantizer: one semantic codebook beside a residual stack (mimi.md 2.8)."""

    dimension: int = 256
    bins: int = 2048
    num_codebooks: int = 32  # levels stored, 1 semantic + the rest acoustic


@dataclass(frozen=True, kw_only=True)
class ISTFTDecoderConfig:
    """A decoder that predicts short-time spectra instead of samples: intelligible at a tenth of the training cost."""

    channels: int = 256
    num_blocks: int = 5
    kernel_size: int = 7
    expansion: int = 3
    n_fft: int = 960
    hop: int = 240

    @property
    def delay(self) -> int:
        """Samples by which the decoded waveform lags its input."""
        return self.n_fft - self.hop


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Mimi (mimi.md section 1). Defaults are the released codec."""

    sample_rate: int = 24000
    frame_rate: float = 12.5
    dimension: int = 512  # latent width
    seanet: SEANetConfig = field(default_factory=SEANetConfig)
    transformer: CodecTransformerConfig = field(default_factory=CodecTransformerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    decoder: Literal["seanet", "istft"] = "seanet"
    istft: ISTFTDecoderConfig = field(default_factory=ISTFTDecoderConfig)  # used when decoder == "istft"
    latent_norm: bool = False  # RMS-normalise the latent before the quantizer; keeps small-scale training stable
    num_codebooks: int = 8  # codebooks that encode() returns unless told otherwise

    @property
    def frame_size(self) -> int:
        """Samples a frame: 1920 = 80 ms at 24 kHz."""
        return int(self.sample_rate / self.frame_rate)

    @property
    def hop(self) -> int:
        """Samples a step of the SEANet rate."""
        hop = 1
        for ratio in self.seanet.ratios:
            hop *= ratio
        return hop

    @property
    def resample_stride(self) -> int:
        """SEANet steps a frame."""
        return self.frame_size // self.hop

    @property
    def decoder_delay(self) -> int:
        """Samples by which the decoded waveform lags the encoded one."""
        return self.istft.delay if self.decoder == "istft" else 0


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Temporal transformer (model.md sections 1 and 4)."""

    dim: int = 4096
    num_heads: int = 32
    num_layers: int = 32
    feed_forward: int = 16896  # int(4.125 * dim); the gated inner width follows from it, model.md 3.3
    context: int = 3000  # keys that a query sees, itself included
    positions: Literal["rope", "none"] = "rope"
    max_period: float = 10000.0
    norm: NormName = "real_rms_norm_f32"
    activation: Activation = "silu"


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Depth transformer: the codebooks of one frame, one after the other (model.md 5.1)."""

    dim: int = 1024
    num_heads: int = 16
    num_layers: int = 6
    feed_forward: int = 4224
    context: int = 8
    norm: NormName = "rms_norm_f32"
    activation: Activation = "silu"
    input_per_step: bool = True  # one input projection a codebook, or one for all


@dataclass(frozen=True, kw_only=True)
class SpeechLMConfig:
    """Token streams, backbone and depth transformer. Streams: text, own audio, user audio (model.md section 2)."""

    text_card: int = 32000  # text ids predicted; id text_card is the initial token
    audio_card: int = 2048  # audio ids predicted; id audio_card is the initial token
    own_codebooks: int = 8  # audio streams generated ("dep_q")
    user_codebooks: int = 8  # audio streams heard
    delays: tuple[int, ...] = (0, *(0, 1, 1, 1, 1, 1, 1, 1), *(0, 1, 1, 1, 1, 1, 1, 1))  # frames, one a stream
    text_padding: int = 3
    text_end_of_padding: int = 0
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)

    @property
    def num_streams(self) -> int:
        return 1 + self.own_codebooks + self.user_codebooks

    @property
    def max_delay(self) -> int:
        return max(self.delays)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Gated cross-attention (paper section 3.1; model.md 4.1 to 4.5)."""

    layers: tuple[int, ...] | None = None  # blocks that have one; None = every block
    sharing: Literal["qkv", "kv", "none"] = "qkv"  # projections that all layers share
    gate: Literal["layer", "shared", "none"] = "layer"
    gate_input: Literal["conditional", "constant"] = "conditional"
    gate_activation: Literal["sigmoid", "tanh"] = "sigmoid"  # sigmoid is shifted by -4
    source_dim: int | None = None  # width of the image tokens; None = backbone width
    norm: NormName = "real_rms_norm_f32"  # norm of the query side, one a layer
    start: int | None = None  # first step at which the adapters act; None = the first
    end: int | None = None  # None = for ever; otherwise acts for this many steps (model.md 4.4)
    # Generation: every layer uses its own keys and values, or all use the first one's, as the release does (4.2).
    stream_keys: Literal["own", "first"] = "own"
    gate_scale: tuple[float, float] = (0.005, 0.016)  # of a transcript's colours (5.5): lowest gate, width

    def __post_init__(self) -> None:
        if not self.gate_scale[1] > 0:
            raise ValueError(f"AdapterConfig.gate_scale needs a width above 0, not {self.gate_scale[1]}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Image encoder and projection (model.md sections 6 and 7)."""

    encoder: Literal["siglip", "pixtral"] = "siglip"
    image_size: int = 448  # pixels; the position table's native size
    patch_size: int = 14
    hidden_size: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    mlp_size: int = 4304
    norm_eps: float = 1e-6  # SigLIP only; Pixtral's norms have 1e-5
    rope_theta: float = 10000.0  # Pixtral only
    longest_edge: int | None = None  # Pixtral only: larger pictures are scaled down to it; None = image_size
    projection_norm: NormName | None = "rms_norm"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that `moshivis.model.MoshiVis` is built from."""

    name: str = "moshika-vis"
    codec: CodecConfig = field(default_factory=CodecConfig)
    speech_lm: SpeechLMConfig = field(default_factory=SpeechLMConfig)
    adapters: AdapterConfig | None = field(default_factory=AdapterConfig)  # None = a speech LM that sees nothing
    vision: VisionConfig = field(default_factory=VisionConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of any config of this module."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """Inverse of `to_dict`. Missing keys take their defaults.

    Raises ValueError that names a key which is unknown or whose value is of another type, or none of those possible.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} must be a mapping, not {data!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return cls(**{name: _convert(hints[name], value, f"{cls.__name__}.{name}") for name, value in data.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):  # by the field's name
            raise ValueError(f"{name} must be a mapping, not {value!r}")
        return from_dict(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, not {value!r}")
        kind, *others = typing.get_args(hint)
        if ... not in others and len(value) != 1 + len(others):
            raise ValueError(f"{name} must have {1 + len(others)} values, not {len(value)}")
        return tuple(_convert(kind, item, name) for item in value)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(typing.get_args(hint))}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        return value
    if type(value) is not hint:
        raise ValueError(f"{name} must be of type {hint.__name__}, not {value!r}")
    return value
