"""What is wrong with a configuration, in one line that names key, value and choices."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from yaml import MarkedYAMLError  # type: ignore[import-untyped]

from block.choices import choose


class ConfigError(ValueError):
    """The configuration is wrong; the message is one line that names key, value and choices."""


def explain(error: BaseException) -> str:
    """What is wrong with a configuration, in one line: Hydra's and OmegaConf's many boiled down to key and choices."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return explain(error.__cause__)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException):
        missing = re.search(
            r"Could not find '(.+)/([^'/]*)' Available options in '[^']+': (.*?)(?: Config sear.*)?$", text
        )
        if missing:
            group, value, choices = missing.groups()
            return f"{group}={value}: {choose(value, choices.split())}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value"
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'", text)
    if several:
        return f"{several.group(1)}: several values are a sweep, which needs -m (or a list, which needs [ ])"
    missing_value = re.match(r"Missing mandatory value: (\S+)", text)
    if missing_value:
        return f"{missing_value.group(1)}: needs a value"
    in_file = re.match(r"In '(.+?)': \w+ raised while composing config: (.*?) full_key: (\S+)", text)
    if in_file:
        return _wrong_in_file(error.__context__, *in_file.groups())
    override = re.match(r"(?:Error merging override |Could not override ')([\w./@+~]+)(?:=(.*))?", text)
    cause = error.__cause__
    if override and cause is not None:
        key, value = override.groups()
        lacking = _lacking(cause)
        if lacking:
            return no_such_key(key, *lacking)
        return f"{key}={value}: {_mismatch(_first_line(cause), getattr(cause, 'child_node', None))}"
    return _first_line(error)


def _wrong_in_file(cause: BaseException | None, file: str, trouble: str, key: str) -> str:
    """The message for `key` of conf/`file`.yaml, or of a file of the user's, by what OmegaConf says of it."""
    lacking = _lacking(cause)
    if lacking:
        return no_such_key(key, *lacking, f" in {file}.yaml")
    value = re.search(r"[Vv]alue '(.*)' (?:of type|is not|for field)", trouble)
    given = f"={value.group(1)}" if value else ""
    return f"{key}{given}: {_mismatch(trouble)}, in {file}.yaml"


def no_such_key(key: str, part: str, known: Sequence[str], where: str = "") -> str:
    """The message for `key`, of which `part` is not among the `known` ones."""
    return f"{key}: no such key{where}{f'; {choose(part, known)}' if known else ', nor any other here'}"


def _mismatch(text: str, node: object = None) -> str:
    """Why a key may not have a value: by the type of the key's node if there is one, else by OmegaConf's words."""
    told = re.search(r"(?:converted to|valid|field of type|convert '\w+' to|with|is not a(?! valid)) '?(\w+)'?", text)
    kind = type(node).__name__ if node is not None else told.group(1) if told else ""
    for word, wanted in _WANTED.items():
        if kind.lower().startswith(word):
            return f"wants {wanted}"
    return text


_WANTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "list": "a list, such as [1,2]",
}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _lacking(error: BaseException | None) -> tuple[str, list[str]] | None:
    """The key that a config node lacks, and those that it has; None if that is not the trouble."""
    node, key = getattr(error, "parent_node", None), getattr(error, "key", None)
    if not isinstance(node, DictConfig) or key is None:
        return None
    known = list(map(str, node))  # `in` would miss those that still need a value
    return None if str(key) in known else (str(key), [name for name in known if name[0] != "_" and name != "hydra"])
