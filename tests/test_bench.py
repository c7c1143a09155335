"""The benchmark at a miniature shape: both sides do the same work, every row is complete, the GPU's command runs."""
import json
import math

import pytest

import bench


def rows_of(path):
    with open(path) as file:
        return json.load(file)["rows"]


@pytest.mark.parametrize("name, count", [("collect", 1), ("compress", 3), ("eval", 1)])
def test_every_benchmark_writes_complete_rows(name, count, tmp_path):
    bench.main([name, "--shape", "tiny", "--repeats", "1", "--json", str(tmp_path / "rows.json")])  # checks both sides
    rows = rows_of(tmp_path / "rows.json")
    assert len(rows) == count == len({row["name"] for row in rows})
    for row in rows:
        assert row["ours_s"] > 0 and math.isclose(row["ratio"], row["plain_s"] / row["ours_s"])


def test_both_training_steps_have_the_same_loss_for_two_steps():
    sizes = {"shape": "tiny", "device": "cpu", "tokens": 160, "n_labels": 20, "length": 12}
    ours, plain = bench.train_ours(**sizes), bench.train_plain(**sizes)
    for _ in range(2):  # the second, after an update with the first one's gradient
        bench.same("losses", ours(), plain(), tolerance=1e-3)


def test_the_command_for_a_gpu_runs_on_a_cpu(tmp_path):
    bench.main(["gpu", "--shape", "tiny", "--device", "cpu", "--repeats", "1", "--json", str(tmp_path / "rows.json")])
    assert len(rows_of(tmp_path / "rows.json")) >= 6
