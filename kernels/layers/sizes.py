"""The sizes of a world model, which plans and updates add theirs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What a world model is made of; names as in the config."""

    obs_dim: int  # 0: latents come from outside (pixels)
    action_dim: int
    latent_dim: int
    mlp_dim: int
    enc_dim: int
    num_enc_layers: int
    num_q: int
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    simnorm_dim: int = 8
    task_dim: int = 0
    episodic: bool = False
    horizon: int = 3
    log_std_min: float = -10.0
    log_std_max: float = 2.0

    @property
    def encoder_widths(self) -> list[int]:
        """Widths of the observation, of each layer between, of the latent; none for pixels."""
        between = max(self.num_enc_layers - 1, 1) * [self.enc_dim]
        return [self.obs_dim, *between, self.latent_dim] if self.obs_dim else []
