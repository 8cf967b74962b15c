"""Where each hyper-parameter lies in a row of `HyperParameters`."""

# The first five are what `momentum_update_` takes; `average` is 1 - momentum. `corrects` is 1 where the momentum is an
# average that starts at zero: `corrected` divides the two weights before by the sum of its weights, and puts that sum
# as it was before the step, 1 - momentum^steps, into `settled`. `damping_factor` multiplies both dampings.
# `signal_scale` is what a GradScaler multiplies the loss with; `sign` is -1 where the loss is maximised.
SLOTS = (
    "lr",
    "momentum",
    "weight_decay",
    "momentum_weight",
    "update_weight",
    "average",
    "settled",
    "corrects",
    "lr_squared",
    "damping",
    "relative_damping",
    "damping_factor",
    "signal_scale",
    "sign",
    "beta1",
    "beta2",
    "one_minus_beta1",
    "one_minus_beta2",
    "eps",
)
SLOT = {name: i for i, name in enumerate(SLOTS)}
OF_UPDATE = 5
