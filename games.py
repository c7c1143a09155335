"""
The games that an actor plays: ALFWorld's own engine, and worker processes that play many games at once.

A game is any class with these methods; success is info["won"], never done:

    tasks(split) -> [{"id", "task", ...}]     reset(task) -> first human turn
    step(action) -> (observation, reward, done, info)

and, if it wants, sender_text(task) -> what its sender is asked, if that is not task["task"];
parse_action(reply) -> action; cut_reply(reply) -> what the conversation keeps of a reply, which ends at the first
line end behind which it cuts; `instruction`, which opens the first turn unless the actor was trained with another.
"""
import contextlib
import copy
import functools
import glob
import importlib.util
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from concurrent import futures

from common import UserError, load_object, progress, read_json, seed_for, write_json

# ---- 1. The game ---------------------------------------------------------------------------------
# The facts and the list of actions of the instruction that opens ETO's training conversations, in our words.
INSTRUCTION = """You are an agent in a household and have one task to carry out there. The room and the \
task are described below; after each of your turns you are told what you observe.
In every turn, think about the situation first and then choose one action. Reply in exactly this format:
Thought: your thoughts
Action: your next action

These are the actions, with {obj} for an object and {recep} for a receptacle, each with its number: \
go to {recep}, take {obj} from {recep}, put {obj} in/on {recep}, open {recep}, close {recep}, \
toggle {obj} {recep}, clean {obj} with {recep}, heat {obj} with {recep}, cool {obj} with {recep}.
"Nothing happens." means that the action was not possible there: try another one."""

# What an agent says -> what this game may call it: `put` or `move` is up to the version that made the game
# file, and ETO's list has a `toggle` that no version knows.
WORDINGS = ((r"put (.+) in/on (.+)", r"move \1 to \2"), (r"move (.+) to (.+)", r"put \1 in/on \2"),
            (r"toggle (\S+ \d+).*", r"use \1"))
# What the engine answers -> what published transcripts say there: no "You arrive at loc 7.", and `put` where
# the game files that alfworld-download fetches say "You move the mug 1 to the shelf 1."
ANSWERS = ((r"^You arrive at [^.]*\. ", ""),
           (r"^You move the (.+) to the (.+)\.$", r"You put the \1 in/on the \2."))
ACTION_LINE = re.compile(r"Action:[ \t]*(\S[^\n]*)")


@functools.cache  # once a process
def remember_translations():
    """Have the engine translate and parse nothing twice in this process, for 1 MB a game: its first reset takes
    half the time, any later one a tenth, and a step a third."""
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule
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
    env = None  # one for all games: each loads another copy of the planner and never lets go of it

    def start_engine(self, folder):
        from alfworld.agents.environment import get_environment
        config = {
            "dataset": {"eval_id_data_path": folder, "num_eval_games": -1},
            "env": {"domain_randomization": False, "task_types": [1, 2, 3, 4, 5, 6],
                    "expert_type": "handcoded", "goal_desc_human_anns_prob": 0.0},
            "general": {"training_method": "dagger"},
            "dagger": {"training": {"max_nb_steps_per_episode": self.engine_max_steps}},
        }
        engine = get_environment("AlfredTWEnv")(config, train_eval="eval_in_distribution")
        env = engine.init_env(batch_size=1)
        env.request_infos.facts = True
        remember_translations()
        return env

    def tasks(self, split):
        """Games of train, valid_seen or valid_unseen -> [{"id": folder/trial, "task", "type", "gamefile"}].

        Raises UserError where the engine, its data or the split is missing, or a game file is damaged."""
        if importlib.util.find_spec("alfworld") is None:
            raise UserError("--env alfworld needs the game engine: pip install alfworld")
        data = os.environ.get("ALFWORLD_DATA") or os.path.expanduser("~/.cache/alfworld")
        root, tasks = os.path.join(data, "json_2.1.1", split), []
        if not os.path.isdir(os.path.dirname(root)):
            raise UserError(f"no json_2.1.1 in {data}: set ALFWORLD_DATA or run alfworld-download")
        os.environ["ALFWORLD_DATA"] = data  # before alfworld is imported, which reads it or makes a folder up
        for name in glob.glob("**/game.tw-pddl", root_dir=root, recursive=True):
            path = os.path.join(root, name)
            game = read_json(path)
            if "movable" in name or "Sliced" in name or not game.get("solvable"):
                continue  # the engine does not take these games either
            goal = re.search(r'Your task is to: (.*?)"', str(game.get("grammar")))
            if goal is None:
                raise UserError(f"{path} states no task, so it is no game of ALFWorld: delete its folder")
            task_id = os.path.dirname(name).replace(os.sep, "/")
            tasks.append({"id": task_id, "task": goal[1], "type": task_id.split("-")[0], "gamefile": path})
        if not tasks:
            splits = sorted(os.listdir(os.path.dirname(root)))
            raise UserError(f"no games in {root}: use a --split of {splits} or run alfworld-download")
        # by a hash, so that the first N are a sample: by name the first 20 of valid_seen have two types only
        return sorted(tasks, key=lambda task: seed_for("game", task["id"]))

    def reset(self, task):
        """Start a game -> room and task, as turn 2 of ETO's conversations has them."""
        argv = sys.argv  # which the planner overwrites; and the engine prints when it starts
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if self.env is None:
                    self.env = self.start_engine(os.path.dirname(task["gamefile"]))
                self.env.gamefiles = [task["gamefile"]]  # it draws from a pool: make this one the pool
                self.env.seed()
                observations, infos = self.env.reset()
        finally:
            sys.argv = argv
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

    def sender_text(self, task):
        """The sender is asked room and task: only a started game tells its room."""
        return self.reset(task)

    @staticmethod
    def parse_action(reply):
        """The text after the first "Action:" up to the end of its line; None if there is none."""
        match = ACTION_LINE.search(reply)
        return match and match[1].strip()

    @staticmethod
    def cut_reply(reply):
        """The reply up to the end of its action line, as released: no observation that the actor made up."""
        match = ACTION_LINE.search(reply)
        return reply[:match.end()].strip() if match else reply


def open_split(spec, split):
    """"alfworld", or "module:Class" that can be imported here -> (the class of the game, its checked tasks)."""
    game = AlfworldGame if spec == "alfworld" else load_object(spec, "--env")
    try:
        tasks = game().tasks(split)
    except UserError:
        raise
    except Exception as error:  # whatever a user's game raises, most of all for a split that it does not have
        raise UserError(f"{spec} has no games in split {split}: tasks({split!r}) raised {error!r}") from error
    if not tasks:
        raise UserError(f"{spec} has no games in split {split}")
    fields = [task.get(key) if isinstance(task, dict) else None for task in tasks for key in ("id", "task")]
    if not all(isinstance(text, str) for text in fields) or len({task["id"] for task in tasks}) < len(tasks):
        raise UserError(f"{spec}: tasks({split!r}) must give records with a unique text 'id' and text 'task'")
    return game, tasks


# ---- 2. Many games at once -----------------------------------------------------------------------
class Crash(str):
    """Why a game could not go on; stands where its answer would."""


def spare_cores():
    """Cores of this process: those it may run on, shared with the other ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def ask(games, make_game, slot, method, argument):
    """Call a method of one slot's game -> (answer or Crash, milliseconds), whatever it raises."""
    if method == "step" and slot not in games:
        return Crash("its process died in another game"), 0.0
    start = time.perf_counter()
    try:
        if slot not in games:
            games[slot] = make_game()
        answer = getattr(games[slot], method)(argument)
        if method == "step":
            answer[0].strip(), answer[3]["won"]  # what a game must say, checked where its faults are caught
        if method in ("reset", "sender_text"):
            answer.strip()
    except (Exception, SystemExit) as error:  # SystemExit: how ALFWorld's planner gives up
        games.pop(slot, None)
        place = traceback.extract_tb(error.__traceback__)[-1]
        answer = Crash(" ".join(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})".split()))
    return answer, 1000 * (time.perf_counter() - start)


def start_worker(make_game):
    """The first that a worker process does; then it answers `ask_here`."""
    def end_with_evaluator():
        multiprocessing.parent_process().join()  # who is killed tells nobody
        os._exit(1)

    global of_this_worker
    of_this_worker = {}, make_game
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the evaluator
    threading.Thread(target=end_with_evaluator, daemon=True).start()


def ask_here(*question):
    return ask(*of_this_worker, *question)


class GameWorkers:
    """One game per slot 0, 1, 2, ..., in num_workers processes; 0: in this process.

        reset({slot: task}) -> {slot: first human turn}
        step({slot: action}) -> {slot: (observation, reward, done, info)}

    A task always goes to the process that had it first, whose engine remembers it. A Crash as the answer ends
    that slot's game, and the others of its process if that died, or was killed because it gave no answer within
    `timeout` seconds (num_workers above 0 only). `ms`: how long each slot's last request took."""

    def __init__(self, make_game, num_workers=0, timeout=120):
        self.make_game, self.timeout = make_game, timeout
        self.games, self.ms, self.worker_of_task, self.worker_of_slot = {}, {}, {}, {}
        self.workers = [self.start() for _ in range(num_workers)]  # [(executor, its process)]

    def start(self):
        # fork takes 0.05 s and 20 MB, spawn 3 s and 170 MB; games use neither torch nor the GPU
        context = multiprocessing.get_context("fork")
        executor = futures.ProcessPoolExecutor(1, context, start_worker, (self.make_game,))
        pid = executor.submit(os.getpid).result()  # the first job starts the process
        return executor, next(child for child in multiprocessing.active_children() if child.pid == pid)

    def close(self):
        for executor, process in self.workers:
            process.kill()
            executor.shutdown()

    def request(self, method, arguments):
        """Call a method of the games of some slots, {slot: its argument} -> {slot: answer or Crash}."""
        replies, questions = {}, [[] for _ in self.workers]  # questions of each worker, in order
        for slot, argument in arguments.items():
            if not self.workers:
                replies[slot] = ask(self.games, self.make_game, slot, method, argument)
                continue
            if method != "step":
                next_worker = len(self.worker_of_task) % len(self.workers)
                self.worker_of_slot[slot] = self.worker_of_task.setdefault(argument["id"], next_worker)
            questions[self.worker_of_slot[slot]].append((slot, method, argument))
        try:
            jobs = [self.submit(n, part) for n, part in enumerate(questions)]  # all workers are at it
            start = time.perf_counter()
            for n, part in enumerate(questions):
                asked = start  # when the question whose answer is awaited came up
                for k, (slot, _, _) in enumerate(part):
                    replies[slot] = self.answer(n, jobs[n][k], asked)
                    if jobs[n][k].exception():  # the worker is a new one, for the questions that wait
                        jobs[n][k + 1:] = self.submit(n, part[k + 1:])
                    asked = time.perf_counter()
        except BaseException:  # Ctrl-C does not wait for a game that hangs
            self.close()
            raise
        self.ms |= {slot: ms for slot, (_, ms) in replies.items()}
        return {slot: replies[slot][0] for slot in arguments}

    reset = functools.partialmethod(request, "reset")
    step = functools.partialmethod(request, "step")

    def submit(self, n, questions):
        try:
            return [self.workers[n][0].submit(ask_here, *question) for question in questions]
        except futures.BrokenExecutor:  # its process died since it was last asked
            self.workers[n] = self.start()
            return self.submit(n, questions)

    def answer(self, n, job, asked):
        """What worker n answers -> (answer or Crash, milliseconds). One that does not is replaced."""
        executor, process = self.workers[n]
        try:
            return job.result(max(0, asked + self.timeout - time.perf_counter()))
        except Exception as error:  # it hangs, it died, or its answer cannot be sent
            process.kill()
            executor.shutdown()  # now the job has an exception in any case
            self.workers[n] = self.start()
            if isinstance(error, futures.TimeoutError):
                return Crash(f"no answer within {self.timeout:g} s"), 1000 * self.timeout
            return Crash(f"its process died with exit code {process.exitcode}"), 0.0


def in_workers(game, method, tasks, desc, rank=0):
    """Call a method of a game for every task, with a bar -> yields [(task, answer or Crash)] of some."""
    if not tasks:
        return
    num_workers = min(spare_cores(), len(tasks))
    with (contextlib.closing(GameWorkers(game, num_workers, timeout=600)) as workers,
          progress(total=len(tasks), desc=desc, unit="game", rank=rank) as bar):
        for start in range(0, len(tasks), 8 * num_workers):
            some = tasks[start:start + 8 * num_workers]
            answers = workers.request(method, dict(enumerate(some)))
            yield [(task, answers[slot]) for slot, task in enumerate(some)]
            bar.update(len(some))


def sender_tasks(game, tasks, known=(), path=None, rank=0, method="sender_text"):
    """What the sender of each task is asked -> [{"id", "task", "type"?}]; with method "reset" what the actor is told.

    That is task["task"] where a game has no such method. Raises UserError where it crashes. known: {id: {"task"}} of
    messages that exist, whose games are not started; path: a .json that outlives a kill."""
    texts = {task["id"]: task["task"] for task in tasks}
    if hasattr(game, method):
        name = f"{game.__module__}:{game.__qualname__}"  # another game has other texts for the same ids
        kept = read_json(path).get(name, {}) if path and os.path.exists(path) else {}
        pending = [task for task in tasks if task["id"] not in known and task["id"] not in kept]
        for answers in in_workers(game, method, pending, "sender's tasks", rank):
            for task, answer in answers:
                if isinstance(answer, Crash):
                    raise UserError(f"{name}.{method} of id {task['id']}: {answer}")
                kept[task["id"]] = answer
            if path:
                write_json(path, {name: kept})
        texts |= kept | {task_id: known[task_id]["task"] for task_id in known}
    return [{key: task[key] for key in ("id", "type") if key in task} | {"task": texts[task["id"]].strip()}
            for task in tasks]
