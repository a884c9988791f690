"""A local folder of MMMU-shaped parquet files, as the stock task reads them where it is run; the rows are made up.

The columns are those that lmms-eval's task code reads; they were not compared with the files on the hub.
"""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

ROWS = 6


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8))


def _row(split: str, number: int) -> dict[str, object]:
    multiple_choice = number % 2 == 0
    return {
        "id": f"{split}_Accounting_{number}",
        "question": f"What is <image 1> number {number}?",
        "options": "['one', 'two', 'three', 'four']" if multiple_choice else "[]",
        "explanation": "",
        "image_1": _picture(number),
        **{f"image_{other}": None for other in range(2, 8)},
        "img_type": "['Tables']",
        "answer": "A" if multiple_choice else "7",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if multiple_choice else "open",
        "subfield": "none",
    }


def write_mmmu(root: Path) -> None:
    """Write `lmms-lab-encoder/MMMU` under `root`: three splits of `ROWS` rows."""
    text, image = datasets.Value("string"), datasets.Image()
    features = datasets.Features(
        {name: image if name.startswith("image_") else text for name in _row("dev", 0)},
    )
    folder = root / "lmms-lab-encoder" / "MMMU" / "data"
    folder.mkdir(parents=True)
    for split in ("dev", "validation", "test"):
        rows = [_row(split, number) for number in range(ROWS)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
