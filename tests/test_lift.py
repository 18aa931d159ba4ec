"""A saved program lifted to modules: same outputs, same layers, and no way to run code from the file."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rowcol_edge.errors import ModelError
from rowcol_edge.factoring.graph import trace
from rowcol_edge.lift import lift, load_program


class Small(nn.Module):
    """Convolutions, batch norms, a shared layer, two inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False),
            nn.BatchNorm2d(4, affine=False),
        )
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.shared = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(image).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        x = self.drop(self.shared(torch.relu(self.shared(x)))) + bias
        return {"logits": x, "probabilities": x.softmax(-1)}


def _inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(batch, 1, 8, 8, generator=generator),
        "bias": torch.randn(batch, 4, generator=generator),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Small().eval()
    model.body[1].running_mean.normal_()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (), _inputs(), dynamic_shapes={"image": {0: batch}, "bias": {0: batch}}, strict=False
    )
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    torch.export.save(program, path)
    return model, path


def test_same_outputs_and_layers(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    lifted = lift(load_program(path))
    for batch in (2, 5):
        with torch.no_grad():
            want, got = model(**_inputs(batch)), lifted(**_inputs(batch))
        assert list(got) == ["logits", "probabilities"]
        assert all(torch.equal(got[key], want[key]) for key in want)
    kinds = {name: type(module).__name__ for name, module in lifted.named_modules() if not isinstance(module, nn.ReLU)}
    assert {name: kinds[name] for name in ("body.0", "body.1", "body.3", "body.4", "shared")} == {
        "body.0": "Conv2d",
        "body.1": "BatchNorm2d",
        "body.3": "Conv2d",
        "body.4": "BatchNorm2d",
        "shared": "Linear",
    }
    assert (lifted.get_submodule("body.3").groups, lifted.get_submodule("body.0").stride) == (2, (2, 2))
    assert set(model.state_dict()) <= set(lifted.state_dict())


class Signals(nn.Module):
    """One-dimensional and transposed convolutions; ``resized`` is called for another size each time."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 6, 4, stride=2, dilation=2)
        self.same = nn.Conv1d(6, 6, 3, padding="same", bias=False)
        self.up = nn.ConvTranspose1d(6, 4, 3, stride=3, output_padding=1)
        self.wide = nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
        self.resized = nn.ConvTranspose1d(4, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.up(torch.relu(self.same(torch.relu(self.down(x)))))
        sizes = [2 * x.shape[-1] + extra for extra in (1, 2)]
        return self.wide(x.unflatten(2, (4, -1))), sum(self.resized(x, [size]).mean() for size in sizes)


def test_signals_are_lifted_to_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Signals().eval(), torch.randn(2, 2, 16)
    torch.export.save(torch.export.export(model, (x,), strict=False), tmp_path / "model.pt2")
    lifted = lift(load_program(tmp_path / "model.pt2"))
    with torch.no_grad():
        assert all(torch.equal(got, want) for got, want in zip(lifted(x), model(x), strict=True))
    for name in ("down", "same", "up", "wide"):
        have, want = lifted.get_submodule(name), model.get_submodule(name)
        assert type(have) is type(want)
        assert repr(have) == repr(want)
    graph = trace(lifted, {"x": x})
    resized = graph.layer("resized")
    assert resized is not None
    assert (resized.calls, resized.own_calls) == (2, 1)  # one of two sizes is the layer's, the other stays an operator


def test_lifted_model_traces_copies_and_exports(saved: tuple[nn.Module, Path]) -> None:
    _, path = saved
    lifted = copy.deepcopy(lift(load_program(path)))
    graph = trace(lifted, _inputs())
    assert [(pair.layer, pair.norm) for pair in graph.batchnorms] == [("body.0", "body.1"), ("body.3", "body.4")]
    shared = graph.layer("shared")
    assert shared is not None
    assert shared.own_calls == 2
    again = torch.export.export(lifted, (), _inputs(), strict=False)
    assert len(again.graph_signature.user_outputs) == 2


def test_training_program_is_refused(tmp_path: Path) -> None:
    for layer in (nn.BatchNorm1d(3), nn.Dropout(0.5)):
        program = torch.export.export(nn.Sequential(nn.Linear(3, 3), layer).train(), (torch.randn(2, 3),), strict=False)
        with pytest.raises(ModelError, match="training mode"):
            lift(program)


def _rewrite(path: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> Path:
    """A copy of the archive with entries changed (None = left out) and added."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        root = source.namelist()[0].split("/")[0]
        for entry in source.namelist():
            data = change(entry.split("/", 1)[1], source.read(entry))
            if data is not None:
                out.writestr(entry, data)
        for name, data in (extra or {}).items():
            out.writestr(f"{root}/{name}", data)
    return target


def _edit(entry: str, edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes | None]:
    def change(name: str, data: bytes) -> bytes | None:
        if name != entry:
            return data
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return change


def test_rewriting_itself_is_harmless(saved: tuple[nn.Module, Path]) -> None:
    _, path = saved
    rewritten = load_program(_rewrite(path, _edit("models/model.json", lambda content: None)))
    assert str(rewritten.graph) == str(load_program(path).graph)


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def _weights(content: Any) -> None:
    next(iter(content["config"].values()))["use_pickle"] = True


def _custom(content: Any) -> None:
    content["config"]["x"] = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}


def _node(**values: object) -> Callable[[Any], None]:
    return lambda content: content["graph_module"]["graph"]["nodes"][0].update(values)


def _spec(context: object, kind: str = "builtins.dict") -> Callable[[Any], None]:
    tree = {"type": kind, "context": json.dumps(context).replace("__enum", "\\u005f_enum"), "children_spec": []}
    return lambda content: content["graph_module"]["module_call_graph"][0]["signature"].update(
        in_spec=json.dumps([1, tree])
    )


def _size(content: Any) -> None:
    sizes = content["graph_module"]["graph"]["tensor_values"]["image"]["sizes"]
    sizes[0] = {"as_expr": {"expr_str": "__import__('os').getcwd()", "hint": None}}


@pytest.mark.parametrize(
    ("entry", "edit"),
    [
        ("data/weights/model_weights_config.json", _weights),
        ("data/constants/model_constants_config.json", _custom),
        ("models/model.json", _node(target="torch.os.system")),
        ("models/model.json", _node(target="torch.ops.load_library.__call__")),
        ("models/model.json", _node(target="torch.ops.aten.from_file.default")),
        ("models/model.json", _node(name="x = print('code')")),
        ("models/model.json", _size),
        ("models/model.json", _spec({"__enum__": True, "fqn": "os:O_RDONLY"})),
        (
            "models/model.json",
            _spec({"default_factory_module": "os", "default_factory_name": "getcwd"}, "collections.defaultdict"),
        ),
        ("models/model.json", lambda content: content.update(guards_code=["__import__('os').getcwd()"])),
        ("models/model.json", lambda content: content.update(guards_code=["L['x'].__class__.__name__ == 'x'"])),
    ],
)
def test_code_in_the_archive_is_refused(saved: tuple[nn.Module, Path], entry: str, edit: Callable[[Any], None]) -> None:
    _, path = saved
    with pytest.raises(ModelError, match="is refused"):
        load_program(_rewrite(path, _edit(entry, edit)))


def test_pickles_are_refused_unopened(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = saved
    mark = tmp_path / "opened"
    bomb = pickle.dumps(Bomb(mark))
    swap = _rewrite(path, lambda name, data: bomb if name.startswith("data/sample_inputs") else data)
    with pytest.raises(ModelError, match="sample inputs"):
        load_program(swap)
    for name in ("data/weights/model.pt", "data/aotinductor/model/x.so", "data/constants/custom_obj_0"):
        with pytest.raises(ModelError, match="is refused"):
            load_program(_rewrite(path, lambda name, data: data, {name: bomb}))
    assert not mark.exists()


def test_no_archive(tmp_path: Path, saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        load_program(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(ModelError, match=r"cannot load text\.pt2"):
        load_program(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.0")
        archive.writestr("serialized_state_dict.pt", b"")
    with pytest.raises(ModelError, match=r"before torch 2\.8"):
        load_program(tmp_path / "old.pt2")
    missing = _rewrite(saved[1], lambda name, data: None if name.startswith("data/weights/model") else data)
    with pytest.raises(ModelError, match="cannot load"):
        load_program(missing)
