"""Stage 4a: batched and cached play equals playing alone without a cache, under every variant, after any kill."""
import csv
import itertools
import json
import os
import signal
import sys
import zlib
from statistics import mean, stdev

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import collect
import eval_alfworld
import games
from common import UserError, seed_for, wilson_interval
from data import PLAN_ANNOUNCEMENT, encode_prompt, stop_ids, text_ids, to_messages
from eval_alfworld import METRICS, bootstrap_interval, episode_path, main, paired_test, spoken
from model import LatentActor, LatentShards, holes_allowed, write_shard
from tiny import make_actor, make_tokenizer, save_model
from variants import VARIANTS, actors_of_variants

WIDTH = 24  # of the senders; the actors are 32 wide
MAX_STEPS, MAX_NEW_TOKENS = 5, 6


class Game:
    """A deterministic game that lasts `turns` replies; what it answers, and who wins, depends on what was said."""

    def tasks(self, split):
        return {"test": [{"id": f"room {i}/{'abcdefg'[i]}", "task": f"do {i} {'things ' * (i % 3)}",
                          "type": ["even", "odd"][i % 2], "turns": 1 + 5 * i % 7} for i in range(7)],  # 1 to 7 turns
                "done": [{"id": str(i), "task": f"end {i}", "turns": 2, "won": False} for i in range(3)],
                "endless": [{"id": str(i), "task": f"go on {i}", "turns": 99, "won": False} for i in range(3)],
                "crash": [{"id": how, "task": how, "turns": 3, "won": True}
                          for how in ("fine", "reset", "step", "exit", "too")],
                "hang": [{"id": how, "task": how, "turns": 3, "won": True} for how in ("fine", "hang")],
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
    """Only the first line of a reply is the action."""

    @staticmethod
    def cut_reply(reply):
        return reply.split("\n")[0].strip()


TASKS = Game().tasks("test")


def write_messages(directory, tasks, width=WIDTH, plan="take the cup {}", model="tiny"):
    generator = torch.Generator().manual_seed(1)
    latents = {t["id"]: torch.randn(3 + i % 4, width, generator=generator) for i, t in enumerate(tasks)}
    records = {t["id"]: {"task": t["task"], "plan": plan.format(i), "plan_token_ids": [], "sender_ms": 7.0 + i}
               for i, t in enumerate(tasks)}
    write_shard(os.path.join(directory, "latents-rank00000-00000.safetensors"), latents, records,
                {"model": model, "hidden_size": width})
    return str(directory)


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
    root = tmp_path_factory.mktemp("world")
    others = {t["id"]: t for split in ("done", "endless", "crash", "hang") for t in Game().tasks(split)}
    return {"qwen2": save_talker(root / "qwen2", sender_dim=WIDTH),
            "llama": save_talker(root / "llama", "llama", "llama3", sender_dim=WIDTH, seed=3),
            "text": save_talker(root / "text", message="text", seed=4),
            "none": save_talker(root / "none", message="none", seed=5), "plain": save_model(root / "plain"),
            "messages": write_messages(root / "messages", TASKS),
            "others": write_messages(root / "others", list(others.values()))}


def argv(world, out, *more, actor="qwen2"):
    """The last of two equal flags wins."""
    return [str(a) for a in [
        "--model_path", world[actor], "--hidden_data", world["messages"], "--env", "test_eval_alfworld:Game",
        "--split", "test", "--max_steps", MAX_STEPS, "--max_new_tokens", MAX_NEW_TOKENS, "--torch_dtype", "fp32",
        "--output_path", out, *more]]


def without_messages(argv):
    n = argv.index("--hidden_data")
    return argv[:n] + argv[n + 2:]


def episodes(out):
    """{(variant, run, id): record} of all episode files."""
    played = {}
    for folder, _, names in os.walk(os.path.join(out, "episodes")):
        for name in names:
            with open(os.path.join(folder, name)) as f:
                record = json.load(f)
            played[record["variant"], record["run"], record["id"]] = record
    return played


def said(out, **changes):
    """All that does not depend on the clock and the machine."""
    clock = {"sender_ms", "actor_ms", "env_ms", "wall_ms", "tokens_per_s", "peak_memory_gb"}
    return {k: {name: v for name, v in r.items() if name not in clock} | changes for k, r in episodes(out).items()}


def rows(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def read(path):
    with open(path) as f:
        return json.load(f)


# ---- batched and cached equals alone without a cache

@torch.no_grad()
def alone(actor, task, variant, shards, ends=()):
    """One episode, every token re-reads the whole history -> [(ids of a reply, ended by itself?)], success. A token of
    `ends` ends a reply in which something was said."""
    tokenizer, table, game = actor.tokenizer, actor.lm.get_input_embeddings(), Game()
    messages = [{"role": "user", "content": game.reset(task).strip()}]
    before, after = encode_prompt(tokenizer, messages, None if variant == "no_comm" else PLAN_ANNOUNCEMENT)
    parts = [table(torch.tensor(before, dtype=torch.long)), table(torch.tensor(after))]
    if variant == "latent":
        H = shards[task["id"]]
        parts.insert(1, actor.adapter(H[None], torch.ones(1, len(H), dtype=torch.bool))[0])
    if variant == "text":
        plan = tokenizer(shards.records[task["id"]]["plan"], add_special_tokens=False).input_ids
        parts.insert(1, table(torch.tensor(plan)))
    embeds, replies, stop = torch.cat(parts), [], stop_ids(tokenizer)
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
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": observation}]
        embeds = torch.cat([embeds, table(torch.tensor(encode_prompt(tokenizer, messages)[1]))])
    return replies, False


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_batched_cached_play_equals_playing_alone_without_a_cache(world, tmp_path, family):
    main(argv(world, tmp_path, "--variants", "latent", "text", "no_comm", "--batch_size", 16, actor=family))
    actor, shards, played = LatentActor.load(world[family]), LatentShards(world["messages"]), episodes(tmp_path)
    ended, lengths = [], set()
    for variant in ("latent", "text", "no_comm"):
        for task in TASKS:
            record, (replies, won) = played[variant, 0, task["id"]], alone(actor, task, variant, shards)
            texts = [actor.tokenizer.decode(reply) for reply, _ in replies]
            assert [turn["reply"] for turn in record["turns"]] == texts
            assert record["tokens"] == sum(len(reply) for reply, _ in replies)
            assert record["steps"] == len(replies) and record["success"] == won
            ended += [by_itself for _, by_itself in replies]
            lengths.add(len(replies))
    assert 0.1 < sum(ended) / len(ended) < 0.9 and lengths == {1, 2, 3, 4, 5}  # the cases that are hard were among them


def test_a_reply_ends_with_its_action_line(world, tmp_path):
    """What comes after it is neither said nor read: each later reply is what follows a history without it."""
    path = save_talker(tmp_path / "lines", sender_dim=WIDTH, newline=2)
    main(argv({**world, "qwen2": path}, tmp_path / "o", "--env", "test_eval_alfworld:LineGame"))
    actor, shards, played = LatentActor.load(path), LatentShards(world["messages"]), episodes(tmp_path / "o")
    line, ended = text_ids(actor.tokenizer, "\n"), set()
    for task in TASKS:
        replies, won = alone(actor, task, "latent", shards, ends=line)
        record = played["latent", 0, task["id"]]
        texts = [actor.tokenizer.decode(ids).strip() for ids, _ in replies]
        assert [turn["reply"] for turn in record["turns"]] == texts
        assert record["success"] == won and record["tokens"] == sum(len(ids) for ids, _ in replies)
        ended |= {by_itself for _, by_itself in replies}
    assert ended == {True, False}


@pytest.mark.parametrize("family, more", [  # positions by column; a window that holes would fill
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 4096}),
    ("mistral", {"sliding_window": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})])
def test_a_family_that_cannot_skip_holes_plays_one_conversation_at_a_time(world, tmp_path, family, more):
    torch.manual_seed(6)
    config = AutoConfig.for_model(family, **more, vocab_size=280, tie_word_embeddings=False, initializer_range=0.3)
    lm = AutoModelForCausalLM.from_config(config).eval()
    assert not holes_allowed(lm)
    path = save_talker(tmp_path / "actor", sender_dim=WIDTH, lm=lm)
    main(argv({**world, "qwen2": path}, tmp_path / "o", "--batch_size", 8, "--num_episodes", 4))
    actor, shards, played = LatentActor.load(path), LatentShards(world["messages"]), episodes(tmp_path / "o")
    for task in TASKS[:4]:
        replies, _ = alone(actor, task, "latent", shards)
        assert [turn["reply"] for turn in played["latent", 0, task["id"]]["turns"]] == [
            actor.tokenizer.decode(ids) for ids, _ in replies]


def test_thoughts_are_not_what_the_game_gets():
    tokenizer = make_tokenizer("qwen3")

    def said(text):
        return spoken(tokenizer, text_ids(tokenizer, text))
    assert said("<think>\nAction: look\n</think>\n\nAction: go") == "Action: go"
    assert said("hm, Action: look\n</think>\nAction: go") == said(" Action: go ") == "Action: go"
    assert said("<think>\nAction: look\n") == ""  # it was cut while it thought


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_batch_size_changes_no_reply(world, tmp_path, temperature):
    for size in (1, 3, 16):
        main(argv(world, tmp_path / str(size), "--variants", "latent", "text", "cross_task", "--batch_size", size,
                  "--temperature", temperature))
    reference = said(tmp_path / "16")
    assert len(reference) == 21 and reference == said(tmp_path / "1") == said(tmp_path / "3")


def test_variants_differ_in_what_is_read(world, tmp_path):
    variants = ["latent", "cross_task", "randomrot", "covgauss0", "text", "no_comm"]
    main(argv(world, tmp_path / "a", "--variants", *variants))
    played = said(tmp_path / "a")
    replies = {v: [[t["reply"] for t in played[v, 0, task["id"]]["turns"]] for task in TASKS] for v in variants}
    assert len({json.dumps(r) for r in replies.values()}) == len(variants)
    lengths = LatentShards(world["messages"]).lengths
    for task in TASKS:
        rows = {v: played[v, 0, task["id"]]["message_length"] for v in variants}
        assert rows["latent"] == rows["randomrot"] == rows["covgauss0"] == lengths[task["id"]] and rows["no_comm"] == 0
        assert rows["text"] == len("take the cup 0") and rows["cross_task"] in lengths.values()


# ---- everything in one command

@pytest.fixture(scope="module")
def complete(world, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("complete"))
    main(argv(world, out, "--variants", *VARIANTS, "--baseline_path", world["text"], world["none"], "--batch_size", 16,
              actor="llama"))
    return out


def test_files_are_complete(complete):
    played = episodes(complete)
    metrics, results = rows(f"{complete}/performance_metrics.csv"), rows(f"{complete}/results.csv")
    keys = {(variant, 0, task["id"]) for variant in VARIANTS for task in TASKS}
    assert played.keys() == keys and len(metrics) == len(results) == len(keys)
    assert os.path.getsize(f"{complete}/results.png") > 1000 and not [f for f in os.listdir(complete) if ".tmp" in f]
    for row in metrics:
        record = played[row["variant"], int(row["run"]), row["id"]]
        assert list(row) == METRICS and all(row[k] == ("" if record[k] is None else str(record[k])) for k in METRICS)
        assert row["dtype"] == "fp32" and row["device"] in ("cpu", "cuda") and float(row["peak_memory_gb"]) > 0
        assert float(row["wall_ms"]) >= float(row["actor_ms"]) > 0 and float(row["tokens_per_s"]) >= 0
    for row in results:
        record = played[row["variant"], int(row["run"]), row["id"]]
        assert all(row[k] == ("" if record[k] is None else str(record[k])) for k in row)
    for (variant, _, task_id), record in played.items():
        sender_ms = 7.0 + [t["id"] for t in TASKS].index(task_id)
        assert record["sender_ms"] == (0 if variant in ("no_comm", "no_cot") else sender_ms)
        assert len(record["turns"]) == record["steps"] <= MAX_STEPS and record["split"] == "test"
        actions = [turn["action"] for turn in record["turns"]]
        hashes = [zlib.crc32(" ".join(actions[:n + 1]).encode()) for n in range(len(actions))]
        assert record["invalid"] == sum(hashed % 5 == 0 for hashed in hashes)


def test_summary_is_what_the_episodes_say(complete, capsys):
    summary, played = read(f"{complete}/summary.json")["variants"], episodes(complete)
    assert list(summary) == list(VARIANTS)
    for variant, figures in summary.items():
        records = [r for (v, *_), r in played.items() if v == variant]
        wins = [r for r in records if r["success"]]
        assert len(records) == 7 and figures["success"] == pytest.approx(len(wins) / 7)
        low, high = figures["interval"]
        assert low <= figures["success"] <= high and figures["games"] == 7
        for key in ("steps", "invalid", "message_length", "sender_ms", "actor_ms", "env_ms"):
            assert figures[key] == pytest.approx(sum(r[key] for r in records) / 7)
        steps_won = sum(r["steps"] for r in wins) / len(wins) if wins else None
        assert figures["steps_success"] == (steps_won if steps_won is None else pytest.approx(steps_won))
        for kind in ("even", "odd"):
            of = [r["success"] for r in records if r["type"] == kind]
            assert figures["by_type"][kind] == pytest.approx(sum(of) / len(of))
        pairs = [(r["success"], played["latent", 0, r["id"]]["success"]) for r in records]
        p = sign_test(pairs.count((True, False)), pairs.count((False, True)))
        assert figures.get("p_against_latent", 1) == pytest.approx(p)
        assert figures["crashed"] == 0 and figures["std"] is None


def sign_test(a, b):
    """Exact two-sided: the chance of a split at least as uneven, by counting all outcomes."""
    outcomes = [bin(x).count("1") for x in range(2 ** (a + b))]
    return min(1.0, 2 * sum(wins <= min(a, b) for wins in outcomes) / len(outcomes))


@pytest.mark.parametrize("wins, losses, p",
                         [(5, 1, 2 * 7 / 64), (0, 0, 1), (10, 0, 2 / 1024), (3, 3, 1), (1, 0, 1), (0, 6, 2 / 64)])
def test_the_paired_test_of_one_run_is_mcnemars(wins, losses, p):
    a = [1] * wins + [0] * losses + [1, 0] * 4
    b = [0] * wins + [1] * losses + [1, 0] * 4
    a, b = dict(enumerate(a)), dict(enumerate(b))
    assert paired_test(a, b) == pytest.approx(paired_test(b, a)) == pytest.approx(p)
    assert p == pytest.approx(sign_test(wins, losses))


def test_the_paired_test_counts_all_signs_of_the_games():
    a, b = dict(enumerate([3, 3, 0, 2, 1, 3])), dict(enumerate([0, 1, 1, 2, 3, 0]))  # wins in 3 runs
    differences = [a[game] - b[game] for game in a]
    sums = [sum(sign * d for sign, d in zip(signs, differences)) for signs in itertools.product([1, -1], repeat=6)]
    expected = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert paired_test(a, b) == pytest.approx(expected)


def test_the_same_run_three_times_is_no_more_evidence(refuses, world, tmp_path):
    """99 against 92 wins of 140 games: three identical runs used to give an interval and a p of 420 games."""
    one = [[1] * 95 + [0] * 45, [1] * 88 + [0] * 7 + [0] * 45]
    p = [paired_test(*(dict(enumerate(np_times(wins, runs))) for wins in one)) for runs in (1, 3)]
    assert p[0] == pytest.approx(p[1]) == pytest.approx(2 / 2**7)
    low, high = bootstrap_interval(one[0])
    error = 1.96 * (95 / 140 * 45 / 140 / 140) ** 0.5
    assert low == pytest.approx(95 / 140 - error, abs=0.01) and high == pytest.approx(95 / 140 + error, abs=0.01)
    assert bootstrap_interval([1.0] * 20) == pytest.approx(wilson_interval(20, 20))  # no spread to draw from
    for variant in ("latent", "text", "no_comm"):
        refuses(main, argv(world, tmp_path / "o", "--runs", 2, "--variants", "cross_task", variant), "--runs 2",
                "--temperature", variant)
    assert not os.path.exists(tmp_path / "o")
    summary = main(argv(world, tmp_path / "o", "--runs", 2, "--variants", "cross_task", "covgauss0"))
    assert len(summary["cross_task"]["runs"]) == 2  # these draw another message in each run
    lengths = {run: [r["message_length"] for (v, k, _), r in sorted(episodes(tmp_path / "o").items())
                     if (v, k) == ("cross_task", run)] for run in (0, 1)}
    assert lengths[0] != lengths[1]


def np_times(wins, runs):
    return [runs * won for won in wins]


def test_baselines_play_with_their_own_actors(world, complete, tmp_path):
    for actor, variant, same in (("text", "text", "cot_full"), ("none", "no_comm", "no_cot")):
        main(argv(world, tmp_path / actor, "--variants", variant, actor=actor))
        played = said(complete)
        for (_, run, task_id), record in said(tmp_path / actor, variant=same).items():
            assert record == played[same, run, task_id]
    played = said(complete)
    for task in TASKS:  # `latent` with a sender of another family
        assert played["qwen2llama", 0, task["id"]] == played["latent", 0, task["id"]] | {"variant": "qwen2llama"}


def test_llama_reads_a_live_qwen2_sender(world, tmp_path):
    """Full messages and K steps from a sender of another family and width, cut to shares, in one command."""
    sender = save_model(tmp_path / "sender", "qwen2", width=WIDTH, seed=7)
    flags = ["--sender", sender, "--max_plan_tokens", 8, "--prompt_template", "Plan: {task}"]
    main(without_messages(argv(world, tmp_path / "full", "--variants", "qwen2llama", "text", *flags, actor="llama")))
    messages, played = LatentShards(str(tmp_path / "full" / "messages")), episodes(tmp_path / "full")
    assert messages.sender["model"] == sender and messages.sender["prompt_template"] == "Plan: {task}"
    for task in TASKS:
        record = played["qwen2llama", 0, task["id"]]
        assert record["message_length"] == messages.lengths[task["id"]] and record["sender_ms"] > 0
    main(argv(world, tmp_path / "k", *flags, "--latent_steps", 2, 3, "--variants", "latent", "no_comm",
              actor="llama"))
    summary = read(tmp_path / "k" / "summary.json")["variants"]
    assert list(summary) == ["latent", "latent_k2", "latent_k3", "no_comm"]  # --hidden_data is read beside them
    for steps in (2, 3):
        assert summary[f"latent_k{steps}"]["message_length"] == steps and summary[f"latent_k{steps}"]["sender_ms"] > 0
    assert summary["latent"]["sender_ms"] == pytest.approx(10) and summary["no_comm"]["sender_ms"] == 0


def test_messages_are_cut_to_shares(world, tmp_path):
    summary = main(argv(world, tmp_path, "--keep_ratio", 1.0, 0.5, 0.0, "--variants", "latent", "no_comm"))
    lengths = LatentShards(world["messages"]).lengths.values()
    assert list(summary) == ["latent", "latent_keep0.5", "latent_keep0", "no_comm"]
    assert summary["latent_keep0.5"]["message_length"] == pytest.approx(mean(round(0.5 * n) for n in lengths))
    assert summary["latent_keep0"]["message_length"] == summary["latent_keep0"]["sender_ms"] == 0


# ---- what counts

@pytest.mark.parametrize("split, steps", [("done", 2), ("endless", MAX_STEPS)])
def test_success_is_won_and_never_done(world, tmp_path, split, steps):
    summary = main(argv({**world, "messages": world["others"]}, tmp_path, "--split", split))
    figures = summary["latent"]
    assert figures["success"] == 0 and figures["steps"] == steps and figures["steps_success"] is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_game_that_crashes_is_counted_and_the_others_go_on(world, tmp_path, capsys, num_workers):
    main(argv({**world, "messages": world["others"]}, tmp_path, "--split", "crash", "--env_workers", num_workers))
    played = {task_id: record for (*_, task_id), record in episodes(tmp_path).items()}
    assert {k: r["crash"] for k, r in played.items()} == {
        "fine": None, "too": None, "reset": "ValueError: no such room", "step": "ValueError: the shelf fell down",
        "exit": "SystemExit: 3"}
    assert {k: (r["steps"], r["success"]) for k, r in played.items()} == {
        "fine": (3, True), "too": (3, True), "reset": (0, False), "step": (2, False), "exit": (1, False)}
    figures = read(tmp_path / "summary.json")["variants"]["latent"]
    assert figures["games"] == 5 and figures["crashed"] == 3 and figures["success"] == pytest.approx(2 / 5)
    table = capsys.readouterr().out.splitlines()
    row = next(line for line in table if line.startswith("latent"))
    heading = next(line for line in table if line.startswith("variant"))
    assert row[:heading.index("crashed") + len("crashed")].split()[-1] == "3"


def test_where_every_game_crashes_there_is_no_result(world, tmp_path, refuses, monkeypatch):
    flags = argv({**world, "messages": world["others"]}, tmp_path, "--split", "broken", "--variants", "no_comm")
    refuses(main, flags, "all 2 episodes crashed", "ValueError: no such room")
    assert [row["crash"] for row in rows(tmp_path / "results.csv")] == ["ValueError: no such room"] * 2
    monkeypatch.setenv("REPAIRED", "1")
    assert main(flags)["no_comm"]["success"] == 1  # the same command plays again what crashed


def test_ids_longer_than_file_names(tmp_path):
    names = ["任务" * 60 + end for end in ("a", "b")] + ["x" * 300]
    paths = {episode_path(str(tmp_path), "latent", 0, name) for name in names}
    assert len(paths) == 3 and all(len(os.path.basename(path)) < 255 for path in paths)


def test_a_game_that_hangs_has_crashed(world, tmp_path):
    main(argv({**world, "messages": world["others"]}, tmp_path, "--split", "hang", "--env_workers", 2, "--env_timeout",
              1))
    played = {task_id: record for (*_, task_id), record in episodes(tmp_path).items()}
    assert {k: (r["success"], r["steps"], r["crash"]) for k, r in played.items()} == {
        "fine": (True, 3, None), "hang": (False, 1, "no answer within 1 s")}
    assert played["hang"]["env_ms"] >= 1000


def test_runs_have_a_deviation(world, tmp_path, capsys):
    main(argv(world, tmp_path, "--runs", 2, "--temperature", 1.0, "--variants", "latent", "no_comm"))
    played, summary = episodes(tmp_path), read(tmp_path / "summary.json")["variants"]
    for variant in ("latent", "no_comm"):
        records = [[played[variant, run, t["id"]] for t in TASKS] for run in (0, 1)]
        replies = [[t["reply"] for r in some for t in r["turns"]] for some in records]
        assert replies[0] != replies[1]
        assert {r["seed"] for r in records[0]} == {0} and {r["seed"] for r in records[1]} == {1}
        means = [sum(r["success"] for r in some) / 7 for some in records]
        assert summary[variant]["runs"] == pytest.approx(means)
        assert summary[variant]["std"] == pytest.approx(stdev(means))
        assert summary[variant]["games"] == 7 and summary[variant]["success"] == pytest.approx(mean(means))


# ---- kills, restarts, ranks

class Killed(BaseException):
    pass


@pytest.mark.parametrize("size", [2, 16])
def test_resumed_is_uninterrupted(world, tmp_path, monkeypatch, capsys, size):
    flags = ["--variants", "latent", "text", "--temperature", 1.0, "--batch_size", size]
    main(argv(world, tmp_path / "whole", *flags))
    out, real, written = tmp_path / "o", eval_alfworld.write_json, []

    def dies(path, value):
        if "episodes" in str(path):
            written.append(path)
            if len(written) == 6:
                raise Killed
        real(path, value)
    with monkeypatch.context() as patch:
        patch.setattr(eval_alfworld, "write_json", dies)
        with pytest.raises(Killed):
            main(argv(world, out, *flags))
    before = {path: os.stat(path).st_mtime_ns for path in written[:5]}
    assert len(episodes(out)) == 5 and not os.path.exists(out / "summary.json")
    played, play = [], eval_alfworld.play
    monkeypatch.setattr(eval_alfworld, "play",
                        lambda actor, jobs, *rest, **more: played.extend(jobs) or play(actor, jobs, *rest, **more))
    main(argv(world, out, *flags))
    assert len(played) == 9 and before == {path: os.stat(path).st_mtime_ns for path in before}
    assert said(out) == said(tmp_path / "whole") and len(said(out)) == 14
    capsys.readouterr()
    main(argv(world, out, *flags))
    assert capsys.readouterr().err == ""  # no empty bar
    assert len(played) == 9  # a finished evaluation plays nothing, and another variant plays only itself
    main(argv(world, out, *flags, "--variants", "latent", "no_comm"))
    assert len(played) == 16 and list(read(out / "summary.json")["variants"]) == ["latent", "no_comm"]


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(world, tmp_path, monkeypatch, capsys):
    flags = argv(world, tmp_path / "o", "--variants", "latent", "no_comm", "--batch_size", 4)
    steps, step = itertools.count(), Game.step

    def interrupted(game, action):
        if next(steps) == 20:  # in the second of four batches
            raise KeyboardInterrupt
        return step(game, action)

    with monkeypatch.context() as patch:
        patch.setattr(Game, "step", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "Traceback" not in error
    assert "stopped by Ctrl-C" in error.splitlines()[-1]
    assert 0 < len(episodes(tmp_path / "o")) < 2 * len(TASKS)
    main(flags)
    main(argv(world, tmp_path / "whole", "--variants", "latent", "no_comm", "--batch_size", 4))
    assert said(tmp_path / "o") == said(tmp_path / "whole")


def test_killed_by_sigkill_and_started_again(world, tmp_path, forked):
    flags = ["--variants", "latent", "text", "no_comm", "--temperature", 1.0, "--batch_size", 4]
    job = forked("eval_alfworld", argv(world, tmp_path / "o", *flags), env={"DEADLY_ROOM": TASKS[5]["id"]})
    assert job["codes"] == [-signal.SIGKILL]
    before = said(tmp_path / "o")
    assert 0 < len(before) < 21 and not os.path.exists(tmp_path / "o" / "results.csv")
    job = forked("eval_alfworld", argv(world, tmp_path / "o", *flags))
    assert job["codes"] == [0], job["err"]
    main(argv(world, tmp_path / "whole", *flags))
    assert before.items() <= said(tmp_path / "o").items()
    assert said(tmp_path / "o") == said(tmp_path / "whole") and len(said(tmp_path / "o")) == 21
    results = [(tmp_path / name / "results.csv").read_bytes() for name in ("o", "whole")]
    assert results[0] == results[1]


def test_timing_can_be_left_out(world, tmp_path):
    main(argv(world, tmp_path / "o", "--enable_timing", "false", "--variants", "no_comm", "--num_episodes", 1))
    assert "performance_metrics.csv" not in os.listdir(tmp_path / "o") and "results.csv" in os.listdir(tmp_path / "o")


def test_the_chat_template_gets_its_arguments(world, tmp_path, refuses):
    """Those of --chat_template_kwargs; without it those that the actor was trained with."""
    actor = save_talker(tmp_path / "qwen3", "qwen2", "qwen3", sender_dim=WIDTH)
    flags = argv({**world, "qwen2": actor}, tmp_path / "plain", "--self_check", "false", "--num_episodes", 3)
    thinking = ["--chat_template_kwargs", '{"enable_thinking": true}']
    main(flags)
    refuses(main, flags + thinking, "--chat_template_kwargs", "--output_path")
    main(flags + thinking + ["--output_path", str(tmp_path / "thinking")])
    info = read(os.path.join(actor, "latent_adapter.json")) | {"chat_template_kwargs": {"enable_thinking": True}}
    with open(os.path.join(actor, "latent_adapter.json"), "w") as f:
        json.dump(info, f)
    main(flags + ["--output_path", str(tmp_path / "trained")])
    assert said(tmp_path / "plain") != said(tmp_path / "thinking") == said(tmp_path / "trained")


def test_two_ranks_equal_one(world, tmp_path, forked):
    sender = save_model(tmp_path / "sender", "qwen2", width=WIDTH, seed=7)
    flags = ["--variants", "latent", "no_comm", "--batch_size", 4, "--sender", sender, "--latent_steps", 2]
    main(argv(world, tmp_path / "one", *flags))
    done = forked("eval_alfworld", argv(world, tmp_path / "two", *flags), world=2)
    assert done["codes"] == [0, 0], done["err"]
    assert said(tmp_path / "one") == said(tmp_path / "two") and len(said(tmp_path / "two")) == 21
    assert "wrote summary.json" in done["out"][0] and "summary" not in done["out"][1]  # one rank talks


# ---- bad input

@pytest.mark.parametrize("flags, words", [
    (["--variants", "smoke"], ["unknown variant smoke", "cross_task"]), (["--surprise", 1], ["--surprise"]),
    (["--env", "no_such_module:Game"], ["no_such_module:Game", "module:Class"]),
    (["--env", "json:Game"], ["json:Game"]),
    (["--env", "alfwolrd"], ["alfwolrd", "module:Class"]), (["--split", "nowhere"], ["no games", "nowhere"]),
    (["--split", "one"], ["no message for 1 tasks", "0", "collect.py"]),
    (["--hidden_data", "/nowhere"], ["no directory /nowhere"]),
    (["--model_path", "/nowhere"], ["/nowhere"]),
    (["--variants", "cot_full"], ["cot_full", "--message text", "--baseline_path"]),
    (["--variants", "latent", "no_cot"], ["no_cot", "--message none", "--baseline_path"]),
    (["--baseline_path", "/nowhere", "--variants", "no_cot"], ["/nowhere"]), (["--keep_ratio", 2], ["--keep_ratio"]),
    (["--latent_steps", 2], ["--latent_steps", "--sender"]), (["--max_steps", 0], ["--max_steps"]),
    (["--sender", "/nowhere", "--latent_steps", 2], ["/nowhere"]),
    (["--sender", "/nowhere"], ["--hidden_data", "--latent_steps"]), (["--torch_dtype", "int8"], ["--torch_dtype"])],
    ids=lambda words: " ".join(map(str, words)))
def test_bad_flags(world, tmp_path, refuses, flags, words):
    refuses(main, argv(world, tmp_path / "o", *flags), *words)
    assert not os.path.exists(tmp_path / "o" / "episodes")


def test_messages_that_do_not_fit(world, tmp_path, refuses):
    wide = write_messages(tmp_path / "wide", TASKS, width=32)
    refuses(main, argv({**world, "messages": wide}, tmp_path / "o"), "32 wide", str(WIDTH))
    mute = write_messages(tmp_path / "mute", TASKS, plan=" ")
    refuses(main, argv({**world, "messages": mute}, tmp_path / "o", "--variants", "text"), TASKS[0]["id"], "empty plan")
    partial = write_messages(tmp_path / "partial", TASKS[:5])
    refuses(main, argv({**world, "messages": partial}, tmp_path / "o"), "no message for 2 tasks", TASKS[5]["id"],
            "collect.py")
    refuses(main, argv(world, tmp_path / "o", actor="plain"), "no adapter", "--message latent")
    refuses(main, argv(world, tmp_path / "o", "--variants", "text", actor="plain"), "<bop>")
    refuses(main, argv(world, tmp_path / "o", actor="text"), "no adapter")
    no_messages = without_messages(argv(world, tmp_path / "o"))
    for variant in ("latent", "text"):
        refuses(main, [*no_messages, "--variants", variant], variant, "--hidden_data", "--sender")
    assert not os.path.exists(tmp_path / "o")
    main([*no_messages, "--variants", "no_comm", "--num_episodes", "2"])
    assert len(episodes(tmp_path / "o")) == 2


def test_other_settings_into_the_same_folder(world, complete, refuses):
    before = said(complete)
    refuses(main, argv(world, complete, "--seed", 1, "--max_steps", 6, actor="llama"), "--seed", "--max_steps",
            "--output_path")
    assert said(complete) == before


def test_context_that_is_too_short(tmp_path, world, refuses):
    short = save_talker(tmp_path / "short", sender_dim=WIDTH, context=200)
    line = refuses(main, argv({**world, "qwen2": short}, tmp_path / "o", "--variants", "no_comm"), "id room", "200",
                   "--max_steps")
    assert "steps the episode needs" in line
    finished = said(tmp_path / "o")
    assert 0 < len(finished) < 7  # those that ended in time stay


@pytest.mark.parametrize("flags, words", [
    (["--cross_hidden_data", "CROSS"], ["--cross_hidden_data", "qwen2llama"]),
    (["--cross_hidden_data", "CROSS", "--variants", "qwen2llama"], ["40 wide", "--baseline_path", "qwen2-sender"]),
    (["--instruction_file", "x.txt"], ["--instruction_file", "--env alfworld"]),
    (["--env_timeout", "0"], ["--env_timeout"])], ids=lambda words: " ".join(words))
def test_bad_flags_of_other_senders_and_games(world, tmp_path, refuses, flags, words):
    cross = write_messages(tmp_path / "cross", TASKS, width=40, model="qwen2-sender")
    flags = [cross if flag == "CROSS" else flag for flag in flags]
    refuses(main, argv(world, tmp_path / "o", *flags), *words)
    assert not os.path.exists(tmp_path / "o")


TASK = '[{"conversations": [{"from": "human", "value": "You are in a room. Your task is to: look."}]}]'


@pytest.mark.parametrize("text", [None, "[]", "{}", '[{"id": 1}]', '[{"conversations": []}]', "[", TASK])
def test_bad_instruction_files(tmp_path, text):
    if text is not None:
        (tmp_path / "sft.json").write_text(text)
    with pytest.raises(UserError, match="sft.json"):
        eval_alfworld.read_instruction(str(tmp_path / "sft.json"))


def test_an_instruction_is_the_first_human_turn(tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": " You live here. "}]
    (tmp_path / "sft.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    (tmp_path / "text.txt").write_text("You live here.\n")
    for name in ("sft.json", "text.txt"):
        assert eval_alfworld.read_instruction(str(tmp_path / name)) == "You live here."


def test_qwen2llama_is_played_by_the_actor_that_reads_its_sender(world, tmp_path):
    """Of the actors that read messages of this width, the one that was trained on this sender."""
    paths = {name: make_actor(sender_dim=40) for name in ("other", "trained")}
    for name, actor in paths.items():
        actor.info["sender"] = {"other": "llama-sender", "trained": "qwen2-sender"}[name]
        actor.save(str(tmp_path / name))
    cross = LatentShards(write_messages(tmp_path / "cross", TASKS, width=40, model="qwen2-sender"))
    baselines = [world["text"], str(tmp_path / "other"), str(tmp_path / "trained")]
    chosen = actors_of_variants(["latent", "qwen2llama"], world["qwen2"], baselines, cross)
    assert chosen == {"latent": world["qwen2"], "qwen2llama": str(tmp_path / "trained")}
    assert actors_of_variants(["qwen2llama"], world["qwen2"], baselines[:2], cross) == {"qwen2llama": baselines[1]}


def test_weights_trained_anew_into_the_same_folder_are_another_actor(world, tmp_path, refuses):
    actor = save_talker(tmp_path / "actor", sender_dim=WIDTH)
    flags = argv({**world, "qwen2": actor}, tmp_path / "o", "--num_episodes", 1)
    main(flags)
    before = said(tmp_path / "o")
    save_talker(tmp_path / "actor", sender_dim=WIDTH)  # the same weights again
    main(flags)
    save_talker(tmp_path / "actor", sender_dim=WIDTH, seed=9)
    refuses(main, flags, "weights in --model_path", "--output_path")
    assert said(tmp_path / "o") == before


# ---- the real engine

@pytest.fixture(scope="module")
def household(tmp_path_factory):
    """The six games of valid_seen -> their tasks, with what the engine says first: room and task."""
    pytest.importorskip("alfworld")
    from alfworld_fixture import make_games
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ALFWORLD_DATA", make_games(tmp_path_factory.mktemp("data")))
        game = games.AlfworldGame()
        yield [task | {"opening": game.reset(task)} for task in game.tasks("valid_seen")]


GARBAGE = ["", "go to shelf 1", "Action: go to the moon"]


def test_walkthroughs_win_all_six_types_and_look_wins_none(world, household, tmp_path, monkeypatch):
    """Scripted replies in place of the decoded ones, the rest of the evaluator's loop as it is."""
    walkthroughs = {}
    for task in household:
        with open(task["gamefile"]) as f:
            walkthroughs[task["id"]] = [f"Thought: clear.\nAction: {action}" for action in json.load(f)["walkthrough"]]
    policies = {"latent": lambda task_id: walkthroughs[task_id], "text": lambda task_id: ["Action: look"] * 12,
                "no_comm": lambda task_id: GARBAGE + walkthroughs[task_id]}
    scripts = {seed_for("reply", 0, label, task["id"]): iter(policy(task["id"]))
               for label, policy in policies.items() for task in household}

    def reply(self, logits, is_over, max_new_tokens, temperature, generators):
        assert len(logits) == len(generators)  # each episode has its own, which tells here whose turn it is
        return [text_ids(tokenizer, next(scripts[g.initial_seed()])) for g in generators], set()
    monkeypatch.setattr(eval_alfworld.CachedChat, "reply", reply)
    tokenizer = LatentActor.load(world["qwen2"]).tokenizer
    conversation = [{"from": "human", "value": "You live in a house. \n"}, {"from": "gpt", "value": "OK"},
                    {"from": "human", "value": ""}, {"from": "gpt", "value": "Action: look"}]
    (tmp_path / "sft.json").write_text(json.dumps([{"id": "1", "conversations": conversation}]))
    rooms = {task["id"]: task["opening"] for task in household}
    messages = write_messages(tmp_path / "m", household)
    summary = main(argv({**world, "messages": messages}, tmp_path / "o", "--env", "alfworld", "--split", "valid_seen",
                        "--variants", *policies, "--env_workers", 2, "--batch_size", 18, "--max_steps", 12,
                        "--instruction_file", tmp_path / "sft.json"))
    for (label, _, task_id), record in episodes(tmp_path / "o").items():
        steps, invalid = {"latent": (len(walkthroughs[task_id]), 0), "text": (12, 0),
                          "no_comm": (3 + len(walkthroughs[task_id]), 3)}[label]
        won = label == "latent" or label == "no_comm" and steps <= 12
        assert (record["success"], record["steps"], record["invalid"]) == (won, min(steps, 12), invalid)
        assert record["crash"] is None and [turn["reply"] for turn in record["turns"]] == policies[label](task_id)[:12]
        # the first turn of the evaluation is that of the training: turns 0 and 2 of ETO's conversations
        conversation[2]["value"] = rooms[task_id]
        assert record["first_turn"] == to_messages({"conversations": conversation}, task_turn=2)[0]["content"]
    assert summary["latent"]["success"] == 1 and set(summary["latent"]["by_type"].values()) == {1}
    assert len(summary["latent"]["by_type"]) == 6 and summary["text"]["success"] == 0
    assert summary["text"]["steps"] == 12 and summary["text"]["steps_success"] is None
    assert 0 < summary["no_comm"]["success"] < 1  # two walkthroughs no longer fit after three steps of garbage


def test_six_real_games_under_every_variant(world, household, tmp_path, monkeypatch, capsys):
    """One command: a live sender, baselines, and messages of a sender of another family and width."""
    sender, other = save_model(tmp_path / "own", "llama", width=WIDTH), save_model(tmp_path / "other", "qwen2", width=40)
    cross = save_talker(tmp_path / "cross", "llama", "llama3", sender_dim=40, seed=8)
    no_cot = make_actor(message="none")
    no_cot.info["instruction"] = "You live in a house."  # as train_actor.py keeps it from its file
    no_cot.save(str(tmp_path / "no_cot"))
    collect.main(["alfworld", "--model_name_or_path", other, "--env", "alfworld", "--split", "valid_seen",
                  "--output_dir", str(tmp_path / "m"), "--max_new_tokens", "7", "--torch_dtype", "fp32"])
    out = tmp_path / "o"
    summary = main(without_messages(argv(
        world, out, "--env", "alfworld", "--split", "valid_seen", "--sender", sender, "--max_plan_tokens", 5,
        "--cross_hidden_data", tmp_path / "m", "--baseline_path", world["text"], tmp_path / "no_cot", cross,
        "--sender_knows", "place",
        "--variants", *VARIANTS, "--max_steps", 2, "--max_new_tokens", 3, "--env_workers", 2, "--batch_size", 12,
        "--torch_dtype", "bf16", actor="llama")))
    played, table = episodes(out), capsys.readouterr().out.splitlines()
    assert played.keys() == {(v, 0, t["id"]) for v in VARIANTS for t in household} and len(VARIANTS) == 13
    start = next(n for n, line in enumerate(table) if line.startswith("variant"))
    assert list(summary) == list(VARIANTS) == [line.split()[0] for line in table[start + 1:start + 14]]
    assert "bootstrap over games" in table[start + 14] and "paired" in table[start + 14]
    metrics = rows(out / "performance_metrics.csv")
    assert [(r["variant"], r["id"]) for r in metrics] == [(v, t["id"]) for v in VARIANTS for t in household]
    assert len(rows(out / "results.csv")) == 78 and all(list(r) == METRICS and r["dtype"] == "bf16" for r in metrics)
    assert os.path.getsize(out / "results.png") > 5000 and len(summary["latent"]["by_type"]) == 6
    rooms = {task["id"]: task["opening"] for task in household}
    sent, crossed = LatentShards(str(out / "messages")), LatentShards(str(tmp_path / "m"))
    assert read(out / "summary.json")["actors"] == {v: world["llama"] for v in VARIANTS} | {
        "cot_full": world["text"], "no_cot": str(tmp_path / "no_cot"), "qwen2llama": cross}
    for (variant, _, task_id), record in played.items():  # gibberish costs steps and crashes nothing
        assert record["steps"] == record["invalid"] == 2 and not record["success"] and record["crash"] is None
        instruction = "You live in a house." if variant == "no_cot" else games.INSTRUCTION
        # the actor reads its own instruction, room and task
        assert record["first_turn"] == instruction + "\n\n" + rooms[task_id]
        assert rooms[task_id].startswith("You are in the middle of a room.")
        # a sender reads room and task, and where things are if it knows the place
        assert crossed.records[task_id]["task"] == rooms[task_id]
        place, opening = sent.records[task_id]["task"].split("\n\n", 1)
        assert opening == rooms[task_id] and place.startswith("You have seen this house: ")
        messages = crossed if variant == "qwen2llama" else sent
        if variant in ("no_comm", "no_cot"):
            assert record["message_length"] == record["sender_ms"] == 0
        elif variant not in ("cross_task", "text", "cot_full"):
            assert record["message_length"] == messages.lengths[task_id]
            assert record["sender_ms"] == messages.records[task_id]["sender_ms"] > 0
