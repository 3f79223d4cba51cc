from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jem.data.fetch import fetch
from jem.data.sources import list_source
from jem.errors import InputError


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make(root: Path, *names: str) -> Path:
    """Write a picture of its own for each name."""
    for shade, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(shade))
    return root


def read(source, entries) -> dict[str, object]:
    return {image.path: image for image in fetch(source, entries, np.random.default_rng(0))}


def labels(entries: pa.Table) -> dict[str, int | None]:
    return dict(zip(entries["path"].to_pylist(), entries["label"].to_pylist(), strict=True))


def problems(entries: pa.Table) -> dict[str, str]:
    pairs = zip(entries["path"].to_pylist(), entries["problem"].to_pylist(), strict=True)
    return {path: problem for path, problem in pairs if problem}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_flat_folder_has_no_labels_however_many_files_it_has(tmp_path):
    make(tmp_path, *[f"{number}.png" for number in range(300)])
    source, entries = list_source(str(tmp_path))
    assert source.kind == "flat"
    assert not source.labelled
    assert len(entries) == 300
    assert entries["label"].null_count == 300


def test_class_folders_are_numbered_by_name_at_any_depth(tmp_path):
    make(tmp_path, "dog/a.png", "cat/deep/er/b.png", "cat/c.PNG", "emu/x/d.JpEg")
    source, entries = list_source(str(tmp_path))
    assert source.kind == "classes"
    assert source.classes == ("cat", "dog", "emu")
    assert labels(entries) == {"cat/c.PNG": 0, "cat/deep/er/b.png": 0, "dog/a.png": 1, "emu/x/d.JpEg": 2}


def test_one_folder_and_very_many_folders_are_no_classes_unless_told_so(tmp_path):
    one = make(tmp_path / "one", "photos/a.png", "photos/b.png")
    many = make(tmp_path / "many", *[f"patient-{number}/scan.png" for number in range(150)])
    for folder, classes in ((one, 1), (many, 150)):
        assert list_source(str(folder))[0].kind == "flat"
        assert len(list_source(str(folder), "classes")[0].classes) == classes


def test_what_might_be_meant_otherwise_is_refused_with_the_choice(tmp_path):
    mixed = make(tmp_path / "mixed", "a.png", "cat/b.png", "dog/c.png")
    with pytest.raises(InputError, match=r"1 images itself and 2 in 2 folders: say --format flat.*--format classes"):
        list_source(str(mixed))
    source, entries = list_source(str(mixed), "classes")
    assert source.classes == ("cat", "dog")
    assert problems(entries) == {"a.png": "lies in no class folder"}
    assert len(list_source(str(mixed), "flat")[1]) == 3
    splits = make(tmp_path / "splits", "train/cat/a.png", "val/cat/b.png")
    with pytest.raises(InputError, match=r"splits \(train, val\): give one of them, such as .*splits/train"):
        list_source(str(splits))
    both = make(tmp_path / "both", "a.png", "b.tar")
    with pytest.raises(InputError, match=r"1 images and 1 \.tar files: say which"):
        list_source(str(both))


def test_other_files_are_counted_and_hidden_ones_left_out(tmp_path):
    make(tmp_path, "cat/a.png", "dog/b.png", "cat/Thumbs.db", "notes.txt", "cat/more.txt", "README")
    make(tmp_path, ".cache/x.png", "cat/._a.png", "__MACOSX/cat/a.png", "cat/.DS_Store")
    source, entries = list_source(str(tmp_path))
    assert entries["path"].to_pylist() == ["cat/a.png", "dog/b.png"]
    assert source.ignored == {".db": 1, ".txt": 2, "": 1}


def test_bad_entries_are_listed_with_their_problem(tmp_path):
    make(tmp_path, "cat/good.png", "dog/good.png")
    (tmp_path / "cat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "cat/loop.jpg").symlink_to(tmp_path / "cat/loop.jpg")
    (tmp_path / "cat/empty.jpg").touch()
    (tmp_path / "dog/folder.jpg").mkdir()
    make(tmp_path / "dog/folder.jpg", "inside.png")
    (tmp_path / "dog/up").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "cat/pipe.png")
    Path(os.fsdecode(bytes(tmp_path / "dog") + b"/caf\xe9.png")).write_bytes(picture(1))
    with (tmp_path / "dog/huge.png").open("wb") as sparse:
        sparse.truncate(2**30 + 1)
    source, entries = list_source(str(tmp_path))
    assert source.classes == ("cat", "dog")
    assert problems(entries) == {
        "cat/empty.jpg": "empty file",
        "cat/gone.jpg": "link to nothing",
        "cat/loop.jpg": "link to nothing",
        "cat/pipe.png": "not a regular file",
        "dog/caf\\xe9.png": "name is not UTF-8",
        "dog/folder.jpg": "folder in place of a file",
        "dog/huge.png": f"too large: {2**30 + 1} bytes",
        "dog/up": "a link to a folder above it",
    }
    assert set(entries["path"].to_pylist()) - set(problems(entries)) == {"cat/good.png", "dog/good.png"}
    assert source.ignored == {".txt": 1}


def test_links_to_files_and_folders_are_followed(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", "a.png", "more/b.png")
    folder = make(tmp_path / "folder", "c.png")
    (folder / "linked.png").symlink_to(elsewhere / "a.png")
    (folder / "cats").symlink_to(elsewhere / "more")
    _, entries = list_source(str(folder), "flat")
    assert entries["path"].to_pylist() == ["c.png", "cats/b.png", "linked.png"]
    assert all(entries["size"].to_numpy() > 0)


def test_files_that_cannot_be_read_become_problems_and_the_rest_goes_on(tmp_path):
    make(tmp_path, "a.png", "b.png", "d.png")
    (tmp_path / "c.png").symlink_to("/proc/self/mem")  # readable by its mode, and fails when it is read
    source, entries = list_source(str(tmp_path))
    entries = entries.set_column(entries.schema.get_field_index("problem"), "problem", pa.nulls(4, pa.string()))
    (tmp_path / "b.png").unlink()
    (tmp_path / "d.png").unlink()
    (tmp_path / "d.png").mkdir()
    images = read(source, entries)
    assert images["a.png"].data == picture(0)
    assert images["a.png"].problem is None
    assert images["b.png"].problem == "unreadable: no such file"
    assert images["d.png"].problem == "unreadable: folder in place of a file"
    assert images["c.png"].problem.startswith("unreadable: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_permissions_are_respected_and_named(tmp_path):
    make(tmp_path, "a.png", "b.png", "dark/c.png")
    (tmp_path / "a.png").chmod(0)
    (tmp_path / "dark").chmod(0)
    source, entries = list_source(str(tmp_path), "flat")
    (tmp_path / "dark").chmod(0o700)
    assert problems(entries) == {"dark": "unreadable folder: Permission denied"}
    assert read(source, entries.slice(0, 1))["a.png"].problem == "unreadable: permission denied"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root / "none", "no source at .*none: give a folder"),
        (lambda root: make(root / "empty", "x/.hidden").joinpath("x"), "has no images: it holds no files"),
        (lambda root: make(root / "texts", "a.txt", "b.txt", "c.md"), r"holds 2 \.txt, 1 \.md"),
        (lambda root: make(root / "packed", "images.zip"), "unpack archives first"),
        (lambda root: make(root / "file", "a.tar.gz") / "a.tar.gz", "is packed: unpack it"),
        (lambda root: make(root / "file", "a.png") / "a.png", "is no folder, list"),
    ],
)
def test_sources_that_cannot_be_used_are_refused_with_a_remedy(tmp_path, prepare, message):
    with pytest.raises(InputError, match=message):
        list_source(str(prepare(tmp_path)))


# --- lists ------------------------------------------------------------------------------------------------------------


def test_lists_give_paths_and_labels_in_their_order(tmp_path):
    make(tmp_path, "b.png", "sub/a.png", "with, comma.png")
    csv = tmp_path / "list.csv"
    csv.write_text('\ufeffpath,label\nsub/a.png,dog\n"with, comma.png",\n./b.png,cat\n', "utf-8")
    lines = tmp_path / "list.jsonl"
    lines.write_text(
        '{"path": "sub/a.png", "label": "dog"}\n\n{"path": "with, comma.png"}\n{"path": "b.png", "label": "cat"}\n'
    )
    for file in (csv, lines):
        source, entries = list_source(str(file))
        assert source.kind == "list"
        assert source.classes == ("cat", "dog")
        assert list(labels(entries).items()) == [("sub/a.png", 1), ("with, comma.png", None), ("b.png", 0)]
        assert read(source, entries)["b.png"].data == picture(0)


def test_integer_labels_stay_as_they_are_and_none_is_no_label(tmp_path):
    make(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("label,path\n7,a.png\n3,b.png\n")
    source, entries = list_source(str(tmp_path / "list.csv"))
    assert (source.classes, source.labelled, labels(entries)) == (None, True, {"a.png": 7, "b.png": 3})
    (tmp_path / "list.jsonl").write_text('{"path": "a.png"}\n{"path": "b.png", "label": null}\n')
    assert not list_source(str(tmp_path / "list.jsonl"))[0].labelled


def test_lists_do_not_leave_their_folder(tmp_path):
    make(tmp_path, "secret.png", "in/a.png", "in/sub/b.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "sub/../../secret.png"]
    rows = ["a.png", "sub/../a.png", "missing.png", "sub", *outside]
    (tmp_path / "in/list.csv").write_text("path\n" + "\n".join(rows) + "\n")
    _source, entries = list_source(str(tmp_path / "in/list.csv"))
    found = list(zip(entries["path"].to_pylist(), entries["problem"].to_pylist(), strict=True))
    assert found[:4] == [
        ("a.png", None),
        ("a.png", None),
        ("missing.png", "no such file"),
        ("sub", "folder in place of a file"),
    ]
    assert [problem.partition(" (")[0] for _, problem in found[4:]] == ["path leaves the list's folder"] * 3


def test_absolute_paths_in_a_list_may_lie_in_its_folder(tmp_path):
    make(tmp_path, "in/a.png", "in/sub/b.png", "inner/c.png")
    rows = [tmp_path / "in/a.png", tmp_path / "in/sub/../sub/b.png", tmp_path / "inner/c.png"]
    (tmp_path / "in/list.csv").write_text("path\n" + "\n".join(map(str, rows)) + "\n")
    source, entries = list_source(str(tmp_path / "in/list.csv"))
    assert problems(entries).keys() == {str(rows[2])}
    good = read(source, entries.slice(0, 2))
    assert {name: image.data for name, image in good.items()} == {"a.png": picture(0), "sub/b.png": picture(1)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file,label\nx.png,1\n", "no column path; its columns are file, label"),
        ("a.csv", "path\n", "lists no images"),
        ("a.csv", "", "no column path"),
        ("a.csv", "path,label\n,cat\n", "line 2: no path"),
        ("a.jsonl", '{"path": "x.png"}\n{"path": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"file": "x.png"}\n', "line 1 has no path"),
        ("a.jsonl", "[1]\n", "line 1 has no path"),
        ("a.jsonl", '{"path": "x.png", "label": [1]}\n', "neither a name nor an integer"),
        ("a.jsonl", '{"path": "\\ud800.png"}\n', "line 1 is not valid text"),
    ],
)
def test_broken_lists_are_refused_with_their_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list_source(str(tmp_path / name))


# --- tars -------------------------------------------------------------------------------------------------------------


def tar(file: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def test_tars_give_images_with_the_labels_beside_them(tmp_path):
    tar(tmp_path / "0.tar", ("x/1.png", picture(1)), ("x/1.cls", b"4\n"), ("x/1.json", b"{}"), ("x/2.cls", b"0"))
    tar(tmp_path / "1.tar", ("2.cls", b" 9 "), ("2.jpg", picture(2)), ("2.seg.png", picture(7)), ("3.PNG", picture(3)))
    for given in (tmp_path, tmp_path / "*.tar"):
        source, entries = list_source(str(given))
        assert source.kind == "webdataset"
        assert (source.labelled, source.classes) == (True, None)
        assert labels(entries) == {"0.tar/x/1.png": 4, "1.tar/2.jpg": 9, "1.tar/3.PNG": None}
        assert source.ignored == {".json": 1, ".seg.png": 1}
        images = read(source, entries)
        assert [images[name].data for name in ("0.tar/x/1.png", "1.tar/2.jpg")] == [picture(1), picture(2)]
    one, entries = list_source(str(tmp_path / "0.tar"))
    assert read(one, entries)["0.tar/x/1.png"].data == picture(1)


def test_names_in_tars_become_classes(tmp_path):
    tar(tmp_path / "0.tar", ("1.png", picture(1)), ("1.cls", b"dog"), ("2.png", picture(1)), ("2.cls", b"cat"))
    source, entries = list_source(str(tmp_path / "0.tar"))
    assert source.classes == ("cat", "dog")
    assert labels(entries) == {"0.tar/1.png": 1, "0.tar/2.png": 0}


def test_members_that_point_outside_are_refused(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(9))
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for name in ("../up.png", "/abs.png", "a/../../up2.png", "good.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            archive.addfile(info, io.BytesIO(picture(1)))
        for name, kind in (
            ("soft.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(info)
    _source, entries = list_source(str(tmp_path / "bad.tar"))
    assert {Path(path).name: problem for path, problem in problems(entries).items()} == {
        "up.png": "name leaves the tar",
        "abs.png": "name leaves the tar",
        "up2.png": "name leaves the tar",
        "soft.png": "a link in a tar",
        "hard.png": "a link in a tar",
        "pipe.png": "not a regular file",
    }
    good = entries.filter(pa.compute.is_null(entries["problem"]))
    assert good["path"].to_pylist() == ["bad.tar/good.png"]


def test_damaged_tars_give_what_comes_before_the_damage_and_say_so(tmp_path):
    members = [(f"{number}.png", picture(number)) for number in range(4)]
    whole = tar(tmp_path / "whole.tar", *members).read_bytes()
    block = 512 + -(-len(picture(0)) // 512) * 512
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: 2 * block + 512 + 5])
    broken = tmp_path / "broken.tar"
    broken.write_bytes(whole[: 2 * block] + b"\x01" * 512 + whole[2 * block + 512 :])
    for file, expected in ((cut, "truncated tar"), (broken, "damaged tar")):
        _, entries = list_source(str(file))
        assert len(entries) - len(problems(entries)) == 2
        assert any(problem.startswith(expected) for problem in problems(entries).values())


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_hugging_face_parquet_is_read_row_by_row(tmp_path):
    cells = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(7)]
    cells[3] = {"bytes": None, "path": "elsewhere.png"}
    metadata = {"huggingface": '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'}
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}, metadata=metadata
    )
    table = pa.table({"image": cells, "label": [0, 1, 0, 1, 0, None, 1]}, schema=schema)
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=3)
    source, entries = list_source(str(tmp_path))
    assert (source.kind, source.classes) == ("parquet", ("cat", "dog"))
    assert entries["rows"].to_pylist() == [3, 3, 1]
    images = read(source, entries)
    assert {path: image.label for path, image in images.items()} == {
        **{f"{number}.png": label for number, label in enumerate([0, 1, 0, 1, 0, None, 1]) if number != 3},
        "elsewhere.png": 1,
    }
    assert images["5.png"].data == picture(5)
    assert images["elsewhere.png"].problem == "no image in this row"


def test_another_protocol_lists_and_reads_the_same(tmp_path):
    make(tmp_path, "cat/a.png", "dog/b.png", ".hidden/c.png", "cat/x.txt", "dog/d.jpg/e.png")
    source, entries = list_source(f"local://{tmp_path}")
    assert (source.kind, source.classes, source.ignored) == ("classes", ("cat", "dog"), {".txt": 1})
    assert problems(entries) == {"dog/d.jpg": "folder in place of a file"}
    assert read(source, entries.slice(0, 1))["cat/a.png"].data == picture(0)
