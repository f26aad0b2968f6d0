"""Turn what jsonargparse and Lightning raise for a user's mistake into one line that names the argument."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pkgutil import resolve_name
from traceback import walk_tb
from typing import Any

import lightning_ssiuu
from lightning_ssiuu.utils.errors import Given, UserError, causes
from lightning_ssiuu.utils.extras import EXTRAS, installing
from lightning_ssiuu.utils.files import disk_refusal
from lightning_ssiuu.utils.reading import load_yaml, reason
from lightning_ssiuu.utils.registry import lookup, nearest, shortened, why_not_found

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_SUBTYPES = re.compile(r"^\s*Subtypes: \[(.*)\]$", re.MULTILINE)
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (?P<name>\S+)"
    r"|Import path (?:(?P<path>\S+) )?does not correspond to a subclass"
    r"|(?:[Nn]o module named|has no attribute) '[^']*'.*?Got value: (?:Namespace\(class_path=)?'?(?P<called>[^'\s,)]+)"
)
_NOT_FOUND = re.compile(
    r"Problem with given class_path '([^']+)':\s+(?:No module named '([^']+)'|module '[^']+' has no attribute)"
)
_REQUIRED = re.compile(r"arguments are required: (.+)|Key \"([^\"]+)\" is required")
_UNKNOWN = re.compile(
    r"[Oo]ption '([^']+)' is not accepted|does not accept option '([^']+)'|arguments: (--?[^\s=]+|\S+)"
)
_WRONG_FUNCTION = re.compile(r"Expected '([^']+)' to be a function that returns (.+?)\.{1,2}(?:\s|$)")
_NOT_INSTALLED = re.compile(r"Requirement '([\w.-]+)[^']*' not met")
_OPTION = re.compile(r"[\w.\-+/]{1,100}")
_FILE = re.compile(r"(?:File does not exist|Path is not a file|File is not readable): '?([^']+?)'?$", re.MULTILINE)
_YAML = re.compile(r"Problems parsing config:(.*)", re.DOTALL)
_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_CHOICES = re.compile(r"^\s*Subtypes: \[.*?typing\.Literal\[([^\]]*)\]", re.MULTILINE)
_UNION_VALUE = re.compile(r"^\s*Given value: (.*)$", re.MULTILINE)
_REASON = re.compile(r"^\s*- (.*?)(?=\n\s*- |\n\s*Given value|\Z)", re.MULTILINE | re.DOTALL)
_TYPE_ONLY = re.compile(r"Expected an? (?!instantiatable)")
_BASE = re.compile(r"(?:<class '|\[)((?:lightning|lightning_ssiuu)\.[\w.]+\.[A-Z]\w*)['\]]")
_REFUSED_BY = re.compile(r"is not accepted\. Got value: Namespace\(class_path='([^']+)'")
_CLASS_VALUE = re.compile(r"class_path'?[=:] ?'([^']+)'")
_TYPE_NAMES = {
    "NoneType": "null",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "collections.abc.Sequence": "a list",
    "collections.abc.Callable": "the import path of a class or function",
    "torch.Tensor": "a tensor",
}


def user_error(error: BaseException) -> UserError | None:
    """The user's mistake behind what reading a configuration, or building from it, raised; None if there is none."""
    chain = list(causes(error))
    if (own := next((cause for cause in chain if isinstance(cause, UserError)), None)) is not None:
        return own
    if (refusal := disk_refusal(error)) is not None:  # of what others write: a logger, another rank
        return refusal
    # By name, because jsonargparse's own class derives from argparse's in some versions and replaces it in others.
    parsed = next((cause for cause in chain if type(cause).__name__ == "ArgumentError"), None)
    argument = ""
    if parsed is None and str(error).startswith("Does not validate against any of the Union"):
        parsed, argument = error, _built(error)
    return None if parsed is None else _translate(str(parsed).strip(), argument, _known_options(error))


def _built(error: BaseException) -> str:
    # Argument whose object was being built: the report of a constructor that raises does not say it.
    frames = [frame.f_locals.get("component") for frame, _ in walk_tb(error.__traceback__)]
    return next((str(action.dest) for action in reversed(frames) if hasattr(action, "dest")), "arguments")


def _known_options(error: BaseException) -> list[str]:
    # Those of the parser that raised; its message does not name them.
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        if actions := getattr(frame.f_locals.get("self"), "_actions", None):
            commands = [parser for action in actions for parser in getattr(action, "_name_parser_map", {}).values()]
            return [str(action.dest) for own in [actions, *(of._actions for of in commands)] for action in own]
    return []


def _translate(text: str, argument: str = "", options: Sequence[str] = ()) -> UserError:
    # The innermost complaint of jsonargparse's nested report, and the key it belongs to.
    path = ".init_args.".join(_KEY.findall(text)) or argument
    inner = _KEY.split(text)[-1]
    classes = _CLASS.findall(text)
    prefix = f"{path}.init_args." if path and _CLASS.search(inner) else (f"{path}." if path else "")
    if found := _REQUIRED.search(inner):
        names = re.sub(r"\b(fit|validate|test)\.", "", next(filter(None, found.groups())))
        allowed = "a value on the command line or in a --config file"
        return UserError(prefix + names, Given("nothing"), allowed)
    if "Unexpected config:" in inner:  # whose text may be data
        return UserError(path or "config", Given("a file that is no mapping"), "YAML with options and their values")
    if found := _UNKNOWN.search(inner):
        name = next(filter(None, found.groups()))
        if not _OPTION.fullmatch(name):
            return UserError(path or "config", Given("an option that does not exist"), "the options that --help lists")
        by = _REFUSED_BY.findall(inner) or (classes if prefix else [])
        own = _options(by[-1]) if by else []
        allowed = ", ".join(own) if own else "the options that --help lists"
        name = name.lstrip("-")
        absent = Given("an option that does not exist")
        return UserError(prefix + name, absent, allowed + _because(nearest(name, own or options)))
    if found := _WRONG_FUNCTION.search(inner):
        kind = re.sub(r"<class '([^']+)'>", r"\1", found[2])
        allowed = f"the import path of a class, or of a function whose annotation says that it returns {kind}"
        return UserError(path or "arguments", found[1], f"{allowed} (that of {found[1]} does not)")
    if packages := _NOT_INSTALLED.findall(inner):
        called = classes[-1] if classes else "a class"
        otherwise = f"pip install {' or '.join(dict.fromkeys(packages))}"
        how = next((installing(name) for name in packages if name in EXTRAS), otherwise)
        allowed = f"a class whose package is installed: {how}"
        return UserError(path or "arguments", called, allowed)
    if (found := _NOT_FOUND.search(inner)) and f"{found[1]}.".startswith(f"{found[2] or found[1]}."):
        key = path if path.endswith("class_path") else f"{path}.class_path"
        return UserError(key, found[1], _class_or(inner, found[1]))
    plain = _SUBTYPES.search(inner)
    takes_numbers = plain is not None and re.search("<class '(float|int)'>", plain[1])
    if plain and takes_numbers and (found := _NO_CLASS.search(inner)) and "." not in (found["name"] or "."):
        return UserError(path, found["name"], _type_names(plain[1]))
    if found := _NO_CLASS.search(inner):
        whole = _UNION_VALUE.search(inner)
        given = next(filter(None, [*found.groups(), whole and whole[1]]))
        key = path if _CHOICES.search(inner) else f"{path}.class_path".lstrip(".")
        return UserError(key, given, _class_or(inner, given))
    if found := _FILE.search(inner):
        name = os.path.relpath(found[1]) if found[1].startswith(os.getcwd() + os.sep) else found[1]
        return UserError(path or "config", name, "an existing file")
    if found := _YAML.search(inner):
        place = re.search(r"line (\d+)", found[1])
        allowed = "valid YAML" + (f": it breaks in line {place[1]}" if place else "")
        if "aliases stand for" in found[1]:
            allowed = "YAML of at most a million values, those that aliases stand for included"
        return UserError(path or "config", Given("a file that cannot be read"), allowed)
    union, value = _SUBTYPES.search(inner), _UNION_VALUE.search(inner)
    if union and value:
        nested = re.fullmatch(r"NestedArg\(key='([^']*)', val='?(.*?)'?\)", value[1])
        argument, given = (".".join(filter(None, (path, nested[1]))), nested[2]) if nested else (path, value[1])
        class_path = _CLASS_VALUE.search(given)
        given = class_path[1] if class_path else given
        names_class = nested is None or nested[1].endswith("class_path")
        argument = argument or "arguments"
        classes_there = _classes(inner if names_class else "")[0]  # the report is on the class that has the option
        if why := why_not_found(given):
            return UserError(argument, given, classes_there + _because(why))
        reason = _reason(inner)
        if reason == "Expected an instantiatable class, but is abstract":
            return UserError(argument, given, classes_there + _because(f"{given} is abstract"))
        if class_path:  # of a class that is there: its constructor has raised
            return UserError(argument, given, f"options that it accepts{_because(reason)}")
        if nested and names_class:
            return UserError(argument, given, _class_or(inner, given))
        named = _type_names(union[1])
        return UserError(argument, given, named + _because(reason))
    if found := _TYPE.search(inner):
        allowed = _type_names(found[1])
        if allowed == _TYPE_NAMES["str"] and found[2].startswith("{"):  # a text with a colon is read as a mapping
            allowed += "; one with a colon and a space, as here, has to stand in a file (--config)"
        return UserError(path or "arguments", found[2], allowed)
    summary = " ".join(inner.split())
    argument = path or "arguments"
    if found := re.match(r"argument (\S+): (.+)", summary):
        argument, summary = found[1], found[2]
    return UserError(argument, Given("what it cannot use"), shortened(summary) or "what --help says of it")


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _reason(report: str) -> str:
    # The first complaint of the innermost union that does not only repeat a type.
    reasons = _REASON.findall(report.rpartition("Errors:")[2])
    return shortened(next((reason for reason in reasons if not _TYPE_ONLY.match(reason)), ""))


def _options(class_path: str) -> list[str]:
    # Constructor arguments of a class, those it hands on to its bases included.
    options: dict[str, None] = {}
    for base in inspect.getmro(resolve_name(class_path)):
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            options |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            if all(p.kind != p.VAR_KEYWORD for p in parameters):
                break
    return list(options) or ["the class's constructor arguments"]


def _class_or(report: str, given: str) -> str:
    # What could have been named instead, and why nothing was found.
    allowed, names = _classes(report)
    if choices := _CHOICES.search(report):
        words = re.findall(r"'([^']*)'", choices[1])
        allowed, names = f"{', '.join(words)}, or the import path of a class or function", [*words, *names]
    return allowed + _because(why_not_found(given) or nearest(given, names))


def _classes(report: str) -> tuple[str, list[str]]:
    # Subclasses of the first class the report mentions: in words, this package's; and all that have a name.
    for base in map(lookup, _BASE.findall(report)):
        if isinstance(base, type):
            names = sorted({kind.__name__ for kind in _subclasses(base) if not kind.__name__.startswith("_")})
            ours = [name for name in names if name in lightning_ssiuu.__all__]
            return ", ".join([*ours, f"{'or ' * bool(ours)}the import path of a subclass of {base.__name__}"]), names
    return "the import path of a class that exists, e.g. torch.optim.AdamW", _optimizers()


def _optimizers() -> list[str]:
    # Of all that is named by class alone what a report says no base of.
    from torch.optim import Optimizer

    return [kind.__name__ for kind in _subclasses(Optimizer) if not kind.__name__.startswith("_")]


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind):
            yield kind
        yield from _subclasses(kind)


def _type_names(text: str) -> str:
    # Types as jsonargparse prints them, in words.
    text = re.sub(r"\S*\bCallable\[.*\](?=, |$)", "<class 'collections.abc.Callable'>", text)
    text = re.sub(r"\btyping\.(?:Sequence|List)\[.*?\](?=, |$)", "<class 'collections.abc.Sequence'>", text)
    names = re.findall(r"<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\]", text)
    spelled = [_TYPE_NAMES.get(name, name.rpartition(".")[2]) if name else values for name, values in names]
    return ", ".join(spelled) or text


@contextmanager
def parsing() -> Iterator[None]:
    """Inside, whatever reading options and configuration files raises, or building from them, is the user's mistake."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    set_loader("yaml", partial(load_yaml, load=load), (yaml.YAMLError,))
    try:
        yield
    except Exception as error:
        if user_error(error) is not None:
            raise
        argument, value = _read(error) or (_built(error), Given("what it cannot use"))
        raise UserError(argument, value, shortened(f"what can be read and used ({reason(error)})")) from error
    finally:
        set_loader("yaml", load, (yaml.YAMLError,))


def _read(error: BaseException) -> tuple[str, str] | None:
    # The configuration file that was being read, by a function of jsonargparse.
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_name == "parse_path" and "path" in frame.f_locals:
            return "config", str(frame.f_locals["path"])
    return None


@contextmanager
def trainer_mistakes(given: Mapping[str, Any], prefix: str = "trainer.") -> Iterator[None]:
    """Inside, a Trainer that cannot be made as asked (a device that is not there) is the user's mistake.

    ``given`` are the options as the user set them; the error names one, after ``prefix``, and quotes Lightning.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        option = _option_in(text, dict(given.items()))  # of a Namespace, which is no Mapping, too
        if not option and not isinstance(error, MisconfigurationException):
            raise
        machine = option in ("accelerator", "devices", "strategy", "precision", "num_nodes")
        taken = "what this machine has" if machine else "what Lightning's Trainer takes"
        allowed = f"{taken} ({shortened(text)})"
        if not option:
            raise UserError(prefix.rstrip(".") or "devices", Given("options that do not fit"), allowed) from error
        raise UserError(f"{prefix}{option}", given[option], allowed) from error


def _option_in(text: str, given: Mapping[str, Any]) -> str:
    # The option that a message is about: the first that it names, or whose value it quotes.
    if text.startswith("You requested gpu") and "devices" in given:
        return "devices"
    text = re.sub(r"\bduration\b", "max_time", text)
    named = {name: found.start() for name in given if (found := re.search(rf"\b{name}\b", text))}
    if named:
        return min(named, key=named.__getitem__)
    quoted = [name for name, value in given.items() if isinstance(value, str) and repr(value) in text]
    return quoted[0] if quoted else ""
