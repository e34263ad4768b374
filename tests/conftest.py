"""Fixtures that every suite may use, and how hypothesis runs: a slow machine is no failure."""

from hypothesis import settings

settings.register_profile("warmkv", deadline=None)
settings.load_profile("warmkv")
