"""Save a posterior in today's format, for `test_saving.py`.

Run it from the root of the repository when `bhpeft_pyro.posterior.saving.FORMAT` has gone up, and
commit what it writes in place of the older ones, which are refused (`saved/old` is one of these):

    PYTHONPATH=. python tests/helpers/make_saved.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bhpeft_pyro as bh
from bhpeft_pyro.posterior.saving import FORMAT
from bhpeft_pyro.testing import tiny_backbone, tiny_model

SAVED = Path(__file__).parents[1] / "posterior" / "saved"
BACKBONE = SAVED / "backbone"
DATA = [
    {"text": ["w5 w9", "w6 w8 w30", "w5", "w6 w12"], "label": ["no", "yes", "no", "yes"]},
    {"text": ["w5 w10", "w6 w31"], "label": ["no", "yes"]},
]
TEXTS = ["w5 w40", "w6 w41", "w7"]
FITS: dict[str, dict[str, Any]] = {
    "normal": {"guide": "normal"},
    "laplace": {"guide": "laplace", "components": 2},
}


def main() -> None:
    if not BACKBONE.exists():  # its random weights need not be the same on every machine
        tiny_backbone().save_pretrained(BACKBONE)
    for name, how in FITS.items():
        model = tiny_model(bh.presets.lora(rank=1))
        posterior = bh.fit(model, data=DATA[0], max_steps=3, progress=False, **how)
        posterior = posterior.update(DATA[1])
        folder = posterior.save(SAVED / f"format-{FORMAT}-{name}", overwrite=True)
        expected = posterior.predict(TEXTS, samples=0).probabilities.tolist()
        (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()
