"""What it takes to train: environments, the online loop, evaluation, logs, the command line."""

_MOVED = dict(
    curves="pictures.curves",
    online="run.trainer",
    plan_picture="pictures.plan_picture",
    plots="pictures.plots",
    runs="run.lifecycle",
    video="pictures.video",
)
