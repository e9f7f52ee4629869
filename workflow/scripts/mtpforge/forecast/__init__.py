"""Forecast: sizes, disk, memory and time of a build, before a byte of weights is fetched."""
