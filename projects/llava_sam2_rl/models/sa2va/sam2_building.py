"""SAM 2 with Sa2VA's settings, of the `sam2` package's modules."""

from __future__ import annotations

import copy

from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base

from projects.llava_sam2_rl.registry import nearest

#: SAM 2 Hiera-L at 1024 px: what the official Sa2VA checkpoints hold.
SAM2_HIERA_L: dict = {
    'image_size': 1024,
    'trunk': {
        'embed_dim': 144,
        'num_heads': 2,
        'stages': [2, 6, 36, 4],
        'global_att_blocks': [23, 33, 43],
        'window_pos_embed_bkg_spatial_size': [7, 7],
        'window_spec': [8, 4, 16, 8],
    },
    'neck': {
        'd_model': 256,
        'backbone_channel_list': [1152, 576, 288, 144],
        'fpn_top_down_levels': [2, 3],
        'fpn_interp_model': 'nearest',
        'position_encoding_num_pos_feats': 256,
    },
    'scalp': 1,
    'memory_attention': {
        'd_model': 256,
        'num_layers': 4,
        'dim_feedforward': 2048,
        'kv_in_dim': 64,
    },
    'memory_encoder': {'in_dim': 256, 'out_dim': 64, 'fuser_num_layers': 2},
}


def _sine(num_pos_feats: int) -> PositionEmbeddingSine:
    return PositionEmbeddingSine(
        num_pos_feats=num_pos_feats, normalize=True, scale=None, temperature=10000
    )


def build_sam2(config: dict | None = None) -> SAM2Base:
    """Builds SAM 2 with Sa2VA's settings and random weights.

    Args:
        config: Sizes, as in `SAM2_HIERA_L`, which is also the default.

    Raises:
        KeyError: A size is missing or unknown, with the nearest known name.
    """
    sizes = copy.deepcopy(dict(SAM2_HIERA_L if config is None else config))
    for key in sizes:
        if key not in SAM2_HIERA_L:
            raise KeyError(
                f'grounding_encoder_config has no option {key!r}: '
                f'{nearest(key, list(SAM2_HIERA_L))}'
            )
    missing = sorted(set(SAM2_HIERA_L) - set(sizes))
    if missing:
        raise KeyError(f'grounding_encoder_config lacks {", ".join(missing)}')

    image_size = sizes['image_size']
    neck = dict(sizes['neck'])
    attention = sizes['memory_attention']
    memory = sizes['memory_encoder']
    width = attention['d_model']
    side = image_size // 16  # backbone stride

    image_encoder = ImageEncoder(
        trunk=Hiera(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in sizes['trunk'].items()}
        ),
        neck=FpnNeck(
            position_encoding=_sine(neck.pop('position_encoding_num_pos_feats')),
            **neck,
        ),
        scalp=sizes['scalp'],
    )

    def rope(**kwargs: object) -> RoPEAttention:
        return RoPEAttention(
            rope_theta=10000.0,
            feat_sizes=[side, side],
            embedding_dim=width,
            num_heads=1,
            downsample_rate=1,
            dropout=0.1,
            **kwargs,
        )

    memory_attention = MemoryAttention(
        d_model=width,
        pos_enc_at_input=True,
        num_layers=attention['num_layers'],
        layer=MemoryAttentionLayer(
            activation='relu',
            dim_feedforward=attention['dim_feedforward'],
            dropout=0.1,
            pos_enc_at_attn=False,
            self_attention=rope(),
            d_model=width,
            pos_enc_at_cross_attn_keys=True,
            pos_enc_at_cross_attn_queries=False,
            cross_attention=rope(rope_k_repeat=True, kv_in_dim=attention['kv_in_dim']),
        ),
    )
    memory_encoder = MemoryEncoder(
        in_dim=memory['in_dim'],
        out_dim=memory['out_dim'],
        position_encoding=_sine(memory['out_dim']),
        mask_downsampler=MaskDownSampler(
            embed_dim=memory['in_dim'], kernel_size=3, stride=2, padding=1
        ),
        fuser=Fuser(
            CXBlock(
                dim=memory['in_dim'],
                kernel_size=7,
                padding=3,
                layer_scale_init_value=1e-6,
                use_dwconv=True,
            ),
            num_layers=memory['fuser_num_layers'],
        ),
    )
    return SAM2Base(
        image_encoder=image_encoder,
        memory_attention=memory_attention,
        memory_encoder=memory_encoder,
        num_maskmem=7,
        image_size=image_size,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=False,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        use_mlp_for_obj_ptr_proj=True,
        sam_mask_decoder_extra_args={
            'dynamic_multimask_via_stability': True,
            'dynamic_multimask_stability_delta': 0.05,
            'dynamic_multimask_stability_thresh': 0.98,
        },
    )
