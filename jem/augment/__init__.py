"""Batched augmentation on the device: every image and every view has its own parameters."""
