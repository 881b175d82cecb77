"""Image classifiers of transformers, a few channels wide."""

from __future__ import annotations

from zoo_hf_build import vision
from zoo_parts import Factory

SMALL_STAGES = {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1]}

#: Per stage its blocks: kernel size, channels in and out, stride, squeeze-and-excitation.
LCNET_BLOCKS = [
    [[3, 16, 32, 1, False]],
    [[3, 32, 64, 2, False]],
    [[3, 64, 64, 2, False]],
    [[5, 64, 96, 2, True]],
    [[5, 96, 96, 2, True]],
]

NETS: dict[str, Factory] = {
    "resnet_basic": vision(
        "resnet", "ResNetForImageClassification", "ResNetConfig", embedding_size=8, layer_type="basic", **SMALL_STAGES
    ),
    "resnet_bottleneck": vision(
        "resnet", "ResNetForImageClassification", "ResNetConfig", embedding_size=8, **SMALL_STAGES
    ),
    "regnet_x": vision(
        "regnet",
        "RegNetForImageClassification",
        "RegNetConfig",
        embedding_size=8,
        groups_width=4,
        layer_type="x",
        **SMALL_STAGES,
    ),
    "regnet_y": vision(
        "regnet", "RegNetForImageClassification", "RegNetConfig", embedding_size=8, groups_width=4, **SMALL_STAGES
    ),
    "mobilenet_v1": vision(
        "mobilenet_v1", "MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25
    ),
    "mobilenet_v2": vision(
        "mobilenet_v2", "MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25
    ),
    "efficientnet": vision(
        "efficientnet",
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
    ),
    "levit": vision(
        "levit",
        "LevitForImageClassificationWithTeacher",
        "LevitConfig",
        size=64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    ),
    "mobilevit": vision(
        "mobilevit",
        "MobileViTForImageClassification",
        "MobileViTConfig",
        image_size=64,
        size=64,
        hidden_sizes=[16, 20, 24],
        neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 32],
        num_attention_heads=2,
    ),
    "mobilevitv2": vision(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        "MobileViTV2Config",
        size=64,
        image_size=64,
        width_multiplier=0.25,
        n_attn_blocks=[1, 1, 1],
        base_attn_unit_dims=[32, 48, 64],
    ),
    "swiftformer": vision(
        "swiftformer",
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        size=64,
        image_size=64,
        depths=[1, 1, 1, 1],
        embed_dims=[8, 12, 16, 16],
        mlp_ratio=2,
    ),
    "cvt": vision(
        "cvt",
        "CvtForImageClassification",
        "CvtConfig",
        embed_dim=[8, 12, 16],
        num_heads=[1, 2, 2],
        depth=[1, 2, 3],
        mlp_ratio=[2.0, 2.0, 2.0],
    ),
    "convnext": vision("convnext", "ConvNextForImageClassification", "ConvNextConfig", image_size=32, **SMALL_STAGES),
    "poolformer": vision(
        "poolformer", "PoolFormerForImageClassification", "PoolFormerConfig", **SMALL_STAGES, mlp_ratio=2.0
    ),
    "regnet_wide": vision(
        "regnet",
        "RegNetForImageClassification",
        "RegNetConfig",
        embedding_size=8,
        groups_width=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 2, 1, 1],
    ),
    "hgnet_v2": vision(
        "hgnet_v2",
        "HGNetV2ForImageClassification",
        "HGNetV2Config",
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 12, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[12, 16, 16, 24],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        hidden_sizes=[12, 16, 16, 24],
        depths=[1, 1, 2, 1],
        use_learnable_affine_block=True,
        num_labels=5,
    ),
    "textnet": vision(
        "textnet",
        "TextNetForImageClassification",
        "TextNetConfig",
        stem_out_channels=8,
        image_size=[64, 64],
        size=64,
        conv_layer_kernel_sizes=[[[3, 3], [3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
        conv_layer_strides=[[1, 2], [2], [1], [2]],
        hidden_sizes=[8, 8, 12, 12, 16],
    ),
    "align": vision(
        "align",
        "AlignVisionModel",
        "AlignVisionConfig",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
    ),
    "pp_lcnet": vision(
        "pp_lcnet",
        "PPLCNetForImageClassification",
        "PPLCNetConfig",
        size=64,
        scale=0.5,
        class_expand=32,
        block_configs=LCNET_BLOCKS,
    ),
    "pp_lcnet_v3": vision(
        "pp_lcnet_v3",
        "PPLCNetV3Backbone",
        "PPLCNetV3Config",
        size=64,
        scale=0.25,
        conv_symmetric_num=2,
        block_configs=LCNET_BLOCKS,
    ),
    "perceiver": vision(
        "perceiver",
        "PerceiverForImageClassificationConvProcessing",
        "PerceiverConfig",
        size=224,
        num_latents=4,
        d_latents=16,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
    ),
    "dinov2": vision(
        "dinov2",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
}
