"""What is wrong with a configuration, in one line that names key, value and choices."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from yaml import MarkedYAMLError  # type: ignore[import-untyped]

from block.core.choices import did_you_mean


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
            return f"{group}={value}: {did_you_mean(value, choices.split())}"
        primary = re.match(r"Cannot find primary config '(.+?)'", text)
        if primary:
            return f"--config-name={primary.group(1)}: there is no such file in conf/ or a --config-dir; leave it away"
    folder = re.match(r"(Primary|Additional) config directory (?:'(.+?)' )?not found", text)
    if folder:
        return f"--config-dir={folder.group(2)}: no such folder" if folder.group(2) else "--config-path: no such folder"
    if isinstance(error, OverrideParseException):
        return _unparsed(error.override, text)
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?: requires|\s*1\.)", text)
    if several:
        text = _or_quotes(several.group(1))
        return f"{several.group(1)}: several values are a sweep, which needs -m (or a list, which needs [ ]{text})"
    missing_value = re.match(r"Missing mandatory value: (\S+)(?: full_key: (\S+))?", text)
    if missing_value:
        return f"{missing_value.group(2) or missing_value.group(1)}: needs a value"
    in_file = re.match(r"In '(.+?)': \w+ raised while composing config: (.*?) full_key: (\S+)", text)
    if in_file:
        return _wrong_in_file(error.__context__, *in_file.groups())
    refers = re.match(r"Interpolation key '(.+?)' not found full_key: (\S+)", text)
    if refers:
        name, key = refers.groups()
        return f"{key}: ${{{name}}} is the value of a key {name}, which there is not; \\${{{name}}} is taken as it is"
    resolved = re.match(r"(?:\w+ raised while resolving interpolation: )?[\"']?(.+?)[\"']? full_key: (\S+)", text)
    if resolved:
        return f"{resolved.group(2)}: {resolved.group(1)}"
    twice = r"(?:Could not append to config. An item is already at '|Multiple values for )"
    there = re.match(rf"{twice}([\w/]+(?:\.\w+)*)", text)
    if there:
        return f"{there.group(1)}: is there already; leave the + away"
    gone = re.match(r"Could not delete from config. '(.+?)' does not exist", text)
    if gone:
        return f"~{gone.group(1)}: no such key"
    override = re.match(r"(?:Error merging override |Could not override ')([\w./@+~]+)(?:=(.*))?", text)
    if override:
        return _not_merged(override.group(1), override.group(2), error.__cause__) or _first_line(error)
    return _first_line(error)


def _unparsed(override: str, text: str) -> str:
    """The message for what Hydra's grammar does not take: a call that fails, or a text that wants quotes."""
    evaluated = re.search(r"while evaluating '.*': (.*?)(?: See https|$)", text)
    key, equals, value = override.partition("=")
    typed = quoted(key, value) if equals else None
    if evaluated and not (unknown := re.match(r"Unknown function '(\w+)' Available: (\S+)", evaluated.group(1))):
        return f"{override}: {evaluated.group(1)}"
    if evaluated and unknown:
        near = did_you_mean(str(unknown.group(1)), str(unknown.group(2)).split(","))
        return f"{override}: no such function; {near}{f'; or, as a text, type {typed}' if typed else ''}"
    if typed is None:
        return f"{override}: not of the form key=value, without spaces around the ="
    return f"{override}: a value with such characters needs quotes, and these need some for the shell: type {typed}"


def quoted(key: str, value: str) -> str | None:
    """How to type `key` with exactly the text `value` in a shell; None if Hydra takes no such key."""
    text = value.replace("${", "\\${")
    typed = f"{key}={QuotedString(text=text, quote=Quote.double).with_quotes()}"
    try:
        OverridesParser.create().parse_override(typed)
    except HydraException:
        return None
    return shlex.quote(typed)


def _not_merged(key: str, value: str | None, cause: BaseException | None) -> str | None:
    """The message for an override that Hydra does not take; None if that cannot be told."""
    if key.startswith("~"):
        return f"{key}: cannot be taken away; give it another value"
    node, lacking = getattr(cause, "parent_node", None), _lacking(cause)
    if lacking and isinstance(node, DictConfig):
        full = str(node._get_full_key(lacking[0]))
        inside = full.startswith(f"{key}.")  # it was given as a {…}
        return no_such_key(full if inside else key, *lacking, root=node._get_root())
    if "@" in key:
        return f"{key}: no such key, with an @"
    return f"{key}={value}: {_mismatch(_first_line(cause), getattr(cause, 'child_node', None))}" if cause else None


def _wrong_in_file(cause: BaseException | None, file: str, trouble: str, key: str) -> str:
    """The message for `key` of conf/`file`.yaml, or of a file of the user's, by what OmegaConf says of it."""
    lacking = _lacking(cause)
    if lacking:
        return no_such_key(key, *lacking, f" in {file}.yaml")
    if key.startswith("object_type="):  # it is of the whole
        return f"{file}.yaml: {trouble.partition(' value: ')[0]}"
    value = re.search(r"[Vv]alue '(.*)' (?:of type|is not|for field)", trouble)
    given = f"={value.group(1)}" if value else ""
    return f"{key}{given}: {_mismatch(trouble)}, in {file}.yaml"


def no_such_key(key: str, part: str, known: Sequence[str], where: str = "", root: object = None) -> str:
    """The message for `key`, of which `part` is not among the `known` ones. root: the config, whose other keys the user
    may have meant.
    """
    name = re.split("[./]", key)[-1]
    near = get_close_matches(part, known, n=1)
    everywhere = [other for other in _keys(root) if other != key] if isinstance(root, DictConfig) else []
    if not near or part.endswith(name):
        near += [other for other in everywhere if other.split(".")[-1] == name]
    if not near:
        names = get_close_matches(name, [other.split(".")[-1] for other in everywhere], n=1)
        near = [other for other in everywhere if other.split(".")[-1] in names]
    hint = f"did you mean {' or '.join(dict.fromkeys(near[:4]))}? " if near else ""
    if not known and not hint:
        return f"{key}: no such key{where}, nor any other here"
    choices = f"choose from {', '.join(known)}" if known else ""
    return f"{key}: no such key{where}; {hint}{choices}".rstrip()


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The keys of a config, in full, except Hydra's own."""
    for name in map(str, node):
        if name[0] != "_" and f"{prefix}{name}" != "hydra":
            yield f"{prefix}{name}"
            value = node._get_node(name)  # not resolved
            if isinstance(value, DictConfig):
                yield from _keys(value, f"{prefix}{name}.")


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


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with the arguments in one line, without the usage, which --help has."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"error: {message}; --help tells what there is\n")


def piped(main: Callable[[], int]) -> int:
    """The exit code of `main`; 1, in silence, if what reads its output ends before it does, as ``| head`` may."""
    logging.raiseExceptions = False  # or a log that nobody reads prints tracebacks
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what Python flushes at its end
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return 1


def _or_quotes(override: str) -> str:
    """How to give a text with a comma in it, if that seems to be one."""
    key, _, value = override.partition("=")
    typed = quoted(key, value) if re.search(r"[/\\]|\.[A-Za-z]|\s", value) else None
    return f"; one text is {typed}" if typed else ""
