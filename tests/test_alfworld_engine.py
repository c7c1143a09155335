"""games.py: the real ALFWorld engine on six small games, and the processes that play them."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import games
from common import UserError
from games import INSTRUCTION, AlfworldGame, Crash, GameWorkers, load_game, sender_tasks

from alfworld_fixture import GAMES, make_games, memoise_engine


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
    started = []

    def start(make_game, num_workers, **options):
        started.append(GameWorkers(make_game, num_workers, **options))
        return started[-1]
    yield start
    for one in started:
        one.close()


parse_action = AlfworldGame.parse_action


def walkthrough(task):
    with open(task["gamefile"]) as f:
        return json.load(f)["walkthrough"]


def play(workers, tasks, policy, max_steps=20):
    """Every task in its own slot; policy(slot, step) -> reply. Returns {slot: [answers]}, the reset's first."""
    answers = {slot: [answer] for slot, answer in workers.reset(dict(enumerate(tasks))).items()}
    for step in range(max_steps):
        live = [s for s, a in answers.items() if not isinstance(a[-1], Crash) and not (step and a[-1][2])]
        for slot, answer in workers.step({s: parse_action(policy(s, step)) for s in live}).items():
            answers[slot].append(answer)
    return answers


@pytest.mark.parametrize("tasks, agent, num_workers", [("installed", "put", 0), ("published", "move", 2)],
                         indirect=["tasks"])
def test_walkthroughs_win_every_game_in_the_other_wording_too(tasks, workers, agent, num_workers):
    def reply(slot, step):
        action = walkthrough(tasks[slot])[step]
        if agent == "put":
            action = re.sub(r"^move (.+) to (.+)", r"put \1 in/on \2", action)
        else:
            action = re.sub(r"^put (.+) in/on (.+)", r"move \1 to \2", action)
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
    assert [t["id"] for t in tasks] == sorted(t["id"] for t in tasks)
    assert sorted(t["type"] for t in tasks) == sorted(game[0] for game in GAMES)
    task = next(t for t in tasks if t["type"] == "look_at_obj_in_light")
    assert task["id"] == "look_at_obj_in_light-Book-None-DeskLamp-1/trial_1"
    assert task["task"] == "look at book under the desklamp."

    game = AlfworldGame()
    turn = game.reset(task)
    assert turn.startswith(INSTRUCTION + "\n\nYou are in the middle of a room. Looking quickly around you, you see a ")
    assert turn.endswith("\n\nYour task is to: look at book under the desklamp.") and "Welcome" not in turn
    assert game.step("go to shelf 1")[0] == "Observation: On the shelf 1, you see a book 1."
    assert game.step("go to drawer 1")[0] == "Observation: The drawer 1 is closed."
    assert game.reset(tasks[0]) != game.reset(tasks[1])  # a second game in the same object is another game
    assert AlfworldGame(instruction="Do it.").reset(task).startswith("Do it.\n\nYou are in")
    assert sys.argv == ["eval_alfworld.py", "--env", "alfworld"] and capfd.readouterr() == ("", "")


def test_look_wins_nothing_and_the_engines_step_limit_is_not_a_victory(tasks, workers, monkeypatch):
    memoise_engine(monkeypatch)

    class ShortGame(AlfworldGame):
        engine_max_steps = 4

    for answers in play(workers(AlfworldGame, 2), tasks, lambda slot, step: "Action: look").values():
        assert len(answers) == 21
        assert not any(done or info["won"] or info["invalid"] for _, _, done, info in answers[1:])
    for answers in play(workers(ShortGame, 2), tasks[:2], lambda slot, step: "Action: look").values():
        assert [done for _, _, done, _ in answers[1:]] == [False, False, False, True]
        assert not any(info["won"] or reward for _, reward, _, info in answers[1:])


GARBAGE = [
    "", "go to shelf 1", "Action:", "Action:   \nlook", "Thought: Action", "Action: go to the moon", "Action: put",
    "Action: put x in/on y", "Action: move a to b to c", r"Action: put \1 in/on \g<9>", "Action: toggle", "Action: \0",
    "Action: " + "ä" * 5000, "Action: (((", "Action: {o.name}", "Action: [{r.name | atlocation(a:agent, l:location)}]"]


def test_garbage_costs_a_step_and_never_crashes(tasks, workers, monkeypatch):
    memoise_engine(monkeypatch)

    def reply(slot, step):
        return (GARBAGE + [f"Action: {action}" for action in walkthrough(tasks[slot])])[step]

    for slot, (_, *steps) in play(workers(AlfworldGame, 2), tasks, reply, max_steps=40).items():
        garbage, rest = steps[:len(GARBAGE)], steps[len(GARBAGE):]
        for text, (observation, reward, done, info) in zip(GARBAGE, garbage):
            problem = "Error: the reply has no line" if parse_action(text) is None else "Nothing happens."
            assert observation.startswith(f"Observation: {problem}")
            assert (reward, done, info) == (0, False, {"won": False, "invalid": True})
        assert len(rest) == len(walkthrough(tasks[slot])) and rest[-1][3]["won"]  # the game itself did not move


def test_a_broken_game_file_is_a_crash_of_its_own_slot(tasks, workers, tmp_path):
    with open(tasks[0]["gamefile"]) as f:
        game = json.load(f)
    broken = []
    changes = [{"pddl_problem": "(define (problem"}, {"grammar": "grammar"}, {"pddl_domain": ""}]
    for number, change in enumerate(changes):
        broken.append({"gamefile": str(tmp_path / str(number) / "game.tw-pddl")})
        os.makedirs(tmp_path / str(number))
        for name, content in (("game.tw-pddl", game | change), ("traj_data.json", {"task_type": tasks[0]["type"]})):
            (tmp_path / str(number) / name).write_text(json.dumps(content))
    for num_workers in (0, 4):
        answers = play(workers(AlfworldGame, num_workers), broken + tasks[:1],
                       lambda slot, step: "Action: " + walkthrough(tasks[0])[step])
        assert all(len(answers[slot]) == 1 and isinstance(answers[slot][0], Crash) for slot in range(3))
        assert answers[3][-1][3]["won"]


def test_parse_action():
    assert parse_action("Thought: hm.\nAction: go to shelf 1  \nAction: look") == "go to shelf 1"
    assert parse_action("Action:look") == "look"
    assert [parse_action(reply) for reply in ("go to shelf 1", "Action: \nlook", "")] == [None, None, None]


def test_a_damaged_file_is_named(data_dirs, tmp_path, monkeypatch):
    shutil.copytree(data_dirs["installed"], tmp_path / "data")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "data"))
    path = AlfworldGame().tasks("valid_seen")[3]["gamefile"]
    with open(path) as f:
        whole = f.read()
    for content, words in ((whole[:1000], "truncated"), ("", "truncated"),
                           (json.dumps(json.loads(whole) | {"grammar": "no goal"}), "states no task"),
                           (json.dumps({"solvable": True}), "states no task")):
        with open(path, "w") as f:
            f.write(content)
        with pytest.raises(UserError, match=f"^{re.escape(path)} .*{words}.*delete its folder$"):
            AlfworldGame().tasks("valid_seen")
    with open(path, "w") as f:
        f.write(whole)
    other = os.path.join(os.path.dirname(path), "traj_data.json")
    with open(other, "w") as f:
        f.write('{"task_')
    with pytest.raises(UserError, match=f"^{re.escape(other)} .*truncated"):
        AlfworldGame().tasks("valid_seen")


def test_the_sender_reads_room_and_task(tasks, monkeypatch):
    texts = {task["id"]: task["task"] for task in sender_tasks("alfworld", "valid_seen", 2, {})}
    game = AlfworldGame(instruction="")
    assert texts == {task["id"]: game.reset(task).strip() for task in tasks[:2]}
    known = {task["id"]: {"task": f"room {n}"} for n, task in enumerate(tasks)}
    monkeypatch.setattr(GameWorkers, "reset", None)  # a game that was read before is not started again
    assert [task["task"] for task in sender_tasks("alfworld", "valid_seen", None, known)] == [
        f"room {n}" for n in range(6)]


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
        return f"{action} {self.steps}", 0.0, False, {"won": False, "pid": os.getpid()}


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_exceptions_end_one_game_only(workers, num_workers):
    games = workers(Fragile, num_workers)
    assert games.reset({s: {"task": "raise" if s == 3 else "hello"} for s in range(4)}) == {
        0: "hello 1", 1: "hello 1", 2: "hello 1", 3: Crash("ValueError: the shelf fell down")}
    answers = games.step({0: "go", 1: "raise", 2: "exit"})
    assert answers[0][0] == "go 2" and answers[1] == "ValueError: the shelf fell down" and answers[2] == "SystemExit: 3"
    assert [isinstance(answers[s], Crash) for s in range(3)] == [False, True, True]
    assert games.step({0: "go"})[0][0] == "go 3" and games.reset({1: {"task": "hello"}}) == {1: "hello 1"}


def test_a_killed_process_is_reported_and_replaced(workers):
    games = workers(Fragile, 2)  # slots 0 and 2 share a process, 1 and 3 the other
    first = games.reset({s: {"task": "die" if s == 3 else "hello"} for s in range(4)})
    assert first == {0: "hello 1", 1: "hello 1", 2: "hello 1", 3: "its process died with exit code -9"}
    assert sorted(games.ms) == [0, 1, 2, 3]
    games.reset({1: {"task": "hello"}, 3: {"task": "hello"}})
    answers = games.step({0: "die", 1: "go", 2: "go", 3: "go"})
    assert answers[0] == "its process died with exit code -9" and isinstance(answers[0], Crash)
    assert answers[2] == "its process died in another game" and isinstance(answers[2], Crash)
    assert answers[1][0] == answers[3][0] == "go 2"
    assert games.reset({0: {"task": "hello"}, 2: {"task": "hello"}}) == {0: "hello 1", 2: "hello 1"}
    answers = games.step({s: "go" for s in range(4)})
    assert [answers[s][0] for s in range(4)] == ["go 2", "go 3", "go 2", "go 3"]
    os.kill(answers[1][3]["pid"], signal.SIGKILL)  # between two requests: the operating system, out of memory
    time.sleep(0.1)
    assert [isinstance(a, Crash) for _, a in sorted(games.step({s: "go" for s in range(4)}).items())] == [
        False, True, False, True]


@pytest.mark.parametrize("method", ["reset", "step"])
def test_a_game_that_hangs_is_ended_with_its_process_only(workers, method):
    games = workers(Fragile, 2, timeout=0.3)
    games.reset({s: {"task": "hello"} for s in range(2)})
    pid = games.step({0: "go"})[0][3]["pid"]
    words = {0: "hang", 1: "on"}
    answers = games.step(words) if method == "step" else games.reset({s: {"task": word} for s, word in words.items()})
    assert answers[0] == "no answer within 0.3 s" and isinstance(answers[0], Crash) and games.ms[0] == 300
    assert not isinstance(answers[1], Crash) and not os.path.exists(f"/proc/{pid}")
    assert isinstance(games.step({0: "go"})[0], Crash)  # the game is gone, and the next one starts
    assert games.reset({0: {"task": "again"}}) == {0: "again 1"} and games.step({1: "go"})[1][0].startswith("go")


def test_processes_overlap(workers):
    games = workers(Fragile, 4)
    games.reset({s: {"task": "hello"} for s in range(4)})
    start = time.perf_counter()
    assert len({info["pid"] for *_, info in games.step(dict.fromkeys(range(4), "sleep")).values()}) == 4
    assert time.perf_counter() - start < 1.5 and all(games.ms[s] >= 500 for s in range(4))  # one after another: 2 s


def test_processes_end_with_the_evaluator(tmp_path):
    script = tmp_path / "evaluator.py"
    script.write_text(
        "import os, signal\nfrom games import GameWorkers\nfrom test_alfworld_engine import Fragile\n"
        "games = GameWorkers(Fragile, 3)\ngames.reset({s: {'task': 'hello'} for s in range(3)})\n"
        "print(*[process.pid for process, _ in games.workers], flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.returncode == -signal.SIGKILL and result.stderr == ""
    deadline = time.time() + 10
    while alive := [pid for pid in result.stdout.split() if os.path.exists(f"/proc/{pid}")]:
        assert time.time() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def test_user_errors_are_one_line_with_the_remedy(data_dirs, tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", data_dirs["installed"])
    with pytest.raises(UserError, match=r"valid_unseen.*--split.*valid_seen"):
        AlfworldGame().tasks("valid_unseen")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="ALFWORLD_DATA.*alfworld-download"):
        AlfworldGame().tasks("valid_seen")
    assert not os.path.exists(tmp_path / "nothing")
    monkeypatch.setattr(games.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install alfworld"):
        AlfworldGame().tasks("valid_seen")
    assert load_game("alfworld") is AlfworldGame
    for spec in ("alfwolrd", "no_such_module:Game", "json:Game"):
        with pytest.raises(UserError, match="module:Class"):
            load_game(spec)
