"""Are drawn emoji of the group that was asked for? Judged by a classifier of the real ones.

    python experiments/emoji_groups.py runs/emoji data/raw/emoji_groups.json

Groups are Unicode's: smileys, people, animals, food, places, activities, objects, symbols, flags.
The judge is a support-vector machine on the pixels of the real training pictures. Its own accuracy
is that on pictures none of whose sisters (other skin tones, other genders) it has seen. Drawn are
names of training pictures, equally many of each group, and every name that was held out. Means are
over groups, so a model that ignores captions is right once in nine times.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
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


def drawn_right(engine: Engine, judge: SVC, names: Sequence[str], group: str) -> float:
    """The share of names whose drawing the judge takes for one of the group."""
    answers = engine.generate([(name,) for name in names], draw=True)
    pictures = [only_picture(spans) for spans in answers]
    drawn = [np.clip(picture, -1, 1).ravel() for picture in pictures if picture is not None]
    return float(np.sum(judge.predict(drawn) == group)) / len(names) if drawn else 0.0


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

    judge = SVC(C=10.0, class_weight="balanced")
    families = [family(name) for name in names]
    without_sisters = cross_val_predict(
        judge, images, labels, groups=families, cv=StratifiedGroupKFold(5)
    )
    judge.fit(images, labels)

    print(f"{arguments.run}, step {step}: {len(names)} training pictures")
    print(f"{'group':16} {'pictures':>8} {'the judge':>10} {'drawn':>6} {'held out':>9}")
    rng = np.random.default_rng(0)
    shares = []
    for group in judge.classes_:
        own = np.flatnonzero(labels == group)
        chosen = rng.choice(own, min(DRAWN, len(own)), replace=False)
        unseen = [name for name in held_out if group_of[name] == group]
        right = (
            float(np.mean(without_sisters[own] == group)),
            drawn_right(engine, judge, [names[i] for i in chosen], group),
            drawn_right(engine, judge, unseen, group) if unseen else np.nan,
        )
        shares.append(right)
        print(f"{group:16} {len(own):8} " + "{:10.0%} {:6.0%} {:9.0%}".format(*right), flush=True)
    means = np.nanmean(shares, axis=0)
    print(f"{'mean':16} {'':8} " + "{:10.0%} {:6.0%} {:9.0%}".format(*means))
    times = means[1:] * len(judge.classes_)
    print("times chance: {:.1f} drawn, {:.1f} held out".format(*times))


if __name__ == "__main__":
    main()
