"""Models and data that are not what one hopes for, through fewer channels, lower ranks and the second pass together.

`Doubled` has every channel twice, so that half of them lose nothing: what is handled must give what the dense model
gives, in its own type. What is not handled stays as it was, and its name is told.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rowcol_edge
from rowcol_edge import cli, limits
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import BudgetError, ModelError
from rowcol_edge.factoring import ranks, thin
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan
from rowcol_edge.factoring.study import Study, study


class Doubled(nn.Module):
    """A residual block of convolutions with a batch norm, and two linear layers; (N, 1, 8, 8) → (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        logits: torch.Tensor = self.head(torch.relu(self.hidden(x.mean((2, 3)))))
        return logits


class Plain(nn.Conv2d):
    """A subclass that computes what a convolution computes."""


class Louder(nn.Conv2d):
    """A subclass that does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Borrowing(Doubled):
    """Uses a weight or bias without calling its layer."""

    part = "weight"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + getattr(self.inner, self.part).mean()


def doubled(kind: type[Doubled] = Doubled) -> Doubled:
    torch.manual_seed(0)
    net = kind().eval()
    with torch.no_grad():
        for layer in (net.stem, net.inner, net.outer, net.hidden):
            for part in layer.parameters():
                part[len(part) // 2 :] = part[: len(part) // 2]
    return net


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.0, (count, 1, 8, 8)).astype(np.float32)


def split(x: np.ndarray) -> Split:
    return scan(Split("calibration", "random", lambda: iter([({"x": x}, None)])))


def outputs(model: nn.Module, x: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(torch.from_numpy(x).to(next(model.parameters()).dtype))
        return result.double()


def halved(known: Study) -> FactorPlan:
    """Half of the channels of every set that was weighed, the ranks that are left to two layers, and a second pass."""
    channels = tuple(ChannelPlan(n, known.infos[n].out_features // 2) for n in known.channel_spaces)
    # behind half of the channels no layer has a higher rank
    layers = tuple(
        LayerPlan(n, "project", 8) for n in ("outer", "hidden") if n in known.infos and not known.infos[n].skip
    )
    return FactorPlan(layers, channels=channels, refit=True)


def distance(model: nn.Module, other: nn.Module, x: np.ndarray) -> float:
    wanted = outputs(model, x)
    assert bool(wanted.isfinite().all())
    return float((outputs(other, x) - wanted).norm() / wanted.norm())


def with_dead(net: Doubled) -> nn.Module:
    net.inner.bias.data[[2, 10]] = -100.0
    return net


def with_constant(net: Doubled) -> nn.Module:
    net.inner.weight.data[[3, 11]] = 0.0
    net.inner.bias.data[[3, 11]] = 0.3
    return net


def with_zeros(net: Doubled) -> nn.Module:
    net.inner.weight.data.zero_()
    net.inner.bias.data.zero_()
    return net


def with_unused(net: Doubled) -> nn.Module:
    net.spare, net.attention = nn.Conv2d(4, 4, 3), nn.MultiheadAttention(8, 2)
    return net


class Again(Doubled):
    """One batch norm behind two layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.norm(self.inner(x)))))
        logits: torch.Tensor = self.head(torch.relu(self.hidden(x.mean((2, 3)))))
        return logits


def with_one_norm(net: Doubled) -> nn.Module:
    net.__class__ = Again
    return net


def with_class(kind: type[nn.Conv2d]) -> Callable[[Doubled], nn.Module]:
    def change(net: Doubled) -> nn.Module:
        net.inner.__class__ = kind
        return net

    return change


def twice(net: Doubled) -> nn.Module:
    net.outer = net.inner
    return net


def tied(net: Doubled) -> nn.Module:
    net.outer.weight = net.inner.weight
    return net


def tied_bias(net: Doubled) -> nn.Module:
    net.outer.bias = net.inner.bias
    return net


def bias_in_a_buffer(net: Doubled) -> nn.Module:
    values = net.inner.bias.detach().clone()
    net.inner.bias = None
    del net.inner.bias
    net.inner.register_buffer("bias", values)
    return net


def old_weight_norm(net: Doubled) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that there is a new one
        nn.utils.weight_norm(net.inner)
    return net


def computed(how: Callable[[nn.Module], object]) -> Callable[[Doubled], nn.Module]:
    def change(net: Doubled) -> nn.Module:
        how(net.inner)
        return net.eval()

    return change


HANDLED: dict[str, Callable[[Doubled], nn.Module]] = {
    "as it is": lambda net: net,
    "dead channels": with_dead,
    "constant channels": with_constant,
    "zero weights": with_zeros,
    "unused layers": with_unused,
    "a batch norm called twice": with_one_norm,
    "a subclass": with_class(Plain),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
    "double": lambda net: net.double(),
    "bfloat16": lambda net: net.bfloat16(),
    "float16": lambda net: net.half(),
}
#: the change, and what is told of the layer "inner"
LEFT: dict[str, tuple[Callable[[Doubled], nn.Module], str]] = {
    "a layer used twice": (twice, "shared: called 2 times"),
    "tied weights": (tied, "its weight is tied to another module"),
    "tied biases": (tied_bias, "its bias is tied to another module"),
    "a bias that is a buffer": (bias_in_a_buffer, "its bias is a buffer"),
    "a forward of its own": (with_class(Louder), "Louder has a forward of its own"),
    "a parametrization": (
        computed(lambda layer: parametrize.register_parametrization(layer, "weight", Halved())),
        "its weight is parametrized",
    ),
    "weight norm": (computed(parametrizations.weight_norm), "its weight is parametrized"),
    "spectral norm": (computed(parametrizations.spectral_norm), "its weight is parametrized"),
    "weight norm in a hook": (old_weight_norm, "its weight is parametrized"),
    "a pruning mask": (
        computed(lambda layer: prune.l1_unstructured(layer, "weight", 0.25)),
        "its weight is parametrized",
    ),
    "a parametrized bias": (
        computed(lambda layer: parametrize.register_parametrization(layer, "bias", Halved())),
        "its bias is parametrized",
    ),
    "a pruned bias": (
        computed(lambda layer: prune.random_unstructured(layer, "bias", 0.25)),
        "its bias is parametrized",
    ),
    "a hook": (
        computed(lambda layer: layer.register_forward_hook(lambda module, args, result: 0.5 * result)),
        "hooks are attached to it",
    ),
}
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("name", HANDLED)
def test_what_is_handled_gives_what_the_dense_model_gives(name: str) -> None:
    model = HANDLED[name](doubled())
    dtype = next(model.parameters()).dtype
    before = copy.deepcopy(model.state_dict())
    known = study(model, split(pictures(24)), classify=True)
    assert {n: info.skip for n, info in known.infos.items() if info.calls and info.skip} == {}
    result = factored(known, halved(known))
    widths = {n: len(result.get_submodule(n).weight) for n in ("stem", "inner")}
    assert widths == {"stem": 8, "inner": 8}
    assert isinstance(result.get_submodule("hidden"), nn.Sequential)
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert distance(model, result, pictures(32, 1)) < ROUNDING[dtype]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_named_and_the_others_are_made_smaller(name: str) -> None:
    change, reason = LEFT[name]
    model = change(doubled())
    wanted = outputs(model, pictures(32, 1))  # a hook computes its weight anew in each call
    # with fewer, a hidden unit of the tied network is dead there and alive in what is judged on
    known = study(model, split(pictures(96)), classify=True)
    assert known.infos["inner"].skip == reason
    assert known.macs == 64 * 16 * 9 * (1 + 16 + 16) + 16 * 32 + 32 * 3
    fixed = {each.name: each.fixed for each in known.channels}
    assert fixed["stem"] == f"read by inner: {reason}"
    assert reason in fixed["inner"]
    result = factored(known, halved(known))
    left = known.folded.get_submodule("inner").state_dict()
    assert all(torch.equal(value, left[key]) for key, value in result.get_submodule("inner").state_dict().items())
    assert result.get_submodule("head").weight.shape == (3, 16)
    got = outputs(result, pictures(32, 1))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_part_that_is_borrowed_is_left_with_its_layer(part: str) -> None:
    model = doubled(Borrowing)
    model.part = part
    known = study(model, split(pictures(24)), classify=True)
    assert known.infos["inner"].skip == f"its {part} is used without calling it"
    assert distance(model, factored(known, halved(known)), pictures(32, 1)) < 1e-4


@pytest.mark.parametrize("kind", ["one sample", "the same sample over and over", "one direction", "flat", "zeros"])
def test_poor_data_reproduce_themselves(kind: str) -> None:
    x = {
        "one sample": pictures(1),
        "the same sample over and over": pictures(1).repeat(24, 0),
        "one direction": np.linspace(-1, 1, 24, dtype=np.float32).reshape(-1, 1, 1, 1) * pictures(1),
        "flat": np.full((24, 1, 8, 8), 0.3, np.float32),
        "zeros": np.zeros((24, 1, 8, 8), np.float32),
    }[kind]
    model = doubled()
    known = study(model, split(x), classify=True)
    result = factored(known, halved(known))
    assert distance(model, result, x) < 1e-4
    assert bool(outputs(result, pictures(32, 1)).isfinite().all())


@settings(max_examples=5, deadline=None)
@given(
    defects=st.sets(st.sampled_from([*HANDLED][1:6]), max_size=3), share=st.floats(0.15, 0.8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), last=st.booleans(), count=st.integers(1, 24),
)  # fmt: skip
def test_any_of_it_together_keeps_the_budget(
    defects: set[str], share: float, dtype: torch.dtype, last: bool, count: int
) -> None:
    model: nn.Module = doubled()
    for name in sorted(defects):
        model = HANDLED[name](model)  # type: ignore[arg-type]
    model = model.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    known = study(model, split(pictures(count)), classify=True)
    limit = int(share * known.parameters)
    try:
        plan = limits.cheapest(known, [limits.of_parameters(known, limit, "")], 1, "")
    except BudgetError:  # then ranks alone cannot do it either
        with pytest.raises(ranks.OverBudgetError):
            ranks.plan_by_cost(
                known.infos, known.spaces, ranks.parameters, total=known.parameters, limit=limit,
                inputs=known.input_spaces,
            )  # fmt: skip
        return
    first, second = (factored(known, replace(plan, refit=True)) for _ in range(2))
    assert sum(p.numel() for p in first.parameters()) <= limit
    assert {p.dtype for p in first.parameters()} == {dtype}
    got = outputs(first, pictures(8, 1))
    assert bool(got.isfinite().all())
    assert torch.equal(got, outputs(second, pictures(8, 1)))


class Opaque(torch.autograd.Function):
    """An operator without a backward pass."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class Headed(nn.Module):
    """`Doubled`, with something behind its logits."""

    def __init__(self, net: Doubled, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))


def with_head(head: Callable[[torch.Tensor], torch.Tensor], bias: float = 0.0) -> nn.Module:
    net = doubled()
    net.head.bias.data += torch.tensor([bias, 0.0, 0.0])
    return Headed(net, head).eval()


def with_zero_head(outputs: int) -> nn.Module:
    net = doubled()
    net.head = nn.Linear(32, outputs)
    net.head.weight.data.zero_()
    return net


class Picky(nn.Module):
    """Raises where gradients are kept."""

    def __init__(self, error: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            self.error(x)
        return x


def picky(error: Callable[[torch.Tensor], object]) -> nn.Module:
    return with_head(Picky(error))


def refuse(x: torch.Tensor) -> None:
    raise ValueError("not today\nnor tomorrow")


def without_memory(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


#: model → what is said of why
WITHOUT_GRADIENTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a head of zeros": (lambda: with_zero_head(3), "zero head"),
    "a head of zeros that is too small to factor": (lambda: with_zero_head(1), "zero head"),
    "a saturated softmax": (lambda: with_head(lambda logits: logits.softmax(1), 1e6), "saturated"),
    "saturated logits": (lambda: with_head(lambda logits: logits, 1e6), "saturated"),
    "a saturated sigmoid": (lambda: with_head(lambda logits: logits[:, :1].sigmoid(), 200.0), "saturated"),
    "integers": (lambda: with_head(lambda logits: logits.argmax(1)), "outputs are integers"),
    "no backward pass": (lambda: with_head(Opaque.apply), "NotImplementedError on the way back: You must implement"),
    "no numpy": (lambda: picky(lambda x: x.numpy()), "RuntimeError in module 'head': Can't call numpy() on Tensor"),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_a_model_without_gradients_is_factored_by_variance_and_told_so(name: str) -> None:
    (make, why), x = WITHOUT_GRADIENTS[name], pictures(32)
    model = make()
    known = study(model, split(x), classify=True)
    plan = limits.cheapest(known, [limits.of_parameters(known, int(0.8 * known.parameters), "")], 1, "")
    noted = thin.noted(known, replace(plan, refit=True))
    assert noted.note.startswith("no gradient says what the model's output makes of its layers")
    assert why in noted.note.partition(": they are weighed")[0]
    assert (noted.loss, noted.gap, noted.channels) == (None, None, ())
    assert noted.projected
    result = factored(known, noted)
    assert sum(p.numel() for p in result.parameters()) <= 0.8 * known.parameters
    with torch.no_grad():
        assert bool(result(torch.from_numpy(x)).isfinite().all())


def test_a_layer_that_no_gradient_reaches_is_named() -> None:
    known = study(doubled(), split(pictures(32)), classify=True)
    blind = {**known.spaces, "outer": replace(known.spaces["outer"], dual=None, losses=None)}
    plan = replace(halved(known), loss=0.1, gap=0.01)
    noted = thin.noted(replace(known, spaces=blind), plan)
    assert noted.note == "no gradient reaches outer: weighed by the variance of its output; no loss is predicted"
    assert (noted.loss, noted.gap) == (None, None)
    assert thin.noted(known, plan) == plan


@pytest.fixture
def calib(tmp_path: Path) -> str:
    np.savez(tmp_path / "calib.npz", x=pictures(32))
    return str(tmp_path / "calib.npz")


def test_a_budget_that_cannot_be_met_names_what_stays(calib: str) -> None:
    model, whole = twice(doubled()), r"left as they are: inner \(2,320 parameters\): shared: called 2 times"
    for budget in ("params<=0.2x", "macs<=0.2x"):
        with pytest.raises(BudgetError, match=whole):
            rowcol_edge.factor(model, calib=calib, budget=budget, cache=False)


class Buffered(nn.Module):
    """The middle one of three layers keeps its weight in a buffer; (N, 16) → (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        weight = self.middle.weight.detach()
        del self.middle.weight
        self.middle.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.middle(torch.relu(self.first(x)))))
        return logits


def test_weights_in_buffers_are_counted_nowhere(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32))
    calib, model = str(tmp_path / "x.npz"), Buffered().eval()
    found = rowcol_edge.inspect(model, calib=calib)
    assert found.parameters == sum(layer.parameters for layer in found.layers) == 544 + 32 + 165
    with pytest.raises(BudgetError, match=r"at most 444 parameters.* middle \(32 parameters\)") as caught:
        rowcol_edge.factor(model, calib=calib, budget="params<=0.6x", cache=False)
    assert "or a target file of your own with a rank_multiple below 16" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_casts_by_itself_is_told_what_its_code_may_cast_to(dtype: torch.dtype, calib: str) -> None:
    class Casting(Doubled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(dtype))

    class Following(Doubled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.stem.weight.dtype))

    with pytest.raises(ModelError, match=r"in module 'stem'.*worked on in float32: .*x\.to\(layer\.weight\.dtype\)"):
        rowcol_edge.inspect(Casting().to(dtype).eval(), calib=calib)
    assert rowcol_edge.inspect(Following().to(dtype).eval(), calib=calib).layers


def test_a_budget_that_cannot_be_met_without_gradients_says_that_channels_stay(calib: str) -> None:
    model = WITHOUT_GRADIENTS["integers"][0]()
    says = r"channels stay: no gradient says what the model's output makes of them \(outputs are integers"
    with pytest.raises(BudgetError, match=says):
        rowcol_edge.factor(model, calib=calib, budget="params<=0.01x", cache=False)
    made = rowcol_edge.factor(model, calib=calib, cache=False)
    assert "no gradient" in made.plan.note
    assert made.plan.loss is None


def test_what_stops_gradients_is_known_from_the_cache_too(
    calib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path / "cache"))
    model = with_head(Opaque.apply)
    notes = [rowcol_edge.factor(model, calib=calib, energy=energy).plan.note for energy in (0.9, 0.8)]
    assert all("NotImplementedError on the way back" in note for note in notes)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (refuse, ModelError, "the model where gradients are kept: .* got ValueError in module 'head': not today"),
        (
            without_memory,
            MemoryError,
            "activations of 4 samples.*OutOfMemoryError in module 'head': CUDA out of memory",
        ),
        (lambda x: torch.empty(1 << 60), MemoryError, "RuntimeError in module 'head': .*DefaultCPUAllocator"),
    ],
)
def test_errors_of_another_kind_are_no_lack_of_gradients(
    error: Callable[[torch.Tensor], object], kind: type[Exception], says: str, calib: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        rowcol_edge.factor(picky(error), calib=calib, budget="params<=0.8x", cache=False)
    assert "tomorrow" not in str(caught.value)


def test_what_is_computed_in_a_hook_is_refused_by_name(calib: str) -> None:
    for change in (old_weight_norm, LEFT["a pruning mask"][0]):
        model = doubled().requires_grad_(requires_grad=True)
        with pytest.raises(ModelError, match=r"layer 'inner'.* got a weight that was computed from others"):
            rowcol_edge.factor(change(model), calib=calib, budget="params<=0.4x", cache=False)


def test_the_command_line_says_the_same(calib: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
    code = (
        "from tests.test_factoring_bad_input import LEFT, doubled\n\ndef {0}():\n    return LEFT[{1!r}][0](doubled())\n"
    )
    names = {"weight_norm": "weight norm", "hooked": "weight norm in a hook"}
    (tmp_path / "net.py").write_text(here + "\n\n".join(code.format(*each) for each in names.items()))

    def run(command: str, factory: str, *more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run_command([command, f"{tmp_path / 'net.py'}:{factory}", "--calib", calib, *more])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, " ".join(said.err.split())

    exit_code, out, _ = run("inspect", "weight_norm", "--json")
    found = json.loads(out)
    assert exit_code == 0
    assert {each["name"]: each["note"] for each in found["layers"]}["inner"] == "its weight is parametrized"
    assert {each["name"]: each["fixed"] for each in found["channels"]}["stem"].startswith("read by inner: ")
    exit_code, _, err = run("factor", "weight_norm", "--budget", "params<=0.2x", "--out", str(tmp_path / "out"))
    assert (exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "inner (2,336 parameters)" in err or "inner (2,320 parameters)" in err
    exit_code, _, err = run("factor", "hooked", "--budget", "params<=0.4x", "--out", str(tmp_path / "out"))
    assert (exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "layer 'inner'" in err
