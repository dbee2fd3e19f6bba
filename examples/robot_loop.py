"""Runs an exported plan at a fixed rate, with numpy and onnxruntime alone, and reports missed deadlines.

    tdmpc2-fast export runs/walker-walk/default/1 out=plan.onnx
    python robot_loop.py plan.onnx 5 100      # decisions a second, how many

The functions `read` and `act` are yours to fill in; here a stand-in takes their place.
"""

import json
import sys
import time

import numpy as np
import onnxruntime

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
rng = np.random.default_rng()


# ---- yours: what the robot sees, and what it does
def read(shape, dtype):
    """Return the observation, in the shape and type of the input `obs`."""
    return rng.integers(0, 256, shape, dtype) if dtype == np.uint8 else rng.standard_normal(shape, dtype)


def act(action):
    """Do what the plan decided: (A,) in [-1, 1]."""
    assert np.isfinite(action).all()


# ---- the loop
def draw(law, shape, dtype):
    """Draw an input of random numbers by the law that the file names."""
    kind, *numbers = law.split(":")
    if kind == "normal":
        return rng.standard_normal(shape, dtype)
    if kind == "exponential":
        return rng.standard_exponential(shape, dtype)
    if kind == "integers":  # from the first number to the second
        return rng.integers(int(numbers[0]), int(numbers[1]) + 1, shape, dtype)
    assert kind == "pairs", law  # two different ones of so many critics
    return rng.random((shape[0], int(numbers[0]))).argsort(-1)[:, :2].astype(dtype)


def main(path, rate=10.0, decisions=100, task=0, evaluate=True):
    """Plan `rate` times a second, and print how long plans took and how many came too late."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between plans the cores are the robot's
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    laws = json.loads(session.get_modelmeta().custom_metadata_map["draws"])
    inputs = {x.name: (x.shape, DTYPES[x.type]) for x in session.get_inputs()}
    if "prev_mean" not in inputs or rate <= 0:
        sys.exit(f"got {path!r} and {rate:g}, allowed: the file of a plan (not the prior's) and a rate above 0")
    given = {"task": np.array([task])} if "task" in inputs else {}
    mean = np.zeros(*inputs["prev_mean"])  # of the first step of an episode
    session.run(None, {n: np.zeros(*x) for n, x in inputs.items()})  # the first call allocates
    period, took, missed = 1 / rate, [], 0
    due = time.perf_counter()
    for _ in range(decisions):
        due += period
        start = time.perf_counter()
        given |= {"obs": read(*inputs["obs"]), "prev_mean": mean}
        given |= {name: draw(law, *inputs[name]) for name, law in laws.items()}
        if evaluate:
            given["action_noise"][:] = 0
        action, mean = session.run(["action", "mean"], given)
        act(action[0])
        took.append(1e3 * (end := time.perf_counter()) - 1e3 * start)
        missed += end > due
        due = max(due, end)  # a plan that came too late moves those that follow
        time.sleep(due - end)
    p50, p99 = np.percentile(took, [50, 99])
    print(f"{decisions} decisions at {rate:g} a second: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {missed} deadlines missed")


if __name__ == "__main__":
    main(sys.argv[1], *(kind(word) for kind, word in zip((float, int, int), sys.argv[2:], strict=False)))
