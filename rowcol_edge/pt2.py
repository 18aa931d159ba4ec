"""Opens a ``.pt2`` without giving the file a way to run code.

``torch.export.load`` trusts its file (read in torch 2.13). What was found in its source, and is refused here before it
is called:

- tensors, constants and legacy weight files may be pickles, loaded with ``weights_only=False``; so may sample inputs:
  they are tried with ``weights_only=True`` first, and on failure without;
- custom and opaque objects are unpickled; compiled parts (``data/aotinductor``) are shared libraries;
- symbolic sizes go through ``sympy.sympify`` and guards through ``exec``: both evaluate text;
- node names are written into the Python source of the forward;
- an operator is any dotted path under ``torch``; a tree spec may import a module by name (enums, ``defaultdict``).
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader

from rowcol_edge.errors import ModelError

_PLAIN = re.compile(r"[\w.\-]*")
_WEIGHT = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_FIXED = frozenset(
    ("archive_format", "archive_version", "byteorder", "version", ".data/version", ".data/serialization_id")
)
_ENTRY = re.compile(
    r"data/sample_inputs/[\w\-]+\.pt|data/(weights|constants)/[\w\-]+_config\.json|models/[\w\-]+\.json"
)
_TARGET = re.compile(r"torch\.ops\.(aten|prims|torchvision|higher_order)\.[a-z]\w*(\.[A-Za-z]\w*)?")
_FORBIDDEN_TARGETS = frozenset(("from_file", "triton_kernel_wrapper_functional", "triton_kernel_wrapper_mutation"))
_SYM_TARGET = re.compile(r"_operator\.[a-z]+_?|math\.[a-z]+|torch\.sym_[a-z]+")
_FORBIDDEN_SYM = frozenset(("_operator.attrgetter", "_operator.methodcaller", "_operator.call"))
_TREES = frozenset((None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"))
_FREE_TEXT = frozenset(("as_string", "as_strings", "metadata", "torch_version", "custom"))
_CALLS = frozenset(
    (
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Eq", "Ne", "Lt", "Le"),
        *("Gt", "Ge", "And", "Or", "Not", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan"),
        *("GreaterThan", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt"),
        *("CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat"),
        *("TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
        "IsNonOverlappingAndDenseIndicator",
    )
)
_METHODS = frozenset(("size", "stride", "storage_offset"))
_SYNTAX = (
    *(ast.Expression, ast.Constant, ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.BinOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.boolop, ast.cmpop, ast.Load, ast.keyword),
)


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """The exported program in ``path``.

    Refuses what only a file made to run code, or a model with Python objects in it, would hold. That covers what the
    loader is known to evaluate; it is no proof against faults in torch's own parsers, so prefer safetensors from
    people you do not know.

    Raises:
        ModelError: missing, no such archive, holds pickled or custom objects or code, or torch cannot read it.
    """
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        got, hint = error.strerror or str(error), "a relative path starts from the current folder"
        raise ModelError(f"cannot read {source}", expected="a saved .pt2", got=got, hint=hint) from error
    try:
        _check_archive(content, source.name)
        # From the bytes that were checked, so the file cannot change in between.
        return torch.export.load(io.BytesIO(content))
    except ModelError:
        raise
    except Exception as error:  # boundary: torch's reader documents no closed set of errors
        raise ModelError(
            f"cannot load {source.name}",
            expected="an archive written by torch.export.save",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        ) from error


def _refuse(name: str, got: str) -> ModelError:
    return ModelError(
        f"{name} is refused",
        expected="an exported program of plain tensors and operators",
        got=got,
        hint="export the model again without custom objects, or give its source as package.module:factory",
    )


def _check_archive(content: bytes, name: str) -> None:
    try:
        listed = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except zipfile.BadZipFile as error:
        raise ModelError(
            f"cannot load {name}", expected="an archive written by torch.export.save", got=str(error)
        ) from error
    if "version" in listed or any(entry.startswith("serialized_") for entry in listed):
        # torch.export.load falls back to that format, and to unpickling, when the first reader fails.
        raise _refuse(name, "the archive format before torch 2.8, which holds pickles")
    # The reader that torch.export.load uses: another one might see another file.
    reader = PT2ArchiveReader(io.BytesIO(content))
    entries = reader.get_file_names()
    if len(set(entries)) != len(entries):
        raise _refuse(name, "an entry twice")
    for entry in entries:
        if entry in _FIXED or entry.startswith("extra/") or _WEIGHT.fullmatch(entry):
            continue
        if not _ENTRY.fullmatch(entry):
            raise _refuse(name, f"entry {entry!r}")
        data = reader.read_bytes(entry)
        if entry.startswith("data/sample_inputs/"):
            _check_samples(data, name)
        elif entry.startswith("models/"):
            _check_model(json.loads(data), name)
        else:
            _check_payload(json.loads(data), name)


def _check_samples(data: bytes, name: str) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # boundary: the unpickler raises whatever the bytes lead to
        raise _refuse(name, "sample inputs that hold other objects than tensors") from error


def _check_payload(content: Any, name: str) -> None:
    for key, payload in content["config"].items():
        if payload["use_pickle"]:
            raise _refuse(name, f"{key!r} as a pickle")
        if not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise _refuse(name, f"{key!r} as {payload['path_name']!r}")


def _check_model(content: Any, name: str) -> None:
    for guard in content.get("guards_code") or ():
        if not _harmless(guard):
            raise _refuse(name, f"guard {guard!r}")
    _check_strings({key: value for key, value in content.items() if key != "guards_code"}, name)


def _check_strings(content: Any, name: str) -> None:
    """Every text of the program that is not known to be inert must be a plain word."""
    for key, text in _strings(content, ""):
        if key == "target":
            good = _known_target(text)
        elif key == "expr_str":
            good = _harmless(text)
        elif key in ("in_spec", "out_spec"):
            good = text == "" or _plain_tree(json.loads(text)[1])
        elif key in ("name", "as_name"):
            good = text == "" or (text.isidentifier() and not keyword.iskeyword(text))
        else:
            good = _is_plain(text)
        if not good:
            raise _refuse(name, f"{key} {text[:80]!r}")


def _strings(content: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for inner, value in content.items():
            if inner not in _FREE_TEXT:
                yield "key", inner
                yield from _strings(value, inner)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value, key)


def _known_target(target: str) -> bool:
    if _TARGET.fullmatch(target):
        return target.split(".")[3] not in _FORBIDDEN_TARGETS
    return _SYM_TARGET.fullmatch(target) is not None and target not in _FORBIDDEN_SYM


def _plain_tree(tree: Any) -> bool:
    # The context is JSON within JSON: look at what it says, not at how it is written.
    context = None if tree["context"] is None else json.loads(tree["context"])
    keys = [] if context is None else context
    inert = isinstance(keys, list) and all(isinstance(key, int) or _is_plain(key) for key in keys)
    return tree["type"] in _TREES and inert and all(_plain_tree(child) for child in tree["children_spec"])


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and _PLAIN.fullmatch(value) is not None


def _harmless(text: str) -> bool:
    """Arithmetic over sizes only: known functions, ``L['x'].size()[0]``, ``args[0].size()[1]``."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return all(_harmless_node(node) for node in ast.walk(tree))


def _harmless_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return (
            node.id in _CALLS
            or node.id in ("L", "args", "true", "false")
            or re.fullmatch(r"[suz]\d+", node.id) is not None
        )
    if isinstance(node, ast.Attribute):
        return node.attr in _METHODS
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name | ast.Attribute)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _is_plain(node.value)
    return isinstance(node, (*_SYNTAX, ast.Subscript))
