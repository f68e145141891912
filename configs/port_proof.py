"""The port proof: both ported towers at a size that runs anywhere in seconds.

    make port-proof

`qwen2_5_vl` and `vggt` are written as the models' own config.json, since the proof makes
checkpoints in the published format and ports them.
"""

import ml_collections


def get_config():
    """ConfigDict with the two config.json, the cameras and the mesh."""
    config = ml_collections.ConfigDict()
    config.seed = 42
    config.num_views = 3
    config.image_size = 112  # pixels; GEAR-VLA: 448
    config.new_tokens = 8
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}  # eight simulated devices
    config.qwen2_5_vl = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "image_token_id": 500,
        "video_token_id": 501,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 44,
            "hidden_act": "silu",
            "fullatt_block_indexes": [1, 3],
            "window_size": 56,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_chans": 3,
            "out_hidden_size": 64,
            "tokens_per_second": 2,
        },
    }
    config.vggt = {
        "aggregator": {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
        "dino": {"img_size": 70, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0},
    }
    return config
