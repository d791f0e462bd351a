"""The same study on POPE's own file format and on a data set with the columns of lmms-lab/POPE."""

import json

import datasets
import pandas as pd
import pytest

from interp_vlm.data import digit_scenes
from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings

SCENES = digit_scenes(n=24, kinds=["existence"])


def pope_file(folder):
    (folder / "val2014").mkdir()
    rows = []
    for number, scene in enumerate(SCENES):
        scene.image.save(folder / "val2014" / f"{scene.group}.png")
        row = {"question_id": number, "image": f"{scene.group}.png", "text": scene.question, "label": scene.answer}
        rows.append(json.dumps(row))
    (folder / "adversarial.json").write_text("\n".join(rows) + "\n")
    return f"pope:{folder}/adversarial.json?images={folder}/val2014"


def hub_folder(folder):
    columns = {
        "id": [str(number) for number in range(len(SCENES))],
        "question_id": [str(number) for number in range(len(SCENES))],
        "question": [scene.question for scene in SCENES],
        "answer": [scene.answer for scene in SCENES],
        "image_source": [scene.group for scene in SCENES],
        "image": [scene.image for scene in SCENES],
        "category": ["adversarial"] * len(SCENES),
    }
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.save_to_disk(str(folder / "pope"))
    return f"hf:{folder}/pope"


@pytest.mark.parametrize("source", [pope_file, hub_folder])
def test_a_study_of_pope(source, tmp_path):
    settings = Settings(models=("testbed:llava",), data=source(tmp_path), draws=2)
    report = run_study(settings, tmp_path / "run", workers=1)
    examples = pd.read_parquet(report.parent / "examples" / "accuracy.parquet")
    # One picture in ten, here one, is set aside as reference for the masks.
    assert len(examples) == 18
    assert examples["group"].nunique() == 3
    assert examples["correct"].mean() > 0.6
    assert {path.name for path in (report.parent / "tables").glob("*.csv")} == {
        f"{name}.csv" for name in (*settings.experiments, "claims") if name not in ("patching", "neurons")
    }
