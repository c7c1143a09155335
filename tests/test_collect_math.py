"""Stage 1 on MATH: the same ids under any filter, the files and hub datasets that hold it, and those that do not."""
import json
import sys
import types

import pytest

from collect import main
from data import MATH_PROMPT, load_tasks
from model import LatentShards
from test_eval_math import SUBJECTS, write_math
from tiny import save_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("math")
    write_math(root / "MATH", "train", 3)
    return write_math(root / "MATH", "test", 5)


# ---- tasks
def test_directory_of_math(data):
    tasks = load_tasks(data, split="test")
    assert {t["id"] for t in tasks} == {f"test/{s}/{5 * n}" for s in SUBJECTS for n in range(1, 6)}
    assert {t["type"] for t in tasks[:7]} == set(SUBJECTS.values())  # the first N are a mix of subjects
    assert tasks[0]["level"] == "Level 1" and tasks[0]["task"].endswith("?") and "\\boxed" in tasks[0]["reply"]
    assert not {t["id"] for t in tasks} & {t["id"] for t in load_tasks(data, split="train")}


@pytest.mark.parametrize("kind", ["directory", "json", "jsonl", "parquet"])
def test_ids_do_not_depend_on_subjects(data, tmp_path, kind):
    tasks = load_tasks(data, split="test")
    records = [{"problem": t["task"], "solution": t["reply"], "type": t["type"]} for t in tasks]
    path = data if kind == "directory" else str(tmp_path / f"math.{kind}")
    if kind == "json":
        (tmp_path / "math.json").write_text(json.dumps(records))
    if kind == "jsonl":
        (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, records)))
    if kind == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(records), path)
    every = {t["task"]: t["id"] for t in load_tasks(path, split="test")}
    for names in (["counting_and_probability", "Geometry"], ["Counting & Probability", "geometry"]):
        some = load_tasks(path, split="test", subjects=names, max_samples=4)
        assert len(every) == 35 and len(some) == 4 and all(every[t["task"]] == t["id"] for t in some)
        assert {t["type"] for t in some} == {"Counting & Probability", "Geometry"}


@pytest.mark.parametrize("configs", [["default"], ["algebra", "geometry"]])
def test_hub_datasets_with_and_without_subjects(monkeypatch, configs):
    def load_dataset(path, name, split):
        assert path == "someone/math"
        return [{"problem": f"{name} {split} {n}", "solution": "s"} for n in range(2)]
    fake = types.SimpleNamespace(get_dataset_config_names=lambda path: configs, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    tasks = load_tasks("someone/math", split="train") + load_tasks("someone/math", split="test")
    assert [t["task"] for t in tasks] == [
        f"{name} {split} {n}" for split in ("train", "test") for name in configs for n in range(2)]
    assert len({t["id"] for t in tasks}) == 4 * len(configs)


def test_collect_math(data, tmp_path):
    sender = save_model(tmp_path / "sender")
    main(["math", "--model_name_or_path", sender, "--dataset_path", data, "--output_dir", str(tmp_path / "o"),
          "--subjects", "precalculus", "--max_new_tokens", "4", "--torch_dtype", "fp32"])
    shards, train = LatentShards(str(tmp_path / "o")), json.load(open(tmp_path / "o" / "train.json"))
    tasks = {t["id"]: t for t in load_tasks(data, subjects=["Precalculus"])}
    assert {k: (r["task"], r["level"], r["type"]) for k, r in shards.records.items()} == {
        f"train/precalculus/{3 * n}": (tasks[f"train/precalculus/{3 * n}"]["task"], f"Level {n}", "Precalculus")
        for n in range(1, 6)}
    for row in train:
        task = tasks[row["id"]]
        assert [t["value"] for t in row["conversations"]] == [
            task["task"] + "\nPut the final answer in \\boxed{}.", task["reply"]]
    prompt = shards.sender["prompt_template"]
    assert prompt == MATH_PROMPT and "plan" in prompt and "do not state the answer" in prompt


# ---- bad input
def test_bad_files_and_hub_datasets(tmp_path, refuses, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "x.parquet")
    (tmp_path / "junk.parquet").write_text("junk")
    base = ["math", "--model_name_or_path", "/nowhere/m", "--output_dir", tmp_path / "o", "--dataset_path"]
    refuses(main, [*base, tmp_path / "x.parquet"], "id a", "--task_field")
    refuses(main, [*base, tmp_path / "junk.parquet"], "junk.parquet", "Parquet")
    refuses(main, [*base, tmp_path / "no.parquet"], "no file or directory")

    def get_dataset_config_names(path):
        raise ConnectionError("offline\nmore")
    fake = types.SimpleNamespace(get_dataset_config_names=get_dataset_config_names)
    for datasets, words in ((None, ["pip install datasets"]), (fake, [
            "some/math is not a", "hub dataset with a split train", "offline"])):
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        refuses(main, [*base, "some/math"], *words)
    assert not (tmp_path / "o").exists()
