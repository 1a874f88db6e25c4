"""One exception tree: every error this package raises on purpose is a `BHPEFTError`, and every
warning that it gives a `BHPEFTWarning`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "ArchitectureError",
    "BHPEFTError",
    "BHPEFTWarning",
    "BusyError",
    "ConfigError",
    "DataError",
    "FitError",
    "GuideError",
    "LikelihoodError",
    "PriorError",
    "SaveError",
    "WriteError",
    "is_out_of_memory",
]


KEEP_TENSORS = (
    "To keep this posterior, keep the tensors of its guide and of its network "
    "(posterior.guide.state_dict(), posterior.model.network.state_dict(), safetensors files) and "
    "load both into new ones"
)


_LISTED = 5  # rows in a message, after the first
_LONGEST = 2000  # characters of a message; what is shown of one value is far shorter


class BHPEFTError(Exception):
    """The root; catch it to catch every deliberate error of the package."""

    def __str__(self) -> str:
        text = super().__str__()
        half = _LONGEST // 2
        return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


class BHPEFTWarning(UserWarning):
    """The root of the warnings; filter it to hide or to raise all of the package's own."""


# In messages of allocators: PyTorch's, oneDNN's and that of C++.
_TOO_LITTLE = ("allocate memory", "out of memory", "could not create a primitive", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too little: PyTorch has an error of that name for GPUs alone."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _TOO_LITTLE)
    )


class ConfigError(BHPEFTError, ValueError):
    """An option has a value that cannot work (a rank above the width, an unknown name)."""


class ArchitectureError(BHPEFTError, ValueError):
    """The transformer's architecture is unknown, or cannot carry a PEFT kind."""


class DataError(BHPEFTError, ValueError):
    """The data cannot be used: empty, a column missing, a label out of range.

    `rows` are all rows at fault, counted from 0, without which the others can be read; empty if no
    rows are. `where` is the column or the argument that they are in, and `problem` what is wrong
    with the first of them. `file` is the name of the file, or "", if the message has the numbers of
    the rows in their table.
    """

    rows: tuple[int, ...] = ()
    where = problem = ""
    file: str | None = None

    @classmethod
    def of_rows(
        cls,
        where: str,
        rows: Sequence[int],
        problem: str,
        unit: str = "row",
        number: Callable[[int], int] = int,
    ) -> DataError:
        """An error that names rows, the first few of them if they are many.

        >>> print(DataError.of_rows("column 'text'", [3, 7, 9], "the text is empty"))
        column 'text', row 3: the text is empty (and 2 more: rows 7, 9)
        """
        first, *others = map(number, rows)
        listed = ", ".join(map(str, others[:_LISTED])) + " ..." * (len(others) > _LISTED)
        which = f"{unit}s" if len(others) > 1 else unit
        more = f" (and {len(others)} more: {which} {listed})" if others else ""
        error = cls(f"{where}{', ' if where else ''}{unit} {first}: {problem}{more}")
        error.rows, error.where, error.problem = tuple(rows), where, problem
        return error

    def placed(self, file: str, unit: str, number: Callable[[int], int]) -> DataError:
        """A copy with the numbers that the rows have in a table, which may be of a file."""
        in_column = f"{file}, {self.where}" if self.where.startswith("column") else file
        where = in_column if file else self.where
        error = self.of_rows(where, self.rows, self.problem, unit, number)
        error.file = file
        return error


class PriorError(BHPEFTError, ValueError):
    """A prior leaves out a site, adds one, returns another shape, or cannot be used as asked."""


class GuideError(BHPEFTError, ValueError):
    """A guide does not fit its model, or cannot do what was asked of it."""


class LikelihoodError(BHPEFTError, ValueError):
    """Likelihood, head and labels do not go together."""


class FitError(BHPEFTError, RuntimeError):
    """Fitting had to stop; `posterior` is the last good state, or the components fitted before, or
    None; `component` is the one that could not be fitted."""

    posterior: object | None = None
    component: Any = None


class SaveError(BHPEFTError, ValueError):
    """A saved posterior is damaged, altered, or belongs to another backbone."""


class BusyError(SaveError):
    """Another process is writing into the folder."""


class WriteError(SaveError, OSError):
    """The disk is full, there is no permission, or a name is too long."""
