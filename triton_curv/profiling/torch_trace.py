"""Time by stage from torch.profiler: our ranges, backward and forward operations around them, and their kernels."""

from torch.profiler import profile

from triton_curv.nvtx import DOMAIN
from triton_curv.profiling.stages import Launch, Range, StageTime, time_by_stage

US = 1e-6
BACKWARD, FORWARD = "backward", "forward and rest"
ENGINE = "autograd::engine::evaluate_function"


def read_trace(recorded: profile) -> dict[str, StageTime]:
    """Seconds by stage: exclusive host time, and device time of what each stage launched.

    Outside our ranges, what autograd's engine runs is "backward" and every other operation "forward and rest"; Python's
    own time between those operations is not counted.
    """
    ranges, launches = [], []
    for event in recorded.events() or ():
        ours = event.name.startswith(f"{DOMAIN}::") and event.is_user_annotation
        if ours or (event.cpu_parent is None and not event.is_user_annotation):
            name = event.name.removeprefix(f"{DOMAIN}::") if ours else _around(event.name)
            ranges.append(Range(name, event.thread, event.time_range.start * US, event.time_range.end * US))
        launches += [Launch(event.thread, event.time_range.start * US, k.duration * US) for k in event.kernels]
    return time_by_stage(ranges, launches)


def _around(name: str) -> str:
    return BACKWARD if name.startswith(ENGINE) else FORWARD
