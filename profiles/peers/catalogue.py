"""The peers: package, how each is built for a task, and what a user has to do to train with it.

Settings are each library's defaults or its paper's; there are 10 steps between roots, inverses or eigenbases, and
weights do not decay. Parameters that a peer does not take go to Adam at the same rate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_curv.scenarios import Scenario
from triton_curv.training.optimizers import OPTIMIZERS

INTERVAL = 10


class UnsupportedTaskError(Exception):
    """A peer can't train this model, or this loss, or with such batches."""


@runtime_checkable
class OwnStep(Protocol):
    """An optimizer that wants to make the forward and backward pass itself."""

    def train_on(self, x: Tensor, y: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """One training step on a batch; returns its loss."""


Build = Callable[[nn.Module, float, Scenario], Any]


@dataclass(frozen=True)
class Peer:
    """One optimizer; `package` is its distribution on PyPI, "" for ours and torch's."""

    name: str
    package: str
    build: Build

    @property
    def version(self) -> str:
        """Of the installed package; empty where it is not installed."""
        try:
            return metadata.version(self.package or "torch")
        except metadata.PackageNotFoundError:
            return ""


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices and higher tensors, and the rest."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]


class Several:
    """Optimizers that share a model."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts

    def step(self) -> None:
        """All of them."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """All of them."""
        for part in self.parts:
            part.zero_grad()


def _ours(name: str) -> Build:
    return lambda model, lr, task: OPTIMIZERS[name](model, lr, task.budget, **task.options.get(name, {}))


def _soap(model: nn.Module, lr: float, task: Scenario) -> Any:
    from pytorch_optimizer import SOAP

    interval = 2 * INTERVAL if task.budget < 80 else INTERVAL
    return SOAP(model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=interval)


def _muon(model: nn.Module, lr: float, task: Scenario) -> Any:
    from pytorch_optimizer import Muon

    matrices, rest = _split(model)
    groups: list[dict[str, Any]] = [{"params": matrices, "use_muon": True, "lr": lr}]
    if rest:
        groups.append({"params": rest, "use_muon": False, "lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})
    return Muon(groups, lr=lr, use_adjusted_lr=True)


def _torch_muon(model: nn.Module, lr: float, task: Scenario) -> Any:
    matrices, rest = _split(model)
    if any(p.ndim != 2 for p in matrices):
        raise UnsupportedTaskError("torch.optim.Muon takes 2-D parameters only")
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Several(muon, torch.optim.Adam(rest, lr=lr)) if rest else muon


def _kron(model: nn.Module, lr: float, task: Scenario) -> Any:
    from pytorch_optimizer import Kron

    return Kron(model.parameters(), lr=lr, pre_conditioner_update_probability=1 / INTERVAL)


def _heavyball_soap(model: nn.Module, lr: float, task: Scenario) -> Any:
    import heavyball

    heavyball.utils.compile_mode = None  # its compiled form takes 19 s before the third step of a small MLP
    return heavyball.SOAP(model.parameters(), lr=lr, precondition_frequency=INTERVAL)


def _singd(model: nn.Module, lr: float, task: Scenario) -> Any:
    from singd.optim.optimizer import SINGD

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    taken = [p for layer in layers for p in layer.parameters()]
    rest = [p for p in model.parameters() if all(p is not t for t in taken)]
    singd = SINGD(model, taken, lr=lr, T=INTERVAL // 2, warn_unsupported=False)
    return Several(singd, torch.optim.Adam(rest, lr=lr)) if rest else singd


class _LBFGS:
    """torch's L-BFGS with a strong Wolfe line search."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model = model
        self.inner = torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=1, line_search_fn="strong_wolfe")

    def train_on(self, x: Tensor, y: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        def closure() -> Tensor:
            self.inner.zero_grad()
            loss = objective(self.model(x))
            loss.backward()
            return loss

        return torch.as_tensor(self.inner.step(closure))


def _lbfgs(model: nn.Module, lr: float, task: Scenario) -> Any:
    if task.batch_size < task.train_rows:
        raise UnsupportedTaskError("L-BFGS wants the same batch at every step")
    return _LBFGS(model, lr)


class _ASDL:
    """asdfghjkl's K-FAC gradient maker before SGD; its NVTX calls crash a CPU build of torch and are taken out."""

    def __init__(self, model: nn.Module, lr: float, task: Scenario) -> None:
        nothing = lambda *args, **kwargs: None  # noqa: E731
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing
        import asdl

        if task.penalty is not None or task.loss not in (nn.functional.cross_entropy, nn.functional.mse_loss):
            raise UnsupportedTaskError("asdfghjkl knows cross-entropy and mean squared error")
        config = asdl.PreconditioningConfig(
            data_size=task.batch_size, damping=1e-2, preconditioner_upd_interval=INTERVAL, curvature_upd_interval=1
        )
        self.maker = asdl.KfacGradientMaker(model, config)
        self.model, self.loss = model, task.loss
        self.inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def train_on(self, x: Tensor, y: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        self.inner.zero_grad()
        output = self.maker.setup_model_call(self.model, x)
        self.maker.setup_loss_call(self.loss, output, y)
        _, loss = self.maker.forward_and_backward()
        self.inner.step()
        return torch.as_tensor(loss)


class _Curvlinops:
    """curvlinops' K-FAC of one batch, rebuilt every 10 steps, its inverse applied to the gradient before SGD."""

    def __init__(self, model: nn.Module, lr: float, task: Scenario) -> None:
        losses: Mapping[Any, Callable[[], nn.Module]] = {
            nn.functional.cross_entropy: nn.CrossEntropyLoss,
            nn.functional.mse_loss: nn.MSELoss,
        }
        if task.penalty is not None or task.loss not in losses:
            raise UnsupportedTaskError("curvlinops' K-FAC knows MSE, cross-entropy and binary cross-entropy")
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.taken = [p for layer in layers for p in layer.parameters()]
        rest = [p for p in model.parameters() if all(p is not t for t in self.taken)]
        self.model, self.loss = model, losses[task.loss]()
        sgd = torch.optim.SGD(self.taken, lr=lr, momentum=0.9)
        self.inner = Several(sgd, torch.optim.Adam(rest, lr=lr)) if rest else Several(sgd)
        self.steps, self.inverse = 0, None

    def train_on(self, x: Tensor, y: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

        if self.steps % INTERVAL == 0:
            operator = KFACLinearOperator(self.model, self.loss, self.taken, [(x, y)], check_deterministic=False)
            self.inverse = KFACInverseLinearOperator(operator, damping=1e-2, use_heuristic_damping=True)
        self.steps += 1
        self.inner.zero_grad()
        loss = objective(self.model(x))
        loss.backward()
        assert self.inverse is not None
        directions = self.inverse @ [p.grad for p in self.taken]
        for p, direction in zip(self.taken, directions, strict=True):
            p.grad = direction.detach()
        self.inner.step()
        return loss


def _kfac_pytorch(model: nn.Module, lr: float, task: Scenario) -> Any:
    from kfac.preconditioner import KFACPreconditioner

    preconditioner = KFACPreconditioner(model, inv_update_steps=INTERVAL, damping=3e-3, lr=lr)
    return Several(preconditioner, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))


def _shampoo(model: nn.Module, lr: float, task: Scenario) -> Any:
    from distributed_shampoo import AdamPreconditionerConfig, DistributedShampoo

    grafting = AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8)
    return DistributedShampoo(
        model.parameters(), lr=lr, precondition_frequency=INTERVAL, max_preconditioner_dim=256, grafting_config=grafting
    )


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        *(Peer(name, "", _ours(name)) for name in ("sgd", "adamw", "kfac")),
        Peer("soap", "pytorch-optimizer", _soap),
        Peer("muon", "pytorch-optimizer", _muon),
        Peer("kron", "pytorch-optimizer", _kron),
        Peer("torch-muon", "", _torch_muon),
        Peer("lbfgs", "", _lbfgs),
        Peer("heavyball-soap", "heavyball", _heavyball_soap),
        Peer("singd", "singd", _singd),
        Peer("asdl-kfac", "asdfghjkl", _ASDL),
        Peer("curvlinops-kfac", "curvlinops-for-pytorch", _Curvlinops),
        Peer("kfac-pytorch", "kfac-pytorch", _kfac_pytorch),
        Peer("shampoo", "distributed-shampoo", _shampoo),
    )
}
"""By name, in the order of the tables."""

CENTRES: Mapping[tuple[str, str], float] = {
    ("muon", "autoencoder-mnist5k"): 1e-2,
    ("torch-muon", "autoencoder-mnist5k"): 1e-2,
    ("soap", "autoencoder-mnist5k"): 3e-3,
}
"""Centres of grids that differ from AdamW's, whose size SOAP's and Muon's steps are made to match."""


def centre(peer: str, task: Scenario) -> float:
    """Centre of a peer's grid: the scenario's own, a hand-set one, a multiple of SGD's, or AdamW's."""
    if peer in task.learning_rates:
        return task.learning_rates[peer]
    of_sgd = {"lbfgs": 10.0, "singd": 0.1, "asdl-kfac": 0.1, "curvlinops-kfac": 0.1, "kfac-pytorch": 0.1, "kron": 0.1}
    if peer in of_sgd:
        return of_sgd[peer] * task.learning_rates["sgd"]
    return CENTRES.get((peer, task.name), task.learning_rates["adamw"])
