"""Finds the golden cases by listing a folder, and says which kind each is, so that none can be passed over in silence.

The folder is `$DUALMATCH_GOLDENS`, else `shared/goldens` beside the checkout, else the small copy in `data/`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent

# Kind by the longest prefix of the folder's name that is listed here; None: tested, else why not.
KINDS: dict[str, str | None] = {
    "checkpoints": None,
    "dsran_bert": None,
    "dsran_bert_tokens": None,
    "dsran_gru": None,
    "dsran_gru_collate": None,
    "dsran_region_data": None,
    "fold5": None,
    "full_size": None,
    "recall": None,
    "recall_vsrn": None,
    "rerank": None,
    "vsrn": None,
    "vsrn_precomp_dataset": None,
}


@dataclass(frozen=True)
class Case:
    """One case of a folder: its entry in the folder's JSON and its arrays."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return f"{self.folder.name}-{self.name}"

    def numbers(self, file_name: str) -> dict[str, Any]:
        return read_json(self.folder / file_name).get(self.name, {})

    def arrays(self) -> dict[str, np.ndarray]:
        if not (self.folder / f"{self.name}.npz").is_file():
            return {}
        with np.load(self.folder / f"{self.name}.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def golden_folder() -> Path:
    named = os.environ.get("DUALMATCH_GOLDENS")
    if named is not None:
        if not Path(named).is_dir():
            raise FileNotFoundError(f"DUALMATCH_GOLDENS names {named}, which is not a folder")
        return Path(named)
    beside = HERE.parents[2] / "shared" / "goldens"
    return beside if beside.is_dir() else HERE / "data"


def kind_of(folder: Path) -> str | None:
    return max((kind for kind in KINDS if folder.name.startswith(kind)), key=len, default=None)


def case_folders() -> list[Path]:
    return sorted(path for path in golden_folder().iterdir() if path.is_dir())


def folders_of(kind: str) -> list[Path]:
    return [folder for folder in case_folders() if kind_of(folder) == kind]


def cases_of(kind: str, file_name: str) -> list[Case]:
    """The cases of all folders of this kind: by the entries of `file_name` and by the arrays, so that neither goes unseen."""
    found = []
    for folder in folders_of(kind):
        names = {path.stem for path in folder.glob("*.npz")} | (set(read_json(folder / file_name)) - {"note"})
        found += [Case(folder, name) for name in sorted(names)]
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
