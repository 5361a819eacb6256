"""What the README shows works: its example environment is checked and trained on as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from worldflux_dist import config, local
from worldflux_dist.envs import EnvConfig, report

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.learning
def test_the_example_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n# dock\.py\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "dock.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = report.check(EnvConfig(id="dock:Dock", max_episode_steps=50))
    assert found.usable and not found.warnings, found.lines()
    settings = config.load(
        [README.parent / "configs" / "tdmpc2_tiny.yaml"],
        [
            "env.id=dock:Dock",
            "env.max_episode_steps=50",
            "train.env_steps=160",
            "train.prefill=100",
            "train.train_ratio=8",
            "train.eval_episodes=2",
        ],
    )
    result = local.train(settings)
    assert result.limiter.gradient_steps == 2
    assert len(result.evaluation.returns) == 2


def test_every_config_it_names_exists() -> None:
    named = set(re.findall(r"configs/[\w/]+\.yaml", README.read_text()))
    assert named
    for name in named:
        assert (README.parent / name).exists(), name
