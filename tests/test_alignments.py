"""examples/alignments.py over what a small run of examples/unsure.py leaves."""
import pytest

from common import read_json
from examples import alignments, unsure
from model import open_shards
from tiny import tensors


@pytest.mark.long
def test_each_row_is_what_it_says_and_no_lm_is_trained(tmp_path):
    folder, out, play = (f"{tmp_path}/{name}" for name in ("OneWord", "out", "out/unsure/play"))
    unsure.prepare(folder, "OneWord", 0, {"base": 40, "train": 64, "test": 8})
    alignments.main(["--fast", "--small", "-", "--smollm2", "-", "--unsure", folder, "--output_dir", out])
    content, base = read_json(f"{out}/alignments.json"), tensors(f"{folder}/base")
    for row in set(alignments.ROWS) - {"trained", "text", "no_comm"}:
        assert sum(part[row]["games"] for part in content["unsure"].values() if part) == 8
        assert all(tensors(f"{out}/unsure/{row}")[name].equal(base[name]) for name in base)
    words, random = (open_shards(f"{play}/{row}_test-0/messages") for row in ("likeliest", "random"))
    for name in words.records:  # where sender and reader are one LM, the likeliest words are the plan as text
        norms = [shards[name].norm(dim=1).tolist() for shards in (random, words)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4) and not random[name].equal(words[name])
        said = [read_json(f"{play}/{row}/run0/{name}.json")["turns"] for row in
                ("none_test-0/episodes/text", "likeliest_test-0/episodes/latent")]
        assert said[0] == said[1]
