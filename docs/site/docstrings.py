"""griffe extension that adapts docstrings and signatures for the API reference.

It changes the following parts of the source:

    Example:                   becomes Examples:, the section name of griffe
    Reference:                 becomes a paragraph
    `jaxseq.scan`              becomes a link to this entry
    Float[Array, "T *batch"]   shows the shape as written; griffe parses it as a product
    Float[Array, " H"]         shows the shape without the space, which only linters need
    **time                     is replaced by every time option, as defined in `jaxseq.TimeOptions`
    a NamedTuple               shows its fields as the signature of its constructor
    TimeOptions                shows the options as keywords with their defaults
    a cell, `mgu = Cell(…)`     shows the docstring of its file: its equations and their pullback
    every entry                ends with a link to its source file
"""

import re
from textwrap import dedent
from typing import Any

import griffe

from jaxseq import _time_options

NAME = re.compile(r"(?<!`)`(jaxseq(?:\.[A-Za-z]\w*)+)`(?!`)")
REFERENCE = re.compile(r"^Reference:\n((?: {4}.*\n?)+)", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Extension that processes every object of the loaded package."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Adapt the docstring and the annotations of an entry."""
        for annotation in annotations(obj):
            quote_shapes(annotation)
        module = obj.parent
        if obj.is_attribute and re.match(r"Cell\(|_\w+\.CELL", str(obj.value)):
            if obj.docstring is None:
                obj.docstring = griffe.Docstring(module.docstring.value, parent=obj)
            obj.annotation = griffe.ExprName("Cell", parent=obj.package)
        if obj.docstring is None:
            return
        if obj.is_function:
            list_time_options(obj)
        text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
        text = REFERENCE.sub(lambda match: f"**Reference:** {dedent(match[1]).strip()}\n", text)
        text = NAME.sub(r"[`\1`][\1]", text)
        if module is not None and module.is_module and not obj.is_module:
            file = str(obj.relative_package_filepath)
            text += f"\n\n**Code:** [`{file}`][{file.removesuffix('/__init__.py')}]"
        obj.docstring.value = text

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the constructor signature of a NamedTuple, and of the options as keywords."""
        kind = griffe.ParameterKind.positional_or_keyword
        if "NamedTuple" in map(str, cls.bases):
            fields = (m for m in cls.attributes.values() if m.annotation is not None and "property" not in m.labels)
            parameters = [griffe.Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in fields]
        elif cls.name == "TimeOptions":
            parameters = time_options(cls.package)
            cls.docstring.value = cls.docstring.value.replace("\nAttributes:\n", "\nArgs:\n")
        else:
            return
        self_ = griffe.Parameter("self", kind=kind)
        constructor = griffe.Function("__init__", parameters=griffe.Parameters(self_, *parameters), parent=cls)
        cls.set_member("__init__", constructor)


def list_time_options(function: griffe.Function) -> None:
    """Replace `**time` by every time option, in the signature and in the docstring."""
    time = next((p for p in function.parameters if str(p.annotation) == "Unpack[TimeOptions]"), None)
    if time is None:
        return
    positional = (p for p in function.parameters if p is not time)
    function.parameters = griffe.Parameters(*positional, *time_options(function.package))
    function.docstring.value = _time_options.described_in(function.docstring.value)


def time_options(package: griffe.Module) -> list[griffe.Parameter]:
    """Return every time option with its type and its default."""
    options, parameters = package["_time_options.TimeOptions"], []
    for name, default in _time_options.DEFAULTS.items():
        annotated = options[name].annotation.slice  # of Annotated[type, Default(value)]
        annotation = annotated.elements[0]
        quote_shapes(annotation)
        kind = griffe.ParameterKind.keyword_only
        parameters.append(griffe.Parameter(name, annotation=annotation, kind=kind, default=repr(default)))
    return parameters


def annotations(obj: griffe.Object) -> list[Any]:
    """Return all annotations of a function, or that of an attribute."""
    if obj.is_function:
        return [obj.returns, *(parameter.annotation for parameter in obj.parameters)]
    return [obj.annotation] if obj.is_attribute else []


def quote_shapes(annotation: Any) -> None:
    """Convert products in an annotation back to strings, and strip the strings."""
    if not isinstance(annotation, griffe.Expr) or isinstance(annotation, griffe.ExprName):
        return
    for part in annotation.iterate(flat=False):
        quote_shapes(part)
    if isinstance(annotation, griffe.ExprTuple):
        product = [isinstance(e, griffe.ExprBinOp) and e.operator == "*" for e in annotation.elements]
        written = [repr(str(e).replace("* ", "*")) for e in annotation.elements]
        elements = [w if p else e for p, w, e in zip(product, written, annotation.elements, strict=True)]
        annotation.elements = [re.sub(r"^(['\"]) ", r"\1", e) if isinstance(e, str) else e for e in elements]
