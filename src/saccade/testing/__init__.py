"""Test suites that check a reducer or a model family against the invariants, for use by other packages too.

`saccade.testing.reducers` needs pytest, `saccade.testing.families` also `saccade[train]`.
"""

import pytest

# So that a failed check shows the values it compared, as in a test file.
pytest.register_assert_rewrite("saccade.testing.families", "saccade.testing.reducers")
