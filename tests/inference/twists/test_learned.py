"""A learned twist on enumerable models: its prefix law through the real decoder, what it learns, and its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lmppl.errors import InfeasibleModel, ModelError, StorageError, UnsupportedModel
from lmppl.inference import Rejection, infer
from lmppl.inference.smc import SMC
from lmppl.inference.twists import LearnedTwist, learn_twist
from lmppl.inference.twists.head import HeadShape, TwistHead
from lmppl.inference.twists.learned import LearnedState, TwistRecord
from lmppl.inference.twists.losses import TwistLoss
from lmppl.inference.twists.rollouts import (
    draw_training_set,
    evaluate_rollouts,
    given_training_set,
    states_before,
)
from lmppl.lm.base import LanguageModel
from lmppl.lm.randomness import Source
from lmppl.lm.transformers import TransformersLM
from lmppl.modeling import Constraint, Incremental, Model, Reward, Target
from lmppl.sequences import Cost, Draws, Sequences, concatenate
from lmppl.testing.enumeration import every_outcome
from tests.inference.twists.test_losses import MeanValue
from tests.lm.random_models import build, tokenizer
from tests.models import TOLERANCE, brute_force, enumerable_lm, has_no, wavy

NETWORKS = ("llama", "mistral")


def random_twist(lm: LanguageModel, seed: int = 0) -> LearnedTwist:
    """Weights of order one everywhere, so that nothing is learned and everything matters."""
    step, _ = lm.decoder().prefill(torch.tensor([0]))
    generator = torch.Generator().manual_seed(seed)
    shape = HeadShape(lm.num_contexts, lm.max_new_tokens, lm.vocab_size, step.hidden.shape[-1], 12, 3, 4)
    head = TwistHead(shape, generator=generator, dtype=lm.dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
        head.scale.normal_(0.0, 0.5, generator=generator)
    return LearnedTwist(head, TwistRecord(repr(lm), lm.fingerprint, "", "", "random", 0, 0, seed))


def walk(twist: LearnedTwist, lm: LanguageModel, rows: Sequences, length: int) -> list[LearnedState]:
    """The states of all rows after 0..length tokens, through the LM's decoder."""
    decoder = lm.decoder()
    step, cache = decoder.prefill(rows.context)
    states = [twist.start(rows.context, step)]
    for t in range(length):
        step, cache = decoder.extend(cache, rows.ids[:, t : t + 1])
        states.append(twist.advance(states[-1], rows.ids[:, t], step))
    return states


def full_rows(lm: LanguageModel) -> Sequences:
    """Outcomes of both contexts that run to the cap."""
    draws = lm.draw(200, generator=torch.Generator().manual_seed(3))
    chosen = draws.sequences.select(torch.nonzero(draws.lengths == lm.max_new_tokens).squeeze(1))
    assert set(chosen.context.tolist()) == {0, 1}
    return chosen


@cache
def model_of(kind: str, hard: bool = False) -> Model:
    model = Model(enumerable_lm(kind)) * Reward(wavy, beta=0.5)
    return model * Constraint(has_no("b")) if hard else model


def everything(model: Model) -> Draws:
    """All outcomes of positive probability, with q the same everywhere, so that their weights are π0.

    What is learned from all of them has no noise of sampling.
    """
    parts = []
    for c in range(model.prior.num_contexts):
        b = brute_force(model, c)
        rows = b.sequences.select(torch.nonzero(b.log_prior > -math.inf).squeeze(1))
        parts.append(with_densities(model.prior, rows, model.prior.score(rows)))
    return concatenate(parts)


def with_densities(lm: LanguageModel, rows: Sequences, log_prior: Tensor) -> Draws:
    """Rows as draws of a law that is the same everywhere."""
    columns = {"log_prior": log_prior, "log_q": torch.zeros_like(log_prior)}
    return Draws(rows.ids, rows.lengths, rows.finished, rows.context, lm.prompts, lm.decode, **columns)


def small(model: Model, loss: str | TwistLoss, **options: object) -> LearnedTwist:
    """Learned from all outcomes, unless told otherwise, by a head that is large for them."""
    settings: dict[str, object] = {"num_steps": 250, "batch_size": 4000, "learning_rate": 2e-2, "weight_decay": 0.0}
    settings |= {"width": 48, "rank": 8, "memory": 8, "progress": False} | options
    if "num_draws" not in settings:
        settings = {"draws": everything(model), "holdout": 0.0} | settings
    return learn_twist(model, loss, **settings)  # type: ignore[arg-type]


@cache
def learned(kind: str, loss: str, hard: bool = False) -> LearnedTwist:
    return small(model_of(kind, hard), loss)


# The prefix-by-prefix form.


@pytest.mark.parametrize("kind", NETWORKS)
def test_increments_add_up_to_the_teacher_forced_values(kind: str) -> None:
    lm = enumerable_lm(kind)
    twist, rows = random_twist(lm), full_rows(lm)
    assert isinstance(twist, Incremental)
    draws = with_densities(lm, rows, lm.score(rows))
    data = given_training_set(Target(Model(lm)), draws)
    forced = evaluate_rollouts(twist.head, data, torch.arange(len(rows)), torch.zeros(2)).log_psi
    states = walk(twist, lm, rows, lm.max_new_tokens)
    assert twist.potential(states[0]).abs().max() == 0.0
    total = torch.zeros(len(rows), dtype=torch.float64)
    for t in range(lm.max_new_tokens):
        every = twist.weigh(states[t], None)
        assert every.shape == (len(rows), lm.vocab_size)
        assert bool(torch.isfinite(every).all())
        some = torch.stack([rows.ids[:, t], torch.zeros_like(rows.ids[:, t])], 1)
        assert (twist.weigh(states[t], some) - every.gather(1, some)).abs().max() < TOLERANCE
        total = total + every.gather(1, rows.ids[:, t : t + 1])[:, 0]
        assert (total - twist.potential(states[t + 1])).abs().max() < TOLERANCE
        assert (total - forced[:, t]).abs().max() < TOLERANCE
    assert (forced[:, 0] - forced[:, 2]).abs().max() > 0.1


@pytest.mark.parametrize("kind", NETWORKS)
def test_expected_values_one_token_ahead_sum_over_the_vocabulary(kind: str) -> None:
    lm = enumerable_lm(kind)
    twist, rows = random_twist(lm), full_rows(lm)
    states = walk(twist, lm, rows, 2)
    decoder = lm.decoder()
    step, _ = decoder.extend(decoder.prefill(rows.context)[1], rows.ids[:, :2])
    expected = torch.logsumexp(step.log_probs[:, -1] + twist.weigh(states[2]) + twist.potential(states[2])[:, None], -1)
    data = draw_training_set(Target(Model(lm)), 200, torch.Generator().manual_seed(0))
    where = {key: i for i, key in enumerate(data.sequences.keys())}
    found = [(i, where[key]) for i, key in enumerate(rows.keys()) if key in where]
    assert len(found) > 20
    mine, theirs = (torch.tensor(x) for x in zip(*found, strict=True))
    r = evaluate_rollouts(twist.head, data, theirs, torch.zeros(2))
    assert (r.log_expected[:, 2] - expected[mine]).abs().max() < TOLERANCE


def same(a: LearnedState, b: LearnedState) -> bool:
    pairs = zip(a[:5], b[:5], strict=True)
    return all(bool((x.double() - y.double()).abs().max() < TOLERANCE) for x, y in pairs)


@pytest.mark.parametrize("kind", NETWORKS)
def test_rows_are_selected_and_cut_back_each_to_its_length(kind: str) -> None:
    lm = enumerable_lm(kind)
    twist = random_twist(lm)
    rows = full_rows(lm)
    index = torch.tensor([5, 0, 5, 2, len(rows) - 1])
    chosen = rows.select(index)
    decoder = lm.decoder()
    step, cache = decoder.prefill(rows.context)
    state = twist.start(rows.context, step)
    step, cache = decoder.extend(cache, rows.ids[:, :1])
    state = twist.advance(state, rows.ids[:, 0], step)
    state, cache = twist.select(state, index), decoder.select(cache, index)  # between two tokens
    step, _ = decoder.extend(cache, chosen.ids[:, 1:2])
    state = twist.advance(state, chosen.ids[:, 1], step)
    fresh = walk(twist, lm, chosen, 2)
    assert same(state, fresh[2])
    lengths = torch.tensor([2, 0, 1, 2, 1])
    cut = twist.crop(state, lengths)
    for row, n in enumerate(lengths.tolist()):
        one = torch.tensor([row])
        assert same(twist.select(cut, one), twist.select(fresh[n], one))
    again = twist.crop(cut, torch.tensor([1, 0, 1, 0, 0]))
    for row, n in enumerate([1, 0, 1, 0, 0]):
        one = torch.tensor([row])
        assert same(twist.select(again, one), twist.select(fresh[n], one))
    with pytest.raises(ModelError, match="got length 2 for row 1, which has 0 tokens"):
        twist.crop(cut, torch.tensor([2, 2, 1, 2, 1]))


def test_it_needs_the_step_of_its_own_lm() -> None:
    lm = enumerable_lm("llama")
    twist = random_twist(lm)
    with pytest.raises(ModelError, match="got step=None"):
        twist.start(torch.tensor([0]))
    step, _ = lm.decoder().prefill(torch.tensor([0]))
    wrong = type(step)(step.project, step.hidden[..., :7])
    with pytest.raises(ModelError, match="hidden states of size 7, expected 16"):
        twist.start(torch.tensor([0]), wrong)


# The training set.


@pytest.mark.parametrize("kind", NETWORKS)
def test_states_while_drawing_are_those_of_teacher_forcing(kind: str) -> None:
    lm = enumerable_lm(kind)
    target = Target(model_of(kind))
    data = draw_training_set(target, 40, torch.Generator().manual_seed(0))
    drawn_cost = target.cost.copy()
    hidden, _ = states_before(lm, data.sequences, cost=Cost())
    mask = data.sequences.mask[:, : hidden.shape[1]]
    assert (data.hidden - hidden)[mask].abs().max() < TOLERANCE
    for row in range(0, len(data), 17):  # each against a row of its own, without a cache
        ids, n = data.sequences.ids[row], int(data.sequences.lengths[row])
        prompt = lm.context_ids[data.sequences.context[row], -int(lm.context_lengths[data.sequences.context[row]]) :]
        alone = lm.network.body(input_ids=torch.cat([prompt, ids[: n - 1]])[None], use_cache=False)[0][
            0, len(prompt) - 1 :
        ]
        assert (data.hidden[row, :n] - alone).abs().max() < TOLERANCE
    log_prior = lm.score(data.sequences)
    assert (data.log_prior_weight).abs().max() == 0.0
    assert bool(torch.isfinite(log_prior).all())
    prefixes = {(c, row[:t]) for c, _, row in data.sequences.keys() for t in range(1, len(row))}  # noqa: SIM118
    assert drawn_cost.lm_tokens == int(lm.context_lengths.sum()) + len(prefixes)
    assert drawn_cost.factor_calls == len(set(data.sequences.text))


def test_draws_of_another_law_are_weighted_to_the_prior() -> None:
    model = model_of("llama")
    other = enumerable_lm("llama", temperature=2.0)
    drawn = other.draw(2000, generator=torch.Generator().manual_seed(1))
    draws = replace(drawn, log_prior=model.prior.score(drawn))
    data = given_training_set(Target(model), draws)
    brutes = [brute_force(model, c) for c in range(2)]
    assert (data.log_z() - torch.stack([b.log_z for b in brutes])).abs().max() < 0.1
    with pytest.raises(ModelError, match="without log_prior or log_q"):
        given_training_set(Target(model), replace(draws, log_q=None))


# What is learned.


def divergences(twist: LearnedTwist, model: Model) -> list[tuple[float, float]]:
    """KL(π*‖q) for q ∝ π0 ψ token by token, and KL(π*‖π0), of each context."""
    found = []
    for c in range(model.prior.num_contexts):
        b = brute_force(model, c)
        rows = b.sequences.select(b.log_prior > -math.inf)
        draws = with_densities(model.prior, rows, torch.zeros(len(rows)))
        data = given_training_set(Target(model), draws)
        with torch.no_grad():
            r = evaluate_rollouts(twist.head, data, torch.arange(len(rows)), torch.zeros(model.prior.num_contexts))
            steered = (r.log_psi - r.log_expected).masked_fill(~r.mask, 0.0).sum(1)
        p = b.log_posterior[b.log_prior > -math.inf].exp()
        ratio = torch.where(p > 0, b.log_phi[b.log_prior > -math.inf] - b.log_z, 0.0)
        found.append((float((p * (ratio - steered)).sum()), float((p * ratio).sum())))
    return found


def value_errors(twist: LearnedTwist, model: Model) -> list[float]:
    """E_π*[|log ψ − V|], of each t and context, over prefixes that go on."""
    errors = []
    for c in range(model.prior.num_contexts):
        b = brute_force(model, c)
        ratio = (b.log_posterior - b.log_prior).exp().nan_to_num(0.0)
        soft, mass = b.soft_values(), {u: g for u, (_, g) in b._masses(ratio).items()}  # V and π*(x_≤t)
        ends = {tuple(row) for row in b.sequences.token_lists()}
        rows = [u for u in soft if u and u not in ends]
        sequences = model.prior.sequences(rows, [c] * len(rows))
        draws = with_densities(model.prior, sequences, torch.zeros(len(rows)))
        data = given_training_set(Target(Model(model.prior)), draws)
        with torch.no_grad():
            r = evaluate_rollouts(twist.head, data, torch.arange(len(rows)), torch.zeros(model.prior.num_contexts))
        for t in (1, 2):
            at = [i for i, u in enumerate(rows) if len(u) == t]
            weight = torch.tensor([mass[rows[i]] for i in at], dtype=torch.float64)
            keep = weight > 0
            gap = torch.tensor([soft[rows[i]] for i in at], dtype=torch.float64) - r.log_psi[at, t - 1]
            errors.append(float((weight[keep] * gap[keep].abs()).sum() / weight.sum()))
    return errors


@pytest.mark.parametrize(
    ("loss", "hard"), [("contrastive", False), ("contrastive", True), ("soft_value", True), ("consistency", False)]
)
def test_each_loss_learns_the_soft_values(loss: str, hard: bool) -> None:
    model, twist = model_of("llama", hard), learned("llama", loss, hard)
    for kl, of_prior in divergences(twist, model):
        assert of_prior > 0.3
        assert kl < 0.02 * of_prior
    assert max(value_errors(twist, model)) < 0.05


def test_a_loss_of_ones_own_is_an_instance_and_mean_values_do_not_give_the_posterior() -> None:
    model = model_of("llama")
    twist = small(model, MeanValue())
    assert twist.record.loss == "mean_value"
    wrong, right = (max(kl for kl, _ in divergences(t, model)) for t in (twist, learned("llama", "contrastive")))
    assert wrong > 0.02
    assert wrong > 10 * right
    assert max(value_errors(twist, model)) > 0.1


def test_progress_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws bars on terminals alone
    small(model_of("llama"), "contrastive", num_draws=40, num_steps=2, progress=True)
    shown = capsys.readouterr()
    assert "learn_twist(contrastive)" in shown.err
    assert shown.out == ""


def test_draws_of_the_prior_do_and_figures_say_how_well() -> None:
    model = model_of("mistral")
    twist = small(model, "contrastive", num_draws=800, num_steps=100)
    assert all(kl < 0.25 * of_prior for kl, of_prior in divergences(twist, model))
    figures = twist.record.figures
    assert all(kl < 0.25 for kl in figures["kl"])
    assert all(v < 0.5 * p for v, p in zip(figures["variance"], figures["prior_variance"], strict=True))


@pytest.mark.parametrize("source", ["draws", "engine"])
def test_positives_can_come_from_elsewhere(source: str) -> None:
    model = Model(enumerable_lm("llama")) * Reward(wavy, beta=0.5, upper=1.0)
    exact = infer(model, Rejection(), 500, seed=4, progress=False).draws
    twist = small(model, "contrastive", positives=exact if source == "draws" else SMC(64, num_sweeps=8), num_steps=150)
    assert all(kl < 0.25 * of_prior for kl, of_prior in divergences(twist, model))
    alone = given_training_set(target := Target(model), everything(model))
    assert len(alone) < 200
    assert twist.training_cost.lm_tokens > target.cost.lm_tokens


def test_the_same_seed_learns_the_same_twist_and_leaves_no_trace() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = model_of("llama")
    options: dict[str, object] = {"num_draws": 60, "num_steps": 8}
    first, second = (small(model, "contrastive", **options) for _ in range(2))
    assert first.fingerprint == second.fingerprint != small(model, "contrastive", seed=1, **options).fingerprint
    assert bool((torch.get_rng_state() == before).all())
    assert not any(p.requires_grad for p in first.head.parameters())
    assert not any(p.requires_grad for p in model.prior.network.model.parameters() if p.grad is not None)


def test_what_it_cost_is_kept() -> None:
    model = model_of("llama")
    twist = small(model, "consistency", num_draws=60, num_steps=4)
    target = Target(model)
    draw_training_set(target, 60, torch.Generator().manual_seed(0))
    cost = twist.training_cost
    assert (cost.lm_tokens, cost.lm_forwards, cost.factor_calls) == (
        target.cost.lm_tokens, target.cost.lm_forwards, target.cost.factor_calls,
    )  # fmt: skip
    assert cost.seconds > 0.0


# What is refused.


def test_a_table_has_no_hidden_states() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"reads the LM's hidden states, and TabularLM.* gives none; a table has"
    ):
        learn_twist(model_of("tabular"))


def test_evidence_that_no_draw_meets_is_refused() -> None:
    never = Model(enumerable_lm("llama")) * Constraint(lambda texts: [False] * len(texts), name="never")
    with pytest.raises(InfeasibleModel, match=r"none of 50 draws for context 'ab' has φ > 0"):
        learn_twist(never, num_draws=50)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps: got 0, expected an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size: got 2.5"),
        ({"memory": -1}, "memory: got -1, expected an integer of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"holdout": 1.0}, "holdout: got 1.0, expected a share of at least 0 and below 1"),
        ({"num_draws": 5, "draws": everything}, "got draws and num_draws"),
        ({"loss": "mse"}, "loss: got 'mse', expected one of"),
        (
            {"loss": "soft_value", "positives": "rejection"},
            "the loss 'soft_value' learns from draws of the prior alone",
        ),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        learn_twist(model_of("llama"), **options)  # type: ignore[arg-type]


# Files.


def other_lm() -> TransformersLM:
    options = {"context": ["ab", "bacab"], "max_new_tokens": 3}
    return TransformersLM(build("llama", 5, seed=9), tokenizer=tokenizer(5), **options)


def test_a_saved_twist_is_the_same_to_the_bit(tmp_path: Path) -> None:
    model, twist = model_of("llama"), learned("llama", "contrastive")
    path = twist.save(tmp_path / "praise.twist")
    for same_declaration in (model, model.prior):
        loaded = LearnedTwist.load(path, same_declaration)
        assert loaded.fingerprint == twist.fingerprint
        assert loaded.record == twist.record
    state: Tensor = loaded.head.state_dict()["first.weight"]
    assert torch.equal(state, twist.head.state_dict()["first.weight"])


def test_a_file_of_another_model_is_refused_and_both_are_named(tmp_path: Path) -> None:
    model, twist = model_of("llama"), learned("llama", "contrastive")
    path = twist.save(tmp_path / "praise.twist")
    other = other_lm()
    with pytest.raises(ModelError) as caught:
        LearnedTwist.load(path, other)
    assert model.prior.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    longer = TransformersLM(build("llama", 5), tokenizer=tokenizer(5), context=["ab", "bacab"], max_new_tokens=4)
    with pytest.raises(ModelError, match=r"learned on .*T = 3.*T = 4"):
        LearnedTwist.load(path, longer)
    with pytest.raises(ModelError) as caught:
        LearnedTwist.load(path, model_of("llama", hard=True))
    assert model.formula in str(caught.value)
    assert model_of("llama", hard=True).formula in str(caught.value)


def test_smc_refuses_the_twist_of_another_lm() -> None:
    model = Model(other_lm()) * Reward(wavy)
    with pytest.raises(ModelError, match=f"SMC: the twist was learned on .*{enumerable_lm('llama').fingerprint}"):
        infer(model, SMC(4, twist=random_twist(enumerable_lm("llama")), num_sweeps=1), progress=False)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    lm, path = enumerable_lm("llama"), tmp_path / "praise.twist"
    learned("llama", "contrastive").save(path)
    content = path.read_bytes()
    for name, broken, words in (
        ("cut", content[: len(content) // 2], "no safetensors file, or a damaged one"),
        ("flipped", content[:-3] + bytes([content[-3] ^ 16]) + content[-2:], "does not match its checksum"),
        ("header", content.replace(b'\\"num_steps\\": ', b'\\"num_steps\\":9', 1), "does not match its checksum"),
        ("empty", b"", "no safetensors file"),
    ):
        assert broken != content
        bad = tmp_path / name
        bad.write_bytes(broken)
        with pytest.raises(StorageError, match=words):
            LearnedTwist.load(bad, lm)
    with pytest.raises(StorageError, match="there is no such file"):
        LearnedTwist.load(tmp_path / "missing", lm)
    with pytest.raises(StorageError, match="holds no learned twist"):
        LearnedTwist.load(lm.draw(2).save(tmp_path / "draws.safetensors"), lm)
    header = {"format": "lmppl.twist", "version": 99}
    newer = tmp_path / "newer"
    newer.write_bytes(safetensors.torch.save({"bias": torch.zeros(1)}, {"lmppl.twist": json.dumps(header)}))
    with pytest.raises(StorageError, match="format version 99, this lmppl reads 2"):
        LearnedTwist.load(newer, lm)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "praise.twist"
    learned("llama", "contrastive").save(path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="cannot write"):
        learned("llama", "contrastive").save(tmp_path / "nowhere" / "praise.twist")
    tmp_path.chmod(0o500)
    try:
        learned("llama", "soft_value").save(path)
    except StorageError:
        assert path.read_bytes() == before
    finally:
        tmp_path.chmod(0o700)
    assert LearnedTwist.load(path, enumerable_lm("llama")).record.loss in ("contrastive", "soft_value")
    assert [p.name for p in tmp_path.iterdir()] == ["praise.twist"]


# At work.


def test_the_evidence_stays_unbiased_whatever_was_learned() -> None:
    """E Ẑ = Z over every choice that two particles can make, with a twist that knows nothing."""
    lm = TransformersLM(build("llama", 4), tokenizer=tokenizer(4), context=["ab"], max_new_tokens=2)
    model = Model(lm) * Reward(wavy, beta=0.3) * Constraint(has_no("b"))
    engine = SMC(2, 1.0, twist=random_twist(lm), num_sweeps=1)

    def run(source: Source) -> float:
        return float(engine.sweep(Target(model), torch.tensor([0]), source).log_z.exp())

    found = list(every_outcome(run))
    assert abs(sum(p for p, _ in found) - 1.0) < 1e-12
    mean = sum(p * z for p, z in found)
    assert abs(mean - float(brute_force(model, 0).log_z.exp())) < TOLERANCE
    assert max(z for _, z in found) > 1.01 * mean
