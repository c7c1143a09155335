"""
ALFWorld with a sender who has seen the house, and conversations that win its games.

  python eval_alfworld.py --env examples.alfworld_house:SeenHouse --split valid_seen --model_path actor \\
      --sender sender --output_path results
  python examples/alfworld_house.py demonstrate --split train --output_dir demonstrations

The sender of `--env alfworld` is asked room and task, and knows no more than the actor. SeenHouse's is told
first where the things of the goal are, which the actor never is:

    You have seen this house: fork 3 is at diningtable 1.

    You are in the middle of a room. ... Your task is to: clean some fork and put it in drawer.

UnsureHouse's is told two places, of which one is right; ToldHouse tells its actor, too, what its sender is told.

    1. what the house holds   a game's goal, where its things are
    2. the games              what their senders are told
    3. demonstrations         how one who knows the place wins, and one who searches for it
"""
import json
import os
import re
import sys
from types import SimpleNamespace

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import (  # noqa: E402
    Parser, UserError, one_line_errors, positive, read_json, seed_for, write_json, write_text)
from games import AlfworldGame, Crash, in_workers, open_split  # noqa: E402

# ---- 1. What the house holds ---------------------------------------------------------------------
TOOLS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
TREATMENTS = {"isClean": "clean", "isHot": "heat", "isCool": "cool"}  # in a goal -> what brings it about


def kind_of(name):
    """"shelf 10" -> "shelf"."""
    return name.rsplit(" ", 1)[0]


def number_of(name):
    """"shelf 10" -> 10."""
    return int(name.rsplit(" ", 1)[1])


def read_goal(task):
    """What a game asks for, from its own PDDL -> {"object", "count", "verb", "place", "lamp"}.

        put a clean plate in cabinet     ->  plate, 1, clean, cabinet, None
        put two pen in drawer            ->  pen, 2, None, drawer, None
        look at book under the desklamp  ->  book, 1, None, None, desklamp"""
    goal = read_json(task["gamefile"])["pddl_problem"].partition("(:goal")[2]
    kinds = dict(re.findall(r"objectType (\?\w+) (\w+)Type", goal))  # {"?o1": "Pen", "?o2": "Pen"}
    toggled = re.search(r"isToggled (\?\w+)", goal)
    place = re.search(r"receptacleType \?\w+ (\w+)Type", goal)
    lamp = kinds.pop(toggled[1]).lower() if toggled else None
    verbs = [verb for change, verb in TREATMENTS.items() if change in goal]
    return {
        "object": next(iter(kinds.values())).lower(),
        "count": len(kinds),
        "verb": verbs[0] if verbs else None,
        "place": place[1].lower() if place else None,
        "lamp": lamp,
    }


def facts_of(facts, name):
    """The engine's facts of one name: "inreceptacle" -> [("mug 1", "shelf 2"), ("pen 1", "desk 1"), ...]."""
    of_name = [fact.arguments for fact in facts if fact.name == name]
    return sorted(tuple(variable.name.strip() for variable in arguments) for arguments in of_name)


def places_of(facts, order=lambda place: (kind_of(place), number_of(place))):
    """All places of a house, those open to view first -> ["desk 1", "shelf 1", "shelf 2", ..., "drawer 1"]."""
    closed = closed_places(facts)
    names = [place for place, _ in facts_of(facts, "receptacleatlocation")]
    return sorted(names, key=lambda place: (place in closed, order(place)))


def facts_in_file(task):
    """The facts at the start of a game, in which things have the names of its file: it need not be started."""
    problem = read_json(task["gamefile"])["pddl_problem"].lower()
    init = problem.partition("(:init")[2].partition("(:goal")[0]
    facts = []
    for name, *pair in re.findall(r"\((\w+) (\S+) (\S+)\)", init):
        variables = [SimpleNamespace(name=variable) for variable in pair]
        facts.append(SimpleNamespace(name=name, arguments=variables))
    return facts


def closed_places(facts):
    openable, opened = facts_of(facts, "openable"), facts_of(facts, "opened")
    return {place for place, in set(openable) - set(opened)}


def locate(task, goal, facts):
    """Where the goal's things are at the start -> ([(thing, place)], route, target).

    Of several objects that would do, one that is open to view; the lamp comes last. The route holds the
    places to fetch an object from, the target is where to put it. Of two objects one may lie at such a place
    already: it stays, and the other is put beside it. Where several places would do, the game's id draws one:
    if it were always the first, room and task would tell most of a plan, and an actor would learn to guess
    instead of reading."""
    order = places_of(facts, lambda place: seed_for("place", task["id"], place))
    things = facts_of(facts, "inreceptacle")
    targets = [place for place in order if kind_of(place) == goal["place"]]
    target = targets[0] if targets else None
    objects = {}
    for thing, place in sorted(things, key=lambda pair: (order.index(pair[1]), number_of(pair[0]))):
        if kind_of(thing) == goal["object"]:
            objects.setdefault(thing, place)  # a keychain in a safe on a dresser has two places
    pairs, there = list(objects.items()), []
    if goal["count"] == 2:
        there = [pair for pair in pairs if pair[1] in targets][:1]
        if there:
            target = there[0][1]
    fetched = [pair for pair in pairs if goal["verb"] or pair[1] != target]
    fetched = fetched[:goal["count"] - len(there)]
    route = [place for _, place in fetched]
    lamps = [pair for pair in things if kind_of(pair[0]) == goal["lamp"]]
    lamps.sort(key=lambda pair: (pair[1] not in route, order.index(pair[1])))  # best beside the object
    return fetched + there + lamps[:1], route, target


def decoys(goal, facts):
    """The places where an object of the goal may lie and none does -> ["drawer 4", "shelf 1", ...].

    None of the goal's kind of place, unless the object has first to be cleaned, heated or cooled: one that lay
    there would be where it belongs."""
    kind = goal["object"] + "type"
    objects = {thing for thing, thing_type in facts_of(facts, "objecttype") if thing_type == kind}
    taken = {place for thing, place in facts_of(facts, "inreceptacle") if thing in objects}
    can_contain = set(facts_of(facts, "cancontain"))  # {("desktype", "pentype"), ...}
    places = []
    for place, place_type in facts_of(facts, "receptacletype"):
        is_target = not goal["verb"] and place_type == f"{goal['place']}type"
        if (place_type, kind) in can_contain and place not in taken and not is_target:
            places.append(place)
    return places


def place_in_words(things):
    """[("fork 3", "diningtable 1")] -> "fork 3 is at diningtable 1."."""
    return " ".join(f"{thing} is at {place}." for thing, place in things)


# ---- 2. The games --------------------------------------------------------------------------------
class SeenHouse(AlfworldGame):
    """ALFWorld, whose sender knows where the goal's things are at the start."""
    demonstrations = ("search", "direct")  # the files' names, in the order in which they are written

    def sender_text(self, task):
        opening = super().reset(task)  # a ToldHouse's own says more
        things, _, _ = locate(task, read_goal(task), self.facts)
        return f"You have seen this house: {place_in_words(things)}\n\n{opening}"

    def demonstrate(self, task):
        """How one who knows the place and one who searches win -> {"direct": record, "search": record}.

        Both follow the same rule, `actions_to_win`, and differ in the places they go to. (The engine's planner
        can need minutes for a game, and its handcoded expert does not know the wording of these files.) Raises
        ValueError where the rule does not win."""
        goal, opening = read_goal(task), self.reset(task)
        things, route, target = locate(task, goal, self.facts)
        lamp_places = [place for thing, place in things if kind_of(thing) == goal["lamp"]]
        direct = play_out(self, actions_to_win(self, goal, route, target, lamp_places))
        self.reset(task)
        search = play_out(self, actions_to_win(self, goal, *search_route(goal, self.facts)))
        names = {"id": task["id"], "type": task["type"]}
        return {
            "direct": {
                **names,
                "sender_task": self.sender_text(task),
                "plan": plan_in_words([action for action, _ in direct]),
                "conversations": conversation(opening, direct),
            },
            "search": {**names, "conversations": conversation(opening, search)},
        }


class UnsureHouse(SeenHouse):
    """Its sender is told two places of the goal's first object, where it is and a decoy, in random order:

        You have seen this house: mug 1 is at shelf 2 or at drawer 4."""
    demonstrations = ("wrong", "right")

    def tasks(self, split):
        tasks = super().tasks(split)
        with_decoy = []
        for task in tasks:
            if decoys(read_goal(task), facts_in_file(task)):
                with_decoy.append(task)
        print(f"{split}: {len(tasks) - len(with_decoy)} of {len(tasks)} games are left out: no place for a decoy")
        return with_decoy

    def sender_text(self, task):
        opening, goal = super().reset(task), read_goal(task)
        things, route, _ = locate(task, goal, self.facts)
        places = two_places(task, route[0], decoys(goal, self.facts))
        for n, (thing, place) in enumerate(things):
            if kind_of(thing) == goal["object"] and place == route[0]:
                things[n] = (thing, " or at ".join(places))
        return f"You have seen this house: {place_in_words(things)}\n\n{opening}"

    def demonstrate(self, task):
        """How one wins whose plan names the right place, or the decoy -> {"right": record, "wrong": record}: go
        where the plan says, if nothing is there to the other place, then on as the goal says."""
        goal, sender_task = read_goal(task), self.sender_text(task)
        things, route, target = locate(task, goal, self.facts)
        lamp_places = [place for thing, place in things if kind_of(thing) == goal["lamp"]]
        right = route[0]
        places = two_places(task, right, decoys(goal, self.facts))
        decoy = places[1 - places.index(right)]
        records = {}
        for name, route in (("right", route), ("wrong", [decoy, *route])):
            opening = self.reset(task)
            steps = play_out(self, actions_to_win(self, goal, route, target, lamp_places))
            if name == "right":
                plan = plan_in_words([action for action, _ in steps])
            records[name] = {
                "id": task["id"],
                "type": task["type"],
                "sender_task": sender_task,
                "places": places,
                "named": route[0],
                "plan": plan.replace(f"from {right},", f"from {route[0]},"),
                "plan_of_both": plan.replace(f"from {right},", f"from {' or '.join(places)},"),
                "conversations": conversation(opening, steps),
            }
        return records


def two_places(task, right, others):
    """Where the object is and one of the other places, in an order that tells nothing."""
    decoy = min(others, key=lambda place: seed_for("decoy", task["id"], place))
    return sorted([right, decoy], key=lambda place: seed_for("order", task["id"], place))


class ToldHouse(SeenHouse):
    """In this share of the games, which is the same in training, the actor is told what the sender is."""
    share = 1.0

    def reset(self, task):
        return self.sender_text(task) if is_told(task["id"], self.share) else super().reset(task)


class HalfToldHouse(ToldHouse):
    share = 0.5


def is_told(task_id, share):
    return seed_for("told", task_id) < share * 2**63


def told(records, share):
    """Demonstrations as a ToldHouse begins them: in a share of the games the actor reads what the sender does."""
    changed = []
    for record in records:
        turns = list(record["conversations"])
        if is_told(record["id"], share):
            turns[2] = {"from": "human", "value": record["sender_task"]}
        changed.append({**record, "conversations": turns})
    return changed


# ---- 3. Demonstrations ---------------------------------------------------------------------------
# Opens the demonstrations, whose agents do not write down what they think.
ACTION_INSTRUCTION = """You are in a household and have one task to carry out. After each of your turns you \
are told what you observe. Answer with one line:
Action: your next action
The actions are: go to {place}, examine {place}, open {place}, close {place}, take {object} from {place}, \
put {object} in/on {place}, clean {object} with {place}, heat {object} with {place}, \
cool {object} with {place}, use {object}."""


def search_route(goal, facts):
    """Where one who has not seen the house looks -> (places for the object, target, places for the lamp).

    First where such an object may lie at all, and of these first what is open to view; not at the target."""
    order = places_of(facts)
    target = next((place for place in order if kind_of(place) == goal["place"]), None)
    pairs = facts_of(facts, "cancontain")  # [("desktype", "pentype"), ...]
    fitting = {place for place, thing in pairs if thing == goal["object"] + "type"}
    route = sorted(order, key=lambda place: kind_of(place) + "type" not in fitting)
    if not goal["verb"]:
        route = [place for place in route if place != target]
    return route, target, order


def actions_to_win(game, goal, route, target, lamp_places):
    """Yields actions: go along the route until there is an object to take, do with it what the goal says, and
    once more if it wants two. What a place holds is read from the commands that the game admits there."""
    here, closed, route, visited = None, closed_places(game.facts), list(route), {}
    for _ in range(goal["count"]):
        takes = []
        while route and not takes:
            yield from arrive(game, here, route[0], closed)
            here = route[0]
            visited[here] = bool(admitted(game, f"use {goal['lamp']}"))
            takes = admitted(game, f"take {goal['object']}", f" from {here}")
            if not takes:
                route.pop(0)
        if not takes:
            return
        if len(takes) == 1:  # there is nothing more to come back for
            route.pop(0)
        yield takes[0]
        thing = takes[0].removeprefix("take ").removesuffix(f" from {here}")
        if goal["verb"]:
            name = TOOLS[goal["verb"]]
            tool = next(place for place in places_of(game.facts) if kind_of(place) == name)
            yield from arrive(game, here, tool, set())  # it need not be opened
            here = tool
            yield f"{goal['verb']} {thing} with {tool}"
        if goal["lamp"]:  # of the places that were visited only those with a lamp, and these first
            places = [place for place in lamp_places if visited.get(place, True)]
            for place in sorted(places, key=lambda place: (place != here, place not in visited)):
                yield from arrive(game, here, place, closed)
                here = place
                uses = admitted(game, f"use {goal['lamp']}")
                if uses:
                    yield uses[0]
                    return
        else:
            yield from arrive(game, here, target, closed)
            here = target
            yield f"put {thing} in/on {target}"


def arrive(game, here, place, closed):
    """The actions that lead from `here` to a place and open it; it is then no longer `closed`."""
    actions = []
    if place != here:
        go = f"go to {place}"  # two cabinets side by side: one does not go to the other, one looks into it
        actions.append(go if go in game.admissible else f"examine {place}")
    if place in closed:
        closed.remove(place)
        actions.append(f"open {place}")
    return actions


def admitted(game, start, end=""):
    """The commands "start N end" that the game admits here, by their number N."""
    matches = [re.fullmatch(rf"{start} (\d+){end}", command) for command in game.admissible]
    matches = sorted(filter(None, matches), key=lambda match: int(match[1]))
    return [match[0] for match in matches]


def play_out(game, actions):
    """Play actions up to the one that wins -> [(action, observation)]. Raises ValueError if none does."""
    steps = []
    for action in actions:
        observation, _, _, info = game.step(action)
        steps.append((action, observation))
        if info["won"]:
            return steps
    raise ValueError(f"not won by {[action for action, _ in steps]}")


def conversation(opening, steps):
    """[(action, observation)] of a won game -> turns of ETO's format, which end with the action that wins."""
    turns = [
        {"from": "human", "value": ACTION_INSTRUCTION},
        {"from": "gpt", "value": "OK"},
        {"from": "human", "value": opening},
    ]
    for action, observation in steps:
        turns.append({"from": "gpt", "value": f"Action: {action}"})
        turns.append({"from": "human", "value": observation})
    return turns[:-1]


def steps_of(record):
    """Actions in a conversation, which has two for each and "OK" after the instruction."""
    return len(record["conversations"]) // 2 - 1


def plan_in_words(actions):
    """["go to desk 1", "take mug 1 from desk 1", "go to microwave 1", ...] -> a plan in one sentence:

        take mug 1 from desk 1, heat it with microwave 1, put it in cabinet 2.
        take book 1 from bed 1, go to desk 1 and use desklamp 1."""
    words, here, thing = [], None, None
    for action in actions:
        verb, rest = action.split(" ", 1)
        if verb == "go":
            here = rest.removeprefix("to ")
        elif verb == "take":
            thing = rest.split(" from ")[0]
            words.append(action)
        elif verb == "use":
            words.append(f"go to {here} and {action}")
        elif verb != "open":
            words.append(action.replace(thing, "it").replace("in/on", "in"))
    return ", ".join(words) + "."


def write_lessons(folder, out):
    """Of the demonstrations of an UnsureHouse what models learn: {out}/planning.json, a prompt with either plan;
    {out}/both.json, with the plan of both places; {out}/train_direct.jsonl, an actor that follows each plan."""
    samples = {"planning": [], "both": [], "acting": []}
    for record in read_json(f"{folder}/train_right.jsonl") + read_json(f"{folder}/train_wrong.jsonl"):
        plans = {"planning": record["plan"]}
        if record["named"] == record["places"][0]:  # "shelf 2 or drawer 4": go to shelf 2 first
            plans["both"] = record["plan_of_both"]
        for name, plan in plans.items():
            sample = {**record, "id": f"{record['id']} {plan}", "plan": plan}
            samples["acting"].append(sample)
            turns = [
                {"from": "human", "value": record["sender_task"]},
                {"from": "gpt", "value": plan},
            ]
            samples[name].append({**sample, "conversations": turns})
    write_json(f"{out}/planning.json", samples["planning"])
    write_json(f"{out}/both.json", samples["both"])
    lines = [json.dumps(sample) + "\n" for sample in samples["acting"]]
    write_text(f"{out}/train_direct.jsonl", "".join(lines))


def followed(records, plans):
    """The demonstrations that do what the sender's plans, {id: plan}, say; of two places the first one first."""
    kept = []
    for record in records:
        plan = re.sub(" ([.,])", r"\1", plans[record["id"]])  # as it is spelled without a tokenizer
        plan = re.sub(r"(from \S+ \d+) or \S+ \d+", r"\1", plan)
        if plan == record["plan"]:
            kept.append(record)
    return kept


def what_is_named(records, plans):
    """Demonstrations, the sender's plans {id: plan} -> {id: (the place that a plan names, the other one, "right" |
    "wrong")}, or (None, None, "neither")."""
    named = {}
    for record in records:
        named[record["id"]] = (None, None, "neither")
        match = re.search(r"from (\S+ \d+)", plans[record["id"]])
        places = record["places"]
        if match and match[1] in places:
            other = places[1 - places.index(match[1])]
            which = "right" if match[1] == record["named"] else "wrong"
            named[record["id"]] = (match[1], other, which)
    return named


def visited(actions):
    """Where one goes, each place once -> ["drawer 4", "shelf 2"]."""
    places = []
    for action in actions:
        match = re.fullmatch(r"(go to|examine) ([a-z]+ \d+)", action or "")
        if match and match[2] not in places:
            places.append(match[2])
    return places


def second_visits(episodes, named):
    """Played episodes, `what_is_named` in their games -> of those whose plan names the wrong place {"games", "first":
    how often the first visit is there; "kind", "place": the second one is to the other's kind, to the other}."""
    counts = {"games": 0, "first": 0, "kind": 0, "place": 0}
    for episode in episodes:
        place, other, which = named[f"{episode['split']}/{episode['id']}"]
        if which == "wrong":
            actions = [turn["action"] for turn in episode["turns"]]
            first, second, *_ = [*visited(actions), " ", " "]
            counts["games"] += 1
            counts["first"] += first == place
            counts["kind"] += kind_of(second) == kind_of(other)
            counts["place"] += second == other
    return counts


# -----------------------------------------------------------------------------------------------------

def get_args(argv):
    parser = Parser(prog="alfworld_house.py", description=__doc__)
    parser.add_argument("command", choices=["demonstrate"], help="write conversations that win ALFWorld's games")
    parser.flag("--split", "train", "train, valid_seen or valid_unseen")
    parser.flag("--env", "examples.alfworld_house:SeenHouse", "or UnsureHouse, and what it demonstrates")
    parser.flag("--output_dir", ..., "gets SPLIT_direct.jsonl and SPLIT_search.jsonl, or _right and _wrong")
    parser.flag("--max_samples", None, "only the first N games", type=positive)
    parser.flag("--max_steps", 20, "a longer search or detour is not written")
    return parser.parse_args(argv)


@one_line_errors("alfworld_house.py")
def main(argv=None):
    args = get_args(argv)
    game, tasks = open_split(args.env, args.split)
    tasks = tasks[:args.max_samples]

    # ---- what an earlier run has made
    detour, direct = game.demonstrations
    paths, records = {}, {}
    for name in (detour, direct):  # in the order in which they are written
        paths[name] = os.path.join(args.output_dir, f"{args.split}_{name}.jsonl")
        records[name] = read_json(paths[name]) if os.path.exists(paths[name]) else []
    done = {record["id"] for record in records[direct]}
    records[detour] = [record for record in records[detour] if record["id"] in done]
    pending = [task for task in tasks if task["id"] not in done]

    # ---- play
    failed = 0
    for answers in in_workers(game, "demonstrate", pending, "demonstrate"):
        for task, answer in answers:
            if isinstance(answer, Crash):
                failed += 1
                tqdm.write(f"{task['id']}: {answer}", file=sys.stderr)
                continue
            records[direct].append(answer[direct])
            if steps_of(answer[detour]) <= args.max_steps:
                records[detour].append(answer[detour])
        for name, path in paths.items():
            lines = [json.dumps(record) + "\n" for record in records[name]]
            write_text(path, "".join(lines))

    # ---- what there is now
    for name, path in paths.items():
        steps = [steps_of(record) for record in records[name]]
        mean, longest = sum(steps) / max(1, len(steps)), max(steps, default=0)
        print(f"{path}: {len(steps)} of {len(tasks)} games, {mean:.1f} steps, {longest} at most")
    if failed:
        raise UserError(f"{failed} of {len(tasks)} games could not be won by the rule or crashed, see above")


if __name__ == "__main__":
    main()
