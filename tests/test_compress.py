"""Stage 3: the loss is the definition, the actor stays as it is, its student is what collect.py asks. What
train_actor.py does alike: test_survival.py. The K steps, padded, of each family: test_families.py."""
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import collect
from common import read_json
from compress import load_teacher, main, read_three_ways
from data import PLAN_ANNOUNCEMENT, PLAN_PROMPT, Conversations, encode_conversation
from hf import load_tokenizer
from model import BOP, EOP, LatentActor, LatentShards, build_sample, collate, compression_terms, kl_weights
from test_collect import write
from tiny import (argv_of, column, logits_by_hand, loss_by_hand, make_actor, make_data, message_of, read_log,
                  save_model, snapshot, write_messages)

N, K, WIDTH = 7, 3, 24  # samples: no multiple of any batch size below; the sender is narrower than the actor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Qwen2 actor 32 wide, a Llama sender 24 wide with another tokenizer and template, and messages 24 wide."""
    root = tmp_path_factory.mktemp("world")
    actor = make_actor(sender_dim=WIDTH)
    actor.lm.config.attention_dropout = 0.5  # on top of the adapter's 0.1: neither may ever be on
    actor.save(str(root / "actor"))
    train, messages = make_data(str(root / "data"), N, WIDTH)
    student = save_model(root / "student", "llama", "llama3", width=WIDTH, seed=1)
    return {"actor": str(root / "actor"), "student": student, "train": train, "messages": messages,
            "actor_files": snapshot(root / "actor")}


def argv(world, out, **flags):
    """The arguments of a short run; `flags` override, None leaves one out."""
    return argv_of({
        "teacher_model_name_or_path": world["actor"], "student_model_name_or_path": world["student"],
        "train_file": world["train"], "hidden_data": world["messages"], "output_dir": out, "K": K,
        "prompt_template": "{task}?", "learning_rate": 1e-3, "global_batch_size": 4, "max_steps": 4,
        "eval_ratio": 0.3, "eval_steps": 2, **flags})


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reference") / "o")
    main(argv(world, out))
    return out


# ---- the loss
class Micro:
    """A micro-batch by hand: three samples with data messages of unequal length, all longer than K."""

    def __init__(self, actor):
        generator = torch.Generator().manual_seed(5)
        texts = [["task one", "go", "here", "take it"], ["two", "x"], ["the third task", "open the door"]]
        chats = [[{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(chat)]
                 for chat in texts]
        self.encoded = [encode_conversation(actor.tokenizer, turns, PLAN_ANNOUNCEMENT) for turns in chats]
        self.silent = [encode_conversation(actor.tokenizer, turns) for turns in chats]
        self.data = [torch.randn(length, WIDTH, generator=generator) for length in (40, 5, 9)]
        self.latents = torch.randn(3, K, WIDTH, generator=generator).requires_grad_()
        self.n_labels = sum(label != -100 for *_, labels in self.encoded for label in labels)

    def terms(self, actor, only=(0, 1, 2), data=None, temperature=4.0):
        """The mean of each term over the three samples (of `only`: their share of it)."""
        data = self.data if data is None else data
        A = collate([build_sample(*self.encoded[n], latents=self.latents[n]) for n in only])
        D = collate([build_sample(*self.encoded[n], latents=data[n]) for n in only])
        B = collate([build_sample(*self.silent[n]) for n in only])
        terms = compression_terms(actor, A, D, B, temperature)
        return torch.stack([terms["task"] / self.n_labels, terms["kl"] / 3, terms["align"] / 3])

    def logits(self, actor, n, latents):
        """Of sample n -> (S, V), labels (S,)."""
        before, after, labels = self.silent[n] if latents is None else self.encoded[n]
        message = torch.zeros(0, 32) if latents is None else message_of(actor, latents)
        return logits_by_hand(actor.lm, before, message, after, labels)


@pytest.fixture(scope="module")
def teacher(world):
    return load_teacher(world["actor"])


@pytest.fixture
def micro(teacher):
    return Micro(teacher)


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def reference_weights(none, data):
    """max(Ent_B - Ent_D, 0), cut at the 0.95 quantile, sum 1. (S,), (S,) -> (S,)"""
    w = (none - data).clamp(min=0)
    w = torch.minimum(w, torch.quantile(w, 0.95))
    return w / w.sum() if w.sum() else w


def test_loss_is_the_definition(teacher, micro):
    """Terms and gradients, against whole logits of unpadded samples; and micro-batches add up."""
    terms = micro.terms(teacher)
    task = kl = align = 0
    for n in range(3):
        with torch.no_grad():
            (d, _), (b, _) = micro.logits(teacher, n, micro.data[n]), micro.logits(teacher, n, None)
            w = reference_weights(entropy(b), entropy(d))
            mean_d = message_of(teacher, micro.data[n]).mean(0)
        a, labels = micro.logits(teacher, n, micro.latents[n])
        task += F.cross_entropy(a, labels, reduction="sum") / micro.n_labels
        divergence = F.kl_div((a / 4).log_softmax(-1), (d / 4).log_softmax(-1), reduction="none",
                              log_target=True).sum(-1)
        kl += 16 * (w * divergence).sum() / 3
        mean_a = message_of(teacher, micro.latents[n]).mean(0)
        align += (1 - F.cosine_similarity(mean_a, mean_d, dim=0)) / 3
    torch.testing.assert_close(terms, torch.stack([task, kl, align]), rtol=1e-4, atol=1e-5)
    for term, expected in zip(terms, (task, kl, align)):
        grads = [torch.autograd.grad(x, micro.latents, retain_graph=True)[0] for x in (term, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert kl > 0 and align > 0
    parts = [micro.terms(teacher, only) for only in ([0], [1, 2])]
    torch.testing.assert_close(terms, sum(parts), rtol=1e-5, atol=1e-5)


def test_lambdas_weigh_the_terms_and_the_temperature_is_that_of_the_kl(world, reference, tmp_path):
    main(argv(world, tmp_path / "o", lambda_task=0.5, lambda_kl=0.1, lambda_align=2, kl_temperature=1))
    for row in read_log(tmp_path / "o"):
        task, kl, align, loss = (float(row[name]) for name in ("task", "kl", "align", "loss"))
        assert loss == pytest.approx(0.5 * task + 0.1 * kl + 2 * align, rel=1e-4) and min(task, kl, align) > 0
    for name in ("task", "kl", "align"):  # before the first step
        assert (column(tmp_path / "o", name)[0] == pytest.approx(column(reference, name)[0])) == (name != "kl")


def test_weights_of_the_kl():
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(3).repeat_interleave(torch.tensor([40, 1, 25]))
    none, data = torch.rand(66, generator=generator), torch.rand(66, generator=generator)
    none[3] += 50  # one position must not take all the weight
    none[owner == 2] = data[owner == 2] - 1  # a message that never helps
    w = kl_weights(none.clone(), data.clone(), owner)
    for b in range(2):
        torch.testing.assert_close(w[owner == b], reference_weights(none[owner == b], data[owner == b]), rtol=1e-5,
                                   atol=1e-7)
        assert w[owner == b].sum().item() == pytest.approx(float((none > data)[owner == b].any()), abs=1e-5)
    assert (w[none <= data] == 0).all() and (w >= 0).all() and (w[owner == 2] == 0).all()
    assert w[3] == w[owner == 0].max() < 0.2
    alone = [kl_weights(none[owner == b], data[owner == b], owner[owner == b]) for b in range(3)]
    assert torch.equal(w, torch.cat(alone))  # whatever else is in the batch
    shuffled = torch.randperm(66, generator=generator)
    torch.testing.assert_close(kl_weights(none[shuffled], data[shuffled], owner[shuffled]), w[shuffled])


# ---- the frozen actor, and what each side reads
@pytest.mark.parametrize("checkpointing", [False, True])
def test_actor_has_no_dropout_and_does_not_change(world, micro, reference, checkpointing):
    """In memory, and in its files after a whole training."""
    actor = load_teacher(world["actor"], gradient_checkpointing=checkpointing)
    assert actor.adapter.attention.dropout == 0.1  # to be switched off, and the 0.5 of the LM's config too
    before = {name: p.clone() for name, p in actor.named_parameters()}
    losses = [micro.terms(actor) for _ in range(2)]
    assert torch.equal(*losses)
    losses[0].sum().backward()
    assert micro.latents.grad.abs().max() > 0
    for name, parameter in actor.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad and torch.equal(parameter, before[name])
    assert snapshot(world["actor"]) == world["actor_files"]


def test_what_the_actor_reads_in_each_pass(world):
    tokenizer, shards = load_tokenizer(world["actor"]), LatentShards(world["messages"])
    data = Conversations(world["train"], tokenizer, shards)
    silent = [encode_conversation(tokenizer, turns) for turns in data.turns]
    latents = torch.randn(N, K, WIDTH, requires_grad=True)
    batches = read_three_ways(data, silent, list(range(N)), latents)
    labels = [[row[row != -100].tolist() for row in batch["labels"]] for batch in batches]
    assert labels[0] == labels[1] == labels[2] and all(labels[0])
    texts = [[tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
             for batch in batches]
    for n, (a, d, b) in enumerate(zip(*texts)):
        for text in (a, d):
            assert text.count(f"{PLAN_ANNOUNCEMENT}{BOP}") == text.count(EOP) == 1
        assert not any(word in b for word in (PLAN_ANNOUNCEMENT, BOP, EOP)) and f"task {n}:" in b
        assert a.split(BOP)[0].replace("\n" + PLAN_ANNOUNCEMENT, "") + a.split(EOP)[1] == b
    assert torch.equal(batches[0]["latents"], latents) and batches[0]["latents"].requires_grad
    assert batches[0]["message_mask"].sum(1).tolist() == [K] * N
    lengths = [shards.lengths[sample_id] for sample_id in data.ids]  # the whole data message, not K states
    assert batches[1]["message_mask"].sum(1).tolist() == lengths and "latents" not in batches[2]


# ---- the student directory
def collected(student, world, out, **flags):
    """The messages that collect.py writes with a student, for the tasks of the training file."""
    shards = LatentShards(world["messages"])
    tasks = write(out.with_suffix(".json"), [
        {"id": task_id, "task": record["task"]} for task_id, record in shards.records.items()])
    collect.main(["custom", *argv_of({
        "model_name_or_path": student, "dataset_path": tasks, "output_dir": out, "latent_steps": K,
        "torch_dtype": "fp32", "batch_size": 3, **flags})])
    return LatentShards(str(out))


def test_collected_messages_have_the_logged_loss(world, tmp_path):
    """Through collect.py's files and plain Hugging Face, the kept student has the lowest logged eval_loss."""
    out, held_out = tmp_path / "o", read_json(world["train"])[4:]
    eval_file = write(tmp_path / "eval.json", held_out)
    main(argv(world, out, eval_file=eval_file, eval_ratio=0, eval_steps=1, learning_rate=0.02))
    shards, actor = collected(out, world, tmp_path / "m"), LatentActor.load(world["actor"])
    assert all(shards[task_id].shape == (K, WIDTH) for task_id in shards.records)
    by_hand = loss_by_hand(actor, held_out, lambda record: message_of(actor, shards[record["id"]]))
    assert by_hand == pytest.approx(min(column(out, "eval_loss")), abs=1e-4)


def test_student_directory(world, reference, tmp_path):
    """It opens as a plain model; collect.py reads its bridge: without it, or untrained, the messages are others."""
    loaded = AutoModelForCausalLM.from_pretrained(reference)
    assert loaded.config.model_type == "llama"
    assert loaded.config.hidden_size == WIDTH
    assert load_tokenizer(reference).chat_template == load_tokenizer(world["student"]).chat_template
    assert {"loss_log.csv", "loss_curve.png", "trainer_state.json"} <= set(os.listdir(reference))
    shutil.copytree(reference, tmp_path / "bridgeless")
    os.remove(tmp_path / "bridgeless" / "latent_bridge.safetensors")
    trained, bridgeless, untrained = (
        collected(student, world, tmp_path / name, prompt_template="{task}?") for name, student in (
            ("m", reference), ("b", tmp_path / "bridgeless"), ("u", world["student"])))
    for task_id in trained.records:
        assert (trained[task_id] - bridgeless[task_id]).abs().amax(-1)[1:].min() > 1e-4
        assert (trained[task_id] - untrained[task_id]).abs().max() > 1e-3
    assert collected(world["student"], world, tmp_path / "v").sender["prompt_template"] == PLAN_PROMPT


def test_the_prompt_goes_from_the_sender_to_its_student_and_on(world, tmp_path, capsys):
    """Without flags a student is asked what the sender of the full messages was, in a template that is given the
    same, and so later; flags come first."""
    full, shards = str(tmp_path / "full"), LatentShards(world["messages"])
    student = save_model(tmp_path / "s", "llama", "chatml", width=WIDTH)
    tokenizer = load_tokenizer(student)
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "{{ mood | default('helpful') }}")
    tokenizer.save_pretrained(student)
    asked = {"prompt_template": "Say {task} shorter.", "chat_template_kwargs": {"mood": "brief"}}
    write_messages(full, {k: shards[k] for k in shards.records}, shards.records, **shards.sender | asked)
    flagged = {"prompt_template": "{task}?", "chat_template_kwargs": {"mood": "fast"}}
    flags = {"prompt_template": "{task}?", "chat_template_kwargs": '{"mood": "fast"}'}
    for name, messages, given, mood, ending, kept in (
            ("o", full, {"prompt_template": None}, "brief", " shorter.", asked),
            ("p", full, flags, "fast", "?", flagged), ("q", world["messages"], {}, "helpful", "?", None)):
        main(argv({**world, "student": student, "messages": messages}, tmp_path / name, max_steps=1, **given))
        prompt = capsys.readouterr().out.split("\nfirst sample: ")[0]
        assert f"You are {mood}." in prompt and f"{ending}<|im_end|>" in prompt
        if kept:
            assert collected(tmp_path / name, world, tmp_path / f"{name}m").sender.items() >= kept.items()


def test_student_learns(world, tmp_path):
    """What to reply stands in the student's prompt only; the frozen (random) actor hears it from K latents."""
    train = write(tmp_path / "t.json", [
        {"id": f"t{i}", "conversations": [{"from": "human", "value": "what now?"},
                                          {"from": "gpt", "value": "abcd"[i % 4]}]} for i in range(N)])
    main(argv({**world, "train": train}, tmp_path / "o", max_steps=25, eval_file=train, eval_ratio=0, eval_steps=5,
              global_batch_size=N, per_device_train_batch_size=N, learning_rate=0.01))
    losses, kl = column(tmp_path / "o", "eval_loss"), column(tmp_path / "o", "kl")
    assert losses[-1] < losses[0] - 0.5 and kl[-1] < 0.8 * kl[0]


# ---- bad input
def test_what_must_fit_the_actor(world, tmp_path, refuses):
    """It must read messages; the student's width and theirs; K, which may exceed a message, its context; the ids."""
    wide, (_, messages) = save_model(tmp_path / "wide", width=32), make_data(str(tmp_path / "data"), N, 32)
    make_actor(kind="text").save(str(tmp_path / "text"))
    make_actor(sender_dim=32).save(str(tmp_path / "actor"))
    make_actor(sender_dim=WIDTH, context=400).save(str(tmp_path / "short"))
    other = make_actor(sender_dim=WIDTH)
    other.info["sender"] = {"model": "another", "fingerprint": None}
    other.save(str(tmp_path / "other"))
    *others, last = read_json(world["train"])
    stranger = write(tmp_path / "t.json", [*others, {**last, "id": "stranger"}])
    for change, flags, words in (
            ({"actor": world["student"]}, {}, [world["student"], "no adapter", "--message latent"]),
            ({"actor": str(tmp_path / "text")}, {}, ["no adapter"]),
            ({"student": wide}, {}, [f"{WIDTH} wide", "is 32"]),
            ({"messages": messages}, {}, [f"{WIDTH} wide", "is 32"]),
            ({"actor": str(tmp_path / "actor")}, {}, ["32 wide", f"is {WIDTH}"]),
            ({"actor": str(tmp_path / "short")}, {"K": 300}, ["id t", "400"]),
            ({"actor": str(tmp_path / "other")}, {}, ["learned to read another", "messages of tiny"]),
            ({"train": stranger}, {}, ["id stranger", "no message", "collect.py"])):
        refuses(main, argv({**world, **change}, tmp_path / "o", **flags), *words)
    assert not os.path.exists(tmp_path / "o")
