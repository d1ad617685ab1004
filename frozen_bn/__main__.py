"""``python -m frozen_bn`` prints the configuration."""

from . import show_config

print(show_config())
