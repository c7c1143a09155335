"""The demo: the household's rules, the problems' arithmetic, and every stage of both through its real script."""
import csv
import json
import os
import random
import re

import pytest

import demo
import demo_math
from demo import LOCATIONS, MAX_STEPS, PLACES, Household, all_tasks, expert, goal, main, plan, search_actions
from eval_math import extract_answer

NAMES = {"none", "text", "no_comm", "no_comm_base", "cross_task", "randomrot", "search", "k8", "k8_untrained", "keep8"}


# ---- the household

def play(task, actions):
    """-> the first turn, and what each action gives."""
    world = Household()
    return world.reset(task), [world.step(action) for action in actions]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_expert_wins_every_task_with_its_last_action(split):
    for task in all_tasks(split):
        _, steps = play(task, expert(task))
        wins = [False] * (len(steps) - 1) + [True]
        assert [info["won"] for *_, info in steps] == [done for _, _, done, _ in steps] == wins
        assert not any(info["invalid"] for *_, info in steps) and len(steps) <= MAX_STEPS


def test_the_search_wins_without_knowing_the_place():
    """Tasks that differ in their place alone are searched in the same way until the object is in sight."""
    searches = {}
    for task in all_tasks("test"):
        _, steps = play(task, search_actions(task))
        assert steps[-1][3]["won"] and not any(info["invalid"] for *_, info in steps)
        same = searches.setdefault((task["type"], task["object"], task["target"]), {})
        same[task["place"]] = search_actions(task)
    for same in searches.values():
        last = same[PLACES[-1]]
        for place, actions in same.items():
            looked = next(i for i, action in enumerate(actions) if action.startswith("take "))
            assert actions[:looked] == last[:looked] and actions[looked].endswith(f" from {place}")


def test_the_first_turn_has_the_goal_but_not_the_place():
    for task in all_tasks("test"):
        first = Household().reset(task)
        assert first.endswith(f"your task is to : {goal(task['type'], task['object'], task['target'])} .")
        assert not any(place in first for place in PLACES)
        assert task["place"] in task["task"] and f"go to {task['place']}" in plan(task)  # the sender knows it
        moved = {**task, "place": PLACES[PLACES.index(task["place"]) - 1]}
        assert Household().reset(moved) == first


def test_held_out_combinations_are_not_in_training():
    train, test = ({(t["type"], t["object"], t["target"]) for t in all_tasks(split)} for split in ("train", "test"))
    assert train and test and not train & test
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.3
    tasks = all_tasks("train") + all_tasks("test")
    assert len({t["id"] for t in tasks}) == len({t["task"] for t in tasks}) == len(tasks)


def test_rules():
    task = next(t for t in all_tasks("train") if t["type"] == "heat" and t["place"].startswith("drawer"))
    obj, place, target = task["object"], task["place"], f"{task['target']} 1"
    world = Household()
    world.reset(task)

    def refused(*actions):
        answers = [world.step(action) for action in actions]
        return all(answer[0] == "nothing happens ." and answer[3]["invalid"] for answer in answers)

    assert refused("", "look", "go to the moon", f"take {obj} from {place}", f"open {place}",
                   f"heat {obj} with microwave 1")
    assert world.step(f"go to {place}")[0] == f"{place} is closed ."
    assert refused(f"take {obj} from {place}")  # a closed place gives nothing
    assert obj in world.step(f"open {place}")[0]
    assert refused(f"open {place}")
    assert world.step(f"take {obj} from {place}")[0] == f"you pick up {obj} from {place} ."
    assert refused(f"take {obj} from {place}", f"put {obj} in/on {target}")  # gone; and the target is elsewhere
    world.step(f"go to {target}")
    assert not world.step(f"put {obj} in/on {target}")[3]["won"]  # cold
    world.step(f"take {obj} from {target}")
    world.step("go to sinkbasin 1")
    world.step(f"clean {obj} with sinkbasin 1")
    world.step(f"go to {target}")
    assert not world.step(f"put {obj} in/on {target}")[3]["won"]  # clean, but cold
    world.step(f"take {obj} from {target}")
    world.step("go to microwave 1")
    assert not world.step(f"heat {obj} with microwave 1")[2]
    world.step(f"go to {target}")
    _, reward, done, info = world.step(f"put {obj} in/on {target}")
    assert reward == 1 and done and info == {"won": True, "invalid": False}


def test_the_tokenizer_knows_every_word():
    tokenizer = demo.household_tokenizer()
    for task in all_tasks("test"):
        texts = [task["task"], plan(task), *(t["value"] for t in demo.conversation(task, search_actions(task)))]
        assert tokenizer.unk_token_id not in tokenizer(" ".join(texts)).input_ids
    assert all(word in tokenizer.get_vocab() for place in LOCATIONS for word in place.split())


# ---- all stages

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("demo") / "out")
    main(["--fast", "--output_dir", out])
    return out


def read(out):
    with open(os.path.join(out, "summary.json")) as f:
        return json.load(f)


def test_the_message_is_what_makes_the_actor_succeed(finished):
    summary = read(finished)
    success, interval = summary["success"], summary["interval"]
    assert success.keys() == interval.keys() == NAMES and summary["episodes"] == 60
    for name in NAMES:
        low, high = interval[name]
        assert 0 <= low <= success[name] <= high <= 1 and low < high
    assert success["none"] >= max(success["no_comm"], success["cross_task"], success["randomrot"]) + 0.25
    assert summary["seconds"] and all(s >= 0 for s in summary["seconds"].values())
    with open(os.path.join(finished, "results.png"), "rb") as f:
        assert f.read(4) == b"\x89PNG"


def test_the_numbers_are_those_of_the_evaluations(finished):
    """summary.json repeats what eval_alfworld.py found, over the same held-out tasks."""
    success, results = read(finished)["success"], {}
    for folder in os.listdir(finished):
        path = os.path.join(finished, folder, "results.csv")
        if os.path.exists(path):
            with open(path) as f:
                for row in csv.DictReader(f):
                    results.setdefault((folder, row["variant"]), {})[row["id"]] = row["success"] == "True"
    ids = [task["id"] for task in Household().tasks("test")[:60]]
    assert all(sorted(of) == sorted(ids) for of in results.values())
    rates = {f"{folder} {variant}": sum(of.values()) / 60 for (folder, variant), of in results.items()}
    for name in ("none", "text", "no_comm", "cross_task", "randomrot"):
        assert success[name] == pytest.approx(rates[f"eval {name}"])
    assert sorted(success[name] for name in NAMES - {"search"}) == pytest.approx(sorted(rates.values()))


def snapshot(directory):
    paths = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    return {path: os.stat(path).st_mtime_ns for path in paths}


def test_a_second_run_reuses_everything(finished, monkeypatch):
    monkeypatch.setattr(demo, "train_lm", None)  # not called
    before, summary = snapshot(finished), read(finished)
    main(["--fast", "--output_dir", finished])
    after = snapshot(finished)
    assert after.keys() == before.keys()
    models = {path for path in before if os.path.basename(path) == "loss_log.csv" or "/episodes/" in path
              or path.endswith((".safetensors", ".pt"))}
    assert sum("loss_log.csv" in path for path in models) == 2
    assert sum("/episodes/" in path for path in models) == 9 * 60
    assert {path: before[path] for path in models} == {path: after[path] for path in models}
    assert all(read(finished)[key] == summary[key] for key in ("success", "interval", "episodes"))


def test_other_flags_into_the_same_folder(finished, refuses):
    before = snapshot(finished)
    refuses(main, ["--fast", "--output_dir", finished, "--seed", "1"], finished, "--fresh", "--output_dir")
    refuses(main, ["--output_dir", finished], finished, "--fresh")
    refuses(main, ["--fast", "--output_dir", finished, "--task", "math"], finished, "--fresh")
    refuses(main, ["--fast", "--output_dir", finished, "--task", "chess"], "--task")
    assert snapshot(finished) == before


# ---- MATH in miniature

STEP = {"plus": "+", "minus": "-", "times": "*"}


def test_the_solutions_are_right():
    """The questions, read as text and computed by Python, give what the solutions say."""
    records = demo_math.records("train", 400) + demo_math.records("test", 200)
    assert len({r["id"] for r in records}) == len({r["problem"] for r in records}) == 600
    for record in records:
        start, *steps = re.findall(r"start (\d)|(plus|minus|times|max|min) (\d)", record["problem"])
        value = start[0]
        for _, operation, number in steps:
            sign = STEP.get(operation)
            value = str(eval(f"{value} {sign} {number}" if sign else f"{operation}({value}, {number})") % 10)
        assert extract_answer(record["solution"]) == value and record["level"] == f"Level {len(steps)}"
        assert {operation for _, operation, _ in steps} <= set(demo_math.SUBJECTS[record["type"]])
    assert {r["type"] for r in records} == demo_math.SUBJECTS.keys()
    assert [sum(r["level"] == f"Level {n}" for r in records) for n in demo_math.LEVELS] == [120] * 5


def test_held_out_problems_are_never_trained_on():
    test = {r["problem"] for r in demo_math.records("test", 200)}
    assert not test & {r["problem"] for r in demo_math.records("train", 600)}
    seen, rng = set(), random.Random(0)
    for _ in range(100):
        prompts = [" ".join(text for text, _ in spans) for spans in demo_math.examples(rng)]
        seen |= {re.search(r"<user> (.*? mod ten \?)", prompt)[1] for prompt in prompts}
    assert len(seen) > 1000 and not test & seen
    drawn = [demo_math.chain(rng, 3) for _ in range(2000)]
    assert 0.15 < sum(map(demo_math.held_out, drawn)) / 2000 < 0.25


def test_the_plan_gives_every_value_but_the_answer():
    """The answer first appears in the plan of a problem that goes on, and no value can be told from its opposite
    without their order."""
    rng = random.Random(0)
    for _ in range(200):
        problem = demo_math.chain(rng, rng.randint(1, 4))
        text, values = demo_math.plan(problem), demo_math.values(problem)
        longer = demo_math.plan({**problem, "steps": problem["steps"] + [("plus", 1)]})
        assert longer.startswith(f"{text.removesuffix(' .')} gives {values[-1]} ")
        for other in range(10):  # a last step that ends elsewhere changes the plan by its number and by nothing else
            operation, number = problem["steps"][-1]
            changed = demo_math.plan({**problem, "steps": problem["steps"][:-1] + [(operation, other)]})
            assert changed.split()[:-2] == text.split()[:-2] and text.split()[-2] == str(number)
        pairs = re.findall(r"(\d) (\d) (?:first|second|third|fourth)", text)
        assert [int(value) for value, _ in pairs] == [problem["start"], *values[:-1]]
        assert all((int(value) + 5) % 10 == int(opposite) for value, opposite in pairs)


def test_sender_and_actor_read_the_same_problem_in_known_words():
    tokenizer = demo_math.tokenizer()
    for problem in demo_math.problems("test", 100):
        texts = demo_math.question(problem), demo_math.plan(problem), demo_math.solution(problem)
        ids = tokenizer(" ".join(texts)).input_ids
        assert tokenizer.unk_token_id not in ids
        assert extract_answer(tokenizer.decode(ids)) == str(demo_math.values(problem)[-1])
    sender, actor = (spans[0][0] for spans in (demo_math.examples(random.Random(0))[n] for n in (0, -1)))
    assert re.fullmatch(r"<user> .* mod ten \? plan \? <eos> <assistant>", sender)
    assert re.fullmatch(r"<user> .* mod ten \?", actor)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """The math demo with hardly any training: what it writes, not how good it is."""
    out = str(tmp_path_factory.mktemp("demo") / "math")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_math.SETTINGS, True,
                      {"base": 10, "collect": 40, "problems": 20, "actor": 2, "no message": 2})
        main(["--task", "math", "--fast", "--output_dir", out])
        before = snapshot(out)
        patch.setattr(demo, "train_lm", None)  # not called again
        main(["--task", "math", "--fast", "--output_dir", out])
    return out, before


def test_math_runs_every_stage(solved):
    out, _ = solved
    summary, found = read(out), read(f"{out}/eval")["variants"]
    names = {"none", "text", "no_comm", "no_comm_base", "cross_task", "randomrot"}
    assert summary["accuracy"].keys() == summary["interval"].keys() == summary["by_level"].keys() == names
    assert summary["problems"] == 20
    for name in names:
        figures = found["no_cot" if name == "no_comm_base" else name]
        assert figures["questions"] == 20 and figures["accuracy"] == summary["accuracy"][name]
        assert figures["message_rows"] == 0 or name not in ("no_comm", "no_comm_base")
        levels = summary["by_level"][name]
        assert [levels[str(n)]["questions"] for n in demo_math.LEVELS] == [4] * 5
        assert sum(cell["accuracy"] for cell in levels.values()) / 5 == pytest.approx(figures["accuracy"])
        assert sum(cell["questions"] for cell in figures["by_subject"].values()) == 20
    with open(f"{out}/results.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"


def test_math_reuses_everything(solved):
    out, before = solved
    after = snapshot(out)
    assert after.keys() == before.keys()
    models = {path for path in before if path.endswith(("loss_log.csv", ".safetensors", ".pt"))}
    assert sum("loss_log.csv" in path for path in models) == 2 and sum("/messages_" in path for path in models) == 2
    assert {path: before[path] for path in models} == {path: after[path] for path in models}


def test_math_and_household_do_not_share_a_folder(solved, refuses):
    refuses(main, ["--fast", "--output_dir", solved[0]], solved[0], "--fresh")
