"""examples/convert.py: to Parquet and back with the same bits, other people's files, states in training records."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common import write_json, write_text
from examples import convert
from examples.convert import main
from hf import DTYPES
from model import LatentShards, write_shard


def make_messages(directory, dtype, n=70):
    """Messages with the values that a careless conversion loses: -0, subnormals, the largest, all the small bits."""
    generator = torch.Generator().manual_seed(0)
    sender = {"model": "tiny", "hidden_size": 6, "dtype": dtype, "format_version": 1}
    for shard in range(2):
        latents, records = {}, {}
        for i in range(shard, n, 2):
            states = torch.randn(1 + i % 4, 6, generator=generator) * 10.0 ** (i % 5 - 2)
            small, large = 1e-40 if dtype != "fp16" else 6e-8, torch.finfo(DTYPES[dtype]).max
            states[0, :4] = torch.tensor([-0.0, small, large, 1 / 3])
            latents[f"train/a/{i}"] = states.to(DTYPES[dtype])
            records[f"train/a/{i}"] = {"task": f"task {i} é", "plan": f"plan\n{i}", "plan_token_ids": [1, 2],
                                       "token_ends": [1, 6], "level": "Level 2", "sender_ms": 1.25}
        write_shard(directory / f"latents-rank00000-{shard:05d}.safetensors", latents, records, sender)
    return LatentShards(str(directory))


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_equal(tmp_path, dtype):
    pytest.importorskip("datasets")
    shards = make_messages(tmp_path / "a", dtype)
    main(["export", str(tmp_path / "a"), "--output_file", str(tmp_path / "a.parquet")])
    main(["import", str(tmp_path / "a.parquet"), "--output_dir", str(tmp_path / "b")])
    again = LatentShards(str(tmp_path / "b"))
    bits = torch.int32 if dtype == "fp32" else torch.int16
    assert all(again[k].dtype == DTYPES[dtype] and torch.equal(again[k].view(bits), shards[k].view(bits))
               for k in shards.records)
    assert again.records == shards.records and again.sender == shards.sender
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.parquet", "b"]  # nothing is left beside them


def other_rows(n=5):
    """What other tools write: nested lists of floats."""
    generator = torch.Generator().manual_seed(0)
    return [{"task_id": f"t{i}", "task": f"do {i}", "plan": f"plan {i}",
             "hidden_state": torch.randn(2 + i, 4, generator=generator).tolist()} for i in range(n)]


@pytest.mark.parametrize("how", ["parquet", "float64", "half", "id, no task", "save_to_disk", "splits", "jsonl"])
def test_import_of_nested_lists(tmp_path, how):
    datasets = pytest.importorskip("datasets")
    rows, source = other_rows(), str(tmp_path / "a [1] é")  # glob characters, which datasets would expand
    data = datasets.Dataset.from_list(rows)  # float64, what Python's floats become
    if how in ("parquet", "half"):
        number = datasets.Value("float32" if how == "parquet" else "float16")
        data = data.cast(datasets.Features(data.features | {"hidden_state": [[number]]}))
    if how == "id, no task":
        data = data.remove_columns("task").rename_column("task_id", "id")
    if how == "jsonl":
        source += ".jsonl"
        write_text(source, "\n".join(map(json.dumps, rows)))
    elif how == "save_to_disk":
        data.save_to_disk(source)
    elif how == "splits":
        datasets.DatasetDict({"dev": data}).save_to_disk(source)
    else:
        data.to_parquet(source)
    main(["import", source, "--output_dir", str(tmp_path / "o"), "--model_name_or_path", "their/sender",
          "--split", "dev"])
    shards = LatentShards(str(tmp_path / "o"))
    assert len(shards) == len(rows) and shards.sender["model"] == "their/sender"
    for row in rows:
        states = torch.tensor(row["hidden_state"], dtype=torch.float16 if how == "half" else torch.float32)
        record = shards.records[row["task_id"]]
        assert torch.equal(shards[row["task_id"]], states.float()) and record["plan"] == row["plan"]
        assert record["task"] == ("" if how == "id, no task" else row["task"])


def test_training_records_with_files_of_states(tmp_path):
    states = torch.randn(3, 8)
    np.save(tmp_path / "a.npy", states.numpy().astype(np.float64))
    save_file({"states": states.half()}, tmp_path / "b.safetensors")
    torch.save(states.bfloat16(), tmp_path / "c.pt")
    records = [{"id": n, "plan": "p", "hidden_state_path": str(tmp_path / name), "conversations": [{"from": "human"}]}
               for n, name in enumerate(("a.npy", "b.safetensors", "c.pt"))]
    write_json(str(tmp_path / "train.json"), records)
    main(["import", str(tmp_path / "train.json"), "--output_dir", str(tmp_path / "o")])
    shards = LatentShards(str(tmp_path / "o"))
    for task_id, dtype in zip("012", (torch.float32, torch.float16, torch.bfloat16)):
        assert torch.equal(shards[task_id], states.to(dtype)) and shards.records[task_id]["plan"] == "p"


@pytest.mark.parametrize("plan, mb, header", [("", 0.05, 2**26), ("é" * 400, 0.05, 2**26), ("", 512, 50_000)])
def test_shards_are_cut_where_they_are_full(tmp_path, monkeypatch, plan, mb, header):
    """A message's text counts as well: over 100 MB of header no library opens a shard."""
    monkeypatch.setattr(convert, "HEADER_LIMIT", header)
    rows = [{"id": str(n), "plan": plan, "hidden_state": [[float(n)] * 6]} for n in range(300)]
    write_json(str(tmp_path / "a.json"), rows)
    convert.import_messages(str(tmp_path / "a.json"), str(tmp_path / "b"), shard_size_mb=mb)
    shards = LatentShards(str(tmp_path / "b"))
    assert len(shards) == 300 and len(shards.files) > (20 if plan else 1)
    assert all(os.path.getsize(path) < 0.06 * 2**20 for path in shards.files)


# ---- bad input
@pytest.mark.parametrize("change, words", [
    ({"hidden_state": None}, ["t1", "hidden_state"]), ({"hidden_state": []}, ["t1", "hidden_state"]),
    ({"hidden_state": [[1.0, 2.0], [1.0]]}, ["t1", "hidden_state"]),
    ({"hidden_state": [[1.0] * 5]}, ["t1", "5 wide", "4"]),
    ({"hidden_state": [[float("nan")] * 4]}, ["t1", "NaN"]), ({"task_id": "t0"}, ["t0", "twice"]),
    ({"dtype": "int4"}, ["t1", "int4"])], ids=str)
def test_bad_rows(tmp_path, refuses, change, words):
    datasets = pytest.importorskip("datasets")
    rows = other_rows(3)
    rows[1] |= change
    rows[0] |= {"dtype": "fp32"}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    refuses(main, ["import", tmp_path / "x.parquet", "--output_dir", tmp_path / "o"], "x.parquet", *words)
    assert not (tmp_path / "o").exists()


def test_bad_files(tmp_path, refuses, monkeypatch):
    pytest.importorskip("datasets")
    out = ["--output_dir", tmp_path / "o"]
    for content, *words in (({"id": "a"}, "list of records"), ([{"text": "b"}], "row 0", "id"),
                            ([{"id": "a", "text": "b"}], "id a", "hidden_state")):
        write_json(str(tmp_path / "x.json"), content)
        refuses(main, ["import", tmp_path / "x.json", *out], "x.json", *words)
    (tmp_path / "junk.parquet").write_text("junk")
    (tmp_path / "empty").mkdir()
    for name in ("junk.parquet", "no.parquet", "empty"):
        refuses(main, ["import", tmp_path / name, *out], name, "no Parquet file", "save_to_disk")
    refuses(main, ["export", tmp_path / "empty", "--output_file", tmp_path / "y.parquet"], "no latent shards")
    make_messages(tmp_path / "a", "bf16", 4)
    refuses(main, ["import", tmp_path / "x.json", "--output_dir", tmp_path / "a"], "already holds messages")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuses(main, ["export", tmp_path / "a", "--output_file", tmp_path / "y.parquet"], "pip install pyarrow")
    refuses(main, ["import", tmp_path / "x.parquet", *out], "pip install datasets")
    assert not (tmp_path / "o").exists()


def test_a_pickle_is_not_run(tmp_path, refuses):
    """hidden_state_path may be a .pt file: tensors are read, code is not."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save(Bomb(), tmp_path / "bomb.pt")
    write_json(str(tmp_path / "x.json"), [{"id": "t1", "hidden_state_path": str(tmp_path / "bomb.pt")}])
    refuses(main, ["import", tmp_path / "x.json", "--output_dir", tmp_path / "o"], "id t1")
    assert not (tmp_path / "pwned").exists()
