"""The benchmark at a miniature shape: both sides do the same work, every row is complete, the GPU's command runs."""
import json
import math

import pytest

from examples import bench


@pytest.mark.parametrize("name, count", [("collect", 2), ("compress", 3), ("eval", 1), ("gpu", 7)])
def test_every_benchmark_writes_complete_rows(name, count, tmp_path):
    """Also the one for a GPU, dry. The two sides of a row are compared there."""
    path = tmp_path / "rows.json"
    bench.main([name, "--shape", "tiny", "--device", "cpu", "--repeats", "1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == count == len({row["name"] for row in rows})
    for row in rows:
        assert row["ours_s"] > 0 and (row["plain_s"] or name == "gpu")
        assert row["ratio"] is None or math.isclose(row["ratio"], row["plain_s"] / row["ours_s"])


def test_both_training_steps_have_the_same_loss_for_two_steps():
    sizes = {"shape": "tiny", "device": "cpu", "tokens": 160, "n_labels": 20, "length": 12}
    ours, plain = bench.train_ours(**sizes), bench.train_plain(**sizes)
    for _ in range(2):
        bench.same(ours()[1], plain()[1])
