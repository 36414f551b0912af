"""A TensorRT module with exactly the names of the real one, for tests where no GPU is.

`surface("tensorrt-10.16")` rebuilds what `record.py` read from the real binding: its classes have those methods,
properties and constants and no others, and what pybind11 refuses (an unknown attribute, writing a read-only one,
calling a class that has no constructor) is refused. It pretends to nothing: a method raises NotImplementedError until
the test sets it on the class, a property until it is given a value. Every call of a constructor and of a method that
was set is in `module.calls`, in order. Subclasses written in Python take attributes of their own, as they do in
reality. Layers are left out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["given", "made", "surface"]


class _Class(type):
    """A recorded class: its methods can be replaced by the test's, and nothing else can be set on it."""

    facts: dict[str, Any]
    calls: list[tuple[str, tuple[Any, ...]]]

    def __setattr__(cls, name: str, value: Any) -> None:
        if "facts" in vars(cls):
            if name not in cls.facts["methods"]:
                raise AttributeError(f"{cls.__name__} has no method {name}")
            value = _watched(f"{cls.__name__}.{name}", value, cls.calls)
        super().__setattr__(name, value)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "facts" in vars(cls) and not cls.facts["constructor"]:
            raise TypeError(f"{cls.__name__}: No constructor defined!")
        cls.calls.append((cls.__name__, (*args, *kwargs.values())))
        return super().__call__(*args, **kwargs)


class _Object(metaclass=_Class):
    """An instance; it has no `__dict__`, so that an attribute that the record does not name cannot be set."""

    __slots__ = ("_values",)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        thing = super().__new__(cls)
        thing._values = {}
        return thing

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # pybind11 checks types here, which a record of names cannot


class _Property:
    def __init__(self, name: str, writable: bool) -> None:
        self._name, self._writable = name, writable

    def __get__(self, thing: Any, owner: Any) -> Any:
        if thing is None:
            return self
        values = {**owner.facts.get("given", {}), **thing._values}
        if self._name not in values:
            raise NotImplementedError(f"the test gave {owner.__name__}.{self._name} no value")
        return values[self._name]

    def __set__(self, thing: Any, value: Any) -> None:
        if not self._writable:
            raise AttributeError(f"property '{self._name}' has no setter")
        thing._values[self._name] = value


def _watched(name: str, function: Callable[..., Any], calls: list[tuple[str, tuple[Any, ...]]]) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((name, (*args, *kwargs.values())))
        return function(self, *args, **kwargs)

    return call


def _unset(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the test gave {name} no behaviour")

    return call


def _rebuilt(module: Any, qualified: str, facts: dict[str, Any]) -> Any:
    body: dict[str, Any] = {name: _unset(f"{qualified}.{name}") for name in facts["methods"]}
    body |= {name: _Property(name, True) for name in facts["properties"]}
    body |= {name: _Property(name, False) for name in facts["readonly"]}
    body |= {"__int__": lambda enum: enum.value} if isinstance(facts["values"], dict) else {}
    body |= {"__slots__": (), "__module__": module.__name__, "facts": facts, "calls": module.calls}
    return _Class(qualified.rpartition(".")[2], (_Object,), body)


def surface(name: str) -> Any:
    """The module recorded in `name`.json, fresh: what one test sets on it no other sees."""
    record = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    module: Any = ModuleType(name.partition("-")[0])
    module.__version__, module.calls = record["version"], []
    classes = {qualified: _rebuilt(module, qualified, facts) for qualified, facts in record["classes"].items()}
    classes["Logger.Severity"] = classes["ILogger.Severity"]  # one class in reality, too
    for qualified, cls in classes.items():
        owner, _, own_name = qualified.rpartition(".")
        if owner:
            type.__setattr__(classes[owner], own_name, cls)
        else:
            setattr(module, own_name, cls)
        for value in cls.facts["values"]:
            if isinstance(cls.facts["values"], dict):  # an enum
                type.__setattr__(cls, value, made(cls, name=value, value=cls.facts["values"][value]))
    for severity in classes["ILogger.Severity"].facts["values"]:
        for cls in (module.ILogger, module.Logger):
            type.__setattr__(cls, severity, getattr(module.ILogger.Severity, severity))
    for alias, (cls, value) in record["values"].items():
        setattr(module, alias, getattr(classes[cls], value))
    for function in record["functions"]:
        setattr(module, function, _unset(function))
    return module


def made(cls: Any, **values: Any) -> Any:
    """An instance of a recorded class as TensorRT itself hands it out, with values for its properties."""
    thing = cls.__new__(cls)
    thing._values.update(_known(cls, values))
    return thing


def given(cls: Any, **values: Any) -> None:
    """Values for properties (read-only too) of every instance of a recorded class that has none of its own."""
    cls.facts["given"] = _known(cls, values)


def _known(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(values) - {*cls.facts["properties"], *cls.facts["readonly"]})
    if unknown:
        raise AttributeError(f"{cls.__name__} has no property {unknown}")
    return values
