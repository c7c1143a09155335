"""Losses, insertion, adapter, actor, shards, the decode loop: each property by itself. test_method.py has the ten that
matter most, test_families.py what a family may get wrong."""
import math
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from common import UserError
from data import text_ids
from hf import decode, embedding_rms, left_pad, lm_logits, next_tokens
from model import (BOP, EOP, LATENT, HiddenStateProcessor, LatentActor, LatentSender, LatentShards, actor_loss,
                   add_markers, build_sample, collate, head_loss, init_markers, js_divergence, kl_divergence,
                   make_adapter, make_record, open_shards, plan_similarity, write_shard)
from tiny import make_actor, make_lm, make_tokenizer

FAMILIES = [("qwen2", "chatml"), ("llama", "llama3"), ("mistral", "mistral")]


def make_samples(tokenizer, ratios=(0, 0.4, 1, 0.7), sender_dim=32):
    """Samples of different prompt, message and reply lengths."""
    samples = []
    for i, ratio in enumerate(ratios):
        generator = torch.Generator().manual_seed(i)
        latents = torch.randn(2 + 3 * i, sender_dim, generator=generator)
        before, after = (text_ids(tokenizer, word * (i + 1)) for word in ("see ", "go "))
        labels = [-100] + after[1:]
        plan_ids = text_ids(tokenizer, "plan " * (i + 1))
        samples.append(build_sample(before, after, labels, plan_ids, latents, ratio))
    return samples


# ---- losses
@pytest.fixture(params=[1e-3, 1.0, 30.0])
def logits(request):
    """Two (40, 300) of some loudness, in float64; the first one requires its gradient."""
    generator = torch.Generator().manual_seed(0)
    a, b = (request.param * torch.randn(40, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    return a.requires_grad_(), b


def test_divergences_are_torchs(logits):
    """Values and gradients in fp32, as in training, against torch's own functions in float64."""
    z64, other = logits
    z = z64.detach().float().requires_grad_()
    p, q = F.log_softmax(z, -1), F.log_softmax(other.float(), -1)
    p64, q64 = F.log_softmax(z64, -1), F.log_softmax(other, -1)
    mixture = torch.logaddexp(p64, q64) - math.log(2)
    kl = F.kl_div(p64, q64, reduction="none", log_target=True).sum(-1)  # torch's KL(target || input)
    js = sum(F.kl_div(mixture, x, reduction="none", log_target=True).sum(-1) for x in (p64, q64)) / 2
    distance = 1 - F.cosine_similarity(p64.exp(), q64.exp(), dim=-1)
    terms = plan_similarity(q, p)
    for term, expected in [(kl_divergence(q, p), kl), (js_divergence(p, q), js), (terms["kl"], kl),
                           (terms["cosine_distance"], distance), (terms["align"], 0.7 * kl + 0.3 * distance)]:
        torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=1e-5)
        a = torch.autograd.grad(term.sum(), z, retain_graph=True)[0]
        b = torch.autograd.grad(expected.sum(), z64, retain_graph=True)[0]
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    nothing_differs = js_divergence(p, p.detach())
    assert torch.isfinite(torch.autograd.grad(nothing_differs.sum(), z)[0]).all()


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("family, tied, bias", [
    ("qwen2", False, False), ("qwen2", True, False), ("qwen2", False, True),
    ("gemma2", True, False),  # soft-capped logits
    ("cohere", True, False), ("granite", True, False)])  # scaled ones
def test_head_loss_is_the_loss_of_whole_logits_in_float64(chunk, family, tied, bias):
    """Value and gradients, for any number of positions at a time, whatever a family does to its logits.
    What comes without gradient gives none to the head."""
    lm = make_lm(family, tied=tied)
    if bias:
        old, lm.lm_head = lm.lm_head.weight, torch.nn.Linear(32, 280)
        lm.lm_head.weight = old
    ids, generator = torch.arange(14), torch.Generator().manual_seed(1)
    labels, fixed = ids * 5, torch.randn(14, 32, generator=generator)
    results = []
    for exact in (False, True):
        lm = lm.double() if exact else lm.float()
        lm.zero_grad()
        states = lm.get_input_embeddings()(ids) * 2  # a tied table gets a gradient from both ends
        states.retain_grad()
        branches = {"sample": states, "plan": fixed.to(states.dtype), "other": fixed.flip(0).to(states.dtype)}
        if exact:
            logits = {name: lm_logits_in_float64(lm, h) for name, h in branches.items()}
            logits |= {name: logits[name].detach() for name in ("plan", "other")}
            terms = {name: term.sum() for name, term in actor_loss(logits, {"labels": labels}).items()}
        else:
            terms = head_loss(lm, branches, actor_loss, {"labels": labels}, chunk_logits=280 * chunk)
        (terms["task"] + 0.3 * terms["align"] + 0.7 * terms["sep"]).backward()
        gradients = [states.grad, *(p.grad for p in lm.parameters() if p.grad is not None)]
        results.append([*terms.values(), *(g.double() for g in gradients)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def lm_logits_in_float64(lm, hidden_states):
    """What the family does after its decoder, spelled out."""
    config, logits = lm.config, lm.lm_head(hidden_states)
    logits = logits * getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation makes, in the backward pass too."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_tensor_of_all_positions_by_all_words_is_ever_made():
    lm, N, V, n = make_lm(vocab=500), 400, 500, 40
    states = {name: torch.randn(N, 32) for name in ("sample", "plan", "other")}
    states["sample"].requires_grad_()
    with Largest() as largest:
        terms = head_loss(lm, states, actor_loss, {"labels": torch.arange(N)}, chunk_logits=n * V)
        (terms["task"] + terms["align"] + terms["sep"]).backward()
    assert n * V <= largest.numbers < 2 * n * V < N * V


def test_terms_are_summed_in_fp32_under_autocast():
    """bf16 has 8 bits: a sum of 2,000 terms of one size would stand still at 256 of them."""
    actor = make_actor()
    batches = [collate(make_samples(actor.tokenizer, [ratio] * 4)) for ratio in (0.5, 0.9, 0.1)]
    with torch.autocast("cpu", torch.bfloat16):
        terms = actor(*batches)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    logits, other_logits = torch.randn(2, 2000, 50)
    branches = {"sample": logits, "plan": other_logits, "other": other_logits}
    targets = {"labels": torch.arange(2000) % 50}
    exact = actor_loss(branches, targets)
    with torch.autocast("cpu", torch.bfloat16):
        terms = actor_loss(branches, targets)
    assert all(torch.equal(terms[name], exact[name]) for name in exact)


# ---- insertion
@pytest.mark.parametrize("family, template", FAMILIES)
@pytest.mark.parametrize("ratio", [0, 0.4, 1])
@pytest.mark.parametrize("sender_dim", [32, 20])
def test_insertion_equals_concatenation_by_hand(family, template, ratio, sender_dim):
    """Embeddings, logits and the states at supervised positions, on either side of padding."""
    actor = make_actor(family, template, sender_dim=sender_dim)
    lm, words = actor.lm, actor.lm.get_input_embeddings()
    before, after, labels = [3, 4, 5], [6, 7, 8, 9], [-100, 7, -100, 9]
    plan, latents = [11, 12, 13, 14, 15], torch.randn(8, sender_dim)
    sample = build_sample(before, after, labels, plan, latents, ratio)
    p, skip = int(5 * ratio), int(8 * ratio)
    with torch.no_grad():
        message = actor.adapter(latents[None], torch.ones(1, 8, dtype=torch.bool))[0, skip:]
        by_hand = [words(torch.tensor(before + plan[:p])), message, words(torch.tensor(after))]
        by_hand = torch.cat(by_hand)[None]  # (1, T, D)
        expected = lm(inputs_embeds=by_hand).logits[0]
        T = by_hand.shape[1]
        for side in ("right", "left"):
            batch = collate([sample, build_sample([3] * 20, [9], [9])], padding_side=side)
            here = slice(-T, None) if side == "left" else slice(0, T)
            torch.testing.assert_close(actor.embed(batch)[0, here], by_hand[0], rtol=0, atol=1e-5)
            states, supervised = actor.hidden_states(batch)
            assert supervised.tolist() == [7, 9, 9]
            logits = lm_logits(lm, states[:2])
            torch.testing.assert_close(logits, expected[[T - 4, T - 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, template", FAMILIES)
def test_neighbours_and_padding_change_no_sample(family, template):
    """With a message, an empty one or none."""
    actor = make_actor(family, template, sender_dim=20)
    parts = [3, 4], [5, 6, 7], [-100, 6, 7]
    silent = [build_sample(*parts), build_sample(*parts, latents=torch.zeros(0, 20))]
    samples = make_samples(actor.tokenizer, sender_dim=20) + silent
    together, labels = actor.hidden_states(collate(samples))
    with torch.no_grad():  # an evaluation gives the same as training
        alone, alone_labels = zip(*(actor.hidden_states(collate([sample])) for sample in samples))
        losses = [actor(collate([sample]))["task"] for sample in samples]
        plain = actor.lm(torch.tensor([[3, 4, 5, 6, 7]]), labels=torch.tensor([silent[0]["labels"]])).loss
    for loss in losses[-2:]:
        torch.testing.assert_close(loss / 2, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, torch.cat(alone_labels))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actor(collate(samples[::-1]))["task"], sum(losses), rtol=1e-5, atol=1e-4)
    assert together.requires_grad and not sum(losses).requires_grad


@pytest.mark.parametrize("percent", range(0, 101, 10))
@pytest.mark.parametrize("n_plan, n_latents", [(7, 3), (3, 7), (10, 10), (0, 5), (6, 0), (1, 1)])
def test_curriculum_counts(percent, n_plan, n_latents):
    """Where sender and actor split the plan differently, each part is cut at its share of its length."""
    latents, plan = torch.randn(n_latents, 4) if n_latents else None, list(range(20, 20 + n_plan))
    sample = build_sample([7, 8], [9, 5], [-100, 5], plan, latents, percent / 100)
    p, used = percent * n_plan // 100, n_latents - percent * n_latents // 100
    assert sample == {"input_ids": [7, 8, *plan[:p], *[LATENT] * used, 9, 5],
                      "labels": [-100] * (3 + p + used) + [5], "latents": latents}
    batch = collate([sample])
    assert batch["message_mask"][0].nonzero().flatten().tolist() == list(range(2 + p, 2 + p + used))
    assert batch["input_ids"].min() >= 0
    if n_latents:  # the last ones are inserted, all are seen by the adapter
        assert batch["latents_mask"].all()
        assert batch["keep_mask"][0].tolist() == [i >= n_latents - used for i in range(n_latents)]


# ---- adapter
@pytest.mark.parametrize("sender_dim", [32, 20, 48])
def test_adapter_ignores_padding_and_survives_empty_messages(sender_dim):
    adapter = HiddenStateProcessor(sender_dim, 32, 4).eval()
    latents = torch.randn(3, 6, sender_dim)
    mask = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    noisy = torch.where(mask[..., None], latents, torch.full_like(latents, 1e3))
    with torch.no_grad():
        out, alone = adapter(noisy, mask), adapter(latents[1:2, :2], mask[1:2, :2])
        torch.testing.assert_close(out[mask], adapter(latents, mask)[mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1, :2], alone[0], rtol=1e-5, atol=1e-6)
    assert out.shape == (3, 6, 32) and torch.isfinite(out).all()
    adapter(noisy, mask)[mask].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # Gemma's module multiplies its table by sqrt(D)
@pytest.mark.parametrize("sender_dim, loudness", [(32, 0.1), (32, 50.0), (20, 1.0)])
def test_a_message_starts_as_loud_as_words(family, sender_dim, loudness):
    actor = make_actor(family, sender_dim=sender_dim)
    H, mask = loudness * torch.randn(4, 30, sender_dim), torch.ones(4, 30, dtype=torch.bool)
    with torch.no_grad():
        words = actor.lm.get_input_embeddings()(torch.arange(280))
        message = actor.adapter(H, mask)
        sender = LatentSender(actor.lm)
        thought = sender.bridge(sender.norm(torch.randn(100, 32)))
    rms = words.pow(2).mean().sqrt().item()
    assert embedding_rms(actor.lm) == pytest.approx(rms, rel=1e-4)
    assert message.pow(2).mean().sqrt().item() == pytest.approx(rms, rel=0.05)
    assert thought.pow(2).mean().sqrt().item() == pytest.approx(rms, rel=0.05)
    torch.testing.assert_close(sender.start.data, words.mean(0))


# ---- actor on disk
@pytest.mark.parametrize("family, template", FAMILIES)
@pytest.mark.parametrize("sender_dim, tied", [(32, True), (20, False)])
def test_actor_saves_bit_for_bit(tmp_path, family, template, sender_dim, tied):
    """latent_adapter.json is all that is needed: what the constructor was called with, and how the template was."""
    actor = make_actor(family, template, sender_dim=sender_dim, tied=tied)
    spec = {"class": "model:HiddenStateProcessor", "arguments": {
        "sender_dim": sender_dim, "dim": 32, "num_heads": 2, "dropout": 0.5, "scale": 0.7, "output_scale": 3.0}}
    actor.adapter = make_adapter(spec).eval()
    actor.info |= {"adapter": spec, "chat_template_kwargs": {"enable_thinking": True}}
    with torch.no_grad():  # as training would: the released code saved the initial values
        actor.adapter.projection.scale.fill_(0.371)
        actor.adapter.projection.output_scale.fill_(1.234)
        actor.adapter.norm_in.bias.normal_()
    actor.save(tmp_path)
    loaded = LatentActor.load(str(tmp_path))
    state = loaded.state_dict()
    assert state.keys() == actor.state_dict().keys() and not loaded.training and loaded.info == actor.info
    assert all(torch.equal(tensor, state[name]) for name, tensor in actor.state_dict().items())
    assert (loaded.lm.lm_head.weight is loaded.lm.get_input_embeddings().weight) == tied
    batch, ids = collate(make_samples(actor.tokenizer, sender_dim=sender_dim)), torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(batch)["task"], actor(batch)["task"])
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, actor.lm(ids).logits)
    assert loaded.tokenizer.get_vocab() == actor.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == actor.tokenizer.chat_template
    assert loaded.adapter.attention.num_heads == 2 and loaded.adapter.attention.dropout == 0.5
    given = LatentActor.load(str(tmp_path), chat_template_kwargs={"x": 1})
    for actor, kwargs in ((loaded, {"enable_thinking": True}), (given, {"x": 1})):
        assert actor.tokenizer.chat_template_kwargs == kwargs


def test_a_damaged_actor_is_one_line(tmp_path):
    make_actor().save(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "latent_adapter.safetensors")
    with pytest.raises(UserError, match="latent_adapter.safetensors is damaged.*unexpected.*x"):
        LatentActor.load(str(tmp_path))
    for text in ('{"kind": "latent"}', "[]", '{"kind": "latent", "format_version": 2}'):
        (tmp_path / "latent_adapter.json").write_text(text)
        with pytest.raises(UserError, match="latent_adapter.json is not what train_actor.py writes"):
            LatentActor.load(str(tmp_path))


@pytest.mark.parametrize("vocab", [259, 280])
@pytest.mark.parametrize("tied", [True, False])
def test_markers_grow_the_table_only_if_needed(vocab, tied):
    lm, tokenizer = make_lm(vocab=vocab, tied=tied), make_tokenizer()
    before = lm.get_input_embeddings().weight.detach().clone()
    new_ids = add_markers(tokenizer)
    init_markers(lm, new_ids)
    table = lm.get_input_embeddings().weight
    assert new_ids == [259, 260] and len(table) == max(vocab, 261)
    assert torch.equal(table[:259], before[:259])
    torch.testing.assert_close(table[new_ids], before[:259].mean(0).expand(2, -1))
    assert lm(torch.tensor([new_ids])).logits.shape[-1] == len(table)
    assert add_markers(tokenizer) == []  # a tokenizer that has them keeps them
    half = make_tokenizer()
    half.add_tokens([EOP], special_tokens=True)
    assert add_markers(half) == [half.convert_tokens_to_ids(BOP)]
    llama2 = make_tokenizer("llama2")  # has an id for every word that it does not know
    assert add_markers(llama2) == [len(llama2) - 2, len(llama2) - 1] == llama2.convert_tokens_to_ids([BOP, EOP])


# ---- shards
SENDER = {"model": "tiny", "hidden_size": 4, "seed": 0}


def shard(directory, ids, number=0, loudness=1.0, **sender):
    latents = {task_id: (loudness * torch.randn(2 + n, 4)).bfloat16() for n, task_id in enumerate(ids)}
    path = os.path.join(directory, f"latents-rank00000-{number:05d}.safetensors")
    records = {task_id: make_record({"task": f"do {task_id} ü"}, "p", [1], 1.0) for task_id in ids}
    write_shard(path, latents, records, SENDER | sender)
    return path, latents


def test_shards_round_trip(tmp_path):
    _, first = shard(tmp_path, ["a", "把一个杯子放在桌子上" * 12, "b/../ü 1\"\\", "*[é]\n", "x" * 300])
    _, second = shard(tmp_path, ["c"], 1)
    shards = open_shards(str(tmp_path))
    for task_id, latents in {**first, **second}.items():
        assert torch.equal(shards[task_id], latents) and shards[task_id].dtype == torch.bfloat16
        assert shards.lengths[task_id] == len(latents)
        assert shards.records[task_id]["task"] == f"do {task_id} ü"
    assert len(shards) == 6 and "c" in shards and "d" not in shards and shards.sender == SENDER
    assert sorted(os.listdir(tmp_path)) == [f"latents-rank00000-0000{i}.safetensors" for i in (0, 1)]


def test_shards_are_read_when_asked(tmp_path):
    """Opening reads headers: a message that is no good is an error only for who asks for it."""
    shard(tmp_path, ["good"])
    shard(tmp_path, ["NaN"], 1, loudness=math.nan)
    shard(tmp_path, ["inf"], 2, loudness=math.inf)
    shards = LatentShards(str(tmp_path))
    assert torch.isfinite(shards["good"]).all()
    for task_id in ("NaN", "inf"):
        with pytest.raises(UserError, match=f"0000[12].safetensors: id {task_id}: NaN or infinity"):
            shards[task_id]


@pytest.mark.parametrize("change, words", [
    (lambda content: content[:-3], "00000.safetensors is truncated.*delete it"),
    (lambda content: content[:40], "truncated"),
    (lambda content: b"", "truncated"),
    (lambda content: content + b"junk", "not a latent shard"),
    (lambda content: b"\xff" * 500, "not a latent shard"),
    (lambda content: save({"w": torch.zeros(2, 4)}), "not a latent shard"),
    (lambda content: save({"w": torch.zeros(2, 4)}, {"records": "[1", "sender": "x"}), "not a latent shard"),
    # a record without a tensor
    (lambda content: content.replace(b'{\\"a\\"', b'{\\"q\\"', 1), "truncated or not a latent")])
def test_a_damaged_shard_says_what_is_wrong(tmp_path, change, words):
    path, _ = shard(tmp_path, ["a", "b"])
    with open(path, "rb") as file:
        content = file.read()
    assert change(content) != content
    with open(path, "wb") as file:
        file.write(change(content))
    with pytest.raises(UserError, match=words):
        LatentShards(str(tmp_path))


@pytest.mark.parametrize("ids, number, change, words", [
    ("z", 1, {"seed": 1}, "mixes senders.*00001.*seed"),
    ("z", 1, {"hidden_size": 5}, "mixes senders.*hidden_size"),
    ("a", 0, {"hidden_size": 5}, "id a: expected a tensor .L, 5., found .2, 4."),
    ("b", 1, {}, "00001.*id b is also in.*00000"),
    ("z", 1, {}, "no message for id nobody")])
def test_shards_that_do_not_fit_say_why(tmp_path, ids, number, change, words):
    shard(tmp_path, ["a", "b"])
    shard(tmp_path, ids, number, **change)
    with pytest.raises(UserError, match=words):
        shards = LatentShards(str(tmp_path))
        shards["a"]
        shards["nobody"]


# ---- the sender in K steps, and the decode loop
def test_student_saves_bit_for_bit_and_a_damaged_bridge_is_one_line(tmp_path):
    sender = LatentSender(make_lm(tied=True)).eval()
    with torch.no_grad():
        for parameter in (sender.start, sender.norm.bias, sender.bridge.weight):
            parameter += torch.randn_like(parameter)
    sender.save(tmp_path)
    loaded = LatentSender.load(str(tmp_path))
    state = loaded.state_dict()
    assert state.keys() == sender.state_dict().keys() and not loaded.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in sender.state_dict().items())
    bridge = tmp_path / "latent_bridge.safetensors"
    for content, words in ((bridge.read_bytes()[:-3], "damaged"), (save({"start": torch.zeros(32)}), "bridge.weight")):
        bridge.write_bytes(content)
        with pytest.raises(UserError, match=f"latent_bridge.safetensors .*{words}"):
            LatentSender.load(str(tmp_path))


@torch.no_grad()
def read_again(lm, prompt, limit, stops, choose):
    """What `decode` must write: all is read anew for each token -> ids, was it cut?, states (L, D)."""
    ids, states = [], torch.zeros(0, 32)
    while len(ids) < limit:
        hidden_states = lm(torch.tensor([prompt + ids]), output_hidden_states=True).hidden_states[-1][0]
        next_id = choose(lm.lm_head(hidden_states[-1:]), [0], len(ids)).item()
        if next_id in stops:
            return ids, False, states
        ids, states = ids + [next_id], hidden_states[len(prompt) - 1:]
    return ids, True, states


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("drawn", [False, True])
def test_decode_writes_in_a_batch_what_it_writes_alone(family, drawn):
    """Texts end at a stop or at their own limit, each at another step; what is kept is of the states of one
    teacher-forced pass, each from the position before its token."""
    lm, prompts = make_lm(family), [[5, 6, 7], [8] * 11, [9, 10], [11, 12, 13, 14], [15], [16, 17]]
    limits, uniforms = [12, 12, 1, 5, 12, 7], torch.rand(6, 12, dtype=torch.float64)

    def chooser(numbers):  # (B, steps)
        return lambda logits, active, step: next_tokens(logits, numbers[active, step] if drawn else None)

    def written(prompts, limits, stops, choose, keep):
        ids, mask = left_pad(prompts)
        return decode(lm, lm.get_input_embeddings()(ids), mask, limits, stops, choose, keep)

    def keep(hidden_states, logits):
        return torch.cat([hidden_states[-1], logits.argmax(-1, keepdim=True)], dim=1)

    endless = [read_again(lm, prompts[n], 12, [], chooser(uniforms[n:n + 1]))[0] for n in range(6)]
    stops = {endless[0][3], endless[4][0], endless[5][6]}
    together, ends = written(prompts, limits, stops, chooser(uniforms), keep), set()
    for n in range(6):
        choose = chooser(uniforms[n:n + 1])
        ids, cut, states = read_again(lm, prompts[n], limits[n], stops, choose)
        ends.add((len(ids), cut))
        for reply in (together[n], *written([prompts[n]], [limits[n]], stops, choose, keep)):
            assert (reply["ids"], reply["cut"], len(reply["kept"])) == (ids, cut, len(ids)) and reply["ms"] > 0
            if ids:
                kept = torch.stack(reply["kept"])  # (L, D + 1)
                torch.testing.assert_close(kept[:, :32], states, rtol=1e-4, atol=1e-4)
                assert drawn or kept[:, 32].tolist() == ids
    assert {(0, False), (1, True)} < ends and len(ends) > 3
    assert written(prompts, limits, stops, chooser(uniforms), None)[0]["kept"] == []
