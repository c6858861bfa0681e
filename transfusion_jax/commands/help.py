"""What `--help` prints: the flags of a command, and every field of the config it takes."""

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal


def help_text(parser: argparse.ArgumentParser, config: Any = None) -> str:
    """The help of a command; the values of `config` are shown as the defaults of its fields."""
    for title, description, fields in sections(config) if config is not None else ():
        group = parser.add_argument_group(title, description)
        for flag, metavar, text in fields:
            group.add_argument(flag, metavar=metavar, help=text.replace("%", "%%"))
    return parser.format_help()


def flags(config: Any) -> list[str]:
    """Every field of a config as the flag that sets it, such as `--model.layers`."""
    return [flag for _, _, fields in sections(config) for flag, _, _ in fields]


Field = tuple[str, str, str]
"""Flag, metavar and help."""


def sections(config: Any, prefix: str = "") -> Iterator[tuple[str, str, list[Field]]]:
    """Title, description and fields of a config, then of each config in it."""
    inner, fields = [], []
    kinds = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            inner.append((name, value))
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            inner += [(f"{name}.{number}", part) for number, part in enumerate(value)]
        elif (metavar := _metavar(kinds[field.name])) is not None:
            fields.append((f"--{name}", metavar, _described(config, field.name, value)))
    title = f"fields of {prefix[:-1]}" if prefix else "fields"
    yield title, inspect.cleandoc(type(config).__doc__ or "").split("\n\n")[0], fields
    for name, part in inner:
        yield from sections(part, f"{name}.")


def _metavar(kind: Any) -> str | None:
    """How a value is written; None for what no flag sets: positionals and lists of configs."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated or (parts and dataclasses.is_dataclass(parts[0])):
        return None
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin is tuple:
        return f"[{_metavar(parts[0])} ...]"
    return "{True,False}" if kind is bool else getattr(kind, "__name__", "value").upper()


def _described(config: Any, name: str, value: Any) -> str:
    """The docstring of a field, and its default."""
    text = _docstrings(type(config)).get(name, "")
    if value in ("", ()):
        return text or "(no default)"
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"{text} (default: {shown})".strip()


@functools.cache
def _docstrings(kind: type) -> dict[str, str]:
    """The first paragraphs of the strings written under the fields of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split("\n\n")[0].split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
