"""DSRAN: Dual Semantic Relations Attention Network (Wen et al., 2020), one implementation, configured.

Two encoders that share no weights, so that each exports as a graph of its own. Differences between paper and authors' code are
named where they occur; the code is followed, because its checkpoints and tables exist.
Shape suffixes: B batch, N nodes, D embedding width, T tokens, C channels.
"""

from typing import cast

import torch
from torch import Tensor, nn

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.nodes import NodeKind

from .config import MAX_POOLED, DsranConfig, RegionConfig
from .generalised_pooling import GeneralisedPooling
from .graph_attention import GatedFusion, GraphAttention
from .pooling import (
    box_geometry,
    box_pooling_weights,
    grid_boxes,
    l2_norm,
    l2_normalise,
    last_node,
    mean_over_nodes,
    pyramid_boxes,
)
from .text import PAD_ID, build_words
from .trunks import CHANNELS, map_size


def _graph(config: DsranConfig) -> GraphAttention:
    return GraphAttention(
        config.embed_dim,
        num_heads=config.num_heads,
        norm=config.norm,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.residual_dropout,
        zero_residual=config.zero_residual,
    )


def _kept(batch: int, count: int, share: float, device: torch.device) -> Tensor:
    """Which of an image's nodes stay (B, N), drawn anew; all of them where chance would have left none."""
    kept_BN = torch.rand(batch, count, device=device) >= share
    return kept_BN | ~kept_BN.any(dim=1, keepdim=True)


class ChannelDropout(nn.Module):
    """Dropout that drops a channel in all nodes of an item at once (spatial dropout; Tompson et al., 2015)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, features_BNC: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return features_BNC
        return features_BNC * torch.dropout(
            features_BNC.new_ones(features_BNC.shape[0], 1, features_BNC.shape[2]), self.share, train=True
        )


class Projection(nn.Module):
    """Dropout, Linear into the shared space, and for `relu` an activation and dropout (eq 1; the authors' BERT variant adds the ReLU)."""

    def __init__(self, input_dim: int, config: DsranConfig, *, dropout: float) -> None:
        super().__init__()
        self.dropout: nn.Module = ChannelDropout(dropout) if config.channel_dropout else nn.Dropout(dropout)
        self.linear = nn.Linear(input_dim, config.embed_dim)
        self.after: nn.Module = (
            nn.Sequential(nn.ReLU(), nn.Dropout(config.projection_dropout))
            if config.projection == "relu"
            else nn.Identity()
        )
        if config.projection == "linear":
            nn.init.xavier_uniform_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.after(self.linear(self.dropout(features)))


class GridNodes(nn.Module):
    """The trunk's final map as projected nodes, row by row, average-pooled to a coarser grid and told their places if the configuration
    says so.
    """

    pooling_weights: Tensor | None
    geometry: Tensor

    def __init__(self, config: DsranConfig) -> None:
        super().__init__()
        size, pooled_size = map_size(config.trunk, "final"), config.trunk.grid_size
        if pooled_size > size:
            raise DualmatchError(
                f"grid_size is {pooled_size}, but the {config.trunk.name} trunk's final map has only {size} x {size} cells "
                f"at {config.trunk.image_size} pixels."
            )
        weights = box_pooling_weights(grid_boxes(pooled_size), size, size) if pooled_size not in (0, size) else None
        self.register_buffer("pooling_weights", weights, persistent=False)
        self.boxes = grid_boxes(pooled_size or size)
        self.count = len(self.boxes)
        self.project = Projection(
            config.trunk.feature_dim or CHANNELS[config.trunk.name]["final"], config, dropout=config.input_dropout
        )
        self.position: nn.Module | None = None
        if config.grid_positions:
            self.register_buffer("geometry", box_geometry(self.boxes), persistent=False)
            self.position = nn.Linear(6, config.embed_dim)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        cells_BNC = map_BCHW.flatten(2).transpose(1, 2)
        if self.pooling_weights is not None:
            cells_BNC = self.pooling_weights.to(cells_BNC.dtype) @ cells_BNC
        nodes_BND: Tensor = self.project(cells_BNC)
        return nodes_BND if self.position is None else nodes_BND + self.position(self.geometry.to(cells_BNC.dtype))


class PyramidRegions(nn.Module):
    """Regions pooled inside the graph from a fixed pyramid of boxes on a map finer than the grid, with their geometry."""

    pooling_weights: Tensor
    geometry: Tensor

    def __init__(self, config: DsranConfig) -> None:
        super().__init__()
        self.boxes = boxes = pyramid_boxes(config.regions.levels)
        size = map_size(config.trunk, config.regions.stage)
        self.stage, self.count = config.regions.stage, len(boxes)
        self.register_buffer("pooling_weights", box_pooling_weights(boxes, size, size), persistent=False)
        self.register_buffer("geometry", box_geometry(boxes), persistent=False)
        self.project = Projection(CHANNELS[config.trunk.name][self.stage], config, dropout=config.input_dropout)
        self.position = nn.Linear(6, config.embed_dim) if config.regions.position_dim else None

    def forward(self, map_BCHW: Tensor) -> Tensor:
        cells_BNC = map_BCHW.flatten(2).transpose(1, 2)
        nodes_BND: Tensor = self.project(self.pooling_weights.to(cells_BNC.dtype) @ cells_BNC)
        return nodes_BND if self.position is None else nodes_BND + self.position(self.geometry.to(cells_BNC.dtype))


class PrecomputedRegions(nn.Module):
    """Region features from files, projected; the authors' BERT variant sums an embedded position feature to them."""

    def __init__(self, config: DsranConfig) -> None:
        super().__init__()
        regions: RegionConfig = config.regions
        self.count = regions.num_regions
        self.hidden = (
            nn.Sequential(nn.Linear(regions.feature_dim, regions.feature_dim), nn.ReLU())
            if regions.hidden_layer
            else nn.Identity()
        )
        self.project = Projection(regions.feature_dim, config, dropout=config.input_dropout)
        self.position = Projection(regions.position_dim, config, dropout=0.0) if regions.position_dim else None

    def forward(self, regions_BNC: Tensor, positions_BNP: Tensor | None) -> Tensor:
        nodes_BND: Tensor = self.project(self.hidden(regions_BNC))
        return nodes_BND if self.position is None else nodes_BND + self.position(positions_BNP)


class ImageEncoder(nn.Module):
    """Pixels, or features, to unit vectors (paper sections III-B to III-D).

    `forward` takes the graph's inputs; `embed` takes the trunk's maps, which training caches for a frozen trunk.
    """

    def __init__(self, config: DsranConfig, trunk: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.grid = GridNodes(config) if config.global_path else None
        self.regions: PyramidRegions | PrecomputedRegions | None = None
        if config.regional_path:
            self.regions = PyramidRegions(config) if config.regions.source == "pyramid" else PrecomputedRegions(config)
        self.grid_graph = _graph(config) if config.global_path and config.separate_relations else None
        self.region_graph = _graph(config) if config.regional_path and config.separate_relations else None
        joint_graphs = config.joint_graphs if config.joint_relations else 0
        self.joint_graphs = nn.ModuleList(_graph(config) for _ in range(joint_graphs))
        meets = config.global_path and config.regional_path and not config.joint_relations
        self.fusions = nn.ModuleList(
            GatedFusion(config.embed_dim) for _ in range({0: int(meets), 1: 0, 2: 1, 4: 3}[joint_graphs])
        )
        self.poolings = nn.ModuleList()
        if config.image_pooling == "gpo":
            counts = [path.count for path in (self.grid, self.regions) if path is not None]
            self.poolings.extend(GeneralisedPooling(n) for n in _pooled(counts, joint_graphs))

    @property
    def stages(self) -> tuple[str, ...]:
        """The trunk's maps that this encoder reads."""
        stages = {"final"} if self.grid is not None else set()
        if isinstance(self.regions, PyramidRegions):
            stages.add(self.regions.stage)
        return tuple(sorted(stages))

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of `forward`, in order."""
        names = ["pixels"] if self.stages else []
        if isinstance(self.regions, PrecomputedRegions):
            names.append("regions")
            if self.regions.position is not None:
                names.append("region_positions")
        return tuple(names)

    @property
    def node_boxes(self) -> dict[NodeKind, Tensor | None]:
        """The kinds of nodes in the order in which `with_nodes` gives them, with their boxes (n, 4) in fractions of the square that the
        trunk sees; None where regions come from files, and so do their boxes.
        """
        boxes: dict[NodeKind, Tensor | None] = {}
        if self.grid is not None:
            boxes["global"] = self.grid.boxes
        if self.regions is not None:
            boxes["regional"] = self.regions.boxes if isinstance(self.regions, PyramidRegions) else None
        return boxes

    def forward(
        self, pixels: Tensor | None = None, regions: Tensor | None = None, region_positions: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, D), of unit norm.

        Args:
            pixels: (B, 3, S, S), pre-processed.
            regions: (B, N, C), for precomputed regions.
            region_positions: (B, N, position_dim), where the configuration has it.
        """
        return self.embed(self._maps(pixels), regions, region_positions)

    def with_nodes(
        self, pixels: Tensor | None = None, regions: Tensor | None = None, region_positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) as `forward` gives them, and the nodes (B, N, D) that each is the mean of: the grid's, then the regions'.

        They are the nodes behind the last graph attention, carried through what follows the pooling at the image's own gates, where
        that is affine: so a node's product with a caption's embedding is its share of their similarity. (Under generalised pooling,
        whose weights go by channel and rank, the mean is not the embedding.) The paper's Fig. 6 takes V_F and V_R of eq 1, from
        before any relation.
        """
        paths, masks = self._related(self._maps(pixels), regions, region_positions)
        vectors = self._pooled(paths, masks)
        fused_BD = self._fuse(vectors)
        nodes_BND = self._carried(vectors, paths)
        return (
            l2_normalise(fused_BD, self.config.l2_epsilon),
            nodes_BND / l2_norm(fused_BD, self.config.l2_epsilon)[:, None],
        )

    def embed(
        self, maps: dict[str, Tensor], regions: Tensor | None = None, region_positions: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, D) from the trunk's maps (B, C, H, W) by stage."""
        vectors = self._pooled(*self._related(maps, regions, region_positions))
        return l2_normalise(self._fuse(vectors), self.config.l2_epsilon)

    def _maps(self, pixels: Tensor | None) -> dict[str, Tensor]:
        """The trunk's maps by stage."""
        if pixels is None:
            return {}
        assert self.trunk is not None
        maps: dict[str, Tensor] = self.trunk(pixels)
        return maps

    def _related(
        self, maps: dict[str, Tensor], regions: Tensor | None, region_positions: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The nodes behind the last graph attention of each path or joint graph, and which of them stay."""
        paths: list[Tensor] = []
        masks: list[Tensor | None] = []
        if self.grid is not None:
            nodes_BND = self.grid(maps["final"])
            masks.append(self._drawn_mask(nodes_BND))
            paths.append(nodes_BND if self.grid_graph is None else self.grid_graph(nodes_BND, masks[-1]))
        if self.regions is not None:
            if isinstance(self.regions, PyramidRegions):
                nodes_BND = self.regions(maps[self.regions.stage])
            else:
                nodes_BND = self.regions(regions, region_positions)
            masks.append(self._drawn_mask(nodes_BND))
            paths.append(nodes_BND if self.region_graph is None else self.region_graph(nodes_BND, masks[-1]))
        if self.joint_graphs:
            joined_BND = torch.cat(paths, dim=1)  # grid first, as the authors do
            drawn = [mask for mask in masks if mask is not None]
            masks = [torch.cat(drawn, dim=1) if drawn else None] * len(self.joint_graphs)
            paths = [graph(joined_BND, masks[0]) for graph in self.joint_graphs]
        return paths, masks

    def _pooled(self, paths: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
        return [
            self.poolings[index](nodes_BND, mask_BN) if self.poolings else mean_over_nodes(nodes_BND, mask_BN)
            for index, (nodes_BND, mask_BN) in enumerate(zip(paths, masks, strict=True))
        ]

    def _drawn_mask(self, nodes_BND: Tensor) -> Tensor | None:
        """The nodes that stay in this step of training; None where none is dropped."""
        if not self.training or self.config.drop_nodes == 0:
            return None
        batch, count, _ = nodes_BND.shape
        return _kept(batch, count, self.config.drop_nodes, nodes_BND.device)

    def _fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fig. 4: F(v1, v2) for two vectors, F3(F1(v1, v2), F2(v3, v4)) for four."""
        if len(vectors) == 1:
            return vectors[0]
        if len(vectors) == 2:
            return self.fusions[0](vectors[0], vectors[1])
        first, second, third = self.fusions
        return third(first(vectors[0], vectors[1]), second(vectors[2], vectors[3]))

    def _carried(self, vectors: list[Tensor], paths: list[Tensor]) -> Tensor:
        """Nodes (B, N, D) whose mean is `_fuse(vectors)`, where the vectors are the means of the paths' nodes."""
        if len(paths) == 1:
            return paths[0]
        fusions = cast("list[GatedFusion]", self.fusions)
        carried = fusions[0].carry((vectors[0], vectors[1]), (paths[0], paths[1]))
        if not self.joint_graphs:
            count = sum(nodes_BND.shape[1] for nodes_BND in carried)
            return torch.cat([nodes_BND * (count / nodes_BND.shape[1]) for nodes_BND in carried], dim=1)
        first_BND = carried[0] + carried[1]
        if len(paths) == 2:
            return first_BND
        first, second, third = fusions
        others = second.carry((vectors[2], vectors[3]), (paths[2], paths[3]))
        fused = first(vectors[0], vectors[1]), second(vectors[2], vectors[3])
        last = third.carry(fused, (first_BND, others[0] + others[1]))
        return last[0] + last[1]

    def train(self, mode: bool = True) -> "ImageEncoder":
        """As usual, but a frozen trunk stays in evaluation mode: its BatchNorm statistics are part of its weights."""
        super().train(mode)
        if self.trunk is not None and self.config.trunk.frozen:
            self.trunk.eval()
        return self


def _pooled(counts: list[int], joint_graphs: int) -> list[int]:
    """How many nodes each vector is pooled from.

    Raises:
        DualmatchError: more than generalised pooling has coefficients for.
    """
    pooled = [sum(counts)] * joint_graphs or counts
    if max(pooled) > MAX_POOLED:
        raise DualmatchError(f'image_pooling = "gpo" pools at most {MAX_POOLED} nodes, the network has {max(pooled)}.')
    return pooled


class TextEncoder(nn.Module):
    """Token ids to unit vectors (paper section III-E).

    `forward` takes ids; `embed` takes word features, which training caches for a frozen BERT.
    """

    def __init__(self, config: DsranConfig) -> None:
        super().__init__()
        self.config = config
        self.words = build_words(config.text, embed_dim=config.embed_dim, attend_padding=config.pad_policy == "authors")
        # The authors' GRU variant has no projection (eq 18 has one): the GRU is as wide as the shared space.
        self.project: nn.Module = (
            nn.Identity()
            if config.text.encoder == "gru"
            else Projection(self.words.width, config, dropout=config.token_dropout)
        )
        self.caption_graph = _graph(config) if config.caption_relations else None
        self.pooling = GeneralisedPooling(config.text.max_length) if config.text.pooling == "gpo" else None

    def forward(self, token_ids: Tensor) -> Tensor:
        """Embeddings (B, D), of unit norm, from ids (B, T) padded with 0 at the end."""
        mask_BT = token_ids != PAD_ID
        if self.training and self.config.drop_words:
            order_BT, mask_BT = self._fewer_words(mask_BT)
            token_ids = token_ids.gather(1, order_BT).masked_fill(~mask_BT, PAD_ID)
        return self._summarise(self.words(token_ids, mask_BT), mask_BT)

    def embed(self, words_BTW: Tensor, mask_BT: Tensor) -> Tensor:
        """Embeddings (B, D) from word features (B, T, W)."""
        if self.training and self.config.drop_words:
            order_BT, mask_BT = self._fewer_words(mask_BT)
            words_BTW = words_BTW.gather(1, order_BT[:, :, None].expand_as(words_BTW))
        return self._summarise(words_BTW, mask_BT)

    def _fewer_words(self, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The words that stay in this step of training, moved to the front: (order (B, T), mask (B, T))."""
        place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        is_special_BT = (place_T == 0) | (place_T == mask_BT.sum(dim=1, keepdim=True) - 1)
        kept_BT = mask_BT & (
            is_special_BT | (torch.rand(mask_BT.shape, device=mask_BT.device) >= self.config.drop_words)
        )
        order_BT = (~kept_BT).to(torch.int8).argsort(dim=1, stable=True)
        return order_BT, kept_BT.gather(1, order_BT)

    def _summarise(self, words_BTW: Tensor, mask_BT: Tensor) -> Tensor:
        nodes_BTD = self.project(words_BTW)
        if self.config.text.normalise_tokens:
            nodes_BTD = l2_normalise(nodes_BTD, 1e-12)  # padding is a zero vector and stays one
        # The authors mask nothing: padding is attended, enters BatchNorm, and counts in the mean.
        mask = mask_BT if self.config.pad_policy == "masked" else None
        if self.caption_graph is not None:
            nodes_BTD = self.caption_graph(nodes_BTD, mask)
        if self.pooling is not None:
            vectors_BD = self.pooling(nodes_BTD, mask_BT)
        elif self.config.text.pooling == "last":
            vectors_BD = last_node(nodes_BTD, mask_BT)
        else:
            vectors_BD = mean_over_nodes(nodes_BTD, mask)
        return l2_normalise(vectors_BD, self.config.l2_epsilon)

    def train(self, mode: bool = True) -> "TextEncoder":
        """As usual, but a frozen word encoder stays in evaluation mode."""
        super().train(mode)
        if self.config.text.frozen:
            self.words.eval()
        return self


class DSRAN(nn.Module):
    """Both encoders.

    Args:
        config: the network.
        trunk: the image trunk, from `trunks.build_trunk`; None where the configuration has none.
    """

    def __init__(self, config: DsranConfig, trunk: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config, trunk)
        self.text_encoder = TextEncoder(config)
        if trunk is not None and config.trunk.frozen:
            trunk.requires_grad_(False)
        if config.text.frozen:
            self.text_encoder.words.requires_grad_(False)
