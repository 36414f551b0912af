"""Every plugin, by being in its folder: it imports, and offers what its folder's Protocol asks for, no more."""

import importlib
import inspect
import typing
from collections.abc import Callable

import pytest

from calibrators.collectors import Collector
from calibrators.errors import RecipeError
from calibrators.refine import Correction, Reconstruction, Rotation, Transform
from calibrators.refining import kind_of
from calibrators.registry import names, pick
from calibrators.sources import Source
from dfq_deploy.generation.generators import ATTENTIVE, AttentiveGenerator, Generator
from dfq_deploy.models.families import Family
from dfq_deploy.scores import Score
from dfq_deploy.tasks import Task
from exporters.backends import Backend, Engine

PROTOCOLS = {
    "calibrators.collectors": Collector,
    "calibrators.refine": Correction,  # or one of _KINDS
    "calibrators.sources": Source,
    "dfq_deploy.generation.generators": Generator,
    "dfq_deploy.models.families": Family,
    "dfq_deploy.scores": Score,
    "dfq_deploy.tasks": Task,
    "exporters.backends": Backend,
}
_KINDS = {"rotate": Rotation, "transform": Transform, "correct": Correction, "reconstruct": Reconstruction}
PLUGINS = [(package, name) for package in PROTOCOLS for name in names(package)]

every_plugin = pytest.mark.parametrize(("package", "name"), PLUGINS, ids=map(".".join, PLUGINS))
every_package = pytest.mark.parametrize("package", PROTOCOLS)


def _parameters(function: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [f"{parameter.name}, {parameter.kind.description}" for parameter in parameters if parameter.name != "self"]


def _asked_for(protocol: type) -> dict[str, list[str]]:
    verbs = {name: verb for name, verb in vars(protocol).items() if inspect.isfunction(verb)}
    return {name: _parameters(verb) for name, verb in verbs.items() if verb.__module__ == protocol.__module__}


@every_package
def test_a_plugin_folder_is_not_empty(package: str) -> None:
    assert names(package)


@every_plugin
def test_a_plugin_says_what_it_is(package: str, name: str) -> None:
    module = pick(package, name)
    assert module is importlib.import_module(f"{package}.{name}")
    assert len(module.__doc__ or "") > 40
    assert all(vars(module)[public].__doc__ for public in module.__all__)


@every_plugin
def test_a_plugin_offers_the_verbs_of_its_protocol_and_no_others(package: str, name: str) -> None:
    module = pick(package, name)
    offered = {public: getattr(module, public) for public in module.__all__}
    verbs = {public: _parameters(thing) for public, thing in offered.items() if inspect.isfunction(thing)}
    protocol = _KINDS[kind_of(name)] if package == "calibrators.refine" else PROTOCOLS[package]
    more = _asked_for(AttentiveGenerator) if protocol is Generator and name in ATTENTIVE else {}
    assert verbs == {**_asked_for(protocol), **more}


@pytest.mark.parametrize("name", names("exporters.backends"))
def test_a_backend_loads_an_engine(name: str) -> None:
    engine = typing.get_type_hints(pick("exporters.backends", name).load)["return"]
    assert {verb: _parameters(getattr(engine, verb)) for verb in _asked_for(Engine)} == _asked_for(Engine)


@every_package
def test_an_unknown_plugin_is_told_with_those_that_there_are(package: str) -> None:
    with pytest.raises(RecipeError, match="named `nonsense`") as caught:
        pick(package, "nonsense")
    assert all(name in caught.value.why for name in names(package))
