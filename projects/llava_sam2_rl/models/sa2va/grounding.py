"""SAM 2 as Sa2VA uses it: the image encoder once per image, the mask decoder per ``[SEG]``.

The modules come from the `sam2` package and carry its parameter names. Only the settings and the
way a ``[SEG]`` embedding prompts the decoder are Sa2VA's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn
from torch.func import functional_call

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

_PIXEL_MEAN = (0.485, 0.456, 0.406)
_PIXEL_STD = (0.229, 0.224, 0.225)


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


@dataclass(frozen=True)
class SamFeatures:
    """What the frozen image encoder knows of N images.

    Args:
        embedding: ``(N, D, s/16, s/16)`` with SAM 2's no-memory embedding added.
        stride4: ``(N, D, s/4, s/4)`` FPN level before the decoder's (trainable) ``conv_s0``.
        stride8: ``(N, D, s/8, s/8)`` FPN level before the decoder's (trainable) ``conv_s1``.
    """

    embedding: Tensor
    stride4: Tensor
    stride8: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    def select(self, index: Tensor) -> SamFeatures:
        """The features of some of the images.

        Args:
            index: ``(M,)`` int64.
        """
        return SamFeatures(self.embedding[index], self.stride4[index], self.stride8[index])


class GroundingEncoder(nn.Module):
    """SAM 2 under the name the official checkpoints give it: ``grounding_encoder.sam2_model``."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: dict | None = None):
        super().__init__()
        #: Any: torch takes the attributes of a module for tensors or modules.
        self.sam2_model: Any = build_sam2(config)
        self.register_buffer(
            'pixel_mean', torch.tensor(_PIXEL_MEAN).view(3, 1, 1), persistent=False
        )
        self.register_buffer('pixel_std', torch.tensor(_PIXEL_STD).view(3, 1, 1), persistent=False)

    @property
    def hidden_dim(self) -> int:
        """Width of a prompt embedding."""
        return self.sam2_model.hidden_dim

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.sam2_model.image_size

    @property
    def mask_decoder(self) -> Any:
        """The part that the official recipe trains."""
        return self.sam2_model.sam_mask_decoder

    def encode(self, g_pixel_values: Tensor) -> SamFeatures:
        """Runs the image encoder.

        Args:
            g_pixel_values: ``(N, 3, s, s)`` uint8 or float RGB, 0–255.

        Raises:
            ValueError: The side is not `image_size`.
        """
        size = self.image_size
        if g_pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f'g_pixel_values are {tuple(g_pixel_values.shape[-2:])}, this SAM 2 takes '
                f"{(size, size)}: set the transform's grounding_size={size}"
            )
        sam = self.sam2_model
        dtype = next(sam.image_encoder.parameters()).dtype
        x = (g_pixel_values.float() / 255 - self.pixel_mean) / self.pixel_std
        # Not sam.forward_image: it applies conv_s0/conv_s1, which are trainable and so differ
        # between policy and teacher.
        fpn = sam.image_encoder(x.to(dtype))['backbone_fpn']
        stride4, stride8, embedding = fpn[-sam.num_feature_levels :]
        no_memory = sam.no_mem_embed.reshape(1, -1, 1, 1).to(embedding.dtype)
        return SamFeatures(embedding + no_memory, stride4, stride8)

    def decode(
        self, features: SamFeatures, prompts: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Segments one object per prompt.

        Args:
            features: Of N images.
            prompts: ``(P, D)``, the projected hidden states at ``[SEG]``.
            image_index: ``(P,)`` int64, the image of each prompt.

        Returns:
            ``low_res_masks (P, 1, s/4, s/4)`` float32 logits of the mask with the highest predicted
            IoU, ``iou_predictions (P, 3)`` float32, and all three ``(P, 3, s/4, s/4)``.
        """
        dtype = self.mask_decoder.iou_token.weight.dtype
        device = prompts.device
        # SAM 2 adds a padding point (label -1) where no point is given; Sa2VA's prompt follows it.
        padding, dense = _in_float32(
            self.sam2_model.sam_prompt_encoder,
            points=(
                torch.zeros(1, 1, 2, device=device),
                -torch.ones(1, 1, dtype=torch.int32, device=device),
            ),
            boxes=None,
            masks=None,
        )
        count = len(prompts)
        sparse = torch.cat(
            [padding.to(dtype).expand(count, -1, -1), prompts.to(dtype).unsqueeze(1)], dim=1
        )
        masks, ious = self._decode(features, sparse, dense, image_index, multimask_output=True)
        best = ious.argmax(dim=-1)
        low_res = masks[torch.arange(count, device=device), best].unsqueeze(1)
        return low_res, ious, masks

    def decode_points(self, features: SamFeatures, coords: Tensor, labels: Tensor) -> Tensor:
        """Segments the object that points or a box show, as SAM 2's own image predictor does.

        One point may mean a part or the whole: of its three masks the one with the highest
        predicted IoU is kept. More points, or a box, mean one mask (`SAM2Base._use_multimask`).

        Args:
            features: Of one image.
            coords: ``(K, 2)`` float, x and y in pixels of the square input.
            labels: ``(K,)`` int: 1 on the object, 0 beside it; 2 and 3 the box's upper left and
                lower right corner.

        Returns:
            ``(1, 1, s/4, s/4)`` float32 logits.
        """
        sparse, dense = _in_float32(
            self.sam2_model.sam_prompt_encoder,
            points=(coords[None].float(), labels[None]),
            boxes=None,
            masks=None,
        )
        masks, ious = self._decode(
            features,
            sparse.to(self.mask_decoder.iou_token.weight.dtype),
            dense,
            torch.zeros(1, dtype=torch.long, device=coords.device),
            multimask_output=len(coords) == 1,
        )
        return masks[:, ious[0].argmax()].unsqueeze(1)

    def _decode(
        self,
        features: SamFeatures,
        sparse: Tensor,
        dense: Tensor,
        image_index: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Mask logits ``(P, C, s/4, s/4)`` and predicted IoU ``(P, C)``, float32; C is 3 or 1.

        Args:
            features: Of N images.
            sparse: ``(P, K, D)``, in the decoder's dtype.
            dense: ``(1, D, s/16, s/16)``.
            image_index: ``(P,)`` int64.
            multimask_output: Three masks instead of one.
        """
        encoder, decoder = self.sam2_model.sam_prompt_encoder, self.mask_decoder
        dtype = sparse.dtype
        high_res = [
            decoder.conv_s0(features.stride4.to(dtype))[image_index],
            decoder.conv_s1(features.stride8.to(dtype))[image_index],
        ]
        masks, ious, _, _ = decoder(
            image_embeddings=features.embedding.to(dtype)[image_index],
            image_pe=_in_float32(encoder.pe_layer, encoder.image_embedding_size)[None].to(dtype),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.to(dtype).expand(len(sparse), -1, -1, -1),
            multimask_output=multimask_output,
            repeat_image=False,
            high_res_features=high_res,
        )
        return masks.float(), ious.float()


def _in_float32(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a small module with float32 weights, whatever it was cast to.

    SAM 2's position encoding makes its coordinates in float32 and multiplies them as they are.
    """
    tensors = {name: tensor.float() for name, tensor in module.state_dict().items()}
    return functional_call(module, tensors, args, kwargs)
