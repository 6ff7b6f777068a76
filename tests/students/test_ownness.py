"""Own or foreign: on made features."""

from __future__ import annotations

import numpy as np

from fastattr.students.ownness import fit_density


def test_foreign_features_are_flagged_and_own_ones_are_not():
    """A check that flags everything, or nothing, would pass a test of one side."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((5, 30))
    own = rng.standard_normal((2000, 5)) @ mixing + 0.1 * rng.standard_normal((2000, 30))
    density = fit_density(own[:1000], own[1000:1200], false_alarms=0.05)
    assert 0.01 < density.is_foreign(own[1200:]).mean() < 0.1
    other_plane = rng.standard_normal((200, 5)) @ rng.standard_normal((5, 30))
    assert density.is_foreign(other_plane).mean() > 0.95
    mismatched = np.concatenate([own[:200, :15], own[200:400, 15:]], axis=1)  # each half own, together not
    assert density.is_foreign(mismatched).mean() > 0.8  # the shrunken covariance gives some of these up
