"""What is differentiated: a network with, for VSRN, its captioning branch, from a batch's inputs to embeddings and caption loss."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dualmatch.models import DSRAN, VSRN
from dualmatch.models.vsrn_caption import Captioner, caption_targets


def part_of(count: int, index: int, parts: int) -> tuple[int, int]:
    """(first, last) of one of so many parts of `count` rows, as equal as can be."""
    return count * index // parts, count * (index + 1) // parts


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of I images and their M captions.

    Attributes:
        images: the image encoder's inputs by name, images first.
        maps: a frozen trunk's maps by stage, which stand for pixels.
        token_ids_MT: captions, padded with 0.
        words_MTW, word_mask_MT: a frozen word encoder's features, which stand for ids.
        owner_M: each caption's row in the images; captions come image by image.
        image_ids_I: which image of the training set each row is.
    """

    images: dict[str, Tensor]
    maps: dict[str, Tensor]
    token_ids_MT: Tensor
    words_MTW: Tensor | None
    word_mask_MT: Tensor | None
    owner_M: Tensor
    image_ids_I: Tensor

    def rows(self, first: int, last: int) -> "Batch":
        """The images from `first` up to `last`, with their captions."""
        begin, end = torch.searchsorted(self.owner_M, torch.tensor([first, last])).tolist()
        return replace(
            self,
            images={name: value[first:last] for name, value in self.images.items()},
            maps={name: value[first:last] for name, value in self.maps.items()},
            token_ids_MT=self.token_ids_MT[begin:end],
            words_MTW=None if self.words_MTW is None else self.words_MTW[begin:end],
            word_mask_MT=None if self.word_mask_MT is None else self.word_mask_MT[begin:end],
            owner_M=self.owner_M[begin:end] - first,
            image_ids_I=self.image_ids_I[first:last],
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                moved[entry.name] = value.to(device, non_blocking=True)
            elif isinstance(value, dict):
                moved[entry.name] = {name: one.to(device, non_blocking=True) for name, one in value.items()}
        return replace(self, **moved)


class Objective(nn.Module):
    """A network in training.

    Args:
        model: DSRAN or VSRN.
        captioner: VSRN's captioning branch, or None.
    """

    def __init__(self, model: DSRAN | VSRN, captioner: Captioner | None = None) -> None:
        super().__init__()
        self.model = model
        self.captioner = captioner

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of images (I, D) and captions (M, D), float32, and the mean caption loss, 0 without the branch."""
        images_ID, captions_MD, caption_loss = self._embed(batch)
        return images_ID.float(), captions_MD.float(), caption_loss.float()

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        if self.captioner is None:
            images_ID = self.embed_images(batch)
            return images_ID, self.embed_captions(batch), images_ID.new_zeros(())
        assert isinstance(self.model, VSRN)
        encoder = self.model.image_encoder
        nodes_INE = encoder.nodes_of_maps(batch.maps, **batch.images) if batch.maps else encoder.nodes(**batch.images)
        images_ID, captions_MD = encoder.summarise(nodes_INE), self.embed_captions(batch)
        labels_ML, mask_ML = caption_targets(batch.token_ids_MT, max_length=self.captioner.config.max_length)
        caption_loss = self.captioner.loss(nodes_INE[batch.owner_M], labels_ML, mask_ML)
        return images_ID, captions_MD, caption_loss * self.captioner.config.weight

    def embed_images(self, batch: Batch) -> Tensor:
        """Image embeddings (I, D)."""
        encoder = self.model.image_encoder
        return encoder.embed(batch.maps, **batch.images) if batch.maps else encoder(**batch.images)

    def embed_captions(self, batch: Batch) -> Tensor:
        """Caption embeddings (M, D)."""
        if batch.words_MTW is None or batch.word_mask_MT is None:
            return self.model.text_encoder(batch.token_ids_MT)
        assert isinstance(self.model, DSRAN)
        return self.model.text_encoder.embed(batch.words_MTW, batch.word_mask_MT)


def build_captioner(model: DSRAN | VSRN) -> Captioner | None:
    """VSRN's captioning branch, where its loss has a weight."""
    if not isinstance(model, VSRN) or model.config.captioning.weight == 0:
        return None
    return Captioner(
        model.config.captioning,
        feature_dim=model.config.embed_dim,
        vocabulary_size=model.config.text.vocabulary_size,
    )
