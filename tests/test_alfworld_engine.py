"""games.py and examples/alfworld_house.py: the real ALFWorld engine on six small games, the processes that play
them, what their senders are asked, and demonstrations."""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import games
from common import UserError, read_json, seed_for, write_json
from data import to_turns
from examples.alfworld_house import SeenHouse, locate, main, search_route
from games import AlfworldGame, Crash, GameWorkers, open_split, sender_tasks, spare_cores

from alfworld_fixture import GAMES, make_games

parse_action = AlfworldGame.parse_action


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory):
    """The six games in the wording of the installed engine and in that of the published game files."""
    pytest.importorskip("alfworld")
    return {wording: make_games(tmp_path_factory.mktemp(wording), legacy=wording == "published")
            for wording in ("installed", "published")}


@pytest.fixture
def tasks(request, data_dirs, monkeypatch):
    """The games of valid_seen; in the published wording, unless a test parametrizes this fixture."""
    monkeypatch.setenv("ALFWORLD_DATA", data_dirs[getattr(request, "param", "published")])
    return AlfworldGame().tasks("valid_seen")


@pytest.fixture
def workers():
    """Starts GameWorkers, and ends them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *some, **more: stack.enter_context(contextlib.closing(GameWorkers(*some, **more)))


def walkthrough(task):
    return read_json(task["gamefile"])["walkthrough"]


def play(workers, tasks, policy, max_steps=20):
    """Every task in its own slot; policy(slot, step) -> reply. Returns {slot: [answers]}, the reset's first."""
    answers = {slot: [answer] for slot, answer in workers.reset(dict(enumerate(tasks))).items()}
    for step in range(max_steps):
        playing = [s for s, a in answers.items() if not isinstance(a[-1], Crash) and not (step and a[-1][2])]
        for slot, answer in workers.step({s: parse_action(policy(s, step)) for s in playing}).items():
            answers[slot].append(answer)
    return answers


@pytest.mark.parametrize("tasks, num_workers", [("installed", 0), ("published", 2)], indirect=["tasks"])
def test_walkthroughs_win_every_game_in_the_other_wording_too(tasks, workers, num_workers):
    def reply(slot, step):
        action = walkthrough(tasks[slot])[step]
        if num_workers:
            action = re.sub(r"^put (.+) in/on (.+)", r"move \1 to \2", action)
        else:
            action = re.sub(r"^move (.+) to (.+)", r"put \1 in/on \2", action)
        action = re.sub(r"^use (.+)", r"toggle \1 desk 1", action)  # ETO's instruction names it so
        return f"Thought: the next step is clear.\nAction: {action}\nAction: go to the moon"

    answers = play(workers(AlfworldGame, num_workers), tasks, reply)
    for slot, (first, *steps) in answers.items():
        assert [done for _, _, done, _ in steps] == [False] * (len(walkthrough(tasks[slot])) - 1) + [True]
        assert [info["won"] for *_, info in steps] == [done for _, _, done, _ in steps]
        assert not any(info["invalid"] for *_, info in steps) and steps[-1][1] == 1


@pytest.mark.parametrize("tasks", ["installed", "published"], indirect=True)
def test_tasks_and_turns_are_in_the_published_format(tasks, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_alfworld.py", "--env", "alfworld"])
    assert [t["id"] for t in tasks] == sorted((t["id"] for t in tasks), key=lambda name: seed_for("game", name))
    assert sorted(t["type"] for t in tasks) == sorted(game[0] for game in GAMES)
    task = next(t for t in tasks if t["type"] == "look_at_obj_in_light")
    assert task["id"] == "look_at_obj_in_light-Book-None-DeskLamp-1/trial_1"
    assert task["task"] == "look at book under the desklamp."

    game = AlfworldGame()
    turn = game.reset(task)
    assert turn.startswith("You are in the middle of a room. Looking quickly around you, you see a ")
    assert turn.endswith("\n\nYour task is to: look at book under the desklamp.") and "Welcome" not in turn
    assert game.step("go to shelf 1")[0] == "Observation: On the shelf 1, you see a book 1."
    assert game.step("go to drawer 1")[0] == "Observation: The drawer 1 is closed."
    assert game.reset(tasks[0]) != game.reset(tasks[1])  # a second game in the same object is another game
    # what alfworld-download fetches today says "move" and "You move the mug 1 to the shelf 1."
    for put in ("put mug 1 in/on shelf 1", "move mug 1 to shelf 1"):
        game.reset(next(t for t in tasks if t["type"] == "pick_and_place_simple"))
        for action in ("go to cabinet 1", "open cabinet 1", "take mug 1 from cabinet 1", "go to shelf 1"):
            assert not game.step(action)[3]["invalid"]
        assert game.step(put)[0] == "Observation: You put the mug 1 in/on the shelf 1."
    assert sys.argv == ["eval_alfworld.py", "--env", "alfworld"] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tasks", ["installed"], indirect=True)
def test_what_the_engine_remembers_changes_no_answer(tasks, monkeypatch):
    """Of a game that is played a second time in a process nothing is translated or parsed again."""
    def transcript():
        game, texts = AlfworldGame(), []
        for task in tasks[:2] + tasks[:2]:
            texts.append([game.reset(task)])
            for action in walkthrough(task):
                texts[-1] += [sorted(game.admissible), *game.step(action)]
        return texts

    remembering = transcript()
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule
    assert fast_downward.pddl2sas.cache_info().hits >= 12  # of 4 requests a reset, at most 2 are new
    queries = Rule.parse_conjunctive_query.cache_info()
    assert queries.hits > 10 * queries.misses
    with monkeypatch.context() as patch:
        for owner, name in ((fast_downward, "pddl2sas"), (textgen, "_parse_and_convert"),
                            (Rule, "parse_conjunctive_query")):
            patch.setattr(owner, name, getattr(owner, name).__wrapped__)
        patch.setattr(games, "remember_translations", lambda: None)
        assert transcript() == remembering
    assert remembering[:2] == remembering[2:]


def test_the_engines_step_limit_is_not_a_victory(tasks, workers):
    class ShortGame(AlfworldGame):
        engine_max_steps = 4

    for answers in play(workers(ShortGame, 2), tasks[:2], lambda slot, step: "Action: look").values():
        assert [done for _, _, done, _ in answers[1:]] == [False, False, False, True]
        assert not any(info["won"] or reward for _, reward, _, info in answers[1:])


GARBAGE = [
    "", "go to shelf 1", "Action:", "Action:   \nlook", "Thought: Action", "Action: go to the moon", "Action: put",
    "Action: put x in/on y", "Action: move a to b to c", r"Action: put \1 in/on \g<9>", "Action: toggle", "Action: \0",
    "Action: " + "ä" * 5000, "Action: (((", "Action: {o.name}", "Action: [{r.name | atlocation(a:agent, l:location)}]"]


def test_garbage_costs_a_step_and_never_crashes(tasks, workers):
    def reply(slot, step):
        return (GARBAGE + [f"Action: {action}" for action in walkthrough(tasks[slot])])[step]

    for slot, (_, *steps) in play(workers(AlfworldGame, 2), tasks, reply, max_steps=40).items():
        garbage, rest = steps[:len(GARBAGE)], steps[len(GARBAGE):]
        for text, (observation, reward, done, info) in zip(GARBAGE, garbage):
            problem = "Error: the reply has no line" if parse_action(text) is None else "Nothing happens."
            assert observation.startswith(f"Observation: {problem}")
            assert (reward, done, info) == (0, False, {"won": False, "invalid": True})
        assert len(rest) == len(walkthrough(tasks[slot])) and rest[-1][3]["won"]  # the game itself did not move


def test_a_broken_game_file_is_a_crash_of_its_slot(tasks, workers, tmp_path):
    game, broken = read_json(tasks[0]["gamefile"]), []
    changes = [{"pddl_problem": "(define (problem"}, {"grammar": "grammar"}, {"pddl_domain": ""}]
    for number, change in enumerate(changes):
        broken.append({"id": str(number), "gamefile": str(tmp_path / str(number) / "game.tw-pddl")})
        write_json(broken[-1]["gamefile"], game | change)
        write_json(str(tmp_path / str(number) / "traj_data.json"), {"task_type": tasks[0]["type"]})
    for num_workers in (0, 4):
        answers = play(workers(AlfworldGame, num_workers), broken + tasks[:1],
                       lambda slot, step: "Action: " + walkthrough(tasks[0])[step])
        assert all(len(answers[slot]) == 1 and isinstance(answers[slot][0], Crash) for slot in range(3))
        assert answers[3][-1][3]["won"]


def test_the_action_is_one_line_and_the_reply_ends_with_it():
    assert parse_action("Thought: hm.\nAction: go to shelf 1  \nAction: look") == "go to shelf 1"
    assert parse_action("Action:look") == "look"
    assert [parse_action(reply) for reply in ("go to shelf 1", "Action: \nlook", "")] == [None, None, None]
    cut = AlfworldGame.cut_reply
    assert cut("Thought: hm.\nAction: look  \nObservation: a mug 1.\nAction: take it") == "Thought: hm.\nAction: look"
    assert [cut(text) for text in ("no line", "Action: look", "")] == ["no line", "Action: look", ""]


@pytest.fixture
def copied(data_dirs, tmp_path, monkeypatch):
    """A copy of the games that a test may damage."""
    monkeypatch.setenv("ALFWORLD_DATA", shutil.copytree(data_dirs["installed"], str(tmp_path / "data")))
    return str(tmp_path / "data" / "json_2.1.1" / "valid_seen")


def test_a_damaged_file_is_named(copied):
    path = AlfworldGame().tasks("valid_seen")[3]["gamefile"]
    with open(path) as f:
        whole = f.read()
    for content, words in ((whole[:1000], "is not valid JSON"), ("", "is not valid JSON"),
                           (whole.replace("Your task is to", "Do"), "states no task"),
                           (json.dumps({"solvable": True}), "states no task")):
        with open(path, "w") as f:
            f.write(content)
        with pytest.raises(UserError, match=f"^{re.escape(path)} .*{words}"):
            AlfworldGame().tasks("valid_seen")


def test_the_engine_would_take_the_same_games(copied):
    unsolvable, sliced, movable, *good = (task["gamefile"] for task in AlfworldGame().tasks("valid_seen"))
    write_json(unsolvable, read_json(unsolvable) | {"solvable": False})
    for path, word in ((sliced, "AppleSliced"), (movable, "movable")):
        folder = os.path.dirname(os.path.dirname(path))
        os.rename(folder, folder.replace("-None-", f"-{word}-"))
    assert sorted(task["gamefile"] for task in AlfworldGame().tasks("valid_seen")) == sorted(good)
    assert sorted(AlfworldGame().start_engine(copied).gamefiles) == sorted(good)


def test_user_errors_are_one_line_with_the_remedy(copied, tmp_path, monkeypatch):
    def refused(words, spec="alfworld", split="valid_seen"):
        with pytest.raises(UserError, match=words):
            open_split(spec, split)
    refused("valid_unseen.*--split.*valid_seen", split="valid_unseen")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nothing"))
    refused("ALFWORLD_DATA.*alfworld-download")
    assert not os.path.exists(tmp_path / "nothing")
    monkeypatch.setattr(games.importlib.util, "find_spec", lambda name: None)
    refused("pip install alfworld")
    for spec in ("alfwolrd", "no_such_module:Game", "json:Game"):
        refused(f"--env {spec} .*module:name", spec)


# ---- what a sender is asked, and demonstrations
def test_one_who_has_seen_the_house_knows_where_the_things_are(tasks):
    """The texts of GAMES say where everything lies. Who has not seen it is asked room and task, as the actor is."""
    for task, plain, asked in zip(tasks, sender_tasks(AlfworldGame, tasks), sender_tasks(SeenHouse, tasks)):
        _, thing, target, where, _ = next(game for game in GAMES if game[0] == task["type"])
        seen, opening = asked["task"].split("\n\n", 1)
        named = dict(re.findall(r"(\w+ \d+) is at (\w+ \d+)\.", seen))
        assert opening == AlfworldGame().reset(task) == SeenHouse().reset(task)  # what the actor reads
        assert plain == {"id": task["id"], "type": task["type"], "task": opening}
        assert seen.startswith("You have seen this house: ") and named.items() <= where.items()
        wanted = {"look_at_obj_in_light": {thing, target}}.get(task["type"], {thing})
        assert {name.split()[0] for name in named} == wanted
        assert len(named) == (2 if task["type"] in ("look_at_obj_in_light", "pick_two_obj_and_place") else 1)
        assert not any(f"{name} is at" in opening for name in where)


class Asking:
    """A game whose sender is asked something else than its actor reads, or which crashes or dies."""
    def sender_text(self, task):
        Fragile().reset(task)
        return f" {os.getppid()} knows {task['id']}. "


def test_any_game_tells_its_sender_what_it_likes(tmp_path):
    every = [{"id": f"game {n}", "task": word} for n, word in enumerate(["hello", "raise", "die", "hello"])]
    path, name = str(tmp_path / "asked.json"), "test_alfworld_engine:Asking"

    def asked(tasks, **more):
        return [task["task"] for task in sender_tasks(Asking, tasks, **more)]
    first, last = (f"{os.getpid()} knows game {n}." for n in (0, 3))  # asked in other processes
    for n, why in ((1, "ValueError: the shelf fell down"), (2, "its process died")):  # who asks the bare task lies
        with pytest.raises(UserError, match=f"Asking.sender_text of id game {n}: {why}"):
            asked([every[n]], path=path)
    assert asked(every[::3], path=path) == [first, last]
    assert sender_tasks(Fragile, every) == every  # has no sender_text
    assert asked(every[::3], known={"game 0": {"task": "known"}}) == ["known", last]
    # what a killed run has asked is kept, for the same game only
    assert read_json(path)[name].keys() == {"game 0", "game 3"}
    for owner, texts in ((name, ["kept", last]), ("another:Game", [first, last])):
        write_json(path, {owner: {"game 0": "kept"}})
        assert asked(every[::3], path=path) == texts


@pytest.fixture(scope="module")
def demonstrations(data_dirs, tmp_path_factory):
    """What `alfworld_house.py demonstrate` writes about the six games -> its directory."""
    out = tmp_path_factory.mktemp("demonstrations")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ALFWORLD_DATA", data_dirs["installed"])
        main(["demonstrate", "--split", "valid_seen", "--output_dir", str(out)])
    return out


def records_in(folder, name):
    return {record["type"]: record for record in read_json(str(folder / f"valid_seen_{name}.jsonl"))}


@pytest.mark.parametrize("tasks", ["installed", "published"], indirect=True)
@pytest.mark.parametrize("name", ["direct", "search"])
def test_every_demonstration_wins(tasks, demonstrations, name):
    """Each is played again, action by action, in both wordings of the game files."""
    game, records = AlfworldGame(), records_in(demonstrations, name)
    assert [record["id"] for record in records.values()] == [task["id"] for task in tasks]
    for task in tasks:
        turns = records[task["type"]]["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[1]["value"] == "OK" and "Your task is to:" not in turns[0]["value"]
        assert turns[2]["value"] == game.reset(task)
        steps = [game.step(parse_action(turn["value"])) for turn in turns[3::2]]
        assert [step[0] for step in steps[:-1]] == [turn["value"] for turn in turns[4::2]]
        assert [info["won"] for *_, info in steps] == [False] * (len(steps) - 1) + [True]
        assert not any(info["invalid"] for *_, info in steps)
        first = to_turns(records[task["type"]], task_turn=2)[0]  # as train_actor.py reads it
        assert first["content"] == turns[0]["value"] + "\n\n" + turns[2]["value"]


def test_one_who_knows_the_place_goes_there_and_one_who_does_not_searches(tasks, demonstrations):
    def actions(record):
        return [turn["value"].removeprefix("Action: ") for turn in record["conversations"][3::2]]
    direct, search = records_in(demonstrations, "direct"), records_in(demonstrations, "search")
    assert direct["pick_heat_then_place_in_recep"]["plan"] == (
        "take egg 1 from fridge 1, heat it with microwave 1, put it in garbagecan 1.")
    assert direct["look_at_obj_in_light"]["plan"] == "take book 1 from shelf 1, go to desk 1 and use desklamp 1."
    assert direct["pick_two_obj_and_place"]["plan"] == (  # what lies open comes first
        "take saltshaker 2 from countertop 1, put it in drawer 1, "
        "take saltshaker 1 from cabinet 2, put it in drawer 1.")
    assert actions(direct["pick_two_obj_and_place"]) == [  # no way back to where nothing is left
        "go to countertop 1", "take saltshaker 2 from countertop 1", "go to drawer 1", "open drawer 1",
        "put saltshaker 2 in/on drawer 1", "go to cabinet 2", "open cabinet 2", "take saltshaker 1 from cabinet 2",
        "go to drawer 1", "put saltshaker 1 in/on drawer 1"]
    for task in tasks:
        knowing, searching = direct[task["type"]], search[task["type"]]
        assert knowing["sender_task"] == SeenHouse().sender_text(task) and "plan" not in searching
        assert len(actions(knowing)) <= min(11, len(actions(searching)))
    # the egg is in the fridge, the last of the places where one looks; only places that can hold an egg come first
    looked = [action for action in actions(search["pick_heat_then_place_in_recep"]) if action.startswith("go to")]
    assert looked[0] == "go to countertop 1" and looked.index("go to fridge 1") > 3


def test_demonstrations_go_on_after_a_kill(tasks, demonstrations, tmp_path, capsys):
    """The file of the searches is written first: what it has beyond the other is made again."""
    command = ["demonstrate", "--split", "valid_seen", "--output_dir", str(tmp_path)]
    for path, kept in (("valid_seen_direct.jsonl", 2), ("valid_seen_search.jsonl", 4)):
        (tmp_path / path).write_text("".join((demonstrations / path).open().readlines()[:kept]))
    main(command)
    for path in ("valid_seen_direct.jsonl", "valid_seen_search.jsonl"):
        assert (tmp_path / path).read_text() == (demonstrations / path).read_text()
    capsys.readouterr()
    main(command)  # nothing is left: no bar
    assert "6 of 6 games" in (said := capsys.readouterr()).out and said.err == ""
    main([*command[:-1], str(tmp_path / "short"), "--max_samples", "2", "--max_steps", "3"])
    assert len(records_in(tmp_path / "short", "direct")) == 2
    assert records_in(tmp_path / "short", "search") == {}  # a longer search is not written


def facts(**lists):
    """{"openable": [("drawer 1",)], ...} as the engine's facts."""
    return [SimpleNamespace(name=name, arguments=[SimpleNamespace(name=argument + " ") for argument in arguments])
            for name, some in lists.items() for arguments in some]


def test_which_of_several_objects_is_fetched():
    places = ("drawer 1", "drawer 2", "desk 1", "desk 2", "safe 1")
    house = facts(receptacleatlocation=[(place, "loc") for place in places],
                  openable=[("drawer 1",), ("drawer 2",), ("safe 1",)], opened=[("safe 1",)],
                  cancontain=[("drawertype", "pentype"), ("desktype", "pentype"), ("drawertype", "desklamptype")],
                  inreceptacle=[("pen 1", "drawer 2"), ("pen 2", "desk 2"), ("pen 3", "safe 1"), ("pen 3", "desk 1"),
                                ("desklamp 1", "desk 1"), ("desklamp 2", "desk 2"), ("mug 1", "desk 1")])
    goal = {"object": "pen", "count": 1, "verb": None, "place": "drawer", "lamp": None}
    games = [{"id": f"game {n}"} for n in range(60)]
    # any that is open to view and any drawer, but always the same in the same game
    drawn = [locate(game, goal, house) for game in games]
    assert drawn == [locate(game, goal, house) for game in games]
    assert {tuple(things) for things, _, _ in drawn} == {
        (("pen 2", "desk 2"),), (("pen 3", "desk 1"),), (("pen 3", "safe 1"),)}
    assert {target for _, _, target in drawn} == {"drawer 1", "drawer 2"}
    assert all(route == [things[0][1]] for things, route, _ in drawn)
    for game in games:
        # of two, the one that lies at a drawer stays there
        things, route, target = locate(game, goal | {"count": 2}, house)
        assert things[1:] == [("pen 1", "drawer 2")] and len(route) == 1 and target == "drawer 2"
        # a lamp beside the object rather than another
        look = goal | {"place": None, "lamp": "desklamp", "object": "mug"}
        assert locate(game, look, house) == ([("mug 1", "desk 1"), ("desklamp 1", "desk 1")], ["desk 1"], None)
    # a search starts where a pen may lie and what is open to view, and leaves the target out
    route, target, lamps = search_route(goal, house)
    assert route == ["desk 1", "desk 2", "drawer 2", "safe 1"] and target == "drawer 1"
    assert lamps == ["desk 1", "desk 2", "safe 1", "drawer 1", "drawer 2"]
    assert search_route(goal | {"verb": "clean"}, house)[0] == ["desk 1", "desk 2", "drawer 1", "drawer 2", "safe 1"]


class Fragile:
    """A game that breaks in the way that it is told to."""
    def reset(self, task):
        self.steps = 0
        return self.step(task["task"])[0]

    def step(self, action):
        self.steps += 1
        if action == "raise":
            raise ValueError("the shelf fell down")
        if action == "exit":
            sys.exit(3)
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "sleep":
            time.sleep(0.5)
        if action == "hang":
            signal.pause()
        info = {"won": False, "pid": os.getpid()}
        if action == "unsendable":
            info["log"] = open(os.devnull)
        return f"{action} {self.steps}", 0.0, False, info


def hello(slot, word="hello"):
    return {"id": slot, "task": word}


def test_a_game_goes_to_the_process_that_had_it_first(workers):
    """In whatever slots and order the variants of a game are played: its process remembers it."""
    games, seen = workers(Fragile, 3), {}
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1, 4, 0]):
        games.reset({10 + slot: hello(task_id) for slot, task_id in enumerate(order)})
        answers = games.step({10 + slot: "go" for slot in range(len(order))})
        for slot, task_id in enumerate(order):
            assert seen.setdefault(task_id, answers[10 + slot][3]["pid"]) == answers[10 + slot][3]["pid"]
    assert len(set(seen.values())) == 3 and seen[0] == seen[3] != seen[1] == seen[4]


def test_a_rank_takes_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert spare_cores() == 96
    for ranks, cores in (("1", 96), ("8", 12), ("200", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert spare_cores() == cores


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_exceptions_end_one_game_only(workers, num_workers):
    games = workers(Fragile, num_workers)
    first = games.reset({s: hello(s, "raise" if s == 3 else "hello") for s in range(4)})
    assert [first[s] for s in range(3)] == ["hello 1"] * 3 and first[3].startswith("ValueError: the shelf fell down (")
    answers = list(games.step({0: "go", 1: "raise", 2: "exit"}).values())
    assert answers[0][0] == "go 2" and [text.split(" (")[0] for text in answers[1:]] == [
        "ValueError: the shelf fell down", "SystemExit: 3"]
    assert [isinstance(answer, Crash) for answer in answers] == [False, True, True]
    assert games.step({0: "go"})[0][0] == "go 3" and games.reset({1: hello(1)}) == {1: "hello 1"}


def test_a_killed_process_is_reported_and_replaced(workers):
    games = workers(Fragile, 2)  # slots 0 and 2 share a process, 1 and 3 the other
    first = games.reset({s: hello(s, "die" if s == 3 else "hello") for s in range(4)})
    assert first == {0: "hello 1", 1: "hello 1", 2: "hello 1", 3: "its process died with exit code -9"}
    assert sorted(games.ms) == [0, 1, 2, 3]
    games.reset({1: hello(1), 3: hello(3)})
    answers = games.step({0: "die", 1: "go", 2: "go", 3: "go"})
    assert answers[0] == "its process died with exit code -9" and isinstance(answers[0], Crash)
    assert answers[2] == "its process died in another game" and isinstance(answers[2], Crash)
    assert answers[1][0] == answers[3][0] == "go 2"
    assert games.reset({0: hello(0), 2: hello(2)}) == {0: "hello 1", 2: "hello 1"}
    answers = games.step({s: "go" for s in range(4)})
    assert [answers[s][0] for s in range(4)] == ["go 2", "go 3", "go 2", "go 3"]
    os.kill(answers[1][3]["pid"], signal.SIGKILL)  # between two requests: the operating system, out of memory
    time.sleep(0.1)
    answers = games.step({0: "go", 1: "go", 2: "unsendable", 3: "go"})  # an open file, which no pipe carries
    assert [isinstance(answers[s], Crash) for s in range(4)] == [False, True, True, True]
    assert games.reset({s: hello(s) for s in range(4)}) == dict.fromkeys(range(4), "hello 1")


@pytest.mark.parametrize("method", ["reset", "step"])
def test_games_that_hang_are_ended_with_their_processes_only(workers, method):
    """And all at the same time: one after another it would be 3 s."""
    games = workers(Fragile, 4, timeout=1)
    games.reset({s: hello(s) for s in range(5)})
    pid = games.step({0: "go"})[0][3]["pid"]
    words, start = {0: "hang", 1: "hang", 2: "hang", 3: "sleep", 4: "on"}, time.perf_counter()
    if method == "step":
        answers = games.step(words)
    else:
        answers = games.reset({s: hello(s, word) for s, word in words.items()})
    assert time.perf_counter() - start < 2.7
    assert [isinstance(answers[s], Crash) for s in range(5)] == [True, True, True, False, method == "step"]
    assert answers[0] == "no answer within 1 s" and games.ms[0] == 1000 and games.ms[3] >= 500
    assert not os.path.exists(f"/proc/{pid}")
    assert isinstance(games.step({0: "go"})[0], Crash)  # the game is gone, and the next one starts
    assert games.reset({0: hello(0, "again")}) == {0: "again 1"} and games.step({3: "go"})[3][0].startswith("go")


EVALUATORS = """
import os, signal, sys, threading
from games import GameWorkers
from test_alfworld_engine import Fragile, hello

def evaluate(end):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    games = GameWorkers(Fragile, 3)
    games.reset({s: hello(s) for s in range(6)})
    print(*[process.pid for _, process in games.workers], flush=True)
    if end == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "without a word":
        os._exit(0)
    if end == "Ctrl-C":
        threading.Timer(0.5, os.kill, (0, signal.SIGINT)).start()
        games.step(dict.fromkeys(range(6), "hang"))

for end in ("SIGKILL", "Ctrl-C", "without a word"):
    if os.fork() == 0:
        os.setsid()
        try:
            sys.exit(evaluate(end))
        except KeyboardInterrupt:
            sys.exit(130)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_processes_end_with_the_evaluator():
    result = subprocess.run([sys.executable, "-c", EVALUATORS], capture_output=True, text=True, timeout=60,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.stdout.splitlines()[1::2] == ["-9", "130", "0"]
    assert result.stderr == ""
    pids, deadline = " ".join(result.stdout.splitlines()[::2]).split(), time.time() + 10
    while running := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        assert time.time() < deadline and len(pids) == 9, running
        time.sleep(0.05)
