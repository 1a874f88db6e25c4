"""The documentation site: `make docs`. Nothing here needs the network."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import bhpeft_pyro

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS.parent / "notebooks"

project = "bhpeft_pyro"
author = "The bhpeft_pyro authors"
version = release = bhpeft_pyro.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_nb",  # MyST's Markdown, and notebooks with the outputs they have
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"bhpeft_pyro {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # MathJax would be fetched from elsewhere

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # the tests run them

# Docstrings: Google style, types from the signatures, `code` in single backticks.
default_role = "code"
napoleon_use_param = False  # "low, high:" documents two at once
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88

# A type of another package is no link: its inventory would have to be fetched.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|concurrent|contextlib|pathlib|torch|nn|pyro)\..*"),
    ("py:.*", r"(transformers|datasets|numpy|matplotlib|starlette)\..*"),
    # As they stand in the source: imported for type checks only, or in a signature that Pyro gives.
    ("py:class", r"Tensor|TorchDistribution|Constraint|Dataset|Axes|AutoGuide|Executor|MCMC"),
    ("py:class", r"OptimizerFactory|Callback|Sequence|Pooling|Action"),
    ("py:class", r"Earlier|Width|LogKernel|_HowMany"),
    ("py:class", r"bhpeft_pyro\.decisions\.(novelty\.F|promises\.P)"),  # type variables
    # What nobody makes by hand.
    (
        "py:class",
        r"bhpeft_pyro\.(data\.tokens\.Tokens|peft\.signals\.Scales"
        r"|peft\.kinds\.(Rows|SitePart|Weights)"
        r"|prediction\.log_kernel\.LogKernel"
        r"|guides\.earlier\.Earlier|guides\.laplace\.(choice_of_tau\.Width|curvature\.Information))",
    ),
    ("py:class", r"pandas\.DataFrame|Figure"),  # imported where they are used
]

# The modules of the reference, and on whose page each public object stands.
MODULES = re.findall(r"^   (bhpeft_pyro[\w.]*)$", (DOCS / "api.md").read_text(), re.MULTILINE)


def _directive(value: object) -> str:
    """How autodoc calls such an object."""
    if isinstance(value, type):
        return "exception" if issubclass(value, BaseException) else "class"
    if inspect.ismodule(value):
        return "module"
    return "function" if inspect.isfunction(value) else "data"


def _pages() -> dict[str, list[tuple[str, str | None]]]:
    """Module to the names of its public objects, and what each is if this page is its place.

    An object stands on the page of the first module that has it in its `__all__`.
    """
    places: dict[int, str] = {id(importlib.import_module(name)): name for name in MODULES}
    pages: dict[str, list[tuple[str, str | None]]] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        pages[path] = []
        for name in module.__all__:
            value, full = getattr(module, name), f"{path}.{name}"
            here = id(value) not in places
            place = places.setdefault(id(value), full)
            pages[path].append((place, _directive(value) if here else None))
    return pages


autosummary_context = {"pages": _pages()}


def _notebook_links(app: Sphinx, page: str, source: list[str]) -> None:
    """Pages link to `../notebooks/`, as on GitHub; the site has the notebooks beside them."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def _signatures(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str, returns: str
) -> tuple[str, str]:
    """A dataclass's default from a factory has no Python to show."""
    return signature and signature.replace("<factory>", "..."), returns


def _constants(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Autodoc looks for a constant's docstring only where it is imported to."""
    package, _, constant = name.rpartition(".")
    if what == "data":
        for module in [m for n, m in sys.modules.items() if n.startswith(package)]:
            if constant in vars(module):
                docs = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
                lines[:] = docs.get(("", constant), lines)


def _inherited(
    app: Sphinx, what: str, name: str, value: object, skip: bool, options: object
) -> bool | None:
    """Leave out what scikit-learn adds to every estimator, with links into its own pages."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def _formula(writer: HTML5Translator, node: nodes.Element) -> None:
    """A formula as MathML, which browsers show without any script."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    formula = convert(node.astext(), display=display)
    if "\\" in formula:
        logging.getLogger(__name__).warning("no MathML for %s", node.astext(), location=node)
    writer.body.append(formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Bring the notebooks in, and mend what autodoc shows."""
    (DOCS / "notebooks").mkdir(exist_ok=True)
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(notebook, DOCS / "notebooks")
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("source-read", _notebook_links)
    app.connect("autodoc-skip-member", _inherited)
    app.connect("autodoc-process-signature", _signatures)
    app.connect("autodoc-process-docstring", _constants)
