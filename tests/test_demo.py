"""The demo: the household's rules, the problems' arithmetic, and every stage of both through its real script."""
import ast
import csv
import os
import random
import re

import pytest

import demo
import demo_math
from common import read_json
from demo import LOCATIONS, MAX_STEPS, PLACES, Household, all_tasks, expert, goal, main, plan, search_actions
from eval_math import extract_answer

ROOT = os.path.dirname(os.path.abspath(demo.__file__))
ROWS = {"latent", "text", "no_comm", "no_comm_base", "cross_task", "randomrot", "search", "k8", "k8_untrained", "keep8"}
VARIANTS = {"latent", "text", "no_comm", "no_cot", "cross_task", "randomrot"}


def test_the_demos_import_in_one_direction():
    with open(os.path.join(ROOT, "demo_math.py")) as file:
        nodes = ast.walk(ast.parse(file.read()))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert sorted(imported) == ["random", "zlib"]


# ---- the household

def play(task, actions):
    """What each action gives."""
    world = Household()
    world.reset(task)
    return [world.step(action) for action in actions]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_expert_wins_every_task_with_its_last_action(split):
    for task in all_tasks(split):
        steps = play(task, expert(task))
        wins = [False] * (len(steps) - 1) + [True]
        assert [info["won"] for *_, info in steps] == [done for _, _, done, _ in steps] == wins
        assert not any(info["invalid"] for *_, info in steps)
        assert len(steps) <= MAX_STEPS


def test_the_search_wins_without_knowing_the_place():
    """Tasks that differ in their place alone are searched in the same way until the object is in sight."""
    searches = {}
    for task in all_tasks("test"):
        steps = play(task, search_actions(task))
        assert steps[-1][3]["won"] and not any(info["invalid"] for *_, info in steps)
        same = searches.setdefault((task["type"], task["object"], task["target"]), {})
        same[task["place"]] = search_actions(task)
    for same in searches.values():
        longest = same[PLACES[-1]]
        for place, actions in same.items():
            looked = next(i for i, action in enumerate(actions) if action.startswith("take "))
            assert actions[:looked] == longest[:looked]
            assert actions[looked].endswith(f" from {place}")


def test_the_first_turn_has_the_goal_but_not_the_place():
    for task in all_tasks("test"):
        first = Household().reset(task)
        assert first.endswith(f"your task is to : {goal(task)} .")
        assert not any(place in first for place in PLACES)
        assert task["place"] in task["task"] and f"go to {task['place']}" in plan(task)  # the sender knows it
        moved = {**task, "place": PLACES[PLACES.index(task["place"]) - 1]}
        assert Household().reset(moved) == first


def test_only_the_order_of_a_plan_tells_the_place():
    for task in all_tasks("test")[:200]:
        for kind in demo.FURNITURE:
            plans = [plan({**task, "place": place}).split() for place in PLACES if place.startswith(kind)]
            assert len({tuple(words) for words in plans}) == demo.FURNITURE[kind]
            assert len({tuple(sorted(words)) for words in plans}) == 1
            assert len({tuple(words[:8]) for words in plans}) == 1  # its first words say the goal only


def test_held_out_combinations_are_not_in_training():
    tasks = {split: all_tasks(split) for split in ("train", "test")}
    train, test = ({(t["type"], t["object"], t["target"]) for t in of} for of in tasks.values())
    assert train and test and not train & test
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.3
    both = tasks["train"] + tasks["test"]
    assert len({t["id"] for t in both}) == len({t["task"] for t in both}) == len(both)


def test_rules():
    task = next(t for t in all_tasks("train") if t["type"] == "heat" and t["place"].startswith("drawer"))
    obj, place, target = task["object"], task["place"], f"{task['target']} 1"
    world = Household()
    world.reset(task)

    def refused(*actions):
        answers = [world.step(action) for action in actions]
        return all(text == "nothing happens ." and info["invalid"] for text, _, _, info in answers)

    def do(*actions):
        """The last action's answer; all are possible."""
        answers = [world.step(action) for action in actions]
        assert not any(info["invalid"] for *_, info in answers)
        return answers[-1]

    take, put = f"take {obj} from {place}", f"put {obj} in/on {target}"
    back, go = f"take {obj} from {target}", f"go to {target}"
    assert refused("", "look", "go to the moon", take, f"open {place}", f"heat {obj} with microwave 1")
    assert do(f"go to {place}")[0] == f"{place} is closed ."
    assert refused(take)  # a closed place gives nothing
    assert obj in do(f"open {place}")[0]
    assert refused(f"open {place}")
    assert do(take)[0] == f"you pick up {obj} from {place} ."
    assert refused(take, put)  # gone; and the target is elsewhere
    assert not do(go, put)[3]["won"]  # cold
    assert not do(back, "go to sinkbasin 1", f"clean {obj} with sinkbasin 1", go, put)[3]["won"]  # clean, but cold
    assert not do(back, "go to microwave 1", f"heat {obj} with microwave 1")[2]
    assert do(go, put)[1:] == (1.0, True, {"won": True, "invalid": False})


def test_the_tokenizer_knows_every_word():
    tokenizer = demo.household_tokenizer()
    for task in all_tasks("test"):
        turns = demo.conversation(task, search_actions(task))
        texts = [task["task"], plan(task), *(turn["value"] for turn in turns)]
        assert tokenizer.unk_token_id not in tokenizer(" ".join(texts)).input_ids
    assert all(word in tokenizer.get_vocab() for place in LOCATIONS for word in place.split())


def test_a_sample_supervises_what_it_says():
    sample = demo.encode([("a b", False), ("c", True)], {"a": 1, "b": 2, "c": 3})
    assert sample["input_ids"] == [1, 2, 3] and sample["labels"] == [-100, -100, 3]


# ---- all stages

def snapshot(directory):
    paths = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    return {path: os.stat(path).st_mtime_ns for path in paths}


def is_png(path):
    with open(path, "rb") as file:
        return file.read(4) == b"\x89PNG"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("the demo") / "out")  # with a space: the commands quote it
    main(["--fast", "--output_dir", out])
    return out


def test_the_message_is_what_makes_the_actor_succeed(finished):
    summary = read_json(f"{finished}/summary.json")
    results = summary["results"]
    assert results.keys() == ROWS and summary["tasks"] == 60
    for figures in results.values():
        low, high = figures["interval"]
        assert 0 <= low <= figures["success"] <= high <= 1 and low < high
    best = max(results[name]["success"] for name in ("no_comm", "cross_task", "randomrot"))
    assert results["latent"]["success"] >= best + 0.25
    assert summary["seconds"] and all(s >= 0 for s in summary["seconds"].values())
    assert is_png(f"{finished}/results.png")


def test_the_numbers_are_those_of_the_evaluations(finished):
    """summary.json repeats what eval_alfworld.py wrote, over the same held-out tasks."""
    results = read_json(f"{finished}/summary.json")["results"]
    ids = [task["id"] for task in Household().tasks("test")[:60]]
    for name in ROWS - {"search"}:
        variant = "no_comm" if name == "no_comm_base" else name if name in VARIANTS else "latent"
        folder = "eval" if name in VARIANTS else f"eval_{name}"
        with open(f"{finished}/{folder}/results.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["variant"].startswith(variant)]
        assert sorted(row["id"] for row in rows) == sorted(ids)
        assert results[name]["success"] == pytest.approx(sum(row["success"] == "True" for row in rows) / 60)


def test_a_second_run_reuses_everything(finished, monkeypatch):
    monkeypatch.setattr(demo, "train_lm", None)  # not called
    before, results = snapshot(finished), read_json(f"{finished}/summary.json")["results"]
    main(["--fast", "--output_dir", finished])
    after = snapshot(finished)
    assert after.keys() == before.keys()
    kept = {path for path in before if path.endswith(("loss_log.csv", ".safetensors", ".pt")) or "/episodes/" in path}
    assert sum("loss_log.csv" in path for path in kept) == 2
    assert sum("/episodes/" in path for path in kept) == 9 * 60
    assert {path: before[path] for path in kept} == {path: after[path] for path in kept}
    assert read_json(f"{finished}/summary.json")["results"] == results


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
    test = {record["problem"] for record in demo_math.records("test", 200)}
    assert not test & {record["problem"] for record in demo_math.records("train", 600)}
    seen, rng = set(), random.Random(0)
    for _ in range(100):
        prompts = [" ".join(text for text, _ in spans) for spans in demo_math.samples(rng)]
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
        text, values, steps = demo_math.plan(problem), demo_math.values(problem), problem["steps"]
        longer = demo_math.plan({**problem, "steps": steps + [("plus", 1)]})
        assert longer.startswith(f"{text.removesuffix(' .')} gives {values[-1]} ")
        operation, number = steps[-1]
        for other in range(10):  # a last step that ends elsewhere changes the plan by its number and by nothing else
            changed = demo_math.plan({**problem, "steps": steps[:-1] + [(operation, other)]})
            assert changed.split()[:-2] == text.split()[:-2]
        assert text.split()[-2] == str(number)
        pairs = re.findall(r"(\d) (\d) (?:first|second|third|fourth)", text)
        assert [int(value) for value, _ in pairs] == values[:-1]
        assert all((int(value) + 5) % 10 == int(opposite) for value, opposite in pairs)


def test_sender_and_actor_read_the_same_problem_in_known_words():
    tokenizer = demo.build_tokenizer(demo_math.WORDS)
    for problem in demo_math.problems("test", 100):
        texts = demo_math.question(problem), demo_math.plan(problem), demo_math.solution(problem)
        ids = tokenizer(" ".join(texts)).input_ids
        assert tokenizer.unk_token_id not in ids
        assert extract_answer(tokenizer.decode(ids)) == str(demo_math.values(problem)[-1])
    samples = demo_math.samples(random.Random(0))
    sender, actor = samples[0][0][0], samples[-1][0][0]
    assert re.fullmatch(r"<user> .* mod ten \? plan \? <eos> <assistant>", sender)
    assert re.fullmatch(r"<user> .* mod ten \?", actor)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """The math demo with hardly any training: what it writes, not how good it is."""
    out = str(tmp_path_factory.mktemp("demo") / "math")
    sizes = {"base": 10, "train": 40, "test": 20, "actor": 2, "baseline": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.SIZES, ("math", True), sizes)
        main(["--task", "math", "--fast", "--output_dir", out])
        before = snapshot(out)
        patch.setattr(demo, "train_lm", None)  # not called again
        main(["--task", "math", "--fast", "--output_dir", out])
    return out, before


def test_math_runs_every_stage(solved):
    out, _ = solved
    summary, evaluated = read_json(f"{out}/summary.json"), read_json(f"{out}/eval/summary.json")["variants"]
    levels = {f"{name}, level {level}" for name in ("latent", "no_comm") for level in demo_math.LEVELS}
    assert summary["results"].keys() == VARIANTS | levels and summary["tasks"] == 20
    for name in VARIANTS:
        figures = summary["results"][name]
        assert figures == evaluated[name] and figures["questions"] == 20
        assert (figures["message_length"] > 0) == (name not in ("no_comm", "no_cot"))
        by_level = list(figures["by_level"].values())
        assert [level["questions"] for level in by_level] == [4] * 5
        assert sum(level["accuracy"] for level in by_level) / 5 == pytest.approx(figures["accuracy"])
        assert sum(subject["questions"] for subject in figures["by_subject"].values()) == 20
    assert is_png(f"{out}/results.png")


def test_math_reuses_everything(solved):
    out, before = solved
    after = snapshot(out)
    assert after.keys() == before.keys()
    kept = {path for path in before if path.endswith(("loss_log.csv", ".safetensors", ".pt"))}
    assert sum("loss_log.csv" in path for path in kept) == 2 and sum("/messages_" in path for path in kept) == 2
    assert {path: before[path] for path in kept} == {path: after[path] for path in kept}


def test_math_and_household_do_not_share_a_folder(solved, refuses):
    refuses(main, ["--fast", "--output_dir", solved[0]], solved[0], "--fresh")
