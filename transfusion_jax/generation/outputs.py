"""Answers of the engine as files: `outputs.jsonl` and the pictures it names."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transfusion_jax.files import write_atomic
from transfusion_jax.images import write_image


def write_outputs(
    out: Path, prompts: Sequence[str], answers: Sequence[Sequence[str | np.ndarray]]
) -> str:
    """Writes `0.png`, `1.png`, ... and, last, `outputs.jsonl`; returns the text of the latter.

    One line for each answer: `{"prompt": "a cat", "spans": [{"text": "..."}, {"image": "0.png"}]}`.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    pictures = 0
    for prompt, spans in zip(prompts, answers, strict=True):
        written = []
        for span in spans:
            if isinstance(span, str):
                written.append({"text": span})
                continue
            write_image(out / f"{pictures}.png", span)
            written.append({"image": f"{pictures}.png"})
            pictures += 1
        lines.append({"prompt": prompt, "spans": written})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(out / "outputs.jsonl", text.encode())
    return text
