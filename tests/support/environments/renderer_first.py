"""Imported before dm_control, which takes its renderer when it is imported."""

from tdmpc2_fast.train.envs.mujoco_setup import prepare_rendering

prepare_rendering()
