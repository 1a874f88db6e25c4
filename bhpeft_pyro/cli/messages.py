"""Messages about arguments of Python, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

Flags = Mapping[str, tuple[str, str]]
"""By the name of an argument its option, and the option that turns it off (or "")."""

_VALUE = r"('[^']*'|\"[^\"]*\"|\((?:\.\.\.)?\)|[^\s,;:()]+)"
# What only Python offers.
_LEFT_OUT = (
    r" \(`columns=Columns\(\.\.\.\)` says which column holds what\)",
    r"; label_names=\(\.\.\.\) is for classes whose numbers are their names",
    r": use labelled=False(?=\))",
    r": each weight draw gets an equal share of the batch \(for a point estimate set particles=1\)",
    r"^columns: (?=max_length)",
    r", or load the backbone with dtype=torch\.float32",
)
_SAID = {
    r"^columns: ": "--text-column, --pair-column, --label-column: ",
    r"particles=(\d+)$": r"\1, the draws of the weights for each batch",
    r"source='([^']*)'": r"\1",
    r"(?<=so it cannot be a prior: ).*": "fit with --guide laplace or --guide normal",
    r"tokenizer=\.\.\.": "a folder that has a tokenizer",
    r"(\w+)=True \((--[\w-]+)\)": r"\2",
    rf"\w+={_VALUE} \((--[\w-]+)\)": r"\2 \1",
}


def in_options(text: str, flags: Flags) -> str:
    """The message with options in place of arguments.

    >>> flags = {"patience": ("--patience", ""), "bf16": ("--bf16", "--no-bf16")}
    >>> in_options("patience=3 needs validation data; patience=None fits to the end", flags)
    '--patience 3 needs validation data; no --patience fits to the end'
    >>> in_options("bf16: of 'patience=3' nothing is left; expected bf16=False", flags)
    "--bf16: of 'patience=3' nothing is left; expected --no-bf16"
    """
    for pattern in _LEFT_OUT:
        text = re.sub(pattern, "", text)
    for pattern, words in _SAID.items():
        text = re.sub(pattern, words, text)
    known = "|".join(map(re.escape, flags))

    def option(found: re.Match[str]) -> str:
        if found[1] is None:  # a text of the user's, or a name
            return found[0]
        flag, off = flags[found[1]]
        if found[2] in ("False", "None"):
            return off or f"no {flag}"
        return flag if found[2] == "True" else f"{flag} {found[2]}"

    quoted = r"(?<!\w)(?:'[^']*'|\"[^\"]*\")"
    text = re.sub(rf"{quoted}|(?<![\w.\-(`])({known})={_VALUE}", option, text)
    return re.sub(rf"^({known})(?=[:,] )", lambda found: flags[found[1]][0], text)
