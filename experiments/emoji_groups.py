"""Are drawn emoji of the group that was asked for? Judged by a classifier of the real ones.

    python experiments/emoji_groups.py runs/emoji data/raw/emoji_groups.json

Groups are Unicode's: smileys, people, animals, food, places, activities, objects, symbols, flags.
The judge is a support-vector machine on the pixels of real training pictures, five of them, each of
which has seen none of a fifth of the families (sisters: other skin tones, other genders). A
picture, real or drawn, is judged by the one that has seen no sister of it, so that a copy of a
training picture is no easier than another. Drawn are names of training pictures, equally many of
each group, and every name that was held out. Means are over groups, so a model that ignores
captions is right once in nine times.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.svm import SVC

from transfusion_jax.data.sources.dataset import Dataset, open_dataset
from transfusion_jax.evaluation.answers import only_picture
from transfusion_jax.generation.engine import Engine, load_engine

DRAWN = 20
"""Captions of each group."""


def pictures(dataset: Dataset, split: str) -> tuple[list[str], np.ndarray]:
    """The first caption of every picture, which is its name; and the pictures, flat."""
    found = [dataset.record(number) for number in dataset.numbers(split).tolist()]
    names = [dataset.tokenizer.decode(record.captions[0].tolist()) for record in found]
    images = dataset.images([record.spans[0][1] for record in found])
    return names, images.reshape(len(images), -1)


SISTERS = re.compile(
    r"\b(wo)?m[ae]n\b|\bpe(rson|ople)\b|\band\b|\bfacing right\b|(?<=\bmer)(maid|man|person)\b"
    r"|\b(Santa|Mrs\.|Mx)(?= Claus)|(?<=\bprince)ss\b|,"
)
"""What sisters differ in, before a colon."""


def family(name: str) -> str:
    """What sisters have in common: of "woman surfing: light skin tone" it is "surfing"."""
    if not name.startswith(("flag:", "keycap:")):
        name = name.partition(":")[0]
    return " ".join(SISTERS.sub("", name).split())


@dataclass(frozen=True)
class Judges:
    """Classifiers of the real pictures, each of which has not seen some families."""

    judges: list[SVC]
    unseen: dict[str, int]
    """Family -> the judge that has not seen it."""

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, families: Sequence[str]) -> "Judges":
        judges, unseen = [], {}
        for seen, others in StratifiedGroupKFold(5).split(images, labels, families):
            judge = SVC(C=10.0, class_weight="balanced")
            judges.append(judge.fit(images[seen], labels[seen]))
            unseen |= {families[i]: len(judges) - 1 for i in others.tolist()}
        return cls(judges, unseen)

    def right(
        self, pictures: Sequence[np.ndarray | None], names: Sequence[str], group: str
    ) -> float:
        """The share of pictures, flat, that are taken for one of the group; None is wrong."""
        found = [
            picture is not None
            and self.judges[self.unseen.get(family(name), 0)].predict(picture[None])[0] == group
            for picture, name in zip(pictures, names, strict=True)
        ]
        return float(np.mean(found))


def drawn(engine: Engine, names: Sequence[str]) -> list[np.ndarray | None]:
    """A picture of each name, flat; None where there is not one picture alone."""
    answers = engine.generate([(name,) for name in names], draw=True)
    pictures = map(only_picture, answers)
    return [None if picture is None else np.clip(picture, -1, 1).ravel() for picture in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("groups", type=Path, metavar="FILE", help="that fetch_emoji.py wrote")
    arguments = parser.parse_args()
    group_of = json.loads(arguments.groups.read_text())
    engine, step = load_engine(arguments.run, print)
    dataset = open_dataset(engine.experiment.data.sources[0].name)
    names, images = pictures(dataset, "train")
    held_out, _ = pictures(dataset, "held_out")
    labels = np.asarray([group_of[name] for name in names])

    judges = Judges.of(images, labels, [family(name) for name in names])
    print(f"{arguments.run}, step {step}: {len(names)} training pictures")
    print(f"{'group':16} {'pictures':>8} {'the judge':>10} {'drawn':>6} {'held out':>9}")
    rng = np.random.default_rng(0)
    shares = []
    groups = np.unique(labels).tolist()
    for group in groups:
        own = np.flatnonzero(labels == group).tolist()
        chosen = [names[i] for i in rng.choice(own, min(DRAWN, len(own)), replace=False)]
        unseen = [name for name in held_out if group_of[name] == group]
        right = (
            judges.right(images[own], [names[i] for i in own], group),
            judges.right(drawn(engine, chosen), chosen, group),
            judges.right(drawn(engine, unseen), unseen, group) if unseen else np.nan,
        )
        shares.append(right)
        print(f"{group:16} {len(own):8} " + "{:10.0%} {:6.0%} {:9.0%}".format(*right), flush=True)
    means = np.nanmean(shares, axis=0)
    print(f"{'mean':16} {'':8} " + "{:10.0%} {:6.0%} {:9.0%}".format(*means))
    times = means[1:] * len(groups)
    print("times chance: {:.1f} drawn, {:.1f} held out".format(*times))


if __name__ == "__main__":
    main()
