"""The benchmark at a miniature size: both sides do the same work, and every row is complete."""
import json
import math

import pytest

import bench

TINY = ["--layers", "1", "--hidden_size", "16", "--vocab_size", "300", "--repeats", "1", "--batch", "2"]


@pytest.mark.parametrize("name, flags, rows", [
    ("collect", ["--prompt", "4", "--length", "8"], 5), ("compress", ["--prompt", "4", "--length", "3"], 2),
    ("eval", ["--prompt", "20", "--length", "3", "--turns", "2"], 1),
    ("io", ["--length", "3", "--directory_gb", "0.002", "--records", "20"], 5)])
def test_every_benchmark_writes_complete_rows(name, flags, rows, tmp_path):
    bench.main([name, *TINY, *flags, "--json", str(tmp_path / "rows.json")])  # raises if the sides disagree
    found = json.load(open(tmp_path / "rows.json"))["rows"]
    assert len(found) == rows == len({row["name"] for row in found})
    for row in found:
        assert list(row) == ["name", "ours_s", "plain_s", "ratio", "ours_gb", "plain_gb"]
        assert row["ours_s"] > 0 and (row["ratio"] is None) == (row["plain_s"] is None)
        assert row["ratio"] is None or math.isclose(row["ratio"], row["plain_s"] / row["ours_s"])


def test_both_training_steps_have_the_same_loss_for_two_steps():
    _, args = bench.get_args(["train", *TINY, "--prompt", "8", "--length", "6"])
    ours, plain = bench.train_ours(args, 40), bench.train_plain(args, 40)
    for _ in range(2):  # the second, after an update with the first one's gradient
        bench.same("losses", ours(), plain())
