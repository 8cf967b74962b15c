"""How kernels ask: what they say of a call, how often, and when they ask anew."""

import ast
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import triton_curv_kernels
from tests.support.tuning import FACTOR, FACTORS, PATCH, factor_problem, other_config, resolver_on, small_problem
from triton_curv_autotune import install
from triton_curv_autotune.bench import copied
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_kernels import choice
from triton_curv_kernels.choice import choose_once, set_chooser
from triton_curv_kernels.factor import default_config

PROBLEM = factor_problem()
OF_OTHER_OPS = {
    PATCH: {"factor", "factor_tiles", "packed"},  # for kernels of one pixel, which are problems of that op
    FACTORS: {"factor"},  # checks and names only
}
UPDATES = ("momentum_update_", "neumann_update_", "cg_update_", "cg_direction_", "cg_dots")


@pytest.fixture
def asked() -> Iterator[list[tuple[str, Any]]]:
    """What a chooser is asked; it answers with the op's default."""
    calls: list[tuple[str, Any]] = []

    def answer(op: str, problem: Any) -> Any:
        calls.append((op, problem))
        return get_op(op).default(problem)

    set_chooser(answer)
    yield calls
    install()


def ask(call: Any = "a call") -> Any:
    return choose_once(FACTOR, call, lambda: PROBLEM, default_config)


def test_a_call_is_asked_about_once_each_way(asked: list[tuple[str, Any]]) -> None:
    for call in ("a", "b", "a", "b"):
        ask(call)
    assert len(asked) == 2
    torch.use_deterministic_algorithms(True)
    ask("a")
    ask("a")
    torch.use_deterministic_algorithms(False)
    ask("a")
    assert len(asked) == 3
    ask(["sizes without a hash"])
    ask(["sizes without a hash"])
    assert len(asked) == 5


def test_answers_are_few(asked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MOST_ANSWERS", 4)
    for call in range(11):
        ask(call)
    assert len(choice._answers) <= 4


@pytest.mark.filterwarnings("ignore::triton_curv_autotune.TuningWarning")
def test_whatever_changes_a_choice_is_seen_by_the_next_call(tmp_path: Path) -> None:
    resolver = resolver_on(tmp_path)
    other = other_config(FACTOR, PROBLEM)
    set_chooser(resolver.resolve)
    try:
        default = ask()
        with resolver.override(FACTOR, other):
            assert ask() == other
        assert ask() == default != other
        resolver.learn(FACTOR, PROBLEM, other)
        assert ask() == other
        resolver.reload()
        assert ask() == other  # learned
    finally:
        install()


class NoKernel:
    """Takes any launch, and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.mark.parametrize("name", op_names())
def test_launchers_ask_for_what_the_declaration_describes(
    name: str, asked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls of the same shapes ask once; only lists of parameters, whose key would cost as much, ask each time."""
    op = get_op(name)
    for module in op.modules:
        for attribute, value in list(vars(module).items()):
            if attribute == "wrap_triton":
                monkeypatch.setattr(module, attribute, lambda kernel: NoKernel())
            elif isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, attribute, NoKernel())
    inputs = op.make_inputs(small_problem(name), torch.device("cpu"))
    arguments = inputs
    if name == PATCH:
        factor, input, geometry, *others = inputs
        padding = [side for before in geometry.before for side in (before, before)]
        arguments = (factor, input, geometry.kernel, geometry.stride, padding, geometry.dilation, *others)
    for _ in range(2):
        op.launch(copied(inputs), None)
    assert asked == op.describe(arguments) * (2 if name in UPDATES else 1)
    assert {op for op, _ in asked} == {name}


@pytest.mark.parametrize("name", op_names())
def test_the_source_of_an_op_is_all_files_its_kernels_are_in(name: str) -> None:
    """Else an entry would outlive a change of the kernel that it was measured with."""
    folder = Path(triton_curv_kernels.__file__).parent
    declared = {Path(str(module.__file__)).stem for module in get_op(name).modules}
    reached, waiting = set[str](), [Path(str(get_op(name).modules[0].__file__)).stem]
    while waiting:
        stem = waiting.pop()
        if stem not in reached:
            reached.add(stem)
            waiting += imports(folder / f"{stem}.py")
    with_kernels = {stem for stem in reached if "@triton.jit" in (folder / f"{stem}.py").read_text()}
    assert with_kernels - OF_OTHER_OPS.get(name, set()) <= declared
    assert len(with_kernels & declared) >= 1


def imports(file: Path) -> list[str]:
    """Files of the package that a file imports."""
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    modules = [str(node.module).split(".") for node in found if str(node.module).startswith("triton_curv_kernels")]
    names = [alias.name for node in found if node.module == "triton_curv_kernels" for alias in node.names]
    stems = [parts[1] for parts in modules if len(parts) > 1] + names
    return [stem for stem in stems if (file.parent / f"{stem}.py").exists()]


def test_described_again_a_bucket_is_itself() -> None:
    """make_inputs gives tensors of the very problem, so that tuning and look-up speak of the same."""
    for name in op_names():
        op = get_op(name)
        problem = op.bucket(small_problem(name))
        inputs = op.make_inputs(problem, torch.device("cpu"))
        if name == PATCH:
            continue
        ((described, again),) = op.describe(inputs)
        assert described == name
        assert again == problem or dataclasses.replace(op.bucket(again), **same_totals(problem)) == problem, name


def same_totals(problem: Any) -> dict[str, Any]:
    """Sizes of all tensors together, which a whole number of matrices does not always meet."""
    names = {field.name for field in dataclasses.fields(problem)}
    return {name: getattr(problem, name) for name in ("numel", "side", "batch") if name in names}
