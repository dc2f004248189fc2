"""That each ablation changes the one thing that it names, and nothing that has another name."""

import pytest
import torch

import ablations
import dreamer
from common.keys import flatten
from small_runs import configure


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The functions of dreamer.py that a patch replaces come back after the test."""
    for name in ("model_loss", "action_model_samples", "discount_weight", "mode_action"):
        monkeypatch.setattr(dreamer, name, getattr(dreamer, name))


def test_the_clip_of_free_nats_moves_inside_the_mean():
    zeros, kl = torch.zeros(1, 2), torch.tensor([[0.0, 6.0]])
    assert dreamer.model_loss(zeros, zeros, kl, 1.0, 3.0) == 3.0
    ablations.clip_before_the_mean()
    assert dreamer.model_loss(zeros, zeros, kl, 1.0, 3.0) == 4.5


def test_the_gradient_passes_the_actors_input():
    def gradient():
        state, belief = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2)
        noise = torch.zeros(1, 1, 2)
        choose = dreamer.action_model_samples(lambda s, b: (s * weight, b), noise)
        action, _, _ = choose(0, state, belief)
        return torch.autograd.grad(action.sum(), state, allow_unused=True)[0]

    weight = torch.ones(2, requires_grad=True)
    assert gradient() is None
    ablations.gradient_through_the_actors_input()
    assert gradient().abs().sum() > 0


def test_all_dreamed_steps_weigh_the_same():
    discount = torch.full((3, 5), 0.9)
    shape = dreamer.discount_weight(discount).shape
    ablations.no_discount_weights()
    assert torch.equal(dreamer.discount_weight(discount), torch.ones(shape))


def test_the_mean_is_played():
    mean, std, noise = torch.ones(2, 3), torch.ones(2, 3), torch.randn(7, 2, 3)
    assert not torch.equal(dreamer.mode_action(mean, std, noise), mean.tanh())
    ablations.mean_action()
    assert torch.equal(dreamer.mode_action(mean, std, noise), mean.tanh())


def test_every_override_is_a_key_whose_value_differs_from_the_preset():
    preset = flatten(configure(name=ablations.PRESET))
    for overrides, patch in ablations.TRAINED.values():
        assert patch is None or not overrides
        for word in overrides:
            key, value = word.split("=")
            assert preset[key] != float(value)


@pytest.mark.parametrize("variant", ablations.TRAINED)
def test_every_variant_starts_wherever_its_folder_is(variant, tmp_path):
    folder = tmp_path / "a student's, (2nd) folder=1"
    _, preset, *words = ablations.training_words(folder, variant, 1, ["env.task=balance"])
    cfg = configure(*words, name=preset)
    assert cfg.run_dir == str(ablations.directory(folder, variant, 1))
    assert cfg.seed == 1 and cfg.env.task == "balance"
