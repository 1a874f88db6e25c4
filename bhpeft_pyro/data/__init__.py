"""Text in, `Batch` out: `encode` reads and tokenises a data set, `Examples` yields its batches."""

from .columns import Columns, Kind
from .encoding import encode
from .examples import Examples

__all__ = ["Columns", "Examples", "Kind", "encode"]
