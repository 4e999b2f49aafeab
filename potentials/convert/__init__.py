"""Upstream checkpoints -> mdplug potentials, read by an inert reader."""
