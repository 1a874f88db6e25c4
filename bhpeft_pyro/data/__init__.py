"""Text in, `Batch` out: `table` reads rows, `encode` tokenises them, `Examples` yields batches."""

from .batch import Batch
from .columns import Columns, Kind
from .copies import LabelWarning
from .encoding import CutWarning, encode
from .examples import Examples
from .table import table

__all__ = ["Batch", "Columns", "CutWarning", "Examples", "Kind", "LabelWarning", "encode", "table"]
