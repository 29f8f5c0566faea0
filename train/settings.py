"""Settings are frozen dataclasses; this turns flags and YAML into them, and them into YAML.

A field is declared once, with its help:

    @dataclass(frozen=True)
    class UploadSettings:
        input_tokenizer_and_model_dir: Path = setting(help="folder to upload")
        private: bool = setting(True, help="make the repository private")

A settings class may hold sections (fields that are settings classes). YAML shows the sections; flags are the leaf
names, which are unique. Flags win over YAML, YAML over defaults. Every problem of a call is reported at once, and a
misspelt name is answered with the nearest valid one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from train.errors import UserError, refuse

Settings = TypeVar("Settings")
LARGEST_SEED = 2**32 - 1  # what NumPy, and with it transformers, takes
_LARGEST_COUNT = 2.0**63  # what the engines' 64-bit integers hold
_COUNT_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[str] = (),
    separator: str | None = None,
    flag_only: bool = False,
) -> Any:
    """A dataclass field with what its flag shows.

    Args:
        default: the default; without one the setting is required.
        help: what it is, with its unit and what special values mean.
        choices: the valid values, when they are few.
        separator: for tuples, what separates values inside one argument (`--input a,b`).
        flag_only: it belongs to one call (`--dry_run`) and is neither read from nor saved in a recipe.
    """
    metadata = {"help": help, "choices": tuple(choices), "separator": separator, "flag_only": flag_only}
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type[Settings]) -> Settings:
    """A field that is itself a settings class whose fields all have defaults."""
    return dataclasses.field(default_factory=cls)


def count(text: Any) -> Any:
    """Reads `300B`, `1.5M`, `3e9` and `1_000` as whole numbers; anything else is left for the type check to refuse."""
    if isinstance(text, float) and text.is_integer():
        return int(text)
    if not isinstance(text, str):
        return text
    plain = text.strip().replace("_", "")
    factor = _COUNT_SUFFIXES.get(plain[-1:].upper(), 1)
    try:
        value = float(plain[:-1] if factor > 1 else plain) * factor
    except ValueError:
        return text
    if not abs(value) < _LARGEST_COUNT:  # infinity and NaN too
        return text
    return round(value) if abs(value - round(value)) < 1e-6 else text


def is_number(word: str) -> bool:
    """Whether a word of the command line is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


class _Count:
    """Lets pydantic read `Count` fields through `count()`, without importing it before settings are built."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(count, handler(source))


Count = Annotated[int, _Count()]


def parse(
    cls: type[Settings],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    example: str = "",
    recipe_dir: Path | None = None,
) -> Settings:
    """Builds `cls` from a command line, and from the YAML file that `--recipe` names when `recipe_dir` is given.

    Raises:
        UserError: unknown, missing or ill-typed settings, all of them in one message.
        SystemExit: after `--help`.
    """
    leaves = {leaf.name: leaf for leaf in _leaves(cls)}
    parser = _Parser(
        prog=program,
        usage=f"{program} {'[--recipe RECIPE] ' if recipe_dir else ''}[--FLAG VALUE ...]",
        description=description,
        epilog=f"example:\n  {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if recipe_dir is not None:
        known = ", ".join(sorted(file.stem for file in recipe_dir.glob("*.yaml")))
        parser.add_argument("--recipe", help=f"YAML file, or one of: {known}. Flags win over it")
    for leaf in leaves.values():
        leaf.add_to(parser)
    flags, unknown = parser.parse_known_args([_underscored(word, {*leaves, "recipe", "help"}) for word in argv])
    refuse(_stray_words(unknown, [*leaves, "recipe", "help"]))

    given: dict[str, Any] = {}
    if recipe_dir is not None and flags.recipe is not None:
        given = read_yaml(find_recipe(flags.recipe, recipe_dir))
        translate = getattr(cls, "from_recipe", None)  # a class that reads other people's recipes too
        given = translate(given, where=flags.recipe) if translate else given
        refuse([*_unknown_keys(cls, given, where=flags.recipe), *_call_keys(cls, given, where=flags.recipe)])
    for name, leaf in leaves.items():
        value = getattr(flags, name)
        if value is not None:
            _put(given, leaf.path, leaf.split(value))
    return build(cls, given)


def build(cls: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Builds `cls` from nested plain data, checked against the field types.

    Raises:
        UserError: unknown keys, missing values, wrong types or what a class's own `problems()` finds.
    """
    from pydantic import TypeAdapter, ValidationError

    refuse(_unknown_keys(cls, given, where="settings"))
    paths = {leaf.path: leaf for leaf in _leaves(cls)}
    try:
        built = TypeAdapter(cls).validate_python(_with_all_sections(cls, given))
    except ValidationError as error:
        raise UserError(_type_problem(item, paths) for item in error.errors(include_url=False)) from None
    refuse(_value_problems(built, paths))
    refuse(_own_problems(built))
    return built


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping as plain data.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    import yaml

    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{file} is not a file: name a YAML recipe.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply to be a recipe: it has sections of settings, no more.") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UserError(f"{file} holds a {type(given).__name__}; a recipe is a mapping of settings.")
    return given


def to_plain(settings: Any) -> dict[str, Any]:
    """The settings as plain nested data, without what belongs to one call only (`flag_only`)."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if field.metadata.get("flag_only"):
            continue
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_plain(value)
        elif isinstance(value, tuple):
            plain[field.name] = [str(item) if isinstance(item, Path) else item for item in value]
        else:
            plain[field.name] = str(value) if isinstance(value, Path) else value
    return plain


def to_yaml(settings: Any) -> str:
    """The settings as YAML that `read_yaml` and `build` turn back into the same settings."""
    import yaml

    return yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True)


def find_recipe(name: str, recipe_dir: Path) -> Path:
    """The file that `--recipe NAME` means: a path, or a shipped recipe's name.

    Raises:
        UserError: there is no such file; the shipped names are listed, the nearest one first.
    """
    candidates = (Path(name), recipe_dir / name, recipe_dir / f"{name}.yaml")
    for file in candidates:
        if file.is_file():
            return file
    known = sorted(file.stem for file in recipe_dir.glob("*.yaml"))
    raise UserError(f"no recipe {name!r}:{_nearest(name, known)} the shipped ones are {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One setting: where it stands in the tree, and how its flag behaves."""

    path: tuple[str, ...]
    type: Any
    field: dataclasses.Field[Any]

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def is_tuple(self) -> bool:
        return any(typing.get_origin(kind) is tuple for kind in _alternatives(self.type))

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        metadata = self.field.metadata
        help_text = metadata.get("help", "").replace("%", "%%")
        if metadata.get("choices"):
            help_text += f" ({', '.join(metadata['choices'])})"
        if self.field.default is dataclasses.MISSING:
            help_text += " [required]"
        elif self.field.default not in (None, (), ""):
            help_text += f" [default: {str(self.field.default).replace('%', '%%')}]"
        options: dict[str, Any] = {"help": help_text, "default": None, "metavar": self.name.upper()}
        if bool in _alternatives(self.type):
            options |= {"nargs": "?", "const": "true", "metavar": "True|False"}
        elif self.is_tuple:
            options["nargs"] = "+"
        parser.add_argument(f"--{self.name}", **options)

    def split(self, value: Any) -> Any:
        if not self.is_tuple:
            return value
        separator = self.field.metadata.get("separator")
        if separator is None:
            return value
        return [part for item in value for part in item.split(separator) if part]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")


def _leaves(cls: type, path: tuple[str, ...] = ()) -> Iterator[_Leaf]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name], (*path, field.name))
        else:
            yield _Leaf((*path, field.name), hints[field.name], field)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _underscored(word: str, flags: Collection[str]) -> str:
    """`--dry-run` and `--dry_run` are the same flag; a value that begins with dashes is none."""
    name, equals, value = word.partition("=")
    own = name[2:].replace("-", "_")
    return f"--{own}{equals}{value}" if name.startswith("--") and own in flags else word


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _with_all_sections(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with an empty section for each absent one, so that what is missing is named setting by setting."""
    hints = typing.get_type_hints(cls)
    sections = [field.name for field in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[field.name])]  # type: ignore[arg-type]
    return {**given, **{name: _with_all_sections(hints[name], given.get(name) or {}) for name in sections}}


def _unknown_keys(cls: type, given: Mapping[str, Any], *, where: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in fields:
            yield f"{where}: " + _unknown_message(str(key), sorted(fields), "")
        elif dataclasses.is_dataclass(hints[key]):
            if value is not None and not isinstance(value, Mapping):
                yield f"{where}: {key} is a section and holds settings, not {value!r}."
            else:
                yield from _unknown_keys(typing.cast(type, hints[key]), value or {}, where=f"{where}: {key}")


def _call_keys(cls: type, given: Mapping[str, Any], *, where: str) -> Iterator[str]:
    """Keys that belong to one call and have no place in a file that is run again."""
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.metadata.get("flag_only") and field.name in given:
            yield f"{where}: {field.name} belongs to one call, not to a recipe: pass --{field.name} instead."


def _stray_words(words: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """What argparse did not take: unknown flags, each with its values, and values without a flag."""
    after_flag = False
    for word in words:
        if word.startswith("--"):
            after_flag = True
            yield _unknown_message(word, known, "--")
        elif not after_flag:  # the values of an unknown flag need no message of their own
            yield f"{word!r} is not expected here: values follow a flag."


def _unknown_message(word: str, known: Sequence[str], dashes: str) -> str:
    name = word.removeprefix(dashes).partition("=")[0]
    hint = _nearest(name, known, dashes) or " see --help for all of them."
    return f"{dashes}{name} is not a setting;{hint}"


def _nearest(name: str, known: Sequence[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" did you mean {dashes}{near[0]}?" if near else ""


def _type_problem(item: Mapping[str, Any], paths: Mapping[tuple[str, ...], _Leaf]) -> str:
    location = tuple(str(part) for part in item["loc"])
    path = next((location[:n] for n in range(len(location), 0, -1) if location[:n] in paths), location[-1:])
    flag = f"--{path[-1]}" if path else "the settings"
    if item["type"] in ("missing", "missing_argument"):
        leaf = paths.get(path)
        return f"{flag} is required: {leaf.field.metadata.get('help', '') if leaf else ''}."
    return f"{flag} {item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}."


def _value_problems(built: Any, paths: Mapping[tuple[str, ...], _Leaf]) -> Iterator[str]:
    for path, leaf in paths.items():
        choices = leaf.field.metadata.get("choices")
        value = built
        for name in path:
            value = getattr(value, name)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"--{leaf.name} {value}: a finite number was expected."
        if choices and value is not None and str(value) not in choices:
            hint = _nearest(str(value), choices)
            yield f"--{leaf.name} {value!r} is not one of {', '.join(choices)}.{hint}"


def _own_problems(built: Any) -> Iterator[str]:
    """What the classes themselves object to: sections first, then the whole."""
    for field in dataclasses.fields(built):
        value = getattr(built, field.name)
        if dataclasses.is_dataclass(value):
            yield from _own_problems(value)
    if hasattr(built, "problems"):
        yield from built.problems()
