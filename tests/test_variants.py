"""What an actor is told: the statistics of perturbations, the labels of the table, the sample of each variant."""
import math
import os

import pytest
import torch

from common import Parser, UserError, fingerprint, wilson_interval, write_json
from data import PLAN_ANNOUNCEMENT
from hf import load_tokenizer
from model import ADAPTER_FORMAT, BOP, EOP, LATENT, LatentShards
from tiny import make_actor, make_data, save_model, write_messages
from variants import (PERTURBATIONS, VARIANTS, actors_of_variants, add_flags, bootstrap_interval, check_args,
                      check_messages, check_sender, check_settings, differences, mean_by_id, message_sample,
                      named_messages, other_message, perturb, table_rows)


N = 6


# ---- perturbations
def covariance(X):
    X = X.double() - X.double().mean(0)
    return X.T @ X / max(len(X) - 1, 1)


def correlated(L, d, rank=None):
    """A message (L, d) with a mean of 3 and a covariance of the given rank."""
    generator, rank = torch.Generator().manual_seed(0), d if rank is None else rank
    return torch.randn(L, rank, generator=generator) @ torch.randn(rank, d, generator=generator) + 3


def draws(variant, H, n=600):
    return torch.stack([perturb(variant, H, f"id{i}", 0) for i in range(n)])


@pytest.mark.parametrize("L, d, rank", [(30, 8, 8), (30, 8, 2), (5, 16, 16), (200, 16, 3), (5, 8, 0), (2, 8, 8),
                                        (1, 8, 8)])  # of rank 0: equal states
def test_rotation_keeps_mean_and_covariance_exactly(L, d, rank):
    H = correlated(L, d, rank)
    out = perturb("randomrot", H, "t1", 0)
    torch.testing.assert_close(out.mean(0), H.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance(out), covariance(H), rtol=1e-4, atol=1e-4 * H.var().item())
    X, rotated = H - H.mean(0), out - H.mean(0)
    if min(L - 1, rank) > 1:
        assert (rotated - X).norm() > 0.3 * X.norm()  # the structure is gone
    residual = rotated - rotated @ torch.linalg.pinv(X, rtol=1e-4) @ X
    assert residual.norm() < 1e-3 * max(X.norm(), 1)  # inside the message's own row space


@pytest.mark.parametrize("L, d", [(12, 6), (4, 10)])
@pytest.mark.parametrize("variant, power", [("covgauss0", 1.0), ("covgauss1", 1.0), ("covnoise0.5", 0.25),
                                            ("covnoise1.0", 1.0), ("whitenoise", 1.0)])
def test_noise_has_its_mean_power_and_shape(variant, power, L, d):
    """It is added to the message, or, where none of it is left, to zero or to its mean."""
    H = correlated(L, d)
    added_to = {"covgauss0": torch.zeros(d), "covgauss1": H.mean(0)}.get(variant, H)
    noise = (draws(variant, H) - added_to).flatten(0, 1).double()
    trace = covariance(H).trace()
    shape = torch.eye(d).double() * trace / d if variant == "whitenoise" else power * covariance(H)
    assert noise.pow(2).sum(1).mean().item() == pytest.approx(power * trace.item(), rel=0.05)
    assert (covariance(noise) - shape).norm() < 0.1 * shape.norm()
    assert (noise.mean(0).abs() / shape.diagonal().sqrt()).max() < 5 / math.sqrt(len(noise))


@pytest.mark.parametrize("variant", PERTURBATIONS)
def test_perturbations_are_seeded(variant):
    H = correlated(9, 6)
    copy = H.clone()
    out = perturb(variant, H, "t1", 0)
    assert torch.equal(out, perturb(variant, H, "t1", 0)) and out.dtype == torch.float32 and out.shape == H.shape
    assert torch.equal(H, copy)
    for other in (("t2", 0), ("t1", 1)):
        assert not torch.allclose(out, perturb(variant, H, *other))
    assert torch.isfinite(perturb(variant, H[:1].bfloat16(), "t1", 0)).all()  # a message of one state


# ---- flags, actors, labels
def flags(*argv):
    parser = Parser()
    add_flags(parser)
    return parser.parse_args(["--model_path", "actor", *argv])


def test_names_of_variants():
    assert flags("--variants", "none", "text", "qwen2llama").variants == ["latent", "text", "latent"]
    assert len(VARIANTS) == 13 and flags("--variants", *VARIANTS).variants == list(VARIANTS)
    with pytest.raises(UserError, match="pinknoise.*covgauss0"):
        perturb("pinknoise", torch.ones(5, 8), "t1")
    check_args(flags("--sender", "s", "--hidden_data", "m", "--latent_steps", "8", "--keep_ratio", "0", "1"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Actors of every kind, messages 32 and 24 wide, tasks."""
    root = tmp_path_factory.mktemp("world")
    for name, kind in (("actor", "latent"), ("text", "text"), ("none", "none")):
        make_actor(kind=kind).save(str(root / name))
    save_model(root / "plain")
    for name, width in (("full", 32), ("narrow", 24)):
        make_data(str(root / name), N, width)
    paths = {name: str(root / name) for name in ("actor", "text", "none", "plain")}
    shards = {name: LatentShards(str(root / name / "messages")) for name in ("full", "narrow")}
    tasks = [{"id": f"t{n}", "task": f"task {n // 2}"} for n in range(N)]  # t0 and t1 have the same task, ...
    return paths | shards | {"tasks": tasks}


def test_each_variant_has_its_actor(world):
    actor, others = world["actor"], [world["text"], world["none"]]
    assert actors_of_variants(VARIANTS, actor, others) == dict.fromkeys(VARIANTS, actor) | {
        "cot_full": world["text"], "no_cot": world["none"]}
    for variant, flag in (("cot_full", "--message text"), ("no_cot", "--message none")):
        with pytest.raises(UserError, match=flag):
            actors_of_variants([variant], actor)


def test_a_plain_model_reads_no_text_message(world, tmp_path):
    """Its tokenizer has no <bop>; one with an unknown token has an id for it all the same."""
    unknown = save_model(tmp_path / "unknown")
    tokenizer = load_tokenizer(unknown)
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.save_pretrained(unknown)
    assert load_tokenizer(unknown).convert_tokens_to_ids(BOP) is not None
    for path in (world["plain"], unknown):
        with pytest.raises(UserError, match=f"{path} knows no <bop>"):
            actors_of_variants(["no_comm", "text"], path)
        assert actors_of_variants(["no_comm"], path)["no_comm"] == path


def test_labels_of_the_table(world):
    """A row per K or per share for what reads states, one for what does not, one per named directory."""
    full, actor, tasks = (world[name] for name in ("full", "actor", "tasks"))
    names, actors = ["latent", "text", "randomrot", "no_comm"], dict.fromkeys(VARIANTS, actor)
    rows = table_rows(names, actors, tasks, {"": full, "_k8": full})
    assert list(rows) == ["latent", "latent_k8", "text", "randomrot", "randomrot_k8", "no_comm"]
    rows = table_rows(names, actors, tasks, {"": full}, keep_ratio=[1.0, 0.5])
    assert list(rows) == ["latent", "latent_keep0.5", "text", "randomrot", "randomrot_keep0.5", "no_comm"]
    assert rows["randomrot_keep0.5"] == {"variant": "randomrot", "actor": actor, "shards": full, "keep": 0.5}
    assert list(table_rows(["latent"], actors, tasks, {"_k8": full}, keep_ratio=[0.5])) == ["latent_k8_keep0.5"]
    named = named_messages([f"llama={full.directory}"])
    rows = table_rows(["no_comm"], actors, tasks, {}, named)  # the flags' shares are not theirs
    assert list(rows) == ["no_comm", "llama"]
    assert rows["llama"] == {"variant": "latent", "actor": actor, "shards": named["llama"], "keep": 1.0}


def test_messages_that_cannot_be_read(world, tmp_path):
    tasks, full, actor = world["tasks"], world["full"], world["actor"]
    with pytest.raises(UserError, match="no adapter.*cross_task"):
        check_messages(tasks, variant="cross_task", actor=world["plain"], shards=full)
    with pytest.raises(UserError, match="--hidden_data or --sender"):
        table_rows(["text"], {"text": actor}, tasks, {})
    with pytest.raises(UserError, match="no message for 1 tasks, the first t9.*collect.py"):
        check_messages([*tasks, {"id": "t9", "task": "x"}], variant="latent", actor=actor, shards=full)
    with pytest.raises(UserError, match="narrow.* 24 wide.*reads 32"):
        table_rows([], {"latent": actor}, tasks, {"": full}, {"other": world["narrow"]})
    full.records["t3"]["plan"], plan = " ", full.records["t3"]["plan"]
    with pytest.raises(UserError, match="t3 has an empty plan"):
        check_messages(tasks, variant="text", actor=actor, shards=full)
    full.records["t3"]["plan"] = plan
    layer = {"model": "tiny", "send": "layer:3"}
    write_json(tmp_path / "latent_adapter.json", {"format_version": ADAPTER_FORMAT, "sender": layer})
    check_sender(layer, str(tmp_path))
    with pytest.raises(UserError, match="other send"):
        check_sender({"model": "tiny", "send": "last"}, str(tmp_path))
    learned = {"model": "owner/a", "fingerprint": None, "send": "last"}  # of the hub: a name is all there is
    write_json(tmp_path / "latent_adapter.json", {"format_version": ADAPTER_FORMAT, "sender": learned})
    check_sender(learned, str(tmp_path))
    with pytest.raises(UserError, match="other model"):
        check_sender(learned | {"model": "owner/b"}, str(tmp_path))
    with pytest.raises(UserError, match="a row of this table has that name"):
        table_rows(["latent"], {"latent": actor}, tasks, {"_k8": full}, {"latent_k8": full})
    for pairs in (["llama"], ["=full"], ["text=full"], ["../out=full"], [f"llama={full.directory}"] * 2):
        with pytest.raises(UserError, match=f"--messages takes NAME=DIR.*{pairs[-1]}"):
            named_messages(pairs)


def test_results_of_other_settings_are_refused(tmp_path):
    out, sender = str(tmp_path / "o"), str(tmp_path / "sender")
    write_json(f"{sender}/config.json", {})
    given = {"output_dir": out, "seed": 0, "id_field": ("id", "idx"), "sender": sender, "batch_size": 2, "runs": 1}
    settings = check_settings("output_dir", given, but=["runs"])
    contents = dict.fromkeys(("model_path", "baseline_path", "hidden_data", "messages", "dataset"), [])
    assert settings == {"seed": 0, "id_field": ["id", "idx"], "sender": sender,
                        "contents": contents | {"sender": [fingerprint(sender)]}}
    write_json(f"{out}/settings.json", settings)
    assert check_settings("output_dir", given | {"batch_size": 9, "runs": 3}, but=["runs"]) == settings
    check_settings("output_dir", given | {"sender": f"{sender}/"}, but=["runs"])  # the same folder
    with pytest.raises(UserError, match="another --seed: give another --output_dir"):
        check_settings("output_dir", given | {"seed": 1}, but=["runs"])
    write_json(f"{sender}/config.json", {"trained": "anew"})
    with pytest.raises(UserError, match="another file or folder at --sender"):
        check_settings("output_dir", given, but=["runs"])


@pytest.mark.parametrize("name", ["model_path", "baseline_path", "hidden_data", "sender", "messages", "dataset"])
def test_no_output_inside_an_input(tmp_path, name):
    value = {"baseline_path": [str(tmp_path)], "messages": [f"other={tmp_path}"]}.get(name, str(tmp_path))
    for out in (tmp_path, tmp_path / "results"):
        with pytest.raises(UserError, match="--output_dir .* is where the input"):
            check_settings("output_dir", {"output_dir": str(out), name: value})


# ---- samples
@pytest.fixture(scope="module")
def told(world):
    """told(variant, n, ...) -> (the sample of a variant, its text, the positions of its message)."""
    actor, turns = make_actor(), [{"role": "user", "content": "what now?"}]

    def call(variant, n, seed=0, keep=1.0):
        row = {"variant": variant, "actor": "a path", "shards": world["full"], "keep": keep}
        sample, told = message_sample(actor, turns, n, world["tasks"], seed, **row)
        length = told["message_length"]
        if variant == "cross_task":
            assert torch.equal(sample["latents"], world["full"][told["message_of"]])
        assert told["sender_ms"] == (world["full"].records[f"t{n}"]["sender_ms"] if length else 0.0)
        assert set(sample["labels"]) == {-100} and len(sample["labels"]) == len(sample["input_ids"])
        text = actor.tokenizer.decode([token for token in sample["input_ids"] if token != LATENT])
        return sample, text, length
    return call


@pytest.mark.parametrize("variant", ["no_comm", "no_cot"])
def test_who_is_told_nothing_sees_no_trace_of_a_message(told, variant):
    sample, text, length = told(variant, 0)
    assert length == 0 and sample["latents"] is None and "what now?" in text
    assert not any(word in text for word in (PLAN_ANNOUNCEMENT, BOP, EOP))


@pytest.mark.parametrize("variant", ["text", "cot_full"])
def test_a_text_message_is_the_plan(world, told, variant):
    sample, text, length = told(variant, 2)
    plan = world["full"].records["t2"]["plan"]
    assert f"{PLAN_ANNOUNCEMENT}{BOP}{plan}{EOP}" in text
    assert length == len(plan) and sample["latents"] is None


def test_latent_messages(world, told):
    for n in range(N):
        H = world["full"][f"t{n}"]
        for keep in (1.0, 0.5, 0.0):
            sample, text, length = told("latent", n, keep=keep)
            assert torch.equal(sample["latents"], H[:round(keep * len(H))]) and f"{BOP}{EOP}" in text
            assert length == len(sample["latents"]) == sample["input_ids"].count(LATENT)
        for variant in PERTURBATIONS:
            sample, _, length = told(variant, n, seed=3)
            assert torch.equal(sample["latents"], perturb(variant, H, 3, f"t{n}")) and length == len(H)


def test_cross_task_is_a_whole_message_of_another_task(world, told):
    seen = set()
    for n in range(N):
        for seed in range(8):
            latents = told("cross_task", n, seed)[0]["latents"]
            sources = [m for m in range(N) if torch.equal(latents, world["full"][f"t{m}"])]
            assert len(sources) == 1 and sources[0] // 2 != n // 2  # of another text, not only of another id
            seen.add(sources[0])
    assert seen == set(range(N))


def test_cross_task_draws_among_the_ten_nearest(tmp_path):
    def drawn(tasks, lengths, texts):
        latents = {task["id"]: torch.zeros(length, 8) for task, length in zip(tasks, lengths)}
        records = {name: {"task": text, "plan": "", "plan_token_ids": []} for name, text in zip(latents, texts)}
        shards = LatentShards(write_messages(tmp_path / str(len(os.listdir(tmp_path))), latents, records))
        names = [other_message(tasks[0], tasks, shards, seed) for seed in range(200)]
        assert names == [other_message(tasks[0], tasks[::-1], shards, seed) for seed in range(200)]  # in any order
        return {int(name) for name in names}

    tasks = [{"id": str(n), "task": f"task {max(n, 1)}"} for n in range(30)]  # 0 and 1 have the same task,
    texts = [f"text {n if n != 2 else 0}" for n in range(30)]  # and the sender of 2 has read what that of 0 has
    assert drawn(tasks, range(40, 70), texts) == set(range(3, 13))
    assert drawn(tasks, range(40, 10, -1), texts) == set(range(3, 13))
    assert drawn(tasks, [5] * 30, texts) == set(range(3, 30))  # equally near: not the first ten of the file
    with pytest.raises(UserError, match="cross_task needs another task's message for id 0"):
        drawn(tasks[:3], [5] * 3, texts)


def test_the_unit_of_a_difference_is_the_game():
    """Rows with a suffix are compared with what has it, or has none; runs and seeds of a game are one value."""
    latent = [{"id": n, "success": n < 95} for n in range(140)]
    for runs in (1, 3):  # the same run three times is no more evidence
        by_game, error = mean_by_id(latent * runs, "success"), 1.96 * (95 / 140 * 45 / 140 / 140) ** 0.5
        low, high = bootstrap_interval([*by_game.values()])
        assert (low, high) == pytest.approx((95 / 140 - error, 95 / 140 + error), abs=0.01)
    rest = {name: {n: 0.5 for n in by_game} for name in ("latent_k8", "cross_task_k8", "no_comm", "llama", "text")}
    compared = differences({"latent": by_game} | rest)
    assert list(compared) == ["gain", "gain_k8", "pairing_k8", "presence_k8"]  # with no cross_task: no pairing
    assert "own_thoughts_k8" not in differences({"self": by_game} | rest)  # only no_comm serves other lengths, too
    assert compared["gain"] == pytest.approx([95 / 140 - 0.5, low - 0.5, high - 0.5])
    unseen = wilson_interval(0, 140)[1]  # how often a game may be otherwise where none was
    assert compared["pairing_k8"] == compared["gain_k8"] == pytest.approx([0, -unseen, unseen])
    assert bootstrap_interval([1] * 20) == pytest.approx(wilson_interval(20, 20))
