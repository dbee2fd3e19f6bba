"""Names of DMControl's tasks: a domain, then a task of it, `_` written `-`."""

_STANDARD = """
acrobot-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cheetah-run
cup-catch dog-run dog-stand dog-trot dog-walk finger-spin finger-turn-easy finger-turn-hard fish-swim hopper-hop
hopper-stand humanoid-run humanoid-stand humanoid-walk pendulum-swingup quadruped-run quadruped-walk
reacher-easy reacher-hard walker-run walker-stand walker-walk
"""
_CUSTOM = """
walker-walk-backwards walker-run-backwards cheetah-run-backwards cheetah-run-front cheetah-run-back
cheetah-jump hopper-hop-backwards reacher-three-easy reacher-three-hard cup-spin pendulum-spin
"""
_MORE = """
acrobot-swingup-sparse cartpole-three-poles cartpole-two-poles dog-fetch fish-upright humanoid-run-pure-state
humanoid-CMU-run humanoid-CMU-stand humanoid-CMU-walk manipulator-bring-ball
manipulator-bring-peg manipulator-insert-ball manipulator-insert-peg point-mass-easy point-mass-hard
quadruped-escape quadruped-fetch stacker-stack-2 stacker-stack-4 swimmer-swimmer15 swimmer-swimmer6
"""
CUSTOM = tuple(_CUSTOM.split())
"""The 11 that the paper adds to the suite (`custom.py`)."""
TASKS = (*_STANDARD.split(), *CUSTOM)
"""The 39 that the paper trains on."""
MORE = tuple(_MORE.split())
"""What else the suite has, but lqr, whose actions have no bounds; these step by dm_control's own code."""

_DOMAINS = {"cup": "ball_in_cup"}
_OF_TWO_WORDS = ("humanoid-CMU", "point-mass")


def domain_and_task(name: str) -> tuple[str, str]:
    """Return the suite's own names of a task: `ball_in_cup`, `catch` of cup-catch."""
    domain = next((d for d in _OF_TWO_WORDS if name.startswith(f"{d}-")), name.partition("-")[0])
    return _DOMAINS.get(domain, domain.replace("-", "_")), name[len(domain) + 1 :].replace("-", "_")
