"""Peers train as our own trainer does: same weights, batches, loss and penalty."""

import csv
from pathlib import Path

import pytest

from profiles import peer_curves
from profiles.peers.catalogue import PEERS
from profiles.peers.trials import PeerTrainer
from triton_curv.scenarios import get_scenario
from triton_curv.training.trainer import Trainer


@pytest.mark.parametrize("name", ["adamw", "kfac"])
def test_a_peer_of_ours_takes_the_trainer_s_steps_on_a_loss_with_a_penalty(name: str) -> None:
    task = get_scenario("bnn-mnist5k")
    data = task.load()
    rate = task.learning_rates[name]
    ours = Trainer(task, data, name, rate, 0, task.budget)
    losses = [float(ours.step(ours.draw())) for _ in range(3)]
    peer = PeerTrainer(task, data, PEERS[name], rate, 0)
    assert [float(peer.step(peer.draw())) for _ in range(3)] == losses
    assert peer.evaluate() == ours.evaluate()


def test_curves_are_drawn_of_runs_at_the_best_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the peers that have one, from runs that are made once."""
    rows = [("reg-bos", "adamw", "0.01", "0.5"), ("reg-bos", "kfac", "0.03", "1.0"), ("reg-bos", "soap", "", "")]
    with (tmp_path / "peers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("task", "peer", "lr", "step_ms"), *rows])
    picture, runs = tmp_path / "curves.png", tmp_path / "runs"
    files = ["--csv", str(tmp_path / "peers.csv"), "--runs", str(runs), "--out", str(picture)]
    monkeypatch.setattr("sys.argv", ["peer_curves", "reg-bos", "--seeds", "2", *files])
    peer_curves.main()
    assert sorted(path.name for path in runs.iterdir()) == [
        f"{peer}.reg-bos.{rate}.{seed}.json" for peer, rate in (("adamw", "0.01"), ("kfac", "0.03")) for seed in (0, 1)
    ]
    assert picture.read_bytes()[1:4] == b"PNG"
