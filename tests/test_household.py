"""examples/household.py and arithmetic.py: the worlds' rules, and every stage of both through its real script."""
import csv
import random
import re

import pytest

from common import read_json
from eval_math import extract_answer
from examples import arithmetic, household as example, scratch
from examples.household import MAX_STEPS, PLACES, Household, all_tasks, expert, goal, plan, search_actions
from tiny import snapshot

ROWS = "latent text no_comm cross_task self randomrot no_comm_base keep8 k8 k8_untrained search".split()
TINY = {"base": 2, "sender": 2, "train": 8, "test": 4, "actor": 1, "student": 1}


# ---- the household
def play(task, actions):
    """What each action gives."""
    world = Household()
    world.reset(task)
    return [world.step(action) for action in actions]


@pytest.mark.parametrize("split, policy", [("train", expert), ("test", expert), ("test", search_actions)])
def test_expert_and_search_win_every_task_with_their_last_action(split, policy):
    for task in all_tasks(split):
        steps = play(task, policy(task))
        wins = [False] * (len(steps) - 1) + [True]
        assert [info["won"] for *_, info in steps] == [done for _, _, done, _ in steps] == wins
        assert not any(info["invalid"] for *_, info in steps)
        assert len(steps) <= MAX_STEPS or policy is search_actions


def test_the_search_does_not_know_the_place():
    """Tasks that differ in their place alone are searched in the same way until the object is in sight."""
    searches = {}
    for task in all_tasks("test"):
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
        for name in example.FURNITURE:
            plans = [plan({**task, "place": place}).split() for place in PLACES if place.startswith(name)]
            assert len({tuple(words) for words in plans}) == example.FURNITURE[name]
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


def test_a_sample_supervises_what_it_says():
    turns = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}, {"from": "human", "value": "b"},
             {"from": "gpt", "value": "a"}]
    tokenizer = scratch.build_tokenizer(["a b c", scratch.PLAN_ANNOUNCEMENT])
    for text, first in ((None, "<user> a b <eos> <assistant>"),
                        ("c c", "<user> a b plan : <bop> c c <eop> <eos> <assistant>")):
        spans = scratch.spans_of(turns, text)
        sample = scratch.encode(spans, tokenizer)
        words = tokenizer.convert_ids_to_tokens(sample["input_ids"])
        assert words == f"{first} c <eos> <user> b <eos> <assistant> a <eos>".split()
        learned = [word for word, label in zip(words, sample["labels"]) if label != -100]
        assert learned == "c <eos> a <eos>".split()
        assert spans[:2] == scratch.one_turn("a b", "c", text)
    # as the scripts will render it
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids == scratch.encode(scratch.one_turn("a b", "c"), tokenizer)["input_ids"]


# ---- all stages of the household
@pytest.fixture(scope="module")
def household(tmp_path_factory):
    """The folder with the household_out of a run that takes seconds and learns nothing."""
    folder = tmp_path_factory.mktemp("household")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(example.SIZES, True, TINY)
        example.main(["--fast"])
    return folder


def unchanged(before, after, *endings):
    """Whether no file has gone or come, and those with these endings were not written again."""
    kept = {path: time for path, time in before.items() if path.endswith(endings)}
    return before.keys() == after.keys() and kept and kept.items() <= after.items()


@pytest.mark.long
def test_the_message_is_what_makes_the_actor_succeed(tmp_path):
    out = str(tmp_path / "a house")  # with a space: the commands quote it
    example.main(["--fast", "--output_dir", out])
    success = {row: figures["success"] for row, figures in read_json(f"{out}/summary.json")["results"].items()}
    best = max(success[row] for row in ("no_comm", "no_comm_base", "cross_task", "randomrot"))
    assert success["latent"] >= best + 0.25 and success["text"] >= best + 0.25


def test_the_table_repeats_the_evaluations(household):
    """summary.json has what eval_alfworld.py wrote, over the same held-out tasks."""
    out = household / "household_out"
    summary = read_json(f"{out}/summary.json")
    results, n = summary["results"], TINY["test"]
    assert list(results) == ROWS == list(example.MEANING) and summary["tasks"] == n
    assert summary["seconds"]
    assert (out / "results.png").read_bytes()[:4] == b"\x89PNG"
    low, high = results["search"]["interval"]  # no evaluation gives this row
    assert 0 <= low <= results["search"]["success"] <= high <= 1 and low < high
    ids = [task["id"] for task in Household().tasks("test")[:n]]
    elsewhere = {"no_comm_base": "no_comm", "k8": "latent_k8"}  # {row: its label in a table of its own}
    for row in ROWS[:-1]:
        folder, label = (f"eval_{row}", elsewhere[row]) if row in elsewhere else ("eval", row)
        with open(f"{out}/{folder}/results.csv") as file:
            played = [episode["id"] for episode in csv.DictReader(file) if episode["variant"] == label]
        assert sorted(played) == sorted(ids)
        assert results[row] == read_json(f"{out}/{folder}/summary.json")["variants"][label]


def test_a_second_run_reuses_everything_and_other_flags_are_refused(household, monkeypatch, refuses):
    monkeypatch.chdir(household)
    monkeypatch.setitem(example.SIZES, True, TINY)
    monkeypatch.setattr(scratch, "train_lm", None)  # not called
    before, results = snapshot("household_out"), read_json("household_out/summary.json")["results"]
    assert sum("loss_log.csv" in path for path in before) == 2
    assert sum("/episodes/" in path for path in before) == len(ROWS[:-1]) * TINY["test"]
    example.main(["--fast"])
    assert unchanged(before, snapshot("household_out"), "loss_log.csv", ".safetensors", ".pt", "/test-0000.json")
    assert read_json("household_out/summary.json")["results"] == results
    before = snapshot("household_out")
    refuses(example.main, ["--fast", "--seed", "1"], "household_out", "--fresh", "--output_dir")
    refuses(example.main, [], "household_out", "--fresh")
    refuses(arithmetic.main, ["--fast", "--output_dir", "household_out"], "household_out", "--fresh")
    refuses(example.main, ["--fast", "--task", "math"], "--task")
    assert snapshot("household_out") == before


# ---- MATH in miniature
STEP = {"plus": "+", "minus": "-", "times": "*"}


def test_the_solutions_are_right():
    """The questions, read as text and computed by Python, give what the solutions say."""
    records = arithmetic.records("train", 400) + arithmetic.records("test", 200)
    assert len({r["id"] for r in records}) == len({r["problem"] for r in records}) == 600
    for record in records:
        start, *steps = re.findall(r"start (\d)|(plus|minus|times|max|min) (\d)", record["problem"])
        value = start[0]
        for _, operation, number in steps:
            sign = STEP.get(operation)
            value = str(eval(f"{value} {sign} {number}" if sign else f"{operation}({value}, {number})") % 10)
        assert extract_answer(record["solution"]) == value and record["level"] == f"Level {len(steps)}"
        assert {operation for _, operation, _ in steps} <= set(arithmetic.SUBJECTS[record["type"]])
    assert {r["type"] for r in records} == arithmetic.SUBJECTS.keys()
    assert [sum(r["level"] == f"Level {n}" for r in records) for n in arithmetic.LEVELS] == [120] * 5


def test_held_out_problems_are_never_trained_on():
    test = {record["problem"] for record in arithmetic.records("test", 200)}
    assert not test & {record["problem"] for record in arithmetic.records("train", 600)}
    seen, rng = set(), random.Random(0)
    for _ in range(100):
        prompts = [" ".join(text for text, _ in spans) for spans in arithmetic.samples(rng)]
        seen |= {re.search(r"<user> (.*? mod ten \?)", prompt)[1] for prompt in prompts}
    assert len(seen) > 1000 and not test & seen
    drawn = [arithmetic.chain(rng, 3) for _ in range(2000)]
    assert 0.15 < sum(map(arithmetic.held_out, drawn)) / 2000 < 0.25


def test_the_plan_gives_every_value_but_the_answer():
    """The answer first appears in the plan of a problem that goes on, and no value can be told from its opposite
    without their order."""
    rng = random.Random(0)
    for _ in range(200):
        problem = arithmetic.chain(rng, rng.randint(1, 4))
        text, values, steps = arithmetic.plan(problem), arithmetic.values(problem), problem["steps"]
        longer = arithmetic.plan({**problem, "steps": steps + [("plus", 1)]})
        assert longer.startswith(f"{text.removesuffix(' .')} gives {values[-1]} ")
        operation, number = steps[-1]
        for other in range(10):  # a last step that ends elsewhere changes the plan by its number and by nothing else
            changed = arithmetic.plan({**problem, "steps": steps[:-1] + [(operation, other)]})
            assert changed.split()[:-2] == text.split()[:-2]
        assert text.split()[-2] == str(number)
        pairs = re.findall(r"(\d) (\d) (?:first|second|third|fourth)", text)
        assert [int(value) for value, _ in pairs] == values[:-1]
        assert all((int(value) + 5) % 10 == int(opposite) for value, opposite in pairs)


def test_sender_and_actor_read_the_same_problem_in_known_words():
    tokenizer = scratch.build_tokenizer(arithmetic.WORDS)
    for problem in arithmetic.problems("test", 100):
        texts = arithmetic.question(problem), arithmetic.plan(problem), arithmetic.solution(problem)
        ids = tokenizer(" ".join(texts)).input_ids
        assert tokenizer.unk_token_id not in ids
        assert extract_answer(tokenizer.decode(ids)) == str(arithmetic.values(problem)[-1])
    samples = arithmetic.samples(random.Random(0))
    sender, actor = samples[0][0][0], samples[-1][0][0]
    assert re.fullmatch(r"<user> .* mod ten \? plan \? <eos> <assistant>", sender)
    assert re.fullmatch(r"<user> .* mod ten \? <eos> <assistant>", actor)


def test_arithmetic_runs_every_stage_once(tmp_path, monkeypatch):
    """With hardly any training: what is written, not how good it is."""
    out, sizes = tmp_path / "a b", {"base": 10, "train": 40, "test": 20, "actor": 2, "baseline": 2}
    monkeypatch.setitem(arithmetic.SIZES, True, sizes)
    arithmetic.main(["--fast", "--output_dir", str(out)])
    before = snapshot(out)
    monkeypatch.setattr(scratch, "train_lm", None)  # not called again
    arithmetic.main(["--fast", "--output_dir", str(out)])
    assert sum("loss_log.csv" in path for path in before) == 2
    assert unchanged(before, snapshot(out), "loss_log.csv", ".safetensors", ".pt")
    summary, evaluated = read_json(f"{out}/summary.json"), read_json(f"{out}/eval/summary.json")["variants"]
    levels = {f"{row}, level {level}" for row in ("latent", "no_comm") for level in arithmetic.LEVELS}
    assert summary["results"].keys() == arithmetic.MEANING.keys() | levels and summary["tasks"] == 20
    for row in arithmetic.MEANING:
        figures = summary["results"][row]
        assert figures == evaluated[row] and figures["questions"] == 20
        assert (figures["message_length"] > 0) == (row not in ("no_comm", "no_cot"))
        assert [level["questions"] for level in figures["by_level"].values()] == [4] * 5
    assert (out / "results.png").read_bytes()[:4] == b"\x89PNG"
