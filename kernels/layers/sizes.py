"""The sizes of a world model, which plans and updates add theirs to, and those of the published ones."""

from __future__ import annotations

from dataclasses import dataclass

MODEL_SIZES: dict[int, dict[str, int]] = {
    1: dict(enc_dim=256, mlp_dim=384, latent_dim=128, num_enc_layers=2, num_q=2),
    5: dict(enc_dim=256, mlp_dim=512, latent_dim=512, num_enc_layers=2, num_q=5),
    19: dict(enc_dim=1024, mlp_dim=1024, latent_dim=768, num_enc_layers=3, num_q=5),
    48: dict(enc_dim=1792, mlp_dim=1792, latent_dim=768, num_enc_layers=4, num_q=5),
    317: dict(enc_dim=4096, mlp_dim=4096, latent_dim=1376, num_enc_layers=5, num_q=8),
}
"""Architecture by model size in millions of parameters (paper, Table 9)."""

SHIFT_PAD = 3
"""Pixels by which an image is shifted at most, to either side."""


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
    num_bins: int
    vmin: float
    vmax: float
    simnorm_dim: int
    task_dim: int
    episodic: bool
    horizon: int
    log_std_min: float
    log_std_max: float

    @property
    def encoder_widths(self) -> list[int]:
        """Widths of the observation, of each layer between, of the latent; none for pixels."""
        between = max(self.num_enc_layers - 1, 1) * [self.enc_dim]
        return [self.obs_dim, *between, self.latent_dim] if self.obs_dim else []
