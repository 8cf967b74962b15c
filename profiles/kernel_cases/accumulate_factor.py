"""`accumulate_factor_` and `accumulate_factors_` on the factors of real nets, against torch.mm and addmm."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from profiles.kernel_cases.case import Case
from profiles.kernel_cases.shapes import (
    FactorShape,
    gpt2_factors,
    llama7b_layer_factors,
    resnet50_factors,
    vit_b16_factors,
)
from triton_curv_kernels import accumulate_factor_, accumulate_factors_
from triton_curv_kernels.packed import packed_length, to_dense

BETA = 0.95
LEAST = 8 * torch.finfo(torch.float32).eps  # eight roundings, which the order of the library's sums may have by luck
SYRKS = [
    (FactorShape("n=K=8192", 8192, 8192, False), "at least 1150 symmetric-equivalent TFLOP/s on an H200"),
    (FactorShape("n=1024 K=32768", 32768, 1024, False), "at least 1.5 times torch.mm on an H200"),
    (FactorShape("n=2048 K=8192", 8192, 2048, False), "at least 1.5 times torch.mm on an H200"),
]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Single products, then whole nets in one call; on CPU small ones against the naive way."""
    if device.type != "cuda":
        for k, n in ((2048, 288), (128, 785), (4096, 577)):
            shape = FactorShape(f"n={n} K={k}", k, n, False)
            yield _single(shape, torch.float32, device, packed=False)
            yield _single(shape, torch.float32, device, packed=True, bar="at most 1.15 times the dense form's time")
        yield _grouped("ResNet-50 batch 1, 32 x 32", resnet50_factors(1, 32), torch.float32, device)
        return
    for shape, bar in SYRKS:
        yield _single(shape, torch.bfloat16, device, packed=False, bar=bar)
        if not quick:
            yield _single(shape, torch.bfloat16, device, packed=True)
            yield _single(shape, torch.float32, device, packed=False)
    bar = "at least 3 times a loop of torch.mm on an H200"
    yield _grouped("ResNet-50 batch 32", resnet50_factors(32), torch.bfloat16, device, bar)
    if quick:
        return
    yield _grouped("ResNet-50 batch 256", resnet50_factors(256), torch.bfloat16, device, bar)
    yield _grouped("ResNet-50 batch 32, packed", resnet50_factors(32), torch.bfloat16, device, packed=True)
    yield _grouped("GPT-2 124M, 8 x 1024 tokens", gpt2_factors(), torch.bfloat16, device)
    yield _grouped("ViT-B/16 batch 64", vit_b16_factors(), torch.bfloat16, device)
    yield _grouped("LLaMA-7B layer, 4 x 2048 tokens", llama7b_layer_factors(), torch.bfloat16, device)


def _rows(shape: FactorShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape.k, shape.n, device=device, dtype=dtype)


def _factor(shape: FactorShape, packed: bool, device: torch.device) -> Tensor:
    size = shape.n + shape.ones
    return torch.zeros(packed_length(size) if packed else (size, size), device=device)


def _flops(shape: FactorShape) -> float:
    """Multiplications and additions of one triangle."""
    size = shape.n + shape.ones
    return shape.k * size * (size + 1.0)


def _bytes(shape: FactorShape, itemsize: int) -> float:
    """Rows once, one triangle of the factor read and written."""
    return float(shape.k * shape.n * itemsize + 2 * 4 * packed_length(shape.n + shape.ones))


def _with_ones(rows: Tensor, ones: bool) -> Tensor:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1) if ones else rows


def _addmm(factor: Tensor, rows: Tensor, ones: bool) -> None:
    """What a user writes: the product in the rows' dtype, added in fp32."""
    x = _with_ones(rows, ones)
    factor.mul_(BETA).add_(x.T @ x, alpha=1 - BETA)


def _error(result: Tensor, rows: Tensor, ones: bool) -> float:
    """Relative to the largest number of the oracle, float64."""
    x = _with_ones(rows, ones).double()
    oracle = x.T @ x
    return float((result.double() - oracle).abs().max() / oracle.abs().max())


def _product_error(rows: Tensor, ones: bool) -> float:
    """The error of the best product a user has that keeps fp32: cuBLAS's from the rows' dtype, if there is one."""
    x = _with_ones(rows, ones)
    if x.device.type == "cuda" and x.dtype != torch.float32:
        return _error(torch.mm(x.T, x, out_dtype=torch.float32), rows, ones)
    return _error(x.float().T @ x.float(), rows, ones)


def _single(shape: FactorShape, dtype: torch.dtype, device: torch.device, packed: bool, bar: str = "") -> Case:
    rows, factor = _rows(shape, dtype, device), _factor(shape, packed, device)
    scratch = _factor(shape, False, device)

    def error() -> float:
        accumulate_factor_(factor, rows, 1.0, 0.0, shape.ones)
        return _error(to_dense(factor) if packed else factor, rows, shape.ones)

    alternatives: dict[str, Callable[[], object]] = {
        "mm": partial(torch.mm, rows.T, rows),
        "mul_.add_(mm)": partial(_addmm, scratch, rows, shape.ones),
    }
    if packed:
        alternatives["dense form"] = partial(accumulate_factor_, scratch, rows, 1 - BETA, BETA, shape.ones)
    name = f"{shape.name} {str(dtype).removeprefix('torch.')}{' packed' if packed else ''}"
    return Case(
        op="accumulate_factor_",
        name=name,
        ours=partial(accumulate_factor_, factor, rows, 1 - BETA, BETA, shape.ones),
        alternatives=alternatives,
        error=error,
        allowed_error=lambda: max(LEAST, 2 * _product_error(rows, shape.ones)),
        flops=_flops(shape),
        bytes=_bytes(shape, dtype.itemsize),
        bound="fp32" if dtype == torch.float32 else "tensor",
        bar=bar,
    )


def _grouped(
    name: str,
    shapes: Sequence[FactorShape],
    dtype: torch.dtype,
    device: torch.device,
    bar: str = "",
    packed: bool = False,
) -> Case:
    """All factors of a net in one call. Layers whose inputs have one shape share the rows' memory, to fit any GPU."""
    distinct = {(shape.k, shape.n): _rows(shape, dtype, device) for shape in shapes}
    rows = [distinct[shape.k, shape.n] for shape in shapes]
    ones = [shape.ones for shape in shapes]
    factors = [_factor(shape, packed, device) for shape in shapes]
    alphas = torch.full((len(shapes),), 1 - BETA, device=device)
    betas = torch.full((len(shapes),), BETA, device=device)
    products: list[Tensor] = [torch.empty(x.shape[1], x.shape[1], device=device, dtype=dtype) for x in rows]
    scratch = [_factor(shape, False, device) for shape in shapes] if packed else factors
    checked = {place for _, places in _by_size(shapes) for place in places[:1]}
    checked.add(min(range(len(shapes)), key=lambda place: shapes[place].n))

    def loop_of_mm() -> None:
        for x, product in zip(rows, products, strict=True):
            torch.mm(x.T, x, out=product)

    def loop_of_addmm() -> None:
        for x, factor, one in zip(rows, scratch, ones, strict=True):
            _addmm(factor, x, one)

    def error() -> float:
        accumulate_factors_(factors, rows, 1.0, 0.0, ones)
        dense = {place: to_dense(factors[place]) if packed else factors[place] for place in checked}
        return max(_error(result, rows[place], ones[place]) for place, result in dense.items())

    def allowed_error() -> float:
        return max(LEAST, 2 * max(_product_error(rows[place], ones[place]) for place in checked))

    return Case(
        op="accumulate_factors_",
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        ours=partial(accumulate_factors_, factors, rows, alphas, betas, ones),
        alternatives={"loop of mm": loop_of_mm, "loop of mul_.add_(mm)": loop_of_addmm},
        error=error,
        allowed_error=allowed_error,
        flops=sum(map(_flops, shapes)),
        bytes=sum(_bytes(shape, dtype.itemsize) for shape in shapes),
        bound="fp32" if dtype == torch.float32 else "tensor",
        bar=bar,
    )


def _by_size(shapes: Sequence[FactorShape]) -> Iterator[tuple[int, list[int]]]:
    """Places of factors of like size, none with so many numbers that an oracle would take long."""
    light = [place for place, shape in enumerate(shapes) if shape.k * shape.n <= 1 << 26]
    for size, places in groupby(sorted(light, key=lambda place: shapes[place].n), key=lambda place: shapes[place].n):
        yield size, list(places)
