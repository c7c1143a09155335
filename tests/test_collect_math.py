"""Stage 1 on MATH, and messages to and from Parquet: same ids under any filter, same bits after a round trip."""
import json
import sys
import types

import pytest
import torch

from collect import import_messages, main
from data import MATH_PROMPT, load_tasks
from model import DTYPES, LatentShards, write_shard
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
def test_hub_ids_differ_between_splits_and_subjects(monkeypatch, configs):
    def load_dataset(path, name, split):
        assert path == "someone/math"
        return [{"problem": f"{name} {split} {n}", "solution": "s"} for n in range(2)]
    fake = types.SimpleNamespace(get_dataset_config_names=lambda path: configs, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    ids = [t["id"] for split in ("train", "test") for t in load_tasks("someone/math", split=split)]
    assert len(set(ids)) == 4 * len(configs) and ids[0] == ("train/0" if len(configs) == 1 else "train/algebra/0")


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


# ---- Parquet and back

def make_messages(directory, dtype, n=70):
    """Messages with the values that a careless conversion loses: -0, subnormals, the largest, all the small bits."""
    generator, latents = torch.Generator().manual_seed(0), {}
    for i in range(n):
        H = torch.randn(1 + i % 4, 6, generator=generator) * 10.0 ** (i % 5 - 2)
        H[0, :4] = torch.tensor([-0.0, 1e-40 if dtype != "fp16" else 6e-8, torch.finfo(DTYPES[dtype]).max, 1 / 3])
        latents[f"train/a/{i}"] = H.to(DTYPES[dtype])
    records = {k: {"task": f"task {k} é", "plan": f"plan\n{k}", "plan_token_ids": [1, 2], "level": "Level 2",
                   "sender_ms": 1.25} for k in latents}
    sender = {"model": "tiny", "hidden_size": 6, "dtype": dtype, "format_version": 1}
    for number, ids in enumerate((list(latents)[::2], list(latents)[1::2])):
        write_shard(directory / f"latents-rank00000-{number:05d}.safetensors", {k: latents[k] for k in ids},
                    {k: records[k] for k in ids}, sender)
    return LatentShards(str(directory))


def assert_same_bits(a, b):
    assert set(a.records) == set(b.records)
    for k in a.records:
        bits = torch.int32 if a[k].dtype == torch.float32 else torch.int16
        assert a[k].dtype == b[k].dtype and torch.equal(a[k].view(bits), b[k].view(bits))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    pytest.importorskip("datasets")
    shards = make_messages(tmp_path / "a", dtype)
    main(["export", str(tmp_path / "a"), "--output_file", str(tmp_path / "a.parquet")])
    main(["import", str(tmp_path / "a.parquet"), "--output_dir", str(tmp_path / "b")])
    again = LatentShards(str(tmp_path / "b"))
    assert_same_bits(shards, again)
    assert again.records == shards.records and again.sender == shards.sender


def other_rows(n=5):
    """What other tools write: nested lists of floats."""
    generator = torch.Generator().manual_seed(0)
    return [{"task_id": f"t{i}", "task": f"do {i}", "plan": f"plan {i}",
             "hidden_state": torch.randn(2 + i, 4, generator=generator).tolist()} for i in range(n)]


@pytest.mark.parametrize("how", ["parquet", "float64", "half", "id, no task", "save_to_disk", "splits"])
def test_import_of_nested_lists(tmp_path, how):
    datasets = pytest.importorskip("datasets")
    rows, source = other_rows(), str(tmp_path / "a [1] é")  # glob characters, which datasets would expand
    data = datasets.Dataset.from_list(rows)  # float64, what Python's floats become
    if how in ("parquet", "half"):
        number = datasets.Value("float32" if how == "parquet" else "float16")
        data = data.cast(datasets.Features(data.features | {"hidden_state": [[number]]}))
    if how == "id, no task":
        data = data.remove_columns("task").rename_column("task_id", "id")
    if how == "save_to_disk":
        data.save_to_disk(source)
    elif how == "splits":
        datasets.DatasetDict({"train": data}).save_to_disk(source)
    else:
        data.to_parquet(source)
    main(["import", source, "--output_dir", str(tmp_path / "o"), "--model_name_or_path", "their/sender"])
    shards = LatentShards(str(tmp_path / "o"))
    assert set(shards.records) == {r["task_id"] for r in rows} and shards.sender["model"] == "their/sender"
    for r in rows:
        states = torch.tensor(r["hidden_state"], dtype=torch.float16 if how == "half" else torch.float32)
        assert torch.equal(shards[r["task_id"]], states.float())
        assert shards.records[r["task_id"]]["plan"] == r["plan"]
        assert shards.records[r["task_id"]]["task"] == ("" if how == "id, no task" else r["task"])


def test_large_imports_are_written_in_parts(tmp_path):
    pytest.importorskip("datasets")
    shards = make_messages(tmp_path / "a", "bf16", 300)
    main(["export", str(tmp_path / "a"), "--output_file", str(tmp_path / "a.parquet")])
    import_messages(str(tmp_path / "a.parquet"), str(tmp_path / "b"), shard_size_mb=0.004)
    again = LatentShards(str(tmp_path / "b"))
    assert_same_bits(shards, again)
    sizes = [sum(again[k].nbytes for k in again.records if again.shard_of[k] == path)
             for path in sorted(set(again.shard_of.values()))]
    assert len(sizes) == 3 and all(4194 <= size < 4194 + 48 for size in sizes[:-1])  # a message has at most 48 bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.parquet", "b"]  # nothing is left beside them


# ---- bad input

@pytest.mark.parametrize("change, words", [
    ({"hidden_state": None}, ["t1", "hidden_state"]), ({"hidden_state": []}, ["t1", "hidden_state"]),
    ({"hidden_state": [[1.0, 2.0], [1.0]]}, ["t1", "hidden_state"]),
    ({"hidden_state": [[1.0] * 5]}, ["t1", "5 wide", "4"]),
    ({"hidden_state": [[float("nan")] * 4]}, ["t1", "NaN"]), ({"task_id": "t0"}, ["t0", "twice"]),
    ({"dtype": "int4"}, ["t1", "int4"])], ids=str)
def test_bad_rows_to_import(tmp_path, refuses, change, words):
    datasets = pytest.importorskip("datasets")
    rows = other_rows(3)
    rows[1] |= change
    rows[0] |= {"dtype": "fp32"}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    refuses(main, ["import", tmp_path / "x.parquet", "--output_dir", tmp_path / "o"], "x.parquet", *words)
    assert not (tmp_path / "o").exists()


def test_bad_files(data, tmp_path, refuses, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = ["--output_dir", tmp_path / "o"]
    parquet.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "x.parquet")
    (tmp_path / "junk.parquet").write_text("junk")
    (tmp_path / "empty").mkdir()
    refuses(main, ["import", tmp_path / "x.parquet", *out], "hidden_state", "id, text")
    refuses(main, ["import", tmp_path / "junk.parquet", *out], "junk.parquet", "not a Parquet file")
    refuses(main, ["import", tmp_path / "no.parquet", *out], "no file", "no.parquet")
    refuses(main, ["export", tmp_path / "empty", "--output_file", tmp_path / "y.parquet"], "no latent shards")
    make_messages(tmp_path / "a", "bf16", 4)
    refuses(main, ["import", tmp_path / "x.parquet", "--output_dir", tmp_path / "a"], "already holds messages")
    base = ["math", "--model_name_or_path", "/nowhere/m", *out, "--dataset_path"]
    refuses(main, [*base, tmp_path / "x.parquet"], "id a", "'problem'", "--task_field")
    refuses(main, [*base, tmp_path / "junk.parquet"], "junk.parquet", "Parquet")
    refuses(main, [*base, tmp_path / "no.parquet"], "no file or directory")
    refuses(main, [*base, data, "--split", "dev"], "dev", "['test', 'train']")
    refuses(main, [*base, data, "--subjects", "poetry"], "poetry", "Geometry")
    refuses(main, [*base, data, "--question_template", "x"], "--question_template", "{task}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses(main, ["export", tmp_path / "a", "--output_file", tmp_path / "y.parquet"], "pip install datasets")
    refuses(main, ["import", tmp_path / "x.parquet", *out], "pip install datasets")
    refuses(main, [*base, "someone/math"], "pip install datasets")
    refuses(main, ["import", tmp_path / "empty", *out], "pip install datasets")
    assert not (tmp_path / "o").exists()


def test_unknown_hub_dataset(tmp_path, refuses, monkeypatch):
    def get_dataset_config_names(path):
        raise ConnectionError("offline\nmore")
    fake = types.SimpleNamespace(get_dataset_config_names=get_dataset_config_names)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    refuses(main, ["math", "--model_name_or_path", "m", "--output_dir", tmp_path / "o", "--dataset_path", "some/math"],
            "no file or directory some/math", "offline")
