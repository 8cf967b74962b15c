"""The calls of every op on the listed real nets, on tensors without memory: what a GPU would compile for them.

A launcher that is called on tensors of device "meta" asks for its default configuration and launches; who intercepts
the launches (`profiles.compile_defaults`) learns each kernel, its constants and the types of its arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from profiles.kernel_cases.shapes import (
    ConvShape,
    FactorShape,
    LinearShape,
    gpt2_factors,
    gpt2_linears,
    llama7b_layer_factors,
    llama7b_layer_linears,
    resnet50_convs,
    resnet50_factors,
    resnet50_linears,
    vit_b16_factors,
    vit_b16_linears,
)
from profiles.parameter_lists import Shapes, gpt2_124m, resnet50, vit_b16
from triton_curv_kernels.apply_inverse import launch_apply_damped_inverse
from triton_curv_kernels.cg import launch_cg_direction, launch_cg_dots, launch_cg_update
from triton_curv_kernels.damped_inverse import launch_damped_inverse_
from triton_curv_kernels.factor import launch_accumulate_factor_
from triton_curv_kernels.factor_group import launch_accumulate_factors_
from triton_curv_kernels.momentum import launch_momentum_update_
from triton_curv_kernels.neumann import launch_neumann_update_
from triton_curv_kernels.packed import packed_length
from triton_curv_kernels.patch import launch_accumulate_patch_factor_
from triton_curv_kernels.patch_geometry import PatchGeometry
from triton_curv_kernels.symmetric import launch_pack_symmetric, launch_unpack_symmetric

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (32, 256)

empty = partial(torch.empty, device="meta")


class Call(NamedTuple):
    """One call of a launcher; `op` as in `torch.ops.triton_curv`."""

    op: str
    case: str
    launch: Callable[[], object]


def net_factors() -> dict[str, list[FactorShape]]:
    """All factors of the listed nets."""
    resnets = {f"ResNet-50 batch {batch}": resnet50_factors(batch) for batch in BATCHES}
    others = {"GPT-2": gpt2_factors(), "ViT-B/16": vit_b16_factors(), "LLaMA-7B layer": llama7b_layer_factors()}
    return resnets | others


def net_gradients() -> dict[str, tuple[list[tuple[int, int]], list[int]]]:
    """(r, c) of each layer with two factors, and channels of each norm layer."""

    def of(linears: Sequence[LinearShape]) -> list[tuple[int, int]]:
        return [(linear.out_features, linear.in_features + linear.bias) for linear in linears]

    convs = resnet50_convs(32)
    return {
        "ResNet-50": (
            [(c.out_channels, c.patch) for c in convs] + of(resnet50_linears(32)),
            [c.out_channels for c in convs],
        ),
        "GPT-2": (of(gpt2_linears()), [768] * 25),
        "ViT-B/16": (of(vit_b16_linears()), [768] * 25),
        "LLaMA-7B layer": (of(llama7b_layer_linears()), []),
    }


def net_parameters() -> dict[str, Shapes]:
    """Every parameter of each net."""
    llama: Shapes = [(layer.out_features, layer.in_features) for layer in llama7b_layer_linears()]
    others = {"ViT-B/16": vit_b16(), "LLaMA-7B layer": [*llama, (4096,), (4096,)]}
    return {"ResNet-50": resnet50(), "GPT-2": gpt2_124m(), **others}


def calls() -> Iterator[Call]:
    """Every op on the listed nets, in fp32, bf16 and fp16 and in all its variants."""
    yield from _single_factors()
    yield from _grouped_factors()
    yield from _patch_factors()
    yield from _packing()
    yield from _inverses()
    yield from _applications()
    yield from _updates()


def _name(*words: object) -> str:
    return " ".join(str(word).removeprefix("torch.") for word in words if word != "")


def _factor(shape: FactorShape, packed: bool) -> Tensor:
    size = shape.n + shape.ones
    return empty(packed_length(size)) if packed else empty(size, size)


def _single_factors() -> Iterator[Call]:
    """Each factor of a net by itself."""
    seen = set()
    for net, shapes in net_factors().items():
        for shape, dtype, packed in product(shapes, DTYPES, (False, True)):
            if (key := (shape[1:], dtype, packed)) in seen:
                continue
            seen.add(key)
            rows, factor = empty(shape.k, shape.n, dtype=dtype), _factor(shape, packed)
            launch = partial(launch_accumulate_factor_, factor, rows, 0.05, 0.95, shape.ones)
            yield Call("accumulate_factor_", _name(net, shape.name, dtype, "packed" if packed else ""), launch)


def _grouped_factors() -> Iterator[Call]:
    """All factors of a net at once; as K-FAC asks for them, with and without statistics."""
    for (net, shapes), dtype, packed, statistics in product(
        net_factors().items(), DTYPES, (False, True), (False, True)
    ):
        rows = [empty(shape.k, shape.n, dtype=dtype) for shape in shapes]
        factors = [_factor(shape, packed) for shape in shapes]
        ones = [shape.ones for shape in shapes]
        numbers = empty(len(shapes)), empty(len(shapes))
        traces = empty(len(shapes)) if statistics else None
        launch = partial(launch_accumulate_factors_, factors, rows, *numbers, ones, traces)
        words = ("packed" if packed else "", "statistics" if statistics else "")
        yield Call("accumulate_factors_", _name(net, dtype, *words), launch)


def _patch_factors() -> Iterator[Call]:
    """Factor A of each convolution of ResNet-50, and of ViT's patch embedding as the convolution that it is.

    Those of a batch of 4 with channels far apart are too few to be copied.
    """
    seen = set()
    convs = [conv for batch in (*BATCHES, 4) for conv in resnet50_convs(batch)]
    for conv in [*convs, ConvShape("patch_embed", 64, 3, 224, 224, 768, 16, 16, 0)]:
        layouts = ((False, False),) if conv.batch == 4 else ((False, True), (True, True), (False, False))
        for dtype, (ones, nearby) in product(DTYPES, layouts):
            if (key := (conv[1:5], conv[6:], dtype, ones, nearby)) in seen:
                continue
            seen.add(key)
            order = torch.channels_last if nearby else torch.contiguous_format
            sizes = (conv.batch, conv.in_channels, conv.height, conv.width)
            input = empty(sizes, dtype=dtype).to(memory_format=order)
            kernel, stride = (conv.kernel_size,) * 2, (conv.stride,) * 2
            geometry = PatchGeometry.of(sizes[2:], kernel, stride, (conv.padding,) * 4, (1, 1))
            factor = empty(1, conv.patch + ones, conv.patch + ones)
            launch = partial(launch_accumulate_patch_factor_, factor, input, geometry, 0.05, 0.95, ones)
            words = ("ones" if ones else "", "" if nearby else "contiguous")
            yield Call("accumulate_patch_factor_", _name(conv.name, conv.batch, dtype, *words), launch)


def _packing() -> Iterator[Call]:
    """To a buffer of each dtype and back; the scale a number or on the device."""
    nets = {net: shapes for net, shapes in net_factors().items() if net != "ResNet-50 batch 256"}
    casts = [(torch.float32, buffer) for buffer in DTYPES] + [(dtype, dtype) for dtype in DTYPES[1:]]
    for (net, shapes), (dtype, buffer), on_device in product(nets.items(), casts, (False, True)):
        sizes = [shape.n + shape.ones for shape in shapes]
        matrices, packed = (
            [empty(n, n, dtype=dtype) for n in sizes],
            empty(sum(map(packed_length, sizes)), dtype=buffer),
        )
        scale = empty(()) if on_device else 0.5
        words = (net, dtype, buffer, "device scale" if on_device else "")
        yield Call("pack_symmetric", _name(*words), partial(launch_pack_symmetric, matrices, buffer, scale))
        yield Call("unpack_symmetric", _name(*words), partial(launch_unpack_symmetric, packed, sizes, dtype, scale))


def _inverses() -> Iterator[Call]:
    """All factors of a net, banks of like size; one step shows all kernels."""
    nets = {net: shapes for net, shapes in net_factors().items() if net != "ResNet-50 batch 256"}
    for (net, shapes), order in product(nets.items(), (2, 3)):
        sizes = [shape.n + shape.ones for shape in shapes]
        banks = [(sizes.count(n), n) for n in sorted(set(sizes))]
        inverses, factors = ([empty(b, n, n) for b, n in banks] for _ in range(2))
        arguments = inverses, factors, [empty(b) for b, _ in banks], 1, order
        yield Call("damped_inverse_", _name(net, "order", order), partial(launch_damped_inverse_, *arguments))


def _applications() -> Iterator[Call]:
    """All layers of a net, with and without norm layers."""
    for (net, (shapes, norms)), dtype, clipped in product(net_gradients().items(), DTYPES, (False, True)):
        of = partial(empty, dtype=dtype)
        grads = [of(shape) for shape in (*shapes, *((n, 2, 1) for n in norms))]
        inverse_a = [of(c, c) for _, c in shapes] + [of(0) for _ in norms]
        inverse_g = [of(r, r) for r, _ in shapes] + [of(n, 2, 2) for n in norms]
        clip = (empty(()), empty(())) if clipped else (None, None)
        launch = partial(launch_apply_damped_inverse, [torch.empty_like(g) for g in grads], grads, inverse_a, inverse_g)
        yield Call("apply_damped_inverse", _name(net, dtype, "clip" if clipped else ""), partial(launch, *clip))


def _updates() -> Iterator[Call]:
    """All parameters of a net: of one dtype, mixed, and with gradients of another dtype."""
    mixtures: dict[str, tuple[Sequence[torch.dtype], Sequence[torch.dtype]]] = {
        **{_name(dtype): ((dtype,), (dtype,)) for dtype in DTYPES},
        "mixed": (DTYPES, DTYPES),
        "float32, gradients bfloat16": ((torch.float32,), (torch.bfloat16,)),
    }
    for net, shapes in net_parameters().items():
        wide = [empty(shape) for shape in shapes]
        scalar, hyper = empty(()), empty(5)
        for mixture, (of_params, of_grads) in mixtures.items():
            params, grads = (
                [empty(shape, dtype=dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
                for dtypes in (of_params, of_grads)
            )
            for coupled, rescaled in product((False, True), (False, True)):
                rescale = [1.0] * len(shapes) if rescaled else None
                launch = partial(
                    launch_momentum_update_,
                    *(params, wide, grads, [scalar] * len(shapes), hyper),
                    coupled=coupled,
                    rescale=rescale,
                )
                words = ("coupled" if coupled else "", "rescale" if rescaled else "")
                yield Call("momentum_update_", _name(net, mixture, *words), launch)
            launch = partial(launch_neumann_update_, params, wide, wide, grads, scalar, hyper)
            yield Call("neumann_update_", _name(net, mixture), launch)
        yield Call("cg_update_", net, partial(launch_cg_update, wide, wide, wide, wide, scalar, empty(())))
        yield Call("cg_direction_", net, partial(launch_cg_direction, wide, wide, scalar))
        yield Call("cg_dots", net, partial(launch_cg_dots, wide, wide))
