"""Captions to token ids in Triton's Python backend.

`write_triton_repository` copies this file into a model repository as `model.py`; there it needs numpy and tokenizers, and nothing of
dualmatch. It cuts and pads as `dualmatch.runtime.tokenizer` does, which a test holds it to.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # Triton's own, only there
from tokenizers import Tokenizer

PAD_ID = 0


class TritonPythonModel:
    """The class that Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer beside this file, after its hash has been checked."""
        parameters = json.loads(args["model_config"])["parameters"]
        values = {name: entry["string_value"] for name, entry in parameters.items()}
        data = Path(__file__).with_name("tokenizer.json").read_bytes()
        if hashlib.sha256(data).hexdigest() != values["tokenizer_sha256"]:
            raise triton.TritonModelException(
                "tokenizer.json does not match the SHA-256 in config.pbtxt; it was changed"
            )
        self.tokenizer = Tokenizer.from_buffer(data)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # a caption that spells "[PAD]" is text, not padding
        self.max_length = int(values["max_length"])
        self.fixed_length = int(values["fixed_length"])
        self.keep_last_special = values["keep_last_special"] == "true"
        self.pad_multiple = int(values["pad_multiple"])
        self.pad_limit = int(values["pad_limit"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request: `token_ids` int64 (captions, tokens) for `caption` (captions, 1); or an error that says why not."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            captions = [self._text(one) for one in triton.get_input_tensor_by_name(request, "caption").as_numpy()[:, 0]]
        except ValueError as error:
            return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(str(error)))
        ids = [self._cut(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(captions)]
        token_ids = np.full((len(ids), self._padded(max(map(len, ids)))), PAD_ID, dtype=np.int64)
        for row, one in zip(token_ids, ids, strict=True):
            row[: len(one)] = one
        return triton.InferenceResponse(output_tensors=[triton.Tensor("token_ids", token_ids)])

    def _text(self, caption: bytes | str) -> str:
        try:
            text = caption.decode("utf-8") if isinstance(caption, bytes) else caption
        except UnicodeDecodeError:
            raise ValueError("a caption is not valid UTF-8") from None
        if not text.strip():
            raise ValueError("a caption is empty; every caption needs at least one word")
        return text

    def _cut(self, ids: list[int]) -> list[int]:
        limit = self.max_length
        if not limit or len(ids) <= limit:
            return ids
        return [*ids[: limit - 1], ids[-1]] if self.keep_last_special else ids[:limit]

    def _padded(self, length: int) -> int:
        """Tokens to pad to: requests of one length share a batch, so where padding does not count, lengths are rounded up."""
        if self.fixed_length:
            return self.fixed_length
        rounded = -(-length // self.pad_multiple) * self.pad_multiple
        return max(length, min(rounded, self.pad_limit)) if self.pad_limit else rounded
