"""Testers that hold a reducer or a model family to the invariants, for packages that bring their own.

`saccade.testing.reducers` needs pytest, `saccade.testing.families` also `saccade[train]`.
"""

import pytest

# So that a check that fails shows the values that it compared, as in a test file.
pytest.register_assert_rewrite("saccade.testing.families", "saccade.testing.reducers")
