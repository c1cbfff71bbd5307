"""`bench paper`: a number of ours stands beside a printed one only where everything agrees; all else is named, with its reason."""

import json
import os

import pytest

from dualmatch.bench.paper import paper_report, read_evaluations
from dualmatch.runtime.errors import DualmatchError
from dualmatch.training.about import about_run, changes
from dualmatch.training.catalogue import catalogue
from dualmatch.training.recipe import ForeignRecipe, load_recipe

from .demo_fixture import dualmatch, one_sentence

FLICKR30K = {"name": "flickr30k", "layout": "karpathy", "splits": ["test"], "images": 1000, "captions": 5000}
COCO = {"name": "coco_precomp", "layout": "scan", "splits": ["testall"], "images": 5000, "captions": 25000}
SIX = {"i2t": {"r1": 70.0, "r5": 90.0, "r10": 95.0, "median": 1.0, "mean": 3.0},
       "t2i": {"r1": 55.0, "r5": 80.0, "r10": 88.0, "median": 1.0, "mean": 9.0}}  # fmt: skip


def model(recipe="dsran-gru-flickr30k", **changed):
    return {"name": "dsran", "recipe": recipe, "changed": [], "precision": "fp16", "bundle": "0", **changed}


def evaluation(*, data=FLICKR30K, models=None, rerank="none", folds=1, **others):
    models = [model()] if models is None else models
    protocol = {
        "split": "test", "images": data["images"], "captions": data["captions"], "captions_per_image": "5",
        "folds": folds, "ties": "smaller index first", "rerank": rerank, "ensemble": len(models),
    }  # fmt: skip
    subject = {"data": data, "models": models}
    return {"rsum": 478.0, **SIX, "protocol": protocol, "subject": subject, **others}


@pytest.fixture
def report(tmp_path):
    """The report of evaluations, each from a file of its own."""

    def make(*documents, recipe=None):
        found = []
        for number, document in enumerate(documents):
            (tmp_path / f"{number}.json").write_text(json.dumps(document))
            found += read_evaluations(tmp_path / f"{number}.json", recipe)
        return paper_report(found, catalogue()).to_json()

    return make


def run_rows(report):
    return [row for row in report["rows"] if row["status"] == "run"]


@pytest.mark.parametrize(
    ("document", "table", "rsum"),
    [
        (evaluation(), "Table II", 492.6),
        (evaluation(rerank="i2t k1=15"), "Table II", 497.3),
        (evaluation(models=[model(), model()]), "Table II", 502.1),
        (evaluation(models=[model(), model()], rerank="i2t k1=15"), "Table II", 508.4),
        (evaluation(models=[model("dsran-gru-flickr30k-k2")]), "Table II", 492.6),
        (evaluation(models=[model("dsran-bert-flickr30k-table3-6")]), "Table III, line 6", 495.6),
        (evaluation(data=COCO, models=[model("vsrn-coco")] * 2, folds=5), "Table 1", 516.8),
        (evaluation(data=COCO, models=[model("vsrn-coco")] * 2), "Table 2", 415.7),
        (evaluation(data=COCO, models=[model("vsrn-coco-table4-gsr")], folds=5), "Table 4", 507.4),
    ],
)
def test_what_agrees_stands_beside_the_printed_row(report, document, table, rsum):
    found = report(document)
    assert not found["beside_none"]
    (row,) = run_rows(found)
    assert (row["table"], row["rsum"]) == (table, rsum)
    (ours,) = row["ours"]
    assert ours["rsum_difference"] == pytest.approx(478.0 - rsum)
    assert ours["protocol"] == document["protocol"]
    assert ours["notes"] == (["the paper does not say how many models"] if table == "Table 4" else [])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (evaluation(data={**FLICKR30K, "name": "flickr8k-1000", "layout": "captions"}), "is not Flickr30K or COCO"),
        (evaluation(data={**FLICKR30K, "splits": ["val", "test"]}), "the papers test on test alone"),
        (evaluation(data={**FLICKR30K, "images": 500}), "500 images of Flickr30K's test: the papers rank 1000"),
        (evaluation(folds=5), "Flickr30K in five folds"),
        (evaluation(folds=4), "4 folds, which no paper averages"),
        (evaluation(rerank="i2t k1=15 and t2i k1=15"), "text to image was re-ranked too"),
        (evaluation(rerank="i2t k1=20"), "re-ranked with K1 = 20"),
        (evaluation(models=[model()] * 3), "with 3 models, not re-ranked"),
        (evaluation(models=[model(), model("dsran-bert-flickr30k")]), "the papers average two models of one network"),
        (evaluation(models=[model(changed=["train.epochs=2"])]), "trained with other options than dsran-gru-flickr30k: train.epochs=2"),
        (evaluation(models=[model("my-recipe")]), "no printed row belongs to the recipe my-recipe"),
        (evaluation(models=[model("dsran-gru-flickr30k-k4")]), "no printed row belongs"),
        (evaluation(data=COCO, models=[model()]), "no row of dsran-gru-flickr30k on COCO 5K"),
        (evaluation(data=COCO, models=[model("vsrn-coco")]), "no row of vsrn-coco on COCO 5K with 1 model"),
        (evaluation(subject=None), "does not say on which data"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_listed_with_its_reason(report, document, reason):
    found = report(document)
    assert not run_rows(found)
    (other,) = found["beside_none"]
    assert reason in other["reason"]
    assert other["rsum"] == 478.0


def test_a_recipe_can_be_named_for_a_network_that_does_not_say(report):
    document = evaluation(models=[model("model_best", changed=None)])
    assert "no printed row" in report(document)["beside_none"][0]["reason"]
    (row,) = run_rows(report(document, recipe="dsran-bert-flickr30k"))
    assert (row["rsum"], row["ours"][0]["notes"]) == (
        500.3,
        ["put here by hand; it calls itself model_best", "whether options of the recipe were changed is not known"],
    )


def test_every_printed_row_is_there_once_and_not_run():
    found = paper_report([], catalogue()).to_json()
    assert not run_rows(found)
    assert not found["beside_none"]
    tables = {}
    for row in found["rows"]:
        tables.setdefault((row["paper"], row["table"].partition(",")[0]), []).append(row)
    assert {table: len(rows) for table, rows in tables.items()} == {
        ("DSRAN", "Table I"): 18, ("DSRAN", "Table II"): 9, ("DSRAN", "Table III"): 16,
        ("VSRN", "Table 1"): 1, ("VSRN", "Table 2"): 1, ("VSRN", "Table 3"): 1, ("VSRN", "Table 4"): 6, ("VSRN", "Table 5"): 3,
    }  # fmt: skip
    assert list(tables) == sorted(tables)
    lines = [row["table"] for row in tables["DSRAN", "Table III"]]
    assert lines == [f"Table III, line {number}" for number in range(1, 17)]
    networks = {network for row in found["rows"] for network in row["recipes"]}
    assert networks == {entry["name"] for entry in catalogue() if entry["targets"]}


def test_only_narrows_the_rows_and_hides_no_evaluation(tmp_path):
    (tmp_path / "0.json").write_text(json.dumps(evaluation()))
    found = paper_report(read_evaluations(tmp_path / "0.json"), catalogue(), only="table3").to_json()
    assert {row["table"].partition(",")[0] for row in found["rows"]} == {"Table III"}
    assert "left out" in found["beside_none"][0]["reason"]


def test_test_sets_have_the_names_of_the_tables():
    from dualmatch.bench import test_sets
    from dualmatch.training import paper_tables

    for name in ("FLICKR30K", "COCO_1K", "COCO_5K"):
        assert getattr(test_sets, name) == getattr(paper_tables, name)


def test_markdown(report, tmp_path):
    (tmp_path / "0.json").write_text(json.dumps(evaluation(rerank="i2t k1=15")))
    (tmp_path / "1.json").write_text(json.dumps(evaluation(data={**FLICKR30K, "name": "a|b", "layout": "captions"})))
    finished = dualmatch("bench", "paper", tmp_path / "0.json", tmp_path / "1.json", "--only", "gru-flickr30k")
    assert finished.code == 0, finished.err
    lines = finished.out.splitlines()
    assert lines[0] == "Of 12 printed rows 1 was run here."
    place = next(number for number, line in enumerate(lines) if " 497.3 " in line)
    ours = [cell.strip() for cell in lines[place + 1].split("|")[1:-1]]
    assert ours == ["", "", "1", "i2t, K1 = 15", "ours, fp16", "70.0", "90.0", "95.0", "55.0", "80.0", "88.0", "478.0", "-19.3"]  # fmt: skip
    assert "## Beside no printed row" in finished.out
    assert "a\\|b" in finished.out  # a name breaks no table
    assert sum(line.endswith("not run |") for line in lines) == 11
    tables = [part.splitlines() for part in finished.out.split("\n\n") if part.startswith("|")]
    assert [len({len(line) for line in table}) for table in tables] == [1] * 3  # padded: readable as it stands


def test_the_files_of_the_commands_that_write_evaluations(small_bundle, small_run, tmp_path):
    words = ("--data", small_run.data, "--split", "test")
    sources = []
    for number, command in enumerate(
        (
            ("runtime", "evaluate", small_bundle, *words, "--json"),
            ("evaluate-checkpoint", small_run.folder, *words, "--json"),
            ("bench", "recall", small_bundle, small_run.folder, *words, "--json"),
        )
    ):
        finished = dualmatch(*command)
        assert finished.code == 0, finished.err
        sources.append(tmp_path / f"{number}.json")
        sources[-1].write_text(finished.out)
    found = dualmatch(
        "bench", "paper", *sources, small_bundle, small_run.folder, *words, "--out", tmp_path / "p.json", "--json"
    )
    assert found.code == 0, found.err
    assert found.json == json.loads((tmp_path / "p.json").read_text())
    others = found.json["beside_none"]
    # Two single evaluations; two models and their ensemble, plain and re-ranked, from the file and once more from the folders.
    assert len(others) == 2 + 6 + 6
    assert {one["data"]["name"] for one in others} == {"small scenes"}
    assert (
        len({one["rsum"] for one in others if (one["protocol"]["rerank"], one["protocol"]["ensemble"]) == ("none", 1)})
        == 1
    )
    assert all("is not Flickr30K or COCO" in one["reason"] for one in others)


def test_a_bundle_on_flickr30k_fills_its_rows(small_bundle, small_run, tmp_path):
    """A thousand images and five thousand captions in Karpathy's layout, of which the files are a dozen scenes over and over."""
    photographs = sorted((small_run.data / "images").iterdir())[:12]
    (tmp_path / "images").mkdir()
    entries = []
    for number in range(1000):
        os.link(photographs[number % 12], tmp_path / "images" / f"{number}.png")
        sentences = [{"raw": f"scene {number}, told {time} times"} for time in range(5)]
        entries.append({"filename": f"{number}.png", "split": "test", "sentences": sentences})
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"dataset": "flickr30k", "images": entries}))
    words = ("--data", tmp_path, "--threads", "1", "--json")
    found = dualmatch("bench", "paper", f"dsran-gru-flickr30k:{small_bundle}", *words)
    assert found.code == 0, found.err
    rows = run_rows(found.json)
    assert [(row["table"], row["models"], row["rerank"]) for row in rows] == [("Table II", 1, 0), ("Table II", 1, 15)]
    wanted = dualmatch("runtime", "evaluate", small_bundle, *words).json
    assert rows[0]["ours"][0]["rsum"] == wanted["rsum"]
    assert "put here by hand; it calls itself scenes-dsran-gru" in rows[0]["ours"][0]["notes"]
    assert [one["protocol"]["folds"] for one in found.json["beside_none"]] == [5, 5]
    unnamed = dualmatch("bench", "paper", small_bundle, *words).json
    assert not run_rows(unnamed)
    assert {one["reason"].partition(":")[0] for one in unnamed["beside_none"]} == {
        "trained with other options than scenes-dsran-gru",
        "Flickr30K in five folds",
    }


def test_changes_of_a_recipe(small_run):
    assert changes(load_recipe("dsran-gru-flickr30k")) == []
    assert changes(load_recipe("dsran-gru-flickr30k", ["train.seed=3", "data.regions=x"])) == []
    assert changes(load_recipe("dsran-gru-flickr30k", ["train.epochs=3", "model.joint_graphs=4"])) == [
        "model.joint_graphs=4",
        "train.epochs=3",
    ]
    assert changes(ForeignRecipe(name="model_best", description="")) is None
    about = about_run(small_run.folder)
    assert about["recipe"] == "scenes-dsran-gru"
    assert "train.epochs=1" in about["changed"]


def test_refusals(tmp_path, small_bundle):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text(json.dumps({"rsum": 1}))
    (tmp_path / "text.json").write_text("text")
    for arguments, message in (
        ((tmp_path / "list.json",), "is no evaluation"),
        ((tmp_path / "other.json",), "is no evaluation"),
        ((tmp_path / "text.json",), "cannot be read as JSON"),
        ((tmp_path / "none.json",), "there is no file"),
        ((small_bundle,), "evaluating it takes --data"),
        (("--only", "scenes"), "the papers print nothing"),
    ):
        finished = dualmatch("bench", "paper", *arguments)
        assert finished.code == 1
        assert message in finished.err
        assert one_sentence(finished.err)
    with pytest.raises(DualmatchError, match="is no evaluation"):
        read_evaluations(tmp_path / "other.json")
