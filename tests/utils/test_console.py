"""What the screen is spared, and what not."""

from __future__ import annotations

import logging
import warnings

from lightning_ssiuu.utils.console import quiet


def test_quiet_hides_advertisements_and_nothing_else() -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with warnings.catch_warnings(record=True) as shown, quiet():
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", stacklevel=1)
        warnings.warn("the model forgot everything", stacklevel=1)
        assert len(logger.filters) == 1
        assert not logger.filter(logger.makeRecord("", 20, "", 0, "Tip: For seamless cloud uploads", (), None))
        assert logger.filter(logger.makeRecord("", 20, "", 0, "GPU available: False", (), None))
    assert [str(warning.message) for warning in shown] == ["the model forgot everything"]
    assert not logger.filters
