"""Writes what a TensorRT binding really offers, by importing it, as a JSON file that `surfaces.surface` rebuilds.

    python tests/surfaces/record.py tensorrt_rtx tests/surfaces/tensorrt_rtx-1.7.json

TensorRT's own module needs libnvinfer, which PyPI does not have; its bindings are there (`pip download --no-deps
tensorrt-cu12-bindings==10.16.1.11`, `tensorrt-cu13-bindings==11.4.0.106`) and import beside empty libraries. Unpack
the wheel, make the three libraries in its folder from one line of C per symbol that `nm -D --undefined-only
tensorrt.so` lists without a version, such as `void* createInferBuilder_INTERNAL(void) { return 0; }`:

    for name in nvinfer nvinfer_plugin nvonnxparser; do
        gcc -shared -fPIC -Wl,-soname,lib$name.so.10 -o tensorrt_bindings/lib$name.so.10 empty.c
    done
    LD_LIBRARY_PATH=tensorrt_bindings PYTHONPATH=. python record.py tensorrt_bindings tensorrt-10.16.json
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def classes_in(owner: object, prefix: str = "") -> Iterator[tuple[str, type]]:
    for name, thing in sorted(vars(owner).items()):
        if isinstance(thing, type) and not name.startswith("_") and not name.endswith("Layer"):  # 60, seldom used
            yield prefix + name, thing
            yield from classes_in(thing, f"{prefix}{name}.")


def facts_of(cls: type) -> dict[str, object]:
    facts: dict[str, list[str]] = {"methods": [], "properties": [], "readonly": [], "values": []}
    for name in dir(cls):
        if name.startswith("_"):
            continue
        thing = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
        if isinstance(thing, property):
            kind = "readonly" if thing.fset is None else "properties"
        else:
            kind = "methods" if callable(thing) and not isinstance(thing, type) else "values"
        facts[kind].append(name)
    constructor = (cls.__init__.__doc__ or "").startswith("__init__(")  # pybind11 writes signatures there
    members = {name: int(member) for name, member in getattr(cls, "__members__", {}).items()}
    return {"constructor": constructor, **facts, **({"values": members} if members else {})}


def recorded(module: ModuleType) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(facts_of(cls))}" for name, cls in classes_in(module)]
    public = {name: thing for name, thing in sorted(vars(module).items()) if not name.startswith("_")}
    functions = [name for name, thing in public.items() if callable(thing) and not isinstance(thing, type)]
    values = {n: [type(v).__name__, v.name] for n, v in public.items() if type(v) in public.values()}
    facts = {"version": vars(module)["__version__"], "functions": functions, "values": values}
    head = "".join(f" {json.dumps(name)}: {json.dumps(fact)},\n" for name, fact in facts.items())
    return "{\n" + head + ' "classes": {\n' + ",\n".join(lines) + "\n }\n}\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(recorded(importlib.import_module(sys.argv[1])), encoding="utf-8")
