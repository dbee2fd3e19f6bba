"""What makes a run learn nothing, or not what it should, said once and as soon as it is certain."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.replay import ReplayBuffer

from .episode import Played


class Doubts:
    """Watches a run for what its config and its rewards say of its learning.

    Args:
        cfg: a completed config.
        say: told each doubt in a line, and what it is about; says nothing of the same thing twice.
    """

    def __init__(self, cfg: Config, say: Callable[[str, str], None]) -> None:
        self.cfg, self._say = cfg, say
        self._longest = 0
        # Of a bin in symlog space; plain regression has no end.
        self._range = (_symexp(cfg.vmin), _symexp(cfg.vmax)) if cfg.num_bins > 1 else (-math.inf, math.inf)
        if why := self._why_too_short():
            say(f"nothing will be learned: {why}", "steps")

    def episode(self, episode: Played) -> None:
        """Look at the rewards of an episode that has ended, and at what they add up to."""
        self._longest = max(self._longest, len(episode))
        discount = self.cfg.discounts[episode.task or 0]
        low, high = self._range
        # No return can be larger than this: rewards on a device need not be waited for.
        if episode.peak <= 0.999 * (1 - discount) * min(-low, high):
            return
        rewards = episode.rewards
        # Behind the end of time it goes on as it was.
        returns, following = np.empty_like(rewards), 0.0 if episode.terminates else rewards.mean() / (1 - discount)
        for t in reversed(range(len(rewards))):
            returns[t] = following = rewards[t] + discount * following
        for what, values in (("reward", rewards), ("discounted return", returns)):
            beyond = values[(values < low) | (values > high)]
            if len(beyond):
                both = np.concatenate([rewards, returns])
                ends = [("vmin=-", -both.min()), ("vmax=", both.max())]
                limits = " ".join(f"{key}{math.ceil(math.log1p(x)) + 1}" for key, x in ends if x > high)
                self._say(
                    f"got a {what} of {beyond[0]:,.6g}, beyond the bins, which end at {low:,.0f} and {high:,.0f} "
                    "(symexp of vmin and vmax): it is learned as if it were there. Scale rewards down, or train with "
                    f"{limits or 'a larger vmax'}",
                    "bins",
                )

    def seeded(self, decisions: int, buffer: ReplayBuffer) -> None:
        """Check, after a decision before the first update, that the replay can give a slice."""
        if decisions > (self.cfg.seed_steps or 0) and buffer.num_eps and not buffer.num_sampleable:
            meanwhile = "" if self.cfg.has_weights else "; actions stay random until one is"
            self._say(
                f"nothing is learned so far: no episode was as long as horizon={self.cfg.horizon} decisions{meanwhile}"
                f". horizon={max(1, self._longest)} fits the longest one",
                "episodes",
            )

    def why_nothing_learned(self, buffer: ReplayBuffer) -> str:
        """Return why a run that has ended made no update."""
        if why := self._why_too_short():
            return why
        if buffer.num_eps and not buffer.num_sampleable:
            return f"no episode was as long as horizon={self.cfg.horizon} decisions"
        return "no episode ended before the run did" if not buffer.num_eps else f"utd={self.cfg.utd}"

    def _why_too_short(self) -> str | None:
        """Return why a run of `steps` decisions ends before its first update; None where it need not."""
        cfg = self.cfg
        seed, length, envs = cfg.seed_steps or 0, min(cfg.episode_lengths or (cfg.episode_length or 0,)), cfg.num_envs
        # An update takes more than `seed_steps` decisions, and an episode that has ended.
        before, ended = seed // envs * envs, (cfg.horizon if cfg.episodic else length) * envs
        if cfg.steps > max(before, ended):
            return None
        kind = "" if cfg.has_weights else " random"
        what = f"seed_steps={seed}{kind} decisions" if before > ended else f"the end of an episode, {ended} decisions"
        return f"steps={cfg.steps}, and the first update comes after {what}; allowed: steps above {max(before, ended)}"


def _symexp(x: float) -> float:
    return math.copysign(math.expm1(abs(x)), x)
