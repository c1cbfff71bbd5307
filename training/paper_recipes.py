"""A recipe for every row of the papers: a base recipe, what differs from it, and the numbers that the paper prints.

The bases are TOML files with the settings of the authors' code; where those differ from their paper, the file says so. Everything else is
generated here. Imports no torch, so that the rows can be listed in the base install.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .paper_tables import Target, ablation_targets, dsran_targets, vsepp_targets, vsrn_ablations, vsrn_targets

DATA = {"flickr30k": "Flickr30K", "coco": "MS-COCO"}
TEXT = {"gru": "a GRU", "bert": "BERT"}

_IMAGES = {
    "flickr30k": "Karpathy's dataset_flickr30k.json beside the photographs",
    "coco": "VSE++'s annotation ids beside the COCO photographs",
}
RESNET = "--set trunk_weights=resnet152.safetensors"
_WORDS = {
    "gru": "--set word_weights=glove.840B.300d.txt",
    "bert": "--set word_weights=FOLDER of bert-base-uncased",
}
_VLP = "--set data.regions=VLP's 100 regions an image"
_SCAN = {"flickr30k": "SCAN's f30k_precomp", "coco": "SCAN's coco_precomp"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe that belongs to a row, or a point of a curve, of a paper.

    Attributes:
        base: the recipe that this one differs from; empty for one that is a TOML file.
        values: what differs, `description` included.
        group: under which heading it is listed.
        needs: what has to be at hand.
        targets: what the paper prints for it.
    """

    group: str
    needs: str
    base: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()


# Table III: (global path, regional path, SSR, JSR) of lines 1 to 8, with BERT; lines 9 to 16 are the same with a GRU.
ABLATIONS = (
    (True, False, False, False),
    (True, False, True, False),
    (False, True, False, False),
    (False, True, True, False),
    (True, True, False, False),
    (True, True, True, False),
    (True, True, False, True),
    (True, True, True, True),
)
# Fig. 8 draws Rsum over the number of epochs, the learning rate falling at half of them. The text names only where the curves are
# highest: 12 (BERT) and 16 (GRU) on Flickr30K, 18 on COCO. The other points are ours.
EPOCHS = (6, 8, 10, 12, 14, 16, 18, 20)


def described(text: str, values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with its description."""
    return {"description": text, **values}


def ablation(path: tuple[bool, bool, bool, bool], *, regions_from_files: bool) -> tuple[str, dict[str, Any]]:
    """A line of Table III in words and as the network's options."""
    is_global, is_regional, separate, joint = path
    paths = " and ".join(name for name, chosen in (("global", is_global), ("regional", is_regional)) if chosen)
    modules = (
        " and ".join(name for name, chosen in (("SSR", separate), ("JSR", joint)) if chosen) or "neither SSR nor JSR"
    )
    fused = "; the paths meet in the gated fusion layer" if is_global and is_regional and not joint else ""
    model: dict[str, Any] = {
        "global_path": is_global,
        "regional_path": is_regional,
        "separate_relations": separate,
        "joint_relations": joint,
    }
    if not is_global and regions_from_files:  # nothing looks at the photograph then
        return f"{paths} path, {modules}{fused}", {
            "trunk_weights": "",
            "model": model | {"trunk": {"name": "none"}},
            "data": {"augment": False, "views": 1},
        }
    return f"{paths} path{'s' if is_global and is_regional else ''}, {modules}{fused}", {"model": model}


def _dsran(text: str, data: str) -> Iterator[tuple[str, Row]]:
    base = f"dsran-{text}-{data}"
    needs = f"{_IMAGES[data]}; {RESNET}; {_WORDS[text]}; {_VLP}"
    network = f"DSRAN with {TEXT[text]} on {DATA[data]}"
    targets = dsran_targets(text, data)
    plain = tuple(target for target in targets if target.models == 1 and not target.rerank)
    tables = "DSRAN, Tables I and II"
    yield base, Row(group=tables, needs=needs, targets=targets)

    own_graphs = 4 if base == "dsran-bert-coco" else 2
    for graphs in (1, 2, 4):
        values = described(f"{network}, K = {graphs} (Fig. 7).", {"model": {"joint_graphs": graphs}})
        yield (
            f"{base}-k{graphs}",
            Row(
                group="DSRAN, Fig. 7: K",
                needs=needs,
                base=base,
                values=values,
                targets=plain if graphs == own_graphs else (),
            ),
        )
    own_epochs = {"dsran-gru-flickr30k": 16, "dsran-bert-flickr30k": 12}.get(base, 18)
    for epochs in EPOCHS:
        values = described(
            f"{network}, {epochs} epochs, the learning rate falling at half of them (Fig. 8).",
            {"train": {"epochs": epochs, "step_epochs": epochs // 2}},
        )
        yield (
            f"{base}-epochs{epochs}",
            Row(
                group="DSRAN, Fig. 8: epochs",
                needs=needs,
                base=base,
                values=values,
                targets=plain if epochs == own_epochs else (),
            ),
        )
    if text == "bert":
        for norm, name in (("none", "without"), ("batch", "with")):
            yield (
                f"{base}-{name}-batchnorm",
                Row(
                    group="DSRAN, Fig. 9: BatchNorm",
                    needs=needs,
                    base=base,
                    values=described(
                        f"{network}, {name} BatchNorm in the graph attention (Fig. 9).", {"model": {"norm": norm}}
                    ),
                    targets=plain if norm == "batch" else (),
                ),
            )
    if data == "flickr30k":
        for number, path in enumerate(ABLATIONS, start=1 if text == "bert" else 9):
            words, values = ablation(path, regions_from_files=True)
            yield (
                f"{base}-table3-{number}",
                Row(
                    group="DSRAN, Table III: ablations",
                    needs="; ".join(
                        (
                            _IMAGES[data],
                            *([RESNET] if path[0] else []),
                            _WORDS[text],
                            *([_VLP] if path[1] else []),
                        )
                    ),
                    base=base,
                    values=described(f"{network}: {words} (Table III, line {number}).", values),
                    targets=ablation_targets(number),
                ),
            )


def _vsrn() -> Iterator[tuple[str, Row]]:
    for data in DATA:
        yield f"vsrn-{data}", Row(group="VSRN, Tables 1 to 3", needs=_SCAN[data], targets=vsrn_targets(data))
    networks: dict[str, tuple[str, dict[str, Any]]] = {
        "table4-mean-pool": (
            "the mean of the projected regions",
            {"num_relation_layers": 0, "global_reasoning": "mean"},
        ),
        "table4-rrr": ("one relation layer, then the mean", {"num_relation_layers": 1, "global_reasoning": "mean"}),
        "table4-gsr": ("the GRU over regions, no relation layer", {"num_relation_layers": 0}),
        "table4-1rrr-gsr": ("one relation layer, then the GRU", {"num_relation_layers": 1}),
        "table4-4rrr-gsr": ("four relation layers, then the GRU: the whole network", {"num_relation_layers": 4}),
        "table4-4rrr-gsr-no-captioning": (
            "the whole network without the captioning loss",
            {"captioning": {"weight": 0.0}},
        ),
        "table5-random": ("regions in random order", {}),
        "table5-size": ("regions from the largest box to the smallest", {}),
        "table5-confidence": ("regions by descending confidence, as SCAN's files hold them", {}),
    }
    for name, targets in vsrn_ablations().items():
        words, model = networks[name]
        order = name.removeprefix("table5-")
        ordered = (
            "" if order in (name, "confidence") else f", its regions put in order of {order} in a file of your own"
        )
        table = name.partition("-")[0].removeprefix("table")
        yield (
            f"vsrn-coco-{name}",
            Row(
                group=f"VSRN, Table {table}: " + ("ablations" if table == "4" else "order of regions"),
                needs=_SCAN["coco"] + ordered,
                base="vsrn-coco",
                values=described(f"VSRN on MS-COCO: {words} (Table {table}).", {"model": model} if model else {}),
                targets=targets,
            ),
        )


def _vsepp() -> Iterator[tuple[str, Row]]:
    for data in DATA:
        needs = f"{_IMAGES[data]}; {RESNET}"
        yield f"vse++-{data}", Row(group="VSE++, the tables' baseline", needs=needs, targets=vsepp_targets(data))


PAPER_ROWS: dict[str, Row] = {
    name: row
    for rows in (*(_dsran(text, data) for text in TEXT for data in DATA), _vsrn(), _vsepp())
    for name, row in rows
}
