"""`momentum_update_`: kernel in the interpreter and CPU reference, against the formulas written out in float64."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.offline import TracedKernels, traced_kernels
from tests.support.poison import poisoned_allocations
from triton_curv_kernels.backend import UnsupportedInputError
from triton_curv_kernels.momentum import launch_momentum_update_, momentum_update_
from triton_curv_kernels.pointer_table import ListConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# a parameter is rounded once: half a unit in the last place, plus fp32 noise
TOLERANCE = {torch.float64: 1e-15, torch.float32: 4e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SHAPES = [(7, 5), (300,), (), (0, 4), (1,), (6, 5, 3, 3), (4, 1, 2)]

Update = Callable[..., None]

both = pytest.mark.parametrize(
    "update_",
    [
        pytest.param(momentum_update_, id="reference"),
        pytest.param(launch_momentum_update_, id="default", marks=pytest.mark.interpreter),
        pytest.param(
            partial(launch_momentum_update_, config=ListConfig(BLOCK=64, num_warps=1)),
            id="small blocks",
            marks=pytest.mark.interpreter,
        ),
    ],
)


class Lists(NamedTuple):
    """Arguments of `momentum_update_`, in their order."""

    params: list[Tensor]
    momenta: list[Tensor]
    updates: list[Tensor]
    scales: list[Tensor]
    hyper: Tensor


def hyper(lr: float = 0.1, momentum: float = 0.9, decay: float = 0.02, of_m: float = 0.8, of_u: float = 0.3) -> Tensor:
    return torch.tensor([lr, momentum, decay, of_m, of_u])


def lists(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, wide: torch.dtype | None = None) -> Lists:
    """Random tensors; momenta of dtype `wide`, fp32 if it is not told."""
    generator = torch.Generator().manual_seed(0)
    wide = wide or torch.float32
    params, momenta, updates = (
        [torch.randn(shape, generator=generator).to(d) for shape in shapes] for d in (dtype, wide, dtype)
    )
    return Lists(params, momenta, updates, list(torch.rand(len(shapes), generator=generator).unbind()), hyper())


def check(update_: Update, args: Lists, coupled: bool = False, rescale: list[float] | None = None) -> None:
    """In place, as the formulas say; updates, scales and hyper stay."""
    lr, momentum, decay, of_m, of_u = args.hyper.double()
    targets = []
    for p, m, u, s, length in zip(*args[:4], rescale or [0.0] * len(args.params), strict=True):
        step = s.double() * u.double() + (decay * p.double() if coupled else 0.0)
        m_new = momentum * m.double() + step
        p_new = p.double() * (1.0 if coupled else 1 - lr * decay) - lr * (of_m * m_new + of_u * step)
        if length > 0:
            p_new = length * p_new / (p_new.norm() + 1e-9)
        targets.append((p_new, m_new))
    kept = [t.clone() for t in (*args.updates, *args.scales, args.hyper)]

    update_(*args, **({"coupled": coupled} if coupled else {}), **({"rescale": rescale} if rescale else {}))

    for p, m, (p_new, m_new) in zip(args.params, args.momenta, targets, strict=True):
        torch.testing.assert_close(p.double(), p_new, rtol=TOLERANCE[p.dtype], atol=TOLERANCE[p.dtype] / 8)
        torch.testing.assert_close(m.double(), m_new, rtol=TOLERANCE[m.dtype], atol=TOLERANCE[m.dtype])
    for before, after in zip(kept, (*args.updates, *args.scales, args.hyper), strict=True):
        assert torch.equal(before, after)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formulas(update_: Update, dtype: torch.dtype) -> None:
    check(update_, lists(SHAPES, dtype))


@both
def test_no_tensors(update_: Update) -> None:
    update_([], [], [], [], hyper())


@both
def test_hyper_may_have_gaps(update_: Update) -> None:
    args = lists([(5, 3)])
    room = torch.full((5, 2), 7.0)
    room[:, 0] = args.hyper
    check(update_, args._replace(hyper=room[:, 0]))


@both
def test_mixed_dtypes_in_one_list(update_: Update) -> None:
    args = lists([(5, 3), (20,), (4,)])
    args.params[1] = args.params[1].bfloat16()
    args.updates[0] = args.updates[0].half()
    check(update_, args)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "column of more": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "row of more": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "four axes": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


@both
@pytest.mark.parametrize("of_momentum", VIEWS)
@pytest.mark.parametrize("of_param", VIEWS)
def test_any_strides(update_: Update, of_param: str, of_momentum: str) -> None:
    args = lists([(6, 5, 3, 2)])
    args.params[0] = VIEWS[of_param](args.params[0])
    args.momenta[0] = VIEWS[of_momentum](args.momenta[0])
    args.updates[0] = VIEWS["transposed"](args.updates[0])
    check(update_, args)


def test_large_tensors_go_by_pieces_on_a_cpu() -> None:
    args = lists([(300, 701), (500, 3, 100), (200_000,), (2, 90_000)])
    args.momenta[0] = VIEWS["row of more"](args.momenta[0])
    args.updates[0] = VIEWS["row of more"](args.updates[0])
    check(momentum_update_, args)
    args.hyper[2] = args.hyper[4] = 0.0  # no decay, no look ahead
    check(momentum_update_, args)


@both
def test_nothing_beside_a_view_is_written(update_: Update) -> None:
    memory = torch.full((2, 9, 12), float("nan"))
    args = lists([(7, 5)])
    views = [memory[0, 1:8, 2:12:2], memory[1, 1:8, 2:12:2]]
    for view, values in zip(views, (args.params[0], args.momenta[0]), strict=True):
        view.copy_(values)
    check(update_, args._replace(params=[views[0]], momenta=[views[1]]))
    assert memory.isnan().sum() == memory.numel() - 2 * 35


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coupled_decay(update_: Update, dtype: torch.dtype) -> None:
    check(update_, lists(SHAPES, dtype), coupled=True)


@both
@pytest.mark.parametrize("coupled", [False, True])
def test_rescaled_weights(update_: Update, coupled: bool) -> None:
    """Some are rescaled, dense or not, of one block or more; others are left alone."""
    args = lists([(7, 5), (300,), (), (0, 4), (6, 5, 3, 3)])
    args.params[0] = VIEWS["row of more"](args.params[0])
    args.params[4] = VIEWS["channels last"](args.params[4])
    with poisoned_allocations():
        check(update_, args, coupled, rescale=[2.0, 5.0, 0.0, 3.0, 12**0.5])
    assert args.params[4].norm().item() == pytest.approx(12**0.5, rel=1e-6)


@both
def test_rescaled_bfloat16_is_the_stored_weight_rescaled(update_: Update) -> None:
    args = lists([(7, 5), (300,)], torch.bfloat16)
    plain = [p.clone() for p in args.params]
    update_(plain, [m.clone() for m in args.momenta], *args[2:])
    update_(*args, rescale=[2.0, 0.0])
    expected = (2.0 / (plain[0].double().norm() + 1e-9)) * plain[0].double()
    torch.testing.assert_close(args.params[0].double(), expected, rtol=2**-8, atol=0)
    assert torch.equal(args.params[1], plain[1])


@both
def test_second_call_equals_the_first(update_: Update) -> None:
    first, second = (lists([(7, 5), (1000,), (33, 9)]) for _ in "ab")
    for args in (first, second):
        update_(*args, rescale=[1.0, 2.0, 3.0])
    for a, b in zip((*first.params, *first.momenta), (*second.params, *second.momenta), strict=True):
        assert torch.equal(a, b)


@both
def test_scales_from_anywhere(update_: Update) -> None:
    """Views of one vector, one value for all, tensors of their own, of several dtypes."""
    for scales in (
        list(torch.rand(6)[::2].unbind()),
        list(torch.rand(()).expand(3).unbind()),
        [torch.tensor(0.5, dtype=d) for d in (torch.float32, torch.float64, torch.float16)],
    ):
        check(update_, lists([(7, 5), (3,), (40,)])._replace(scales=scales))


@both
@pytest.mark.parametrize("start", [1, 4])
def test_beginnings_at_any_byte(update_: Update, start: int) -> None:
    """A parameter at a multiple of 16 bytes among others that are not, and the other way round."""
    args = lists([(600,), (600,)])
    args.params[0] = torch.cat([torch.zeros(start), args.params[0]])[start:]
    args.momenta[1] = torch.cat([torch.zeros(start), args.momenta[1]])[start:]
    check(update_, args)


@both
def test_idle_hyper_changes_nothing(update_: Update) -> None:
    """lr 0, momentum 1, scale 0: how an optimizer skips a step without looking at a flag."""
    args = lists([(7, 5), (3,)])._replace(hyper=hyper(0.0, 1.0, 0.0, 0.0, 0.0), scales=[torch.zeros(())] * 2)
    before = [t.clone() for t in (*args.params, *args.momenta)]
    update_(*args)
    for old, new in zip(before, (*args.params, *args.momenta), strict=True):
        assert torch.equal(old, new)


@both
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_is_torch_sgd(update_: Update, nesterov: bool, decay: float) -> None:
    args = lists([(7, 5), (3,)])
    params = [torch.nn.Parameter(p.clone()) for p in args.params]
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=decay)
    args = args._replace(
        momenta=[torch.zeros_like(p) for p in params],
        scales=[torch.ones(())] * 2,
        hyper=hyper(decay=decay, of_m=0.9 if nesterov else 1.0, of_u=float(nesterov)),
    )
    for _ in range(3):
        for p, u in zip(params, args.updates, strict=True):
            p.grad = u
        sgd.step()
        update_(*args, coupled=True)
    for mine, theirs in zip(args.params, params, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_reference_takes_float64() -> None:
    args = lists([(7, 5)], torch.float64, torch.float64)
    args = args._replace(hyper=args.hyper.double())
    check(momentum_update_, args)
    check(momentum_update_, args, coupled=True, rescale=[3.0])


def test_bad_input_is_named() -> None:
    good = lists([(3, 2), (4,)])
    bad: list[tuple[Lists, str]] = [
        (good._replace(scales=good.scales[:1]), "2 updates, 1 scales"),
        (good._replace(hyper=good.hyper[:4]), r"expected hyper \(5,\) .* got \(4,\)"),
        (good._replace(updates=good.updates[::-1]), r"at place 0, got \(3, 2\), \(3, 2\), \(4,\)"),
        (good._replace(scales=[s[None] for s in good.scales]), r"0-dim scale .* \(1,\)"),
    ]
    for args, message in bad:
        for update_ in (momentum_update_, launch_momentum_update_):
            with pytest.raises(UnsupportedInputError, match=message):
                update_(*args)
    for update_ in (momentum_update_, launch_momentum_update_):
        with pytest.raises(UnsupportedInputError, match="expected 2 lengths to rescale to, got 1"):
            update_(*good, rescale=[1.0])
    with pytest.raises(UnsupportedInputError, match=r"got \['torch.float64'\]"):
        launch_momentum_update_(*lists([(3,)], torch.float64, torch.float64))
    elsewhere = good._replace(scales=[good.scales[0], torch.empty((), device="meta")])
    with pytest.raises(UnsupportedInputError, match="scales on cpu, got one at place 1 on meta"):
        launch_momentum_update_(*elsewhere)


def test_options_are_part_of_the_op() -> None:
    args = lists([(7, 5), (3,), (6, 5, 3, 3)])
    torch.library.opcheck(
        torch.ops.triton_curv.momentum_update_, tuple(args), {"coupled": True, "rescale": [1.0, 0, 2]}
    )


def test_a_cuda_graph_holds_a_launch_for_each_tensor_and_one_more_if_it_is_rescaled() -> None:
    def step(*tensors: Tensor) -> None:
        params, momenta, updates, scales = ([*tensors[3 * i : 3 * i + 3]] for i in range(4))
        momentum_update_(params, momenta, updates, scales, tensors[-1], rescale=[1.0, 0.0, 2.0])

    def arguments() -> list[Tensor]:
        shapes: list[tuple[int, ...]] = [(7, 5), (3,), (6, 5, 3, 3)]
        triple = [torch.empty(s, device="cuda") for s in shapes]
        views = [torch.empty_strided((7, 5), (6, 1), device="cuda"), *triple[1:]]
        return [
            *triple,
            *views,
            *triple,
            *(torch.empty((), device="cuda") for _ in shapes),
            torch.empty(5, device="cuda"),
        ]

    assert traced_kernels(step, arguments) == TracedKernels(3 + 2, [])
