"""That training learns: `python -m pytest -m learning` runs it; it takes minutes.

What the return becomes when a part of the algorithm is spoiled: `learn.py --without`.
"""

import pytest
from learn import ENOUGH, learned_return


@pytest.mark.learning
@pytest.mark.timeout(3000)
def test_a_pole_is_balanced_far_better_than_by_chance(tmp_path):
    assert learned_return(tmp_path / "run", seed=0) > ENOUGH
