from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rowcol_edge import calling, models
from rowcol_edge.errors import DataError, ModelError, WeightsError

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)
    def forward(self, pixels, scale):
        return self.second(torch.relu(self.first(pixels))) * scale

def build():
    return Net()

def number():
    return 7

def broken():
    raise RuntimeError("no such luck")
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def state(net: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in models.load(f"{net}:build").module.state_dict().items()}


def test_a_file_factory_with_safetensors(net: Path, tmp_path: Path) -> None:
    wanted = {k: torch.full_like(v, 0.5) for k, v in state(net).items()}
    save_file(wanted, tmp_path / "w.safetensors")
    loaded = models.load(f"{net}:build", tmp_path / "w.safetensors")
    assert loaded.inputs == ("pixels", "scale")
    assert loaded.name == "net"
    assert not loaded.module.training
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.module.state_dict().items())


def test_half_precision_storage_is_widened(net: Path, tmp_path: Path) -> None:
    save_file({k: v.half() for k, v in state(net).items()}, tmp_path / "w.safetensors")
    assert models.load(f"{net}:build", tmp_path / "w.safetensors").module.first.weight.dtype == torch.float32


def test_a_checkpoint_with_a_nested_state_dict(net: Path, tmp_path: Path) -> None:
    wanted = {k: torch.ones_like(v) for k, v in state(net).items()}
    torch.save({"epoch": 3, "state_dict": wanted}, tmp_path / "w.pt")
    assert models.load(f"{net}:build", tmp_path / "w.pt").module.second.bias.tolist() == [1.0, 1.0]


def test_a_module_factory(monkeypatch: pytest.MonkeyPatch, net: Path) -> None:
    monkeypatch.syspath_prepend(net.parent)
    assert models.load("net:build").inputs == ("pixels", "scale")


def test_the_same_weights_have_the_same_digest(net: Path) -> None:
    module = models.load(f"{net}:build").module
    before = models.digest(module)
    assert models.digest(module) == before
    with torch.no_grad():
        module.first.bias[0] += 1
    assert models.digest(module) != before


class Sized(nn.Module):
    """Its representation does not say how many heads it has."""

    def __init__(self, heads: int, act: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.sizes, self.act = {"heads": (heads, 4)}, act
        self.register_buffer("mask", torch.ones(heads), persistent=False)


def test_what_no_representation_shows_is_in_the_digest() -> None:
    torch.manual_seed(0)
    model = Sized(2)
    model.second.load_state_dict(model.first.state_dict())
    model.table, model.array = torch.ones(2), np.ones(2)
    weight_twice, module_twice, other_act, other_mask, other_sizes, other_table, other_array = (
        copy.deepcopy(model) for _ in range(7)
    )
    weight_twice.second.weight = weight_twice.first.weight
    module_twice.second = module_twice.first
    other_act.act = torch.tanh
    other_mask.mask[0] = 0.0
    other_sizes.sizes["heads"] = (1, 4)
    other_table.table[0], other_array.array[0] = 2.0, 2.0
    every = (model, weight_twice, module_twice, other_act, other_mask, other_sizes, other_table, other_array)
    assert len({repr(each) for each in every}) == 1
    assert len({models.digest(each) for each in every}) == len(every)
    assert models.digest(copy.deepcopy(module_twice)) == models.digest(module_twice)


def test_a_list_in_itself_and_a_place_on_this_machine_are_no_part_of_a_digest() -> None:
    torch.manual_seed(0)
    model = Sized(2)
    model.loop, model.name_or_path = [1], "/here/model"
    model.loop.append(model.loop)
    moved = copy.deepcopy(model)
    moved.name_or_path = "/there/model"
    assert models.digest(moved) == models.digest(model)
    moved.loop[0] = 2
    assert models.digest(moved) != models.digest(model)


def test_the_callers_module_is_copied() -> None:
    module = nn.Linear(3, 2).half().train()
    loaded = models.load(module)
    assert loaded.module is not module
    assert module.training
    assert module.weight.dtype == torch.float16
    assert loaded.module.weight.dtype == torch.float32


def test_another_forward_is_another_digest(tmp_path: Path) -> None:
    digests = []
    for i, forward in enumerate(("return self.first(x)", "return -self.first(x)")):
        path = tmp_path / f"net{i}.py"
        path.write_text(
            "import torch\nclass Net(torch.nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n        torch.manual_seed(0)\n"
            f"        self.first = torch.nn.Linear(4, 2)\n    def forward(self, x):\n        {forward}\n"
            "def build():\n    return Net()\n"
        )
        digests.append(models.load(f"{path}:build").digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("sample:elpv-resnet19", "did you mean sample:elpv-resnet18"),
        ("net", "sample:NAME"),
        ("nowhere.at.all:build", "importable"),
        ("{net}:nothing", "a callable nothing"),
        ("{net}:number", r"torch\.nn\.Module, got .* that returns the model"),
        (".a:b", "model"),
        ("{net}:", "empty part"),
        ("{net}:broken", r"no such luck – it came from .*net\.py, line \d+$"),
        ("missing.py:build", "no such file"),
        ("missing.pt2", "(?i)no such file"),
    ],
)
def test_a_reference_that_is_none_is_refused(net: Path, reference: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        models.load(reference.format(net=net))


def test_a_file_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def build(:\n")
    with pytest.raises(ModelError, match="SyntaxError"):
        models.load(f"{tmp_path / 'bad.py'}:build")


def test_weights_that_do_not_fit_name_the_first_keys(net: Path, tmp_path: Path) -> None:
    fitting = state(net)
    cases = {
        "missing first.weight": {k: v for k, v in fitting.items() if k != "first.weight"},
        "unexpected third.weight": {**fitting, "third.weight": torch.zeros(1)},
        r"first\.bias.*\(8,\).*\(7,\)": {**fitting, "first.bias": torch.zeros(7)},
        "strip it": {f"module.{k}": v for k, v in fitting.items()},
    }
    for says, tensors in cases.items():
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match=says):
            models.load(f"{net}:build", tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(net: Path, tmp_path: Path, value: float) -> None:
    tensors = state(net)
    tensors["second.weight"][0, 0] = value
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"second\.weight"):
        models.load(f"{net}:build", tmp_path / "w.safetensors")


class Boom:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("pwned").touch, ())


def test_a_checkpoint_that_would_run_code_is_refused(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"first.weight": Boom()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Boom()))
    for name in ("evil.pt", "plain.pth"):
        with pytest.raises(WeightsError, match="weights_only") as caught:
            models.load(f"{net}:build", tmp_path / name)
        assert caught.value.got.startswith("a pickle")  # and nothing of torch's advice to trust it
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.safetensors", b"junk"),
        ("w.pt", b""),
        ("w.pt", b"hello world, no weights"),
        ("w.pt", b"\x80\x02."),
        ("w.npz", b"x"),
        ("none.pt", None),
    ],
)
def test_unreadable_weights_are_refused(net: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError):
        models.load(f"{net}:build", tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(net: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = models.load(f"{net}:build").module.state_dict()
    key = next(iter(state))
    torch.save({**state, key: state[key].to(dtype)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=f"{key}: expected float32, got {str(dtype).removeprefix('torch.')}"):
        models.load(f"{net}:build", tmp_path / "w.pt")


def test_weights_that_may_not_be_read_are_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    opened = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:  # root may read any file
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(WeightsError, match="Permission denied"):
        models.load(nn.Linear(1, 1), weights=tmp_path / "w.safetensors")


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))


def on_meta() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2, device="meta"))


def scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 2), torch.zeros(1, 4)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lazy, r"parameter 1\.weight: .*lazy layer has seen no input – call the model once"),
        (on_meta, r"parameter 1\.weight: .*on the meta device – .*assign=True"),
        (
            scripted,
            r"module '1': expected a torch\.nn\.Module in Python, got a TorchScript module – hand over the module",
        ),
        (
            lambda: nn.DataParallel(nn.Linear(4, 2)),
            r"the model: .*DataParallel around it – use model\.module in its place",
        ),
        (
            lambda: torch.compile(nn.Linear(4, 2)),
            r"the model: .*OptimizedModule .* – use model\._orig_mod in its place",
        ),
        (lambda: nn.Sequential(torch.compile(nn.Linear(4, 2))), r"module '0': .* – use 0\._orig_mod in its place"),
    ],
)
def test_what_is_no_module_with_numbers_is_refused_with_the_remedy(
    make: Callable[[], nn.Module], says: str, tmp_path: Path
) -> None:
    with calling.quiet():  # torch warns of its own parts
        model = make()
    save_file({"weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    for weights in (None, tmp_path / "w.safetensors"):
        with pytest.raises(ModelError, match=says):
            models.load(model, weights=weights)


class Open(nn.Linear):
    def forward(self, ids: torch.Tensor | None = None, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> Any:
        return super().forward(ids if mask is None else ids * mask) * scale


class Keyword(nn.Linear):
    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Half(nn.Linear):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return super().forward(ids if mask is None else ids * mask)


@pytest.mark.parametrize(
    ("kind", "arrays", "inputs"),
    [
        (Open, ("mask", "ids"), ("ids", "mask")),
        (Open, ("mask",), ("mask",)),
        (Open, ("anything",), ("ids",)),
        (Open, (), ("ids",)),
        (Keyword, ("x",), ("x",)),
        (Half, ("mask", "ids"), ("ids", "mask")),
        (Half, ("ids",), ("ids",)),
        (Half, ("mask",), ("ids",)),
        (nn.Linear, ("pixels",), ("input",)),
    ],
)
def test_arrays_name_the_inputs_that_forward_leaves_open(
    kind: type[nn.Linear], arrays: tuple[str, ...], inputs: tuple[str, ...]
) -> None:
    loaded = models.load(kind(3, 2))
    found = models.named(loaded, arrays)
    assert found.inputs == inputs
    assert models.may_be_named(loaded.module) is (kind in (Open, Half))
    # what is made of a model depends on what it is given
    assert (found.digest == loaded.digest) is (loaded.inputs == inputs)


def test_names_that_forward_does_not_have_are_refused_with_those_that_it_has() -> None:
    says = r"names of the input arrays: expected arguments of Open.forward: ids, mask, scale, got tokens – rename them"
    with pytest.raises(DataError, match=says):
        models.named(models.load(Open(3, 2)), ("tokens", "mask"))


def test_lazy_layers_that_have_seen_a_sample_are_taken() -> None:
    model = lazy()
    model(torch.zeros(1, 4))
    assert models.load(model).module.get_submodule("1").weight.shape == (2, 4)
