"""The two encoders of a bundle, opened on a backend: photographs and captions to unit vectors, without torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .backends import ENGINE_BACKENDS, Session, open_encoder
from .bundle import Bundle, EncoderName, load_bundle
from .datasets import ImageItem
from .errors import DualmatchError
from .preprocess import ImageLike
from .regions import RegionFile
from .tokenizer import CaptionTokenizer

Array = NDArray[Any]


class _Encoder:
    """What both encoders share: a session, and batches through it."""

    session: Session
    batch_size: int

    def __init__(
        self,
        bundle: Bundle,
        encoder: EncoderName,
        *,
        backend: str,
        threads: int,
        batch_size: int,
        attention: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DualmatchError(f"the batch size must be at least 1, got {batch_size}.")
        entry = bundle.manifest.encoders[encoder]
        self.bundle = bundle
        self.batch_size = batch_size
        self.dimension = bundle.manifest.embedding_dimension
        self.session = open_encoder(bundle, encoder, backend=backend, threads=threads, nodes=attention)
        self._output = entry.outputs[0].name
        promised = {spec.name for spec in entry.inputs}
        if promised != {spec.name for spec in self.session.inputs}:
            raise DualmatchError(
                f"{entry.file} takes {sorted(s.name for s in self.session.inputs)}, the manifest promises {sorted(promised)}; export the bundle again."
            )

    @property
    def provider(self) -> str:
        """What the graph really runs on."""
        return self.session.provider

    def run(self, feeds: dict[str, Array]) -> NDArray[np.float32]:
        """One batch through the graph, (batch, dimension) float32."""
        return self.session.run(feeds)[self._output].astype(np.float32, copy=False)

    def close(self) -> None:
        """Release the graph."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ImageEncoder(_Encoder):
    """A bundle's image encoder.

    Args:
        bundle: an opened bundle or its path.
        backend: see `runtime.backends.BACKENDS`.
        threads: 0 leaves the number to the backend.
        regions: for networks with precomputed regions, where their features are.
        attention: fetch the nodes too, for `encode_with_nodes` and `runtime.attention`.

    Raises:
        DualmatchError: the backend is not available, regions are needed and missing, or nodes are asked for and not to be had.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        backend: str = "onnxruntime",
        threads: int = 0,
        batch_size: int = 32,
        regions: RegionFile | None = None,
        attention: bool = False,
    ) -> None:
        bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        names = {spec.name for spec in bundle.manifest.encoders["image"].inputs}
        if "regions" in names and regions is None:
            raise DualmatchError(
                "this bundle's network takes precomputed regions; give their file with --regions FILE."
            )
        self.nodes = bundle.manifest.encoders["image"].nodes if attention else None
        if attention and self.nodes is None:
            raise DualmatchError(
                f"the bundle {bundle.path} does not tell what its network looks at: export it with `dualmatch export … --attention`."
            )
        if attention and backend in ENGINE_BACKENDS:
            raise DualmatchError(
                f"backend {backend!r} runs engines, which leave out what attention pictures are drawn from; take --backend onnxruntime."
            )
        super().__init__(bundle, "image", backend=backend, threads=threads, batch_size=batch_size, attention=attention)
        self._names = names
        self.regions = regions
        self._preprocess = bundle.manifest.preprocessing

    def prepare(self, image: ImageLike, image_id: str | None = None) -> dict[str, Array]:
        """One image's inputs, without the batch axis.

        Args:
            image: a path, encoded bytes, or a PIL image.
            image_id: the name that the region file knows it by; a path's file name by default.

        Raises:
            DualmatchError: the image cannot be read, or has no regions where they are needed.
        """
        prepared: dict[str, Array] = {}
        if "pixels" in self._names:
            assert self._preprocess is not None
            prepared["pixels"] = self._preprocess(image)
        if self.regions is not None and "regions" in self._names:
            if image_id is None:
                if not isinstance(image, str | Path):
                    raise DualmatchError("an image that is not a file needs its id, to find its precomputed regions.")
                image_id = Path(image).name
            prepared["regions"] = self.regions.features(image_id)
            if "region_positions" in self._names:
                prepared["region_positions"] = self.regions.positions(image_id)
        return prepared

    def encode_prepared(self, prepared: Sequence[dict[str, Array]]) -> NDArray[np.float32]:
        """Embeddings of one batch of prepared images, (n, dimension)."""
        return self.run(self._batch(prepared))

    def encode_with_nodes(
        self, prepared: Sequence[dict[str, Array]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embeddings (n, dimension) and nodes (n, nodes, dimension) of one batch of prepared images; see `NodesOutput`.

        Raises:
            DualmatchError: the encoder was not opened with `attention=True`.
        """
        if self.nodes is None:
            raise DualmatchError(
                "attention is asked of an encoder that was opened without: ImageEncoder(…, attention=True)."
            )
        results = self.session.run(self._batch(prepared))
        return results[self._output], results[self.nodes.output.name]

    def _batch(self, prepared: Sequence[dict[str, Array]]) -> dict[str, Array]:
        return {name: np.stack([one[name] for one in prepared]) for name in sorted(self._names)}

    def encode_items(
        self, items: Sequence[ImageItem], progress: Callable[[str, int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Embeddings of a data set's images, (n, dimension) float32, in the given order.

        Raises:
            DualmatchError: an image that cannot be read, by its id.
        """
        parts = [np.empty((0, self.dimension), np.float32)]
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            parts.append(self.encode_prepared([self._prepare_item(item) for item in batch]))
            if progress is not None:
                progress("encoding images", start + len(batch), len(items))
        return np.concatenate(parts)

    def _prepare_item(self, item: ImageItem) -> dict[str, Array]:
        try:
            # A data set of region features has no photographs; networks without a trunk need none.
            return self.prepare(item.read_bytes() if "pixels" in self._names else b"", item.id)
        except DualmatchError as error:
            raise DualmatchError(f"image {item.id!r} of the data set: {error}") from None

    def encode(self, images: Sequence[ImageLike], image_ids: Sequence[str] | None = None) -> NDArray[np.float32]:
        """Embeddings of images, (n, dimension) float32, of unit norm, in the given order."""
        parts = [np.empty((0, self.dimension), np.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = range(start, min(start + self.batch_size, len(images)))
            parts.append(
                self.encode_prepared([self.prepare(images[i], image_ids[i] if image_ids else None) for i in batch])
            )
        return np.concatenate(parts)


class TextEncoder(_Encoder):
    """A bundle's text encoder; arguments as for `ImageEncoder`."""

    def __init__(
        self, bundle: Bundle | str | Path, *, backend: str = "onnxruntime", threads: int = 0, batch_size: int = 128
    ) -> None:
        bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        super().__init__(bundle, "text", backend=backend, threads=threads, batch_size=batch_size)
        self.tokenizer = CaptionTokenizer(bundle.read("tokenizer.json"), bundle.manifest.tokenizer)

    def encode_prepared(self, prepared: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Embeddings of one batch of captions' ids, (n, dimension)."""
        return self.run({"token_ids": self.tokenizer.pad(prepared)})

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of captions, (n, dimension) float32, of unit norm, in the given order.

        Under the `masked` policy captions of similar length are run together, which changes the speed and not the result; under
        `authors` an embedding depends on the batch's longest caption, so batches keep the given order, as the authors' evaluation does.
        """
        ids = self.tokenizer.ids(captions)
        order = list(range(len(ids)))
        if self.bundle.manifest.pad_policy == "masked":
            order.sort(key=lambda i: len(ids[i]))
        embeddings = np.empty((len(ids), self.dimension), np.float32)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            embeddings[batch] = self.encode_prepared([ids[i] for i in batch])
        return embeddings
