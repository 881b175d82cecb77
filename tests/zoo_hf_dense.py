"""Dense prediction in transformers: segmentation, depth, matting, pose, matching, text and detection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_hf_build import Outputs, submodule, vision
from zoo_hf_vision import LCNET_BLOCKS
from zoo_parts import Factory

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}


def rt_detr_backbone() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = submodule("rt_detr.rt_detr_resnet", "RTDetrResNetConfig")(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    )
    net = submodule("rt_detr.rt_detr_resnet", "RTDetrResNetBackbone")(config)
    with torch.no_grad():
        submodule("rt_detr", "replace_batch_norm")(net)
    return Outputs(net, "pixel_values"), (torch.randn(2, 3, 32, 32),)


def with_backbone(
    family: str,
    model: str,
    config: str,
    backbone: tuple[str, str, dict[str, object]],
    size: int = 64,
    channels: int = 3,
    **options: object,
) -> Factory:
    """As ``vision``, the backbone's configuration being one of its own: family, class name and options."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        backbone_family, name, backbone_options = backbone
        inner = submodule(backbone_family, name)(**backbone_options)
        return vision(family, model, config, size, channels, backbone_config=inner, **options)()

    return build


def detector(
    family: str, model: str, config: str, backbone: tuple[str, str, dict[str, object]], **options: object
) -> Factory:
    """RT-DETR and its descendants at 64 pixels, with eight queries."""
    small = {
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [12, 16, 16],
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "d_model": 16,
        "decoder_in_channels": [16, 16, 16],
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "num_queries": 8,
        "decoder_n_points": 2,
        "num_denoising": 0,
        "hidden_expansion": 0.5,
        "freeze_backbone_batch_norms": True,
    }
    return with_backbone(family, model, config, backbone, **(small | options))


RT_DETR_RESNET = (
    "rt_detr.rt_detr_resnet",
    "RTDetrResNetConfig",
    RESNET | {"out_features": ["stage2", "stage3", "stage4"]},
)
LCNET = {
    "scale": 0.25,
    "conv_symmetric_num": 1,
    "block_configs": LCNET_BLOCKS,
    "out_features": ["stage2", "stage3", "stage4", "stage5"],
}
HGNET = (
    "hgnet_v2",
    "HGNetV2Config",
    {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 12, 12, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [12, 12, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
        "hidden_sizes": [12, 12, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
        "use_learnable_affine_block": True,
    },
)


NETS: dict[str, Factory] = {
    "rt_detr_backbone": rt_detr_backbone,
    "segformer": vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        size=64,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        mlp_ratios=[2, 2, 2, 2],
    ),
    "beit": vision(
        "beit",
        "BeitForSemanticSegmentation",
        "BeitConfig",
        size=64,
        image_size=64,
        patch_size=16,
        intermediate_size=32,
        out_indices=[1, 2, 3, 4],
        auxiliary_channels=8,
        num_labels=5,
        **VIT,
    ),
    "data2vec": vision(
        "data2vec.data2vec_vision",
        "Data2VecVisionForSemanticSegmentation",
        "Data2VecVisionConfig",
        size=64,
        image_size=64,
        patch_size=16,
        intermediate_size=32,
        out_indices=[0, 1, 2, 3],
        auxiliary_channels=8,
        num_labels=5,
        **VIT,
    ),
    "mobilevit_deeplab": vision(
        "mobilevit",
        "MobileViTForSemanticSegmentation",
        "MobileViTConfig",
        size=64,
        image_size=64,
        hidden_sizes=[16, 20, 24],
        neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 32],
        num_attention_heads=2,
        aspp_out_channels=8,
        num_labels=5,
    ),
    "mobilenet_v2_deeplab": vision(
        "mobilenet_v2",
        "MobileNetV2ForSemanticSegmentation",
        "MobileNetV2Config",
        size=64,
        depth_multiplier=0.25,
        num_labels=5,
        output_stride=16,
    ),
    "dpt": vision(
        "dpt",
        "DPTForDepthEstimation",
        "DPTConfig",
        size=64,
        image_size=64,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 12, 12],
        fusion_hidden_size=8,
        use_batch_norm_in_fusion_residual=True,
        use_auxiliary_head=False,
        **VIT,
    ),
    "dpt_segmentation": vision(
        "dpt",
        "DPTForSemanticSegmentation",
        "DPTConfig",
        size=64,
        image_size=64,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 12, 12],
        fusion_hidden_size=8,
        use_batch_norm_in_fusion_residual=True,
        num_labels=5,
        **VIT,
    ),
    "upernet": with_backbone(
        "upernet",
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        ("resnet", "ResNetConfig", RESNET | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}),
        hidden_size=8,
        auxiliary_channels=8,
        auxiliary_in_channels=16,
        num_labels=5,
    ),
    "vitmatte": with_backbone(
        "vitmatte",
        "VitMatteForImageMatting",
        "VitMatteConfig",
        (
            "vitdet",
            "VitDetConfig",
            VIT
            | {
                "num_channels": 4,
                "image_size": 64,
                "pretrain_image_size": 64,
                "patch_size": 16,
                "out_features": ["stage4"],
            },
        ),
        channels=4,
        hidden_size=16,
        convstream_hidden_sizes=[8, 8, 12],
        fusion_hidden_sizes=[16, 12, 8, 8],
    ),
    "vitpose": with_backbone(
        "vitpose",
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        (
            "vitpose_backbone",
            "VitPoseBackboneConfig",
            VIT | {"image_size": [64, 64], "patch_size": [16, 16], "out_features": ["stage4"], "num_experts": 1},
        ),
        use_simple_decoder=False,
        num_labels=3,
    ),
    "zoedepth": with_backbone(
        "zoedepth",
        "ZoeDepthForDepthEstimation",
        "ZoeDepthConfig",
        (
            "beit",
            "BeitConfig",
            VIT
            | {
                "image_size": 64,
                "patch_size": 16,
                "intermediate_size": 32,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
                "reshape_hidden_states": False,
            },
        ),
        neck_hidden_sizes=[8, 8, 12, 12],
        fusion_hidden_size=8,
        bottleneck_features=8,
        bin_embedding_dim=8,
        num_attractors=[4, 3, 2, 1],
        use_batch_norm_in_fusion_residual=True,
        patch_transformer_hidden_size=8,
        patch_transformer_intermediate_size=16,
        patch_transformer_num_attention_heads=2,
        num_relative_features=8,
        bin_configurations=[{"name": "nyu", "n_bins": 8, "min_depth": 1e-3, "max_depth": 10.0}],
    ),
    "uvdoc": with_backbone(
        "uvdoc",
        "UVDocModel",
        "UVDocConfig",
        (
            "uvdoc",
            "UVDocBackboneConfig",
            {
                "resnet_head": [[3, 8], [8, 8]],
                "resnet_configs": [[[8, 8, 1, False]], [[8, 8, 1, True]], [[8, 8, 3, True]]],
                "stage_configs": [[[8, 1]], [[8, 2]], [[8, 3], [8, 1]]],
                "out_features": ["stage1", "stage2", "stage3"],
            },
        ),
        size=128,
        bridge_connector=[8, 8],
        out_point_positions2D=[[8, 8], [8, 2]],
    ),
    "detr": with_backbone(
        "detr",
        "DetrModel",
        "DetrConfig",
        ("resnet", "ResNetConfig", RESNET | {"out_features": ["stage4"]}),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
    ),
    "rt_detr": detector("rt_detr", "RTDetrForObjectDetection", "RTDetrConfig", RT_DETR_RESNET),
    "rt_detr_v2": detector("rt_detr_v2", "RTDetrV2ForObjectDetection", "RTDetrV2Config", RT_DETR_RESNET),
    "d_fine": detector("d_fine", "DFineForObjectDetection", "DFineConfig", HGNET),
    "pp_ocrv5_mobile_det": with_backbone(
        "pp_ocrv5_mobile_det",
        "PPOCRV5MobileDetForObjectDetection",
        "PPOCRV5MobileDetConfig",
        ("pp_lcnet_v3", "PPLCNetV3Config", LCNET),
        neck_out_channels=16,
        layer_list_out_channels=[8, 8, 8, 8],
    ),
}
