"""ONNX Runtime's graph optimisations by name, and which of them makes a right file wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: As of ONNX Runtime 1.31, in the order in which they run: rewrite rules and transformers of levels 1, 2 and 3. A name
#: that a runtime does not know is ignored by it.
NAMES: tuple[str, ...] = (
    "EliminateIdentity", "EliminateSlice", "UnsqueezeElimination", "EliminateDropout", "ExpandElimination",
    "CastElimination", "CastChainElimination", "PreShapeNodeElimination", "NoopElimination", "DivMulFusion",
    "FuseReluClip", "GemmSumFusion", "GemmTransposeFusion", "NotWhereFusion", "ConvAddFusion", "ConvMulFusion",
    "ConvBNFusion", "Pad_Fusion", "MatMul_BatchNormalization_Fusion", "LabelEncoderFusion", "DoubleQDQPairsRemover",
    "ConstantSharing", "CommonSubexpressionElimination", "ConstantFolding", "ConstantFoldingDQ", "MatMulAddFusion",
    "ReshapeFusion", "FreeDimensionOverrideTransformer", "GeluFusionL1", "LayerNormFusionL1",
    "QDQPropagationTransformer", "WeightBiasQuantization", "EnsureUniqueDQForNodeUnit", "TransposeOptimizer",
    "ClipQuantRewrite", "ReluQuantRewrite", "QDQS8ToU8Transformer", "QDQSelectorActionTransformer",
    "GemmActivationFusion", "MatMulIntegerToFloatFusion", "DynamicQuantizeMatMulFusion", "ConvActivationFusion",
    "GeluFusionL2", "LayerNormFusionL2", "SimplifiedLayerNormFusion", "AttentionFusion", "EmbedLayerNormFusion",
    "GatherSliceToSplitFusion", "GatherToSliceFusion", "MatmulTransposeFusion", "BiasGeluFusion",
    "GroupQueryAttentionFusion", "GroupQueryAttentionPreNormFusion", "SkipLayerNormFusion", "BiasSkipLayerNormFusion",
    "FastGeluFusion", "QuickGeluFusion", "BiasSoftmaxFusion", "BiasDropoutFusion", "MatMulScaleFusion",
    "MatMulActivationFusion", "MatMulNBitsFusion", "DQMatMulNBitsFusion", "MatMulNBitsMlpFusion",
    "MatMulNBitsQkvFusion", "QDQFinalCleanupTransformer", "SliceConcatToSpaceToDepthFusion",
    "GqaValueLayoutTransformer", "NchwcTransformer", "NhwcTransformer", "ConvAddActivationFusion",
    "GeluApproximation", "Avx2WeightS8ToU8Transformer",
)  # fmt: skip


def guilty(wrong: Callable[[Sequence[str]], bool], names: Sequence[str] = NAMES) -> tuple[str, ...]:
    """The optimisations without which an optimised file is right; empty where that is none of those known here.

    Asks ``wrong``, whether the file is wrong with these optimisations left out, about twice the logarithm of their
    number. Where two faults come together, what is left when no half of it suffices is returned as a whole.
    """
    if wrong(names):
        return ()
    while len(names) > 1:
        middle = len(names) // 2
        half = next((part for part in (names[:middle], names[middle:]) if not wrong(part)), None)
        if half is None:
            break
        names = half
    return tuple(names)
