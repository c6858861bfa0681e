"""Readers: inputs of every kind, made on the spot, and every kind of damage with the reason it is
counted under."""

import functools
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from transfusion_jax.images import decode, from_uint8
from transfusion_jax.preparation.readers import texts
from transfusion_jax.preparation.readers.inputs import find_inputs
from transfusion_jax.preparation.readers.listing import list_files
from transfusion_jax.preparation.readers.raw import Columns, Picture, Reader, Rejected


def png(color=(200, 30, 30), size=(6, 5)) -> bytes:
    return encoded(Image.new("RGB", size, color), "PNG")


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PLAIN = Columns()


MAX_BYTES = 1 << 28


def open_input(path: str, columns: Columns) -> list[tuple[str, Reader]]:
    return [(found.name, found.open()) for found in find_inputs(path, columns, MAX_BYTES)]


def the_reader(path: Path | str, columns: Columns = PLAIN):
    (_, reader), *others = open_input(str(path), columns)
    assert not others
    return reader


def items(reader) -> list:
    """Every item: (captions, spans) with pictures loaded, or the reason it was rejected."""
    found = []
    for index in range(len(reader)):
        try:
            raw = reader[index]
            spans = tuple(span.load() if isinstance(span, Picture) else span for span in raw.spans)
            found.append((raw.captions, spans))
        except Rejected as error:
            assert error.name.encode()
            found.append(error.reason)
    return found


def lines(path: Path, *values, end: bytes = b"\n") -> Path:
    path.write_bytes(
        end.join(v if isinstance(v, bytes) else json.dumps(v).encode() for v in values)
    )
    return path


def test_captions_of_one_picture_are_merged_wherever_they_stand(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png())
    lines(
        tmp_path / "captions.jsonl",
        {"file": "a.png", "caption": "one"},
        {"file": "b.png", "captions": ["two", "three"]},
        b"",
        b"not json",
        {"file": "a.png", "caption": "four"},
        {"file": "gone.png", "caption": "five"},
        {"file": "b.png"},
        {"file": "b.png", "captions": []},
        b'{"file": "a.png", "caption": "\xff"}',
        {"file": "\0.png", "caption": "six"},
        [1],
        {"file": "\ud800.png", "caption": "seven"},
        {"file": "a.png/", "caption": "eight"},
    )
    reader = the_reader(tmp_path)
    assert items(reader) == [
        (("one", "four"), (png(),)),
        (("two", "three"), (png(),)),
        "invalid JSON",
        "missing file",
        "no caption",
        "no caption",
        "invalid UTF-8",
        "missing file",
        "not a document",
        "missing file",
        "missing file",
    ]
    (found,) = find_inputs(str(tmp_path), PLAIN, MAX_BYTES)
    assert found.missing == (4, ("\0.png", "a.png/", "gone.png", "\ud800.png"))


def test_json_lines_of_every_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = lines(
        tmp_path / "x.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"text": "first"}).encode(),
        b"",
        {"spans": [{"image": "a.png"}, {"text": "remove it"}, "now", {"image": "a.png"}]},
        {"file": "a.png", "caption": "a pair"},
        {"text": "x" * 3_000_000},
        {"spans": [{"audio": "a.wav"}]},
        {"spans": []},
        {"text": 3},
        b'{"text": ',
        b"[" * 100_000,
        {"text": "last"},
        end=b"\r\n",
    )
    got = items(the_reader(path))
    assert got[:4] == [
        ((), ("first",)),
        ((), (png(), "remove it", "now", png())),
        (("a pair",), (png(),)),
        ((), ("x" * 3_000_000,)),
    ]
    assert got[4:] == [*["not a document"] * 2, "not text", *["invalid JSON"] * 2, ((), ("last",))]
    reader = the_reader(path)
    with pytest.raises(Rejected, match="x.jsonl:6"):  # the line, blank ones counted
        reader[4]
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    assert len(the_reader(empty)) == 0


WITH_PICTURES = (
    ({"image": "a.png", "text": "t"}, (("t",), (png(),))),
    ({"file_name": "a.png", "text": "t"}, (("t",), (png(),))),
    ({"image": "a.png", "caption": "t", "url": "http://x/a.png"}, (("t",), (png(),))),
    ({"image": None, "text": "t"}, ((), ("t",))),
    ({"text": "t", "url": "http://x/page.html", "id": 3, "image_width": 7}, ((), ("t",))),
    ({"text": "t", "file": ""}, "not a document"),
    ({"text": "t", "image": ["a.png"]}, "not a document"),
    ({"text": "t", "image": {"bytes": "x"}}, "not a document"),
    ({"image": "a.png"}, "no caption"),
    ({"image": "a.png", "file": "a.png", "text": "t"}, "ambiguous keys"),
    ({"image": "a.png", "caption": "t", "text": "u"}, "ambiguous keys"),
    ({"image": "a.png", "spans": [{"text": "t"}]}, "ambiguous keys"),
    ({"text": "t", "spans": [{"image": "a.png"}]}, "ambiguous keys"),
    ({"text": "t", "images": ["a.png"]}, "unknown key with a picture"),
    ({"texts": ["t"], "images": ["a.png"]}, "unknown key with a picture"),
    ({"text": "t", "picture": "QUJD"}, "unknown key with a picture"),
    ({"text": "t", "pixel_values": [[0.1, 0.2]]}, "unknown key with a picture"),
    ({"text": "t", "IMAGE": {"bytes": "QUJD"}}, "unknown key with a picture"),
    ({"text": "t", "imageName": "q0"}, "unknown key with a picture"),
    ({"text": "t", "data": "iVBORw0KGgo"}, "unknown key with a picture"),
    ({"image": "a.png", "text": "t", "data": {"x": "/9j/4AAQ"}}, "unknown key with a picture"),
    ({"text": "t", "media": "q0.JPEG#frag"}, "unknown key with a picture"),
    ({"text": "t", "media": " q0.jpg\n"}, "unknown key with a picture"),
    ({"text": "t", "x": {"y": ["data:image/png;base64,QUJD"]}}, "unknown key with a picture"),
    ({"text": "t", "x": [[{"y": "b.TIFF"}]]}, "unknown key with a picture"),
    ({"text": "t", "url": "http://x/a.jpg?w=3"}, "unknown key with a picture"),
    ({"image": "a.png", "text": "t", "edited": "b.png"}, "unknown key with a picture"),
    ({"spans": [{"text": "t"}], "images": ["a.png"]}, "unknown key with a picture"),
    ({"spans": [{"text": "t"}], "photo": "abc"}, "unknown key with a picture"),
    ({"spans": [{"text": "t", "image": "a.png"}]}, "not a document"),
    ({"spans": [{"text": "t", "picture": "a.png"}]}, "not a document"),
    ({"spans": [{"file": "a.png"}, "t"]}, ((), (png(), "t"))),
    ({"spans": [{"image": ["a.png"]}]}, "not a document"),
    ({"spans": {"image": "a.png"}, "text": None}, "not a document"),
    ({"caption": "t"}, "not a document"),
)


@pytest.mark.parametrize(("value", "expected"), WITH_PICTURES)
def test_no_line_with_a_picture_becomes_text(tmp_path, value, expected):
    (tmp_path / "a.png").write_bytes(png())
    assert items(the_reader(lines(tmp_path / "x.jsonl", value))) == [expected]


@pytest.mark.parametrize(
    "line",
    [
        '{"image": "a.png", "image": "b.png", "text": "t"}',
        '{"text": "t", "text": "u"}',
        '{"spans": [{"image": "a.png", "image": "b.png"}]}',
    ],
)
def test_a_key_that_occurs_twice_hides_nothing(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    assert items(the_reader(tmp_path / "x.jsonl")) == ["ambiguous keys"]


def test_a_link_to_itself_is_an_item_like_others(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("t")
    (tmp_path / "loop.png").symlink_to("loop.png")
    names = list_files(tmp_path).names
    assert names == ["a.png", "a.txt", "loop.png"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
        pyarrow.list_(pyarrow.uint8()),
        pyarrow.list_(pyarrow.binary()),
        pyarrow.binary(3),
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    ],
    ids=str,
)
def test_columns_that_may_hold_pictures_are_never_left_out(tmp_path, kind):
    schema = pyarrow.schema([("x", kind), ("text", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="columns that would be left out: x;"):
        the_reader(tmp_path / "x.parquet")


def test_a_column_called_after_pictures_is_never_left_out(tmp_path):
    table = pyarrow.table({"img": ["a.png"], "text": ["t"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="columns that would be left out: img;"):
        the_reader(tmp_path / "x.parquet")


def test_keys_can_be_ignored(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = lines(
        tmp_path / "x.jsonl",
        {"text": "t", "images": ["a.png"]},
        {"image": "a.png", "caption": "t", "text": "u", "original": "b.png"},
        {"spans": [{"text": "t", "image": "a.png"}]},
    )
    columns = Columns(ignored=("images", "original", "text"))
    assert items(the_reader(path, columns)) == [
        "not a document",
        (("t",), (png(),)),
        ((), (png(),)),
    ]


def test_every_picture_in_a_folder_is_an_item(tmp_path):
    """Those that no line names, and those in formats that are not read, are rejected."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.PNG", "e.tiff", "sub/f.png"):
        (tmp_path / name).write_bytes(png())
    lines(tmp_path / "captions.jsonl", {"file": "a.png", "caption": "one"})
    lines(tmp_path / "sub" / "x.jsonl", {"spans": [{"image": "./c.png"}, {"image": "../a.png"}]})
    (tmp_path / "sub" / "f.txt").write_text("two")
    (tmp_path / "notes.md").write_text("not read")
    found = {
        found.name: items(found.open()) for found in find_inputs(str(tmp_path), PLAIN, MAX_BYTES)
    }
    assert found == {
        str(tmp_path): [(("one",), (png(),))],
        f"{tmp_path} (pictures)": [
            "no caption",
            "unsupported picture format",
            "no caption",
            (("two",), (png(),)),
        ],
        f"{tmp_path}/sub/x.jsonl": [((), (png(), png()))],
    }
    first, *_ = find_inputs(str(tmp_path), PLAIN, MAX_BYTES)
    assert first.unread == ((".md", 1),)
    # As an input of its own, a file stands for its lines alone.
    assert items(the_reader(tmp_path / "captions.jsonl")) == [(("one",), (png(),))]


def test_text_beside_a_picture_that_a_line_names_is_no_document(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_text(name)
    lines(tmp_path / "captions.jsonl", {"file": "a.png", "caption": "one"})
    first, second = find_inputs(str(tmp_path), PLAIN, MAX_BYTES)
    assert items(first.open()) == [(("one",), (png(),))]
    assert items(second.open()) == [(("b",), (png(),))]
    assert first.unread == ((".txt beside pictures that have captions", 1),)


def test_one_picture_spelt_in_several_ways_is_one_document(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    names = ("a.png", "./a.png", "sub/../a.png", str(tmp_path / "a.png"))
    lines(
        tmp_path / "captions.jsonl",
        *({"file": name, "caption": str(i)} for i, name in enumerate(names)),
    )
    assert items(the_reader(tmp_path)) == [(("0", "1", "2", "3"), (png(),))]


def test_pictures_with_text_beside_them_and_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, caption in (("a", "one"), ("sub/b", "two"), ("c", None)):
        (tmp_path / f"{name}.PNG").write_bytes(png())
        if caption:
            (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "lone.txt").write_text("a text of its own")
    lines(tmp_path / "more.jsonl", {"text": "more"})
    (name, pairs), (text_name, texts), (_, more) = open_input(str(tmp_path), PLAIN)
    assert items(pairs) == [(("one",), (png(),)), "no caption", (("two",), (png(),))]
    assert items(texts) == [((), ("a text of its own",))] and text_name == f"{name} (text)"
    assert items(more) == [((), ("more",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no pair found"),
        ({"a.png": b"x"}, "no pair found.*1 pictures"),
        (None, "there is no input"),
        ({"a.csv": b""}, "no pair found"),
    ],
)
def test_folders_without_pairs(tmp_path, content, message):
    folder = tmp_path / "in"
    if content is not None:
        folder.mkdir()
    for name, data in (content or {}).items():
        (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_input(str(folder), PLAIN)


def test_a_stray_picture_is_counted_beside_what_can_be_read(tmp_path):
    (tmp_path / "banner.png").write_bytes(png())
    tar(tmp_path / "a.tar", *SAMPLES)
    (_, pictures), (_, pairs) = open_input(str(tmp_path), PLAIN)
    assert items(pictures) == ["no caption"] and len(items(pairs)) == 5
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.txt").write_text("a text")
    (_, pictures), (_, texts) = open_input(str(tmp_path), PLAIN)
    assert items(pictures) == ["no caption"] and items(texts) == [((), ("a text",))]


def test_files_of_unknown_kind(tmp_path):
    for name, message in (
        ("a.csv", "none of"),
        ("a.tar", "no tar"),
        ("a.tar.gz", "none of"),
        ("a.parquet", "Parquet"),
    ):
        (tmp_path / name).write_bytes(b"x" * 2000)
        with pytest.raises(ValueError, match=message):
            open_input(str(tmp_path / name), PLAIN)


def tar(path: Path, *members: tuple[str, bytes], mode: str = "w", **options) -> Path:
    with tarfile.open(path, mode, **options) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


SAMPLES = [
    (f"{i}.{kind}", png() if kind == "png" else f"caption {i}".encode())
    for i in range(5)
    for kind in ("png", "txt")
]


def headers(path: Path) -> dict[str, int]:
    with tarfile.open(path) as file:
        return {member.name: member.offset for member in file}


def test_tar_samples(tmp_path):
    path = tar(
        tmp_path / "x.tar",
        ("a/1.png", png()),
        ("a/1.txt", b"one"),
        ("b/1.JPG", png()),
        ("b/1.json", b'{"caption": "two"}'),
        ("3.png", png()),
        ("3.cls", b"7"),
        ("4.txt", b"no picture"),
        ("5.png", png()),
        ("5.json", b"{"),
        ("6.png", png()),
        ("6.txt", b"\xff"),
        (f"{'long' * 50}.png", png()),
        (f"{'long' * 50}.txt", b"long"),
        ("7.png", png()),
        ("7.json", b'{"captions": ["x", "y"]}'),
        ("a/1.png", png()),
        ("a/1.txt", b"again"),
        format=tarfile.PAX_FORMAT,
        pax_headers={"comment": "for all members"},
    )
    assert items(the_reader(path)) == [
        (("one",), (png(),)),
        (("two",), (png(),)),
        "no caption",
        "no image",
        "invalid JSON",
        "invalid UTF-8",
        (("long",), (png(),)),
        (("x", "y"), (png(),)),
        (("again",), (png(),)),
    ]
    with pytest.raises(ValueError, match="compressed"):
        the_reader(tar(tmp_path / "z.tar", *SAMPLES, mode="w:gz"))


def test_tar_samples_with_several_pictures_are_rejected(tmp_path):
    path = tar(
        tmp_path / "x.tar",
        ("1.before.png", png()),
        ("1.after.png", png()),
        ("1.txt", b"edit"),
        ("2.jpg", png()),
        ("2.tiff", b"x"),
        ("2.txt", b"two"),
        ("3.tiff", b"x"),
        ("3.txt", b"three"),
        ("4.png", png()),
        ("4.txt", b"four"),
    )
    several = ["several images"] * 2
    expected = [*several, "unsupported picture format", (("four",), (png(),))]
    assert items(the_reader(path)) == expected
    one = [(("edit",), (png(),)), *expected[1:]]
    for ignored in ("before", "before.png"):
        assert items(the_reader(path, Columns(ignored=(ignored,)))) == one


def test_a_second_picture_in_a_sample_s_json_is_rejected(tmp_path):
    second = (
        {"caption": "a", "image_b": "3b.png"},
        {"caption": "a", "edited": "data:image/png;base64,x"},
    )
    metadata = {
        "caption": "a", "image": "0.jpg", "file_name": "x.png", "url": "http://x/y.png", "n": 1,
        "meta": {"original_filename": "IMG_1.JPG"}, "exif": {"Image": "/9j/x"}, "more": None,
    }  # fmt: skip
    members = [(f"{i}.json", json.dumps(value).encode()) for i, value in enumerate(second)]
    path = tar(tmp_path / "x.tar", ("0.png", png()), ("1.png", png()), *members[:2])
    assert items(the_reader(path)) == ["unknown key with a picture"] * 2
    deep = b'{"caption": "a", "x": ' + b"[" * 600 + b'"0.png"' + b"]" * 600 + b"}"
    nested = tar(tmp_path / "deep.tar", ("0.png", png()), ("0.json", deep))
    assert items(the_reader(nested)) == [(("a",), (png(),))]
    ignored = Columns(ignored=("image_b", "edited"))
    assert items(the_reader(path, ignored)) == [(("a",), (png(),))] * 2
    own = tar(tmp_path / "own.tar", ("0.png", png()), ("0.json", json.dumps(metadata).encode()))
    assert items(the_reader(own)) == [(("a",), (png(),))]


@pytest.mark.parametrize("damaged", [["2.png"], ["0.png"], ["1.png", "3.txt"], ["4.txt"]])
def test_members_after_a_damaged_header_are_read(tmp_path, damaged):
    path = tar(tmp_path / "x.tar", *SAMPLES)
    content, offsets = bytearray(path.read_bytes()), headers(path)
    for name in damaged:
        content[offsets[name] + 10 : offsets[name] + 200] = b"\x55" * 190
    path.write_bytes(content)
    lost = {name[0]: "no image" if name.endswith("png") else "no caption" for name in damaged}
    expected = [lost.get(str(i), ((f"caption {i}",), (png(),))) for i in range(5)]
    assert items(the_reader(path)) == expected + ["bad tar member"] * len(damaged)


def test_a_truncated_tar_and_one_without_an_end_mark(tmp_path):
    path = tar(tmp_path / "x.tar", *SAMPLES)
    content, offsets = path.read_bytes(), headers(path)
    whole = [((f"caption {i}",), (png(),)) for i in range(5)]
    path.write_bytes(content[: offsets["4.txt"] + 1024])
    assert items(the_reader(path)) == whole
    path.write_bytes(content[: offsets["4.png"] + 600])  # inside the picture
    assert items(the_reader(path)) == [*whole[:4], "no caption"]
    path.write_bytes(content[: offsets["4.txt"] + 515])  # inside the caption
    assert items(the_reader(path)) == [*whole[:4], "truncated file"]
    path.write_bytes(content[: offsets["4.txt"] + 100])  # inside the header
    assert items(the_reader(path)) == [*whole[:4], "no caption", "bad tar member"]


def test_parquet(tmp_path):
    pictures = [{"bytes": png(), "path": None}] * 4 + [{"bytes": None, "path": "x"}, None]
    captions = [["a", "b"], ["c"], None, [], ["e"], ["f"]]
    table = pyarrow.table({"image": pictures, "caption": captions, "other": range(6)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    expected = [
        (("a", "b"), (png(),)),
        (("c",), (png(),)),
        "no caption",
        "no caption",
        "no image",
        "no image",
    ]
    assert items(the_reader(tmp_path / "x.parquet")) == expected
    table = pyarrow.table({"jpg": [png(), b""], "t": ["one", "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    named = Columns(image="jpg", caption="t", text="t")
    assert items(the_reader(tmp_path / "y.parquet", named)) == [
        (("one",), (png(),)),
        (("two",), (b"",)),
    ]
    assert items(the_reader(tmp_path / "y.parquet", Columns(text="t", ignored=("jpg",)))) == [
        ((), ("one",)),
        ((), ("two",)),
    ]
    for columns, message in (
        (Columns(), "no column image or text, only jpg, t"),
        (Columns(image="jpg"), "no column caption or text"),
        (Columns(text="t"), "columns that would be left out: jpg;"),
    ):
        with pytest.raises(ValueError, match=message):
            the_reader(tmp_path / "y.parquet", columns)


def test_no_column_with_pictures_or_text_is_left_out_unsaid(tmp_path):
    picture = {"bytes": png(), "path": None}
    columns = {
        "image": [picture],
        "after": [picture],
        "more": [[png()]],
        "caption": ["a"],
        "text": ["b"],
        "label": [1],
    }
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match="left out: after, more, text;"):
        the_reader(path)
    ignored = Columns(ignored=("after", "more", "text"))
    assert items(the_reader(path, ignored)) == [(("a",), (png(),))]
    assert items(the_reader(path, Columns(caption="text", ignored=("after", "more")))) == [
        (("b",), (png(),))
    ]
    pyarrow.parquet.write_table(pyarrow.table({"image": [png()], "text": ["b"]}), path)
    assert items(the_reader(path)) == [(("b",), (png(),))]


@pytest.mark.parametrize(
    ("more", "left"),
    [
        ({"image": [png()], "caption": ["a"], "edited_image": ["b.png"]}, "edited_image"),
        ({"image": [png()], "caption": ["a"], "image_url": ["http://x/b.png"]}, None),
        ({"image": [png()], "captions": [["a"]], "text": ["b"]}, "captions"),
        ({"text": ["a"], "extra": [{"image": "b.png", "n": 1}]}, "extra"),
        ({"text": ["a"], "extra": [{"image": "b", "n": 1}], "label": [1]}, None),
        # As in Flickr30k, COCO and FineWeb.
        (
            {"image": [{"bytes": png(), "path": "b.jpg"}], "caption": ["a"], "filename": ["b.jpg"]},
            None,
        ),
        ({"image": [png()], "caption": ["a"], "file_name": ["b.jpg"], "coco": ["c.jpg"]}, None),
        ({"image": [{"bytes": png(), "path": "b.jpg"}], "text": ["a"], "photo": ["x/B.png"]}, None),
        ({"text": ["a"], "url": ["https://x/File:Foo.jpg"], "dump": ["d"]}, None),
        ({"text": ["a"] * 3, "source": [None, "", "data:image/png;base64,x"]}, "source"),
    ],
)
def test_a_column_of_names_of_pictures_is_never_left_out(tmp_path, more, left):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(more), path)
    if left is None:
        assert len(the_reader(path)) == 1
        return
    with pytest.raises(ValueError, match=f"left out: {left};"):
        the_reader(path)
    assert len(the_reader(path, Columns(ignored=(left,)))) == len(more[left])


def test_a_damaged_row_group_is_counted_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [f"text {i} " * 50 for i in range(12)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        path,
        row_group_size=4,
        compression="zstd",
        use_dictionary=False,
    )
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[column.data_page_offset : middle] = b"\xaa" * (middle - column.data_page_offset)
    path.write_bytes(content)
    good = [((), (text,)) for text in texts]
    assert items(the_reader(path)) == [*good[:4], *["unreadable row group"] * 4, *good[8:]]


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    """A data set `tiny`, made and read without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "captions": tfds.features.Sequence(tfds.features.Text()),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                image, label = png((10 * i,) * 3), i % 2 if i else -1
                yield (
                    i,
                    {
                        "image": image,
                        "caption": f"picture {i}",
                        "label": label,
                        "captions": ["a", "b"],
                    },
                )

    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tfds, "data_source", functools.partial(tfds.data_source, data_dir=folder))
        yield


def test_tfds_without_tensorflow(tiny_tfds):
    def decoded(columns: Columns) -> list[tuple[str, list[int]]]:
        return sorted(
            (captions[0], flat(shown(data)))
            for captions, (data,) in items(the_reader("tfds:tiny", columns))
        )

    assert decoded(PLAIN) == [(f"picture {i}", [10 * i] * 3) for i in range(4)]
    labelled = items(the_reader("tfds:tiny", Columns(caption="label")))
    assert sorted(item if isinstance(item, str) else item[0][0] for item in labelled) == [
        "cat",
        "dog",
        "dog",
        "no caption",
    ]
    assert {item[0] for item in items(the_reader("tfds:tiny", Columns(caption="captions")))} == {
        ("a", "b")
    }
    assert len(the_reader("tfds:tiny:train[:3]")) == 3
    assert the_reader("tfds:tiny").digest() != the_reader("tfds:tiny:train[:3]").digest()
    text = Columns(image="none", text="caption", ignored=("image",))
    assert sorted(items(the_reader("tfds:tiny", text)))[0] == (
        (),
        ("picture 0",),
    )
    for name, columns, message in (
        ("tfds:nowhere", PLAIN, "cannot open tfds:nowhere"),
        ("tfds:tiny:test", PLAIN, "cannot open tfds:tiny:test"),
        ("tfds:tiny", Columns(image="picture"), "has no feature picture or text, only"),
        ("tfds:tiny", Columns(image="none", text="caption"), "would be left out: image;"),
    ):
        with pytest.raises(ValueError, match=message):
            the_reader(name, columns)
    assert "tensorflow" not in sys.modules


def test_an_example_that_cannot_be_read_is_counted(tiny_tfds, monkeypatch):
    reader = the_reader("tfds:tiny")
    monkeypatch.setattr(type(reader._source), "__getitem__", lambda self, index: 1 / 0)
    assert items(reader) == ["unreadable example"] * 4


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, monkeypatch, end):
    monkeypatch.setattr(texts, "TEXT_PIECE", 1000)
    rng = np.random.default_rng(0)
    text = "".join("é" * int(n) + end for n in rng.integers(0, 300, 100))
    (tmp_path / "x.txt").write_bytes(text.encode())
    pieces = [spans[0] for _, spans in items(the_reader(tmp_path / "x.txt"))]
    assert "".join(pieces) == text
    if end:
        assert len(pieces) > 10 and all(piece.endswith("\n") for piece in pieces[:-1])
        assert all(len(piece.encode()) < 1700 for piece in pieces)
    (tmp_path / "x.txt").write_bytes(b"")
    assert items(the_reader(tmp_path / "x.txt")) == [((), ("",))]
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    assert items(the_reader(tmp_path / "x.txt")) == ["invalid UTF-8"]


def digests_in(folder: Path) -> list[str]:
    """Of every input in a folder."""
    return [
        found.digest
        for path in sorted(folder.iterdir())
        for found in find_inputs(str(path), PLAIN, MAX_BYTES)
    ]


def test_digests_tell_changed_inputs_apart(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "cat"})
    tar(tmp_path / "b.tar", *SAMPLES)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["cat"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("cat")
    before = digests_in(tmp_path)
    assert digests_in(tmp_path) == before
    lines(tmp_path / "a.jsonl", {"text": "dog"})
    tar(tmp_path / "b.tar", *SAMPLES[:-2])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["dogs"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("dogs")
    assert not set(digests_in(tmp_path)) & set(before)


def test_digests_tell_texts_of_one_size_apart(tmp_path):
    def write(caption: str) -> None:
        (tmp_path / "pairs" / "a.txt").write_text(caption)
        tar(tmp_path / "b.tar", ("1.png", png()), ("1.txt", caption.encode()))
        (tmp_path / "c.txt").write_text(caption)
        (tmp_path / "long.txt").write_text((caption + "\n") * 200_000)

    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.png").write_bytes(png())
    write("a red cat")
    before = digests_in(tmp_path)
    assert len(before) == 4 and digests_in(tmp_path) == before
    write("a red dog")
    assert not set(digests_in(tmp_path)) & set(before)
    write("a red cat")
    assert digests_in(tmp_path) == before


# --- pictures ---


def shown(data: bytes, height: int = 6, width: int = 6, channels: int = 3) -> np.ndarray:
    return decode(data, height, width, channels)


def flat(pixels: np.ndarray) -> list[int]:
    """The one colour of a picture."""
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].tolist()


def test_every_mode_becomes_rgb_or_grey():
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    palette = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    see_through = Image.new("P", (8, 8), 0)
    see_through.putpalette([9, 9, 9])
    sixteen = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    clear = encoded(sixteen, "PNG", transparency=0x80FF)
    assert flat(shown(encoded(half, "PNG"))) == pytest.approx([255, 127, 127], abs=1)
    assert flat(shown(encoded(palette, "PNG"))) == [10, 200, 30]
    assert flat(shown(encoded(see_through, "PNG", transparency=0))) == [255] * 3
    assert flat(shown(encoded(sixteen, "PNG"))) == [128] * 3
    assert flat(shown(clear)) == [255] * 3
    assert flat(shown(encoded(Image.new("L", (8, 8), 77), "PNG"))) == [77] * 3
    assert flat(shown(encoded(Image.new("RGB", (8, 8), (77, 77, 77)), "PNG"), channels=1)) == [77]
    assert flat(shown(encoded(Image.new("LA", (8, 8), (0, 0)), "PNG"))) == [255] * 3
    assert flat(
        shown(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    ) == pytest.approx([255, 0, 0], abs=9)
    assert flat(shown(encoded(Image.new("1", (8, 8), 1), "PNG"))) == [255] * 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_picture_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert flat(shown(data)) == pytest.approx([250, 0, 0], abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_applied(orientation):
    pixels = np.zeros((6, 6), np.uint8)
    pixels[:2, :3], pixels[4:, :2] = 250, 120
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, 1),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(shown(data, channels=1)[..., 0], pixels)


def test_an_odd_tag_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0128] = 2  # ResolutionUnit, a number, which some programs store as text
    tags = exif.tobytes()
    number, text = bytes.fromhex("0128 0003"), bytes.fromhex("0128 0002")
    assert tags.count(number) == 1
    tags = tags.replace(number, text)
    data = encoded(Image.new("RGB", (12, 6), (10, 200, 30)), "JPEG", exif=tags)
    with pytest.raises(Exception):  # noqa: B017, PT011
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert flat(shown(data, 12, 6)) == pytest.approx([10, 200, 30], abs=3)


def test_pixels_are_from_minus_one_to_one():
    np.testing.assert_allclose(
        from_uint8(np.array([0, 51, 255], np.uint8)), [-1, -0.6, 1], atol=1e-6
    )


@pytest.mark.parametrize(
    ("w", "h", "width", "height"),
    [(90, 40, 16, 16), (40, 90, 16, 16), (64, 48, 8, 24), (10, 10, 16, 16)],
)
def test_the_crop_is_centred_and_the_resize_averages(w, h, width, height):
    pixels = np.random.default_rng(0).integers(64, 192, (h, w, 3), np.uint8)
    got = shown(encoded(Image.fromarray(pixels), "PNG"), height, width).astype(float)
    # Independently: the kernel's definition, at the places that the outputs have in the picture.
    scale = min(w / width, h / height)
    left, top = (w - width * scale) / 2, (h - height * scale) / 2
    centres = [(np.arange(n) + 0.5) * scale + at for n, at in ((height, top), (width, left))]
    weights = [cubic(c, n, max(scale, 1)) for c, n in zip(centres, (h, w), strict=True)]
    expected = np.clip(np.einsum("yh,xw,hwc->yxc", *weights, pixels.astype(float)), 0, 255)
    # Pillow rounds between its two passes, and samples nothing outside the box.
    assert np.abs(got - expected)[2:-2, 2:-2].max() < 1.5


@pytest.mark.parametrize("size", [28, 224, 299, 336, 600])
def test_no_size_of_a_good_picture_is_refused(size):
    for side in (29, 58, 116, 225, 232, 239, 301, 344, 450, 601):
        for other in (side, side + 1, 2 * side):
            for w, h in ((side, other), (other, side)):
                data = encoded(Image.new("L", (w, h), 90), "PNG")
                assert shown(data, size, size, 1).shape == (size, size, 1)


def cubic(centres: np.ndarray, size: int, scale: float) -> np.ndarray:
    """Weights [outputs, inputs] of the cubic convolution (a = -0.5) whose support grows with the
    reduction."""
    x = np.abs((np.arange(size) + 0.5)[None] - centres[:, None]) / scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def test_a_strong_reduction_shows_the_mean_not_samples():
    checkers = np.indices((512, 512)).sum(0) % 2 * 255
    got = shown(encoded(Image.fromarray(checkers.astype(np.uint8)), "PNG"), 8, 8, 1)
    np.testing.assert_allclose(got, 127.5, atol=1.5)


def test_damaged_pictures_name_their_damage():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    jpeg, webp = encoded(noise, "JPEG"), encoded(noise, "WEBP")
    broken = bytearray(encoded(noise, "PNG"))
    broken[200:260] = bytes(60)
    cases = {
        "empty image file": [b""],
        "not an image": [b"text", b"\xff\xd8", jpeg[:1]],
        "truncated image": [jpeg[: len(jpeg) // 2], encoded(noise, "PNG")[:2000]],
        "decompression bomb": [bomb],
        "corrupt image": [bytes(broken), webp[: len(webp) // 2]],
    }
    for reason, data in ((reason, data) for reason, damaged in cases.items() for data in damaged):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            shown(data)
