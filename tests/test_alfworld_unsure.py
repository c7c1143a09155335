"""examples/alfworld_unsure.py on six small made games: a sender that knows two places, an actor that is told."""
import glob
import os

import pytest

from alfworld_fixture import make_games
from common import read_json
from examples import alfworld_small, alfworld_unsure
from examples.alfworld_house import (
    UnsureHouse, decoys, facts_in_file, is_told, main, read_goal, second_visits, visited, what_is_named)
from test_alfworld_small import TINY

pytest.importorskip("alfworld")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The directory that both experiments leave, with some of the rows."""
    folder, make = tmp_path_factory.mktemp("unsure"), ["demonstrate", "--split", "train", "--output_dir"]
    sizes = {"base": 60, "both": 60, "warm": 2, "actor": 2, "every": 1, "knowing": 2, "train": 6, "games": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALFWORLD_DATA", make_games(folder / "data", ["train", *alfworld_small.SPLITS], legacy=True))
        patch.setattr(alfworld_unsure, "unpack_demonstrations", lambda out: main([*make, out]))
        for row in set(alfworld_unsure.ACTORS) - {"latent", "text of both places", "no message"}:
            patch.delitem(alfworld_unsure.ACTORS, row)
        patch.setattr(alfworld_unsure, "TRAIN", alfworld_unsure.TRAIN.replace("eval_ratio 0.03", "eval_ratio 0.2"))
        patch.setitem(alfworld_unsure.SIZES, True, sizes)
        patch.setattr(alfworld_small, "SHAPE", TINY)
        for flags in (["--unsure"], ["--actor_knows", "0", "0.5"]):
            alfworld_small.main([*flags, "--fast", "--output_dir", f"{folder}/out"])
        yield f"{folder}/out"


def test_the_sender_knows_two_places_and_one_is_right(out):
    game, records = UnsureHouse(), [read_json(f"{out}/unsure/train_{name}.jsonl") for name in ("right", "wrong")]
    for task, right, wrong in zip(game.tasks("train"), *records):
        assert right["sender_task"] == wrong["sender_task"] == game.sender_text(task)
        assert f" is at {' or at '.join(right['places'])}." in right["sender_task"]
        others = decoys(read_goal(task), game.facts)
        assert wrong["named"] in others and right["named"] not in others
        assert len(others) == len(decoys(read_goal(task), facts_in_file(task)))
        for record, detour in ((right, []), (wrong, [wrong["named"]])):
            actions = [turn["value"].removeprefix("Action: ") for turn in record["conversations"][3::2]]
            assert visited(actions)[:1 + len(detour)] == [*detour, right["named"]]
            assert f"from {record['named']}," in record["plan"]
    assert {record["places"].index(record["named"]) for record in records[0]} == {0, 1}


def test_every_row_and_what_the_actor_is_told(out):
    result = read_json(f"{out}/unsure/unsure_games.json")
    assert len(result["table"]) == 5 and result["curves"]["0"]["latent"]["step"] == [1, 2]
    assert set(read_json(f"{out}/actor_knows/actor_knows.json")["table"]) == {"0.0", "0.5"}
    assert min(map(os.path.getsize, glob.glob(f"{out}/*/*.png"))) > 10_000
    for path in glob.glob(f"{out}/actor_knows/seed0/play/told_*/episodes/no_comm/run0/*.json"):
        episode, share = read_json(path), 0.5 if "told_0.5" in path else 0
        assert is_told(episode["id"], share) == episode["first_turn"].count("You have seen this house")


def test_what_the_second_visit_is_worth():
    """The plan names drawer 1 where the mug is at shelf 2."""
    record = {"id": "a", "places": ["drawer 1", "shelf 2"], "named": "shelf 2"}
    named = what_is_named([record], {"a": "take mug 1 from drawer 1 , put"})
    for second, kind, place in (("shelf 2", 1, 1), ("shelf 1", 1, 0), ("desk 1", 0, 0)):
        turns = [{"action": action} for action in ("go to drawer 1", None, "open drawer 1", f"go to {second}")]
        counts = second_visits([{"split": "s", "id": "a", "turns": turns}], {"s/a": named["a"]})
        assert counts == {"games": 1, "first": 1, "kind": kind, "place": place}
