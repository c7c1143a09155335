"""examples/alfworld_small.py on six small made games: every stage through its script, and what is written."""
import json
import os
import random

import pytest
import torch

from alfworld_fixture import make_games
from common import fingerprint, read_json, write_json, write_text
from examples import alfworld_small
from hf import load_lm, load_tokenizer
from model import open_shards, write_shard
from tiny import tensors

pytest.importorskip("alfworld")
pytestmark = pytest.mark.long
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The directory that a run of two games a split leaves."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALFWORLD_DATA", make_games(folder / "data", ["train", *alfworld_small.SPLITS], legacy=True))
        patch.setitem(alfworld_small.SIZES, True, {"base": 30, "llama": 30, "warm": 2, "actor": 2, "search": 2,
                                                   "student": 2, "games": 2})
        patch.setattr(alfworld_small, "SHAPE", TINY)
        alfworld_small.main(["--fast", "--from_games", "--output_dir", f"{folder}/out"])
    return f"{folder}/out"


def test_what_plays_is_the_box(small):
    """All in bf16; the base as it was when messages were collected from it, so that the actor still knows it."""
    for name in ("base", "actor", "search_actor", "student"):
        box = f"{small}/seed0/box/{name}"
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(box).values())
        assert not {"loss_log.csv", "checkpoint-2"} & set(os.listdir(box))
    assert fingerprint(f"{small}/seed0/box/base") == fingerprint(f"{small}/seed0/base")


def test_every_row_of_both_splits(small):
    result = read_json(f"{small}/alfworld.json")
    assert os.path.getsize(f"{small}/alfworld.png") > 10_000
    for part, n_games in (("seen", 2), ("unseen", 2), ("all", 4)):
        assert list(result["tables"][part]) == list(alfworld_small.MEANING)
        for row in result["tables"][part].values():
            assert row["games"] == n_games and row["by_seed"] == [row["success"]]
            assert row["interval"][0] <= row["success"] <= row["interval"][1]
    assert list(result["differences"]["all"]) == ["gain", "pairing", "presence", "own_thoughts"]
    assert [counts[1] for counts in result["obeyed"]["0"].values()] == [2, 2]
    # the row of another family: a Llama's messages, and the actor that learned them
    settings = read_json(f"{small}/seed0/play/llama_valid_seen/settings.json")
    assert settings["model_path"].endswith("llama_actor") and settings["sender"].endswith("/llama")
    assert read_json(f"{small}/seed0/llama/config.json")["model_type"] == "llama"


def test_seeds_are_no_games(small, tmp_path, monkeypatch):
    """Three seeds that play alike say no more than one of them; three that differ are averaged game by game."""
    monkeypatch.setattr(alfworld_small, "obedience", lambda folder: [1, 2])
    monkeypatch.setattr(alfworld_small, "MEANING", {"latent": "", "no_comm": ""})
    rng, tables = random.Random(0), []
    wins = {split: {row: {f"{split}{n}": rng.random() < 0.6 for n in range(40)} for row in alfworld_small.MEANING}
            for split in alfworld_small.SPLITS}
    for seeds in ([0], [0, 1, 2]):
        alfworld_small.report(str(tmp_path), dict.fromkeys(seeds, wins), {}, {seed: {"a": 1.0} for seed in seeds})
        tables.append(read_json(f"{tmp_path}/alfworld.json"))
    for part in ("seen", "all"):
        for one, three in zip(*(table["tables"][part].values() for table in tables)):
            assert one["interval"] == three["interval"] and three["by_seed"] == one["by_seed"] * 3
        assert tables[0]["differences"][part] == tables[1]["differences"][part]
    other = {split: {row: {game: not won for game, won in games.items()} for row, games in rows.items()}
             for split, rows in wins.items()}
    assert set(alfworld_small.pool({0: wins, 1: other}, alfworld_small.SPLITS)["latent"].values()) == {0.5}


def test_obedience(tmp_path):
    records = {}
    for n, place in enumerate(("desk 1", "desk 11", "shelf 2")):
        records[str(n)] = {"task": "", "plan": f"take mug 1 from {place} , go", "plan_token_ids": [0]}
        visits = [{"action": action} for action in (None, "look", "go to desk 1", "go to shelf 2")]
        write_json(f"{tmp_path}/episodes/cross_task/run0/{n}.json", {"message_of": str(n), "turns": visits})
    write_shard(f"{tmp_path}/messages/latents-rank00000-00000.safetensors",
                {key: torch.zeros(1, 4) for key in records}, records, {"hidden_size": 4})
    assert alfworld_small.obedience(str(tmp_path)) == [1, 3]


def test_the_sender_knows_the_place_and_the_actor_does_not(small):
    seed = f"{small}/seed0"
    for split in alfworld_small.SPLITS:
        for record in open_shards(f"{seed}/play/main_{split}/messages").records.values():
            assert record["task"].startswith("You have seen this house: ")
        for record in open_shards(f"{seed}/play/main_{split}/self/messages").records.values():
            assert record["task"].startswith("You are in the middle of a room")
    for name in os.listdir(f"{seed}/play/main_valid_seen/episodes/latent/run0"):
        episode = read_json(f"{seed}/play/main_valid_seen/episodes/latent/run0/{name}")
        assert "You have seen" not in episode["first_turn"] and episode["message_length"] > 0


@pytest.mark.parametrize("said, learned", [("1112", "012"), ("1222", "0123")])
def test_an_actor_learns_from_what_its_message_says(tmp_path, said, learned):
    """Every demonstration opens drawer 1: kept are the games whose sender says so, or all where hardly one does."""
    plan = "take mug 1 from desk 1, put it in drawer {}."
    latents = {str(n): torch.zeros(3, 4) for n in range(4)}
    records = {}
    for n, drawer in enumerate(said):
        words = plan.format(drawer).replace(",", " ,").replace(".", " .")  # as the tokenizer decodes it
        records[str(n)] = {"task": "", "plan": words, "plan_token_ids": [0, 0, 0]}
    write_shard(f"{tmp_path}/base_train/latents-rank00000-00000.safetensors", latents, records, {"hidden_size": 4})
    lines = [json.dumps({"id": str(n), "plan": plan.format(1)}) for n in range(4)]
    write_text(f"{tmp_path}/train_direct.jsonl", "\n".join(lines))
    alfworld_small.write_told(str(tmp_path), "base")
    assert "".join(record["id"] for record in read_json(f"{tmp_path}/base_told.json")) == learned


def test_no_word_of_the_games_is_unknown(small):
    seed = f"{small}/seed0"
    tokenizer = load_tokenizer(f"{seed}/base")
    for record in read_json(f"{seed}/train_direct.jsonl"):
        for text in [record["sender_task"], record["plan"], *(turn["value"] for turn in record["conversations"])]:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).replace(" .", ".").replace(" ,", ",") == " ".join(text.split())


def test_a_language_model_goes_on_after_a_kill(small, tmp_path, monkeypatch):
    """The same weights as of the run that nobody killed."""
    os.makedirs(tmp_path / "seed")
    for name in ("train_direct.jsonl", "train_search.jsonl"):
        os.symlink(f"{small}/seed0/{name}", tmp_path / "seed" / name)
    save = torch.save

    def kill(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(alfworld_small, "SHAPE", TINY)
    monkeypatch.setattr(alfworld_small, "SAVE_STEPS", 20)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            alfworld_small.language_models(f"{tmp_path}/seed", 0, {"base": 30, "llama": 30})
    alfworld_small.language_models(f"{tmp_path}/seed", 0, {"base": 30, "llama": 30})
    states = [load_lm(f"{path}/base", check=False).state_dict() for path in (f"{small}/seed0", tmp_path / "seed")]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
