"""The operators that a stranger's program may hold: those that compute on tensors and numbers alone.

An allow-list and no pattern: an operator is looked up by its whole name, because one that maps files (``from_file``),
writes them (``image::write_file``), calls methods of custom classes or launches kernels is spelt like any other.
"""

from __future__ import annotations

#: By namespace. An in-place operator (``relu_``) goes with its twin (``relu``).
_ALLOWED: dict[str, frozenset[str]] = {
    namespace: frozenset(names.split())
    for namespace, names in {
        "aten": """
            __and__ __iand__ __ior__ __ixor__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d
            _adaptive_avg_pool3d _addmm_activation _assert_async _assert_scalar _assert_tensor_metadata _cdist_forward
            _conj _convolution _convolution_mode _embedding_bag _euclidean_dist _fft_c2c _fft_c2r _fft_r2c
            _fused_rms_norm _local_scalar_dense _log_softmax _native_batch_norm_legit
            _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _native_multi_head_attention
            _nested_tensor_from_mask _nested_tensor_from_mask_left_aligned _pack_padded_sequence _pad_packed_sequence
            _pdist_forward _prelu_kernel _reshape_alias _safe_softmax _scaled_dot_product_efficient_attention
            _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy
            _transformer_encoder_layer_fwd _unique2 _unsafe_index _unsafe_view _upsample_bicubic2d_aa
            _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
            _upsample_nearest_exact3d _weight_norm _weight_norm_interface abs absolute acos acosh adaptive_avg_pool1d
            adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add
            addbmm addcdiv addcmul addmm addmv addr adjoint affine_grid_generator alias alias_copy all allclose
            alpha_dropout amax amin aminmax any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax
            argmin argsort as_strided as_strided_copy as_strided_scatter asin asinh atan atan2 atanh atleast_1d
            atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm bartlett_window batch_norm bernoulli bilinear
            binary_cross_entropy binary_cross_entropy_with_logits bincount bitwise_and bitwise_left_shift bitwise_not
            bitwise_or bitwise_right_shift bitwise_xor blackman_window block_diag bmm broadcast_tensors broadcast_to
            bucketize cartesian_prod cat cdist ceil celu chain_matmul channel_shuffle cholesky chunk clamp clamp_max
            clamp_min clip clone col2im column_stack combinations complex concat concatenate conj conj_physical
            constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
            convolution copy copysign corrcoef cos cosh cosine_similarity count_nonzero cov cross cross_entropy_loss
            cummax cummin cumprod cumsum deg2rad dequantize det detach detach_copy diag diag_embed diagflat diagonal
            diagonal_copy diagonal_scatter diff digamma dim dist div divide dot dropout dsplit dstack einsum elu
            embedding embedding_bag empty empty_like empty_strided eq equal erf erfc erfinv exp exp2 expand expand_as
            expand_copy expm1 exponential eye fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
            feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft
            fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq
            fft_rfftn fill fix flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac
            fractional_max_pool2d fractional_max_pool3d frexp frobenius_norm full full_like gather gcd ge gelu ger glu
            greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gru_cell gt hamming_window
            hann_window hardshrink hardsigmoid hardswish hardtanh heaviside histc hsplit hstack huber_loss hypot i0
            igamma igammac im2col imag index index_add index_copy index_fill index_put index_reduce index_select inner
            instance_norm inverse is_complex is_floating_point is_nonzero isclose isfinite isin isinf isnan isneginf
            isposinf isreal istft item kaiser_window kl_div kron kthvalue l1_loss layer_norm lcm ldexp le leaky_relu
            lerp less less_equal lgamma lift lift_fresh lift_fresh_copy linalg_cholesky linalg_cross linalg_det
            linalg_eigh linalg_inv linalg_inv_ex linalg_lstsq linalg_matrix_norm linalg_matrix_power linalg_multi_dot
            linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_svd linalg_svdvals linalg_vector_norm
            linear linspace log log10 log1p log2 log_normal log_sigmoid log_sigmoid_forward log_softmax logaddexp
            logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logspace logsumexp lstm
            lstm_cell lt mH mT margin_ranking_loss masked_fill masked_scatter masked_select matmul matrix_H matrix_exp
            matrix_power max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
            max_pool3d_with_indices max_unpool2d max_unpool3d maximum mean median meshgrid min minimum mish mm mode
            moveaxis movedim mse_loss msort mul multinomial multiply mv mvlgamma nan_to_num nanmean nanmedian
            nanquantile nansum narrow narrow_copy native_batch_norm native_channel_shuffle native_dropout
            native_group_norm native_layer_norm native_norm ne neg negative new_empty new_empty_strided new_full
            new_ones new_zeros nextafter nll_loss nll_loss2d_forward nll_loss_forward nonzero nonzero_numpy
            nonzero_static norm norm_except_dim normal not_equal nuclear_norm numel numpy_T one_hot ones ones_like outer
            pad pad_sequence pairwise_distance pdist permute permute_copy pixel_shuffle pixel_unshuffle polar polygamma
            positive pow prelu prod quantile quantize_per_channel quantize_per_tensor rad2deg rand rand_like randint
            randint_like randn randn_like randperm ravel real reciprocal reflection_pad1d reflection_pad2d
            reflection_pad3d relu relu6 remainder renorm repeat repeat_interleave replication_pad1d replication_pad2d
            replication_pad3d reshape reshape_as resolve_conj resolve_neg result_type rms_norm rnn_relu rnn_relu_cell
            rnn_tanh rnn_tanh_cell roll rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter
            scatter_add scatter_reduce searchsorted select select_copy select_scatter selu sgn sigmoid sign signbit silu
            sin sinc sinh size slice slice_copy slice_scatter slogdet smooth_l1_loss soft_margin_loss softmax softplus
            softshrink sort special_bessel_j0 special_bessel_j1 special_digamma special_entr special_erf special_erfc
            special_erfcx special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc
            special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr
            special_log_softmax special_logit special_logsumexp special_multigammaln special_ndtr special_ndtri
            special_polygamma special_psi special_round special_sinc special_softmax special_xlog1py special_xlogy
            special_zeta split split_copy split_with_sizes split_with_sizes_copy sqrt square squeeze squeeze_copy stack
            std std_mean stft stride sub subtract sum sum_to_size svd swapaxes swapdims sym_constrain_range
            sym_constrain_range_for_size sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride t t_copy
            take take_along_dim tan tanh tensor_split tensordot threshold tile to to_padded_tensor topk trace transpose
            transpose_copy trapezoid trapz triangular_solve tril tril_indices triplet_margin_loss triu triu_indices
            true_divide trunc type_as unbind unbind_copy unflatten unfold unfold_copy uniform unique_consecutive
            unique_dim unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_bicubic2d
            upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
            upsample_trilinear3d vander var var_mean vdot view view_as view_as_complex view_as_real view_copy vsplit
            vstack where xlogy zero zeros zeros_like
        """,
        "torchvision": "deform_conv2d nms ps_roi_align ps_roi_pool roi_align roi_pool",
        "quantized_decomposed": "choose_qparams dequantize_per_channel dequantize_per_tensor quantize_per_channel "
        "quantize_per_tensor",
        "higher_order": "associative_scan cond map_impl scan while_loop wrap_with_autocast wrap_with_set_grad_enabled",
        # Of sizes, which are numbers.
        "torch": "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum _sym_sqrt",
        "math": "ceil floor log2 pow sqrt trunc",
        "_operator": "abs add and_ eq floordiv ge getitem gt invert le lshift lt mod mul ne neg not_ or_ pos pow "
        "rshift sub truediv xor",
    }.items()
}

_MODULES = ("torch", "math", "_operator")


def is_allowed(target: str) -> bool:
    """Whether an operator, as ``torch.export.save`` spells it, is one of them.

    >>> is_allowed("torch.ops.aten.relu_.default"), is_allowed("torch.ops.aten.from_file.default")
    (True, False)
    """
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5):
        namespace, name = parts[2:4]
        plain = name.removesuffix("_") if namespace == "aten" else name
        return namespace not in _MODULES and bool({name, plain} & _ALLOWED.get(namespace, frozenset()))
    return len(parts) == 2 and parts[0] in _MODULES and parts[1] in _ALLOWED[parts[0]]
