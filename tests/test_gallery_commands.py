"""Merging, appending, removing, compacting: what a gallery holds afterwards, what is refused, and that a kill never costs one.

Run as a program, this file kills changes of galleries below `argv[1]` at random moments and prints how many; it is a program
of its own so that the forks start from a process without other threads.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.galleries.edit import append_gallery, compact, remove_items
from dualmatch.runtime.galleries.gallery import Gallery
from dualmatch.runtime.galleries.merge import merge

if __name__ == "__main__":  # the folder of the tests is no package
    sys.path.insert(0, str(Path(__file__).parent))
    from gallery_tables import calls_of, contents, killed_in_the_middle, unit_table, write_table
else:
    from .demo_fixture import dualmatch, one_sentence
    from .gallery_tables import contents, unit_table, write_table

TABLE = unit_table(30)


def ids(path):
    return [item.id for item in Gallery.open(path).items]


@pytest.fixture
def gallery(tmp_path):
    """Thirty captions c0 … c29 in shards of eight; 5, 9 and 16 to 23 are quarantined."""
    write_table(tmp_path / "g", TABLE, bad={5, 9, *range(16, 24)})
    return tmp_path / "g"


GOOD = [row for row in range(30) if row not in {5, 9, *range(16, 24)}]


# Merging


def test_parts_in_any_order_merge_to_the_bytes_of_one_run(tmp_path, gallery):
    bad = {5, 9, *range(16, 24)}
    write_table(tmp_path / "part0", TABLE, bad=bad, rows=(0, 16))
    write_table(tmp_path / "part16", TABLE, bad=bad, rows=(16, None))
    merge([tmp_path / "part16", tmp_path / "part0"], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(gallery)
    Gallery.open(tmp_path / "merged").check()


def test_parts_that_do_not_make_a_list_are_refused(tmp_path):
    write_table(tmp_path / "a", TABLE, rows=(0, 8))
    write_table(tmp_path / "b", TABLE, rows=(16, None))
    write_table(tmp_path / "c", TABLE, rows=(0, 16))
    write_table(tmp_path / "other", unit_table(20), rows=(8, 16), prefix="x")
    write_table(tmp_path / "whole", TABLE)
    for names, message in {
        ("a", "b"): "rows 8:16 are in none",
        ("a", "c"): "rows 0:8 are in two",
        ("a", "c", "b"): "rows 0:8 are in two",
        ("a", "other"): "from another list",
        ("whole", "a"): "rows 0:",
    }.items():
        with pytest.raises(DualmatchError, match=message):
            merge([tmp_path / name for name in names], tmp_path / "out")
        assert not (tmp_path / "out" / "index.json").exists()


def test_galleries_of_different_folders_follow_each_other_and_find_their_photographs(tmp_path, gallery):
    """Rows count on, quarantine too, and each keeps its root."""
    second = write_table(tmp_path / "more" / "h", unit_table(11, seed=1), prefix="d", bad={2})
    third = write_table(tmp_path / "k", unit_table(3, seed=2), prefix="e")
    merge([gallery, second.path, third.path], tmp_path / "deep" / "out")
    merged = Gallery.open(tmp_path / "deep" / "out")
    merged.check()
    assert [item.row for item in merged.items] == [*GOOD, *(30 + r for r in range(11) if r != 2), 41, 42, 43]
    assert [item.id for item in merged.items][20:23] == ["d0", "d1", "d3"]
    assert [entry.row for entry in merged.quarantine][-2:] == [23, 32]
    expected = np.concatenate([Gallery.open(gallery).vectors(), second.vectors(), third.vectors()])
    assert np.array_equal(merged.vectors(), expected)
    assert merged.bundle_path == Gallery.open(gallery).bundle_path
    assert merged.search(merged.vectors()[20:21], 1)[1].tolist() == [[20]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bundle": "a" * 64}, "another bundle"), ({"dtype": "float32"}, "another dtype")],
)
def test_what_does_not_compare_is_not_joined(tmp_path, gallery, options, message):
    other = write_table(tmp_path / "h", unit_table(4, seed=1), prefix="d", **options)
    before = contents(gallery)
    with pytest.raises(DualmatchError, match=message):
        merge([gallery, other.path], tmp_path / "out")
    with pytest.raises(DualmatchError, match=message):
        append_gallery(gallery, other)
    assert not (tmp_path / "out").exists()
    assert contents(gallery) == before


def test_an_id_that_occurs_twice_is_refused_or_decided(tmp_path, gallery):
    other = write_table(tmp_path / "h", unit_table(3, seed=1))  # c0, c1, c2 with other vectors
    with pytest.raises(DualmatchError, match=r"'c0' occurs twice.*--duplicates"):
        merge([gallery, other.path], tmp_path / "out")
    merge([gallery, other.path], tmp_path / "first", duplicates="first")
    merge([gallery, other.path], tmp_path / "last", duplicates="last")
    first, last = Gallery.open(tmp_path / "first"), Gallery.open(tmp_path / "last")
    assert np.array_equal(first.vectors(), Gallery.open(gallery).vectors())
    assert [item.id for item in last.items] == [*(f"c{row}" for row in GOOD[3:]), "c0", "c1", "c2"]
    assert np.array_equal(last.vectors()[-3:], other.vectors())
    first.check()
    last.check()


def test_a_damaged_source_is_not_copied(tmp_path, gallery):
    other = write_table(tmp_path / "h", unit_table(4, seed=1), prefix="d")
    path = other.path / "vectors-00000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x3c")
    with pytest.raises(DualmatchError, match=r"damaged: vectors-00000.npy \(hash\)"):
        merge([gallery, other.path], tmp_path / "out")
    before = contents(gallery)
    with pytest.raises(DualmatchError, match=r"damaged: vectors-00000.npy \(hash\)"):
        append_gallery(gallery, other)
    assert {name: data for name, data in contents(gallery).items() if name in before} == before
    Gallery.open(gallery).check()


def test_a_merge_does_not_write_over_anything(tmp_path, gallery):
    other = write_table(tmp_path / "h", unit_table(4, seed=1), prefix="d")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(DualmatchError, match=r"holds thesis.txt"):
        merge([gallery, other.path], tmp_path / "full")
    assert contents(tmp_path / "full") == {"thesis.txt": b"years of work"}
    with pytest.raises(DualmatchError, match="exists already"):
        merge([gallery, other.path], other.path)
    with pytest.raises(DualmatchError, match="two different"):
        merge([gallery, gallery], tmp_path / "out")


# Removing and compacting


def test_removed_items_are_gone_from_everything_that_reads(gallery):
    before = Gallery.open(gallery)
    vectors = before.vectors()
    assert remove_items(gallery, ["c3", "c24", "c29", "c4"]) == 4
    after = Gallery.open(gallery)
    keep = [place for place, row in enumerate(GOOD) if row not in {3, 4, 24, 29}]
    assert len(after) == 16
    assert [item.row for item in after.items] == [GOOD[place] for place in keep]
    assert [after.item(place).row for place in range(16)] == [GOOD[place] for place in keep]
    assert np.array_equal(after.vectors(), vectors[keep])
    assert np.array_equal(after.vectors_at(np.array([15, 0, 3])), vectors[keep][[15, 0, 3]])
    queries = vectors[[3]]  # the removed c3's own
    expected = np.argsort(-(queries @ vectors[keep].T), axis=1, kind="stable")[:, :5]
    assert after.search(queries, 5)[1].tolist() == expected.tolist()
    after.check()
    assert remove_items(gallery, ["c25"]) == 1  # beside an earlier tombstone
    assert len(Gallery.open(gallery)) == 15


def test_compacting_rewrites_only_shards_with_removed_items_and_changes_nothing_that_is_read(gallery):
    remove_items(gallery, ["c3", "c24", "c29", "c4"])
    before = Gallery.open(gallery)
    vectors, items, size = before.vectors(), before.items, (gallery / "vectors-00000.npy").stat().st_size
    untouched = (gallery / "vectors-00001.npy").stat().st_mtime_ns
    assert compact(gallery) == 4
    after = Gallery.open(gallery)
    after.check()
    assert np.array_equal(after.vectors(), vectors)
    assert after.items == items
    assert [entry.row for entry in after.quarantine] == [5, 9, *range(16, 24)]
    assert sorted(contents(gallery)) == [
        "index.json", *(f"items-0000{n}.jsonl" for n in (1, 2, 4, 5)), "quarantine.jsonl",
        *(f"vectors-0000{n}.npy" for n in (1, 2, 4, 5)),
    ]  # fmt: skip
    assert (gallery / "vectors-00004.npy").stat().st_size < size
    assert (gallery / "vectors-00001.npy").stat().st_mtime_ns == untouched
    assert compact(gallery) == 0


def test_a_gallery_may_be_emptied_and_filled_again(tmp_path, gallery):
    remove_items(gallery, ids(gallery))
    assert Gallery.open(gallery).search(TABLE[:2], 3)[1].shape == (2, 0)
    compact(gallery)
    Gallery.open(gallery).check()
    append_gallery(gallery, write_table(tmp_path / "h", unit_table(4, seed=1)))  # c0 to c3 are free again
    assert ids(gallery) == ["c0", "c1", "c2", "c3"]
    Gallery.open(gallery).check()


def test_an_unknown_id_removes_nothing(gallery):
    before = contents(gallery)
    with pytest.raises(DualmatchError, match=r"holds no item 'c5', nor 1 more .*nothing was removed"):
        remove_items(gallery, ["c0", "c5", "x"])
    assert contents(gallery) == before


def test_check_notices_rows_that_do_not_add_up_after_edits(gallery):
    remove_items(gallery, ["c3"])
    compact(gallery)
    index = json.loads((gallery / "index.json").read_text())
    items = gallery / index["shards"][1]["items"]["file"]
    lines = items.read_bytes().splitlines(keepends=True)
    lines[1] = lines[0]  # a row twice, with hashes brought up to it
    _seal(gallery, index, 1, items, b"".join(lines))
    with pytest.raises(DualmatchError, match="items"):
        Gallery.open(gallery).check()


def _seal(gallery, index, number, path, data):
    import hashlib

    path.write_bytes(data)
    index["shards"][number]["items"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (gallery / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("removed", [[[0, 99]], [[2, 1]], [[0, 1], [1, 2]], [[-1, 1]], [["0", 1]], "all", [[0]]])
def test_tombstones_that_make_no_sense_are_refused(gallery, removed):
    index = json.loads((gallery / "index.json").read_text())
    index["shards"][0]["removed"] = removed
    index["version"] = 2
    (gallery / "index.json").write_text(json.dumps(index))
    with pytest.raises(DualmatchError, match="damaged"):
        Gallery.open(gallery)


def test_an_edited_gallery_does_not_pass_for_version_1(gallery):
    remove_items(gallery, ["c3"])
    index = json.loads((gallery / "index.json").read_text())
    assert index["version"] == 2
    index["version"] = 1
    (gallery / "index.json").write_text(json.dumps(index))
    with pytest.raises(DualmatchError, match="contradict"):
        Gallery.open(gallery)


# Appending


def test_appending_touches_no_old_file_but_the_index_and_the_quarantine(tmp_path, gallery):
    before = contents(gallery)
    other = write_table(tmp_path / "h", unit_table(11, seed=1), prefix="d", bad={2})
    assert append_gallery(gallery, other) == 10
    after = contents(gallery)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"index.json", "quarantine.jsonl"}
    assert after["quarantine.jsonl"].startswith(before["quarantine.jsonl"])
    opened = Gallery.open(gallery)
    opened.check()
    assert np.array_equal(opened.vectors()[20:], other.vectors())
    merge([gallery, write_table(tmp_path / "k", unit_table(3, seed=2), prefix="e").path], tmp_path / "again")
    Gallery.open(tmp_path / "again").check()


def test_two_writers_do_not_meet(tmp_path, gallery):
    other = write_table(tmp_path / "h", unit_table(4, seed=1), prefix="d")
    before = contents(gallery)
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(gallery)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for change in (
            lambda: append_gallery(gallery, other),
            lambda: remove_items(gallery, ["c0"]),
            lambda: compact(gallery),
        ):
            with pytest.raises(DualmatchError, match="being written by another process"):
                change()
    finally:
        holder.communicate("\n")
    assert {name: data for name, data in contents(gallery).items() if name != ".lock"} == before
    assert remove_items(gallery, ["c0"]) == 1


LOCK = """
import sys
from pathlib import Path
from dualmatch.runtime.galleries.store import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_no_change_of_what_is_not_there(tmp_path):
    for change in (lambda: remove_items(tmp_path / "no", ["a"]), lambda: compact(tmp_path / "no")):
        with pytest.raises(DualmatchError, match="no file"):
            change()
    assert not (tmp_path / "no").exists()


def test_a_part_is_merged_before_it_grows(tmp_path, gallery):
    part = write_table(tmp_path / "part", TABLE, rows=(0, 8))
    with pytest.raises(DualmatchError, match="merge the parts first"):
        append_gallery(part.path, Gallery.open(gallery))


# Killing


def test_killed_changes_leave_the_old_gallery_or_the_new_one(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    for name, counts in report.items():
        assert counts["killed"] >= 12, name
        assert counts["old"] >= 1, name
    assert sum(counts["leftovers"] for counts in report.values()) >= 5


def _kill_changes(folder):
    write_table(folder / "g", TABLE, bad={5, 9})
    write_table(folder / "h", unit_table(20, seed=1), prefix="d", bad={2})
    shutil.copytree(folder / "g", folder / "removed")
    remove_items(folder / "removed", ["c3", "c12", "c29"])
    changes = {
        "append": (folder / "g", lambda out: append_gallery(out, Gallery.open(folder / "h"))),
        "remove": (folder / "g", lambda out: remove_items(out, ["c1", "c20"])),
        "compact": (folder / "removed", compact),
        "merge": (None, lambda out: merge([folder / "g", folder / "h"], out)),
    }
    report = {}
    for name, (start, change) in changes.items():

        def fresh(out, start=start):
            return shutil.copytree(start, out) if start is not None else out

        new = fresh(folder / f"{name}-new")
        calls = calls_of(lambda new=new, change=change: change(new))
        wanted = contents(new)
        counts = report[name] = {"killed": 0, "old": 0, "leftovers": 0}
        for seed in range(16):
            out = fresh(folder / f"{name}-{seed}")
            counts["killed"] += killed_in_the_middle(lambda out=out, change=change: change(out), seed, calls)
            index = out / "index.json"
            if index.exists() and index.read_bytes() == wanted["index.json"]:
                Gallery.open(out).check()
                continue
            counts["old"] += 1
            before = {} if start is None else contents(start)
            now = contents(out) if out.exists() else {}
            counts["leftovers"] += bool(set(now) - set(before) - {".lock"})
            if start is None:
                assert not index.exists(), f"{out}: half a gallery"
            else:
                assert index.read_bytes() == before["index.json"], f"{out}: neither old nor new"
                Gallery.open(out).check()
            change(out)
            assert contents(out) == wanted, f"{out} after the kill differs from an undisturbed {name}"
    print(json.dumps(report))


# The command line


def test_the_commands_work_together(tmp_path, small_bundle, small_run):
    photos = sorted((small_run.data / "images").iterdir())
    for name, chosen in (("a", photos[:20]), ("b", photos[20:30]), ("c", photos[30:34])):
        (tmp_path / name).mkdir()
        for photo in chosen:
            shutil.copy(photo, tmp_path / name)
    for name in "ab":
        assert (
            dualmatch("runtime", "encode-gallery", small_bundle, tmp_path / name, "--out", tmp_path / f"g{name}").code
            == 0
        )
    merged = dualmatch("gallery", "merge", tmp_path / "ga", tmp_path / "gb", "--out", tmp_path / "g")
    assert merged.code == 0, merged.err
    assert "30 vectors of 2 galleries" in merged.out
    appended = dualmatch("gallery", "append", tmp_path / "g", tmp_path / "c")
    assert appended.code == 0, appended.err
    assert "4 items added, 34 now" in appended.out
    assert not (tmp_path / "g.append").exists()
    found = dualmatch("runtime", "search", tmp_path / "g", "--image", photos[31], "--json", "--top", "1")
    assert found.json[0]["id"] == photos[31].name
    sheet = dualmatch(
        "runtime", "search", tmp_path / "g", "--text", "a ball", "--top", "34", "--sheet", tmp_path / "s.html"
    )
    assert sheet.code == 0
    assert "cannot be shown" not in (tmp_path / "s.html").read_text()  # photographs of all three folders are found
    again = dualmatch("gallery", "append", tmp_path / "g", tmp_path / "c")
    assert (again.code, one_sentence(again.err)) == (1, True)
    assert f"{photos[30].name!r} is in gallery" in again.err
    (tmp_path / "ids.txt").write_text(f"{photos[0].name}\n{photos[31].name}\n")
    assert "2 items removed" in dualmatch("gallery", "remove", tmp_path / "g", "--ids", tmp_path / "ids.txt").out
    found = dualmatch("runtime", "search", tmp_path / "g", "--image", photos[31], "--json", "--top", "40")
    assert len(found.json) == 32
    assert photos[31].name not in {hit["id"] for hit in found.json}
    assert "32 vectors, 0 quarantined, 2 removed but not compacted" in dualmatch("gallery", "check", tmp_path / "g").out
    assert "2 removed vectors are off the disk" in dualmatch("gallery", "compact", tmp_path / "g").out
    assert "32 vectors, 0 quarantined, all hashes match" in dualmatch("gallery", "check", tmp_path / "g").out


def test_an_append_killed_between_joining_and_tidying_up_joins_once(tmp_path, small_bundle, small_run, monkeypatch):
    for name, chosen in (("a", slice(0, 6)), ("b", slice(6, 9))):
        (tmp_path / name).mkdir()
        for photo in sorted((small_run.data / "images").iterdir())[chosen]:
            shutil.copy(photo, tmp_path / name)
    assert dualmatch("runtime", "encode-gallery", small_bundle, tmp_path / "a", "--out", tmp_path / "g").code == 0

    def killed(_path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dualmatch.runtime.append.shutil.rmtree", killed)
        assert dualmatch("gallery", "append", tmp_path / "g", tmp_path / "b").code == 130
    assert (tmp_path / "g.append").exists()
    again = dualmatch("gallery", "append", tmp_path / "g", tmp_path / "b")
    assert again.code == 0, again.err
    assert len(Gallery.open(tmp_path / "g")) == 9
    assert not (tmp_path / "g.append").exists()


def test_a_full_disk_leaves_the_gallery_as_it_was(tmp_path, gallery):
    other = write_table(tmp_path / "h", unit_table(400, dimension=16, seed=1), prefix="d", rows_per_shard=400)
    before = contents(gallery)
    code = """
import resource, signal, sys
from pathlib import Path
from dualmatch.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
sys.argv = ["dualmatch", "gallery", "append", *sys.argv[1:]]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(gallery), str(other.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "File too large; it is as it was before" in done.stderr
    assert "Traceback" not in done.stderr
    assert {name: data for name, data in contents(gallery).items() if name in before} == before
    Gallery.open(gallery).check()
    append_gallery(gallery, other)
    Gallery.open(gallery).check()


if __name__ == "__main__":
    _kill_changes(Path(sys.argv[1]))
