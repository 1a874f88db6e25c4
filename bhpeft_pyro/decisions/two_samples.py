"""Whether two sets of texts are of one kind: a classifier two-sample test.

A logistic regression in the unit vectors of the frozen transformer's last layer learns which of the
two sets a text is from, and is tested on texts that it has not learnt (Lopez-Paz and Oquab 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .novelty import LEAST, Novelty

_FOLDS = 5


def separation(earlier: Novelty, new: Novelty) -> float | None:
    """The AUROC with which new texts can be told from earlier ones, at least 0.5.

    It is 0.5 for texts of one kind, up to chance, and 1 for two kinds that have nothing in common.
    If a half of the earlier texts are of the kind of all new ones, it is about 0.75.

    Returns:
        The AUROC of held-out texts in five-fold cross-validation; None with fewer than 19 texts on
        a side.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model(())
    >>> one, other = (Novelty.of(model, tiny_examples(60, seed=seed)) for seed in (0, 1))
    >>> separation(one, other) < 0.7
    True
    """
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    sides: list[Tensor] = [normalize(side.last, dim=1) for side in (earlier, new)]
    if min(map(len, sides)) < LEAST:
        return None
    is_new = torch.arange(sum(map(len, sides))) >= len(sides[0])
    scores = cross_val_predict(
        LogisticRegression(class_weight="balanced", max_iter=1000),
        torch.cat(sides).numpy(),
        is_new.numpy(),
        cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=0),
        method="decision_function",
    )
    return max(0.5, float(roc_auc_score(is_new.numpy(), scores)))
