"""Local folders of MMMU- and MMBench-shaped parquet files, as the stock tasks read them where they are run.

The columns are those that lmms-eval's task code reads; they were not compared with the files on the hub. The rows are
made up, the awkward ones after the plain ones.
"""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

ROWS = 6
MMMU = "lmms-lab-encoder/MMMU"
MMBENCH = "lmms-lab-encoder/MMBench"


def _picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, mode="RGBA").convert(mode)


def _row(split: str, number: int, subject: str = "Accounting", **changed: object) -> dict[str, object]:
    multiple_choice = number % 2 == 0
    return {
        "id": f"{split}_{subject}_{number}",
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
    } | changed


def _awkward_rows(split: str) -> list[dict[str, object]]:
    """Pictures of other modes and sizes, several of them, in the options, and one that is named but not there."""
    return [
        _row(split, 10, "Music", image_1=_picture(10, "RGBA"), answer="C"),
        _row(split, 12, "Music", image_1=_picture(12, "P"), answer="B", options="['yes', 'no']"),
        _row(split, 14, "Music", image_1=_picture(14, "L", (1, 1)), answer="D"),
        _row(split, 16, "Art_Theory", question="<image 1> and <image 2> show what?", image_2=_picture(17), answer="B"),
        _row(split, 18, "Art_Theory", question="Which of <image 2> fits <image 1>?", image_2=_picture(19)),
        _row(
            split, 20, "Math", options="['<image 1>', 'it is <image 2>']", question="Which one?", image_2=_picture(21)
        ),
        _row(split, 22, "Math", question="Compare <image 1> with <image 2>."),  # there is no second picture
    ]


def write_mmmu(root: Path, *, awkward: bool = False) -> None:
    """Write `lmms-lab-encoder/MMMU` under `root`: three splits of `ROWS` rows, and the awkward ones if asked for."""
    text, image = datasets.Value("string"), datasets.Image()
    features = datasets.Features(
        {name: image if name.startswith("image_") else text for name in _row("dev", 0)},
    )
    folder = root / MMMU / "data"
    folder.mkdir(parents=True)
    for split in ("dev", "validation", "test"):
        rows = [_row(split, number) for number in range(ROWS)] + (_awkward_rows(split) if awkward else [])
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def _mmbench_row(index: int, answer: str, options: tuple[str, ...], **changed: object) -> dict[str, object]:
    letters = dict(zip("ABCD", (*options, *["nan"] * 4), strict=False))
    return {
        "index": index,
        "question": f"图中第{index % 1_000_000}个物体是什么颜色？",  # noqa: RUF001
        "hint": "请看图。",
        "answer": answer,
        **letters,
        "category": "attribute_recognition",
        "image": _picture(index % 1_000_000),
        "source": "made up",
        "L2-category": "finegrained_perception (instance-level)",
        "comment": "",
        "split": "dev",
    } | changed


def write_mmbench_cn(root: Path) -> None:
    """Write the configuration `cn` of `lmms-lab-encoder/MMBench` under `root`: 5 questions of 4 pictures."""
    rows = [
        _mmbench_row(1, "A", ("红色", "蓝色", "绿色", "黄色")),
        _mmbench_row(2, "B", ("红色", "蓝色"), image=_picture(2, "RGBA")),
        _mmbench_row(3, "C", ("一", "二", "三"), image=_picture(3, "P")),
        _mmbench_row(4, "D", ("左", "右", "上", "下"), image=_picture(4, "RGB", (1, 1))),
        _mmbench_row(5, "A", ("红色", "蓝色", "绿色"), hint=None, image=_picture(1)),  # the picture of the first
        _mmbench_row(1_000_001, "B", ("黄色", "红色", "蓝色", "绿色")),
        _mmbench_row(1_000_002, "A", ("蓝色", "红色")),
    ]
    text = datasets.Value("string")
    kinds = {"index": datasets.Value("int64"), "image": datasets.Image()}
    features = datasets.Features({name: kinds.get(name, text) for name in rows[0]})
    folder = root / MMBENCH / "cn"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "dev-00000-of-00001.parquet")
    card = "configs:\n- config_name: cn\n  data_files:\n  - split: dev\n    path: cn/dev-*\n"
    (root / MMBENCH / "README.md").write_text(f"---\n{card}---\n")
