"""`resume` as a person types it."""

import pytest
from smoke import command, here, train


@pytest.mark.slow
def test_resume_with_changed_rate_needs_permission(smoke, tmp_path, capfd):
    typed = ("budget=smoke", "metrics=none", f"resume={smoke.run}", "training.steps=3", "training.optimizer.lr=1e-3")
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("train.py", *typed) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: resume={smoke.run} is a checkpoint of another training: ")
        assert "training.optimizer.lr: 0.002 -> 0.001; training.steps: 2 -> 3" in said
        run = train(*typed[1:], "resume_allow_changes=[training.optimizer.lr,training.steps]")
        assert "resuming from step 2 " in capfd.readouterr().out
        row = (run / "metrics.jsonl").read_text().splitlines()[-1]
        assert '"step": 3' in row
        assert command("train.py", "budget=smoke", "metrics=none", "resume=must", "seed=5") == 2
        said = capfd.readouterr().err
    assert "error: resume=must: no valid checkpoint in runs/" in said
    assert (
        "has, and differs from this config in seed: 0 -> 5; "
        "training.optimizer.lr: 0.001 -> 0.002; training.steps: 3 -> 2" in said
    )
