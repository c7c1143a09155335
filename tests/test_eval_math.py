"""Stage 4b: what is counted is what was answered, whatever the batch, the ranks and the kills."""
import json
import os
import sys
import types

import pytest
import torch

import collect
import eval_math
from eval_math import main, summarize
from data import load_tasks, message_row
from model import HiddenStateProcessor, LatentActor, LatentShards, add_markers, init_markers, text_ids, write_shard
from tiny import make_lm, make_tokenizer, save_model

SUBJECTS = {"algebra": "Algebra", "counting_and_probability": "Counting & Probability", "geometry": "Geometry",
            "intermediate_algebra": "Intermediate Algebra", "number_theory": "Number Theory",
            "prealgebra": "Prealgebra", "precalculus": "Precalculus"}


def write_math(root, split="test", number=1):
    """MATH's own directory: seven subjects, five levels, one problem each, answers 0 to 3."""
    for s, (folder, name) in enumerate(SUBJECTS.items()):
        os.makedirs(os.path.join(root, split, folder))
        for level in range(1, 6):
            with open(os.path.join(root, split, folder, f"{level * number}.json"), "w") as f:
                json.dump({"problem": f"What is {'very ' * (level % 3)}{name} {level}?", "level": f"Level {level}",
                           "type": name, "solution": f"It is $\\boxed{{{(s + level) % 4}}}$."}, f)
    return str(root)


def answering_lm():
    """A tiny LM that often says an answer or ends: words for \\boxed{0} to \\boxed{3}, louder than the others."""
    lm, tokenizer = make_lm(), make_tokenizer()
    tokenizer.add_tokens([f"\\boxed{{{d}}}{' ' * k}" for d in range(4) for k in range(3)])
    boxes = range(len(tokenizer) - 12, len(tokenizer))
    lm.lm_head.weight.data[[tokenizer.eos_token_id, *boxes]] *= 2
    return lm, tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """MATH's directory, a plain LM, an actor, and messages for all problems."""
    root = tmp_path_factory.mktemp("math")
    data, (lm, tokenizer) = write_math(root / "MATH"), answering_lm()
    lm.save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    init_markers(lm, add_markers(tokenizer))
    torch.manual_seed(1)
    adapter = HiddenStateProcessor(48, 32, 4, scale=1.0, output_scale=0.3)
    info = {"message": "latent", "sender_hidden_size": 48, "num_heads": 4}
    LatentActor(lm, tokenizer, adapter, info).save(root / "actor")
    LatentActor(lm, tokenizer, None, {"message": "text"}).save(root / "text_actor")
    tasks = load_tasks(data, split="test")
    latents = {t["id"]: torch.randn(3 + n % 4, 48) for n, t in enumerate(tasks)}
    write_shard(root / "messages" / "latents-rank00000-00000.safetensors", latents,
                {t["id"]: {"task": t["task"], "plan": f"add {n}", "plan_token_ids": [], "sender_ms": 2.0}
                 for n, t in enumerate(tasks)}, {"model": "tiny", "hidden_size": 48})
    return types.SimpleNamespace(data=data, tasks=tasks, **{k: str(root / k) for k in ("lm", "actor", "text_actor",
                                                                                        "messages")})


SAMPLED = ["--temperature", 1.0, "--samples_per_question", 3]


def argv(world, out, *more, variants=("none", "text", "no_comm", "cross_task", "randomrot"), model="actor"):
    messages = [] if model == "lm" else ["--hidden_data", world.messages]
    return [str(a) for a in ("--model_path", getattr(world, model), *messages, "--dataset", world.data, "--variants",
                             *variants, "--output_dir", out, "--torch_dtype", "fp32", "--max_length", 6,
                             "--batch_size", 32, *more)]


TIMES = ("actor_ms", "timestamp")


def results(out):
    """Lines of detailed_results.jsonl, less the times."""
    with open(os.path.join(out, "detailed_results.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]


def summary(out):
    with open(os.path.join(out, "summary.json")) as f:
        return json.load(f)


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """Sampled answers of one uninterrupted run on one rank."""
    out = tmp_path_factory.mktemp("reference") / "o"
    main(argv(world, out, *SAMPLED, variants=("none", "no_comm")))
    return out


# ---- the files

def test_actor_gives_complete_files(world, tmp_path, capsys):
    main(argv(world, tmp_path / "o", "--baseline_path", world.text_actor,
              variants=("none", "text", "no_comm", "cross_task", "randomrot", "cot_full")))
    text, rows, shards = capsys.readouterr().out, results(tmp_path / "o"), LatentShards(world.messages)
    assert [(r["variant"], r["id"]) for r in rows] == [
        (v, t["id"]) for v in ("none", "text", "no_comm", "cross_task", "randomrot", "cot_full") for t in world.tasks]
    for r in rows:
        assert r["question"] == f"{shards.records[r['id']]['task']}\nPut the final answer in \\boxed{{}}."
        split, folder, number = r["id"].split("/")
        assert (split, SUBJECTS[folder], number) == ("test", r["subject"], r["level"])
        assert r["reference_answer"] == str((list(SUBJECTS).index(folder) + int(number)) % 4)
        assert r["extracted_answer"] == eval_math.extract_answer(r["model_output"])
        assert r["correct"] == (r["extracted_answer"] == r["reference_answer"]) and not r["failed"]
        if r["variant"] in ("none", "randomrot"):
            assert r["message_rows"] == shards.lengths[r["id"]]
        assert (r["message_rows"] > 0) == (r["variant"] != "no_comm") == (r["sender_ms"] > 0)
    outputs = {tuple(r["model_output"] for r in rows if r["variant"] == v)
               for v in ("none", "cross_task", "no_comm", "text")}
    assert len(outputs) == 4  # each variant is told something else
    s = summary(tmp_path / "o")
    assert s["variants"] == summarize(rows) and 0 < s["variants"]["none"]["accuracy"] < 1
    assert list(s["variants"]["none"]["by_level"]) == list("12345")
    assert list(s["variants"]["none"]["by_subject"]) == sorted(SUBJECTS.values())
    assert f"\nnone {s['variants']['none']['accuracy']:22.3f}" in text and "\nCounting & Probability       5" in text
    with open(tmp_path / "o" / "results.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"


def test_plain_lm_answers_as_generate_does(world, tmp_path):
    """Greedy answers against Hugging Face's own loop, one prompt at a time."""
    main(argv(world, tmp_path / "o", model="lm", variants=["no_comm"]))
    lm, tokenizer = answering_lm()
    rows = results(tmp_path / "o")
    assert len(rows) == 35 and len({len(r["model_output"]) for r in rows}) > 3
    for r in rows[::4]:
        ids = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": r["question"]}], tokenize=False,
                                                      add_generation_prompt=True), return_tensors="pt").input_ids
        out = lm.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        assert r["model_output"] == tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


def test_the_question_is_the_training_question(world, tmp_path):
    """train.json of collect.py math and the evaluation give the actor the same prompt, byte for byte."""
    sender = save_model(tmp_path / "sender")
    collect.main(["math", "--model_name_or_path", sender, "--dataset_path", world.data, "--split", "test",
                  "--output_dir", str(tmp_path / "m"), "--max_samples", "3", "--max_new_tokens", "4"])
    train = json.load(open(tmp_path / "m" / "train.json"))
    main(argv(world, tmp_path / "o", "--num_samples", 3, variants=["none"]))
    assert [(t["id"], t["conversations"][0]["value"]) for t in train] == [(r["id"], r["question"])
                                                                         for r in results(tmp_path / "o")]


# ---- the same answers in any company

@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_do_not_depend_on_the_batch(world, reference, tmp_path, batch_size):
    main(argv(world, tmp_path / "o", *SAMPLED, "--batch_size", batch_size, "--variants", "none"))
    assert results(tmp_path / "o") == [r for r in results(reference) if r["variant"] == "none"]


def test_samples_are_seeded_and_differ(world, reference, tmp_path):
    rows = [r for r in results(reference) if r["variant"] == "none"]
    first, second, third = ([r["model_output"] for r in rows if r["sample"] == k] for k in range(3))
    assert first != second and second != third and first != third
    main(argv(world, tmp_path / "o", "--temperature", 1.0, variants=["none"]))  # one, or the first of three
    assert [r["model_output"] for r in results(tmp_path / "o")] == first
    main(argv(world, tmp_path / "s", "--temperature", 1.0, "--seed", 1, variants=["none"]))
    assert [r["model_output"] for r in results(tmp_path / "s")] != first


def test_sampling_follows_the_models_distribution(world):
    actor = LatentActor.load(world.lm)
    row = message_row(actor, [{"role": "user", "content": "hi"}], 0, "no_comm", 0, (None, 1.0), world.tasks)
    actor.lm.lm_head.weight.data *= 0.2
    with torch.no_grad():
        probs = actor.lm(torch.tensor([row["input_ids"]])).logits[0, -1].softmax(-1)
    args = types.SimpleNamespace(max_length=1, temperature=1.0)
    uniforms = (torch.arange(2000, dtype=torch.float64)[:, None] + 0.5) / 2000
    replies = eval_math.generate(actor, [row] * 2000, uniforms, args)
    drawn = [(ids or [actor.tokenizer.eos_token_id])[0] for ids, _, _ in replies]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probs)) / 2000
    assert (counts - probs).abs().max() < 2 / 2000


class Killed(BaseException):
    pass


@pytest.mark.parametrize("ranks_after", [1, 2])
def test_killed_and_resumed(world, reference, tmp_path, monkeypatch, ranks_after):
    out, real, calls = tmp_path / "o", eval_math.answer_jobs, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(*args)
    flags = argv(world, out, *SAMPLED, "--batch_size", 50, variants=("none", "no_comm"))
    monkeypatch.setattr(eval_math, "answer_jobs", dies)
    with pytest.raises(Killed):
        main(flags)
    part = out / "parts" / "rank00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:len(lines[-1]) // 2])  # and the last line is torn
    assert not (out / "summary.json").exists()
    answered = []
    monkeypatch.setattr(eval_math, "answer_jobs", lambda a, jobs, *more: answered.extend(jobs) or real(a, jobs, *more))
    if ranks_after == 2:  # rank 1's share is done first, as a rank that needs no barrier would
        monkeypatch.setattr(eval_math.dist, "init_process_group", lambda *a, **k: None)
        monkeypatch.setattr(eval_math.dist, "barrier", lambda: None)
        monkeypatch.setattr(eval_math.dist, "destroy_process_group", lambda: None)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        main(flags)
        assert 40 < len(answered) < 70  # its half of the rest
        monkeypatch.setenv("RANK", "0")
    main(flags)
    assert len(answered) == 2 * 35 * 3 - 99  # 100 were on disk, one of them torn
    assert results(out) == results(reference) and summary(out) == summary(reference)
    main(flags)
    assert len(answered) == 2 * 35 * 3 - 99  # nothing is left to do


def test_two_ranks_give_the_same_as_one(world, reference, tmp_path, forked):
    run = forked("eval_math", argv(world, tmp_path / "o", *SAMPLED, variants=("none", "no_comm")), world=2)
    assert run["codes"] == [0, 0], run["err"]
    assert sorted(os.listdir(tmp_path / "o" / "parts")) == ["rank00000.jsonl", "rank00001.jsonl"]
    assert results(tmp_path / "o") == results(reference) and summary(tmp_path / "o") == summary(reference)


# ---- the figures

def record(task, sample, extracted, reference, **more):
    return {"variant": "none", "id": task, "sample": sample, "level": "1", "subject": "A", "failed": False,
            "extracted_answer": extracted, "correct": extracted == reference, "message_rows": 2, "tokens": 10, **more}


def test_pass_at_1_pass_at_n_and_majority_by_hand():
    rows = [record("a", k, said, "5") for k, said in enumerate(["5", "7", "7.0", None])]
    rows += [record("b", k, said, "2", level="2", failed=k == 3) for k, said in enumerate(["1", "2", "2", None])]
    s = summarize(rows)["none"]
    assert s["questions"] == 2 and s["samples"] == 8 and s["failed"] == 1 and s["no_answer"] == 2
    assert s["accuracy"] == (1 / 4 + 2 / 4) / 2 and s["pass_at_n"] == 1.0
    assert s["majority"] == 0.5  # a: 7 and 7.0 are one answer, and outvote 5
    assert s["by_level"]["2"]["accuracy"] == 0.5 and s["by_level"]["2"]["majority"] == 1.0
    low, high = s["interval"]
    assert low < 0.375 < high and high - low > 0.7  # two questions, not eight


def test_failures_count_as_wrong(world, tmp_path, monkeypatch, capsys):
    """An exception in one row of a batch, and logits that are not finite in another, fail these two rows only."""
    real_collate, real_logits = eval_math.collate, eval_math.lm_logits
    main(argv(world, tmp_path / "good", variants=["no_comm"]))
    tokenizer = LatentActor.load(world.actor).tokenizer
    marks = [tuple(text_ids(tokenizer, text)) for text in ("very Geometry 1", "very Geometry 4")]

    def holds(row, mark):
        return any(tuple(row["input_ids"][i:i + len(mark)]) == mark for i in range(len(row["input_ids"])))

    def collate(rows, device):
        collate.rows = rows
        if any(holds(row, marks[0]) for row in rows):
            raise RuntimeError("out of\nmemory")
        return real_collate(rows, device)

    def lm_logits(lm, hidden):
        logits = real_logits(lm, hidden)
        for b, row in enumerate(collate.rows if len(collate.rows) == len(logits) else []):
            if holds(row, marks[1]):
                logits[b, 5] = torch.nan
        return logits
    monkeypatch.setattr(eval_math, "collate", collate)
    monkeypatch.setattr(eval_math, "lm_logits", lm_logits)
    main(argv(world, tmp_path / "o", variants=["no_comm"]))
    rows, good = results(tmp_path / "o"), results(tmp_path / "good")
    failed = {r["id"]: r["error"] for r in rows if r["failed"]}
    assert failed == {"test/geometry/1": "RuntimeError: out of memory", "test/geometry/4": "the logits are not finite"}
    assert [r for r in rows if not r["failed"]] == [g for r, g in zip(rows, good) if not r["failed"]]
    s = summary(tmp_path / "o")["variants"]["no_comm"]
    assert s["failed"] == 2 and s["questions"] == 35 and s["accuracy"] == sum(r["correct"] for r in rows) / 35
    assert "2 answers failed" in capsys.readouterr().out
    ids = text_ids(tokenizer, "\\boxed{1}")  # an answer that was right before the rest failed is not right
    monkeypatch.setattr(eval_math, "answer", lambda actor, rows, *more: [(ids, 1.0, "died")] * len(rows))
    main(argv(world, tmp_path / "died", variants=["no_comm"]))
    assert summary(tmp_path / "died")["variants"]["no_comm"]["accuracy"] == 0


def test_a_prompt_beyond_the_context_fails_alone(world, tmp_path):
    """And an answer that reaches the end of the context stops there."""
    (lm, tokenizer), mute = answering_lm(), str(tmp_path / "mute")  # an LM that never ends
    lm.model.norm.weight.data.zero_()  # all logits are 0: the first token of the table, for ever
    lm.save_pretrained(mute)
    tokenizer.save_pretrained(mute)
    data, lengths = tmp_path / "data.json", (10, 3900, 5000)
    data.write_text(json.dumps([{"problem": "x" * n, "solution": "\\boxed{1}"} for n in lengths]))
    flags = ["--dataset", data, "--max_length", 400, "--model_path", mute]
    main(argv(world, tmp_path / "o", *flags, variants=["no_comm"]))
    rows = results(tmp_path / "o")
    assert [r["failed"] for r in rows] == [False, False, True] and "context of 4096" in rows[2]["error"]
    assert rows[0]["tokens"] == 400 and 50 < rows[1]["tokens"] < 160


def test_live_sender_and_keep_ratio(world, tmp_path, monkeypatch):
    sender, sizes, think = save_model(tmp_path / "sender", width=48), [], collect.think
    monkeypatch.setattr(collect, "think", lambda model, prompts, steps: sizes.append(len(prompts)) or think(
        model, prompts, steps))
    main(argv(world, tmp_path / "o", "--num_samples", 4, "--sender", sender, "--latent_steps", 4, "--keep_ratio", 1,
              0.5, "--subjects", "geometry", "--sender_batch_size", 3, variants=["latent"]))
    assert sizes == [3, 1]
    rows = results(tmp_path / "o")
    said = {(r["variant"], r["message_rows"]) for r in rows if "_k4" in r["variant"]}
    assert said == {("none_k4", 4), ("none_k4_keep0.5", 2)}
    assert set(LatentShards(str(tmp_path / "o" / "messages_k4")).records) == {f"test/geometry/{n}" for n in range(1, 5)}
    assert {r["variant"] for r in rows} == {"none", "none_keep0.5", "none_k4", "none_k4_keep0.5"}


def test_qwen2llama_reads_another_senders_messages(world, tmp_path):
    (lm, tokenizer), wide = answering_lm(), str(tmp_path / "wide")
    init_markers(lm, add_markers(tokenizer))
    info = {"message": "latent", "sender_hidden_size": 40, "num_heads": 4}
    LatentActor(lm, tokenizer, HiddenStateProcessor(40, 32, 4), info).save(wide)
    cross = tmp_path / "cross" / "latents-rank00000-00000.safetensors"
    records = {t["id"]: {"task": t["task"], "plan": "", "plan_token_ids": [], "sender_ms": 3.0} for t in world.tasks}
    write_shard(cross, {k: torch.randn(2, 40) for k in records}, records, {"model": "other", "hidden_size": 40})
    main(argv(world, tmp_path / "o", "--cross_hidden_data", cross.parent, "--baseline_path", wide, "--num_samples", 4,
              "--torch_dtype", "bf16", variants=["none", "qwen2llama"]))
    said, lengths = results(tmp_path / "o"), LatentShards(world.messages).lengths
    assert [(r["variant"], r["message_rows"], r["sender_ms"]) for r in said] == [
        *(("none", lengths[t["id"]], 2.0) for t in world.tasks[:4]), *[("qwen2llama", 2, 3.0)] * 4]
    assert summary(tmp_path / "o")["actors"] == {"none": world.actor, "qwen2llama": wide}


def test_math_verify(world, tmp_path, monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    refuses(main, argv(world, tmp_path / "o", "--grader", "math_verify"), "math_verify", "pip install math-verify")
    fake = types.SimpleNamespace(parse=lambda text: eval(eval_math.extract_answer(text)), verify=lambda a, b: a == b)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    correct = eval_math.load_grader("math_verify")
    assert correct("4/2", "2") and not correct("3", "2") and not correct(None, "2")


# ---- bad input

@pytest.mark.parametrize("flags, words", [
    (["--samples_per_question", 2], ["--temperature", "--samples_per_question"]),
    (["--temperature", -1], ["--temperature"]), (["--variants", "telepathy"], ["telepathy", "no_comm"]),
    (["--split", "dev"], ["dev", "['test']"]), (["--subjects", "poetry"], ["poetry", "Number Theory"]),
    (["--dataset", "/nowhere/MATH"], ["no file or directory /nowhere/MATH"]),
    (["--hidden_data", "/nowhere"], ["/nowhere"]), (["--latent_steps", 4], ["--sender"]),
    (["--keep_ratio", 2], ["--keep_ratio"]), (["--cross_hidden_data", "x"], ["qwen2llama"]),
    (["--sender", "/nowhere"], ["--hidden_data", "--latent_steps"]),
    (["--sender_batch_size", 0], ["--sender_batch_size"]),
    (["--question_template", "x"], ["--question_template"]), (["--model_path", "/nowhere/m"], ["/nowhere/m"]),
    (["--variants", "cot_full"], ["cot_full", "--baseline_path"]), (["--surprise", 1], ["--surprise"])],
    ids=lambda words: " ".join(map(str, words)))
def test_bad_flags(world, tmp_path, refuses, flags, words):
    refuses(main, argv(world, tmp_path / "o", *flags), *words)
    assert not (tmp_path / "o").exists()


def test_bad_data_and_settings(world, tmp_path, refuses):
    refuses(main, argv(world, tmp_path / "o", model="lm", variants=["none"]), "no adapter", "train_actor.py")
    data = write_math(tmp_path / "MATH")
    bad = tmp_path / "MATH" / "test" / "geometry" / "3.json"
    for text, words in (('{"problem": "x", "solution": "five"}', ["test/geometry/3", "\\boxed"]),
                        ('{"problem": "x"}', ["test/geometry/3", "solution"]), ("[1]", ["3.json", "one problem"]),
                        ("{", ["3.json", "not valid JSON"]), ('{"solution": "x"}', ["test/geometry/3", "'problem'"])):
        bad.write_text(text)
        refuses(main, argv(world, tmp_path / "o", "--dataset", data), *words)
    more = write_math(tmp_path / "MORE", number=7)
    refuses(main, argv(world, tmp_path / "o", "--dataset", more), world.messages, "no message")
    main(argv(world, tmp_path / "p", "--num_samples", 2, variants=["no_comm"]))
    refuses(main, argv(world, tmp_path / "p", "--num_samples", 2, "--seed", 1, variants=["no_comm"]), "another --seed")
