"""SAM 2 as Sa2VA uses it: the image encoder once per image, the mask decoder per ``[SEG]``.

The modules come from the `sam2` package and carry its parameter names. Only the settings and the
way a ``[SEG]`` embedding prompts the decoder are Sa2VA's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from projects.llava_sam2_rl.models.sa2va.sam2_building import build_sam2

_PIXEL_MEAN = (0.485, 0.456, 0.406)
_PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SamFeatures:
    """What the frozen image encoder knows of N images.

    Args:
        embedding: ``(N, D, s/16, s/16)`` with SAM 2's no-memory embedding added.
        stride4: ``(N, D, s/4, s/4)`` FPN level before the decoder's (trainable) ``conv_s0``.
        stride8: ``(N, D, s/8, s/8)`` FPN level before the decoder's (trainable) ``conv_s1``.
        unconditioned: ``(N, D, s/16, s/16)``, ``embedding`` before anything was added: what a frame
            of a clip looks back at its memories with.
        position: ``(1, D, s/16, s/16)``, its position encoding, the same for all images.
    """

    embedding: Tensor
    stride4: Tensor
    stride8: Tensor
    unconditioned: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    def select(self, index: Tensor | slice) -> SamFeatures:
        """The features of some of the images.

        Args:
            index: ``(M,)`` int64, or a slice, which copies nothing.
        """
        return SamFeatures(
            self.embedding[index],
            self.stride4[index],
            self.stride8[index],
            self.unconditioned[index],
            self.position,
        )

    @staticmethod
    def joined(parts: Sequence[SamFeatures]) -> SamFeatures:
        """The features of several lots of images as those of one."""
        return SamFeatures(
            torch.cat([part.embedding for part in parts]),
            torch.cat([part.stride4 for part in parts]),
            torch.cat([part.stride8 for part in parts]),
            torch.cat([part.unconditioned for part in parts]),
            parts[0].position,
        )


@dataclass(frozen=True)
class DecodedObjects:
    """What the mask decoder made of P prompts.

    Args:
        low_res: ``(P, s/4, s/4)`` float32 logits of the mask with the highest predicted IoU.
        ious: ``(P, 3)`` float32, predicted.
        masks: ``(P, 3, s/4, s/4)`` float32 logits of all three.
        token: ``(P, D)``, the output token of the chosen mask.
        object_score: ``(P,)`` logits of the object's being in the picture.
    """

    low_res: Tensor
    ious: Tensor
    masks: Tensor
    token: Tensor
    object_score: Tensor


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
        stride4, stride8, embedding, position = self.levels(g_pixel_values)
        return SamFeatures(
            embedding + self.no_memory(embedding.dtype), stride4, stride8, embedding, position[:1]
        )

    def no_memory(self, dtype: torch.dtype) -> Tensor:
        """``(1, D, 1, 1)``: what SAM 2 adds to the features of a picture that has no memory."""
        return self.sam2_model.no_mem_embed.reshape(1, -1, 1, 1).to(dtype)

    def levels(self, g_pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The image encoder's output as it is.

        Args:
            g_pixel_values: As in `encode`.

        Returns:
            ``(N, D, s/4, s/4)``, ``(N, D, s/8, s/8)``, ``(N, D, s/16, s/16)`` and the last one's
            position encoding, of the same shape.

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
        encoded = sam.image_encoder(x.to(dtype))
        stride4, stride8, embedding = encoded['backbone_fpn'][-sam.num_feature_levels :]
        return stride4, stride8, embedding, encoded['vision_pos_enc'][-1]

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
        embedding = features.embedding.to(self.dtype)[image_index]
        high_res = [level[image_index] for level in self.high_res(features)]
        decoded = self.decode_objects(embedding, high_res, prompts)
        return decoded.low_res.unsqueeze(1), decoded.ious, decoded.masks

    @property
    def dtype(self) -> torch.dtype:
        """Of the mask decoder's weights."""
        return self.mask_decoder.iou_token.weight.dtype

    def high_res(self, features: SamFeatures) -> list[Tensor]:
        """``(N, D/8, s/4, s/4)`` and ``(N, D/4, s/8, s/8)``: what refines the decoder's masks."""
        decoder = self.mask_decoder
        return [
            decoder.conv_s0(features.stride4.to(self.dtype)),
            decoder.conv_s1(features.stride8.to(self.dtype)),
        ]

    def decode_objects(
        self, embedding: Tensor, high_res: list[Tensor], prompts: Tensor | None
    ) -> DecodedObjects:
        """The mask with the highest predicted IoU of each of P objects, and what tracks it on.

        Args:
            embedding: ``(P, D, s/16, s/16)``, in the decoder's dtype.
            high_res: As `high_res` gives them, of P images.
            prompts: ``(P, D)``, or ``None``: the memory in ``embedding`` says what to look for.
        """
        count, device = len(embedding), embedding.device
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
        sparse = padding.to(self.dtype).expand(count, -1, -1)
        if prompts is not None:
            sparse = torch.cat([sparse, prompts.to(self.dtype).unsqueeze(1)], dim=1)
        masks, ious, tokens, scores = self._decode(embedding, high_res, sparse, dense, True)
        rows = torch.arange(count, device=device)
        best = ious.argmax(dim=-1)
        return DecodedObjects(masks[rows, best], ious, masks, tokens[rows, best], scores[:, 0])

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
        masks, ious, _, _ = self._decode(
            features.embedding.to(self.dtype),
            self.high_res(features),
            sparse.to(self.dtype),
            dense,
            multimask_output=len(coords) == 1,
        )
        return masks[:, ious[0].argmax()].unsqueeze(1)

    def _decode(
        self,
        embedding: Tensor,
        high_res: list[Tensor],
        sparse: Tensor,
        dense: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mask decoder; C is 3 with ``multimask_output``, else 1.

        Args:
            embedding: ``(P, D, s/16, s/16)``.
            high_res: As `high_res` gives them, of P images.
            sparse: ``(P, K, D)``, in the decoder's dtype.
            dense: ``(1, D, s/16, s/16)``.
            multimask_output: Three masks instead of one.

        Returns:
            Mask logits ``(P, C, s/4, s/4)`` and predicted IoU ``(P, C)``, float32; output tokens of
            the masks ``(P, C, D)``; logits of the object's being there ``(P, 1)``.
        """
        encoder = self.sam2_model.sam_prompt_encoder
        position = _in_float32(encoder.pe_layer, encoder.image_embedding_size)[None]
        masks, ious, tokens, scores = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=position.to(self.dtype),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.to(self.dtype).expand(len(sparse), -1, -1, -1),
            multimask_output=multimask_output,
            repeat_image=False,
            high_res_features=high_res,
        )
        return masks.float(), ious.float(), tokens, scores


def _in_float32(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a small module with float32 weights, whatever it was cast to.

    SAM 2's position encoding makes its coordinates in float32 and multiplies them as they are.
    """
    tensors = {name: tensor.float() for name, tensor in module.state_dict().items()}
    return functional_call(module, tensors, args, kwargs)
