import pytest
import torch
from torch import nn

from projects.llava_sam2_rl.models.teacher import EMATeacher


class Toy(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4, dtype=dtype)
        self.frozen = nn.Linear(4, 4, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight  # tied, as language models do
        self.adapter = nn.Linear(4, 4, dtype=dtype)

    def forward(self, x):
        return self.head(self.adapter(self.frozen(x)))


def test_shadows_exactly_the_trainable_tensors_once():
    teacher = EMATeacher(Toy())
    assert teacher.names == ['embed.weight', 'adapter.weight', 'adapter.bias']
    assert teacher.num_parameters == 20 + 16 + 4
    assert teacher.memory_bytes == 160
    assert not any(name.startswith('frozen') for name in teacher.state_dict()['shadows'])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_follows_the_closed_form(dtype):
    # Policy held at a constant c after a start at s: shadow_n = c + decay^n (s - c).
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    model.weight.data.fill_(1.0)
    teacher = EMATeacher(model, decay=0.999)
    model.weight.data.fill_(1.5)
    for _ in range(500):
        teacher.update(model)
    expected = 1.5 - 0.999**500 * 0.5
    assert abs(teacher.state_dict()['shadows']['weight'].item() - expected) < 1e-6
    assert teacher.num_updates == 500


def test_follows_the_weighted_sum_of_a_moving_bf16_policy():
    torch.manual_seed(1)
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    decay, seen = 0.9, [model.weight.detach().double()]
    teacher = EMATeacher(model, decay)
    for _ in range(20):
        model.weight.data.add_(torch.randn(2, 3), alpha=0.1)
        seen.append(model.weight.detach().double())
        teacher.update(model)
    expected = decay**20 * seen[0]
    for k in range(1, 21):
        expected = expected + (1 - decay) * decay ** (20 - k) * seen[k]
    error = (teacher.state_dict()['shadows']['weight'].double() - expected).abs().max()
    assert error < 1e-6


def test_small_and_large_parameters_are_all_updated(monkeypatch):
    from projects.llava_sam2_rl.models import teacher as module

    monkeypatch.setattr(module, '_ELEMENTS_AT_A_TIME', 5)
    model = nn.ModuleList([nn.Linear(1, 2), nn.Linear(4, 4), nn.Linear(2, 1)])
    teacher = EMATeacher(model, decay=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    teacher.update(model)
    shadows = teacher.state_dict()['shadows']
    assert len(shadows) == 6
    assert all((s == 7.0).all() for s in shadows.values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_applied_to_computes_with_the_teacher_and_restores_the_same_storage(dtype):
    model = Toy(dtype)
    teacher = EMATeacher(model)
    with torch.no_grad():
        model.adapter.weight.add_(1.0)
        model.embed.weight.add_(1.0)
    fresh = Toy(dtype)  # the seed makes it equal to the teacher
    x = torch.randn(2, 4, dtype=dtype)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with teacher.applied_to(model) as inside:
        assert inside is model
        torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=0)
        assert model.head.weight is model.embed.weight
        assert model.adapter.weight.dtype == dtype
    assert not torch.equal(model(x), fresh(x))
    for name, p in model.named_parameters():
        same, pointer, value = before[name]
        assert p is same
        assert p.data_ptr() == pointer
        assert torch.equal(p, value)


def test_applied_to_restores_after_an_error():
    model = Toy()
    teacher = EMATeacher(model)
    weight = model.adapter.weight
    with pytest.raises(KeyError, match='boom'), teacher.applied_to(model):
        raise KeyError('boom')
    assert model.adapter.weight is weight
    teacher.update(model)  # the scope is closed again


def test_applied_to_leaves_gradients_and_optimizer_alone():
    model, reference = Toy(), Toy()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    twin = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad])
    teacher = EMATeacher(model)
    x = torch.randn(2, 4)
    for _ in range(3):
        loss = model(x).square().mean()
        with teacher.applied_to(model), torch.no_grad():
            model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference(x).square().mean().backward()
        twin.step()
        twin.zero_grad()
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.equal(p, q)


def test_gradient_through_the_teacher_uses_its_weights_after_the_scope():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(3.0)
    teacher = EMATeacher(model)
    model.weight.data.fill_(5.0)
    x = torch.ones(1, 1, requires_grad=True)
    with teacher.applied_to(model):
        y = model(x)
    y.sum().backward()
    assert x.grad.item() == 3.0  # d(3x)/dx, not the policy's 5
    assert model.weight.grad is None


def test_refuses_to_nest_and_to_change_while_applied():
    model = Toy()
    teacher = EMATeacher(model)
    with teacher.applied_to(model):
        with pytest.raises(RuntimeError, match='applied_to was called while'):
            teacher.applied_to(model).__enter__()
        for call in (
            lambda: teacher.update(model),
            lambda: teacher.copy_from(model),
            lambda: teacher.load_state_dict(teacher.state_dict()),
        ):
            with pytest.raises(RuntimeError, match='while the teacher is applied'):
                call()
    assert teacher.num_updates == 0


def test_casting_the_model_does_not_round_the_shadows():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0 + 2**-20)  # not a bfloat16 number
    model.teacher = EMATeacher(model)
    model.to(torch.bfloat16)
    shadow = model.teacher.state_dict()['shadows']['weight']
    assert shadow.dtype == torch.float32
    assert shadow.item() == 1.0 + 2**-20
    assert list(model.state_dict()) == ['weight']


def test_shadows_follow_the_device():
    model = nn.Linear(2, 2)
    teacher = EMATeacher(model)
    model.to('meta')
    teacher.update(model)
    assert teacher.state_dict()['shadows']['weight'].device.type == 'meta'


def test_state_dict_round_trip_and_copy_from(tmp_path):
    model = Toy()
    teacher = EMATeacher(model)
    with torch.no_grad():
        model.adapter.bias.fill_(9.0)
    teacher.update(model)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    other = EMATeacher(Toy())
    other.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True))
    assert other.num_updates == 1
    for name, shadow in teacher.state_dict()['shadows'].items():
        assert torch.equal(other.state_dict()['shadows'][name], shadow)
    other.copy_from(model)
    assert (other.state_dict()['shadows']['adapter.bias'] == 9.0).all()
    assert other.num_updates == 0


def test_a_state_that_does_not_fit_is_listed_and_changes_nothing():
    model = Toy()
    teacher = EMATeacher(model)
    before = {k: v.clone() for k, v in teacher.state_dict()['shadows'].items()}
    bad = {k: v.clone() + 1 for k, v in before.items()}
    bad['stranger'] = bad.pop('adapter.bias')
    bad['adapter.weight'] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match='adapter.bias is missing') as error:
        teacher.load_state_dict({'num_updates': 3, 'shadows': bad})
    assert 'stranger is not averaged' in str(error.value)
    assert 'adapter.weight has shape (2, 2), the teacher has (4, 4)' in str(error.value)
    for name, shadow in teacher.state_dict()['shadows'].items():
        assert torch.equal(shadow, before[name])
    assert teacher.num_updates == 0


def test_a_changed_set_of_trainable_parameters_is_an_error():
    model = Toy()
    teacher = EMATeacher(model)
    model.adapter.bias.requires_grad_(False)
    with pytest.raises(ValueError, match='adapter.bias is missing'):
        teacher.update(model)


@pytest.mark.parametrize('decay', [-0.1, 1.1])
def test_decay_outside_the_range_is_an_error(decay):
    with pytest.raises(ValueError, match='between 0 and 1'):
        EMATeacher(Toy(), decay)


def test_a_wholly_frozen_model_is_an_error():
    with pytest.raises(ValueError, match='no trainable parameter'):
        EMATeacher(Toy().requires_grad_(False))
