"""VSRN: Visual Semantic Reasoning Network (Li et al., 2019), one implementation, configured.

Two encoders that share no weights, so that each exports as a graph of its own; the captioning branch, which only training needs, stands
in `vsrn_caption.py`. Where paper and authors' code differ the code is followed, because its checkpoints and tables exist.
Shape suffixes: B batch, N regions, C channels of a region feature, E embedding width, T tokens, I images, M captions.
"""

import torch
from torch import Tensor, nn

from dualmatch.runtime.nodes import NodeKind

from .graph_attention import NodeNorm
from .pooling import box_geometry, box_pooling_weights, l2_normalise, last_node, mean_over_nodes, pyramid_boxes
from .text import PAD_ID, GruWords, build_words
from .trunks import CHANNELS, map_size
from .vsrn_config import Measure, VsrnConfig


def similarity(images_IE: Tensor, captions_ME: Tensor, measure: Measure) -> Tensor:
    """Similarities (I, M): products, or for `order` -‖max(0, caption - image)‖ (Vendrov et al., 2016).

    Where that norm is 0 its gradient is taken as 0; the authors' square root gives NaN there.
    """
    if measure == "cosine":
        return images_IE @ captions_ME.T
    return -torch.linalg.vector_norm((captions_ME[None] - images_IE[:, None]).clamp(min=0), dim=2)


def _normalise_over_regions(nodes_BNE: Tensor, epsilon: float) -> Tensor:
    # The authors normalise along dim 1, which is the regions' axis here and not the channels'; kept so that their checkpoints reproduce.
    return l2_normalise(nodes_BNE.transpose(1, 2), epsilon).transpose(1, 2)


class RelationLayer(nn.Module):
    """One layer of region relationship reasoning (eqs 2 and 3).

    The paper normalises the rows of R; the code divides it by the number of regions. The paper's W_r is here a Linear and a BatchNorm
    that starts at zero, so that a new layer changes nothing.

    What a layer adds grows with the cube of its input: with large features and without `normalise_projected` it may leave float16's range.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.merge = nn.Linear(dim, dim)
        self.norm = NodeNorm(dim, "batch")
        for parameter in self.norm.parameters():
            nn.init.zeros_(parameter)

    def forward(self, nodes_BNE: Tensor) -> Tensor:
        """Regions (B, N, E) to regions (B, N, E)."""
        # Divided before the product, which float16 could not hold otherwise.
        affinity_BNN = (self.query(nodes_BNE) / nodes_BNE.shape[1]) @ self.key(nodes_BNE).transpose(1, 2)
        return nodes_BNE + self.norm(self.merge(affinity_BNN @ self.value(nodes_BNE)))


class PooledRegions(nn.Module):
    """Regions pooled inside the graph from a fixed pyramid of boxes on a trunk's map; their geometry, the same for every image, behind
    their channels.
    """

    pooling_weights: Tensor
    geometry: Tensor

    def __init__(self, config: VsrnConfig) -> None:
        super().__init__()
        self.boxes = boxes = pyramid_boxes(config.levels)
        size = map_size(config.trunk, config.stage)
        self.register_buffer("pooling_weights", box_pooling_weights(boxes, size, size), persistent=False)
        geometry = box_geometry(boxes) if config.geometry else boxes.new_zeros(len(boxes), 0)
        self.register_buffer("geometry", geometry, persistent=False)
        self.feature_dim = CHANNELS[config.trunk.name][config.stage] + geometry.shape[1]

    def forward(self, map_BCHW: Tensor) -> Tensor:
        cells_BMC = map_BCHW.flatten(2).transpose(1, 2)
        regions_BNC = self.pooling_weights.to(cells_BMC.dtype) @ cells_BMC
        geometry_BNG = self.geometry.to(cells_BMC.dtype).expand(regions_BNC.shape[0], -1, -1)
        return torch.cat([regions_BNC, geometry_BNG], dim=2)


class VsrnImageEncoder(nn.Module):
    """Region features to image embeddings (paper sections 3.1 to 3.3).

    `forward` takes the graph's inputs; `embed` takes the trunk's maps, which training caches for a frozen trunk.
    """

    def __init__(self, config: VsrnConfig, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.pool = None if config.trunk.name == "none" else PooledRegions(config)
        feature_dim = config.feature_dim if self.pool is None else self.pool.feature_dim
        self.project = nn.Linear(feature_dim, config.embed_dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.relations = nn.ModuleList(RelationLayer(config.embed_dim) for _ in range(config.num_relation_layers))
        self.reasoning = (
            nn.GRU(config.embed_dim, config.embed_dim, batch_first=True) if config.global_reasoning == "gru" else None
        )
        self.final_norm = nn.BatchNorm1d(config.embed_dim) if config.final_norm else None

    @property
    def stages(self) -> tuple[str, ...]:
        """The trunk's maps that this encoder reads."""
        return () if self.pool is None else (self.config.stage,)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of `forward`."""
        return ("regions",) if self.pool is None else ("pixels",)

    def forward(self, regions: Tensor | None = None, pixels: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) from region features (B, N, C), N the same for all images, or from pre-processed pixels (B, 3, S, S)."""
        return self.summarise(self.nodes(regions, pixels))

    @property
    def node_boxes(self) -> dict[NodeKind, Tensor | None]:
        """The kind of nodes that `with_nodes` gives, with their boxes (n, 4) in fractions of the square that the trunk sees; None where
        regions come from files, and so do their boxes.
        """
        return {"regional": None if self.pool is None else self.pool.boxes}

    def with_nodes(self, regions: Tensor | None = None, pixels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, E) as `forward` gives them, and V*, the regions with their relations (B, N, E) (section 4.5)."""
        nodes_BNE = self.nodes(regions, pixels)
        return self.summarise(nodes_BNE), nodes_BNE

    def embed(self, maps: dict[str, Tensor], regions: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) from the trunk's maps (B, C, H, W) by stage."""
        return self.summarise(self.nodes_of_maps(maps, regions))

    def nodes(self, regions: Tensor | None = None, pixels: Tensor | None = None) -> Tensor:
        """Regions with their relations (B, N, E) from what `forward` takes."""
        maps: dict[str, Tensor] = {}
        if pixels is not None:
            assert self.trunk is not None
            maps = self.trunk(pixels)
        return self.nodes_of_maps(maps, regions)

    def nodes_of_maps(self, maps: dict[str, Tensor], regions: Tensor | None = None) -> Tensor:
        """Regions with their relations (B, N, E) from what `embed` takes."""
        if self.pool is not None:
            regions = self.pool(maps[self.config.stage])
        assert regions is not None
        return self.relate(regions)

    def relate(self, regions_BNC: Tensor) -> Tensor:
        """Regions with their relations (B, N, E): what the captioning branch describes."""
        nodes_BNE: Tensor = self.project(regions_BNC)
        if self.config.normalise_projected:
            nodes_BNE = _normalise_over_regions(nodes_BNE, self.config.l2_epsilon)
        for layer in self.relations:
            nodes_BNE = layer(nodes_BNE)
        if self.config.normalise_related:
            nodes_BNE = _normalise_over_regions(nodes_BNE, self.config.l2_epsilon)
        return nodes_BNE

    def summarise(self, nodes_BNE: Tensor) -> Tensor:
        """Embeddings (B, E) from regions with their relations, read in their order."""
        if self.reasoning is None:
            vectors_BE = mean_over_nodes(nodes_BNE, None)
        else:
            vectors_BE = self.reasoning(nodes_BNE)[1].squeeze(0)
        if self.final_norm is not None:
            vectors_BE = self.final_norm(vectors_BE)
        if self.config.normalise_images:
            vectors_BE = l2_normalise(vectors_BE, self.config.l2_epsilon)
        return vectors_BE.abs() if self.config.absolute else vectors_BE

    def train(self, mode: bool = True) -> "VsrnImageEncoder":
        """As usual, but a frozen trunk stays in evaluation mode: its BatchNorm statistics are part of its weights."""
        super().train(mode)
        if self.trunk is not None and self.config.trunk.frozen:
            self.trunk.eval()
        return self


class VsrnTextEncoder(nn.Module):
    """Token ids to caption embeddings: the GRU's state at the last word. They do not depend on padding."""

    def __init__(self, config: VsrnConfig) -> None:
        super().__init__()
        self.config = config
        self.words = build_words(config.text, embed_dim=config.embed_dim, attend_padding=False)
        assert isinstance(self.words, GruWords)
        nn.init.uniform_(self.words.embed.weight, -0.1, 0.1)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Embeddings (B, E), of unit norm, from ids (B, T) padded with 0 at the end."""
        mask_BT = token_ids != PAD_ID
        words_BTE = self.words(token_ids, mask_BT)
        vectors_BE = l2_normalise(last_node(words_BTE, mask_BT), self.config.l2_epsilon)
        return vectors_BE.abs() if self.config.absolute else vectors_BE


class VSRN(nn.Module):
    """Both encoders.

    Args:
        config: the network.
        trunk: the image trunk, from `trunks.build_trunk`; None where regions come from files.

    Raises:
        DualmatchError: the vocabulary's size was not filled in.
    """

    def __init__(self, config: VsrnConfig, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = VsrnImageEncoder(config, trunk)
        self.text_encoder = VsrnTextEncoder(config)
        if trunk is not None and config.trunk.frozen:
            trunk.requires_grad_(False)

    def similarity(self, images_IE: Tensor, captions_ME: Tensor) -> Tensor:
        """Similarities (I, M) by the configuration's measure."""
        return similarity(images_IE, captions_ME, self.config.measure)
