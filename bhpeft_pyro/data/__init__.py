"""Text in, `Batch` out: `encode` reads and tokenises a data set, `Examples` yields its batches."""

from .batch import Batch
from .columns import Columns, Kind
from .doubts import LabelWarning
from .encoding import CutWarning, encode
from .examples import Examples

__all__ = ["Batch", "Columns", "CutWarning", "Examples", "Kind", "LabelWarning", "encode"]
