"""Speed against baselines, measured in one run and shown only where the results agree."""

_MOVED = dict(
    soak="gpu.soak",
    stand_in="harness.stand_in",
    wheels="gpu.wheels",
)
