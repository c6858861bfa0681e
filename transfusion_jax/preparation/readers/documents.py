"""Documents that JSON describes; nothing that names a picture becomes a document without it.

{"text": "..."}                                                         text
{"file": "a.jpg", "caption": "..."}  or  "captions": ["...", "..."]     a pair
{"spans": [{"image": "a.png"}, {"text": "remove it"}, {"image": "b.png"}]}     any mix; here an edit

`image` and `file_name` mean `file`, and beside a picture `text` means `caption`. Other keys are
metadata, unless they seem to hold a picture: then the object is rejected.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Set
from typing import Any

from transfusion_jax.preparation.readers.folder import Folder
from transfusion_jax.preparation.readers.raw import (
    Picture,
    Raw,
    Rejected,
    is_picture,
    string_of,
    text_of,
)

FILE_KEYS = ("file", "file_name", "image")
TEXT_KEYS = ("caption", "captions", "text")
PICTURE_WORDS = frozenset(
    "image images img imgs picture pictures photo photos pixel pixels pic pics jpg jpeg png webp "
    "gif bmp".split()
)
FILE_NAME_KEYS = frozenset("files file_names filename filenames".split())
DESCRIBING_WORDS = frozenset(
    "file files filename name names path paths id ids url urls uri".split()
)
"""In keys of what describes a picture: `image_path`, `pictureId`."""
BASE64_STARTS = ("iVBORw0KG", "/9j/", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF and WebP


def json_of(content: bytes, name: str) -> Any:
    """The value of a JSON text; raises Rejected if it is none, or names a key twice."""
    text = text_of(content, name)
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except KeyError as error:
        raise Rejected("ambiguous keys", name, content) from error
    except (ValueError, RecursionError) as error:
        raise Rejected("invalid JSON", name, content) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise KeyError("a key occurs twice")
    return value


def names_picture(key: str) -> bool:
    """Whether a key or column is called after pictures: `img`, `image_id`, `photoURL`."""
    return key.lower() in FILE_NAME_KEYS or not _words(key).isdisjoint(PICTURE_WORDS)


def _words(key: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)}


def holds_another_picture(metadata: Any, own: str, key: str = "") -> bool:
    """Whether what stands beside a picture, in a tar's JSON or a table's cells, holds a second one:
    encoded, or named under a key that is called after pictures (`edited_image`, not `file_name`).

    Args:
      own: the stem of the picture's file, whatever its ending; empty where it has none.
      key: what `metadata` stands under.
    """
    waiting = [(key, metadata)]
    while waiting:
        key, found = waiting.pop()
        if key.lower() == "exif":
            continue
        if isinstance(found, dict):
            waiting += found.items()
        elif isinstance(found, list):
            waiting += ((key, value) for value in found)
        elif isinstance(found, str) and _is_another_picture(found, own, key):
            return True
    return False


def _is_another_picture(text: str, own: str, key: str) -> bool:
    if text.startswith(("data:image/", *BASE64_STARTS)):
        return True
    words = _words(key)
    called = not words.isdisjoint(PICTURE_WORDS) and words.isdisjoint(DESCRIBING_WORDS)
    stem = os.path.basename(text).partition(".")[0].lower()
    return called and is_picture(text) and "://" not in text and stem != own.lower()


def document_of(content: bytes, name: str, folder: Folder, at: str, ignored: Set[str]) -> Raw:
    """The document of one JSON object.

    Args:
      name: of the item.
      at: the folder within `folder` that the names of files are relative to.
      ignored: keys that are as good as absent.

    Raises:
      Rejected: it is none, it is more than one, or it seems to hold a picture that is not in it.
    """
    value = json_of(content, name)
    if not isinstance(value, dict):
        raise Rejected("not a document", name, content)
    value = _present(value, ignored)
    files = [key for key in FILE_KEYS if key in value]
    texts = [key for key in TEXT_KEYS if key in value]
    spans = value.get("spans")
    if len(files) > 1 or len(texts) > 1 or (spans is not None and files + texts):
        raise Rejected("ambiguous keys", name, content)
    metadata = {key: v for key, v in value.items() if key not in (*files, *texts, "spans")}
    if _holds_picture(metadata, beside_picture=bool(files) or _has_picture(spans)):
        raise Rejected("unknown key with a picture", name, content)
    if files:
        picture = _picture(value[files[0]], name, folder, at, content)
        return Raw(value[files[0]], (picture,), captions_of(value, value[files[0]]))
    if isinstance(spans, list) and spans:
        return Raw(name, tuple(_span(span, name, folder, at, ignored, content) for span in spans))
    if texts == ["text"]:
        return Raw(name, (string_of(value["text"], name),))
    raise Rejected("not a document", name, content)


def captions_of(value: Any, name: str) -> tuple[str, ...]:
    """The captions of an object with `caption`, `captions` or `text`: a string or a list of them.

    Raises:
      Rejected: it has none, it has several of these keys, or a caption is no text.
    """
    value = value if isinstance(value, dict) else {}
    found = [value[key] for key in TEXT_KEYS if value.get(key) is not None]
    if len(found) > 1:
        raise Rejected("ambiguous keys", name)
    if not found or found == [[]]:
        raise Rejected("no caption", name)
    captions = found[0] if isinstance(found[0], list) else found
    return tuple(string_of(caption, name) for caption in captions)


def _has_picture(spans: Any) -> bool:
    spans = spans if isinstance(spans, list) else []
    return any(isinstance(span, dict) and any(key in span for key in FILE_KEYS) for span in spans)


def _span(
    value: Any, name: str, folder: Folder, at: str, ignored: Set[str], content: bytes
) -> str | Picture:
    if isinstance(value, str):
        return value
    value = _present(value, ignored) if isinstance(value, dict) else {}
    known = [key for key in (*FILE_KEYS, "text") if key in value]
    metadata = {key: v for key, v in value.items() if key not in known}
    if len(known) != 1 or _holds_picture(metadata, beside_picture=known != ["text"]):
        raise Rejected("not a document", name, content)
    if known == ["text"]:
        return string_of(value["text"], name)
    return _picture(value[known[0]], name, folder, at, content)


def _picture(file: Any, name: str, folder: Folder, at: str, content: bytes) -> Picture:
    if not isinstance(file, str) or not file:
        raise Rejected("not a document", name, content)
    path = os.path.join(at, file)
    return Picture(functools.partial(folder.read, path, file), path)


def _present(value: dict, ignored: Set[str]) -> dict:
    return {key: v for key, v in value.items() if v is not None and key not in ignored}


def _holds_picture(metadata: dict, beside_picture: bool) -> bool:
    """Whether a value seems to be a picture or the name of one.

    Beside a picture, keys such as `image_id` and `image_url` describe it, and only what looks like
    another picture counts. With text alone, whatever is called after pictures does: it would be
    left out.
    """
    for key, value in metadata.items():
        named = not beside_picture and names_picture(key)
        if named and value and isinstance(value, str | list | dict):  # a number is metadata
            return True
        for text in map(str.strip, _strings(value)):
            if beside_picture and "://" in text:
                continue
            file = text.partition("?")[0].partition("#")[0].strip()
            if text.startswith(("data:image/", *BASE64_STARTS)) or is_picture(file):
                return True
    return False


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, however deep."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
