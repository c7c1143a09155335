"""
The games that an actor plays: ALFWorld's own engine, and many games at once in worker processes.

A game is any class with tasks(split) -> [{"id", "task", ...}], reset(task) -> first human turn, and step(action) ->
(observation, reward, done, info); success is info["won"], never done.
"""
import contextlib
import functools
import gc
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

from common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# the game

# The facts and the list of actions of the instruction that opens ETO's training conversations, in our words.
INSTRUCTION = """You are an agent in a household and have one task to carry out there. The room and the task are \
described below; after each of your turns you are told what you observe.
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

# What an agent says -> what this game may call it: `put` or `move` is up to the version that made the game file, and
# ETO's list has a `toggle` that no version knows.
WORDINGS = ((r"put (.+) in/on (.+)", r"move \1 to \2"), (r"move (.+) to (.+)", r"put \1 in/on \2"),
            (r"toggle (\S+ \d+).*", r"use \1"))


@contextlib.contextmanager
def quiet_engine():
    """The engine prints when it loads a split, and its planner overwrites sys.argv at every reset."""
    argv = sys.argv
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.argv = argv


class AlfworldGame:
    """ALFWorld's household games, played through the unmodified AlfredTWEnv, in ETO's conversation format."""
    engine_max_steps = 1000  # the engine's own limit, out of the way: --max_steps is the cap

    def __init__(self, instruction=INSTRUCTION):
        self.instruction, self.env = instruction, None

    def alfred_env(self, folder):
        from alfworld.agents.environment import get_environment
        config = {"dataset": {"eval_id_data_path": folder, "num_eval_games": -1},
                  "env": {"domain_randomization": False, "task_types": [1, 2, 3, 4, 5, 6], "expert_type": "handcoded",
                          "goal_desc_human_anns_prob": 0.0},
                  "general": {"training_method": "dagger"},
                  "dagger": {"training": {"max_nb_steps_per_episode": self.engine_max_steps}}}
        return get_environment("AlfredTWEnv")(config, train_eval="eval_in_distribution")

    def tasks(self, split):
        """Games of valid_seen, valid_unseen or train, sorted -> [{"id": "folder/trial", "task", "type", "gamefile"}].
        Raises UserError when the engine, its data or the split is missing."""
        if importlib.util.find_spec("alfworld") is None:
            raise UserError("--env alfworld needs the game engine: pip install alfworld")
        data = os.environ.get("ALFWORLD_DATA") or os.path.expanduser("~/.cache/alfworld")
        if not os.path.isdir(os.path.join(data, "json_2.1.1")):
            raise UserError(f"no games in {data}: set ALFWORLD_DATA to the folder with json_2.1.1 (alfworld-download)")
        os.environ["ALFWORLD_DATA"] = data  # before the first import of alfworld, which reads it or makes a folder up
        root = os.path.join(data, "json_2.1.1", split)
        try:
            with quiet_engine():
                gamefiles = self.alfred_env(root).game_files
        except Exception as error:  # it reads every file and does not say which one it could not read
            for path in sorted(glob.glob(os.path.join(glob.escape(root), "**", "*.*"), recursive=True)):
                if path.endswith((".json", ".tw-pddl")):
                    read_game(path)
            raise UserError(f"ALFWorld cannot read the games in {root}: {type(error).__name__}: {error}") from error
        if not gamefiles:
            raise UserError(f"no games in {root}: use a --split of {sorted(os.listdir(os.path.dirname(root)))} "
                            "or run alfworld-download")
        tasks = []
        for gamefile in gamefiles:
            task_id = os.path.relpath(os.path.dirname(gamefile), root).replace(os.sep, "/")
            goal = re.search(r'Your task is to: (.*?)"', str(read_game(gamefile).get("grammar")))
            if goal is None:
                raise UserError(f"{gamefile} states no task, so it is no game of ALFWorld: delete its folder")
            tasks.append({"id": task_id, "task": goal[1], "type": task_id.split("-")[0], "gamefile": gamefile})
        return sorted(tasks, key=lambda task: task["id"])  # the engine's order is the file system's

    def reset(self, task):
        """Start a game -> the first human turn: instruction, room and task."""
        with quiet_engine():
            # one environment for all games: each new one loads another copy of the planner and never lets go of it
            if self.env is None:
                self.env = self.alfred_env(os.path.dirname(task["gamefile"])).init_env(batch_size=1)
            self.env.gamefiles = [task["gamefile"]]  # it draws games from a shuffled pool: make this one the pool
            self.env.seed()
            observations, infos = self.env.reset()
        self.admissible = infos["admissible_commands"][0]
        return self.instruction + "\n\n" + observations[0].split("\n\n", 1)[1].strip()  # without the line of welcome

    def step(self, action):
        """One action, None if the reply had none -> (observation, reward, done, {"won", "invalid"})."""
        if action is None:
            text = "Observation: Error: the reply has no line 'Action: <your next action>'."
            return text, 0.0, False, {"won": False, "invalid": True}
        for pattern, wording in WORDINGS:
            if action not in self.admissible and (other := re.sub(f"^{pattern}$", wording, action)) in self.admissible:
                action = other
        observations, _, dones, infos = self.env.step([action])
        self.admissible, won = infos["admissible_commands"][0], bool(infos["won"][0])
        # ETO's transcripts, like ReAct's, leave "You arrive at loc 7." out
        text = re.sub(r"^You arrive at [^.]*\. ", "", observations[0].strip())
        return "Observation: " + text, float(won), bool(dones[0]), {"won": won, "invalid": text == "Nothing happens."}

    @staticmethod
    def parse_action(reply):
        """The text after the first "Action:" up to the end of its line; None if there is none."""
        match = re.search(r"Action:[ \t]*(\S[^\n]*)", reply)
        return match and match.group(1).strip()


def read_game(path):
    """A game file of ALFWorld, which is JSON. Raises UserError with its name."""
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): run alfworld-download -f, or delete its "
                        f"folder") from None


def load_game(spec):
    """"alfworld", or "module:Class" of a module that is installed or in the current folder -> the class of the game."""
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
    ids = [task.get("id") for task in tasks]
    if not all(isinstance(task.get(k), str) for task in tasks for k in ("id", "task")) or len(set(ids)) < len(ids):
        raise UserError(f"{spec}: tasks({split!r}) must give records with a unique text 'id' and a text 'task'")
    return game, tasks


def sender_tasks(spec, split, max_samples, known):
    """The games of a split as the sender reads them -> [{"id", "task", "type"?}]; known {id: {"task"}}: read before.

    In ALFWorld it reads room and task, as in turn 2 of ETO's conversations, on which it was collected for training;
    only a game that was started tells its room. Any other game's sender reads the game's `task`."""
    game, games = open_split(spec, split)
    games = games[:max_samples]
    texts = {task["id"]: known[task["id"]]["task"] if task["id"] in known else task["task"] for task in games}
    unknown = [task for task in games if task["id"] not in known and game is AlfworldGame]
    workers = GameWorkers(functools.partial(AlfworldGame, ""), min(os.cpu_count(), len(unknown)))
    for i in range(0, len(unknown), max(1, len(workers.workers))):
        some = unknown[i:i + len(workers.workers)]
        for slot, room in workers.reset(dict(enumerate(some))).items():
            if not isinstance(room, Crash):  # the evaluation reports it; here the goal is enough
                texts[some[slot]["id"]] = room
    workers.close()
    return [{"id": task["id"], "task": texts[task["id"]].strip(), **{k: task[k] for k in ("type",) if k in task}}
            for task in games]


# ---------------------------------------------------------------------------------------------------------------------
# many games at once

class Crash(str):
    """Why a game could not go on; stands where its answer would."""


def ask(games, make_game, slot, method, argument):
    """reset or step of one slot's game -> (answer or Crash, milliseconds): nothing that a game raises gets further."""
    start = time.perf_counter()
    try:
        if method == "reset" and slot not in games:
            games[slot] = make_game()
        # no game: its process was started anew since
        answer = getattr(games[slot], method)(argument) if slot in games else Crash("its process died in another game")
        if method == "step" and not isinstance(answer, Crash):
            answer[3]["won"]  # what a game must say, checked where its faults are caught
    except (Exception, SystemExit) as error:  # SystemExit: how ALFWorld's planner gives up
        games.pop(slot, None)
        answer = Crash(" ".join(f"{type(error).__name__}: {error}".split()))  # on one line
    return answer, 1000 * (time.perf_counter() - start)


def serve(make_game, pipe, evaluator_end):
    """A worker process: answers until the evaluator is gone, which closes the other end of the pipe."""
    evaluator_end.close()  # our copy; those of workers forked earlier stay, so the workers leave one after another
    gc.freeze()  # the collector would write to, and so copy, all the pages that fork shares
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the evaluator
    games = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(ask(games, make_game, *pipe.recv()))


class GameWorkers:
    """One game per slot 0, 1, 2, ...; slot s lives in process s % num_workers, or in this process if num_workers is 0.

    reset({slot: task}) -> {slot: first human turn}; step({slot: action}) -> {slot: (observation, reward, done, info)}.
    The processes work at the same time. A Crash as the answer ends that slot's game and no other's, unless they shared
    a process and it died, or was killed because it gave no answer within `timeout` seconds (num_workers above 0 only).
    `ms` holds the duration of each slot's last request."""

    def __init__(self, make_game, num_workers=0, timeout=120):
        self.make_game, self.timeout, self.games, self.ms = make_game, timeout, {}, {}
        self.workers = [None] * num_workers  # (process, our end of its pipe)
        for index in range(num_workers):
            self.start(index)

    def start(self, index):
        # fork, as torch's DataLoader does: ready in 0.05 s with 20 MB of its own, where spawn would import torch again
        # in each worker (3 s, 170 MB). Safe after the model is loaded too: games use neither torch nor the GPU.
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
        if not self.workers:
            replies = {slot: ask(self.games, self.make_game, slot, method, arguments[slot]) for slot in arguments}
            self.ms.update({slot: ms for slot, (_, ms) in replies.items()})
            return {slot: answer for slot, (answer, _) in replies.items()}
        answers, waiting, busy = {}, list(arguments), {}  # busy: {pipe: (deadline, worker, slot)}, one per worker
        while waiting or busy:
            for slot in list(waiting):
                index = slot % len(self.workers)
                pipe = self.workers[index][1]
                if pipe not in busy:
                    waiting.remove(slot)
                    busy[pipe] = time.monotonic() + self.timeout, index, slot
                    with contextlib.suppress(OSError):  # died since its last answer: the read below says so
                        pipe.send((slot, method, arguments[slot]))
            ready = multiprocessing.connection.wait(busy, max(0, min(busy.values())[0] - time.monotonic()))
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
                    answers[slot] = Crash(f"no answer within {self.timeout:g} s" if pipe in late else
                                          f"its process died with exit code {process.exitcode}")
                    self.ms[slot] = 1000 * self.timeout if pipe in late else 0.0
                    self.start(index)
        return answers

    def close(self):
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
