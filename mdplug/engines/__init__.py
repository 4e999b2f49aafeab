"""Engines: each converts a state, asks for pairs, calls a deployed potential and converts back."""
