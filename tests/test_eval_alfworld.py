"""Stage 4a: batched and cached play equals playing alone without a cache, under every variant, after any kill."""
import csv
import multiprocessing
import os
import signal
import sys
import zlib
from statistics import mean, median, stdev

import pytest
import torch

import collect
import eval_alfworld
import games
from common import read_json, seed_for, wilson_interval, write_json
from data import PLAN_ANNOUNCEMENT, encode_prompt, stop_ids, text_ids, to_turns
from eval_alfworld import episode_path, main
from hf import holes_allowed
from model import LatentActor, LatentShards
from tiny import make_actor, make_lm, message_of, save_model, snapshot, write_messages
from variants import SILENT_VARIANTS, VARIANTS

WIDTH = 24  # of the senders; the actors are 32 wide
MAX_STEPS, MAX_NEW_TOKENS = 5, 6
STOPS = (signal.SIGTERM, signal.SIGINT)


class Game:
    """A deterministic game that lasts `turns` replies; what it answers, and who wins, depends on what was said."""

    def tasks(self, split):
        return {"test": [{"id": f"room {i}/{'abcdefg'[i]}", "task": f"do {i} {'things ' * (i % 3)}",
                          "type": ["even", "odd"][i % 2], "turns": 1 + 5 * i % 7} for i in range(7)],  # 1 to 7 turns
                "crash": [{"id": how, "task": how, "turns": 3, "won": True}
                          for how in ("fine", "reset", "step", "exit", "too", "hang")],
                "broken": [{"id": str(i), "task": "reset", "turns": 1, "won": True} for i in range(2)],
                "one": [{"id": "0", "task": "do it", "turns": 1}]}.get(split, [])

    def reset(self, task):
        if task["task"] == "reset" and not os.environ.get("REPAIRED"):
            raise ValueError("no such room")
        self.task, self.said = task, []
        return f" You are in room {task['id']}. {task['task']} "

    def step(self, action):
        self.said.append(action)
        if self.task["task"] == "step" and len(self.said) == 2:
            raise ValueError("the shelf fell\ndown")
        if self.task["task"] == "exit":
            sys.exit(3)
        if self.task["task"] == "hang":
            signal.pause()
        if self.task["id"] == os.environ.get("DEADLY_ROOM") and len(self.said) == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # without workers, the evaluator itself
        hashed = zlib.crc32(" ".join(self.said).encode())
        done = len(self.said) >= self.task["turns"]
        won = done and self.task.get("won", hashed % 2 == 0)
        observation = f"You see {'a cup and ' * (hashed % 3)}{hashed % 100}."
        return observation, 0.0, done, {"won": won, "invalid": hashed % 5 == 0}


class LineGame(Game):
    """Only the first line of a reply is the action; the sender is told more than the actor."""

    @staticmethod
    def cut_reply(reply):
        return reply.split("\n")[0].strip()

    def sender_text(self, task):
        return f"The code is {len(task['id'])}. {self.reset(task)}"


class OpenGame(Game):
    sender_text = Game.reset  # it is told what the actor is told


TASKS = Game().tasks("test")


def write_plans(directory, tasks, width=WIDTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = {t["id"]: torch.randn(3 + i % 4, width, generator=generator) for i, t in enumerate(tasks)}
    records = {t["id"]: {"task": t["task"], "plan": f"take the cup {i}", "plan_token_ids": [], "sender_ms": 7.0 + i}
               for i, t in enumerate(tasks)}
    return write_messages(directory, latents, records)


def save_talker(directory, *args, lm=None, newline=0, **kwargs):
    """A random actor that says printable ASCII only, so that its text shows its tokens, and often ends its turn, or
    says a newline `newline` times as often as it would."""
    actor = make_actor(*args, **kwargs)
    actor.lm = lm or actor.lm
    head, eot = actor.lm.get_output_embeddings().weight.data, stop_ids(actor.tokenizer)[-1]
    line = actor.tokenizer.convert_tokens_to_ids("Ċ")  # byte-level for a newline
    head[line] = newline * head[94]
    for start, end in ((94, line), (line + 1, eot), (eot + 1, len(head))):
        head[start:end] = 0  # the first 94 ids of a byte-level alphabet are "!" to "~"
    head[eot] *= 2.5
    actor.save(str(directory))
    return str(directory)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Actors, baselines and messages."""
    root, windowed = tmp_path_factory.mktemp("world"), make_lm("mistral", seed=6)
    windowed.config.sliding_window = 40  # holes would fill it: such an actor plays one conversation at a time
    return {"qwen2": save_talker(root / "qwen2", sender_dim=WIDTH),
            "mistral": save_talker(root / "mistral", sender_dim=WIDTH, lm=windowed),
            "llama": save_talker(root / "llama", "llama", "llama3", sender_dim=WIDTH, seed=3),
            "text": save_talker(root / "text", kind="text", seed=4),
            "none": save_talker(root / "none", kind="none", seed=5), "plain": save_model(root / "plain"),
            "messages": write_plans(root / "messages", TASKS),
            "of another": write_plans(root / "of another", TASKS, seed=2),
            "others": write_plans(root / "others", Game().tasks("crash"))}


def argv(world, out, *more, actor="qwen2"):
    """The last of two equal flags wins."""
    return [str(a) for a in [
        "--model_path", world[actor], "--hidden_data", world["messages"], "--env", "test_eval_alfworld:Game",
        "--split", "test", "--max_steps", MAX_STEPS, "--max_new_tokens", MAX_NEW_TOKENS, "--torch_dtype", "fp32",
        "--output_path", out, *more]]


NO_MESSAGES = ["--hidden_data", ""]


def episodes(out):
    """{(label, run, id): record} of all episode files."""
    played = {}
    for folder, _, names in os.walk(os.path.join(out, "episodes")):
        for record in (read_json(os.path.join(folder, name)) for name in names):
            played[record["variant"], record["run"], record["id"]] = record
    return played


def said(out, **changes):
    """All that does not depend on the clock and the machine."""
    clock = {"sender_ms", "actor_ms", "env_ms", "wall_ms", "tokens_per_s", "peak_memory_gb"}
    return {k: {name: v for name, v in r.items() if name not in clock} | changes for k, r in episodes(out).items()}


def replies_of(record):
    return [turn["reply"] for turn in record["turns"]]


def rows(path):
    with open(path) as f:
        return list(csv.DictReader(f))


# ---- batched and cached equals alone without a cache
@torch.no_grad()
def alone(actor, task, variant, shards, ends=()):
    """One episode, every token re-reads the whole history -> [(ids of a reply, ended by itself?)], success. A token
    of `ends` ends a reply in which something was said."""
    tokenizer, table, game = actor.tokenizer, actor.lm.get_input_embeddings(), Game()
    turns = [{"role": "user", "content": game.reset(task).strip()}]
    prompt = encode_prompt(tokenizer, turns, None if variant == "no_comm" else PLAN_ANNOUNCEMENT)
    parts = [table(torch.tensor(prompt[name], dtype=torch.long)) for name in ("before", "after")]
    if variant == "latent":
        parts.insert(1, message_of(actor, shards[task["id"]]))
    if variant == "text":
        plan = tokenizer(shards.records[task["id"]]["plan"], add_special_tokens=False).input_ids
        parts.insert(1, table(torch.tensor(plan)))
    embeds, replies, stop = torch.cat(parts), [], stop_ids(tokenizer, actor.lm)
    for _ in range(MAX_STEPS):
        reply = []
        while len(reply) < MAX_NEW_TOKENS:
            token = actor.lm(inputs_embeds=embeds[None]).logits[0, -1].argmax()
            if token in stop or token in ends and tokenizer.decode(reply).strip():
                break
            reply.append(token.item())
            embeds = torch.cat([embeds, table(token[None])])
        replies.append((reply, len(reply) < MAX_NEW_TOKENS))
        text = tokenizer.decode(reply).strip()
        observation, _, done, info = game.step(text)
        if done:
            return replies, info["won"]
        turns += [{"role": "assistant", "content": text}, {"role": "user", "content": observation}]
        embeds = torch.cat([embeds, table(torch.tensor(encode_prompt(tokenizer, turns)["after"]))])
    return replies, False


def check_alone(path, world, out, ends=""):
    """Each episode on disk is what its actor plays alone -> for each whether its replies ended by themselves."""
    actor, shards, ended = LatentActor.load(path), LatentShards(world["messages"]), []
    for (variant, _, task_id), record in episodes(out).items():
        task = next(task for task in TASKS if task["id"] == task_id)
        replies, won = alone(actor, task, variant, shards, text_ids(actor.tokenizer, ends))
        assert replies_of(record) == [actor.tokenizer.decode(ids).strip() for ids, _ in replies]
        assert record["tokens"] == sum(len(ids) for ids, _ in replies)
        assert record["steps"] == len(replies) and record["success"] == won
        ended.append([by_itself for _, by_itself in replies])
    return ended


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_batched_cached_play_equals_playing_alone_without_a_cache(world, tmp_path, family):
    main(argv(world, tmp_path, "--variants", "latent", "text", "no_comm", "--batch_size", 16, actor=family))
    ended = check_alone(world[family], world, tmp_path)
    assert holes_allowed(LatentActor.load(world[family]).lm) == (family != "mistral")
    assert len(ended) == 21 and {len(replies) for replies in ended} == {1, 2, 3, 4, 5}
    assert 0.1 < mean(sum(ended, [])) < 0.9  # the hard cases were among them


def test_a_reply_ends_with_its_action_line(world, tmp_path):
    """What comes after it is neither said nor read: each later reply is what follows a history without it."""
    path = save_talker(tmp_path / "lines", sender_dim=WIDTH, newline=2)
    main(argv({**world, "qwen2": path}, tmp_path / "o", "--env", "test_eval_alfworld:LineGame"))
    ended = check_alone(path, world, tmp_path / "o", ends="\n")
    assert len(ended) == 7 and set(sum(ended, [])) == {True, False}


def test_batch_size_changes_no_reply(world, tmp_path):
    for size in (1, 3, 16):
        main(argv(world, tmp_path / str(size), "--variants", "latent", "text", "cross_task", "--batch_size", size,
                  "--temperature", 1.0))
    assert said(tmp_path / "16") == said(tmp_path / "1") == said(tmp_path / "3") and len(said(tmp_path / "3")) == 21


# ---- everything in one command
LABELS = [*(name for name in VARIANTS if name != "self"), "another"]


@pytest.fixture(scope="module")
def complete(world, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("complete"))
    main(argv(world, out, "--variants", *LABELS[:-1], "--baseline_path", world["text"], world["none"], "--messages",
              f"another={world['of another']}", actor="llama"))
    return out


def test_files_are_complete(world, complete):
    played, results = episodes(complete), rows(f"{complete}/results.csv")
    assert [(r["variant"], r["run"], r["id"]) for r in results] == [
        (label, "0", task["id"]) for label in LABELS for task in TASKS] and len(played) == len(results)
    assert os.path.getsize(f"{complete}/results.png") > 1000 and not [f for f in os.listdir(complete) if ".tmp" in f]
    for row in results:
        record = played[row["variant"], 0, row["id"]]
        assert row == {name: "" if value is None else str(value) for name, value in record.items()
                       if name not in ("task", "first_turn", "turns")} and len(row) == 21
        assert row["dtype"] == "fp32" and row["device"] in ("cpu", "cuda") and float(row["peak_memory_gb"]) > 0
        assert float(row["wall_ms"]) >= float(row["actor_ms"]) > 0
        assert len(record["turns"]) == record["steps"] <= MAX_STEPS and record["split"] == "test"
        actions = [turn["action"] for turn in record["turns"]]
        hashes = [zlib.crc32(" ".join(actions[:n + 1]).encode()) for n in range(len(actions))]
        assert record["invalid"] == sum(hashed % 5 == 0 for hashed in hashes)
    assert read_json(f"{complete}/summary.json")["actors"] == dict.fromkeys(LABELS, world["llama"]) | {
        "cot_full": world["text"], "no_cot": world["none"]}


def test_variants_differ_in_what_is_read(world, complete):
    played, shards = episodes(complete), LatentShards(world["messages"])
    replies = {str([replies_of(played[label, 0, task["id"]]) for task in TASKS]) for label in LABELS}
    assert len(replies) == len(LABELS)
    for (label, _, task_id), record in played.items():
        expected = {"no_comm": 0, "no_cot": 0, "text": len("take the cup 0"), "cot_full": len("take the cup 0")}
        assert (record["message_of"] == task_id) == (label not in ("cross_task", *SILENT_VARIANTS))
        assert record["message_length"] == expected.get(label, shards.lengths.get(record["message_of"]))
        assert record["sender_ms"] == (0 if label in SILENT_VARIANTS else shards.records[task_id]["sender_ms"])


def test_summary_is_what_the_episodes_say(complete):
    summary, played = read_json(f"{complete}/summary.json")["variants"], episodes(complete)
    assert list(summary) == LABELS
    for variant, figures in summary.items():
        records = [r for (v, *_), r in played.items() if v == variant]
        steps_won = [r["steps"] for r in records if r["success"]]
        assert len(records) == 7 and figures["success"] == pytest.approx(len(steps_won) / 7)
        assert figures["interval"][0] <= figures["success"] <= figures["interval"][1] and figures["games"] == 7
        for key in ("steps", "invalid", "message_length", "sender_ms", "actor_ms", "env_ms"):
            assert figures[key] == pytest.approx(mean(r[key] for r in records))
        assert figures["steps_success"] == (pytest.approx(mean(steps_won)) if steps_won else None)
        assert figures["by_type"] == {
            name: pytest.approx(mean(r["success"] for r in records if r["type"] == name)) for name in ("even", "odd")}
        assert figures["crashed"] == 0 and figures["std"] is None


def test_runs_that_would_be_alike_are_refused(refuses, world, tmp_path):
    for variant in ("latent", "text", "no_comm"):
        refuses(main, argv(world, tmp_path / "o", "--runs", 2, "--variants", "cross_task", variant), "--runs 2",
                "--temperature", variant)
    assert not os.path.exists(tmp_path / "o")
    summary = main(argv(world, tmp_path / "o", "--runs", 2, "--variants", "cross_task", "covgauss0"))
    assert len(summary["cross_task"]["runs"]) == 2  # these draw another message in each run
    sources = {run: [r["message_of"] for (v, k, _), r in sorted(episodes(tmp_path / "o").items())
                     if (v, k) == ("cross_task", run)] for run in (0, 1)}
    assert sources[0] != sources[1]


def test_other_actors_and_messages_play_as_if_alone(world, complete, tmp_path):
    played = said(complete)
    for actor, flags, label in (("text", ["--variants", "text"], "cot_full"),
                                ("none", ["--variants", "no_comm"], "no_cot"),
                                ("llama", ["--hidden_data", world["of another"]], "another")):
        main(argv(world, tmp_path / label, *flags, actor=actor))
        for (_, run, task_id), record in said(tmp_path / label, variant=label).items():
            assert record == played[label, run, task_id]


def test_llama_reads_a_live_qwen2_sender(world, tmp_path, monkeypatch):
    """Full messages and K steps from a sender of another family and width, in one command."""
    sender, handlers, play = save_model(tmp_path / "sender", "qwen2", width=WIDTH, seed=7), set(), eval_alfworld.play
    flags = ["--sender", sender, "--max_plan_tokens", 8, "--prompt_template", "Plan: {task}"]
    monkeypatch.setattr(eval_alfworld, "play", lambda *args, **more: (
        handlers.update(map(signal.getsignal, STOPS)) or play(*args, **more)))
    main(argv(world, tmp_path / "full", "--variants", "latent", "text", *flags, *NO_MESSAGES, actor="llama"))
    assert handlers == set(map(signal.getsignal, STOPS))  # a collection waits for its batch, play does not
    messages, played = LatentShards(str(tmp_path / "full" / "messages")), episodes(tmp_path / "full")
    assert messages.sender["model"] == sender and messages.sender["prompt_template"] == "Plan: {task}"
    for task in TASKS:
        record = played["latent", 0, task["id"]]
        assert record["message_length"] == messages.lengths[task["id"]] and record["sender_ms"] > 0
    summary = main(argv(world, tmp_path / "k", *flags, "--latent_steps", 2, 3, "--variants", "latent", "no_comm",
                        actor="llama"))
    assert list(summary) == ["latent", "latent_k2", "latent_k3", "no_comm"]  # --hidden_data is read beside them
    for steps in (2, 3):
        assert summary[f"latent_k{steps}"]["message_length"] == steps and summary[f"latent_k{steps}"]["sender_ms"] > 0
    assert summary["latent"]["sender_ms"] == pytest.approx(10) and summary["no_comm"]["sender_ms"] == 0


def test_self_and_the_four_differences_by_hand(world, tmp_path, capsys, refuses):
    flags = ["--sender", save_model(tmp_path / "sender", width=WIDTH, seed=7), "--max_plan_tokens", 5, *NO_MESSAGES,
             "--variants", "latent", "self", "cross_task", "no_comm", "--runs", 2, "--temperature", 1.0, "--env"]
    lines = argv(world, tmp_path / "o", *flags, "test_eval_alfworld:LineGame")
    assert list(main(lines)) == ["latent", "cross_task", "no_comm", "self"]
    told, alone = (LatentShards(str(tmp_path / "o" / name)) for name in ("messages", "self/messages"))
    assert not any(torch.equal(told[task["id"]], alone[task["id"]]) for task in TASKS)
    wins = {"latent": [2] * 7, "cross_task": [2] * 6 + [0], "no_comm": [0] * 7, "self": [1] * 7}  # of two runs
    for (label, run, task_id), record in episodes(tmp_path / "o").items():
        shards = alone if label == "self" else told
        assert record["message_length"] == (0 if label == "no_comm" else shards.lengths[record["message_of"]])
        won = run < wins[label][[task["id"] for task in TASKS].index(task_id)]
        write_json(episode_path(tmp_path / "o", label, run, task_id), record | {"success": won})
    capsys.readouterr()
    main(lines)
    unseen = wilson_interval(0, 7)[1]
    expected = {"gain": [1, 1 - 2 * unseen, 1],  # in no game less than 1, nor may it be much less in many
                # one of 7 games: 3 are in its place in 5 % of draws, more in 1 %. Of 14 episodes: 5, not 6
                "pairing": [1 / 7, 0, 3 / 7], "presence": [6 / 7, 4 / 7, 1],
                "own_thoughts": [0.5, 0.5 - 1.5 * unseen, 0.5 + 0.5 * unseen]}
    assert read_json(f"{tmp_path}/o/summary.json")["differences"] == {
        name: pytest.approx(figures) for name, figures in expected.items()}
    screen = capsys.readouterr().out
    assert f"\npairing {1 / 7:+26.3f}{0:+10.3f}{3 / 7:+10.3f}\n" in screen and "(latent - self): " in screen
    near = median(abs(told.lengths[r["message_of"]] - told.lengths[r["id"]])
                  for (label, *_), r in episodes(tmp_path / "o").items() if label == "cross_task")
    assert f"cross_task: another task's message, its length within {near:g} states" in screen
    lines = argv(world, tmp_path / "p", *flags, "test_eval_alfworld:OpenGame")
    assert list(main(lines)) == ["latent", "cross_task", "no_comm"] and "self is left out" in capsys.readouterr().out
    refuses(main, [*lines, "--variants", "self"], "self", "latent")


# ---- what counts
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_game_that_crashes_or_hangs_is_counted_and_the_others_go_on(world, tmp_path, capsys, num_workers):
    games = 6 if num_workers else 5  # without processes nobody ends the game that hangs
    figures = main(argv({**world, "messages": world["others"]}, tmp_path, "--split", "crash", "--num_episodes", games,
                        "--env_workers", num_workers, "--env_timeout", 1))["latent"]
    played = {task_id: record for (*_, task_id), record in episodes(tmp_path).items()}
    expected = {"fine": (3, None), "too": (3, None), "reset": (0, "ValueError: no such room"),
                "step": (2, "ValueError: the shelf fell down"), "exit": (1, "SystemExit: 3")}
    if num_workers:
        expected["hang"] = (1, "no answer within 1 s")
        assert played["hang"]["env_ms"] >= 1000
    why = {task_id: record["crash"] and record["crash"].split(" (")[0] for task_id, record in played.items()}
    assert {task_id: (record["steps"], why[task_id]) for task_id, record in played.items()} == expected
    assert "test_eval_alfworld.py:" in played["reset"]["crash"]  # its place
    assert all(record["success"] == (record["crash"] is None) for record in played.values())
    assert figures["games"] == games and figures["crashed"] == games - 2
    assert figures["success"] == pytest.approx(2 / games)
    heading, row = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("variant", "latent")))
    assert row[:heading.index("crashed") + len("crashed")].split()[-1] == str(games - 2)


def test_where_every_game_crashes_there_is_no_result(world, tmp_path, refuses, monkeypatch):
    flags = argv({**world, "messages": world["others"]}, tmp_path, "--split", "broken", "--variants", "no_comm")
    refuses(main, flags, "all 2 episodes crashed", "ValueError: no such room")
    assert [row["crash"].split(" (")[0] for row in rows(tmp_path / "results.csv")] == ["ValueError: no such room"] * 2
    monkeypatch.setenv("REPAIRED", "1")
    assert main(flags)["no_comm"]["success"] == 1  # the same command plays again what crashed


def test_logits_that_are_no_numbers_are_no_lost_games(world, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(eval_alfworld, "lm_logits", lambda lm, states: torch.full((len(states), 9), torch.nan))
    refuses(main, argv(world, tmp_path), "logits are not finite", "--torch_dtype bf16 or fp32")


def test_no_game_outlives_an_error(world, tmp_path, monkeypatch):
    def play(*args, **more):
        assert len(multiprocessing.active_children()) == 2
        raise RuntimeError("no memory")
    monkeypatch.setattr(eval_alfworld, "play", play)
    with pytest.raises(RuntimeError, match="no memory"):
        main(argv(world, tmp_path, "--env_workers", 2))
    assert not multiprocessing.active_children()


def test_ids_longer_than_file_names(tmp_path):
    names = ["任务" * 60 + end for end in ("a", "b")] + ["x" * 300]
    paths = {episode_path(str(tmp_path), "latent", 0, name) for name in names}
    assert len(paths) == 3 and all(len(os.path.basename(path)) < 255 for path in paths)


def test_runs_have_a_deviation_and_messages_are_cut_to_shares(world, tmp_path):
    summary = main(argv(world, tmp_path, "--runs", 2, "--temperature", 1.0, "--keep_ratio", 1.0, 0.5, 0.0,
                        "--variants", "latent", "no_comm"))
    played, lengths = episodes(tmp_path), LatentShards(world["messages"]).lengths.values()
    assert list(summary) == ["latent", "latent_keep0.5", "latent_keep0", "no_comm"]
    assert summary["latent_keep0.5"]["message_length"] == pytest.approx(mean(round(0.5 * n) for n in lengths))
    assert summary["latent_keep0"]["message_length"] == summary["latent_keep0"]["sender_ms"] == 0
    for variant in summary:
        records = [[played[variant, run, t["id"]] for t in TASKS] for run in (0, 1)]
        assert [replies_of(r) for r in records[0]] != [replies_of(r) for r in records[1]]
        assert [{r["seed"] for r in some} for some in records] == [{0}, {1}]
        means, figures = [mean(r["success"] for r in some) for some in records], summary[variant]
        assert figures["runs"] == pytest.approx(means) and figures["std"] == pytest.approx(stdev(means))
        assert figures["games"] == 7 and figures["success"] == pytest.approx(mean(means))


# ---- kills, restarts, ranks
def test_killed_and_stopped_and_resumed_is_uninterrupted(world, tmp_path, monkeypatch, capsys, forked):
    """The same command plays what is left, in other batches, and nothing twice; Ctrl-C is one line."""
    flags = ["--variants", "latent", "text", "--temperature", 1.0, "--batch_size", 4]
    main(argv(world, tmp_path / "whole", *flags))
    out, played, play = tmp_path / "o", [], eval_alfworld.play
    done = forked("eval_alfworld", argv(world, out, *flags), env={"DEADLY_ROOM": TASKS[5]["id"]})
    assert done["codes"] == [-signal.SIGKILL]
    n_killed = len(episodes(out))
    assert 0 < n_killed < 10 and not os.path.exists(out / "summary.json")

    def interrupted(path, value):
        if len(snapshot(out / "episodes")) == n_killed + 2:
            raise KeyboardInterrupt
        write_json(path, value)
    with monkeypatch.context() as patch:
        patch.setattr(eval_alfworld, "write_json", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(argv(world, out, *flags))
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "Traceback" not in error and "stopped by Ctrl-C" in error.splitlines()[-1]
    before = snapshot(out / "episodes")
    assert len(before) == n_killed + 2 and not os.path.exists(out / "summary.json")
    monkeypatch.setattr(eval_alfworld, "play",
                        lambda actor, jobs, *rest, **more: played.extend(jobs) or play(actor, jobs, *rest, **more))
    for _ in range(2):  # a finished evaluation plays nothing, another variant only itself
        main(argv(world, out, *flags))
        assert len(played) == 14 - len(before) and before.items() <= snapshot(out / "episodes").items()
        assert said(out) == said(tmp_path / "whole") and len(said(out)) == 14
    assert list(main(argv(world, out, *flags, "--variants", "latent", "no_comm"))) == ["latent", "no_comm"]
    assert len(played) == 21 - len(before)


def test_other_settings_or_weights_need_another_folder(world, tmp_path, refuses):
    """Also other arguments of the chat template: those of the flag; without it those of the actor's training."""
    actor = save_talker(tmp_path / "qwen3", "qwen2", "qwen3", sender_dim=WIDTH)
    flags = argv({**world, "qwen2": actor}, tmp_path / "plain", "--self_check", "false", "--num_episodes", 3)
    thinking = ["--chat_template_kwargs", '{"enable_thinking": true}']
    main(flags)
    before = said(tmp_path / "plain")
    refuses(main, [*flags, *thinking, "--max_steps", "6"], "--chat_template_kwargs", "--max_steps", "--output_path")
    save_talker(tmp_path / "qwen3", "qwen2", "qwen3", sender_dim=WIDTH)  # the same weights again
    main(flags)
    main(flags + thinking + ["--output_path", str(tmp_path / "thinking")])
    info = read_json(f"{actor}/latent_adapter.json")
    write_json(f"{actor}/latent_adapter.json", info | {"chat_template_kwargs": {"enable_thinking": True}})
    main(flags + ["--output_path", str(tmp_path / "trained")])
    assert before != said(tmp_path / "thinking") == said(tmp_path / "trained")
    save_talker(tmp_path / "qwen3", "qwen2", "qwen3", sender_dim=WIDTH, seed=9)  # trained anew: another actor
    refuses(main, flags, "--model_path", "--output_path")
    assert said(tmp_path / "plain") == before


def test_two_ranks_equal_one(world, tmp_path, forked):
    """Also in what a sender is asked, of which each rank asks its share, and no actor reads."""
    sender = save_model(tmp_path / "sender", "qwen2", width=WIDTH, seed=7)
    flags = ["--variants", "latent", "no_comm", "self", "--batch_size", 4, "--sender", sender, "--latent_steps", 2,
             "--env", "test_eval_alfworld:LineGame"]
    main(argv(world, tmp_path / "one", *flags))
    done = forked("eval_alfworld", argv(world, tmp_path / "two", *flags), world=2)
    assert done["codes"] == [0, 0], done["err"]
    assert said(tmp_path / "one") == said(tmp_path / "two") and len(said(tmp_path / "two")) == 28
    assert "wrote summary.json" in done["out"][0] and "summary" not in done["out"][1]  # one rank talks
    assert not any("code" in record["first_turn"] for record in said(tmp_path / "two").values())
    for folder, ask in (("two", LineGame().sender_text), ("two/self", LineGame().reset)):
        for task_id, record in LatentShards(f"{tmp_path}/{folder}/messages_k2").records.items():
            assert record["task"] == ask(next(task for task in TASKS if task["id"] == task_id)).strip()
        for rank in (0, 1):
            path, = (tmp_path / folder).glob(f"asked-*-rank{rank:05d}.json")
            assert read_json(str(path))["test_eval_alfworld:LineGame"] == {task["id"]: ask(task) for task in TASKS[rank::2]}


# ---- bad input
@pytest.mark.parametrize("flags, words", [
    (["--variants", "smoke"], ["invalid choice: 'smoke'", "cross_task"]), (["--surprise", 1], ["--surprise"]),
    (["--env", "alfwolrd"], ["alfwolrd", "module:name"]), (["--split", "nowhere"], ["no games", "nowhere"]),
    (["--split", "one"], ["no message for 1 tasks", "0", "collect.py"]), (["--max_steps", 0], ["--max_steps"]),
    (["--hidden_data", "/nowhere"], ["no directory /nowhere"]), (["--model_path", "/nowhere"], ["/nowhere"]),
    (["--baseline_path", "/nowhere", "--variants", "no_cot"], ["/nowhere"]),
    (["--messages", "llama=/nowhere"], ["no directory /nowhere"]), (["--messages", "llama"], ["NAME=DIR"]),
    (["--messages", "llama=WIDE"], ["32 wide", str(WIDTH)]), (["--hidden_data", "WIDE"], ["32 wide", str(WIDTH)]),
    (["--sender", "/nowhere", "--latent_steps", 2], ["/nowhere"]), (["--torch_dtype", "int8"], ["--torch_dtype"]),
    (["--sender", "/nowhere"], ["--hidden_data", "--latent_steps"]), (["--env_timeout", 0], ["--env_timeout"])],
    ids=lambda words: " ".join(map(str, words)))
def test_bad_flags(world, tmp_path, refuses, flags, words):
    wide = write_plans(tmp_path / "wide", TASKS, width=32)
    refuses(main, argv(world, tmp_path / "o", *(str(flag).replace("WIDE", wide) for flag in flags)), *words)
    assert not os.path.exists(tmp_path / "o" / "episodes")


def test_only_who_is_told_nothing_needs_no_message(world, tmp_path, refuses):
    for actor, flags, words in (("plain", [], ["no adapter", "--message latent"]), ("text", [], ["no adapter"]),
                                ("plain", ["--variants", "text"], ["<bop>"])):
        refuses(main, argv(world, tmp_path / "o", *flags, actor=actor), *words)
    for variant in ("latent", "text"):
        refuses(main, argv(world, tmp_path / "o", *NO_MESSAGES, "--variants", variant), variant, "--sender")
    assert not os.path.exists(tmp_path / "o" / "episodes")
    main(argv(world, tmp_path / "o", *NO_MESSAGES, "--variants", "no_comm", "--num_episodes", 2, actor="plain"))
    assert len(episodes(tmp_path / "o")) == 2


def test_context_that_is_too_short(tmp_path, world, refuses):
    short = save_talker(tmp_path / "short", sender_dim=WIDTH, context=200)
    refuses(main, argv({**world, "qwen2": short}, tmp_path / "o", "--variants", "no_comm"), "id room", "200",
            "steps the episode needs", "--max_steps")
    assert 0 < len(said(tmp_path / "o")) < 7  # those that ended in time stay


# ---- the real engine
@pytest.fixture(scope="module")
def household(tmp_path_factory):
    """The six games of valid_seen -> {id: task, with what the engine says first: room and task}."""
    pytest.importorskip("alfworld")
    from alfworld_fixture import make_games
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ALFWORLD_DATA", make_games(tmp_path_factory.mktemp("data")))
        game = games.AlfworldGame()
        yield {task["id"]: task | {"opening": game.reset(task)} for task in game.tasks("valid_seen")}


GARBAGE = ["", "go to shelf 1", "Action: go to the moon"]


def test_walkthroughs_win_all_six_types_and_look_wins_none(world, household, tmp_path, monkeypatch):
    """Scripted replies in place of the decoded ones, the rest of the evaluator's loop as it is."""
    walkthroughs = {}
    for task_id, task in household.items():
        actions = read_json(task["gamefile"])["walkthrough"]
        walkthroughs[task_id] = [f"Thought: clear.\nAction: {action}" for action in actions]
    policies = {"latent": lambda task_id: walkthroughs[task_id], "text": lambda task_id: ["Action: look"] * 12,
                "no_comm": lambda task_id: GARBAGE + walkthroughs[task_id]}
    scripts = {(label, task_id): iter(policy(task_id)) for label, policy in policies.items() for task_id in household}
    asked = {seed_for("reply", 0, *key, step): key for key in scripts for step in range(12)}
    turn = []  # whose it is: a reply's numbers come from a seed of its own
    monkeypatch.setattr(eval_alfworld, "uniform_numbers", lambda seed, steps: (
        turn.append(asked[seed]) or torch.zeros(steps, dtype=torch.float64)))

    def reply(self, logits, is_over, max_new_tokens, temperature, uniforms):
        assert len(logits) == len(turn) == len(uniforms)
        replies = [text_ids(tokenizer, next(scripts[key])) for key in turn]
        turn.clear()
        return replies, set()
    monkeypatch.setattr(eval_alfworld.CachedChat, "reply", reply)
    tokenizer = LatentActor.load(world["qwen2"]).tokenizer
    messages = write_plans(tmp_path / "m", list(household.values()))
    summary = main(argv({**world, "messages": messages}, tmp_path / "o", "--env", "alfworld", "--split", "valid_seen",
                        "--variants", *policies, "--env_workers", 2, "--batch_size", 18, "--max_steps", 12))
    for (label, _, task_id), record in episodes(tmp_path / "o").items():
        steps, invalid = {"latent": (len(walkthroughs[task_id]), 0), "text": (12, 0),
                          "no_comm": (3 + len(walkthroughs[task_id]), 3)}[label]
        won = label == "latent" or label == "no_comm" and steps <= 12
        assert (record["success"], record["steps"], record["invalid"]) == (won, min(steps, 12), invalid)
        assert record["crash"] is None and replies_of(record) == policies[label](task_id)[:12]
        # the first turn of the evaluation is that of the training: turns 0 and 2 of ETO's conversations
        speakers = zip(["human", "gpt", "human"], [games.INSTRUCTION, "OK", household[task_id]["opening"]])
        conversation = [{"from": speaker, "value": text} for speaker, text in speakers]
        assert record["first_turn"] == to_turns({"conversations": conversation}, task_turn=2)[0]["content"]
    assert len(summary["latent"]["by_type"]) == 6 and summary["text"]["steps_success"] is None
    assert 0 < summary["no_comm"]["success"] < 1  # two walkthroughs no longer fit after three steps of garbage


def test_six_real_games_in_one_command(world, household, tmp_path, capsys):
    """A live sender who has seen the house, messages of another one who has not, baselines, most variants."""
    variants = ["latent", "cross_task", "randomrot", "text", "no_comm", "cot_full", "no_cot"]
    sender, other = (save_model(tmp_path / family, family, width=WIDTH) for family in ("llama", "qwen2"))
    out, no_cot = tmp_path / "o", make_actor(kind="none")
    no_cot.info["instruction"] = "You live in a house."  # as train_actor.py keeps it from its file
    no_cot.save(str(tmp_path / "no_cot"))
    collect.main(["alfworld", "--model_name_or_path", other, "--env", "alfworld", "--split", "valid_seen",
                  "--output_dir", str(tmp_path / "m"), "--max_new_tokens", "7", "--torch_dtype", "fp32"])
    summary = main(argv(
        world, out, *NO_MESSAGES, "--env", "examples.alfworld_house:SeenHouse", "--split", "valid_seen",
        "--sender", sender, "--max_plan_tokens", 5, "--messages", f"other={tmp_path / 'm'}", "--baseline_path",
        world["text"], tmp_path / "no_cot", "--variants", *variants, "--max_steps", 2, "--max_new_tokens", 3,
        "--env_workers", 2, "--batch_size", 12, "--torch_dtype", "bf16", actor="llama"))
    played, lines, labels = episodes(out), capsys.readouterr().out.splitlines(), [*variants, "other"]
    start = next(n for n, line in enumerate(lines) if line.startswith("variant"))
    assert list(summary) == labels == [line.split()[0] for line in lines[start + 1:start + 9]]
    assert [line.split()[0] for line in lines[start + 10:start + 14]] == ["difference", "gain", "pairing", "presence"]
    assert played.keys() == {(label, 0, task_id) for label in labels for task_id in household}
    assert {record["dtype"] for record in played.values()} == {"bf16"} and len(summary["latent"]["by_type"]) == 6
    sent, others = LatentShards(str(out / "messages")), LatentShards(str(tmp_path / "m"))
    for (label, _, task_id), record in played.items():  # gibberish costs steps and crashes nothing
        assert record["steps"] == record["invalid"] == 2 and not record["success"] and record["crash"] is None
        instruction = "You live in a house." if label == "no_cot" else games.INSTRUCTION
        # the actor reads its own instruction, room and task; a sender where things are, if it has seen the house
        assert record["first_turn"] == instruction + "\n\n" + others.records[task_id]["task"]
        place, opening = sent.records[task_id]["task"].split("\n\n", 1)
        assert opening == others.records[task_id]["task"] == household[task_id]["opening"]
        assert opening.startswith("You are in the middle") and place.startswith("You have seen this house: ")
        messages = others if label == "other" else sent
        if label in SILENT_VARIANTS:
            assert record["message_length"] == record["sender_ms"] == 0
        elif label not in ("cross_task", "text", "cot_full"):
            assert record["message_length"] == messages.lengths[task_id]
            assert record["sender_ms"] == messages.records[task_id]["sender_ms"] > 0
