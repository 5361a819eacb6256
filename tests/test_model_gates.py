"""What a world model must know of Pendulum-v1 after seconds of learning, by its report card.

Random play, judged on held-out episodes: one step ahead the error is at most a 50th of a copy's,
15 steps ahead it is still below a copy's, rewards are known, features have not collapsed.
"""

from __future__ import annotations

from typing import Any

import pytest
from pendulum import card, trained

pytestmark = pytest.mark.learning

# Of each family: gradient steps, the shape of batches and options. A JEPA's errors are those of its
# embeddings. Token models have a gate of their own (test_token.py): what they draw from a hundred
# bins is further off than a copy one step ahead.
GATES: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {
    "jepa": (1000, (16, 16), {}),
    "diffusion": (400, (16, 16), {}),
}


@pytest.mark.parametrize("family", GATES)
def test_pendulum_is_known(family: str) -> None:
    steps, shape, options = GATES[family]
    agent, _ = trained(f"{family}:tiny", steps, shape, **options)
    found = card(agent)
    what = "obs" if agent.world_model.decodes_obs else "features"
    assert found.numbers[f"{what}@1"] < 0.02
    assert found.curves[what].max() < 0.5
    assert found.numbers["reward@1"] < 0.2 and found.numbers["reward@15"] < 0.5
    assert found.numbers["rank"] > 2 and found.numbers["probe"] > 0.9
    if family == "jepa":  # learned from single steps alone, it drifts: measured 0.017 against 0.008
        single, _ = trained("jepa:tiny", steps, shape, steps=1)
        assert card(single).numbers["features@5"] > 1.3 * found.numbers["features@5"]
