"""Word embeddings from a GloVe text file, as the authors of DSRAN-GRU initialise theirs."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualmatch.models.authors_files import SPECIALS
from dualmatch.runtime.errors import DualmatchError

_DROPPED = str.maketrans("", "", "-.'")


def initialise_from_glove(weight: Tensor, word2idx: Mapping[str, int], path: Path) -> list[int]:
    """Overwrite the rows of an embedding whose words GloVe knows; all others, and the four specials, stay as they are.

    A word that is not in the file is looked up again without `-`, `.` and `'`, and only to its first `/`.

    Args:
        weight: (words, numbers), changed in place.
        path: a GloVe text file with as many numbers a line; the authors take `glove.840B.300d.txt`.

    Returns:
        The rows that were overwritten, ascending.

    Raises:
        DualmatchError: see `read_glove`; or an id for which the embedding has no row.
    """
    words = {word: row for word, row in word2idx.items() if word not in SPECIALS}
    if words and max(words.values()) >= len(weight):
        raise DualmatchError(f"the vocabulary has ids up to {max(words.values())}, the embedding {len(weight)} rows.")
    vectors = read_glove(path, {*words, *map(_simplified, words)}, dim=weight.shape[1])
    rows = {row: vectors.get(word, vectors.get(_simplified(word))) for word, row in words.items()}
    found = {row: vector for row, vector in sorted(rows.items()) if vector is not None}
    with torch.no_grad():
        for row, vector in found.items():
            weight[row] = torch.from_numpy(vector)
    return list(found)


def read_glove(path: Path, words: Collection[str], *, dim: int) -> dict[str, NDArray[np.float32]]:
    """The vectors of these words, (dim,) float32 each, from a file that is read once and never held: 840B takes 5.6 GB.

    A word that stands in the file twice has its last vector, as in torchtext, which the authors used.

    Raises:
        DualmatchError: no such file; a line that is not a word and `dim` finite numbers with single spaces between, by its number.
    """
    wanted = {word.encode(): word for word in words}
    vectors = {}
    longest = 1024 + 32 * dim  # of any line: a file of another kind may have none end
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(longest), b""), start=1):
                # Only spaces divide: some words of the 840B file hold other white space.
                entry = line.rstrip(b" \r\n")
                if (count := entry.count(b" ")) != dim:
                    raise DualmatchError(
                        f"{path}, line {number}: a word and {dim} numbers with single spaces between are needed; it has {count + 1} parts."
                    )
                name, _, numbers = entry.partition(b" ")
                if (word := wanted.get(name)) is not None:
                    vectors[word] = _vector(numbers, f"{path}, line {number}", word)
    except FileNotFoundError:
        raise DualmatchError(f"there is no GloVe file {path}.") from None
    except OSError as error:
        raise DualmatchError(f"the GloVe file {path} cannot be read: {error}.") from None
    return vectors


def _vector(numbers: bytes, place: str, word: str) -> NDArray[np.float32]:
    try:
        vector = np.array([float(number) for number in numbers.split(b" ")])
    except ValueError:
        raise DualmatchError(f"{place}: what follows {word!r} is not all numbers.") from None
    if not (np.abs(vector) <= np.finfo(np.float32).max).all():
        raise DualmatchError(f"{place}: the vector of {word!r} is not finite in float32.")
    return vector.astype(np.float32)


def _simplified(word: str) -> str:
    return word.translate(_DROPPED).partition("/")[0]
