"""Speech, series and text in transformers: BatchNorm over (N, C, L), between linear layers and transpositions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo_hf_build import Outputs, part, submodule
from zoo_parts import Factory


def model(family: str, name: str, config: str, argument: str, example: Tensor, **options: Any) -> Factory:
    """A whole model over one input called ``argument``."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        return Outputs(submodule(family, name)(submodule(family, config)(**options)), argument), (example.clone(),)

    return build


def plain(family: str, name: str, shape: tuple[int, ...], *args: Any) -> Factory:
    """A layer built without a configuration."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        return submodule(family, name)(*args), (torch.randn(shape),)

    return build


def signal(*shape: int) -> Tensor:
    """Noise of one seed, drawn without touching the caller's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SPEECH = ENCODER | {
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}

NETS: dict[str, Factory] = {
    "speecht5_postnet": part(
        "speecht5",
        "SpeechT5SpeechDecoderPostnet",
        "SpeechT5Config",
        (2, 6, 8),
        hidden_size=8,
        num_mel_bins=4,
        reduction_factor=2,
        speech_decoder_postnet_units=8,
        speech_decoder_postnet_layers=3,
    ),
    "fastspeech2_postnet": part(
        "fastspeech2_conformer",
        "FastSpeech2ConformerSpeechDecoderPostnet",
        "FastSpeech2ConformerConfig",
        (2, 6, 8),
        hidden_size=8,
        num_mel_bins=4,
        reduction_factor=2,
        speech_decoder_postnet_units=8,
        speech_decoder_postnet_layers=3,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
    ),
    "fastspeech2_conv": part(
        "fastspeech2_conformer",
        "FastSpeech2ConformerConvolutionModule",
        "FastSpeech2ConformerConfig",
        (2, 9, 8),
        {"kernel_size": 5, "activation": "swish"},
        hidden_size=8,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
    ),
    "wav2vec2_conformer": model(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        "input_values",
        signal(2, 400),
        conv_depthwise_kernel_size=5,
        **SPEECH,
    ),
    "hubert": model(
        "hubert", "HubertModel", "HubertConfig", "input_values", signal(2, 400), conv_pos_batch_norm=True, **SPEECH
    ),
    "seamless_conv": part(
        "seamless_m4t",
        "SeamlessM4TConformerConvolutionModule",
        "SeamlessM4TConfig",
        (2, 9, 8),
        hidden_size=8,
        conv_depthwise_kernel_size=5,
    ),
    "granite_speech_conv": part(
        "granite_speech",
        "GraniteSpeechConformerConvModule",
        "GraniteSpeechEncoderConfig",
        (2, 9, 8),
        hidden_dim=8,
        conv_kernel_size=5,
        conv_expansion_factor=2,
    ),
    "parakeet_conv": part(
        "parakeet",
        "ParakeetEncoderConvolutionModule",
        "ParakeetEncoderConfig",
        (2, 9, 8),
        hidden_size=8,
        conv_kernel_size=5,
    ),
    "lasr_conv": part(
        "lasr", "LasrEncoderConvolutionModule", "LasrEncoderConfig", (2, 9, 8), hidden_size=8, conv_kernel_size=5
    ),
    "informer_conv": plain("informer", "InformerConvLayer", (2, 9, 8), 8),
    "superglue_mlp": part("superglue", "SuperGlueMultiLayerPerceptron", "SuperGlueConfig", (2, 9, 8), 8, 8),
    "emu3_block": plain("emu3", "Emu3VQVAETemporalResnetBlock", (2, 8, 3, 6, 6), 8, 12),
    "patchtst": model(
        "patchtst",
        "PatchTSTForRegression",
        "PatchTSTConfig",
        "past_values",
        signal(2, 32, 3),
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_hidden_layers=2,
        d_model=8,
        num_attention_heads=2,
        ffn_dim=16,
        loss="mse",
        num_targets=2,
    ),
    "patchtsmixer": model(
        "patchtsmixer",
        "PatchTSMixerForRegression",
        "PatchTSMixerConfig",
        "past_values",
        signal(2, 32, 3),
        num_input_channels=3,
        context_length=32,
        norm_mlp="BatchNorm",
        num_layers=2,
        loss="mse",
        num_targets=2,
    ),
    "clap_audio": model(
        "clap",
        "ClapAudioModel",
        "ClapAudioConfig",
        "input_features",
        signal(2, 1, 64, 16),
        num_mel_bins=16,
        spec_size=32,
        hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        patch_embeds_hidden_size=16,
        num_hidden_layers=2,
        window_size=4,
    ),
    "sam3_lite_text": model(
        "sam3_lite_text",
        "Sam3LiteTextTextModel",
        "Sam3LiteTextTextConfig",
        "input_ids",
        torch.arange(14).reshape(2, 7) + 2,
        vocab_size=24,
        max_position_embeddings=7,
        projection_dim=8,
        repmixer_kernel_size=5,
        bos_token_id=0,
        eos_token_id=1,
        **(ENCODER | {"num_hidden_layers": 3}),
    ),
}
