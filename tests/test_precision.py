"""Master weights: small steps are kept, float32 is left as it is, and a resumed run is the same run."""

from __future__ import annotations

import copy
import doctest
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from rlhf_gym.lm import precision
from rlhf_gym.lm.precision import MasterWeights

ADAM = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)


def regression(dtype, *, float32_head=False):
    """A two-layer model of seeded weights, inputs, and targets that it is a little away from."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x = torch.randn(64, 8, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True))
    model[0].to(dtype)
    model[2].to(torch.float32 if float32_head else dtype)
    return model, x, y


def loss_of(model, x, y):
    hidden = torch.tanh(model[0](x.to(model[0].weight.dtype)))
    return (model[2](hidden.to(model[2].weight.dtype)).float() - y).square().mean()


def train(model, x, y, trainer, steps, **options):
    losses = []
    for _ in range(steps):
        loss = loss_of(model, x, y)
        loss.backward()
        trainer.step(**options)
        losses.append(loss.item())
    return losses


def test_docstring_examples():
    assert doctest.testmod(precision).failed == 0


def test_small_steps_are_not_lost():
    """Linear regression from weights of 1 to weights of 1.2 by Adam steps of .001; above 1, bf16 has steps of .0078."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def gap(weight):
        return (x @ (weight.float() - 1.2)).square().mean()

    weights = {name: nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for name in ("masters", "bare")}
    optimizers = {"masters": MasterWeights([weights["masters"]], ADAM), "bare": ADAM([weights["bare"]])}
    start = gap(torch.ones(8)).item()
    for _ in range(400):
        for name, weight in weights.items():
            optimizers[name].zero_grad()
            gap(weight).backward()
            optimizers[name].step()
    assert (weights["bare"] == 1).all()  # stalled where it began
    assert gap(weights["masters"]).item() < 0.01 * start
    torch.testing.assert_close(optimizers["masters"].masters[0].detach(), torch.full((8,), 1.2), atol=0.01, rtol=0)


def test_float32_is_the_bare_optimizer_bit_for_bit():
    model, x, y = regression(torch.float32)
    twin = copy.deepcopy(model)
    trainer = MasterWeights(model.parameters(), ADAM)
    assert all(master is parameter for master, parameter in zip(trainer.masters, model.parameters(), strict=True))
    train(model, x, y, trainer, 20, max_grad_norm=0.5)
    bare = ADAM(twin.parameters())
    for _ in range(20):
        bare.zero_grad()
        loss_of(twin, x, y).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        bare.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_model_holds_the_rounded_masters():
    model, x, y = regression(torch.bfloat16, float32_head=True)
    frozen = model[0].bias.requires_grad_(False)
    before = frozen.clone()
    trainer = MasterWeights(model.parameters(), ADAM)
    train(model, x, y, trainer, 5)
    assert torch.equal(frozen, before) and len(trainer.masters) == 3
    assert all(master.dtype == torch.float32 and master.grad is None for master in trainer.masters)
    assert torch.equal(model[0].weight, trainer.masters[0].bfloat16())
    assert trainer.masters[1] is model[2].weight


def test_compute_dtype_rounds_the_parameters_and_not_the_masters():
    model, x, y = regression(torch.float32)
    exact = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = MasterWeights(model.parameters(), ADAM, compute_dtype=torch.bfloat16)
    for parameter, master, value in zip(model.parameters(), trainer.masters, exact, strict=True):
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, value.bfloat16())
        assert torch.equal(master, value)
    train(model, x, y, trainer, 2)
    assert model[0].weight.dtype == torch.bfloat16


def test_master_precision_is_for_saving_and_loading():
    model, x, y = regression(torch.bfloat16, float32_head=True)
    trainer = MasterWeights(model.parameters(), ADAM)
    train(model, x, y, trainer, 3)
    rounded = [parameter.detach().clone() for parameter in model.parameters()]
    with trainer.master_precision():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.masters, strict=True))
        assert model[0].weight.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rounded, strict=True))

    with pytest.raises(KeyError), trainer.master_precision():
        model[0].weight.data.fill_(1.001)
        raise KeyError
    assert (trainer.masters[0] == 1.001).all() and (model[0].weight == 1).all()
    train(model, x, y, trainer, 1)  # still trains the same tensors
    assert torch.equal(model[0].weight, trainer.masters[0].bfloat16()) and (trainer.masters[0] != 1.001).any()


def test_micro_batches_add_up_in_float32():
    """256 gradients of 1 after one of 256: bf16 has no 257, so adding them there one by one stays at 256."""
    totals = {}
    for accumulate in (True, False):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        trainer = MasterWeights([weight], partial(torch.optim.SGD, lr=1.0))
        for gradient in [256.0] + [1.0] * 256:
            (weight * gradient).sum().backward()
            if accumulate:
                trainer.accumulate()
        norm = trainer.step()
        totals[accumulate] = -trainer.masters[0].item()
        assert norm.item() == totals[accumulate]
    assert totals == {True: 512.0, False: 256.0}


def test_the_norm_is_that_before_clipping():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    trainer = MasterWeights([weight], partial(torch.optim.SGD, lr=1.0))
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    assert trainer.step(max_grad_norm=1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(trainer.masters[0].detach(), torch.tensor([-0.6, -0.8]))
    assert weight.grad is None


OPTIMIZERS = {
    "AdamW": ADAM,
    "AMSGrad": partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "SGD": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "plain SGD": partial(torch.optim.SGD, lr=1e-3),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[2:], "lr": 1e-4}, {"params": p[:2]}], lr=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resume_is_bit_exact(dtype, optimizer):
    model, x, y = regression(dtype, float32_head=True)
    trainer = MasterWeights(model.parameters(), OPTIMIZERS[optimizer])
    train(model, x, y, trainer, 7)
    tensors, scalars = trainer.state_dict()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = save(tensors), json.dumps(scalars), save(weights)
    straight = train(model, x, y, trainer, 7)

    resumed, x, y = regression(dtype, float32_head=True)
    resumed.load_state_dict(load(files[2]))
    trainer = MasterWeights(resumed.parameters(), OPTIMIZERS[optimizer])
    saved = load(files[0])
    trainer.load_state_dict(saved, json.loads(files[1]))
    assert train(resumed, x, y, trainer, 7) == straight
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, tensor in load(files[0]).items():  # training on did not write into what was loaded from
        assert torch.equal(tensor, saved[name])


def test_without_the_masters_a_resume_is_another_run():
    """The negative control: rounded weights alone do not carry the small steps over."""
    model, x, y = regression(torch.bfloat16)
    trainer = MasterWeights(model.parameters(), ADAM)
    train(model, x, y, trainer, 7)
    _, scalars = trainer.state_dict()
    twin = copy.deepcopy(model)
    fresh = MasterWeights(twin.parameters(), ADAM)
    assert any(not torch.equal(a, b) for a, b in zip(trainer.masters, fresh.masters, strict=True))
    assert json.loads(json.dumps(scalars))["param_groups"][0]["lr"] == 1e-3


def test_refusals():
    model, x, y = regression(torch.bfloat16)
    trainer = MasterWeights(model.parameters(), ADAM)
    train(model, x, y, trainer, 1)
    tensors, scalars = trainer.state_dict()
    before = [master.clone() for master in trainer.masters]

    with pytest.raises(ValueError, match="everything is frozen"):
        MasterWeights([nn.Parameter(torch.ones(1), requires_grad=False)], ADAM)
    with pytest.raises(ValueError, match="optimizer_factory must"):
        MasterWeights(model.parameters(), lambda masters: ADAM(masters[:1]))
    other, _, _ = regression(torch.float32)
    with pytest.raises(ValueError, match="has 4 float32 master weights, the model needs 0"):
        MasterWeights(other.parameters(), ADAM).load_state_dict(tensors, scalars)
    wrong = tensors | {"optimizer.0.exp_avg": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"optimizer.0.exp_avg has shape \(3,\)"):
        trainer.load_state_dict(wrong, scalars)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.masters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype):
    model, x, y = regression(dtype)
    trainer = MasterWeights(model.parameters(), ADAM)
    train(model, x, y, trainer, 2)
    before = copy.deepcopy((model.state_dict(), trainer.state_dict()[0]))
    (loss_of(model, x, y) * torch.nan).backward()
    with pytest.raises(ValueError, match="norm must be finite, got nan; no step was taken"):
        trainer.step(max_grad_norm=1.0)
    for old, new in zip(before, (model.state_dict(), trainer.state_dict()[0]), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert all(tensor.grad is None for tensor in (*trainer.parameters, *trainer.masters))
