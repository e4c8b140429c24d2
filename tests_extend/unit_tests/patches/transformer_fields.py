"""Every field of the configuration of Megatron's layers, 0.16 to 0.19, by what becomes of it beside this attention."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMPUTED = _names("""
    num_attention_heads num_query_groups kv_channels tensor_model_parallel_size context_parallel_size
    attention_dropout softmax_type window_size window_attn_skip_freq qk_clip log_max_attention_logit
""")
"""What Megatron's core attention reads, and this one computes by."""

WITHOUT_EFFECT = {
    "apply_query_key_layer_scaling": "scores are divided by the layer's number, and multiplied again in the softmax",
    "attention_softmax_in_fp32": "sums are in fp32 at least",
    "masked_softmax_fusion": "a kernel of the softmax alone",
    "fp16": "the dtype is that of the queries",
    "bf16": "the dtype is that of the queries",
    "sequence_parallel": "a choice of random generator, where dropout has none",
}
"""What Megatron's core attention reads, and the result does not depend on; with the reason."""

BY_MEGATRON = _names("init_method params_dtype perform_initialization")
"""What Megatron's own constructor of the core attention does, which runs: the parameter of a learnable sink."""

REFUSED = _names("""
    cache_mla_latents experimental_attention_variant use_kitchen_attention cuda_graph_impl enable_cuda_graph
    external_cuda_graph fp8_dot_product_attention fp8_multi_head_attention batch_invariant_mode
    window_size
""")
"""With some value, by a table of patches/unsupported.py."""

NOTED = _names("""
    hidden_dropout moe_input_jitter_eps moe_router_force_load_balancing moe_router_force_biased
    moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_router_load_balancing_type
""")
"""Honoured within each rank, by another table there."""

HANDED_DOWN = _names("""
    softmax_scale use_mup mup_base_head_dim mup_attn_scale_power multi_latent_attention q_lora_rank kv_lora_rank
    qk_head_dim qk_pos_emb_head_dim v_head_dim mscale mscale_all_dim rotary_scaling_factor qk_layernorm qk_l2_norm
    qk_clip_alpha qk_clip_threshold attention_output_gate add_qkv_bias rotary_interleaved no_rope_freq rope_type
    rotary_base rotary_percent original_max_position_embeddings beta_fast beta_slow mla_down_proj_fusion
""")
"""What the layer around the core attention makes of it comes as queries, keys, values or their scale."""

OUTRANKED = _names("""
    attention_backend flash_attention_version hierarchical_context_parallel_sizes cp_comm_type
""")
"""What chooses among TransformerEngine's kernels and transfers: a note says what it does here."""

ELSEWHERE = _names("""
    pipeline_model_parallel_comm_backend pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    hybrid_context_parallel max_seqlen_per_dp_cp_rank expert_model_parallel_size expert_tensor_parallel_size
    moe_extended_tp
    use_cpu_initialization timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func
    param_sync_func deterministic_mode enable_autocast autocast_dtype
    num_microbatches_with_partial_activation_checkpoints gradient_accumulation_fusion
    async_tensor_model_parallel_allreduce use_te_rng_tracker tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad
    tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs
    tp_comm_atomic_rs cross_entropy_loss_fusion cross_entropy_fusion_impl tp_comm_overlap_disable_qkv
    tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend overlap_moe_expert_parallel_comm delay_wgrad_compute
    ep_overlap_early_attn_memory_release pipeline_dtype variable_seq_lengths overlap_p2p_comm batch_p2p_comm
    batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs defer_embedding_wgrad_compute
    wgrad_deferral_limit overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage mtp_standalone
    cpu_offloading cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights
    cpu_offloading_double_buffering barrier_with_L1_time num_layers mtp_num_layers mtp_loss_scaling_factor
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split hidden_size ffn_hidden_size
    fp32_residual_connection apply_residual_connection_post_layernorm layernorm_epsilon layernorm_zero_centered_gamma
    add_bias_linear gated_linear_unit activation_func activation_func_fp8_input_store glu_linear_offset
    activation_func_clamp_value num_moe_experts normalization test_mode calculate_per_token_loss dsa_indexer_n_heads
    dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_attention_freq
    linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
    output_layer_init_method init_method_std embedding_init_method embedding_init_method_std
    init_model_with_meta_device disable_bf16_reduced_precision_matmul bias_activation_fusion persist_layer_norm
    memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion use_fused_weighted_squared_relu
    fused_single_qkv_rope recompute_granularity recompute_method recompute_num_layers distribute_saved_activations
    recompute_modules fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len
    fp8_amax_compute_algo fp8_wgrad tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16
    num_layers_at_end_in_bf16 use_kitchen kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap moe_layer_freq
    moe_ffn_hidden_size moe_router_topk moe_enable_routing_replay moe_router_topk_limited_devices
    moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_num_groups moe_router_group_topk
    moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype
    moe_router_enable_expert_bias moe_router_bias_update_rate moe_grouped_gemm moe_use_legacy_grouped_gemm
    moe_aux_loss_coeff moe_z_loss_coeff moe_token_dropping moe_token_dispatcher_type moe_enable_deepep
    moe_flex_dispatcher_backend moe_per_layer_logging moe_pad_expert_input_to_capacity moe_token_drop_policy
    moe_layer_recompute moe_permute_fusion moe_router_fusion moe_apply_probs_on_input moe_latent_size
    moe_deepep_num_sms moe_hybridep_num_sms cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
    cuda_graph_warmup_steps cuda_graph_scope clone_scatter_output_in_embedding disable_parameter_transpose_cache
    config_logger_dir flash_decode use_te_activation_func inference_rng_tracker inference_sampling_seed
    symmetric_ar_type use_inference_optimized_layers inference_fuse_tp_communication mrope_section is_hybrid_model
    mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path mlp_chunks_for_prefill
    heterogeneous_block_specs hetereogenous_dist_checkpoint quant_recipe transformer_impl
    fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
    cpu_offloading_retain_pinned_cpu_buffers mtp_use_repeated_layer mtp_hybrid_override_pattern mup_width_mult
    mup_base_hidden_size mup_embedding_mult mup_output_mult fused_residual_rmsnorm moe_permute_fusion_into_hybridep
    moe_pad_experts_for_cuda_graph_inference moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
    nccl_all_reduce_for_prefill inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
    inference_moe_disable_fused_quant_kernels overlap_dispatch_backward_with_experts_wgrad
    use_transformer_engine_op_fuser fp8_output_proj high_priority_a2a_comm_stream use_grouped_gemm_for_dense_mlp
    moe_single_grouped_weight moe_single_grouped_bias moe_hybridep_num_sms_preprocessing moe_mlp_glu_interleave_size
    cuda_graph_modules inference_cuda_graph_scope inference_moe_token_dispatcher_type mlp_chunks_for_training
    moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
    moe_paged_stash_buffer_size_factor_cpu fine_grained_offloading_max_inflight_offloads
    tensor_parallel_num_weight_shards gtp_weight_remat_size expert_tensor_parallel_num_weight_shards
    expert_gtp_weight_remat_size moe_grad_scale_func mtp_grad_scale_func mtp_detach_heads
    experimental_attention_variant_loss_scale_func dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
    dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
    dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 use_grouped_gemm_for_shared_expert
    moe_shared_expert_glu_interleave_size moe_router_quantile_balancing_ema moe_hybridep_pad_uneven_dispatch_inputs
    moe_flex_dispatcher_num_sms moe_ncclep_static_shape moe_ncclep_zero_copy mamba_training_ssm_states_dtype
    delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction
""")
"""Read where no attention is computed: other layers, parallelism, precision, inference, and parts that are refused."""
