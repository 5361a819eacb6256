"""What a world model must know of Pendulum-v1 after seconds of learning, by its report card.

Random play, judged on held-out episodes: one step ahead the error is at most a fiftieth of a copy's,
15 steps ahead it is still below a copy's, rewards are known, features have not collapsed.
"""

from __future__ import annotations

from typing import Any

import pytest
from pendulum import card, trained

pytestmark = pytest.mark.learning

# Of each family: gradient steps, the shape of batches, options, and the most that the error one
# step ahead may be of a copy's. A token model's bins alone cost 0.006 and what it draws from them
# more; a JEPA's is that of its embeddings.
GATES: dict[str, tuple[int, tuple[int, int], dict[str, Any], float]] = {
    "jepa": (1000, (16, 16), {}, 0.02),
    "token": (600, (8, 32), {"learning_rate": 3e-3}, 0.1),
    "diffusion": (400, (16, 16), {}, 0.02),
}


@pytest.mark.parametrize("family", GATES)
def test_pendulum_is_known(family: str) -> None:
    steps, shape, options, limit = GATES[family]
    agent, _ = trained(f"{family}:tiny", steps, shape, **options)
    found = card(agent)
    what = "obs" if agent.world_model.decodes_obs else "features"
    print(family, {name: round(value, 4) for name, value in found.numbers.items()})
    assert found.numbers[f"{what}@1"] < limit
    assert found.curves[what].max() < 0.5
    assert found.numbers["reward@1"] < 0.2 and found.numbers["reward@15"] < 0.5
    assert found.numbers["rank"] > 2 and found.numbers["probe"] > 0.9
