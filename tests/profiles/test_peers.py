"""Peers train as our own trainer does: same weights, batches, loss and penalty."""

import pytest

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
