"""
The games that an actor plays: ALFWorld's own engine, many games at once, and conversations that win them.

  python games.py demonstrate --split train --output_dir demonstrations

    1. the game               ALFWorld's engine, in the format of ETO's conversations
    2. what the house holds   a game's goal, where its things are, what a sender is told
    3. many games at once     worker processes
    4. demonstrations         how one who knows the place wins, and one who searches for it

A game is any class with these methods; success is info["won"], never done:

    tasks(split) -> [{"id", "task", ...}]     reset(task) -> first human turn
    step(action) -> (observation, reward, done, info)

and, if it wants, parse_action(reply) -> action, cut_reply(reply) -> what the conversation keeps of a reply, and
`instruction`, a text that opens the first turn unless the actor was trained with another one.
"""
import argparse
import contextlib
import copy
import functools
import glob
import importlib
import importlib.util
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time

from common import (Parser, UserError, one_line_errors, positive, progress, read_json, seed_for, write_json,
                    write_text)

# -----------------------------------------------------------------------------------------------------
# 1. The game

# The facts and the list of actions of the instruction that opens ETO's training conversations, in our words.
INSTRUCTION = """You are an agent in a household and have one task to carry out there. The room and the \
task are described below; after each of your turns you are told what you observe.
In every turn, think about the situation first and then choose one action. Reply in exactly this format:
Thought: your thoughts
Action: your next action

These are the actions, with {obj} for an object and {recep} for a receptacle, each with its number:
1. go to {recep}
2. take {obj} from {recep}
3. put {obj} in/on {recep}
4. open {recep}
5. close {recep}
6. toggle {obj} {recep}
7. clean {obj} with {recep}
8. heat {obj} with {recep}
9. cool {obj} with {recep}
"Nothing happens." means that the action was not possible there: try another one."""

# What an agent says -> what this game may call it: `put` or `move` is up to the version that made the game
# file, and ETO's list has a `toggle` that no version knows.
WORDINGS = (
    (r"put (.+) in/on (.+)", r"move \1 to \2"),
    (r"move (.+) to (.+)", r"put \1 in/on \2"),
    (r"toggle (\S+ \d+).*", r"use \1"),
)
# What the engine answers -> what published transcripts say there. ETO's, like ReAct's, have no "You arrive at
# loc 7."; game files of version 0.4, which alfworld-download fetches, say "You move the mug 1 to the shelf 1."
ANSWERS = (
    (r"^You arrive at [^.]*\. ", ""),
    (r"^You move the (.+) to the (.+)\.$", r"You put the \1 in/on the \2."),
)


@contextlib.contextmanager
def quiet_engine():
    """The engine prints when it loads a split, and its planner overwrites sys.argv at every reset."""
    argv = sys.argv
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.argv = argv


def remember_translations():
    """Have the engine keep what it has translated and parsed in this process.

    Each reset translates the same two texts twice, which is most of its time, and each step parses the same
    rules of the grammar again, which is most of its; a text's translation is always the same. With this a first
    reset takes half the time, any later one of that game a tenth, and a step a third. A translation is 1 MB."""
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule
    if hasattr(fast_downward.pddl2sas, "cache_info"):
        return
    fast_downward.pddl2sas = functools.lru_cache(maxsize=512)(fast_downward.pddl2sas)
    Rule.parse_conjunctive_query = functools.lru_cache(maxsize=4096)(Rule.parse_conjunctive_query)
    parsed = functools.lru_cache(maxsize=4096)(textgen._parse_and_convert)

    @functools.wraps(textgen._parse_and_convert)
    def parse(*args, **kwargs):
        return copy.deepcopy(parsed(*args, **kwargs))  # the engine writes into what it has parsed

    textgen._parse_and_convert = parse


class AlfworldGame:
    """ALFWorld's household games through the unmodified AlfredTWEnv, in ETO's conversation format."""
    instruction = INSTRUCTION  # of an actor that was not trained with one of its own
    engine_max_steps = 1000  # the engine's own limit, out of the way: --max_steps is the cap

    def __init__(self):
        self.env = None

    def alfred_env(self, folder):
        from alfworld.agents.environment import get_environment
        config = {
            "dataset": {"eval_id_data_path": folder, "num_eval_games": -1},
            "env": {
                "domain_randomization": False,
                "task_types": [1, 2, 3, 4, 5, 6],
                "expert_type": "handcoded",
                "goal_desc_human_anns_prob": 0.0,
            },
            "general": {"training_method": "dagger"},
            "dagger": {"training": {"max_nb_steps_per_episode": self.engine_max_steps}},
        }
        return get_environment("AlfredTWEnv")(config, train_eval="eval_in_distribution")

    def tasks(self, split):
        """Games of valid_seen, valid_unseen or train -> [{"id": "folder/trial", "task", "type", "gamefile"}].

        Raises UserError where the engine, its data or the split is missing, or a file is damaged."""
        root = check_data(split)
        try:
            with quiet_engine():
                gamefiles = self.alfred_env(root).game_files
        except Exception as error:  # it reads every file and does not say which one it could not read
            for path in sorted(glob.glob(os.path.join(glob.escape(root), "**", "*.*"), recursive=True)):
                if path.endswith((".json", ".tw-pddl")):
                    read_game(path)
            raise UserError(f"ALFWorld cannot read the games in {root}: {error!r}") from error
        if not gamefiles:
            splits = sorted(os.listdir(os.path.dirname(root)))
            raise UserError(f"no games in {root}: use a --split of {splits} or run alfworld-download")
        tasks = []
        for gamefile in gamefiles:
            task_id = os.path.relpath(os.path.dirname(gamefile), root).replace(os.sep, "/")
            goal = re.search(r'Your task is to: (.*?)"', str(read_game(gamefile).get("grammar")))
            if goal is None:
                raise UserError(f"{gamefile} states no task, so it is no game of ALFWorld: delete its folder")
            kind_of_task = task_id.split("-")[0]
            tasks.append({"id": task_id, "task": goal[1], "type": kind_of_task, "gamefile": gamefile})
        # by a hash, so that the first N are a sample: by name the first 20 of valid_seen are of two types only
        return sorted(tasks, key=lambda task: seed_for("game", task["id"]))

    def reset(self, task):
        """Start a game -> room and task, as turn 2 of ETO's conversations has them."""
        with quiet_engine():
            # one environment for all games: each loads another copy of the planner and never lets go of it
            if self.env is None:
                self.env = self.alfred_env(os.path.dirname(task["gamefile"])).init_env(batch_size=1)
                self.env.request_infos.facts = True
                remember_translations()
            self.env.gamefiles = [task["gamefile"]]  # it draws from a shuffled pool: make this one the pool
            self.env.seed()
            observations, infos = self.env.reset()
        self.admissible, self.facts = infos["admissible_commands"][0], infos["facts"][0]
        return observations[0].split("\n\n", 1)[1].strip()  # without the line of welcome

    def step(self, action):
        """One action, None if the reply had none -> (observation, reward, done, {"won", "invalid"})."""
        if action is None:
            text = "Observation: Error: the reply has no line 'Action: <your next action>'."
            return text, 0.0, False, {"won": False, "invalid": True}
        for pattern, wording in WORDINGS:
            other = re.sub(f"^{pattern}$", wording, action)
            if action not in self.admissible and other in self.admissible:
                action = other
        observations, _, dones, infos = self.env.step([action])
        self.admissible, won = infos["admissible_commands"][0], bool(infos["won"][0])
        text = observations[0].strip()
        for pattern, published in ANSWERS:
            text = re.sub(pattern, published, text)
        info = {"won": won, "invalid": text == "Nothing happens."}
        return "Observation: " + text, float(won), bool(dones[0]), info

    def look_around(self, task):
        """What a game's sender may be told -> {"opening": room and task, "place": where the goal's things are}."""
        opening = self.reset(task)
        things, _, _ = locate(task, read_goal(task), self.facts)
        return {"opening": opening, "place": place_in_words(things)}

    def demonstrate(self, task):
        """Two conversations that win this game, see `demonstrate` below."""
        return demonstrate(self, task)

    @staticmethod
    def parse_action(reply):
        """The text after the first "Action:" up to the end of its line; None if there is none."""
        match = ACTION_LINE.search(reply)
        return match and match[1].strip()

    @staticmethod
    def cut_reply(reply):
        """The reply up to the end of its action line, as the released code has it: an observation that the
        actor makes up never enters the conversation."""
        match = ACTION_LINE.search(reply)
        return reply[:match.end()].strip() if match else reply


ACTION_LINE = re.compile(r"Action:[ \t]*(\S[^\n]*)")


def check_data(split):
    """The folder of a split's games. Raises UserError when the engine or its data is missing."""
    if importlib.util.find_spec("alfworld") is None:
        raise UserError("--env alfworld needs the game engine: pip install alfworld")
    data = os.environ.get("ALFWORLD_DATA") or os.path.expanduser("~/.cache/alfworld")
    if not os.path.isdir(os.path.join(data, "json_2.1.1")):
        raise UserError(f"no games in {data}: set ALFWORLD_DATA to the folder with json_2.1.1, which "
                        "alfworld-download fetches")
    os.environ["ALFWORLD_DATA"] = data  # before alfworld is imported, which reads it or makes a folder up
    return os.path.join(data, "json_2.1.1", split)


def read_game(path):
    """A game file of ALFWorld, which is JSON. Raises UserError with its name."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): run alfworld-download -f, or delete its "
                        "folder") from None


def load_game(spec):
    """"alfworld", or "module:Class" of a module that can be imported here -> the class of the game."""
    if spec == "alfworld":
        return AlfworldGame
    module, _, name = spec.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(f"--env takes alfworld or module:Class; {spec} cannot be loaded: {error}") from error


def open_split(spec, split):
    """"alfworld" or "module:Class", and a split -> (the class of the game, its checked tasks)."""
    game = load_game(spec)
    tasks = game().tasks(split)
    if not tasks:
        raise UserError(f"{spec} has no games in split {split}")
    texts = all(isinstance(task.get(key), str) for task in tasks for key in ("id", "task"))
    if not texts or len({task["id"] for task in tasks}) < len(tasks):
        raise UserError(f"{spec}: tasks({split!r}) must give records with a unique text 'id' and a text 'task'")
    return game, tasks


# -----------------------------------------------------------------------------------------------------
# 2. What the house holds

SENDER_KNOWS = ("nothing", "place")
TOOLS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
STATES = {"isClean": "clean", "isHot": "heat", "isCool": "cool"}  # in a goal -> what brings it about


def kind(name):
    """"shelf 10" -> "shelf"."""
    return name.rsplit(" ", 1)[0]


def number(name):
    """"shelf 10" -> 10."""
    return int(name.rsplit(" ", 1)[1])


def read_goal(task):
    """What a game asks for, from its own PDDL -> {"object", "count", "verb", "place", "lamp"}.

        put a clean plate in cabinet     ->  plate, 1, clean, cabinet, None
        put two pen in drawer            ->  pen, 2, None, drawer, None
        look at book under the desklamp  ->  book, 1, None, None, desklamp"""
    goal = read_game(task["gamefile"])["pddl_problem"].partition("(:goal")[2]
    kinds = dict(re.findall(r"objectType (\?\w+) (\w+)Type", goal))  # {"?o1": "Pen", "?o2": "Pen"}
    toggled = re.search(r"isToggled (\?\w+)", goal)
    place = re.search(r"receptacleType \?\w+ (\w+)Type", goal)
    lamp = kinds.pop(toggled[1]).lower() if toggled else None
    return {
        "object": next(iter(kinds.values())).lower(),
        "count": len(kinds),
        "verb": next((verb for state, verb in STATES.items() if state in goal), None),
        "place": place[1].lower() if place else None,
        "lamp": lamp,
    }


def facts_of(facts, name):
    """The engine's facts of one name: "inreceptacle" -> [("mug 1", "shelf 2"), ("pen 1", "desk 1"), ...]."""
    return sorted(tuple(v.name.strip() for v in fact.arguments) for fact in facts if fact.name == name)


def places_of(facts, order=lambda place: (kind(place), number(place))):
    """All places of a house, those open to view first -> ["desk 1", "shelf 1", "shelf 2", ..., "drawer 1"]."""
    closed = closed_places(facts)
    names = [place for place, _ in facts_of(facts, "receptacleatlocation")]
    return sorted(names, key=lambda place: (place in closed, order(place)))


def closed_places(facts):
    return {place for place, in set(facts_of(facts, "openable")) - set(facts_of(facts, "opened"))}


def locate(task, goal, facts):
    """Where the goal's things are at the start -> ([(thing, place)], route, target).

    Of several objects that would do, one that is open to view; the lamp comes last. The route holds the places
    to fetch an object from, the target is where to put it. Of two objects one may lie at such a place already:
    it stays, and the other is put beside it. Where several places would do, the game's id draws one: if it were
    always the first, room and task would tell most of a plan, and an actor learned to guess instead of reading."""
    order = places_of(facts, lambda place: seed_for("place", task["id"], place))
    things = facts_of(facts, "inreceptacle")
    targets = [place for place in order if kind(place) == goal["place"]]
    target = targets[0] if targets else None
    objects = {}
    for thing, place in sorted(things, key=lambda pair: (order.index(pair[1]), number(pair[0]))):
        if kind(thing) == goal["object"]:
            objects.setdefault(thing, place)  # a keychain in a safe on a dresser has two places
    there = []
    if goal["count"] == 2:
        there = [(thing, place) for thing, place in objects.items() if place in targets][:1]
        target = there[0][1] if there else target
    fetched = [(thing, place) for thing, place in objects.items() if goal["verb"] or place != target]
    fetched = fetched[:goal["count"] - len(there)]
    lamps = [(thing, place) for thing, place in things if kind(thing) == goal["lamp"]]
    route = [place for _, place in fetched]
    lamps.sort(key=lambda lamp: (lamp[1] not in route, order.index(lamp[1])))  # beside the object, if it can be
    return fetched + there + lamps[:1], route, target


def place_in_words(things):
    """[("fork 3", "diningtable 1")] -> "fork 3 is at diningtable 1."."""
    return " ".join(f"{thing} is at {place}." for thing, place in things)


def sender_text(opening, place, sender_knows="nothing"):
    """What a sender reads of a game: room and task; if it has seen the house, first where things are."""
    return f"You have seen this house: {place}\n\n{opening}" if sender_knows == "place" else opening


ROOMS = {}  # {game file: what `look_around` says}, of this process: each K of --latent_steps asks for the same


def sender_tasks(spec, split, max_samples=None, known=None, sender_knows="nothing", rooms_path=None, rank=0,
                 world=1):
    """A rank's share of the games of a split, as the sender reads them -> [{"id", "task", "type"?}].

    In ALFWorld it reads room and task, as in turn 2 of ETO's conversations, and with sender_knows "place" first
    where the goal's things are at the start, which the actor is never told. Only a game that was started tells
    its room. Any other game's sender reads the game's `task`.
    known: {id: {"task"}} of games that were read before; rooms_path: a .json that keeps what is read, so that
    who is killed does not read it again."""
    if sender_knows != "nothing" and spec != "alfworld":
        raise UserError("--sender_knows place is for --env alfworld, whose files tell where things are")
    game, games = open_split(spec, split)
    games = games[:max_samples][rank::world]
    texts = {task["id"]: task["task"] for task in games}
    if game is AlfworldGame:
        kept = read_json(rooms_path) if rooms_path and os.path.exists(rooms_path) else {}
        rooms = kept | {task["id"]: ROOMS[task["gamefile"]] for task in games if task["gamefile"] in ROOMS}
        unread = [task for task in games if task["id"] not in (known or {}) and task["id"] not in rooms]
        for answers in in_workers("look_around", unread, "rooms", rank):
            for task, answer in answers:
                if not isinstance(answer, Crash):  # else the evaluation reports it; here the goal is enough
                    rooms[task["id"]] = ROOMS[task["gamefile"]] = answer
            if rooms_path:
                write_json(rooms_path, rooms)
        texts |= {task_id: sender_text(**answer, sender_knows=sender_knows) for task_id, answer in rooms.items()}
    texts |= {task_id: record["task"] for task_id, record in (known or {}).items()}
    return [{key: task[key] for key in ("id", "type") if key in task} | {"task": texts[task["id"]].strip()}
            for task in games]


# -----------------------------------------------------------------------------------------------------
# 3. Many games at once

class Crash(str):
    """Why a game could not go on; stands where its answer would."""


def spare_cores():
    """Cores of this process: those it may run on, shared with the other ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def ask(games, make_game, slot, method, argument):
    """Call a method of one slot's game -> (answer or Crash, milliseconds): nothing that it raises gets further."""
    start = time.perf_counter()
    try:
        if method != "step" and slot not in games:
            games[slot] = make_game()
        if slot in games:
            answer = getattr(games[slot], method)(argument)
            if method == "step":
                answer[3]["won"]  # what a game must say, checked where its faults are caught
        else:
            answer = Crash("its process died in another game")
    except (Exception, SystemExit) as error:  # SystemExit: how ALFWorld's planner gives up
        games.pop(slot, None)
        answer = Crash(" ".join(f"{type(error).__name__}: {error}".split()))  # on one line
    return answer, 1000 * (time.perf_counter() - start)


def serve(make_game, pipe, evaluator_end):
    """A worker process: answers until the evaluator is gone, which closes the other end of the pipe."""
    evaluator_end.close()  # our copy; workers forked earlier keep theirs, so the last one leaves first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the evaluator
    games = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(ask(games, make_game, *pipe.recv()))


class GameWorkers:
    """One game per slot 0, 1, 2, ..., in num_workers processes, or in this process if num_workers is 0.

        reset({slot: task}) -> {slot: first human turn}
        step({slot: action}) -> {slot: (observation, reward, done, info)}

    The processes work at the same time; a task always goes to the process that had it first, whose engine
    remembers it. A Crash as the answer ends that slot's game and no other's, unless they shared a process and it
    died, or was killed because it gave no answer within `timeout` seconds (num_workers above 0 only). `ms` holds
    the duration of each slot's last request."""

    def __init__(self, make_game, num_workers=0, timeout=120):
        self.make_game, self.timeout, self.games, self.ms = make_game, timeout, {}, {}
        self.home, self.index_of = {}, {}  # {task id: its process}, {slot: its process}
        self.workers = [None] * num_workers  # (process, our end of its pipe)
        for index in range(num_workers):
            self.start(index)

    def start(self, index):
        # fork, as torch's DataLoader does: ready in 0.05 s with 20 MB, where spawn would import torch again in
        # each worker (3 s, 170 MB). Safe after a model is loaded too: games use neither torch nor the GPU.
        context = multiprocessing.get_context("fork")
        pipe, worker_end = context.Pipe()
        process = context.Process(target=serve, args=(self.make_game, worker_end, pipe), daemon=True)
        process.start()
        worker_end.close()
        self.workers[index] = process, pipe

    def reset(self, tasks):
        return self.request("reset", tasks)

    def step(self, actions):
        return self.request("step", actions)

    def request(self, method, arguments):
        """Call a method of the games of some slots, {slot: its argument} -> {slot: answer or Crash}."""
        if not self.workers:
            answers = {}
            for slot, argument in arguments.items():
                answers[slot], self.ms[slot] = ask(self.games, self.make_game, slot, method, argument)
            return answers
        for slot, argument in arguments.items():
            if method != "step":
                next_worker = len(self.home) % len(self.workers)
                self.index_of[slot] = self.home.setdefault(argument["id"], next_worker)
        answers, waiting = {}, list(arguments)
        busy = {}  # {pipe: (deadline, worker, slot)}, one request per worker
        while waiting or busy:
            for slot in list(waiting):
                pipe = self.workers[self.index_of[slot]][1]
                if pipe not in busy:
                    waiting.remove(slot)
                    busy[pipe] = time.monotonic() + self.timeout, self.index_of[slot], slot
                    with contextlib.suppress(OSError):  # it died since its last answer: the read below says so
                        pipe.send((slot, method, arguments[slot]))
            first_deadline = min(busy.values())[0]
            ready = multiprocessing.connection.wait(busy, max(0, first_deadline - time.monotonic()))
            late = [pipe for pipe in busy if pipe not in ready and busy[pipe][0] <= time.monotonic()]
            for pipe in ready + late:
                _, index, slot = busy.pop(pipe)
                process = self.workers[index][0]
                try:
                    if pipe in late:
                        process.kill()
                        raise EOFError
                    answers[slot], self.ms[slot] = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    pipe.close()
                    answers[slot] = Crash(f"its process died with exit code {process.exitcode}")
                    self.ms[slot] = 0.0
                    if pipe in late:
                        answers[slot] = Crash(f"no answer within {self.timeout:g} s")
                        self.ms[slot] = 1000 * self.timeout
                    self.start(index)
        return answers

    def close(self):
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()


def in_workers(method, tasks, desc, rank=0, per_worker=8):
    """Call a method of AlfworldGame for every task, in worker processes and with a bar.

    Yields [(task, answer or Crash)] of some tasks at a time."""
    if not tasks:
        return
    workers = GameWorkers(AlfworldGame, min(spare_cores(), len(tasks)), timeout=600)
    step = per_worker * len(workers.workers)
    with progress(total=len(tasks), desc=desc, unit="game", rank=rank) as bar:
        for start in range(0, len(tasks), step):
            some = tasks[start:start + step]
            answers = workers.request(method, dict(enumerate(some)))
            yield [(task, answers[slot]) for slot, task in enumerate(some)]
            bar.update(len(some))
    workers.close()


# -----------------------------------------------------------------------------------------------------
# 4. Demonstrations

# Opens the demonstrations, whose agents do not write down what they think.
ACTION_INSTRUCTION = """You are in a household and have one task to carry out. After each of your turns you \
are told what you observe. Answer with one line:
Action: your next action
The actions are: go to {place}, examine {place}, open {place}, close {place}, take {object} from {place}, \
put {object} in/on {place}, clean {object} with {place}, heat {object} with {place}, \
cool {object} with {place}, use {object}."""


def demonstrate(game, task):
    """How one who knows the place and one who searches win a game -> {"direct": record, "search": record}.

    Both follow the same rule, `actions_to_win`, and differ in the places they go to. (The engine's planner can
    need minutes for a game, and its handcoded expert does not know the wording of these files.) Raises
    ValueError where the rule does not win."""
    goal, opening = read_goal(task), game.reset(task)
    things, route, target = locate(task, goal, game.facts)
    lamp_places = [place for thing, place in things if kind(thing) == goal["lamp"]]
    direct = play_out(game, actions_to_win(game, goal, route, target, lamp_places))
    game.reset(task)
    search = play_out(game, actions_to_win(game, goal, *search_route(goal, game.facts)))
    names = {"id": task["id"], "type": task["type"]}
    known = {
        "sender_task": sender_text(opening, place_in_words(things), "place"),
        "plan": plan_in_words([action for action, _ in direct]),
    }
    return {
        "direct": names | known | {"conversations": conversation(opening, direct)},
        "search": names | {"conversations": conversation(opening, search)},
    }


def search_route(goal, facts):
    """Where one who has not seen the house looks -> (places for the object, target, places for the lamp).

    First where such an object may lie at all, and of these first what is open to view; not at the target."""
    order = places_of(facts)
    target = next((place for place in order if kind(place) == goal["place"]), None)
    fitting = {place for place, thing in facts_of(facts, "cancontain") if thing == goal["object"] + "type"}
    route = sorted(order, key=lambda place: kind(place) + "type" not in fitting)
    return [place for place in route if goal["verb"] or place != target], target, order


def actions_to_win(game, goal, route, target, lamp_places):
    """Yields actions: go along the route until there is an object to take, do with it what the goal says, and
    once more if it wants two. What there is at a place is read from the commands that the game admits there."""
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
            tool = next(place for place in places_of(game.facts) if kind(place) == TOOLS[goal["verb"]])
            yield from arrive(game, here, tool, set())  # it need not be opened
            here = tool
            yield f"{goal['verb']} {thing} with {tool}"
        if goal["lamp"]:  # of the places that were visited only those with a lamp, and these first
            places = [place for place in lamp_places if visited.get(place, True)]
            for place in sorted(places, key=lambda place: (place != here, place not in visited)):
                yield from arrive(game, here, place, closed)
                here = place
                if admitted(game, f"use {goal['lamp']}"):
                    yield admitted(game, f"use {goal['lamp']}")[0]
                    return
        else:
            yield from arrive(game, here, target, closed)
            here = target
            yield f"put {thing} in/on {target}"


def arrive(game, here, place, closed):
    """The actions that lead from `here` to a place and open it; it is then no longer `closed`."""
    actions = []
    if place != here:  # two cabinets side by side: one does not go from one to the other, one looks into it
        actions.append(f"go to {place}" if f"go to {place}" in game.admissible else f"examine {place}")
    if place in closed:
        closed.remove(place)
        actions.append(f"open {place}")
    return actions


def admitted(game, start, end=""):
    """The commands "start N end" that the game admits here, by their number N."""
    matches = [re.fullmatch(rf"{start} (\d+){end}", command) for command in game.admissible]
    return [match[0] for match in sorted(filter(None, matches), key=lambda match: int(match[1]))]


def play_out(game, actions):
    """Play actions up to the one that wins -> [(action, observation)]. Raises ValueError if none does."""
    turns = []
    for action in actions:
        observation, _, _, info = game.step(action)
        turns.append((action, observation))
        if info["won"]:
            return turns
    raise ValueError(f"not won by {[action for action, _ in turns]}")


def conversation(opening, turns):
    """[(action, observation)] of a won game -> turns of ETO's format, which end with the action that wins."""
    values = [ACTION_INSTRUCTION, "OK", opening]
    for action, observation in turns:
        values += [f"Action: {action}", observation]
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values[:-1])]


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


# -----------------------------------------------------------------------------------------------------

def get_args(argv):
    parser = Parser(prog="games.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("demonstrate", help="conversations that win ALFWorld's games", allow_abbrev=False)
    p.add_argument("--split", default="train", help="train, valid_seen or valid_unseen")
    p.add_argument("--output_dir", required=True, help="gets SPLIT_direct.jsonl and SPLIT_search.jsonl")
    p.add_argument("--max_samples", type=positive, help="only the first N games")
    p.add_argument("--max_steps", type=positive, default=20, help="a longer search is not written")
    return parser.parse_args(argv)


@one_line_errors("games.py")
def main(argv=None):
    args = get_args(argv)
    _, tasks = open_split("alfworld", args.split)
    tasks = tasks[:args.max_samples]

    # ---- what an earlier run has made
    paths = {name: os.path.join(args.output_dir, f"{args.split}_{name}.jsonl") for name in ("search", "direct")}
    records = {name: read_json(path) if os.path.exists(path) else [] for name, path in paths.items()}
    done = {record["id"] for record in records["direct"]}  # this file is written last
    records["search"] = [record for record in records["search"] if record["id"] in done]
    pending = [task for task in tasks if task["id"] not in done]

    # ---- play
    failed = 0
    for answers in in_workers("demonstrate", pending, "demonstrate"):
        for task, answer in answers:
            if isinstance(answer, Crash):
                failed += 1
                progress.write(f"{task['id']}: {answer}", file=sys.stderr)
                continue
            records["direct"].append(answer["direct"])
            if steps_of(answer["search"]) <= args.max_steps:
                records["search"].append(answer["search"])
        for name, path in paths.items():
            write_text(path, "".join(json.dumps(record) + "\n" for record in records[name]))

    # ---- what there is now
    for name, path in paths.items():
        steps = [steps_of(record) for record in records[name]]
        mean = sum(steps) / max(1, len(steps))
        print(f"{path}: {len(steps)} of {len(tasks)} games, {mean:.1f} steps, {max(steps, default=0)} at most")
    if failed:
        raise UserError(f"{failed} of {len(tasks)} games could not be won by the rule or crashed, see above")


if __name__ == "__main__":
    main()
